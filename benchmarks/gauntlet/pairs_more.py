"""CLIP, DINOv2, SigLIP, BEiT, DeiT, PoolFormer and more; re-writings of image models; wrappers and new heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gauntlet import pairs_language as language
from benchmarks.gauntlet import pairs_vision as vision
from benchmarks.gauntlet.generated import _clip
from benchmarks.gauntlet.pair import Pair, Sample, images, input_of, method, pick, tokens
from benchmarks.gauntlet.pairs_language import _hf
from benchmarks.gauntlet.rewrites.unet import UNet, WrittenOutUNet
from benchmarks.gauntlet.rewrites.vision import (
    CellLSTM,
    ListDenseNet,
    Lit,
    NamedVGG,
    SequentialResNet,
    ShortViT,
    TorchLSTM,
    Wrapped,
)
from benchmarks.gauntlet.truth import (
    add_leading_axis,
    change,
    concat,
    drop,
    keep,
    rename,
    reshape,
    split,
    transpose,
)

KEY_BIAS = r"(k_proj|key)\.bias$"
TINY_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


# CLIP -----------------------------------------------------------------------------------------------------------------
def hf_clip() -> nn.Module:
    import transformers

    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "hidden_act": "gelu",
        "bos_token_id": 1,
        "eos_token_id": 95,
        "pad_token_id": 0,
    }
    image = {
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=24))


def _pictures_and_texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 95, (3, 12))
    ids[:, -1] = 95  # the end of the text, where both implementations look
    return torch.randn(3, 3, 32, 32), ids


def _open_clip_sample() -> Sample:
    return _pictures_and_texts(), {}


def _hf_clip_sample() -> Sample:
    pictures, ids = _pictures_and_texts()
    return (), {"pixel_values": pictures, "input_ids": ids}


def _open_clip_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    image, text, scale = module(*args, **kwargs)
    return scale * image @ text.T


def _open_clip_tower(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return input_of("visual.ln_post")(module, args, kwargs)[:, 0]


CLIP_TO_HF = (
    transpose(r"^(text_projection|visual\.proj)$"),
    rename(
        (r"^text_projection$", "text_projection.weight"),
        (r"^visual\.proj$", "visual_projection.weight"),
        (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
        (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
        (r"^ln_final\.", "text_model.final_layer_norm."),
        (r"^transformer\.", "text_model.transformer."),
        (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
        (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
        (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
        (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
        (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
        (r"^visual\.transformer\.", "vision_model.transformer."),
        (r"\.transformer\.resblocks\.", ".encoder.layers."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ln_(\d)\.", r".layer_norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
    split(r"(.*)\.in_proj_(weight|bias)", [rf"\1.{part}_proj.\2" for part in "qkv"]),
)
CLIP_TO_TIMM = (
    keep(r"^visual\."),
    drop(r"^visual\.proj$"),
    rename(
        (r"^visual\.", ""),
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
    reshape(r"^cls_token$", 1, 1, 40),
    add_leading_axis(r"^pos_embed$"),
)


def clips() -> list[Pair]:
    whole = Pair(
        "clip/open_clip-to-transformers",
        _clip,
        hf_clip,
        CLIP_TO_HF,
        _hf_clip_sample,
        source_sample=_open_clip_sample,
        source_call=_open_clip_logits,
        target_call=pick("logits_per_image"),
        insensitive=KEY_BIAS,
        tolerance=1e-5,
        tags=_tags("clip", "split", "transpose"),
    )
    timm_tower = partial(
        vision.timm_vit,
        depth=2,
        heads=2,
        width=40,
        mlp=96,
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    tower = Pair(
        "clip/open_clip-to-timm_image_tower",
        _clip,
        timm_tower,
        CLIP_TO_TIMM,
        lambda: ((_pictures_and_texts()[0],), {}),
        source_sample=_open_clip_sample,
        source_call=lambda m, a, k: m.visual.ln_post(_open_clip_tower(m, a, k)),
        tags=_tags("clip", "rename", "reshape", "partial"),
    )
    vision_only = Pair(
        "clip/open_clip-to-transformers_image_tower",
        _clip,
        partial(
            _hf,
            "CLIPVisionModel",
            "CLIPVisionConfig",
            hidden_size=40,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            hidden_act="gelu",
        ),
        (*CLIP_TO_HF, keep(r"^vision_model\."), rename((r"^vision_model\.", ""))),
        lambda: ((_pictures_and_texts()[0],), {}),
        source_sample=_open_clip_sample,
        source_call=lambda m, a, k: m.visual.ln_post(_open_clip_tower(m, a, k)),
        target_call=pick("pooler_output"),
        insensitive=KEY_BIAS,
        tolerance=1e-5,
        tags=_tags("clip", "split", "partial"),
    )
    return [whole, whole.reverse(insensitive=None), tower, vision_only]


# DINOv2, SigLIP, BEiT, DeiT -------------------------------------------------------------------------------------------
DINO_TO_TIMM = (
    drop(r"mask_token$"),
    concat(
        [r"encoder\.layer\.(\d+)\.attention\.q_proj\.(weight|bias)"]
        + [rf"encoder.layer.\1.attention.{part}_proj.\2" for part in "kv"],
        r"blocks.\1.attn.qkv.\2",
    ),
    rename(
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ),
)


def dinos() -> list[Pair]:
    out: list[Pair] = []
    timm_dino = partial(vision.timm_vit, num_classes=0, init_values=0.1)
    plain = Pair(
        "dinov2/transformers-to-timm",
        partial(_hf, "Dinov2Model", "Dinov2Config", mlp_ratio=3, **TINY_VIT),
        timm_dino,
        DINO_TO_TIMM,
        images(32),
        source_call=pick("pooler_output"),
        tags=_tags("dinov2", "concat", "rename"),
    )

    def timm_swiglu() -> nn.Module:
        from timm.layers import SwiGLUPacked

        return vision.timm_vit(num_classes=0, init_values=0.1, mlp=128, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)

    gated = Pair(
        "dinov2_swiglu/transformers-to-timm",
        partial(_hf, "Dinov2Model", "Dinov2Config", mlp_ratio=4, use_swiglu_ffn=True, **TINY_VIT),
        timm_swiglu,
        (
            *DINO_TO_TIMM,
            concat([r"(.*)\.mlp\.gate_proj\.(weight|bias)", r"\1.mlp.up_proj.\2"], r"\1.mlp.fc1.\2"),
            rename((r"\.mlp\.down_proj\.", ".mlp.fc2.")),
        ),
        images(32),
        source_call=pick("pooler_output"),
        tags=_tags("dinov2", "concat"),
    )
    for pair in (plain, gated):
        out += [pair, pair.reverse(new=r"mask_token$", insensitive=KEY_BIAS)]
    return out


def _deit(model: str) -> nn.Module:
    if model == "timm":
        from timm.models.deit import VisionTransformerDistilled

        return VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, mlp_ratio=3, num_classes=10
        )
    return _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", intermediate_size=72, num_labels=10, **TINY_VIT)


def _timm_beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        mlp_ratio=3,
        num_classes=10,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=0.1,
    )


def other_vits() -> list[Pair]:
    def three(path: str) -> Any:
        return split(r"(.*)\.attn\.qkv\.(weight|bias)", [rf"\1.{path}.{part}_proj.\2" for part in "qkv"])

    siglip = Pair(
        "siglip/timm-to-transformers",
        partial(vision.timm_vit, class_token=False, global_pool="map", num_classes=0),
        partial(_hf, "SiglipVisionModel", "SiglipVisionConfig", intermediate_size=72, hidden_act="gelu", **TINY_VIT),
        (
            three("self_attn"),
            concat([r"attn_pool\.q\.(weight|bias)", r"attn_pool.kv.\1"], r"head.attention.in_proj_\1"),
            rename(
                (r"^pos_embed$", "embeddings.position_embedding.weight"),
                (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
                (r"^blocks\.", "encoder.layers."),
                (r"\.norm(\d)\.", r".layer_norm\1."),
                (r"\.attn\.proj\.", ".self_attn.out_proj."),
                (r"^norm\.", "post_layernorm."),
                (r"^attn_pool\.latent$", "head.probe"),
                (r"^attn_pool\.proj\.", "head.attention.out_proj."),
                (r"^attn_pool\.norm\.", "head.layernorm."),
                (r"^attn_pool\.mlp\.", "head.mlp."),
            ),
            change(r"position_embedding", lambda value: value.squeeze(0)),
        ),
        images(32),
        target_call=pick("pooler_output"),
        insensitive=KEY_BIAS,
        tags=_tags("siglip", "split", "concat", "reshape"),
    )
    beit = Pair(
        "beit/timm-to-transformers",
        _timm_beit,
        partial(
            _hf,
            "BeitForImageClassification",
            "BeitConfig",
            intermediate_size=72,
            num_labels=10,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=False,
            **TINY_VIT,
        ),
        (
            three("attention"),
            rename(
                (r"^cls_token$", "beit.embeddings.cls_token"),
                (r"^patch_embed\.proj\.", "beit.embeddings.patch_embeddings.projection."),
                (r"^blocks\.", "beit.layers."),
                (r"\.gamma_(\d)$", r".lambda_\1"),
                (r"\.norm1\.", ".layernorm_before."),
                (r"\.norm2\.", ".layernorm_after."),
                (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
                (r"\.attn\.relative", ".relative_position_bias.relative"),
                (r"\.attn\.proj\.", ".attention.o_proj."),
                (r"^fc_norm\.", "beit.pooler.layernorm."),
                (r"^head\.", "classifier."),
            ),
        ),
        images(32),
        target_call=pick("logits"),
        tags=_tags("beit", "split"),
    )
    deit = Pair(
        "deit/timm-to-transformers",
        partial(_deit, "timm"),
        partial(_deit, "transformers"),
        (
            three("attention"),
            rename(
                (r"^cls_token$", "deit.embeddings.cls_token"),
                (r"^dist_token$", "deit.embeddings.distillation_token"),
                (r"^pos_embed$", "deit.embeddings.position_embeddings"),
                (r"^patch_embed\.proj\.", "deit.embeddings.patch_embeddings.projection."),
                (r"^blocks\.", "deit.layers."),
                (r"\.norm1\.", ".layernorm_before."),
                (r"\.norm2\.", ".layernorm_after."),
                (r"\.attn\.proj\.", ".attention.o_proj."),
                (r"^norm\.", "deit.layernorm."),
                (r"^head\.", "cls_classifier."),
                (r"^head_dist\.", "distillation_classifier."),
            ),
        ),
        images(32),
        target_call=pick("logits"),
        insensitive=KEY_BIAS,
        tags=_tags("deit", "split"),
    )
    return [p for pair in (siglip, beit, deit) for p in (pair, pair.reverse(insensitive=None))]


# Convolutional nets of timm and transformers --------------------------------------------------------------------------
def hf_convnextv2() -> nn.Module:
    return _hf(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        hidden_sizes=[w for w, _ in vision.CONVNEXT],
        depths=[d for _, d in vision.CONVNEXT],
        layer_norm_eps=1e-6,
        num_labels=10,
    )


def timm_poolformer() -> nn.Module:
    from timm.layers import GroupNorm1
    from timm.models.metaformer import MetaFormer

    return MetaFormer(
        depths=(1, 2, 3, 1),
        dims=(16, 24, 32, 40),
        num_classes=10,
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        output_norm=GroupNorm1,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
        use_mlp_head=False,
    )


def hf_poolformer() -> nn.Module:
    return _hf(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        depths=[1, 2, 3, 1],
        hidden_sizes=[16, 24, 32, 40],
        num_labels=10,
    )


def _norm_then_pool(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The head's own layers in the paper's order: timm pools before the last norm."""
    x = module.forward_features(*args, **kwargs)
    return module.head.fc(module.head.norm(x).mean((-2, -1)))


EFFICIENTNET_STARTS = (0, 1, 3, 5, 8, 11, 15)


def _hf_efficientnet_block(match: Any) -> str:
    return f"efficientnet.encoder.blocks.{EFFICIENTNET_STARTS[int(match[1])] + int(match[2])}."


def convolutional() -> list[Pair]:
    v2 = Pair(
        "convnextv2/timm-to-transformers",
        partial(vision.timm_convnext, use_grn=True, ls_init_value=None),
        hf_convnextv2,
        (
            rename((r"\.mlp\.grn\.", ".grn.")),
            vision.CONVNEXT_TIMM_TO_HF,
            rename((r"^convnext\.", "convnextv2.")),
            change(r"\.grn\.", lambda value: value.reshape(1, 1, 1, -1)),
        ),
        images(),
        target_call=pick("logits"),
        tags=_tags("convnext", "rename", "reshape"),
    )
    pool = Pair(
        "poolformer/timm-to-transformers",
        timm_poolformer,
        hf_poolformer,
        (
            rename(
                (r"^stem\.conv\.", "poolformer.encoder.patch_embeddings.0.projection."),
                (r"^stages\.(\d)\.downsample\.conv\.", r"poolformer.encoder.patch_embeddings.\1.projection."),
                (r"^stages\.(\d)\.blocks\.", r"poolformer.encoder.block.\1."),
                (r"\.layer_scale(\d)\.scale$", r".layer_scale_\1"),
                (r"\.norm1\.", ".before_norm."),
                (r"\.norm2\.", ".after_norm."),
                (r"\.mlp\.fc(\d)\.", r".output.conv\1."),
                (r"^head\.norm\.", "norm."),
                (r"^head\.fc\.", "classifier."),
            ),
        ),
        images(),
        source_call=_norm_then_pool,
        target_call=pick("logits"),
        insensitive=r"(before_norm|norm1)\.bias$",  # pooling minus identity removes a constant
        tags=_tags("poolformer", "rename", "grouped by kind"),
    )
    efficient = Pair(
        "efficientnet_b0/timm-to-transformers",
        partial(vision._timm, "tf_efficientnet_b0", num_classes=10),
        partial(
            _hf,
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            width_coefficient=1.0,
            depth_coefficient=1.0,
            image_size=224,
            hidden_dim=1280,
            num_labels=10,
        ),
        (
            rename(
                (r"^blocks\.0\.0\.conv_pw\.", "blocks.0.0.conv_pwl."),
                (r"^blocks\.0\.0\.bn2\.", "blocks.0.0.bn3."),
                (r"^blocks\.0\.0\.bn1\.", "blocks.0.0.bn2."),
                (r"^blocks\.(\d)\.(\d)\.", _hf_efficientnet_block),
                (r"^conv_stem\.", "efficientnet.embeddings.convolution."),
                (r"^bn1\.", "efficientnet.embeddings.batchnorm."),
                (r"^conv_head\.", "efficientnet.encoder.top_conv."),
                (r"^bn2\.", "efficientnet.encoder.top_bn."),
                (r"\.conv_pw\.", ".expansion.expand_conv."),
                (r"\.bn1\.", ".expansion.expand_bn."),
                (r"\.conv_dw\.", ".depthwise_conv.depthwise_conv."),
                (r"\.bn2\.", ".depthwise_conv.depthwise_norm."),
                (r"\.se\.conv_", ".squeeze_excite."),
                (r"\.conv_pwl\.", ".projection.project_conv."),
                (r"\.bn3\.", ".projection.project_bn."),
            ),
        ),
        images(224, batch=1),
        target_call=pick("logits"),
        tags=_tags("efficientnet", "rename", "flattened stages", "original size"),
    )
    return [p for pair in (v2, pool, efficient) for p in (pair, pair.reverse())]


# Re-writings ----------------------------------------------------------------------------------------------------------
def _flat_block(match: Any) -> str:
    return f"blocks.{2 * (int(match[1]) - 1) + int(match[2])}."


def _vgg_names() -> list[tuple[str, str]]:
    names, number, stage, place = [], 0, 1, 1
    for item in vision.VGG:
        if item == "M":
            number, stage, place = number + 1, stage + 1, 1
            continue
        names.append((rf"^features\.{number}\.", f"conv{stage}_{place}."))
        number, place = number + 2, place + 1
    return names


VIT_TO_SHORT = rename(
    (r"^patch_embed\.proj\.", "to_patch_embedding."),
    (r"^pos_embed$", "pos_embedding"),
    (r"^blocks\.(\d+)\.norm1\.", r"transformer.layers.\1.0.norm."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"transformer.layers.\1.0.to_qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.layers.\1.0.to_out.0."),
    (r"^blocks\.(\d+)\.norm2\.", r"transformer.layers.\1.1.net.0."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.layers.\1.1.net.1."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.layers.\1.1.net.4."),
    (r"^norm\.", "transformer.norm."),
    (r"^head\.", "mlp_head."),
)


def rewritten() -> list[Pair]:
    resnet = Pair(
        "resnet18/torchvision-to-sequential",
        vision.tv_resnet,
        SequentialResNet,
        (
            rename(
                (r"^conv1\.", "stem.0."),
                (r"^bn1\.", "stem.1."),
                (r"^layer(\d)\.(\d)\.", _flat_block),
                (r"^fc\.", "head."),
                (r"\.downsample\.", ".shortcut."),
                (r"\.conv1\.", ".body.0."),
                (r"\.bn1\.", ".body.1."),
                (r"\.conv2\.", ".body.3."),
                (r"\.bn2\.", ".body.4."),
            ),
        ),
        images(),
        tags=_tags("resnet", "rename", "reordered", "flattened stages"),
    )
    vgg = Pair(
        "vgg/timm-to-named",
        vision.timm_vgg,
        partial(NamedVGG, vision.VGG, 64, 10),
        (
            rename(
                *_vgg_names(),
                (r"^pre_logits\.fc1\.", "fc6."),
                (r"^pre_logits\.fc2\.", "fc7."),
                (r"^head\.fc\.", "fc8."),
            ),
            change(r"^fc[67]\.weight$", lambda value: value.flatten(1)),
        ),
        images(224, batch=1),
        tags=_tags("vgg", "rename", "reshape"),
    )
    vit = Pair(
        "vit/timm-to-short",
        partial(vision.timm_vit, qkv_bias=False),
        ShortViT,
        (VIT_TO_SHORT, change(r"^to_patch_embedding\.weight$", lambda value: value.flatten(1))),
        images(32),
        tags=_tags("vit", "rename", "reshape", "reordered"),
    )
    vit_last = replace(
        vit,
        name="vit/timm-to-short_channels_last",
        target=partial(ShortViT, channels_last=True),
        rules=(
            VIT_TO_SHORT,
            change(r"^to_patch_embedding\.weight$", lambda value: value.permute(0, 2, 3, 1).flatten(1)),
        ),
        permute=True,
        tags=_tags("vit", "permute"),
    )
    dense = Pair(
        "densenet/torchvision-to-lists",
        vision.tv_densenet,
        ListDenseNet,
        (
            rename(
                (r"^features\.conv0\.", "stem."),
                (r"^features\.norm0\.", "stem_norm."),
                (
                    r"^features\.denseblock(\d)\.denselayer(\d)\.",
                    lambda m: f"blocks.{int(m[1]) - 1}.{int(m[2]) - 1}.",
                ),
                (r"^features\.transition(\d)\.norm\.", lambda m: f"transitions.{int(m[1]) - 1}.0."),
                (r"^features\.transition(\d)\.conv\.", lambda m: f"transitions.{int(m[1]) - 1}.2."),
                (r"\.norm1\.", ".reduce.0."),
                (r"\.conv1\.", ".reduce.2."),
                (r"\.norm2\.", ".grow.0."),
                (r"\.conv2\.", ".grow.2."),
                (r"^features\.norm5\.", "norm."),
                (r"^classifier\.", "fc."),
            ),
        ),
        images(),
        tags=_tags("densenet", "rename", "grouped by kind"),
    )
    unet = Pair(
        "unet/lists-to-written_out",
        UNet,
        WrittenOutUNet,
        (
            rename(
                (r"^downs\.(\d)\.", lambda m: f"enc{int(m[1]) + 1}."),
                (r"^bottleneck\.", "center."),
                (r"^ups\.([024])\.", lambda m: f"up{3 - int(m[1]) // 2}."),
                (r"^ups\.([135])\.", lambda m: f"dec{3 - int(m[1]) // 2}."),
                (r"^(enc\d|dec\d|center)\.0\.", r"\1.conv1."),
                (r"^(enc\d|dec\d|center)\.1\.", r"\1.bn1."),
                (r"^(enc\d|dec\d|center)\.3\.", r"\1.conv2."),
                (r"^(enc\d|dec\d|center)\.4\.", r"\1.bn2."),
                (r"^final_conv\.", "out."),
            ),
        ),
        images(32),
        tags=_tags("unet", "rename", "reordered"),
    )
    lstm = Pair(
        "lstm/torch-to-cells",
        TorchLSTM,
        CellLSTM,
        (
            rename(
                (r"^embedding\.", "embed."),
                (r"^out\.", "head."),
                (r"^lstm\.(\w+)_l(\d)$", r"cells.\2.\1"),
            ),
        ),
        tokens(96),
        tags=_tags("lstm", "rename", "reordered"),
    )
    return [p for pair in (resnet, vgg, vit, vit_last, dense, unet, lstm) for p in (pair, pair.reverse())]


# Wrappers -------------------------------------------------------------------------------------------------------------
def wrappers() -> list[Pair]:
    """Checkpoints as trainers write them: a prefix, a compiled net inside it, a loss with weights beside it."""
    out: list[Pair] = []

    def wrap(pair: Pair, name: str, *names: str, tags: tuple[str, ...] = ()) -> Pair:
        prefix = "".join(f"{part}." for part in names)
        return replace(
            pair,
            name=name,
            source=partial(_wrapped, pair.source, names),
            rules=(keep(rf"^{prefix}"), rename((rf"^{prefix}", "")), *pair.rules),
            tags=pair.tags | {"wrapper", *tags},
        )

    known = {pair.name: pair for pair in [*vision.pairs(), *language.pairs(), *clips(), *rewritten()]}
    out.append(wrap(known["resnet18/timm-to-torchvision"], "wrapper/module-to-resnet18", "module"))
    out.append(wrap(known["convnext/torchvision-to-timm"], "wrapper/lightning_convnext-to-timm", "model"))
    out.append(wrap(known["vit/timm-to-transformers"], "wrapper/compiled_vit-to-transformers", "model", "_orig_mod"))
    out.append(wrap(known["llama/transformers-to-meta"], "wrapper/lightning_llama-to-meta", "net"))
    out.append(wrap(known["gpt2/transformers-to-nano"], "wrapper/ddp_gpt2-to-nano", "module", "_orig_mod"))
    out.append(wrap(known["bert/transformers-to-torch"], "wrapper/lightning_bert-to-torch", "encoder", "backbone"))
    back = known["swin/timm-to-transformers"]
    out.append(
        replace(
            back,
            name="wrapper/timm_swin-to-lightning",
            target=partial(_wrapped, back.target, ("model",)),
            rules=(*back.rules, rename((r"^", "model."))),
            tags=back.tags | {"wrapper"},
        )
    )
    loss = known["resnet18/torchvision-to-sequential"]
    out.append(
        replace(
            loss,
            name="wrapper/lightning_with_loss-to-sequential",
            source=_with_loss,
            rules=(keep(r"^model\."), rename((r"^model\.", "")), *loss.rules),
            tags=loss.tags | {"wrapper"},
        )
    )
    out.append(
        Pair(
            "wrapper/resnet18-to-lightning_new_classes",
            vision.tv_resnet,
            _lightning_new_head,
            (drop(r"^fc\."), rename((r"^", "model."))),
            images(),
            source_call=input_of("fc"),
            target_call=input_of("model.fc"),
            new=r"^(model\.fc|criterion)\.",
            tags=_tags("resnet", "wrapper", "partial", "new head"),
        )
    )
    out.append(
        Pair(
            "wrapper/vit-to-backbone_with_head",
            vision.timm_vit,
            _ViTWithHead,
            (drop(r"^head\."), rename((r"^", "backbone."))),
            images(32),
            source_call=input_of("head"),
            target_call=method("pooled"),
            new=r"^head\.",
            tags=_tags("vit", "wrapper", "partial", "new head"),
        )
    )
    return out


class _ViTWithHead(nn.Module):
    """A user's model: a library's backbone without head, and a head whose first layer looks like a block's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vision.timm_vit(num_classes=0)
        self.head = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 72), nn.GELU(), nn.Linear(72, 3))

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pooled(x))


def _wrapped(build: Any, names: tuple[str, ...]) -> nn.Module:
    return Wrapped(build(), *names)


def _with_loss() -> nn.Module:
    return Lit(vision.tv_resnet(), 10)


def _lightning_new_head() -> nn.Module:
    net = vision.tv_resnet()
    net.fc = nn.Linear(512, 7)
    return Lit(net, 7)


def pairs() -> list[Pair]:
    """All pairs of this module, in a fixed order."""
    return [*clips(), *dinos(), *other_vits(), *convolutional(), *rewritten(), *wrappers()]
