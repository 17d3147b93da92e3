"""Names of data sets, as recipes and flags give them."""

import re
from typing import Literal, NamedTuple

from ditjax.errors import UserError

LATENTS = "latents:"
_FOLDER, _CAPTIONS, _SEVIR = "folder:", "captions:", "sevir:"
VERSION = r"\d{1,9}\.\d{1,9}\.\d{1,9}"
_NAME = re.compile(
    rf"(?P<name>\w{{1,100}})(?:/(?P<config>[\w.+-]{{1,200}}))?(?::(?P<version>{VERSION}))?"
)


class DatasetName(NamedTuple):
    """The parts of a data set's name `text`.

    'latents:PATH', 'folder:PATH', 'captions:PATH' and 'sevir:PATH' have a path;
    'NAME[/CONFIG][:VERSION]' has the other three; 'package.module.Builder' is the dotted name of a
    class, and has none of them.
    """

    text: str
    kind: Literal["latents", "folder", "captions", "sevir", "builder", "prepared"]
    path: str = ""
    base: str = ""
    config: str | None = None
    version: str | None = None


class Split(NamedTuple):
    """A split of a data set, or a slice of one: 'train[:10%]'.

    Name and split travel apart: joined to one text, 'folder:/data/birds' and 'train' cannot be told
    from the folder /data/birds/train.
    """

    name: str
    split: str = "train"

    def __str__(self) -> str:
        return f"{self.name}/{self.split}"


def parse_name(text: str) -> DatasetName:
    """Any of the forms of `DatasetName`. Raises UserError for another."""
    if is_latents(text):
        return DatasetName(text, "latents", text.removeprefix(LATENTS))
    if text.startswith(_FOLDER):
        return DatasetName(text, "folder", text.removeprefix(_FOLDER))
    if text.startswith(_CAPTIONS):
        return DatasetName(text, "captions", text.removeprefix(_CAPTIONS))
    if text.startswith(_SEVIR):
        return DatasetName(text, "sevir", text.removeprefix(_SEVIR))
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", text):
        return DatasetName(text, "builder")
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(
            f"data set {text!r} is not a name: expected 'digits', 'digit_scenes', 'caption_scenes',"
            " 'folder:/path', 'captions:/path', 'sevir:/path', a name of tensorflow-datasets such"
            " as 'cifar10', 'mnist:3.0.1' or 'imagenet_resized/64x64', or the dotted name of a"
            " builder of yours."
        )
    return DatasetName(text, "prepared", "", match["name"], match["config"], match["version"])


def is_latents(name: str) -> bool:
    """Whether a name is that of encoded latents, 'latents:PATH'."""
    return name.startswith(LATENTS)
