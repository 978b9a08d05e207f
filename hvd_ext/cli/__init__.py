"""cli: decisions."""
