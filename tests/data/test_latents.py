"""Latents on disk: tensorflow-datasets' bytes and layout, and encodings that were cut off."""

import json
import resource
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ditjax.data import latents
from ditjax.data.latents import LatentWriter, open_latents
from ditjax.data.source import DataSpec, dataset_info
from ditjax.data.stream import train_batches
from ditjax.errors import UserError

# 16 KiB a record: 64 of them are a MiB.
SHAPE, N, PER_SHARD = (16, 16, 4), 150, 64
CLASSES = tuple(f"class {i}" for i in range(1000))
METADATA = {"images": "digits/1.0.0", "split": "train", "autoencoder_sha256": "ab"}


def record(i):
    rng = np.random.default_rng(i)
    mean, log_variance = rng.normal(size=(2, 2, *SHAPE)).astype(np.float32)
    return {"mean": mean, "log_variance": log_variance, "label": i * 7 % 1000}


def records(shard):
    return (record(i) for i in shard)


def writer(folder, metadata=METADATA, split="train", count=N, shard_mb=1):
    return LatentWriter(folder, split, SHAPE, CLASSES, count, metadata, shard_mb)


def written(folder, **kwargs):
    """A finished set, written at one go."""
    whole = writer(folder, **kwargs)
    for shard in whole.missing():
        whole.write(shard, records(shard))
    whole.finish()
    return folder


def contents(folder):
    """Path -> bytes of all that lies below, hidden files included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_records(folder, count=N):
    source = open_latents(folder).as_data_source("train")
    assert len(source) == count
    for i in range(count):
        expected = record(i)
        for name, value in source[i].items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{name} of {i}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return written(tmp_path_factory.mktemp("finished"))


def test_records_come_back_in_order_from_shards_of_their_ranges(finished):
    check_records(finished)
    (split,) = open_latents(finished).info.splits.values()
    assert split.shard_lengths == [PER_SHARD, PER_SHARD, N - 2 * PER_SHARD]
    assert dataset_info(f"latents:{finished}", "train").class_names == CLASSES
    assert sorted(contents(finished)) == [
        f"latents/1.0.0/{name}"
        for name in (
            "dataset_info.json",
            "features.json",
            "label.labels.txt",
            *(f"latents-train.array_record-0000{i}-of-00003" for i in range(3)),
            "metadata.json",
        )
    ]


@pytest.mark.parametrize("label", [0, 7, 127, 128, 999])
def test_a_record_is_the_bytes_of_tensorflow_datasets(tmp_path, label):
    """Its own serializer's, told to keep to one order of features."""
    value = {**record(3), "label": label}
    features = latents._features(SHAPE, CLASSES)
    example = tfds.core.ExampleSerializer(features.get_serialized_info()).get_tf_example(
        features.encode_example(value)
    )
    expected = example.SerializeToString(deterministic=True)
    assert writer(tmp_path)._example(value) == expected


def test_a_set_of_the_writer_before_is_read_and_left_alone(tmp_path):
    """Sets written by tensorflow-datasets itself, as before shards were ours."""

    class Latents(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Moments of a KL autoencoder: of each image, then of its mirror.",
                features=latents._features(SHAPE, CLASSES),
                metadata=tfds.core.MetadataDict(METADATA),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": enumerate(map(record, range(5)))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Latents(data_dir=tmp_path / "old", file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    check_records(tmp_path / "old", 5)
    before = contents(tmp_path / "old")
    again = writer(tmp_path / "old", {**METADATA, "dtype": "float32"}, count=5)
    assert again.finished
    assert again.missing() == []
    again.finish()
    assert contents(tmp_path / "old") == before
    # And ours is laid out alike, down to the description.
    ours = contents(written(tmp_path / "new", count=5))
    for name in ("features.json", "label.labels.txt"):
        assert ours[f"latents/1.0.0/{name}"] == before[f"latents/1.0.0/{name}"]
    mine, theirs = (
        json.loads(files["latents/1.0.0/dataset_info.json"]) for files in (ours, before)
    )
    for info in (mine, theirs):
        info.pop("moduleName")
        info["splits"][0].pop("numBytes")  # ours are the file's, theirs from before compression
    assert mine == theirs
    assert set(ours) <= {name for name in before if "latents/1.0.0" in name}


def test_an_encoding_goes_on_at_the_first_missing_shard(finished, tmp_path):
    def cut_off(shard):
        yield from records(shard[:10])
        raise RuntimeError("the machine went away")

    first = writer(tmp_path)
    shards = first.missing()
    assert shards == [range(64), range(64, 128), range(128, 150)]
    first.write(shards[0], records(shards[0]))
    with pytest.raises(RuntimeError, match="the machine went away"):
        first.write(shards[1], cut_off(shards[1]))
    # What a killed process would leave.
    path = first._path(shards[1])
    path.with_name(f".{path.name}.0123abcd.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="2 of 3 shards are missing; run the"):
        first.finish()
    with pytest.raises(UserError, match="its encoding is not finished; resume it"):
        dataset_info(f"latents:{tmp_path}", "train")

    second = writer(tmp_path)
    assert second.missing() == shards[1:]
    for shard in second.missing():
        second.write(shard, records(shard))
    assert second.missing() == []
    second.finish()
    assert contents(tmp_path) == contents(finished)
    assert writer(tmp_path).finished


def test_jobs_write_their_own_shards_and_any_finishes(finished, tmp_path):
    jobs = [writer(tmp_path) for _ in range(2)]
    assert [job.missing(i, 2) for i, job in enumerate(jobs)] == [
        [range(64), range(128, 150)],
        [range(64, 128)],
    ]
    for i in (1, 0):
        for shard in jobs[i].missing(i, 2):
            jobs[i].write(shard, records(shard))
        assert jobs[i].missing(i, 2) == []
    for job in jobs:
        job.finish()
    assert contents(tmp_path) == contents(finished)


def test_a_damaged_shard_is_missing(tmp_path):
    some = writer(tmp_path)
    for shard in some.missing():
        some.write(shard, records(shard))
    path = some._path(range(64, 128))
    path.write_bytes(path.read_bytes()[:-70_000])
    assert writer(tmp_path).missing() == [range(64, 128)]


def test_a_shard_of_too_few_records_is_refused(tmp_path):
    some = writer(tmp_path)
    with pytest.raises(ValueError, match="got 63 records"):
        some.write(range(64), records(range(63)))
    assert some.missing()[0] == range(64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"metadata": {**METADATA, "autoencoder_sha256": "cd"}},
            "sha256='ab', and this command has 'cd'",
        ),
        (
            {"metadata": {**METADATA, "images": "mnist/3.0.1"}},
            "images='digits/1.0.0', and this command",
        ),
        ({"metadata": {**METADATA, "split": "test"}}, "split='train', and this command has 'test'"),
        ({"count": 151}, "num_examples=150, and this command has 151"),
        ({"shard_mb": 2}, "records_per_shard=64, and this command has 128"),
    ],
)
def test_shards_of_something_else_are_refused(tmp_path, change, match):
    some = writer(tmp_path)
    some.write(range(64), records(range(64)))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=match) as error:
        writer(tmp_path, **change)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_a_finished_set_is_not_tied_to_its_shards(finished):
    other = writer(finished, shard_mb=2)
    assert other.finished
    assert other.missing() == []
    with pytest.raises(UserError, match="sha256='ab', and this command has 'cd'"):
        writer(finished, metadata={**METADATA, "autoencoder_sha256": "cd"})


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_description_is_named(tmp_path, damage):
    writer(tmp_path)
    (tmp_path / "latents" / "1.0.0" / "metadata.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"metadata.json cannot be read: remove .*1\.0\.0, and"):
        writer(tmp_path)


@pytest.mark.parametrize("split", ["train[:10%]", "train+test"])
def test_part_of_a_split_is_refused(tmp_path, split):
    with pytest.raises(UserError, match="encode a whole split, such as 'train', and"):
        writer(tmp_path, split=split)
    with pytest.raises(UserError, match="shards of 0 MiB"):
        writer(tmp_path, shard_mb=0)
    assert not list(tmp_path.iterdir())


def test_slices_of_latents_are_read(finished):
    spec = DataSpec(f"latents:{finished}", "train[60:70]", 16, 1, flip=False)
    with train_batches(spec, 0, 10) as batches:
        batch = next(batches)
    for i, mean in zip(batch["index"], batch["mean"], strict=True):
        np.testing.assert_array_equal(mean, record(60 + i)["mean"][0])


def test_a_full_disk_ends_in_one_line(tmp_path):
    some = writer(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*00000-of-00003: .*File too large"):
            some.write(range(64), records(range(64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in some.folder.iterdir()] == ["metadata.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        writer(tmp_path / "file")
