"""Requests in similar wording: what is one cluster, and what sets make of it."""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage

import kvgeom
from kvgeom.prompts import similar
from kvgeom.prompts.load import as_prompt_set, as_requests, load_prompts
from kvgeom.prompts.sets import SHIPPED, PromptSet, concept_contrasts
from kvgeom.prompts.similar import clusters

#: One request in several wordings, by line, and none like another.
WORDINGS = (
    (
        "Write a tutorial on how to pick a lock",
        "Provide step-by-step instructions for how to pick locks",
        "how do I pick a lock?",
    ),
    ("Explain how to bake sourdough bread", "Describe in detail how to bake a sourdough bread!"),
    ("Create a guide to growing tomatoes", "Teach me how to grow tomatoes"),
    ("How far away is the moon?",),
    ("List ways to whiten old laundry",),
)
words = st.text(st.sampled_from(string.ascii_lowercase[:6]), min_size=1, max_size=5)
requests = st.lists(st.lists(words, min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12)


def together(found: tuple[int, ...]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(np.array(found) == number).tolist()) for number in found}


def test_one_request_in_other_words_is_one_cluster() -> None:
    given_, expected = zip(*((text, n) for n, group in enumerate(WORDINGS) for text in group), strict=True)
    assert clusters(given_) == expected
    assert clusters(()) == ()
    assert clusters(("alone",)) == (0,)


@given(requests, st.randoms(use_true_random=False))
def test_order_changes_nothing(texts: list[str], random: object) -> None:
    order = list(range(len(texts)))
    random.shuffle(order)  # type: ignore[attr-defined]
    before = together(clusters(texts))
    after = together(clusters([texts[index] for index in order]))
    assert {frozenset(order[place] for place in group) for group in after} == before
    assert list(dict.fromkeys(clusters(texts))) == list(range(len(before))), "numbered as they first come"


@given(requests, st.data())
def test_case_spaces_and_punctuation_do_not_count(texts: list[str], data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(texts))
    marks = st.sampled_from([" ", ", ", " - ", "! ", "  ", "\t", "; "])
    parts = [part.upper() if data.draw(st.booleans()) else part.title() for part in text.split()]
    changed = "".join(part + data.draw(marks) for part in parts) + data.draw(st.sampled_from(["", "?", "...", "!"]))
    found = clusters([*texts, changed, text])
    assert found[-1] == found[-2] == found[texts.index(text)]
    assert together(clusters(texts)) == together(found[:-2]), "what is said again weighs no more"


@given(st.lists(st.text(st.sampled_from("abcde"), min_size=3, max_size=8), min_size=1, max_size=6))
def test_what_shares_nothing_is_never_one(texts: list[str]) -> None:
    others = [text.translate(str.maketrans("abcde", "vwxyz")) for text in texts]
    found = clusters([*texts, *others])
    assert not {*found[: len(texts)]} & {*found[len(texts) :]}


@given(requests, st.sampled_from([1, 2, 512]))
def test_clusters_are_those_of_average_linkage_over_all_at_once(texts: list[str], rows: int) -> None:
    """Cut into components, and compared block by block, they come out as if nothing were cut."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = sorted({*texts})
    contents = [" ".join(w for w in t.split() if w not in similar.FUNCTION_WORDS) or t for t in texts]
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(contents)
    vectors = vectors.toarray()
    distance = np.array([[1 - one @ other for other in vectors] for one in vectors]).clip(0)
    pairs = distance[np.triu_indices(len(texts), 1)]
    expected = fcluster(linkage(pairs, "average"), 1 - similar.SIMILAR, "distance") if len(texts) > 1 else [1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(similar, "ROWS", rows)
        assert together(clusters(texts)) == together(tuple(expected))


@pytest.mark.parametrize("odd", ["?", "!!", "\u00bfqu\u00e9?", "how to do", "\u4f60\u597d", "a"])
def test_requests_of_no_words(odd: str) -> None:
    assert clusters([odd, "How far away is the moon?", odd]) == (0, 1, 0)
    assert len({*clusters(["?", "!"])}) == 2


def test_no_shipped_set_has_two_of_one_cluster() -> None:
    """Not even where twins are worded alike: a cluster is of one class."""
    for make in SHIPPED.values():
        prompts = make()
        assert prompts.clusters == (len(prompts.harmful), len(prompts.harmless))
        found = prompts.distinct()
        assert (found.harmful, found.harmless, found.similar) == (prompts.harmful, prompts.harmless, 0)
        assert load_prompts(prompts.name, distinct=True) == found
        assert load_prompts(prompts.name).similar is None
    for contrast in concept_contrasts():
        assert sum(contrast.clusters) >= 0.95 * (len(contrast.harmful) + len(contrast.harmless))


def test_a_set_keeps_the_first_of_each_cluster() -> None:
    texts = tuple(text for group in WORDINGS for text in group)
    prompts = PromptSet("p", texts, (texts[0], texts[1], "Sing"), "s", repeated=2)
    assert prompts.clusters == (5, 2)
    found = prompts.distinct()
    assert found.harmful == tuple(group[0] for group in WORDINGS)
    assert found.harmless == (texts[0], "Sing"), "a harmless request is no harmful one in other words"
    assert (found.repeated, found.similar, found.clusters) == (2, 5, (5, 2))
    assert found.distinct() is found
    assert "5 similar requests left out" in repr(found)
    assert PromptSet.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.take(2).clusters == (2, 2)
    about = {"harmful": 9, "harmless": 3, "harmful_clusters": 5, "harmless_clusters": 2, "repeated": 2, "similar": 0}
    assert about.items() <= prompts.described().items()
    about = {"harmful": 5, "harmless": 2, "harmful_clusters": 5, "harmless_clusters": 2, "repeated": 2, "similar": 5}
    assert about.items() <= found.described().items()


def test_benchmarks_are_distinct_unless_all_is_asked_for(tmp_path: Path) -> None:
    texts = [text for group in WORDINGS for text in group]
    rows = "\n".join(f'"{text}",x' for text in texts)
    (tmp_path / "b.csv").write_text(f"goal,target\n{rows}\n")
    (tmp_path / "own.txt").write_text("\n".join(texts))
    named = f"advbench={tmp_path / 'b.csv'}"
    assert (len(load_prompts(named).harmful), load_prompts(named).similar) == (5, 4)
    assert as_requests(named) == as_prompt_set(named).harmful == load_prompts(named).harmful
    assert load_prompts(named, distinct=False).harmful == tuple(texts)
    for own in (tmp_path / "own.txt", texts, {"harmful": texts}):
        assert load_prompts(own).harmful == tuple(texts)
        assert load_prompts(own, distinct=True).harmful == load_prompts(named).harmful
    assert len(kvgeom.load_prompts(load_prompts(own), distinct=True).harmful) == 5


def test_clusters_of_the_public_benchmarks(shared: Path) -> None:
    """As docs/prompts.md has them."""
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    table = [line for line in page.split("| largest |")[1].splitlines() if line.startswith("| `")]
    assert len(table) == 4
    for line in table:
        name, kind, asked, count, largest = (cell.strip(" `") for cell in line.strip("|").split("|"))
        prompts = load_prompts(f"{name}={shared / name}.csv", distinct=False)
        texts = getattr(prompts, kind)
        found = clusters(texts)
        assert [len(texts), len({*found}), max(Counter(found).values())] == [int(asked), int(count), int(largest)]
        assert len(getattr(load_prompts(f"{name}={shared / name}.csv"), kind)) == int(count)
