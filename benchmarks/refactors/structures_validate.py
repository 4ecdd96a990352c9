"""Networks of the part that validates: words, sound, series, graphs, ranking and control."""

from __future__ import annotations

from benchmarks.refactors.structures import Draft, structure
from benchmarks.refactors.structures_fourth import stored


def attending(d: Draft, at: str, order: str = "qkvo", context: int | None = None, bias: bool | None = None) -> None:
    """An attention whose maps are registered in an order of its own; keys and values may read something else."""
    s = d.sizes
    for role in order:
        inner = context if context and role in "kv" else s.width
        d.linear(f"{at}/{role}", s.kv if role in "kv" else s.width, inner, bias)


def registered_after(d: Draft, start: int, *roles: str) -> None:
    """Of the leaves added since, those of these roles are registered last; they run where they were added."""
    fresh = d.leaves[start:]
    d.leaves[start:] = sorted(fresh, key=lambda leaf: leaf.role in roles)


def torch_layer(d: Draft, at: str) -> None:
    """A layer as the framework writes it: norms behind their parts in the run, and last in the registration."""
    start = len(d.leaves)
    attending(d, f"{at}/attn")
    d.norm(f"{at}/norm_a")
    d.linear(f"{at}/ff1", d.sizes.hidden, d.sizes.width)
    d.linear(f"{at}/ff2", d.sizes.width, d.sizes.hidden)
    d.norm(f"{at}/norm_b")
    registered_after(d, start, "norm_a", "norm_b")


def layered(d: Draft, path: str, kind: str, inner: int) -> None:
    """A recurrent module of several layers: a piece for each."""
    s = d.sizes
    d.add(path, kind, s.width, inner)
    leaf = d.leaves[-1]
    pieces = tuple(f"{path}~{i}" for i in range(s.depth))
    sizes = ((s.width, inner), *((s.width, s.width) for _ in range(s.depth - 1)))
    d.leaves[-1] = type(leaf)(leaf.path, kind, pieces, sizes, leaf.bias, when=leaf.when)


@structure("validate", "captioner")
def show_and_attend(d: Draft) -> None:
    """Convolutions look, a cell speaks, and an attention of three maps stands between."""
    s = d.sizes
    for i in range(s.stages):
        d.conv(f"eyes#{i}/eye_conv", s.width, s.width if i else 3)
        d.add(f"eyes#{i}/eye_norm", "batch_norm", s.width)
    d.linear("glance/see_map", s.hidden, s.width)
    d.linear("glance/state_map", s.hidden, s.width)
    d.linear("glance/score_map", 1, s.hidden)
    d.add("spoken", "embedding", s.vocabulary, s.width)
    d.add("speaker", "lstm", s.width, 2 * s.width)
    stored(d, "cell")
    for role in ("start_h", "start_c", "lens"):
        d.linear(role, s.width, s.width)
    d.linear("speak", s.vocabulary, s.width)


@structure("validate", "interpreter")
def interpreter(d: Draft) -> None:
    """Recurrent layers on both sides, a general score between them."""
    s = d.sizes
    d.add("heard", "embedding", s.vocabulary, s.width)
    layered(d, "listen", "gru", s.width)
    d.linear("turn", s.width, s.width)
    d.add("told", "embedding", s.vocabulary + 2, s.width)
    layered(d, "answering", "gru", s.width)
    d.linear("general", s.width, s.width, bias=False)
    d.linear("merging", s.width, 2 * s.width)
    d.linear("tell", s.vocabulary + 2, s.width)


@structure("validate", "voice", "tokens", "layer", "attention", "list")
def voice_maker(d: Draft) -> None:
    """Text to frames: layers of the framework, three predictors of one make, and convolutions behind the frames."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.add("speakers", "embedding", 5, s.width)
    for i in range(s.depth):
        torch_layer(d, f"blocks#{i}")
    for role in ("lengths", "melody", "loudness"):
        for n in "12":
            d.add(f"{role}/guess{n}", "conv1d", s.width, s.width, 3)
            d.norm(f"{role}/guess_norm{n}")
        d.linear(f"{role}/guess_out", 1, s.width)
    d.add("melody_steps", "embedding", 7, s.width)
    d.add("loudness_steps", "embedding", 7, s.width)
    d.linear("frames", s.outputs, s.width)
    for i in range(s.stages):
        first, last = i == 0, i == s.stages - 1
        d.add(f"after#{i}/after_conv", "conv1d", s.outputs if last else s.width, s.outputs if first else s.width, 3)
        d.add(f"after#{i}/after_norm", "batch_norm", s.outputs if last else s.width)


@structure("validate", "ctc", "attention", "list")
def letter_recogniser(d: Draft) -> None:
    """Halved feed-forwards around an attention with places and a convolution; five norms at the end of each block."""
    s = d.sizes
    d.conv("thin1", s.width, 1)
    d.conv("thin2", s.width, s.width)
    d.linear("thin_map", s.width, 2 * s.width)
    for i in range(s.depth):
        at, start = f"blocks#{i}", len(d.leaves)
        d.norm(f"{at}/norm_half1")
        d.linear(f"{at}/half1/rise", s.hidden, s.width)
        d.linear(f"{at}/half1/fall", s.width, s.hidden)
        d.norm(f"{at}/norm_listen")
        attending(d, f"{at}/listening")
        d.linear(f"{at}/listening/place_map", s.width, s.width, bias=False)
        d.add(f"{at}/listening/bias_u", "table", 2, 4)
        d.add(f"{at}/listening/bias_v", "table", 2, 4)
        d.norm(f"{at}/norm_conv")
        d.add(f"{at}/convolving/points1", "conv1d", 2 * s.width, s.width, 1)
        d.add(f"{at}/convolving/wide", "conv1d", s.width, 1, 3)
        d.add(f"{at}/convolving/conv_norm", "batch_norm", s.width)
        d.add(f"{at}/convolving/points2", "conv1d", s.width, s.width, 1)
        d.norm(f"{at}/norm_half2")
        d.linear(f"{at}/half2/rise", s.hidden, s.width)
        d.linear(f"{at}/half2/fall", s.width, s.hidden)
        d.norm(f"{at}/norm_end")
        registered_after(d, start, "norm_half1", "norm_listen", "norm_conv", "norm_half2", "norm_end")
    d.linear("letters_out", s.vocabulary, s.width)


@structure("validate", "sound")
def sound_coder(d: Draft) -> None:
    """Weight-normed convolutions with learned periods, codes in small spaces of their own, and the way back."""
    s = d.sizes
    d.add("sound_in", "weight_norm", s.width, 1, 3)
    for i in range(s.stages):
        _periodic(d, f"shrinking#{i}")
        d.add(f"shrinking#{i}/pace", "weight_norm", s.width, s.width, 4)
    for j in range(s.experts):
        d.linear(f"codings#{j}/squeeze", 2, s.width)
        d.add(f"codings#{j}/codes", "embedding", 16, 2)
        d.linear(f"codings#{j}/spread", s.width, 2)
    for i in range(s.stages):
        d.add(f"growing#{i}/lift", "upconv1d", s.width, s.width, 4)
        _periodic(d, f"growing#{i}")
    d.add("last_period", "table", 1, s.width, 1)
    d.add("sound_out", "weight_norm", 1, s.width, 3)


def _periodic(d: Draft, at: str) -> None:
    s = d.sizes
    d.add(f"{at}/period1", "table", 1, s.width, 1)
    d.add(f"{at}/dilated", "weight_norm", s.width, s.width, 3)
    d.add(f"{at}/period2", "table", 1, s.width, 1)
    d.add(f"{at}/pointed", "weight_norm", s.width, s.width, 1)


@structure("validate", "season", "coder", "list", "attention")
def season_transformer(d: Draft) -> None:
    """Values by a convolution, the calendar by tables, thinning convolutions between the layers of the encoder."""
    s = d.sizes
    d.add("level_mean", "table", s.outputs)
    d.add("level_spread", "table", s.outputs)
    for side in ("coder", "decoder"):
        d.add(f"{side}_input/values", "conv1d", s.width, s.outputs if s.outputs > 1 else 2, 3, bias=False)
        for role, rows in (("hours", 24), ("days", 7), ("months", 13)):
            d.add(f"{side}_input/{role}", "embedding", rows, s.width)
    for i in range(s.depth):
        at = f"coder/blocks#{i}"
        attending(d, f"{at}/own_look", "kvqo")
        _steps(d, at)
    for i in range(s.depth - 1):
        d.add(f"coder/thinning#{i}/thin_conv", "conv1d", s.width, s.width, 3)
        d.add(f"coder/thinning#{i}/thin_norm", "batch_norm", s.width)
    d.norm("coder/closing")
    for i in range(s.depth):
        at = f"decoder/blocks#{i}"
        attending(d, f"{at}/own_look", "kvqo")
        attending(d, f"{at}/other_look", "kvqo")
        _steps(d, at)
        d.norm(f"{at}/step_norm3")
    d.norm("decoder/closing")
    d.linear("forecast_map", s.outputs, s.width)


def _steps(d: Draft, at: str) -> None:
    d.add(f"{at}/step1", "conv1d", d.sizes.hidden, d.sizes.width, 1)
    d.add(f"{at}/step2", "conv1d", d.sizes.width, d.sizes.hidden, 1)
    d.norm(f"{at}/step_norm1")
    d.norm(f"{at}/step_norm2")


@structure("validate", "diagonal")
def diagonal_states(d: Draft) -> None:
    """Diagonal state spaces: steps, decays and frequencies as parameters; norms and gates in lists beside them."""
    s = d.sizes
    d.linear("signal_in", s.width, 3)
    for i in range(s.depth):
        at = f"kernels#{i}"
        d.add(f"{at}/log_step", "table", s.width)
        d.add(f"{at}/log_decay", "table", s.width, 3)
        d.add(f"{at}/frequency", "table", s.width, 3)
        d.add(f"{at}/readings", "table", s.width, 3, 2)
        d.add(f"{at}/passing", "table", s.width)
    for i in range(s.depth):
        d.linear(f"gated_maps#{i}", 2 * s.width, s.width)
    for i in range(s.depth):
        d.norm(f"state_norms#{i}")
    d.linear("signal_out", s.outputs, s.width)


@structure("validate", "isomorphism")
def isomorphism_network(d: Draft) -> None:
    """Sums over neighbours, each with a scalar of its own; a node that sees all; norms in a list beside the rounds."""
    s = d.sizes
    for j, rows in enumerate((9, 5, 4)):
        d.add(f"atom_kinds#{j}", "embedding", rows, s.width)
    d.add("overseer", "embedding", 1, s.width)
    for i in range(s.depth):
        at = f"summing#{i}"
        d.linear(f"{at}/sum_in", 2 * s.width, s.width)
        d.add(f"{at}/sum_norm", "batch_norm", 2 * s.width)
        d.linear(f"{at}/sum_out", s.width, 2 * s.width)
        d.add(f"{at}/selfness", "table")
        for j, rows in enumerate((6, 3)):
            d.add(f"{at}/bond_kinds#{j}", "embedding", rows, s.width)
    for i in range(s.depth):
        d.add(f"round_norms#{i}", "batch_norm", s.width)
    for i in range(s.depth - 1):
        d.linear(f"overseeing#{i}/over_in", 2 * s.width, s.width)
        d.linear(f"overseeing#{i}/over_out", s.width, 2 * s.width)
    d.linear("pool_gate", 1, s.width)
    d.linear("graph_out", s.outputs, s.width)


@structure("validate", "tasks")
def gated_tasks(d: Draft) -> None:
    """Several tasks, a gate of each over common experts, a tower of each behind them."""
    s = d.sizes
    for j, rows in enumerate((11, 6)):
        d.add(f"fields#{j}", "embedding", rows, s.width)
    many = s.stages + 1
    for t in range(many):
        d.linear(f"task_gates#{t}", s.experts, 2 * s.width, bias=False)
    for t in range(many):
        d.linear(f"task_towers#{t}/tower_in", s.width, s.hidden)
        d.linear(f"task_towers#{t}/tower_out", 1, s.width)
    for e in range(s.experts):
        d.linear(f"specialists#{e}/skill_in", s.width, 2 * s.width)
        d.linear(f"specialists#{e}/skill_out", s.hidden, s.width)
    d.add("task_weights", "table", many)


@structure("validate", "taste")
def taste_towers(d: Draft) -> None:
    """Who and what, each in a tower: a table of ids, tables of traits, maps and their norms in two lists."""
    s = d.sizes
    for side, rows in (("visitor", 23), ("product", 23 if s.same_heads else 29)):
        d.add(f"{side}/identity", "embedding", rows, s.width)
        for j in range(2):
            d.add(f"{side}/traits#{j}", "embedding", 4 + j, 4)
        for i in range(s.depth):
            d.linear(f"{side}/deep_maps#{i}", s.width, s.width if i else s.width + 8)
        for i in range(s.depth):
            d.add(f"{side}/deep_norms#{i}", "batch_norm", s.width)
        d.linear(f"{side}/taste_out", s.width, s.width, bias=False)
    d.linear("title_map", s.width, s.hidden)
    d.add("heat", "table")


@structure("validate", "crossing")
def crossing_ranker(d: Draft) -> None:
    """Low-rank crosses beside a deep stack; a linear part of one weight for each value."""
    s = d.sizes
    for j, rows in enumerate((9, 9, 13)):
        d.add(f"first_order#{j}", "embedding", rows, 1)
    for j, rows in enumerate((9, 9, 13)):
        d.add(f"second_order#{j}", "embedding", rows, 4)
    for i in range(s.depth):
        d.linear(f"crosses#{i}/thin_side", 2, 12, bias=False)
        d.linear(f"crosses#{i}/thick_side", 12, 2)
    for i in range(s.depth):
        d.linear(f"stack_maps#{i}", s.hidden, s.hidden if i else 12)
        d.add(f"stack_norms#{i}", "batch_norm", s.hidden)
    d.linear("rank_out", 1, 12 + s.hidden, bias=False)
    d.add("rank_shift", "table", 1)


@structure("validate", "sequence_taste", "attention", "neck")
def next_item(d: Draft) -> None:
    """A list for each kind of part: norms before attention, attentions, norms before convolutions, convolutions."""
    s = d.sizes
    d.add("items", "embedding", s.vocabulary, s.width)
    d.add("item_places", "embedding", 11, s.width)
    for i in range(s.depth):
        d.norm(f"look_norms#{i}")
    for i in range(s.depth):
        attending(d, f"looks#{i}")
    for i in range(s.depth):
        d.norm(f"think_norms#{i}")
    for i in range(s.depth):
        d.add(f"thoughts#{i}/think1", "conv1d", s.width, s.width, 1)
        d.add(f"thoughts#{i}/think2", "conv1d", s.width, s.width, 1)
    d.norm("neck")


@structure("validate", "policy")
def remembering_policy(d: Draft) -> None:
    """One pair of eyes, two memories, two stacks of maps; the acting half first."""
    s = d.sizes
    for i in range(s.stages + 1):
        d.conv(f"sight#{i}", s.width, s.width if i else 4)
    d.linear("sight_map", s.width, 3 * s.width)
    for half in ("acting", "judging"):
        d.add(f"{half}_memory", "lstm", s.width, s.width)
    for half in ("acting", "judging"):
        for i in range(s.depth):
            d.linear(f"{half}#{i}", s.width, s.width)
    d.add("log_noise", "table", s.outputs)
    d.linear("act_out", s.outputs, s.width)
    d.linear("judge_out", 1, s.width)


@structure("validate", "experts_layer", "tokens", "attention", "gated", "neck")
def routed_language_model(d: Draft) -> None:
    """Dense and routed layers in turn, their feed-forwards registered first; the head shares the table's parameter."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at, start = f"turns#{i}", len(d.leaves)
        d.norm(f"{at}/norm_look", bias=False)
        attending(d, f"{at}/look", bias=False)
        d.norm(f"{at}/norm_think", bias=False)
        if i % 2 == 0:
            d.gated(f"{at}/plain_think")
        else:
            for e in range(s.experts):
                d.gated(f"{at}/chosen_think/chosen#{e}")
            d.linear(f"{at}/chosen_think/choice", s.experts, s.width, bias=False)
        d.leaves[start:] = sorted(d.leaves[start:], key=lambda leaf: leaf.path[1].role in ("norm_look", "look"))
    d.norm("neck", bias=False)
    d.linear("vocabulary", s.vocabulary, s.width, bias=False)
    d.leaves[-1] = type(d.leaves[-1])(
        d.leaves[-1].path, "linear", ("tokens",), d.leaves[-1].sizes, False, "tied", d.leaves[-1].when
    )
