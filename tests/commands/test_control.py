"""A control by command: trained from a run, drawn with images and scored with records."""

import dataclasses
import json
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from ditjax import convert, evaluate, sample, train
from ditjax.config import replaced
from ditjax.data import records
from ditjax.data.crop import normalize
from ditjax.data.maps import ink_map
from ditjax.errors import UserError
from ditjax.files.npz import load_array
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.sampling import given
from ditjax.sampling.draw import Drawn
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks.guide import guide_recipe
from tests.commands.conftest import TINY

SHORT = (*TINY, "--config.train.steps=4", "--config.train.checkpoint_every_steps=2")
CONTROL = (
    "--config.adapt.kind=control",
    "--config.control.blocks=1",
    "--config.control.source=ink",
)
LARGE = ("--config.optim.learning_rate=0.1", "--config.train.ema_decay=0.1")


@pytest.fixture(scope="module")
def controlled(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("control")
    words = [*SHORT, *CONTROL, *LARGE]
    assert train.main([*words, f"--config.adapt.base={finished}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def pipeline(controlled):
    return Pipeline.from_pretrained(controlled)


def image(value=255):
    x = np.zeros((8, 8), np.uint8)
    x[2:6, 3:5] = value
    return x


def drawn(pipeline, **options):
    return pipeline([3], num=4, seed=1, quiet=True, **options).array


def test_an_image_controls_samples_and_several_runs_add_up(controlled, pipeline, tmp_path):
    one = drawn(pipeline, control=image())
    assert (one != drawn(pipeline, control=image(0))).any()
    Image.fromarray(image()).save(tmp_path / "map.png")
    words = [f"--workdir={controlled}", "--classes=3", "--num=4", "--seed=1", f"--out={tmp_path}"]
    words += ["--batch_size=8", "--config.model.matmul=float32"]
    assert sample.main([*words, f"--control={tmp_path / 'map.png'}"]) == 0
    np.testing.assert_array_equal(load_array(tmp_path / "samples.npz", "arr_0"), one)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["control"]["scale"] == [1.0]
    assert len(record["protocol"]["control_images"][0]) == 64
    # The same control twice at half the scale is the control; its images may differ by sample.
    words += [f"--config.control.others=('{controlled}',)", "--config.control.scale=0.5"]
    both = ",".join([str(tmp_path / "map.png")] * 2)
    assert sample.main([*words, f"--control={both}"]) == 0
    again = load_array(tmp_path / "samples.npz", "arr_0").astype(int)
    assert np.abs(again - one).max() <= 1
    record = json.loads((tmp_path / "samples.json").read_text())
    assert len(record["protocol"]["control_others"]) == 1
    with pytest.raises(UserError, match=r"1 control image\(s\) for 2 control\(s\)"):
        sample.main([*words, f"--control={tmp_path / 'map.png'}"])


def test_each_sample_has_the_image_of_its_index(pipeline):
    several = np.stack([image(), image(0), image(), image(0)])[..., None]
    found = drawn(pipeline, control=several)
    np.testing.assert_array_equal(found[::2], drawn(pipeline, control=image())[::2])
    np.testing.assert_array_equal(found[1::2], drawn(pipeline, control=image(0))[1::2])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.zeros((9, 8), np.uint8), r"uint8\[9, 8\]: expected a control map .*\[8,8,1\]"),
        (np.zeros((8, 8, 3), np.uint8), "of mode 'L'"),
        (Image.new("P", (8, 8)), "of mode P"),
        (np.zeros((8, 8)), r"float64\[8, 8\]"),
        ("nowhere.png", "nowhere.png cannot be read"),
    ],
)
def test_an_image_of_another_size_or_mode_is_refused(pipeline, given, expected):
    with pytest.raises(UserError, match=expected):
        drawn(pipeline, control=given)


def test_evaluation_takes_condition_i_from_record_i(controlled, pipeline):
    # The pipeline's program, in two batches.
    words = [f"--workdir={controlled}", "--config.evaluate.num_samples=12"]
    words += ["--config.sample.batch_size=8", "--config.model.matmul=float32"]
    assert evaluate.main([*words, "--config.evaluate.guided_scale=0"]) == 0
    found = json.loads((controlled / "evaluation.json").read_text())
    assert {"control_f1", "control_f1_shuffled", "control_error"} <= found["metrics"].keys()
    protocol = found["protocol"]
    assert protocol["labels"] == "records"
    assert protocol["control_images"] == "digits/1.0.0/test"
    assert protocol["control"]["sources"] == ["ink"]
    # The same samples from the labels and the maps of records 0 to 3.
    digits = records.load_arrays("digits", "test", None, 8)
    first = load_array(controlled / "samples.npz", "arr_0")[:4].astype(int)
    own = pipeline(num=4, seed=0, quiet=True)
    np.testing.assert_array_equal(own.label, digits["label"][:4])
    assert np.abs(own.array - first).max() <= 1
    maps = [
        np.where(np.asarray(ink_map(normalize(x), jax.random.key(0))) > 0, 255, 0)
        for x in digits["image"][:4]
    ]
    again = pipeline(
        own.label.tolist(), seed=0, quiet=True, control=np.stack(maps).astype(np.uint8)
    )
    assert np.abs(again.array - first).max() <= 1


def test_grids_while_training_have_the_labels_of_the_records(controlled, tmp_path):
    class Recorder:
        mesh = make_mesh(-1, 1)

        def whole(self, c, params, num, **options):
            self.options = options
            return Drawn(0, np.zeros((num, 8, 8, 1), np.uint8), np.zeros(num, np.int32))

    drawer: Any = Recorder()
    log = mock.Mock()
    train._Grids(opening.recipe_of(controlled), drawer).save(None, 1, tmp_path, log)
    assert drawer.options["label_of"] is None
    assert drawer.options["given"].rows(np.arange(3))["image"].shape == (3, 8, 8, 1)


def test_what_a_control_cannot_do_is_said(controlled, finished, tmp_path):
    with pytest.raises(UserError, match="has no place in it"):
        convert.main([f"--weights={controlled}", "--to=ditjax", f"--out={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="the network has no control"):
        drawn(Pipeline.from_pretrained(finished), control=image())
    words = [f"--workdir={controlled}", f"--config.control.others=('{finished}',)"]
    with pytest.raises(UserError, match="which trains no control"):
        sample.main(words)


def test_controls_of_other_counts_are_not_paired(pipeline, monkeypatch):
    monkeypatch.setattr(given, "map_channels", lambda c: (1, 1))
    three, two = np.zeros((3, 8, 8, 1), np.uint8), np.ones((2, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="controls of 3 and 2 images: expected as many of each"):
        given.given_controls(pipeline.config, [three, two])
    rows = given.given_controls(pipeline.config, [three, two[:1]]).rows(np.arange(3))
    assert rows["beside"].channels.shape == (3, 8, 8, 2)


def test_a_run_of_a_control_is_no_guide(controlled, pipeline):
    c = pipeline.config
    guided = replaced(c, sample=dataclasses.replace(c.sample, guide=str(controlled)))
    with pytest.raises(UserError, match="a run of a control, and a guide is given no control"):
        guide_recipe(guided)
