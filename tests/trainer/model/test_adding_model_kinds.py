"""The worked examples of docs/architecture.md: a search, a sequence model, a head, each one file and a line.

They are added to a copy of trainer/, as a new contributor would, and trained from a config like any other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.trainer.test_presets import preset_log

BLOCK = re.compile(r"^```python\n# (trainer/\S+\.py)(?:, in (\w+))?\n(.*?)^```$", flags=re.M | re.S)
KINDS = ("search", "sequence", "head")


def extended(folder: Path) -> dict[str, str]:
    """Copy trainer/ and do what the page says; -> each file that was touched, and how."""
    shutil.copytree(ROOT / "trainer", folder / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    touched = {}
    for kind in KINDS:
        section = page.partition(f"## Adding a {kind if kind != 'sequence' else 'sequence model'}\n")[2]
        for path, table, code in BLOCK.findall(section.partition("\n## ")[0]):
            file = folder / path
            if not table:
                assert not file.exists()
                file.write_text(code, encoding="utf-8")
                touched[path] = "new"
                continue
            line_of_import, _, entry = code.partition("\n\n")
            assert entry.count("\n") == 1, "one line a kind"
            text = file.read_text(encoding="utf-8")
            begin = re.search(rf"^{table}: .* = {{\n", text, flags=re.M)
            assert begin is not None
            text = text[: begin.end()] + entry + text[begin.end() :]
            first = text.index("from trainer.model.")
            file.write_text(f"{text[:first]}{line_of_import}\n{text[first:]}", encoding="utf-8")
            touched[path] = "lines"
    return touched


PROGRAM = """
import json, sys
from pathlib import Path
import torch, trainer
from tests.programs.preset_steps import small_config
from tests.trainer.test_presets import model_of
from trainer.assemble import resolve_groups
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.run_config import Config, load_config
from trainer.snapshot.search import search_parts
from trainer.step_size import kept_behaviors, step_size

log = Path(sys.argv[1])
config = small_config("dare", log)
chosen = {"search": "every_third", "every": 2, "sequence": "mean", "head": "linear", "k": 3}
tree = config.model_dump(mode="json", exclude_none=True)
config = Config.model_validate({**tree, "model": {**tree["model"], **chosen}})
manifest = read_manifest(log)
groups = resolve_groups(config, manifest)
model, rows = model_of(config, log)
model.train()
batch = next(iter(SequenceLogReader(config.data, "train", rows, seed=1).steps())).batch
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch).logits, batch.labels.float())
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
kept = model.search(batch)["main"]
saved = config.model_dump(mode="json")["model"]
unused = small_config("dare", log)
unused = unused.model_copy(update={"model": unused.model.model_copy(update={"every": 7})})
try:
    Config.model_validate({"model": {"every": 0}})
except ValueError as error:
    refused = "model.every" in str(error)
print(json.dumps({
    "trainer": trainer.__path__[0],
    "losses": losses,
    "ranks": sorted(set(kept.marks.position[kept.mask].tolist())),
    "saved": {key: saved[key] for key in chosen},
    "again": Config.model_validate({"model": saved}).model == config.model,
    "reason": search_parts(config, groups, {})["main"][0].reason,
    "remarks": [line for line in remarks(unused, manifest, groups) if "every" in line],
    "quiet": not any("every" in line for line in remarks(config, manifest, groups)),
    "refused": refused,
    "missed": config.model.search_kind.missed_share(config.model, 100.0, 50, 0.01),
    "kept": kept_behaviors(config.model, step_size(config.data, manifest)),
}))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("extended")
    log = preset_log(folder / "log")
    touched = extended(folder)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(log)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "touched": touched, "folder": str(folder)}


def test_each_kind_is_one_new_file_and_lines_of_one_table(outcome: dict[str, object]) -> None:
    assert outcome["touched"] == {
        "trainer/model/retrieve/every_third.py": "new",
        "trainer/model/read/mean.py": "new",
        "trainer/model/heads/linear.py": "new",
        "trainer/model/settings.py": "lines",
    }
    assert str(outcome["trainer"]).startswith(str(outcome["folder"]))


def test_they_train_and_keep_what_they_say(outcome: dict[str, object]) -> None:
    losses = outcome["losses"]
    assert isinstance(losses, list) and losses[0] > losses[1] > losses[2]
    assert outcome["ranks"] == [1, 3, 5]


def test_their_settings_are_keys_of_the_flat_section(outcome: dict[str, object]) -> None:
    chosen = {"search": "every_third", "every": 2, "sequence": "mean", "head": "linear", "k": 3}
    assert outcome["saved"] == chosen
    assert outcome["again"] and outcome["refused"]


def test_the_rest_of_the_project_knows_them_by_their_facts_alone(outcome: dict[str, object]) -> None:
    assert outcome["reason"] == 'search = "every_third" compares nothing'
    assert outcome["remarks"] == ["no effect in this configuration: model.every = 7"] and outcome["quiet"]
    assert isinstance(outcome["kept"], int) and outcome["kept"] > 0
    assert outcome["missed"] == pytest.approx(0.97), "50 candidates keep the same 3 of 100 behaviors"
