"""Checkpoints: what is kept, what comes back, and where it comes back to."""

import contextlib
import errno
import math
import os
import resource
import shutil
import threading
import time
import tracemalloc  # noqa: F401 (pytest imports it for a warning, which needs a file)
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import FaultError, UserError
from ditjax.files import faults
from ditjax.models.dit import RULES
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.checkpoint import Checkpoints, DamagedError, Score, Step
from ditjax.training.step import TrainState
from tests.unstable import FOR_EVER, PASSING, Unstable


def newest(checkpoints, abstract_state):
    """`runs.newest`, where there is one."""
    found = opening.restore_newest(checkpoints, abstract_state)
    assert found
    return found


def state(value: float) -> TrainState:
    params = {"blocks": {"mlp": {"in": {"kernel": jnp.full((2, 8, 32), value)}}}}
    return TrainState(
        step=jnp.array(int(value), jnp.int32),
        params=params,
        ema=jax.tree.map(lambda x: x + 0.5, params),
        opt_state=({"count": jnp.array(3)}, params),
    )


def abstract(mesh) -> TrainState:
    shardings = rules.state_shardings(state(0.0), mesh, RULES)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(0.0), shardings
    )


def test_saving_what_every_device_has_compiles_nothing(tmp_path, caplog):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(make_mesh(8, 1)))
    saved = jax.device_put(state(2.0), shardings)
    jax.clear_caches()  # another test may have saved such a state
    with Checkpoints(tmp_path, keep=1) as checkpoints, jax.log_compiles():
        checkpoints.save(2, saved, {})
    assert not [line for line in caplog.messages if "compil" in line]


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
            jax.tree.leaves(state(3.0)),
            jax.tree.leaves(restored),
            jax.tree.leaves(abstract(mesh)),
            strict=True,
        ):
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


class OldState(NamedTuple):
    """The state before it had averages."""

    step: Any
    params: Any
    ema: Any
    opt_state: Any


def test_a_state_without_averages_is_stored_as_before_there_were_any(tmp_path):
    """Files, digests and what restores them: an old checkpoint is a new one."""
    new = state(3.0)
    assert new.averages == ()
    for name, each in (("old", OldState(*new[:4])), ("new", new)):
        with Checkpoints(tmp_path / name, keep=1) as checkpoints:
            checkpoints.save(3, each, {"seed": 7})
    for file in ("digests/metadata", "position/metadata", "state/_METADATA"):
        old, now = ((tmp_path / name / "3" / file).read_text() for name in ("old", "new"))
        assert old == now, file
    with Checkpoints(tmp_path / "old", keep=1, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(abstract(make_mesh(8, 1)))
    assert isinstance(restored, TrainState)
    jax.tree.map(np.testing.assert_array_equal, restored, new)


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


def noisy(seed: int) -> TrainState:
    """Of numbers that no compression makes small."""
    kernel = jax.random.normal(jax.random.key(seed), (2, 8, 32))
    return state(float(seed))._replace(params={"blocks": {"mlp": {"in": {"kernel": kernel}}}})


def test_every_so_many_steps_one_is_kept_for_good(tmp_path):
    for steps in ((1, 2, 3, 4, 5), (6, 7)):
        with Checkpoints(tmp_path, keep=1, keep_every=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, state(step), {}, scored(1.0) if step == 3 else None)
    assert kept(tmp_path) == [2, 3, 4, 6, 7]


def test_a_step_is_listed_when_it_is_durable(tmp_path, monkeypatch):
    release = threading.Event()
    written: list[str] = []
    synced: set[int] = set()
    real, fsync = Checkpoints._sync, os.fsync

    def seen(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)

    def slow(self):
        assert release.wait(30)
        real(self)
        folder = tmp_path / "2.orbax-checkpoint-tmp"
        written.extend(path.name for path in folder.rglob("*"))
        assert {path.stat().st_ino for path in folder.rglob("*")} <= synced
        assert not (tmp_path / "2").exists()

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(Checkpoints, "_sync", slow)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, noisy(2), {})
        checkpoints.check()
        assert checkpoints.latest_step == 1
        with Checkpoints(tmp_path, keep=1, read_only=True) as reader:
            assert reader.find("latest") == 1
        release.set()
        checkpoints.wait()
        assert checkpoints.steps == [2]
    assert {"metadata", "_METADATA", "manifest.ocdbt"} <= set(written)


def test_what_a_dead_writer_left_goes_at_the_next_start(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state(1), {})
    stray = [tmp_path / "2.orbax-checkpoint-tmp" / "state", tmp_path / "1.deleted"]
    for folder in stray:
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        assert checkpoints.steps == [1]
    assert all(folder.exists() for folder in stray)
    with Checkpoints(tmp_path, keep=1):
        assert kept(tmp_path) == [1]


def test_a_save_that_fails_is_told_at_once(tmp_path):
    """A limit on the size of files is a full disk that this process alone has."""
    target = abstract(make_mesh(8, 1))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, noisy(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, unlimited[1]))
        try:
            with pytest.raises(FaultError) as told:  # noqa: PT012 (when it is told is the disk's)
                checkpoints.save(2, noisy(2), {})
                for _ in range(1000):
                    checkpoints.check()
                    time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert checkpoints.steps == [1]
    line = str(told.value)
    assert line.startswith(f"checkpoint 2 was not saved in {tmp_path}: ")
    assert "File too large" in line
    assert line.endswith("free some space, then run the same command again to resume from step 1.")
    assert "\n" not in line
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert int(checkpoints.restore(target)[0].step) == 1
        checkpoints.save(2, noisy(2), {})
    assert kept(tmp_path) == [1, 2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Steps 1, 2, 3, evaluated."""
    folder = tmp_path_factory.mktemp("sound")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, noisy(step), {"seed": 7}, scored(4.0 - step))
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "checkpoints")


def put_state(folder, of, into):
    """What no format notices: a sound state, and not the one that was saved."""
    shutil.rmtree(folder / str(into) / "state")
    shutil.copytree(folder / str(of) / "state", folder / str(into) / "state")


def test_a_damaged_step_is_set_aside_and_the_one_before_it_used(folder, capfd):
    mesh = make_mesh(2, 4)
    put_state(folder, 1, 3)
    with Checkpoints(folder, keep=3) as checkpoints:
        restored, position = newest(checkpoints, abstract(mesh))
        assert int(restored.step) == checkpoints.latest_step == 2
        assert position == {"seed": 7}
        told = capfd.readouterr().err
        assert told == (
            f"warning: checkpoint 3 in {folder} is damaged: step, params/blocks/mlp/in/kernel,"
            " ema/blocks/mlp/in/kernel and 1 more are not what was saved. It was renamed to"
            " damaged-3; the one before it is used\n"
        )
        np.testing.assert_array_equal(
            restored.params["blocks"]["mlp"]["in"]["kernel"],
            noisy(2).params["blocks"]["mlp"]["in"]["kernel"],
        )
        # It is trained again, is damaged again, and nothing is deleted.
        checkpoints.save(3, noisy(3), {"seed": 7})
        checkpoints.wait()
        put_state(folder, 1, 3)
        assert int(newest(checkpoints, abstract(mesh))[0].step) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "damaged-3", "damaged-3-1"]


def test_a_run_with_no_sound_checkpoint_does_not_begin_anew(folder):
    for step in (1, 2, 3):
        (folder / str(step) / "position" / "metadata").write_text("{")
    for _ in range(2):
        with (
            Checkpoints(folder, keep=3) as checkpoints,
            pytest.raises(UserError, match=r"no intact checkpoint: 3 \(position/metadata can"),
        ):
            newest(checkpoints, abstract(make_mesh(8, 1)))
    assert kept(folder) == [1, 2, 3]
    for step in (1, 2, 3):
        (folder / str(step)).rename(folder / f"damaged-{step}")
    with (
        Checkpoints(folder, keep=3) as checkpoints,
        pytest.raises(UserError, match="no intact checkpoint: damaged-1, damaged-2, damaged-3"),
    ):
        newest(checkpoints, abstract(make_mesh(8, 1)))
    with Checkpoints(folder.parent / "new", keep=3) as checkpoints:
        assert opening.restore_newest(checkpoints, abstract(make_mesh(8, 1))) is None


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGE = {
    "deleted": None,
    "halved": lambda d: d[: len(d) // 2],
    "emptied": lambda d: b"",
    "flipped": flip,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damaged_file_is_noticed_or_harmless(folder, damage):
    step = folder / "3"
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(noisy(3))]
    target = abstract(make_mesh(1, 1, jax.devices()[:1]))
    noticed = set()
    with Checkpoints(folder, keep=3, read_only=True) as checkpoints:
        for path in sorted(path for path in step.rglob("*") if path.is_file()):
            whole = path.read_bytes()
            changed = DAMAGE[damage]
            if changed is None:
                path.unlink()
            else:
                path.write_bytes(changed(whole))
            try:
                restored, position = checkpoints.restore(target, 3)
            except DamagedError:
                noticed.add(path.relative_to(step).parts[0])
            else:
                assert position == {"seed": 7}
                for a, b in zip(expected, jax.tree.leaves(restored), strict=True):
                    np.testing.assert_array_equal(a, b)
            path.write_bytes(whole)
    assert {"state", "position", "digests"} <= noticed


def test_readers_name_the_leaf_and_another_step_and_leave_it_there(folder):
    put_state(folder, 1, 3)
    target = abstract(make_mesh(8, 1))
    with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match=r"ema/blocks/mlp/in/kernel is not .*--step: 1, 2\."):
            checkpoints.restore_part("ema", target.ema)
        checkpoints.restore_part("ema", target.ema, 2)
    assert kept(folder) == [1, 2, 3]


@pytest.mark.parametrize("old", [False, True])
def test_another_dtype_or_shape_is_no_damage_and_never_cast(folder, old):
    if old:
        shutil.rmtree(folder / "3" / "digests")
    target = abstract(make_mesh(1, 1, jax.devices()[:1]))
    kernel = target.ema["blocks"]["mlp"]["in"]["kernel"]
    of_int = jax.ShapeDtypeStruct(kernel.shape, jnp.int32, sharding=kernel.sharding)
    shorter = jax.ShapeDtypeStruct((2, 8, 16), kernel.dtype, sharding=kernel.sharding)
    asked = target._replace(
        ema={"blocks": {"mlp": {"in": {"kernel": of_int}}}},
        params={"blocks": {"mlp": {"in": {"kernel": shorter}, "out": kernel}}},
    )
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(UserError) as told:
            newest(checkpoints, asked)
        with pytest.raises(UserError, match="asked for int32"):
            checkpoints.restore_part("ema", asked.ema)
    assert (
        "ema/blocks/mlp/in/kernel is float32[2,8,32], asked for int32[2,8,32];"
        " params/blocks/mlp/in/kernel is float32[2,8,32], asked for float32[2,8,16];"
        " params/blocks/mlp/out is not in the checkpoint." in str(told.value)
    )
    assert kept(folder) == [1, 2, 3]


def test_old_checkpoints_have_no_digests_and_are_taken(folder, capfd):
    for step in (1, 2, 3):
        metrics = folder / str(step) / "metrics"
        (metrics / "metadata").rename(metrics / "metrics")
        shutil.rmtree(folder / str(step) / "digests")
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.best_step == 3
        restored, position = newest(checkpoints, abstract(make_mesh(8, 1)))
    assert int(restored.step) == 3
    assert position == {"seed": 7}
    assert capfd.readouterr().err.count("has no digests") == 1


def test_changed_digests_are_damage_and_no_other_network(folder):
    path = folder / "3" / "digests" / "metadata"
    path.write_text(path.read_text().replace("float32", "float16", 1))
    with Checkpoints(folder, keep=3) as checkpoints:
        restored, _ = newest(checkpoints, abstract(make_mesh(8, 1)))
        assert checkpoints.damaged == ["damaged-3"]
    assert int(restored.step) == 2


def test_a_changed_score_makes_no_best(folder):
    path = folder / "1" / "metrics" / "metadata"
    path.write_text(path.read_text().replace("3.0", "0.1"))
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.best_step == 3


@pytest.mark.parametrize("code", PASSING)
@pytest.mark.parametrize("part", ["3/position", "3/digests", "3/metrics"])
def test_a_fault_that_passes_costs_no_checkpoint(folder, part, code, monkeypatch, capfd):
    system = Unstable(monkeypatch, part, 2, code)
    with Checkpoints(folder, keep=1) as checkpoints:
        restored, _ = newest(checkpoints, abstract(make_mesh(8, 1)))
        assert checkpoints.best_step == 3
    assert int(restored.step) == 3
    assert kept(folder) == [1, 2, 3]
    assert system.left == 0
    assert capfd.readouterr().err.count("trying again") == 2


@pytest.mark.parametrize("part", ["3/position", "3/digests"])
def test_a_fault_that_stays_ends_the_run_and_changes_nothing(folder, part, monkeypatch):
    system = Unstable(monkeypatch, part, FOR_EVER)
    with Checkpoints(folder, keep=1) as checkpoints:
        for read in (
            lambda: newest(checkpoints, abstract(make_mesh(8, 1))),
            lambda: checkpoints.restore_part("ema", abstract(make_mesh(8, 1)).ema),
        ):
            with pytest.raises(FaultError, match=rf"{part}.*Stale file .*Nothing was changed"):
                read()
        assert kept(folder) == [1, 2, 3]
        system.left = 0
        assert int(newest(checkpoints, abstract(make_mesh(8, 1)))[0].step) == 3


def test_a_fault_that_hides_a_score_removes_no_checkpoint(folder, monkeypatch, capfd):
    """Step 1 would be the best of all; its metrics cannot be read when step 4 is written."""
    path = folder / "1"
    shutil.rmtree(path)
    with Checkpoints(folder, keep=4) as checkpoints:
        checkpoints.save(1, noisy(1), {"seed": 7}, scored(0.1))
    system = Unstable(monkeypatch, "1/metrics", FOR_EVER)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(4, noisy(4), {"seed": 7}, scored(2.0))
        checkpoints.wait()
        assert kept(folder) == [1, 2, 3, 4]
        assert "no checkpoint is removed now: cannot read" in capfd.readouterr().err
        with pytest.raises(FaultError, match="1/metrics"):
            checkpoints.restore(abstract(make_mesh(8, 1)), "best")
        system.left = 0
        checkpoints.save(5, noisy(5), {"seed": 7}, scored(3.0))
        checkpoints.wait()
        assert checkpoints.best_step == 1
    assert kept(folder) == [1, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_many_open_files_are_no_damage(folder, monkeypatch):
    """The system's words distinguish damage from a fault that orbax and TensorStore raise."""
    monkeypatch.setattr(faults, "WAITS", ())
    target = abstract(make_mesh(1, 1, jax.devices()[:1]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Checkpoints(folder, keep=3) as checkpoints:
        refused = 0
        for free in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
            held = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.open("/dev/null", os.O_RDONLY))
                for _ in range(free):
                    os.close(held.pop())
                restored, _ = newest(checkpoints, target)
                assert int(restored.step) == 3
            except FaultError as error:
                refused += 1
                assert "Too many open files" in str(error)  # noqa: PT017 (both ends are right)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for descriptor in held:
                    os.close(descriptor)
            assert kept(folder) == [1, 2, 3]
        assert refused
        assert int(newest(checkpoints, target)[0].step) == 3


def test_an_error_of_the_disk_while_the_state_is_read_is_no_damage(folder, monkeypatch):
    monkeypatch.setattr(faults, "WAITS", (0.0,))
    calls = []
    with Checkpoints(folder, keep=3) as checkpoints:
        real = checkpoints._orbax.restore

        def fails(*args, **kwargs):
            calls.append(args)
            if len(calls) <= 2:
                raise ValueError(f"DATA_LOSS: reading 'd/0': {os.strerror(errno.EIO)}")
            return real(*args, **kwargs)

        monkeypatch.setattr(checkpoints._orbax, "restore", fails)
        with pytest.raises(FaultError, match=rf"checkpoint 3 in .*{os.strerror(errno.EIO)}"):
            newest(checkpoints, abstract(make_mesh(8, 1)))
        assert int(newest(checkpoints, abstract(make_mesh(8, 1)))[0].step) == 3
    assert kept(folder) == [1, 2, 3]
