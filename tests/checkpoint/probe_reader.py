# ruff: noqa: E501
"""Run in a process of its own: opens every file of a folder under an audit hook and prints what came of each.

Usage: ``python probe_reader.py FOLDER``; one JSON line per file. Anything that looks like running code, importing,
writing or connecting ends the process with status 99.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch

from lit_wsl.checkpoint import load_checkpoint_as_dict, open_checkpoint
from lit_wsl.errors import CheckpointError

FORBIDDEN = (  # names and beginnings of audit events
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.putenv", "os.remove",
    "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate", "subprocess.", "socket.",
    "ctypes.", "shutil.", "pty.", "webbrowser.", "urllib.", "ftplib.", "http.", "tempfile.", "compile", "exec", "import",
    "pickle.find_class", "code.__new__", "function.__new__", "object.__setattr__", "sys.addaudithook", "marshal.", "cpython.run_",
)  # fmt: skip
MEMORY = 1536 << 20  # bytes a file of a few MB may take on top
armed = False


def watch(event: str, args: tuple) -> None:
    if not armed:
        return
    writes = event == "open" and (
        (isinstance(args[1], str) and any(letter in args[1] for letter in "wax+"))
        or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    )
    if writes or event.startswith(FORBIDDEN):
        print(json.dumps({"violation": event, "args": repr(args)[:300]}), flush=True)
        traceback.print_stack()
        os._exit(99)


def probe(path: Path) -> dict:
    started = time.process_time()  # and not of other processes
    try:
        checkpoint = open_checkpoint(path)
        sums = {name: tuple(checkpoint[name].shape) for name in checkpoint}
        dense = "w" in checkpoint and checkpoint["w"].layout == torch.strided
        good = dense and checkpoint["w"].flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        load_checkpoint_as_dict(path)
        outcome = {"tensors": len(sums), "good": good, "stubbed": list(checkpoint.stubbed)}
    except CheckpointError as error:
        outcome = {"error": str(error)[:500]}
    outcome["seconds"] = round(time.process_time() - started, 3)
    return outcome


def main(folder: Path) -> None:
    global armed
    warnings.simplefilter("ignore")
    warm = folder / "warm"
    for path in sorted(warm.iterdir()):  # whatever the readers import lazily is imported here
        probe(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(watch)
    gc.collect()
    armed = True
    for path in sorted(folder.iterdir()):
        if path != warm:
            print(json.dumps({"file": path.name, **probe(path)}), flush=True)
    armed = False


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
