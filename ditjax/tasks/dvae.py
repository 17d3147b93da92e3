"""The discrete VAE of DALL·E: its training by the Gumbel relaxation, and its use, frozen."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ditjax.config import Config, Section, above, at_least, at_most, key, network_module, positive
from ditjax.errors import UserError
from ditjax.models.dvae import (
    DvaeConfig,
    dvae_config,
    kl_to_uniform,
    laplace_nll,
    normal_nll,
    relaxed_codes,
    unmapped_pixels,
)
from ditjax.parallel import rules
from ditjax.runs import rundir
from ditjax.tasks.autoencoder import check_reconstructs, image_inputs, psnr_db
from ditjax.tasks.opened import Opened, check_channels, opened_run
from ditjax.training.step import Batch, Metrics
from ditjax.training.task import Definition, Frozen, Task, ValidationScore
from ditjax.weights.dvae import load_dvae


@dataclass(frozen=True)
class Dvae(Section):
    """The loss of a discrete VAE and its two schedules; the defaults are the paper's (App. A.2)."""

    kl_weight: float = key(6.6, at_least(0))  # β at its end; both terms are per pixel and channel
    kl_steps: int = positive(5_000)  # until then it rises from 0
    tau_end: float = key(0.0625, above(0), at_most(1))  # the temperature at its end
    tau_steps: int = positive(150_000)  # until then it falls from 1
    normal_std: float = key(0.0, at_least(0))  # of a normal likelihood; 0: the paper's


def cosine_between(first: float, last: float, steps: int, step: jax.Array) -> jax.Array:
    """A half cosine from `first` at step 0 to `last` at `steps` and after: f32[]."""
    done = jnp.minimum(step.astype(jnp.float32) / steps, 1)
    return last + (first - last) * 0.5 * (1 + jnp.cos(np.float32(np.pi) * done))


def make(c: Config, mesh: Mesh | None = None) -> Task:
    """Build the task that trains a discrete VAE; its mesh may only split the data."""
    if mesh is not None:
        rules.check_data_only(mesh, "the discrete VAE")
    module = network_module(c.model.kind).NETWORK.module(c.model, c.data.channels)
    apply: Callable[..., Any] = module.apply
    config, k = dvae_config(c.model, c.data.channels), c.dvae

    def draw(batch: Batch, key: jax.Array) -> Batch:
        """Draw the Gumbel noise of every code at every place."""
        x0, f = batch["x0"], config.downsample
        shape = (len(x0), x0.shape[1] // f, x0.shape[2] // f, config.codes)
        return {"x0": x0, "gumbel": jax.random.gumbel(key, shape, jnp.float32)}

    def anneal(drawn: Batch, step: jax.Array) -> Batch:
        """Add the temperature and the weight of the KL at a step, for every example."""
        now = {
            "temperature": cosine_between(1.0, k.tau_end, k.tau_steps, step),
            "kl_weight": cosine_between(0.0, k.kl_weight, k.kl_steps, step),
        }
        every = (len(drawn["x0"]),)
        return {**drawn, **{name: jnp.broadcast_to(value, every) for name, value in now.items()}}

    def loss(params: Any, frozen: Frozen, drawn: Batch) -> tuple[jax.Array, Metrics]:
        """Ramesh et al. 2021 Eq. 1, negated: recon + β KL(q || uniform), per pixel and channel.

        recon is -ln p(x) of the logit-Laplace, or of the normal one with `normal_std`.
        `kl_share` is the KL over its largest value: at 1 every place has one code, whatever the
        image, if it is always the same; 0 are uniform codes.
        """
        x0 = drawn["x0"]
        logits = apply(params, x0, method="logits")
        z = relaxed_codes(logits, drawn["gumbel"], drawn["temperature"])
        p = apply(params, z, method="decode")
        kl = kl_to_uniform(logits)
        recon = normal_nll(x0, p, k.normal_std) if k.normal_std else laplace_nll(x0, p)
        nll, per_value = recon.mean(), kl.sum((1, 2)) / x0[0].size
        total = nll + (drawn["kl_weight"] * per_value).mean()
        shown = jnp.clip(unmapped_pixels(jax.nn.sigmoid(p.location)), -1, 1)
        metrics = {
            "nll": nll,
            "kl_share": kl.mean() / np.log(config.codes).astype(np.float32),
            "relaxed_psnr_db": psnr_db(jnp.square(shown - x0).mean()),
            "temperature": drawn["temperature"].mean(),
        }
        return total, metrics

    image = image_inputs(c)
    return Task(
        name=f"dVAE-{config.codes} (f={config.downsample})",
        inputs=image,
        init=lambda key: module.init(key, jnp.zeros((1, *image["x0"].shape))),
        prepare=lambda frozen, batch, key: {"x0": batch["image"], "label": batch["label"]},
        draw=draw,
        anneal=anneal,
        loss=loss,
        scores=(_score(c, apply, config),),
    )


def _score(c: Config, apply: Callable[..., Any], config: DvaeConfig) -> ValidationScore:
    """PSNR of images decoded from their most probable codes, and how many codes are used."""

    def measure(params: Any, frozen: Frozen, keys: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """10 log10(2² / mse) dB: of all pixels, weighted by ink, and of the image's mean colour.

        Ink is the distance from the image's median colour: a plain background flatters the first.
        """
        x = batch["image"]
        codes = apply(params, x, method="codes")
        decoded = apply(params, codes, method="images")
        error = jnp.square(decoded - x)
        median = jnp.median(x, axis=(1, 2), keepdims=True)
        ink = jnp.abs(x - median).max(-1, keepdims=True) + np.float32(1e-6)
        ink = ink / ink.mean((1, 2), keepdims=True)
        flat = jnp.square(x - x.mean((1, 2), keepdims=True))
        found = {"psnr_db": error, "psnr_ink_db": ink * error, "psnr_mean_colour_db": flat}
        means = {name: psnr_db(each.mean((1, 2, 3))) for name, each in found.items()}
        return {**means, "codes": codes, "images": decoded}

    def summary(measured: Mapping[str, np.ndarray]) -> dict[str, float]:
        codes = measured["codes"].astype(np.int64)
        bits = {"neighbour_bits": neighbour_bits(codes, config.codes)}
        return code_use(codes, config.codes) | bits

    names = ("psnr_db", "psnr_ink_db", "psnr_mean_colour_db")
    return ValidationScore(
        measure,
        names={name: name for name in names},
        protocol={
            "metric": "PSNR of hard codes",
            "split": c.evaluate.split,
            "image_size": c.data.image_size,
        },
        summary=summary,
        images="images",
    )


def code_use(codes: np.ndarray, count: int) -> dict[str, float]:
    """How many of `count` codes are used at all, and the exponential of the entropy of their use.

    codes: i[...].
    """
    share = np.bincount(codes.reshape(-1), minlength=count) / codes.size
    seen = share[share > 0]
    return {
        "codes_used": float(len(seen)),
        "code_perplexity": float(np.exp(-(seen * np.log(seen)).sum())),
    }


def neighbour_bits(codes: np.ndarray, count: int, prior: float = 0.02) -> float:
    """Mean -log2 p of a code given those to its left and above, by counts: codes i[N,h,w].

    Counted on the first half of the images, with `prior` added to each count, and measured on the
    second: what a transformer over these codes has to beat.
    """
    outside = np.pad(codes, ((0, 0), (1, 0), (1, 0)), constant_values=count)
    pairs = outside[:, 1:, :-1] * (count + 1) + outside[:, :-1, 1:]
    half = len(codes) // 2
    triples = (pairs * count + codes).reshape(len(codes), -1)
    seen = [np.unique(each[:half], return_counts=True) for each in (triples, pairs)]

    def counted(which: int, values: np.ndarray) -> np.ndarray:
        known, counts = seen[which]
        at = np.minimum(np.searchsorted(known, values), len(known) - 1)
        return np.where(known[at] == values, counts[at], 0)

    of_code = counted(0, triples[half:].reshape(-1)) + prior
    of_pair = counted(1, pairs[half:].reshape(-1)) + prior * count
    return float(-np.log2(of_code / of_pair).mean())


def check(c: Config) -> None:
    """Raise UserError for data or settings that this task does not support."""
    check_reconstructs(c)
    if c.data.image_size % c.model.stride:
        raise UserError(
            f"config.data.image_size is {c.data.image_size}: {c.model.groups} groups need a"
            f" multiple of {c.model.stride}."
        )
    if c.model.width % 4:
        raise UserError(
            f"config.model.width is {c.model.width}: the inner width of a block is a quarter of it;"
            " expected a multiple of 4."
        )


TASK = Definition(make=make, network="dvae", sections={"dvae": Dvae}, check=check)


# ---- the frozen discrete VAE of other tasks


def open_dvae(path: str | os.PathLike[str], key_name: str, channels: int) -> Opened:
    """The discrete VAE of a run, or of a folder of published weights (`weights/dvae.py`).

    `key_name` is the key of the recipe that names it. Raises UserError for another network.
    """
    if rundir.is_run(path):
        found = opened_run(path, key_name, "dvae")
        config = dvae_config(found.recipe.model, found.recipe.data.channels)
        opened = found._replace(config=config)
    else:
        loaded = load_dvae(path)
        opened = Opened(loaded.config, lambda mesh: {"params": loaded.params}, loaded.account)
    check_channels(path, opened.config.image_channels, channels)
    return opened
