"""A command on record: as a shell reads it back, and without the folders of this machine."""

import shlex

import pytest

from ditjax.runs.provenance import typed


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--config=a.py", "--config.sweep.grid=(('model.patch',(4, 2)),)"], None),
        (["--workdir=/home/me/x", "--jobs=2"], ["--workdir=DIR", "--jobs=2"]),
        (["--workdir", "/home/me/x", "--jobs", "2"], ["--workdir=DIR", "--jobs", "2"]),
        (["--jobs=2", "--workdir"], ["--jobs=2", "--workdir=DIR"]),
        (["--work", "/home/me", "--workd=/home/you"], ["--workdir=DIR", "--workdir=DIR"]),
        (["--out", "/home/me", "--ou=/x", "--outer=/y", "--watch=3"], ["--outer=/y", "--watch=3"]),
        (["--"], None),
        (["--config.data.name=it's $HOME \\ `x` \"!"], None),
    ],
)
def test_folders_stay_here(words, kept):
    line = typed("x", words, drop=("--out",), folders=("--workdir",))
    assert shlex.split(line) == ["python", "-m", "ditjax.x", *(words if kept is None else kept)]


def test_a_grid_can_be_read():
    grid = "--config.sweep.grid=(('model.patch',(4, 2)),)"
    assert typed("x", [grid]) == f'python -m ditjax.x "{grid}"'
