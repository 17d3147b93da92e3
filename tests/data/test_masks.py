"""Random masks: their kinds, their sizes, and that a key alone decides."""

import jax
import numpy as np
import pytest

from ditjax.data import masks


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), 500)
    made = jax.jit(jax.vmap(lambda key: masks.random_mask(key, 16, 12)))
    return made(keys), made(keys[::-1])


def test_a_mask_is_of_zeros_and_ones_and_of_its_key(drawn):
    found, backwards = drawn
    assert found.shape == (500, 16, 12, 1)
    assert set(np.unique(found)) == {0.0, 1.0}
    np.testing.assert_array_equal(found, backwards[::-1])
    assert len(np.unique(np.reshape(found, (500, -1)), axis=0)) > 250


def test_a_tenth_is_all_unknown_and_no_mask_is_all_known(drawn):
    share = np.asarray(drawn[0]).mean((1, 2, 3))
    assert np.mean(share == 0) == pytest.approx(0.1, abs=0.04)
    assert np.mean(share == 1) < 0.01
    assert 0.4 < share.mean() < 0.7


def test_the_kinds_of_holes():
    keys = jax.random.split(jax.random.key(1), 200)

    def holes(kind):
        return np.asarray(jax.jit(jax.vmap(lambda key: kind(key, 16, 16)))(keys))

    for hole in holes(masks._rectangle):
        rows, columns = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
        assert hole.sum() == len(rows) * len(columns)
        assert all(3 <= len(side) <= 13 for side in (rows, columns))
    planes = holes(masks._half_plane)
    assert 0.1 < planes.mean((1, 2)).min() < planes.mean((1, 2)).max() < 0.9
    straight = [np.ptp(each.sum(0)) == 0 or np.ptp(each.sum(1)) == 0 for each in planes]
    assert 0.4 < np.mean(straight) < 0.7
    strokes = holes(masks._strokes).mean((1, 2))
    assert strokes.min() > 0
    assert 0.05 < strokes.mean() < 0.6
