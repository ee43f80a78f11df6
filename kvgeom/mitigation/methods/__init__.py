"""Mitigations, one module each."""
