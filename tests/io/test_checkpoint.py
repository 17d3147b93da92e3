"""Checkpoints: what is kept, what comes back, and where it comes back to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.io.checkpoint import Checkpoints, Score, Step
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.training.step import TrainState


def state(value: float) -> TrainState:
    params = {"blocks": {"mlp": {"in": {"kernel": jnp.full((2, 8, 32), value)}}}}
    return TrainState(
        step=jnp.array(int(value), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda x: x + 0.5, params),
        opt_state=({"count": jnp.array(3)}, params),
    )


def abstract(mesh) -> TrainState:
    shardings = rules.state_shardings(state(0.0), mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(0.0), shardings
    )


def test_the_newest_are_kept_and_come_back_on_any_mesh(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(float(step)), {"seed": 7})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    for mesh in (make_mesh(8, 1), make_mesh(2, 4), make_mesh(1, 1, jax.devices()[:1])):
        with Checkpoints(tmp_path, keep=2, read_only=True) as checkpoints:
            assert checkpoints.latest_step == 3
            restored, position = checkpoints.restore(abstract(mesh))
            older, _ = checkpoints.restore(abstract(mesh), 2)
        assert position == {"seed": 7}
        assert int(restored.step) == 3
        assert int(older.step) == 2
        assert isinstance(restored, TrainState)
        for ours, theirs, target in zip(
            jax.tree.leaves(state(3.0)), jax.tree.leaves(restored),
            jax.tree.leaves(abstract(mesh)), strict=True,
        ):  # fmt: skip
            np.testing.assert_array_equal(ours, theirs)
            assert theirs.sharding == target.sharding


def scored(value: float, **protocol: int) -> Score:
    return Score("fd_digits", value, {"num_samples": 250, **protocol})


def kept(folder) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir())


def test_the_best_is_kept_beside_the_newest(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        values, best = (math.inf, 1.0, math.nan, 2.0, 1.5), (None, 2, 2, 2, 2)
        for step, (value, found) in enumerate(zip(values, best, strict=True), start=1):
            checkpoints.save(step, state(step), {}, scored(value))
            assert checkpoints.best_step == found
        assert checkpoints.latest_step == 5
    assert kept(tmp_path) == [2, 4, 5]


def test_the_best_survives_a_restart_and_what_is_not_evaluated(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, value in ((1, 1.0), (2, 5.0)):
            checkpoints.save(step, state(step), {}, scored(value))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, state(step), {})
        checkpoints.save(5, state(5), {}, scored(4.0))
    assert kept(tmp_path) == [1, 5]
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        assert checkpoints.best_step == 1
        cases: tuple[tuple[Step, float], ...] = (("best", 1.5), ("latest", 5.5), (1, 1.5))
        for asked, value in cases:
            ema, found = checkpoints.restore_part("ema", abstract(make_mesh(8, 1)).ema, asked)
            np.testing.assert_array_equal(ema["blocks"]["mlp"]["in"]["kernel"], value)
            assert found == int(value)
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # as good as the best: the newer one
        checkpoints.save(6, state(6), {}, scored(1.0))
        assert checkpoints.best_step == 6
    assert kept(tmp_path) == [6]


def test_distances_of_two_protocols_are_not_ranked(tmp_path):
    """More samples make a distance smaller: 2.0 of 1,000 is no better than 3.0 of 250."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step, value, num in ((1, 3.0, 250), (2, 4.0, 250), (3, 2.5, 1000), (4, 2.0, 1000)):
            checkpoints.save(step, state(step), {}, scored(value, num_samples=num))
        checkpoints.save(5, state(5), {})
        assert checkpoints.best_step == 4
    assert kept(tmp_path) == [1, 4, 5]


def test_steps_that_are_not_there(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {})
        assert checkpoints.best_step is None
        target = abstract(make_mesh(8, 1))
        with pytest.raises(UserError, match=r"no best .* none was evaluated .*: it has 1, 2"):
            checkpoints.restore(target, "best")
        with pytest.raises(UserError, match=r"no checkpoint of step 3: it has 1, 2"):
            checkpoints.restore_part("ema", target.ema, 3)


def test_the_average_alone(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(4, state(4.0), {})
        ema, step = checkpoints.restore_part("ema", abstract(make_mesh(2, 4)).ema)
    assert step == 4
    kernel = ema["blocks"]["mlp"]["in"]["kernel"]
    np.testing.assert_array_equal(kernel, 4.5)
    assert not kernel.sharding.is_fully_replicated


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Checkpoints(tmp_path / "none", keep=1, read_only=True)
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(UserError, match="holds no checkpoint: train first"),
    ):
        checkpoints.restore(abstract(make_mesh(8, 1)))


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make"):
        Checkpoints(tmp_path / "file" / "below", keep=1)
