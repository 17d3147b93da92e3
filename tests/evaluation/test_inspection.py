"""An instrument on a network that is given channels: it sees them, and nothing else changes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.diffusion.resampling import resized
from ditjax.errors import UserError
from ditjax.evaluation.analyses import words
from ditjax.evaluation.inspection import Examples, Instrument
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions, Taps
from ditjax.tasks import given, make_task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.tasks.objective import process_of
from ditjax.weights.networks import shapes_of
from tests.seeded import seeded_state

B, L, N = 3, 2, 4
RNG = np.random.default_rng(0)
IMAGE, EPS = (RNG.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32) for _ in range(2))
LABEL, T = jnp.arange(B), jnp.int32(300)
CONDITIONS = {"label": LABEL}
GIVEN: dict[str, dict[str, Any]] = {
    "low": {"kind": "low", "side": 4, "noise_most": 0.4, "noise": 0.1},
    "mask": {"kind": "mask"},
}


@functools.cache
def opened(kind):
    """(recipe, instrument, examples with what is given behind them, how many channels that is)."""
    c = read(load_recipe(["--config=digits:2x16x2/4"]))
    c = changed(c, {"given": GIVEN[kind]})
    inside: Any = make_task(c).inside
    params = unflatten(seeded_state(shapes_of(c), 1))
    nothing: Any = None
    images = (nothing, nothing, B, nothing, nothing, nothing)
    tool = Instrument(c, inside, {"params": params}, nothing, nothing, (), (), (1, 2), *images)
    keys = jax.random.split(jax.random.key(1), B)
    x0 = jax.jit(inside.x0)({}, jnp.asarray(IMAGE), keys)
    return c, tool, x0


@pytest.mark.parametrize("kind", GIVEN)
def test_examples_carry_what_samples_are_given(kind):
    c, tool, x0 = opened(kind)
    np.testing.assert_array_equal(tool.own(x0), IMAGE)
    channels = x0[..., 1:]
    assert channels.shape[-1] == given.extra_channels(c)
    if kind == "mask":
        np.testing.assert_array_equal(channels[..., 1:], channels[..., :1] * IMAGE)
        assert tool.inside.levels(B) is None
        return
    # α y + σ ε at a tenth of the noise, enlarged.
    np.testing.assert_array_equal(tool.inside.levels(B), np.full(B, 100))
    at = process_of(c.diffusion).at(np.array([100]))
    clean = resized(resized(jnp.asarray(IMAGE), 4, "area"), 8, "bicubic")
    rest = np.asarray(channels - float(at.alpha[0]) * clean)
    assert 0.3 < rest.std() / float(at.sigma[0]) < 1.2


def test_it_reads_the_network_on_them():
    """The prediction is the network's, of x noised and the channels as they are."""
    c, tool, x0 = opened("low")
    x_t = tool.noised(x0, jnp.asarray(EPS), T)
    np.testing.assert_array_equal(x_t[..., 1:], x0[..., 1:])
    out, taps = tool.observe(tool.params, x_t, CONDITIONS, T, "tokens")
    process = process_of(c.diffusion)
    x = process.noised(jnp.asarray(IMAGE), jnp.full(B, T), jnp.asarray(EPS))
    conditions = Conditions(label=LABEL, channels=x0[..., 1:], level=jnp.full(B, 100))
    expected: Any = denoiser_module(c).apply(tool.params, x, jnp.full(B, T), conditions)
    np.testing.assert_array_equal(out, expected[..., :1])
    np.testing.assert_array_equal(
        tool.through_lens(tool.params, taps.tokens[-1], x_t, CONDITIONS, T), out
    )
    assert (
        tool.x0_of(out, x_t, T).shape == tool.target(x0, jnp.asarray(EPS), T).shape == IMAGE.shape
    )


def test_a_patch_of_all_tokens_is_the_donors_prediction():
    """What is given enters by the tokens alone: the donor's carry its channels, too."""
    _, tool, x0 = opened("low")
    donor = jnp.concatenate([x0[..., :1], x0[::-1, ..., 1:]], axis=-1)
    x_t, other = (tool.noised(each, jnp.asarray(EPS), T) for each in (x0, donor))
    out, taps = tool.observe(tool.params, other, CONDITIONS, T, "tokens")
    plain, _ = tool.observe(tool.params, x_t, CONDITIONS, T)
    mask = jnp.zeros((L, 1, N), bool).at[0].set(True)
    found = tool.patched(tool.params, x_t, CONDITIONS, T, mask, taps.tokens)
    np.testing.assert_array_equal(found, out)
    assert np.abs(plain - out).max() > 1e-3


def test_what_says_nothing_is_the_null_label_and_no_vector():
    _, tool, x0 = opened("mask")
    beside = {"context": np.ones((B, 2, 3)), "vector": np.ones((B, 4))}
    examples = Examples(IMAGE, np.arange(B), np.asarray(x0), EPS, beside)
    found = tool.null_conditions(examples)
    np.testing.assert_array_equal(found["label"], np.full(B, 10))
    np.testing.assert_array_equal(found["context"], beside["context"])  # the label drops it
    assert not found["vector"].any()
    assert examples.conditions["vector"].all()


# ---- words


SAID = np.array(["red", "the", ""])  # the last token ends the text


class Planted:
    """An instrument on a network whose 'red' is at what is shown, and 'the' at the last token, too.

    Blocks 1 and 2 do so; of image k, a square of 2 x 2 of 4 x 4 tokens is shown at place k.
    """

    shares, times, middle, blocks, taken = (0.5,), (np.float32(0.5),), 0, (1, 2), np.arange(2)
    params: Any = None

    def __init__(self):
        rows = []
        for k in range(6):
            image = np.full((16, 16, 3), -1, np.float32)
            top, left = 4 * (k % 3), 4 * (k // 3)
            image[top : top + 8, left : left + 8] = 1
            rows.append(image)
        image = np.stack(rows)
        beside = {"context": np.zeros((6, 3, 1)), "context_mask": np.tile([1, 1, 1], (6, 1))}
        pieces = [list(SAID)] * 6
        each = Examples(image, np.arange(6), image, np.zeros_like(image), beside, pieces)
        self.fit, self.held = each, each
        self.inside = type("Inside", (), {"grid": (4, 4), "pieces": lambda ids: ids})

    def noised(self, x0, eps, t):
        return x0 + 0 * eps * t

    def over(self, program, rows, *args):
        return jax.tree.map(np.asarray, program(*rows, *args))

    def at(self, index, **values):
        return {"share": self.shares[index], **values}

    def observe(self, params, x_t, conditions, t, *wanted):
        assert wanted == ("crossed",)
        shown = x_t.reshape(len(x_t), 4, 4, 4, 4, 3).mean((2, 4, 5)).reshape(len(x_t), 16) > 0
        red = jnp.where(shown, 0.5, 0.2)
        the = jnp.where(shown, 0.06, 0.01).at[:, 15].set(0.2)
        weights = jnp.stack([red, the, 1 - red - the], axis=-1)
        return None, Taps(crossed=jnp.broadcast_to(weights[None, :, None], (2, 6, 2, 16, 3)))


def test_a_word_that_looks_at_what_is_shown_overlaps_with_it():
    planted: Any = Planted()
    found = words(planted)
    rows = found.tables["words"]
    of_word = {row["word"]: row for row in rows if row["kind"] == "word"}
    assert set(of_word) == {"red", "the"}, "what ends a text is no word"
    assert of_word["red"]["images"] == 6
    # The best threshold of 'red' would leave nothing but the last token of 'the'.
    assert of_word["red"]["iou"] == 1
    assert of_word["the"]["iou"] == pytest.approx(4 / 5)
    inside = (4 * 0.5 / 4.4, 4 * 0.06 / 0.55)
    assert of_word["red"]["inside"] == pytest.approx(inside[0])
    of_kind = {row["kind"]: row for row in rows if row["kind"] != "block"}
    assert of_kind["map"]["iou"] == pytest.approx((1 + 4 / 5) / 2)
    assert of_kind["uniform"]["inside"] == 1 / 4
    # A map for all images cannot follow the square.
    assert 1 / 4 < of_kind["same map"]["iou"] < 0.5
    assert 1 / 4 <= of_kind["centre"]["iou"] < 0.5
    blocks = [row["inside"] for row in rows if row["kind"] == "block"]
    assert blocks == pytest.approx([sum(inside) / 2] * 2)
    assert found.pictures["words"].shape == (6, 3, 4, 4)
    assert [row["word"] for row in found.tables["words_pictured"][:2]] == ["red", "the"]


def test_words_need_a_text():
    planted: Any = Planted()
    planted.inside = type("Inside", (), {"grid": (4, 4), "pieces": None})
    with pytest.raises(UserError, match="no tokens of a text: leave 'words' out"):
        words(planted)
