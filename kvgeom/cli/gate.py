"""``kvgeom gate``."""

from __future__ import annotations

import argparse
import os

import kvgeom
from kvgeom.cli import options
from kvgeom.errors import InputError, brief

NAME = "gate"
HELP = "compare two live servers: does the candidate keep the refusals of the baseline?"
DESCRIPTION = (
    "Ask two servers the same, and decide. Exit status 0: pass, 1: fail, 3: too few refusals to tell, 2: input that cannot be "
    "used. With --out, every answer is kept: the same command goes on where it was interrupted."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    servers = (
        "a base URL (http://localhost:8000/v1), or an engine, a model and a cache to start (llamacpp:demo?k=f16&v=f16)"
    )
    command.add_argument("baseline", metavar="BASELINE", help=f"{servers}, or the folder of an earlier gate")
    command.add_argument("candidate", metavar="CANDIDATE", nargs="?", help="as BASELINE, or the folder of a kvgeom fix")
    command.add_argument(
        "--from", metavar="PLAN", dest="plan", help="in place of CANDIDATE: a plan.json, run on the engine of BASELINE"
    )
    command.add_argument("--out", metavar="DIR", help="folder for answers and reports")
    options.add_prompts(command)
    command.add_argument("--judge", metavar="NAME", help="what labels responses, e.g. wildguard (default: keyword)")
    _add_verdict(command)
    _add_setting(command)
    _add_servers(command)
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_verdict(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tolerance",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="net share of refusals that may be lost (default: %(default)s)",
    )
    command.add_argument(
        "--noise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the baseline twice, to know its noise (default: yes)",
    )
    command.add_argument("--text", metavar="FILE", help="plain text that both read (default: a short one)")


def _add_setting(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what each request stands in")
    group.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=24, help="longest response (default: %(default)s)"
    )
    group.add_argument(
        "--template",
        metavar="FILE",
        help="Jinja chat template that is applied here; prompts then go to /v1/completions (for base models)",
    )
    options.add_conversation(group)
    group.add_argument("--temperature", metavar="T", type=float, default=0.0, help="of sampling (default: greedy)")
    group.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="with a temperature: how often each request is asked"
    )


def _add_servers(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("servers")
    group.add_argument(
        "--served-model", metavar="NAME", help="what servers at a URL call the model, if they have several"
    )
    group.add_argument("--api-key-env", metavar="NAME", help="variable that holds the API key of servers at a URL")
    group.add_argument("--python", metavar="FILE", help="interpreter that has the engine, for servers that are started")
    group.add_argument(
        "--concurrency", metavar="N", type=int, default=4, help="requests at once (default: %(default)s)"
    )
    group.add_argument(
        "--timeout", metavar="S", type=int, default=120, help="seconds for one answer (default: %(default)s)"
    )
    group.add_argument(
        "--retries", metavar="N", type=int, default=4, help="times a request is sent again (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Gate, print the verdict and its tables, and return the status that says which it is."""
    from kvgeom.gating.config import ASKED
    from kvgeom.gating.plans import is_plan

    names = ("tolerance", "noise", *ASKED, "served_model", "python", "concurrency", "timeout", "retries", "judge")
    if (arguments.candidate is None) == (arguments.plan is None):
        raise InputError("give a CANDIDATE, or --from a plan, and not both")
    if arguments.plan is not None and not is_plan(arguments.plan):
        raise InputError(
            f"there is no plan at {brief(arguments.plan)}; give the plan.json, or the folder, of a kvgeom fix"
        )
    found = kvgeom.gate(
        arguments.baseline,
        arguments.candidate or arguments.plan,
        arguments.out,
        prompts=options.prompt_set(arguments.prompts, arguments),
        text=None if arguments.text is None else options.plain_text(arguments.text),
        api_key=_key(arguments.api_key_env),
        progress=not arguments.quiet,
        **{name: getattr(arguments, name) for name in names},
    )
    print(f"\n{found.to_text()}")
    if arguments.out is not None:
        print(f"\nreport: {options.out_folder(arguments) / 'report.html'}")
    return found.status


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    found = os.environ.get(name, "")
    if not found.strip():
        raise InputError(f"--api-key-env names {name!r}, which is not set; put the key into that variable")
    return found
