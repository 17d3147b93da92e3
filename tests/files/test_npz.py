"""Arrays in npz files: by rows, whole, and every kind of damage told as such."""

import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.files import npz

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
        np.testing.assert_array_equal(npz.read_array(archive, "x"), X)
        np.testing.assert_array_equal(npz.read_array(archive, "x", 2), X[:2])
        np.testing.assert_array_equal(npz.read_array(archive, "x", 20), X)
        np.testing.assert_array_equal(npz.read_array(archive, "fortran"), X)
        assert npz.read_array(archive, "scalar") == 3
        assert npz.read_array(archive, "none").shape == (0, 5)
        assert list(npz.rows(archive, "none", 2)) == []


def test_arrays_can_be_written_to(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    with npz.reading(tmp_path / "a.npz") as archive:
        array = npz.read_array(archive, "x")
    array += 1
    np.testing.assert_array_equal(array, X + 1)


def read(path, name="x"):
    with npz.reading(path) as archive:
        return npz.read_array(archive, name), list(npz.rows(archive, name, 2))


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
    with pytest.raises(UserError, match="scalar is a single number"):
        read(path, "scalar")
    with pytest.raises(UserError, match=r"no array 'scalr', only x, fortran, scalar. Did you mean"):
        read(path, "scalr")
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
        read(tmp_path)


def array_file(path):
    np.save(path, X)


def pickle_of(protocol):
    return lambda path: path.write_bytes(pickle.dumps({"fid": {"mu": [0.0]}}, protocol))


def zip_of_images(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("00000/img00000000.png", b"\x89PNG")


def tar_of_images(mode):
    def write(path):
        with tarfile.open(path, mode) as archive:
            archive.add(__file__, "img.png")

    return write


# Files that people give as samples or as a reference -> what is said of them.
OTHERS = {
    "x.npy": (array_file, r"single array \(\.npy\), not an npz: pack it: .*np\.savez"),
    "edm2.pkl": (pickle_of(5), r"a pickle, which may run code .* mu=s\['mu'\]"),
    "old.pkl": (pickle_of(2), "a pickle, which may run code and is not loaded"),
    "images.zip": (zip_of_images, r"a zip of 1 files, such as 00000/img00000000\.png, and no npz"),
    "images.tar": (tar_of_images("w"), "a packed archive, not an npz: unpack it"),
    "images.tar.gz": (tar_of_images("w:gz"), "a packed archive, not an npz: unpack it"),
    "images.tar.bz2": (tar_of_images("w:bz2"), "a packed archive, not an npz: unpack it"),
    "images.tar.xz": (tar_of_images("w:xz"), "a packed archive, not an npz: unpack it"),
    "one.png": (
        lambda p: p.write_bytes(b"\x89PNG\r\n"),
        "a single image.* give a folder of images",
    ),
    "one.jpg": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0"), "a single image"),
    "x.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n"), "an HDF5 file"),
    "x.parquet": (lambda p: p.write_bytes(b"PAR1"), "a Parquet file"),
    "x.txt": (lambda p: p.write_bytes(b"text"), "is not a whole npz file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a whole npz file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_gets_its_remedy(tmp_path, name):
    write, words = OTHERS[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=words) as told:
        read(tmp_path / name)
    assert "\n" not in str(told.value)
    assert str(tmp_path / name) in str(told.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fortran_order(tmp_path, save, monkeypatch):
    whole = np.arange(5 * 4 * 3 * 2, dtype=np.uint8).reshape(5, 4, 3, 2)
    save(tmp_path / "a.npz", x=np.asfortranarray(whole))
    with npz.reading(tmp_path / "a.npz") as archive:
        np.testing.assert_array_equal(npz.read_array(archive, "x"), whole)
        np.testing.assert_array_equal(npz.read_array(archive, "x", 2), whole[:2])
        for size in (1, 2, 5, 9):
            parts = list(npz.rows(archive, "x", size))
            assert all(part.flags.c_contiguous for part in parts)
            np.testing.assert_array_equal(np.concatenate(parts), whole)
        monkeypatch.setenv(npz.MAX_GIB_VARIABLE, "1e-8")
        with pytest.raises(UserError, match="are read at once"):
            next(npz.rows(archive, "x", 1))


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


def test_a_claim_larger_than_what_can_be_there(tmp_path, monkeypatch):
    """A small file cannot ask for memory that its bytes could never fill."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.zeros((1 << 20, 8)))
    whole = path.read_bytes()
    assert len(whole) < 100_000
    monkeypatch.setattr(npz, "_DEFLATE", 100)
    with pytest.raises(UserError, match=r"x claims 6\d+ bytes in \d+"):
        read(path)
    entry = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[: entry + 20] + b"\xff\xff\xff\x7f" + whole[entry + 24 :])
    with pytest.raises(UserError, match="it claims more than its own length"):
        read(path)


def test_what_is_read_at_once_is_bounded_and_the_bound_can_be_lifted(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((1 << 10, 128)))
    monkeypatch.setenv(npz.MAX_GIB_VARIABLE, "0.0005")
    with pytest.raises(UserError, match=r"a\.npz: x is float64.* DITJAX_MAX_ARRAY_GIB=1 in the"):
        npz.load_array(path, "x")
    with npz.reading(path) as archive:
        assert sum(map(len, npz.rows(archive, "x", 100))) == 1 << 10
    monkeypatch.setenv(npz.MAX_GIB_VARIABLE, "1")
    assert npz.load_array(path, "x").shape == (1 << 10, 128)
    monkeypatch.setenv(npz.MAX_GIB_VARIABLE, "many")
    with pytest.raises(UserError, match="DITJAX_MAX_ARRAY_GIB='many': expected a number"):
        npz.load_array(path, "x")


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAX_MEMBERS", 2)
    np.savez(tmp_path / "a.npz", x=X, y=X, z=X)
    with pytest.raises(UserError, match="holds 3 files: an npz of at most 2 arrays"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_never_writes(tmp_path, compression):
    np.save(tmp_path / "x.npy", X)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    with pytest.raises(UserError, match="compressed in a way that NumPy never writes"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("descr", "shape", "match"),
    [
        ("'<f4'", "(-5, -7)", "has the shape"),
        ("'<f4'", f"({2**70}, 0)", "has the shape"),
        ("'<f4'", "(True, 35)", "has the shape"),
        ("'<f4'", "(" * 150 + ")" * 150, "not a whole npz"),
        ("'|O'", "(35,)", "pickled objects"),
        ("[()]", "(35,)", "not a whole npz"),
        ("'<f4'", "(35,", "not a whole npz"),
    ],
)
def test_hostile_headers(tmp_path, descr, shape, match):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + X.tobytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", data)
    with pytest.raises(UserError, match=match):
        read(tmp_path / "a.npz")


def test_a_header_of_4_gb(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 200_000)
    with pytest.raises(UserError, match="x has a header longer than"):
        read(tmp_path / "a.npz")
