"""All measurements of lit_wsl.rebasin, one after the other (``make rebasin-bench``).

    python -m benchmarks.rebasin [architectures registered planted digits timing llama] [--device cuda] [--save]

With ``--save`` what the parts print goes to ``benchmarks/results`` too, from where ``python docs/measured.py`` takes it
into the docs. Each part is a module of its own and can be run alone: ``python -m benchmarks.rebasin_digits --help``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

PARTS = {
    "architectures": "function kept and coverage on public architectures",
    "registered": "function kept by the hand-written specs of the registry",
    "planted": "planted permutations recovered, with and without noise",
    "digits": "barrier between two seeds on real digits",
    "timing": "time of a sweep, beside its pure part and the rebasin package",
    "llama": "one full matching of the shapes of an 8-billion-parameter Llama",
}
RESULTS = Path(__file__).parent / "results"
#: Parts that write what they measured as JSON where ``--out`` says.
AS_JSON = ("architectures", "registered", "digits")
#: Ten pairs of seeds: one pair is luck.
PAIRS = [f"{seed},{seed + 1}" for seed in range(0, 20, 2)]


def measure(part: str, extra: list[str], save: bool) -> int:
    """Run one part; what it prints is shown, and kept if asked for and nothing failed."""
    if save and part in AS_JSON:
        extra = [*extra, "--out", str((RESULTS / f"rebasin_{part}.json").relative_to(Path.cwd()))]
    words = ["-m", f"benchmarks.rebasin_{part}", *extra]
    lines = [f"$ python {' '.join(words)}\n"]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if save and process.returncode == 0 and part not in (*AS_JSON, "timing"):  # timing always writes its JSON
        (RESULTS / f"rebasin_{part}.txt").write_text("".join(lines), encoding="utf-8")
    return process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help="; ".join(f"{k}: {v}" for k, v in PARTS.items()))
    parser.add_argument("--device", default="cpu", help="cuda runs llama at full size")
    parser.add_argument("--save", action="store_true", help="keep what is printed in benchmarks/results")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    failed = []
    for part in options.parts or PARTS:
        print(f"\n== {part}: {PARTS[part]}", flush=True)
        extra = {"llama": ["--device", options.device], "digits": ["--seeds", *PAIRS]}.get(part, [])
        began = time.perf_counter()
        code = measure(part, extra, options.save)
        print(f"== {part} took {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
