"""The reference of a run is the images that it trains on, for every kind of data set and split."""

import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.config import read
from ditjax.data.builders import write_whole
from ditjax.data.latents import LatentRecord, LatentWriter
from ditjax.data.names import Split
from ditjax.data.records import load_arrays
from ditjax.data.source import dataset_info, images_of, parse_split
from ditjax.errors import UserError
from ditjax.evaluation.evaluator import reference_of
from ditjax.evaluation.features import Extractor, ImageFeatures
from ditjax.evaluation.scoring import open_reference
from ditjax.runs import opening

SIDE = 8


def extract(images):
    flat = images.reshape(len(images), -1)[:, :6].astype(np.float32)
    return ImageFeatures(flat, None, flat)


EXTRACTOR = Extractor("inception", extract, 64, {"features_sha256": "a" * 64})


def pixels(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


class Tiny(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Twelve images of training and four of a test, of a name, a configuration and a version."""

    VERSION = tfds.core.Version("1.0.0")

    name: str

    def __init__(self, root, name, version="1.0.0", config=None):
        type(self).name = name
        type(self).VERSION = tfds.core.Version(version)
        made = tfds.core.BuilderConfig(name=config, description="d") if config else None
        super().__init__(data_dir=root, config=made, file_format="array_record")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        seed = int(hashlib.sha256(f"{self.name}{self.VERSION}".encode()).hexdigest()[:6], 16)
        return {"train": self._generate_examples(seed, 12), "test": self._generate_examples(1, 4)}

    def _generate_examples(self, seed, count):
        for i, image in enumerate(pixels(seed, count)):
            yield i, {"image": Image.fromarray(image), "label": i % 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Prepared: sets of tensorflow-datasets, of which the newest version is not always named."""
    root = tmp_path_factory.mktemp("data")
    for version in ("1.0.0", "2.0.0"):
        write_whole(Tiny(root, "tiny", version))
        write_whole(Tiny(root, "tiny_resized", version, "8x8"))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a b") / "photo.s"
    for split, count in (("train", 12), ("test", 4)):
        for i, image in enumerate(pixels(len(split), count)):
            place = folder / split / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    return folder


KINDS = (
    "digits",
    "digits:1.0.0",
    "digit_scenes/20",
    "tiny",
    "tiny:1.0.0",
    "tiny_resized/8x8",
    "tiny_resized/8x8:1.0.0",
    "folder",
)
SPLITS = ("train", "test", "train[:50%]", "train[3:9]", "train+test")


@pytest.fixture
def name_of(folder):
    return lambda kind: f"folder:{folder}" if kind == "folder" else kind


def recipe(name, split, root, held="validation"):
    data = {"name": name, "split": split, "image_size": SIDE, "data_dir": str(root)}
    kind = "kl" if name.startswith("latents:") else "none"
    sections = {"model": {"patch": 1}, "autoencoder": {"kind": kind}}
    return read({"data": data, "evaluate": {"split": held}, **sections})


def sha256(name, split, root):
    """Of the images themselves, as the protocol records them."""
    channels = 1 if name.startswith("digits") else 3
    images = load_arrays(name, split, root, SIDE, channels)["image"]
    digest = hashlib.sha256(f"{images.shape[1:]}".encode())
    digest.update(images.data)
    return digest.hexdigest()


def latents_of(name, split, root, out):
    """Encoded as `encode` does, with other numbers."""
    info = dataset_info(name, split, root)
    metadata = {"images": info.full_name, "split": split}
    writer = LatentWriter(out, split, (2, 2, 1), info.class_names, info.num_examples, metadata)
    moments = np.zeros((2, 2, 2, 1), np.float32)
    row = LatentRecord(mean=moments, log_variance=moments, label=0)
    for shard in writer.missing():
        writer.write(shard, [row] * len(shard))
    writer.finish()
    return f"latents:{out}"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_by_default_it_is_what_is_trained_on(kind, split, name_of, root):
    name = name_of(kind)
    found = reference_of(recipe(name, split, root), EXTRACTOR)
    assert found.record["reference_sha256"] == sha256(name, split, root)
    assert found.name == f"{name}/{split}, 8x8"
    again = reference_of(recipe(name, split, root), EXTRACTOR)  # from the cache
    assert again.record == found.record


@pytest.mark.parametrize("kind", KINDS)
def test_of_latents_it_is_the_images_that_they_encode(kind, name_of, root, tmp_path):
    name = name_of(kind)
    latents = latents_of(name, "train", root, tmp_path / "c++/l")
    for split in ("train", "train[:50%]"):
        found = reference_of(recipe(latents, split, root), EXTRACTOR)
        assert found.record["reference_sha256"] == sha256(name, split, root)
    named = open_reference(latents, EXTRACTOR, SIDE, str(root))
    assert named.record["reference_sha256"] == sha256(name, "train", root)
    held = opening.held_out(recipe(latents, "train", root, held="test"))
    assert dataset_info(held.name, held.split, root) == dataset_info(name, "test", root)


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_named(kind, name_of, root):
    name = name_of(kind)
    assert parse_split(name, root) == Split(name, "train")
    for split in SPLITS:
        assert parse_split(f"{name}/{split}", root) == (name, split)
    found = open_reference(f"{name}/train[:50%]", EXTRACTOR, SIDE, str(root))
    assert found.record["reference_sha256"] == sha256(name, "train[:50%]", root)
    assert open_reference(f"{name}/test", EXTRACTOR, SIDE, str(root)).record["reference_count"] > 1


@pytest.mark.parametrize("last", ["c++", "train[1]", "a=b", "val"])
def test_a_folder_of_any_name_is_itself(tmp_path, last):
    place = tmp_path / last / "a"
    place.mkdir(parents=True)
    name = f"folder:{tmp_path / last}"
    assert parse_split(name, tmp_path) == Split(name, "train")
    assert parse_split(f"{name}/train[:10%]", tmp_path) == Split(name, "train[:10%]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("folder:/nowhere/x", "there is no folder '/nowhere/x'"),
        ("folder:/nowhere/x/train[:10%]", r"there is no folder '/nowhere/x/train\[:10%\]'"),
        ("latents:/nowhere/x", "no encoded latents at /nowhere/x"),
        ("tiny/64x64", "split '64x64': there is no such split"),
        ("digits/tset", "there is no such split, or it is empty; there are test, train"),
        ("a/b/c/d", "is not a name"),
        ("image_folder/0123:2.0.0/train", "is the conversion of a folder that is not under"),
    ],
)
def test_what_is_not_there_is_named_as_it_was_given(root, text, words):
    with pytest.raises(UserError, match=words):
        open_reference(text, EXTRACTOR, SIDE, str(root))


def test_images_of_what_is_no_latents_are_itself():
    assert images_of(Split("folder:/x/y", "val")) == ("folder:/x/y", "val")


def test_cached_statistics_of_features_without_weights_are_read(root):
    """They have no digest: the second time was a KeyError."""
    bare = EXTRACTOR._replace(record={"features": "of no weights"})
    first, again = (open_reference(Split("tiny"), bare, SIDE, str(root)) for _ in range(2))
    np.testing.assert_array_equal(again.statistics.mu, first.statistics.mu)
