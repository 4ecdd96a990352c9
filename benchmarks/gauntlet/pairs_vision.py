"""Image models of torchvision, timm and transformers against each other."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import nn

from benchmarks.gauntlet.pair import Pair, images, input_of, pick
from benchmarks.gauntlet.truth import add_axes, concat, drop, rename, reshape, split, squeeze

CLASSES = 10


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


def both(pair: Pair, new: str | None = None) -> list[Pair]:
    """A pair and its reverse; ``new`` is what the reverse has no source for."""
    return [pair, pair.reverse(new=new)]


# ResNet ---------------------------------------------------------------------------------------------------------------
def tv_resnet(block: str = "BasicBlock", depths: tuple[int, ...] = (2, 2, 2, 2), width: int = 64) -> nn.Module:
    from torchvision.models import resnet

    return resnet.ResNet(getattr(resnet, block), list(depths), num_classes=CLASSES, width_per_group=width)


def timm_resnet(block: str = "BasicBlock", depths: tuple[int, ...] = (2, 2, 2, 2), **options: object) -> nn.Module:
    from timm.models import resnet

    return resnet.ResNet(getattr(resnet, block), depths, num_classes=CLASSES, **options)


def hf_resnet(block: str = "basic", depths: tuple[int, ...] = (2, 2, 2, 2)) -> nn.Module:
    import transformers

    widths = [64, 128, 256, 512] if block == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=widths, depths=list(depths), layer_type=block, num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


RESNET_TO_HF = rename(
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^layer(\d+)\.(\d+)\.", lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    (r"^fc\.", "classifier.1."),
)


def resnets() -> list[Pair]:
    out = both(
        Pair(
            "resnet18/torchvision-to-transformers",
            tv_resnet,
            hf_resnet,
            (RESNET_TO_HF,),
            images(),
            target_call=pick("logits"),
            source_sample=images(),
            tags=_tags("resnet", "rename"),
        )
    )
    out += both(
        Pair(
            "resnet50/timm-to-transformers",
            partial(timm_resnet, "Bottleneck", (3, 4, 6, 3)),
            partial(hf_resnet, "bottleneck", (3, 4, 6, 3)),
            (RESNET_TO_HF,),
            images(),
            target_call=pick("logits"),
            tags=_tags("resnet", "rename", "original size"),
        )
    )
    out.append(
        Pair(
            "resnet18/timm-to-torchvision",
            timm_resnet,
            tv_resnet,
            (),
            images(),
            tags=_tags("resnet", "identity"),
        )
    )
    return out


# ConvNeXt -------------------------------------------------------------------------------------------------------------
CONVNEXT = ((16, 1), (24, 2), (32, 3), (40, 1))


def tv_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    widths = [w for w, _ in CONVNEXT] + [None]
    blocks = [CNBlockConfig(w, widths[i + 1], d) for i, (w, d) in enumerate(CONVNEXT)]
    return ConvNeXt(blocks, num_classes=CLASSES)


def timm_convnext(**options: object) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(
        depths=tuple(d for _, d in CONVNEXT), dims=tuple(w for w, _ in CONVNEXT), num_classes=CLASSES, **options
    )


def hf_convnext(classes: int = CLASSES) -> nn.Module:
    import transformers

    config = transformers.ConvNextConfig(
        hidden_sizes=[w for w, _ in CONVNEXT],
        depths=[d for _, d in CONVNEXT],
        layer_norm_eps=1e-6,
        num_labels=classes,
    )
    return transformers.ConvNextForImageClassification(config)


def _tv_convnext_path(match: re.Match[str]) -> str:
    number = int(match[1])
    return f"stages.{number // 2}.downsample." if number % 2 == 0 else f"stages.{number // 2}.blocks."


CONVNEXT_TV_TO_TIMM = rename(
    (r"^features\.0\.", "stem."),
    (r"^features\.(\d+)\.", _tv_convnext_path),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
CONVNEXT_TIMM_TO_HF = rename(
    (r"^stem\.0\.", "convnext.embeddings.patch_embeddings."),
    (r"^stem\.1\.", "convnext.embeddings.layernorm."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"convnext.encoder.stages.\1.layers.\2."),
    (r"^stages\.(\d+)\.downsample\.", r"convnext.encoder.stages.\1.downsampling_layer."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.(weight|bias)$", r".layernorm.\1"),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"^head\.layernorm\.", "convnext.layernorm."),
    (r"^head\.fc\.", "classifier."),
)


def convnexts() -> list[Pair]:
    tags = _tags("convnext", "rename", "reshape")
    out = both(
        Pair(
            "convnext/torchvision-to-timm",
            tv_convnext,
            timm_convnext,
            (CONVNEXT_TV_TO_TIMM, squeeze(r"\.gamma$")),
            images(),
            tags=tags,
        )
    )
    out += both(
        Pair(
            "convnext/timm-to-transformers",
            timm_convnext,
            hf_convnext,
            (CONVNEXT_TIMM_TO_HF,),
            images(),
            target_call=pick("logits"),
            tags=_tags("convnext", "rename"),
        )
    )
    out += both(
        Pair(
            "convnext/torchvision-to-timm_convolutions",
            tv_convnext,
            partial(timm_convnext, conv_mlp=True),
            (CONVNEXT_TV_TO_TIMM, squeeze(r"\.gamma$"), add_axes(r"mlp\.fc\d\.weight$")),
            images(),
            tags=tags,
        )
    )
    out.append(
        Pair(
            "convnext/torchvision-to-transformers_new_head",
            tv_convnext,
            partial(hf_convnext, 7),
            (CONVNEXT_TV_TO_TIMM, squeeze(r"\.gamma$"), CONVNEXT_TIMM_TO_HF, drop(r"^classifier\.")),
            images(),
            source_call=input_of("classifier.2"),
            target_call=input_of("classifier"),
            new=r"^classifier\.",
            tags=tags | {"partial"},
        )
    )
    return out


# ViT ------------------------------------------------------------------------------------------------------------------
def tv_vit(size: int = 32, patch: int = 8, depth: int = 3, heads: int = 3, width: int = 24, mlp: int = 72) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(size, patch, depth, heads, width, mlp, num_classes=CLASSES)


def timm_vit(
    size: int = 32, patch: int = 8, depth: int = 3, heads: int = 3, width: int = 24, mlp: int = 72, **options: object
) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = {"num_classes": CLASSES, **options}
    return VisionTransformer(
        img_size=size, patch_size=patch, depth=depth, num_heads=heads, embed_dim=width, mlp_ratio=mlp / width, **options
    )


def hf_vit(
    size: int = 32, patch: int = 8, depth: int = 3, heads: int = 3, width: int = 24, mlp: int = 72, **options: object
) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        image_size=size,
        patch_size=patch,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_size=width,
        intermediate_size=mlp,
        layer_norm_eps=1e-6,
        num_labels=CLASSES,
        **options,
    )
    return transformers.ViTForImageClassification(config)


VIT_TV_TO_TIMM = rename(
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
VIT_TIMM_TO_HF = (
    split(
        r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)",
        [rf"blocks.\1.attention.{part}_proj.\2" for part in "qkv"],
    ),
    rename(
        (r"^cls_token$", "vit.embeddings.cls_token"),
        (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
        (r"^blocks\.", "vit.layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"^norm\.", "vit.layernorm."),
        (r"^head\.", "classifier."),
    ),
)
KEY_BIAS_HF = r"(k_proj|key)\.bias$"  # adds the same to all logits of a row, softmax removes it


def vits() -> list[Pair]:
    out = both(
        Pair(
            "vit/torchvision-to-timm",
            tv_vit,
            timm_vit,
            (VIT_TV_TO_TIMM,),
            images(32),
            tags=_tags("vit", "rename"),
        )
    )
    out += both(
        Pair(
            "vit/timm-to-transformers",
            timm_vit,
            hf_vit,
            VIT_TIMM_TO_HF,
            images(32),
            target_call=pick("logits"),
            insensitive=KEY_BIAS_HF,
            tags=_tags("vit", "split"),
        )
    )
    out += both(
        Pair(
            "vit/torchvision-to-transformers",
            tv_vit,
            hf_vit,
            (VIT_TV_TO_TIMM, *VIT_TIMM_TO_HF),
            images(32),
            target_call=pick("logits"),
            insensitive=KEY_BIAS_HF,
            tags=_tags("vit", "split"),
        )
    )
    size = {"size": 64, "patch": 16, "depth": 12, "heads": 12, "width": 768, "mlp": 3072}
    out.append(
        Pair(
            "vit_b_16/torchvision-to-timm",
            partial(tv_vit, **size),
            partial(timm_vit, **size),
            (VIT_TV_TO_TIMM,),
            images(64),
            tags=_tags("vit", "rename", "original size"),
        )
    )
    out.append(
        Pair(
            "vit_b_16/timm-to-transformers",
            partial(timm_vit, **size),
            partial(hf_vit, **size),
            VIT_TIMM_TO_HF,
            images(64),
            target_call=pick("logits"),
            insensitive=KEY_BIAS_HF,
            tags=_tags("vit", "split", "original size"),
        )
    )
    out.append(
        Pair(
            "vit/transformers-to-timm_encoder_only",
            hf_vit,
            partial(timm_vit, num_classes=0),
            (*_inverse_vit_names(), drop(r"^classifier\.")),
            images(32),
            source_call=input_of("classifier"),
            new=r"^$",
            tags=_tags("vit", "concat", "partial"),
        )
    )
    return out


def _inverse_vit_names() -> tuple:
    return (
        concat(
            [r"vit\.layers\.(\d+)\.attention\.q_proj\.(weight|bias)"]
            + [rf"vit.layers.\1.attention.{part}_proj.\2" for part in "kv"],
            r"blocks.\1.attn.qkv.\2",
        ),
        rename(
            (r"^vit\.embeddings\.cls_token$", "cls_token"),
            (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
            (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"^vit\.layers\.", "blocks."),
            (r"\.layernorm_before\.", ".norm1."),
            (r"\.layernorm_after\.", ".norm2."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"^vit\.layernorm\.", "norm."),
        ),
    )


# Swin -----------------------------------------------------------------------------------------------------------------
SWIN = {"embed_dim": 16, "depths": [2, 4, 2], "num_heads": [2, 4, 8]}


def tv_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(patch_size=[4, 4], window_size=[4, 4], num_classes=CLASSES, **SWIN)


def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=64, patch_size=4, window_size=4, num_classes=CLASSES, **SWIN)


def hf_swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(image_size=64, patch_size=4, window_size=4, num_labels=CLASSES, **SWIN)
    return transformers.SwinForImageClassification(config)


SWIN_TV_TO_TIMM = (
    drop(r"relative_position_index$"),
    rename(
        (r"^features\.0\.0\.", "patch_embed.proj."),
        (r"^features\.0\.2\.", "patch_embed.norm."),
        (
            r"^features\.(\d+)\.",
            lambda m: f"layers.{int(m[1]) // 2}." + ("downsample." if int(m[1]) % 2 == 0 else "blocks."),
        ),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.3\.", ".mlp.fc2."),
        (r"^head\.", "head.fc."),
    ),
)
SWIN_TIMM_TO_HF = (
    split(r"(.*)\.attn\.qkv\.(weight|bias)", [rf"\1.attention.{part}_proj.\2" for part in "qkv"]),
    rename(
        (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "swin.embeddings.norm."),
        (r"^layers\.(\d+)\.downsample\.", lambda m: f"swin.encoder.layers.{int(m[1]) - 1}.downsample."),
        (r"^layers\.", "swin.encoder.layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.relative", ".attention.relative_position_bias.relative"),
        (r"^norm\.", "swin.layernorm."),
        (r"^head\.fc\.", "classifier."),
    ),
)


def swins() -> list[Pair]:
    out = both(
        Pair(
            "swin/torchvision-to-timm",
            tv_swin,
            timm_swin,
            SWIN_TV_TO_TIMM,
            images(64),
            tags=_tags("swin", "rename"),
        )
    )
    out += both(
        Pair(
            "swin/timm-to-transformers",
            timm_swin,
            hf_swin,
            SWIN_TIMM_TO_HF,
            images(64),
            target_call=pick("logits"),
            insensitive=KEY_BIAS_HF,
            tags=_tags("swin", "split"),
        )
    )
    out.append(
        Pair(
            "swin/torchvision-to-transformers",
            tv_swin,
            hf_swin,
            (*SWIN_TV_TO_TIMM, *SWIN_TIMM_TO_HF),
            images(64),
            target_call=pick("logits"),
            insensitive=KEY_BIAS_HF,
            tags=_tags("swin", "split"),
        )
    )
    return out


# VGG, DenseNet --------------------------------------------------------------------------------------------------------
VGG = [8, "M", 12, "M", 16, 16, "M", 24, 24, "M", 24, 24, "M"]


def tv_vgg(batch_norm: bool = False) -> nn.Module:
    from torchvision.models import vgg

    with torch.device("meta"):  # the wide layers of the paper are replaced below, and cost 100 M elements
        net = vgg.VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)
    net.features = vgg.make_layers(VGG, batch_norm)
    net.classifier[0] = nn.Linear(24 * 49, 64)
    net.classifier[3] = nn.Linear(64, 64)
    net.classifier[6] = nn.Linear(64, CLASSES)
    return net


def timm_vgg(batch_norm: bool = False) -> nn.Module:
    from timm.models import vgg

    net = vgg.VGG(VGG, num_classes=CLASSES, norm_layer=nn.BatchNorm2d if batch_norm else None)
    net.pre_logits = vgg.ConvMlp(24, 64, kernel_size=7, mlp_ratio=1.0)
    net.head.fc = nn.Linear(64, CLASSES)
    return net


def tv_densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 3, 4), num_init_features=16, num_classes=CLASSES)


def timm_densenet() -> nn.Module:
    from timm.models.densenet import DenseNet

    return DenseNet(growth_rate=8, block_config=(2, 3, 4), num_classes=CLASSES)


def vggs() -> list[Pair]:
    out = []
    for name, norm in (("vgg", False), ("vgg_bn", True)):
        out += both(
            Pair(
                f"{name}/torchvision-to-timm",
                partial(tv_vgg, norm),
                partial(timm_vgg, norm),
                (
                    rename(
                        (r"^classifier\.0\.", "pre_logits.fc1."),
                        (r"^classifier\.3\.", "pre_logits.fc2."),
                        (r"^classifier\.6\.", "head.fc."),
                    ),
                    reshape(r"fc1\.weight$", 64, 24, 7, 7),
                    add_axes(r"fc2\.weight$"),
                ),
                images(224, batch=1),
                tags=_tags("vgg", "reshape"),
            )
        )
    out += both(
        Pair(
            "densenet/torchvision-to-timm",
            tv_densenet,
            timm_densenet,
            (),
            images(64),
            tags=_tags("densenet", "identity"),
        )
    )
    return out


# EfficientNet, RegNet, MobileNet: searched and scaled nets at their own size ------------------------------------------
def _tv(name: str, **options: object) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(weights=None, **options)


def _timm(name: str, **options: object) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _efficientnet_block(match: re.Match[str]) -> str:
    """Torchvision numbers a block's units; in the first stage, which does not expand, all numbers are one lower."""
    stage, block, unit = int(match[1]) - 1, match[2], int(match[3])
    if stage == 0:
        units = ["conv_dw|bn1", "se", "conv_pw|bn2"]
    else:
        units = ["conv_pw|bn1", "conv_dw|bn2", "se", "conv_pwl|bn3"]
    name = units[unit]
    if name == "se":
        return f"blocks.{stage}.{block}.se." + {"fc1": "conv_reduce.", "fc2": "conv_expand."}[match[4]]
    return f"blocks.{stage}.{block}." + name.split("|")[int(match[4])] + "."


EFFICIENTNET_TV_TO_TIMM = rename(
    (r"^features\.0\.0\.", "conv_stem."),
    (r"^features\.0\.1\.", "bn1."),
    (r"^features\.8\.0\.", "conv_head."),
    (r"^features\.8\.1\.", "bn2."),
    (r"^features\.(\d)\.(\d+)\.block\.(\d)\.(\w+)\.", _efficientnet_block),
    (r"^classifier\.1\.", "classifier."),
)
REGNET_TV_TO_TIMM = rename(
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.bn."),
    (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
    (r"\.proj\.0\.", ".downsample.conv."),
    (r"\.proj\.1\.", ".downsample.bn."),
    (r"\.f\.([abc])\.0\.", lambda m: f".conv{'abc'.index(m[1]) + 1}.conv."),
    (r"\.f\.([abc])\.1\.", lambda m: f".conv{'abc'.index(m[1]) + 1}.bn."),
    (r"\.f\.se\.", ".se."),
    (r"^fc\.", "head.fc."),
)
REGNET_TIMM_TO_HF = rename(
    (r"^stem\.conv\.", "regnet.embedder.embedder.convolution."),
    (r"^stem\.bn\.", "regnet.embedder.embedder.normalization."),
    (r"^s(\d)\.b(\d+)\.", lambda m: f"regnet.encoder.stages.{int(m[1]) - 1}.layers.{int(m[2]) - 1}."),
    (r"\.downsample\.conv\.", ".shortcut.convolution."),
    (r"\.downsample\.bn\.", ".shortcut.normalization."),
    (r"\.se\.fc(\d)\.", lambda m: f".layer.2.attention.{2 * (int(m[1]) - 1)}."),
    (r"\.conv3\.", ".layer.3."),
    (r"\.conv([12])\.", lambda m: f".layer.{int(m[1]) - 1}."),
    (r"\.conv\.", ".convolution."),
    (r"\.bn\.", ".normalization."),
    (r"^head\.fc\.", "classifier.1."),
)


def hf_regnet() -> nn.Module:
    import transformers

    config = transformers.RegNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 104, 208, 440],
        depths=[1, 3, 6, 6],
        groups_width=8,
        layer_type="y",
        num_labels=CLASSES,
    )
    return transformers.RegNetForImageClassification(config)


def _mobilenet_v2(match: re.Match[str]) -> str:
    number, rest = int(match[1]), match[2]
    first = {"0.0.": "conv_dw.", "0.1.": "bn1.", "1.": "conv_pw.", "2.": "bn2."}
    later = {"0.0.": "conv_pw.", "0.1.": "bn1.", "1.0.": "conv_dw.", "1.1.": "bn2.", "2.": "conv_pwl.", "3.": "bn3."}
    starts = (1, 2, 4, 7, 11, 14, 17)
    stage = max(i for i, start in enumerate(starts) if start <= number)
    unit = (first if number == 1 else later)[rest]
    return f"blocks.{stage}.{number - starts[stage]}.{unit}"


MOBILENET_V2_TV_TO_TIMM = rename(
    (r"^features\.0\.0\.", "conv_stem."),
    (r"^features\.0\.1\.", "bn1."),
    (r"^features\.18\.0\.", "conv_head."),
    (r"^features\.18\.1\.", "bn2."),
    (r"^features\.(\d+)\.conv\.((?:\d\.)+)", _mobilenet_v2),
    (r"^classifier\.1\.", "classifier."),
)


def scaled() -> list[Pair]:
    out = both(
        Pair(
            "efficientnet_b0/torchvision-to-timm",
            partial(_tv, "efficientnet_b0", num_classes=CLASSES),
            partial(_timm, "efficientnet_b0", num_classes=CLASSES),
            (EFFICIENTNET_TV_TO_TIMM,),
            images(64),
            tags=_tags("efficientnet", "rename", "original size"),
        )
    )
    out += both(
        Pair(
            "regnet_y_400mf/torchvision-to-timm",
            partial(_tv, "regnet_y_400mf", num_classes=CLASSES),
            partial(_timm, "regnety_004", num_classes=CLASSES),
            (REGNET_TV_TO_TIMM,),
            images(64),
            tags=_tags("regnet", "rename", "original size"),
        )
    )
    out += both(
        Pair(
            "regnet_y_400mf/timm-to-transformers",
            partial(_timm, "regnety_004", num_classes=CLASSES),
            hf_regnet,
            (REGNET_TIMM_TO_HF,),
            images(64),
            target_call=pick("logits"),
            tags=_tags("regnet", "rename", "original size"),
        )
    )
    out += both(
        Pair(
            "mobilenet_v2/torchvision-to-timm",
            partial(_tv, "mobilenet_v2", num_classes=CLASSES),
            partial(_timm, "mobilenetv2_100", num_classes=CLASSES),
            (MOBILENET_V2_TV_TO_TIMM,),
            images(64),
            tags=_tags("mobilenet", "rename", "original size"),
        )
    )
    return out


def pairs() -> list[Pair]:
    """All pairs of this module, in a fixed order."""
    return [*resnets(), *convnexts(), *vits(), *swins(), *vggs(), *scaled()]
