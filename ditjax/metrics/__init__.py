"""Numbers from features."""
