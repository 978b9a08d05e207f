"""delay: decisions."""
