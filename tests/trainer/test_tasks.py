"""What the section [tasks] means: which tasks there are, and where their masks are true."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.errors import ConfigError
from tests.helpers.launching import ROOT
from trainer.config.label_mask import LabelMask, MaskError
from trainer.config.tasks import TaskConfig, labels_of, named_tasks, names_of, resolve_tasks
from trainer.objectives.of_tasks import trained_tasks
from trainer.run_config import load_config

LABELS = ("click", "buy", "watch")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# float32 has none of these but the first and the last.
NUMBERS = ("0", "0.1", "0.3", "0.5", "0.7", "1.0")


class Reference:
    """A mask as text, and what it means for one candidate."""

    def __init__(self, text: str, labels: set[str], of: Callable[[dict[str, float]], bool]) -> None:
        self.text, self.labels, self.of = text, labels, of

    def true(self, candidate: dict[str, float | None]) -> bool:
        known = {name: value for name, value in candidate.items() if value is not None}
        return self.labels <= known.keys() and self.of(known)


def comparison(label: str, sign: str, number: str, turned: bool) -> Reference:
    value, compare = np.float32(number), COMPARE[sign]
    if turned:
        return Reference(f"{number} {sign} {label}", {label}, lambda c: bool(compare(value, c[label])))
    return Reference(f"{label} {sign} {number}", {label}, lambda c: bool(compare(c[label], value)))


def between(label: str, low: str, high: str) -> Reference:
    first, last = np.float32(low), np.float32(high)
    return Reference(f"{low} <= {label} < {high}", {label}, lambda c: bool(first <= c[label] < last))


def negated(part: Reference) -> Reference:
    return Reference(f"not ({part.text})", part.labels, lambda c: not part.of(c))


def joined(parts: list[Reference], word: str) -> Reference:
    every = all if word == "and" else any
    text = f" {word} ".join(f"({part.text})" for part in parts)
    return Reference(text, set().union(*(p.labels for p in parts)), lambda c: every(p.of(c) for p in parts))


def masks() -> st.SearchStrategy[Reference]:
    label, number = st.sampled_from(LABELS), st.sampled_from(NUMBERS)
    leaf = st.one_of(
        st.builds(comparison, label, st.sampled_from(list(COMPARE)), number, st.booleans()),
        st.builds(between, label, number, number),
    )
    return st.recursive(
        leaf,
        lambda parts: st.one_of(
            st.builds(negated, parts),
            st.builds(joined, st.lists(parts, min_size=2, max_size=3), st.sampled_from(["and", "or"])),
        ),
        max_leaves=6,
    )


CANDIDATE = st.fixed_dictionaries(
    {name: st.sampled_from([None, *(float(np.float32(number)) for number in NUMBERS)]) for name in LABELS}
)


@given(mask=masks(), candidates=st.lists(CANDIDATE, max_size=20))
def test_a_mask_is_what_its_words_say_of_each_candidate(
    mask: Reference, candidates: list[dict[str, float | None]]
) -> None:
    compiled = LabelMask.parse(mask.text)
    columns = {
        name: np.array([np.nan if c[name] is None else c[name] for c in candidates], dtype=np.float32)
        for name in LABELS
    }
    assert set(compiled.labels) == mask.labels
    for label, place in zip(compiled.labels, compiled.places, strict=True):
        assert mask.text[place - 1 :].startswith(label)
    assert compiled.true(columns).tolist() == [mask.true(candidate) for candidate in candidates]
    # A label that the log lacks was never observed.
    lacking = {name: values for name, values in columns.items() if name != compiled.labels[0]}
    assert compiled.true(lacking).tolist() == [False] * len(candidates)


def test_and_binds_before_or_and_not_before_both() -> None:
    mask = LabelMask.parse("not click == 1 and buy == 1\n or watch == 1")
    values = [[click, buy, watch] for click in (0, 1) for buy in (0, 1) for watch in (0, 1)]
    columns = dict(zip(LABELS, np.array(values, dtype=np.float32).T, strict=True))
    wanted = [(not click and buy) or watch for click, buy, watch in values]
    assert mask.true(columns).tolist() == [bool(value) for value in wanted]


@pytest.mark.parametrize(
    ("text", "problem", "place"),
    [
        ("click = 1", "= is no comparison; write ==", 7),
        ("click", "click alone is no comparison; write click == 1", 1),
        ("buy == 1 and not click", "click alone is no comparison", 18),
        ("click == buy", "click == buy compares two labels", 1),
        ("1 < 0", "1 < 0 names no label", 1),
        ("click == 2", "click is compared with 2, and a label is 0 to 1", 10),
        ("  click == -1", "click is compared with -1, and a label is 0 to 1", 12),
        ("click == True", "click is compared with True, which is no number", 10),
        ("click == 'a'", "click is compared with 'a', which is no number", 10),
        ("click is 1", "click is 1 is none of the comparisons", 1),
        ("click in (0, 1)", "is none of the comparisons", 1),
        ("click == 1 & buy == 1", "click is compared with 1 & buy, which is no number", 10),
        ("click + buy == 1", "click + buy == 1 names no label", 1),
        ("open('x') == 1", "open('x') == 1 names no label", 1),
        ("(lambda: 1)", "lambda: 1 does not belong in a mask", 2),
        ("é == 1 and (x == 3)", "x is compared with 3", 18),
        ("click == 1) or (buy == 1", "unmatched ')'", 11),
        ("click == 1 and", "is no expression", 14),
        ("click == 1 # or more", "has no comments", 12),
        ("   ", "is blank", 0),
        ("not " * 251, "is longer than 1,000 characters", 0),
        ("(" * 900, "is no expression", 1),
    ],
)
def test_what_is_no_mask_is_refused_with_its_place(text: str, problem: str, place: int) -> None:
    with pytest.raises(MaskError) as caught:
        LabelMask.parse(text)
    message = str(caught.value)
    assert problem in message
    if not text.startswith("(("):
        assert message.endswith(f"(at character {place} of the mask)") == bool(place)


def tasks_of(*words: str) -> dict[str, TaskConfig]:
    return load_config(ROOT / "configs/dare.toml", words).tasks


def test_a_config_names_the_task_of_a_bad_mask() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.buy\.mask: = is no comparison; write == \(at character 7"):
        tasks_of("tasks.buy.mask=click = 1")


def test_a_product_has_each_factor_once() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.both: product names a task twice: click, click"):
        tasks_of('tasks.both.product=["click", "click"]')


FACTORS = ["tasks.click.weight=1", "tasks.buy.weight=1", "tasks.both.label=watch"]
BOTH = 'tasks.both.product=["click", "{}"]'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tasks.buy.mask=watch == 1 or clik == 1"],
            r"tasks\.buy\.mask = .*no label 'clik' \(at character 15 of the mask\); did you mean 'click'\?",
        ),
        (["tasks.buy.mask=x == 1"], r"tasks\.buy\.mask = .*no label 'x'.*it has click, buy, watch"),
        (["tasks.click.weight=1", "tasks.bought.label=byu"], r"tasks\.bought\.label = 'byu'.*'buy'"),
        (["tasks.clik.weight=1"], r"tasks\.clik: the log has no such label; did you mean 'click'"),
        (
            ["tasks.sold.weight=1"],
            r"tasks\.sold: the log has no such label; set tasks\.sold\.label to the one that the "
            "task predicts; it has click, buy, watch",
        ),
        (
            ["tasks.sold.label=buy", "tasks.watch.mask=sold == 1"],
            r"tasks\.watch\.mask = 'sold == 1': sold is a task, and a mask compares labels of "
            "the log: write buy",
        ),
        ([*FACTORS, 'tasks.watch.product=["click", "watch"]'], "'watch', which is the task itself; name"),
        (
            [*FACTORS, 'tasks.watch.product=["click", "buy"]', BOTH.format("watch")],
            r"tasks\.both\.product names 'watch', which is a product itself; name its factors .*: click, buy",
        ),
        (
            ["tasks.click.weight=1", BOTH.format("buy"), "tasks.both.label=watch"],
            r"tasks\.both\.product names 'buy', which is a label of the log and no task; .*\[tasks\.buy\]",
        ),
        ([*FACTORS, BOTH.format("by")], r"names 'by', which is no task; did you mean 'buy'\?"),
        ([*FACTORS, BOTH.format("other")], "names 'other', which is no task; it may name click, buy"),
    ],
)
def test_labels_that_the_log_lacks_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tasks(tasks_of(*words), LABELS)


def test_tasks_say_which_labels_they_need() -> None:
    configs = tasks_of(
        "tasks.bought.label=buy", "tasks.bought.mask=click == 1 and buy <= 1", "tasks.click.weight=2"
    )
    tasks = resolve_tasks(configs, LABELS)
    assert [task.labels for task in tasks] == [("buy", "click"), ("click",)]
    assert labels_of(configs, ["ignored"]) == ["buy", "click"]
    # Where only the names are known, as in a snapshot.
    assert named_tasks(configs, names_of(tasks)) == tasks
    assert named_tasks({}, ["a", "b"]) == resolve_tasks({}, ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss": "none", "weight": 2.0}, "so weight would have no effect"),
        ({"loss": "none", "mean": "step", "gamma": 2.0}, "so gamma and mean would have no effect"),
        ({"bce_weight": 0.7}, "bce_weight belong to a ranking loss, which the task has not"),
        ({"product": ["a", "b"], "pairs": "request"}, "pairs belong to a ranking loss"),
    ],
)
def test_what_a_task_would_not_look_at_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        TaskConfig.model_validate(settings)


def test_a_config_that_was_written_whole_is_read_again() -> None:
    for settings in ({"loss": "none"}, {}, {"rank": "pair", "bce_weight": 0.5}):
        task = TaskConfig.model_validate(settings)
        for without_none in (False, True):
            tree = task.model_dump(mode="json", exclude_none=without_none)
            assert TaskConfig.model_validate(tree) == task
            # A version before had fewer keys.
            del tree["gamma" if "gamma" in tree else "mask"]
            assert TaskConfig.model_validate(tree) == task


def test_a_product_without_its_label_is_told_the_labels_of_all_candidates() -> None:
    product = TaskConfig(product=("click", "buy"))
    configs = {"click": TaskConfig(), "buy": TaskConfig(), "buys": product}
    with pytest.raises(ConfigError) as caught:
        resolve_tasks(configs, ["click", "buy", "ctcvr"], ["buy"])
    assert str(caught.value) == (
        "tasks.buys: the log has no such label; set tasks.buys.label to one that is known where a factor did "
        "not happen, too; all candidates have click, ctcvr"
    )


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"a": {"loss": "none"}, "b": {}},
            r'tasks\.a\.loss = "none": nothing trains the task; give it a loss',
        ),
        (
            {"a": {"loss": "none"}, "b": {}, "p": {"product": ["a", "b"], "weight": 0}},
            r'tasks\.a\.loss = "none": only a product trains the task, and tasks\.p\.weight = 0; give',
        ),
        (
            {"a": {}, "b": {}, "p": {"product": ["a", "b"], "loss": "none"}},
            r'tasks\.p\.loss = "none": a product trains others by its own loss alone; leave loss out, or set',
        ),
    ],
)
def test_a_task_that_nothing_trains_names_the_culprit(given: dict[str, Any], problem: str) -> None:
    configs = {name: TaskConfig.model_validate(settings) for name, settings in given.items()}
    with pytest.raises(ConfigError, match=problem):
        trained_tasks(resolve_tasks(configs, list(configs)), "bce", 0)
