"""The tables of the paper, one file each; :mod:`kvgeom.paper.registry` knows them all."""
