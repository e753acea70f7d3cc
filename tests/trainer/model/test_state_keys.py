"""Names of a model's parameters and buffers are those of every checkpoint and snapshot written so far."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.programs.preset_steps import small_config
from tests.trainer.test_presets import model_of, preset_log

# preset -> the names in a state dict, in their order: the norm of all gradients is added up in it.
KEYS = json.loads((Path(__file__).parent / "state_keys.json").read_text())
_OWN_TIME = ["model.time_tables=stage"]
_TWIN = ['model.time_in=["scores"]', 'model.cross_in=["scores"]']
# What presets said when those checkpoints were written; a run keeps its own config.
THEN = {
    **dict.fromkeys(("tin", "stacked_tin", "tdpe", "dpe", "dsi_tin"), _OWN_TIME),
    **dict.fromkeys(("twin", "twin_v2", "stem_twin", "multi_embedding_twin"), _TWIN),
    "dare_paper": [*_OWN_TIME, "model.time=bias"],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preset_log(tmp_path_factory.mktemp("state") / "log")


@pytest.mark.parametrize("preset", KEYS)
def test_a_checkpoint_of_before_loads_without_a_new_name(preset: str, log: Path) -> None:
    model, _ = model_of(small_config(preset, log, *THEN.get(preset, ())), log)
    assert list(model.state_dict()) == KEYS[preset]
