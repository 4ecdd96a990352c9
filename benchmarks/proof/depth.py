"""How many passes a proof takes for decoders of 2 to 24 blocks: ``python -m benchmarks.proof.depth``.

A Llama-like network, taken to the hostile spelling (turned and fused matrices, the other rotary convention, blocks
counted from the end) and back.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial

from benchmarks.proof import text
from benchmarks.proof.__main__ import measure
from benchmarks.proof.pairs import Pair, directed

DEPTHS = (2, 6, 12, 24)


def pair_of(depth: int) -> Pair:
    """Two spellings of a decoder of some depth."""
    family = replace(text.FAMILIES["llama"], width=32, inner=48, blocks=depth)
    spellings = partial(text.Decoder, family), partial(text.Hostile, family), partial(text.hostile_state, family)
    return Pair(f"llama of {depth}", "text", *spellings, 250)


def main() -> None:
    """A line for each depth and direction."""
    warnings.filterwarnings("ignore")
    for depth in DEPTHS:
        for direction in directed(pair_of(depth)):
            row = measure(direction, "data")
            print(
                f"{row.pair:15} right {row.right:3} wrong {row.wrong:3} missing {row.missing:3} "
                f"{'kept' if row.kept else '-':5} {row.proof:10} {row.passes:6.1f} passes {row.seconds:6.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
