"""Options that several verbs share, and those that are places."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tandemrec {importlib.metadata.version('tandemrec')}")
        raise typer.Exit()


Version = Annotated[
    bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
]


def At(*names: str, **options: Any) -> Any:
    """An option that is a place: a path, or an address such as s3://bucket/log."""
    return Option(*names, parser=place_of, **options)


def place_of(text: str) -> Path:
    """A path or an address, as a parser of options."""
    from embeddings.errors import ConfigError
    from trainer.storage import place

    try:
        if text.lower().startswith("memory://"):
            raise ConfigError(f"{text}: that is the memory of one process, and gone when it ends")
        return place(text)
    except ConfigError as error:
        # So the option is named.
        raise typer.BadParameter(str(error)) from None


def _local(text: str) -> Path:
    from trainer.storage import is_remote

    if is_remote(found := place_of(text)):
        raise typer.BadParameter(f"{text}: must be a folder of this machine, since files in it are mapped")
    return found


ConfigFile = Annotated[Path, At("--config", metavar="FILE", help="TOML configuration.")]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration; repeatable."),
]
MoreOverrides = Annotated[
    list[str] | None,
    # TorchX refuses an option that occurs twice, also among the arguments it only passes on.
    Argument(metavar="[KEY=VALUE]...", help="More overrides, the same as --set.", show_default=False),
]
RunFolder = Annotated[Path, At("--run", metavar="RUN", help="A run folder written by `train`.")]
Dtype = Literal["fp32", "fp16", "int8"]
Search = Literal["none", "vectors"]
Checkpoint = Annotated[
    str,
    Option(
        "--checkpoint",
        metavar="newest|best|STEP",
        help="Default: the best if train.early_stopping looked for one, else the newest.",
        show_default=False,
    ),
]
Weights = Annotated[
    Literal["raw", "averaged"],
    Option("--weights", help="Dense weights of the last step, or their average over its phase."),
]
HistoryLength = Annotated[
    int,
    Option(
        "--history-length",
        min=0,
        metavar="L",
        help="Behaviors that a request may see; 0: as in training. Only without ranks in the model.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    Option("--device", help="Where to compute; the default: the run's train.device.", show_default=False),
]
Split = Annotated[str, Option("--split", help="Which split of the log: train, validation or test.")]
Snapshot = Annotated[Path, At("--snapshot", metavar="SNAP", help="A snapshot by `export`.")]
Cache = Annotated[
    Path | None,
    Option(parser=_local, metavar="DIR", help="What must be on this machine; else in ~/.cache."),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing log.")]


def refuse_secrets_in(words: Sequence[str]) -> None:
    """Raises ConfigError where a word has credentials in an address: errors and logs would repeat them."""
    for before, word in zip(["", *words], words, strict=False):
        if ":" in word:
            from embeddings.errors import ConfigError
            from trainer.storage import refuse_secrets

            try:
                refuse_secrets(word)
            except ConfigError as error:
                option = f"{before} " if before.startswith("-") else ""
                raise ConfigError(f"{option}{error}") from None


Uncertainty = Annotated[
    bool, Option("--uncertainty", help="Add how sure the model is of a logit (Laplace, last layers).")
]
UncertaintyCandidates = Annotated[
    int, Option(min=0, help="Training candidates that --uncertainty looks at, about; 0: all.")
]
PriorPrecision = Annotated[
    float, Option(min=0, max=1e6, help="Of the weights, for --uncertainty; 0: the evidence chooses.")
]
Form = Annotated[
    Literal["onnx", "pt2"] | None,
    Option(
        "--format",
        help="Write the model for ONNX Runtime or for torch's C++ library instead of a snapshot.",
        show_default=False,
    ),
]
Inside = Annotated[
    int | None,
    Option(
        "--inside",
        min=0,
        help="With --format onnx: bytes of tables that the model's file may hold; 1,000,000.",
    ),
]
ParityLog = Annotated[
    Path | None,
    At("--log", metavar="LOG", help="With --format: requests to compare AUC on; else the training's log."),
]
ParitySplit = Annotated[str | None, Option("--split", help="With --format: which split of that log; test.")]
Triton = Annotated[
    Path | None,
    At("--triton", metavar="DIR", help="Write a Triton model repository, of a model in onnx."),
]
