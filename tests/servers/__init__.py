"""Where the update runs."""
