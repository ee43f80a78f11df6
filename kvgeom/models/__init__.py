"""A language model as the rest of kvgeom sees it, and how to get one."""
