"""DiT figure 10: more sampling steps do not make up for a smaller model. FID-10K, no guidance.

    C=experiments/paper/fig10_sampling_compute.py
    python -m ditjax.grid --workdir=$STUDY --steps=16,32,64,128,256,1000 --num=10000 \
      --published=$C --out=$STUDY/fig10

$STUDY is the directory of table4.py's sweep: the grid samples its twelve checkpoints and trains
nothing. Without that sweep, `sweep --config=$C` trains the same models.

Published (FID-10K): L/2 with 1,000 steps, 80.7 Tflops an image, 25.9; XL/2 with 128 steps, 15.2
Tflops, 23.7. The other 70 points are only plotted.
Hardware and hours, computed and not measured: the 72 cells on a v5e:4x4 (16 chips), .787 hours of
sampling at best. Not run.
"""

from ml_collections import ConfigDict

from . import published, table4

STEPS = ("16", "32", "64", "128", "256", "1000")


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the models' recipe, with the published figures of the grid's cells."""
    config = table4.get_config(arg)
    config.evaluate.num_samples = 10_000
    config.sweep.title = "DiT figure 10: FID-10K against sampling compute"
    config.sweep.published = sum(
        (
            published.figures(
                {"fid": fid}, model__size=size, model__patch=patch, sample__steps=steps
            )
            for (size, patch, steps), fid in published.SAMPLING.items()
        ),
        (),
    )
    config.sweep.published_protocol = published.protocol(
        num_samples="10000", leave=("sampling_steps",)
    )
    config.sweep.published_source = f"{published.PAPER}, section 5.2"
    return config
