"""Run functions of a file in several real processes that make one process group (gloo, CPU)."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 90  # seconds that a rank waits for the others, and that turns a hang into a failure


def run_ranks(file: str | Path, names: Sequence[str], folder: Path, size: int = 2) -> dict[str, list[Any]]:
    """Call ``name(folder)`` for each name, in order, in ``size`` processes at once.

    Returns:
        For each name what each rank returned; of a function that raised, ``{"raised": [type, message]}``.
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
        command = [sys.executable, __file__, str(file), str(folder), *names]
        processes.append(
            subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    try:
        outputs = [process.communicate(timeout=TIMEOUT * 2.5)[0].decode() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{outputs[rank][-4000:]}"
    return {n: [json.loads((folder / f"{n}.{rank}.json").read_text()) for rank in range(size)] for n in names}


def main(file: str, folder: str, *names: str) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location("scenarios", file)
    assert spec is not None
    assert spec.loader is not None
    scenarios = importlib.util.module_from_spec(spec)
    sys.modules["scenarios"] = scenarios
    spec.loader.exec_module(scenarios)
    rank = dist.get_rank()
    for name in names:
        own = Path(folder) / name
        own.mkdir(exist_ok=True)
        try:
            result = getattr(scenarios, name)(own)
        except Exception as error:
            traceback.print_exc()
            result = {"raised": [type(error).__name__, str(error)]}
        (Path(folder) / f"{name}.{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
