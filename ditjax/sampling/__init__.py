"""Sampling: the jitted sampler, sample files, and the pipeline."""
