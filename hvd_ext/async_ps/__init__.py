"""async_ps: decisions."""
