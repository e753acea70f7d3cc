"""How well the pooled vector tells positives from negatives (DARE, section 4.5).

The pooled vector h of each candidate, and nothing else of what the head is given, is put into one of so many
clusters by k-means. The mutual information of cluster and label says how much the clusters know. Clusters
of nothing but chance know something, too, the more of them there are: so the same is measured with labels
that are shuffled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from trainer.analysis.readings import pooled_of
from trainer.analysis.search.information import Floats, Ints
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.read.sequence import TargetPooling

CLUSTERS = (2, 5, 10, 20, 50, 100, 200)
# Candidates a cluster, at least: fewer say nothing of its labels.
_FEWEST = 20


@dataclass(frozen=True)
class Discriminability:
    """Of each number of clusters: over seeds [clusters, seeds].

    Attributes:
        clusters: how many; information: of cluster and label, nats; normalised: over the mean of both
            entropies, 0 to 1; by_chance: the same with shuffled labels.
    """

    clusters: tuple[int, ...]
    information: Floats
    normalised: Floats
    by_chance: Floats


@torch.no_grad()
def pooled_vectors(model: TwoStageModel, batch: RequestBatch) -> Floats:
    """The pooled vector h of each candidate as the head is given it, float32 [C, D].

    Those of branches and sets lie side by side. Sequence models that pool nothing into one vector are left
    out, so that D may be 0.

    Args:
        batch: with the ids that the model knows.
    """
    parts = []
    for reading in pooled_of(model, batch).of_branch.values():
        of_sets = reading.parts()
        for expert in reading.branch.experts:
            if isinstance(expert.sequence, TargetPooling):
                # [v_t ; h] or [v_t ; h ; v_t * h].
                parts.append(of_sets[expert.set][1].float().cpu().numpy())
    return np.concatenate(parts, axis=1) if parts else np.zeros((batch.candidates, 0), dtype=np.float32)


def discriminability(
    vectors: Floats, labels: Ints, seeds: Iterable[int], clusters: Iterable[int] = CLUSTERS
) -> Discriminability | None:
    """Measure vectors [n, D] against labels 0 and 1 [n]; None where there is only one label, or D is 0.

    Args:
        clusters: how many; numbers that would leave fewer than 20 vectors a cluster are left out.
    """
    few = tuple(each for each in clusters if each * _FEWEST <= len(labels))
    if len(np.unique(labels)) < 2 or not vectors.shape[1] or not few:
        return None
    seeds = list(seeds)
    found = np.array([[_measure(vectors, labels, count, seed) for seed in seeds] for count in few])
    return Discriminability(few, *(found[:, :, place] for place in range(3)))


def _measure(vectors: Floats, labels: Ints, clusters: int, seed: int) -> tuple[float, float, float]:
    means = MiniBatchKMeans(clusters, random_state=seed, n_init=1, batch_size=2048)
    cluster = means.fit_predict(vectors)
    shuffled = np.random.default_rng(seed).permutation(labels)
    return (
        float(mutual_info_score(labels, cluster)),
        float(normalized_mutual_info_score(labels, cluster)),
        float(normalized_mutual_info_score(shuffled, cluster)),
    )
