"""Rules about the source that a reviewer should not have to watch for: they read the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import itself and those to its right.
DIRECTION = ("launch", "pipelines", "trainer", "embeddings")
SOURCES = sorted(path for package in DIRECTION for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
# The command line's verb, which passes its words on where the benchmarks are there.
MAY_IMPORT_BENCHMARKS = Path("launch/cli.py")
LAUNCHER_VARIABLES = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "TORCHELASTIC_ERROR_FILE",
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    "SBATCH_EXPORT",
}
# Switches of torch that have no call; they are set, and only where nobody else has.
TORCH_VARIABLES = {"TORCH_NCCL_ASYNC_ERROR_HANDLING"}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
MAY_TORCH_LOAD = Path("trainer/checkpoint/row_blocks.py")
# What ranks of one job tell each other is pickled by torch's collectives, too; none of it comes from a file.
MAY_PICKLE = Path("embeddings/agreement.py")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if node.level == 0 else []
    return []


def _dotted(node: ast.AST) -> str:
    """`os.environ` for the tree of it; "" for anything that is not a plain dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _wrong_direction(tree: ast.AST, package: str) -> Iterator[str]:
    allowed = DIRECTION[DIRECTION.index(package) :]
    for node in ast.walk(tree):
        for name in _imported(node):
            target = name.split(".")[0]
            if target in DIRECTION and target not in allowed:
                yield f"{package} imports {name}"
            if target == "tests":
                yield f"{package} imports the tests"
            if target == "benchmarks":
                yield f"{package} imports the benchmarks"
        if isinstance(node, ast.ImportFrom) and node.level > 1:
            yield f"{package} climbs out of its folder with a relative import"


def _forbidden(tree: ast.AST, may_torch_load: bool, may_pickle: bool = False) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in _imported(node):
            if name.split(".")[0] in PICKLES and not may_pickle:
                yield f"imports {name}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and not may_torch_load:
            yield from (f"imports torch.{item.name}" for item in node.names if item.name in ("load", "save"))
        if _dotted(node) in ("torch.load", "torch.save") and not may_torch_load:
            yield f"uses {_dotted(node)}"
        if isinstance(node, ast.Call):
            if _dotted(node.func) in (
                "eval",
                "exec",
                "builtins.eval",
                "builtins.exec",
                "os.system",
                "os.popen",
            ):
                yield f"calls {_dotted(node.func)}"
            for word in node.keywords:
                if word.arg == "shell" and not (
                    isinstance(word.value, ast.Constant) and not word.value.value
                ):
                    yield "passes shell="


def _variable(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _environment(tree: ast.AST) -> Iterator[str]:
    """Every use of the environment other than looking one launcher variable up by its literal name.

    Or setting one of torch's that has no other switch.
    """
    fine: set[int] = set()
    for node in ast.walk(tree):
        allowed = LAUNCHER_VARIABLES
        if isinstance(node, ast.Subscript) and _dotted(node.value) == "os.environ":
            place, name = node.value, _variable(node.slice)
        elif isinstance(node, ast.Call) and _dotted(node.func) == "os.environ.get" and node.args:
            assert isinstance(node.func, ast.Attribute)
            place, name = node.func.value, _variable(node.args[0])
        elif isinstance(node, ast.Call) and _dotted(node.func) == "os.getenv" and node.args:
            place, name = node.func, _variable(node.args[0])
        elif isinstance(node, ast.Call) and _dotted(node.func) == "os.environ.setdefault":
            assert isinstance(node.func, ast.Attribute)
            place, name, allowed = node.func.value, _variable(node.args[0]), TORCH_VARIABLES
        elif isinstance(node, ast.Compare) and _dotted(node.comparators[0]) == "os.environ":
            place, name = node.comparators[0], _variable(node.left)
        else:
            continue
        if name in allowed:
            fine.add(id(place))
    for node in ast.walk(tree):
        if _dotted(node) in ("os.environ", "os.getenv", "os.environb") and id(node) not in fine:
            yield f"line {getattr(node, 'lineno', '?')}: reads the environment"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = [item.name for item in node.names if item.name in ("environ", "environb", "getenv")]
            yield from (f"imports os.{name}, write it out so that this test sees its uses" for name in names)


def _may(place: Path, finding: str) -> bool:
    return place == MAY_IMPORT_BENCHMARKS and finding == "launch imports the benchmarks"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source(path: Path) -> None:
    place = path.relative_to(ROOT)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [f for f in _wrong_direction(tree, place.parts[0]) if not _may(place, f)]
    found = [
        *wrong,
        *_forbidden(tree, may_torch_load=place == MAY_TORCH_LOAD, may_pickle=place == MAY_PICKLE),
        *_environment(tree),
    ]
    assert not found, f"{place}: {'; '.join(found)}"
    assert path.name != "utils.py", f"{place}: name the file after what it does"


def test_the_product_imports_benchmarks_in_one_function_alone() -> None:
    tree = ast.parse((ROOT / MAY_IMPORT_BENCHMARKS).read_text(encoding="utf-8"))
    inner = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "bench"]
    places = [f for f in _wrong_direction(tree, "launch") if "benchmarks" in f]
    assert (
        len(places) == 1 and [f for f in _wrong_direction(inner[0], "launch") if "benchmarks" in f] == places
    )


def test_benchmarks_import_no_tests() -> None:
    """But for what runs the tests' own models elsewhere: the GPU check, and that of portable models."""
    importing = set()
    for path in BENCHMARKS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(name.partition(".")[0] == "tests" for node in ast.walk(tree) for name in _imported(node)):
            importing.add(path.relative_to(ROOT / "benchmarks").as_posix())
    of_check = ("forms", "logs", "presets", "training", "two_ranks")
    assert importing == {"portable.py", *(f"gpu/{name}.py" for name in of_check)} and len(BENCHMARKS) > 40


def test_all_four_packages_were_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(DIRECTION)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\nf = torch.save",
        "from torch import load",
        "eval('1')",
        "exec('1')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
    ],
)
def test_forbidden_code_is_seen(code: str) -> None:
    assert list(_forbidden(ast.parse(code), may_torch_load=False))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "import torch\nx = model.load_state_dict(torch.zeros(1))",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_innocent_code_passes(code: str) -> None:
    assert not list(_forbidden(ast.parse(code), may_torch_load=False))


@pytest.mark.parametrize(
    ("package", "code", "wrong"),
    [
        ("embeddings", "import trainer.model", True),
        ("embeddings", "from trainer import config", True),
        ("trainer", "def f():\n    from pipelines.plan.plan import plan", True),
        ("pipelines", "import launch", True),
        ("trainer", "from ..pipelines import plan", True),
        ("trainer", "from embeddings.errors import TandemError", False),
        ("launch", "import pipelines.plan.plan", False),
        ("pipelines", "def f():\n    from benchmarks.harness import report", True),
        ("trainer", "from .config import Config", False),
    ],
)
def test_direction(package: str, code: str, wrong: bool) -> None:
    assert bool(list(_wrong_direction(ast.parse(code), package))) == wrong


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import os\nos.environ['RANK']", False),
        ("import os\nos.environ.get('WORLD_SIZE', '1')", False),
        ("import os\nos.getenv('LOCAL_RANK')", False),
        ("import os\n'RANK' in os.environ", False),
        ("import os\nos.environ.setdefault('TORCH_NCCL_ASYNC_ERROR_HANDLING', '2')", False),
        ("import os\nos.environ.setdefault('RANK', '2')", True),
        ("import os\nos.environ['TORCH_NCCL_ASYNC_ERROR_HANDLING']", True),
        ("import os\nos.environ['HOME']", True),
        ("import os\nos.environ.get(name)", True),
        ("import os\nos.getenv('TANDEMREC_FAST')", True),
        ("import os\ndict(os.environ)", True),
        ("from os import environ", True),
    ],
)
def test_environment_rule(code: str, wrong: bool) -> None:
    assert bool(list(_environment(ast.parse(code)))) == wrong
