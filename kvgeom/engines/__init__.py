"""Engines: how each stores a cache, how it is configured, and how that differs from a recipe."""
