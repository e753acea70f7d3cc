"""`bench tasks`: a preset's control is, for each task, a model with that task alone, as wide as all sets."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tasks import control_jobs, model_of
from pipelines.synth.synth import synth
from trainer.run_config import load_config

CONFIGS = Path("configs")


def test_a_control_has_one_task_and_the_width_of_all_sets(tmp_path: Path) -> None:
    synth(tmp_path / "log", "agree", 1, users=20)
    given = ["data.history_length=20", "tasks.likes.label=like", "tasks.click.weight=0.5"]
    model = model_of(CONFIGS / "stem.toml", tmp_path / "log", given)
    # A shared set and one a task.
    assert list(model.tasks) == ["likes", "click"] and model.width == 3 * 16
    jobs = control_jobs(CONFIGS / "shared_bottom.toml", model, tmp_path / "log", given, [1, 2])
    for task, label in {"likes": "like", "click": "click"}.items():
        configs = [load_config(job.preset, job.overrides) for job in jobs[task]]
        assert [config.train.seed for config in configs] == [1, 2]
        for config in configs:
            assert {name: alone.label for name, alone in config.tasks.items()} == {task: label}
            assert config.groups["representation"].dim == model.width
            assert config.data.history_length == 20
