"""Networks of the fourth part: pictures, volumes, scenes, bodies, agents and worlds."""

from __future__ import annotations

from benchmarks.refactors.structures import Draft, structure
from benchmarks.refactors.structures_fourth import shared, stored


@structure("fourth", "windows", "patches", "list", "block", "attention", "mlp", "neck", "head")
def windowed_transformer(d: Draft) -> None:
    """Stages of blocks with a table of relative places (and its index, a buffer) in each attention; merges between."""
    s = d.sizes
    d.conv("patches", s.width, 3, 2)
    d.norm("patch_norm")
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"levels#{j}/blocks#{i}"
            d.norm(f"{at}/norm1")
            d.add(f"{at}/attn/place_bias", "table", 9, 2)
            d.add(f"{at}/attn/place_index", "table", 4, 4)
            stored(d, "kind:buffer")
            d.attention(f"{at}/attn")
            d.norm(f"{at}/norm2")
            d.mlp(f"{at}/mlp")
        if j < s.stages - 1:
            d.add(f"levels#{j}/merge/merge_norm", "norm", 4 * s.width)
            d.linear(f"levels#{j}/merge/merge_map", s.width, 4 * s.width, bias=False)
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("fourth", "masking", "patches", "list", "block", "attention", "mlp", "neck")
def masked_autoencoder(d: Draft) -> None:
    """An encoder of what is seen, and a smaller decoder of everything; fixed places are buffers."""
    s = d.sizes
    d.add("seen_token", "table", 1, 1, s.width)
    d.add("seen_places", "table", 1, 7, s.width)
    stored(d, "kind:buffer")
    d.conv("patches", s.width, 3, 2)
    for i in range(s.depth):
        d.block(f"blocks#{i}")
    d.norm("neck")
    d.linear("handover", s.width, s.width, bias=True)
    d.add("hidden_token", "table", 1, 1, s.width)
    d.add("all_places", "table", 1, 7, s.width)
    stored(d, "kind:buffer")
    for i in range(s.stages):
        d.block(f"restorers#{i}")
    d.norm("restored_norm")
    d.linear("pixels", 12, s.width, bias=True)


@structure("fourth", "depthwise", "prototypes")
def self_distiller(d: Draft) -> None:
    """Wide-kernel blocks with a scale for every channel, a projector, prototypes and a centre that is a buffer."""
    s = d.sizes
    d.conv("shrink0/pool_conv", s.width, 3, 2)
    d.norm("shrink0/pool_norm")
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"tiers#{j}/cells#{i}"
            d.add(f"{at}/wide", "depthwise", s.width, 7, bias=True)
            d.norm(f"{at}/cell_norm")
            d.linear(f"{at}/cell_in", 2 * s.width, s.width, bias=True)
            d.linear(f"{at}/cell_out", s.width, 2 * s.width, bias=True)
            d.add(f"{at}/cell_scale", "table", s.width)
    for n in range(2):
        d.linear(f"projector/project{n}", s.width, s.width, bias=False)
        d.add(f"projector/project_norm{n}", "batch_norm", s.width)
    d.linear("prototypes", s.vocabulary, s.width, bias=False)
    d.add("centre", "table", 1, s.vocabulary)
    stored(d, "kind:buffer")


@structure("fourth", "volume")
def volume_segmenter(d: Draft) -> None:
    """Convolutions in space with instance norms, down and up, and an output at every level that is trained as well."""
    s = d.sizes

    def pair(at: str, inner: int) -> None:
        for n in "12":
            d.add(f"{at}/solid{n}", "conv3d", s.width, inner if n == "1" else s.width, 3)
            d.add(f"{at}/solid_norm{n}", "instance_norm", s.width)

    for j in range(s.stages + 1):
        pair(f"contract#{j}", 1 if j == 0 else s.width)
    for j in range(s.stages):
        d.add(f"widenings#{j}", "upconv3d", s.width, s.width, 2)
    for j in range(s.stages):
        pair(f"expansion#{j}", 2 * s.width)
    for j in range(s.stages):
        d.add(f"verdicts#{j}", "conv3d", s.outputs, s.width, 1)


@structure("fourth", "motion", "convs")
def flow_estimator(d: Draft) -> None:
    """Two encoders of one make, and a convolutional gated cell that updates a field."""
    s = d.sizes
    for encoder in ("matching_net", "context_net"):
        d.conv(f"{encoder}/flow_stem", s.width, 3)
        for i in range(s.depth):
            d.conv_block(f"{encoder}/flow_layers#{i}", s.width, s.width)
        d.conv(f"{encoder}/flow_last", s.width, s.width, 1)
    for role, inner in (("cost1", 9), ("cost2", s.width), ("field1", 2), ("field2", s.width), ("motion_join", 16)):
        d.conv(f"refine/motion/{role}", s.width, inner)
    for role in ("gate_z", "gate_r", "gate_q"):
        d.conv(f"refine/cell/{role}", s.width, 3 * s.width)
    for role, out in (("delta", 2), ("upmask", 9)):
        d.conv(f"refine/{role}/branch_in", s.width, s.width)
        d.conv(f"refine/{role}/branch_out", out, s.width)


@structure("fourth", "stem", "resolutions", "convs")
def resolution_network(d: Draft) -> None:
    """Branches for each resolution in every phase, and ways from each to each: lists of lists of lists."""
    s = d.sizes
    d.conv("stem_conv", s.width, 3, bias=False)
    d.add("stem_bn", "batch_norm", s.width)
    for j in range(s.stages):
        for b in range(2):
            for i in range(min(s.depth, 2)):
                d.conv_block(f"phases#{j}/scales#{b}/links#{i}", s.width, s.width)
        for b in range(2):
            for a in range(2):
                d.conv(f"phases#{j}/exchange#{b}/ways#{a}/way_conv", s.width, s.width, 1, bias=False)
                d.add(f"phases#{j}/exchange#{b}/ways#{a}/way_norm", "batch_norm", s.width)
    d.conv("merge_conv", s.width, 2 * s.width, 1)
    d.conv("heatmaps", s.outputs, s.width, 1)


@structure("fourth", "radiance")
def radiance_field(d: Draft) -> None:
    """A coarse and a fine field of the same make; an input comes in again half way."""
    s = d.sizes
    for field in ("coarse", "fine"):
        for i in range(s.depth + 2):
            skip = 6 if i == 1 else 0
            d.linear(f"{field}/place_maps#{i}", s.width, 6 if i == 0 else s.width + skip)
        d.linear(f"{field}/density", 1, s.width)
        d.linear(f"{field}/features", s.width, s.width)
        d.linear(f"{field}/gaze", s.width // 2, s.width + 4)
        d.linear(f"{field}/shade", 3, s.width // 2)


@structure("fourth", "modulation", "patches", "attention", "mlp")
def diffusion_transformer(d: Draft) -> None:
    """Blocks without norms of their own: one map of the time writes shifts, scales and gates of each."""
    s = d.sizes
    d.conv("patches", s.width, 4, 2)
    d.add("fixed_places", "table", 1, 7, s.width)
    stored(d, "kind:buffer")
    d.linear("clock/clock_in", s.width, 6)
    d.linear("clock/clock_out", s.width, s.width)
    d.add("classes", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"adaptive#{i}"
        d.attention(f"{at}/look")
        d.mlp(f"{at}/reflect")
        d.linear(f"{at}/modulate", 6 * s.width, s.width)
    d.linear("ending/modulate", 2 * s.width, s.width)
    d.linear("ending/ending_map", 16, s.width)


@structure("fourth", "slots")
def slot_network(d: Draft) -> None:
    """Slots compete for a picture through maps without biases and a gated cell, and each paints its part."""
    s = d.sizes
    for i in range(s.depth):
        d.conv(f"seeing#{i}", s.width, 3 if i == 0 else s.width, bias=True)
    d.linear("grid_in", s.width, 4)
    d.add("slot_mean", "table", 1, 1, s.width)
    d.add("slot_spread", "table", 1, 1, s.width)
    for role in ("norm_pixels", "norm_slots", "norm_after"):
        d.norm(f"contest/{role}")
    for role in ("ask", "offer", "carry_on"):
        d.linear(f"contest/{role}", s.width, s.width, bias=False)
    d.add("contest/slot_cell", "gru", s.width, s.width)
    stored(d, "cell")
    d.linear("contest/slot_ff1", s.hidden, s.width)
    d.linear("contest/slot_ff2", s.width, s.hidden)
    d.linear("grid_out", s.width, 4)
    for i in range(s.depth):
        d.conv(f"painting#{i}", s.width, s.width, bias=True)
    d.conv("canvas", 4, s.width)


@structure("fourth", "caption", "tokens", "list", "block", "attention", "mlp", "neck")
def gated_captioner(d: Draft) -> None:
    """Latents sample a picture; between the blocks of a language model stand gated looks at them."""
    s = d.sizes
    d.add("sampler/sampled", "table", 3, s.width)
    d.add("sampler/frames", "table", 2, 1, s.width)
    for i in range(s.stages):
        at = f"sampler/samplings#{i}"
        d.norm(f"{at}/norm_media")
        d.norm(f"{at}/norm_sampled")
        d.attention(f"{at}/glance", bias=False)
        d.norm(f"{at}/norm_digest")
        d.mlp(f"{at}/digest")
    d.norm("sampler/sampler_norm")
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"gated_looks#{i}"
        d.norm(f"{at}/norm_look")
        d.attention(f"{at}/glance", bias=False)
        d.add(f"{at}/look_gate", "table", 1)
        d.norm(f"{at}/norm_digest")
        d.mlp(f"{at}/digest")
        d.add(f"{at}/digest_gate", "table", 1)
    for i in range(s.depth):
        d.block(f"blocks#{i}")
    d.norm("neck")
    d.linear("says", s.vocabulary, s.width, bias=False)
    shared(d, "tokens", "tied")


@structure("fourth", "exits", "list", "convs")
def early_exits(d: Draft) -> None:
    """A trunk of blocks, and a small classifier behind each."""
    s = d.sizes
    for i in range(s.depth):
        d.conv_block(f"trunk_part/blocks#{i}", s.width, 3 if i == 0 else s.width)
    for i in range(s.depth):
        d.conv(f"doors#{i}/door_conv", s.width, s.width)
        d.add(f"doors#{i}/door_norm", "batch_norm", s.width)
        d.linear(f"doors#{i}/door_map", s.outputs, s.width)


@structure("fourth", "relations")
def relating_video(d: Draft) -> None:
    """Convolutions in space and time, and between them modules that relate every place to every other."""
    s = d.sizes
    d.add("clip_conv", "conv3d", s.width, 3, 3, bias=False)
    d.add("clip_norm", "batch_norm", s.width)
    for i in range(s.depth):
        for n in "12":
            d.add(f"clips#{i}/volume{n}", "conv3d", s.width, s.width, 3, bias=False)
            d.add(f"clips#{i}/volume_norm{n}", "batch_norm", s.width)
        for role in ("theta", "phi", "content"):
            d.add(f"clips#{i}/relate/{role}", "conv3d", s.width // 2, s.width, 1)
        d.add(f"clips#{i}/relate/join", "conv3d", s.width, s.width // 2, 1)
        d.add(f"clips#{i}/relate/join_norm", "batch_norm", s.width)
    d.linear("action", s.outputs, s.width)


@structure("fourth", "body")
def body_regressor(d: Draft) -> None:
    """A body that is buffers only, and a regressor that starts from means and is run several times."""
    s = d.sizes
    for role, size in (
        ("template", (7, 3)),
        ("shape_dirs", (7, 3, 4)),
        ("joint_regressor", (3, 7)),
        ("skin_weights", (7, 3)),
        ("pose_dirs", (9, 21)),
    ):
        d.add(f"figure/{role}", "table", *size)
        stored(d, "kind:buffer")
    for role, size in (("start_pose", 6), ("start_shape", 4), ("start_camera", 3)):
        d.add(f"fitting/{role}", "table", 1, size)
        stored(d, "kind:buffer")
    d.linear("fitting/fit1", s.width, 13 + s.width)
    d.linear("fitting/fit2", s.width, s.width)
    for role, out in (("to_pose", 6), ("to_shape", 4), ("to_camera", 3)):
        d.linear(f"fitting/{role}", out, s.width)


@structure("fourth", "world")
def world_model(d: Draft) -> None:
    """A picture becomes a state that a cell carries on; what is expected, what is seen, what follows."""
    s = d.sizes
    for i in range(s.stages):
        d.conv(f"watcher#{i}", s.width, 3 if i == 0 else s.width, 4, bias=True)
    d.linear("dynamics/enter_map", s.width, s.width + 2)
    d.add("dynamics/world_cell", "gru", s.width, s.width)
    stored(d, "cell")
    for role, inner in (("expected", s.width), ("observed", 2 * s.width)):
        d.linear(f"dynamics/{role}/belief_in", s.width, inner)
        d.linear(f"dynamics/{role}/belief_out", 2 * s.width, s.width)
    d.linear("painter_in", s.width, 2 * s.width)
    for i in range(s.stages):
        d.add(f"painter#{i}", "upconv2d", 3 if i == s.stages - 1 else s.width, s.width, 4)
    for role in ("payoff", "going_on"):
        for i in range(2):
            d.linear(f"{role}/predict#{i}", s.width, 2 * s.width if i == 0 else s.width)
        d.linear(f"{role}/predict_out", 1, s.width)


@structure("fourth", "ensemble")
def soft_agent(d: Draft) -> None:
    """A policy of two outputs, an ensemble of critics, their slow copies, and a temperature."""
    s = d.sizes
    for i in range(2):
        d.linear(f"behaviour/inner#{i}", s.width, 5 if i == 0 else s.width)
    d.linear("behaviour/act_mean", s.outputs, s.width)
    d.linear("behaviour/act_log_std", s.outputs, s.width)
    for group in ("judges", "slow_judges"):
        for j in range(s.experts):
            for i in range(2):
                d.linear(f"{group}#{j}/inner#{i}", s.width, 5 + s.outputs if i == 0 else s.width)
            d.linear(f"{group}#{j}/worth_out", 1, s.width)
    d.add("log_temperature", "table", 1)


@structure("fourth", "common_trunk", "list")
def common_trunk(d: Draft) -> None:
    """Policy and value hold the same trunk, so that the file has it twice; their heads stand in a dict of modules."""
    s = d.sizes
    for owner in ("doer", "rater"):
        for n in "12":
            d.conv(f"{owner}/torso/torso_conv{n}", s.width, 3 if n == "1" else s.width)
            if owner == "rater":
                shared(d, f"doer/torso/torso_conv{n}")
        d.norm(f"{owner}/torso/torso_norm")
        if owner == "rater":
            shared(d, "doer/torso/torso_norm")
        for i in range(s.depth):
            d.linear(f"{owner}/blocks#{i}", s.width, s.width)
    for role in ("move", "aim", "fire"):
        d.linear(f"doer/choices/{role}", s.outputs if s.same_heads else len(role) + 1, s.width)
    d.linear("rater/rating", 1, s.width)
