"""Reports on networks other than DiTs: what a network does not state is '-' and groups nothing."""

import csv

import pytest

from ditjax import report
from ditjax.reporting.looks import Encoding
from ditjax.reporting.samples import sample_cells
from ditjax.reporting.study import group_by_protocol
from ditjax.runs.results import find_results

UNETS = {
    f"U-Net-{width}": {"name": f"U-Net-{width}", "channels": [width, 2 * width], "depth": [2, 2]}
    for width in (32, 64, 96, 128)
}


def write_unets(study, root, **changes):
    """Four U-Nets of the planted law, by the sizes of DiTs of growing cost."""
    sizes = ((2, 48, 2), (3, 72, 3), (4, 96, 3), (6, 96, 3))
    for size, (name, model) in zip(sizes, UNETS.items(), strict=True):
        study.write_run(root, *size, 2, run=name, model=model, **changes)


@pytest.fixture(scope="module")
def unets(study, tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    write_unets(study, root)
    return report.make_report([root], root / "report")


def test_unets_have_laws_and_claims_about_what_they_have(unets):
    (analysis,) = unets.analyses
    assert unets.problems == ()
    assert (analysis.fits[0].n, analysis.fits[0].models) == (4, 4)
    assert analysis.fits[0].law.b == pytest.approx(0.5, abs=0.1)
    holds = {claim.text: (claim.holds, claim.figures) for claim in analysis.claims}
    nothing = (None, "no two models to compare.")
    assert holds["Bigger models are better at the same patch size."] == nothing
    assert holds["Smaller patches are better at the same size."] == nothing
    assert holds["adaLN-Zero beats the other blocks."] == nothing
    assert "4 models" in holds["Gflops predict quality, parameters alone do not."][1]


def test_unets_are_distinguished_by_their_names(unets, read_page):
    (key,) = Encoding(unets.groups[0].runs).keys()
    assert list(key.values) == list(UNETS)
    page = unets.page.read_text()
    assert "patch" not in " ".join(read_page(page[page.index("Samples by model") :]).words)
    assert page.count('class="cell"') == 4
    names = {path.name for path in unets.files}
    assert {"gflops_vs_fid.png", "samples_by_model.png"} <= names


def test_what_a_network_states_is_in_the_csv(unets):
    rows = list(csv.DictReader((unets.out_dir / "table.csv").open()))
    assert [row["model.name"] for row in rows] == list(UNETS)
    assert rows[0]["model.channels"] == "[32, 64]"
    assert "model.patch" not in rows[0]
    table = (unets.out_dir / "table.tex").read_text()
    assert r"U{-}Net{-}32 & -- & " in table


def test_unets_are_reported_beside_dits(study, tmp_path, read_page):
    write_unets(study, tmp_path)
    folders = study.write(tmp_path / "dits", seeds=(0, 1))
    summary = report.make_report([tmp_path], tmp_path / "report")
    assert len(summary.groups[0].runs) == 4 + len(folders)
    assert summary.analyses[0].fits[0].models == 13
    patches, sizes = Encoding(summary.groups[0].runs).keys()
    assert list(patches.values) == ["4", "2", "1", "-"]
    assert {"2x48x2", "U-Net-32"} <= set(sizes.values)
    cells = read_page(summary.page.read_text()).cells
    at = cells.index("U-Net-32", cells.index("U-Net-32") + 1)  # in the table over seeds
    assert cells[at + 1].strip() == "-"


def test_networks_have_laws_of_their_own(study, tmp_path):
    write_unets(study, tmp_path, config={"model": {"kind": "unet"}})
    study.write(tmp_path / "dits")
    summary = report.make_report([tmp_path], tmp_path / "report")
    (analysis,) = summary.analyses
    every = {fit.label: fit.models for fit in analysis.fits}
    assert every == {"kind dit": 9, "kind unet": 4}
    (pair,) = analysis.slopes
    assert pair.labels == ("kind dit", "kind unet")
    (problem,) = summary.problems
    assert "runs differ in model.kind" in problem


def test_samples_of_networks_without_a_patch_are_in_the_first_column(study, tmp_path):
    write_unets(study, tmp_path)
    study.write(tmp_path / "dits")
    found, _ = find_results([tmp_path])
    (group,) = group_by_protocol(found, "fd_digits", [])
    cells, _ = sample_cells(group, "fd_digits", [])
    assert cells
    assert cells.columns == ["4", "2", "1"]
    assert cells.patches_of("U-Net-32") == ["-"]
    assert cells.patches_of("2x48x2") == cells.columns
