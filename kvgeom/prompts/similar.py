"""Requests in similar wording, which a statistic over requests may count only once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from kvgeom.prompts.template import unwrapped
from kvgeom.prompts.wording import content, grams, opposites, units, words

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Requests are of one cluster if their similarity is at least this on average. In docs/prompts.md: why.
SIMILAR = 0.6
#: Of two requests that are alike, one has at least this share of its words, by their rarity, in common with the other.
IN_COMMON = 0.7
#: Words are one if they begin alike, up to this many letters of the longer and one of the shorter.
_ENDINGS = (4, 1)
#: Farther apart than any mean over a cluster forgives.
_OPPOSITE = 1e9
#: So many requests at a time are compared with all others.
ROWS = 512


def clusters(requests: Sequence[str]) -> tuple[int, ...]:
    """Which requests are worded alike: the number of the cluster of each, in the order of their first requests.

    Requests that differ in case, spaces, punctuation or the composition of letters are one. All others are compared by
    what they are about: without the template that they are wrapped in (:mod:`kvgeom.prompts.template`), function words
    and words of asking. Their similarity is the cosine of TF-IDF-weighted character n-grams, if they also share
    :data:`IN_COMMON` of the words of one of them; else it is that share, where it is less. They are joined by average
    linkage down to a mean similarity of :data:`SIMILAR`, but never if one says the opposite of the other
    (:func:`~kvgeom.prompts.wording.opposites`). Weights are those of the requests given. Their order changes nothing
    but the numbers.

    Parameters
    ----------
    requests : sequence of str
        Of one kind: a harmful request and its harmless twin are worded alike, and are not the same.

    Examples
    --------
    >>> clusters(["How do I pick a lock?", "Write a guide to cooking rice", "Explain how to pick a lock!"])
    (0, 1, 0)
    """
    return _clusters(tuple(requests))


@lru_cache(maxsize=16)  # the same few sets are asked about again and again
def _clusters(requests: tuple[str, ...]) -> tuple[int, ...]:
    forms = [_form(request) for request in requests]
    distinct = sorted({*forms})
    joined = dict(zip(distinct, _joined(distinct), strict=True))
    found = [joined[form] for form in forms]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(found))}
    return tuple(numbers[label] for label in found)


def _form(request: str) -> str:
    """A request without case, spaces and punctuation; if nothing is left, without spaces at its ends."""
    return " ".join(words(request)) or " ".join(request.split())


def _joined(forms: Sequence[str]) -> list[int]:
    """Labels of clusters of different requests."""
    if len(forms) < 2:
        return [0] * len(forms)
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    asked = unwrapped(forms)
    contents = [content(each) for each in asked]
    vectors = TfidfVectorizer(analyzer=grams, sublinear_tf=True).fit_transform(contents)
    told = [frozenset(units(each) or [each]) for each in contents]
    rarity = _rarity(told)
    # Average linkage joins nothing that no chain of similar pairs joins: each component is clustered by itself, so that
    # only the largest one decides what memory is needed.
    _, component = connected_components(_similar_pairs(vectors), directed=False)
    labels = np.zeros(len(forms), dtype=int)
    for number in np.unique(component):
        members = np.flatnonzero(component == number)
        found = (vectors[members] @ vectors[members].T).toarray()
        common = _in_common([told[index] for index in members], rarity)
        least = np.where(common < IN_COMMON, SIMILAR * common / IN_COMMON, 1)
        apart = np.clip(1 - np.minimum(found, least), 0, None)
        apart[opposites([asked[index] for index in members])] = _OPPOSITE
        labels[members] = labels.max() + _average_linkage(apart)
    return [int(label) for label in labels]


def _rarity(told: Sequence[frozenset[str]]) -> dict[str, float]:
    """How much each word tells: inverse document frequency, as scikit-learn smooths it."""
    found: dict[str, int] = {}
    for each in told:
        for word in each:
            found[word] = found.get(word, 0) + 1
    return {word: float(np.log((1 + len(told)) / (1 + n)) + 1) for word, n in found.items()}


def _in_common(told: Sequence[frozenset[str]], rarity: dict[str, float]) -> NDArray[np.float64]:
    """The share of the words of either request that the other has too, whichever is larger, ``[requests, requests]``.

    So a request that adds something to another has all in common with it, and one that says something else instead has
    not.
    """
    vocabulary = sorted({word for each in told for word in each})
    has = np.array([[word in each for word in vocabulary] for each in told], dtype=float)
    alike = np.array([[_one_word(one, other) for other in vocabulary] for one in vocabulary], dtype=float)
    weighed = has * np.array([rarity[word] for word in vocabulary])
    shares: NDArray[np.float64] = weighed @ (has @ alike > 0).T / weighed.sum(1, keepdims=True)
    return np.maximum(shares, shares.T)


def _one_word(one: str, other: str) -> bool:
    """Whether two words differ in their endings only."""
    if one == other:
        return True
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    short, long = sorted((len(one), len(other)))
    return same >= 3 and same >= long - _ENDINGS[0] and same >= short - _ENDINGS[1]


def _similar_pairs(vectors: Any) -> Any:
    """Sparse matrix of the pairs that are similar enough, by blocks of rows."""
    from scipy.sparse import vstack

    blocks = []
    for start in range(0, vectors.shape[0], ROWS):
        block = vectors[start : start + ROWS] @ vectors.T
        block.data[block.data < SIMILAR - 1e-9] = 0
        block.eliminate_zeros()
        blocks.append(block)
    return vstack(blocks)


def _average_linkage(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Labels from 1 on."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(distances) == 1:
        return np.ones(1, dtype=np.int64)
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average")
    labels: NDArray[np.int64] = fcluster(tree, 1 - SIMILAR, "distance")
    return labels
