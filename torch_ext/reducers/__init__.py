"""How gradients are reduced over the ranks: one module for each way."""
