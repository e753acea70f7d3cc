"""`tandemrec bench step` without a config: the training step against what users would pick instead."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt

from benchmarks.loops import Seconds, bare_loop, one_thread, timed, trainer_loop
from benchmarks.plain import PlainDare, PlainMlpScorer, plain_loss
from benchmarks.report import provenance, write_report
from benchmarks.synthetic import Draws, Shape, as_batch, padded, row_per_sample, zipf_share
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded
from trainer.config.toml import Settings, load_settings
from trainer.data.reader import Cursor, Step
from trainer.data.rows import UserRows
from trainer.model.retrieve.score import MlpScorer
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config
from trainer.update.step import make_optimizer

Kind = Literal[
    "plain", "published", "plain attention", "rows", "bare, 1", "ours, 1", "bare, blocks", "ours, blocks"
]
NAMES: Mapping[Kind, str] = {
    "plain": "plain PyTorch, rows, dense Adam",
    "published": "the same, all L looked up, 2 losses",
    "plain attention": "bare TorchRec, rows, [q;k;q-k;qk]",
    "rows": "bare TorchRec, rows",
    "bare, 1": "bare TorchRec, 1 request a block",
    "ours, 1": "ours, 1 request a block",
    "bare, blocks": "bare TorchRec, blocks",
    "ours, blocks": "ours, blocks",
}
_DARE: tuple[Kind, ...] = ("rows", "bare, 1", "ours, 1", "bare, blocks", "ours, blocks")
_DIN: tuple[Kind, ...] = ("plain attention", *_DARE)
# Over and under the line of each ratio, where both were measured.
_RATIOS: tuple[tuple[str, Kind, Kind], ...] = (
    ("ours_to_plain", "ours, blocks", "plain"),
    ("ours_to_published_form", "ours, blocks", "published"),
    ("ours_to_plain_attention", "ours, blocks", "plain attention"),
    ("ours_to_bare", "ours, blocks", "bare, blocks"),
    ("ours_to_bare_1", "ours, 1", "bare, 1"),
    ("ours_to_rows", "ours, blocks", "rows"),
    ("blocks_to_1", "ours, blocks", "ours, 1"),
)


class Cell(Settings):
    """One point of the grid.

    Attributes:
        model: `dare` of configs/dare.toml without age, `din` of configs/din.toml.
        items, length, dim: rows of the item table, L, width of each table.
        users: of a step, with 19 requests of 3 candidates each.
        kinds: what is measured.
    """

    model: Literal["dare", "din"] = "dare"
    items: PositiveInt
    length: PositiveInt
    dim: PositiveInt = 16
    users: PositiveInt = 36
    kinds: tuple[Kind, ...] = _DARE

    @property
    def name(self) -> str:
        return f"{self.model}, {self.items:,} items, L {self.length:,}, dim {self.dim}"

    @property
    def shape(self) -> Shape:
        # Taobao's 9,408 categories for 4.07 million items, and as many items a category elsewhere.
        return Shape(self.items, max(self.items // 432, 8), self.length, self.users)


_GRID = (
    Cell(items=50_000, length=200, kinds=("plain", "published", *_DARE)),
    Cell(items=4_068_790, length=200, kinds=("plain", "published", *_DARE)),
    Cell(items=4_068_790, length=1_000, users=9),
    Cell(items=4_068_790, length=10_000, users=4, kinds=("rows", "bare, blocks", "ours, blocks")),
    Cell(items=50_000, length=200, dim=64, kinds=("plain", "rows", "bare, blocks", "ours, blocks")),
    Cell(items=50_000, length=200, dim=128, kinds=("plain", "rows", "bare, blocks", "ours, blocks")),
    Cell(model="din", items=1_000_000, length=200, users=18, kinds=_DIN),
    Cell(model="din", items=1_000_000, length=1_000, users=4, kinds=_DIN),
)


class StepBench(Settings):
    """What is measured.

    Attributes:
        seed: of ids, labels and first weights; cells: the grid.
        steps: of one measurement, each over a batch of its own; slow_steps: of those on per-sample rows.
        slow_repeats: most measurements of plain PyTorch, whose steps take seconds.
    """

    seed: int = Field(7, ge=0)
    cells: tuple[Cell, ...] = _GRID
    steps: PositiveInt = 4
    slow_steps: PositiveInt = 1
    slow_repeats: PositiveInt = 3


@one_thread()
def bench_grid(overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Samples per processor second of every kind of every cell, kinds interleaved within a cell.

    On one rank and one thread, over batches in memory. A ratio is the median of the rounds' ratios.
    """
    quiet_third_parties()
    settings = load_settings(StepBench, None, overrides)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    facts: dict[str, Any] = {"settings": settings.model_dump(mode="json"), "repeats": repeats}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for cell in settings.cells:
            measured, found = _measure(_Cell(cell, settings, ranks, Path(folder)), settings, repeats)
            rows += measured
            for name, (middle, low, high) in found.items():
                ratios[f"{cell.name}: {name}"] = middle
                facts |= {f"{cell.name}: {name}_min": low, f"{cell.name}: {name}_max": high}
            _print(cell, measured, found)
    print("\n".join(provenance(settings.seed, repeats)))
    if report is not None:
        write_report(report, rows, ratios, facts)


def config_of(cell: Cell) -> Config:
    """The trainer's config of a cell."""
    roles = ("attention_target", "attention_behavior", "representation_target", "representation_behavior")
    served = {role: "shared" if cell.model == "din" else role.split("_")[0] for role in roles}
    model: dict[str, Any] = {"age": False, "roles": served}
    if cell.model == "din":
        model |= {"search": "all", "score": "mlp", "score_hidden": 36, "position": False}
        model |= {"target_aware": False}
    group = {"dim": cell.dim, "learning_rate": 0.2}
    return Config.model_validate(
        {
            "data": {"history_length": cell.length},
            "model": model,
            "groups": {name: group for name in sorted(set(served.values()))},
            "train": {"learning_rate": 0.003, "warmup_steps": 100},
        }
    )


class _Cell:
    """The loops of one cell over the same samples, and the models they train.

    Loops over TorchRec share one model; its values do not change what a step costs.
    """

    def __init__(self, cell: Cell, settings: StepBench, ranks: Ranks, folder: Path) -> None:
        self.cell, self._ranks, self._folder = cell, ranks, folder
        self._config, self._manifest = config_of(cell), cell.shape.manifest()
        draws = Draws(cell.shape, settings.seed)
        users = [draws.step() for _ in range(max(settings.steps, settings.slow_steps))]
        self._users = {"few": users[: settings.slow_steps], "many": users[: settings.steps]}
        self.model = build_sharded(self._config, self._manifest, ranks).model
        self._optimizer = make_optimizer(self.model, self._config.train)
        self._scorer: Any = self.model.module.branches["main"].scorer
        self._steps = {
            "rows": self._batches("few", 1, apart=True),
            "1": self._batches("many", 1),
            "blocks": self._batches("many", cell.shape.requests),
        }

    def kinds(self) -> dict[Kind, tuple[Callable[[], Seconds], int]]:
        """-> how each kind is measured, and the samples that takes."""
        bare = {name: partial(self._bare, steps) for name, steps in self._steps.items()}
        ours = {name: partial(self._ours, steps) for name, steps in self._steps.items()}
        few, many = (self.cell.shape.samples * len(self._users[name]) for name in ("few", "many"))
        found: dict[Kind, tuple[Callable[[], Seconds], int]] = {}
        if "plain" in self.cell.kinds:
            found["plain"] = self._plain(published=False), few
        if "published" in self.cell.kinds:
            found["published"] = self._plain(published=True), few
        found["plain attention"] = self._plain_attention, few
        found |= {"rows": (bare["rows"], few), "bare, 1": (bare["1"], many), "ours, 1": (ours["1"], many)}
        found |= {"bare, blocks": (bare["blocks"], many), "ours, blocks": (ours["blocks"], many)}
        return {kind: found[kind] for kind in self.cell.kinds}

    def facts(self) -> dict[str, float]:
        """Behaviors looked up for a sample, and different items among all that are looked up, by layout."""
        samples = self.cell.shape.samples
        found = {}
        for layout, steps in self._steps.items():
            found[f"behaviors a sample, {layout}"] = steps[0].batch.behaviors / samples
            found[f"different items, {layout}"] = zipf_share([step.batch for step in steps])
        return found

    def _batches(self, users: str, requests: int, apart: bool = False) -> list[Step]:
        chosen = [row_per_sample(rows) if apart else rows for rows in self._users[users]]
        data = self._config.data
        return [Step(as_batch(rows, self._manifest, data, requests), True, Cursor()) for rows in chosen]

    def _bare(self, steps: Sequence[Step]) -> Seconds:
        return bare_loop(self.model, self._optimizer, steps, self._ranks)

    def _ours(self, steps: Sequence[Step]) -> Seconds:
        return trainer_loop(self._config, self.model, steps, self._ranks, self._folder)

    def _plain_attention(self) -> Seconds:
        branch = self.model.module.branches["main"]
        assert isinstance(self._scorer, MlpScorer)
        branch.scorer = PlainMlpScorer(self._scorer)
        try:
            return self._bare(self._steps["rows"])
        finally:
            branch.scorer = self._scorer

    def _plain(self, published: bool) -> Callable[[], Seconds]:
        rows = {name: info.rows for name, info in self._manifest.features.items()}
        model = PlainDare(rows, self.cell.dim, self.cell.length, self._config.model.k, published=published)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = [_plain_batch(rows, self.cell.length) for rows in self._users["few"]]

        def work() -> None:
            for history, target, labels in batches:
                optimizer.zero_grad()
                plain_loss(model(history, target), labels).backward()
                optimizer.step()

        return partial(timed, work)


def _plain_batch(rows: UserRows, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    history, target = padded(rows, length)
    return torch.from_numpy(history), torch.from_numpy(target), torch.from_numpy(rows.labels)


def _measure(
    loops: _Cell, settings: StepBench, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[float, float, float]]]:
    """-> rows of the table, and each ratio's median, lowest and highest. The first round warms up."""
    kinds, facts = loops.kinds(), loops.facts()
    slow = {"plain", "published"}
    rounds: list[dict[Kind, Seconds]] = []
    for number in range(repeats + 1):
        due = [kind for kind in kinds if kind not in slow or number <= settings.slow_repeats]
        rounds.append({kind: kinds[kind][0]() for kind in due})
    rows = []
    for kind, (_, samples) in kinds.items():
        rates = sorted(samples / found[kind].cpu for found in rounds[1:] if kind in found)
        rows.append(
            {
                "cell": loops.cell.name,
                "name": NAMES[kind],
                "n": len(rates),
                "samples_a_step": loops.cell.shape.samples,
                "samples_per_cpu_s": statistics.median(rates),
                "min": rates[0],
                "max": rates[-1],
                "cpu_ms_a_step": 1e3 * loops.cell.shape.samples / statistics.median(rates),
                **{name: value for name, value in facts.items() if name.endswith(_layout(kind))},
            }
        )
    ratios = {}
    for name, over, under in _RATIOS:
        both = [found for found in rounds[1:] if over in found and under in found]
        each = [found[under].cpu / found[over].cpu * kinds[over][1] / kinds[under][1] for found in both]
        if each:
            ratios[name] = statistics.median(each), min(each), max(each)
    return rows, ratios


def _layout(kind: Kind) -> str:
    """The name of the batches that a kind works on, as in `_Cell.facts`."""
    return kind.rsplit(", ", 1)[-1] if ", " in kind else "rows"


def _print(
    cell: Cell, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, tuple[float, float, float]]
) -> None:
    head = [cell.name, "n", "samples/CPU s", "min-max", "CPU ms/step", "behaviors/sample"]
    cells = [
        [
            row["name"],
            str(row["n"]),
            f"{row['samples_per_cpu_s']:,.0f}",
            f"{row['min']:,.0f}-{row['max']:,.0f}",
            f"{row['cpu_ms_a_step']:,.1f}",
            f"{next(value for key, value in row.items() if key.startswith('behaviors')):.1f}",
        ]
        for row in rows
    ]
    print("\n".join(table_lines(head, cells)))
    for name, (middle, low, high) in ratios.items():
        print(f"{name}: {middle:.2f} ({low:.2f}-{high:.2f})")
    print(flush=True)
