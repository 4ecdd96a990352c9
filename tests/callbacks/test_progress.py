"""The progress bar of long transfers."""

from __future__ import annotations

import io
import sys

from lit_wsl.callbacks.remarks import proof_progress, transfer_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_it_shows_on_a_terminal_for_long_transfers_only(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with transfer_progress(2 << 30) as progress:
        progress("verify", 1 << 30)
        progress("copy", 1 << 30)
    assert "copying weights" in terminal.getvalue()
    for size, enabled in ((1 << 20, True), (2 << 30, False)):
        with transfer_progress(size, enabled=enabled) as progress:
            assert progress is None
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with transfer_progress(2 << 30) as progress:
        assert progress is None
    assert pipe.getvalue() == ""


def test_a_proof_shows_how_far_it_is_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with proof_progress(60.0) as watch:
        watch(15.0)
    assert "proof on data" in terminal.getvalue()
    assert "25%" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with proof_progress(60.0) as watch:
        assert watch is None
