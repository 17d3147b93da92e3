"""inspect: what it writes, identities that hold for any network, and what it refuses."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from ditjax import inspect
from ditjax.config import read
from ditjax.errors import UserError
from ditjax.evaluation.analyses import ANALYSES, warped_images
from ditjax.evaluation.inspection import Reading, open_instrument

WORDS = ("--num=40", "--batch_size=32", "--times=0.3,0.8")


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def inspected(request, tmp_path_factory):
    """The folder of an inspection of the tiny run, and what was printed."""
    run = request.getfixturevalue("finished")
    out = tmp_path_factory.mktemp("inspected")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setenv("DITJAX_DATA", str(request.getfixturevalue("data_dir")))
        assert inspect.main([f"--workdir={run}", f"--out={out}", *WORDS]) == 0
    return out, "\n".join(lines)


def test_it_writes_a_page_tables_figures_and_their_protocol(inspected):
    out, printed = inspected
    page = (out / "index.html").read_text()
    names = set(ANALYSES) - {"words"}  # it has no texts
    for name in names:
        assert f"<h2>{name.capitalize()}</h2>" in page
        assert f"\n{name}: " in f"\n{printed}"
    assert page.count("<svg") == len(list(out.glob("*.png"))) > 10
    assert "<script" not in page
    assert "src=" not in page
    with Image.open(out / "lens_images.png") as picture:
        assert picture.width > 200
    record = json.loads((out / "inspection.json").read_text())
    assert record["source"]["step"] == 20
    protocol = record["protocol"]
    assert (protocol["times"], protocol["blocks"]) == ([300, 800], [1])
    assert protocol["images"] == {"fit": "40 of digits, train", "held_out": "40 of digits, test"}
    assert protocol["weights"] == "ema"
    assert set(record["found"]) == names


def test_the_last_block_through_the_lens_is_the_prediction(inspected):
    rows = rows_of(inspected[0] / "lens.csv")
    raw = [row for row in rows if row["kind"] == "raw"]
    assert len(raw) == 2
    for row in raw:
        assert float(row["mse_last"]) < 1e-10 < float(row["mse_target"])
    # From the last block to itself, the fitted map is the identity.
    assert all(float(row["mse_last"]) < 1e-6 for row in rows)


def test_the_table_of_gates_begins_with_the_whole_network(inspected):
    closed, gates = (rows_of(inspected[0] / f"{n}.csv") for n in ("gates_closed", "gates"))
    losses = {float(row["loss"]) for row in closed if row["closed"] == "0"}
    assert losses == {float(row["loss"]) for row in gates if row["time"] == "300"}
    halves = [(float(row["rise_half_1"]) + float(row["rise_half_2"])) / 2 for row in gates]
    np.testing.assert_allclose(halves, [float(row["rise"]) for row in gates], atol=1e-9)
    first = {row["loss"] for row in closed if row["closed"] == "2"}
    assert len(first) == 1, "all branches are closed, in any order"


def test_every_row_is_at_a_time_of_the_process(inspected):
    for path in inspected[0].glob("*.csv"):
        times = {row["time"] for row in rows_of(path) if row["time"]}
        assert times <= {"300", "800"}, path


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--blocks=2"], "--blocks=2: expected different numbers from 1 to 1, the depth"),
        (["--times=0.3,1"], "--times=0.3,1.0: expected rising shares of the noise"),
        (["--times=0.5,0.3"], "rising shares"),
        (["--times=a"], "expected shares of the noise separated by commas"),
        (["--what=probes"], "'probes' is no analysis; .* Did you mean 'probe'"),
        (["--what=words"], "given no tokens of a text: leave 'words' out"),
        (["--num=3"], "--num=3 .* at least 32"),
        (["--config.data.name=no_such"], "no_such"),
        (["--which=model"], "--which: no effect with --workdir"),
    ],
)
def test_a_mistake_is_one_line(finished, tmp_path, words, match):
    with pytest.raises(UserError, match=match):
        inspect.main([f"--workdir={finished}", f"--out={tmp_path / 'x'}", *words])
    assert not (tmp_path / "x").exists()


def test_a_warped_copy_shows_the_places_that_are_said():
    """A picture of its own rows and columns: what a token of the copy shows is where it is from."""
    row, column = np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")
    picture = np.stack([row, column], axis=-1)[None].astype(np.float32)
    draws = np.array([[0.7, -0.5, 0.3, -0.4]], np.float32)
    warped, source = warped_images(picture, draws, (8, 8))
    seen = np.asarray(warped).reshape(8, 2, 8, 2, 2).mean((1, 3)).reshape(64, 2)
    expected = np.asarray(source)[0] * 2 + 0.5  # places of tokens in pixels
    inside = ((expected > 1.5) & (expected < 13.5)).all(-1)
    assert inside.sum() > 20
    np.testing.assert_allclose(seen[inside], expected[inside], atol=1e-3)
    unmoved, same = warped_images(picture, np.zeros((1, 4), np.float32), (8, 8))
    np.testing.assert_allclose(unmoved, picture, atol=1e-4)
    assert np.abs(np.diff(np.asarray(same)[0], axis=0)).max() == 7


def test_a_u_net_is_refused_before_its_weights_are_read():
    size = {
        "width": 16,
        "multipliers": (1.0,),
        "attention_factors": (),
        "groups": 8,
        "head_width": 8,
    }
    c = read({"model": {"kind": "unet", **size}, "data": {"image_size": 32}})
    with pytest.raises(UserError, match="'unet', whose network has no stack of blocks"):
        open_instrument(c, _never, Reading())


def _never(c, mesh):
    raise AssertionError("weights are read")
