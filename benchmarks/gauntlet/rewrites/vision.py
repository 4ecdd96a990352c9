"""ResNet, VGG, ViT and DenseNet as users write them; two layers of LSTM cells; wrappers around a net."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Wrapped(nn.Module):
    """A net under another name, as LightningModules (``model.``), DDP (``module.``) and ``torch.compile`` hold it."""

    def __init__(self, net: nn.Module, *names: str):
        super().__init__()
        self.name = names[0]
        self.add_module(names[0], Wrapped(net, *names[1:]) if names[1:] else net)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.name)(*args, **kwargs)


class Lit(Wrapped):
    """A LightningModule in all but name: the net, a teacher that moves with it, and a loss with class weights."""

    def __init__(self, net: nn.Module, classes: int):
        super().__init__(net, "model")
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(classes))


class Residual(nn.Module):
    """The shortcut first, then the body as one Sequential."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SequentialResNet(nn.Module):
    """ResNet-18: a stem, one flat list of eight blocks, a head registered before them."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.head = nn.Linear(512, classes)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.blocks = nn.Sequential(*(Residual(a, b, 1 if a == b else 2) for a, b in pairwise(widths)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class NamedVGG(nn.Module):
    """Layers by the names of the paper: conv1_1, conv1_2, ..., fc6, fc7, fc8."""

    def __init__(self, config: list[Any], hidden: int, classes: int):
        super().__init__()
        inside, stage, place = 3, 1, 1
        self.order: list[str] = []
        for item in config:
            if item == "M":
                self.order.append("pool")
                stage, place = stage + 1, 1
                continue
            name = f"conv{stage}_{place}"
            self.add_module(name, nn.Conv2d(inside, item, 3, padding=1))
            self.order.append(name)
            inside, place = item, place + 1
        self.fc6 = nn.Linear(inside * 49, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = F.max_pool2d(x, 2) if name == "pool" else F.relu(getattr(self, name)(x))
        return self.fc8(F.relu(self.fc7(F.relu(self.fc6(x.flatten(1))))))


class ShortAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ShortFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(hidden, width),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ShortTransformer(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(
            nn.ModuleList([ShortAttention(width, heads), ShortFeedForward(width, hidden)]) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = x + attention(x)
            x = x + feed(x)
        return self.norm(x)


class ShortViT(nn.Module):
    """The well-known short ViT: pre-norms inside attention and feed-forward, patches flattened into a Linear.

    Args:
        channels_last: Patches are flattened as (height, width, channel), not (channel, height, width).
    """

    def __init__(self, channels_last: bool = False, width: int = 24, depth: int = 3, heads: int = 3, hidden: int = 72):
        super().__init__()
        self.channels_last = channels_last
        self.to_patch_embedding = nn.Linear(3 * 64, width)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 17, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.transformer = ShortTransformer(width, depth, heads, hidden)
        self.mlp_head = nn.Linear(width, 10)

    def forward(self, img: Tensor) -> Tensor:
        x = img.unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # batch, channel, rows, 8, columns, 8
        order = (0, 2, 4, 3, 5, 1) if self.channels_last else (0, 2, 4, 1, 3, 5)
        x = self.to_patch_embedding(x.permute(order).flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x)[:, 0])


class DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int):
        super().__init__()
        self.reduce = nn.Sequential(nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, 4 * growth, 1, bias=False))
        self.grow = nn.Sequential(
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.reduce(x))], 1)


class ListDenseNet(nn.Module):
    """Blocks as Sequentials of layers that concatenate by themselves, transitions in a list of their own."""

    def __init__(self, growth: int = 8, depths: tuple[int, ...] = (2, 3, 4), width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            self.blocks.append(nn.Sequential(*(DenseLayer(width + j * growth, growth) for j in range(depth))))
            width += depth * growth
            if i < len(depths) - 1:
                self.transitions.append(
                    nn.Sequential(
                        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 3, 2, 1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self.fc(F.relu(self.norm(x)).mean((-2, -1)))


class TorchLSTM(nn.Module):
    def __init__(self, vocab: int = 96, width: int = 24):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)
        self.out = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(tokens))[0])


class CellLSTM(nn.Module):
    """The same, cell by cell."""

    def __init__(self, vocab: int = 96, width: int = 24):
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(2))
        self.embed = nn.Embedding(vocab, width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).unbind(1)
        for cell in self.cells:
            state, out = None, []
            for step in x:
                state = cell(step, state)
                out.append(state[0])
            x = out
        return self.head(torch.stack(list(x), 1))
