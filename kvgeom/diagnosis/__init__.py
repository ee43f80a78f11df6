"""From outcomes under recipes to a verdict: which failure mode a model has, and how sure that is."""
