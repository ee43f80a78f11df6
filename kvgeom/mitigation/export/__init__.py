"""A mitigation as what an engine runs: a cache, flags, lines of Python, or a new checkpoint."""
