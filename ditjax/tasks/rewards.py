"""Training on a reward of what the network draws: its keys, its rewards, its rollout and its loss.

`config.reward.method` 'ddpo' follows the gradient of the expected reward along the steps of the
sampler (Black et al. 2023), with DPOK's penalty (Fan et al. 2023); 'dpo' prefers the better of two
images (Diffusion-DPO, Wallace et al. 2023). The equations are in `diffusion/chains.py`.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import (
    Config,
    Section,
    above,
    at_least,
    check_used,
    key,
    lookup,
    registered,
)
from ditjax.diffusion import chains, samplers
from ditjax.diffusion.chains import Chains
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.losses import simple_loss
from ditjax.diffusion.samplers import Steps
from ditjax.errors import UserError, reason
from ditjax.models.network import Inputs, NetworkCost
from ditjax.parallel.processes import is_primary
from ditjax.tasks import autoencoder
from ditjax.tasks.alignment import digit_images
from ditjax.tasks.objective import objective_of, options_of, sampler_of, time_draw, times_of
from ditjax.training.averages import HELD
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import Additions, Frozen, Task
from ditjax.weights.shipped import shipped_classifier

REWARD_REGISTRY = "ditjax.tasks.rewards.REWARDS"
AT_START = f"{HELD}0"  # the weights that training started from: the reference policy

# (images f32[B,H,W,C] in [-1, 1], labels i32[B]) -> f32[B]
RewardFunction = Callable[[jax.Array, jax.Array], jax.Array]

# How images are drawn is part of what is learned.
_DRAWN_BY = (
    *("sampler", "steps", "grid", "rho", "shift", "last_step", "eta", "clip_x0"),
    *("cfg_scale", "cfg_channels", "cfg_interval", "cfg_rule", "cfg_rescale"),
    *("apg_eta", "apg_norm", "zero_steps"),
)
_FIXED = tuple(f"sample.{name}" for name in _DRAWN_BY)
_ON = ("method", ("ddpo", "dpo"))
_DDPO = ("method", ("ddpo",))


@dataclass(frozen=True)
class Reward(Section):
    """Training on a reward of drawn images (`tasks/rewards.py`)."""

    method: Literal["none", "ddpo", "dpo"] = key("none", fixes={"ddpo": _FIXED, "dpo": _FIXED})
    # 'digit', 'ink', 'jpeg' or the dotted name of your own function
    source: str = key("digit", registered(REWARD_REGISTRY), used_if=_ON)
    # of DDPO: chains of one label, whose rewards are compared with each other
    group: int = key(8, at_least(2), used_if=_DDPO)
    updates: int = key(1, at_least(1), used_if=_DDPO)  # with chains of the same weights
    clip: float = key(1e-4, above(0), used_if=_DDPO)  # of the ratio, where updates > 1
    advantage_clip: float = key(5.0, above(0), used_if=_DDPO)
    kl: float = key(0.0, at_least(0), used_if=_DDPO)  # DPOK's β
    # logarithms of densities, and DPOK's divergence: the mean over dimensions, or their sum
    reduction: Literal["mean", "sum"] = key("mean", used_if=_DDPO)
    dpo_beta: float = key(5000.0, above(0), used_if=("method", ("dpo",)))

    def unused(self, name: str, c: Config) -> str:
        if name == "clip" and self.method == "ddpo" and self.updates == 1:
            return "updates"
        return super().unused(name, c)

    def check(self, c: Config) -> None:
        given = (name for name, value in vars(Reward()).items() if getattr(self, name) != value)
        check_used(c, (f"reward.{name}" for name in given))


def is_rewarded(c: Config) -> bool:
    """Whether a recipe trains on a reward."""
    return bool(c.reward.method != "none")


# ---- rewards


def digit_reward(images: jax.Array, label: jax.Array) -> jax.Array:
    """The log-probability of the label by `DigitsConvNet`, which never judges -> f32[B]."""
    network, params = shipped_classifier("digits_convnet")
    apply: Callable[..., Any] = network.apply
    logits = apply({"params": params}, digit_images(images)).logits
    return jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]


def ink_reward(images: jax.Array, label: jax.Array) -> jax.Array:
    """The mean brightness of an image, in [-1, 1]."""
    return images.mean((1, 2, 3))


# The quantisation of luminance in JPEG's standard, ITU-T T.81 Table K.1.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


def jpeg_reward(images: jax.Array, label: jax.Array) -> jax.Array:
    """Minus the bits of JPEG's quantised coefficients a pixel, in grey: compressibility.

    log2(1 + |q|) of each, without the entropy code. An image is padded to blocks of 8x8 by its
    border.
    """
    grey = 127.5 * images.mean(-1)
    B, H, W = grey.shape
    grey = jnp.pad(grey, ((0, 0), (0, -H % 8), (0, -W % 8)), mode="edge")
    k, x = np.arange(8)[:, None], np.arange(8)
    basis = 0.5 * np.cos((2 * x + 1) * k * np.pi / 16) * np.where(k == 0, 0.5**0.5, 1.0)
    dct = jnp.asarray(basis, jnp.float32)
    blocks = grey.reshape(B, grey.shape[1] // 8, 8, grey.shape[2] // 8, 8)
    found = jnp.einsum("ki,brisj,lj->brskl", dct, blocks, dct)
    steps = jnp.asarray(_LUMINANCE[None, None, None], jnp.float32)
    bits = jnp.log2(1 + jnp.abs(jnp.rint(found / steps)))
    return -bits.sum((1, 2, 3, 4)) / (H * W)


# config.reward.source -> the reward
REWARDS: dict[str, RewardFunction] = {
    "digit": digit_reward,
    "ink": ink_reward,
    "jpeg": jpeg_reward,
}
# The shipped networks that rewards are made of, and features that are measured by the same.
_NETWORKS = {"digit": "digits_convnet"}
_MEASURED = {"digits": "digits_convnet", "scenes": "digits_convnet"}


# ---- in a task


class Policy(NamedTuple):
    """A recipe's network as what draws: the shape of an example, and its denoisers.

    `guided(params, labels)` is the one that samples are drawn by, `plain` that without guidance.
    """

    shape: tuple[int, ...]
    guided: Callable[[Any, jax.Array], Denoise]
    plain: Callable[[Any, jax.Array], Denoise]


def rewarded(c: Config, task: Task, policy: Policy) -> Task:
    """The task of a recipe, trained on the reward of what its network draws.

    Of a batch it reads the labels. `rollout` draws the images by the weights that the state holds;
    everything that is random is a function of the step's key, and so of (seed, step).
    """
    ddpo = c.reward.method == "ddpo"
    held = [f"{HELD}{c.reward.updates}"] if ddpo and c.reward.updates > 1 else []
    held += [AT_START] if not ddpo or c.reward.kl else []
    latent = ("autoencoder",) if c.latent else ()
    return task._replace(
        inputs={"label": task.inputs["label"]},
        prepare=lambda frozen, batch, key: {"label": batch["label"]},
        draw=functools.partial(_draw, c, policy.shape),
        rollout=_chain_rollout(c, task, policy) if ddpo else _pair_rollout(c, task, policy),
        loss=_ddpo_loss(c, task, policy) if ddpo else _dpo_loss(c, task, policy),
        holds=tuple(held),
        shapes=lambda: {"autoencoder": autoencoder.frozen_shapes(c)} if c.latent else {},
        reads=tuple(dict.fromkeys((*task.reads, *latent))),
        open_rows=lambda: _note(c),
    )


def _note(c: Config) -> Additions:
    """Print what is circular in the recipe's scores."""
    network = _NETWORKS.get(c.reward.source)
    if network and network == _MEASURED.get(c.evaluate.features) and is_primary():
        print(
            f"note: distances are measured with {network}, the network of the reward: they are"
            " circular. Accuracy is not, which digits_mixer judges",
            file=sys.stderr,
        )
    return Additions()


def _draw(c: Config, shape: tuple[int, ...], batch: Batch, key: jax.Array) -> Batch:
    """Draw a key for each chain, or pair; time and noise of a pair's errors."""
    label = batch["label"]
    B = len(label)
    of_chains, of_times, of_noise = jax.random.split(key, 3)
    each = jax.vmap(jax.random.fold_in, (None, 0))(of_chains, jnp.arange(B))
    if c.reward.method == "ddpo":
        return {"y": jnp.repeat(label[:: c.reward.group], c.reward.group), "key": each}
    eps = jax.random.normal(of_noise, (B, *shape), jnp.float32)
    return {"y": label, "key": each, "eps": eps, **time_draw(c.diffusion)(of_times, B)}


def _rewards_of(c: Config, frozen: Frozen, x0: jax.Array, label: jax.Array) -> jax.Array:
    """The reward of drawn x0, as pixels in [-1, 1]."""
    x = autoencoder.decode_latents(c, frozen["autoencoder"], x0) if c.latent else x0
    function: RewardFunction = lookup(c.reward.source, REWARD_REGISTRY)
    return function(jnp.clip(x, -1, 1), label)


def _steps_of(c: Config, denoise: Denoise, x_T: jax.Array) -> Steps:
    sampler = sampler_of(c)
    assert sampler.steps is not None  # `check_reward`
    options = {"clip_x0": c.sample.clip_x0, **options_of(c)}
    return sampler.steps(denoise, objective_of(c), times_of(c), x_T, **options)


def _first(c: Config, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return objective_of(c).process.prior_std * samplers.initial_noise(keys, shape)


def _chain_rollout(c: Config, task: Task, policy: Policy) -> Callable[[Any, Frozen, Batch], Batch]:
    """Draw the chains of a step, their rewards and their advantages."""
    join, held = task.transform.join, f"{HELD}{c.reward.updates}"

    def rollout(trained: Any, frozen: Frozen, drawn: Batch) -> Batch:
        keys, label = drawn["key"], drawn["y"]
        params = join(frozen.get("base"), frozen.get(held, trained))
        x_T = _first(c, keys, policy.shape)
        steps = _steps_of(c, policy.guided(params, label), x_T)
        found = chains.draw_chains(steps, x_T, samplers.per_sample_noise(keys, policy.shape))
        reward = _rewards_of(c, frozen, found.x[:, -1], label)
        advantage = chains.advantages(reward, c.reward.group, c.reward.advantage_clip)
        return {"y": label, "reward": reward, "advantage": advantage, **found._asdict()}

    return rollout


def _ddpo_loss(
    c: Config, task: Task, policy: Policy
) -> Callable[[Any, Frozen, Batch], tuple[jax.Array, Metrics]]:
    """Build DDPO's surrogate and DPOK's penalty, the mean over chains and steps.

    The steps are taken one after another, and each is computed again in the backward pass: only
    one step's activations are in memory.
    """
    join, r = task.transform.join, c.reward

    def loss(trained: Any, frozen: Frozen, batch: Batch) -> tuple[jax.Array, Metrics]:
        found = Chains(batch["x"], batch["mean"])
        label, advantage, base = batch["y"], batch["advantage"], frozen.get("base")
        x = found.x.swapaxes(0, 1)

        def steps_of(trained: Any) -> Steps:
            return _steps_of(c, policy.guided(join(base, trained), label), x[0])

        steps = steps_of(trained)
        reference = steps_of(frozen[AT_START]) if r.kl else None
        sigmas = jnp.asarray(chains.deviations(steps), jnp.float32)

        @jax.checkpoint
        def terms(step: tuple[Any, ...]) -> Metrics:
            x, x_next, old, row, sigma = step
            mean = chains.step_mean(steps, x, row)
            # With one update these are the weights that drew: the ratio is 1, to the bit.
            old = old if r.updates > 1 else jax.lax.stop_gradient(mean)
            ratio = chains.log_ratio(x_next, mean, old, sigma, r.reduction)
            surrogate = chains.clipped_surrogate(ratio, advantage, r.clip)
            metrics = {"surrogate": surrogate.mean()}
            if r.updates > 1:
                clipped = jnp.abs(jnp.expm1(ratio)) > r.clip
                metrics["clipped"] = clipped.astype(jnp.float32).mean()
            if reference is not None:
                other = jax.lax.stop_gradient(chains.step_mean(reference, x, row))
                metrics["kl"] = chains.step_divergence(mean, other, sigma, r.reduction).mean()
            return metrics

        along = (x[:-1], x[1:], found.mean.swapaxes(0, 1), steps.rows, sigmas)
        _, each = jax.lax.scan(lambda carry, step: (carry, terms(step)), None, along)
        means = {name: value.mean() for name, value in each.items()}
        total = means["surrogate"] + (r.kl * means["kl"] if r.kl else 0.0)
        return total, {**means, "reward": batch["reward"].mean()}

    return loss


def _pair_rollout(c: Config, task: Task, policy: Policy) -> Callable[[Any, Frozen, Batch], Batch]:
    """Draw two images of each label by the weights at the start; the better one comes first."""
    join = task.transform.join
    options = {"clip_x0": c.sample.clip_x0, **options_of(c)}

    def rollout(trained: Any, frozen: Frozen, drawn: Batch) -> Batch:
        label, shape = drawn["y"], policy.shape
        denoise = policy.guided(join(frozen.get("base"), frozen[AT_START]), label)

        def one(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise = samplers.per_sample_noise(keys, shape)
            x0 = sampler_of(c).solve(
                denoise, objective_of(c), times_of(c), _first(c, keys, shape), noise, **options
            )
            return x0, _rewards_of(c, frozen, x0, label)

        pairs = jax.vmap(jax.random.split)(drawn["key"])
        (x, reward), (y, other) = one(pairs[:, 0]), one(pairs[:, 1])
        first = (reward >= other).reshape(-1, *(1,) * len(shape))
        return {
            **{name: value for name, value in drawn.items() if name != "key"},
            "preferred": jnp.where(first, x, y),
            "other": jnp.where(first, y, x),
            "reward": 0.5 * (reward + other),
            "gap": jnp.abs(reward - other),
        }

    return rollout


def _dpo_loss(
    c: Config, task: Task, policy: Policy
) -> Callable[[Any, Frozen, Batch], tuple[jax.Array, Metrics]]:
    """Build Diffusion-DPO's loss of the pairs, whose labels are not dropped."""
    join, objective = task.transform.join, objective_of(c)

    def loss(trained: Any, frozen: Frozen, batch: Batch) -> tuple[jax.Array, Metrics]:
        label, t, eps = batch["y"], batch["t"], batch["eps"]

        def errors(trained: Any) -> tuple[jax.Array, jax.Array]:
            denoise = policy.plain(join(frozen.get("base"), trained), label)
            preferred, other = (
                simple_loss(objective, denoise, batch[name], t, eps)["mse"]
                for name in ("preferred", "other")
            )
            return preferred, other

        ours, reference = errors(trained), errors(frozen[AT_START])
        found = chains.preference_loss(*ours, *reference, c.reward.dpo_beta)
        agrees = (ours[0] - ours[1]) < (reference[0] - reference[1])
        return found.mean(), {
            "reward": batch["reward"].mean(),
            "reward_gap": batch["gap"].mean(),
            "agreement": agrees.astype(jnp.float32).mean(),
        }

    return loss


def with_reward_cost(c: Config, cost: NetworkCost, evaluations: int) -> NetworkCost:
    """The cost of a step on a reward, for one label of the batch.

    `evaluations` are those of one sample. DDPO draws with them, differentiates them, and compares
    them with the reference if there is a penalty; DPO draws two samples, and evaluates each at one
    time by both weights.
    """
    if c.reward.method == "dpo":
        return cost._replace(passes=2.0 * evaluations + 2 * (3 + 1), drawn=2.0 * evaluations)
    passes = evaluations * (1 + 3 + bool(c.reward.kl))
    again = evaluations * (cost.macs + cost.training_macs)  # `jax.checkpoint`
    drawn = float(evaluations)
    return cost._replace(passes=float(passes), training_macs=again, drawn=drawn)


# ---- refusals


def check_reward(c: Config, inputs: Inputs) -> None:
    """Raise UserError for a reward that does not go with the rest of the recipe."""
    if not is_rewarded(c):
        return
    r, s = c.reward, c.sample
    said = f"config.reward.method is {r.method!r}"
    refused = {
        "adapt.base": ("" if c.adapt.base else "''", "the weights to start from"),
        "adapt.kind": (repr(c.adapt.kind) * (c.adapt.kind == "control"), "no control branch"),
        "align.teacher": (repr(c.align.teacher) * (c.align.teacher != "none"), "'none'"),
        "sample.guide": (repr(s.guide) * bool(s.guide), "no second network"),
        "sample.apg_momentum": (str(s.apg_momentum) * bool(s.apg_momentum), "0"),
        "diffusion.loss": (repr(c.diffusion.loss) * inputs.interval, "a loss of one time"),
    }
    for name, (came, expected) in refused.items():
        if came:
            raise UserError(f"{said} and config.{name} {came}: expected {expected}.")
    if r.method == "ddpo":
        _check_chains(c, inputs, said)
    elif sampler_of(c).adaptive or sampler_of(c).interval:
        raise UserError(
            f"{said} and config.sample.sampler {s.sampler!r}: expected a sampler of fixed steps,"
            " such as 'ddim'."
        )
    size, channels = c.data.image_size, c.data.channels
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    source = f"config.reward.source is {r.source!r}"
    try:
        function = lookup(r.source, REWARD_REGISTRY)
        found = jax.eval_shape(function, images, jax.ShapeDtypeStruct((2,), jnp.int32))
    except Exception as error:  # the user's own function may fail in any way
        raise UserError(
            f"{source}, which fails for images of {size}x{size}x{channels}: {reason(error)}"
        ) from None
    if getattr(found, "shape", None) != (2,):
        raise UserError(f"{source}: expected a function of (images, labels) that returns f32[B].")


def _check_chains(c: Config, inputs: Inputs, said: str) -> None:
    r, s = c.reward, c.sample
    if c.train.batch_size % r.group:
        raise UserError(
            f"config.reward.group is {r.group} and config.train.batch_size {c.train.batch_size}:"
            " expected a batch of whole groups."
        )
    if r.updates > 1 and c.model.dtype != "float32":
        raise UserError(
            f"config.reward.updates is {r.updates} and config.model.dtype {c.model.dtype!r}, which"
            " rounds away what the clip compares: set dtype to 'float32', or updates to 1."
        )

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.zeros((*x.shape[:-1], inputs.out_channels))

    try:
        if sampler_of(c).steps is None:
            raise UserError("it has no steps of its own")
        chains.deviations(_steps_of(c, denoise, jnp.zeros((1, *inputs.shape))))
    except UserError:
        raise UserError(
            f"{said}, and config.sample.sampler {s.sampler!r} with eta {s.eta} and"
            f" config.diffusion.variance {c.diffusion.variance!r}: each step needs noise of a known"
            " variance; set sampler to 'ddim' and eta to 1, or sampler to 'ddpm' and variance to"
            " 'fixed_small'."
        ) from None
