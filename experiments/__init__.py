"""Recipes: each file's get_config() returns the keys that differ from the paper's values."""
