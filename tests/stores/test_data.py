"""Latents and prepared data sets on a store give the rows that they give on a disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditjax.data import latents, source, stream
from ditjax.errors import UserError
from ditjax.files import store

BOTH = pytest.mark.parametrize("server", ["gs", "s3"], indirect=True)


def encoded(out: Path) -> str:
    """Forty latents in shards, written as `encode` does."""
    metadata = {"images": "digits:1.0.0", "split": "train"}
    writer = latents.LatentWriter(out, "train", (2, 2, 4), ("a", "b"), 40, metadata)
    zeros = np.zeros((2, 2, 2, 4), np.float32)
    for shard in writer.missing():
        writer.write(
            shard, ({"mean": zeros + i, "log_variance": zeros, "label": i % 2} for i in shard)
        )
    assert not writer.missing()
    writer.finish()
    return f"latents:{out}"


def first_batch(name: str, data_dir: str | None = None) -> dict[str, np.ndarray]:
    spec = source.DataSpec(name, "train", 8, 1, True, data_dir, cache_mb=0, threads=4)
    with stream.train_batches(spec, 0, 16) as batches:
        return dict(next(iter(batches)))


@BOTH
def test_latents(root, tmp_path):
    with pytest.raises(UserError, match="no encoded latents"):
        latents.open_latents(root)
    there, here = encoded(root), encoded(tmp_path / "latents")
    assert source.known_content(there) == source.known_content(here)
    ours, theirs = first_batch(there), first_batch(here)
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


@BOTH
def test_a_data_set_is_prepared_there(root, tmp_path):
    ours, theirs = first_batch("digits", str(root)), first_batch("digits", str(tmp_path))
    assert all((ours[key] == theirs[key]).all() for key in ours)


@BOTH
def test_a_folder_of_images(root, tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 40 * int(path.stem), np.uint8)
        Image.fromarray(pixels).save(path)
    store.upload_tree(tmp_path / "images", root / "images")
    there = source.prepare(f"folder:{root / 'images'}", str(root / "data"))
    here = source.prepare(f"folder:{tmp_path / 'images'}", tmp_path / "data")
    assert there.info.splits["train"].num_examples == here.info.splits["train"].num_examples == 3
    assert there.info.full_name == here.info.full_name
