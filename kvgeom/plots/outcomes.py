"""Labels by recipe."""

from __future__ import annotations

import plotly.graph_objects as go

from kvgeom.plots.registry import Plottable, figure
from kvgeom.plots.theme import LABEL_COLORS, finish, plain


@figure("outcomes", "labels_by_recipe")
def labels_by_recipe(outcomes: Plottable) -> go.Figure:
    """How many prompts have each label under each recipe.

    How to read it: every bar holds all prompts; compare each with the first, which is the model with an exact cache.

    Parameters
    ----------
    outcomes : Outcomes
        ``label`` over (recipe, prompt).

    Returns
    -------
    plotly.graph_objects.Figure
        Stacked bars; x: prompts, y: recipe.
    """
    labels = outcomes.data.label.transpose("recipe", "prompt").values
    recipes = [plain(recipe) for recipe in outcomes.data.recipe.values]
    chart = go.Figure()
    for label, colour in LABEL_COLORS.items():
        chart.add_bar(
            y=recipes,
            x=(labels == label).sum(1),
            orientation="h",
            name=label,
            marker_color=colour,
            hovertemplate=f"%{{y}}: %{{x}} {label}<extra></extra>",
        )
    chart.update_xaxes(title_text="prompts")
    chart.update_yaxes(autorange="reversed", type="category")
    return finish(chart, 120 + 28 * len(recipes), barmode="stack")
