"""How gradients are reduced: settings, buckets, and the registry of methods."""
