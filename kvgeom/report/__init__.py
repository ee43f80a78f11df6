"""An audit from end to end, and the page that shows it."""
