"""DiT table 4, last rows: XL/2 trained longer, FID-50K without guidance. ':256' or ':512' pixels.

    C=experiments/paper/table4_longer.py:256
    for STEPS in 2352000 7000000; do
      python -m ditjax.train --config=$C --workdir=$RUN --config.train.steps=$STEPS \
        --config.data.name=latents:$LATENTS
      python -m ditjax.grid --workdir=$RUN --published=$C --out=$RUN/grid-$STEPS
    done

This is one run, resumed with more steps; `sweep` would train every cell from the start. Files and
protocol are those of table4.py; at 512 pixels the steps are 1301000 and 3000000, and the reference
is VIRTUAL_imagenet512.npz.

Published (FID-50K): 256 pixels 10.67 after 2,352,000 steps and 9.62 after 7,000,000; 512 pixels
13.78 after 1,301,000 and 11.93 after 3,000,000, with the ft-MSE decoder (table 3 has 12.03 with
ft-EMA).
Hardware and hours, computed and not measured: 256 pixels to 7,000,000 steps on h100:8 (8 chips),
44.8 hours of training at best (65.2 with nothing hidden); 512 pixels to 3,000,000, 84.8 (93.6). Not
run.
"""

from ml_collections import ConfigDict

from . import published, table4


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the recipe for '256' (default) or '512' pixels. Raises ValueError."""
    size = arg or "256"
    if size not in ("256", "512"):
        raise ValueError(f"{arg!r}: expected '256' or '512' pixels")
    longer = published.LONGER[int(size)]
    config = table4.get_config("XL/2")
    if size == "512":
        config.data.image_size = 512
        config.evaluate.reference = "VIRTUAL_imagenet512.npz"
    config.train.steps = max(longer)
    config.sweep.grid = (("train.steps", tuple(longer)),)
    config.sweep.title = f"DiT table 4: XL/2 at {size} pixels, trained longer"
    config.sweep.topology = "h100:8"
    config.sweep.published = sum(
        (
            published.figures(
                {"fid": fid},
                model__size="XL",
                model__patch=2,
                train__steps=steps,
                sample__cfg_scale=1.0,
            )
            for steps, fid in longer.items()
        ),
        (),
    )
    config.sweep.published_protocol = published.protocol(int(size), leave=("steps",))
    return config
