"""Eight simulated devices, and no silent broadcasting or promotion: set before JAX starts."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compilation: what is dear in it and changes no number by more than 1e-6
# is left out (LLVM's dear passes, the emitters by way of MLIR, the split of a program's functions
# among threads, which copies modules: the workers keep all cores busy), and nothing is compiled
# twice, in this process, the other workers or the commands that tests start.
# Not --xla_backend_optimization_level=1: gradients of float32 are off by 1e-4.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_parallel_codegen_split_count=1"
    # Eight simulated devices meet on a busy machine, too: XLA aborts after 40 s.
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
if version("jaxlib").startswith("0.10."):  # XLA ends a process for a flag that it does not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ditjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have it from this process
    # Not the user's folder: it may hold statistics of references by another version of JAX, which
    # differ in the last bits from what a test computes.
    os.environ["DITJAX_DATA"] = tempfile.mkdtemp(prefix="ditjax-tests-data-")
    atexit.register(shutil.rmtree, os.environ["DITJAX_DATA"], ignore_errors=True)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Files and folders whose tests compile most, and ask what is done, not how fast: without XLA's
# optimizations they compile in a quarter of the time. What is equal to the bit with them is so
# without, and gradients are off by 3e-5.
UNOPTIMIZED = (
    "commands",
    "diffusion",
    "faults",
    "evaluation",
    "models",
    "sampling",
    "tasks",
    "test_classify.py",
    "test_meanflow.py",
    "test_mup.py",
    "test_program.py",
    "test_transforms.py",
    "toys",
    "weights",
)
# Of these, files that compare the bits of programs of different shapes.
OPTIMIZED = ("test_likelihood.py",)
_VARIABLE = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ[_VARIABLE] = "0"

# Files that take long: were they last, one worker would work on and the others wait.
FIRST = ("commands", "faults", "test_program.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rest in the order of their names, as they came."""
    items.sort(key=lambda item: names(item).isdisjoint(FIRST))


@pytest.fixture(autouse=True)
def _own_unraisable_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test runs in this process sets the hook, which is the process's."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def pytest_collection_finish() -> None:
    """Let Python's collector look at young objects alone: tracing makes millions that live."""
    gc.freeze()
    gc.set_threshold(200_000, 100, 1000)


def names(item: pytest.Item) -> set[str]:
    """Of its file and its folder."""
    return {item.path.name, item.path.parent.name}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Set around a test and its fixtures, and for the processes that they start."""
    found = names(item)
    chosen = str(int(found.isdisjoint(OPTIMIZED) and not found.isdisjoint(UNOPTIMIZED)))
    if os.environ[_VARIABLE] != chosen:
        os.environ[_VARIABLE] = chosen
        jax.config.update(_VARIABLE.lower(), chosen == "1")
        jax.clear_caches()
    return (yield)


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our own arithmetic promotes no dtype silently; optax's does (a float to an integer power)."""
    ours = request.path.parent.name in ("diffusion", "models", "metrics")
    with jax.numpy_dtype_promotion("strict" if ours else "standard"):
        yield


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def own_data(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in a folder of the module's."""
    monkeypatch.setenv("DITJAX_DATA", str(data_root))
