"""How well drawn vectors follow their distribution: of unCLIP's prior, on pairs of vectors.

Unit vectors: images z f[N,E], texts t f[N,E], and S samples of each text f[N,S,E]. A ridge
regression of z by t is fitted to the first half; all scores are of the second.
"""

import numpy as np

_RIDGES = 10.0 ** np.arange(-4, 3)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of each row of f[N,E] with its partner: f64[N]."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def ridge_predictions(x: np.ndarray, y: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Ridge regression of y f[n,E] by x f[n,F] with a constant, at `new` f[m,F] -> f64[m,E].

    The penalty is the one of seven with the least leave-one-out error (Hastie et al. 2009, Eq.
    7.64, averaged over outputs).
    """
    x, y, new = (np.asarray(each, np.float64) for each in (x, y, new))
    middle, centre = x.mean(0), y.mean(0)
    U, s, Vt = np.linalg.svd(x - middle, full_matrices=False)
    projected = U.T @ (y - centre)
    best = (np.inf, np.zeros_like(projected))
    for penalty in _RIDGES * (s**2).mean():
        shrunk = (s**2 / (s**2 + penalty))[:, None]
        left = 1 - 1 / len(x) - ((U**2) @ shrunk)[:, 0]
        error = (y - centre - U @ (shrunk * projected)) / np.maximum(left, 1e-9)[:, None]
        found = float(np.square(error).mean())
        if found < best[0]:
            best = found, (s / (s**2 + penalty))[:, None] * projected
    return np.asarray((new - middle) @ Vt.T @ best[1] + centre)


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Szekely & Rizzo 2013 Eq. 5: 2 E|A - B| - E|A - A'| - E|B - B'|, of two sets f[N,E].

    Row i of both belongs to text i. All pairs are of different texts, so that two sets of one
    distribution have mean 0: partners are nearer to each other than two independent draws.
    """

    def mean_distance(x: np.ndarray, y: np.ndarray) -> float:
        square = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        apart = np.sqrt(np.maximum(square, 0))
        return float((apart.sum() - np.trace(apart)) / (len(x) * (len(x) - 1)))

    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return 2 * mean_distance(a, b) - mean_distance(a, a) - mean_distance(b, b)


def nearest_agreement(
    vectors: np.ndarray, pool: np.ndarray, classes: np.ndarray, pool_classes: np.ndarray
) -> float:
    """How often the nearest of a pool has the same classes, i[N,K], -1 for none: a share.

    vectors f[N,E] and pool f[M,E] are unit vectors.
    """
    nearest = np.argmax(vectors @ pool.T, axis=1)
    known = (classes >= 0) & (pool_classes[nearest] >= 0)
    same = classes == pool_classes[nearest]
    return float(same[known].mean()) if known.any() else float("nan")


def prior_scores(
    image: np.ndarray, text: np.ndarray, samples: np.ndarray, classes: np.ndarray | None = None
) -> dict[str, float]:
    """Whether samples have the mean, the spread and the distribution of real vectors.

    - `mean_cosine` of the mean of a text's samples with the image, beside `ridge_cosine`, that of
      the regression: a perfect sampler's mean is the conditional mean. The mean of S samples has
      noise, which lowers its cosine by sqrt(1 + (1 - ρ) / (S ρ)), ρ = E[s·s']: that is undone.
    - `calibration_gap`: with s, s' exact samples given a text, E[s·z] = E[s·s'] = E|E[z|t]|². One
      sample's cosine to the image is no score: the mean's direction beats it.
    - energy distances of samples, of the regression's unit vectors and of texts to the images.
    - with classes i[N,K]: how often the nearest image of the first half has the classes. A perfect
      sampler has the share of the images themselves; the texts may have a larger one.
    """
    half = len(image) // 2
    z, t, s = image[half:], text[half:], samples[half:]
    predicted = ridge_predictions(text[:half], image[:half], t)
    predicted /= np.linalg.norm(predicted, axis=1, keepdims=True)
    S = s.shape[1]
    real = float(np.einsum("nse,ne->ns", s, z).mean())
    every = np.einsum("nse,nte->nst", s, s)
    pairs = float((every.sum((1, 2)) - np.einsum("nss->n", every)).mean() / (S * (S - 1)))
    noise = np.sqrt(1 + (1 - pairs) / (S * max(pairs, 1 / S)))
    found = {
        "mean_cosine": float(cosines(s.mean(1), z).mean() * noise),
        "ridge_cosine": float(cosines(predicted, z).mean()),
        "sample_cosine": real,
        "sample_pair_cosine": pairs,
        "calibration_gap": abs(real - pairs),
        "energy_samples": energy_distance(s[:, 0], z),
        "energy_ridge": energy_distance(predicted, z),
        "energy_text": energy_distance(t, z),
    }
    if classes is not None:
        pool = image[:half], classes[half:], classes[:half]
        found["nearest_samples"] = nearest_agreement(s[:, 0], *pool)
        found["nearest_image"] = nearest_agreement(z, *pool)
        found["nearest_text"] = nearest_agreement(t, *pool)
    return found
