"""A law fitted to the smaller models predicts the largest, within its interval."""

import numpy as np
import pytest
from scipy import stats

from ditjax.errors import UserError
from ditjax.scaling.extrapolate import predict_held_out
from tests.scaling.planted import study


@pytest.mark.parametrize(("c", "offset"), [(0.0, False), (0.0, None), (1.5, True)])
def test_an_exact_law_predicts_exactly(c, offset):
    x = np.geomspace(1e-4, 1e2, 10)
    y = c + 3.0 * x**-0.4
    told = predict_held_out(x, y, np.random.default_rng(0), hold=2, offset=offset)
    assert told.models_fitted == 8
    assert (told.x, told.fitted_to) == pytest.approx((x[-1], x[7]))
    assert [held.name for held in told.held] == [8, 9]
    np.testing.assert_allclose([held.predicted for held in told.held], y[-2:], rtol=1e-4)
    assert told.predicted == pytest.approx(y[-1], rel=1e-4)
    assert abs(told.error) < 1e-4


def test_the_held_out_model_is_not_seen():
    x, y, _ = study(np.random.default_rng(1), models=9)
    other = y.copy()
    other[-1] *= 3
    one, two = (predict_held_out(x, each, np.random.default_rng(0)) for each in (y, other))
    assert (one.a, one.b, one.c) == (two.a, two.b, two.c)
    assert (one.predicted, one.interval) == (two.predicted, two.interval)
    assert two.measured == pytest.approx(3 * one.measured)
    assert two.error == pytest.approx((1 + one.error) / 3 - 1)


def test_the_order_of_runs_does_not_matter_and_seeds_of_a_model_stay_together():
    x, y, model = study(np.random.default_rng(2), models=8, seeds=3)
    told = predict_held_out(x, y, np.random.default_rng(0), groups=model, offset=False)
    mixed = np.random.default_rng(3).permutation(len(x))
    shuffled = predict_held_out(
        x[mixed], y[mixed], np.random.default_rng(0), groups=[model[i] for i in mixed], offset=False
    )
    assert told.name == shuffled.name == 7
    assert told.models_fitted == 7
    assert shuffled.predicted == pytest.approx(told.predicted)
    assert told.measured == pytest.approx(np.exp(np.log(y[-3:]).mean()))


@pytest.mark.parametrize(("fitted", "further"), [(8, 1.0), (12, 1.0), (12, 1e6)])
def test_interval_is_near_the_textbook_one_for_even_noise(fitted, further):
    """Student's prediction interval: t·s·√(1 + 1/n + (x₀-x̄)²/Sxx), on logs."""
    rng = np.random.default_rng(4)
    ratios = []
    for _ in range(100):
        x, y, _ = study(rng, models=fitted + 1)
        x[-1] *= further
        told = predict_held_out(x, y, rng, offset=False, resamples=400)
        u, v = np.log(x[:-1]), np.log(y[:-1])
        line = stats.linregress(u, v)
        s = np.sqrt(np.sum((v - line.intercept - line.slope * u) ** 2) / (fitted - 2))
        far = (np.log(x[-1]) - u.mean()) ** 2 / np.sum((u - u.mean()) ** 2)
        ideal = stats.t.ppf(0.975, fitted - 2) * s * np.sqrt(1 + 1 / fitted + far)
        ratios.append(np.log(told.interval.high / told.predicted) / ideal)
    assert 0.95 < np.median(ratios) < 1.3


def test_a_model_off_the_law_is_outside():
    x = np.geomspace(1e-3, 1, 10)
    y = x**-0.5 * np.exp(0.02 * np.random.default_rng(5).normal(size=10))
    told = predict_held_out(x, y, np.random.default_rng(0))
    assert told.held[-1].inside
    y[-1] *= 2
    assert not predict_held_out(x, y, np.random.default_rng(0)).held[-1].inside


def test_none_takes_an_offset_only_where_it_can():
    x = np.geomspace(1e-3, 1, 6)
    y = 1.0 + x**-0.5
    assert predict_held_out(x, y, np.random.default_rng(0)).c == pytest.approx(1.0, abs=1e-3)
    assert predict_held_out(x[:5], y[:5], np.random.default_rng(0)).c == 0.0  # 4 models are left
    assert predict_held_out(x, x, np.random.default_rng(0)).c == 0.0  # y grows


def test_refusals():
    rng, x = np.random.default_rng(0), [1.0, 2.0, 3.0, 4.0]
    y = [4.0, 3.0, 2.0, 1.0]
    with pytest.raises(UserError, match=r"hold=2 of 4 models: .* 3 left"):
        predict_held_out(x, y, rng, hold=2)
    with pytest.raises(UserError, match="hold=0"):
        predict_held_out(x, y, rng, hold=0)
    with pytest.raises(UserError, match="5 left"):
        predict_held_out(x, y, rng, offset=True)
    with pytest.raises(UserError, match=r"parts models of one x \(4\)"):
        predict_held_out([*x, 4.0], [*y, 1.1], rng)
    with pytest.raises(UserError, match=r"y\[1\] is nan"):
        predict_held_out(x, [4.0, np.nan, 2.0, 1.0], rng)
    with pytest.raises(UserError, match="level 95"):
        predict_held_out(x, y, rng, level=95)
