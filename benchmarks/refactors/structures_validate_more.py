"""Networks of the part that validates: pictures, scenes, fields and statistics."""

from __future__ import annotations

from benchmarks.refactors.structures import Draft, structure
from benchmarks.refactors.structures_fourth import stored
from benchmarks.refactors.structures_validate import attending, registered_after, torch_layer


@structure("validate", "gated_unet")
def attention_gated_unet(d: Draft) -> None:
    """All ways down, all lifts, all gates on the skips, all ways up: four lists."""
    s = d.sizes
    levels = s.stages + 1
    for i in range(levels):
        _twice(d, f"descent#{i}", s.width if i else 3)
    for i in range(s.stages):
        d.add(f"lifts#{i}/lift_conv", "upconv2d", s.width, s.width, 2)
        d.add(f"lifts#{i}/lift_norm", "batch_norm", s.width)
    for i in range(s.stages):
        for role in ("deep_side", "skip_side"):
            d.conv(f"skip_gates#{i}/{role}", s.width // 2, s.width, 1)
            d.add(f"skip_gates#{i}/{role}_norm", "batch_norm", s.width // 2)
        d.conv(f"skip_gates#{i}/gate_out", 1, s.width // 2, 1)
    for i in range(s.stages):
        _twice(d, f"ascent#{i}", 2 * s.width)
    d.conv("paint", s.outputs, s.width, 1)


def _twice(d: Draft, at: str, inner: int) -> None:
    d.conv(f"{at}/twice1", d.sizes.width, inner)
    d.add(f"{at}/twice_norm1", "batch_norm", d.sizes.width)
    d.conv(f"{at}/twice2", d.sizes.width, d.sizes.width)
    d.add(f"{at}/twice_norm2", "batch_norm", d.sizes.width)


@structure("validate", "picture_code")
def picture_autoencoder(d: Draft) -> None:
    """Centre and spread of a code, unfolded and painted again; a table of codes as buffers beside it."""
    s = d.sizes
    for i in range(s.stages):
        d.conv(f"narrowing#{i}/narrow_conv", s.width, s.width if i else 3)
        d.add(f"narrowing#{i}/narrow_norm", "batch_norm", s.width)
    d.linear("code_spread", s.outputs, 4 * s.width)
    d.linear("code_centre", s.outputs, 4 * s.width)
    d.add("code_book", "codebook", 12, s.width)
    d.linear("unfold", 4 * s.width, s.outputs)
    for i in range(s.stages):
        d.add(f"widening#{i}/wide_conv", "upconv2d", s.width, s.width, 3)
        d.add(f"widening#{i}/wide_norm", "batch_norm", s.width)
    d.conv("repaint", 3, s.width)


@structure("validate", "denoiser", "attention")
def conditioned_denoiser(d: Draft) -> None:
    """Residual units that hear the clock, looks at a condition of another width, down, in the middle and up."""
    s = d.sizes
    d.conv("noise_in", s.width, s.outputs)
    d.linear("clock/clock1", s.hidden, s.width)
    d.linear("clock/clock2", s.hidden, s.hidden)
    for i in range(s.stages):
        _unit(d, f"falling#{i}/unit")
        _glance(d, f"falling#{i}/glancing")
        d.conv(f"falling#{i}/halve", s.width, s.width)
    _unit(d, "bottom/before")
    _glance(d, "bottom/glancing")
    _unit(d, "bottom/behind")
    for i in range(s.stages):
        _unit(d, f"rising#{i}/unit", 2)
        _glance(d, f"rising#{i}/glancing")
        d.conv(f"rising#{i}/double", s.width, s.width)
    d.add("noise_norm", "group_norm", s.width)
    d.conv("noise_out", s.outputs, s.width)


def _unit(d: Draft, at: str, wide: int = 1) -> None:
    s = d.sizes
    d.add(f"{at}/unit_norm1", "group_norm", wide * s.width)
    d.conv(f"{at}/unit_conv1", s.width, wide * s.width)
    d.linear(f"{at}/hear_clock", s.width, s.hidden)
    d.add(f"{at}/unit_norm2", "group_norm", s.width)
    d.conv(f"{at}/unit_conv2", s.width, s.width)
    if wide > 1:
        d.conv(f"{at}/around", s.width, wide * s.width, 1)


def _glance(d: Draft, at: str) -> None:
    s = d.sizes
    d.norm(f"{at}/glance_norm")
    attending(d, f"{at}/glance", context=12, bias=False)
    d.norm(f"{at}/gated_norm")
    d.linear(f"{at}/gated_in", 2 * s.hidden, s.width)
    d.linear(f"{at}/gated_out", s.width, s.hidden)


@structure("validate", "pyramid", "convs")
def pyramid_detector(d: Draft) -> None:
    """A base in stages, side and smoothing convolutions, two towers of one make, and a scalar for each level."""
    s = d.sizes
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"base#{j}/base_units#{i}"
            for n in "12":
                d.add(f"{at}/bn{n}", "batch_norm", s.width)
                d.conv(f"{at}/conv{n}", s.width, s.width, bias=False)
    for j in range(s.stages):
        d.conv(f"aside#{j}", s.width, s.width, 1)
    for j in range(s.stages):
        d.conv(f"smoothing#{j}", s.width, s.width)
    for tower in ("what_tower", "where_tower"):
        for i in range(2):
            d.conv(f"{tower}#{i}/tower_conv", s.width, s.width)
            d.add(f"{tower}#{i}/tower_norm", "group_norm", s.width)
    d.conv("what_out", s.outputs, s.width)
    d.conv("where_out", 4, s.width)
    d.conv("centre_out", 1, s.width)
    for j in range(s.stages):
        d.add(f"level_gain#{j}", "table", 1)


@structure("validate", "prompted", "patches", "position", "list", "layer", "attention", "head")
def prompted_transformer(d: Draft) -> None:
    """Prompts before every layer, a bottleneck beside each feed-forward; norms registered last, as frameworks do."""
    s = d.sizes
    d.conv("patches", s.width, 3, 2)
    d.add("cls", "table", 1, 1, s.width)
    d.add("pos", "table", 1, 10, s.width)
    for i in range(s.depth):
        d.add(f"prompts#{i}", "table", 5, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        torch_layer(d, at)
        d.linear(f"{at}/bottleneck/lean_in", 3, s.width)
        d.linear(f"{at}/bottleneck/lean_out", s.width, 3)
        d.add(f"{at}/bottleneck/lean_gain", "table", 1)
    d.linear("head", s.outputs, s.width)


@structure("validate", "statistics")
def standing_statistics(d: Draft) -> None:
    """Most of it is counted or given: means, a bank of filters, a window, prior odds; little is learned."""
    s = d.sizes
    for role in ("seen_mean", "seen_spread"):
        d.add(role, "table", s.width)
        stored(d, "kind:buffer")
    d.add("filter_bank", "table", s.width, 9)
    stored(d, "kind:buffer")
    d.add("window", "table", 9)
    stored(d, "kind:buffer")
    for i in range(s.depth):
        d.linear(f"little#{i}/little_map", s.width, s.width, bias=False)
        d.add(f"little#{i}/little_norm", "plain_batch_norm", s.width)
    d.add("memory", "codebook", 14, s.width)
    d.linear("odds_map", s.outputs, s.width)
    d.add("prior_odds", "table", s.outputs)
    stored(d, "kind:buffer")


@structure("validate", "unpaired")
def unpaired_translators(d: Draft) -> None:
    """Two painters and two judges, in pairs of one make; the judges are normed by their spectra."""
    s = d.sizes
    for painter in ("paint_ab", "paint_ba"):
        d.conv(f"{painter}/stroke_in", s.width, 3)
        d.add(f"{painter}/stroke_norm", "group_norm", s.width)
        for i in range(s.depth):
            for n in "12":
                d.conv(f"{painter}/touches#{i}/touch{n}", s.width, s.width)
                d.add(f"{painter}/touches#{i}/touch_norm{n}", "group_norm", s.width)
        d.add(f"{painter}/enlarge", "upconv2d", s.width, s.width, 3)
        d.conv(f"{painter}/stroke_out", 3, s.width)
    for judge in ("judge_a", "judge_b"):
        for i in range(s.stages + 1):
            d.add(f"{judge}/verdicts#{i}", "spectral2d", s.width, s.width if i else 3, 3)
        d.add(f"{judge}/verdict_out", "spectral2d", 1, s.width, 3)


@structure("validate", "attributes", "stem", "convs", "list")
def face_attributes(d: Draft) -> None:
    """A trunk of pre-activated blocks, a common map, and heads for many labels, some of one size."""
    s = d.sizes
    d.conv("stem_conv", s.width, 3)
    d.add("stem_bn", "batch_norm", s.width)
    for i in range(s.depth):
        for n in "12":
            d.add(f"blocks#{i}/bn{n}", "batch_norm", s.width)
            d.conv(f"blocks#{i}/conv{n}", s.width, s.width, bias=False)
    d.linear("common_map", s.hidden, s.width)
    for role, out in (("years", 1), ("mood", s.outputs), ("hair", s.outputs if s.same_heads else 6), ("glasses", 2)):
        d.linear(f"labels/{role}", out, s.hidden)
    d.linear("labels/smile", 2, s.hidden)
    d.add("doubt", "table", 5)


@structure("validate", "cloud")
def cloud_hierarchy(d: Draft) -> None:
    """Sets of sets of points: in every level a list of convolutions and a list of their norms, and the way back."""
    s = d.sizes
    for which, inner in (("turn_points", 3), ("turn_features", s.width)):
        d.add(f"{which}/turn1", "conv1d", s.width, inner, 1)
        d.linear(f"{which}/turn2", s.width, s.width)
        d.linear(f"{which}/turn3", inner * inner, s.width)
    for j in range(s.stages):
        for i in range(s.depth):
            d.conv(f"gathers#{j}/gather_convs#{i}", s.width, s.width if i else s.width + 3, 1)
        for i in range(s.depth):
            d.add(f"gathers#{j}/gather_norms#{i}", "batch_norm", s.width)
    for j in range(s.stages):
        for i in range(2):
            d.add(f"returns#{j}/return_convs#{i}", "conv1d", s.width, s.width if i else 2 * s.width, 1)
        for i in range(2):
            d.add(f"returns#{j}/return_norms#{i}", "batch_norm", s.width)
    d.add("point_map", "conv1d", s.width, s.width, 1)
    d.add("point_norm", "batch_norm", s.width)
    d.add("point_out", "conv1d", s.outputs, s.width, 1)


@structure("validate", "predictive", "patches", "list", "layer", "attention", "neck")
def predictive_embedding(d: Draft) -> None:
    """A reader of what is seen, a slow reader of all, and a guesser between them in a narrower layer of its own."""
    s = d.sizes
    for reader in ("quick_reader", "slow_reader"):
        d.conv(f"{reader}/patches", s.width, 3, 2)
        d.add(f"{reader}/spots", "table", 1, 9, s.width)
        for i in range(s.depth):
            torch_layer(d, f"{reader}/blocks#{i}")
        d.norm(f"{reader}/neck")
    d.linear("guesser/guess_in", s.width, s.width)
    d.add("guesser/blank", "table", 1, 1, s.width)
    d.add("guesser/guess_spots", "table", 1, 9, s.width)
    for i in range(s.stages):
        torch_layer(d, f"guesser/blocks#{i}")
    d.norm("guesser/neck")
    d.linear("guesser/guess_out", s.width, s.width)


@structure("validate", "weights_of_weights")
def writing_network(d: Draft) -> None:
    """A network that writes another: who is written for, which piece, and norms of the written one kept for each."""
    s = d.sizes
    d.add("conditions", "embedding", s.experts, s.width)
    d.add("pieces", "embedding", 2 * s.depth, s.width)
    for i in range(s.depth):
        d.linear(f"scribe#{i}", s.width, 2 * s.width if i == 0 else s.width)
    d.linear("write_kernel", 3 * s.width, s.width)
    d.linear("write_shift", s.width, s.width)
    for j in range(s.experts):
        for i in range(s.stages):
            d.add(f"written#{j}/written_norms#{i}", "norm", s.width)
    d.add("first_kernel", "table", s.width, s.width)
    d.linear("written_out", s.outputs, s.width)


@structure("validate", "glow")
def invertible_steps(d: Draft) -> None:
    """A scale and a shift, a mixing by triangles, and a network of three convolutions, in steps of several scales."""
    s = d.sizes
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"scales#{j}/steps#{i}"
            d.add(f"{at}/even/even_shift", "table", 1, s.width, 1, 1)
            d.add(f"{at}/even/even_scale", "table", 1, s.width, 1, 1)
            for role in ("below", "above"):
                d.add(f"{at}/mixing/{role}", "table", s.width, s.width)
            d.add(f"{at}/mixing/log_diagonal", "table", s.width)
            for role, size in (("order", (s.width, s.width)), ("signs", (s.width,))):
                d.add(f"{at}/mixing/{role}", "table", *size)
                stored(d, "kind:buffer")
            d.conv(f"{at}/bending/bend1", s.hidden, s.width // 2)
            d.conv(f"{at}/bending/bend2", s.hidden, s.hidden, 1)
            d.conv(f"{at}/bending/bend3", s.width, s.hidden)
    d.conv("prior_conv", 2 * s.width, s.width)


@structure("validate", "field_operator")
def fourier_operator(d: Draft) -> None:
    """Weights of frequencies, maps of places and mixers of channels: a list for each."""
    s = d.sizes
    d.conv("raise1", s.hidden, 3, 1)
    d.conv("raise2", s.width, s.hidden, 1)
    for i in range(s.depth):
        d.add(f"frequencies#{i}", "table", s.width, s.width, 3, 2)
    for i in range(s.depth):
        d.conv(f"straight#{i}", s.width, s.width, 1)
    for i in range(s.depth):
        d.conv(f"mixers#{i}/mix_in", s.width // 2, s.width, 1)
        d.conv(f"mixers#{i}/mix_out", s.width, s.width // 2, 1)
    d.conv("fall1", s.hidden, s.width, 1)
    d.conv("fall2", s.outputs, s.hidden, 1)


@structure("validate", "physics")
def physics_network(d: Draft) -> None:
    """Fixed frequencies, two streams that every layer mixes with, and coefficients of the equation to be found."""
    s = d.sizes
    d.add("waves", "table", s.width // 2, 3)
    stored(d, "kind:buffer")
    d.linear("stream_u", s.width, s.width)
    d.linear("stream_v", s.width, s.width)
    for i in range(s.depth + 1):
        d.linear(f"hidden_maps#{i}", s.width, s.width)
    d.linear("field_out", s.outputs, s.width)
    for role in ("coefficient1", "coefficient2"):
        d.add(role, "table")


@structure("validate", "mask_queries", "list", "attention", "mlp")
def masks_from_queries(d: Draft) -> None:
    """Queries that look at pixels before they look at each other; names, masks and levels at the end."""
    s = d.sizes
    for j in range(s.stages):
        d.conv(f"pixel_sides#{j}", s.width, s.width, 1)
    d.conv("mask_pixels", s.width, s.width)
    d.add("level_table", "embedding", s.stages, s.width)
    d.add("query_places", "embedding", 6, s.width)
    d.add("query_content", "embedding", 6, s.width)
    for i in range(s.depth):
        at, start = f"blocks#{i}", len(d.leaves)
        attending(d, f"{at}/pixel_look", "kqvo")
        d.norm(f"{at}/pixel_norm")
        attending(d, f"{at}/query_look", "kqvo")
        d.norm(f"{at}/query_norm")
        d.mlp(f"{at}/think")
        d.norm(f"{at}/think_norm")
        registered_after(d, start, "pixel_norm", "query_norm", "think_norm")
    d.norm("query_end")
    d.linear("name_map", s.outputs + 1, s.width)
    for i in range(3):
        d.linear(f"mask_maps#{i}", s.width, s.width)
