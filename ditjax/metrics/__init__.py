"""Scores of samples, computed from features in NumPy."""
