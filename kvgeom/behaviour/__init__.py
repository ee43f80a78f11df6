"""Measures of behaviour: curves over bits, single layers, ablations, PCR."""
