"""A quick look at a quantized cache, from forward passes alone."""
