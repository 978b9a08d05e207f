"""Two ranks of which one is given, or does, something else: every combination ends on both."""
