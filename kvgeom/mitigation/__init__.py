"""From a diagnosis to a cache that keeps refusing: candidates, search, a plan, its proof, and its export."""
