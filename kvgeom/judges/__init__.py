"""Labels of responses: keyword rules, and public classifiers."""
