"""What requests are wrapped in: a passage before or after many of them, whatever it is that they ask."""

from __future__ import annotations

from collections.abc import Sequence

from kvgeom.prompts.wording import content, grams, joined, units, weight

#: A passage of so many words that say something is a template if so many different requests are wrapped in it: the
#: shorter it is, the more of them it takes, for requests about one thing begin and end alike too.
TEMPLATES = ((12, 2), (6, 3), (3, 8))
#: What is wrapped in it says so much, in words.
ASKED = 2


def unwrapped(forms: Sequence[str]) -> list[str]:
    """Requests without what they are wrapped in.

    What several requests begin with is a template if each goes on with a request of its own, most of which have little
    in common. What they end with is one likewise.

    Parameters
    ----------
    forms : sequence of str
        Different ones, of words joined by spaces.
    """
    ahead = _without_beginning([units(form) for form in forms])
    behind = _without_beginning([each[::-1] for each in ahead])
    return [joined(each[::-1]) for each in behind]


def _without_beginning(requests: list[list[str]], *, wrapped_twice: bool = True) -> list[list[str]]:
    """Requests, as units, without the template that they begin with; what they go on with may end in another one."""
    found = list(requests)
    order = sorted(range(len(requests)), key=lambda index: requests[index])
    groups = [(0, order)]  # of those that begin with so many units alike
    while groups:
        start, group = groups.pop()
        end = _alike(requests[group[0]], requests[group[-1]])
        rests = [requests[index][end:] for index in group]
        inside = _inside(requests[group[0]][:end], rests, wrapped_twice) if end > start else None
        if inside is not None:
            for index, rest in zip(group, inside, strict=True):
                found[index] = rest if weight(joined(rest)) else requests[index]
            continue
        going_on: dict[str, list[int]] = {}
        for index in group:
            if len(requests[index]) > end:
                going_on.setdefault(requests[index][end], []).append(index)
        groups += [(end, members) for members in going_on.values() if len(members) > 1]
    return found


def _alike(first: Sequence[str], last: Sequence[str]) -> int:
    """With how many units the first and the last of sorted requests begin alike, and so all between."""
    differ = (at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(first), len(last)))


def _inside(beginning: list[str], rests: list[list[str]], wrapped_twice: bool) -> list[list[str]] | None:
    """What is wrapped in a beginning, and in the ending that all have; None if these are no template."""
    backwards = sorted(rest[::-1] for rest in rests)
    tail = _alike(backwards[0], backwards[-1])
    said = weight(joined(beginning)) + weight(joined(backwards[0][:tail][::-1]))
    if not any(said >= long and len(rests) >= shared for long, shared in TEMPLATES):
        return None
    inside = [rest[: len(rest) - tail] for rest in rests]
    asked = inside
    if wrapped_twice:  # some of them may end in another template
        asked = [each[::-1] for each in _without_beginning([rest[::-1] for rest in inside], wrapped_twice=False)]
    texts = [joined(rest) for rest in asked]
    least = 1 if said >= TEMPLATES[0][0] else ASKED
    told = sorted(map(weight, texts))[len(texts) // 2] >= least
    return inside if told and 2 * _unlike(texts) > len(texts) else None


def _unlike(texts: Sequence[str]) -> int:
    """How many of them have little in common with any that came before."""
    seen: list[set[str]] = []
    for text in texts:
        found = {*grams(content(text))}
        if all(2 * len(found & other) < min(len(found), len(other)) for other in seen):
            seen.append(found)
    return len(seen)
