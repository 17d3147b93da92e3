"""A law in model size and training images (Hoffmann et al. 2022, Sec. 3.3)."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy
from numpy.typing import ArrayLike

from ditjax.errors import UserError
from ditjax.scaling.fit import fit_huber, huber_delta
from ditjax.scaling.points import Vector, positive_points


@dataclass(frozen=True)
class JointLaw:
    """y = E + A·N^(-α) + B·D^(-β) (Hoffmann et al. 2022, Eq. 2), fitted to n points."""

    e: float
    a: float
    alpha: float
    b: float
    beta: float
    n: int

    def __call__(self, size: ArrayLike, images: ArrayLike) -> Vector:
        """E + A·N^(-α) + B·D^(-β)."""
        size, images = np.asarray(size, np.float64), np.asarray(images, np.float64)
        return self.e + self.a * size**-self.alpha + self.b * images**-self.beta

    def best_size(self, compute: ArrayLike, per_size: float = 3.0) -> Vector:
        """Hoffmann et al. 2022, Eq. 4: N* = (αA/βB)^(1/(α+β))·(C/κ)^(β/(α+β)), C = κ·N·D.

        `per_size` is κ: 3 if N is forward Gflops and C training Gflops.
        """
        both = self.alpha + self.beta
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / both)
        return ratio * (np.asarray(compute, np.float64) / per_size) ** (self.beta / both)


def fit_joint(size: ArrayLike, images: ArrayLike, y: ArrayLike) -> JointLaw:
    """Hoffmann et al. 2022, Eq. 3: Huber's loss on log y - log(E + A·N^(-α) + B·D^(-β)).

    E, A, B >= 0. As in the paper, the fit starts on a grid of exponents and keeps the best. The
    delta of the loss is that of `fit.fit_power_law_offset`. size, images, y f64[n] > 0, n >= 6, at
    least 3 different sizes and 3 different images. Raises UserError otherwise.
    """
    size, y = positive_points(size, y, at_least=6)
    images, y = positive_points(images, y, at_least=6)
    for name, values in (("sizes", size), ("numbers of images", images)):
        if len(np.unique(values)) < 3:
            raise UserError(
                f"{len(np.unique(values))} different {name}: a law in size and images needs 3."
            )
    size_unit, images_unit, y_unit = (np.exp(np.log(v).mean()) for v in (size, images, y))
    u, w, v = np.log(size / size_unit), np.log(images / images_unit), y / y_unit

    def parts(theta: Vector) -> tuple[Vector, Vector, Vector]:
        first = np.exp(theta[1] - theta[2] * u)
        second = np.exp(theta[3] - theta[4] * w)
        return first, second, theta[0] + first + second

    def residual(theta: Vector) -> Vector:
        return np.log(v) - np.log(parts(theta)[2])

    def jacobian(theta: Vector) -> Vector:
        first, second, total = parts(theta)
        columns = [np.ones_like(u), first, -u * first, second, -w * second]
        return -np.stack(columns, axis=1) / total[:, None]

    starts = []
    for alpha, beta in product((0.2, 0.5, 1.0), repeat=2):
        columns = np.stack([np.ones_like(u), np.exp(-alpha * u), np.exp(-beta * w)], axis=1)
        e, a, b = scipy.optimize.nnls(columns / v[:, None], np.ones_like(v))[0]
        starts.append(np.array([e, np.log(max(a, 1e-3)), alpha, np.log(max(b, 1e-3)), beta]))
    bounds = ([0.0, -30.0, 1e-3, -30.0, 1e-3], [v.max(), 30.0, 10.0, 30.0, 10.0])
    theta, _, _ = fit_huber(
        residual, jacobian, starts, bounds, huber_delta(np.log(v)), max_nfev=2000
    )
    e, log_a, alpha, log_b, beta = (float(each) for each in theta)
    return JointLaw(
        e=float(e * y_unit),
        a=float(y_unit * np.exp(log_a) * size_unit**alpha),
        alpha=alpha,
        b=float(y_unit * np.exp(log_b) * images_unit**beta),
        beta=beta,
        n=len(y),
    )
