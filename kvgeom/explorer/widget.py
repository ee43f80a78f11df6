"""The explorer as a widget of a notebook, and as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from kvgeom.checks import as_path
from kvgeom.errors import KvgeomError
from kvgeom.paths import write_whole

#: Answers a prompt, by its index, under a cache, by its spelling: what :func:`kvgeom.explorer.payload.payload` has of an answer.
Ask = Callable[[int, str], Mapping[str, Any]]
_SOURCE = files("kvgeom.explorer").joinpath("explorer.js").read_text(encoding="utf-8")
_STYLE = files("kvgeom.explorer").joinpath("explorer.css").read_text(encoding="utf-8")
_EXPORT = "export default { render };"


class Explorer(anywidget.AnyWidget):
    """Layers, channels, prompts and responses of results, linked.

    Show it as the last line of a cell (Jupyter, VS Code, Colab, marimo), or keep it with :meth:`save`.

    Attributes
    ----------
    content : dict
        From :func:`kvgeom.explorer.payload.payload`.
    live : bool
        Whether a model is at hand, which is asked about caches that were not tried.
    """

    _esm = _SOURCE
    _css = _STYLE
    content = traitlets.Dict().tag(sync=True)
    live = traitlets.Bool(False).tag(sync=True)

    def __init__(self, content: Mapping[str, Any], ask: Ask | None = None) -> None:
        super().__init__(content=dict(content), live=ask is not None)
        self._ask = ask
        self.on_msg(self._asked)

    def _asked(self, _: Any, message: Mapping[str, Any], __: Any) -> None:
        """Answer one prompt under a cache that was typed; what cannot be used is said in the place of the answer."""
        if self._ask is None or not isinstance(message, dict) or message.get("kind") != "ask":
            return
        prompt, scheme = message.get("prompt"), message.get("scheme")
        try:
            answer = dict(self._ask(prompt, scheme))  # type: ignore[arg-type]
        except KvgeomError as error:
            self.send({"kind": "error", "prompt": prompt, "scheme": scheme, "text": str(error)})
        else:
            self.send({"kind": "answer", "prompt": prompt, "scheme": scheme, "answer": answer})

    def save(self, path: str | Path) -> Path:
        """Write one HTML file that needs no network, no kernel and no other file.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        return write_whole(as_path("the file of an explorer", path), page(self.content))


def page(content: Mapping[str, Any]) -> str:
    """The explorer as a page. Texts of models are data in it, and are never read as markup."""
    # "<" ends a script, wherever it stands in one.
    data = json.dumps(dict(content), allow_nan=False).replace("<", "\\u003c")
    script = _SOURCE.replace(_EXPORT, "")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="kvgeom">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvgeom explorer</title>
<style>
body {{ margin: 0; padding: 16px; }}
{_STYLE}
</style>
</head>
<body>
<main id="explorer"></main>
<script type="application/json" id="content">{data}</script>
<script type="module">
{script}
const content = JSON.parse(document.getElementById("content").textContent);
const frozen = {{ get: (name) => ({{ content, live: false }})[name], on() {{}}, send() {{}} }};
render({{ model: frozen, el: document.getElementById("explorer") }});
</script>
</body>
</html>
"""
