"""Networks of the fourth part: sound, text, series, tables, molecules and sets."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.refactors.structures import Draft, structure


def stored(d: Draft, layout: str) -> None:
    """Say how the last leaf is stored."""
    d.leaves[-1] = replace(d.leaves[-1], layout=layout)


def shared(d: Draft, with_path: str, layout: str = "shared") -> None:
    """Let the last leaf hold the parameters of the leaf of that path."""
    d.leaves[-1] = replace(d.leaves[-1], pieces=(with_path,), layout=layout)


def both_ways(d: Draft, path: str, inner: int) -> None:
    """A recurrent layer that reads forwards and backwards, each half of the model's width."""
    d.add(path, "bilstm", d.sizes.width // 2, inner)
    leaf = d.leaves[-1]
    d.leaves[-1] = replace(leaf, pieces=(f"{path}~onwards", f"{path}~backwards"), sizes=leaf.sizes * 2)


@structure("fourth", "vocoder")
def wave_generator(d: Draft) -> None:
    """Rising convolutions, and behind each a unit with two lists of weight-normed convolutions."""
    s = d.sizes
    d.add("wave_in", "weight_norm", s.width, s.outputs, 3)
    for j in range(s.stages):
        d.add(f"risers#{j}", "upconv1d", s.width, s.width, 4)
    for j in range(s.stages):
        for i in range(s.depth):
            d.add(f"units#{j}/spread_convs#{i}", "weight_norm", s.width, s.width, 3)
        for i in range(s.depth):
            d.add(f"units#{j}/dense_convs#{i}", "weight_norm", s.width, s.width, 3)
    d.add("wave_out", "weight_norm", 1, s.width, 3)


@structure("fourth", "dilation")
def dilated_autoregressor(d: Draft) -> None:
    """Four lists beside each other: what is filtered, gated, kept and handed out."""
    s = d.sizes
    d.add("causal", "conv1d", s.width, 5, 2)
    for role, size in (("filters", 2), ("gates", 2), ("remains", 1), ("skips", 1)):
        for i in range(s.depth):
            d.add(f"{role}#{i}", "conv1d", s.width, s.width, size)
    d.add("close1", "conv1d", s.width, s.width, 1)
    d.add("close2", "conv1d", s.outputs, s.width, 1)


@structure("fourth", "separation")
def source_separator(d: Draft) -> None:
    """Down by convolutions, a recurrence both ways, and up by transposed ones; each has a gate before or after."""
    s = d.sizes
    for i in range(s.depth):
        d.add(f"shrinkers#{i}/sample_conv", "conv1d", s.width, 2 if i == 0 else s.width, 4)
        d.add(f"shrinkers#{i}/rewrite", "conv1d", 2 * s.width, s.width, 1)
    both_ways(d, "memory/reader", s.width)
    d.linear("memory/reader_map", s.width, s.width, bias=True)
    for i in range(s.depth):
        d.add(f"growers#{i}/rewrite", "conv1d", 2 * s.width, s.width, 1)
        d.add(f"growers#{i}/sample_conv", "upconv1d", 2 if i == s.depth - 1 else s.width, s.width, 4)


@structure("fourth", "masks", "list")
def mask_estimator(d: Draft) -> None:
    """Stacks of separable convolutions with parametric rectifiers estimate masks over a learned basis."""
    s = d.sizes
    d.add("analysis", "conv1d", s.width, 3, 4, bias=False)
    d.add("narrow_norm", "group_norm", s.width)
    d.add("narrow", "conv1d", s.width, s.width, 1)
    for j in range(s.stages):
        for i in range(s.depth):
            at = f"repeats#{j}/blocks#{i}"
            d.add(f"{at}/widen", "conv1d", s.hidden, s.width, 1)
            d.add(f"{at}/rectify1", "prelu", 1)
            d.add(f"{at}/tcn_norm1", "group_norm", s.hidden)
            d.add(f"{at}/along", "conv1d", s.hidden, 1, 3)
            d.add(f"{at}/rectify2", "prelu", 1)
            d.add(f"{at}/tcn_norm2", "group_norm", s.hidden)
            d.add(f"{at}/onward", "conv1d", s.width, s.hidden, 1)
            d.add(f"{at}/aside", "conv1d", s.width, s.hidden, 1)
    d.add("mask_rectify", "prelu", 1)
    d.add("mask_map", "conv1d", 2 * s.width, s.width, 1)
    d.add("synthesis", "upconv1d", 3, s.width, 4, bias=False)


@structure("fourth", "tokens", "tagging")
def sequence_tagger(d: Draft) -> None:
    """Words and characters, a recurrence both ways, highways, and a random field over the labels."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.add("letters/letter_table", "embedding", 7, 4)
    d.add("letters/letter_conv", "conv1d", s.width, 4, 3)
    for i in range(s.stages):
        d.linear(f"highways#{i}/carry", s.width, s.width)
        d.linear(f"highways#{i}/transform", s.width, s.width)
    both_ways(d, "sentence", 2 * s.width)
    d.linear("emission", s.outputs, s.width)
    d.add("field/leave", "table", s.outputs)
    d.add("field/step", "table", s.outputs, s.outputs)
    d.add("field/enter", "table", s.outputs)


@structure("fourth", "tokens", "parsing")
def dependency_parser(d: Draft) -> None:
    """Four maps of one make, and two bilinear forms between them."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.add("tags", "embedding", s.vocabulary if s.same_heads else 6, s.width)
    both_ways(d, "sentence", 2 * s.width)
    for role in ("arc_head", "arc_dependent", "label_head", "label_dependent"):
        d.linear(role, s.width, s.width, bias=True)
    d.add("arc_form", "bilinear", 1, s.width, s.width)
    d.add("label_form", "bilinear", s.outputs, s.width, s.width)


@structure("fourth", "alignment")
def aligned_translator(d: Draft) -> None:
    """A recurrence that looks back by additive attention, copies, and shares its table with the last map."""
    s = d.sizes
    d.add("source_table", "embedding", s.vocabulary, s.width)
    both_ways(d, "source_reader", s.width)
    d.linear("start", s.width, s.width)
    d.add("target_table", "embedding", s.vocabulary, s.width)
    for role in ("keys_map", "state_map"):
        d.linear(f"align/{role}", s.width, s.width, bias=False)
    d.linear("align/energy", 1, s.width, bias=False)
    d.add("writer", "lstm", s.width, 2 * s.width)
    stored(d, "cell")
    d.linear("copy_gate", 1, s.width)
    d.linear("mixing", s.width, 2 * s.width)
    d.linear("vocabulary_map", s.vocabulary, s.width, bias=False)
    shared(d, "target_table", "tied")


@structure("fourth", "factorised", "block", "attention", "mlp")
def one_layer_encoder(d: Draft) -> None:
    """Narrow tables, one block that is run many times, and a head that is tied to the narrow table."""
    s = d.sizes
    d.add("lookup/word_table", "embedding", s.vocabulary, 4)
    d.add("lookup/place_table", "embedding", 11, 4)
    d.add("lookup/segment_table", "embedding", 2, 4)
    d.add("lookup/lookup_norm", "norm", 4)
    d.linear("enlarge", s.width, 4)
    d.block("only")
    d.linear("summary", s.width, s.width)
    d.linear("guess/guess_map", 4, s.width)
    d.add("guess/guess_norm", "norm", 4)
    d.linear("guess/guess_out", s.vocabulary, 4, bias=False)
    shared(d, "lookup/word_table", "tied")
    d.add("guess/guess_shift", "table", s.vocabulary)


@structure("fourth", "receptance", "tokens", "neck", "head")
def receptance_model(d: Draft) -> None:
    """Linear recurrences: shifts that mix, decays, and squares called keys, values and receptances, twice a block."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    d.norm("norm_zero")
    for i in range(s.depth):
        at = f"rwkv#{i}"
        d.norm(f"{at}/norm_t")
        d.add(f"{at}/timing/decay", "table", s.width)
        d.add(f"{at}/timing/first", "table", s.width)
        for role in ("mix_k", "mix_v", "mix_r"):
            d.add(f"{at}/timing/{role}", "table", 1, 1, s.width)
        for role in ("rk", "rv", "rr", "ro"):
            d.linear(f"{at}/timing/{role}", s.width, s.width, bias=False)
        d.norm(f"{at}/norm_c")
        for role in ("mix_k", "mix_r"):
            d.add(f"{at}/channel/{role}", "table", 1, 1, s.width)
        d.linear(f"{at}/channel/rk", s.hidden, s.width, bias=False)
        d.linear(f"{at}/channel/rr", s.width, s.width, bias=False)
        d.linear(f"{at}/channel/rv", s.width, s.hidden, bias=False)
    d.norm("neck")
    d.linear("head", s.vocabulary, s.width, bias=False)


@structure("fourth", "tables", "list", "block", "attention", "gated", "neck", "head")
def table_transformer(d: Draft) -> None:
    """A vector for every number, a table for every category, and blocks."""
    s = d.sizes
    d.add("summary_token", "table", s.width)
    d.add("numbers/number_scale", "table", 5, s.width)
    d.add("numbers/number_shift", "table", 5, s.width)
    for j in range(s.experts):
        d.add(f"categories#{j}", "embedding", 6 if s.same_heads else 4 + j, s.width)
    for i in range(s.depth):
        d.norm(f"blocks#{i}/norm1")
        d.attention(f"blocks#{i}/attn")
        d.norm(f"blocks#{i}/norm2")
        d.gated(f"blocks#{i}/mlp")
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("fourth", "atoms")
def molecule_network(d: Draft) -> None:
    """Continuous filters: a net of distances writes what a convolution of atoms multiplies; distances are a buffer."""
    s = d.sizes
    d.add("atom_table", "embedding", s.vocabulary, s.width)
    d.add("radial/centres", "table", 5)
    stored(d, "kind:buffer")
    for i in range(s.depth):
        at = f"interactions#{i}"
        d.linear(f"{at}/atom_in", s.width, s.width, bias=False)
        d.linear(f"{at}/filter_a", s.width, 5)
        d.linear(f"{at}/filter_b", s.width, s.width)
        d.linear(f"{at}/atom_mid", s.width, s.width)
        d.linear(f"{at}/atom_out", s.width, s.width)
    d.linear("energy_a", s.width // 2, s.width)
    d.linear("energy_b", 1, s.width // 2)
    d.add("offsets", "embedding", s.vocabulary, 1)


@structure("fourth", "equivariance")
def equivariant_network(d: Draft) -> None:
    """Messages over edges, updates of nodes and steps of coordinates, each two maps."""
    s = d.sizes
    d.linear("node_in", s.width, 5)
    for i in range(s.depth):
        at = f"passes#{i}"
        d.linear(f"{at}/edge_a", s.width, 2 * s.width + 1)
        d.linear(f"{at}/edge_b", s.width, s.width)
        d.linear(f"{at}/node_a", s.width, 2 * s.width)
        d.linear(f"{at}/node_b", s.width, s.width)
        d.linear(f"{at}/place_a", s.width, s.width)
        d.linear(f"{at}/place_b", 1, s.width, bias=False)
        d.linear(f"{at}/edge_gate", 1, s.width, bias=True)
    d.linear("node_out", s.outputs, s.width)


@structure("fourth", "neighbours")
def attending_graph(d: Draft) -> None:
    """Attention over neighbours by bare vectors, gated updates by one cell, and a recurrent readout."""
    s = d.sizes
    d.linear("atoms_map", s.width, 5)
    for i in range(s.depth):
        at = f"rounds#{i}"
        d.linear(f"{at}/from_map", s.width, s.width, bias=False)
        d.linear(f"{at}/to_map", s.width, s.width, bias=False)
        d.linear(f"{at}/bond_map", s.width, 3, bias=False)
        for role in ("from_vector", "to_vector", "bond_vector"):
            d.add(f"{at}/{role}", "table", 1, 2, s.width // 2)
        d.add(f"{at}/graph_shift", "table", s.width)
        d.add(f"{at}/graph_norm", "batch_norm", s.width)
    d.add("update", "gru", s.width, s.width)
    stored(d, "cell")
    d.add("readout", "lstm", s.width, 2 * s.width)
    d.linear("property", s.outputs, 2 * s.width)


@structure("fourth", "sets", "attention")
def set_network(d: Draft) -> None:
    """Sets attend to points that are learned, and those to the set; seeds pool it."""
    s = d.sizes

    def attend(at: str) -> None:
        d.attention(at)
        d.norm(f"{at}/norm_heads")
        d.linear(f"{at}/set_ff", s.width, s.width)
        d.norm(f"{at}/norm_set")

    d.linear("element_map", s.width, 3)
    for i in range(s.depth):
        d.add(f"induced#{i}/points", "table", 1, 3, s.width)
        attend(f"induced#{i}/gathering")
        attend(f"induced#{i}/spreading")
    d.add("pooling/seeds", "table", 1, 2, s.width)
    attend("pooling/seed_attention")
    d.linear("set_head", s.outputs, s.width)


@structure("fourth", "process")
def neural_process(d: Draft) -> None:
    """Two encoders of the same make, one of which ends in a distribution, and a decoder."""
    s = d.sizes
    for path in ("certain", "random"):
        for i in range(s.depth + 1):
            d.linear(f"{path}/path_maps#{i}", s.width, 3 if i == 0 else s.width)
    d.linear("random/before_last", s.width, s.width)
    d.linear("random/centre", s.width, s.width)
    d.linear("random/log_width", s.width, s.width)
    for i in range(s.depth + 1):
        d.linear(f"answerer/path_maps#{i}", s.width, 2 * s.width + 1 if i == 0 else s.width)
    d.linear("answerer/answer_map", 2, s.width)


@structure("fourth", "knowledge")
def knowledge_graph(d: Draft) -> None:
    """Entities and relations with a real and an imaginary part, and a small convolution over them."""
    s = d.sizes
    for role in ("entity_real", "entity_imaginary"):
        d.add(role, "embedding", s.vocabulary, s.width)
    for role in ("relation_real", "relation_imaginary"):
        d.add(role, "embedding", s.vocabulary if s.same_heads else 6, s.width)
    d.add("grid_norm", "batch_norm", 1)
    d.conv("grid_conv", s.width, 1)
    d.add("map_norm", "batch_norm", s.width)
    d.linear("grid_map", s.width, 2 * s.width)
    d.add("entity_shift", "table", s.vocabulary)


@structure("fourth", "sharing", "tokens", "list", "block", "attention", "gated", "neck", "head")
def sharing_experts(d: Draft) -> None:
    """Experts that are chosen, one that always is, and a correction of the choice that is a buffer."""
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.norm(f"{at}/norm1", bias=False)
        d.attention(f"{at}/attn", bias=False)
        d.norm(f"{at}/norm2", bias=False)
        if i == 0:
            d.gated(f"{at}/mlp")
            continue
        d.linear(f"{at}/mlp/router", s.experts, s.width, bias=False)
        d.add(f"{at}/mlp/correction", "table", s.experts)
        stored(d, "kind:buffer")
        for j in range(s.experts):
            d.gated(f"{at}/mlp/routed#{j}")
        d.gated(f"{at}/mlp/common")
    d.norm("neck", bias=False)
    d.linear("head", s.vocabulary, s.width, bias=False)


@structure("fourth", "listening", "tokens", "position", "coder", "list", "cross", "attention", "mlp", "neck")
def listening_translator(d: Draft) -> None:
    """Two convolutions and fixed places before the encoder; keys have no bias; the last map is the table of tokens."""
    s = d.sizes

    def attend(at: str) -> None:
        for role in "qkvo":
            d.linear(f"{at}/{role}", s.width, s.width, bias=role != "k")

    d.add("coder/hear1", "conv1d", s.width, 5, 3)
    d.add("coder/hear2", "conv1d", s.width, s.width, 3)
    d.add("coder/hear_places", "table", 7, s.width)
    stored(d, "kind:buffer")
    for i in range(s.depth):
        at = f"coder/blocks#{i}"
        d.norm(f"{at}/norm_self")
        attend(f"{at}/self")
        d.norm(f"{at}/norm_ff")
        d.mlp(f"{at}/ff")
    d.norm("coder/neck")
    d.add("decoder/tokens", "embedding", s.vocabulary, s.width)
    d.add("decoder/pos", "table", 11, s.width)
    for i in range(s.depth):
        at = f"decoder/blocks#{i}"
        for part in ("self", "cross"):
            d.norm(f"{at}/norm_{part}")
            attend(f"{at}/{part}")
        d.norm(f"{at}/norm_ff")
        d.mlp(f"{at}/ff")
    d.norm("decoder/neck")
