"""The Pareto front of planted cells, and the table, CSV and figure of a grid."""

import csv
import io
import math

import numpy as np
import pytest
from PIL import Image

from ditjax.reporting import style
from ditjax.reporting.grid import Outcome, front, grid_csv, grid_text, setting_text, varying
from ditjax.reporting.pareto import pareto_png
from ditjax.studies.words import shortened

PROTOCOL = {"metric": "FID", "num_samples": 50_000, "labels": "uniform", "seed": 0}


def cell(gflops, fid, run="DiT-XL-p2", **settings):
    settings = {"sampler": "ddpm", "cfg_scale": 1.0, "steps": "250", **settings}
    metrics = {"fid": fid, "fid_low": fid - 0.25, "fid_high": fid + 0.25, "recall": 0.5}
    return Outcome(f"{run}-{settings}", run, 100, "ab", settings, "c0", gflops, metrics, 3.0)


def test_no_cell_beats_the_front():
    points = [
        *((4, 9.0), (1, 30.0), (2, 20.0), (2, math.nan), (2, 19.0), (3, 19.0), (3, 25.0)),
        *((8, 9.5), (0.5, math.nan), (5, math.inf), (6, 9.0)),
    ]
    cells = [cell(gflops, fid) for gflops, fid in points]
    assert [points[i] for i in front(cells, "fid")] == [(1, 30.0), (2, 19.0), (4, 9.0)]
    dominated = {
        i
        for i, (g, f) in enumerate(points)
        if not math.isfinite(f) or any((a <= g and b < f) or (a < g and b <= f) for a, b in points)
    }
    assert set(range(len(points))) - dominated == set(front(cells, "fid"))


def test_a_front_of_one_and_of_none():
    assert front([cell(1, 5.0)], "fid") == [0]
    assert front([cell(1, math.nan)], "fid") == []


def test_the_table_marks_the_best_and_names_what_varies():
    cells = [
        cell(250, 9.6, cfg_channels=None),
        cell(500, 2.27, cfg_scale=1.5, cfg_channels="three"),
        cell(500, 3.22, cfg_scale=1.25, cfg_channels="three"),
    ]
    assert varying(cells) == ["cfg_scale"]  # unguided has no channels: they do not vary
    lines = grid_text(cells, "fid", PROTOCOL, "VIRTUAL.npz").splitlines()
    assert "DiT-XL-p2 at step 100: FID of 50,000 samples to VIRTUAL.npz" in lines[0]
    assert "sampler ddpm" in lines[0]
    assert "cfg_channels three" in lines[0]
    header, *rows = lines[2:6]
    assert [row[:2] for row in rows] == [" +", "*+", "  "]
    assert rows[1].split()[1:7] == ["1.5", "500", "2.27", "2.02", "to", "2.52"]
    for title in ("cfg_scale", "Gflops", "FID", "95 %", "recall"):
        end = header.index(title) + len(title)
        assert all(row[end - 1] != " " and row[end : end + 1] in ("", " ") for row in rows)
    assert lines[-1].startswith("Cells differ in cfg_scale, and in nothing else")


def test_runs_are_named_where_there_are_several():
    text = grid_text([cell(1, 9.0, run="S"), cell(2, 5.0, run="B")], "fid", PROTOCOL, "x")
    assert "2 runs: FID" in text
    assert [line[:6] for line in text.splitlines()[3:5]] == [" +  S ", "*+  B "]


LONG = [
    f"DiT-3x64x2-p2-diffusion_process_flow-diffusion_prediction_{prediction}-seed{seed}"
    for prediction in ("velocity", "x0")
    for seed in (0, 1)
]


def test_long_names_of_runs_stay_different(monkeypatch):
    """In the table and the figure's legend: what all runs have is left out, never the rest."""
    assert list(shortened(LONG, 30).values()) == [
        "...velocity-seed0", "...velocity-seed1", "...x0-seed0", "...x0-seed1"
    ]  # fmt: skip
    assert shortened(["a" * 50], 10) == {"a" * 50: "aaaaaaa..."}
    ends = shortened(["x" * 40 + "1", "x" * 40 + "2"], 10)
    assert list(ends.values()) == ["xxxx...xx1", "xxxx...xx2"]
    twins = ["a" * 9 + "b" + "c" * 9, "a" * 9 + "d" + "c" * 9]  # the middle tells
    assert len(set(shortened(twins, 8).values())) == 2
    cells = [cell(1 + k, 9.0 - k, run) for k, run in enumerate(LONG)]
    rows = grid_text(cells, "fid", PROTOCOL, "r.npz").splitlines()[3:7]
    named = [word for row in rows for word in row.split() if "seed" in word]
    assert named == list(shortened(LONG).values())
    keys, plot_figure = [], style.plot_figure

    def drawn(*args, **kwargs):
        keys.extend(kwargs["keys"])
        return plot_figure(*args, **kwargs)

    monkeypatch.setattr(style, "plot_figure", drawn)
    pareto_png(cells, "fid", PROTOCOL, "r.npz")
    assert list(keys[0].values) == [
        "...velocity-seed0",
        "...velocity-seed1",
        "...x0-seed0",
        "...x0-seed1",
    ]


def test_the_csv_holds_every_number_at_full_precision():
    cells = [cell(250, 9.6 + 1e-12), cell(1 / 3, 2.0, cfg_interval=[0.1, 0.7], steps="10,15")]
    rows = list(csv.DictReader(io.StringIO(grid_csv(cells))))
    assert [float(row["metrics.fid"]) for row in rows] == [9.6 + 1e-12, 2.0]
    assert float(rows[1]["gflops"]) == 1 / 3
    assert [row["settings.cfg_interval"] for row in rows] == ["", "0.1:0.7"]
    assert rows[1]["settings.steps"] == "10+15"
    assert rows[0]["metrics.fid_low"] == repr(9.35 + 1e-12)


def test_the_text_of_a_setting_is_exact():
    assert [setting_text(value) for value in (1.0, 1.0000001, None, (0.0, 1.0))] == [
        "1",
        "1.0000001",
        "-",
        "0:1",
    ]


@pytest.mark.parametrize("fids", [[9.0, 5.0, 4.0], [500.0, 5.0, math.nan], [math.nan] * 3])
def test_the_figure_is_drawn_whatever_the_values(fids):
    cells = [cell(2.0**i, fid, steps=str(i)) for i, fid in enumerate(fids)]
    with Image.open(io.BytesIO(pareto_png(cells, "fid", PROTOCOL, "x"))) as image:
        assert image.width > 1000
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize(("crowd", "count"), [(4, 20), (20, 20), (6, 48)])
def test_labels_cover_neither_one_another_nor_a_marker(crowd, count, monkeypatch):
    """With `crowd` cells on an abscissa, labels move aside, or are left out and counted."""
    from matplotlib.text import Annotation, Text

    from ditjax.reporting import pareto

    figures: list = []
    draw = pareto._draw

    def kept(*args):
        figures.append(draw(*args))
        return figures[0]

    monkeypatch.setattr(pareto, "_draw", kept)
    cells = [
        cell(
            1 + i // crowd,
            5 + i // crowd + 0.01 * i + 4 * (i == count - 1),
            cfg_scale=1 + i / 8,
            sampler=("ddpm", "ddim")[i % 2],
        )
        for i in range(count)
    ]
    pareto_png(cells, "fid", PROTOCOL, "x")
    (ax,) = figures[0].axes
    labels = [text for text in ax.texts if isinstance(text, Annotation)]
    boxes = [Text.get_window_extent(text) for text in labels]
    markers = [np.ravel(line.get_xydata()) for line in ax.lines if len(line.get_xydata()) == 1]
    assert len(markers) == count
    assert len(boxes) > 10
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        for x, y in ax.transData.transform(markers):
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)
    caption = " ".join(text.get_text().replace("\n", " ") for text in figures[0].texts)
    if len(boxes) < count:
        assert f"{count - len(boxes)} labels that would overlap left out" in caption
    else:
        assert "left out" not in caption
    assert (len(boxes) < count) == (count > pareto.MAX_LEADERS)
    if crowd > pareto.CROWD:  # in columns nothing is left out, and a column keeps the order
        for side in ("left", "right"):
            column = [each for each in labels if each.get_horizontalalignment() == side]
            scales = [float(each.get_text()) for each in sorted(column, key=_height)]
            assert scales == sorted(scales)
            assert scales


def _height(text):
    return text.get_window_extent().y1
