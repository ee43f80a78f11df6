"""Number formats of quantized caches, one module a family; each registers its formats when it is imported."""
