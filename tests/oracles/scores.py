"""torch-fidelity's and pytorch-fid's scores of the features of `tests.feature_sets`, and goldens.

torch-fidelity has precision and recall from 0.4.0 on. ADM's evaluator needs TensorFlow 1; its
Fréchet distance is pytorch-fid's function line by line.
"""

import importlib
from types import ModuleType

import numpy as np
import torch

from tests import feature_sets
from tests.oracles.inception import torchvision_to_import

PACKAGES = ("torch", "torch-fidelity", "pytorch-fid", "scipy", "numpy")
SEED = 2020  # torch-fidelity's default


def _module(name: str) -> ModuleType:
    with torchvision_to_import():
        return importlib.import_module(name)


def inception_score(logits: np.ndarray, splits: int, shuffle: bool) -> tuple[float, float]:
    """Mean and deviation over splits."""
    isc = _module("torch_fidelity.metric_isc")
    scores = isc.isc_features_to_metric(torch.from_numpy(logits), splits, shuffle, SEED)
    return scores[isc.KEY_METRIC_ISC_MEAN], scores[isc.KEY_METRIC_ISC_STD]


def isc_order(count: int) -> np.ndarray:
    """The order in which torch-fidelity shuffles."""
    return np.random.RandomState(SEED).permutation(count)


def kid(x: np.ndarray, y: np.ndarray, subsets: int, size: int) -> tuple[float, float]:
    """Mean and deviation over subsets."""
    module = _module("torch_fidelity.metric_kid")
    scores = module.kid_features_to_metric(
        torch.from_numpy(x),
        torch.from_numpy(y),
        kid_subsets=subsets,
        kid_subset_size=size,
        kid_degree=3,
        kid_gamma=None,
        kid_coef0=1,
        rng_seed=SEED,
        verbose=False,
    )
    return scores[module.KEY_METRIC_KID_MEAN], scores[module.KEY_METRIC_KID_STD]


def kid_subsets(
    count_x: int, count_y: int, subsets: int, size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The subsets that torch-fidelity draws."""
    rng = np.random.RandomState(SEED)
    return [
        (rng.choice(count_x, size, replace=False), rng.choice(count_y, size, replace=False))
        for _ in range(subsets)
    ]


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int, block: int
) -> tuple[float, float]:
    """By torch-fidelity's row-batched function."""
    prc = _module("torch_fidelity.metric_prc")
    return prc.calculate_precision_recall_part(
        torch.from_numpy(samples), torch.from_numpy(reference), k, block
    )


def frechet_distance(
    mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray
) -> float:
    """By pytorch-fid: scipy's sqrtm of the product."""
    module = _module("pytorch_fid.fid_score")
    return float(module.calculate_frechet_distance(mu1, sigma1, mu2, sigma2))


def goldens() -> dict[str, np.ndarray]:
    """'isc_10_shuffled', 'kid', 'prc_3', 'fid_full', ... -> what the packages say."""
    arrays: dict[str, object] = {"isc_order": isc_order(feature_sets.SAMPLES).astype(np.int32)}
    for splits in feature_sets.ISC_SPLITS:
        for shuffle in (False, True):
            name = f"isc_{splits}_{'shuffled' if shuffle else 'in_order'}"
            arrays[name] = inception_score(feature_sets.logits(), splits, shuffle)
    y = feature_sets.features(feature_sets.REFERENCE, 0)
    x = feature_sets.features(feature_sets.SAMPLES, 1)
    arrays["kid_subsets_x"], arrays["kid_subsets_y"] = (
        np.array(side, np.int32)
        for side in zip(
            *kid_subsets(len(x), len(y), feature_sets.KID_SUBSETS, feature_sets.KID_SIZE),
            strict=True,
        )
    )
    arrays["kid"] = kid(
        x.astype(np.float64), y.astype(np.float64), feature_sets.KID_SUBSETS, feature_sets.KID_SIZE
    )
    for k in (1, 3):
        arrays[f"prc_{k}"] = precision_recall(y, x, k, 10000)
    for name in feature_sets.GAUSSIANS:
        arrays[f"fid_{name}"] = frechet_distance(*feature_sets.gaussians(name)[:4])
    return {name: np.asarray(value) for name, value in arrays.items()}
