"""Train a pair of classifiers that ships with ditjax, or the network of FD-clips; write weights.

    python -m ditjax.classify --out=DIR
    python -m ditjax.classify --features=mnist --out=DIR
    python -m ditjax.classify --clips --out=DIR

The first takes about a minute on two cores, the others a few. The features of one of a pair give a
distance, such as FD-digits; the other judges the class of a sample. They share neither
architecture, nor seed, nor augmentation. The weights of the last step are kept: the test split is
scored once and selects nothing.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ditjax import cli
from ditjax.data import moving, source
from ditjax.data.crop import normalize
from ditjax.data.records import HostBatch, load_arrays
from ditjax.data.scenes import load_handwriting
from ditjax.errors import UserError
from ditjax.evaluation.classifiers import (
    FEATURE_CLASSIFIER,
    JUDGE,
    PAIRS,
    accuracy,
    apply_classifier,
    recognise,
)
from ditjax.files.assets import save_assets
from ditjax.metrics.frechet import batch_moments, frechet_distance
from ditjax.models.classifier import (
    CLIP_LENGTH,
    MNIST_SIDE,
    DigitsConvNet,
    DigitsMixer,
    MovingConvNet,
)

_LINEN_FIELDS = ("parent", "name")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Half-widths of uniform draws, one per image; `noise` is the largest added deviation."""

    rotation_radians: float
    shift_pixels: float
    log_zoom: float = 0.1
    log_contrast: float = 0.15
    noise: float = 0.3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up over a tenth of the steps and cosine decay to zero."""

    network: DigitsConvNet | DigitsMixer
    augmentation: Augmentation
    seed: int
    epochs: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05


RECIPES = {
    FEATURE_CLASSIFIER: Recipe(
        DigitsConvNet(), Augmentation(rotation_radians=0.15, shift_pixels=1.0), seed=0, epochs=60
    ),
    JUDGE: Recipe(
        DigitsMixer(),
        Augmentation(rotation_radians=0.25, shift_pixels=0.5, noise=0.2),
        seed=1,
        epochs=90,
    ),
    PAIRS["mnist"].features: Recipe(
        DigitsConvNet(width=8, side=MNIST_SIDE, stages=3),
        Augmentation(rotation_radians=0.15, shift_pixels=1.5),
        seed=0,
        epochs=1,
    ),
    PAIRS["mnist"].judge: Recipe(
        DigitsMixer(width=40, blocks=2, side=MNIST_SIDE, patch=4),
        Augmentation(rotation_radians=0.25, shift_pixels=1.0, noise=0.2),
        seed=1,
        epochs=7,
    ),
    # Clothes stand upright, and their classes differ in finer details than digits.
    PAIRS["fashion"].features: Recipe(
        DigitsConvNet(width=12, side=MNIST_SIDE, stages=3),
        Augmentation(rotation_radians=0.05, shift_pixels=1.0, noise=0.2),
        seed=0,
        epochs=8,
    ),
    PAIRS["fashion"].judge: Recipe(
        DigitsMixer(width=40, blocks=2, side=MNIST_SIDE, patch=4),
        Augmentation(rotation_radians=0.1, shift_pixels=0.5, noise=0.1),
        seed=1,
        epochs=7,
    ),
}
# What the data set is, where its full name does not say so.
_DATA = {"digits": "scikit-learn load_digits; record i is test when i % 5 == 4"}


def augment(key: jax.Array, x: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Rotate, zoom, shift (bilinear, black outside), scale contrast, add noise: f32[B,S,S,1]."""
    uniform_key, noise_key = jax.random.split(key)
    draws = jax.random.uniform(uniform_key, (x.shape[0], 6), minval=-1.0)
    angle = augmentation.rotation_radians * draws[:, 0:1]  # [B,1]
    zoom = jnp.exp(augmentation.log_zoom * draws[:, 1:2])
    shift = augmentation.shift_pixels * draws[:, 2:4]
    contrast = jnp.exp(augmentation.log_contrast * draws[:, 4:5])
    level = augmentation.noise * jnp.abs(draws[:, 5:6])
    pixels = jnp.arange(x.shape[1], dtype=jnp.float32)
    centre = (x.shape[1] - 1) / 2
    row, column = (
        axis.reshape(1, -1) - centre for axis in jnp.meshgrid(pixels, pixels, indexing="ij")
    )
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    source_row = cos * row + sin * column + shift[:, :1] + centre  # [B,S²]
    source_column = cos * column - sin * row + shift[:, 1:] + centre

    def tent(source: jax.Array) -> jax.Array:  # bilinear weights, [B,S²] -> [B,S²,S]
        return jnp.maximum(0.0, 1.0 - jnp.abs(source[:, :, None] - pixels[None, None, :]))

    # Ink is x + 1: pixels that the tents do not reach get 0 ink, the background.
    ink = jnp.einsum("bnp,bnq,bpq->bn", tent(source_row), tent(source_column), x[..., 0] + 1.0)
    noise = level[:, :, None, None] * jax.random.normal(noise_key, x.shape)
    return (contrast * ink).reshape(x.shape) - 1.0 + noise


def train_classifier(
    recipe: Recipe,
    images: np.ndarray,
    labels: np.ndarray,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Train by cross-entropy on augmented images u8[N,S,S,1], labels i32[N]. Returns parameters.

    Random draws depend only on (recipe.seed, step), so the same arrays give the same weights on the
    same kind of machine. `progress(step, steps, loss)` is called ten times.
    """
    x, y = jnp.asarray(normalize(images)), jnp.asarray(labels)
    steps = max(1, recipe.epochs * len(images) // recipe.batch_size)
    params = jax.jit(recipe.network.init)(jax.random.key(recipe.seed), x[:1])["params"]
    state = _optimizer(recipe, steps).init(params)
    for step in range(steps):
        params, state, loss = _train_step(recipe, steps, params, state, x, y, jnp.int32(step))
        if (step + 1) % max(1, steps // 10) == 0:
            progress(step + 1, steps, float(loss))
    return jax.tree.map(np.asarray, params)


def _optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, max(1, steps // 10), max(2, steps)
    )
    return optax.adamw(schedule, weight_decay=recipe.weight_decay)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train_step(
    recipe: Recipe,
    steps: int,
    params: Any,
    state: Any,
    x: jax.Array,
    y: jax.Array,
    step: jax.Array,
) -> tuple[Any, Any, jax.Array]:
    step_key = jax.random.fold_in(jax.random.key(recipe.seed), step)
    draw_key, augment_key = jax.random.split(step_key)
    index = jax.random.randint(draw_key, (recipe.batch_size,), 0, x.shape[0])
    batch = augment(augment_key, x[index], recipe.augmentation)

    def loss_of(params: Any) -> jax.Array:
        logits = apply_classifier(recipe.network, params, batch).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = _optimizer(recipe, steps).update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


# ---- clips

CLIPS, CLIP_STEPS, CLIP_BATCH, CLIP_EXAMPLES = "moving_convnet", 4000, 64, 6000
VELOCITY_WEIGHT = 2.0


class LabelledClips(NamedTuple):
    """frames u8[N,8,16,16], digit i32[N], velocity f32[N,2] of the first step, bounce f32[N]."""

    frames: np.ndarray
    digit: np.ndarray
    velocity: np.ndarray
    bounce: np.ndarray


def labelled_clips(split: str, count: int, seed: int) -> LabelledClips:
    """Windows of 8 frames, that begin at frames 0 to 8 of moving digits, and what is in them."""
    digits, rows = load_handwriting(split), []
    for i in range(count):
        clip, first = moving.moving_clip(digits, seed, split, i), i % (CLIP_LENGTH + 1)
        path = clip.corners[0, first : first + CLIP_LENGTH]
        steps = np.diff(path, axis=0)
        bounced = (np.diff(steps, axis=0) ** 2).sum() > 1e-6
        rows.append((clip.frames[first : first + CLIP_LENGTH], clip.label, steps[0], bounced))
    frames, label, velocity, bounced = zip(*rows, strict=True)
    return LabelledClips(
        np.stack(frames),
        np.array(label, np.int32),
        np.array(velocity, np.float32),
        np.array(bounced, np.float32),
    )


def train_motion(network: MovingConvNet, clips: LabelledClips, seed: int) -> dict[str, Any]:
    """Train to tell digit, velocity and bounce of noisy clips. Returns parameters.

    A quarter of the clips have their frames in another order, which is to be told, too; their
    velocity and bounces are not asked for.
    """
    x, y = normalize(clips.frames)[..., None], clips[1:]
    params = jax.jit(network.init)(jax.random.key(seed), jnp.asarray(x[:1]))["params"]
    schedule = optax.cosine_decay_schedule(3e-3, CLIP_STEPS)
    optimizer = optax.adamw(schedule, weight_decay=0.05)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array, y: Any) -> Any:
        def loss_of(params: Any) -> jax.Array:
            of_level, of_noise = jax.random.split(key)
            level = 0.3 * jax.random.uniform(of_level, (len(x), 1, 1, 1, 1))
            noisy = x + level * jax.random.normal(of_noise, x.shape)
            found: Any = network.apply({"params": params}, noisy)
            digit, velocity, bounce, shuffled = y
            moves = VELOCITY_WEIGHT * jnp.square(found.velocity - velocity).sum(-1)
            moves += optax.sigmoid_binary_cross_entropy(found.bounce, bounce)
            loss = optax.softmax_cross_entropy_with_integer_labels(found.digit, digit)
            loss += optax.sigmoid_binary_cross_entropy(found.shuffled, shuffled)
            return (loss + (1 - shuffled) * moves).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for k in range(CLIP_STEPS):
        rng, quarter = np.random.default_rng([seed, k]), CLIP_BATCH // 4
        rows = rng.integers(0, len(x), CLIP_BATCH)
        shuffled = np.float32(np.arange(CLIP_BATCH) < quarter)
        batch = x[rows]
        for clip in batch[:quarter]:
            clip[:] = clip[rng.permutation(CLIP_LENGTH)]
        key = jax.random.fold_in(jax.random.key(seed), k)
        labels = (*(each[rows] for each in y), shuffled)
        params, state, loss = step(params, state, key, batch, labels)
        if (k + 1) % (CLIP_STEPS // 10) == 0:
            print(f"{CLIPS}: step {k + 1}/{CLIP_STEPS}  loss {loss:.3f}", flush=True)
    return jax.tree.map(np.asarray, params)


def save_motion(out: str, seed: int) -> None:
    """Train the network of FD-clips, and write it with what it scores on test clips."""
    network = MovingConvNet()
    params = train_motion(network, labelled_clips("train", CLIP_EXAMPLES, seed), seed)
    test = labelled_clips("test", 600, seed)
    apply = jax.jit(network.apply)
    found: Any = apply({"params": params}, normalize(test.frames)[..., None])
    record = {
        "network": {"name": "MovingConvNet", "width": network.width, "features": network.features},
        "recipe": {"steps": CLIP_STEPS, "batch_size": CLIP_BATCH, "seed": seed, "noise": 0.3},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "data": f"moving_digits, {CLIP_EXAMPLES} training clips; windows of 8 frames",
        "test_count": len(test.digit),
        "test_accuracy": accuracy(np.asarray(found.digit), test.digit),
        "test_velocity_error": float(np.sqrt(np.square(found.velocity - test.velocity).mean())),
        "test_bounce_accuracy": float(np.mean((np.asarray(found.bounce) > 0) == test.bounce)),
        "made_by": f"python -m ditjax.classify --clips --out=DIR --seed={seed}",
        "jax": jax.__version__,
    }
    save_assets(out, {CLIPS: (params, record)})
    print(
        f"{CLIPS}: test accuracy {record['test_accuracy']:.4f}, velocity to within"
        f" {record['test_velocity_error']:.3f} px, bounce {record['test_bounce_accuracy']:.4f}"
    )


def main(argv: list[str]) -> int:
    """Train both, and write NAME.npz and manifest.json to --out. Raises UserError."""
    parser = cli.parser("classify", "Train a pair of the shipped classifiers.", config=False)
    parser.add_argument(
        "--features", choices=PAIRS, default="digits", help="which pair (default: digits)"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the npz files and manifest"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="folder of prepared data sets")
    parser.add_argument(
        "--clips", action="store_true", help="train the network of FD-clips instead of these two"
    )
    parser.add_argument("--seed", type=int, default=0, help="added to the seed of each recipe")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed={args.seed}: expected 0 or more.")
    save_assets(args.out, {})  # raises for an unwritable folder before the training
    if args.clips:
        save_motion(args.out, args.seed)
        return 0

    pair = PAIRS[args.features]
    train_split = load_arrays(pair.data, "train", args.data_dir)
    test_split = load_arrays(pair.data, "test", args.data_dir)
    data = _DATA.get(pair.data) or source.known_content(pair.data, args.data_dir)
    flags = (f"--features={args.features}", "--out=DIR", f"--seed={args.seed}")
    for name in (pair.features, pair.judge):
        recipe = RECIPES[name]
        recipe = dataclasses.replace(recipe, seed=recipe.seed + args.seed)
        params = train_classifier(
            recipe, train_split["image"], train_split["label"], _progress_of(name)
        )
        record = {
            **_measured(recipe, params, train_split, test_split),
            "data": data,
            "made_by": " ".join(("python -m ditjax.classify", *flags)),
        }
        save_assets(args.out, {name: (params, record)})
        print(
            f"{name}: test accuracy {record['test_accuracy']:.4f} on {record['test_count']} images,"
            f" Fréchet distance train to test {record['frechet_train_test']:.3f}"
        )
    return 0


def _progress_of(name: str) -> Callable[[int, int, float], None]:
    start = time.monotonic()

    def report(step: int, steps: int, loss: float) -> None:
        rate = step / (time.monotonic() - start)
        left = (steps - step) / rate
        print(
            f"{name}: step {step}/{steps}  loss {loss:.3f}  {rate:.0f} steps/s  {left:.0f} s left",
            flush=True,
        )

    return report


def _measured(
    recipe: Recipe, params: Any, train_split: HostBatch, test_split: HostBatch
) -> dict[str, Any]:
    """Return the record of trained parameters: network, recipe, and scores of both splits."""
    train_features, _ = recognise(recipe.network, params, train_split["image"])
    test_features, test_logits = recognise(recipe.network, params, test_split["image"])
    return {
        "network": _network(recipe),
        "recipe": _settings(recipe),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "train_count": len(train_split["label"]),
        "test_count": len(test_split["label"]),
        "test_accuracy": accuracy(test_logits, test_split["label"]),
        "frechet_train_test": frechet_distance(
            batch_moments(train_features), batch_moments(test_features)
        ),
        "jax": jax.__version__,
    }


def _network(recipe: Recipe) -> dict[str, Any]:
    """Return the class name and the widths that rebuild the network."""
    names = [field.name for field in dataclasses.fields(recipe.network)]
    widths = {name: getattr(recipe.network, name) for name in names if name not in _LINEN_FIELDS}
    return {"name": type(recipe.network).__name__, **widths}


def _settings(recipe: Recipe) -> dict[str, Any]:
    settings = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    del settings["network"]
    return {**settings, "augmentation": dataclasses.asdict(recipe.augmentation)}


if __name__ == "__main__":
    cli.run(main)
