"""U-Net twice: with lists of blocks, and written out level by level as in the first tutorials."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
        nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Blocks in lists, down first."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32), classes: int = 5):
        super().__init__()
        ins = (3, *widths[:-1])
        self.downs = nn.ModuleList(double(a, b) for a, b in zip(ins, widths[:-1], strict=False))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = double(widths[-2], widths[-1])
        self.ups = nn.ModuleList()
        for small, large in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.ups.append(nn.ConvTranspose2d(large, small, 2, stride=2))
            self.ups.append(double(2 * small, small))
        self.final_conv = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for i in range(0, len(self.ups), 2):
            x = self.ups[i + 1](torch.cat([skips.pop(), self.ups[i](x)], 1))
        return self.final_conv(x)


class Level(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()


class WrittenOutUNet(nn.Module):
    """Each level by name; convolutions before norms; the upsampling apart from its convolutions."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 24, 32), classes: int = 5):
        super().__init__()
        a, b, c, d = widths
        self.enc1, self.enc2, self.enc3 = Level(3, a), Level(a, b), Level(b, c)
        self.center = Level(c, d)
        self.up3 = nn.ConvTranspose2d(d, c, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(c, b, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(b, a, 2, stride=2)
        self.dec3, self.dec2, self.dec1 = Level(2 * c, c), Level(2 * b, b), Level(2 * a, a)
        self.out = nn.Conv2d(a, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        pool = nn.functional.max_pool2d
        e1 = self.enc1(x)
        e2 = self.enc2(pool(e1, 2))
        e3 = self.enc3(pool(e2, 2))
        x = self.center(pool(e3, 2))
        x = self.dec3(torch.cat([e3, self.up3(x)], 1))
        x = self.dec2(torch.cat([e2, self.up2(x)], 1))
        x = self.dec1(torch.cat([e1, self.up1(x)], 1))
        return self.out(x)
