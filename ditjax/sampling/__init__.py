"""Drawing images."""
