"""Tokenizers: texts -> ids, by the files that published text encoders come with.

The package `tokenizers` does the work (`pip install 'ditjax[text]'`); it needs no network. Padding
and truncation are done here, because files have their own baked in: MiniLM's pads to 128.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.errors import UserError, first_few, reason
from ditjax.files.assets import asset_bytes

SHIPPED_TOKENIZER = "scenes"  # assets/scene_bpe.json
MAX_TEXT = 4096  # characters
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PADDING = ("[PAD]", "<pad>")
_WORD_MARKS = ("\u0120", "</w>", "\u2581")  # of byte-level BPE, CLIP and SentencePiece


class Tokens(NamedTuple):
    """Token ids i32[n,M], and where they are text: mask bool[n,M]. `cut` are the texts cut short.

    Padding follows the text, whose last id is the tokenizer's end, even if it was cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: tuple[str, ...]


class Tokenizer:
    """A tokenizer of a file. `vocabulary` counts its ids, `sha256` is that of its file.

    `end` is the id that ends every text, -1 if there is none; `pad` that of padding.
    """

    def __init__(self, tokenizer: Any, sha256: str, pad_token: str = "") -> None:
        stated = tokenizer.padding
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer, self.sha256 = tokenizer, sha256
        self.vocabulary = int(tokenizer.get_vocab_size())
        empty = tokenizer.encode("").ids
        self.end = int(empty[-1]) if empty else -1
        pads = [tokenizer.token_to_id(name) for name in (pad_token, *_PADDING) if name]
        if stated:
            pads.insert(0, stated["pad_id"])
        # CLIP pads with the end of the text.
        self.pad = next((int(each) for each in pads if each is not None), max(self.end, 0))

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """The ids of texts, padded or cut to `length`. Raises UserError for what is no text."""
        for text in texts:
            check_text(text)
        ids = np.full((len(texts), length), self.pad, np.int32)
        mask, cut = np.zeros((len(texts), length), bool), []
        encoded = self._tokenizer.encode_batch(list(texts))
        for row, (text, each) in enumerate(zip(texts, encoded, strict=True)):
            found = each.ids
            if len(found) > length:
                cut.append(text)
                found = found[:length] if self.end < 0 else [*found[: length - 1], self.end]
            ids[row, : len(found)], mask[row, : len(found)] = found, True
        return Tokens(ids, mask, tuple(cut))

    def pieces(self, ids: np.ndarray) -> list[list[str]]:
        """The text of each of ids i32[n,M]: '' of padding and of what marks a text's ends.

        A file without a decoder leaves the marks of a word's ends, which are taken out.
        """

        def piece(token: int) -> str:
            found: str = self._tokenizer.decode([token])
            for mark in _WORD_MARKS:
                found = found.replace(mark, " ")
            return found.strip()

        known = {int(each): piece(int(each)) for each in np.unique(ids)}
        return [[known[int(each)] for each in row] for row in ids]


def check_text(text: str) -> None:
    """Raise UserError for a text that is too long, or that holds a NUL."""
    if len(text) > MAX_TEXT or "\0" in text:
        what = "a NUL" if "\0" in text else f"{len(text):,} characters"
        raise UserError(
            f"text {text[:40]!r}...: it has {what}; expected at most {MAX_TEXT:,} characters and"
            " no NUL."
        )


def cut_line(tokens: Tokens, length: int) -> str:
    """A line that says which texts were cut to `length` tokens, '' if none was."""
    if not tokens.cut:
        return ""
    return (
        f"warning: {len(tokens.cut)} of {len(tokens.ids)} texts are cut to {length} tokens:"
        f" {first_few([repr(text[:60]) for text in tokens.cut], 2)}"
    )


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder or file, or the shipped one for 'scenes'.

    A folder holds tokenizer.json, or CLIP's vocab.json and merges.txt. Raises UserError for another
    one, and if the package `tokenizers` is missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"tokenizer {os.fspath(path)!r} needs the package tokenizers: pip install"
            " 'ditjax[text]'."
        ) from None
    if os.fspath(path) == SHIPPED_TOKENIZER:
        content = asset_bytes("scene_bpe", ".json")[0]
        return Tokenizer(tokenizers.Tokenizer.from_str(content.decode()), _sha256(content))
    place = Path(path)
    file = place / "tokenizer.json" if place.is_dir() else place
    try:
        if not file.exists() and (place / "merges.txt").exists():
            return _clip_tokenizer(place)
        content = file.read_bytes()
        found = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except OSError as error:
        raise UserError(
            f"tokenizer {os.fspath(path)!r}: {file} cannot be read ({error.strerror}); expected"
            " a folder with tokenizer.json, or with CLIP's vocab.json and merges.txt."
        ) from error
    except Exception as error:  # the parser raises plain exceptions
        raise UserError(f"{file} is not a tokenizer ({reason(error)}).") from error
    return Tokenizer(found, _sha256(content), _stated_pad(file.parent))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _stated_pad(folder: Path) -> str:
    """The padding token that tokenizer_config.json names, or ''."""
    try:
        stated = json.loads((folder / "tokenizer_config.json").read_bytes()).get("pad_token")
    except (OSError, ValueError, AttributeError):
        return ""
    stated = stated.get("content") if isinstance(stated, dict) else stated
    return stated if isinstance(stated, str) else ""


def _clip_tokenizer(folder: Path) -> Tokenizer:
    """CLIP's tokenizer of vocab.json and merges.txt: byte-level BPE of lower-cased words."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Raw

    names = (os.fspath(folder / "vocab.json"), os.fspath(folder / "merges.txt"))
    vocabulary, merges = models.BPE.read_file(*names)
    start, end = "<|startoftext|>", "<|endoftext|>"
    model = models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end)
    found = Raw(model)
    found.add_special_tokens([start, end])
    found.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    found.post_processor = processors.RobertaProcessing(
        (end, vocabulary[end]),
        (start, vocabulary[start]),
        trim_offsets=False,
        add_prefix_space=False,
    )
    return Tokenizer(found, _sha256(b"".join(Path(name).read_bytes() for name in names)))
