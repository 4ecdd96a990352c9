"""Plans as files: exact both ways, stable, human-sized, strict, and safe to open."""

import json
import re
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wsl.errors import PlanError
from lit_wsl.plan.file import plan_to_text
from lit_wsl.plan.operations import run_shapes
from lit_wsl.transfer import (
    Ambiguity,
    Candidate,
    Cast,
    Concat,
    Permute,
    PlanEntry,
    Reshape,
    SideSummary,
    Split,
    Stack,
    TransferPlan,
    Transpose,
    Unmatched,
)

SIDE = SideSummary("old.ckpt", 3, 1000, 1, 10, "ab" * 32)


def make_plan(entries, **rest):
    return TransferPlan(tuple(entries), SIDE, SIDE, **rest)


def entry(source, target, shape=(4, 4), **rest):
    return PlanEntry((source,), (target,), (), (shape,), (shape,), **rest)


def mixture_of_experts(layers=6, dense=2, experts=4):
    """Layers that differ: first dense, then with experts, so that no family runs through all of them."""
    entries = []
    for i in range(layers):
        old, new = f"layers.{i}.", f"model.blocks.{i}."
        for leaf, shape in (("weight", (24, 8)), ("bias", (24,))):
            targets = tuple(f"{new}attn.{x}.{leaf}" for x in "qkv")
            part = (8, *shape[1:])
            split = (Split(0, (8, 8, 8)),)
            entries.append(
                PlanEntry((f"{old}attn.qkv.{leaf}",), targets, split, (shape,), (part,) * 3, score=0.9 + i / 1000)
            )
        if i < dense:
            entries.append(entry(f"{old}mlp.up.weight", f"{new}mlp.up.weight", reason="same name"))
        else:
            sources = tuple(f"{old}mlp.experts.{e}.{n}.weight" for e in range(experts) for n in ("gate", "up"))
            operations = (Concat(0, (4, 4)), Stack(0, experts))
            shapes = ((4, 8),) * len(sources)
            target = f"{new}mlp.experts.gate_up"
            entries.append(PlanEntry(sources, (target,), operations, shapes, tuple(run_shapes(operations, shapes))))
        entries.append(entry(f"{old}norm.weight", f"{new}ln.weight", (8,)))
    return entries


def conv_net():
    """Numbered names that interleave (conv1, bn1, conv2, bn2) and a Sequential whose members alternate."""
    names = []
    for stage in range(1, 4):
        for block in range(stage + 1):
            names += [f"layer{stage}.{block}.{kind}_{n}.weight" for n in (1, 2) for kind in ("conv", "bn")]
            names += [f"layer{stage}.{block}.tail.{n}.weight" for n in range(4)]
    return [entry("old." + name, name, (n % 2 + 1,)) for n, name in enumerate(names)]


# ---------------------------------------------------------------- exact and stable

parts = st.sampled_from(["layers", "0", "1", "2", "10", "attn", "conv_1", "conv_2", "007", "q", "w"])
plain_names = st.lists(parts, min_size=1, max_size=4).map(".".join)
odd_names = st.text(st.characters(codec="utf-8"), max_size=6)
any_names = st.one_of(plain_names, plain_names, plain_names, odd_names)
shares = st.floats(0, 1).map(lambda x: round(x, 2))
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.sampled_from(["parameter", "buffer"])


@st.composite
def entries_with(draw, targets):
    """An entry for one or two of the target names, with operations that fit."""
    if len(targets) == 2:
        size = draw(st.integers(1, 3))
        return PlanEntry(
            (draw(any_names),),
            targets,
            (Split(0, (size, size)),),
            ((2 * size, 4),),
            ((size, 4),) * 2,
            score=draw(shares),
        )
    shape = draw(shapes)
    operations = draw(
        st.sampled_from(
            [
                (),
                (Cast("float16", "float32"),),
                (Permute(tuple(reversed(range(len(shape))))),),
                (Reshape(shape, (*shape, 1)), Stack(1, 1)),
            ]
        )
    )
    known = draw(st.booleans())
    return PlanEntry(
        (draw(any_names),),
        targets,
        operations,
        (shape,) if known else (),
        tuple(run_shapes(operations, [shape])) if known else (),
        draw(kinds),
        draw(shares),
        draw(shares),
        draw(st.sampled_from(["", "same name", "position 3 of 12", "ü"])),
    )


@st.composite
def plans(draw):
    names = draw(st.lists(any_names, unique=True, max_size=24))
    entries, rest = [], list(names)
    while rest and draw(st.integers(0, 9)):
        count = min(len(rest), draw(st.sampled_from([1, 1, 1, 2])))
        entries.append(draw(entries_with(tuple(rest[:count]))))
        rest = rest[count:]
    used = {s for e in entries for s in e.sources}
    ambiguous = tuple(
        Ambiguity((name,), tuple(Candidate((draw(any_names),), draw(shares)) for _ in range(2)), draw(shapes), "equal")
        for name in rest[: len(rest) // 2]
    )
    unmatched = tuple(Unmatched(n, draw(shapes), draw(kinds), "no partner") for n in rest[len(rest) // 2 :])
    loose = draw(st.lists(any_names, unique=True, max_size=5))
    return make_plan(
        entries,
        ambiguous=ambiguous,
        unmatched_target=unmatched,
        unmatched_source=tuple(Unmatched(n, (2,), "parameter", "left over") for n in loose if n not in used),
        options={"threshold": draw(shares), "weights": {"shape": 0.5, "name": 0.5}, "adapt": ["x"], "none": None},
        proof=draw(st.sampled_from(["proven", "refuted", "not tested"])),
        notes=tuple(draw(st.lists(odd_names, max_size=2))),
    )


@settings(max_examples=150, deadline=None)
@given(plans())
def test_a_plan_comes_back_from_its_file_exactly(plan):
    text = plan_to_text(plan)
    back = TransferPlan.from_text(text)
    assert back == plan
    assert plan_to_text(back) == text


@settings(max_examples=60, deadline=None)
@given(plans())
def test_a_plan_comes_back_from_yaml_exactly(plan):
    assert TransferPlan.from_text(plan_to_text(plan, yaml=True)) == plan


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml", "plan"])
def test_saving_and_loading_files_of_every_suffix(tmp_path, suffix):
    plan = make_plan(mixture_of_experts())
    file = tmp_path / f"plan.{suffix}"
    plan.save(file)
    assert TransferPlan.load(file) == plan
    assert (file.read_text()[0] == "{") == (suffix not in ("yaml", "yml"))


def test_equal_plans_give_equal_bytes_whatever_the_order_of_their_options():
    first = make_plan(mixture_of_experts(), options={"a": 1, "b": {"x": 1, "y": 2}})
    second = make_plan(mixture_of_experts(), options={"b": {"y": 2, "x": 1}, "a": 1})
    assert first == second
    assert plan_to_text(first) == plan_to_text(second)


# ---------------------------------------------------------------- human-sized


def maps(plan):
    return [line["map"] for line in json.loads(plan_to_text(plan))["entries"]]


def test_layers_fold_even_if_they_differ_and_keep_the_models_order():
    assert maps(make_plan(mixture_of_experts())) == [
        "layers.{0..5}.attn.qkv.weight -> model.blocks.{0..5}.attn.[q,k,v].weight",
        "layers.{0..5}.attn.qkv.bias -> model.blocks.{0..5}.attn.[q,k,v].bias",
        "layers.{0..1}.mlp.up.weight -> model.blocks.{0..1}.mlp.up.weight",
        "layers.{2..5}.mlp.experts.[0..3].[gate,up].weight -> model.blocks.{2..5}.mlp.experts.gate_up",
        "layers.{0..5}.norm.weight -> model.blocks.{0..5}.ln.weight",
    ]


def test_several_indices_offsets_and_steps_fold():
    plan = make_plan(entry(f"s.{i}.b.{j}.w", f"stage.{i + 1}.{3 * j}.w") for i in range(4) for j in range(3))
    assert maps(plan) == ["s.{i:0..3}.b.{j:0..2}.w -> stage.{i:1..4}.{j:0..6..3}.w"]
    assert TransferPlan.from_text(plan_to_text(plan)) == plan


def test_a_conv_net_with_interleaved_names_keeps_its_order_in_few_lines():
    plan = make_plan(conv_net())
    assert TransferPlan.from_text(plan_to_text(plan)) == plan
    assert len(maps(plan)) < len(plan) / 2


def test_lists_sorted_by_name_fold_as_well():
    names = sorted(f"b.{i}.{leaf}" for i in range(12) for leaf in ("w", "b"))
    plan = make_plan([], unmatched_source=tuple(Unmatched(n, (1,), "parameter", "left over") for n in names))
    document = json.loads(plan_to_text(plan))
    assert [line["name"] for line in document["unmatched_source"]] == ["b.{0..11}.b", "b.{0..11}.w"]
    assert TransferPlan.from_text(plan_to_text(plan)) == plan


def test_a_plan_of_45000_entries_is_saved_in_linear_time():
    def saved(experts):
        plan = make_plan(
            entry(f"m.{i}.experts.{e}.{old}.weight", f"model.{i}.ffn.{e}.{new}.weight", score=0.9 + i / 1000)
            for i in range(60)
            for e in range(experts)
            for old, new in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        )
        start = time.process_time()
        return plan, plan_to_text(plan), time.process_time() - start

    _, _, tenth = saved(25)
    plan, text, whole = saved(250)
    assert whole < 30 * tenth  # quadratic would be a hundred times
    assert len(text) < 10_000
    assert TransferPlan.from_text(text) == plan


# ---------------------------------------------------------------- editing

SMALL = make_plan(
    [entry(f"a.{i}.w", f"b.{i}.w") for i in range(4)] + [entry("head.w", "fc.w", (2, 4), score=0.8)],
    unmatched_target=(Unmatched("new.w", (4, 4), "parameter", "no partner"),),
    unmatched_source=(Unmatched("old.w", (4, 4), "parameter", "no partner"),),
)


def edited(change, plan=SMALL):
    document = json.loads(plan_to_text(plan))
    change(document)
    return json.dumps(document, indent=1)


def test_entries_can_be_removed_changed_and_added_by_hand():
    def change(document):
        document["entries"][0]["map"] = "a.{0..2}.w -> b.{1..3}.w"
        del document["entries"][1]
        document["entries"].append({"map": "old.w -> new.w", "ops": ["transpose"], "shape": [4, 5]})

    plan = TransferPlan.from_text(edited(change))
    assert [(e.sources[0], e.targets[0]) for e in plan.entries] == [
        ("a.0.w", "b.1.w"),
        ("a.1.w", "b.2.w"),
        ("a.2.w", "b.3.w"),
        ("old.w", "new.w"),
    ]
    assert plan.by_target["new.w"].operations == (Transpose(),)
    assert plan.by_target["new.w"].target_shapes == ((5, 4),)
    assert plan.unmatched_source == plan.unmatched_target == ()  # what an added entry uses is no longer left over


def test_yaml_written_by_hand_is_read():
    plan = TransferPlan.from_text(
        """
        format: lit_wsl.plan
        version: 1
        source: {label: old}
        target: {label: new}
        entries:
          - map: enc.{0..1}.qkv -> encoder.{0..1}.[q, k, v]   # fused before
            ops: [{split: {dim: 0, sizes: [2, 2, 2]}}]
          - map: a, b -> c
            ops: [{concat: {dim: 0, sizes: [1, 1]}}]
        """.replace("\n        ", "\n")
    )
    assert [e.targets for e in plan.entries] == [
        ("encoder.0.q", "encoder.0.k", "encoder.0.v"),
        ("encoder.1.q", "encoder.1.k", "encoder.1.v"),
        ("c",),
    ]


def set_entry(**fields):
    return lambda document: document["entries"][0].update(fields)


WRONG = {
    "not an arrow": (set_entry(map="a.w b.w"), "one arrow"),
    "two arrows": (set_entry(map="a -> b -> c"), "one arrow"),
    "empty side": (set_entry(map="a ->"), "empty name"),
    "open brace": (set_entry(map="a.{0..3 -> b"), "not closed"),
    "nested braces": (set_entry(map="a.{0..{1..2}} -> b"), "not closed"),
    "no range": (set_entry(map="a.{x..y} -> b.{0..1}"), "not a range"),
    "empty range": (set_entry(map="a.{3..0} -> b.{3..0}"), "without values"),
    "unequal ranges": (set_entry(map="a.{0..3}.w -> b.{0..2}.w"), "walk together"),
    "huge range": (set_entry(map="a.{0..999999999} -> b.{0..999999999}"), "expands to more"),
    "huge product": (set_entry(map=".".join(f"{{v{c}:0..9}}" for c in "abcdefgh") + " -> b"), "expands to more"),
    "huge list": (set_entry(map="[0..9].[0..9].[0..9].[0..9].[0..9].[0..9].[0..9] -> b"), "expands to more"),
    "unknown field": (set_entry(skore=1), "did you mean 'score'"),
    "score as text": (set_entry(score="high"), "number from 0 to 1"),
    "score too high": (set_entry(score=7), "number from 0 to 1"),
    "score is true": (set_entry(score=True), "number from 0 to 1"),
    "runs too short": (set_entry(score=[[3, 0.5]]), "stands for 4 entries"),
    "runs too long": (set_entry(score=[[10**12, 0.5]]), "more than 4"),
    "kind": (set_entry(kind="weights"), "'parameter', 'buffer'"),
    "shape of text": (set_entry(shape=["x"]), "takes shapes"),
    "negative shape": (set_entry(shape=[-1]), "takes shapes"),
    "both shapes": (set_entry(shapes=[[1]]), "one of the two"),
    "target shapes": (set_entry(target_shapes=[[9, 9]]), "the operations give"),
    "unknown operation": (set_entry(ops=["rotate"]), "unknown operation 'rotate'"),
    "missing argument": (set_entry(ops=[{"split": {"dim": 0}}]), "takes ['dim', 'sizes']"),
    "wrong argument": (set_entry(ops=[{"split": {"dim": "0", "sizes": [4]}}]), "dim must be int"),
    "operation that does not fit": (set_entry(ops=[{"split": {"dim": 0, "sizes": [3, 3]}}]), "must have 6 entries"),
    "operations give too many": (set_entry(ops=[{"split": {"dim": 0, "sizes": [2, 2]}}]), "gives 2 tensors for 1"),
    "two sources without operation": (set_entry(map="a, c -> b"), "must say how 2 sources become 1"),
    "attribute as dtype": (set_entry(ops=[{"cast": {"source": "float32", "target": "load"}}]), "not a torch data type"),
    "map and sources": (set_entry(sources="x"), "one of the two"),
    "entry is a list": (lambda d: d["entries"].insert(0, []), "mapping with text as keys"),
    "duplicated target": (lambda d: d["entries"].append({"map": "x -> b.2.w"}), "already filled by"),
    "no entries": (lambda d: d.pop("entries"), "'entries' is missing"),
    "newer version": (lambda d: d.update(version=99), "install a newer one"),
    "version as text": (lambda d: d.update(version="1"), "whole number"),
    "order": (lambda d: d.update(order={"entries": "random"}), "'tree', 'sorted', 'listed'"),
    "proof": (lambda d: d.update(proof="yes"), "'proven'"),
    "notes": (lambda d: d.update(notes="x"), "a list"),
    "unknown top-level field": (lambda d: d.update(extra=1), "unknown field 'extra'"),
    "negative count": (lambda d: d["source"].update(parameters=-1), "not be negative"),
    "other format": (lambda d: d.update(format="x"), "this is not a plan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_refused_with_the_place_and_what_is_allowed(name):
    change, message = WRONG[name]
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        TransferPlan.from_text(edited(change))
    assert len(str(caught.value)) < 1000


def test_messages_name_the_line_and_the_entry():
    text = edited(set_entry(map="a.{0..3}.w -> b.{0..3}.w", score="x"))
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "a.{0..3}.w" in row)
    with pytest.raises(PlanError, match=rf"line {line}, entry 1 .*field 'score'"):
        TransferPlan.from_text(text)


def test_errors_name_the_file(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("{}")
    with pytest.raises(PlanError, match=r"plan\.json: this is not a plan"):
        TransferPlan.load(file)
    file.write_bytes(b"{\xff}")
    with pytest.raises(PlanError, match="not UTF-8"):
        TransferPlan.load(file)


ALIAS_BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{c}: &{c} [*{p}, *{p}]" for p, c in zip("abcdefghijklmnop", "bcdefghijklmnopq")
)

HOSTILE = {
    "empty": "",
    "not a mapping": "[1, 2]",
    "torn": '{"format": "lit_wsl.plan", "entries": [',
    "NaN": '{"format": "lit_wsl.plan", "x": NaN}',
    "infinity": '{"format": "lit_wsl.plan", "x": -Infinity}',
    "key twice": '{"format": "lit_wsl.plan", "format": "lit_wsl.plan"}',
    "deep JSON": '{"format": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "deep YAML": "format: " + "[" * 20_000 + "]" * 20_000,
    "long integer": '{"format": ' + "9" * 100_000 + "}",
    "YAML object": "format: !!python/object/apply:os.system ['true']",
    "YAML key twice": "format: lit_wsl.plan\nformat: lit_wsl.plan",
    "YAML aliases": ALIAS_BOMB,
    "YAML date": "format: 2024-99-99",
    "YAML tabs": "format:\t\n\t- x",
    "many commas": '{"format": "lit_wsl.plan", "source": {}, "target": {}, "entries": [{"map": "'
    + "," * 500_000
    + '"}]}',
    "many brackets": '{"format": "lit_wsl.plan", "source": {}, "target": {}, "entries": [{"map": "'
    + "[" * 500_000
    + '"}]}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly(name):
    start = time.process_time()
    with pytest.raises(PlanError):
        TransferPlan.from_text(HOSTILE[name])
    assert time.process_time() - start < 5


JUNK = [
    *(None, True, 0, -1, 10**30, 1.5, 1e308, "", "a", "a -> b", "{0..3}", "a.{i:0..1}.{j:0..9}", "a, b", "->", "\0"),
    *([], {}, [[]], [1, 2], ["x"], [None], {"split": {}}, [[1, 0.5]], [[0, 1]], [["x", 2]], {"op": "split"}),
    *(["transpose"], [{"permute": {"dims": [0, 1]}}], [{"reshape": {"source": [4], "target": [2, 2]}}]),
    *([{"stack": {"dim": 99, "count": 1}}], [{"split": {"dim": 5, "sizes": [1]}}], [{"fan_out": {"count": 10**9}}]),
    *([{"concat": {"dim": 0, "sizes": [10**20]}}], [{"unstack": {"dim": 0, "count": 10**12}}]),
    [{"fan_out": {"count": 10**5}}, {"fan_out": {"count": 10**5}}],
]


def places(node, path=()):
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def test_whatever_is_changed_in_a_plan_it_is_a_plan_or_a_plan_error():
    whole = make_plan(
        mixture_of_experts(layers=3),
        ambiguous=(Ambiguity(("x.0",), (Candidate(("y.0",), 0.5, (Split(0, (1, 1)),)),), (2,), "equal"),),
        unmatched_target=(Unmatched("u.0", (1,), "buffer", "r"),),
        options={"a": [1, {"b": None}]},
    )
    document = json.loads(plan_to_text(whole))
    everywhere = list(places(document))
    random = Random(0)
    readable = 0
    for _ in range(700):
        changed = json.loads(json.dumps(document))
        *path, last = random.choice(everywhere)
        node = changed
        for key in path:
            node = node[key]
        if random.random() < 0.2:
            del node[last]
        else:
            node[last] = random.choice(JUNK)
        start = time.process_time()
        try:
            plan = TransferPlan.from_text(json.dumps(changed))
        except PlanError:
            pass
        else:
            readable += 1
            assert TransferPlan.from_text(plan_to_text(plan)) == plan
        assert time.process_time() - start < 2
    assert readable > 20


def test_a_plan_that_is_not_plain_data_is_not_written(tmp_path):
    file = tmp_path / "plan.json"
    for plan in (make_plan([], options={"x": object()}), make_plan([entry("a", "b", score=float("nan"))])):
        with pytest.raises(PlanError, match="plain data"):
            plan.save(file)
    assert list(tmp_path.iterdir()) == []
