"""The matching by what it must do: outputs equal after a transfer, planted renames found, doubt where nothing tells."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import OrderedDict

import pairs
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pairs import NewEncoder, OldEncoder, randomise, sample
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lit_wsl import transfer_weights
from lit_wsl.mapper import MatchingOptions, build_plan
from lit_wsl.structure import describe, trace_execution_order


def plan_of(source, target, **options):
    return build_plan(describe(source), describe(target), MatchingOptions(**options))


def test_renamed_regrouped_and_fused_models_compute_the_same():
    old, new = randomise(OldEncoder()), randomise(NewEncoder(), 1)
    report = transfer_weights(new, old.state_dict())
    assert report.missing == report.ambiguous == report.unused == ()
    torch.testing.assert_close(new(sample()), old(sample()))


def test_fused_models_split_again():
    old, new = randomise(NewEncoder()), randomise(OldEncoder(), 1)
    transfer_weights(new, old.state_dict())
    torch.testing.assert_close(new(sample()), old(sample()))


def test_a_new_head_stays_and_everything_else_is_found():
    old, new = randomise(OldEncoder()), randomise(NewEncoder(classes=9), 1)
    before = new.head.weight.clone()
    report = transfer_weights(new, old.state_dict())
    assert torch.equal(new.head.weight, before)
    assert set(report.missing) == {"head.weight", "head.bias"}
    features = [m(x) for m, x in ((old.final_layer_norm, torch.ones(1, 16)), (new.backbone.norm, torch.ones(1, 16)))]
    torch.testing.assert_close(features[0], features[1])


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "net.backbone."])
def test_wrappers_do_not_matter(prefix):
    old, new = randomise(OldEncoder()), randomise(OldEncoder(), 1)
    transfer_weights(new, {prefix + name: t for name, t in old.state_dict().items()})
    assert torch.equal(new(sample()), old(sample()))


@pytest.mark.parametrize("names", [("a", "b"), ("up", "down")])
@pytest.mark.parametrize("factored", [weight_norm, spectral_norm])
@pytest.mark.parametrize("old_is_factored", [True, False])
def test_a_weight_is_no_factor_of_one(factored, names, old_is_factored):
    def net(made, names):
        return nn.ModuleDict({n: made(nn.Linear(*size)) for n, size in zip(names, ((6, 7), (7, 3)))})

    old, new = net(factored, ("a", "b")), net(lambda layer: layer, names)
    plan = plan_of(old, new) if old_is_factored else plan_of(new, old)
    assert not any("weight" in name for entry in plan for name in entry.targets)
    assert sum("the other a factor of one" in note for note in plan.notes) == 2


def test_counting_from_one_does_not_shift_blocks():
    old, new = randomise(OldEncoder()), randomise(OldEncoder(), 1)
    shifted = OrderedDict()
    for name, tensor in old.state_dict().items():
        parts = name.split(".")
        shifted[".".join([str(int(p) + 1) if p.isdigit() else p for p in parts])] = tensor
    transfer_weights(new, shifted)
    assert torch.equal(new(sample()), old(sample()))


def test_names_beat_registration_order():
    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.value, self.query, self.output, self.key = (nn.Linear(6, 6) for _ in range(4))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    plan = plan_of(Reordered().state_dict(), Plain())
    found = {e.targets[0]: e.sources[0] for e in plan}
    assert found["q.weight"] == "query.weight"
    assert found["k.bias"] == "key.bias"
    assert found["v.weight"] == "value.weight"
    assert found["o.weight"] == "output.weight"


def test_what_nothing_tells_stays_ambiguous_with_its_candidates():
    """Registration is shuffled (the matrices of other shapes prove it), and the names say nothing."""

    def net(names):
        shapes = {"a": (3, 4), "b": (4, 5), "c": (5, 6), "d": (6, 7), "x": (6, 6), "y": (6, 6)}
        return nn.ModuleDict({new: nn.Linear(*shapes[role]) for role, new in names})

    source = net([("d", "p"), ("x", "m"), ("b", "r"), ("y", "n"), ("a", "s"), ("c", "t")])
    target = net([("a", "e"), ("y", "f"), ("b", "g"), ("c", "h"), ("x", "i"), ("d", "j")])
    plan = plan_of(source.state_dict(), target)
    unsure = {t for a in plan.ambiguous for t in a.targets}
    assert {"f.weight", "f.bias", "i.weight", "i.bias"} <= unsure
    for doubt in (a for a in plan.ambiguous if a.targets[0][0] in "fi"):
        leaf = doubt.targets[0].rpartition(".")[2]
        assert {f"m.{leaf}", f"n.{leaf}"} <= {s for c in doubt.candidates for s in c.sources}
        assert doubt.reason
    assert {e.targets[0] for e in plan} == {f"{m}.{leaf}" for m in "eghj" for leaf in ("weight", "bias")}


def test_no_source_fills_two_targets_and_no_target_gets_two_sources():
    plan = plan_of(randomise(OldEncoder()).state_dict(), NewEncoder())
    sources = [s for e in plan for s in e.sources]
    targets = [t for e in plan for t in e.targets]
    assert len(sources) == len(set(sources))
    assert len(targets) == len(set(targets))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4), st.booleans())
def test_a_planted_consistent_rename_is_found(seed, depth, keep_numbers):
    """Any word-for-word renaming, order kept, is undone without a single wrong tensor."""
    rng = random.Random(seed)
    old = OldEncoder(depth=depth)
    words: dict[str, str] = {}

    def rename(part: str) -> str:
        if part.isdigit():
            return part if keep_numbers else str(int(part) + 3)
        if part not in words:
            words[part] = (
                "".join(rng.choice("bdfghjlmnprst") + rng.choice("aeiou") for _ in range(3)) + f"x{len(words)}"
            )
        return words[part]

    truth = {}
    for name in old.state_dict():
        *modules, leaf = name.split(".")
        truth[".".join([*map(rename, modules), leaf])] = name
    assume(list(truth) != sorted(truth))  # what is sorted by chance has no order
    renamed = OrderedDict((new, old.state_dict()[name]) for new, name in truth.items())
    plan = plan_of(renamed, old)
    found = {e.sources[0]: e.targets[0] for e in plan}
    assert found.items() <= truth.items()
    assert len(found) >= len(truth) / 3
    assert {t for a in plan.ambiguous for t in a.targets} | set(found.values()) == set(truth.values())
    assert all(e.badge == "exact" for e in plan)


def test_tied_tensors_fill_untied_ones():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.body, self.lm_head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
            self.lm_head.weight = self.wte.weight

    class Untied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.trunk, self.readout = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)

    old, new = randomise(Tied()), randomise(Untied(), 1)
    report = transfer_weights(new, old.state_dict())
    assert report.missing == ()
    assert torch.equal(new.tokens.weight, old.wte.weight)
    assert torch.equal(new.readout.weight, old.wte.weight)
    assert torch.equal(new.trunk.weight, old.body.weight)


def test_conv1d_is_transposed_square_matrices_too():
    class Conv1D(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(n_in, n_out)), nn.Parameter(torch.empty(n_out))

        def forward(self, x):
            return x @ self.weight + self.bias

    def stack(linear):
        return nn.ModuleList(
            nn.ModuleDict({"up": linear(6, 10), "square": linear(6, 6), "down": linear(10, 6)}) for _ in range(3)
        )

    old, new = randomise(stack(Conv1D)), randomise(stack(nn.Linear), 1)
    report = transfer_weights(new, old.state_dict())
    assert {e.badge for e in report.plan if e.targets[0].endswith("weight")} == {"transpose"}
    x = torch.randn(3, 6)
    for a, b in zip(old, new):
        for name in ("up", "square"):
            torch.testing.assert_close(b[name](x), a[name](x))


def test_experts_stack_and_their_gates_join():
    width, ffn, experts = 4, 6, 5

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Linear(width, ffn, bias=False)
            self.w2 = nn.Linear(ffn, width, bias=False)
            self.w3 = nn.Linear(width, ffn, bias=False)

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * ffn, width))
            self.down_proj = nn.Parameter(torch.empty(experts, width, ffn))

    def layers(make):
        return nn.ModuleList(nn.ModuleDict({"router": nn.Linear(width, 7), "experts": make()}) for _ in range(2))

    old = randomise(layers(lambda: nn.ModuleList(Expert() for _ in range(experts))))
    new = randomise(layers(Stacked), 1)
    transfer_weights(new, old.state_dict())
    for a, b in zip(old, new):
        for e in range(experts):
            one = a["experts"][e]
            assert torch.equal(b["experts"].down_proj[e], one.w2.weight)
            assert torch.equal(b["experts"].gate_up_proj[e], torch.cat([one.w1.weight, one.w3.weight]))
    back = randomise(layers(lambda: nn.ModuleList(Expert() for _ in range(experts))), 2)
    transfer_weights(back, new.state_dict())
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name]), name


def test_execution_order_settles_what_registration_cannot():
    class Net(nn.Module):
        def __init__(self, order):
            super().__init__()
            shapes = {"a": (3, 6), "x": (6, 6), "b": (6, 5), "c": (5, 6), "y": (6, 6), "d": (6, 2)}
            self.order = order
            for role, name in order:
                self.add_module(name, nn.Linear(*shapes[role]))

        def forward(self, x):
            for role in "axbcyd":
                x = getattr(self, dict(self.order)[role])(x)
            return x

    source = Net([("a", "p"), ("x", "q"), ("b", "r"), ("c", "s"), ("y", "t"), ("d", "u")])
    target = Net([("d", "e"), ("y", "f"), ("b", "g"), ("a", "h"), ("x", "i"), ("c", "j")])
    blind = plan_of(source.state_dict(), target)
    assert blind.ambiguous
    order = trace_execution_order(target, (torch.randn(1, 3),))
    seeing = build_plan(describe(source.state_dict()), describe(target, execution_order=order))
    found = {e.targets[0]: e.sources[0] for e in seeing}
    assert found["i.weight"] == "q.weight"
    assert found["f.weight"] == "t.weight"
    assert {(e.sources, e.targets) for e in blind} <= {(e.sources, e.targets) for e in seeing}


PLAN_SCRIPT = """
import json, sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads({threads})
from pairs import NewEncoder, OldEncoder, randomise
from lit_wsl.mapper import build_plan
from lit_wsl.structure import describe
plan = build_plan(describe(randomise(OldEncoder()).state_dict()), describe(NewEncoder()))
print(json.dumps([[e.sources, e.targets, e.badge, e.score, e.margin, e.reason] for e in plan]))
"""


class Chain(nn.Module):
    """Layers of few shapes, registered in one order and run in another."""

    def __init__(self, widths, registered, name):
        super().__init__()
        self.run = [name(k) for k in range(len(widths) - 1)]
        for k in registered:
            self.add_module(name(k), nn.Linear(widths[k], widths[k + 1]))

    def forward(self, x):
        for name in self.run:
            x = torch.tanh(getattr(self, name)(x))
        return x


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([3, 4]), min_size=4, max_size=8), st.randoms(use_true_random=False))
def test_a_sample_only_turns_missing_into_right(widths, chance):
    layers = list(range(len(widths) - 1))
    words = [f"{chance.choice(['body', 'neck', 'tail'])}_{letter}" for letter in "abcdefg"]
    orders = [chance.sample(layers, len(layers)) if chance.random() < 0.5 else layers for _ in range(2)]
    old, new = Chain(widths, orders[0], lambda k: f"stage{k}"), Chain(widths, orders[1], lambda k: words[k])
    x = torch.randn(2, widths[0])
    without = build_plan(describe(old.state_dict()), describe(new))
    order = trace_execution_order(new, (x,))
    with_sample = build_plan(describe(old.state_dict()), describe(new, execution_order=order))
    found = [{t: (e.sources, e.operations) for e in plan for t in e.targets} for plan in (without, with_sample)]
    contradicted = {t for a in with_sample.ambiguous for t in a.targets}  # run otherwise than registered
    assert {t: f for t, f in found[0].items() if t not in contradicted}.items() <= found[1].items()


def test_the_plan_is_the_same_for_every_hash_seed_and_thread_count():
    plans = set()
    for seed, threads in (("0", 1), ("1", 2), ("4711", 1)):
        script = PLAN_SCRIPT.format(folder=os.path.dirname(pairs.__file__), threads=threads)
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        plans.add(done.stdout)
    assert len(plans) == 1
    assert len(json.loads(plans.pop())) > 20


def test_another_order_of_unrelated_modules_flips_nothing():
    """A source whose unrelated modules are listed in another order gives no other pairs; it may leave some open."""
    old = randomise(OldEncoder())
    items = list(old.state_dict().items())
    top = OrderedDict()
    for name, tensor in items:
        top.setdefault(name.split(".")[0], []).append((name, tensor))
    found = []
    for order in (list(top), list(reversed(top))):
        state = OrderedDict(pair for key in order for pair in top[key])
        found.append({e.targets: e.sources for e in plan_of(state, NewEncoder())})
    assert found[1].items() <= found[0].items()
    assert len(found[1]) > len(found[0]) / 2


def test_a_bias_does_not_leave_its_weight():
    """A norm's bias has the size of a conv's bias, and where the checkpoint's conv has none it is still no match."""

    class Part(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, bias=fused)
            if not fused:
                self.a_norm = nn.BatchNorm2d(8)
            self.b = nn.Conv2d(8, 8, 3, bias=False)
            self.b_norm = nn.BatchNorm2d(8)

    plan = plan_of(Part(False).state_dict(), Part(True))
    found = {e.targets[0]: e.sources[0] for e in plan if e.kind == "parameter"}
    assert "a.bias" not in found
    assert found["a.weight"] == "a.weight"
    assert found["b_norm.weight"] == "b_norm.weight"
    assert found["b_norm.bias"] == "b_norm.bias"


def test_a_layer_put_into_a_sequence_takes_no_weights_by_its_number():
    old = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    new = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    found = {e.targets[0]: e.sources[0] for e in plan_of(old.state_dict(), new)}
    assert found == {"0.weight": "0.weight", "0.bias": "0.bias", "3.weight": "2.weight", "3.bias": "2.bias"}


class Blocks(nn.Module):
    """Blocks of layers that run in an order of their own."""

    def __init__(self, blocks, layers, order):
        super().__init__()
        sizes = [(6, 9), (9, 9), (9, 9), (9, 6)]
        self.order, self.place = [layers[k] for k in order], blocks
        stack = [nn.ModuleDict({n: nn.Linear(*s) for n, s in zip(layers, sizes)}) for _ in range(3)]
        self.add_module(blocks, nn.ModuleList(stack))

    def forward(self, x):
        for block in getattr(self, self.place):
            y = x
            for name in self.order:
                y = block[name](y)
            x = x + y
        return x


@pytest.mark.parametrize("swapped", [False, True])
def test_order_decides_nothing_where_the_model_runs_otherwise(swapped):
    old = Blocks("blocks", ["widen", "first_thing", "other", "shrink"], [0, 1, 2, 3])
    new = Blocks("stages", ["enlarge", "circle", "square", "reduce"], [0, 2, 1, 3] if swapped else [0, 1, 2, 3])
    report = transfer_weights(new, old.state_dict(), example_args=(torch.zeros(1, 6),), min_coverage=0.0)
    filled = {name for name in report.plan.by_target if "circle" in name or "square" in name}
    assert len(filled) == (0 if swapped else 12)
