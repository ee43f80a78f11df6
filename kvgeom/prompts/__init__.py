"""Requests to ask a model: the calibration set, public benchmarks, and files of your own."""
