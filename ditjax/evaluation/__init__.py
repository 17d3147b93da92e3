"""Evaluation of samples and networks: features, references, scores, validation loss."""
