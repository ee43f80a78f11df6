"""Engines: what each holds in its cache, how it is configured, and how far that is from what was asked."""
