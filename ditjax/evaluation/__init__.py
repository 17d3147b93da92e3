"""What samples are worth: features, references, scores, validation loss."""
