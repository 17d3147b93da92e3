"""Paths in a flag, separated by commas, that may have commas in their names."""

from pathlib import Path

import pytest

from ditjax.errors import UserError
from ditjax.files.paths import split_paths


def test_paths_whose_names_have_commas(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b", "lr=1,2", "x,", "c"):
        (tmp_path / name).mkdir()
    for words, expected in [
        ("a", ["a"]),
        ("c,a", ["c", "a"]),
        ("lr=1,2", ["lr=1,2"]),
        ("a,lr=1,2,c", ["a", "lr=1,2", "c"]),
        ("x,", ["x,"]),
        ("none,a", ["none", "a"]),
        (f"{tmp_path}/lr=1,2,{tmp_path}/c", [f"{tmp_path}/lr=1,2", f"{tmp_path}/c"]),
    ]:
        assert split_paths(words, "--runs") == [Path(each) for each in expected]
    assert capsys.readouterr().err == ""
    assert split_paths("a,b", "--runs") == [Path("a,b")]
    assert "'a,b' is taken for one path; write ./ before each" in capsys.readouterr().err
    assert split_paths("./a,./b", "--runs") == [Path("a"), Path("b")]
    for words in ("", ",", "a,,c"):
        with pytest.raises(UserError, match=r"--runs=.*: expected one or more paths"):
            split_paths(words, "--runs")
