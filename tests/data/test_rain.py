"""Clips of rain: generated ones are what they say, SEVIR's events are read as they lie."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data import radar, sevir, source
from ditjax.errors import UserError


def test_a_clip_is_a_function_of_seed_split_and_index():
    a, b = (radar.radar_clip(3, "train", 5) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (13, 32, 32)
    assert a.dtype == np.uint8
    for other in ((4, "train", 5), (3, "test", 5), (3, "train", 6)):
        assert (radar.radar_clip(*other) != a).any()
    assert (radar.radar_clip(3, "train", 5, advect=True) != a).any()


def test_clips_are_rain():
    """Some pixels are dry, some heavy, and the share of rain is that of a storm."""
    clips = np.stack([radar.radar_clip(0, "train", i) for i in range(40)])
    wet = (clips > 0).mean()
    assert 0.2 < wet < 0.8
    assert 0.01 < (clips >= 133).mean() < 0.3
    assert (clips.reshape(40, -1).max(1) > 60).mean() > 0.9
    assert ((clips == 0) | (clips >= 8)).all()


def test_advected_rain_only_moves():
    """The flow is invertible, and a frame carried along it is the next one."""
    flow = radar._Flow(1 + 0.5j, complex(0.01, 0.03), 32 + 32j)
    z = np.array([3 + 4j, 40 - 2j])
    np.testing.assert_allclose(flow.carried(flow.carried(z, 5.0), -5.0), z, rtol=1e-12)
    still = radar._Flow(1 + 0.5j, 0j, 0j)
    np.testing.assert_allclose(still.carried(z, 2.0), z + 2 + 1j, rtol=1e-15)
    totals = {}
    for advect in (True, False):
        clips = [radar.radar_clip(1, "train", i, advect) for i in range(12)]
        values = [[np.percentile(frame, 95) for frame in clip] for clip in clips]
        totals[advect] = np.abs(np.diff(np.array(values), axis=1)).mean()
    assert totals[True] < 0.6 * totals[False]


def test_names_of_sets():
    assert radar.parse_radar_set("50-advect-seed2") == (50, True, 2)
    assert radar.parse_radar_set("50-advect-seed2").name == "50-advect-seed2"
    with pytest.raises(UserError, match=r"radar/many': expected 'radar',"):
        radar.parse_radar_set("many")


# ---- SEVIR

COLUMNS = ("id", "file_name", "file_index", "img_type", "time_utc", "pct_missing")


def write_catalog(root: Path, rows: list[tuple[str, ...]], columns=COLUMNS) -> None:
    with (root / "CATALOG.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def rows_of(*events: tuple[str, int, str]) -> list[tuple[str, ...]]:
    return [(i, "a.h5", str(k), "vil", time, "0.0") for i, k, time in events]


def test_a_catalogue_is_split_by_time_and_broken_events_are_left_out(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"")
    rows = rows_of(
        ("S1", 0, "2018-12-31 23:55:00"),
        ("S2", 1, "2019-01-01 00:00:00"),
        ("S3", 2, "2019-06-01 00:00:00"),
        ("S4", 3, "2018-01-01 00:00:00"),
        ("S4", 4, "2018-01-01 00:00:00"),
    )
    rows.append(("S5", "a.h5", "5", "vil", "2018-01-01 00:00:00", "0.2"))
    rows.append(("S6", "b.h5", "0", "ir069", "2018-01-01 00:00:00", "0.0"))
    write_catalog(tmp_path, rows)
    found = sevir.list_sevir(str(tmp_path))
    ids = {split: [event.id for event in events] for split, events in found.events.items()}
    assert ids == {"train": ["S1"], "validation": ["S2"], "test": ["S3"]}
    assert found.left_out == "3 events left out"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: None, "CATALOG.csv cannot be read"),
        (lambda root: write_catalog(root, [], COLUMNS[:3]), "lacks the columns img_type, time_utc"),
        (lambda root: write_catalog(root, []), "lists no whole event of type 'vil'"),
        (
            lambda root: write_catalog(root, rows_of(("S1", 0, "2018-01-01"))),
            "1 of 1 files of the catalogue are missing, such as a.h5: download them",
        ),
        (
            lambda root: write_catalog(root, [("S", "a", "x", "vil", "2018", "0")]),
            "cannot be read",
        ),
    ],
)
def test_a_folder_that_is_not_sevirs_is_refused_in_one_line(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        sevir.list_sevir(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def events(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Two events of 49 frames in one file."""
    h5py = pytest.importorskip("h5py")
    root = tmp_path_factory.mktemp("sevir")
    data = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 49), np.uint8)
    with h5py.File(root / "a.h5", "w") as file:
        file["id"], file["vil"] = np.array([b"S1", b"S2"]), data
    write_catalog(root, rows_of(("S1", 0, "2018-05-01"), ("S2", 1, "2018-05-02")))
    return root, data


def test_windows_never_span_events(events, tmp_path):
    root, data = events
    builder = source.prepare(f"sevir:{root}", tmp_path)
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert [records[i]["file_name"].decode() for i in range(len(records))] == [
        f"{event}/{start}" for event in ("S1", "S2") for start in (0, 12, 24)
    ]
    image: Any = Image.open(io.BytesIO(records[4]["image"]))
    assert image.n_frames == 25
    for k in (0, 24):
        image.seek(k)
        np.testing.assert_array_equal(np.asarray(image.convert("L")), data[1, :, :, 12 + k])


def test_an_event_that_is_missing_is_named(events):
    root, _ = events
    for event, message in (
        (sevir.SevirEvent("S3", "a.h5", 2), "row 2 of the catalogue, cannot be read .it has 2"),
        (sevir.SevirEvent("S3", "a.h5", 1), "event 1 is 'S2'"),
    ):
        with pytest.raises(UserError, match=message):
            sevir.read_event(root, event)
