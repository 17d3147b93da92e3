"""evaluate --samples: any set of images against any reference, with the protocol on record."""

import json

import numpy as np
import pytest
from PIL import Image

from ditjax import evaluate
from ditjax.data import records
from ditjax.errors import UserError
from ditjax.evaluation.features import digits_extractor
from ditjax.evaluation.statistics import load_statistics, save_statistics
from ditjax.metrics import frechet, neighbours
from tests.sample_files import save_samples


@pytest.fixture(scope="module")
def digits(data_dir):
    """u8[N,8,8,1] of both splits: all for training, and few held out."""
    return {
        split: records.load_arrays("digits", split, data_dir)["image"]
        for split in ("train", "test[:120]")
    }


@pytest.fixture
def sample_file(digits, tmp_path):
    path = tmp_path / "samples.npz"
    save_samples(path, digits["test[:120]"], np.zeros(len(digits["test[:120]"]), np.int32))
    return path


def run(samples, reference, out, *more):
    words = [
        f"--samples={samples}",
        f"--reference={reference}",
        "--features=digits",
        f"--out={out}",
        *more,
    ]
    assert evaluate.main(words) == 0
    return json.loads(out.read_text())


def test_against_a_data_set(sample_file, digits, tmp_path, capsys):
    record = run(sample_file, "digits/train", tmp_path / "out.json")
    pools = {split: digits_extractor().extract(images).pool for split, images in digits.items()}
    moments = {split: frechet.batch_moments(pool) for split, pool in pools.items()}
    metrics = record["metrics"]
    distance = frechet.frechet_distance(moments["test[:120]"], moments["train"])
    assert metrics["fd_digits"] == pytest.approx(distance, rel=1e-9)
    assert metrics["fd_digits_low"] < distance < metrics["fd_digits_high"]
    pr = neighbours.precision_recall(pools["train"], pools["test[:120]"])
    assert metrics["precision_digits"] == pr.precision
    assert metrics["recall_digits"] == pr.recall
    assert not {name for name in metrics if name.startswith(("fid", "kid", "inception"))}
    assert record["reference"] == "digits/train, 8x8"
    assert record["protocol"]["reference_count"] == len(digits["train"])
    assert record["protocol"]["num_samples"] == len(digits["test[:120]"])
    assert record["protocol_hash"] in capsys.readouterr().out


def test_the_reference_is_kept_and_read_again(sample_file, tmp_path):
    kept = tmp_path / "reference.npz"
    first = run(sample_file, "digits/train", tmp_path / "a.json", f"--save_reference={kept}")
    assert load_statistics(kept).provenance["features"] == "digits_convnet"
    again = run(sample_file, kept, tmp_path / "b.json")
    assert again["metrics"] == pytest.approx(first["metrics"], rel=1e-9)
    # Statistics by other features are not compared with.
    other = load_statistics(kept)
    save_statistics(kept, other._replace(provenance={"features_sha256": "0" * 64}))
    with pytest.raises(UserError, match="has features 000000000000"):
        run(sample_file, kept, tmp_path / "c.json")


def test_a_folder_is_its_images(sample_file, digits, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, image in enumerate(digits["test[:120]"][:40]):
        Image.fromarray(image[..., 0]).save(folder / f"{i:05}.png")
    save_samples(tmp_path / "few.npz", digits["test[:120]"][:40], np.zeros(40, np.int32))
    of_folder = run(folder, sample_file, tmp_path / "a.json")
    of_file = run(tmp_path / "few.npz", sample_file, tmp_path / "b.json")
    assert of_folder["metrics"] == {k: v for k, v in of_file["metrics"].items() if k != "accuracy"}
    assert of_folder["protocol_hash"] == of_file["protocol_hash"]


def test_a_set_against_itself(sample_file, tmp_path):
    metrics = run(sample_file, sample_file, tmp_path / "out.json")["metrics"]
    assert metrics["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert metrics["precision_digits"] == metrics["recall_digits"] == 1


def test_the_protocol_tells_sets_apart(sample_file, digits, tmp_path):
    save_samples(tmp_path / "few.npz", digits["test[:120]"][:100], np.zeros(100, np.int32))
    hashes = {
        run(samples, reference, tmp_path / "out.json")["protocol_hash"]
        for samples in (sample_file, tmp_path / "few.npz")
        for reference in ("digits/train", "digits/test", tmp_path / "few.npz")
    }
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("inception", "expected inception:FILE"),
        ("inception:", "expected inception:FILE"),
        ("clip", "expected inception:FILE"),
        ("inception:none.pth", "none.pth does not exist"),
    ],
)
def test_features_that_are_none(sample_file, features, message):
    words = [f"--samples={sample_file}", "--reference=digits/train", f"--features={features}"]
    with pytest.raises(UserError, match=message):
        evaluate.main(words)


def test_one_image_has_no_distance(digits, tmp_path, sample_file):
    save_samples(tmp_path / "one.npz", digits["test[:120]"][:1], np.zeros(1, np.int32))
    with pytest.raises(UserError, match="1 samples have no covariance"):
        run(tmp_path / "one.npz", sample_file, tmp_path / "out.json")


def test_labels_that_are_not_one_for_each_image(digits, tmp_path):
    """Of another shape, NumPy would compare each label with each prediction."""
    images = digits["test[:120]"][:20]
    for label in (np.zeros((20, 1), int), np.zeros(19, int), np.zeros(20), np.int32(3)):
        np.savez(tmp_path / "x.npz", arr_0=images, label=label)
        with pytest.raises(UserError, match=r"x\.npz: label is .*, expected i32\[20\]"):
            run(tmp_path / "x.npz", "digits/train", tmp_path / "out.json")


@pytest.mark.parametrize(
    ("flag", "match"),
    [
        ("--seed=-1", "--seed=-1: expected at least 0"),
        ("--batch_size=-1", "--batch_size=-1 --seed=0: expected at least 0"),
        ("--batch_size=4", "--batch_size=4 has no effect on features 'digits'"),
        (f"--reference={'y' * 300}", "data set 'y+' is not a name"),
    ],
)
def test_flags_that_cannot_be_meant(sample_file, tmp_path, flag, match):
    with pytest.raises(UserError, match=match):
        run(sample_file, "digits/train", tmp_path / "out.json", flag)
