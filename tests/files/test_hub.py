"""hf: names stand for files of the hub, or for one line that says why not."""

import sys

import numpy as np
import pytest

from ditjax import convert
from ditjax.data import latents
from ditjax.errors import FaultError, UserError
from ditjax.evaluation.features import open_extractor
from ditjax.evaluation.scoring import open_reference
from ditjax.files import hub
from ditjax.files.store import place
from ditjax.parallel.mesh import make_mesh
from ditjax.weights.torch_file import write_torch
from tests.commands.test_convert import run
from tests.hub_server import stand_in  # noqa: F401
from tests.weight_files import release_state

constants = pytest.importorskip("huggingface_hub.constants", reason="no huggingface_hub")
pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture
def files(stand_in):  # noqa: F811
    stand_in.repositories["owner/name"] = found = {"a.txt": b"a" * 40, "sub/b.txt": b"b"}
    return found


def fails(text, error, match):
    hub.fetched.cache_clear()
    with pytest.raises(error, match=match) as told:
        place(text)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(text) or text in str(told.value)


def test_files_folders_and_revisions(files, stand_in, capsys):  # noqa: F811
    assert place("hf:owner/name/a.txt").read_bytes() == files["a.txt"]
    folder = place("hf:owner/name/sub")
    assert [path.name for path in folder.iterdir()] == ["b.txt"]
    sha = stand_in.sha("owner/name")
    assert f"hf:owner/name/a.txt: commit {sha[:12]}" in capsys.readouterr().err
    asked = len(stand_in.asked)
    assert place("hf:owner/name/sub") == folder  # asked once in a process
    assert len(stand_in.asked) == asked
    files["a.txt"] = b"new"
    hub.fetched.cache_clear()
    assert place("hf:owner/name/a.txt").read_bytes() == b"new"
    stand_in.repositories["owner/data"] = {"c": b"c"}
    assert place("hf:datasets/owner/data/c").read_bytes() == b"c"
    assert any(each.startswith("GET /api/datasets/owner/data") for each in stand_in.asked)


def test_mistakes_are_one_line(files):
    for text in ("hf:", "hf:name", "hf:owner/name/../x", "hf:/owner/name", "hf:owner/name@"):
        fails(text, UserError, "expected hf:OWNER/NAME")
    fails("hf:owner/none", UserError, "no such model, or it is not yours")
    fails("hf:owner/name@v9/a.txt", UserError, "it has no revision 'v9'")
    fails("hf:owner/name/none", UserError, "model owner/name has no 'none'")


def test_half_a_file_is_not_taken(files, stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda _: None)
    stand_in.half = "a.txt"
    fails("hf:owner/name/a.txt", FaultError, "cannot copy hf:owner/name/a.txt: .* kept")
    stand_in.half = ""
    hub.fetched.cache_clear()
    assert place("hf:owner/name/a.txt").read_bytes() == files["a.txt"]


def test_without_a_connection_a_whole_copy_is_read_and_said(files, monkeypatch, capsys):
    copy = place("hf:owner/name/sub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetched.cache_clear()
    assert place("hf:owner/name/sub") == copy
    assert ", a copy: no connection" in capsys.readouterr().err
    fails("hf:owner/name/a.txt", FaultError, "cannot be reached, and no whole copy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.fetched.cache_clear()
    assert place("hf:owner/name/sub") == copy
    fails("hf:owner/name/a.txt", FaultError, "cannot be reached, and no whole copy")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails("hf:owner/name", UserError, r"pip install 'ditjax\[hub\]'")
    with pytest.raises(UserError, match=r"--push=owner/name needs a package .*ditjax\[hub\]"):
        hub.check_push("owner/name")


def test_statistics_and_latents(files, stand_in, tmp_path):  # noqa: F811
    extractor = open_extractor("digits", make_mesh(-1, 1))
    width = 64
    np.savez(tmp_path / "s.npz", mu=np.zeros(width), sigma=np.eye(width))
    files["s.npz"] = (tmp_path / "s.npz").read_bytes()
    there = open_reference("hf:owner/name/s.npz", extractor, 8)
    here = open_reference(str(tmp_path / "s.npz"), extractor, 8)
    assert there.record == here.record
    writer = latents.LatentWriter(tmp_path / "l", "train", (2, 2, 4), ("a",), 4, {"images": "x"})
    zeros = np.zeros((2, 2, 2, 4), np.float32)
    for shard in writer.missing():
        row: latents.LatentRecord = {"mean": zeros, "log_variance": zeros, "label": 0}
        writer.write(shard, (row for _ in shard))
    writer.finish()
    stand_in.repositories["owner/latents"] = {
        path.relative_to(tmp_path / "l").as_posix(): path.read_bytes()
        for path in (tmp_path / "l").rglob("*")
        if path.is_file()
    }
    found = latents.open_latents("hf:datasets/owner/latents").as_data_source("train")
    assert len(found) == 4
    np.testing.assert_array_equal(found[3]["mean"], zeros)


def test_weights_go_there_and_back(stand_in, tmp_path, capsys):  # noqa: F811
    state = release_state(np.float32)
    write_torch(tmp_path / "a.pt", state)
    words = ("--to=ditjax", "--heads=3", f"--out={tmp_path}/w.safetensors")
    run(f"--weights={tmp_path}/a.pt", *words, "--push=owner/new")
    out = capsys.readouterr().out
    assert "pushed to https://huggingface.co/owner/new/commit/" in out
    assert "no scores: none of this step are on record" in out
    assert stand_in.created == {"owner/new": True}
    pushed = stand_in.repositories["owner/new"]
    assert pushed["w.safetensors"] == (tmp_path / "w.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "`hf:owner/new/w.safetensors` stands wherever ditjax takes weights" in card
    assert '| `model.size` | `"2x48x3"` |' in card
    assert "None are on record" in card
    assert "a.pt (release) -> w.safetensors (ditjax)" in card
    assert str(tmp_path) not in card
    run("--weights=hf:owner/new/w.safetensors", "--to=ditjax", f"--out={tmp_path}/v.safetensors")
    assert (tmp_path / "v.safetensors").read_bytes() == pushed["w.safetensors"]


def test_what_may_not_be_pushed(stand_in, tmp_path, capsys):  # noqa: F811
    write_torch(tmp_path / "a.pt", release_state(np.float32))
    words = [f"--weights={tmp_path}/a.pt", "--to=ditjax", "--heads=3"]
    with pytest.raises(UserError, match="--push=name: expected OWNER/NAME"):
        convert.main([*words, f"--out={tmp_path}/w.safetensors", "--push=name"])
    assert not (tmp_path / "w.safetensors").exists()
    stand_in.closed = True
    with pytest.raises(UserError, match=r"the hub refuses it .*hf auth login.* is written") as told:
        convert.main([*words, f"--out={tmp_path}/w.safetensors", "--push=owner/new"])
    assert "\n" not in str(told.value)
    assert (tmp_path / "w.safetensors").exists()
    assert not stand_in.repositories
