"""The safety subspace of keys, values and residual stream, and how exposed it is to rounding."""
