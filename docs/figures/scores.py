"""Draw the scores of all pairs of weights, and circle what was chosen: ``python docs/figures/scores.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from example import NewNet, OldNet

from lit_wsl import WeightMapper
from lit_wsl.matching.scoring import score_pair


def draw(path: Path) -> None:
    """Write the figure."""
    mapper = WeightMapper(OldNet(), NewNet())
    plan = mapper.suggest_mapping().plan
    rows = [info for info in mapper.source.parameters if info.leaf == "weight"]
    columns = [info for info in mapper.target.parameters if info.leaf == "weight"]
    chosen = {(s, t) for entry in plan for s in entry.sources for t in entry.targets}
    fits = {
        (s, t): entry.badge not in ("exact", "cast") for entry in plan for s in entry.sources for t in entry.targets
    }
    scores = [
        [score_pair(s, t, mapper.options, operation=fits.get((s.name, t.name), False)).total for t in columns]
        for s in rows
    ]
    plt.rcParams["svg.hashsalt"] = "lit_wsl"
    figure, axes = plt.subplots(figsize=(8, 4.2))
    image = axes.imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, s in enumerate(rows):
        for j, t in enumerate(columns):
            axes.text(
                j, i, f"{scores[i][j]:.2f}", ha="center", va="center", color="white" if scores[i][j] > 0.55 else "black"
            )
            if (s.name, t.name) in chosen:
                axes.add_patch(
                    plt.Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor="#c0262d", linewidth=2)
                )
    axes.set_xticks(range(len(columns)), [c.name.removesuffix(".weight") for c in columns], rotation=25, ha="right")
    axes.set_yticks(range(len(rows)), [r.name.removesuffix(".weight") for r in rows])
    figure.colorbar(image, label="score of the pair by itself")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
