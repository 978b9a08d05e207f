"""sparse: decisions."""
