"""Reference statistics of features, in the npz files that ADM and pytorch-fid read and write.

ADM's files hold mu and sigma of pool_3, mu_s and sigma_s of the spatial features, and often arr_0,
the reference images themselves; pytorch-fid's hold only mu and sigma. ditjax writes ADM's format
with two more arrays, which other readers ignore: `provenance`, a JSON text that describes the
statistics, and `features` f32[n,d] for precision and recall.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ditjax.errors import UserError
from ditjax.files import npz
from ditjax.files.atomic import write_atomic
from ditjax.files.npz import provenance_text, read_provenance

Float64Array = NDArray[np.float64]


class Statistics(NamedTuple):
    """mu f64[d], sigma f64[d,d]; mu_s, sigma_s of the spatial features, or None.

    `provenance` is {} in files of other programs; `arrays` names the other arrays in the file.
    """

    mu: Float64Array
    sigma: Float64Array
    mu_s: Float64Array | None = None
    sigma_s: Float64Array | None = None
    provenance: Mapping[str, Any] = {}
    arrays: tuple[str, ...] = ()


def save_statistics(
    path: str | os.PathLike[str],
    statistics: Statistics,
    features: NDArray[np.floating[Any]] | None = None,
) -> Path:
    """Write statistics in float64 and `features` f[n,d] in float32, for `load_statistics`.

    Raises UserError for statistics that could not be read again, or a provenance that is not plain
    JSON.
    """
    statistics = _checked(statistics, "statistics to save")
    arrays: dict[str, NDArray[Any]] = {"mu": statistics.mu, "sigma": statistics.sigma}
    if statistics.mu_s is not None and statistics.sigma_s is not None:
        arrays |= {"mu_s": statistics.mu_s, "sigma_s": statistics.sigma_s}
    if features is not None:
        arrays["features"] = _checked_features(
            features, len(statistics.mu), "features to save"
        ).astype(np.float32)
    arrays["provenance"] = provenance_text(statistics.provenance)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return write_atomic(path, buffer.getvalue())


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Load the statistics in an npz of ADM, pytorch-fid or ditjax.

    Raises a UserError that names the file and the array if one is missing, pickled, not of floats,
    of the wrong shape, not finite, or not a covariance.
    """
    with npz.reading(path) as archive:
        names = npz.names(archive)
        if "mu" not in names and "arr_0" in names:
            raise UserError(
                f"{path} holds samples (arr_0) but no statistics (mu, sigma): give a reference"
                " file, or make statistics of these images first."
            )
        found = {name: npz.read_array(archive, name) for name in ("mu", "sigma")}
        spatial = [name for name in ("mu_s", "sigma_s") if name in names]
        if len(spatial) == 1:
            raise UserError(f"{path} has only {spatial[0]}: expected mu_s and sigma_s, or neither.")
        found |= {name: npz.read_array(archive, name) for name in spatial}
        provenance = read_provenance(archive)
    others = tuple(sorted(set(names) - {*found, "provenance"}))
    return _checked(Statistics(**found, provenance=provenance, arrays=others), str(path))


def load_features(path: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Load the `features` f32[n,d] in a file that `save_statistics` wrote.

    Raises UserError if there are none, or if they are not a finite float array.
    """
    with npz.reading(path) as archive:
        features = npz.read_array(archive, "features")
    return _checked_features(features, None, str(path)).astype(np.float32)


def statistics_hash(statistics: Statistics) -> str:
    """Return the first 12 hex digits of the SHA-256 that identifies a reference.

    The digest covers the float64 little-endian bytes of mu, sigma and, if any, mu_s and sigma_s.
    """
    digest = hashlib.sha256()
    for array in statistics[:4]:
        if array is not None:
            digest.update(np.ascontiguousarray(array, "<f8").tobytes())
    return digest.hexdigest()[:12]


def _checked(statistics: Statistics, where: str) -> Statistics:
    mu, sigma = _gaussian(statistics.mu, statistics.sigma, "mu", "sigma", where)
    if (statistics.mu_s is None) != (statistics.sigma_s is None):
        raise UserError(f"{where}: expected mu_s and sigma_s, or neither.")
    if statistics.mu_s is None or statistics.sigma_s is None:
        return statistics._replace(mu=mu, sigma=sigma)
    mu_s, sigma_s = _gaussian(statistics.mu_s, statistics.sigma_s, "mu_s", "sigma_s", where)
    return statistics._replace(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)


def _gaussian(
    mu: NDArray[Any], sigma: NDArray[Any], mu_name: str, sigma_name: str, where: str
) -> tuple[Float64Array, Float64Array]:
    for name, array in ((mu_name, mu), (sigma_name, sigma)):
        if array.dtype not in (np.float32, np.float64):
            raise UserError(f"{where}: {name} is {array.dtype}, expected float64 or float32.")
    if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
        raise UserError(
            f"{where}: {mu_name} is {list(mu.shape)} and {sigma_name} {list(sigma.shape)}, expected"
            " [d] and [d, d]."
        )
    for name, array in ((mu_name, mu), (sigma_name, sigma)):
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} is not finite: make the statistics again.")
    sigma = sigma.astype(np.float64)
    # The halves may differ by a rounding of float32, because sums have another order.
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise UserError(
            f"{where}: {sigma_name} is not a covariance: expected a symmetric matrix without"
            " negative variances."
        )
    return mu.astype(np.float64), (sigma + sigma.T) / 2


def _checked_features(
    features: NDArray[Any], dimensions: int | None, where: str
) -> NDArray[np.floating[Any]]:
    shape = features.shape
    if features.dtype.kind != "f" or len(shape) != 2 or shape[1] != (dimensions or shape[1]):
        raise UserError(
            f"{where}: features are {features.dtype}{list(shape)}, expected floats"
            f" [n, {dimensions or 'd'}]."
        )
    if not np.isfinite(features).all():
        raise UserError(f"{where}: features are not finite: make them again.")
    return features
