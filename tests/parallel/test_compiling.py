"""What XLA does not want to do is an error, and nothing else of stderr is lost."""

import os
import subprocess
import threading

import jax
import jax.numpy as jnp
import pytest

from ditjax.errors import UserError
from ditjax.parallel.compiling import no_rematerialization, step_options, watching
from ditjax.parallel.mesh import make_mesh


def fused(mesh):
    """A fused 6D axis that a split crosses: XLA gathers it whole to reach the batch's sharding."""

    def put(x, *spec):
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P(*spec)))

    def program(x):
        x = put(jnp.sin(x), "data", "fsdp").reshape(16, 6, 16)
        return put(jnp.sin(x), ("data", "fsdp"), None, None)

    return jax.jit(program)


MESSAGE = r"mesh data=2, fsdp=4: XLA would gather f32\[8,.*\(reshape.* whole .* Legal: 1 for .*fsdp"


def test_a_rematerialization_is_an_error_each_time(capfd):
    """Also from a compilation cache, which would not say it a second time."""
    mesh, key = make_mesh(2, 4), "jax_persistent_cache_min_compile_time_secs"
    kept = getattr(jax.config, key)
    jax.config.update(key, 0.0)
    try:
        for _ in range(2):
            program = fused(mesh)
            with pytest.raises(UserError, match=MESSAGE), watching(mesh):
                program(jnp.zeros((16, 96)))
    finally:
        jax.config.update(key, kept)
    assert "Involuntary" not in capfd.readouterr().err


def stderr():
    return os.readlink("/proc/self/fd/2")


def test_stderr_is_read_while_several_devices_compile_and_no_longer():
    before = stderr()
    with watching(make_mesh(8, 1)):
        assert stderr() != before
    assert stderr() == before
    with watching(make_mesh(1, 1, jax.devices()[:1])):
        assert stderr() == before


def test_a_call_that_failed_can_be_made_and_watched_again():
    mesh, before, seen = make_mesh(8, 1), stderr(), []

    def call(fails):
        with watching(mesh):
            seen.append(stderr())
            if fails:
                raise UserError("not yet")

    with pytest.raises(UserError, match="not yet"):
        call(True)
    assert stderr() == before
    call(False)
    assert stderr() == before
    assert before not in seen


def test_the_rest_of_stderr_goes_where_it_went(capfd):
    line = (
        "W0101 00:00:00.0 1 a.cc:1] [SPMD] Involuntary full rematerialization. The compiler cannot"
        " go from sharding {devices=[2]<=[2]} to {replicated} efficiently for HLO operation"
        " %a.0 = f32[8,3]{1,0} add(%b), sharding={replicated}.\n"
    )
    go, done = threading.Event(), threading.Event()

    def another_thread():
        go.wait()
        os.write(2, b"from a thread\n")
        done.set()

    thread = threading.Thread(target=another_thread)
    thread.start()
    watch = no_rematerialization(make_mesh(2, 4))
    watch.__enter__()
    os.write(2, b"unfinished " + line.encode())
    go.set()
    done.wait()
    child = subprocess.Popen("read line; echo from a child >&2", shell=True, stdin=-1)
    os.write(2, line.encode() + b"no newline")
    with pytest.raises(UserError, match=r"gather f32\[8,3\] \(add\).*and 1 more"):
        watch.__exit__(None, None, None)
    child.communicate(b"\n")
    thread.join()
    os.write(2, b" and after\n")
    assert child.returncode == 0
    err = capfd.readouterr().err
    assert "Involuntary" not in err
    for words in ("unfinished ", "from a thread\n", "no newline", " and after\n"):
        assert err.count(words) == 1, err


def test_a_warning_that_cannot_be_trusted_is_passed_on(capfd):
    line = (
        "[SPMD] Involuntary full rematerialization. The compiler cannot go from sharding"
        " {mesh['data'=1,'fsdp'=2], [{}, {'fsdp'}]} to {devices=[2,1]<=[2]} efficiently for HLO"
        " operation %a.0 = f32[16,16]{1,0} parameter(0), sharding={replicated}.\n"
    )
    with no_rematerialization(make_mesh(2, 4)):
        os.write(2, line.encode())
    assert capfd.readouterr().err == line


def test_an_error_of_the_program_comes_through(capfd):
    with pytest.raises(ZeroDivisionError), no_rematerialization(make_mesh(2, 4)):
        1 / 0  # noqa: B018
    os.write(2, b"still there\n")
    assert capfd.readouterr().err == "still there\n"


RINGS = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
SPARSE = "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter"


@pytest.mark.parametrize(
    ("kind", "fsdp", "tensor", "given"),
    [
        ("TPU v6 lite", 16, 1, {RINGS, SPARSE}),
        ("TPU v5 lite", 16, 1, {RINGS}),  # it has no SparseCores
        ("TPU v6 lite", 1, 1, set()),  # nothing is gathered
        ("TPU v6 lite", 4, 4, set()),  # rings of tensor parallel products are left
        ("TPU v5 lite", 4, 4, set()),
        ("TPU v5", 16, 1, set()),  # it makes no rings, and scatters hardly more gradients
        ("cpu", 8, 1, set()),
    ],
)
def test_fsdp_on_some_tpus_is_given_xla_options(kind, fsdp, tensor, given):
    assert set(step_options(kind, {"fsdp": fsdp, "tensor": tensor}) or {}) == given
