"""Inception Score and KID: known answers, brute force, then the goldens."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.metrics.scores import (
    adm_splits,
    inception_score,
    kid,
    kid_influence,
    log_softmax,
    no_scores,
    polynomial_mmd2,
    random_subsets,
    split_scores,
    update_scores,
)
from tests import feature_sets
from tests.feature_sets import even_splits, log_probabilities

GOLDENS = Path(__file__).parent.parent / "goldens" / "scores.npz"


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


def score(log_p, split):
    splits = int(split.max()) + 1
    return inception_score(update_scores(no_scores(splits, log_p.shape[1]), log_p, split))


def test_inception_score_is_one_where_every_image_looks_the_same():
    log_p = log_softmax(np.tile(np.random.default_rng(0).normal(size=(1, 9)), (30, 1)))
    np.testing.assert_allclose(score(log_p, even_splits(30, 3)), (1.0, 0.0), atol=1e-12)


def test_inception_score_is_the_class_count_where_each_is_sure_and_as_frequent():
    for log_p in (log_probabilities(np.eye(8)), log_softmax(1e4 * np.eye(8))):
        assert score(log_p, np.zeros(8, int))[0] == pytest.approx(8.0, rel=1e-13)
    # Sure of 3 of 8 classes: exp of the entropy of (1/2, 1/4, 1/4).
    log_p = log_probabilities(np.eye(8)[[0, 0, 1, 2]])
    assert score(log_p, np.zeros(4, int))[0] == pytest.approx(2**1.5, rel=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_inception_score_lies_between_one_and_the_class_count(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(64, 5)) * 10 ** rng.uniform(-2, 3)
    sums = update_scores(no_scores(4, 5), log_softmax(logits), even_splits(64, 4))
    assert np.all(split_scores(sums) >= 1 - 1e-12)
    assert np.all(split_scores(sums) <= 5 + 1e-12)


def test_inception_score_is_its_definition_by_splits():
    logits = feature_sets.logits().astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for size in (100, 150, 403):
        scores = []
        for start in range(0, len(p), size):
            part = p[start : start + size]
            kl = [
                sum(a * np.log(a / b) for a, b in zip(x, part.mean(0), strict=True)) for x in part
            ]
            scores.append(np.exp(np.mean(kl)))
        expected = (np.mean(scores), np.std(scores))
        split = adm_splits(len(p), size)
        for log_p in (log_softmax(logits), log_softmax(logits + 1e3), log_probabilities(p)):
            np.testing.assert_allclose(score(log_p, split), expected, rtol=1e-10)


def test_inception_score_of_a_stream_is_that_of_the_whole():
    log_p, split = log_softmax(feature_sets.logits()), even_splits(feature_sets.SAMPLES, 4)
    sums = no_scores(4, feature_sets.CLASSES)
    for part in np.split(np.random.default_rng(0).permutation(len(log_p)), [0, 1, 90, 300]):
        sums = update_scores(sums, log_p[part], split[part])
    np.testing.assert_array_equal(sums.samples, np.bincount(split))
    np.testing.assert_allclose(inception_score(sums), score(log_p, split), rtol=1e-12)


def test_splits_of_adm_and_of_torch_fidelity():
    np.testing.assert_array_equal(np.bincount(adm_splits(12_000)), [5000, 5000, 2000])
    split = even_splits(403, 10)
    for i in range(10):
        assert np.all(split[i * 403 // 10 : (i + 1) * 403 // 10] == i)
    order = np.random.default_rng(0).permutation(403)
    np.testing.assert_array_equal(even_splits(403, 10, order)[order], split)


@pytest.mark.parametrize("splits", feature_sets.ISC_SPLITS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_inception_score_of_torch_fidelity(goldens, splits, shuffle):
    order = goldens["isc_order"] if shuffle else None
    split = even_splits(feature_sets.SAMPLES, splits, order)
    ours = score(log_softmax(feature_sets.logits()), split)
    golden = goldens[f"isc_{splits}_{'shuffled' if shuffle else 'in_order'}"]
    np.testing.assert_allclose(ours, golden, rtol=1e-12, atol=1e-12)


def test_mmd_is_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)), rng.normal(size=(9, 5)) + 0.5

    def k(a, b):
        return (sum(a * b) / 5 + 1) ** 3

    expected = (
        np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
        + np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    assert polynomial_mmd2(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_mmd_has_no_bias(shift):
    """N(0, 1) and N(a, 1): 3 a^2 + 3 a^4 + (a^3 + 3a)^2 from the moments, 0 for equal ones."""
    rng = np.random.default_rng(1)
    values = [
        polynomial_mmd2(rng.normal(size=(40, 1)), rng.normal(size=(30, 1)) + shift)
        for _ in range(2000)
    ]
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    error = np.std(values) / 2000**0.5
    assert np.mean(values) == pytest.approx(expected, abs=4 * error)
    # The biased estimate is above by about E k(x, x) (1/n + 1/m) = 28 (1/40 + 1/30).
    assert 8 * error < 28 * (1 / 40 + 1 / 30)


def test_kid_subsets_are_draws_without_repeats_and_depend_on_seed_and_index():
    pairs = list(random_subsets(50, 60, 4, 30, seed=3))
    assert len(pairs) == 4
    for in_x, in_y in pairs:
        assert len(set(in_x)) == len(set(in_y)) == 30
        assert max(in_x) < 50
        assert max(in_y) < 60
    longer = list(random_subsets(50, 60, 6, 30, seed=3))
    np.testing.assert_array_equal(longer[:4], pairs)
    assert not np.array_equal(longer[0], longer[1])
    assert not np.array_equal(longer[0], next(random_subsets(50, 60, 1, 30, seed=4)))


def test_kid_is_the_mean_and_deviation_over_pairs():
    x, y = feature_sets.features(80, 1), feature_sets.features(70, 5)
    pairs = list(random_subsets(80, 70, 6, 40, seed=0))
    values = [polynomial_mmd2(x[i], y[j]) for i, j in pairs]
    assert kid(x, y, pairs) == pytest.approx((np.mean(values), np.std(values)))


def test_kid_of_torch_fidelity(goldens):
    x = feature_sets.features(feature_sets.SAMPLES, 1)
    y = feature_sets.features(feature_sets.REFERENCE, 0)
    pairs = zip(goldens["kid_subsets_x"], goldens["kid_subsets_y"], strict=True)
    np.testing.assert_allclose(kid(x, y, pairs), goldens["kid"], rtol=1e-10)


def test_the_influence_of_kid_is_its_spread_over_fresh_samples():
    rng = np.random.default_rng(0)
    y, everything = rng.normal(size=(200, 4)), (np.arange(100), np.arange(200))
    values, errors = [], []
    for _ in range(300):
        x = 1.2 * rng.normal(size=(100, 4)) + 0.5
        influence = kid_influence(x, y, everything)
        values.append(polynomial_mmd2(x, y))
        errors.append(influence.std() / 10)
    # A deviation of 300 numbers is known to 4 %.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(kid_influence(x, y, everything, block=7), influence, rtol=1e-9)
    # Of a subset that holds the sample or not, without itself.
    few = kid_influence(x, y, (np.arange(50), np.arange(200)))
    assert np.corrcoef(few, influence)[0, 1] > 0.98


X = np.ones((4, 3))
NAN = np.array([[0.0, 1.0], [np.nan, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: log_softmax(np.zeros(3)), r"logits of shape \(3,\)"),
        (lambda: log_softmax(NAN), "1 of 3 rows of logits are not finite.*row 1"),
        (lambda: adm_splits(10, 0), "splits of 0 samples"),
        (lambda: update_scores(no_scores(2, 3), X, [0, 1, 1, 2]), "splits 0 to 2"),
        (lambda: update_scores(no_scores(2, 4), X, [0, 1, 1, 1]), r"expected \[4, 4\]"),
        (lambda: inception_score(no_scores(2, 4)), "no sample: use fewer"),
        (lambda: kid(X, np.ones((4, 2)), [([0], [0])]), "3 and 2 dimensions"),
        (lambda: kid(NAN, NAN, [([0, 1], [0, 1])]), "rows of features are not finite"),
        (lambda: kid(X, X, []), "at least one pair"),
        (lambda: kid(X, X, [([0, 4], [0, 1])]), "KID of 4 and 4 features: index 4"),
        (lambda: kid(X, X, [([0], [0, 1])]), "at least 2 in each"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()
