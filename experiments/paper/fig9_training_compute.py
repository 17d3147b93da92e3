"""DiT figures 6 and 9: the twelve models of table 4, scored during training.

    python -m ditjax.sweep --config=experiments/paper/fig9_training_compute.py --workdir=$STUDY \
      --config.data.name=latents:$LATENTS

This is table4.py, with 50,000 samples of the averaged weights scored every 50,000 steps. The FID is
in metrics.jsonl as `eval/fid`; training compute is 3 x forward Gflops x batch x steps.

Published: the text says that XL/2 overtakes XL/4 after about 1e10 Gflops; the ends of the curves at
400,000 steps are in table 4.
Hardware and hours, computed and not measured: all twelve on a v5e:4x4 (16 chips), 23.6 hours of
training at best (56.1 with nothing hidden) and 5.92 hours of sampling. Not run.
"""

from ml_collections import ConfigDict

from . import published, table4


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; 'SIZE/PATCH' selects the model that `train` trains."""
    config = table4.get_config(arg)
    config.train.evaluate_every_steps = 50_000
    config.train.evaluate_num = 50_000
    config.sweep.title = "DiT figure 9: FID against training compute"
    config.sweep.published_source = f"{published.PAPER}, table 4 and figure 9"
    return config
