"""Scores of a set: one pass gives what the definitions give, whatever the batches."""

import dataclasses

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.evaluation.features import Extractor, ImageFeatures
from ditjax.evaluation.scoring import extract_features, open_reference, score, statistics_of
from ditjax.evaluation.statistics import save_statistics
from ditjax.metrics import frechet, neighbours, scores, sliced
from tests.sample_files import save_samples

WIDTH, SPATIAL, CLASSES = 6, 4, 5
RNG = np.random.default_rng(3)
MIX = {name: RNG.normal(size=(48, d)) for name, d in (("p", WIDTH), ("s", SPATIAL), ("l", CLASSES))}


def extract(images):
    """Linear features of 4x4x3 images: as far as the scores can tell, an Inception."""
    flat = images.reshape(len(images), -1) / 255.0
    pool, spatial, logits = ((flat @ MIX[name]).astype(np.float32) for name in "psl")
    return ImageFeatures(pool, spatial, logits)


EXTRACTOR = Extractor("inception", extract, 16, {"features_sha256": "a" * 64})


def images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)


def batches(array, size):
    return [array[i : i + size] for i in range(0, len(array), size)]


@pytest.fixture(scope="module")
def reference():
    array = images(300, 1)
    seen = extract_features(EXTRACTOR, batches(array, 16), 300)
    return extract(array), statistics_of(seen, {}), seen.pool


def test_scores_are_those_of_the_definitions(reference):
    theirs, statistics, pool = reference
    array = images(200, 2) // 2
    ours = extract(array)
    found = score(extract_features(EXTRACTOR, batches(array, 7), 200), statistics, pool, family="")
    assert found["fid"] == pytest.approx(
        frechet.frechet_distance(
            frechet.batch_moments(ours.pool), frechet.batch_moments(theirs.pool)
        ),
        rel=1e-9,
    )
    assert found["sfid"] == pytest.approx(
        frechet.frechet_distance(
            frechet.batch_moments(ours.spatial), frechet.batch_moments(theirs.spatial)
        ),
        rel=1e-9,
    )
    log_p = scores.log_softmax(ours.logits)
    p = np.exp(log_p)
    divergence = (p * (log_p - np.log(p.mean(0)))).sum(1).mean()
    assert found["inception_score"] == pytest.approx(np.exp(divergence), rel=1e-6)
    pr = neighbours.precision_recall(theirs.pool, ours.pool)
    assert (found["precision"], found["recall"]) == (pr.precision, pr.recall)
    assert found["fid_low"] < found["fid"] < found["fid_high"]
    assert found["fid_inf"] < found["fid"]
    assert found.keys() >= {"kid", "kid_subset_deviation", "inception_score_split_deviation"}
    dc = neighbours.density_coverage(theirs.pool, ours.pool)
    assert (found["density"], found["coverage"]) == (dc.density, dc.coverage)
    monge = sliced.monge_distance(ours.pool, theirs.pool, 0)
    assert found["mind"] == pytest.approx(monge.value, rel=1e-12)
    for name in ("precision", "recall", "density", "coverage", "authenticity", "kid", "mind"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"], name


def test_metrics_on_other_features_carry_their_name(reference):
    _, statistics, pool = reference
    seen = extract_features(EXTRACTOR, [images(50, 2)], 50)
    found = score(seen, statistics, pool, family="mine")
    assert {"fd_mine", "kd_mine", "md_mine", "density_mine", "coverage_mine"} <= found.keys()
    assert not {"fid", "kid", "mind", "density"} & found.keys()


def test_an_interval_does_not_reach_below_nothing(reference):
    """Of 200 samples 3 of which are near, precision_low was -5e-18, and was printed as -0."""
    _, statistics, pool = reference
    seen = extract_features(EXTRACTOR, [images(200, 2)], 200)
    moved = seen.pool + np.float32(1e3)
    moved[:3] = pool[:3]
    found = score(dataclasses.replace(seen, pool=moved), statistics, pool, family="")
    assert found["precision"] == 3 / 200
    for name in ("precision", "recall", "density", "coverage", "mind"):
        assert found[f"{name}_low"] >= 0, name


def test_brief_is_the_same_distance(reference):
    _, statistics, pool = reference
    seen = extract_features(EXTRACTOR, [images(50, 2)], 50)
    whole = score(seen, statistics, pool, family="")
    brief = score(seen, statistics, pool, family="", brief=True)
    assert brief.keys() < whole.keys()
    assert {name: whole[name] for name in brief} == brief
    assert "precision" not in brief


def test_kept_features_are_spread_evenly():
    array = images(100, 5)
    seen = extract_features(EXTRACTOR, batches(array, 7), 100, max_pool=12)
    rows = np.linspace(0, 99, 12).astype(int)
    np.testing.assert_array_equal(seen.pool, extract(array).pool[rows])
    assert rows[-1] == 99
    whole = extract_features(EXTRACTOR, batches(array, 7), 100)
    np.testing.assert_array_equal(seen.moments.mean, whole.moments.mean)


@pytest.mark.parametrize("given", [9, 11])
def test_another_number_than_announced(given):
    with pytest.raises(UserError, match="10"):
        extract_features(EXTRACTOR, batches(images(given, 0), 4), 10)


def test_features_that_are_not_finite():
    broken = EXTRACTOR._replace(extract=lambda x: extract(x)._replace(pool=np.full((4, 6), np.nan)))
    with pytest.raises(UserError, match="finite"):
        extract_features(broken, [images(4, 0)], 4)


def test_a_reference_is_known_by_its_images(tmp_path):
    """Not by its file's name, the batches it came in, or its statistics' last bits."""
    array = images(40, 1)
    for name in ("a.npz", "b.npz"):
        save_samples(tmp_path / name, array, np.zeros(40, np.int32))
    save_samples(tmp_path / "c.npz", array[::-1], np.zeros(40, np.int32))
    kept = tmp_path / "kept.npz"
    first = open_reference(str(tmp_path / "a.npz"), EXTRACTOR, 4, save_to=kept)
    smaller = open_reference(str(tmp_path / "b.npz"), EXTRACTOR._replace(batch_size=3), 4)
    again = open_reference(str(kept), EXTRACTOR, 4)
    assert first.record == smaller.record == again.record
    assert first.record["reference_count"] == 40
    other = open_reference(str(tmp_path / "c.npz"), EXTRACTOR, 4)
    assert other.record != first.record
    np.testing.assert_array_equal(again.pool, first.pool)


def test_statistics_of_others_come_with_images_or_without(tmp_path, reference):
    """ADM's reference has arr_0 beside its statistics; pytorch-fid's has none."""
    _, statistics, _ = reference
    bare, full = tmp_path / "bare.npz", tmp_path / "full.npz"
    np.savez(bare, mu=statistics.mu, sigma=statistics.sigma)
    np.savez(
        full,
        mu=statistics.mu,
        sigma=statistics.sigma,
        mu_s=statistics.mu_s,
        sigma_s=statistics.sigma_s,
        arr_0=images(30, 1),
    )
    found = {path.stem: open_reference(str(path), EXTRACTOR, 4) for path in (bare, full)}
    assert found["bare"].pool is None
    np.testing.assert_array_equal(found["full"].pool, extract(images(30, 1)).pool)
    assert found["bare"].record["reference_sha256"] != found["full"].record["reference_sha256"]
    seen = extract_features(EXTRACTOR, [images(50, 2)], 50)
    for name, has in (("bare", False), ("full", True)):
        metrics = score(seen, found[name].statistics, found[name].pool, family="")
        assert ("sfid" in metrics, "precision" in metrics) == (has, has)


def test_statistics_by_other_features_are_refused(tmp_path, reference):
    _, statistics, pool = reference
    path = tmp_path / "ours.npz"
    save_statistics(path, statistics._replace(provenance={"features_sha256": "b" * 64}), pool)
    with pytest.raises(UserError, match="bbbbbbbbbbbb, the samples have aaaaaaaaaaaa"):
        open_reference(str(path), EXTRACTOR, 4)
    # Features that are computed without weights have no digest.
    with pytest.raises(UserError, match="bbbbbbbbbbbb, the samples have others"):
        open_reference(str(path), EXTRACTOR._replace(record={}), 4)
