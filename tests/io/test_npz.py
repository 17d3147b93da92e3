"""Arrays in npz files: by rows, whole, and every kind of damage told as such."""

import zipfile

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.io import npz

X = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_and_limits_and_headers(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, x=X, scalar=np.float64(3), none=X[:0], fortran=np.asfortranarray(X))
    with npz.reading(path) as archive:
        assert npz.names(archive) == ["x", "scalar", "none", "fortran"]
        assert npz.shape_and_dtype(archive, "x") == ((7, 5), np.float32)
        for size in (1, 3, 7, 100):
            parts = list(npz.rows(archive, "x", size))
            assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
            np.testing.assert_array_equal(np.concatenate(parts), X)
        np.testing.assert_array_equal(np.concatenate(list(npz.rows(archive, "x", 2, 3))), X[3:])
        np.testing.assert_array_equal(npz.read(archive, "x"), X)
        np.testing.assert_array_equal(npz.read(archive, "x", 2), X[:2])
        np.testing.assert_array_equal(npz.read(archive, "x", 20), X)
        np.testing.assert_array_equal(npz.read(archive, "fortran"), X)
        assert npz.read(archive, "scalar") == 3
        assert npz.read(archive, "none").shape == (0, 5)
        assert list(npz.rows(archive, "none", 2)) == []


def test_arrays_can_be_written_to(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    with npz.reading(tmp_path / "a.npz") as archive:
        array = npz.read(archive, "x")
    array += 1
    np.testing.assert_array_equal(array, X + 1)


def read(path, name="x"):
    with npz.reading(path) as archive:
        return npz.read(archive, name), list(npz.rows(archive, name, 2))


def test_what_is_no_array_of_numbers(tmp_path):
    path = tmp_path / "a.npz"
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    np.savez(path, x=np.array([Evil()], object), fortran=np.asfortranarray(X), scalar=1.0)
    with pytest.raises(UserError, match=r"a\.npz is not a whole npz file \(x holds pickled"):
        read(path)
    assert not ran.exists()
    for name in ("fortran", "scalar"):
        with pytest.raises(UserError, match=f"{name} is not a plain C-ordered"):
            read(path, name)
    with pytest.raises(UserError, match=r"no array 'scalr', only x, fortran, scalar. Did you mean"):
        read(path, "scalr")
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
        read(tmp_path)
    np.save(tmp_path / "c.npy", X)
    with pytest.raises(UserError, match="not a whole npz file"):
        read(tmp_path / "c.npy")


def test_a_length_that_is_not_the_header_s(tmp_path):
    path = tmp_path / "a.npz"
    np.save(tmp_path / "x.npy", X)
    whole = (tmp_path / "x.npy").read_bytes()
    for data in (whole[:-1], whole + b"\0", whole.replace(b"(7, 5)", b"(9, 5)")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", data)
        with pytest.raises(UserError, match="x ends early or late"):
            read(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_is_a_mistake_told_or_changes_nothing(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, x=X)
    whole = path.read_bytes()
    rng, told = np.random.default_rng(0), 0
    for i in rng.permutation(len(whole))[:400]:
        damaged = bytearray(whole)
        damaged[i] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            array, _ = read(path)
        except UserError:
            told += 1
        else:
            np.testing.assert_array_equal(array, X)
    assert told > 100
    for length in rng.integers(len(whole), size=50):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole npz"):
            read(path)
