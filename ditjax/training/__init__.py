"""The optimizer chain and the pure training step."""
