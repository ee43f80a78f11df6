"""What prompts begin with, read once: everything is as if each had been read whole."""

from __future__ import annotations

import pytest
import torch

from kvgeom.models.reading import read, read_prefix
from tests.builders.tiny import KINDS, tiny_model

REQUESTS = ["open the door", "count to nine, please, and use more words than a sliding window has room for"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["cache", "projection"])
def test_nothing_changes_but_the_last_digit(kind: str, where: str) -> None:
    model = tiny_model(kind)
    prompts = model.encode(REQUESTS)
    prefix = read_prefix(model, prompts, where)  # type: ignore[arg-type]
    assert prefix is not None
    assert prefix.ids == tuple(prompts[0].ids[: len(prefix.ids)]) == tuple(prompts[1].ids[: len(prefix.ids)])
    assert len(prefix.ids) == prompts[0].instruction.start
    for prompt in (*prompts, prompts[0]):  # what is kept is not written to
        whole = read(model, prompt, where, resid=True)  # type: ignore[arg-type]
        rest = read(model, prompt, where, resid=True, after=prefix)  # type: ignore[arg-type]
        for a, b in zip(whole, rest, strict=True):
            for x, y in ((a.k, b.k), (a.v, b.v), (a.resid, b.resid), (a.unrotated(), b.unrotated())):
                torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_prompts_that_begin_with_nothing_in_common_have_no_prefix() -> None:
    model = tiny_model()
    one, other = model.encode(["open the door", "count to nine"])
    moved = type(other)(**{**vars(other), "ids": tuple(reversed(other.ids))})
    assert read_prefix(model, [one, moved]) is None
