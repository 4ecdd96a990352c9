"""Networks as lists of leaves: convolutions, recurrence, graphs, generators, codecs."""

from __future__ import annotations

from benchmarks.refactors.structures import Draft, structure


@structure("first", "stem", "stages", "list", "convs", "head")
def residual_network(d: Draft) -> None:
    s = d.sizes
    d.conv("stem_conv", s.width, 3, bias=False)
    d.add("stem_bn", "batch_norm", s.width)
    inner = s.width
    for j in range(s.stages):
        out = s.width if j == 0 else s.hidden
        for i in range(s.depth):
            at = f"stages#{j}/blocks#{i}"
            d.conv_block(at, out, inner)
            if inner != out:
                d.conv(f"{at}/short_conv", out, inner, 1, bias=False)
                d.add(f"{at}/short_bn", "batch_norm", out)
            inner = out
    d.linear("head", s.outputs, inner)


@structure("first", "stem", "unet", "convs", "head")
def u_net(d: Draft) -> None:
    """Down, a bottom, and up again; with one width throughout or growing ones."""
    s = d.sizes
    widths = [s.width if s.same_heads else s.width * (1 + j) for j in range(s.stages + 1)]
    d.conv("stem_conv", widths[0], 3)
    for j in range(s.stages):
        d.conv_block(f"down#{j}", widths[j + 1], widths[j])
    d.conv_block("middle", widths[-1], widths[-1])
    for j in range(s.stages):
        out, inner = widths[-2 - j], widths[-1 - j]
        d.add(f"up#{j}/rise", "upconv2d", out, inner, 2)
        d.conv_block(f"up#{j}", out, 2 * out if not s.same_heads else out)
    d.conv("head", s.outputs, widths[0], 1)


@structure("second", "stem", "stages", "list", "convs", "pyramid", "detection")
def detector(d: Draft) -> None:
    """A backbone, a pyramid with the coarsest level first, and two dense heads."""
    s = d.sizes
    d.conv("body/stem_conv", s.width, 3, bias=False)
    d.add("body/stem_bn", "batch_norm", s.width)
    inner = s.width
    for j in range(s.stages + 1):
        out = s.width if j < 2 else s.hidden
        d.conv_block(f"body/stages#{j}/blocks#0", out, inner)
        inner = out
    for j in range(s.stages + 1):
        d.conv(f"pyramid/lateral#{j}", s.width, s.width if j < 2 else s.hidden, 1, bias=True)
    for j in range(s.stages + 1):
        d.conv(f"pyramid/smooth#{j}", s.width, s.width, bias=True)
    for branch, outputs in (("classes", s.outputs), ("boxes", 4)):
        for i in range(2):
            d.conv(f"heads/{branch}_tower#{i}", s.width, s.width, bias=True)
        d.conv(f"heads/{branch}", outputs, s.width, bias=True)


@structure("first", "tokens", "recurrent", "neck", "head")
def lstm_tagger(d: Draft) -> None:
    s = d.sizes
    d.add("tokens", "embedding", s.vocabulary, s.width)
    _recurrent(d, "recurrent", "lstm", s.depth)
    d.norm("neck")
    d.linear("head", s.outputs, s.width)


@structure("second", "tokens", "coder", "recurrent", "bridge", "head")
def gru_translator(d: Draft) -> None:
    """An encoder and a decoder of gated units, and a bridge between them."""
    s = d.sizes
    d.add("coder/tokens", "embedding", s.vocabulary, s.width)
    _recurrent(d, "coder/recurrent", "gru", s.depth)
    d.linear("bridge", s.width, s.width)
    d.add("decoder/tokens", "embedding", s.vocabulary, s.width)
    _recurrent(d, "decoder/recurrent", "gru", s.depth)
    d.linear("head", s.vocabulary, s.width)


def _recurrent(d: Draft, path: str, kind: str, layers: int) -> None:
    """One module for all layers, a piece for each."""
    from dataclasses import replace

    d.add(path, kind, d.sizes.width, d.sizes.width)
    leaf = d.leaves[-1]
    pieces = tuple(f"{path}~{layer}" for layer in range(layers))
    d.leaves[-1] = replace(leaf, pieces=pieces, sizes=leaf.sizes * layers)


@structure("first", "nodes", "list", "graph", "head")
def graph_network(d: Draft) -> None:
    s = d.sizes
    d.linear("nodes", s.width, 5)
    d.linear("edges", s.width, 3)
    for i in range(s.depth):
        at = f"blocks#{i}"
        d.linear(f"{at}/itself", s.width, s.width)
        d.linear(f"{at}/neighbour", s.width, s.width, bias=False)
        d.linear(f"{at}/edge", s.width, s.width, bias=False)
        d.add(f"{at}/bn", "batch_norm", s.width)
    d.linear("head", s.outputs, s.width)


@structure("first", "coder", "list", "gaussian", "convs")
def variational_autoencoder(d: Draft) -> None:
    s = d.sizes
    for i in range(s.depth):
        d.conv_block(f"coder/blocks#{i}", s.width, 3 if i == 0 else s.width)
    d.linear("mean", s.outputs, s.width)
    d.linear("spread", s.outputs, s.width)
    d.linear("decoder/entry", s.width, s.outputs)
    for i in range(s.depth):
        d.conv_block(f"decoder/blocks#{i}", s.width, s.width)
    d.conv("decoder/exit", 3, s.width)


@structure("second", "time", "unet", "diffusion", "attention", "head")
def latent_diffusion(d: Draft) -> None:
    """Residual blocks with a time embedding, attention over an image and over a text."""
    s = d.sizes
    d.linear("time/first", s.hidden, s.width)
    d.linear("time/second", s.hidden, s.hidden)
    d.conv("entry", s.width, 4)

    def blocks(at: str) -> None:
        d.add(f"{at}/res/norm_in", "group_norm", s.width)
        d.conv(f"{at}/res/conv_in", s.width, s.width)
        d.linear(f"{at}/res/time_map", s.width, s.hidden)
        d.add(f"{at}/res/norm_out", "group_norm", s.width)
        d.conv(f"{at}/res/conv_out", s.width, s.width)
        for attention in ("over_image", "over_text"):
            d.norm(f"{at}/trans/norm_{attention}")
            d.attention(f"{at}/trans/{attention}", bias=False)

    for j in range(s.stages):
        blocks(f"down#{j}")
    blocks("middle")
    for j in range(s.stages):
        blocks(f"up#{j}")
    d.add("exit_norm", "group_norm", s.width)
    d.conv("head", 4, s.width)


@structure("second", "adversaries", "list", "convs")
def adversarial_pair(d: Draft) -> None:
    """Two generators of one shape and two critics with spectral norm."""
    s = d.sizes
    for net in ("there", "back"):
        for i in range(s.depth):
            d.conv_block(f"{net}/blocks#{i}", s.width, 3 if i == 0 else s.width)
    for critic in ("critic_there", "critic_back"):
        for i in range(2):
            d.add(f"{critic}/layers#{i}", "spectral", s.width, s.width)
        d.add(f"{critic}/verdict", "spectral", 1, s.width)


@structure("second", "coder", "list", "codec")
def neural_codec(d: Draft) -> None:
    """Weight-normed convolutions around residual codebooks that are buffers only."""
    s = d.sizes
    for i in range(s.depth):
        d.add(f"coder/blocks#{i}", "weight_norm", s.width, s.width, 3)
    for j in range(s.experts):
        d.add(f"quantizer/levels#{j}/codebook", "codebook", 6, s.width)
    for i in range(s.depth):
        d.add(f"decoder/blocks#{i}", "weight_norm", s.width, s.width, 3)


@structure("first", "coder", "list", "target_network")
def momentum_encoder(d: Draft) -> None:
    """An online and a target network, centred by batch norms that have buffers only."""
    s = d.sizes
    for net in ("online", "target"):
        for i in range(s.depth):
            d.linear(f"{net}/blocks#{i}/fc", s.width, s.width)
            d.add(f"{net}/blocks#{i}/whiten", "plain_batch_norm", s.width)
        d.linear(f"{net}/project", s.outputs, s.width, bias=False)
    d.linear("predictor", s.outputs, s.outputs)
    d.add("queue", "table", s.outputs, 6)
