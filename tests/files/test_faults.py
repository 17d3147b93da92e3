"""Faults of the file system are not taken for damage: reading is retried, then the command ends."""

import errno
import io
import os
import zipfile

import jax
import numpy as np
import pytest

from ditjax.errors import FaultError, UserError
from ditjax.files import atomic, faults, npz
from ditjax.runs.log import MetricsLog
from tests.unstable import FOR_EVER, PASSING, Unstable


def error(code: int) -> OSError:
    return OSError(code, os.strerror(code), "/data/file")


def failing(*errors: BaseException):
    """A function that raises these, one a call, and then returns 'read'."""
    left = list(errors)

    def read() -> str:
        if left:
            raise left.pop(0)
        return "read"

    return read


def wrapped(inner: BaseException) -> Exception:
    """As zipfile does: another error, raised while the first was handled."""
    try:
        try:
            raise inner
        except BaseException:
            raise zipfile.BadZipFile("File is not a zip file")  # noqa: B904 (as zipfile does)
    except zipfile.BadZipFile as error:
        return error


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        *((error(code), True) for code in PASSING),
        (error(errno.EACCES), True),
        (error(errno.ENOENT), False),
        (error(errno.EISDIR), False),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (io.UnsupportedOperation("read"), False),
        (RuntimeError("UNAVAILABLE: cannot open '/data/x': Stale file handle"), True),
        (ValueError("FAILED_PRECONDITION: [OS error 24: Too many open files]"), True),
        (ValueError("Unexpected end of file"), False),
        (KeyError("Stale file handle"), False),
        (jax.errors.JaxRuntimeError("Connection reset by peer"), False),
        (wrapped(error(errno.EIO)), True),
        (wrapped(ValueError("no end record")), False),
    ],
)
def test_a_fault_is_told_from_damage(found, expected):
    assert faults.is_fault(found) is expected


@pytest.mark.parametrize("code", PASSING)
def test_what_passes_is_waited_for_aloud(code, monkeypatch, capsys):
    monkeypatch.setattr(faults, "WAITS", (0.0, 0.0))
    assert faults.retried("the file", failing(error(code), error(code))) == "read"
    line = f"warning: cannot read the file ({os.strerror(code)}): trying again in 0 s"
    assert capsys.readouterr().err.splitlines() == [line, line]


def test_what_stays_ends_the_command(monkeypatch):
    monkeypatch.setattr(faults, "WAITS", (0.0, 0.0))
    match = r"cannot read the file: Stale file handle\. Nothing was changed; run the same"
    with pytest.raises(FaultError, match=match):
        faults.retried("the file", failing(*[error(errno.ESTALE)] * 3))


def test_the_systems_words_are_found_in_a_long_message(monkeypatch):
    """TensorStore puts long paths before them and its whole specification behind."""
    monkeypatch.setattr(faults, "WAITS", ())
    long = ValueError(f"Error opening {'/data' * 60}: Too many open files [spec={'x' * 400}]")
    with pytest.raises(FaultError, match=r"^cannot read step 3: Too many open files\. Nothing"):
        faults.retried("step 3", failing(long))


@pytest.mark.parametrize("other", [error(errno.ENOENT), error(errno.EACCES), ValueError("bad")])
def test_nothing_else_is_tried_again(other, monkeypatch):
    monkeypatch.setattr(faults, "WAITS", (0.0,))
    with pytest.raises(type(other)) as raised:
        faults.retried("the file", failing(other))
    assert raised.value is other


def test_whether_a_file_is_there(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert faults.exists(tmp_path / "file")
    assert not faults.exists(tmp_path / "none")
    assert not faults.exists(tmp_path / "file" / "below")
    monkeypatch.setattr(faults, "WAITS", ())
    real = os.stat

    def stat(path, *args, **kwargs):
        if path == tmp_path / "file":
            raise error(errno.ESTALE)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(FaultError, match="Stale file handle"):
        faults.exists(tmp_path / "file")


@pytest.mark.parametrize("code", PASSING)
def test_json_and_npz_outlast_a_fault(code, tmp_path, monkeypatch):
    atomic.write_json(tmp_path / "a.json", {"a": 1})
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    system = Unstable(monkeypatch, "a.", 2, code)
    assert atomic.load_json(tmp_path / "a.json") == {"a": 1}
    system.left = 2
    assert npz.load_array(tmp_path / "a.npz", "a").tolist() == [0, 1, 2]
    system.left = FOR_EVER
    with pytest.raises(FaultError, match=os.strerror(code)):
        atomic.load_json(tmp_path / "a.json")
    with pytest.raises(FaultError, match=os.strerror(code)):
        npz.load_array(tmp_path / "a.npz", "a")


def test_a_fault_in_the_midst_of_an_npz_is_no_damage(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", a=np.arange(3))

    def fails(*_):
        raise error(errno.EIO)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fails)
    with pytest.raises(FaultError, match="Input/output error"):
        npz.load_array(tmp_path / "a.npz", "a")
    monkeypatch.undo()
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match="is not a whole npz"):
        npz.load_array(tmp_path / "a.npz", "a")


def test_a_log_that_cannot_be_read_is_not_cut(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    system = Unstable(monkeypatch, "metrics.jsonl", FOR_EVER)
    with pytest.raises(FaultError, match=r"metrics\.jsonl: Stale file handle"):
        MetricsLog(tmp_path, 5)
    system.left = 1
    with MetricsLog(tmp_path, 5) as log:
        assert log.last == {"step": 1, "loss": 2.0}
