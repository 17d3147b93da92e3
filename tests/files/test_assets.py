"""Weight files: what is written is what is read, and nothing else is read."""

import json
from typing import Any

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.files.assets import MANIFEST, flatten, load_asset, save_assets, unflatten

TREE: dict[str, Any] = {
    "logits": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3)},
    "scale": np.float32(2.0),
}


@pytest.fixture
def folder(tmp_path):
    save_assets(tmp_path, {"digits": (TREE, {"test_accuracy": 0.5})})
    return tmp_path


def test_a_tree_is_flattened_to_paths_and_back():
    flat = flatten(TREE)
    assert list(flat) == ["logits/bias", "logits/kernel", "scale"]
    again = unflatten(flat)
    assert again["logits"].keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(again["logits"]["kernel"], TREE["logits"]["kernel"])
    with pytest.raises(ValueError, match="a/b"):
        flatten({"a/b": np.zeros(1)})


def test_parameters_and_record_come_back_as_written(folder):
    params, record = load_asset("digits", folder)
    assert params["logits"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["logits"]["kernel"], TREE["logits"]["kernel"])
    np.testing.assert_array_equal(params["scale"], 2.0)
    assert record["test_accuracy"] == 0.5


def test_equal_trees_make_equal_bytes_whatever_the_order_of_their_keys(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_assets(other, {"digits": (dict(reversed(TREE.items())), {"test_accuracy": 0.5})})
    for name in ("digits.npz", MANIFEST):
        assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_saving_one_asset_keeps_the_others_and_leaves_no_temporary_file(folder):
    save_assets(folder, {"judge": ({"w": np.zeros(2)}, {})})
    assert {path.name for path in folder.iterdir()} == {"digits.npz", "judge.npz", MANIFEST}
    load_asset("digits", folder)
    load_asset("judge", folder)


@pytest.mark.parametrize("position", [0, 200, -1])
def test_one_flipped_bit_is_refused(folder, position):
    path = folder / "digits.npz"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"SHA-256.*damaged"):
        load_asset("digits", folder)


def test_a_pickle_is_refused_even_when_the_manifest_vouches_for_it(folder):
    save_assets(folder, {"digits": ({"w": np.array([{"code": 1}], dtype=object)}, {})})
    with pytest.raises(UserError, match="not an npz file of plain arrays"):
        load_asset("digits", folder)


def test_names_and_files_that_are_missing_are_named(folder):
    with pytest.raises(UserError, match=r"'digit' is not in .*Did you mean 'digits'"):
        load_asset("digit", folder)
    (folder / "digits.npz").unlink()
    with pytest.raises(UserError, match=r"cannot read .*digits.npz: No such file"):
        load_asset("digits", folder)
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        load_asset("digits", folder / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 1', "not JSON"),
        ("[]", "expected an object"),
        ('{"schema": 2, "assets": {}}', "schema 2"),
        ('{"schema": 1, "assets": {"digits": {}}}', "sha256"),
    ],
)
def test_a_manifest_of_another_form_is_refused(folder, text, message):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        load_asset("digits", folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write assets to"):
        save_assets(tmp_path / "file", {})


def test_the_manifest_is_plain_json(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema"] == 1
    assert len(manifest["assets"]["digits"]["sha256"]) == 64
