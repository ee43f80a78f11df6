"""Labels by recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from kvgeom.plots.registry import figure
from kvgeom.plots.theme import LABEL_COLORS, finish

if TYPE_CHECKING:
    from kvgeom.evaluation.outcomes import Outcomes


@figure("outcomes", "labels_by_recipe")
def labels_by_recipe(outcomes: Outcomes) -> go.Figure:
    """How many prompts have each label under each recipe.

    How to read it: every bar holds all prompts; compare each with the first, the unquantized model.
    """
    recipes = [str(recipe) for recipe in outcomes.data.recipe.values]
    fig = go.Figure()
    for label, colour in LABEL_COLORS.items():
        fig.add_bar(
            y=recipes,
            x=[outcomes.counts(recipe)[label] for recipe in recipes],
            orientation="h",
            name=label,
            marker_color=colour,
            hovertemplate=f"%{{y}}: %{{x}} {label}<extra></extra>",
        )
    fig.update_xaxes(title_text="prompts")
    fig.update_yaxes(autorange="reversed", type="category")
    return finish(fig, 120 + 28 * len(recipes), barmode="stack")
