"""The command line of a benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from embeddings.errors import ConfigError
from pipelines.console import quiet_third_parties


class Options(argparse.ArgumentParser):
    """Options of one benchmark. All of them have --json and --page.

    Args:
        subject: its name; told: the docstring of its file, which `--help` shows.
        page: the Markdown page that is written where none is named; None: no page.
    """

    def __init__(self, subject: str, told: str | None, page: Path | None = None) -> None:
        super().__init__(
            f"tandemrec bench {subject}",
            description=told,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._needs_config = False
        self.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
        self.add_argument(
            *("--page", "--table"),
            default=page,
            type=Path,
            metavar="FILE.md",
            help="write them as Markdown too",
        )

    def measuring(self, *, config: bool | None = None, repeats: int = 5) -> Options:
        """Add --repeats, and --config and --set as other verbs have them.

        Args:
            config: whether a configuration is required; None: the benchmark takes none.
        """
        self.add_argument("--repeats", type=_positive, default=repeats, help="measurements of each row")
        if config is not None:
            self.add_argument("--config", type=Path, metavar="FILE", help="TOML configuration")
            self.overriding()
        self._needs_config = bool(config)
        return self

    def overriding(self, group: argparse._ArgumentGroup | None = None) -> None:
        """Add --set, to a group of options if there is one."""
        (group or self).add_argument(
            "--set",
            action="append",
            default=[],
            dest="overrides",
            metavar="KEY=VALUE",
            help="override one key of the configuration; repeatable",
        )

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of the options, with the command line itself as `command`; third parties fall silent.

        Raises:
            ConfigError: a word is not understood, or a configuration is missing.
        """
        given = self.parse_args(words)
        given.command = " ".join([self.prog, *words])
        quiet_third_parties()
        if self._needs_config and given.config is None:
            raise ConfigError("this benchmark measures with a configuration: give --config")
        return given

    def error(self, message: str) -> NoReturn:
        """Raise what the command line reports in one line."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return number


def own_command(subject: str) -> list[str]:
    """The words that start this benchmark again in a process of its own."""
    return [sys.executable, "-m", "benchmarks", subject]
