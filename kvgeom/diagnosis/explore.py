"""A diagnosis to point at, with its model to ask where it is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from kvgeom.checks import whole
from kvgeom.evaluation.baseline import Baseline
from kvgeom.evaluation.condition import as_conditions
from kvgeom.evaluation.evaluate import run_conditions
from kvgeom.explorer.payload import answer_of, payload
from kvgeom.progress import shown

if TYPE_CHECKING:
    from kvgeom.diagnosis.diagnose import Diagnosis
    from kvgeom.explorer.widget import Explorer


def explore(diagnosis: Diagnosis) -> Explorer:
    """The explorer of a diagnosis; see :meth:`kvgeom.diagnosis.diagnose.Diagnosis.explore`."""
    from kvgeom.explorer.widget import Explorer

    base = diagnosis.base
    content = payload(diagnosis.parts().values())
    return Explorer(content, None if base is None else lambda prompt, scheme: asked(base, prompt, scheme))


def asked(base: Baseline, prompt: Any, scheme: Any) -> Mapping[str, Any]:
    """What the model answers to one prompt under a cache by its spelling.

    Raises
    ------
    InputError
        For a prompt that was not asked, or a scheme that cannot be used.
    """
    index = whole("prompt", prompt, 0, len(base.prompts) - 1)
    conditions = as_conditions({"asked": scheme}, base.model, None)
    base.journal.reopen()
    with closing(base.journal), shown(False):
        found = run_conditions(base, conditions, prompts=(index,), title="asked")
    return answer_of(found.data.sel(recipe="asked", prompt=index))
