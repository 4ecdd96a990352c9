"""Specs by architecture name: right on networks with the published names, and as large as what inference finds."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_wsl.errors import RebasinError
from lit_wsl.rebasin import (
    PermutationSpecBuilder,
    infer_permutation_spec,
    permutation_spec,
    register_permutation_spec,
    registered_permutation_specs,
    verify_permutation_spec,
)


class Block(nn.Module):
    """Basic or bottleneck block; the shortcut is a projection or pads with zeros (CIFAR option A)."""

    def __init__(self, inp: int, width: int, stride: int, bottleneck: bool, pad: bool) -> None:
        super().__init__()
        out = width * 4 if bottleneck else width
        sizes = (
            [(inp, width, 1), (width, width, 3), (width, out, 1)] if bottleneck else [(inp, width, 3), (width, out, 3)]
        )
        for k, (a, b, kernel) in enumerate(sizes, start=1):
            step = stride if kernel == 3 and k <= 2 and not (k == 2 and not bottleneck) else 1
            setattr(self, f"conv{k}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"bn{k}", nn.BatchNorm2d(b))
        self.count, self.stride, self.pad = len(sizes), stride, out - inp if pad else 0
        if not pad and (stride > 1 or inp != out):
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for k in range(1, self.count + 1):
            y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
            y = F.relu(y) if k < self.count else y
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, depths, widths, bottleneck: bool = False, pad: bool = False, head: str = "fc") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        inp = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for k in range(depth):
                blocks.append(Block(inp, width, 2 if stage > 1 and k == 0 else 1, bottleneck, pad))
                inp = width * 4 if bottleneck else width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.stages, self.head = len(depths), head
        setattr(self, head, nn.Linear(inp, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.head)(x.mean((2, 3)))


def resnet20(pad: bool) -> nn.Module:
    return ResNet((3, 3, 3), (16, 32, 64), pad=pad, head="linear")


def resnet50() -> nn.Module:
    """The depths and names of ResNet50, a quarter of its width."""
    return ResNet((3, 4, 6, 3), (4, 8, 16, 32), bottleneck=True)


class VGG(nn.Module):
    """The layers and names of VGG16, narrow, on 32 pixels with a 1 x 1 or a larger map before the flatten."""

    def __init__(self, norm: bool, side: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inp = 3
        for out in (4, 4, 0, 6, 6, 0, 8, 8, 8, 0, 10, 10, 10, 0, 10, 10, 10):
            if out == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(inp, out, 3, padding=1), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU(True)]
            inp = out
        self.features, self.pool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(10 * side**2, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(True), nn.Dropout(),
            nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class FusedAttention(nn.Module):
    """timm's names: ``qkv`` and ``proj``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), FusedAttention(width, heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 20), act=nn.GELU(), fc2=nn.Linear(20, width)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4)})
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(TimmBlock(width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def headless_vit() -> nn.Module:
    model = TimmViT()
    model.head = nn.Identity()
    return model


class PackedBlock(nn.Module):
    """A block around ``nn.MultiheadAttention``, with the names of torchvision or of OpenCLIP."""

    def __init__(self, width: int, heads: int, attention: str, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(width), nn.LayerNorm(width), mlp
        self.attention = attention
        setattr(self, attention, nn.MultiheadAttention(width, heads, batch_first=True))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + getattr(self, self.attention)(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.class_token, self.conv_proj = nn.Parameter(torch.randn(1, 1, width)), nn.Conv2d(3, width, 4, 4)
        layers = OrderedDict()
        for k in range(2):
            mlp = nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Dropout(), nn.Linear(20, width), nn.Dropout())
            layers[f"encoder_layer_{k}"] = PackedBlock(width, heads, "self_attention", mlp)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.randn(1, 5, width))
        self.encoder.layers, self.encoder.ln = nn.Sequential(layers), nn.LayerNorm(width)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, 7)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(x))[:, 0])


class Tower(nn.Module):
    """Both towers of OpenCLIP have ``transformer.resblocks.{i}.attn.in_proj_weight`` and so on."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.Module()
        names = ("c_fc", "gelu", "c_proj")
        self.transformer.resblocks = nn.ModuleList(
            PackedBlock(
                width,
                heads,
                "attn",
                nn.Sequential(
                    OrderedDict(zip(names, (nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)), strict=True))
                ),
            )
            for _ in range(2)
        )

    def through(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return x


class Visual(Tower):
    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__(width, heads)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.conv1, self.ln_pre = nn.Conv2d(3, width, 4, 4, bias=False), nn.LayerNorm(width)
        self.ln_post, self.proj = nn.LayerNorm(width), nn.Parameter(torch.randn(width, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        token = self.class_embedding.view(1, 1, -1).expand(len(x), -1, -1)
        x = self.through(self.ln_pre(torch.cat([token, x], dim=1) + self.positional_embedding))
        return self.ln_post(x)[:, 0] @ self.proj


class Text(Tower):
    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__(width, heads)
        self.token_embedding = nn.Embedding(13, width)
        self.positional_embedding = nn.Parameter(torch.randn(6, width))
        self.ln_final, self.text_projection = nn.LayerNorm(width), nn.Parameter(torch.randn(width, 8))
        self.register_buffer("attn_mask", torch.full((6, 6), float("-inf")).triu(1), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        x = self.through(self.token_embedding(text) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection


IMAGE, HALF, SMALL = (torch.randn(2, 3, side, side) for side in (32, 16, 8))  # five, three and no halvings
TEXT = torch.randint(0, 13, (2, 6))
KNOWN = {
    "ResNet20": (lambda: resnet20(pad=False), HALF, lambda sd: permutation_spec("resnet20", sd)),
    "ResNet20 option A": (lambda: resnet20(pad=True), HALF, lambda sd: permutation_spec("resnet20", sd)),
    "ResNet50": (resnet50, HALF, lambda sd: permutation_spec("resnet50", sd)),
    "VGG16": (lambda: VGG(norm=False), IMAGE, lambda sd: permutation_spec("vgg16", sd)),
    "VGG16-BN": (lambda: VGG(norm=True), IMAGE, lambda sd: permutation_spec("vgg16_bn", sd)),
    "timm ViT": (TimmViT, SMALL, lambda sd: permutation_spec("ViT", sd, heads=3)),
    "timm ViT without a head": (headless_vit, SMALL, lambda sd: permutation_spec("ViT", sd, heads=3)),
    "torchvision ViT": (TorchvisionViT, SMALL, lambda sd: permutation_spec("ViT", sd, heads=3)),
    "OpenCLIP visual": (Visual, SMALL, lambda sd: permutation_spec("ViT", sd, heads=3)),
    "OpenCLIP text": (Text, TEXT, lambda sd: permutation_spec("ViT", sd, heads=3)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_by_hand_and_inferred_are_right_and_agree(name):
    build, sample, by_hand = KNOWN[name]
    torch.manual_seed(0)
    model = build()
    hand = by_hand(model.state_dict())
    inferred = infer_permutation_spec(model, (sample,), verify=False)
    for spec in (hand, inferred):
        found = verify_permutation_spec(spec, model, (sample,))
        assert found.ok, found.dropped
    if name == "ResNet20 option A":
        # Padding shortcuts: by hand only the inside of blocks; inference finds at least that.
        assert set(hand.axes) <= set(inferred.axes)
        return
    assert {n: sorted(by) for n, by in hand.axes.items()} == {n: sorted(by) for n, by in inferred.axes.items()}

    def kinds(spec):
        return sorted((g.size, spec.groups[g.parent].size if g.parent else 0) for g in spec.groups.values())

    assert kinds(hand) == kinds(inferred)


def test_names_do_not_depend_on_case_and_punctuation():
    shapes = {name: tuple(tensor.shape) for name, tensor in VGG(norm=True).state_dict().items()}
    assert permutation_spec("VGG16-BN", shapes) == permutation_spec("vgg16_bn", shapes)
    assert {"resnet20", "resnet50", "vgg16", "vgg16_bn", "vit_b_16", "vit_base_patch16_224"} <= set(
        registered_permutation_specs()
    )
    assert {"open_clip_vit_b_32_visual", "open_clip_vit_l_14_visual", "open_clip_vit_l_14_text"} <= set(
        registered_permutation_specs()
    )


def test_own_architectures_can_be_registered():
    @register_permutation_spec("test_only_net")
    def spec_of(state_dict):
        return PermutationSpecBuilder(state_dict).linear("0", "hidden", None).linear("1", None, "hidden").build()

    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    spec = permutation_spec("test-only-net", model)
    assert verify_permutation_spec(spec, model, (torch.randn(1, 3),)).ok
    assert spec.groups["hidden"].size == 6


def test_unknown_names_and_wrong_state_dicts_are_refused():
    with pytest.raises(RebasinError, match="No permutation spec is registered for 'nobody'"):
        permutation_spec("nobody", {})
    with pytest.raises(RebasinError, match="blocks or the classifier"):
        permutation_spec("resnet50", {"something": (3, 3)})
    with pytest.raises(RebasinError, match="no vision transformer"):
        permutation_spec("ViT-B-32", {"something": (3, 3)})
    headless = VGG(norm=True)
    headless.classifier = nn.Identity()
    for source in (headless, headless.state_dict()):
        with pytest.raises(RebasinError, match="classifier"):
            permutation_spec("vgg16_bn", source)


class PublishedBlock(nn.Module):
    """A basic block as it is published under other names, norms behind or in front of the convolutions."""

    def __init__(self, inp: int, out: int, names: tuple[str, str], norm: type[nn.Module], first: bool) -> None:
        super().__init__()
        self.names, self.first = names, first
        self.conv1, self.conv2 = (nn.Conv2d(a, out, 3, padding=1, bias=False) for a in (inp, out))
        for k, width in ((1, inp if first else out), (2, out)):
            setattr(self, f"{names[0]}{k}", norm(width))
        if inp != out:
            layers = [nn.Conv2d(inp, out, 1, bias=False), *([] if first else [norm(out)])]
            setattr(self, names[1], nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        norms, shortcut = [getattr(self, f"{self.names[0]}{k}") for k in (1, 2)], getattr(self, self.names[1], None)
        if self.first:
            y = self.conv2(norms[1](self.conv1(norms[0](x).relu())).relu())
            return y + (x if shortcut is None else shortcut(norms[0](x).relu()))
        y = norms[1](self.conv2(norms[0](self.conv1(x)).relu()))
        return (y + (x if shortcut is None else shortcut(x))).relu()


class Published(nn.Module):
    def __init__(self, blocks: str, norm: str, shortcut: str, head: str, first: bool, wrapped: bool = False) -> None:
        super().__init__()
        kind = WrappedNorm if wrapped else nn.BatchNorm2d
        self.conv, self.head, self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False), head, first
        widths, made = [4, 4, 6, 8], []
        for inp, out in zip([4, *widths], widths, strict=False):
            made.append(PublishedBlock(inp, out, (norm, shortcut), kind, first))
        self.bn = kind(8 if first else 4)
        setattr(self, blocks, nn.ModuleList(made))
        setattr(self, head, nn.Linear(8, 5))
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.first else self.bn(x).relu()
        for block in self.made:
            x = block(x)
        x = self.bn(x).relu() if self.first else x
        return getattr(self, self.head)(x.mean((2, 3)))


class WrappedNorm(nn.Module):
    """A layer norm over channels, inside a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x.movedim(1, -1)).movedim(-1, 1)


PUBLISHED = {
    "downsample and fc": ("layer", "bn", "downsample", "fc", False),
    "shortcut and linear": ("blocks", "bn", "shortcut", "linear", False),
    "norms first": ("layers", "bn", "shortcut", "linear", True),
    "wrapped norms": ("blockgroup", "norm", "shortcut", "linear", False, True),
}


@pytest.mark.parametrize("layout", PUBLISHED)
def test_residual_networks_in_every_layout(layout):
    model = Published(*PUBLISHED[layout])
    spec, *others = (permutation_spec(name, model) for name in ("ResNet20", "resnet-20", "ResNet20_CIFAR10"))
    assert all(other == spec for other in others)
    assert verify_permutation_spec(spec, model, (SMALL,)).ok
    inferred = infer_permutation_spec(model, (SMALL,), verify=False)
    assert {n: sorted(by) for n, by in spec.axes.items()} == {n: sorted(by) for n, by in inferred.axes.items()}


TRANSFORMERS = ("ViT-B-32", "ViT-B/16", "ViT-L-14", "CLIP ViT-B-32", "CLIP ViT-L-14", "clip", "ViT")


class WholeClip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual, text = Visual(), Text()
        for name, value in [*text.named_children(), *text.named_parameters(recurse=False)]:
            setattr(self, name, value)
        self.register_buffer("attn_mask", text.attn_mask, persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(image) * self.logit_scale, Text.forward(self, text)

    through = Text.through


@pytest.mark.parametrize(
    ("build", "args", "count"),
    [(TimmViT, (SMALL,), 9), (TorchvisionViT, (SMALL,), 9), (Visual, (SMALL,), 9), (Text, (TEXT,), 9),
     (WholeClip, (SMALL, TEXT), 18)],
    ids=["timm", "torchvision", "CLIP's visual tower", "CLIP's text tower", "CLIP"],
)  # fmt: skip
def test_what_the_tensors_are_decides(build, args, count):
    """Under any name the layout is that of the tensors: timm, torchvision, both towers of CLIP and the whole."""
    model = build()
    spec, *others = (permutation_spec(name, model) for name in TRANSFORMERS)
    assert len(spec.groups) == count
    assert "unproven" in repr(spec)
    assert all(other == spec for other in others)
    assert verify_permutation_spec(spec, model, args).ok


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_tensors_may_stand_under_a_prefix(name):
    state = {f"model.{key}": tensor for key, tensor in TimmViT().state_dict().items()}
    assert len(permutation_spec(name, state, heads=3).groups) == 9


def test_heads_come_from_the_model_or_the_published_width():
    with pytest.raises(RebasinError, match="heads="):
        permutation_spec("ViT", TimmViT().state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in TimmViT(width=192).state_dict().items()}
    assert permutation_spec("vit_tiny_patch16_224", shapes).groups["blocks.0.heads"].size == 3


def test_every_tensor_is_accounted_for():
    state = dict(TimmViT().state_dict())
    state["blocks.0.attn.q_norm.weight"] = torch.ones(4)
    with pytest.raises(RebasinError, match=r"q_norm.weight' of shape \(4,\)"):
        permutation_spec("ViT", state, heads=3)
    spec = permutation_spec("ViT", TimmViT().state_dict(), heads=3)
    assert set(TimmViT().state_dict()) == set(spec.axes) | set(spec.frozen)
    assert spec.frozen["head.bias"] == {0: "declared fixed"}


def test_a_spec_without_groups_is_refused():
    register_permutation_spec("test_only_empty")(lambda sd: PermutationSpecBuilder(sd).fixed(*sd).build())
    with pytest.raises(RebasinError, match="nothing in this state dict"):
        permutation_spec("test-only-empty", {"a": (3, 3)})
    register_permutation_spec("test_only_silent")(lambda sd: PermutationSpecBuilder(sd).linear("a", "P", None).build())
    with pytest.raises(RebasinError, match=r"'b' of shape \(2,\)"):
        permutation_spec("test-only-silent", {"a.weight": (3, 3), "b": (2,)})
