"""A synthetic study in, files and a page out: grouping, problems, hostile names, alignment."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditjax import report
from ditjax.errors import UserError
from ditjax.io.results import protocol_hash, save_samples, write_result

SIZES = ((2, 48, 2), (3, 72, 3), (4, 96, 3))
PROTOCOL = {"features": "digits", "num": 100}


def write_run(root, depth, width, heads, patch, seed=0, fd=None, **changes):
    """One run of a planted law FD = 0.2·Gflops^(-0.5)."""
    tokens = (8 // patch) ** 2
    gflops = depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2) / 1e9
    size = f"{depth}x{width}x{heads}"
    noise = np.random.default_rng([depth, patch, seed]).normal()
    result: Any = {
        "schema": 1,
        "run": f"DiT-{size}-p{patch}-seed{seed}",
        "model": {
            "name": f"DiT-{size}/{patch}",
            "size": size,
            "depth": depth,
            "width": width,
            "heads": heads,
            "patch": patch,
            "block": "adaln_zero",
            "tokens": tokens,
        },
        "params": depth * 18 * width**2,
        "gflops": gflops,
        "train": {
            "steps": 200,
            "batch_size": 8,
            "images": 1600,
            "seconds": 9.0,
            "learning_rate": 1e-3,
            "final_loss": 0.2,
            "seed": seed,
        },
        "sample": {
            "num": 100,
            "sampler": "ddim",
            "steps": 10,
            "eta": 0.0,
            "cfg_scale": 1.0,
            "cfg_channels": "all",
            "seed": 0,
            "seconds": 1.0,
        },
        "metrics": {
            "fd_digits": fd if fd is not None else 0.2 * gflops**-0.5 * math.exp(0.05 * noise),
            "accuracy": 0.9,
            "fd_digits_floor": 0.4,
        },
        "protocol": PROTOCOL,
        "protocol_hash": protocol_hash(PROTOCOL),
        "environment": {"command": "python -m ditjax.sweep --config=experiments/digits.py"},
        "config": {},
    } | changes
    folder = root / f"DiT-{size}-p{patch}-seed{seed}"
    write_result(folder, result)
    lines = [json.dumps({"step": s, "loss": 1 / s}) for s in range(1, 50)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    save_samples(folder / "samples.npz", np.full((12, 8, 8, 1), 16 * patch, np.uint8))
    return folder


def write_study(root, seeds=(0,), **changes):
    return [
        write_run(root, *size, patch, seed, **changes)
        for size in SIZES
        for patch in (4, 2, 1)
        for seed in seeds
    ]


class Page(HTMLParser):
    """Tags with their attributes, the visible text, the cells of the table of runs."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.cells, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    root = tmp_path_factory.mktemp("nine")
    write_study(root)
    return report.make_report([root], root / "report")


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


def test_the_planted_law_is_reported(nine):
    (group,) = nine.groups
    (fit,) = group.fits
    assert (fit.n, fit.models) == (9, 9)
    assert fit.law.b_interval.low <= 0.5 <= fit.law.b_interval.high
    assert fit.law.b == pytest.approx(0.5, abs=0.1)
    text = " ".join(Page(nine.page.read_text()).words)
    for words in (nine.text.splitlines()[0].split()[0], f"{fit.law.b:.3f}", f"{fit.pearson:.3f}"):
        assert words in text
    assert "it is not FID" in text
    assert "experiments/digits.py" in text


def test_csv_and_json_hold_every_number_at_full_precision(nine):
    rows = list(csv.DictReader((nine.out_dir / "table.csv").open()))
    merged = json.loads((nine.out_dir / "results.json").read_text())
    assert len(rows) == len(merged["results"]) == 9
    for row, each in zip(rows, merged["results"], strict=True):
        assert float(row["gflops"]) == each["gflops"]
        assert float(row["metrics.fd_digits"]) == each["metrics"]["fd_digits"]
    assert merged["fits"][0]["law"]["b"] == nine.groups[0].fits[0].law.b


def test_terminal_columns_are_aligned(nine):
    lines = (nine.out_dir / "table.txt").read_text().splitlines()[:10]
    header = lines[0]
    for title in ("params", "Gflops", "FD-digits", "seed"):
        end = header.index(title) + len(title)
        for line in lines[1:]:
            assert line[end - 1] != " "
            assert line[end : end + 1] in ("", " ")
    assert "e-" not in "".join(lines)


def test_page_needs_no_network(nine):
    page = nine.page.read_text()
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        for key in ("src", "href", "srcset", "data", "action"):
            if attributes.get(key) is not None:
                assert attributes[key].startswith("data:image/png;base64,"), (tag, key)
    assert not re.search(r"@import|url\(|https?://", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_same_results_same_bytes(nine, tmp_path):
    again = report.make_report([nine.out_dir.parent], tmp_path / "again")
    for path in nine.files:
        assert (again.out_dir / path.name).read_bytes() == path.read_bytes()


def test_seeds_have_their_own_fits(tmp_path):
    write_study(tmp_path, seeds=(0, 1))
    summary = report.make_report([tmp_path], tmp_path / "report")
    labels = [(fit.label, fit.n, fit.models) for fit in summary.groups[0].fits]
    assert labels == [("all runs", 18, 9), ("seed 0", 9, 9), ("seed 1", 9, 9)]
    assert all(fit.law is not None and fit.law.groups == 9 for fit in summary.groups[0].fits)
    assert "2 seeds" in summary.text


def test_protocols_never_share_a_fit(tmp_path):
    write_study(tmp_path / "one")
    other = PROTOCOL | {"num": 50000}
    folders = write_study(tmp_path / "two", protocol=other, protocol_hash=protocol_hash(other))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert sorted(group.fits[0].n for group in summary.groups) == [9, 9]
    assert len({group.protocol_hash for group in summary.groups}) == 2
    assert any("2 protocols among the results" in problem for problem in summary.problems)
    assert not any("twice" in problem for problem in summary.problems)
    page = " ".join(Page(summary.page.read_text()).words)
    assert protocol_hash(other) in page
    assert "50000" in page
    assert folders


def test_what_is_wrong_is_named_and_kept_out_of_the_fit(tmp_path):
    write_study(tmp_path)
    write_run(tmp_path / "copy", *SIZES[0], 4, fd=99.0)
    write_run(tmp_path, 5, 96, 3, 1, fd=math.nan)
    write_run(tmp_path, 6, 96, 3, 1, fd=-1.0)
    write_run(tmp_path, 7, 96, 3, 1, metrics={"accuracy": 0.5})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_text('{"schema": 1, "ru')
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "metrics.jsonl").write_text("")
    (tmp_path / "DiT-2x48x2-p2-seed0" / "metrics.jsonl").write_text('{"loss": 1}\n{"step": 1}\n')
    (tmp_path / "DiT-2x48x2-p1-seed0" / "samples.npz").write_bytes(b"PK")
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = " ".join(Page(summary.page.read_text()).words)
    for words in (
        "is there twice",
        "'DiT-5x96x3-p1-seed0': fd_digits is nan",
        "'DiT-6x96x3-p1-seed0': fd_digits is -1.0",
        "'DiT-7x96x3-p1-seed0': fd_digits is missing",
        "half/result.json is not whole JSON",
        "stopped has no result.json",
        "metrics.jsonl line 1 is damaged",
        "samples.npz is not a whole npz",
    ):
        assert sum(words in problem for problem in summary.problems) == 1, words
        assert words in page
        assert words in summary.text
    assert summary.groups[0].fits[0].n == 9
    assert len(summary.groups[0].runs) == 12
    assert "NaN" in summary.text
    assert json.loads((tmp_path / "report" / "results.json").read_text())["problems"]


def test_one_hash_for_two_protocols_and_mixed_steps_are_named(tmp_path):
    folders = write_study(tmp_path)
    path = folders[0] / "result.json"
    changed = json.loads(path.read_text())
    changed["protocol"]["num"] = 7
    changed["train"]["steps"] = 400
    path.write_text(json.dumps(changed))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert any("2 different protocols carry this hash" in each for each in summary.problems)
    assert any("mixes runs of 200, 400 training steps" in each for each in summary.problems)


def test_two_runs_give_a_table_and_say_why_there_is_no_law(tmp_path):
    for patch in (2, 1):
        write_run(tmp_path, *SIZES[0], patch)
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert summary.groups[0].fits[0].law is None
    assert "a law needs 3 models, there are 2" in summary.text
    assert "a law needs 3 models, there are 2" in summary.page.read_text()


HOSTILE = '$\\frac{$"><script>alert(1)</script>\x1b[31m {{ 7*7 }} ' + "x" * 5000


def test_hostile_strings_stay_text(tmp_path):
    write_study(tmp_path)
    model = {"name": HOSTILE, "size": HOSTILE, "depth": 9, "width": 8, "heads": 1, "patch": 1}
    write_run(
        tmp_path,
        9,
        96,
        3,
        1,
        run=HOSTILE,
        model=model | {"block": HOSTILE, "tokens": 64},
        protocol={HOSTILE: HOSTILE, **PROTOCOL},
        environment={"command": HOSTILE, HOSTILE: [HOSTILE]},
        metrics={"fd_digits": 1.0, HOSTILE: 2.0},
    )
    summary = report.make_report([tmp_path], tmp_path / "report")
    page = summary.page.read_text()
    tags = Page(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert "<script>alert" not in page
    assert "{{ 7*7 }}" in page
    assert not any(key.startswith("on") for _, attributes in tags for key in attributes)
    assert "\x1b" not in summary.text
    assert max(map(len, summary.text.splitlines())) < 700


def test_names_beyond_unicode_text_are_written(tmp_path):
    write_run(tmp_path, *SIZES[0], 1, run="lone \ud800 surrogate")
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert "lone" in summary.page.read_text()


def test_command_prints_the_table_and_joins_folders(tmp_path, capsys):
    write_run(tmp_path / "a", *SIZES[0], 1)
    write_run(tmp_path / "b", *SIZES[1], 1)
    assert report.main([f"--runs={tmp_path / 'a'},{tmp_path / 'b'}"]) == 0
    printed = capsys.readouterr().out
    assert "DiT-2x48x2-p1-seed0" in printed
    assert "DiT-3x72x3-p1-seed0" in printed
    assert (tmp_path / "a" / "report" / "index.html").exists()


def test_users_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "good", *SIZES[0], 1)
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.00026, "0.000260"),
        (118.64, "119"),
        (0.999951, "1.00"),
        (1.414, "1.41"),
        (12345.0, "12345"),
        (-0.9298, "-0.930"),
        (0.0, "0"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (None, "-"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, shown):
    assert report._number(value) == shown


def test_smoothing_keeps_a_constant_and_averages_noise():
    steps = np.arange(1.0, 2001.0)
    np.testing.assert_allclose(report._smooth(steps, np.full(2000, 0.3)), 0.3, rtol=1e-12)
    assert report._smooth(steps, steps)[599] == pytest.approx(610)  # the mean of 500 to 720
    noisy = 0.3 + np.random.default_rng(0).normal(size=2000) * 0.1
    assert np.std(report._smooth(steps, noisy)[1000:]) < 0.02
