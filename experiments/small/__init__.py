"""The studies of the DiT paper at a size that two cores do within the hour."""
