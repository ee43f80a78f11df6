"""What arXiv:2606.09864 has published, and the same from here."""
