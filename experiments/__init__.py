"""Recipes as data: each file has a get_config() that names every key."""
