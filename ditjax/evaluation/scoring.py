"""Scores of a set of images against a reference: one pass for features, then NumPy in float64."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.data import source, stream
from ditjax.data.images import open_images
from ditjax.data.names import split_of
from ditjax.errors import UserError
from ditjax.evaluation.features import Extractor
from ditjax.evaluation.statistics import (
    Statistics,
    load_features,
    load_statistics,
    save_statistics,
    statistics_hash,
)
from ditjax.files import npz
from ditjax.metrics import frechet, scores, uncertainty
from ditjax.parallel import processes
from ditjax.parallel.processes import is_primary
from ditjax.runs.log import Progress

# As ADM's evaluator: precision and recall with k = 3, on 10,000 images of the reference.
PR_NEIGHBOURS = 3
REFERENCE_FEATURES = 10_000
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
LEVELS = (1, 2, 3, 4)  # sample counts n/k from which the distance of infinitely many is read


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A set of `count` images after one pass: what the scores need of them.

    moments of all; pool f32[n,F] of all, or of n spread evenly over them; of the spatial features
    the moments alone, or None; `classes`, the sums of an Inception Score; `judged` i[count], the
    class that an independent classifier sees, or None.
    """

    count: int
    pool: np.ndarray
    moments: frechet.FeatureMoments
    spatial: frechet.FeatureMoments | None
    classes: scores.ScoreSums
    judged: np.ndarray | None


def look(
    extractor: Extractor,
    batches: Iterable[np.ndarray],
    count: int,
    *,
    title: str = "",
    keep: int | None = None,
) -> Seen:
    """One pass over u8[B,H,W,C] batches of `count` images in all; a batch at a time in memory.

    Features are kept of at most `keep` images. With a title the progress is told. Raises UserError
    for features that are not finite, or another number of images.
    """
    kept = min(count, count if keep is None else keep)
    chosen = np.linspace(0, count - 1, kept).astype(np.int64) if kept > 1 else np.arange(kept)
    split = scores.adm_splits(count)
    pool, judged = np.empty((0, 0), np.float32), []
    moments = spatial = classes = None
    done, progress = 0, Progress(title, count, "images") if title else None
    for images in batches:
        f = extractor.extract(images)
        stop = done + len(images)
        if stop > count:
            raise UserError(f"{title or 'images'}: more than the {count} that were announced.")
        if moments is None or classes is None:
            pool = np.empty((kept, f.pool.shape[1]), np.float32)
            moments = frechet.no_moments(f.pool.shape[1])
            spatial = None if f.spatial is None else frechet.no_moments(f.spatial.shape[1])
            classes = scores.no_scores(int(split[-1]) + 1, f.logits.shape[1])
        a, b = np.searchsorted(chosen, (done, stop))
        pool[a:b] = f.pool[chosen[a:b] - done]
        moments = frechet.update(moments, f.pool)
        if spatial is not None and f.spatial is not None:
            spatial = frechet.update(spatial, f.spatial)
        classes = scores.update_scores(classes, scores.log_softmax(f.logits), split[done:stop])
        if extractor.judge:
            judged.append(extractor.judge(images))
        done = stop
        if progress:
            progress.report(done)
    if moments is None or classes is None or done != count:
        raise UserError(f"{title or 'images'}: {done} of the {count} that were announced.")
    return Seen(count, pool, moments, spatial, classes, np.concatenate(judged) if judged else None)


def statistics_of(seen: Seen, provenance: dict[str, Any]) -> Statistics:
    """What a reference file keeps of a set."""
    spatial = seen.spatial
    return Statistics(
        seen.moments.mean,
        frechet.covariance(seen.moments),
        None if spatial is None else spatial.mean,
        None if spatial is None else frechet.covariance(spatial),
        provenance,
    )


def score(
    seen: Seen,
    reference: Statistics,
    reference_pool: np.ndarray | None,
    *,
    family: str,
    seed: int = 0,
    brief: bool = False,
) -> dict[str, float]:
    """Metric name -> value.

    `family` names the features: '' are FID's own, on which metrics have their plain names; others
    carry theirs, as 'fd_digits'. With `reference_pool` f[N,F] also precision, recall and KID.
    Intervals are bootstraps of the samples (95 %), the reference taken as known. `brief` leaves out
    what takes long.
    """
    fid = distance_name(family)
    value = frechet.gaussian_frechet_distance(
        seen.moments.mean, frechet.covariance(seen.moments), reference.mu, reference.sigma
    )
    found = {fid: value}
    if not brief:
        _, influence = uncertainty.frechet_influence(seen.pool, reference.mu, reference.sigma)
        interval = uncertainty.bootstrap_interval(value, influence, seed)
        found |= {f"{fid}_low": max(0.0, interval.low), f"{fid}_high": interval.high}
    if not brief and seen.count // max(LEVELS) > len(reference.mu):
        limit = uncertainty.frechet_infinite(seen.pool, reference.mu, reference.sigma, seed)
        found |= {f"{fid}_inf": limit.value, f"{fid}_inf_se": limit.standard_error}
    if seen.spatial is not None and reference.mu_s is not None and reference.sigma_s is not None:
        found["sfid"] = frechet.gaussian_frechet_distance(
            seen.spatial.mean, frechet.covariance(seen.spatial), reference.mu_s, reference.sigma_s
        )
    if not family:
        mean, deviation = scores.inception_score(seen.classes)
        found |= {"inception_score": mean, "inception_score_split_deviation": deviation}
    if reference_pool is not None and not brief:
        found |= _against_features(seen.pool, reference_pool, family, seed)
    return found


def distance_name(family: str) -> str:
    """The Fréchet distance's honest name: FID is what the 2015 Inception features give, alone."""
    return f"fd_{family}" if family else "fid"


def _against_features(
    pool: np.ndarray, reference: np.ndarray, family: str, seed: int
) -> dict[str, float]:
    found: dict[str, float] = {}
    suffix = f"_{family}" if family else ""
    if min(len(pool), len(reference)) > PR_NEIGHBOURS:
        pr = scores.precision_recall(reference, pool, PR_NEIGHBOURS)
        found |= {f"precision{suffix}": pr.precision, f"recall{suffix}": pr.recall}
    size = min(KID_SUBSET_SIZE, len(pool), len(reference))
    subsets = scores.random_subsets(len(pool), len(reference), KID_SUBSETS, size, seed)
    mean, deviation = scores.kid(pool, reference, subsets)
    name = f"kd_{family}" if family else "kid"
    return {**found, name: mean, f"{name}_subset_deviation": deviation}


class Reference(NamedTuple):
    """What samples are compared with: statistics, and features f[n,F] where they are known.

    `name` is for a reader; `record` fixes what it is and goes into the protocol.
    """

    statistics: Statistics
    pool: np.ndarray | None
    name: str
    record: dict[str, Any]


def open_reference(
    text: str, extractor: Extractor, side: int, data_dir: str = "", keep: str | Path = ""
) -> Reference:
    """Statistics, images or a data set by name ('imagenet2012/validation'), seen by `extractor`.

    A data set's images get the centre crop and are brought to side x side; what was seen of them is
    kept beside the data. `keep` is a file that gets the reference in any case. Statistics of others
    do not say what features they are of: their SHA-256 is on record.
    Raises UserError for what is none of them, and for statistics of ours by other features.
    """
    path = Path(text)
    if path.is_file() and _holds_statistics(path):
        found = _from_statistics(path, extractor)
    elif path.exists():
        images = open_images(path)
        batches = images.batches(extractor.batch_size)
        found = _looked_at(batches, images.count, extractor, path.name)
    elif path.is_absolute() or path.suffix == ".npz":
        raise UserError(
            f"reference {text} does not exist: expected statistics or images there, or the name of"
            " a data set, as imagenet2012/validation."
        )
    else:
        found = _of_data_set(text, extractor, extractor.side or side, data_dir)
    if keep and is_primary():
        save_statistics(keep, found.statistics, found.pool)
    return found


def _of_data_set(text: str, extractor: Extractor, side: int, data_dir: str) -> Reference:
    name, split = split_of(text)
    spec = source.DataSpec(
        name=name,
        split=split,
        image_size=side,
        channels=1 if name == "digits" else 3,
        flip=False,
        data_dir=data_dir or None,
        cache_mb=0,
        threads=4,
    )
    info = source.dataset_info(name, split, spec.data_dir)
    title = f"{info.full_name}-{split}-{side}"
    words = f"{title} {info.num_examples} {sorted(extractor.record.items())}"
    key = hashlib.sha256(words.encode()).hexdigest()[:12]
    file = re.sub(r"[^\w.-]", "_", f"{title}-{key}.npz")
    kept = source.data_root(spec.data_dir) / "references" / file
    # Looking is the work of all processes: none may read while another waits for it.
    if processes.everywhere(kept.exists()):
        return _from_statistics(kept, extractor)
    batches = (_as_uint8(rows["image"]) for rows in stream.in_order(spec, extractor.batch_size))
    found = _looked_at(batches, info.num_examples, extractor, f"{name}/{split}, {side}x{side}")
    if is_primary():
        save_statistics(kept, found.statistics, found.pool)
    return found


def _looked_at(
    batches: Iterable[np.ndarray], count: int, extractor: Extractor, name: str
) -> Reference:
    digest = hashlib.sha256()
    seen = look(
        extractor, _digested(batches, digest), count, title="reference", keep=REFERENCE_FEATURES
    )
    record = {
        "reference_sha256": digest.hexdigest(),
        "reference_count": count,
        "reference_features": len(seen.pool),
    }
    statistics = statistics_of(seen, {**extractor.record, **record, "reference": name})
    return Reference(statistics, seen.pool, name, record)


def _digested(batches: Iterable[np.ndarray], digest: Any) -> Iterator[np.ndarray]:
    """The same; their bytes go into the digest, which knows a set whatever machine looks at it."""
    for k, images in enumerate(batches):
        if k == 0:
            digest.update(f"{images.shape[1:]}".encode())
        digest.update(np.ascontiguousarray(images).data)
        yield images


def _as_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] as the readers give it -> the bytes that it was made of."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _holds_statistics(path: Path) -> bool:
    with npz.reading(path) as archive:
        return "mu" in npz.names(archive)


def _from_statistics(path: Path, extractor: Extractor) -> Reference:
    found = load_statistics(path)
    said = found.provenance
    if said.get("features_sha256") not in (None, extractor.record["features_sha256"]):
        raise UserError(
            f"{path} is of features {said['features_sha256'][:12]}, the samples' are"
            f" {extractor.record['features_sha256'][:12]}: make the reference again with these."
        )
    if "reference_sha256" in said:  # ours: it is still the set that it was made of
        record = {key: said[key] for key in said if key.startswith("reference_")}
        pool = load_features(path) if "features" in found.arrays else None
        return Reference(found, pool, str(said.get("reference", path.name)), record)
    pool = None
    if "arr_0" in found.arrays:
        images = open_images(path)
        batches = images.batches(extractor.batch_size)
        seen = look(extractor, batches, images.count, title="reference", keep=REFERENCE_FEATURES)
        pool = seen.pool
    record = {
        "reference_sha256": statistics_hash(found),
        "reference_features": 0 if pool is None else len(pool),
    }
    return Reference(found, pool, path.name, record)
