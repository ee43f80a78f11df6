"""What counts as a refusal: labels of responses, a score without generation, and directions."""
