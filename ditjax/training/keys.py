"""The random streams of a run: one for each use of its seed."""

import jax

# A stream's number is part of every run: never reorder them, add new ones at the end.
INIT, TRAIN, LATENTS, SAMPLE, LABELS, VALIDATE = range(6)


def stream(seed: int, which: int) -> jax.Array:
    """The key of one use of a seed, so that no two uses share random numbers."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), which)
