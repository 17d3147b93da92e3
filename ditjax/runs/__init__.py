"""A run's directory: recipe, checkpoints, log, results, provenance."""
