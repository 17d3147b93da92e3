"""Tokenizers: the shipped one, and the files that other programs write."""

import json

import numpy as np
import pytest

from ditjax.data.caption_scenes import every_caption
from ditjax.data.tokenizers import cut_line, open_tokenizer
from ditjax.errors import UserError

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def shipped():
    return open_tokenizer("scenes")


def test_the_shipped_tokenizer_is_the_recorded_one(shipped):
    assert (shipped.vocabulary, shipped.end, shipped.pad) == (360, 1, 1)
    tokens = shipped(["a small red three at the top", "A  Red THREE"], 10)
    assert tokens.ids.dtype == np.int32
    assert tokens.ids[0, 0] == 0
    assert (tokens.ids[~tokens.mask] == 1).all()
    assert tokens.ids[0, tokens.mask[0].sum() - 1] == 1


def test_every_text_has_ids_and_captions_are_short(shipped):
    tokens = shipped(every_caption()[::97], 12)
    assert not tokens.cut
    for text in ("Ünïcödé ☃", "", "\t"):
        assert not shipped([text], 40).cut


def test_a_cut_text_keeps_its_end_and_is_named(shipped):
    tokens = shipped(["red " * 30, "red"], 8)
    assert tokens.ids[0, -1] == shipped.end
    assert tokens.mask[0].all()
    assert tokens.cut == ("red " * 30,)
    assert "1 of 2 texts are cut to 8 tokens: 'red red" in cut_line(tokens, 8)
    assert not cut_line(shipped(["red"], 8), 8)


@pytest.mark.parametrize("text", ["x" * 4097, "a\0b"])
def test_a_text_that_is_none_is_refused(shipped, text):
    with pytest.raises(UserError, match="expected at most 4,096 characters and no NUL"):
        shipped([text], 8)


def test_padding_and_truncation_of_the_file_are_not_used(tmp_path):
    """MiniLM's file pads to 128, which would make every text as long."""
    model = tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 2, "red": 1}, "[UNK]")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.enable_padding(pad_id=2, length=128)
    raw.enable_truncation(1)
    raw.save(str(tmp_path / "tokenizer.json"))
    found = open_tokenizer(tmp_path)
    tokens = found(["red red", "blue"], 4)
    np.testing.assert_array_equal(tokens.ids, [[1, 1, 2, 2], [0, 2, 2, 2]])
    np.testing.assert_array_equal(tokens.mask.sum(1), [2, 1])
    assert found.end == -1


def test_clip_of_two_files(tmp_path):
    """vocab.json and merges.txt without tokenizer.json: words end in </w>, lower case."""
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    found = open_tokenizer(tmp_path)
    tokens = found(["AB  a", "b"], 6)
    np.testing.assert_array_equal(tokens.ids, [[5, 4, 2, 6, 6, 6], [5, 3, 6, 6, 6, 6]])
    np.testing.assert_array_equal(tokens.mask.sum(1), [4, 3])
    assert (found.end, found.pad) == (6, 6)


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read \(No such file"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer") as error:
        open_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_the_pieces_of_a_text_are_its_words(shipped):
    ids = shipped(["a large red three", "two"], 8).ids
    first, second = shipped.pieces(ids)
    assert [piece for piece in first if piece] == ["a", "large", "red", "three"]
    assert [piece for piece in second if piece] == ["two"]
    assert len(first) == len(second) == 8
