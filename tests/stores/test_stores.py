"""What the rules ask of a store, of real servers: versions, ranges, listings, whole writes."""

import errno
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.evaluation.statistics import Statistics, load_statistics, save_statistics
from ditjax.files import atomic, lease, npz, store
from ditjax.files.lease import ObjectLease

BOTH = pytest.mark.parametrize("server", ["gs", "s3"], indirect=True)


@BOTH
def test_an_object_is_found_as_a_file_is(root):
    assert (root.exists(), list(root.iterdir())) == (False, [])
    (root / "a" / "b.txt").write_text("hello")
    (root / "empty").write_bytes(b"")
    assert [path.name for path in root.iterdir()] == ["a", "empty"]
    assert (root.is_dir(), root.is_file(), (root / "a/b.txt").stat().st_size) == (True, False, 5)
    assert store.read_start(root / "a/b.txt", 3) == b"hel"
    assert store.read_start(root / "a/b.txt", 300) == b"hello"
    assert store.read_start(root / "empty", 3) == (root / "empty").read_bytes() == b""
    for read in (lambda: (root / "no").read_bytes(), lambda: (root / "no").open("rb")):
        with pytest.raises(FileNotFoundError):
            read()
    assert [path for path, _, _ in store.walk_tree(root, lambda error: None)] == [root, root / "a"]
    (root / "a" / "b.txt").unlink()
    assert not (root / "a").exists(), "a listing is stale"
    (root / "no").unlink(missing_ok=True)
    store.remove_tree(root)
    assert not root.exists()


@BOTH
def test_of_many_writers_of_one_version_one_succeeds(root):
    path = root / "x"
    for turn in range(10):
        found = store.read_version(path)
        version = found[1] if found else store.ABSENT
        with ThreadPoolExecutor(8) as pool:
            writes = [(path, b"%d %d" % (turn, k), version) for k in range(8)]
            results = list(pool.map(lambda each: store.write_if(*each), writes))
        assert results.count(True) == 1
        assert path.read_bytes() == writes[results.index(True)][1]
    assert not store.write_if(root / "none", b"1", version)


@BOTH
def test_one_of_many_holds_a_lease_and_the_next_follows(root, monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)

    def start(_):
        try:
            return ObjectLease(root / ".lease", "the run")
        except UserError as error:
            assert "in use by process" in str(error)  # noqa: PT017
            return None

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            held = [each for each in pool.map(start, range(8)) if each]
        assert len(held) == 1
        held[0]._move()
        held[0].check()
        held[0].release()


@BOTH
def test_large_files_are_read_by_ranges_and_written_whole(root):
    image = np.random.default_rng(0).integers(0, 256, (3000, 32, 32, 3), np.uint8)
    with atomic.atomic(root / "x.npz") as file:
        np.savez(file, arr_0=image, label=np.arange(3000))
    with npz.reading(root / "x.npz") as archive:
        assert (npz.read_array(archive, "arr_0", 10) == image[:10]).all()
    assert (npz.load_array(root / "x.npz", "label") == np.arange(3000)).all()
    with (root / "x.npz").open("rb") as opened:
        opened.read(1)
        (root / "x.npz").write_bytes(bytes(1 << 24))
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            opened.read()
    with pytest.raises(UserError, match="not a whole npz"):
        npz.load_array(root / "x.npz", "label")
    copy = store.local_copy(root / "x.npz")
    assert copy.read_bytes() == bytes(1 << 24)
    assert zipfile.is_zipfile(copy) is False


@BOTH
def test_statistics_are_files_like_others(root):
    found = Statistics(np.ones(8), np.eye(8), np.ones(2), np.eye(2))
    save_statistics(root / "reference.npz", found, None)
    assert np.allclose(load_statistics(root / "reference.npz").mu, found.mu)


@BOTH
def test_a_bucket_that_is_not_there_is_named(root, server):
    other = store.place(f"{server}://other-bucket/x")
    assert not other.exists()
    with pytest.raises(UserError, match="there is no bucket 'other-bucket'"):
        atomic.write_json(other, {})
    with pytest.raises(UserError, match="there is no bucket 'other-bucket'"):
        ObjectLease(other / ".lease", "the run")
    with pytest.raises(FileNotFoundError, match="there is no bucket"):
        list(other.iterdir())
