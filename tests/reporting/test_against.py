"""A report is the reference of the next: its runs, and their evaluations along training."""

import pytest

from ditjax import report
from ditjax.files.atomic import protocol_hash
from ditjax.runs.results import find_results
from ditjax.studies.measured import BesideSeeds, read_measured


@pytest.mark.usefixtures("no_pictures")
def test_evaluations_along_training_are_compared_at_their_own_step(study, tmp_path):
    folders = [study.write_run(tmp_path, *study.sizes[0], 4, seed) for seed in (0, 1)]
    protocol = {"num_samples": 8}
    study.write_curves(folders, protocol_hash(protocol))
    report.main([f"--runs={tmp_path}"])
    measured = read_measured(str(tmp_path / "report" / "results.json"))
    model = "DiT-2x48x2-p4"
    assert len(measured.along[100][model]["fd_digits"]) == 2
    value = measured.along[100][model]["fd_digits"][0]
    beside = BesideSeeds(measured, model)
    (line,) = beside.lines(100, {"fd_digits": value}, protocol)
    assert "is within" in line
    (line,) = beside.lines(200, {"fd_digits": value}, protocol)
    assert "is above" in line
    assert not beside.lines(100, {"fd_digits": value}, {"num_samples": 9})


@pytest.mark.usefixtures("no_pictures")
def test_a_report_serves_as_the_reference_of_the_next(study, tmp_path, capsys):
    study.write(tmp_path / "a", seeds=(0, 1))
    report.main([f"--runs={tmp_path / 'a'}"])
    reference = tmp_path / "a" / "report" / "results.json"
    assert len(find_results([tmp_path / "a"])[0]) == 18
    study.write_run(tmp_path / "b", *study.sizes[0], 4, 5)
    study.write_run(tmp_path / "b", *study.sizes[1], 4, 5, fd=500.0)
    capsys.readouterr()
    assert report.main([f"--runs={tmp_path / 'b'}", f"--against={reference}"]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs are within the noise" in text
    assert "500, OUTSIDE" in text
