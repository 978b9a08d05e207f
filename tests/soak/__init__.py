"""Trainings that are struck at random moments, and gone on with: nothing hangs, nothing is lost."""
