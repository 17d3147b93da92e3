"""Linear probes: multinomial logistic regression on features, in float64 NumPy.

What a linear classifier reads from features is a lower bound of what they hold (Alain & Bengio
2017, arXiv:1610.01644).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditjax.errors import UserError

_Floats = NDArray[np.float64]

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # l2 that are tried, the strongest first
STEPS, TOLERANCE = 500, 1e-5


class Probe(NamedTuple):
    """A classifier of features: the argmax of ((x - mean) / std) weights + bias.

    mean, std f64[D]; weights f64[D,K]; bias f64[K]; l2 is the penalty that it was fitted with.
    """

    mean: _Floats
    std: _Floats
    weights: _Floats
    bias: _Floats
    l2: float

    def predict(self, x: ArrayLike) -> NDArray[np.int64]:
        """The class of each row of features f[n,D] -> i64[n]."""
        z = (np.asarray(x, np.float64) - self.mean[None]) / self.std[None]
        return np.argmax(z @ self.weights + self.bias[None], axis=1)

    def accuracy(self, x: ArrayLike, labels: ArrayLike) -> float:
        """The share of rows of features f[n,D] whose class is their label i[n]."""
        return float(np.mean(self.predict(x) == np.asarray(labels)))


def fit_probe(
    x: ArrayLike, labels: ArrayLike, classes: int, penalties: Sequence[float] = PENALTIES
) -> Probe:
    """Fit features f[n,D] to labels i[n], with the best of some penalties.

    Features are brought to zero mean and unit deviation. Each penalty is fitted to the first three
    quarters of the rows and scored on the last one; the best, the strongest of equals, is fitted to
    all. Raises UserError for fewer than 8 rows, or features that are not finite.
    """
    features, target = np.asarray(x, np.float64), np.asarray(labels)
    if features.ndim != 2 or len(features) != len(target) or len(target) < 8:
        raise UserError(
            f"a probe of features {list(features.shape)} and {len(target)} labels: expected [n, D]"
            " and n, at least 8."
        )
    if not np.isfinite(features).all():
        raise UserError("a probe's features are not finite: the network or its inputs diverged.")
    mean, std = features.mean(0), features.std(0)
    std = np.where(std > 0, std, 1.0)
    z, cut = (features - mean[None]) / std[None], 3 * len(target) // 4
    best, l2 = -1.0, penalties[0]
    if len(penalties) > 1:
        for penalty, weights in _path(z[:cut], target[:cut], classes, penalties):
            found = np.argmax(_with_one(z[cut:]) @ weights, axis=1)
            if (right := float(np.mean(found == target[cut:]))) > best:
                best, l2 = right, penalty
    ((_, weights),) = _path(z, target, classes, [l2])
    return Probe(mean, std, weights[:-1], weights[-1], l2)


def _path(
    z: _Floats, labels: NDArray[np.int64], classes: int, penalties: Sequence[float]
) -> list[tuple[float, _Floats]]:
    """The solution f64[D+1,K] of each penalty, each started from the one before."""
    found, weights = [], np.zeros((z.shape[1] + 1, classes))
    for l2 in penalties:
        weights = logistic_regression(_with_one(z), np.eye(classes)[labels], l2, weights)
        found.append((l2, weights))
    return found


def _with_one(z: _Floats) -> _Floats:
    return np.concatenate([z, np.ones((len(z), 1))], axis=1)


def logistic_regression(x: _Floats, y: _Floats, l2: float, start: _Floats) -> _Floats:
    """min over W of the mean cross-entropy of softmax(x W) + ½ l2 |W|², but for its last row.

    x f64[n,D] whose last column is 1, y f64[n,K] one-hot, W f64[D,K]. The Hessian is nowhere above
    ½ xᵀx/n + l2 in each class (Böhning 1992), so a step by the inverse of that bound never goes too
    far, without a step size. Steps are accelerated (Nesterov 1983) and restarted by the gradient
    (O'Donoghue & Candès 2015).
    """
    n, D = x.shape
    penalty = np.full((D, 1), l2)
    penalty[-1] = 0.0
    bound = np.linalg.inv(0.5 * x.T @ x / n + np.diag(penalty[:, 0]))
    weights, ahead, momentum = start, start, 1.0
    for _ in range(STEPS):
        logits = x @ ahead
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = x.T @ (p - y) / n + penalty * ahead
        stepped = ahead - bound @ gradient
        change = stepped - weights
        if np.abs(stepped - ahead).max() < TOLERANCE * (1 + np.abs(stepped).max()):
            return stepped
        restart = float((gradient * change).sum()) > 0
        following = 1.0 if restart else 0.5 * (1 + np.sqrt(1 + 4 * momentum**2))
        ahead = stepped + (0.0 if restart else (momentum - 1) / following) * change
        weights, momentum = stepped, following
    return weights
