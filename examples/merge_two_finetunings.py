"""Two fine-tunings of one network, compared and merged at the end of the second fit.

1. Pretrain a small convolutional network on scikit-learn's handwritten digits.
2. Fine-tune it twice: on images turned by a quarter, and on images in negative.
3. The second fit ends with ``RebasinCallback``: it compares the task vectors and writes the merged network.

Two fine-tunings of one network have their units in the same order already. Matching on whole weights says so: all
units stay. Matching on task vectors finds another order, in which the task vectors resemble each other most; that is
for comparing them, and merging by it would do harm: the last lines show how much.

Run it with ``python examples/merge_two_finetunings.py``; it takes well under a minute on two cores. It checks what it
shows, and ends with exit code 1 if anything of it is not so.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_wsl import RebasinCallback
from lit_wsl.rebasin import (
    apply_permutation,
    average,
    infer_permutation_spec,
    reestimate_batchnorm,
    task_vector,
    weight_matching_for_task_vectors,
)


class Net(LightningModule):
    def __init__(self, width: int = 24, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        )
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)


def turned(images: Tensor) -> Tensor:
    return torch.rot90(images, 1, (2, 3))


def negative(images: Tensor) -> Tensor:
    return 1 - images


def fit(model: Net, images: Tensor, labels: Tensor, epochs: int, folder: Path, *callbacks: RebasinCallback) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    trainer.fit(model, loader)
    return trainer


def plot(path: Path, scores: dict[str, list[float]], shares: dict[str, float]) -> None:
    """Accuracy of every model on every view, and where the two matchings left the units."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(1, 2))
    left.bar(["on weights", "on task\nvectors"], [shares["weights"], shares["task_vectors"]], color=["C0", "C3"])
    left.set(ylim=(0, 1.05), title="units that stay in place")
    names = ["fine-tuned on turned", "fine-tuned on negative", "merged on weights", "merged on task vectors"]
    for number, (name, color) in enumerate(zip(names, ("0.75", "0.55", "C0", "C3"))):
        right.bar([i + 0.2 * number for i in range(3)], scores[name], width=0.18, label=name, color=color)
    right.set_xticks([0.3, 1.3, 2.3], ["upright", "turned", "negative"])
    right.set(ylim=(0, 1.05), title="accuracy on held-out digits")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, help="folder for checkpoints and reports; a temporary one by default")
    parser.add_argument("--plot", type=Path, help="file for a plot of the outcome (.png, .svg)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    output = options.output or Path(tempfile.mkdtemp())
    output.mkdir(parents=True, exist_ok=True)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    seen, labels_seen = images[:1437], labels[:1437]
    held_out, answers = images[1437:], labels[1437:]

    seed_everything(0, verbose=False)
    pretrained = Net()
    fit(pretrained, seen, labels_seen, options.epochs, output).save_checkpoint(output / "pretrained.ckpt")

    def fine_tuned(seed: int, change, name: str, *callbacks: RebasinCallback) -> tuple[Net, Trainer]:
        seed_everything(seed, verbose=False)
        model = Net(lr=0.02)
        model.load_state_dict(pretrained.state_dict())
        both = torch.cat([seen, change(seen)])
        return model, fit(model, both, labels_seen.repeat(2), options.epochs, output / name, *callbacks)

    first, trainer = fine_tuned(1, turned, "turned")
    trainer.save_checkpoint(output / "turned.ckpt")
    rebasin = RebasinCallback(output / "pretrained.ckpt", output / "turned.ckpt", merge="average")
    second, trainer = fine_tuned(2, negative, "negative", rebasin)

    report = json.loads(Path(trainer.log_dir, "rebasin.json").read_text())
    run = report["models"]["run"]
    shares = {on: found["identity_share"] for on, found in run["matching"].items()}
    before, after = run["before"]["overall"], run["after"]["overall"]
    print(f"task vectors, as they are: cosine {before['cosine']:.3f}, sign conflict {before['sign_conflict']:.1%}")
    print(f"aligned for comparing:     cosine {after['cosine']:.3f}, sign conflict {after['sign_conflict']:.1%}")
    print(
        f"units that stay in place:  {shares['weights']:.1%} matched on weights, {shares['task_vectors']:.1%} on task"
    )

    # What merging by the permutations of the task vectors would have done.
    base = pretrained.state_dict()
    spec = infer_permutation_spec(first, (seen[:2],))
    vectors = [task_vector(m.state_dict(), base) for m in (first, second)]
    wrong_order = apply_permutation(spec, weight_matching_for_task_vectors(spec, vectors)[1], second.state_dict())
    harmed = Net().eval()
    harmed.load_state_dict(average([first.state_dict(), wrong_order]))
    reestimate_batchnorm(harmed, [torch.cat([seen, turned(seen), negative(seen)])], forward=lambda m, x: m(x))
    merged = Net().eval()
    merged.load_state_dict(torch.load(Path(trainer.log_dir, report["files"]["merged"]))["state_dict"])
    reestimate_batchnorm(merged, [torch.cat([seen, turned(seen), negative(seen)])], forward=lambda m, x: m(x))

    def accuracy(model: Net) -> list[float]:
        model.eval()
        with torch.no_grad():
            views = (held_out, turned(held_out), negative(held_out))
            return [float((model(v).argmax(1) == answers).float().mean()) for v in views]

    models = {"pretrained": pretrained, "fine-tuned on turned": first, "fine-tuned on negative": second}
    models |= {"merged on weights": merged, "merged on task vectors": harmed}
    print(f"\n{'':26} upright  turned  negative")
    scores = {name: accuracy(model) for name, model in models.items()}
    for name, values in scores.items():
        print(f"{name:26} {values[0]:7.1%} {values[1]:7.1%} {values[2]:9.1%}")

    if options.plot:
        plot(options.plot, scores, shares)
    mean = {name: sum(values) / 3 for name, values in scores.items()}
    claims = {
        "the models were aligned, and the report says so": report["perm_matching"] is True,
        "matched on weights, the units stay where they are": shares["weights"] > 0.99,
        "aligned for comparing, the task vectors are closer": after["cosine"] > before["cosine"],
        "the merged network is better over all three than the pretrained one": mean["merged on weights"]
        > mean["pretrained"],
        "merging by the order of the task vectors does harm": mean["merged on task vectors"]
        < mean["merged on weights"],
    }
    print()
    for claim, holds in claims.items():
        print("yes" if holds else "NO ", claim)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
