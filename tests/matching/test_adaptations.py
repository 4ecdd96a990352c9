"""``adapt=[...]``: only on request, only where the place is clear, and each reported."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_wsl import transfer_weights
from lit_wsl.errors import CheckpointError, PlanError
from lit_wsl.mapper import MatchingOptions, build_plan
from lit_wsl.structure import describe
from lit_wsl.transfer import TransferPlan

ADAPTATIONS = ["fold_batchnorm", "resize_position_embedding", "new_input_channels", "partial_head"]


class Block(nn.Module):
    def __init__(self, width_in, width, norm, names):
        super().__init__()
        first, norm1, second, norm2 = names
        setattr(self, first, nn.Conv2d(width_in, width, 3, padding=1, bias=not norm))
        if norm:
            setattr(self, norm1, nn.BatchNorm2d(width))
        setattr(self, second, nn.Conv2d(width, width, 3, padding=1, bias=not norm))
        if norm:
            setattr(self, norm2, nn.BatchNorm2d(width))
        self.short = None
        if width_in != width:
            norms = [nn.BatchNorm2d(width)] if norm else []
            self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=not norm), *norms)
        self.names, self.norm = names, norm

    def forward(self, x):
        first, norm1, second, norm2 = (getattr(self, n, nn.Identity()) for n in self.names)
        y = norm2(second(norm1(first(x)).relu()))
        return (y + (x if self.short is None else self.short(x))).relu()


class Net(nn.Module):
    def __init__(self, norm=True, names=("conv1", "bn1", "conv2", "bn2"), stem="conv", channels=3, classes=10):
        super().__init__()
        setattr(self, stem, nn.Conv2d(channels, 8, 3, bias=not norm))
        if norm:
            self.bn = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, norm, names), Block(8, 16, norm, names), Block(16, 16, norm, names))
        self.fc = nn.Linear(16, classes)
        self.stem = stem

    def forward(self, x):
        x = getattr(self, self.stem)(x)
        x = (self.bn(x) if hasattr(self, "bn") else x).relu()
        return self.fc(self.layers(x).mean((2, 3)))


def trained(model, seed=0):
    """Give every tensor values that tell it from the others, statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            vector = name.endswith("var") or (tensor.ndim == 1 and name.endswith("weight"))
            tensor.copy_(drawn + 0.5 if vector else (drawn - 0.5) * 0.3)
    return model.eval()


class Vision(nn.Module):
    """A vision transformer's outside: patches, class tokens, a table of positions, one layer, a head."""

    def __init__(self, grid, prefix=1, classes=10, channels=3, names=("patch", "cls", "pos", "body", "head")):
        super().__init__()
        patch, cls, pos, body, head = names
        setattr(self, patch, nn.Conv2d(channels, 16, 4, 4))
        setattr(self, cls, nn.Parameter(torch.randn(1, prefix, 16)))
        setattr(self, pos, nn.Parameter(torch.randn(1, prefix + grid * grid, 16)))
        layer = nn.Module()
        layer.norm, layer.up, layer.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16)
        setattr(self, body, layer)
        setattr(self, head, nn.Linear(16, classes))


class Window(nn.Module):
    """Windowed attention with one bias per pair of places and head."""

    def __init__(self, window):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4)
        self.blocks = nn.ModuleList()
        for width, heads in ((12, 2), (12, 2), (24, 4)):
            block = nn.Module()
            block.bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
            block.qkv, block.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.blocks.append(block)


class Text(nn.Module):
    def __init__(self, length, classes=7):
        super().__init__()
        self.tok, self.pos = nn.Embedding(50, 16), nn.Embedding(length, 16)
        self.up, self.norm, self.head = nn.Linear(16, 30), nn.LayerNorm(30), nn.Linear(30, classes)


def plan_for(source, target, adapt=()):
    return build_plan(describe(source), describe(target), MatchingOptions(adapt=adapt))


def adapted(plan):
    return {e.targets: e for e in plan if not e.lossless}


PAIRS = {
    "fold": (lambda: Net(), lambda: Net(norm=False)),
    "resize": (lambda: Vision(4), lambda: Vision(6)),
    "channels": (lambda: Net(), lambda: Net(channels=1)),
    "head": (lambda: Net(), lambda: Net(classes=4)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_nothing_that_changes_values_is_done_unasked(pair):
    old, new = (make() for make in PAIRS[pair])
    assert not adapted(plan_for(old.state_dict(), new))


@pytest.mark.parametrize("pair", PAIRS)
def test_only_what_was_asked_for_is_done(pair):
    old, new = (make() for make in PAIRS[pair])
    wanted = ADAPTATIONS[list(PAIRS).index(pair)]
    others = [name for name in ADAPTATIONS if name != wanted]
    with_all, without = (plan_for(old.state_dict(), new, adapt) for adapt in (ADAPTATIONS, others))
    assert {op.name for e in with_all for op in e.operations if not op.lossless} == {wanted}
    assert not adapted(without)
    assert without.entries == plan_for(old.state_dict(), new).entries


@pytest.mark.parametrize("adapt", [[name] for name in ADAPTATIONS] + [ADAPTATIONS])
def test_where_nothing_is_left_over_the_plan_stays_as_it_is(adapt):
    plain, asked = (plan_for(Net().state_dict(), Net(), a) for a in ((), adapt))
    assert asked.entries == plain.entries
    assert asked.unmatched_target == plain.unmatched_target == ()
    assert [n for n in asked.notes if n not in plain.notes] == [
        f"{name}: nothing was adapted; nothing that is left over calls for it" for name in ADAPTATIONS if name in adapt
    ]


@pytest.mark.parametrize("names", [("conv1", "bn1", "conv2", "bn2"), ("a", "-", "b", "--")])
@pytest.mark.parametrize("stem", ["conv", "first"])
@pytest.mark.parametrize("as_module", [True, False])
def test_a_folded_network_computes_the_same(names, stem, as_module):
    old, new = trained(Net().double()), Net(norm=False, names=names, stem=stem).double().eval()
    report = transfer_weights(new, old if as_module else old.state_dict(), adapt=["fold_batchnorm"])
    assert report.missing == report.ambiguous == ()
    x = torch.randn(2, 3, 9, 9).double()
    torch.testing.assert_close(new(x), old(x), rtol=1e-10, atol=1e-10)
    assert len(adapted(report.plan)) == 8
    assert all("eps=1e-05 assumed" in e.reason for e in adapted(report.plan).values())


def test_convolutions_with_a_bias_of_their_own_are_folded_too():
    def make(*norm):
        return nn.Sequential(nn.Conv2d(3, 8, 3), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).double()

    old, new = trained(make(nn.BatchNorm2d(8))), make()
    transfer_weights(new, old.state_dict(), adapt=["fold_batchnorm"])
    x = torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(new(x), old(x), rtol=1e-10, atol=1e-10)


def test_another_eps_is_an_edit_of_the_plan():
    old, new = trained(Net().double()), Net(norm=False).double().eval()
    for module in old.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2
    plan = plan_for(old, new, ["fold_batchnorm"])
    edited = [
        replace(e, operations=tuple(replace(op, eps=1e-2) for op in e.operations)) for e in adapted(plan).values()
    ]
    plan = replace(plan, entries=(*edited, *(e for e in plan if e.lossless)))
    transfer_weights(new, old.state_dict(), plan=plan)
    x = torch.randn(2, 3, 9, 9).double()
    torch.testing.assert_close(new(x), old(x), rtol=1e-10, atol=1e-10)


def test_the_function_check_proves_a_folded_network_and_sees_a_wrong_eps():
    for eps, proof in ((1e-5, "proven"), (0.5, "refuted")):
        old, new = trained(Net()), Net(norm=False).eval()
        for module in old.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = eps
        x = torch.randn(2, 3, 9, 9)
        report = transfer_weights(
            new, old.state_dict(), source_module=old, example_args=(x,), adapt=["fold_batchnorm"], min_coverage=0.0
        )
        assert report.plan.proof == proof


def test_a_norm_that_the_target_keeps_is_not_folded():
    class Part(nn.Module):
        def __init__(self, folded):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, bias=folded)
            if not folded:
                self.a_norm = nn.BatchNorm2d(8)
            self.b = nn.Conv2d(8, 20, 3, bias=False)
            self.b_norm = nn.BatchNorm2d(20)

        def forward(self, x):
            x = self.a(x)
            return self.b_norm(self.b(self.a_norm(x) if hasattr(self, "a_norm") else x))

    old, new = trained(Part(False).double()), Part(True).double().eval()
    report = transfer_weights(new, old.state_dict(), adapt=["fold_batchnorm"])
    assert set(adapted(report.plan)) == {("a.weight", "a.bias")}
    x = torch.randn(2, 3, 9, 9).double()
    torch.testing.assert_close(new(x), old(x), rtol=1e-10, atol=1e-10)


class Residual(nn.Module):
    """Norm, convolution, norm, convolution, and a sum: only the second norm of a block can be folded."""

    def __init__(self, folded, names=("n1", "c1", "n2", "c2")):
        super().__init__()
        self.stem, self.names = nn.Conv2d(3, 8, 3, padding=1), names
        self.blocks = nn.ModuleList(nn.Module() for _ in range(3))
        for block in self.blocks:
            block.add_module(names[0], nn.BatchNorm2d(8))
            block.add_module(names[1], nn.Conv2d(8, 8, 3, padding=1, bias=folded))
            if not folded:
                block.add_module(names[2], nn.BatchNorm2d(8))
            block.add_module(names[3], nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            norm1, conv1, norm2, conv2 = (getattr(block, name, nn.Identity()) for name in self.names)
            x = x + conv2(norm2(conv1(norm1(x).relu())).relu())
        return self.fc(x.mean((2, 3)))


def test_a_norm_behind_a_sum_is_never_folded_into_what_is_registered_before_it():
    old, new = trained(Residual(folded=False).double()), Residual(folded=True).double().eval()
    report = transfer_weights(new, old.state_dict(), adapt=["fold_batchnorm"])
    assert report.missing == report.ambiguous == ()
    assert set(adapted(report.plan)) == {(f"blocks.{i}.c1.weight", f"blocks.{i}.c1.bias") for i in range(3)}
    x = torch.randn(2, 3, 6, 6).double()
    torch.testing.assert_close(new(x), old(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_position_table_is_resized(prefix, renamed):
    old = Vision(4, prefix)
    names = {"names": ("embed", "extra_token", "place_table", "trunk", "classifier")} if renamed else {}
    new = Vision(6, prefix, **names)
    report = transfer_weights(new, old.state_dict(), adapt=["resize_position_embedding"])
    assert report.missing == ()
    picture = old.pos[0, prefix:].T.reshape(1, 16, 4, 4)
    wanted = F.interpolate(picture, (6, 6), mode="bicubic", antialias=True).reshape(16, 36).T
    table = new.place_table if renamed else new.pos
    torch.testing.assert_close(table[0, prefix:], wanted)
    assert torch.equal(table[0, :prefix], old.pos[0, :prefix])
    (entry,) = adapted(report.plan).values()
    kept = f"{prefix} prefix token{'s' * (prefix > 1)} kept"
    assert f"resized by bicubic interpolation (antialiased) from 4x4 to 6x6, {kept}" in entry.reason
    assert any(entry.targets[0] in note and "from 4x4 to 6x6" in note for note in report.plan.notes)


def test_every_relative_position_table_is_resized():
    old, new = Window(3), Window(5)
    report = transfer_weights(new, old.state_dict(), adapt=["resize_position_embedding"])
    assert report.missing == ()
    for a, b in zip(old.blocks, new.blocks):
        picture = a.bias_table.T.reshape(1, -1, 5, 5)
        wanted = F.interpolate(picture, (9, 9), mode="bicubic", antialias=True).flatten(2)[0].T
        torch.testing.assert_close(b.bias_table, wanted)


@pytest.mark.parametrize(("old", "new"), [(64, 256), (128, 256), (100, 49)])
def test_positions_in_a_text_are_no_grid(old, new):
    plan = plan_for(Text(old).state_dict(), Text(new), ADAPTATIONS)
    assert not adapted(plan)
    reasons = {u.name: u.reason for u in (*plan.unmatched_source, *plan.unmatched_target)}
    assert set(reasons) == {"pos.weight"}
    assert "grid" in reasons["pos.weight"]


def test_another_number_of_prefix_tokens_is_refused():
    plan = plan_for(Vision(4, prefix=1).state_dict(), Vision(6, prefix=2), ["resize_position_embedding"])
    assert not adapted(plan)
    assert any("pos has 17 rows, pos 38, which are no square grids" in note for note in plan.notes)


@pytest.mark.parametrize("classes", [4, 25])
@pytest.mark.parametrize("stem", ["conv", "first"])
def test_a_head_is_copied_in_part(classes, stem):
    old, new = trained(Net()), Net(stem=stem, classes=classes).eval()
    before = {n: t.clone() for n, t in new.fc.state_dict().items()}
    report = transfer_weights(new, old.state_dict(), adapt=["partial_head"])
    assert report.missing == ()
    rows = min(10, classes)
    for name, tensor in new.fc.state_dict().items():
        assert torch.equal(tensor[:rows], old.fc.state_dict()[name][:rows])
        assert torch.equal(tensor[rows:], before[name][rows:])
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(new(x)[:, :rows], old(x)[:, :rows])
    kept = (classes - rows) * (1 + new.fc.in_features), (10 - rows) * (1 + new.fc.in_features)
    target, source = report.coverage.target, report.coverage.source
    assert (target.of_elements - target.elements, source.of_elements - source.elements) == kept
    assert target.tensor_share == source.tensor_share == 1.0


def test_a_wider_inner_layer_is_no_head():
    def make(width):
        return nn.Sequential(nn.Linear(6, 30), nn.Linear(30, width), nn.LayerNorm(width), nn.Linear(width, 5))

    plan = plan_for(make(12).state_dict(), make(20), ["partial_head"])
    assert not adapted(plan)


def test_an_embedding_is_no_head():
    class Tied(nn.Module):
        def __init__(self, words):
            super().__init__()
            self.up, self.tok = nn.Linear(16, 30), nn.Embedding(words, 16)

    assert not adapted(plan_for(Tied(50).state_dict(), Tied(60), ADAPTATIONS))


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("make", [Net, lambda channels=3: Vision(4, channels=channels)], ids=["conv", "patches"])
def test_the_stem_takes_other_channels(channels, make):
    old, new = make(), make(channels=channels)
    report = transfer_weights(new, old.state_dict(), adapt=["new_input_channels"])
    assert report.missing == ()
    name = next(iter(new.state_dict())) if make is Net else "patch.weight"
    weight, stem = new.state_dict()[name], old.state_dict()[name]
    wanted = stem.sum(1, keepdim=True) if channels == 1 else stem[:, torch.arange(channels) % 3] * 3 / channels
    torch.testing.assert_close(weight, wanted)


def test_only_the_first_convolution_is_a_stem():
    def make(width):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, width, 3), nn.Conv2d(width, 12, 5))

    assert not adapted(plan_for(make(8).state_dict(), make(10), ["new_input_channels"]))


def test_all_four_at_once():
    old = trained(Net().double())
    new = Net(norm=False, names=("a", "-", "b", "--"), stem="first", channels=1, classes=4).double().eval()
    report = transfer_weights(new, old.state_dict(), adapt=ADAPTATIONS)
    assert report.missing == report.ambiguous == ()
    x = torch.randn(2, 1, 9, 9).double()
    torch.testing.assert_close(new(x), old(x.expand(-1, 3, -1, -1))[:, :4], rtol=1e-10, atol=1e-10)


def test_the_plan_is_saved_replayed_and_has_no_way_back(tmp_path):
    old, first, second = trained(Vision(4)), Vision(6, classes=4), Vision(6, classes=4)
    second.load_state_dict(first.state_dict())
    report = transfer_weights(first, old.state_dict(), adapt=ADAPTATIONS)
    report.plan.save(tmp_path / "plan.json")
    plan = TransferPlan.load(tmp_path / "plan.json")
    assert plan.entries == report.plan.entries
    transfer_weights(second, old.state_dict(), plan=plan)
    assert all(torch.equal(t, first.state_dict()[n]) for n, t in second.state_dict().items())
    with pytest.raises(PlanError, match="cannot be reversed"):
        plan.reverse()


def test_the_report_names_every_adapted_tensor():
    report = transfer_weights(Vision(6, classes=4), Vision(4).state_dict(), adapt=ADAPTATIONS)
    text = report.to_json()
    for name in ("pos", "head.weight", "head.bias"):
        assert any(note.startswith(f"{name}: ") for note in report.plan.notes)
        assert report.plan.by_target[name].badge in text
        assert report.plan.by_target[name].score < 1.0


def test_a_conversion_needs_the_model_and_refuses_optimizer_states(tmp_path):
    old, new = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 10)), nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    optimizer = torch.optim.Adam(old.parameters())
    old(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    torch.save({"state_dict": old.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "old.ckpt")
    plan = plan_for(old.state_dict(), new, ["partial_head"])
    assert len(adapted(plan)) == 2
    with pytest.raises(PlanError, match="give the target model"):
        plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match="partial_head changes values"):
        plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", target=new)
    plan.convert_checkpoint(tmp_path / "old.ckpt", tmp_path / "new.ckpt", target=new, weights_only=True)
    made = torch.load(tmp_path / "new.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(made["1.weight"], old[1].weight[:4])


@pytest.mark.parametrize("adapt", [ADAPTATIONS, ADAPTATIONS[::-1]])
def test_the_order_of_the_names_does_not_matter(adapt):
    plan = plan_for(Vision(4).state_dict(), Vision(6, classes=4, channels=1), adapt)
    assert plan.entries == plan_for(Vision(4).state_dict(), Vision(6, classes=4, channels=1), ADAPTATIONS).entries
    assert len(adapted(plan)) == 4
