"""The flag that JAX needs is set before it starts, by jaxlib's version, beside the user's own."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from ditjax.parallel import xla_flags

FLAG = "--xla_enable_hlo_sharding_v3=false"


@pytest.mark.parametrize("jaxlib", ["0.11.0", "0.11.2", "0.12.0.1"])
def test_shardings_stay_tiled_on_the_versions_that_name_axes(jaxlib):
    assert xla_flags("", jaxlib) == FLAG
    assert xla_flags("--xla_dump_to=/tmp/x", jaxlib) == f"--xla_dump_to=/tmp/x {FLAG}"
    for chosen in (FLAG, "--xla_enable_hlo_sharding_v3=true", "--xla_enable_hlo_sharding_v3"):
        assert xla_flags(chosen, jaxlib) == chosen


@pytest.mark.parametrize("jaxlib", ["0.9.1", "0.10.2", "0.13.0", "0.13.0.dev20270101", "1.0.0"])
def test_other_versions_get_no_flag(jaxlib):
    assert xla_flags("", jaxlib) == ""
    assert xla_flags("--xla_dump_to=/tmp/x", jaxlib) == "--xla_dump_to=/tmp/x"


@pytest.mark.parametrize("given", [None, "--xla_cpu_enable_fast_math=false"])
def test_any_import_of_the_folder_sets_it_and_jax_starts(given):
    """In a process of its own: XLA ends one that is given a flag it does not know."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if given is not None:
        env["XLA_FLAGS"] = given
    code = (
        "import ditjax.parallel.mesh, jax, os; jax.numpy.zeros(2).block_until_ready();"
        " print(os.environ.get('XLA_FLAGS'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = xla_flags(given or "", version("jaxlib")) or None
    assert done.stdout.strip() == str(expected)
