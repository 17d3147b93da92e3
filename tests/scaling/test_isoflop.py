"""A planted law's best sizes come back from its curves, with the exponents they grow by."""

import numpy as np
import pytest
from scipy import optimize

from ditjax.errors import UserError
from ditjax.scaling.isoflop import ComputeCurve, compute_optimal, isoflop
from ditjax.scaling.joint import JointLaw, fit_joint
from tests.scaling.coverage import of_isoflop
from tests.scaling.planted import LAW, budgets, curves

RNG = np.random.default_rng
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0)


def at_budget(metrics, sizes=SIZES, budget=100.0):
    """Curves that have these metrics at the budget."""
    ends = np.array([budget / 10, budget * 10])
    return [ComputeCurve(n, ends, np.full(2, m)) for n, m in zip(sizes, metrics, strict=True)]


def parabola(bottom, curvature=0.3, sizes=SIZES):
    return np.exp(0.5 + curvature * np.log(np.array(sizes) / bottom) ** 2)


def test_a_parabola_gives_its_vertex():
    (profile,) = isoflop(at_budget(parabola(5.0)), [100.0])
    assert profile.best_size == pytest.approx(5.0)
    assert profile.best_metric == pytest.approx(np.exp(0.5))
    assert profile.best_images == pytest.approx(100.0 / (3 * 5.0))
    assert profile.images == pytest.approx([100 / (3 * n) for n in SIZES])
    assert profile.interval is not None
    assert (profile.interval.low, profile.interval.high) == pytest.approx((5.0, 5.0))
    assert profile.why == ""


def test_the_vertex_is_numpys():
    metrics = parabola(5.0) * np.exp(0.02 * RNG(0).normal(size=5))
    (profile,) = isoflop(at_budget(metrics), [100.0])
    p2, p1, _ = np.polyfit(np.log(SIZES), np.log(metrics), 2)
    assert profile.best_size == pytest.approx(np.exp(-p1 / (2 * p2)))
    assert profile.best_size is not None
    assert profile.interval is not None
    assert profile.interval.low < profile.best_size < profile.interval.high


def test_fiellers_interval_holds_the_vertex():
    rng, held, width = RNG(1), [], []
    sizes = np.geomspace(1, 16, 8)
    for _ in range(400):
        metrics = parabola(5.0, sizes=sizes) * np.exp(0.05 * rng.normal(size=8))
        (profile,) = isoflop(at_budget(metrics, sizes), [100.0])
        if profile.interval is not None:
            held.append(profile.interval.low <= 5.0 <= profile.interval.high)
            width.append(np.log(profile.interval.high / profile.interval.low))
    assert len(held) > 350
    assert 0.917 <= np.mean(held) <= 0.983
    assert np.median(width) < 0.6


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        (parabola(0.2), "lowest at the smallest model"),
        (parabola(40.0), "lowest at the largest model"),
        ([2.0, 3.0, 1.9, 3.0, 2.0], "opens downwards"),
        ([1.03, 1.0, 1.04, 1.06, 1.061], "outside"),
    ],
)
def test_no_minimum_where_the_models_show_none(metrics, why):
    (profile,) = isoflop(at_budget(metrics), [100.0])
    assert profile.best_size is None
    assert profile.interval is None
    assert why in profile.why
    assert len(profile.metrics) == 5


def test_two_models_are_not_a_parabola_and_three_have_no_interval():
    (two,) = isoflop(at_budget([2.0, 1.0], SIZES[:2]), [100.0])
    assert two.best_size is None
    assert "2 of the models reach it" in two.why
    (three,) = isoflop(at_budget(parabola(2.0, sizes=SIZES[:3]), SIZES[:3]), [100.0])
    assert three.best_size == pytest.approx(2.0)
    assert three.interval is not None
    assert (three.interval.low, three.interval.high) == (0.0, np.inf)


def test_no_curve_is_read_beyond_its_points():
    profiles = isoflop(curves(RNG(0), models=3), [3e2, 5e3, 3e6, 1e9, 1e10])
    reached = [[f"{size:g}" for size in profile.sizes] for profile in profiles]
    assert reached == [["0.03"], ["0.03", "0.3"], ["0.03", "0.3", "3"], ["3"], []]


def test_seeds_of_a_size_are_one_point():
    metrics = parabola(5.0)
    doubled = at_budget(metrics * 1.1) + at_budget(metrics / 1.1)
    (once,), (twice,) = isoflop(at_budget(metrics), [100.0]), isoflop(doubled, [100.0])
    assert twice.metrics == pytest.approx(once.metrics)
    assert twice.best_size == pytest.approx(once.best_size)


def test_parameters_as_size_take_the_cost_of_an_image():
    """The best number of images is the budget over what an image costs the best size."""
    of_gflops = isoflop(at_budget(parabola(5.0)), [100.0])[0]
    renamed = [
        ComputeCurve(c.size**1.5, c.compute, c.metric, 3 * c.size) for c in at_budget(parabola(5.0))
    ]
    of_parameters = isoflop(renamed, [100.0])[0]
    assert of_parameters.best_size == pytest.approx(5.0**1.5)
    assert of_parameters.best_images == pytest.approx(of_gflops.best_images)


def test_best_sizes_are_those_of_the_planted_law():
    profiles = isoflop(curves(RNG(0), models=16), budgets())
    for profile in profiles:
        one = optimize.minimize_scalar(
            lambda log_n, c=profile.budget: LAW(np.exp(log_n), c / (3 * np.exp(log_n))),
            bounds=np.log([0.03, 3]),
            method="bounded",
        )
        assert float(LAW.best_size(profile.budget)) == pytest.approx(np.exp(one.x), rel=1e-3)
        # The profile is no parabola all the way, which moves its vertex.
        assert profile.best_size == pytest.approx(np.exp(one.x), rel=0.25)
    found = compute_optimal(profiles)
    assert found.size.exponent == pytest.approx(0.3 / 0.7, abs=0.03)
    assert found.images.exponent == pytest.approx(0.4 / 0.7, abs=0.03)
    assert found.size(profiles[2].budget) == pytest.approx(profiles[2].best_size, rel=0.05)
    assert 3 * found.size(1e6) * found.images(1e6) == pytest.approx(1e6, rel=1e-6)


def test_interval_of_the_exponent_holds_the_planted_one():
    found = of_isoflop(100, models=9, seeds=1, sigma=0.01)
    assert found["exponent"] >= 0.90
    assert found["width"] < 1.0


def test_more_budgets_are_not_more_evidence():
    noisy = curves(RNG(3), models=9, sigma=0.01)
    few, many = (compute_optimal(isoflop(noisy, budgets(n))).size.interval for n in (6, 48))
    assert (many.high - many.low) == pytest.approx(few.high - few.low, rel=0.25)


def test_three_models_give_an_exponent_without_interval():
    """Also where other budgets have more: their noise is not that of the three."""
    for few, many in ((3, 3), (3, 5)):
        made = [
            *isoflop(at_budget(parabola(2.0, sizes=SIZES[:few]), SIZES[:few]), [100.0]),
            *isoflop(at_budget(parabola(2.6, sizes=SIZES[:many]), SIZES[:many], 1e3), [1e3]),
        ]
        growth = compute_optimal(made).size
        assert growth.exponent == pytest.approx(np.log10(1.3))
        assert (growth.interval.low, growth.interval.high) == (-np.inf, np.inf)


def test_optimal_growth_by_hand():
    """Vertices 2, 4 and 8 at budgets 10, 100 and 1000; the edge at 10⁴ is left out."""
    made = [
        profile
        for bottom, budget in ((2.0, 10.0), (4.0, 100.0), (8.0, 1000.0), (99.0, 1e4))
        for profile in isoflop(at_budget(parabola(bottom), budget=budget), [budget])
    ]
    found = compute_optimal(made)
    assert found.size.exponent == pytest.approx(np.log10(2))
    assert found.images.exponent == pytest.approx(1 - np.log10(2))
    assert found.size.k == pytest.approx(1.0)
    assert (found.budgets, found.left_out) == ((10.0, 100.0, 1000.0), (1e4,))
    with pytest.raises(UserError, match=r"1 of 2 budgets .*\(lowest at the largest model"):
        compute_optimal(made[2:])


def test_isoflop_refusals():
    two = [ComputeCurve(1.0, [1, 2], [1, 1], 3.0), ComputeCurve(1.0, [1, 2], [1, 1], 9.0)]
    with pytest.raises(UserError, match="two models of size 1 cost 3 and 9 an image"):
        isoflop(two, [1.0])
    with pytest.raises(UserError, match=r"y\[0\] is nan"):
        isoflop([(1.0, [1, 2], [np.nan, 1])], [1.0])
    with pytest.raises(UserError, match=r"x\[0\] is -5"):
        isoflop(two[:1], [-5.0])
    with pytest.raises(UserError, match="level"):
        isoflop(two[:1], [1.0], level=2)


def joint_points(n_sizes=5, n_images=5):
    size = np.repeat(np.geomspace(0.01, 10, n_sizes), n_images)
    return size, np.tile(np.geomspace(1e4, 1e8, n_images), n_sizes)


def test_joint_law_is_found_exactly():
    size, images = joint_points()
    found = fit_joint(size, images, LAW(size, images))
    np.testing.assert_allclose(
        [found.e, found.a, found.alpha, found.b, found.beta], [1.0, 2.0, 0.4, 270.0, 0.3], rtol=1e-4
    )
    np.testing.assert_allclose(found.best_size(1e6), LAW.best_size(1e6), rtol=1e-3)
    scaled = fit_joint(size * 1e9, images, LAW(size, images) * 7)
    np.testing.assert_allclose(scaled(size * 1e9, images), 7 * LAW(size, images), rtol=1e-4)


def test_joint_law_is_found_in_noise_with_a_wild_point():
    size, images = joint_points(8, 8)
    y = LAW(size, images) * np.exp(0.01 * RNG(0).normal(size=64))
    y[[5, 20, 50]] *= 10
    found = fit_joint(size, images, y)
    assert found.alpha == pytest.approx(0.4, abs=0.06)
    assert found.beta == pytest.approx(0.3, abs=0.05)


def test_joint_law_is_no_worse_than_scipys_least_squares():
    size, images = joint_points()
    y = LAW(size, images) * np.exp(0.05 * RNG(1).normal(size=25))
    ours = fit_joint(size, images, y)

    def log_law(at, e, a, alpha, b, beta):
        return np.log(JointLaw(abs(e), abs(a), alpha, abs(b), beta, 0)(*at))

    theirs = optimize.curve_fit(
        log_law, (size, images), np.log(y), p0=[1.0, 2.0, 0.4, 270.0, 0.3], maxfev=20000
    )[0]

    def absolute(prediction):
        return np.mean(np.abs(np.log(y) - prediction))

    ours_is = absolute(np.log(ours(size, images)))
    assert ours_is <= 1.02 * absolute(log_law((size, images), *theirs))


def test_joint_refusals():
    size, images = joint_points(2, 4)
    with pytest.raises(UserError, match="2 different sizes"):
        fit_joint(size, images, np.ones(8))
    with pytest.raises(UserError, match="5 points"):
        fit_joint(size[:5], images[:5], np.ones(5))
