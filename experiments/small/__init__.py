"""The studies of the DiT paper at a size that two CPU cores finish within an hour."""
