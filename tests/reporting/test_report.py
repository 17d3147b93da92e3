"""The command: every file, the same bytes on a second run, a user's mistakes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ditjax import report
from ditjax.errors import UserError
from ditjax.reporting import page
from tests.reporting.many import write_many


def test_nine_runs_give_every_file(nine):
    names = {path.name for path in nine.files}
    assert names == {
        "index.html",
        "table.csv",
        "table.tex",
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


@pytest.mark.usefixtures("no_pictures")
def test_two_hundred_runs_are_one_small_page(tmp_path, read_page):
    """At most 10 MB with samples of 256x256; `python -m tests.reporting.many` times it."""
    write_many(tmp_path / "study", 200, side=256, lines=40)
    summary = report.make_report([tmp_path / "study"], tmp_path / "report")
    assert summary.page.stat().st_size <= 10e6
    read = read_page(summary.page.read_text())
    rows = [attributes for tag, attributes in read.tags if tag == "tr" and attributes]
    assert sum("data-r" in attributes for attributes in rows) == 200
    assert sum(attributes.get("class") == "absent" for attributes in rows) == 12
    words = " ".join(read.words)
    assert "Not run: DiT-missing-0, DiT-missing-1" in words
    assert "Shown are 8 of 10 sizes" in words
    images = [a["src"] for tag, a in read.tags if tag == "img" and "src" in a]
    assert len(images) == 32
    assert all(image.startswith("data:image/jpeg") for image in images)


@pytest.mark.usefixtures("no_pictures")
def test_samples_that_would_make_the_page_large_are_left_out_and_counted(
    study, tmp_path, monkeypatch, read_page
):
    study.write(tmp_path)
    monkeypatch.setattr(page, "PAGE_BYTES", 800)
    read = read_page(report.make_report([tmp_path], tmp_path / "report").page.read_text())
    images = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    words = " ".join(read.words)
    assert 1 <= len(images) <= 8
    assert sum(map(len, images)) <= 800
    assert f"{9 - len(images)} cells left out to keep the page small" in words
    assert words.count("not shown") == 9 - len(images)


def test_users_mistakes_are_one_line(study, tmp_path):
    (tmp_path / "empty").mkdir()
    study.write_run(tmp_path / "good", *study.sizes[0], 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text("{")
    for argv, words in (
        ([f"--runs={tmp_path}/empty"], "no readable result.json"),
        ([f"--runs={tmp_path}/nowhere"], "nowhere' is not there"),
        ([f"--runs={tmp_path}/file"], "file' is a file: give the folder"),
        ([f"--runs={tmp_path}/{'x' * 300}"], "x' is not there"),
        ([f"--runs={tmp_path}/bad"], "1 problem: "),
        (["--runs=,"], "--runs=,: expected one or more paths"),
        ([], "required: --runs"),
        ([f"--runs={tmp_path}/good", f"--out={tmp_path}/file/report"], "cannot write"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as raised:
            report.main(argv)
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("value", [1e308, -1e308, 1e-320])
def test_one_absurd_metric_is_a_problem_and_no_traceback(value, study, tmp_path):
    folders = [study.write_run(tmp_path / "s", *size, 4) for size in study.sizes]
    change(folders[0], "metrics", fd_digits=value)
    summary = report.make_report([tmp_path / "s"], tmp_path / "report")
    begin = f"{folders[0]}: metrics.fd_digits is {value:g}, which no measurement gives"
    assert any(line.startswith(begin) for line in summary.problems)
    assert "which no measurement gives" in summary.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("", "gflops", 1e308), ("", "gflops", 1e-320), ("train", "batch_size", 0)],
)
def test_a_result_that_no_run_can_have_is_left_out_and_listed(section, key, value, study, tmp_path):
    folders = [study.write_run(tmp_path / "s", *size, 4) for size in study.sizes]
    change(folders[0], section, **{key: value})
    summary = report.make_report([tmp_path / "s"], tmp_path / "report")
    (line,) = summary.problems
    assert key in line
    assert str(folders[0]) in line
    assert sum(len(group.runs) for group in summary.groups) == 2


def change(folder, section, **values):
    """Edit the result of a run."""
    path = folder / "result.json"
    result = json.loads(path.read_text())
    (result[section] if section else result).update(values)
    path.write_text(json.dumps(result))
