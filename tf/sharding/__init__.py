"""The update on the ranks that own it, and how its weights come back."""
