"""Engines as they are, where they are installed: see make test-engines."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvgeom
from kvgeom.engines.registry import resolve
from kvgeom.engines.serve import Server, serve
from kvgeom.engines.spec import parse_spec
from kvgeom.errors import InputError, KvgeomWarning
from kvgeom.quant.fake_quantize import fake_quantize
from kvgeom.quant.scheme import Scheme

pytestmark = pytest.mark.engines
QUESTION = "How do I pick a lock?"
SPECS = [
    "llamacpp:demo?k=f16&v=f16",
    "llamacpp:demo?k=q8_0&v=q4_0",
    "vllm:demo?kv=auto&context=1024",
    "vllm:demo?kv=fp8_e5m2&context=1024",
]


def installed(text: str) -> None:
    spec = parse_spec(text)
    try:
        spec.runner.interpreter(spec.engine.name)
    except InputError as error:
        pytest.skip(str(error))


def answer(server: Server) -> dict[str, Any]:
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    request = urllib.request.Request(
        f"{server.url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as found:
        choice: dict[str, Any] = json.load(found)["choices"][0]
    return choice


#: Writes every bfloat16 into a cache of vLLM on a CPU, a block for each, and prints the file of the codes that it holds.
_CACHED = """
import sys, torch
import vllm._custom_ops as ops
kind, path, width, block = sys.argv[1], sys.argv[2], 32, 32
x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
x, found = x[x.isfinite()], []
for part in x.split(8192):
    caches = []
    for fill in (0x00, 0xFF):
        keys, values = torch.full((len(part), 1, 2 * block, width), fill, dtype=torch.uint8).chunk(2, dim=2)
        constant = part[:, None, None].expand(-1, 1, width).contiguous()
        ops.cpu_attn_reshape_and_cache(constant, constant, keys, values, torch.arange(len(part)) * block, "vec", 1.0, 1.0, kind)
        caches.append(torch.stack([keys.flatten(1), values.flatten(1)]))
    same = caches[0] == caches[1]  # what was written, whatever was there before
    assert (same.sum(-1) == width).all()
    codes = caches[0][same].view(2, len(part), width)
    assert (codes == codes[:1, :, :1]).all()
    found.append(codes[0, :, 0])
torch.save(torch.cat(found), path)
"""


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_vllm_on_a_cpu_casts_every_value_as_the_preset_does(kind: str, tmp_path: Path) -> None:
    installed("vllm:demo")
    python, _ = parse_spec("vllm:demo").runner.interpreter("vllm")
    subprocess.run([python, "-c", _CACHED, kind, str(tmp_path / "codes")], check=True, cwd=tmp_path, timeout=300)
    codes = torch.load(tmp_path / "codes")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].float()
    assert len(codes) == len(x) == 65_280
    scheme = resolve(f"vllm-cpu-{kind.replace('_', '-')}").k
    assert scheme is not None
    ours = fake_quantize(x[None, None, :, None].expand(1, 1, -1, 2), scheme)[0, 0, :, 0]
    dtype = torch.float8_e4m3fn if kind == "fp8_e4m3" else torch.float8_e5m2
    assert torch.equal(codes.view(dtype).float(), ours)
    assert not torch.equal(ours, fake_quantize(x[None, None, :, None], Scheme.parse(kind))[0, 0, :, 0])


@pytest.mark.parametrize("spec", SPECS)
def test_an_engine_starts_with_the_cache_that_was_asked_for_and_stops(spec: str, tmp_path: Path) -> None:
    installed(spec)
    with serve(spec, log=tmp_path / "log") as server:
        choice = answer(server)
        assert dict(server.stated) == dict(server.spec.cache)
        assert choice["message"]["content"].strip()
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 20
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


@pytest.mark.parametrize(("exact", "rounded"), [(SPECS[0], SPECS[1]), (SPECS[2], SPECS[3])])
def test_a_rounded_cache_changes_what_an_engine_computes(exact: str, rounded: str, tmp_path: Path) -> None:
    installed(exact)
    found = []
    for number, spec in enumerate((exact, rounded)):
        with serve(spec, log=tmp_path / f"log{number}") as server:
            found.append([each["logprob"] for each in answer(server)["logprobs"]["content"]])
    assert found[0] != found[1]


def test_a_gate_between_two_caches_of_an_engine(tmp_path: Path) -> None:
    installed(SPECS[0])
    prompts = kvgeom.load_prompts("calibration").take(2)
    options = {"prompts": prompts, "max_new_tokens": 8, "progress": False}
    found = kvgeom.gate(SPECS[0], SPECS[1], tmp_path, **options)
    assert found.proof == ("stated", "the candidate says that its cache is k=q8_0, v=q4_0")
    assert np.isfinite(found.data.apart.sel(server="candidate")).all()
    assert found.data.apart.sel(server="candidate").max() > 0
    with pytest.warns(KvgeomWarning, match="the same cache|both servers say"):
        kvgeom.gate(tmp_path, SPECS[0], **options)  # the same cache, from answers that are kept
