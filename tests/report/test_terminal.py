"""What the terminal views show, parsed from what is printed: at 80 columns, without colour, in ASCII, in a notebook."""

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from lit_wsl import transfer_weights
from lit_wsl.mapper import WeightMapper
from lit_wsl.matching.options import MatchingOptions
from lit_wsl.plan.coverage import measure_coverage
from lit_wsl.plan.entries import Ambiguity, Candidate, PlanEntry, SideSummary
from lit_wsl.plan.plan import TransferPlan
from lit_wsl.report.drawing import as_html, plain
from lit_wsl.report.report import TransferReport
from lit_wsl.report.rows import describe_from_plan, mapping_rows, open_questions
from lit_wsl.report.scores import BreakdownView
from lit_wsl.report.terminal import (
    AnalysisView,
    MappingView,
    ReportView,
    gap_lines,
    markdown,
    module_rows,
    print_report,
    remark_lines,
    summary_lines,
)
from lit_wsl.report.trees import HierarchyView, tree_lines
from lit_wsl.structure import describe


def show(*views, width=80, encoding="utf-8", color=False):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, no_color=not color, force_terminal=color)
    for view in views:
        console.print(view)
    file.flush()
    return raw.getvalue().decode(encoding)


def squeeze(text):
    """The text without borders and line breaks, so that wrapped names come together."""
    return re.sub(r"[│|╭╮╰╯─+\s]+", "", text)


def report_of(example, **details):
    source, target, plan = example
    return TransferReport.of(plan, measure_coverage(plan, source, target), source, target, **details)


def all_views(example):
    source, target, plan = example
    report = report_of(example, warnings=("look at this, which is longer than a line " * 3,), notes=("a note",))
    yield ReportView(report)
    yield ReportView(report, "Mapping", modules=False, mapping=MappingView(plan))
    yield MappingView(plan)
    yield MappingView(plan, by="tensor", folded=False)
    yield HierarchyView(source, target)
    yield HierarchyView(source, target, plan)
    yield AnalysisView(report)
    for name in ("embed.weight", "blocks.3.attn.qkv.weight", "new_head.weight", "pair.x"):
        yield BreakdownView(name, plan, source, target, MatchingOptions.of(plan.options))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_console_and_no_colour_leaks(example, width):
    for view in all_views(example):
        text = show(view, width=width)
        assert text.strip()
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text


def test_every_view_can_be_written_to_an_ascii_log(example):
    for view in all_views(example):
        assert show(view, encoding="ascii").isascii()


def test_every_view_shows_itself_in_a_notebook(example):
    for view in all_views(example):
        shown = view._repr_mimebundle_(include=[], exclude=[])
        assert shown["text/html"].startswith("<pre")
        assert shown["text/plain"].strip()


def test_summary_tells_coverage_counts_and_options(example):
    text = show(ReportView(report_of(example), "Mapping", mapping=MappingView(example[2])))
    assert "Mapping old.ckpt -> NewModel" in text
    moved, of = 20 * 8 + 12 * (3 * 64 + 256 + 8), 20 * 8 + 12 * (3 * 64 + 256 + 8) + 10 + 24
    assert f"model:   {100 * moved / of:.1f}% of {of:,} elements, 37 of 40 tensors" in text
    assert "steps:   37 (13 exact, 12 concat, 12 transpose), lowest score 0.55" in text
    assert "options: threshold 0.6, best_match, buffers lenient" in text
    assert "missing (1): new_head.weight 3x8" in text
    assert "ambiguous, not loaded (2):" in text


def test_one_report_says_the_same_in_every_form(example):
    """The terminal, a log file, a notebook and Markdown: the same lines, the same table."""
    report = report_of(example, warnings=("look",), notes=("a note",))
    terminal = plain(ReportView(report))
    lines = [*summary_lines(report), *gap_lines(report), *remark_lines(report)]
    for text in (terminal, str(report), markdown(report)):
        for line in lines:
            assert line in text
    for row in module_rows(report.coverage)[1]:
        assert re.search(r"\s+".join(map(re.escape, row.cells)), terminal)
        assert f"| {' | '.join(row.cells)} |" in markdown(report)
    assert re.sub(r"<[^>]+>", "", as_html(ReportView(report))).split()[0] == "Loaded"


@pytest.mark.parametrize("width", [80, 160])
def test_mapping_is_folded_with_operation_count_and_lowest_score(example, width):
    text = show(MappingView(example[2]), width=width)
    rows = [line for line in text.splitlines() if re.match(r"[01]\.\d\d", line)]
    assert [re.match(r"([01]\.\d\d)( [?!])? +(\w+) +x(\d+)", row).groups() for row in rows] == [
        ("0.72", " ?", "exact", "1"),
        ("0.83", None, "concat", "12"),
        ("0.55", " !", "transpose", "12"),
        ("0.95", None, "exact", "12"),
    ]
    flat = squeeze(text)
    for name in ("query", "key", "value"):
        assert f"encoder.layer.{{0..11}}.attention.{name}" in flat
    assert "blocks.{0..11}.attn.qkv" in flat
    assert "3of8x8->24x8" in flat.replace("query/key/value->", "")


def test_unfolded_and_by_tensor_list_every_step(example):
    plan = example[2]
    text = squeeze(show(MappingView(plan, by="tensor", folded=False), width=200))
    for entry in plan.entries:
        for name in (*entry.sources, *entry.targets):
            assert name in text
    assert len(mapping_rows(plan, by="tensor", folded=False)) == len(plan.entries)


def test_rows_hold_every_step_exactly_once_whatever_the_folding(example):
    plan = example[2]
    for by in ("group", "tensor"):
        for folded in (True, False):
            held = [entry for row in mapping_rows(plan, by=by, folded=folded) for entry in row.entries]
            assert sorted(map(str, held)) == sorted(map(str, plan.entries))


def test_a_shortened_table_keeps_the_doubtful_rows_and_says_what_it_hides(example):
    text = show(MappingView(example[2], max_rows=2))
    assert "0.55 !" in text
    assert "0.72 ?" in text
    assert "2 more lines, with scores of 0.83 and above" in text


def test_colour_follows_confidence(example):
    text = show(MappingView(example[2]), color=True)
    for code, score in ((31, "0.55 !"), (33, "0.72 ?"), (32, "0.83")):
        assert f"\x1b[{code}m{score}" in text


def test_gaps_show_shape_reason_nearest_partner_and_candidates(example):
    text = squeeze(plain(ReportView(report_of(example))))
    for word in ("old_head.weight10x8", "notargetofshape(10,8)isfree", "stepsscalar(buffer)", "new_head.weight3x8"):
        assert word in text
    assert "nearest:old_head.weight10x8" in text
    assert "pair.x5,pair.y5<-oneoftwin.a0.61,twin.b0.61" in text
    assert "bothordersfitequallywell" in text
    assert "todecide:" in text


def test_ambiguous_families_are_one_line_and_every_reason_is_said_once():
    fused = [
        Ambiguity(
            (f"layers.{i}.attn.{name}.{kind}",),
            (Candidate((f"h.{i}.c_attn.{kind}",), 0.79),),
            shape,
            "q, k, v?",
        )
        for i in range(12)
        for kind, shape in (("weight", (8, 8)), ("bias", (8,)))
        for name in "qkv"
    ]
    other = Ambiguity(("a.x", "a.y"), (Candidate(("b.x",), 0.61), Candidate(("b.y",), 0.6)), (5,), "both fit")
    side = SideSummary.of(describe(nn.Linear(1, 1)))
    plan = TransferPlan((), side, side, ambiguous=(*fused, other))
    text = plain(ReportView(report_of((describe_from_plan(plan, "source"), describe_from_plan(plan, "target"), plan))))
    assert "ambiguous, not loaded (74):" in text
    assert text.count("why: q, k, v?") == text.count("why: both fit") == 1
    assert len(re.findall(r"layers\.\{0\.\.11\}\.attn\.[qkv]\.weight 8x8", text)) == 3
    assert text.count("one of h.{0..11}.c_attn.weight 0.79") == text.count("one of h.{0..11}.c_attn.bias 0.79") == 1
    assert "b.x 0.61, b.y 0.60" in text
    questions = open_questions(plan)
    assert sorted(str(case) for q in questions for case in q.cases) == sorted(map(str, plan.ambiguous))


def test_excluded_buffers_are_counted_said_and_not_called_unmatched():
    old = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    mapper = WeightMapper(old, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))  # excludes buffers
    console = Console(file=io.StringIO(), width=80)
    mapper.print_analysis(console=console)
    text = console.file.getvalue()
    assert "buffers: 3 of 3 excluded: the model keeps its own" in text
    assert "1 module lacks its running statistics" in text
    assert "predicts like an untrained one until it has trained" in text
    row = re.search(r"^1 +2 of 5 +0 +0 +3 +8 of 17 +(\S+)$", text, re.M)
    assert row, text
    assert row[1] != "100.0%"
    assert "missing (" not in text
    assert mapper.get_unmatched() == {"source": [], "target": []}


def test_statistics_that_the_checkpoint_lacks_are_said_and_a_counter_does_not_travel_alone():
    old = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    state = {name: tensor for name, tensor in old.state_dict().items() if "running" not in name}
    new = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    report = transfer_weights(new, state)
    text = str(report)
    assert "buffers: 0.0% of 9 elements, 0 of 3 tensors" in text
    assert "1 module lacks its running statistics" in text
    reasons = {u.name: u.reason for u in (*report.plan.unmatched_target, *report.plan.unmatched_source)}
    assert "together with the statistics" in reasons["1.num_batches_tracked"]
    nearest = re.findall(r"nearest: (.*)", text)
    assert nearest
    for line in nearest:
        assert len(set(line.split(", "))) == len(line.split(", ")), line
    assert "running statistics" not in str(transfer_weights(new, old.state_dict()))


def test_alike_layers_share_a_row_and_a_single_container_is_opened():
    net = nn.Module()
    net.model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    net.scale = nn.Parameter(torch.ones(1))
    side = describe(net)
    plan = TransferPlan(
        tuple(PlanEntry((i.name,), (i.name,)) for i in side.parameters if i.name != "model.7.bias"),
        SideSummary.of(side),
        SideSummary.of(side),
    )
    titles, rows, hidden = module_rows(measure_coverage(plan, side, side))
    assert sorted((row.module, row.cells[titles.index("loaded")], row.state) for row in rows) == [
        ("(root)", "1 of 1", "all"),
        ("model.7", "1 of 2", "part"),
        ("model.{0..6,8..29}", "58 of 58", "all"),
    ]
    assert hidden == ""


@pytest.mark.parametrize("evil", ["a\x1b[2J\x1b]0;owned\x07", "b\x9b31m", "c\u202egnp.exe", "d\rloaded", "e\x07"])
def test_names_cannot_control_the_terminal(evil, capsys):
    source = describe({f"{evil}.weight": torch.ones(3), "x": torch.ones(2, 5)}, label=f"{evil}.ckpt")
    target = describe({"p.weight": torch.ones(3), f"{evil}.y": torch.ones(4, 7)}, label="new")
    entry = PlanEntry((f"{evil}.weight",), ("p.weight",), (), ((3,),), ((3,),), reason=evil)
    plan = TransferPlan((entry,), SideSummary.of(source), SideSummary.of(target))
    report = report_of((source, target, plan), warnings=(evil,), notes=(evil,))
    views = [ReportView(report, mapping=MappingView(plan)), AnalysisView(report), HierarchyView(source, target, plan)]
    views.append(BreakdownView("p.weight", plan, source, target, MatchingOptions.of(plan.options)))
    print_report(report)
    texts = [show(view) for view in views] + [str(report), markdown(report), repr(report), capsys.readouterr().out]
    for text in texts:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert repr(evil[1])[1:-1] in texts[0]


def test_trees_fold_repeated_blocks_and_mark_what_is_matched(example):
    source, target, plan = example
    text = show(HierarchyView(source, target, plan))
    line = next(line for line in text.splitlines() if "{0..11} x12" in line)
    assert "encoder.layer.{0..11} x12" in line
    assert "blocks.{0..11} x12" in line
    assert re.search(r"● query x12 \[W\] 8x8", text)
    assert re.search(r"│ +→ blocks\.\{0\.\.11\}\.", text)  # its partner, below it and inside the tree
    assert re.search(r"embed \[W\] 20x8 → wte", text)
    assert re.search(r"○ old_head \[W\] 10x8", text)
    assert re.search(r"~ NewModel", text)
    plain = show(HierarchyView(source, target))
    assert "●" not in plain
    assert "→" not in plain


def test_trees_obey_the_depth_limit(example):
    source = example[0]
    for depth in range(4):
        lines = tree_lines(source, max_depth=depth, folded=False)
        assert max(line.depth for line in lines) == depth
        assert sum(line.hidden for line in lines) + sum(len(line.paths) for line in lines) == len(
            list(source.root.walk())
        )


def test_unfolded_tree_has_every_module(example):
    source = example[0]
    assert [line.paths[0] for line in tree_lines(source, max_depth=99, folded=False)] == [
        node.path for node in source.root.walk()
    ]


def test_blocks_that_differ_do_not_fold():
    blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    labels = [line.label for line in tree_lines(describe(blocks))]
    assert labels == ["Sequential", "{0..1}", "2"]
    half = [line.label for line in tree_lines(describe(blocks), matched=frozenset({"0.weight"}))]
    assert half == ["Sequential", "0", "1", "2"]


def test_neighbours_with_a_number_in_their_names_fold():
    layers = {f"layer_{i}": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for i in (1, 2, 3)}
    net = nn.ModuleDict({**layers, "stage1_block2": nn.Linear(4, 4), "stage1_block3": nn.Linear(4, 4)})
    labels = [line.label for line in tree_lines(describe(net))]
    assert labels == ["ModuleDict", "layer_{1..3}", "0", "1", "stage1_block2", "stage1_block3"]


def test_names_break_behind_dots(example):
    long = "encoder.layers.encoder_layer.self_attention_with_a_name.out_proj.weight"
    source = describe({long: torch.ones(3)}, label="old")
    target = describe({"p": torch.ones(3)}, label="new")
    plan = TransferPlan(
        (PlanEntry((long,), ("p",), (), ((3,),), ((3,),)),), SideSummary.of(source), SideSummary.of(target)
    )
    rows = [line.strip() for line in show(MappingView(plan, by="tensor"), width=80).splitlines()]
    at = next(i for i, row in enumerate(rows) if "encoder.layers" in row)
    assert rows[at].endswith("encoder.layers.encoder_layer.")
    assert rows[at + 1] == "self_attention_with_a_name.out_proj.weight"


def test_badges_tell_weight_bias_shape_and_buffers():
    text = show(HierarchyView(describe(nn.BatchNorm1d(6)), describe(nn.Linear(3, 2, bias=False))))
    assert re.search(r"\[W\]\[B\] 6 \+3 buffers", text)
    assert re.search(r"\[W\] 2x3", text)


def test_breakdown_adds_up_to_the_score(example):
    source, target, plan = example
    text = show(BreakdownView("embed.weight", plan, source, target, MatchingOptions.of(plan.options)))
    rows = dict(re.findall(r"^│ +(\w+) +([01]\.\d\d) ", text, re.M))
    for part in ("shape", "name", "hierarchy", "token", "edit", "substring", "depth", "path", "order"):
        assert part in rows
    adds = [float(number) for number in re.findall(r" ([01]\.\d\d) +│$", text, re.M)]
    assert sum(adds) == pytest.approx(float(rows["score"]), abs=0.02)
    assert "score 0.72 ?" in text
    assert "margin 0.30" in text


def test_breakdown_of_a_fused_step_shows_the_pair_asked_for(example):
    source, target, plan = example
    view = BreakdownView("encoder.layer.3.attention.key.weight", plan, source, target, MatchingOptions.of(plan.options))
    text = show(view)
    assert text.count("hierarchy") == 1
    assert "concat" in text
    whole = show(BreakdownView("blocks.3.attn.qkv.weight", plan, source, target, MatchingOptions.of(plan.options)))
    assert whole.count("hierarchy") == 3
    assert "why: fused" in whole


def test_breakdown_names_the_runner_up():
    old = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    mapper = WeightMapper(old, nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}))
    console = Console(file=io.StringIO(), width=80)
    mapper.visualize_score_breakdown("first.weight", console=console)
    assert re.search(
        r"runner-up.*\n│ [01]\.\d\d.* second\.weight \(filled from second\.weight\)", console.file.getvalue()
    )


def test_analysis_lists_modules_lowest_scores_and_reasons(example):
    text = show(AnalysisView(report_of(example)))
    assert re.search(r"blocks +36 of 36 +0 +0 +5,472 of 5,472 +100\.0%", text)
    assert re.search(r"new_head +0 of 1 +1 +0 +0 of 24 +0\.0%", text)
    assert "scores: 24 above 0.8, 1 from 0.6 to 0.8, 12 below 0.6" in text
    scores = [float(x) for x in re.findall(r"^ *([01]\.\d\d)(?: [?!])? +[01]\.\d\d", text, re.M)]
    assert scores == sorted(scores)
    assert scores[0] == 0.55
    assert "why: no target of shape (10, 8) is free" in text


def test_mapper_prints_through_the_views():
    torch.manual_seed(0)
    mapper = WeightMapper(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4)))
    for method in ("visualize_mapping", "visualize_hierarchies", "print_analysis"):
        console = Console(file=io.StringIO(), width=80)
        getattr(mapper, method)(console=console)
        assert "Sequential" in console.file.getvalue()


def test_names_beyond_a_log_files_encoding_do_not_stop_the_run():
    module = nn.Module()
    module.register_parameter("größe_日本", nn.Parameter(torch.ones(5)))
    mapper = WeightMapper(module, module)
    for encoding, shown in (("ascii", "gr??e_??"), ("latin-1", "größe_??"), ("utf-8", "größe_日本")):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        console = Console(file=file, width=80)
        mapper.visualize_mapping(console=console)
        mapper.visualize_hierarchies(console=console, show_matches=True)
        mapper.visualize_score_breakdown("größe_日本", console=console)
        file.flush()
        assert shown in file.buffer.getvalue().decode(encoding)


def test_chains_of_single_modules_stand_on_one_line():
    deep = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 3))))
    assert [line.label for line in tree_lines(describe(deep))] == ["Sequential", "0.0.0"]


def test_operations_that_change_values_are_marked(example):
    from dataclasses import dataclass, replace
    from typing import ClassVar

    from lit_wsl.plan.operations import Transpose

    @dataclass(frozen=True)
    class Lossy(Transpose):
        name: ClassVar[str] = "resize"
        lossless: ClassVar[bool] = False

    plan = example[2]
    first = replace(plan.entries[0], operations=(Lossy(),))
    marked = show(MappingView(replace(plan, entries=(first, *plan.entries[1:]))))
    assert "resize *" in marked
    assert "* changes values" in marked
    assert "changes values" not in show(MappingView(plan))


def norms(count, names):
    """Blocks with a convolution and a batch norm each."""
    blocks = [nn.ModuleDict(dict(zip(names, (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))) for _ in range(count)]
    return nn.ModuleDict({"layers": nn.ModuleList(blocks), "head": nn.Linear(4, 2)})


def test_layers_refused_for_the_same_reason_share_its_lines_and_both_sides_tell_it():
    old, new = norms(30, ("conv", "bn")), norms(30, ("filter", "norm"))
    without = {name: t for name, t in old.state_dict().items() if "running" not in name and "num_" not in name}
    text = show(transfer_weights(new, without, buffers="strict", min_coverage=0.0))
    assert len(text.splitlines()) < 40
    assert text.count("buffers='strict' and the module's buffers don't all match") == 2  # missing, and unused
    assert "layers.{0..29}.bn.weight" in text.partition("unused")[2]
    assert "no free buffer of the source has this shape" in text
    refused = WeightMapper(old, new).suggest_mapping(threshold=0.97)
    text = show(refused)
    assert "the best source, layers.{0..29}.conv.weight, scores 0." in text.partition("unused")[0]
    assert "the best target, layers.{0..29}.filter.weight, scores 0." in text.partition("unused")[2]
    assert "nothing shows" not in text


def test_long_lines_hang_below_their_indent_and_stay_whole_in_log_files():
    old, new = norms(3, ("conv", "bn")), norms(3, ("filter", "norm"))
    result = WeightMapper(old, new).suggest_mapping(threshold=0.97)
    lines = show(result).splitlines()
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("    why: ")) + 1]
    assert after.startswith("      ")
    assert all(len(line) <= 80 for line in lines)
    assert any("scores" in line and "below the threshold 0.97" in line for line in plain(result._view()).splitlines())


def test_the_breakdown_of_a_tensor_without_a_partner_names_the_nearest_and_the_remedy():
    console = Console(file=io.StringIO(), width=80)
    old, new = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (10, 7))
    WeightMapper(old, new).visualize_score_breakdown("2.weight", console=console)
    assert "nearest: 2.weight 7x8" in console.file.getvalue()
    assert 'adapt=["partial_head"]' in console.file.getvalue()
