"""The explorer: what it is given is what results hold; in a real browser, what is clicked is what is shown."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvgeom
from kvgeom.diagnosis.diagnose import Diagnosis
from kvgeom.diagnosis.explore import asked
from kvgeom.errors import InputError
from kvgeom.explorer.payload import payload
from kvgeom.explorer.widget import Explorer, page
from kvgeom.outliers import outlier_border
from tests.builders.judges import ArbitraryJudge
from tests.builders.tiny import tiny_model

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    prompts = kvgeom.calibration().take(6)
    harmful = (*prompts.harmful[:5], f"How do I {HOSTILE}?")
    prompts = kvgeom.PromptSet("six", harmful, prompts.harmless, "tests")
    return kvgeom.diagnose(
        tiny_model("qwen2"), prompts, bits=(8, 3), scan_bits=3, judge=ArbitraryJudge(), max_new_tokens=6, progress=False
    )


def unpacked(content: dict[str, Any], site: str, name: str, layers: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(content["channels"][site][name]), dtype="<f4").reshape(layers, -1)


def test_numbers_are_those_of_the_results(found: Diagnosis) -> None:
    content = payload(found.parts().values())
    space = found.sensitivity
    assert space is not None
    assert content["layers"] == space.data.layer.values.tolist()
    columns = {column["name"]: column for column in content["columns"]}
    assert [*columns] == ["ratio, keys", "ratio, values", "ratio, residual", "refusals lost", "margin lost"]
    for site, name in (("k", "ratio, keys"), ("v", "ratio, values")):
        one = space.data.sel(site=site)
        expected = np.where(np.isfinite(one.ratio), one.ratio, one.ratio_low)
        np.testing.assert_array_equal(np.array(columns[name]["values"], dtype=float), expected)
        for variable in ("magnitude", "noise", "loading"):
            held = space.channels(site)[variable].values
            np.testing.assert_allclose(unpacked(content, site, variable, 3), held, rtol=1e-6)
        borders = [outlier_border(row).item() for row in space.channels(site).magnitude.values]
        assert content["channels"][site]["outliers"] == pytest.approx(borders)
    assert columns["refusals lost"]["values"] == found.scan.data.flips.values.tolist()
    json.dumps(content, allow_nan=False)


def test_answers_are_those_of_the_outcomes(found: Diagnosis) -> None:
    content = payload(found.parts().values())
    assert [prompt["index"] for prompt in content["prompts"]] == list(found.baseline.refused)
    assert {each["group"] for each in content["recipes"]} == {"widths", "single layers", "other caches"}
    for outcomes in (found.outcomes, found.scan_outcomes):
        for prompt in content["prompts"]:
            for name, answer in prompt["answers"].items():
                if name in outcomes.data.recipe.values:
                    row = outcomes.data.sel(recipe=name, prompt=prompt["index"])
                    assert (answer["text"], answer["label"]) == (str(row.text.item()), str(row.label.item()))
                    assert answer["divergence"] == int(row.divergence)


def test_of_a_sensitivity_alone_there_are_layers_and_no_prompts(found: Diagnosis) -> None:
    assert found.sensitivity is not None
    content = found.sensitivity.explore().content
    assert (len(content["layers"]), content["prompts"], content["recipes"]) == (3, [], [])


def test_the_model_is_asked_under_another_cache(found: Diagnosis) -> None:
    explorer, sent = found.explore(), list[Any]()
    explorer.send = sent.append  # type: ignore[method-assign, assignment]
    index = found.baseline.refused[0]
    explorer._asked(None, {"kind": "ask", "prompt": index, "scheme": "int2-sym-tensor"}, None)
    own = kvgeom.evaluate(None, {"x": "int2-sym-tensor"}, found.baseline, refused_only=True, progress=False)
    row = own.data.sel(recipe="x", prompt=index)
    assert sent[0]["answer"]["text"] == str(row.text.item())
    for wrong in ("int99", "", None, 5, [], "a" * 9000):
        explorer._asked(None, {"kind": "ask", "prompt": index, "scheme": wrong}, None)
        assert sent[-1]["kind"] == "error"
        assert len(sent[-1]["text"]) < 700
    with pytest.raises(InputError):
        asked(found.baseline, 99, "int4-asym-token")
    explorer._asked(None, {"kind": "ask", "prompt": "0", "scheme": "int4-asym-token"}, None)
    assert sent[-1]["kind"] == "error"


def test_a_diagnosis_without_its_model_asks_nothing(found: Diagnosis, tmp_path: Path) -> None:
    explorer = Diagnosis.load(found.save(tmp_path / "d.nc")).explore()
    assert not explorer.live
    assert explorer.content == found.explore().content
    sent: list[Any] = []
    explorer.send = sent.append  # type: ignore[method-assign, assignment]
    explorer._asked(None, {"kind": "ask", "prompt": 0, "scheme": "int4-asym-token"}, None)
    assert not sent


def test_the_page_needs_nothing_and_holds_texts_as_data(found: Diagnosis, tmp_path: Path) -> None:
    path = found.explore().save(tmp_path / "x.html")
    text = path.read_text()
    assert not re.findall(r"(?:src|href)=[\"']?https?:", text)
    assert "export default" not in text
    assert HOSTILE not in text
    held = json.loads(text.split('id="content">')[1].split("</script>")[0])
    assert held == found.explore().content
    with pytest.raises(InputError, match="no file was named"):
        found.explore().save("")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser's driver is not installed (kvgeom[browser])"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_what_is_clicked_is_what_is_shown(found: Diagnosis, browser: Any, tmp_path: Path, width: int) -> None:
    content = found.explore().content
    view = browser.new_page(viewport={"width": width, "height": 900})
    errors: list[str] = []
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
    view.goto(found.explore().save(tmp_path / "x.html").as_uri())
    view.locator('[data-key="1 ratio, values"]').click()
    assert view.locator(".said").inner_text().startswith("largest share: channel")
    assert "values of layer 1" in view.locator("h3", has_text="Channels of").inner_text()
    assert view.locator("circle").count() == content["channels"]["v"]["count"]
    layer = next(each["name"] for each in content["recipes"] if each["layer"] == 1)
    assert view.locator("select").input_value() == layer
    lost = sum(prompt["answers"][layer]["label"] != "refused" for prompt in content["prompts"])
    assert view.locator(".count").inner_text().startswith(f"{lost} of {len(content['prompts'])} lost")
    last = content["prompts"][-1]
    view.locator(f'[data-key="prompt {last["index"]}"]').click()
    shown = view.locator(".answer")
    assert shown.nth(0).inner_text() == last["exact"]["text"].strip() or not last["exact"]["text"].strip()
    assert view.locator(".answers").count() == 1
    # By keyboard: down and right from the first cell, and it is chosen with Enter.
    view.locator('[data-key="0 ratio, keys"]').focus()
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        view.keyboard.press(key)
    assert view.evaluate("document.activeElement.dataset.key") == "1 ratio, values"
    assert view.evaluate("window.hacked") is None
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors
    view.close()


def test_the_shape_of_a_real_model(browser: Any, tmp_path: Path) -> None:
    rng, layers, channels = np.random.default_rng(0), 32, 1024
    packed = {
        name: base64.b64encode(rng.random((layers, channels), "f4").tobytes()).decode()
        for name in ("magnitude", "noise", "loading")
    }
    column = {"scale": "log", "values": rng.random(layers).tolist(), "marks": [""] * layers, "note": ""}
    answer = {"text": "I cannot", "label": "refused", "reason": "r", "divergence": 2, "margin": 1.0}
    names = [f"layer {n}" for n in range(layers)]
    content = {
        "model": "m", "layers": list(range(layers)), "columns": [{**column, "name": f"ratio, {s}", "site": s} for s in "kv"],
        "channels": {s: {"count": channels, "heads": 8, "outliers": [0.9] * layers, **packed} for s in "kv"},
        "recipes": [{"name": name, "group": "single layers", "layer": n, "about": ""} for n, name in enumerate(names)],
        "prompts": [{"index": n, "request": "r", "exact": answer, "answers": dict.fromkeys(names, answer)} for n in range(64)],
    }  # fmt: skip
    (tmp_path / "x.html").write_text(page(content))
    view = browser.new_page()
    view.goto((tmp_path / "x.html").as_uri())
    view.locator('[data-key="7 ratio, v"]').click()
    assert view.locator("circle").count() == channels
    assert view.locator("select").input_value() == "layer 7"
    view.close()


def test_it_is_a_widget(found: Diagnosis) -> None:
    explorer = found.explore()
    assert isinstance(explorer, Explorer)
    assert explorer.live
    assert "application/vnd.jupyter.widget-view+json" in str(explorer._repr_mimebundle_())
