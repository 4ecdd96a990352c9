from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wsl.structure.families import fold, fold_names

names = st.lists(
    st.sampled_from(["a", "b", "0", "1", "2", "10", "007", "layer_3", "x1", "w"]), min_size=1, max_size=5
).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(names, names), max_size=40), st.integers(0, 3))
def test_families_expand_to_exactly_the_rows_they_fold(rows, modulus):
    keys = [i % (modulus + 1) for i in range(len(rows))]
    families = fold(rows, keys)
    back = {}
    for family in families:
        assert len({keys[m] for m in family.members}) == 1
        assert len(family.rows()) == len(family.members)
        for member, row in zip(family.members, family.rows()):
            assert member not in back
            back[member] = row
    assert [back[i] for i in range(len(rows))] == rows


def test_independent_indices_fold_as_a_product_and_linked_ones_move_together():
    rows = [(f"layers.{i}.experts.{j}.w", f"blocks.{i}.mlp.{j}.w") for i in range(4) for j in range(8)]
    assert [f.patterns for f in fold(rows)] == [("layers.{0..3}.experts.{0..7}.w", "blocks.{0..3}.mlp.{0..7}.w")]


def test_renumbered_stages_fold_stage_by_stage():
    depths = [2, 6, 2]
    rows, k = [], 0
    for stage, depth in enumerate(depths):
        for block in range(depth):
            rows.append((f"stages.{stage}.{block}.w", f"blocks.{k}.w"))
            k += 1
    assert [f.patterns for f in fold(rows)] == [
        ("stages.0.{0..1}.w", "blocks.{0..1}.w"),
        ("stages.1.{0..5}.w", "blocks.{2..7}.w"),
        ("stages.2.{0..1}.w", "blocks.{8..9}.w"),
    ]


def test_gaps_and_other_shapes_stay_visible():
    assert fold_names([f"b.{i}.w" for i in (0, 1, 2, 5)]) == ["b.{0..2,5}.w"]
    assert [f.patterns[0] for f in fold([(f"b.{i}.w",) for i in range(3)], [(3,), (4,), (4,)])] == [
        "b.0.w",
        "b.{1..2}.w",
    ]


def test_folding_is_linear_enough_for_large_models():
    rows = [(f"m.layers.{i}.mlp.experts.{j}.up.weight",) for i in range(60) for j in range(256)]
    assert [f.patterns[0] for f in fold(rows)] == ["m.layers.{0..59}.mlp.experts.{0..255}.up.weight"]


def test_indices_that_walk_at_different_paces_fold_together():
    rows = [(f"features.{3 * i + 1}.w", f"convs.{i}.w", f"back.{9 - i}.w") for i in range(4)]
    (family,) = fold(rows)
    assert family.patterns == ("features.{1..10..3}.w", "convs.{0..3}.w", "back.{9..6..-1}.w")
    assert family.rows() == rows
