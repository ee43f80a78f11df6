"""Where a model runs, and in which number format: checked before any weights are read."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from kvgeom.errors import InputError, brief, unknown

if TYPE_CHECKING:
    import torch

#: Number formats that a model can run in.
_USUAL = ("auto", "bfloat16", "float16", "float32", "float64")


def best_device() -> str:
    """An accelerator if there is one, else ``"cpu"``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_and_dtype(
    device: str | torch.device | None, dtype: torch.dtype | str | None
) -> tuple[str, torch.dtype | str]:
    """The device and the number format of a model, once what is wrong with them has been reported.

    Parameters
    ----------
    device : str or torch.device, optional
        :func:`best_device` by default.
    dtype : torch.dtype or str, optional
        By default float32 on a CPU and ``"auto"``, the checkpoint's own, elsewhere.

    Raises
    ------
    InputError
        If this machine does not have the device, or the number format is no floating-point type.
    """
    import torch

    if device is not None and not isinstance(device, str | torch.device):
        raise InputError(
            f"device must be text or a torch.device, got {brief(device)}; give 'cpu', or none for {best_device()!r}"
        )
    device = best_device() if device is None else str(device)
    if not _usable(device):
        known = _devices()
        close = get_close_matches(device, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of these, or none for {best_device()!r}"
        raise InputError(
            f"device {brief(device)} cannot be used: PyTorch finds {', '.join(known)} on this machine; {hint}"
        )
    if dtype is None:
        return device, torch.float32 if device == "cpu" else "auto"
    if not isinstance(dtype, str | torch.dtype) or dtype not in (
        *_USUAL,
        *(getattr(torch, name) for name in _USUAL[1:]),
    ):
        raise unknown("floating-point dtype", dtype, _USUAL)
    return device, dtype


def _usable(device: str) -> bool:
    import torch

    try:
        found = torch.empty(0, device=device).device
        return found.type != "meta" and torch.device(device).index in (None, found.index)  # "cpu:3" is taken for "cpu"
    except Exception:  # of many kinds: each device that is not there has its own
        return False


def _devices() -> list[str]:
    """What this machine has."""
    import torch

    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    return [*(f"{kind}:{index}" for index in range(torch.accelerator.device_count())), "cpu"]
