"""Places on stores: what a path of an object can do, and how each failure is reported."""

import ast
import errno
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ditjax.errors import FaultError, UserError
from ditjax.files import atomic, npz, store
from ditjax.files.store import Mirror, ObjectPath, place
from tests.memory_store import Memory, memory  # noqa: F401 (a fixture)

ROOT = "gs://bucket/study"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("az://bucket/x", r"az:// cannot be read or written: .* gs://BUCKET/NAME or s3://"),
        ("gs://", "expected gs://BUCKET/NAME"),
        ("s3://Bucket/x", "expected s3://BUCKET/NAME"),
        ("gs://bucket/a/../b", "neither . nor .."),
    ],
)
def test_a_url_that_names_no_place_is_refused(text, match):
    with pytest.raises(UserError, match=match):
        place(text)


def test_a_local_path_stays_one():
    for text in ("a/b", "/a/b", "~/a", "a:b/c", "."):
        assert type(place(text)) is type(Path(text))
        assert place(text) == Path(text)
    # What pathlib makes of a URL leads to no folder 'gs:' of this machine.
    assert str(place(Path("gs://bucket/x"))) == "gs://bucket/x"


def test_no_client_is_imported_before_a_url_is_met():
    tree = ast.parse(Path(store.__file__).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names]
            name = node.module if isinstance(node, ast.ImportFrom) else names[0]
            assert name is not None
            assert name.partition(".")[0] in {*sys.stdlib_module_names, "ditjax"}


def test_a_client_that_is_missing_is_named_with_its_extra(monkeypatch):
    for scheme, module in (("gs", "gcsfs"), ("s3", "boto3")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"{scheme}://.*pip install 'ditjax\[{scheme}|gcs\]'"):
            store._STORES[scheme]()


def test_an_object_is_found_as_a_file_is(memory):  # noqa: F811
    root = place(ROOT)
    assert not root.exists()
    assert list(root.iterdir()) == []
    (root / "a" / "b.txt").write_text("hello")
    atomic.write_json(root / "c.json", {"x": 1})
    assert (root.is_dir(), root.is_file(), (root / "a/b.txt").is_file()) == (True, False, True)
    assert [path.name for path in root.iterdir()] == ["a", "c.json"]
    assert list(root.glob("*/b*")) == list(root.glob("a/b.txt")) == [root / "a/b.txt"]
    assert str((root / "a/b.txt").with_suffix(".png").relative_to(root)) == "a/b.png"
    assert os.fspath(root / "c.json") == f"{ROOT}/c.json"
    assert atomic.load_json(f"{ROOT}/c.json") == {"x": 1}
    with (root / "a/b.txt").open() as file:
        assert file.readlines() == ["hello"]
    with pytest.raises(OSError, match="cannot be opened"):
        (root / "a/b.txt").open("a")
    with pytest.raises(OSError, match="renamed"):
        (root / "a/b.txt").rename(root / "d")
    walked = list(store.walk_tree(root, lambda error: pytest.fail(str(error))))
    assert walked == [(root, ["a"], ["c.json"]), (root / "a", [], ["b.txt"])]
    store.remove_tree(root)
    assert not memory.objects


def test_an_array_is_read_by_ranges_of_one_version(memory, tmp_path):  # noqa: F811
    whole = np.arange(1 << 19)
    np.savez(tmp_path / "x.npz", arr_0=whole)
    path = place(ROOT) / "x.npz"
    path.write_bytes((tmp_path / "x.npz").read_bytes())
    memory.calls.clear()
    assert (npz.load_array(path, "arr_0") == whole).all()
    assert 2 <= sum(call.startswith("get") for call in memory.calls) < 10
    with path.open("rb") as file:
        file.read(1)
        path.write_bytes(bytes(1 << 22))
        with pytest.raises(OSError, match="written"):
            file.read()


def test_a_write_that_fails_leaves_the_object_as_it_was(memory):  # noqa: F811
    path = place(ROOT) / "x"
    path.write_bytes(b"before")

    def fail():
        with atomic.atomic(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == b"before"
    assert list(memory.objects) == ["study/x"]


def test_each_failure_is_one_line(memory):  # noqa: F811
    with pytest.raises(UserError, match=r"gs://other/x: there is no bucket 'other'"):
        atomic.write_json("gs://other/x", {})
    with pytest.raises(UserError, match=r"gs://closed/x: the store refuses it"):
        atomic.write_json("gs://closed/x", {})
    with pytest.raises(UserError, match=r"gs://closed/x: the store refuses it"):
        atomic.read_json("gs://closed/x")
    (place(ROOT) / "half.json").write_bytes(b'{"a": ')
    with pytest.raises(UserError, match=r"half\.json is not JSON"):
        atomic.read_json(place(ROOT) / "half.json")

    def silent(call):
        raise TimeoutError(errno.ETIMEDOUT, "the store does not answer: refused")

    memory.fault = silent
    with pytest.raises(FaultError, match=r"does not answer: refused\. Run the same command again"):
        atomic.write_json(ROOT, {})


def test_of_many_writers_of_one_version_one_succeeds(memory):  # noqa: F811
    path = place(ROOT) / "x"
    assert isinstance(path, ObjectPath)
    for version in (store.ABSENT, "1"):
        with ThreadPoolExecutor(8) as pool:
            args = [(path, b"%d" % k, version) for k in range(8)]
            results = list(pool.map(lambda each: store.write_if(*each), args))
        assert sorted(results) == [False] * 7 + [True]


def test_a_line_is_added_to_what_another_process_has_just_written(memory):  # noqa: F811
    path = place(ROOT) / "damaged.txt"

    def meanwhile(call):
        if call.startswith("put") and "study/damaged.txt" not in memory.objects:
            memory.objects["study/damaged.txt"] = b"theirs\n", "0"

    memory.fault = meanwhile
    store.append_line(path, "ours")
    assert path.read_text() == "theirs\nours\n"


def test_a_copy_is_made_once_for_each_version(memory, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path))
    root = place(ROOT)
    (root / "model" / "a.json").write_text("1")
    (root / "model" / "b" / "w.bin").write_bytes(b"w")
    first = store.local_copy(root / "model")
    assert (first.name, (first / "a.json").read_text()) == ("model", "1")
    assert (first / "b" / "w.bin").read_bytes() == b"w"
    memory.calls.clear()
    assert store.local_copy(f"{ROOT}/model") == first
    assert not any(call.startswith("get") for call in memory.calls)
    (root / "model" / "a.json").write_text("2")
    assert (store.local_copy(root / "model") / "a.json").read_text() == "2"
    assert capsys.readouterr().err.count("are copied to") == 2
    assert store.local_copy(tmp_path) is tmp_path
    with pytest.raises(UserError, match="refuses"):
        store.local_copy("gs://closed/x")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_mirror_sends_what_has_grown(memory, monkeypatch):  # noqa: F811
    monkeypatch.setattr(store, "SHIP_SECONDS", 3600.0)
    mirror = Mirror(place(ROOT))
    (mirror.local / "metrics").mkdir()
    for name in ("metrics/1", "metrics/2"):
        (mirror.local / name).write_text("one\n")
    mirror.ship()
    memory.calls.clear()

    def refuses(call):
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    with (mirror.local / "metrics/2").open("a") as file:
        file.write("two\n")
    memory.fault = refuses
    with pytest.raises(OSError, match="no answer"):
        mirror.ship()
    memory.fault = lambda call: None
    mirror.close()
    assert [call for call in memory.calls if call.startswith("put")] == ["put study/metrics/2"] * 2
    assert (place(ROOT) / "metrics/2").read_text() == "one\ntwo\n"
    assert not mirror.local.exists()
