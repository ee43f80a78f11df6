"""Models on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from kvgeom.errors import InputError, brief


def check_hub(
    name: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_only: bool = False,
) -> None:
    """Ask the local cache, then the hub, once whether a model is there; transformers would go on trying for a minute.

    Raises
    ------
    InputError
        If it is not, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError as error:
        raise InputError(
            f"{brief(name)} is no folder here, and no hub id (owner/name, of letters, digits, - _ and .); check the name"
        ) from error
    if isinstance(cached, str):
        return
    if local_only:
        raise InputError(
            f"{name} is no folder here and not in the local cache; load it once with local_files_only=False"
        )
    try:
        HfApi(token=token).model_info(name, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise InputError(f"model {name} has no revision {revision} on the hub; give another") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is no folder here and no model on the hub; check the name or, if it is private, run: hf auth login"
        ) from error
    except Exception as error:  # of whichever HTTP library the installed hub client uses
        raise InputError(
            f"{name} is no folder here, and the hub cannot be reached ({error or type(error).__name__}); check the path or "
            "the network"
        ) from error
