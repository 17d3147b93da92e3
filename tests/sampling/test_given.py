"""Edits by networks that were trained to make them, and cascades of such networks."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditjax import sample
from ditjax.config import changed
from ditjax.errors import UserError
from ditjax.sampling.cascade import Cascade, Upsampler, parse_upsamplers
from ditjax.sampling.pipeline import Pipeline
from tests.sampling.test_editing import weights

RNG = np.random.default_rng(0)
LOW = RNG.integers(0, 256, (3, 4, 4, 1), np.uint8)
IMAGE = RNG.integers(0, 256, (8, 8, 1), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[4:] = 255
FAST: dict[str, Any] = {"steps": "ddim2", "sampler": "ddim", "quiet": True}
NOISY = {"kind": "low", "side": 4, "noise_most": 0.4, "noise": 0.1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    small = {"data": {"image_size": 4, "channels": 1, "num_classes": 10}}
    return {
        "base": weights(folder / "base.safetensors", **small),
        "low": weights(folder / "low.safetensors", given=NOISY),
        "plain": weights(folder / "plain.safetensors", sample={"sampler": "ddim"}),
        "mask": weights(folder / "mask.safetensors", given={"kind": "mask"}),
    }


@pytest.fixture(scope="module")
def upsampler(files):
    return Pipeline.from_pretrained(files["low"])


@pytest.fixture(scope="module")
def enlarged(upsampler):
    return upsampler.upscale(LOW, [3], seed=1, **FAST)


def test_a_trained_network_enlarges(upsampler, enlarged):
    assert enlarged.array.shape == (3, 8, 8, 1)
    assert enlarged.record["edit"]["method"] == "trained"
    assert enlarged.record["given"]["kernels"] == ["area", "bicubic"]
    # Of its own image, in any batch.
    other = upsampler.upscale(LOW[[0, 0, 2, 1]], [3], seed=1, batch_size=8, **FAST)
    np.testing.assert_array_equal(other.array[[0, 2]], enlarged.array[[0, 2]])
    assert (other.array[1] != enlarged.array[1]).any()


def test_the_noise_of_what_is_given_is_of_the_sample(upsampler, enlarged):
    more = Pipeline(upsampler._source, changed(upsampler.config, {"given": {"noise": 0.4}}))
    assert (more.upscale(LOW, [3], seed=1, **FAST).array != enlarged.array).any()
    assert (upsampler.upscale(LOW, [3], seed=2, **FAST).array != enlarged.array).any()


def test_a_trained_network_completes_and_sees_no_hole(files):
    pipeline = Pipeline.from_pretrained(files["mask"])
    changed_hole = np.where(MASK[..., None] > 0, 255 - IMAGE, IMAGE)
    found = [pipeline.inpaint(each, MASK, [3], **FAST).array for each in (IMAGE, changed_hole)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0][0, :4], IMAGE[:4])
    other = np.concatenate([255 - IMAGE[:4], IMAGE[4:]])
    assert (pipeline.inpaint(other, MASK, [3], **FAST).array[0, 4:] != found[0][0, 4:]).any()
    with pytest.raises(UserError, match="'mask', whose network completes them: --edit=inpaint"):
        pipeline.upscale(LOW, [3], **FAST)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda p: p.upscale(LOW[:, :2, :2], [3], **FAST),
            "image of 2x2 to enlarge, and .* 4x4",
        ),
        (lambda p: p.inpaint(IMAGE, MASK, [3], **FAST), "'low', whose network enlarges images"),
        (lambda p: p.denoise(IMAGE, 20.0, cfg_scale=1.0), r"edit\.sigma has no effect: .*given"),
        (lambda p: p.upscale(LOW, method="ddnm", **FAST), r"edit\.method has no effect: .*given"),
        (lambda p: p(num=1, control=IMAGE, **FAST), "the network has no control"),
    ],
)
def test_what_a_trained_network_does_not_do(upsampler, edit, words):
    with pytest.raises(UserError, match=words):
        edit(upsampler)


def test_a_cascade_enlarges_what_its_base_draws(files, upsampler):
    base = Pipeline.from_pretrained(files["base"])
    cascade = Cascade(base, [Upsampler(str(files["low"]), 0.2)])
    below, above = cascade([3, 4], seed=7, **FAST)
    assert (below.array.shape, above.array.shape) == ((2, 4, 4, 1), (2, 8, 8, 1))
    np.testing.assert_array_equal(above.label, [3, 4])
    stage = cascade.stages[1]
    assert stage.config.given.noise == 0.2
    again = stage.upscale(below.array, [3, 4], seed=8, quiet=True)
    np.testing.assert_array_equal(again.array, above.array)


def test_stages_follow_one_another(files):
    base = Pipeline.from_pretrained(files["base"])
    with pytest.raises(UserError, match="to 8x8 from 4x4, and the stage below draws 8x8"):
        Cascade(base, [str(files["low"])] * 2)
    with pytest.raises(UserError, match=r"whose steps need noise, .*eta is 0\.0"):
        Cascade(base, [str(files["plain"])])
    with pytest.raises(UserError, match=r"noise is 0\.9 and .* no more noise"):
        Cascade(base, [Upsampler(str(files["low"]), 0.9)])
    assert parse_upsamplers("a,b:0.25,c:/d") == (
        Upsampler("a"),
        Upsampler("b", 0.25),
        Upsampler("c:/d"),
    )


def test_the_command_draws_a_cascade(files, tmp_path):
    words = [f"--weights={files['base']}", f"--upsample={files['low']}:0.2", "--num=3"]
    words += [f"--out={tmp_path}", "--classes=3", "--steps=2", "--cfg_scale=1"]
    assert sample.main(words) == 0
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 1)
    with np.load(tmp_path / "stage0.npz") as archive:
        assert archive["arr_0"].shape == (3, 4, 4, 1)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert [each["image_size"] for each in record["stages"]] == [4, 8]
    below = record["protocol"]["edit"]["of"]
    assert below["sampling"]["image_size"] == 4
    assert below["model"]["params_sha256"] != record["stages"][1]["weights"]["sha256"]
    assert record["protocol"]["given"]["noise"] == 0.2
    assert Image.open(tmp_path / "samples.png").size[0] >= 24
