"""Checkpoints: what is kept, what comes back, and where it comes back to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.io.checkpoint import Checkpoints
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
