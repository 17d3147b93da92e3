"""The recipe of digits on latents with the toy network: of the network nothing is asked."""

from ml_collections import ConfigDict

from experiments import digits_latent


def get_config() -> ConfigDict:
    config = digits_latent.get_config()
    config.model = {"kind": "tests.toys.network"}
    config.diffusion.loss = "simple"
    config.diffusion.variance = "fixed_small"
    return config
