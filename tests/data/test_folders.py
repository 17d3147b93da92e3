"""What a folder holds is read or counted among what was left out: the table in docs/data.md."""

import contextlib
import inspect
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditjax.data.folders import UNLABELLED, LeftOut, list_folder, walk_images
from ditjax.data.source import dataset_info, prepare
from ditjax.errors import FaultError, UserError
from ditjax.files import faults
from tests.unstable import FOR_EVER, PASSING, Unstable

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def fill(root, *paths):
    """A folder with files: images where the suffix is of images, links 'a -> b', folders 'a/'."""
    for path in paths:
        name, _, target = path.partition(" -> ")
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if target:
            place.symlink_to(target)
        elif path.endswith("/"):
            place.mkdir(exist_ok=True)
        elif place.suffix == ".png":
            Image.fromarray(PIXELS).save(place)
        else:
            place.write_text("no image")
    return root


def listed(listing):
    return {
        split: sorted(f"{each.class_name}: {each.name}" for each in found)
        for split, found in listing.files.items()
    }


# What lies there -> (split -> 'class: file', what is left out): the rows of docs/data.md.
LAYOUTS = {
    "`CLASS/IMAGE`, also deeper: `CLASS/more/IMAGE`": (
        ["cat/0.png", "dog/more/1.png"],
        {"train": ["cat: cat/0.png", "dog: dog/more/1.png"]},
        "",
    ),
    "`train/CLASS/IMAGE`, `val/CLASS/IMAGE`": (
        ["train/cat/0.png", "train/dog/1.png", "val/dog/2.png"],
        {"train": ["cat: train/cat/0.png", "dog: train/dog/1.png"], "val": ["dog: val/dog/2.png"]},
        "",
    ),
    "`Training/CLASS/IMAGE`, `valid/CLASS/IMAGE`": (
        ["Training/cat/0.png", "valid/cat/1.png", "TEST/cat/2.png"],
        {
            "train": ["cat: Training/cat/0.png"],
            "valid": ["cat: valid/cat/1.png"],
            "test": ["cat: TEST/cat/2.png"],
        },
        "",
    ),
    "`train/CLASS/IMAGE`, `other/CLASS/IMAGE`": (
        ["train/cat/0.png", "other/cat/1.png", "2.png"],
        {"train": ["cat: train/cat/0.png"]},
        "folders beside train that are no split 1 (other), images beside the splits 1 (2.png)",
    ),
    "`train/CLASS/IMAGE`, `test/IMAGE`": (
        ["train/cat/0.png", "test/1.png", "test/2.png"],
        {"train": ["cat: train/cat/0.png"]},
        "images of a split without class folders 2 (test 2)",
    ),
    "`IMAGE`": (
        ["0.png", "1.png"],
        {"train": [f"{UNLABELLED}: 0.png", f"{UNLABELLED}: 1.png"]},
        "",
    ),
    "`train/IMAGE`, `val/IMAGE`": (
        ["train/0.png", "val/1.png"],
        {"train": [f"{UNLABELLED}: train/0.png"], "val": [f"{UNLABELLED}: val/1.png"]},
        "",
    ),
    "`train/IMAGE`, `plane/IMAGE`": (
        ["train/0.png", "plane/1.png"],
        {"train": ["plane: plane/1.png", "train: train/0.png"]},
        "",
    ),
    "`CLASS/IMAGE`, `IMAGE`": (
        ["cat/0.png", "1.png"],
        {"train": ["cat: cat/0.png"]},
        "images beside the class folders 1 (1.png)",
    ),
    "a class folder without images": (
        ["cat/0.png", "dog/", "emu/notes.txt"],
        {"train": ["cat: cat/0.png"]},
        "folders without images 2 (dog, emu), files of other types 1 (.txt)",
    ),
    "files of other types": (
        ["cat/0.png", "cat/1.heic", "cat/2.HEIC", "cat/labels", "cat/a.csv"],
        {"train": ["cat: cat/0.png"]},
        "files of other types 4 (.heic 2, .csv, no suffix)",
    ),
    "names that begin with a dot": (
        ["cat/0.png", "cat/._0.png", ".cache/1.png", "cat/.thumbs/2.png"],
        {"train": ["cat: cat/0.png"]},
        "hidden files and folders 3 (.cache, .thumbs, ._0.png)",
    ),
    "links to files and to folders": (
        ["cat/0.png", "dog -> cat", "emu/1.png -> ../cat/0.png", "fox/more -> ../cat"],
        {
            "train": [
                "cat: cat/0.png",
                "dog: dog/0.png",
                "emu: emu/1.png",
                "fox: fox/more/0.png",
            ]
        },
        "",
    ),
    "links to a folder that they are in": (
        ["cat/0.png", "cat/again -> .", "cat/top -> ..", "dog -> ."],
        {"train": ["cat: cat/0.png"]},
        "links to a folder that they are in 3 (dog, again, top)",
    ),
    "broken links": (
        ["cat/0.png", "cat/1.png -> gone.png", "dog -> gone", "cat/2.png -> 2.png"],
        {"train": ["cat: cat/0.png"]},
        "broken links 3 (cat/1.png, cat/2.png, dog)",
    ),
}


@pytest.mark.parametrize("row", LAYOUTS)
def test_a_layout_is_read_and_the_rest_is_counted(tmp_path, row):
    paths, expected, left = LAYOUTS[row]
    listing = list_folder(fill(tmp_path / "f", *paths))
    assert listed(listing) == expected
    reasons = re.compile(r"[a-z][^(]*\([^)]*\)")
    assert sorted(reasons.findall(str(listing.left_out))) == sorted(reasons.findall(left))


def test_the_page_has_these_rows():
    table = DOCS.read_text(encoding="utf-8").partition("## What a folder holds\n")[2]
    rows = [line.split(" | ")[0][2:] for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:][: len(LAYOUTS)] == list(LAYOUTS)


def test_links_that_lead_round_through_each_other_end(tmp_path):
    fill(tmp_path, "a/0.png", "b/1.png", "a/to -> ../b", "b/to -> ../a")
    listing = list_folder(tmp_path)
    assert listed(listing)["train"] == [
        "a: a/0.png",
        "a: a/to/1.png",
        "b: b/1.png",
        "b: b/to/0.png",
    ]
    assert "links to a folder that they are in 2" in str(listing.left_out)


def test_deeper_than_python_calls_itself(tmp_path):
    place = tmp_path
    for _ in range(300):
        place /= "d"
    place.mkdir(parents=True)
    Image.fromarray(PIXELS).save(place / "0.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        assert len(list(walk_images(tmp_path, tmp_path, LeftOut()))) == 1
    finally:
        sys.setrecursionlimit(limit)


def test_what_is_no_file(tmp_path):
    fill(tmp_path, "cat/0.png")
    os.mkfifo(tmp_path / "cat" / "1.png")
    with socket.socket(socket.AF_UNIX) as open_socket:
        here = os.getcwd()
        os.chdir(tmp_path / "cat")
        try:
            open_socket.bind("2.png")
        finally:
            os.chdir(here)
        assert str(list_folder(tmp_path).left_out) == "no regular files 2 (cat/1.png, cat/2.png)"


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "cat/0.png", "cat/shut/1.png")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"shut cannot be read: Permission denied; make it"):
        list_folder(tmp_path)


def test_two_folders_of_one_split(tmp_path):
    fill(tmp_path, "train/a/0.png", "Train/a/1.png")
    if len(list(tmp_path.iterdir())) == 2:  # not on a file system that ignores case
        with pytest.raises(UserError, match="are the same split 'train': rename one"):
            list_folder(tmp_path)


@pytest.mark.parametrize(
    "name", [b"\xff\xfe", b"two\nlines", b" space", b"tab\t", b"\xe2\x80\xa8", b"\x1b[31m"]
)
def test_a_class_that_cannot_be_recorded(tmp_path, name):
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    Image.fromarray(PIXELS).save(os.path.join(folder, b"0.png"))
    with pytest.raises(UserError, match=r"has a name that is not plain text.*rename") as told:
        list_folder(tmp_path)
    assert str(told.value).isprintable()


@pytest.mark.parametrize("name", ["café", "黒猫", "a b", "#1", "train", "c++", "x" * 200, "[a]"])
def test_classes_of_any_plain_name(tmp_path, name):
    fill(tmp_path / "f", f"{name}/0.png", "other/1.png")
    info = dataset_info(f"folder:{tmp_path / 'f'}", "train", tmp_path / "d")
    assert info.class_names == tuple(sorted((name, "other")))


def test_a_file_whose_name_is_no_utf_8_is_read(tmp_path):
    fill(tmp_path / "f", "a/0.png")
    os.rename(tmp_path / "f/a/0.png", os.path.join(os.fsencode(tmp_path / "f/a"), b"\xff\n.png"))
    assert dataset_info(f"folder:{tmp_path / 'f'}", "train", tmp_path / "d").num_examples == 1


def test_one_line_says_what_was_read(tmp_path, capsys):
    fill(tmp_path / "f", "train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "train/emu/")
    for _ in range(2):
        prepare(f"folder:{tmp_path / 'f'}", tmp_path / "d")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert lines == [
        f"data: {tmp_path / 'f'}: images of 2 classes (cat, dog): 2 in train, 1 in val;"
        " left out: folders without images 1 (train/emu)"
    ]


def test_one_class_of_a_flat_folder_is_said(tmp_path, capsys):
    fill(tmp_path / "f", "0.png", "1.png")
    info = dataset_info(f"folder:{tmp_path / 'f'}", "train", tmp_path / "d")
    assert (info.num_examples, info.class_names) == (2, (UNLABELLED,))
    assert "one class, because they are in no class folders: 2 in train" in capsys.readouterr().err


@pytest.mark.parametrize("code", PASSING)
def test_a_folder_that_does_not_answer_for_a_while(tmp_path, monkeypatch, code):
    """Neither a folder that cannot be listed, nor a link that cannot be followed, is left out."""
    fill(tmp_path, "f/cat/0.png", "f/dog/1.png", "other/2.png", "f/fox -> ../other")
    root = tmp_path / "f"
    monkeypatch.setattr(faults, "WAITS", (0.0, 0.0))
    system = Scanning(monkeypatch, "dog", "fox", code)
    system.left = 2
    found = list_folder(root)
    assert found.class_names == ("cat", "dog", "fox")
    assert str(found).endswith("; nothing left out")
    system.left = FOR_EVER
    for place in ("dog", "fox"):
        system.names = {place}
        with pytest.raises(FaultError, match=os.strerror(code)):
            list_folder(root)
    monkeypatch.undo()
    monkeypatch.setattr(faults, "WAITS", (0.0, 0.0))
    Unstable(monkeypatch, "0.png", FOR_EVER, code)
    with pytest.raises(FaultError, match=rf"cannot read .*0\.png: {os.strerror(code)}"):
        found.content()


class Scanning:
    """A folder that cannot be listed, and a link that cannot be followed, `left` times."""

    def __init__(self, patch, folder, link, code):
        self.names, self.left, self.code = {folder, link}, 0, code
        real = os.scandir

        class Entry:
            def __init__(self, entry, system):
                self._entry, self._system = entry, system

            def is_dir(self):
                self._system.fail(self._entry.path)
                return self._entry.is_dir()

            def __getattr__(self, name):
                return getattr(self._entry, name)

        @contextlib.contextmanager
        def scandir(path):
            self.fail(path)
            with real(path) as entries:
                yield [Entry(each, self) if each.name == link else each for each in entries]

        patch.setattr(os, "scandir", scandir)

    def fail(self, path):
        if os.path.basename(path) in self.names and self.left:
            self.left -= 1
            raise OSError(self.code, os.strerror(self.code), str(path))
