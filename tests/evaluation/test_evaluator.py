"""Sample sets that devices, batches and interruptions do not change, and what they are worth."""

import functools
import json
from typing import Any

import jax
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.data.names import Split
from ditjax.errors import UserError
from ditjax.evaluation import evaluator as evaluation
from ditjax.evaluation.classifiers import JUDGE, predict_class
from ditjax.evaluation.evaluator import Evaluator
from ditjax.files.atomic import protocol_hash
from ditjax.files.npz import load_array
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.draw import Drawer, decoder_of, draw_to
from ditjax.sampling.samples import SampleWriter
from ditjax.tasks import make_task
from ditjax.training.program import training

pytestmark = pytest.mark.usefixtures("own_data")
NUM = 100  # no multiple of a batch


@functools.cache
def recipe():
    words = (
        "--config=experiments/digits.py:1x32x2/4",
        "--config.model.unroll=1",
        "--config.train.evaluate_every_steps=0",
        "--config.sample.steps=ddim3",
        "--config.sample.batch_size=24",
        f"--config.evaluate.num_samples={NUM}",
        "--config.evaluate.guided_num=30",
        "--config.evaluate.val_loss_num=0",
    )
    return changed(read(load_recipe(words)), {"sample": {"num": NUM}})


def program(c):
    mesh = make_mesh(1, 1, jax.devices()[:1])
    return training(c, make_task(c, mesh), mesh)


@functools.cache
def params():
    """Far from the start, so that labels and guidance matter."""
    rng = np.random.default_rng(0)
    tree = program(recipe()).init().params
    return jax.tree.map(lambda x: np.float32(x + 0.2 * rng.normal(size=x.shape)), tree)


def drawn_to(path, *, devices=8, c=None, seed=0, provenance=None):
    c = c or recipe()
    drawer = Drawer(make_mesh(devices, 1, jax.devices()[:devices]), {})
    draw_to(path, drawer, c, params(), provenance or {"seed": seed}, seed=seed)
    return load_array(path, "arr_0"), load_array(path, "label")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return drawn_to(tmp_path_factory.mktemp("whole") / "x.npz")


def test_one_and_eight_devices_draw_the_same(whole, tmp_path):
    """To the last bit of the rounded image: 1/255 at most, where a float falls on an edge."""
    c = changed(recipe(), {"sample": {"batch_size": 17}})
    images, label = drawn_to(tmp_path / "x.npz", devices=1, c=c)
    assert images.shape == (NUM, 8, 8, 1)
    np.testing.assert_array_equal(label, whole[1])
    assert np.abs(images.astype(int) - whole[0]).max() <= 1
    assert (drawn_to(tmp_path / "y.npz", seed=1)[0] != whole[0]).any()


def test_cut_off_and_drawn_on(whole, tmp_path, monkeypatch):
    """None missing, none twice: what was on disk is not drawn again."""
    write, path = SampleWriter.write, tmp_path / "x.npz"
    seen: list[int] = []
    again: list[int] = []

    def failing(self, start, images, label=None):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(start)
        write(self, start, images, label)

    monkeypatch.setattr(SampleWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        drawn_to(path)
    assert not path.exists()

    def noting(self, start, images, label=None):
        again.append(start)
        write(self, start, images, label)

    monkeypatch.setattr(SampleWriter, "write", noting)
    images, label = drawn_to(path, c=changed(recipe(), {"sample": {"batch_size": 8}}))
    assert (seen, again) == ([0, 24], list(range(48, NUM, 8)))
    np.testing.assert_array_equal(images, whole[0])
    np.testing.assert_array_equal(label, whole[1])


def test_another_set_begun_gives_way(whole, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        patch.setattr(SampleWriter, "finish", lambda self: None)
        drawer = Drawer(make_mesh(8, 1), {})
        draw_to(path, drawer, recipe(), params(), {"seed": 5}, seed=5)
    np.testing.assert_array_equal(drawn_to(path)[0], whole[0])
    # And so does a whole one.
    assert (drawn_to(path, seed=5)[0] != whole[0]).any()


@pytest.fixture(scope="module")
def evaluator(data_root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_root))
        return Evaluator(recipe(), make_mesh(-1, 1), {})


@pytest.fixture(scope="module")
def of_run(evaluator, tmp_path_factory, data_root):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_root))
        return folder, evaluator.of_run(recipe(), params(), folder, {"step": 1})


def test_in_memory_and_by_way_of_the_disk_agree(evaluator, of_run):
    _, by_disk = of_run
    in_memory = evaluator.in_memory(recipe(), params(), NUM)
    # Moments are merged over other batches: equal but for the rounding of float64.
    assert in_memory.metrics["fd_digits"] == pytest.approx(by_disk.metrics["fd_digits"], rel=1e-13)
    assert in_memory.metrics["accuracy"] == by_disk.metrics["accuracy"]
    guided = {"guided_scale": 2.0, "guided_num": 30}
    assert {**in_memory.protocol, **guided} == by_disk.protocol
    assert evaluator.distance == "fd_digits"


def test_of_a_run(of_run):
    folder, found = of_run
    images, label = (load_array(folder / "samples.npz", name) for name in ("arr_0", "label"))
    assert found.metrics["accuracy"] == np.mean(predict_class(JUDGE, images) == label)
    images, label = (load_array(folder / "guided.npz", name) for name in ("arr_0", "label"))
    assert len(images) == 30
    assert found.metrics["accuracy_guided"] == np.mean(predict_class(JUDGE, images) == label)
    assert found.reference == "digits/train, 8x8"
    assert json.loads(json.dumps(found.protocol)) == found.protocol


# A key of the recipe, and another value of it that makes another number.
DIFFERENT: dict[str, dict[str, Any]] = {
    "seed": {"evaluate": {"seed": 1}},
    "labels": {"evaluate": {"labels": "balanced"}},
    "sampler": {"sample": {"sampler": "ddpm"}},
    "steps": {"sample": {"steps": "ddim4"}},
    "eta": {"sample": {"eta": 0.5}},
    "scale": {"sample": {"cfg_scale": 1.5}},
    "interval": {"sample": {"cfg_scale": 1.5, "cfg_interval": (0.0, 0.5)}},
    "clip": {"sample": {"clip_x0": False}},
    "weights": {"sample": {"weights": "model"}},
    "ema": {"train": {"ema_decay": 0.9}},
    "dtype": {"model": {"dtype": "bfloat16"}},
    "matmul": {"model": {"matmul": "float32"}},
    "size": {"data": {"image_size": 16}},
}
# And of what the number does not depend on, or what it is that is measured.
SAME: dict[str, dict[str, Any]] = {
    "training's seed": {"seed": 1},
    "batch": {"sample": {"batch_size": 48}},
    "model": {"model": {"size": "2x32x2"}},
    "channels of no guidance": {"sample": {"cfg_channels": "three"}, "data": {"channels": 3}},
    "steps of training": {"train": {"steps": 5000}},
}


def test_the_protocol_hash(evaluator):
    def hash_of(changes, num=NUM):
        return protocol_hash(evaluator.protocol(changed(recipe(), changes), num))

    own = hash_of({})
    hashes = {name: hash_of(changes) for name, changes in DIFFERENT.items()}
    assert len({own, *hashes.values()}) == len(hashes) + 1, hashes
    for name, changes in SAME.items():
        if name != "channels of no guidance":
            assert hash_of(changes) == own, name
    assert hash_of({}, NUM + 1) != own
    protocol = evaluator.protocol(recipe(), NUM)
    assert protocol["features_sha256"] != protocol["judge_sha256"]
    assert {"reference_sha256", "reference_count", "resize", "features_precision"} <= set(protocol)
    three = changed(recipe(), SAME["channels of no guidance"])
    assert evaluator.protocol(three, NUM) == protocol


def test_the_decoder_is_known_by_its_weights():
    a, b = {"w": np.ones(3, np.float32)}, {"w": np.zeros(3, np.float32)}
    assert decoder_of({}) == "pixels"
    assert len({decoder_of({"autoencoder": x}) for x in (a, b, {"v": a["w"]})}) == 3
    on_devices = jax.tree.map(jax.numpy.asarray, a)
    assert decoder_of({"autoencoder": on_devices}) == decoder_of({"autoencoder": a})


def test_what_cannot_be_evaluated():
    for changes, words in (
        ({"evaluate": {"features": "none"}}, "features is 'none': expected 'digits'"),
        ({"evaluate": {"reference": "/no/such.npz"}}, "/no/such.npz does not exist"),
        ({"evaluate": {"features": "inception:/no/such.pth"}}, "/no/such.pth does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            Evaluator(changed(recipe(), changes), make_mesh(-1, 1), {})


def test_the_floor_is_of_real_digits():
    floors = evaluation.real_scores("digits", Split("digits", "test"), "digits/train", "", 8)
    assert 10 < floors["fd_digits_floor"] < 20
    assert 0.3 < floors["authenticity_digits_floor"] < 0.9


def test_scenes_are_seen_in_windows(tmp_path):
    """Of another data set than digits: its own reference, floor and judge."""
    c = changed(
        recipe(),
        {
            "data": {"name": "digit_scenes/60", "image_size": 32, "channels": 3},
            "model": {"patch": 16},
            "sample": {"batch_size": 16, "steps": "ddim2"},
            "evaluate": {
                "features": "scenes",
                "num_samples": 16,
                "guided_scale": 0.0,
                "val_loss_num": 16,
                "reference": "digit_scenes/60/train[:40]",
            },
        },
    )
    evaluator = Evaluator(c, make_mesh(-1, 1), {})
    trained = program(c).init().params
    weights = jax.tree.map(np.asarray, trained)
    found = evaluator.of_run(c, weights, tmp_path, {"step": 0})
    assert found.reference == "digit_scenes/60/train[:40], 32x32"
    # Six real scenes are nearer to forty than what is drawn untrained.
    assert found.metrics["fd_digits"] > 2 * found.metrics["fd_digits_floor"] > 0
    assert {"accuracy", "val_loss", "val_vlb"} <= found.metrics.keys()
    assert found.protocol["val_loss_data"] == "digit_scenes/60/1.0.0/test"
    assert found.protocol["reference_count"] == 40
