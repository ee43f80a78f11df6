"""The command line."""

from kvgeom.cli.main import main

__all__ = ["main"]
