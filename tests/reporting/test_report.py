"""The command: every file, the same bytes again, a user's mistakes."""

import re

import numpy as np
import pytest
from PIL import Image

from ditjax import report
from ditjax.errors import UserError


def test_nine_runs_give_every_file(nine):
    names = {path.name for path in nine.files}
    assert names == {
        "index.html",
        "table.csv",
        "table.txt",
        "results.json",
        "gflops_vs_fid.png",
        "samples_by_model.png",
        "loss_curves.png",
    }
    for path in nine.files:
        assert path.parent == nine.out_dir
        assert path.stat().st_size > 500
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert np.asarray(image.convert("L")).std() > 5
    assert nine.problems == ()


def test_same_results_same_bytes(nine, tmp_path):
    again = report.make_report([nine.out_dir.parent], tmp_path / "again")
    for path in nine.files:
        assert (again.out_dir / path.name).read_bytes() == path.read_bytes()


def test_command_prints_the_table_and_joins_folders(study, tmp_path, capsys):
    study.write_run(tmp_path / "a", *study.sizes[0], 1)
    study.write_run(tmp_path / "b", *study.sizes[1], 1)
    assert report.main([f"--runs={tmp_path / 'a'},{tmp_path / 'b'}"]) == 0
    printed = capsys.readouterr().out
    assert "DiT-2x48x2-p1-seed0" in printed
    assert "DiT-3x72x3-p1-seed0" in printed
    assert (tmp_path / "a" / "report" / "index.html").exists()


def test_users_mistakes_are_one_line(study, tmp_path):
    (tmp_path / "empty").mkdir()
    study.write_run(tmp_path / "good", *study.sizes[0], 1)
    (tmp_path / "file").write_text("")
    for argv, words in (
        ([f"--runs={tmp_path}/empty"], "no readable result.json"),
        ([f"--runs={tmp_path}/nowhere"], "nowhere' is not there"),
        (["--runs=,"], "--runs is empty"),
        ([], "required: --runs"),
        ([f"--runs={tmp_path}/good", f"--out={tmp_path}/file/report"], "cannot write"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as raised:
            report.main(argv)
        assert "\n" not in str(raised.value)
