"""A small model that refuses some requests, as tables of the paper see it, and the released protocol in plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvgeom.evaluation.config import RunConfig
from kvgeom.models.hf import HFModel
from kvgeom.paper.study import Study, suites_of
from tests.builders.judges import ArbitraryJudge
from tests.builders.released import ReleasedQwen2, Round
from tests.builders.requests import REQUESTS
from tests.builders.tiny import tiny_tokenizer, wide_model

TOKENS = 9
#: Of which the arbitrary judge finds some refused.
ASKED = [f"{request} {n}" for request in REQUESTS[:6] for n in (1, 2)]
#: As many that nobody has to refuse.
HARMLESS = [f"{request} please" for request in ASKED]
WIDE = wide_model()
RUN = RunConfig(judge=ArbitraryJudge(), max_new_tokens=TOKENS, progress=False)


def study(folder: Path | None = None, name: str | None = None, asked: list[str] | None = None) -> Study:
    """Of both suites alike."""
    model = WIDE if name is None else HFModel(WIDE.hf_model, tiny_tokenizer(), name=name)
    return Study(model, replace(RUN), suites_of({"harmful": asked or ASKED, "harmless": HARMLESS}, None), folder)


def straight_line(study: Study, rounding: Mapping[tuple[int, str], Round]) -> tuple[np.ndarray, float]:
    """Which refused prompts flip, and the KV MSE, of the released protocol in plain arithmetic."""
    base = study.base()
    plain = ReleasedQwen2(
        {name: weight.detach() for name, weight in WIDE.hf_model.named_parameters()}, WIDE.hf_model.config
    )
    labels, errors = [], []
    for begin in range(0, len(base.prompts), 4):
        ids = [prompt.ids for prompt in base.prompts[begin : begin + 4]]
        responses, _, found = plain.batch(ids, rounding, TOKENS, WIDE.stop_tokens, pad=0, filler=2)
        labels += [base.judged(begin + row, tokens)[1] for row, tokens in enumerate(responses)]
        errors += found
    flips = np.array([labels[index] != "refused" for index in base.refused])
    return flips, float(np.mean(errors)) if errors else 0.0
