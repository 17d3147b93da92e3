"""Captioned data: scenes, folders and shards; the choice among captions; what is refused."""

import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import source, stream
from ditjax.data.caption_scenes import (
    DIGIT_NAMES,
    HUES,
    INK_COLOURS,
    PLACES,
    SCENE_SIZES,
    AltCaptionScenes,
    Thing,
    alt_caption,
    caption_scene,
    is_held_out,
    pair_captions,
)
from ditjax.data.captions import TextSpec, captions_of, find_captions, list_captions
from ditjax.data.scenes import load_handwriting
from ditjax.data.source import DataSpec
from ditjax.errors import UserError
from ditjax.evaluation.captions import judge_scenes, judged_pairs

pytest.importorskip("tokenizers")

TEXT = TextSpec("random", "", "scenes", 12)


def spec(name, root, split="train", size=8, **changes):
    return DataSpec(name, split, size, 3, False, root, text=TEXT._replace(**changes))


def png(shade, side=8):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(root, lines, name="metadata.jsonl"):
    root.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of one, two or three captions."""
    root = tmp_path_factory.mktemp("captions")
    lines = []
    for i in range(6):
        (root / f"{i}.png").write_bytes(png(40 * i))
        lines.append({"file_name": f"{i}.png", "text": [f"{i} {k}" for k in range(1 + i % 3)]})
    return rows(root, lines)


# ---- scenes


@pytest.fixture(scope="module")
def scenes():
    digits = load_handwriting("train")
    return [caption_scene(digits, 0, "train", i) for i in range(300)]


def test_a_scene_is_a_function_of_seed_split_and_index(scenes):
    digits = load_handwriting("train")
    again = caption_scene(digits, 0, "train", 299)
    np.testing.assert_array_equal(again.image, scenes[299].image)
    assert again.captions == scenes[299].captions
    for other in ((1, "train", 299), (0, "test", 299), (0, "train", 298)):
        assert (caption_scene(digits, *other).image != again.image).any()


def test_held_out_pairs_are_in_their_split_alone(scenes):
    digits = load_handwriting("test")
    shown = {(t.digit, t.colour) for each in scenes for t in each.things}
    assert not any(is_held_out(*pair) for pair in shown)
    assert len(shown) > 65
    held = [caption_scene(digits, 0, "test_heldout", i) for i in range(60)]
    assert all(is_held_out(t.digit, t.colour) for each in held for t in each.things)


def test_alt_texts_leave_most_out_and_get_some_wrong(tmp_path):
    """Of 2,000: each attribute is right in a quarter, and wrong in .15 of a table's other rows."""
    thing, n = Thing(digit=3, colour=2, size=1, place=4), 2000
    texts = [alt_caption([thing], 0, i) for i in range(n)]
    assert texts[7] == alt_caption([thing, thing], 0, 7) != alt_caption([thing], 1, 7)
    for word, table in (("three", DIGIT_NAMES), ("yellow", INK_COLOURS), ("large", SCENE_SIZES)):
        named = [set(text.split()) & set(table) for text in texts]
        right = 0.25 + 0.15 / len(table)
        assert np.mean([bool(each) for each in named]) == pytest.approx(0.4, abs=0.045)
        assert np.mean([word in each for each in named]) == pytest.approx(right, abs=0.045)
    assert all(text.split()[-1].isdecimal() for text in texts)
    digits, builder = load_handwriting("train"), AltCaptionScenes(tmp_path)
    scene = caption_scene(digits, 0, "train", 5)
    assert builder._captions(digits, "train", 5, 9) == (alt_caption(scene.things, 0, 5),)
    held = load_handwriting("test")
    full = caption_scene(held, 0, "test", 5).captions
    assert builder._captions(held, "test", 5, 9) == full


def test_captions_are_true_and_the_first_is_full(scenes):
    for each in scenes:
        first = each.things[0]
        assert INK_COLOURS[first.colour] in each.captions[0]
        assert DIGIT_NAMES[first.digit] in each.captions[0]
        if len(each.things) == 2:
            (a, b), relation = each.things, each.captions[0]
            assert ("left of" in relation) != ("above" in relation)
            if "left of" in relation:
                assert (a.place % 3, b.place % 3) == (0, 2)
            else:
                assert (a.place // 3, b.place // 3) == (0, 2)
        else:
            assert f"at the {PLACES[first.place]}" in each.captions[0]
    assert 40 < sum(len(each.things) == 2 for each in scenes) < 110
    assert not any(" a orange" in f" {text}" for each in scenes for text in each.captions)


def test_the_judge_reads_real_scenes_and_nothing_of_noise(scenes):
    alone = [each for each in scenes if len(each.things) == 1]
    truth = np.array([each.things[0] for each in alone])
    found = judge_scenes(np.stack([each.image for each in alone]))
    assert np.mean(found.digit == truth[:, 0]) > 0.95
    assert np.mean(found.colour == truth[:, 1]) == 1
    assert np.mean(found.place == truth[:, 3]) == 1
    assert len(HUES) == len(INK_COLOURS)
    judge_scenes(np.zeros((2, 16, 16, 3), np.uint8))  # empty canvases are judged, as anything


def test_the_judge_reads_the_colours_of_pairs(scenes):
    """Of real scenes they are the caption's, also at half the size."""
    images, captions = (np.stack([x.image for x in scenes]), [x.captions[0] for x in scenes])
    two = np.array([len({thing.colour for thing in x.things}) == 2 for x in scenes])
    small = images.reshape(len(images), 16, 2, 16, 2, 3).mean((2, 4)).astype(np.uint8)
    for shown in (images, small):
        found = judged_pairs(shown, captions)
        assert found.keys() == {"pair_colours", "pair_colours_swapped"}
        np.testing.assert_array_equal(found["pair_colours"], np.where(two, 1, np.nan))
        np.testing.assert_array_equal(found["pair_colours_swapped"], np.where(two, 0, np.nan))
    turned = [
        pair_captions(x.things[1], x.things[0], "left of" if "left of" in text else "above")[0]
        if len(x.things) == 2
        else text
        for x, text in zip(scenes, captions, strict=True)
    ]
    found = judged_pairs(images, turned)
    np.testing.assert_array_equal(found["pair_colours"], np.where(two, 0, np.nan))
    np.testing.assert_array_equal(found["pair_colours_swapped"], np.where(two, 1, np.nan))
    # A half without a digit has no colour, though black is nearest to red.
    half = np.zeros((1, 32, 32, 3), np.uint8)
    half[:, 2:8, 2:8] = (0, 64, 255)
    half[:, 20, 3] = (9, 0, 0)
    assert judged_pairs(half, ["a blue three above a red four"])["pair_colours"] == 0
    half[:, 20:28, 2:8] = (255, 0, 0)
    assert judged_pairs(half, ["a blue three above a red four"])["pair_colours"] == 1
    odd = half[:, :31, :31]
    assert judged_pairs(odd, ["a blue three above a red four"])["pair_colours"] == 1


def test_classes_are_in_the_order_of_their_names_in_every_process():
    """The columns of a batch's classes are: a prepared data set's features have no fixed order."""
    label = tfds.features.ClassLabel
    every = {
        "size": label(names=["s"]),
        "digit": label(names=["0", "1"]),
        "x": tfds.features.Text(),
    }
    for names in itertools.permutations(every):
        found = source.class_names_by_feature({name: every[name] for name in names})
        assert list(found.items()) == [("digit", ("0", "1")), ("size", ("s",))]


# ---- the stream


def taken(data, steps, start=0):
    with stream.train_batches(data, 3, 4, start_step=start) as batches:
        return [next(batches) for _ in range(steps)]


def test_a_resumed_stream_reads_the_same_captions(folder, tmp_path):
    data = spec(f"captions:{folder}", tmp_path)
    whole = taken(data, 9)
    for one, other in zip(whole[5:], taken(data, 4, start=5), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert whole[0]["caption"].dtype == np.int32
    assert whole[0]["caption"].shape == (4, 12)
    # A record of three captions shows all of them, one of one caption only that.
    seen: dict[int, set[bytes]] = {}
    for batch in whole:
        for index, ids in zip(batch["index"], batch["caption"], strict=True):
            seen.setdefault(int(index), set()).add(ids.tobytes())
    counts = {index: len(ids) for index, ids in seen.items()}
    assert counts[0] == counts[3] == 1
    assert max(counts[2], counts[5]) == 3
    firsts = next(stream.in_order(spec(f"captions:{folder}", tmp_path, mode="first"), 6))
    again = next(stream.in_order(data, 6))
    np.testing.assert_array_equal(firsts["caption"], again["caption"])
    assert (np.diff(firsts["image"][:, 0, 0, 0]) > 0).all()


def test_without_a_cache_the_batches_are_the_same(folder, tmp_path):
    data = spec(f"captions:{folder}", tmp_path)
    uncached = DataSpec(**{**vars(data), "cache_mb": 0})
    for one, other in zip(taken(data, 40), taken(uncached, 40), strict=True):
        np.testing.assert_array_equal(one["caption"], other["caption"])


def test_modes_of_several_captions(folder, tmp_path):
    found = {
        mode: next(stream.in_order(spec(f"captions:{folder}", tmp_path, mode=mode), 6))["caption"]
        for mode in ("first", "concat")
    }
    assert (found["first"][0] == found["concat"][0]).all()
    assert (found["first"][2] != found["concat"][2]).any()


# ---- folders and shards


def test_splits_are_folders_or_a_column(tmp_path):
    for split in ("train", "test"):
        rows(tmp_path / "a" / split, [{"file_name": "x.png", "caption": split}])
        (tmp_path / "a" / split / "x.png").write_bytes(png(9))
    found = list_captions(str(tmp_path / "a"))
    assert {name: files[0].captions for name, files in found.files.items()} == {
        "train": ("train",),
        "test": ("test",),
    }
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(png(9))
    text = 'file_name,split,text\nx.png,val,"one, two"\n'
    (tmp_path / "b" / "metadata.csv").write_text(text)
    (only,) = list_captions(str(tmp_path / "b")).files["val"]
    assert only.captions == ("one, two",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "/x.png", "text": "a"}, "expected a path below the folder, without '..'"),
        ({"file_name": "../x.png", "text": "a"}, "expected a path below the folder"),
        ({"file_name": "no.png", "text": "a"}, r"1 files .* missing \(.*no.png\)"),
        ({"file_name": "0.png", "text": " "}, "line 1: a caption is empty"),
        ({"file_name": "0.png", "text": "x" * 4097}, "it has 4,097 characters"),
        ({"file_name": "0.png", "text": 3}, "expected one of text, caption, prompt"),
        ({"file_name": "0.png"}, "line 1: it has no caption"),
        ({"text": "a"}, "line 1: it has no file_name"),
    ],
)
def test_a_row_that_is_none_is_one_line(tmp_path, row, message):
    (tmp_path / "0.png").write_bytes(png(1))
    with pytest.raises(UserError, match=message) as error:
        list_captions(str(rows(tmp_path, [row])))
    assert "\n" not in str(error.value)


def test_a_missing_file_may_be_left_out_and_a_second_name_may_not(folder, tmp_path):
    (tmp_path / "0.png").write_bytes(png(1))
    row = {"file_name": "0.png", "text": "a"}
    assert list_captions(str(rows(tmp_path, [row, {**row, "file_name": "1.png"}])), 1).missing
    with pytest.raises(UserError, match=r"0\.png are named twice"):
        list_captions(str(rows(tmp_path, [row, row])))
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        list_captions(str(tmp_path))
    with pytest.raises(UserError, match=r"expected one of metadata.jsonl.*found none"):
        list_captions(str(tmp_path / "none"))


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_in_order(tmp_path):
    for k in range(2):
        as_json = json.dumps({"caption": f"json {k}"}).encode()
        samples = [(f"s{k}/0.png", png(9 + k)), (f"s{k}/0.json", as_json)]
        shard(tmp_path / f"{k:02d}.tar", [*samples, (f"1{k}.txt", b"text"), (f"1{k}.png", png(k))])
    name = f"captions:{tmp_path}/{{00..01}}.tar"
    listing = list_captions(f"{tmp_path}/{{00..01}}.tar")
    found = [each for each, _ in listing.examples("train")]
    assert [each.name for each in found] == ["s0/0.png", "10.png", "s1/0.png", "11.png"]
    assert found[2].captions == ("json 1",)
    opened = source.open_split(name, "train", tmp_path / "root")
    assert opened.info.num_examples == 4
    assert opened.info.num_classes == 1
    shard(tmp_path / "00.tar", [("0.txt", b"text")])
    with pytest.raises(UserError, match=r"sample '0': it has no image"):
        source.open_split(name, "train", tmp_path / "root")
    with pytest.raises(UserError, match=r"missing: .*02.tar"):
        list_captions(f"{tmp_path}/{{00..02}}.tar")


def test_a_changed_set_is_refused_and_a_touched_one_is_not(tmp_path):
    root = rows(tmp_path / "set", [{"file_name": "0.png", "text": "red"}])
    (root / "0.png").write_bytes(png(1))
    name = f"captions:{root}"
    source.prepare(name, tmp_path)
    first = source.known_content(name, tmp_path)
    rows(
        root,
        [
            {"file_name": "0.png", "text": "red"},
        ][:1],
    )
    (root / "0.png").touch()
    source.prepare(name, tmp_path)
    assert source.known_content(name, tmp_path) == first is not None
    rows(root, [{"file_name": "0.png", "text": "blue"}])
    with pytest.raises(UserError, match=r"removed or changed since .* was converted; undo that"):
        source.prepare(name, tmp_path)


# ---- features


def test_captions_are_found_or_candidates_are_named():
    text, many = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    coco = tfds.features.Sequence({"id": tfds.features.Scalar(np.int64), "text": text})
    assert find_captions({"captions": coco, "image/filename": text}, "", "t") == "captions"
    assert find_captions({"file_name": text}, "", "t") == ""
    with pytest.raises(UserError, match=r"several features hold texts \(a, b\): set config.text"):
        find_captions({"a": text, "b": many}, "", "t")
    with pytest.raises(UserError, match="'c', which holds no texts; those that do: a"):
        find_captions({"a": text}, "c", "t")
    assert captions_of({"text": [b"x", b"y"], "id": [1, 2]}) == ("x", "y")
    assert captions_of([{"text": b"x"}]) == captions_of(b"x") == ("x",)
