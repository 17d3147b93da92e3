"""The equations of diffusion: pure functions of arrays and keys.

They know a network only as `denoise(x, t) -> Array`.
"""
