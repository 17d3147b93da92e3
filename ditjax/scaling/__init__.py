"""The laws fitted to a study."""
