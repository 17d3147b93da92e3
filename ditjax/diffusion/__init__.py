"""The equations of diffusion: pure functions of arrays and keys.

All that is known here of a network is `denoise(x, t) -> Array`.
"""
