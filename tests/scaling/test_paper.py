"""The published Table 4 and Figure 9 through our own analysis."""

import numpy as np
import pytest

from ditjax.scaling.fit import fit_power_law, fit_power_law_offset, pearson, spearman
from ditjax.scaling.frontier import frontier
from tests.scaling.paper import FID, GFLOPS, LONGER_XL2, NAMES, law_of_steps, overtakings, predicted


def test_correlations_of_table_4():
    assert round(pearson(np.log10(GFLOPS), FID), 3) == -0.930
    assert spearman(GFLOPS, FID) == pytest.approx(-0.9, abs=0.05)


def test_laws_of_table_4():
    for fit in (fit_power_law, fit_power_law_offset):
        law = fit(GFLOPS, FID, np.random.default_rng(0))
        assert law.b_interval.low > 0
        assert law.b_interval.low < law.b < law.b_interval.high


def test_frontier_of_table_4():
    """Patch 8 of the large models costs more than it gives (DiT Sec. 5.1)."""
    best = {NAMES[i] for i in frontier(GFLOPS, FID)}
    assert {"DiT-S/8", "DiT-S/4", "DiT-B/4", "DiT-L/4", "DiT-XL/2"} <= best
    assert not best & {"DiT-B/8", "DiT-L/8", "DiT-XL/8"}


@pytest.mark.parametrize("hold", [3, 1])
def test_the_largest_model_is_predicted_from_the_smaller(hold):
    told = predicted(hold, offset=False)
    assert (told.name, told.models_fitted) == ("DiT-XL/2", 12 - hold)
    assert told.measured == pytest.approx(19.47)
    assert told.held[-1].inside


def test_law_of_steps_goes_through_the_three_points():
    c, a, b = law_of_steps()
    for steps, fid in LONGER_XL2.items():
        assert c + a * (steps / 400_000) ** -b == pytest.approx(fid, abs=1e-6)


def test_figure_9():
    """XL/2 overtakes XL/4 near 10¹⁰ training Gflops, given how XL/4 learns."""
    added, flat, factor, same_end = (each.compute for each in overtakings())
    found = [compute for compute in (flat, added, factor) if compute is not None]
    assert len(found) == 3
    assert 0.5e10 < found[0] < found[1] < found[2] < 2e10
    # That XL/4 stops above XL/2 is what makes it fall behind: the figures alone do not show it.
    assert same_end is None
