"""seng: decisions."""
