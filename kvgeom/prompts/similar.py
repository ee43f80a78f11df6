"""Requests in similar wording, which a statistic over requests may count only once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


#: Requests are of one cluster if their similarity is at least this on average. In docs/prompts.md: why.
SIMILAR = 0.6
#: Words that hold sentences together. Of many requests TF-IDF finds out that they say little; of few it cannot.
FUNCTION_WORDS = frozenset(
    _words(
        "a about all also an and any are as at be been but by can could do does for from had has have her his how "
        "i if in into is it its me might my of on or our s should so some t than that the their them then there "
        "these they this those to us was we were what when where which who why will with would you your"
    )
)
#: Words in which one asks for an answer, of whatever: a tutorial on how to build something is a guide to building it.
ASKING_WORDS = frozenset(
    _words(
        "advice compose create demonstrate describe design detail detailed details develop draft explain "
        "explanation generate give guidance guide illustrate instruct instruction instructions list manual offer "
        "outline produce provide publish show step steps suggest teach tell tips tutorial way ways write"
    )
)
#: So many requests at a time are compared with all others.
ROWS = 512


def clusters(requests: Sequence[str]) -> tuple[int, ...]:
    """Which requests are worded alike: the number of the cluster of each, in the order of their first requests.

    Requests that differ in case, spaces or punctuation are one. All others are compared by cosine similarity of
    TF-IDF-weighted character n-grams (three to five, within words), function words and words of asking left out, and
    joined by average linkage down to a mean similarity of :data:`SIMILAR`. Weights are those of the requests given. Their
    order changes nothing but the numbers.

    Parameters
    ----------
    requests : sequence of str
        Of one kind: a harmful request and its harmless twin are worded alike, and are not the same.

    Examples
    --------
    >>> clusters(["How do I pick a lock?", "Write a guide to cooking rice", "Explain how to pick a lock!"])
    (0, 1, 0)
    """
    forms = [_form(request) for request in requests]
    distinct = sorted({*forms})
    joined = dict(zip(distinct, _joined(distinct), strict=True))
    found = [joined[form] for form in forms]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(found))}
    return tuple(numbers[label] for label in found)


def _form(request: str) -> str:
    """A request without case, spaces and punctuation; as it is if nothing is left."""
    return " ".join(_words(request)) or request


def _content(form: str) -> str:
    """What a request is about; all of it if it says nothing else."""
    left = [word for word in form.split() if word not in FUNCTION_WORDS | ASKING_WORDS]
    return " ".join(left) or form


def _joined(forms: Sequence[str]) -> list[int]:
    """Labels of clusters of different requests."""
    if len(forms) < 2:
        return [0] * len(forms)
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    weigh = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, lowercase=False)
    vectors = weigh.fit_transform([_content(form) for form in forms])
    # Average linkage joins nothing that no chain of similar pairs joins: each component is clustered by itself, so that
    # only the largest one decides what memory is needed.
    _, component = connected_components(_similar_pairs(vectors), directed=False)
    labels = np.zeros(len(forms), dtype=int)
    for number in np.unique(component):
        members = np.flatnonzero(component == number)
        labels[members] = labels.max() + _average_linkage(vectors[members])
    return [int(label) for label in labels]


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


def _average_linkage(vectors: Any) -> NDArray[np.int64]:
    """Labels from 1 on."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if vectors.shape[0] == 1:
        return np.ones(1, dtype=np.int64)
    distances = np.clip(1 - (vectors @ vectors.T).toarray(), 0, None)
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average")
    labels: NDArray[np.int64] = fcluster(tree, 1 - SIMILAR, "distance")
    return labels
