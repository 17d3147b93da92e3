"""Captions that a captioner writes, in the place of the data set's (Betker et al. 2023, Sec. 3).

A share of the records are given them in training, the others keep their own: prompts of people are
like these. A record's caption is written when it is first read, once in a process. Which records
are chosen, and what is written, follows from the run's seed and a record's number.
"""

import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.config import Config
from ditjax.data.tokenizers import open_tokenizer
from ditjax.parallel.mesh import make_mesh
from ditjax.parallel.processes import is_primary, padded
from ditjax.runs import opening
from ditjax.tasks.captioner import image_states, written_captions
from ditjax.tasks.clip import open_clip
from ditjax.tasks.opened import Opened, check_trained_alike, opened_run
from ditjax.training import keys
from ditjax.training.task import Additions


def _captioner_of(c: Config) -> Opened:
    """The captioner of a recipe. Raises UserError for other texts or images than its."""
    opened = opened_run(c.text.captioner, "text.captioner", "captioner")
    names = ("text.tokenizer", "text.tokens", "data.image_size", "data.channels")
    check_trained_alike(c, opened.recipe, names, f"the captioner at {c.text.captioner}")
    return opened


def recaptions(c: Config) -> Additions:
    """What training does with the captions of the rows that it reads. Raises UserError."""
    if not c.text.captioner:
        return Additions()
    opened = _captioner_of(c)
    recipe = opened.recipe
    clip = open_clip(recipe, "captioner.clip")
    mesh = make_mesh(1, 1, jax.local_devices()[:1])
    weights, seen = opened.load(mesh), clip.load(mesh)
    pad = open_tokenizer(c.text.tokenizer).pad
    stream = keys.stream(c.seed, keys.CAPTION)

    @jax.jit
    def written(weights: object, seen: object, images: jax.Array, index: jax.Array) -> jax.Array:
        own = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(stream, 0), index)
        states = image_states(clip, seen, images)
        return written_captions(recipe, clip, weights, states, own, pad)

    @jax.jit
    def chosen(index: jax.Array) -> jax.Array:
        own = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(stream, 1), index)
        return jax.vmap(lambda key: jax.random.bernoulli(key, c.text.synthetic_share))(own)

    kept: dict[int, np.ndarray] = {}

    def add(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        index = np.asarray(rows["index"])
        picked = np.asarray(chosen(jnp.asarray(index)))
        new = np.array([i for i, at in enumerate(index) if picked[i] and int(at) not in kept], int)
        if len(new):
            given = (padded(each[new], len(index)) for each in (rows["image"], index))
            found = np.asarray(written(weights, seen, *map(jnp.asarray, given)))
            kept.update(zip(map(int, index[new]), found[: len(new)], strict=True))
        own = zip(rows["caption"], index, picked, strict=True)
        return {**rows, "caption": np.stack([kept[int(at)] if p else ids for ids, at, p in own])}

    if is_primary():
        print(
            f"text: a share of {c.text.synthetic_share:g} of the records is given captions that"
            f" {c.text.captioner} writes",
            file=sys.stderr,
        )
    digests = {"": opening.digest(weights), ".clip": opening.digest(seen)}
    return Additions(add, {f"text.captioner{end}": digest for end, digest in digests.items()})
