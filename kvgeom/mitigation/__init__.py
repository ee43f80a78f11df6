"""Mitigations: what keeps refusals under a quantized cache, chosen, proven and exported."""
