"""A copy without memory runs as the model does, and leaves it alone."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lit_wsl.structure import trace_execution_order
from lit_wsl.structure.execution_order import meta_copy, on_meta


class Net(nn.Module):
    """Registered in another order than it runs, with tied weights, buffers, a parametrization and plain tensors."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.body = weight_norm(nn.Linear(8, 8))
        self.tokens = nn.Embedding(11, 8)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.table = torch.arange(8.0)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(self.calls))
        return self.head(self.norm(self.body(self.tokens(x).mean(1) * self.scale + self.table)))


def refuse(*args):
    raise AssertionError("a hook was called")


def test_the_order_is_that_of_the_model():
    net, x = Net(), torch.zeros(4, 3, dtype=torch.long)
    expected = trace_execution_order(net, (x,))
    for module in net.modules():
        module.register_forward_pre_hook(refuse)  # such as gather the parts of a sharded model
        module.register_forward_hook(refuse)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    copy = meta_copy(net)
    assert trace_execution_order(copy, on_meta((x,))) == expected
    assert min(expected, key=expected.get) in ("tokens.weight", "head.weight")  # tied
    assert net.calls == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_names_shapes_and_ties_are_kept():
    net = Net().half()
    copy = meta_copy(net)
    described = [(n, t.shape, t.dtype) for n, t in net.state_dict().items()]
    assert [(n, t.shape, t.dtype) for n, t in copy.state_dict().items()] == described
    assert all(t.is_meta for t in (*copy.parameters(), *copy.buffers(), copy.table))
    assert copy.head.weight is copy.tokens.weight
    assert not net.head.weight.is_meta
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in net.parameters()]
