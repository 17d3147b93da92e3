"""Recipes as data: each file has a get_config() of the keys that differ from the paper's."""
