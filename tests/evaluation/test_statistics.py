"""Reference statistics: files of ADM and pytorch-fid, ours, and what is refused."""

import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.evaluation.statistics import (
    Statistics,
    load_features,
    load_statistics,
    save_statistics,
    statistics_hash,
)
from ditjax.metrics.frechet import gaussian_frechet_distance
from tests.feature_sets import features

X, Y = (features(50, seed, d).astype(np.float64) for seed, d in ((0, 6), (1, 4)))
MU, SIGMA = X.mean(0), np.cov(X, rowvar=False)
MU_S, SIGMA_S = Y.mean(0), np.cov(Y, rowvar=False)
ADM = {"mu": MU, "sigma": SIGMA, "mu_s": MU_S, "sigma_s": SIGMA_S}
OURS = Statistics(MU, SIGMA, MU_S, SIGMA_S, {"count": 50, "resize": "tf1", "data": {"name": "é"}})


def test_a_file_of_adm(tmp_path):
    np.savez(tmp_path / "a.npz", **ADM, arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    found = load_statistics(tmp_path / "a.npz")
    for name, array in ADM.items():
        np.testing.assert_array_equal(getattr(found, name), array)
    assert found.arrays == ("arr_0",)
    assert found.provenance == {}


def test_a_file_of_pytorch_fid(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    found = load_statistics(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.sigma, SIGMA)
    assert found.mu_s is found.sigma_s is None
    assert found.arrays == ()


def test_a_file_in_float32_and_in_fortran_order(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU.astype("f4"), sigma=np.asfortranarray(SIGMA.astype("f4")))
    found = load_statistics(tmp_path / "a.npz")
    assert found.mu.dtype == found.sigma.dtype == np.float64
    np.testing.assert_allclose(found.sigma, SIGMA, rtol=1e-6, atol=1e-7)
    assert gaussian_frechet_distance(found.mu, found.sigma, MU, SIGMA) < 1e-6


def test_ours_comes_back_and_others_read_it(tmp_path):
    path = save_statistics(tmp_path / "new" / "a.npz", OURS, X)
    found = load_statistics(path)
    for ours, again in zip(OURS, found, strict=True):
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(again, ours)
    assert found.provenance == OURS.provenance
    assert found.arrays == ("features",)
    np.testing.assert_array_equal(load_features(path), X.astype(np.float32))
    # As ADM's evaluator and pytorch-fid do.
    with np.load(path) as file:
        for name, array in ADM.items():
            np.testing.assert_array_equal(file[name], array)


def test_without_spatial_statistics_there_are_none_in_the_file(tmp_path):
    path = save_statistics(tmp_path / "a.npz", OURS._replace(mu_s=None, sigma_s=None))
    with np.load(path) as file:
        assert set(file) == {"mu", "sigma", "provenance"}
    with pytest.raises(UserError, match="no array 'features'"):
        load_features(path)


def test_the_hash_is_of_the_numbers_alone(tmp_path):
    path = save_statistics(tmp_path / "a.npz", OURS)
    digits = statistics_hash(load_statistics(path))
    assert digits == statistics_hash(OURS._replace(provenance={}))
    assert len(digits) == 12
    for name, array in ADM.items():
        changed = array.copy()
        changed.flat[0] = np.nextafter(changed.flat[0], 2)
        assert statistics_hash(OURS._replace(**{name: changed})) != digits
    assert statistics_hash(OURS._replace(mu_s=None, sigma_s=None)) != digits


def edited(**changes):
    return {k: v for k, v in (ADM | changes).items() if v is not None}


NAN = SIGMA.copy()
NAN[2, 3] = NAN[3, 2] = np.nan
SKEW = SIGMA.copy()
SKEW[0, 1] += 0.01 * np.abs(SIGMA).max()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (edited(mu=None), "no array 'mu'"),
        (edited(sigma=None), "no array 'sigma', only mu, mu_s, sigma_s. Did you mean 'sigma_s'"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"holds samples \(arr_0\) but no statistics"),
        (edited(mu_s=None), "has only sigma_s"),
        (edited(sigma_s=None), "has only mu_s"),
        (edited(mu=np.arange(6)), "mu is int64, expected float64"),
        (edited(sigma_s=SIGMA_S.astype("f2")), "sigma_s is float16"),
        (edited(sigma=SIGMA[:5]), r"mu is \[6\] and sigma \[5, 6\], expected \[d\] and \[d, d\]"),
        (edited(mu=MU[None]), r"mu is \[1, 6\]"),
        (edited(mu_s=MU), r"mu_s is \[6\] and sigma_s \[4, 4\]"),
        (edited(sigma=NAN), "sigma is not finite"),
        (edited(mu_s=MU_S * np.inf), "mu_s is not finite"),
        (edited(sigma=SKEW), "sigma is not a covariance"),
        (edited(sigma=-SIGMA), "sigma is not a covariance"),
        (edited(mu=np.array([print], object)), "mu holds pickled objects"),
        (edited(provenance=np.array("[1]")), "provenance is not a JSON object"),
        (edited(provenance=np.array("{")), "not a whole npz file"),
        (edited(provenance=np.zeros(3)), "provenance is float64"),
    ],
)
def test_what_is_refused(tmp_path, arrays, message):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_statistics(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("statistics", "more", "message"),
    [
        (OURS._replace(sigma=NAN), None, "sigma is not finite"),
        (OURS._replace(sigma_s=None), None, "expected mu_s and sigma_s, or neither"),
        (OURS._replace(provenance={"x": float("nan")}), None, "plain JSON"),
        (OURS._replace(provenance={"x": print}), None, "plain JSON"),
        (OURS, X[:, :5], r"features are float64\[50, 5\], expected floats \[n, 6\]"),
        (OURS, X * np.nan, "features are not finite"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, statistics, more, message):
    with pytest.raises(UserError, match=message):
        save_statistics(tmp_path / "a.npz", statistics, more)
    assert not list(tmp_path.iterdir())


def test_features_of_another_kind_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.arange(6).reshape(2, 3))
    with pytest.raises(UserError, match="features are int64"):
        load_features(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", features=np.float32(1.0))
    with pytest.raises(UserError, match="features are float32"):
        load_features(tmp_path / "a.npz")
