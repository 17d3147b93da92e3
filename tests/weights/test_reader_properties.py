"""What was written comes back; with any bytes after it, or in its place, it ends in one line."""

import json
import math

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditjax.errors import UserError
from ditjax.evaluation import statistics
from ditjax.files import npz
from ditjax.runs import log, results
from ditjax.weights import tensors
from tests.fuzz import a_result

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.text("abcxyz_/é", min_size=1, max_size=6)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.dictionaries(NAMES, NUMBERS | st.text(max_size=5), max_size=3), max_size=5)
TAILS = st.binary(max_size=40) | st.sampled_from(
    [
        b"",
        b'{"step": 9',
        b'{"step": "9"}',
        b"9",
        b"[]",
        b"[" * 5000,
        b"\xff\xfe",
        b'{"step": 1e999}',
    ]
)


@QUICK
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.int32, np.float32, np.float64, np.bool_, np.complex64]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    compressed=st.booleans(),
    fortran=st.booleans(),
    limit=st.integers(0, 5),
)
def test_arrays(tmp_path, array, compressed, fortran, limit):
    given_array = np.asfortranarray(array) if fortran and array.ndim else array
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", x=given_array)
    with npz.reading(tmp_path / "a.npz") as archive:
        found = npz.read_array(archive, "x")
        assert npz.shape_and_dtype(archive, "x") == (array.shape, array.dtype)
        if array.ndim and given_array.flags.c_contiguous:
            assert npz.read_array(archive, "x", limit).tobytes() == array[:limit].tobytes()
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(array).tobytes()


def or_line(reader, path):
    """What it reads, or None for a UserError that names the file."""
    line = ""
    try:
        return reader(path)
    except UserError as error:
        line = str(error)
    assert str(path) in line
    return None


@QUICK
@given(
    d=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    spatial=st.booleans(),
    n=st.integers(0, 3),
    said=st.dictionaries(st.text(max_size=5), st.text(max_size=5) | NUMBERS, max_size=3),
)
def test_statistics(tmp_path, d, seed, spatial, n, said):
    rng = np.random.default_rng(seed)
    mu, root = rng.standard_normal(d), rng.standard_normal((d, d))
    mu_s, sigma_s = (mu, root @ root.T) if spatial else (None, None)
    made = statistics.Statistics(mu, root @ root.T, mu_s, sigma_s, said)
    path = statistics.save_statistics(tmp_path / "s.npz", made, rng.random((n, d)) if n else None)
    found = statistics.load_statistics(path)
    assert found.provenance == said
    assert (found.mu_s is None) != spatial
    assert found.mu.tobytes() == mu.tobytes()
    np.testing.assert_allclose(found.sigma, root @ root.T, rtol=1e-12, atol=1e-15)
    assert found.arrays == (("features",) if n else ())


@QUICK
@given(
    metrics=st.dictionaries(NAMES, st.floats(), max_size=4),
    run=st.text(min_size=1, max_size=30),
    config=st.recursive(
        st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
        lambda inner: st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_results(tmp_path, metrics, run, config):
    made = {**a_result(), "metrics": metrics, "run": run, "config": {"a": config}}
    results.write_result(tmp_path, made)  # type: ignore[arg-type]
    found = results.read_result(tmp_path)
    assert (found["run"], found["config"]) == (run, {"a": config})
    assert found["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
        assert found["metrics"][name] == value or not math.isfinite(value)
        assert math.isnan(found["metrics"][name]) or math.isfinite(value)


@QUICK
@given(rows=ROWS, tail=TAILS)
def test_a_log_with_anything_after_it(tmp_path, rows, tail):
    rows = [{**row, "step": step} for step, row in enumerate(rows, start=1)]
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(whole + tail)
    if b"\n" not in tail:
        assert results.read_metrics(path)[: len(rows)] == rows
    else:
        or_line(results.read_metrics, path)
    last = log.last_metrics(tmp_path)
    assert isinstance(last, dict)
    if not tail and rows:
        assert last == rows[-1]
    # A run that resumes at the last step finds its own lines, and drops what came after.
    log._truncate(path, len(rows))
    assert path.read_bytes().startswith(whole)
    assert len(results.read_metrics(path)) >= len(rows)


@QUICK
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pt", ".safetensors", ".npz"]))
def test_any_bytes_are_no_weights_and_no_images(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for reader in (tensors.read_tensors, results.load_samples, statistics.load_statistics):
        assert or_line(reader, path) is None
