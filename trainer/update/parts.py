"""Parts of a model by the words of a phase: `tables`, `groups.<name>`, `dense`, `head.towers.*.layers`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from embeddings.errors import ConfigError, hint_of
from trainer.config.phases import DENSE, GROUP, TABLES


@dataclass(frozen=True)
class Parts:
    """Some of a model.

    Attributes:
        groups: names of table groups; dense: names of weights that are no table's.
    """

    groups: frozenset[str] = frozenset()
    dense: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.groups or self.dense)

    def __sub__(self, others: Parts) -> Parts:
        return Parts(self.groups - others.groups, self.dense - others.dense)

    def __or__(self, others: Parts) -> Parts:
        return Parts(self.groups | others.groups, self.dense | others.dense)

    @staticmethod
    def of(words: Sequence[str], whole: Parts, where: str) -> Parts:
        """What the words name.

        Args:
            whole: everything that the model has; where: the key that they are given to.

        Raises:
            ConfigError: a word names nothing.
        """
        found = Parts()
        for word in words:
            found |= _of_word(word, whole, where)
        return found


def _of_word(word: str, whole: Parts, where: str) -> Parts:
    if word == TABLES:
        return Parts(groups=whole.groups)
    if word == DENSE:
        return Parts(dense=whole.dense)
    if word.startswith(GROUP) and word.removeprefix(GROUP) in whole.groups:
        return Parts(groups=frozenset({word.removeprefix(GROUP)}))
    # A star stands for one name between dots: the same weights of every task, say.
    pattern = re.compile(re.escape(word).replace(r"\*", "[^.]+") + r"(\..+)?")
    dense = frozenset(name for name in whole.dense if pattern.fullmatch(name))
    if not dense:
        raise ConfigError(f"{where} names {word!r}, which is no part of the model; {_known(word, whole)}")
    return Parts(dense=dense)


def _known(word: str, whole: Parts) -> str:
    words = [TABLES, *(f"{GROUP}{name}" for name in sorted(whole.groups)), DENSE, *_prefixes(whole.dense)]
    return hint_of(word, words, f"parts are {', '.join(words)}")


def _prefixes(names: Collection[str]) -> list[str]:
    """The names of modules up to two levels deep that hold these weights."""
    found: dict[str, None] = {}
    for name in sorted(names):
        modules = name.split(".")[:-1]
        for depth in range(1, min(2, len(modules)) + 1):
            found[".".join(modules[:depth])] = None
    return list(found)
