"""MNIST's own files become the data set of tensorflow-datasets, which ordinary readers read."""

import gzip

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ditjax.data import source, stream
from ditjax.data.records import load_arrays
from ditjax.errors import UserError
from tests import prepare_mnist

COUNTS = {"train": 40, "t10k": 10}


def idx(array):
    sizes = np.array(array.shape, ">i4").tobytes()
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """(the folder of files as LeCun's, the arrays in them)."""
    folder, rng, arrays = tmp_path_factory.mktemp("files"), np.random.default_rng(0), {}
    for prefix, count in COUNTS.items():
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
        arrays[prefix] = images, labels
    return folder, arrays


@pytest.fixture(scope="module")
def data_dir(originals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert prepare_mnist.main(["mnist", str(originals[0]), str(folder)]) == 0
    return folder


def test_the_original_files_are_read_as_tensorflow_datasets_prepares_them(originals, data_dir):
    info = source.dataset_info("mnist", "train", data_dir)
    assert info.full_name == "mnist/3.0.1"
    assert (info.num_examples, info.num_classes, info.channels) == (40, 10, 1)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found, (images, labels) = load_arrays("mnist", split, data_dir), originals[1][prefix]
        assert found["image"].shape == (len(images), 28, 28, 1)
        # In the hashed order of their keys: every image once, with its label.
        order = [int(np.flatnonzero((images == x[..., 0]).all((1, 2)))[0]) for x in found["image"]]
        assert sorted(order) == list(range(len(images)))
        assert order != sorted(order)
        np.testing.assert_array_equal(found["label"], labels[order])
    hashed = tfds.core.hashing.Hasher("test").hash_key
    assert order == sorted(range(10), key=hashed)


def test_images_of_28_pixels_reach_the_network_unchanged_or_scaled(data_dir):
    exact = load_arrays("mnist", "test", data_dir)["image"]
    for size, channels in ((28, 1), (32, 1), (28, 3)):
        spec = source.DataSpec("mnist", "test", size, channels, flip=False, data_dir=data_dir)
        rows = next(iter(stream.in_order(spec, 10)))
        assert rows["image"].shape == (10, size, size, channels)
        if size == 28:
            pixels = np.rint((rows["image"] + 1) * 127.5)
            np.testing.assert_array_equal(pixels, np.repeat(exact, channels, axis=3))


def test_other_splits_have_another_version(originals, tmp_path):
    """So that no protocol takes them for the official ones."""
    (images, labels), held = originals[1]["train"], originals[1]["t10k"]
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, train_image=images, train_label=labels, test_image=held[0], test_label=held[1])
    assert prepare_mnist.main(["fashion_mnist", str(arrays), str(tmp_path / "data")]) == 0
    info = source.dataset_info("fashion_mnist", "test", tmp_path / "data")
    assert (info.full_name, info.num_examples) == ("fashion_mnist/0.0.1", 10)
    assert info.class_names[:2] == ("T-shirt/top", "Trouser")


def test_files_of_another_kind_are_refused(originals, tmp_path, capsys):
    for content in (b"no gzip", gzip.compress(b"\0\0\x0d\1\0\0\0\1\0\0\0\0"), gzip.compress(b"")):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        assert prepare_mnist.main(["mnist", str(tmp_path), str(tmp_path / "data")]) == 2
        assert "is not an IDX file of bytes" in capsys.readouterr().err
    arrays, few = tmp_path / "few.npz", np.zeros((2, 28, 28), np.uint8)
    np.savez(arrays, train_image=few, train_label=np.zeros(3), test_image=few, test_label=few[0, 0])
    with pytest.raises(UserError, match=r"3 labels and images uint8\[2, 28, 28\]"):
        prepare_mnist.read_splits(arrays)
