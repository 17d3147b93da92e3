"""The JAX training code of DiT, rebuilt in the open, as an instrument for scaling studies."""

__version__ = "0.1.0"
