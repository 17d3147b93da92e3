"""Scores of forecasts: pysteps' where it is right, and closed forms where it is not."""

from pathlib import Path

import numpy as np
import pytest

from ditjax.metrics import nowcast
from tests import rain

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "nowcast.npz") as file:
        return dict(file)


def test_contingency_scores_are_pysteps(golden):
    """Exactly, at every threshold and lead."""
    forecast, observed = rain.fields()
    table = nowcast.contingency(forecast, observed, rain.THRESHOLDS)
    ours = np.stack(
        [
            nowcast.critical_success(table),
            nowcast.detection(table),
            nowcast.false_alarm_ratio(table),
            nowcast.frequency_bias(table),
        ],
        axis=1,
    )
    for row, threshold in zip(ours, rain.THRESHOLDS, strict=True):
        np.testing.assert_array_equal(row, golden[f"scores_{threshold}"])


def test_an_event_is_at_or_above_the_threshold():
    table = nowcast.contingency(np.full((1, 1, 1), 16), np.full((1, 1, 1), 16), (16, 17))
    assert table.hits.tolist() == [[1], [0]]


def test_tables_add_up_and_undefined_scores_are_left_out():
    forecast, observed = rain.fields()
    whole = nowcast.contingency(forecast, observed, (100, 256))
    parts = [nowcast.contingency(forecast[i], observed[i], (100, 256)) for i in range(3)]
    added = parts[0].plus(parts[1]).plus(parts[2])
    for a, b in zip(whole, added, strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.hits.dtype == np.int64
    scores = nowcast.critical_success(nowcast.over_leads(whole))
    assert np.isnan(scores[1, 0])  # nothing is above 255
    assert nowcast.mean_defined(scores) == (scores[0, 0], 1)
    assert np.isnan(nowcast.mean_defined([np.nan])[0])


def test_crps_is_pysteps_without_ties_and_right_with_them(golden):
    members, observed = rain.untied()
    np.testing.assert_allclose(nowcast.crps(members, observed).mean(), golden["crps"], rtol=1e-12)
    # Members 0, 0, 5 and observation 0: E|X - y| = 5/3, E|X - X'| / 2 = 10/9; pysteps has 0.
    tied = nowcast.crps(np.array([[0], [0], [5]]), np.array([0]))
    np.testing.assert_allclose(tied, 5 / 9, rtol=1e-15)


def test_crps_is_its_definition():
    members, observed = rain.untied()
    pairs = np.abs(members[:, None] - members[None])
    error = np.abs(members - observed).mean(0)
    plain, fair = nowcast.crps(members, observed), nowcast.crps(members, observed, fair=True)
    np.testing.assert_allclose(plain, error - pairs.mean((0, 1)) / 2, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(fair, error - pairs.sum((0, 1)) / 84, rtol=1e-10, atol=1e-12)
    one = nowcast.crps(members[:1], observed)
    np.testing.assert_array_equal(one, np.abs(members[0] - observed))


def test_exchangeable_members_have_the_spread_of_their_error():
    rng = np.random.default_rng(1)
    centre = rng.normal(0, 1, 40_000)
    members = centre + rng.normal(0, 2, (5, 40_000))
    found = nowcast.spread_skill(members, centre + rng.normal(0, 2, 40_000))
    assert found == pytest.approx(1, abs=0.02)
    assert nowcast.spread_skill(members, centre + rng.normal(0, 8, 40_000)) < 0.5


def test_blocks_keep_their_largest_value():
    field = np.arange(36).reshape(1, 6, 6)
    assert nowcast.max_pooled(field, 4).tolist() == [[[21]]]
    assert nowcast.max_pooled(field, 3).tolist() == [[[14, 17], [32, 35]]]


def test_the_report_of_a_perfect_and_of_an_empty_forecast():
    _, observed = rain.fields()
    perfect = nowcast.contingency_scores(observed, observed)
    assert perfect["csi"] == perfect["csi_leads"] == perfect["csi_4"] == perfect["csi_16"] == 1
    assert perfect["far"] == 0
    empty = nowcast.contingency_scores(np.zeros_like(observed), observed)
    assert (empty["csi"], empty["pod"], empty["bias"]) == (0, 0, 0)
    assert np.isnan(empty["far"])
