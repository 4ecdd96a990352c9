"""Networks of the third part: speech, points, video, recommenders, proteins, trackers, flows and others."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.refactors.structures import Draft, structure


@structure("third", "subsampling", "list", "conformer", "attention", "mlp", "head")
def speech_recogniser(d: Draft) -> None:
    """Convolution between two half feed-forwards, attention with relative positions."""
    s = d.sizes
    d.conv("subsample/sub1", s.width, 1)
    d.conv("subsample/sub2", s.width, s.width)
    d.linear("subsample/sub_out", s.width, 2 * s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm_half1")
        d.mlp(f"{at}/half1")
        d.norm(f"{at}/norm_mha")
        d.add(f"{at}/mha/bias_u", "table", 2, s.width // 2)
        d.add(f"{at}/mha/bias_v", "table", 2, s.width // 2)
        d.attention(f"{at}/mha")
        d.linear(f"{at}/mha/relative", s.width, s.width, bias=False)
        d.norm(f"{at}/norm_conv")
        d.add(f"{at}/conv/expand", "conv1d", 2 * s.width, s.width, 1)
        d.add(f"{at}/conv/depth", "conv1d", s.width, 1, 3)
        d.add(f"{at}/conv/conv_bn", "batch_norm", s.width)
        d.add(f"{at}/conv/shrink", "conv1d", s.width, s.width, 1)
        d.norm(f"{at}/norm_half2")
        d.mlp(f"{at}/half2")
        d.norm(f"{at}/norm_end")
    d.linear("head", s.vocabulary, s.width)


@structure("third", "tokens", "coder", "list", "post_block", "attention", "predictor", "mel")
def speech_synthesiser(d: Draft) -> None:
    """Blocks with convolutions as feed-forward; predictors of duration, pitch and energy, all of one make."""
    s = d.sizes

    def blocks(at: str) -> None:
        for i in range(s.depth):
            d.attention(f"{at}/blocks#{i}/attn")
            d.norm(f"{at}/blocks#{i}/norm_attn")
            d.add(f"{at}/blocks#{i}/conv_ff/widen", "conv1d", s.hidden, s.width, 3)
            d.add(f"{at}/blocks#{i}/conv_ff/narrow", "conv1d", s.width, s.hidden, 1)
            d.norm(f"{at}/blocks#{i}/norm_ff")

    d.add("tokens", "embedding", s.vocabulary, s.width)
    blocks("coder")
    for what in ("duration", "pitch", "energy"):
        at = f"variance/{what}"
        for n in "12":
            d.add(f"{at}/filter{n}", "conv1d", s.width, s.width, 3)
            d.norm(f"{at}/filter_norm{n}")
        d.linear(f"{at}/estimate", 1, s.width)
    d.add("variance/pitch_bins", "embedding", 9, s.width)
    d.add("variance/energy_bins", "embedding", 9, s.width)
    blocks("decoder")
    d.linear("mel", s.outputs, s.width)
    for i in range(s.stages):
        last, first = i == s.stages - 1, i == 0
        out, inner = (s.outputs if last else s.width), (s.outputs if first else s.width)
        d.add(f"post#{i}/post_conv", "conv1d", out, inner, 3)
        d.add(f"post#{i}/post_bn", "batch_norm", out)


@structure("third", "points")
def point_network(d: Draft) -> None:
    """Set abstraction and feature propagation: convolutions and their norms stand in lists beside each other."""
    s = d.sizes
    inner = 6
    for j in range(s.stages + 1):
        out = s.width if j < 2 else s.hidden
        for i in range(2):
            d.conv(f"gather#{j}/convs#{i}", out, inner if i == 0 else out, 1)
        for i in range(2):
            d.add(f"gather#{j}/bns#{i}", "batch_norm", out)
        inner = out
    for j in range(s.stages):
        for i in range(2):
            d.add(f"spread#{j}/convs#{i}", "conv1d", s.width, inner if i == 0 else s.width, 1)
        for i in range(2):
            d.add(f"spread#{j}/bns#{i}", "batch_norm", s.width)
        inner = s.width
    d.add("label1", "conv1d", s.width, s.width, 1)
    d.add("label_bn", "batch_norm", s.width)
    d.add("label2", "conv1d", s.outputs, s.width, 1)


@structure("third", "video", "list", "block", "attention", "mlp", "neck", "head")
def video_transformer(d: Draft) -> None:
    """Attention over time, then over space."""
    s = d.sizes
    d.add("cls", "table", 1, 1, s.width)
    d.add("space_pos", "table", 1, 7, s.width)
    d.add("time_pos", "table", 1, 7 if s.same_heads else 5, s.width)
    d.add("tubelets", "conv3d", s.width, 3, 2)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm_time")
        d.attention(f"{at}/over_time")
        d.linear(f"{at}/after_time", s.width, s.width)
        d.block(at)
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("third", "recommender")
def recommender(d: Draft) -> None:
    """Many tables, a cross network of squares and a deep tower."""
    s = d.sizes
    for j in range(s.experts + 1):
        d.add(f"tables#{j}", "embedding", s.vocabulary if s.same_heads else s.vocabulary + j, s.width)
    for i in range(2):
        d.linear(f"dense#{i}", s.width, 5 if i == 0 else s.width)
    for i in range(s.depth):
        d.linear(f"cross#{i}", s.width, s.width)
    for i in range(s.depth):
        d.linear(f"deep#{i}/deep_fc", s.width, s.width)
        d.add(f"deep#{i}/deep_bn", "batch_norm", s.width)
    d.linear("click", 1, 2 * s.width)


@structure("third", "list", "evoformer", "triangle", "attention", "mlp")
def protein_network(d: Draft) -> None:
    """Attention over rows and columns with a bias from pairs, triangle updates and triangle attention."""
    s = d.sizes

    def gated(at: str, pairs: bool) -> None:
        d.norm(f"{at}/norm_query")
        if pairs:
            d.norm(f"{at}/norm_pair")
            d.linear(f"{at}/pair_bias", 2, s.width, bias=False)
        d.attention(f"{at}/mha", bias=False)
        d.linear(f"{at}/mha/gating", s.width, s.width, bias=True)

    def transition(at: str) -> None:
        d.norm(f"{at}/norm_in")
        d.mlp(at)

    for i in range(s.depth):
        at = f"blocks#{i}"
        gated(f"{at}/rows", True)
        gated(f"{at}/columns", False)
        transition(f"{at}/msa_transition")
        d.norm(f"{at}/outer/norm_in")
        d.linear(f"{at}/outer/left", s.width // 2, s.width)
        d.linear(f"{at}/outer/right", s.width // 2, s.width)
        d.linear(f"{at}/outer/back", s.width, 4 * s.width)
        for triangle in ("outgoing", "incoming"):
            tri = f"{at}/{triangle}"
            d.norm(f"{tri}/norm_in")
            for role in ("left", "left_gate", "right", "right_gate"):
                d.linear(f"{tri}/{role}", s.width, s.width)
            d.norm(f"{tri}/norm_out")
            d.linear(f"{tri}/back", s.width, s.width)
            d.linear(f"{tri}/back_gate", s.width, s.width)
        gated(f"{at}/starting", False)
        gated(f"{at}/ending", False)
        transition(f"{at}/pair_transition")


@structure("third", "list", "convs", "tracker")
def siamese_tracker(d: Draft) -> None:
    """One trunk for template and search region, two correlation heads of one make."""
    s = d.sizes
    for i in range(s.depth):
        d.conv_block(f"trunk/blocks#{i}", s.width, 3 if i == 0 else s.width)
    d.conv("adjust/adjust_conv", s.width, s.width, 1, bias=False)
    d.add("adjust/adjust_bn", "batch_norm", s.width)
    for branch, outputs in (("what", s.outputs), ("where", s.outputs if s.same_heads else 4)):
        for role in ("template", "search"):
            d.conv(f"{branch}/{role}_conv", s.width, s.width, bias=False)
            d.add(f"{branch}/{role}_bn", "batch_norm", s.width)
        d.conv(f"{branch}/mix_conv", s.width, s.width, 1, bias=False)
        d.add(f"{branch}/mix_bn", "batch_norm", s.width)
        d.conv(f"{branch}/map", outputs, s.width, 1)


@structure("third", "flow")
def coupling_flow(d: Draft) -> None:
    """Scales of a normalising flow: a norm with data-dependent values, a mixing matrix, a coupling."""
    s = d.sizes
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"scales#{j}/steps#{i}"
            d.add(f"{at}/act/shift", "table", 1, s.width, 1, 1)
            d.add(f"{at}/act/log_scale", "table", 1, s.width, 1, 1)
            d.add(f"{at}/mixing", "table", s.width, s.width)
            d.conv(f"{at}/coupling/net1", s.hidden, s.width // 2)
            d.conv(f"{at}/coupling/net2", s.hidden, s.hidden, 1)
            d.conv(f"{at}/coupling/net3", s.width, s.hidden)
        d.conv(f"scales#{j}/prior", s.width, s.width // 2)


@structure("third", "upscaler")
def super_resolution(d: Draft) -> None:
    """Residual in residual dense blocks."""
    s = d.sizes
    grow = s.width // 2
    d.conv("entry", s.width, 3)
    for i in range(s.depth):
        for block in "123":
            at = f"trunk#{i}/dense{block}"
            for n in range(1, 4):
                d.conv(f"{at}/grow{n}", grow, s.width + grow * (n - 1))
            d.conv(f"{at}/fuse", s.width, s.width + 3 * grow)
    for role in ("join", "up1", "up2", "exit1"):
        d.conv(role, s.width, s.width)
    d.conv("exit2", 3, s.width)


@structure("third", "hyper", "list")
def hyper_network(d: Draft) -> None:
    """One network writes the weights of another from a table of tasks."""
    s = d.sizes
    d.add("tasks", "embedding", s.experts, s.width)
    for i in range(s.depth):
        d.linear(f"writer/blocks#{i}", s.width, s.width)
    for j in range(s.stages):
        d.linear(f"writer/weights#{j}", 2 * s.width, s.width)
        d.linear(f"writer/shifts#{j}", s.width, s.width)
        d.linear(f"writer/gains#{j}", s.width, s.width)
    d.linear("reader/reader_in", s.width, s.width)
    for j in range(s.stages):
        d.norm(f"reader/reader_norms#{j}")
    d.linear("reader/reader_out", s.outputs, s.width)


@structure("third", "tokens", "memory")
def memory_network(d: Draft) -> None:
    """A controller that reads from a memory and writes to it, through maps of one shape."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.add("memory", "table", 7, s.width)
    _layers(d, "controller", "lstm", s.stages)
    for role, out in (("key", s.width), ("strength", 1), ("blend", 1), ("shift", 3)):
        d.linear(f"reading/read_{role}", out, s.width)
    for role, out in (("key", s.width), ("strength", 1), ("blend", 1), ("erase", s.width), ("add", s.width)):
        d.linear(f"writing/write_{role}", out, s.width)
    d.linear("answer", s.outputs, 2 * s.width)


@structure("third", "density", "list")
def density_network(d: Draft) -> None:
    """A mixture of densities over a recurrent trunk."""
    s = d.sizes
    d.linear("strokes", s.width, 3)
    _layers(d, "pen", "lstm", s.depth)
    for i in range(2):
        d.linear(f"hidden/blocks#{i}", s.width, s.width)
    for role, out in (("mix", s.outputs), ("mean", 2 * s.outputs), ("spread", 2 * s.outputs), ("skew", s.outputs)):
        d.linear(f"mixture/{role}", out, s.width)
    d.linear("lift", 1, s.width)


def _layers(d: Draft, path: str, kind: str, layers: int) -> None:
    """One recurrent module, a piece for each layer."""
    d.add(path, kind, d.sizes.width, d.sizes.width)
    leaf = d.leaves[-1]
    d.leaves[-1] = replace(leaf, pieces=tuple(f"{path}~{n}" for n in range(layers)), sizes=leaf.sizes * layers)


@structure("third", "stem", "stages", "list", "convs", "tasks")
def many_decoders(d: Draft) -> None:
    """One encoder, and a decoder of the same make for each of three tasks."""
    s = d.sizes
    d.conv("stem_conv", s.width, 3, bias=False)
    d.add("stem_bn", "batch_norm", s.width)
    for j in range(s.stages):
        for i in range(s.depth):
            d.conv_block(f"stages#{j}/blocks#{i}", s.width, s.width)
    for task, outputs in (("segment", s.outputs), ("depth", 1), ("surface", s.outputs if s.same_heads else 3)):
        for j in range(s.stages):
            d.conv(f"{task}/merge#{j}/merge_conv", s.width, s.width, bias=False)
            d.add(f"{task}/merge#{j}/merge_bn", "batch_norm", s.width)
        d.conv(f"{task}/read", outputs, s.width, 1, bias=True)


@structure("third", "tokens", "retrieval", "list", "block", "attention", "mlp")
def retriever(d: Draft) -> None:
    """Two towers that embed apart, and a cross encoder that reads both together."""
    s = d.sizes
    for tower in ("query_tower", "passage_tower", "reranker"):
        d.add(f"{tower}/tokens", "embedding", s.vocabulary, s.width)
        for i in range(s.stages):
            d.block(f"{tower}/blocks#{i}")
        if tower != "reranker" or s.same_heads:
            d.linear(f"{tower}/pool", s.width, s.width)
    d.linear("relevance", 1, s.width)


@structure("third", "series", "list", "mlp")
def series_mixer(d: Draft) -> None:
    """Maps over time and over features by turns."""
    s = d.sizes
    d.add("standard/gain", "table", s.width)
    d.add("standard/shift", "table", s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.add(f"{at}/norm_time", "batch_norm", s.width)
        d.linear(f"{at}/time_map", s.width, s.width)
        d.add(f"{at}/norm_feature", "batch_norm", s.width)
        d.mlp(f"{at}/feature_map")
    d.linear("forecast", s.outputs, s.width)


@structure("third", "basis")
def basis_forecaster(d: Draft) -> None:
    """Stacks of blocks that each explain a part of the past and add one of the future."""
    s = d.sizes
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"stacks#{j}/units#{i}"
            for n in range(2):
                d.linear(f"{at}/layers#{n}", s.hidden, s.width if n == 0 else s.hidden)
            d.linear(f"{at}/past", s.width, s.hidden, bias=False)
            d.linear(f"{at}/future", s.width if s.same_heads else s.outputs, s.hidden, bias=False)


@structure("third", "fusion", "residual_unit", "attention")
def fusion_forecaster(d: Draft) -> None:
    """Gated residual units everywhere, between a recurrent encoder and decoder and attention."""
    s = d.sizes

    def unit(at: str) -> None:
        d.linear(f"{at}/unit_in", s.width, s.width)
        d.linear(f"{at}/unit_out", s.width, s.width)
        d.linear(f"{at}/unit_gate", 2 * s.width, s.width)
        d.norm(f"{at}/unit_norm")

    for j in range(s.experts):
        d.linear(f"scalars#{j}", s.width, 1)
    unit("selection")
    for role in ("context_h", "context_c", "context_static"):
        unit(role)
    _layers(d, "past_rnn", "lstm", 1)
    _layers(d, "future_rnn", "lstm", 1)
    unit("enrichment")
    d.attention("temporal")
    unit("position_wise")
    d.linear("quantiles", s.outputs, s.width)


@structure("third", "stem", "stages", "convs", "set_prediction", "coder", "list", "cross", "attention", "mlp")
def query_detector(d: Draft) -> None:
    """Queries that read an image: a trunk of convolutions, an encoder, a decoder, two heads."""
    s = d.sizes
    d.conv("trunk/stem_conv", s.width, 3, bias=False)
    d.add("trunk/stem_bn", "batch_norm", s.width)
    for j in range(s.stages):
        d.conv_block(f"trunk/stages#{j}", s.width, s.width)
    d.conv("shrink", s.width, s.width, 1)
    d.add("queries", "embedding", 6, s.width)
    for i in range(s.depth):
        at = f"coder/blocks#{i}"
        d.attention(f"{at}/self")
        d.norm(f"{at}/norm_self")
        d.mlp(f"{at}/ff")
        d.norm(f"{at}/norm_ff")
    for i in range(s.depth):
        at = f"decoder/blocks#{i}"
        d.attention(f"{at}/self")
        d.norm(f"{at}/norm_self")
        d.attention(f"{at}/cross")
        d.norm(f"{at}/norm_cross")
        d.mlp(f"{at}/ff")
        d.norm(f"{at}/norm_ff")
    d.linear("kind", s.outputs + 1, s.width)
    for i in range(3):
        d.linear(f"box#{i}", 4 if i == 2 else s.width, s.width)


@structure("third", "latent_reader", "list", "attention", "gated", "head")
def latent_reader(d: Draft) -> None:
    """A few latents read a long input, think, and are read by queries."""
    s = d.sizes

    def reading(at: str) -> None:
        d.norm(f"{at}/norm_latents")
        d.norm(f"{at}/norm_context")
        d.attention(f"{at}/attend", bias=False)
        d.norm(f"{at}/norm_think")
        d.gated(f"{at}/think")

    d.add("latents", "table", 5, s.width)
    d.add("outlets", "table", 5, s.width)
    reading("reading")
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm_latents")
        d.attention(f"{at}/attend", bias=False)
        d.norm(f"{at}/norm_think")
        d.gated(f"{at}/think")
    reading("answering")
    d.linear("head", s.outputs, s.width)


@structure("third", "styles")
def style_generator(d: Draft) -> None:
    """A mapping network, and blocks whose convolutions are modulated by it."""
    s = d.sizes
    for i in range(s.depth + 1):
        d.linear(f"mapping#{i}", s.width, s.width)
    d.add("painter/constant", "table", 1, s.width, 4, 4)
    for j in range(s.stages):
        for part in ("grow", "keep"):
            at = f"painter/levels#{j}/{part}"
            d.add(f"{at}/noise", "table", 1)
            d.linear(f"{at}/style", s.width, s.width)
            d.conv(f"{at}/kernel", s.width, s.width, bias=False)
        d.linear(f"painter/levels#{j}/colour/style", s.width, s.width)
        d.conv(f"painter/levels#{j}/colour/kernel", 3, s.width, 1)


@structure("third", "stem", "stages", "list", "mobile", "head")
def mobile_network(d: Draft) -> None:
    """Inverted residuals with squeeze and excitation."""
    s = d.sizes
    d.conv("stem_conv", s.width, 3, bias=False)
    d.add("stem_bn", "batch_norm", s.width)
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"stages#{j}/blocks#{i}"
            d.conv(f"{at}/expand", s.hidden, s.width, 1, bias=False)
            d.add(f"{at}/expand_bn", "batch_norm", s.hidden)
            d.add(f"{at}/depthwise", "depthwise", s.hidden, 3, bias=False)
            d.add(f"{at}/depthwise_bn", "batch_norm", s.hidden)
            d.conv(f"{at}/excite/squeeze", 2, s.hidden, 1, bias=True)
            d.conv(f"{at}/excite/restore", s.hidden, 2, 1, bias=True)
            d.conv(f"{at}/project", s.width, s.hidden, 1, bias=False)
            d.add(f"{at}/project_bn", "batch_norm", s.width)
    d.conv("last_conv", s.hidden, s.width, 1, bias=False)
    d.add("last_bn", "batch_norm", s.hidden)
    d.linear("head", s.outputs, s.hidden)


@structure("third", "agent")
def dueling_agent(d: Draft) -> None:
    """Pixels to two streams, and twin critics over actions."""
    s = d.sizes
    for n, inner in (("1", 3), ("2", s.width), ("3", s.width)):
        d.conv(f"eyes/eye{n}", s.width, inner)
    for stream, out in (("advantage", s.outputs), ("worth", s.outputs if s.same_heads else 1)):
        d.linear(f"{stream}/stream_in", s.width, s.width)
        d.linear(f"{stream}/stream_out", out, s.width)
    for critic in ("critic1", "critic2"):
        for n in range(s.stages + 1):
            d.linear(f"{critic}/critic_layers#{n}", s.width, s.width)
        d.linear(f"{critic}/critic_out", 1, s.width)


@structure("third", "tokens", "coder", "list", "cross", "attention", "mlp", "neck", "head")
def tied_translator(d: Draft) -> None:
    """The last map is the table of tokens, which encoder and decoder share."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"coder/blocks#{i}"
        d.norm(f"{at}/norm_self", bias=False)
        d.attention(f"{at}/self", bias=False)
        d.norm(f"{at}/norm_ff", bias=False)
        d.mlp(f"{at}/ff")
    d.norm("coder/neck", bias=False)
    for i in range(s.depth):
        at = f"decoder/blocks#{i}"
        for part in ("self", "cross"):
            d.norm(f"{at}/norm_{part}", bias=False)
            d.attention(f"{at}/{part}", bias=False)
        d.norm(f"{at}/norm_ff", bias=False)
        d.mlp(f"{at}/ff")
    d.norm("decoder/neck", bias=False)
    d.linear("head", s.vocabulary, s.width, bias=False)
    d.leaves[-1] = replace(d.leaves[-1], pieces=("tokens",), layout="tied")


@structure("third", "speaker", "list")
def speaker_network(d: Draft) -> None:
    """Dilated convolutions in groups of channels, one after another, and pooling by attention."""
    s = d.sizes
    d.add("frames/frame_conv", "conv1d", s.width, 5, 3)
    d.add("frames/frame_bn", "batch_norm", s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.add(f"{at}/before/point_conv", "conv1d", s.width, s.width, 1)
        d.add(f"{at}/before/point_bn", "batch_norm", s.width)
        for n in range(s.experts - 1):
            d.add(f"{at}/groups#{n}/group_conv", "conv1d", s.width // 2, s.width // 2, 3)
            d.add(f"{at}/groups#{n}/group_bn", "batch_norm", s.width // 2)
        d.add(f"{at}/after/point_conv", "conv1d", s.width, s.width, 1)
        d.add(f"{at}/after/point_bn", "batch_norm", s.width)
    d.add("pooling/pool_in", "conv1d", s.width // 2, s.width, 1)
    d.add("pooling/pool_out", "conv1d", s.width, s.width // 2, 1)
    d.linear("voice", s.outputs, 2 * s.width)
    d.add("voice_bn", "batch_norm", s.outputs)
