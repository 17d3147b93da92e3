"""DiT figures 6 and 9: the twelve models of table 4, scored along training.

    python -m ditjax.sweep --config=experiments/paper/fig9_training_compute.py --workdir=$STUDY \
      --config.data.name=latents:$LATENTS

As table4.py, and every 50,000 steps 50,000 samples of the averaged weights are scored: FID against
training compute, 3 x forward Gflops x batch x steps, is in metrics.jsonl as `eval/fid`.

Published: of the curves the text says that XL/4 is overtaken by XL/2 after about 1e10 Gflops; their
ends at 400,000 steps are table 4's.
Hardware and hours, computed and not measured: all twelve on a v5e:4x4 (16 chips), 23.6 hours of
training at best (56.1 with nothing hidden) and 5.92 hours of sampling. Never run by us.
"""

from ml_collections import ConfigDict

from . import published, table4


def get_config(arg: str | None = None) -> ConfigDict:
    """The sweep; 'SIZE/PATCH' picks the model that `train` alone would train."""
    config = table4.get_config(arg)
    config.train.evaluate_every_steps = 50_000
    config.train.evaluate_num = 50_000
    config.sweep.title = "DiT figure 9: FID against training compute"
    config.sweep.published_source = f"{published.PAPER}, table 4 and figure 9"
    return config
