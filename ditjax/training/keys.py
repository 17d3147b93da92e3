"""The random streams of a run: one for each use of its seed."""

import jax

# Every run depends on these numbers: never reorder them, and add new ones at the end.
INIT, TRAIN, LATENTS, SAMPLE, LABELS, VALIDATE, CONTROL, INSPECT, CAPTION = range(9)


def stream(seed: int, which: int) -> jax.Array:
    """The key of one stream of a seed; no two streams share random numbers."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), which)
