"""Conventions that names and shapes don't show: doubted without a proof, decided with one, no hindrance elsewhere."""

from __future__ import annotations

import pytest
import torch
from pairs import randomise
from small_nets import Tree
from torch import Tensor, nn
from torch.nn import functional as F

from lit_wsl import WeightMapper, transfer_weights
from lit_wsl.errors import CoverageError

WIDTH, HEADS = 16, 2


def turned(x, pairs: bool):
    """Rotary embedding of (batch, heads, time, width): neighbours or halves turn together."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[-2]), 10.0 ** -torch.arange(half))
    cos, sin = angle.cos(), angle.sin()
    a, b = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
    rotated = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(rotated, -1).flatten(-2) if pairs else torch.cat(rotated, -1)


class Words(nn.Module):
    """A model of words in one of several conventions.

    ``names`` are those of the projections; two of them mean a fused projection, whose heads ``alternate`` or not.
    ``around`` are those of the rest.
    """

    def __init__(self, names, around, *, pairs=False, rotary=True, table=False, alternate=False, late=False, **kind):
        super().__init__()
        norm, puts_out = kind.get("norm", nn.LayerNorm), kind.get("puts_out", 40)
        self.names, self.around = names, around
        self.pairs, self.rotary, self.alternate = pairs, rotary, alternate
        self.table = nn.Embedding(7, WIDTH) if table else None
        layers = dict(zip(around, (nn.Embedding(40, WIDTH), norm(WIDTH), nn.Linear(WIDTH, puts_out))))
        widths = [3 * WIDTH] if len(names) == 2 else [WIDTH] * 3
        layers |= {name: nn.Linear(WIDTH, width) for name, width in zip(names, [*widths, WIDTH])}
        if late:
            layers[around[1]] = layers.pop(around[1])
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, ids):
        embed, norm, head = (getattr(self, name) for name in self.around)
        *projections, out = (getattr(self, name) for name in self.names)
        x = embed(ids)
        if self.table is not None:
            x = x + self.table(torch.arange(ids.shape[1]))
        y = norm(x)
        if len(projections) == 3:
            q, k, v = (p(y).unflatten(-1, (HEADS, -1)) for p in projections)
        elif self.alternate:
            q, k, v = projections[0](y).unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        else:
            q, k, v = projections[0](y).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rotary:
            q, k = turned(q, self.pairs), turned(k, self.pairs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return head(x + out(y))


LONG, SHORT, FUSED = ("query", "key", "value", "dense"), ("wq", "wk", "wv", "wo"), ("qkv", "proj")
AROUND, ELSEWHERE = ("embedding", "norm", "classifier"), ("tokens", "ln", "readout")
IDS = torch.arange(2, 12).view(2, 5)


def other(**options) -> Words:
    """The same network under other names, registered in another order."""
    return randomise(Words(SHORT, ELSEWHERE, late=True, **options), 1)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_of_queries_and_keys_wait_for_a_proof(pairs):
    old, new = randomise(Words(LONG, AROUND)), other(pairs=pairs)
    report = transfer_weights(new, old.state_dict())
    rows = {f"{name}.{kind}" for name in ("wq", "wk") for kind in ("weight", "bias")}
    assert set(report.ambiguous) == rows
    assert {c.sources[0].partition(".")[0] for a in report.plan.ambiguous for c in a.candidates} == {"query", "key"}
    assert all("source_module" in a.reason for a in report.plan.ambiguous)
    torch.testing.assert_close(new.wv.weight, old.value.weight, rtol=0, atol=0)

    report = transfer_weights(new, old.state_dict(), example_args=(IDS,), source_module=old)
    assert (report.plan.proof, report.ambiguous) == ("proven", ())
    torch.testing.assert_close(new(IDS), old(IDS))
    assert torch.equal(new.wq.weight, old.query.weight) != pairs


def test_whoever_knows_may_say_so():
    old, new = randomise(Words(LONG, AROUND)), other()
    report = transfer_weights(new, old.state_dict(), assume_layouts=True)
    assert report.ambiguous == ()
    assert report.plan.options["assume_layouts"] is True
    torch.testing.assert_close(new(IDS), old(IDS))


def test_a_sample_that_never_turns_a_row_proves_nothing():
    old, new = randomise(Words(LONG, AROUND)), other(pairs=True)
    report = transfer_weights(new, old.state_dict(), example_args=(IDS[:, :1],), source_module=old)
    assert {name.partition(".")[0] for name in report.ambiguous} == {"wq", "wk"}


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("whole_is_target", [False, True])
def test_fused_projections_of_a_model_without_positions_wait_for_a_proof(alternate, whole_is_target):
    fused, apart = Words(FUSED, AROUND, alternate=alternate), Words(SHORT, ELSEWHERE)
    old, new = (apart, fused) if whole_is_target else (fused, apart)
    randomise(old), randomise(new, 1)
    report = transfer_weights(new, old.state_dict())
    doubted = {"qkv"} if whole_is_target else {"wq", "wk", "wv"}
    assert {name.partition(".")[0] for name in report.ambiguous} == doubted
    transfer_weights(new, old.state_dict(), example_args=(IDS,), source_module=old)
    torch.testing.assert_close(new(IDS), old(IDS))


@pytest.mark.parametrize("pairs", [False, True])
def test_a_pure_renaming_keeps_every_convention(pairs):
    old, new = randomise(Words(LONG, AROUND, pairs=pairs)), randomise(Words(SHORT, ELSEWHERE, pairs=pairs), 1)
    assert transfer_weights(new, old.state_dict()).missing == ()
    torch.testing.assert_close(new(IDS), old(IDS))


@pytest.mark.parametrize(("norm", "doubted"), [(nn.LayerNorm, False), (nn.RMSNorm, True)])
def test_a_classifier_is_doubted_only_with_the_norms_that_came_with_rotary_embeddings(norm, doubted):
    old, new = randomise(Words(LONG, AROUND, puts_out=5, norm=norm)), other(puts_out=5, norm=norm)
    assert bool(transfer_weights(new, old.state_dict()).ambiguous) == doubted


def test_a_table_of_positions_leaves_nothing_to_turn():
    old, new = randomise(Words(LONG, AROUND, table=True, rotary=False)), other(table=True, rotary=False)
    assert transfer_weights(new, old.state_dict()).ambiguous == ()
    torch.testing.assert_close(new(IDS), old(IDS))


def test_one_code_base_keeps_its_convention_when_it_fuses():
    old, new = Words(("q_proj", "k_proj", "v_proj", "proj"), AROUND), Words(FUSED, AROUND)
    report = transfer_weights(randomise(new, 1), randomise(old).state_dict())
    assert report.ambiguous == ()
    torch.testing.assert_close(new(IDS), old(IDS))


def test_the_mapper_shows_the_pair_and_says_what_it_takes_for_granted():
    old, new = randomise(Words(LONG, AROUND)), other(pairs=True)
    result = WeightMapper.from_state_dict(old.state_dict(), new).suggest_mapping()
    assert result["query.weight"] == "wq.weight"
    assert any("wq.weight" in note and "rotary" in note for note in result.plan.notes)


class Patches(nn.Module):
    """A classifier of pictures cut into patches by a convolution, or by hand for a linear layer."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut
        self.embed = nn.Conv2d(3, WIDTH, 4, 4) if cut == "convolution" else nn.Linear(48, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        if self.cut == "convolution":
            y = self.embed(x).flatten(2).transpose(1, 2)
        else:
            y = x.unfold(2, 4, 4).unfold(3, 4, 4)  # (batch, channels, rows, columns, height, width)
            order = (0, 2, 3, 1, 4, 5) if self.cut == "channels first" else (0, 2, 3, 4, 5, 1)
            y = self.embed(y.permute(*order).flatten(3).flatten(1, 2))
        return self.head(self.norm(y).mean(1))


@pytest.mark.parametrize("cut", ["channels first", "channels last"])
@pytest.mark.parametrize("back", [False, True])
def test_flattened_patches_wait_for_a_proof(cut, back):
    models = [Patches("convolution"), Patches(cut)]
    old, new = reversed(models) if back else models
    randomise(old), randomise(new, 1)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(CoverageError, match=r"ambiguous, first embed\.weight: patches"):
        transfer_weights(new, old.state_dict())
    assert transfer_weights(new, old.state_dict(), min_coverage=0.1).ambiguous == ("embed.weight",)
    report = transfer_weights(new, old.state_dict(), example_args=(x,), source_module=old)
    assert report.ambiguous == ()
    torch.testing.assert_close(new(x), old(x))


def test_a_flattened_head_is_cut_in_the_order_of_memory():
    old = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 2))
    new = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 6))
    report = transfer_weights(randomise(new, 1), randomise(old).state_dict())
    assert report.ambiguous == report.missing == ()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(new(x), old(x).flatten(1))


def test_square_experts_that_became_one_bare_tensor_are_open():
    """A stack of ``weight`` in a parameter of its own may be stored (out, in) or (in, out); squares don't show it."""
    old = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(8, 8, bias=False)}) for _ in range(3))
    new = nn.Module()
    new.w1 = nn.Parameter(torch.randn(3, 8, 8))
    before = new.w1.clone()
    transfer_weights(new, {f"experts.{n}": t for n, t in old.state_dict().items()}, min_coverage=0.0)
    assert torch.equal(new.w1, before)


@pytest.mark.parametrize("arrange", [list, sorted, reversed])
def test_two_up_and_one_down_fit_one_way(arrange):
    """The shapes of a gated feed-forward fit crosswise only if it had as many matrices down as up."""
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    old = {f"layers.{k}.attention.{n}.weight": torch.randn(8, 8) for k in range(2) for n in names}
    sizes = {"w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}
    old |= {f"layers.{k}.feed_forward.{n}.weight": torch.randn(size) for k in range(2) for n, size in sizes.items()}
    made = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
    blocks = [
        nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in names.values()}),
                "mlp": nn.ModuleDict({n: nn.Linear(*size, bias=False) for n, size in made.items()}),
            }
        )
        for _ in range(2)
    ]
    new = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    transfer_weights(new, {n: old[n] for n in arrange(list(old))}, assume_layouts=True)
    parts = {**{f"attention.{a}": f"self_attn.{b}" for a, b in names.items()}, "feed_forward.w1": "mlp.gate_proj"}
    parts |= {"feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    held = new.state_dict()
    for k in range(2):
        for a, b in parts.items():
            assert torch.equal(held[f"layers.{k}.{b}.weight"], old[f"layers.{k}.{a}.weight"])


@pytest.mark.parametrize("around", ["", "layers.0.mlp."])
def test_what_would_have_to_be_turned_is_open_where_its_neighbour_stands_as_it_was(around):
    def gated(up: str, down: str) -> dict[str, nn.Module]:
        parts = {"w1": nn.Linear(8, 16, bias=False), up: nn.Linear(8, 16, bias=False)}
        return {f"{around}{n}": m for n, m in {**parts, down: nn.Linear(16, 8, bias=False)}.items()}

    old, new = Tree(gated("w2", "w3")), Tree(gated("w3", "w2"))  # the gate, the way up, the way down
    fresh = {n: t.clone() for n, t in new.state_dict().items()}
    transfer_weights(new, old.state_dict(), min_coverage=0.0)
    for ours, theirs in (("w1", "w1"), ("w3", "w2"), ("w2", "w3")):
        held, right = new.state_dict()[f"{around}{ours}.weight"], old.state_dict()[f"{around}{theirs}.weight"]
        assert torch.equal(held, right) or torch.equal(held, fresh[f"{around}{ours}.weight"])


def test_parts_of_a_square_do_not_show_which_way_round_it_is_stored():
    def layers(*, fused: bool) -> dict[str, nn.Module]:
        keys = {"kv": nn.Linear(8, 8)} if fused else {"k": nn.Linear(8, 4), "v": nn.Linear(8, 4)}
        attention = {f"attn.{n}": m for n, m in {"q": nn.Linear(8, 8), **keys, "out": nn.Linear(8, 8)}.items()}
        parts = {**attention, "mlp.up": nn.Linear(8, 16), "mlp.down": nn.Linear(16, 8)}
        return {f"blocks.0.{n}": m for n, m in parts.items()}

    for fused in (True, False):
        old, new = Tree(layers(fused=fused)), Tree(layers(fused=not fused))
        stored = {n: t.mT.contiguous() if t.ndim == 2 else t for n, t in old.state_dict().items()}  # (in, out)
        fresh = {n: t.clone() for n, t in new.state_dict().items()}
        transfer_weights(new, stored, min_coverage=0.0)
        keys = [old.state_dict()[f"blocks.0.attn.{n}.weight"] for n in (("kv",) if fused else ("k", "v"))]
        held = [new.state_dict()[f"blocks.0.attn.{n}.weight"] for n in (("k", "v") if fused else ("kv",))]
        left = [fresh[f"blocks.0.attn.{n}.weight"] for n in (("k", "v") if fused else ("kv",))]
        assert torch.equal(torch.cat(held), torch.cat(keys)) or all(map(torch.equal, held, left))
        query = new.state_dict()["blocks.0.attn.q.weight"]
        right = old.state_dict()["blocks.0.attn.q.weight"], fresh["blocks.0.attn.q.weight"]
        assert any(torch.equal(query, one) for one in right)


def _kernels(turned: bool) -> tuple[dict[str, Tensor], nn.Module]:
    """A feed-forward as matrices, stored either way, and as kernels of one by one under other names."""
    maps = {"block.intermediate": (24, 8), "block.output": (8, 24)}
    state = {f"{n}.weight": torch.randn(*(size[::-1] if turned else size)) for n, size in maps.items()}
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"lin1": nn.Conv2d(8, 24, 1, bias=False), "lin2": nn.Conv2d(24, 8, 1, bias=False)})}
    )
    return state, model


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_that_became_kernels_may_be_stored_the_other_way_round(turned):
    state, model = _kernels(turned)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    transfer_weights(model, dict(sorted(state.items())), min_coverage=0.0)
    for name, old in (("block.lin1.weight", "block.intermediate.weight"), ("block.lin2.weight", "block.output.weight")):
        right = state[old].T if turned else state[old]
        now = model.state_dict()[name]
        assert torch.equal(now, before[name]) or torch.equal(now[..., 0, 0], right)


def test_squares_are_open_where_what_is_left_beside_them_fits_only_turned():
    """Queries and output are square; keys and values, of fewer heads, show that the kernels stood the other way."""
    sizes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    state = {f"b.{k}.attn.{n}.weight": torch.randn(*size[::-1]) for k in range(2) for n, size in sizes.items()}
    state |= {
        f"b.{k}.mlp.{n}.weight": torch.randn(*size)
        for k in range(2)
        for n, size in (("up", (16, 8)), ("down", (8, 16)))
    }
    inside = {
        f"{k}": nn.ModuleDict(
            {
                "attn": nn.ModuleDict({n: nn.Conv2d(i, o, 1, bias=False) for n, (o, i) in sizes.items()}),
                "mlp": nn.ModuleDict({"up": nn.Conv2d(8, 16, 1, bias=False), "down": nn.Conv2d(16, 8, 1, bias=False)}),
            }
        )
        for k in range(2)
    }
    model = nn.ModuleDict({"b": nn.ModuleDict(inside)})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    transfer_weights(model, state, min_coverage=0.0)
    for name, tensor in model.state_dict().items():
        right = state[name].T if "attn" in name else state[name]
        assert torch.equal(tensor, before[name]) or torch.equal(tensor[..., 0, 0], right), name


def test_a_map_to_one_number_shows_how_matrices_are_stored():
    """All maps are square but the last one, a row here and a column there: nothing else shows that all were turned."""
    names = ("q", "k", "v", "o")
    state = {f"blocks.{k}.attn.{n}.weight": torch.randn(8, 8) for k in range(2) for n in names}
    state["score.weight"] = torch.randn(8, 1)
    maps = nn.ModuleList(
        nn.ModuleDict({"attn": nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in names})}) for _ in range(2)
    )
    model = nn.ModuleDict({"blocks": maps, "score": nn.Linear(8, 1, bias=False)})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    transfer_weights(model, state, min_coverage=0.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) or torch.equal(tensor, state[name].T), name
