"""The figures that Peebles & Xie 2023 (arXiv 2212.09748) publish, as data.

Tables 2 to 5 and every number in the text were compared on 2026-11-23 with two independent
transcriptions of the paper and with the README of the public release (facebookresearch/DiT, commit
ed81ce2): every digit agrees. The curves of figures 5, 6, 9, 10 and 12 are only plotted: this file
holds the numbers that the text states about them.
"""

PAPER = "Peebles & Xie 2023, arXiv 2212.09748"

# Table 4: FID-50K at 400,000 steps without guidance, by size and patch.
MODELS = {
    ("S", 8): 153.60,
    ("S", 4): 100.41,
    ("S", 2): 68.40,
    ("B", 8): 122.74,
    ("B", 4): 68.38,
    ("B", 2): 43.47,
    ("L", 8): 118.87,
    ("L", 4): 45.64,
    ("L", 2): 23.33,
    ("XL", 8): 106.41,
    ("XL", 4): 43.01,
    ("XL", 2): 19.47,
}

# Table 4: XL/2 at 400,000 steps by block; figure 5 draws them over training.
BLOCKS = {"in_context": 35.24, "cross_attention": 26.14, "adaln": 25.21, "adaln_zero": 19.47}

# Table 4: XL/2 trained longer, by image size and steps.
LONGER = {
    256: {2_352_000: 10.67, 7_000_000: 9.62},
    512: {1_301_000: 13.78, 3_000_000: 11.93},
}

# Tables 2 and 3: XL/2 after 7,000,000 and 3,000,000 steps, by guidance scale.
_METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
TABLES = {
    256: {
        1.0: (9.62, 6.85, 121.50, 0.67, 0.67),
        1.25: (3.22, 5.28, 201.77, 0.76, 0.62),
        1.5: (2.27, 4.60, 278.24, 0.83, 0.57),
    },
    512: {
        1.0: (12.03, 7.12, 105.25, 0.75, 0.64),
        1.25: (4.64, 5.77, 174.77, 0.81, 0.57),
        1.5: (3.04, 5.02, 240.82, 0.84, 0.54),
    },
}
# Section 5.1: guided, after "2.35M" steps, 2,352,000 in table 4.
GUIDED_AT_2352K = 2.55

# Appendix A: channels guided and scale.
GUIDANCE = {("three", 1.5): 2.27, ("all", 1.375): 2.20}

# Table 5: guidance 1.5, by decoder.
DECODERS = {
    "original": (2.46, 5.18, 271.56, 0.82, 0.57),
    "ft-MSE": (2.30, 4.73, 276.09, 0.83, 0.57),
    "ft-EMA": (2.27, 4.60, 278.24, 0.83, 0.57),
}

# Section 5.2: FID-10K at 400,000 steps, by size, patch and sampling steps. The other
# points are only plotted, in figure 10.
SAMPLING = {("L", 2, "1000"): 25.9, ("XL", 2, "128"): 23.7}

# Value of protocol fields that the paper does not state; they prevent an exact comparison.
NOT_STATED = "not stated"


def figures(values: dict[str, float], **keys: object) -> tuple[tuple[object, ...], ...]:
    """Return rows of config.sweep.published: metrics of the cells with `keys` (a__b means a.b)."""
    named = tuple((key.replace("__", "."), value) for key, value in keys.items())
    return tuple((named, metric, value) for metric, value in values.items())


def scores(row: tuple[float, ...]) -> dict[str, float]:
    """Return a row of tables 2, 3 or 5 by metric."""
    return dict(zip(_METRICS, row, strict=True))


def protocol(
    image_size: int = 256, *, leave: tuple[str, ...] = (), **changes: str
) -> tuple[tuple[str, str], ...]:
    """Return the paper's protocol of training and evaluation, as config.sweep.published_protocol.

    Source: section 4 and appendix A; the labels follow the release's sample_ddp.py, the reference
    is that of ADM's evaluator, which the paper used. `leave` names fields that the figures' keys
    state.
    """
    large = image_size == 512
    fields = {
        "metric": "FID",
        "features": "FID's Inception (2015)",
        "reference": f"VIRTUAL_imagenet{'512' if large else '256_labeled'}.npz",
        # For precision and recall: stated in table 3; for 256 pixels, the size of ADM's file.
        "reference_features": "1000" if large else "10000",
        "num_samples": "50000",
        "sampler": "ddpm",
        "sampling_steps": "250",
        "cfg_scale": "1",
        "cfg_channels": "three",
        "weights": "ema",
        "ema_decay": "0.9999",
        "labels": "uniform",
        "decoder": "ft-MSE",
        "precision": NOT_STATED,
        "data": "imagenet2012",
        "image_size": str(image_size),
        "num_classes": "1000",
        "flip": "True",
        "steps": "400000",
        "batch_size": "256",
        "learning_rate": "0.0001",
        # Everything without a field here is as in experiments/base.py.
        "recipe": "the paper's",
        "seed": NOT_STATED,
        **changes,
    }
    return tuple((field, text) for field, text in fields.items() if field not in leave)
