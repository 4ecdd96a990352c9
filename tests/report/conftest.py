import pytest

from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary, Unmatched
from lit_wsl.plan.operations import Concat, Transpose
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.structure.description import ModelDescription, ParameterInfo

DIM, DEPTH = 8, 12


def describe(label, rows):
    infos = [
        ParameterInfo(name, shape, kind=kind, index=i, execution_order=i) for i, (name, shape, kind) in enumerate(rows)
    ]
    return ModelDescription(tuple(infos), label=label)


def make_plan(source, target, entries, **details):
    return TransferPlan(
        entries=tuple(entries),
        source=SideSummary.of(source),
        target=SideSummary.of(target),
        options={"threshold": 0.6, "strategy": "best_match", "buffers": "lenient"},
        **details,
    )


def transformer(depth=DEPTH):
    """Separate q, k, v against fused qkv, one transposed layer, one ambiguous pair, leftovers on both sides."""
    s, t, entries = [], [], []
    s.append(("embed.weight", (20, DIM), "parameter"))
    t.append(("wte.weight", (20, DIM), "parameter"))
    entries.append(
        PlanEntry(("embed.weight",), ("wte.weight",), (), ((20, DIM),), ((20, DIM),), score=0.72, margin=0.3)
    )
    for i in range(depth):
        qkv = tuple(f"encoder.layer.{i}.attention.{n}.weight" for n in ("query", "key", "value"))
        s += [(name, (DIM, DIM), "parameter") for name in qkv]
        s += [
            (f"encoder.layer.{i}.mlp.weight", (DIM, 4 * DIM), "parameter"),
            (f"encoder.layer.{i}.norm.weight", (DIM,), "parameter"),
        ]
        t += [
            (f"blocks.{i}.attn.qkv.weight", (3 * DIM, DIM), "parameter"),
            (f"blocks.{i}.mlp.fc.weight", (4 * DIM, DIM), "parameter"),
            (f"blocks.{i}.norm.weight", (DIM,), "parameter"),
        ]
        fused = (Concat(0, (DIM, DIM, DIM)),)
        entries.append(
            PlanEntry(qkv, (t[-3][0],), fused, ((DIM, DIM),) * 3, (t[-3][1],), score=0.83, margin=0.2, reason="fused")
        )
        entries.append(
            PlanEntry((s[-2][0],), (t[-2][0],), (Transpose(),), (s[-2][1],), (t[-2][1],), score=0.55, margin=0.1)
        )
        entries.append(PlanEntry((s[-1][0],), (t[-1][0],), (), ((DIM,),), ((DIM,),), score=0.95, margin=0.5))
    s += [("twin.a", (5,), "parameter"), ("twin.b", (5,), "parameter"), ("old_head.weight", (10, DIM), "parameter")]
    t += [("pair.x", (5,), "parameter"), ("pair.y", (5,), "parameter"), ("new_head.weight", (3, DIM), "parameter")]
    s.append(("steps", (), "buffer"))
    candidates = (Candidate(("twin.a",), 0.61), Candidate(("twin.b",), 0.61))
    source, target = describe("old.ckpt", s), describe("NewModel", t)
    return (
        source,
        target,
        make_plan(
            source,
            target,
            entries,
            ambiguous=(Ambiguity(("pair.x", "pair.y"), candidates, (5,), "both orders fit equally well"),),
            unmatched_source=(
                Unmatched("twin.a", (5,), "parameter", "ambiguous"),
                Unmatched("twin.b", (5,), "parameter", "ambiguous"),
                Unmatched("old_head.weight", (10, DIM), "parameter", "no target of shape (10, 8) is free"),
                Unmatched("steps", (), "buffer", "no target of this shape is free"),
            ),
            unmatched_target=(
                Unmatched("new_head.weight", (3, DIM), "parameter", "no source of shape (3, 8) is free"),
            ),
        ),
    )


@pytest.fixture
def example():
    return transformer()


@pytest.fixture(scope="session")
def large():
    """10,000 tensors a side, as a mixture of experts has them."""
    rows = [("embed.weight", (64, 16), "parameter")]
    for i in range(36):
        rows += [(f"layers.{i}.attn.{n}.weight", (16, 16), "parameter") for n in ("q", "k", "v", "o")]
        rows += [
            (f"layers.{i}.experts.{j}.{n}.weight", (32, 16), "parameter")
            for j in range(91)
            for n in ("gate", "up", "down")
        ]
    source = describe("experts.safetensors", rows)
    target = describe("Experts", [(f"model.{n}", shape, kind) for n, shape, kind in rows])
    entries = [
        PlanEntry((n,), (f"model.{n}",), (), (shape,), (shape,), score=0.7 + 0.3 * (i % 7 > 0))
        for i, (n, shape, _) in enumerate(rows)
    ]
    return source, target, make_plan(source, target, entries)
