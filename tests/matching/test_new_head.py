"""A new head, the commonest refactoring of all, leaves the rest of a regrouped model matched."""

import pytest
import torch
from torch import nn

from lit_wsl.mapper import WeightMapper


def old():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 32, 3),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class New(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 3)
        )
        self.head = nn.ModuleDict({"classifier": nn.Linear(32, classes)})


@pytest.mark.parametrize("classes", [10, 3])
def test_new_head(classes):
    truth = {f"{i}.{p}": f"backbone.{i}.{p}" for i in (1, 3) for p in ("weight", "bias")} | {
        "0.weight": "backbone.0.weight"
    }
    if classes == 10:
        truth |= {f"5.{p}": f"head.classifier.{p}" for p in ("weight", "bias")}
    assert dict(WeightMapper(old(), New(classes)).suggest_mapping()) == truth
    with torch.device("meta"):
        assert dict(WeightMapper.from_state_dict(old().state_dict(), New(classes)).suggest_mapping()) == truth


class Flat(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 32, 3)
        self.fc = nn.Linear(32, classes)


def test_new_head_on_a_regrouped_and_renamed_model():
    truth = {
        "conv1.weight": "backbone.0.weight",
        "bn1.weight": "backbone.1.weight",
        "bn1.bias": "backbone.1.bias",
        "conv2.weight": "backbone.3.weight",
        "conv2.bias": "backbone.3.bias",
    }
    assert dict(WeightMapper(Flat(), New(3)).suggest_mapping()) == truth
