"""What the search keeps, against what behaviors tell about the response; and what the pooled vector knows."""

from __future__ import annotations

from collections.abc import Sequence

from embeddings.errors import CheckpointError
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Figure, Finding, Section, Table
from pipelines.analyze.runs import AnalysedRun
from pipelines.analyze.search_figures import ENOUGH, SEEDS, TRUTH, Case, Measured, figures_of, findings_of
from pipelines.analyze.table_ids import names_by_vocabulary
from trainer.analysis.search.discriminability import discriminability
from trainer.analysis.search.information import Truth, count_truths, read_impressions
from trainer.analysis.search.measure import measure_search
from trainer.analysis.search.ranking import REFERENCES
from trainer.analysis.search.relevance import LearnedRelevance, frequent
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader

# All pairs of categories are counted.
_MOST_CATEGORIES = 1000
# Candidates of the train split that are counted for each one that is ranked.
_COUNTED = 100


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """Measure what each run's search keeps; runs of one log and history length are compared."""
    cases: dict[Case, list[AnalysedRun]] = {}
    skipped = []
    for run in runs:
        feature, problem = _feature_of(run)
        if problem:
            skipped.append(f"{run.name}: {problem}.")
        else:
            data = run.config.data
            case = Case(str(data.log), data.history_length, feature, run.tasks[0].name)
            cases.setdefault(case, []).append(run)
    figures: list[Figure | Table] = []
    findings: list[Finding] = []
    for number, (case, same) in enumerate(cases.items(), 1):
        found, left_out = _measured(case, same, options)
        skipped += left_out
        end = "" if len(cases) == 1 else f"-{number}"
        if found.runs:
            figures += figures_of(case, found, end)
            findings += findings_of(found, f"search-quality{end}")
    return Section(
        "search", "What the search keeps", _INTRODUCTION, tuple(figures), tuple(findings), tuple(skipped)
    )


_INTRODUCTION = (
    "A behavior matters to a candidate as far as it tells about the response. How much it tells is counted "
    "on the train split: for the category of the candidate, the category of the behavior and its place in "
    "the window, the mutual information, in bits, of “a behavior of this category lies at this place” and "
    "the label. A search is good if it keeps the behaviors that tell most. This measure knows categories "
    "and places alone: a model that prefers the same item is not paid for it, so that the order of models "
    "says more than the values."
)


def _feature_of(run: AnalysedRun) -> tuple[str, str]:
    """The feature that classes behaviors and candidates, or else what is missing."""
    if run.config.data.search.levels:
        return (
            "",
            "behaviors are searched while they are read (data.search), so that the window is not all there",
        )
    fitting = {
        name: info.rows
        for name, info in run.manifest.features.items()
        if info.side == "both"
        and not info.multi
        and info.rows <= _MOST_CATEGORIES
        and info.encoder is None
        and not run.config.id_rules.get(name)
    }
    if not fitting:
        return "", (
            "its log has no feature with one id each for behaviors and candidates and at most "
            f"{_MOST_CATEGORIES:,} ids, by which behaviors could be classed; ingest a category"
        )
    return max(fitting, key=lambda name: fitting[name]), ""


def _measured(case: Case, runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> tuple[Measured, list[str]]:
    truth = _truth_of(case, runs[0], options)
    categories = frequent(truth)
    names = tuple(names_by_vocabulary(runs[0], case.feature, categories))
    found, skipped = Measured(truth, categories, names, {}, {}, {}, {}, {}), []
    for run in runs:
        seed = run.seed if options.seed is None else options.seed
        batches = [step.batch for step in run.reader(options.split, options.sample).steps()]
        if not batches:
            skipped.append(f"{run.name}: the sample of {options.split} holds no user; raise --sample.")
            continue
        try:
            partial = run.model(batches)
        except CheckpointError as error:
            skipped.append(f"{run.name}: {error}")
            continue
        one = measure_search(
            partial.model.module,
            ((batch, partial.renumbered(batch).to(run.ranks.device)) for batch in batches),
            {TRUTH: truth},
            case.feature,
            LearnedRelevance(categories, truth.bins),
            ENOUGH,
            beside=not found.beside,
            seed=seed,
        )
        found.runs.setdefault(run.label, []).append(one)
        found.seeds.setdefault(run.label, []).append(run.seed)
        found.steps.setdefault(run.label, []).append(run.step)
        if one.obstacle:
            skipped.append(
                f"{run.name}: has no NDCG, since its model {one.obstacle}; what it keeps is measured."
            )
        elif not one.candidates:
            skipped.append(
                f"{run.name}: no candidate of the sample has more than K behaviors and a category with "
                f"{ENOUGH:,} candidates in the train split; take a larger --sample."
            )
        elif not found.beside:
            found.beside = {name: one.tallies[TRUTH][name] for name in REFERENCES}
        clusters = discriminability(one.vectors, one.labels, range(seed, seed + SEEDS))
        if clusters is None:
            skipped.append(
                f"{run.name}: pooled vectors are not clustered: there are too few, or one label only."
            )
        else:
            found.clusters.setdefault(run.label, []).append(clusters)
    return found, skipped


def _truth_of(case: Case, run: AnalysedRun, options: AnalyzeOptions) -> Truth:
    data = DataConfig(log=run.config.data.log, history_length=case.length, order="stored", verify=False)
    limit, rows = options.sample * _COUNTED, run.manifest.features[case.feature].rows
    # Columns of other features are not even read.
    known = {case.feature: rows}
    reader = SequenceLogReader(data, "train", known, tasks=run.tasks, limit=limit, manifest=run.manifest)
    return count_truths(read_impressions(reader, case.feature, case.length, rows), rows, (TRUTH,))[TRUTH]
