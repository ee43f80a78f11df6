"""The server that a plan of kvgeom fix asks for."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import replace
from pathlib import Path

from kvgeom.engines.runner import from_any_folder
from kvgeom.engines.spec import ServerSpec
from kvgeom.engines.transformers import is_plan_file
from kvgeom.errors import InputError, KvgeomWarning


def is_plan(given: object) -> bool:
    """Whether a candidate is a plan, or a file or folder that holds one."""
    if not isinstance(given, str | Path):
        return hasattr(given, "chosen")
    return is_plan_file(str(given))


def planned(given: object, baseline: ServerSpec | None) -> ServerSpec:
    """The baseline's server with the cache of a plan, as nearly as its engine has it; how it differs is a warning.

    Raises
    ------
    InputError
        If the baseline is no server that kvgeom starts, or its engine cannot be started with what the plan asks for.
    """
    from kvgeom.mitigation.plan import Plan  # imports torch, which takes seconds

    if baseline is not None and baseline.runner.plan_option and isinstance(given, str | Path):
        return replace(baseline, cache={**baseline.cache, baseline.runner.plan_option: from_any_folder(str(given))})
    plan = given if isinstance(given, Plan) else Plan.load(str(given))
    if baseline is None:
        raise InputError(
            "a plan is gated on a server that kvgeom starts; give the baseline as an engine and a model (vllm:MODEL)"
        )
    engine, runner = baseline.engine, baseline.runner
    if engine.export is None:
        raise InputError(f"{engine.name} cannot be configured by a plan; give the candidate itself")
    export = engine.export(plan.chosen.recipe, plan.chosen.placement, plan.geometry)
    cache, words = {name: values[0] for name, values in runner.caches.items()}, shlex.split(export.text)
    for flag in [word for word in words if word.startswith("-")]:
        value = words[words.index(flag) + 1]
        name = runner.flags.get(flag)
        if name is None:
            raise InputError(
                f"the plan needs {export.text!r} of {engine.title}, and kvgeom does not start it with {flag}; start it yourself and give its URL"
            )
        if name:
            cache[name] = value
    if export.cannot:
        warnings.warn(
            f"{engine.title} comes nearest to the plan, and differs: {'; '.join(export.cannot)}",
            KvgeomWarning,
            stacklevel=3,
        )
    return replace(baseline, cache=cache)
