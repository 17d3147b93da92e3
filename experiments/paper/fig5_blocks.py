"""DiT figure 5: XL/2 with each of the four blocks, 400,000 steps, FID-50K, no guidance.

    python -m ditjax.sweep --config=experiments/paper/fig5_blocks.py --workdir=$STUDY \
      --config.data.name=latents:$LATENTS

Files and protocol are those of table4.py. The figure plots FID over training: add
--config.train.evaluate_every_steps=50000 --config.train.evaluate_num=50000.

Published (FID-50K, table 4): in-context 35.24, cross-attention 26.14, adaLN 25.21, adaLN-Zero
19.47.
Hardware and hours, computed and not measured: all four on h100:8 (8 chips), 10.7 hours of training
at best (14.7 with nothing hidden) and .434 hours of sampling. Not run.
"""

from ml_collections import ConfigDict

from . import published, table4


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the sweep; 'SIZE/PATCH' selects another model, which has no published figures."""
    config = table4.get_config(arg)
    config.sweep.grid = (("model.block", tuple(published.BLOCKS)),)
    config.sweep.title = "DiT figure 5: four blocks, XL/2 at 400,000 steps"
    config.sweep.topology = "h100:8"
    config.sweep.published = sum(
        (
            published.figures({"fid": fid}, model__size="XL", model__patch=2, model__block=block)
            for block, fid in published.BLOCKS.items()
        ),
        (),
    )
    config.sweep.published_source = f"{published.PAPER}, table 4 and figure 5"
    return config
