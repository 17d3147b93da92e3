"""Names of data sets and their parts."""

import pytest

from ditjax.data.names import DatasetName, is_latents, parse_name
from ditjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("digits", ("prepared", "", "digits", None, None)),
        ("mnist:3.0.1", ("prepared", "", "mnist", None, "3.0.1")),
        ("imagenet_resized/64x64", ("prepared", "", "imagenet_resized", "64x64", None)),
        ("a/b:1.2.3", ("prepared", "", "a", "b", "1.2.3")),
        ("folder:/data/a b", ("folder", "/data/a b", "", None, None)),
        ("latents:~/latents", ("latents", "~/latents", "", None, None)),
        ("latents:gs://bucket/l", ("latents", "gs://bucket/l", "", None, None)),
        ("latents:hf:owner/name", ("latents", "hf:owner/name", "", None, None)),
    ],
)
def test_parts(text, parts):
    assert parse_name(text) == DatasetName(text, *parts)
    assert is_latents(text) == (parts[0] == "latents")


@pytest.mark.parametrize("text", ["", "../x", "a/b/c", "mnist:3", "folders:/x", "a b"])
def test_others_are_refused(text):
    with pytest.raises(UserError, match="is not a name"):
        parse_name(text)
