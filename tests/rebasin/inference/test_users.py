"""What users write by hand: axes that a person knows to be movable move, and permutations keep the function."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lit_wsl.rebasin import (
    PermutationSpecBuilder,
    apply_permutation,
    infer_permutation_spec,
    verify_permutation_spec,
)

EDGES, IMAGE = torch.randint(0, 6, (2, 14), generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, 8, 8)


def loop(net, x):
    state = torch.zeros(len(x), 6, dtype=x.dtype)
    out = x.new_zeros(len(x), x.shape[1], 6)
    for step in range(x.shape[1]):
        state = torch.tanh(net.both(torch.cat([x[:, step], state], 1)))
        out[:, step] = state
    return net.b(out.relu())


def packed(net, x):
    rows = pack_padded_sequence(net.a(x), torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
    out, (last, _) = net.rnn(rows)
    return net.b(last[-1]) + net.b(pad_packed_sequence(out, batch_first=True)[0].amax(1))


def attention(net, x):
    x = net.a(x)
    q, k, v = torch.einsum("bnc,shdc->sbhnd", x, net.qkv)
    y = torch.einsum("bhnm,bhmd->bhnd", (q @ k.mT).softmax(-1), v)
    return net.b(x + torch.einsum("bhnd,hdc->bnc", y, net.o))


def spectral(net, x):
    x = net.a(x).mT
    modes = torch.fft.rfft(x)
    kept = torch.zeros_like(modes)
    kept[:, :, :2] = torch.einsum("bix,iox->box", modes[:, :, :2], net.w)
    return net.b(F.gelu(torch.fft.irfft(kept, n=x.shape[-1])).mT)


def spectral_2d(net, x):
    x = net.a(x)
    modes = torch.fft.rfft2(x)
    kept = torch.zeros(*modes.shape, dtype=modes.dtype)
    kept[:, :, :2, :2] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :2, :2], net.low)
    kept[:, :, -2:, :2] = torch.einsum("bixy,ioxy->boxy", modes[:, :, -2:, :2], net.high)
    return net.b(F.gelu(torch.fft.irfft2(kept, s=x.shape[-2:]) + net.c(x)))


def block_spectral(net, x):
    x = net.a(x)
    modes = torch.fft.rfft(x, dim=1).unflatten(-1, (2, 3))
    real, imaginary = modes.real, modes.imag
    w, v = net.w, net.v
    one = F.relu(torch.einsum("bnki,kio->bnko", real, w[0]) - torch.einsum("bnki,kio->bnko", imaginary, w[1]))
    two = F.relu(torch.einsum("bnki,kio->bnko", imaginary, w[0]) + torch.einsum("bnki,kio->bnko", real, w[1]))
    out = torch.stack([torch.einsum("bnki,kio->bnko", one, v[0]), torch.einsum("bnki,kio->bnko", two, v[1])], -1)
    return net.b(torch.fft.irfft(torch.view_as_complex(out).flatten(2), n=x.shape[1], dim=1))


def biaffine(net, x):
    return net.b(torch.einsum("bih,khd,bjd->bijk", net.a(x).relu(), net.u, net.c(x).relu()).tanh())


def one_expert(net, x):
    x = net.a(x)
    gain, chosen = net.r(x).softmax(-1).max(-1)
    hidden = (torch.einsum("bhd,bd->bh", net.w[chosen], x) + net.c[chosen]).relu()
    return net.b(torch.einsum("bdh,bh->bd", net.v[chosen], hidden) * gain[:, None] + x)


def two_experts(net, x):
    x = net.a(x)
    gain, chosen = net.r(x).softmax(-1).topk(2, -1)
    hidden = torch.einsum("bd,bkhd->bkh", x, net.w[chosen]) + net.c[chosen]
    return net.b((torch.einsum("bkh,bkdh->bkd", hidden.relu(), net.v[chosen]) * gain[..., None]).sum(1))


def gathered_experts(net, x):
    x = net.a(x)
    gain, chosen = net.r(x).softmax(-1).topk(2, -1)
    out = torch.einsum("beh,edh->bed", (torch.einsum("bd,ehd->beh", x, net.w) + net.c).relu(), net.v)
    picked = out.gather(1, chosen[..., None].expand(-1, -1, out.shape[-1]))
    return net.b((picked * gain[..., None]).sum(1))


def experts() -> dict[str, nn.Module | Tensor]:
    parts = {"w": torch.randn(4, 5, 6), "c": torch.randn(4, 5), "v": torch.randn(4, 6, 5)}
    return {**ends(), "r": nn.Linear(6, 4), **parts}


def codebook(net, x):
    z = net.a(x)
    chosen = torch.cdist(z, net.codes.weight).argmin(-1)
    return net.b(z + (net.codes(chosen) - z).detach())


def shifted(net, x):
    h = net.a(x)
    out = torch.zeros_like(h)
    out[:, 1:, :2], out[:, :-1, 2:4], out[:, :, 4:] = h[:, :-1, :2], h[:, 1:, 2:4], h[:, :, 4:]
    return net.b(out.relu())


def shifted_beside(net, x):
    h = net.a(x)
    return net.b(torch.cat([h[:, :-1, :3], h[:, 1:, 3:]], -1).relu())


def scattered(net, x, edges):
    h = net.a(x).relu()
    return net.b(torch.zeros_like(h).index_add_(0, edges[1], h[edges[0]]))


def sparse(net, x, edges):
    adjacency = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1], dtype=x.dtype), (6, 6))
    return net.b(torch.sparse.mm(adjacency, net.a(x)).relu())


def graph_attention(net, x, edges):
    h = net.a(x).view(-1, 2, 3)
    score = F.leaky_relu((h * net.left).sum(-1)[edges[0]] + (h * net.right).sum(-1)[edges[1]]).exp()
    out = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]] * score[..., None])
    return net.b(out.flatten(1))


def masked_attention(net, x):
    x = net.a(x)
    padding = torch.arange(x.shape[1]) >= torch.tensor([[4], [2], [3]])
    return net.b(net.m(x, x, x, key_padding_mask=padding, attn_mask=CAUSAL, need_weights=False)[0])


def masked_rows(net, x):
    def rows(y):
        return y.reshape(len(x), -1, 2, 4).transpose(1, 2).reshape(2 * len(x), -1, 4)

    q, k, v = map(rows, net.a(x).chunk(3, -1))
    padding = (torch.arange(x.shape[1]) >= torch.tensor([[4], [2], [3]])) * -1e4
    scores = q @ k.mT + padding.to(x.dtype)[:, None].repeat(1, 2, 1).view(len(q), 1, -1)
    return net.b((scores.softmax(-1) @ v).view(len(x), 2, -1, 4).transpose(1, 2).flatten(2))


def statistics_of_units(net, x):
    h = net.a(x)
    return net.b(h) + h.median(-1, keepdim=True)[0] + h.kthvalue(2, -1, keepdim=True)[0] + h.mode(-1, keepdim=True)[0]


def ends() -> dict[str, nn.Module]:
    return {"a": nn.Linear(3, 6), "b": nn.Linear(6, 2)}


def pixels() -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(6, 2, 1)}


def chain(norm) -> dict[str, nn.Module]:
    return {"a": norm(nn.Linear(3, 6)), "b": norm(nn.Linear(6, 2))}


CAUSAL = torch.ones(4, 4).triu(1).bool()
ROWS, NODES, STEPS = torch.randn(4, 3), torch.randn(6, 3), torch.randn(3, 4, 3)
ENDS = "a.weight:0 b.weight:1"
EXPERTS = f"{ENDS} a.bias:0 r.weight:0 r.weight:1 r.bias:0 w:0 w:1 w:2 c:0 c:1 v:0 v:1 v:2"
WEIGHT = "parametrizations.weight."
CASES = {
    "GRU, batch first": (
        lambda n, x: n.b(n.rnn(x)[0].mean(1)),
        lambda: {"rnn": nn.GRU(3, 6, batch_first=True), "b": nn.Linear(6, 2)},
        (STEPS,),
        "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.weight_hh_l0:1 b.weight:1",
    ),
    "packed": (
        packed,
        lambda: {"a": nn.Linear(3, 6), "rnn": nn.LSTM(6, 7, batch_first=True), "b": nn.Linear(7, 2)},
        (STEPS,),
        "a.weight:0 rnn.weight_ih_l0:0 rnn.weight_ih_l0:1 rnn.weight_hh_l0:1 b.weight:1",
    ),
    "loop": (loop, lambda: {"both": nn.Linear(9, 6), "b": nn.Linear(6, 2)}, (STEPS,), "both.weight:0 b.weight:1"),
    "stacked heads": (
        attention,
        lambda: {**ends(), "qkv": torch.randn(3, 2, 4, 6), "o": torch.randn(2, 4, 6)},
        (STEPS,),
        f"{ENDS} qkv:1 qkv:2 qkv:3 o:0 o:1 o:2",
    ),
    "Fourier modes": (
        spectral,
        lambda: {**ends(), "w": torch.randn(6, 6, 2, dtype=torch.cfloat)},
        (torch.randn(2, 8, 3),),
        f"{ENDS} w:0 w:1",
    ),
    "weight norm": (
        lambda n, x: n.b(n.a(x).relu()),
        lambda: chain(parametrizations.weight_norm),
        (ROWS,),
        f"a.{WEIGHT}original0:0 a.{WEIGHT}original1:0 b.{WEIGHT}original1:1",
    ),
    "masks of attention, padding for each sequence": (
        masked_attention,
        lambda: {"a": nn.Linear(3, 8), "m": nn.MultiheadAttention(8, 2, batch_first=True), "b": nn.Linear(8, 2)},
        (STEPS,),
        f"{ENDS} m.in_proj_weight:0 m.out_proj.weight:0 m.out_proj.weight:1",
    ),
    "padding repeated for each head": (
        masked_rows,
        lambda: {"a": nn.Linear(3, 24), "b": nn.Linear(8, 2)},
        (STEPS,),
        ENDS,
    ),
    "order statistics": (statistics_of_units, ends, (ROWS,), ENDS),
    "buckets": (lambda n, x: n.b(torch.bucketize(n.a(x), torch.linspace(-1, 1, 9)).to(x.dtype)), ends, (ROWS,), ENDS),
    "invertible, with its log-determinant": (
        lambda n, x: (n.b(n.a(x) @ n.w), torch.slogdet(n.w)[1]),
        lambda: {**ends(), "w": torch.randn(6, 6)},
        (ROWS,),
        f"{ENDS} w:0 w:1",
    ),
    "hidden distribution that is validated": (
        lambda n, x: n.b(torch.distributions.Normal(n.a(x), n.c(x).exp()).mean),
        lambda: {**ends(), "c": nn.Linear(3, 6)},
        (ROWS,),
        ENDS,
    ),
    "spectral norm": (
        lambda n, x: n.b(n.a(x).relu()),
        lambda: chain(parametrizations.spectral_norm),
        (ROWS,),
        f"a.{WEIGHT}original:0 b.{WEIGHT}original:1 b.{WEIGHT}0._v:0",
    ),
    "index_add": (scattered, ends, (NODES, EDGES), ENDS),
    "sparse": (sparse, ends, (NODES, EDGES), ENDS),
    "graph attention": (
        graph_attention,
        lambda: {**ends(), "left": torch.randn(1, 2, 3), "right": torch.randn(1, 2, 3)},
        (NODES, EDGES),
        f"{ENDS} left:1 left:2 right:2",
    ),
    "fold": (
        lambda n, x: n.b(F.fold(F.unfold(n.a(x), 3, padding=1), (8, 8), 3, padding=1).relu()),
        pixels,
        (IMAGE,),
        ENDS,
    ),
    "grid": (
        lambda n, x, g: n.b(F.grid_sample(n.a(x), g, align_corners=False)),
        pixels,
        (IMAGE, torch.rand(2, 5, 5, 2)),
        ENDS,
    ),
    "distances": (
        lambda n, x: torch.cdist(n.a(x), n.c).neg().softmax(-1) @ n.o,
        lambda: {"a": nn.Linear(3, 6), "c": torch.randn(5, 6), "o": torch.randn(5, 2)},
        (ROWS,),
        "a.weight:0 c:0 c:1 o:0",
    ),
    "bag": (
        lambda n, t: n.b(n.e(t).relu()),
        lambda: {"e": nn.EmbeddingBag(20, 6), "b": nn.Linear(6, 2)},
        (torch.randint(0, 20, (3, 4)),),
        "e.weight:1 b.weight:1",
    ),
    "one expert by advanced indexing": (one_expert, experts, (ROWS,), EXPERTS),
    "two experts by advanced indexing": (two_experts, experts, (ROWS,), EXPERTS),
    "experts' outputs gathered": (gathered_experts, experts, (ROWS,), EXPERTS),
    "codebook": (
        codebook,
        lambda: {**ends(), "codes": nn.Embedding(5, 6)},
        (ROWS,),
        f"{ENDS} codes.weight:0 codes.weight:1",
    ),
    "channels shifted in time": (shifted, ends, (STEPS,), ENDS),
    "channels shifted in time, side by side": (shifted_beside, ends, (STEPS,), ENDS),
    "FNO 2d": (
        spectral_2d,
        lambda: {
            **pixels(),
            "c": nn.Conv2d(6, 6, 1),
            "low": torch.randn(6, 6, 2, 2, dtype=torch.cfloat),
            "high": torch.randn(6, 6, 2, 2, dtype=torch.cfloat),
        },
        (IMAGE,),
        f"{ENDS} c.weight:0 c.weight:1 low:0 low:1 high:0 high:1",
    ),
    "AFNO": (
        block_spectral,
        lambda: {**ends(), "w": torch.randn(2, 2, 3, 3), "v": torch.randn(2, 2, 3, 3)},
        (STEPS,),
        f"{ENDS} w:1 w:2 w:3 v:1 v:2 v:3",
    ),
    "biaffine": (
        biaffine,
        lambda: {"a": nn.Linear(3, 5), "c": nn.Linear(3, 6), "u": torch.randn(4, 5, 6), "b": nn.Linear(4, 2)},
        (STEPS,),
        f"{ENDS} c.weight:0 u:0 u:1 u:2",
    ),
    "bilinear": (
        lambda n, x: n.b(n.m(n.a(x), n.c(x)).relu()),
        lambda: {"a": nn.Linear(3, 5), "c": nn.Linear(3, 4), "m": nn.Bilinear(5, 4, 6), "b": nn.Linear(6, 2)},
        (ROWS,),
        f"{ENDS} c.weight:0 m.weight:0 m.weight:1 m.weight:2 m.bias:0",
    ),
}


def double(value: Tensor) -> Tensor:
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("name", CASES)
def test_what_is_movable_moves_and_keeps_the_function(name):
    forward, parts, args, movable = CASES[name]
    torch.manual_seed(0)
    model = Net(forward, **parts()).eval()
    spec = infer_permutation_spec(model, args)
    assert not spec.dropped
    stay = []
    for place in movable.split():
        tensor, axis = place.rsplit(":", 1)
        found = spec.axes.get(tensor, {}).get(int(axis))
        if found is None or not bool(found.touched.all()):
            stay.append(place)
    assert not stay
    model = copy.deepcopy(model)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    wide = double(tensor.detach())
                    table[name] = nn.Parameter(wide, False) if isinstance(tensor, nn.Parameter) else wide
    args = tuple(double(a) for a in args)
    with torch.no_grad():
        before = model(*args)
        for seed in range(4):
            state = model.state_dict()
            other = copy.deepcopy(model)
            other.load_state_dict(apply_permutation(spec, spec.random_permutations(seed), state))
            torch.testing.assert_close(other(*args), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("drop", [F.dropout, lambda x, p: F.scaled_dot_product_attention(x, x, x, None, p)])
def test_dropout_that_is_always_on_is_not_looked_at(drop):
    model = Net(lambda net, x: net.b(drop(net.a(x), 0.5)), **ends()).eval()
    spec = infer_permutation_spec(model, (STEPS,))
    assert spec.axes["a.weight"].keys() == {0}
    assert not spec.dropped


@pytest.mark.parametrize("draw", [torch.bernoulli, torch.randn_like, lambda x: F.rrelu(x, training=True)])
def test_what_is_drawn_for_each_position_keeps_its_order_and_says_so(draw):
    model = Net(lambda net, x: net.b(draw(net.a(x).sigmoid()) * net.a(x)), **ends()).eval()
    spec = infer_permutation_spec(model, (ROWS,))
    assert not spec.groups
    assert not spec.dropped
    assert "random" in spec.frozen["a.weight"][0]


def test_a_sign_of_a_determinant_keeps_the_order():
    model = Net(lambda net, x: net.a(x).sum() * torch.slogdet(net.w)[0], a=nn.Linear(3, 3), w=torch.randn(3, 3)).eval()
    assert "w" not in infer_permutation_spec(model, (ROWS,), verify=False).axes


def test_a_model_in_data_parallel_is_proven_too():
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))).eval()
    spec = infer_permutation_spec(model, (ROWS,))
    assert spec.axes["module.0.weight"].keys() == {0}
    assert spec.axes["module.2.weight"].keys() == {1}


@pytest.mark.parametrize("number", [False, True])
def test_positions_that_are_computed_with_or_returned_keep_their_order(number):
    def forward(net, x):
        chosen = net.r(net.a(x)).argmax(-1)
        return (net.b(net.a(x)) + chosen[:, None] if number else net.b(net.a(x))), chosen

    model = Net(forward, **ends(), r=nn.Linear(6, 4)).eval()
    spec = infer_permutation_spec(model, (ROWS,), verify=False)
    assert 0 not in spec.axes["r.weight"]
    assert set(spec.axes["a.weight"]) == {0}


def test_a_wrong_order_of_what_is_only_returned_as_positions_does_not_pass():
    model = Net(lambda net, x: (net.b(net.a(x)), net.r(x).argmax(-1)), **ends(), r=nn.Linear(3, 4)).eval()
    wrong = PermutationSpecBuilder(model).linear("r", "P", None).build()
    assert verify_permutation_spec(wrong, model, (ROWS,)).dropped == ("P",)


def test_what_nothing_moves_is_listed_with_a_reason():
    model = Net(lambda net, x: net.b(torch.cat([net.a(x).relu(), x[:, :1]], 1)), a=nn.Linear(3, 6), b=nn.Linear(7, 2))
    spec = infer_permutation_spec(model.eval(), (ROWS,))
    for name, shape in spec.shapes.items():
        for axis, size in enumerate(shape):
            moved = spec.axes.get(name, {}).get(axis)
            if size > 1 and (moved is None or not bool(moved.touched.all())):
                assert spec.frozen[name][axis]
