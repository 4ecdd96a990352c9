"""The pairs: two spellings of a function, a source that was trained, the truth in both directions."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gauntlet.truth import Rule, Tensors, invert
from benchmarks.proof import encoders, layouts, names, public, text, vision
from benchmarks.proof.data import dataset

CACHE = Path(__file__).parents[2] / "build" / "proof"
BATCH = 32


@dataclass(frozen=True)
class Pair:
    """Two spellings of one function.

    Attributes:
        name: Of the pair.
        task: ``classify``, ``segment``, ``reconstruct``, ``contrast`` or ``text``.
        usual: Builds the usual spelling, which is trained.
        hostile: Builds the other.
        truth: From the state dict of the usual spelling to that of the other.
        steps: Steps of training.
        rate: Learning rate.
        code: Files that it depends on.
    """

    name: str
    task: str
    usual: Callable[[], nn.Module]
    hostile: Callable[[], nn.Module]
    truth: Rule = field(repr=False)
    steps: int = 300
    rate: float = 3e-3
    code: tuple[str, ...] = ("data", "text", "vision")  # files that the trained model depends on


def loss(task: str, net: nn.Module, batch: list[Tensor]) -> Tensor:
    """The loss of a task on one batch; the network's own if it has one."""
    own = getattr(net, "loss", None)
    if own is not None:
        return own(batch)
    if task == "text":
        ids = batch[0]
        scores = net(ids[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
    images, labels = batch
    if task == "classify":
        return F.cross_entropy(net(images), labels)
    if task == "segment":
        noisy = images + 0.3 * torch.randn_like(images)
        return F.binary_cross_entropy_with_logits(net(noisy), (images > 0.4).float())
    if task == "reconstruct":
        scores, mean, spread = net(images)
        likeness = F.binary_cross_entropy_with_logits(scores, images.flatten(1), reduction="sum") / len(images)
        return likeness + 0.5 * (mean**2 + spread.exp() - 1 - spread).sum(1).mean()
    scores = net(images)
    own = torch.arange(len(images))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2


PAIRS = (
    Pair("convnet", "classify", vision.ConvNet, vision.HostileConvNet, vision.HostileConvNet.truth),
    Pair("vit", "classify", vision.ViT, vision.HostileViT, vision.HostileViT.truth),
    Pair("mixer", "classify", vision.Mixer, vision.HostileMixer, vision.HostileMixer.truth),
    Pair("unet", "segment", vision.UNet, vision.HostileUNet, vision.HostileUNet.truth),
    Pair("vae", "reconstruct", vision.VAE, vision.HostileVAE, vision.HostileVAE.truth),
    Pair("lstm", "classify", partial(vision.Recurrent, "lstm"), vision.HostileLSTM, vision.HostileLSTM.truth, 400),
    Pair("gru", "classify", partial(vision.Recurrent, "gru"), vision.HostileGRU, vision.HostileGRU.truth, 400),
    Pair("t5", "classify", encoders.T5, encoders.HostileT5, encoders.HostileT5.truth, 400, code=("data", "encoders")),
    Pair("towers", "contrast", vision.TwoTowers, vision.HostileTwoTowers, vision.HostileTwoTowers.truth),
    Pair("highway", "classify", names.Highway, names.Misnamed, names.Misnamed.truth, code=("data", "names")),
    Pair(
        "experts", "classify", names.Experts, names.HostileExperts, names.HostileExperts.truth, code=("data", "names")
    ),
    *(
        Pair(
            name,
            "text",
            partial(text.Decoder, family),
            partial(text.Hostile, family),
            partial(text.hostile_state, family),
            250,
        )
        for name, family in text.FAMILIES.items()
    ),
    Pair("litgpt", "text", partial(text.Decoder, layouts.FAMILY), layouts.LitGPT, layouts.lit_state, 250),
    Pair(
        "torchtune",
        "text",
        layouts.LitGPT,
        layouts.TorchTune,
        layouts.tune_state,
        250,
        code=("data", "text", "layouts"),
    ),
    *(
        Pair(
            f"public {kind}",
            "text",
            partial(public.Public, kind),
            partial(text.Hostile, text.FAMILIES[kind]),
            partial(public.public_state, kind),
            250,
            code=("data", "text", "public"),
        )
        for kind in (public.KINDS if importlib.util.find_spec("transformers") else ())
    ),
    *(
        Pair(
            "timm vit", "classify", encoders.timm_vit, vision.HostileViT, encoders.timm_state, code=("data", "encoders")
        )
        for _ in range(importlib.util.find_spec("timm") is not None)
    ),
)


@dataclass(frozen=True)
class Directed:
    """A pair in one direction: the source's trained tensors, the model to fill, and what it has to hold then."""

    name: str
    task: str
    source: Tensors = field(repr=False)
    source_model: nn.Module = field(repr=False)
    target: Callable[[], nn.Module]
    truth: Tensors = field(repr=False)


def loader(task: str, shuffle: bool = True) -> DataLoader:
    """The training data of a task."""
    return DataLoader(dataset(task), BATCH, shuffle=shuffle, drop_last=True)


def trained(pair: Pair) -> nn.Module:
    """The usual spelling, trained; from the cache if it was trained before with the same code."""
    code = "".join((Path(__file__).parent / f"{m}.py").read_text() for m in pair.code)
    key = hashlib.sha256(f"{code}{pair.name}{pair.steps}{pair.rate}".encode()).hexdigest()[:16]
    path = CACHE / f"{pair.name}-{key}.pt"
    torch.manual_seed(1)
    net = pair.usual()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    optimizer = torch.optim.AdamW(net.parameters(), pair.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, pair.rate, pair.steps)
    batches: Iterator[list[Tensor]] = iter(())
    for _ in range(pair.steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader(pair.task))
            batch = next(batches)
        optimizer.zero_grad()
        loss(pair.task, net, batch).backward()
        optimizer.step()
        schedule.step()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def directed(pair: Pair) -> Iterator[Directed]:
    """The pair there and back."""
    net = trained(pair)
    usual = {name: value.detach().clone() for name, value in net.state_dict().items()}
    other = {name: value.contiguous() for name, value in pair.truth(usual).items()}
    twin = pair.hostile().eval()
    twin.load_state_dict(other)
    back = invert([pair.truth], usual)(other)
    yield Directed(f"{pair.name} ->", pair.task, usual, net, pair.hostile, other)
    yield Directed(f"{pair.name} <-", pair.task, other, twin, pair.usual, back)
