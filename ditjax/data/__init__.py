"""From a name to batches: sources, builders, latents, the seeded stream."""
