"""Figures: functions of result objects that return plotly figures, and never show them."""
