"""Measurements that take long, and what is written of them."""
