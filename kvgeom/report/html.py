"""What the pages share: templates, figures and tables in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvgeom.words import cell_text, conversation_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from markupsafe import Markup

#: Panning and selecting are of no use in these figures; a picture of one is. Figures follow the width of the page.
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


def page(template: str, *, figures: bool = True, **content: Any) -> str:
    """Fill in a template of this package: a page that needs no network and no other file.

    All text in ``content`` is escaped, unless it is markup that :func:`drawn` made. A page without figures does not carry what
    draws them.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("kvgeom.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    plotly = Markup(get_plotlyjs()) if figures else ""  # noqa: S704
    return environment.get_template(template).render(plotly=plotly, **content)


def section(title: str, text: str, figure: go.Figure, table: pd.DataFrame | None = None) -> dict[str, Any]:
    """A figure with its heading, how to read it, and its numbers, for the template."""
    return {
        "title": title,
        "text": text,
        "figure": drawn(figure, title),
        "table": None if table is None else cells(table),
    }


def drawn(figure: go.Figure, title: str) -> Markup:
    """A figure as markup; plotly escapes its JSON, and figures escape names.

    Its id comes from the title, so that the same result makes the same page. Titles on a page must differ.
    """
    from markupsafe import Markup

    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, div_id=name))  # noqa: S704


def prompts_text(prompts: Mapping[str, Any]) -> str:
    """A prompt set, as :meth:`~kvgeom.prompts.sets.PromptSet.described` has it, in a line."""
    classes = [
        f"{prompts[kind]} {kind}"
        + (
            f" in {clusters} clusters of similar wording"
            if (clusters := prompts[f"{kind}_clusters"]) < prompts[kind]
            else ""
        )
        for kind in ("harmful", "harmless")
    ]
    left_out = [f"{prompts[kind]} {kind} ones left out" for kind in ("repeated", "similar") if prompts[kind]]
    return f"{prompts['name']}: {', '.join([*classes, *left_out])} ({prompts['source']}; {prompts['fingerprint']})"


def made_text(settings: Mapping[str, Any]) -> str:
    """When something was made, in which time, and with what, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    return f"{settings['created']}, in {settings['seconds']:.0f} s; seed {settings['seed']}; {versions}"


def conversation_rows(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row of a table of settings: what stands before each request, if anything."""
    said = conversation_text(settings.get("conversation", ()))
    return [("requests", said)] if said else []


def cells(table: pd.DataFrame) -> dict[str, Any]:
    """A frame as columns and rows of text."""
    return {
        "columns": list(table.columns),
        "rows": [[cell_text(value) for value in row] for row in table.itertuples(index=False)],
    }
