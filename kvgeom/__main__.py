"""``python -m kvgeom``."""

from kvgeom.cli import main

raise SystemExit(main())
