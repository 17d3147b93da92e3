"""Files: data sets, checkpoints, logs, weights, results."""
