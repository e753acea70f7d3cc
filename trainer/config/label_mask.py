"""Masks of tasks: small expressions over the labels of a log, such as `click == 1 and not watch < 0.5`.

A mask compares labels with numbers, and joins comparisons by `and`, `or`, `not` and parentheses. It is parsed
as Python and nothing of it is ever run as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import hint_of

Truth = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
# How Python's tree calls a comparison -> how it is computed.
_COMPARISONS: dict[type[ast.cmpop], Callable[[Floats, np.float32], Truth]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# The same comparison with its sides exchanged.
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_JOINS: dict[type[ast.boolop], Callable[[Truth, Truth], Truth]] = {
    ast.And: np.logical_and,
    ast.Or: np.logical_or,
}
_FORM = "compare labels with numbers by ==, !=, <, <=, >, >= and join comparisons by and, or, not"
_LONGEST = 1000


class MaskError(ValueError):
    """A text that is no mask. `column` counts its characters from 1; 0 means the whole text."""

    def __init__(self, problem: str, column: int = 0) -> None:
        super().__init__(f"{problem} (at character {column} of the mask)" if column else problem)


@dataclass(frozen=True)
class _Comparison:
    label: str
    compare: Callable[[Floats, np.float32], Truth]
    number: np.float32

    def of(self, labels: Mapping[str, Floats]) -> Truth:
        return self.compare(labels[self.label], self.number)


@dataclass(frozen=True)
class _Not:
    part: _Node

    def of(self, labels: Mapping[str, Floats]) -> Truth:
        return ~self.part.of(labels)


@dataclass(frozen=True)
class _Joined:
    join: Callable[[Truth, Truth], Truth]
    parts: tuple[_Node, ...]

    def of(self, labels: Mapping[str, Floats]) -> Truth:
        found, *others = (part.of(labels) for part in self.parts)
        for other in others:
            found = self.join(found, other)
        return found


_Node = _Comparison | _Not | _Joined


@dataclass(frozen=True)
class LabelMask:
    """A compiled mask.

    Attributes:
        text: as it was given.
        labels: that it names, each once; places: where the text first names them, in characters from 1.
    """

    text: str
    labels: tuple[str, ...]
    places: tuple[int, ...]
    root: _Node

    @staticmethod
    def parse(text: str) -> LabelMask:
        """Compile a mask; which labels there are is not looked at, see `unknown`.

        Raises:
            MaskError: it is no such expression.
        """
        if len(text) > _LONGEST:
            raise MaskError(f"is longer than {_LONGEST:,} characters")
        # Of one line, which Python takes without a word about indents.
        line = "".join(" " if letter.isspace() else letter for letter in text)
        if "#" in line:
            raise MaskError("has no comments", line.index("#") + 1)
        try:
            tree = ast.parse(line.lstrip(), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise _mistake(line, error) from None
        compiler = _Compiler(line)
        root = compiler.node(tree.body)
        return LabelMask(text, tuple(compiler.places), tuple(compiler.places.values()), root)

    def unknown(self, known: Sequence[str]) -> str:
        """What is wrong with the names of its labels; empty if a log with the labels `known` has all."""
        for label, column in zip(self.labels, self.places, strict=True):
            if label not in known:
                hint = hint_of(label, known, f"it has {', '.join(known)}")
                return f"the log has no label {label!r} (at character {column} of the mask); {hint}"
        return ""

    def true(self, labels: Mapping[str, Floats]) -> Truth:
        """Where it is true: [n]. It is not where one of its labels is NaN, whatever the others are.

        Numbers are compared in float32, as labels are kept: a label that was given as 0.3 equals 0.3.

        Args:
            labels: the label's name -> float32 [n]; a label that is not there was never observed.
        """
        observed = [~np.isnan(labels[label]) for label in self.labels if label in labels]
        if len(observed) < len(self.labels):
            sizes = [values.shape for values in labels.values()]
            return np.zeros(sizes[0] if sizes else 0, dtype=bool)
        true: Truth = np.logical_and.reduce([self.root.of(labels), *observed])
        return true


class _Compiler:
    """From Python's tree of a mask to its nodes.

    Attributes:
        places: labels so far, and where they are first named, in characters from 1.
    """

    def __init__(self, line: str) -> None:
        self.parsed = line.lstrip()
        self.before = len(line) - len(self.parsed)
        self.places: dict[str, int] = {}

    def node(self, tree: ast.expr) -> _Node:
        if isinstance(tree, ast.BoolOp):
            return _Joined(_JOINS[type(tree.op)], tuple(self.node(part) for part in tree.values))
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not):
            return _Not(self.node(tree.operand))
        if isinstance(tree, ast.Compare):
            return self._comparison(tree)
        if isinstance(tree, ast.Name):
            name = self._source(tree)
            raise self._error(tree, f"{name} alone is no comparison; write {name} == 1")
        raise self._error(tree, f"{self._source(tree)} does not belong in a mask; {_FORM}")

    def _comparison(self, tree: ast.Compare) -> _Node:
        """`a < 1` or `0 < a < 1`: each two neighbours are a label and a number."""
        parts: list[_Node] = []
        sides = [tree.left, *tree.comparators]
        for left, kind, right in zip(sides, tree.ops, sides[1:], strict=False):
            if type(kind) not in _COMPARISONS:
                raise self._error(tree, f"{self._source(tree)} is none of the comparisons; {_FORM}")
            if isinstance(left, ast.Name) and isinstance(right, ast.Name):
                problem = f"{self._source(tree)} compares two labels; each comparison has one, and a number"
                raise self._error(tree, problem)
            turned = isinstance(right, ast.Name)
            name, number = (right, left) if turned else (left, right)
            if not isinstance(name, ast.Name):
                raise self._error(tree, f"{self._source(tree)} names no label; {_FORM}")
            operation = _MIRRORED.get(type(kind), type(kind)) if turned else type(kind)
            value = self._number(number, name.id)
            self.places.setdefault(name.id, self._column(name))
            parts.append(_Comparison(name.id, _COMPARISONS[operation], value))
        return parts[0] if len(parts) == 1 else _Joined(np.logical_and, tuple(parts))

    def _number(self, tree: ast.expr, label: str) -> np.float32:
        sign = 1
        value: object = getattr(tree, "value", None)
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
            sign, value = -1, getattr(tree.operand, "value", None)
        if type(value) not in (int, float):
            problem = f"{label} is compared with {self._source(tree)}, which is no number; {_FORM}"
            raise self._error(tree, problem)
        number = sign * float(str(value)) if isinstance(value, int | float) else 0.0
        if not 0 <= number <= 1:
            problem = f"{label} is compared with {self._source(tree)}, and a label is 0 to 1"
            raise self._error(tree, problem)
        return np.float32(number)

    def _source(self, tree: ast.expr) -> str:
        """The words of a part of the mask, at most 40 characters of them."""
        words = " ".join((ast.get_source_segment(self.parsed, tree) or "this").split())
        return words if len(words) <= 40 else f"{words[:40]} ..."

    def _column(self, tree: ast.expr) -> int:
        """Where a part begins in the text, in characters from 1; Python counts bytes from 0."""
        return self.before + len(self.parsed.encode()[: tree.col_offset].decode()) + 1

    def _error(self, tree: ast.expr, problem: str) -> MaskError:
        return MaskError(problem, self._column(tree))


def _mistake(line: str, error: Exception) -> MaskError:
    """What is wrong with a text that Python cannot parse."""
    if not line.strip():
        return MaskError("is blank; leave it out, or make it empty")
    without = line
    for pair in ("==", "!=", "<=", ">="):
        without = without.replace(pair, "  ")
    if "=" in without:
        return MaskError("= is no comparison; write ==", without.index("=") + 1)
    if not isinstance(error, SyntaxError):
        return MaskError(f"is no expression; {_FORM}")
    # Where something is missing, the place is the end, or none.
    at = (error.offset or len(line)) + len(line) - len(line.lstrip())
    return MaskError(f"is no expression: {error.msg}; {_FORM}", min(at, len(line)))
