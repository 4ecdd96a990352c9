"""Draw the two networks of the guides with lines between matched modules: ``python docs/figures/alignment.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from example import NewNet, OldNet

from lit_wsl import WeightMapper
from lit_wsl.report.rows import mapping_rows

COLOURS = {True: "#2458c5", False: "#15803d"}


def draw(path: Path) -> None:
    """Write the figure."""
    mapper = WeightMapper(OldNet(), NewNet())
    rows = mapping_rows(mapper.suggest_mapping().plan)
    left = [g.module_path for g in mapper.source.groups]
    right = [g.module_path for g in mapper.target.groups]
    sizes = {(side, g.module_path): g.numel for side, d in ((0, mapper.source), (1, mapper.target)) for g in d.groups}
    plt.rcParams["svg.hashsalt"] = "lit_wsl"
    figure, axes = plt.subplots(figsize=(8, 3.6))
    height = max(len(left), len(right)) - 1
    place = {(0, p): height * (1 - i / (len(left) - 1)) for i, p in enumerate(left)}
    place |= {(1, p): height * (1 - i / (len(right) - 1)) for i, p in enumerate(right)}
    for row in rows:
        transformed = row.badge != "exact"
        for source in row.sources:
            for target in row.targets:
                axes.plot(
                    [0.0, 1.0],
                    [place[0, source], place[1, target]],
                    color=COLOURS[transformed],
                    linestyle="--" if transformed else "-",
                    linewidth=1.8,
                )
        middle = sum(place[0, s] for s in row.sources) / len(row.sources)
        other = sum(place[1, t] for t in row.targets) / len(row.targets)
        if transformed:
            axes.text(0.5, (middle + other) / 2 + 0.18, row.badge, ha="center", color=COLOURS[True], fontsize=9)
    for (side, module), y in place.items():
        label = f"{module}\n{sizes[side, module]:,} elements"
        axes.text(-0.03 if side == 0 else 1.03, y, label, ha="right" if side == 0 else "left", va="center", fontsize=9)
    axes.set(xlim=(-0.45, 1.55), ylim=(-0.5, height + 0.6))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
