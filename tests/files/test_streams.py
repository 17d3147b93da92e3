"""stdout and stderr that are closed, without a reader or of few characters end no command."""

import errno
import io
import os
import subprocess
import sys

import pytest

from ditjax.files.streams import _Kept, keep_streams


def pipe(**kwargs):
    """(the reader's descriptor, a stream into a pipe)."""
    read, write = os.pipe()
    return read, open(write, "w", **{"encoding": "utf-8", **kwargs})


@pytest.mark.parametrize("always", [False, True])
def test_a_reader_that_goes_away_is_no_error(always):
    read, stream = pipe()
    kept = _Kept(stream, always=always)
    kept.write("read\n")
    kept.flush()
    assert os.read(read, 99) == b"read\n"
    os.close(read)
    for _ in range(3):
        assert kept.write("not read\n") == 9
        kept.flush()
    stream.close()  # as at the end of Python: nothing is left to be written
    kept.write("closed\n")
    kept.flush()


class Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_stdout_is_an_error_and_under_stderr_is_none():
    with pytest.raises(OSError, match="No space left"):
        _Kept(Full(), always=False).flush()
    _Kept(Full(), always=True).flush()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_written_in_any_encoding(encoding):
    read, stream = pipe(encoding=encoding)
    kept = _Kept(stream, always=False)
    kept.write("train 1/2 · μP ✓ \udcff\n")
    kept.flush()
    text = os.read(read, 999).decode(encoding)
    assert text.startswith("train 1/2 ")
    assert text.endswith("\\udcff\n")
    assert kept.encoding == encoding
    os.close(read)


def test_streams_are_replaced_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    keep_streams()
    first = sys.stdout, sys.stderr
    keep_streams()
    assert (sys.stdout, sys.stderr) == first
    print("nowhere", file=sys.stderr)
    print("here")
    assert out.getvalue() == "here\n"


SCRIPT = """
import os, sys
from ditjax import cli
from ditjax.runs.log import Progress

def main(argv):
    file = open(os.path.join(argv[0], "file"), "w+")
    Progress("train", 2).report(1, loss=0.5)
    print("lost or shown", file=sys.stderr)
    os.write(2, b"of XLA\\n")
    print("finished ·")
    assert file.read() == ""
    return 0

cli.run(main)
"""


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "<&- 2>&-", "2>&1 | true", ">&- 2>&-"])
def test_a_command_ends_as_it_would(closed, tmp_path):
    """Of a shell, as users close them; the file that is open gets nothing of the messages."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    env = {
        **os.environ,
        "PYTHONIOENCODING": "ascii:strict",
        "DITJAX_CACHE": "off",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = f"{sys.executable} {path} {tmp_path} {closed}; echo ${{PIPESTATUS[0]}} >{tmp_path}/s"
    done = subprocess.run(
        ["bash", "-c", command], env=env, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "s").read_text() == "0\n"
    assert (tmp_path / "file").read_text() == ""
    assert "Traceback" not in done.stdout + done.stderr
    if closed == "2>&-":
        assert done.stdout == "finished \\xb7\n"
