"""The class-conditional task with a network, data, sampler, objective and features of a user's."""

from ml_collections import ConfigDict

from experiments import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.model = {"kind": "tests.toys.network", "width": 8}
    config.data.name = "tests.toys.data.Sides"
    config.data.num_classes = 2
    config.diffusion.variance = "fixed_small"
    config.diffusion.loss = "tests.toys.functions.absolute"
    config.sample.sampler = "tests.toys.functions.twice"
    config.sample.steps = "ddim4"
    config.sample.batch_size = 32
    config.sample.num = 32
    config.evaluate.features = "tests.toys.functions.halves"
    config.evaluate.num_samples = 64
    config.evaluate.guided_scale = 0.0
    config.evaluate.val_loss_num = 32
    config.optim.warmup_steps = 5
    config.train.steps = 20
    config.train.batch_size = 8
    config.train.log_every_steps = 5
    config.train.checkpoint_every_steps = 10
    config.train.sample_every_steps = 10
    config.train.evaluate_every_steps = 10
    config.train.evaluate_num = 32
    config.sweep.grid = (("model.width", (4, 8)),)
    return config
