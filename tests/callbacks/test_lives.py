"""Once per model in every life that Lightning leads: trained weights are never touched, untrained ones are filled."""

from __future__ import annotations

import lightning as L
import pytest
from lives import BUILT, LIVES, lead


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("life", LIVES)
def test_training_is_never_undone_and_nothing_starts_untrained(life, built, tmp_path, trainer_kwargs):
    def trainer(folder, *callbacks):
        return L.Trainer(**trainer_kwargs, callbacks=list(callbacks))

    assert lead(life, built, tmp_path, trainer) == []
