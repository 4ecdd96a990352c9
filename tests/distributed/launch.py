"""Run functions of a file in several real processes that make one process group (gloo, CPU)."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from inspect import isfunction, signature
from pathlib import Path
from types import ModuleType
from typing import Any

TIMEOUT = 240  # seconds that a rank waits for the others, and that turns a hang into a failure


Results = dict[str, list[Any]]


def run_ranks(file: str | Path, names: Sequence[str], folder: Path, size: int = 2) -> Results:
    """Call ``name(folder)`` for each name, in order, in ``size`` processes at once.

    Returns:
        For each name what each rank returned; of a function that raised, ``{"raised": [type, message]}``.
    """
    return run_files({file: names}, folder, size)[Path(file).stem]


def run_files(work: Mapping[str | Path, Sequence[str]], folder: Path, size: int = 2) -> dict[str, Results]:
    """Call functions of several files, one file after the other, in the same ``size`` processes.

    Args:
        work: For each file the names of the functions, or nothing for all public ones, see :func:`scenarios_of`.
        folder: A folder that the processes share.
        size: How many processes.

    Returns:
        By the file's name without its suffix what :func:`run_ranks` gives.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        env = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "NODE_RANK": "0",
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, str(folder), json.dumps({str(f): list(n) for f, n in work.items()})]
        processes.append(
            subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT * 3)[0].decode() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{outputs[rank][-4000:]}"
    found: dict[str, Results] = {}
    for file in work:
        told = [json.loads((folder / f"{Path(file).stem}.{rank}.json").read_text()) for rank in range(size)]
        found[Path(file).stem] = {name: [of_rank[name] for of_rank in told] for name in told[0]}
    return found


def scenarios_of(module: ModuleType) -> list[str]:
    """The names of a module's own public functions of one argument, ``folder``, in the order of the file."""
    own = [(name, f) for name, f in vars(module).items() if isfunction(f) and f.__code__.co_filename == module.__file__]
    return [name for name, f in own if name[0] != "_" and list(signature(f).parameters) == ["folder"]]


def main(folder: str, work: str) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank = dist.get_rank()
    files = json.loads(work)
    for file, names in files.items():
        base = Path(folder, Path(file).stem if len(files) > 1 else "")  # names may be the same in two files
        sys.path.insert(0, str(Path(file).parent))
        scenarios = importlib.import_module(Path(file).stem)
        results = {}
        for name in names or scenarios_of(scenarios):
            own = base / name
            own.mkdir(exist_ok=True, parents=True)
            start = time.perf_counter()
            try:
                results[name] = getattr(scenarios, name)(own)
            except Exception as error:
                traceback.print_exc()
                results[name] = {"raised": [type(error).__name__, str(error)]}
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            dist.barrier()
        (Path(folder) / f"{Path(file).stem}.{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
