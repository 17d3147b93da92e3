"""Scores of drawn vectors, on distributions whose conditional mean is known."""

import numpy as np
import pytest

from ditjax.metrics.vectors import (
    cosines,
    energy_distance,
    nearest_agreement,
    prior_scores,
    ridge_predictions,
)


def units(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


N, E, S = 600, 8, 16


@pytest.fixture(scope="module")
def world():
    """Texts name one of three places; an image is at it, and left or right of it by chance."""
    rng = np.random.default_rng(0)
    centres, side = units(rng.normal(size=(3, E))), rng.normal(size=E)
    place = rng.integers(0, 3, N)

    def images(shape):
        sign = rng.choice([-1, 1], shape)[..., None]
        at = centres[place] if shape == N else centres[place][:, None]
        return units(at + 0.4 * sign * side + 0.1 * rng.normal(size=(*np.atleast_1d(shape), E)))

    z, exact = images(N), images((N, S))
    text = units(centres[place] @ rng.normal(size=(E, E)))
    return z, text, exact, place[:, None]


def test_an_exact_sampler_passes(world):
    z, text, exact, place = world
    found = prior_scores(z, text, exact, place)
    assert found["mean_cosine"] >= found["ridge_cosine"] - 0.005
    assert found["calibration_gap"] <= 0.03
    assert found["energy_samples"] < min(found["energy_ridge"], found["energy_text"])
    assert abs(found["energy_samples"]) < 0.02
    assert found["nearest_samples"] == found["nearest_image"] == 1
    # One exact sample loses to the regression: its cosine is E|m|², not E|m|.
    assert found["sample_cosine"] < found["ridge_cosine"] - 0.02


def test_a_sampler_of_the_mean_is_found_out(world):
    """Its cosine is the best there is; it is neither calibrated nor of the distribution."""
    z, text, exact, place = world
    mean = np.repeat(units(exact.mean(1))[:, None], S, axis=1)
    found, good = prior_scores(z, text, mean, place), prior_scores(z, text, exact, place)
    assert found["mean_cosine"] > good["mean_cosine"] - 0.02
    assert found["calibration_gap"] > 0.1
    assert found["energy_samples"] > good["energy_samples"] + 0.05


def test_a_sampler_that_ignores_the_text_is_found_out(world):
    z, text, exact, place = world
    found = prior_scores(z, text, np.roll(exact, N // 2 + 1, axis=0), place)
    assert found["mean_cosine"] < found["ridge_cosine"] - 0.1
    assert found["nearest_samples"] < 0.6
    assert abs(found["energy_samples"]) < 0.05  # the images as such are right


def test_a_regression_of_what_is_linear_is_exact():
    rng = np.random.default_rng(1)
    x, W, b = rng.normal(size=(50, 4)), rng.normal(size=(4, 3)), rng.normal(size=3)
    new = rng.normal(size=(5, 4))
    np.testing.assert_allclose(ridge_predictions(x, x @ W + b, new), new @ W + b, atol=2e-3)
    # Of noise it predicts less than least squares do.
    x, noise, new = (rng.normal(size=shape) for shape in ((50, 40), (50, 3), (5, 40)))
    least = np.linalg.lstsq(x - x.mean(0), noise - noise.mean(0), rcond=None)[0]
    by_least = (new - x.mean(0)) @ least
    ridge = ridge_predictions(x, noise, new) - noise.mean(0)
    assert np.square(ridge).mean() < 0.3 * np.square(by_least).mean()


def test_distances_by_hand():
    a, b = np.array([[0.0], [3]]), np.array([[1.0], [5]])
    # 2 · mean(5, 2) - 3 - 4: of different rows
    assert abs(energy_distance(a, b)) < 1e-12
    rng = np.random.default_rng(2)
    assert abs(energy_distance(rng.normal(size=(500, 3)), rng.normal(size=(500, 3)))) < 0.02
    np.testing.assert_allclose(cosines(np.array([[3.0, 0]]), np.array([[1.0, 1]])), [0.5**0.5])


def test_partners_do_not_lower_the_energy_distance():
    """The mean of two sets of one distribution is 0, also where rows have a text in common."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(300, 20, 1, 4))
    sets = centres + 0.3 * rng.normal(size=(300, 20, 2, 4))
    found = [energy_distance(each[:, 0], each[:, 1]) for each in sets]
    assert abs(np.mean(found)) < 4 * np.std(found) / 300**0.5
    assert np.std(found) / 300**0.5 < 0.01  # with partners the mean is -.2


def test_agreement_leaves_out_what_has_no_class():
    eye = np.eye(3)
    classes = np.array([[0, 1], [1, -1], [2, 2]])
    assert nearest_agreement(eye, eye, classes, classes) == 1
    other = np.array([[0, 0], [5, 3], [5, -1]])
    # known: (0,0) (0,1) (1,0) (2,0); equal: the first
    assert nearest_agreement(eye, eye, classes, other) == 0.25
    assert np.isnan(nearest_agreement(eye, eye, -np.ones((3, 1)), classes[:, :1]))
