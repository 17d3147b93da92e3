"""Write MNIST or Fashion-MNIST from files, as tensorflow-datasets prepares it.

    python -m tests.prepare_mnist mnist FOLDER DATA_DIR
    python -m tests.prepare_mnist fashion_mnist ARRAYS.npz DATA_DIR

It needs neither a network nor TensorFlow. FOLDER holds the four original files (IDX, gzip), whose
splits are the official ones. ARRAYS.npz holds train_image u8[N,28,28], train_label, test_image and
test_label, whose splits may be anyone's: they get version 0.0.1, so that no record of a result
takes them for the official version 3.0.1. Afterwards `config.data.name=mnist` reads the data set as
if tensorflow-datasets had prepared it: the same features, keys and order of records.
"""

import argparse
import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.builders import write_whole
from ditjax.data.source import open_split
from ditjax.errors import UserError
from ditjax.files import npz

NAMES = ("mnist", "fashion_mnist")
OTHER_SPLIT = "0.0.1"
_FILES = {"train": "train", "test": "t10k"}
_SIDE = 28

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> images u8[N,28,28], labels [N]


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in an IDX file, gzip: 0 0 8 rank, the sizes as big-endian i32, the bytes.

    Raises UserError for another file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, ">i4", rank, 4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("another kind of file")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is not an IDX file of bytes, compressed by gzip: {error}."
        ) from None


def read_splits(source: Path) -> Splits:
    """The splits of the original files in a folder, or of an npz. Raises UserError."""
    if source.is_dir():
        splits = {
            split: (
                read_idx(source / f"{prefix}-images-idx3-ubyte.gz"),
                read_idx(source / f"{prefix}-labels-idx1-ubyte.gz"),
            )
            for split, prefix in _FILES.items()
        }
    else:
        splits = {
            split: (
                npz.load_array(source, f"{split}_image"),
                npz.load_array(source, f"{split}_label"),
            )
            for split in _FILES
        }
    for split, (images, labels) in splits.items():
        if images.dtype != np.uint8 or images.shape != (len(labels), _SIDE, _SIDE):
            raise UserError(
                f"{source}, {split}: {len(labels)} labels and images"
                f" {images.dtype}{list(images.shape)}: expected u8[N,28,28] of as many."
            )
    return splits


def write_mnist(name: str, splits: Splits, data_dir: Path, version: str = "") -> Path:
    """Write splits as the data set `name` of tensorflow-datasets below data_dir; return its folder.

    `version` takes the place of tensorflow-datasets' own. A data set that is there is kept.
    """
    base: Any = tfds.builder_cls(name)

    class FromFiles(base, skip_registration=True):  # type: ignore[call-arg]
        name = base.name
        VERSION = tfds.core.Version(version or str(base.VERSION))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {split: self._generate_examples(*arrays) for split, arrays in splits.items()}

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            # The keys of tensorflow-datasets, by whose hashes records are ordered.
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": Image.fromarray(image), "label": int(label)}

    FromFiles.name = name
    builder = FromFiles(data_dir=data_dir, file_format="array_record")
    write_whole(builder)
    return Path(builder.data_dir)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("source", type=Path, help="folder of the original files, or an npz")
    parser.add_argument("data_dir", type=Path, help="folder of prepared data sets ($DITJAX_DATA)")
    args = parser.parse_args(argv)
    try:
        official = args.source.is_dir()
        splits = read_splits(args.source)
        folder = write_mnist(args.name, splits, args.data_dir, "" if official else OTHER_SPLIT)
        counts = {
            split: open_split(f"{args.name}:{folder.name}", split, args.data_dir).info.num_examples
            for split in splits
        }
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    whose = "the official splits" if official else "not the official splits"
    print(f"{folder}: {', '.join(f'{n:,} in {split}' for split, n in counts.items())}; {whose}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
