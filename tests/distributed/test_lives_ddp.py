"""Once per model under DDP: the same lives as in one process."""

from __future__ import annotations

SCENARIOS = "scenarios_lives"


def test_training_is_never_undone_and_nothing_starts_untrained(results):
    for rank in results["all_lives"]:
        assert "raised" not in rank, rank
        assert {life: wrong for life, wrong in rank.items() if wrong} == {}
        assert len(rank) == 30
