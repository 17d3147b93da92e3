"""What is prepared is exactly what was given, once, and every mistake is told with its remedy."""

import io
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import folders, pictures, source
from ditjax.data.builders import Digits, is_complete, write_below
from ditjax.data.folders import list_folder
from ditjax.data.pictures import decode_image
from ditjax.data.records import load_arrays
from ditjax.data.source import data_root, prepare
from ditjax.errors import UserError
from ditjax.files import lease, store
from ditjax.files.store import place
from tests.memory_store import memory  # noqa: F401 (a fixture)


def photograph(seed, width=12, height=9):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, file_format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def photographs(tmp_path):
    """Two classes, four formats, names in several cases; and what is to be left out."""
    root = tmp_path / "photographs"
    (root / "zebra" / "more").mkdir(parents=True)
    (root / "ant").mkdir()
    (root / ".hidden").mkdir()
    photograph(0).save(root / "zebra" / "a.PNG")
    photograph(1).save(root / "zebra" / "b.JpEg")
    photograph(2).save(root / "zebra" / "more" / "c.webp")
    photograph(3).save(root / "ant" / "d.bmp")
    photograph(4).save(root / ".hidden" / "e.png")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "ant" / ".d.png").write_text("no image either")
    return root


def records(builder, split="train"):
    raw = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [raw[i] for i in range(len(raw))]


def test_digits_are_scikit_learns_split_by_the_rule(digits_dir):
    digits = sklearn.datasets.load_digits()
    builder = prepare("digits", digits_dir)
    for split, rows in (
        ("train", [i for i in range(1797) if i % 5 != 4]),
        ("test", range(4, 1797, 5)),
    ):
        found = records(builder, split)
        assert len(found) == len(rows)
        for record, i in zip(found, rows, strict=True):
            assert record["label"] == digits.target[i]
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            np.testing.assert_array_equal(pixels, np.floor(digits.images[i] * 15.9375 + 0.5))


def test_digits_say_where_they_come_from(digits_dir):
    info = prepare("digits", digits_dir).info
    assert info.features["label"].names == list("0123456789")
    assert info.features["image"].shape == (8, 8, 1)
    assert info.file_format.value == "array_record"
    assert "UCI" in info.description
    assert "scikit-learn" in info.description
    assert "10.24432/C50P49" in info.citation


def test_prepared_once_then_only_opened(digits_dir, monkeypatch):
    def never(*_, **__):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", never)
    monkeypatch.setattr(source, "_exclusive", never)
    for name in ("digits", "digits:1.0.0"):
        assert prepare(name, digits_dir).info.full_name == "digits/1.0.0"


def test_two_at_once_prepare_once(tmp_path, monkeypatch):
    calls, together = [], threading.Barrier(2, timeout=10)
    load_digits = sklearn.datasets.load_digits

    def counted():
        calls.append(1)
        return load_digits()

    def find_nothing_together(folder):
        found = is_complete(folder)
        if not found:
            together.wait()
        return found

    monkeypatch.setattr(sklearn.datasets, "load_digits", counted)
    monkeypatch.setattr(source, "is_complete", find_nothing_together)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(prepare, ["digits"] * 2, [tmp_path] * 2))
    assert len(calls) == 2  # once for each of the two splits
    assert [b.info.splits["test"].num_examples for b in both] == [359, 359]


def test_what_a_killed_process_left_is_not_read_and_is_removed(tmp_path, digits_dir):
    whole = digits_dir / "digits" / "1.0.0"
    left = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"
    shutil.copytree(whole, left)
    builder = prepare("digits", tmp_path)
    assert Path(builder.data_dir) == tmp_path / "digits" / "1.0.0"
    assert not left.exists()


def test_data_root(monkeypatch):
    monkeypatch.setenv("DITJAX_DATA", "/somewhere")
    assert data_root() == Path("/somewhere")
    assert data_root("/given") == Path("/given")
    monkeypatch.delenv("DITJAX_DATA")
    assert data_root() == Path.home() / ".cache/ditjax/data"
    assert str(data_root("gs://bucket/data")) == "gs://bucket/data"
    with pytest.raises(UserError, match="az:// cannot be read or written"):
        data_root("az://bucket/data")
    with pytest.raises(UserError, match=r"data_dir is 'None': expected a folder; leave it empty"):
        data_root("None")
    monkeypatch.setenv("DITJAX_DATA", "None")
    with pytest.raises(UserError, match=r"\$DITJAX_DATA is 'None': .* write \./None for"):
        data_root()
    assert data_root("./None") == Path.cwd() / "None"


def test_folder_keeps_the_files_own_bytes(photographs, tmp_path):
    builder = prepare(f"folder:{photographs}", tmp_path / "data")
    assert builder.info.features["label"].names == ["ant", "zebra"]
    assert list(builder.info.splits) == ["train"]
    found = {record["file_name"].decode(): record for record in records(builder)}
    assert sorted(found) == ["ant/d.bmp", "zebra/a.PNG", "zebra/b.JpEg", "zebra/more/c.webp"]
    for name, record in found.items():
        assert record["image"] == (photographs / name).read_bytes()
        assert record["label"] == (1 if name.startswith("zebra") else 0)


def test_folder_records_are_mixed_so_that_slices_hold_every_class(tmp_path):
    for label in "ab":
        (tmp_path / "f" / label).mkdir(parents=True)
        for i in range(20):
            photograph(i, 2, 2).save(tmp_path / "f" / label / f"{i}.png")
    labels = [r["label"] for r in records(prepare(f"folder:{tmp_path / 'f'}", tmp_path / "d"))]
    assert sum(labels) == 20
    assert 3 <= sum(labels[:20]) <= 17


def test_folder_with_splits(tmp_path):
    root = tmp_path / "f"
    for split, label in (("train", "a"), ("train", "b"), ("val", "b"), ("other", "c")):
        (root / split / label).mkdir(parents=True)
        photograph(0).save(root / split / label / "0.png")
    builder = prepare(f"folder:{root}", tmp_path / "data")
    assert sorted(builder.info.splits) == ["train", "val"]
    assert builder.info.features["label"].names == ["a", "b"]
    assert [record["label"] for record in records(builder, "val")] == [1]
    (root / "val" / "new").mkdir()
    photograph(0).save(root / "val" / "new" / "0.png")
    with pytest.raises(UserError, match=r"val/new is a class that .*train does not have"):
        list_folder(root)


def test_a_class_named_train_is_a_class(tmp_path):
    for label in ("train", "plane"):
        (tmp_path / label).mkdir()
        photograph(0).save(tmp_path / label / "0.png")
    listing = list_folder(tmp_path)
    assert listing.class_names == ("plane", "train")
    assert list(listing.files) == ["train"]


def test_folders_of_one_name_never_mix(tmp_path):
    for parent, count in (("x", 1), ("y", 2)):
        (tmp_path / parent / "same" / "a").mkdir(parents=True)
        for i in range(count):
            photograph(i).save(tmp_path / parent / "same" / "a" / f"{i}.png")
    found = [prepare(f"folder:{tmp_path / parent / 'same'}", tmp_path / "data") for parent in "xyx"]
    assert [b.info.splits["train"].num_examples for b in found] == [1, 2, 1]


@pytest.mark.parametrize("change", ["add", "remove", "touch"])
def test_a_changed_folder_is_refused(photographs, tmp_path, change):
    name = f"folder:{photographs}"
    prepare(name, tmp_path / "data")
    prepare(name, tmp_path / "data")
    if change == "add":
        photograph(9).save(photographs / "ant" / "new.png")
    elif change == "remove":
        (photographs / "zebra" / "a.PNG").unlink()
    else:
        (photographs / "zebra" / "a.PNG").write_bytes(encoded(photograph(7)))
    with pytest.raises(UserError, match="changed since") as told:
        prepare(name, tmp_path / "data")
    (record,) = (tmp_path / "data" / "image_folder").glob("photographs-*.json")
    assert f"rm -r '{record}'" in str(told.value)
    record.unlink()  # the remedy
    assert (
        prepare(name, tmp_path / "data").info.splits["train"].num_examples
        == 4 + ({"add": 1, "remove": -1, "touch": 0}[change])
    )


def test_a_conversion_outlives_its_folder(photographs, tmp_path):
    name = f"folder:{photographs}"
    prepare(name, tmp_path / "data")
    shutil.rmtree(photographs)
    assert prepare(name, tmp_path / "data").info.splits["train"].num_examples == 4
    with pytest.raises(UserError, match="there is no folder"):
        prepare(name, tmp_path / "elsewhere")


def test_a_damaged_image_is_named_and_nothing_is_left(photographs, tmp_path):
    bad = photographs / "zebra" / "b.JpEg"
    whole = bad.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"not an image at all"):
        bad.write_bytes(damage)
        with pytest.raises(UserError, match=r"zebra/b\.JpEg is not a sound image"):
            prepare(f"folder:{photographs}", tmp_path / "data")
        assert not list((tmp_path / "data").rglob("*.json"))
        assert not list((tmp_path / "data").rglob("*array_record*"))
    bad.write_bytes(whole)
    assert prepare(f"folder:{photographs}", tmp_path / "data").info.splits


def test_too_many_pixels(monkeypatch):
    picture = encoded(photograph(0, 12, 9))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 108)
    assert decode_image(picture).size == (12, 9)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 107)
    with pytest.raises(ValueError, match="12x9 is more than 107 pixels"):
        decode_image(picture)


def test_only_image_formats_are_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    with pytest.raises(ValueError, match="cannot identify"):
        decode_image(postscript)


def test_a_folder_without_images(tmp_path):
    (tmp_path / "f" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"f holds no image: .*It holds: folders without images 1"):
        prepare(f"folder:{tmp_path / 'f'}", tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("digit", r"unknown.*Did you mean 'digits'\?"),
        ("imagenet2021", r"Did you mean 'imagenet2012'\?"),
        ("../digits", "is not a name"),
        ("digits:1.0", "is not a name"),
        ("digits:2.0.0", "expected 'digits'"),
        ("folder:", "there is no folder"),
    ],
)
def test_unknown_names(name, told, tmp_path):
    with pytest.raises(UserError, match=told) as error:
        prepare(name, tmp_path)
    assert "\n" not in str(error.value)


def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*DITJAX_DATA"):
        prepare("digits", tmp_path / "file" / "data")


def test_without_tensorflow_others_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(UserError, match=r"pip install 'ditjax\[prepare\]'"):
        prepare("cifar10", tmp_path)


def test_with_tensorflow_others_are_prepared_in_another_process(tmp_path, digits_dir, monkeypatch):
    ran = []

    def run(command, env, check):
        ran.append(command)
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        if len(ran) == 1:
            return subprocess.CompletedProcess(command, 1)
        shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "cifar10" / "1.0.0")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="could not be downloaded"):
        prepare("cifar10", tmp_path)
    assert prepare("cifar10", tmp_path).info.splits["test"].num_examples == 359
    assert ran[1][-2:] == ["cifar10", str(tmp_path)]
    assert "array_record" in ran[1][2]


def test_versions_and_configurations(digits_dir, tmp_path):
    whole = digits_dir / "digits" / "1.0.0"
    for version in ("2.0.0", "10.0.0"):
        shutil.copytree(whole, tmp_path / "one" / version)
    for config in ("a", "b"):
        shutil.copytree(whole, tmp_path / "two" / config / "1.0.0")
    shutil.copytree(whole, tmp_path / "three" / "only" / "1.0.0")

    def where(name):
        return str(Path(prepare(name, tmp_path).data_dir).relative_to(tmp_path))

    assert where("one") == "one/10.0.0"
    assert where("one:2.0.0") == "one/2.0.0"
    assert where("two/b") == "two/b/1.0.0"
    assert where("three") == "three/only/1.0.0"
    with pytest.raises(UserError, match="name one of two/a, two/b"):
        prepare("two", tmp_path)


def test_another_file_format_or_a_broken_description(digits_dir, tmp_path):
    copy = tmp_path / "digits" / "1.0.0"
    shutil.copytree(digits_dir / "digits" / "1.0.0", copy)
    described = json.loads((copy / "dataset_info.json").read_text())
    described["fileFormat"] = "tfrecord"
    (copy / "dataset_info.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"stored as tfrecord.*--file_format=array_record"):
        prepare("digits", tmp_path)
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as error:
        prepare("digits", tmp_path)
    assert "\n" not in str(error.value)


def copied(root, place):
    """A copy with the same bytes and other times."""
    shutil.copytree(root, place, copy_function=shutil.copyfile)
    return place


def touched(root):
    os.utime(root / "ant" / "d.bmp")
    return root


SPELLINGS = {
    "by a link": lambda f, t: (t / "link").symlink_to(f) or t / "link",
    "with dots": lambda f, t: f"{t}/x/../{f.name}",
    "with a slash": lambda f, t: f"{f}/",
    "copied": lambda f, t: copied(f, t / "copy"),
    "moved": lambda f, t: f.rename(t / "moved"),
    "touched": lambda f, t: touched(f),
    "rewritten": lambda f, t: (
        (f / "ant" / "d.bmp").write_bytes((f / "ant" / "d.bmp").read_bytes()) and f
    ),
    "with a note beside": lambda f, t: (f / "ant" / "more.txt").write_text("none") and f,
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_a_folder_is_its_content_wherever_it_is(photographs, tmp_path, kind, monkeypatch):
    first = prepare(f"folder:{photographs}", tmp_path / "data")
    monkeypatch.setattr(source, "write_below", None)  # nothing is converted again
    again = prepare(f"folder:{SPELLINGS[kind](photographs, tmp_path)}", tmp_path / "data")
    assert again.data_dir == first.data_dir
    assert again.info.full_name == first.info.full_name


def test_the_files_are_read_again_only_if_one_was_touched(photographs, tmp_path, monkeypatch):
    read, content = [], folders.Listing.content

    def counted(listing):
        read.append(1)
        return content(listing)

    monkeypatch.setattr(folders.Listing, "content", counted)
    for touches in (False, False, True, False):
        if touches:
            touched(photographs)
        prepare(f"folder:{photographs}", tmp_path / "data")
    assert len(read) == 2


def test_other_content_of_the_same_names_and_sizes_is_another_set(tmp_path):
    """Also if an archive restored equal times."""
    for name, value in (("x", 0), ("y", 1)):
        (tmp_path / name / "a").mkdir(parents=True)
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(tmp_path / name / "a" / "0.bmp")
        os.utime(tmp_path / name / "a" / "0.bmp", (0, 0))
    found = [prepare(f"folder:{tmp_path / name}", tmp_path / "data") for name in "xy"]
    assert len({builder.info.full_name for builder in found}) == 2


def test_a_conversion_that_was_prepared_elsewhere_is_found_by_content(photographs, tmp_path):
    """In a root that has no record of this path, and that may not be written to."""
    prepare(f"folder:{photographs}", tmp_path / "data")
    moved = photographs.rename(tmp_path / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        patch.setattr(source, "_exclusive", None)
        patch.setattr(source, "write_below", None)
        assert prepare(f"folder:{moved}", tmp_path / "data").info.splits["train"].num_examples == 4


def converted_by_version_1(folder, root):
    """As ditjax 0.x left a conversion: named by the path, without a record."""
    builder = prepare(f"folder:{folder}", root)
    (record,) = (root / "image_folder").glob("*.json")
    old = root / "image_folder" / record.stem / "1.0.0"
    old.parent.mkdir()
    Path(builder.data_dir).rename(old)
    record.unlink()
    for file in old.iterdir():
        if file.suffix == ".json":
            text = file.read_text().replace('"version": "2.0.0"', '"version": "1.0.0"')
            file.write_text(text.replace('"2.0.0":', '"0.9.9":'))
    return old


def test_a_conversion_of_version_1_is_read_as_it_was(photographs, tmp_path, capsys):
    root = tmp_path / "data"
    old = converted_by_version_1(photographs, root)
    for _ in range(2):
        os.utime(photographs / "ant" / "d.bmp")
        assert prepare(f"folder:{photographs}", root).data_dir == str(old)
    told = capsys.readouterr().err
    assert "an older ditjax, which is read: 4 in train; images are not turned upright" in told
    photograph(9).save(photographs / "ant" / "new.png")
    with pytest.raises(UserError, match="changed since") as told:
        prepare(f"folder:{photographs}", root)
    assert f"'{old}'" in str(told.value)


def test_pixels_of_version_1_are_what_they_were(tmp_path):
    """Converted to RGB, whatever is transparent, and turned by nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, alpha = photograph(0, 8, 8), photograph(1, 8, 8).convert("L")
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {"exif.png": (picture, {"exif": exif})}
    for name, mode in (("rgba.png", "RGBA"), ("la.png", "LA")):
        image = picture.convert(mode)
        image.putalpha(alpha)
        files[name] = (image, {})
    files["palette.png"] = (picture.quantize(8), {"transparency": 2})
    files["key.png"] = (picture, {"transparency": picture.getpixel((0, 0))})
    deep = Image.fromarray(np.full((8, 8), 0x4321, np.uint16))
    files["deep.png"] = (deep, {"transparency": 0x4321})
    (tmp_path / "f" / "a").mkdir(parents=True)
    for name, (image, options) in files.items():
        image.save(tmp_path / "f" / "a" / name, **options)
    converted_by_version_1(tmp_path / "f", tmp_path / "data")
    name = f"folder:{tmp_path / 'f'}"
    for channels, mode in ((1, "L"), (3, "RGB")):
        found = load_arrays(name, "train", tmp_path / "data", 8, channels)["image"]
        raw = records(prepare(name, tmp_path / "data"))
        for pixels, record in zip(found, raw, strict=True):
            image, _ = files[record["file_name"].decode()[2:]]
            seen = Image.new("L", (8, 8), 0x43) if image is deep else image
            expected = np.asarray(seen.convert(mode)).reshape(8, 8, channels)
            np.testing.assert_array_equal(pixels, expected)


def test_files_that_change_while_they_are_read(photographs, tmp_path, monkeypatch):
    content = folders.Listing.content

    def then_changed(listing):
        found = content(listing)
        photograph(9).save(photographs / "zebra" / "a.PNG")
        return found

    monkeypatch.setattr(folders.Listing, "content", then_changed)
    with pytest.raises(UserError, match="changed while they were read: run the same command"):
        prepare(f"folder:{photographs}", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_a_data_set_on_a_store_is_whole_with_its_last_object(memory, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    root = place("gs://bucket/data")
    made = []

    def make(folder):
        made.append(folder)
        return Digits(data_dir=folder, file_format="array_record")

    def fails(call):
        if call.startswith("put") and call.endswith("dataset_info.json"):
            raise TimeoutError("no answer")

    memory.fault = fails
    with pytest.raises(TimeoutError):
        write_below(root, make)
    assert any(call.startswith("put") for call in memory.calls)
    assert not is_complete(root / "digits" / "1.0.0")
    memory.fault, memory.calls = lambda call: None, []
    write_below(root, make)
    puts = [call for call in memory.calls if call.startswith("put")]
    assert puts[-1] == "put data/digits/1.0.0/dataset_info.json"
    assert is_complete(root / "digits" / "1.0.0")
    here = prepare("digits", tmp_path / "here")
    for path in Path(here.data_dir).glob("*.array_record-*"):
        assert (root / "digits" / "1.0.0" / path.name).read_bytes() == path.read_bytes()
    memory.calls = []
    write_below(root, make)
    assert not any(call.startswith("put") for call in memory.calls)
    assert len(made) == 3
    assert not list(tmp_path.glob("ditjax-*"))


def test_one_process_at_a_time_prepares_on_a_store(memory):  # noqa: F811
    root = place("gs://bucket/data")
    with source._exclusive("digits", root):
        assert list(lease.holders([root / ".prepare.lease"], 0.0))
    assert not list(lease.holders([root / ".prepare.lease"], 0.0))


def test_a_folder_on_a_store_is_a_data_set(memory, photographs, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "copies"))
    there, data = place("gs://bucket/photographs"), tmp_path / "data"
    store.upload_tree(photographs, there)
    ours, theirs = prepare(f"folder:{there}", data), prepare(f"folder:{photographs}", data)
    assert ours.data_dir == theirs.data_dir
    memory.calls = []
    assert prepare(f"folder:{there}", data).data_dir == ours.data_dir
    assert not any(call.startswith("get") for call in memory.calls)
    buffer = encoded(photograph(9))
    (there / "ant" / "new.png").write_bytes(buffer)
    assert records(prepare(f"folder:{there}", data))[-1].keys() == records(ours)[-1].keys()
    assert len(records(prepare(f"folder:{there}", data))) == len(records(ours)) + 1
    with pytest.raises(UserError, match="there is no folder 'gs://bucket/none'"):
        prepare("folder:gs://bucket/none", data)
    with pytest.raises(UserError, match="TensorFlow prepares on disks"):
        prepare("cifar10", "gs://bucket/data")


def test_a_builder_with_configurations_is_prepared_once(tmp_path, monkeypatch):
    """It lies under its default configuration, where the second call finds it."""
    name = "tests.toys.data.SizedSides"
    builder = source.prepare(name, tmp_path)
    assert Path(builder.data_dir) == tmp_path / "sized_sides" / "small" / "1.0.0"
    assert builder.info.splits["train"].num_examples == 64
    monkeypatch.setattr(source, "write_below", None)
    assert source.prepare(name, tmp_path).data_dir == builder.data_dir
