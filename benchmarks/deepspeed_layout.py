"""Whether the DeepSpeed folders of our tests have the layout of the real library, and both join them alike.

Runs the library's own ``zero_to_fp32.py`` (from an unpacked source distribution; nothing is built or installed) over
the folders that ``tests/checkpoint/test_deepspeed.py`` writes, and compares each tensor with ours.

    pip download deepspeed==0.18.1 --no-deps --no-binary :all: && tar xzf deepspeed-0.18.1.tar.gz
    python -m benchmarks.deepspeed_layout deepspeed-0.18.1
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from lit_wsl.checkpoint import open_checkpoint

TESTS = Path(__file__).parents[1] / "tests" / "checkpoint" / "test_deepspeed.py"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def library(root: Path) -> ModuleType:
    """The real script and its real constants; of the rest of the library only the logger is needed."""
    for name in ("deepspeed", "deepspeed.checkpoint"):
        sys.modules[name] = ModuleType(name)
    utils = sys.modules["deepspeed.utils"] = ModuleType("deepspeed.utils")
    utils.logger = logging.getLogger("deepspeed")  # type: ignore[attr-defined]
    load("deepspeed.checkpoint.constants", root / "deepspeed" / "checkpoint" / "constants.py")
    return load("zero_to_fp32", root / "deepspeed" / "utils" / "zero_to_fp32.py")


def main() -> int:
    script, tests = library(Path(sys.argv[1])), load("test_deepspeed", TESTS)
    differing = 0
    for stage in (1, 2, 3):
        for ranks in (1, 2, 3, 8):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "ds")
                tests.write(path, stage, ranks)
                theirs = script.get_fp32_state_dict_from_zero_checkpoint(str(path))
                ours = open_checkpoint(path)
                unequal = [n for n, t in theirs.items() if n not in ours or not torch.equal(ours[n].float(), t.float())]
                more = sorted(set(ours) - set(theirs))  # tied names that the script leaves out
                differing += len(unequal)
                print(f"stage {stage}, {ranks} ranks: {len(theirs)} tensors, differing {unequal}, only ours {more}")
    print(f"{differing} tensors differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
