"""What tests build with: tiny models, judges, results as they might have been found."""
