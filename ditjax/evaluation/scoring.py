"""Scores of a set of images against a reference: one pass for features, then exact sums."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditjax.data import source, stream
from ditjax.data.folders import report_reading
from ditjax.data.images import open_images
from ditjax.data.names import Split, parse_name
from ditjax.errors import UserError
from ditjax.evaluation.features import Extractor, check_frames_of
from ditjax.evaluation.statistics import (
    Statistics,
    load_features,
    load_statistics,
    save_statistics,
    statistics_hash,
)
from ditjax.files import faults, npz
from ditjax.files.store import place
from ditjax.metrics import frechet, neighbours, scores, sliced, uncertainty
from ditjax.parallel import processes
from ditjax.parallel.processes import is_primary
from ditjax.runs.log import Progress

# As in ADM's evaluator: precision and recall with k = 3, on 10,000 images of the reference.
PR_NEIGHBOURS = 3
DC_NEIGHBOURS = 5  # as in Naeem et al. 2020
REFERENCE_FEATURES = 10_000
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
LEVELS = (1, 2, 3, 4)  # sample counts n/k from which the distance is extrapolated


@dataclasses.dataclass(frozen=True, eq=False)
class ExtractedFeatures:
    """The features of a set of `count` images that the scores need.

    `pool` f32[n,F] holds the features of all images, or of n images spread evenly over them;
    `moments` those of all. `spatial` holds only moments, or is None. `classes` are the sums of an
    Inception Score; `predicted` i[count] is the class that an independent classifier predicts, or
    None. `measured` are the means of the extractor's scores of each sample.
    """

    count: int
    pool: np.ndarray
    moments: frechet.FeatureMoments
    spatial: frechet.FeatureMoments | None
    classes: scores.ScoreSums
    predicted: np.ndarray | None
    measured: dict[str, float] = dataclasses.field(default_factory=dict)


def extract_features(
    extractor: Extractor,
    batches: Iterable[np.ndarray],
    count: int,
    *,
    title: str = "",
    max_pool: int | None = None,
) -> ExtractedFeatures:
    """Extract features from u8[B,..,H,W,C] batches of `count` images or clips in one pass.

    One batch at a time is in memory. Pool features of at most `max_pool` images are kept. Progress
    is logged if there is a title. Raises UserError for features that are not finite, or for
    another number of images.
    """
    kept = min(count, count if max_pool is None else max_pool)
    chosen = np.linspace(0, count - 1, kept).astype(np.int64) if kept > 1 else np.arange(kept)
    split = scores.adm_splits(count)
    pool, predicted = np.empty((0, 0), np.float32), []
    measured: dict[str, float] = {}
    moments = spatial = classes = None
    done, progress = 0, Progress(title, count, "images") if title else None
    for images in batches:
        f = extractor.extract(images)
        stop = done + len(images)
        if stop > count:
            raise UserError(f"{title or 'images'}: more than the expected {count}.")
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
            predicted.append(extractor.judge(images))
        for name, each in (extractor.measures(images) if extractor.measures else {}).items():
            measured[name] = measured.get(name, 0.0) + float(each.sum()) / count
        done = stop
        if progress:
            progress.report(done)
    if moments is None or classes is None or done != count:
        raise UserError(f"{title or 'images'}: only {done} of the expected {count}.")
    return ExtractedFeatures(
        count,
        pool,
        moments,
        spatial,
        classes,
        np.concatenate(predicted) if predicted else None,
        measured,
    )


def statistics_of(extracted: ExtractedFeatures, provenance: dict[str, Any]) -> Statistics:
    """Return the statistics of a set that a reference file holds."""
    spatial = extracted.spatial
    return Statistics(
        extracted.moments.mean,
        frechet.covariance(extracted.moments),
        None if spatial is None else spatial.mean,
        None if spatial is None else frechet.covariance(spatial),
        provenance,
    )


def score(
    extracted: ExtractedFeatures,
    reference: Statistics,
    reference_pool: np.ndarray | None,
    *,
    family: str,
    seed: int = 0,
    brief: bool = False,
) -> dict[str, float]:
    """Return metrics by name.

    `family` names the features: '' means those of FID, whose metrics have plain names; the metrics
    of others carry the name, such as 'fd_digits'. `reference_pool` f[N,F] adds the metrics of two
    feature sets. Intervals are 95 % bootstraps over the samples with the reference taken as known.
    `brief` leaves out slow metrics.
    """
    fid = distance_name(family)
    theirs = frechet.gaussian_root(reference.mu, reference.sigma)
    ours = frechet.gaussian_root(extracted.moments.mean, frechet.covariance(extracted.moments))
    value = frechet.root_distance(ours, theirs)
    found = {fid: value, **extracted.measured}
    if not brief:
        found |= _frechet_uncertainty(extracted.pool, theirs, fid, value, seed)
    if (
        extracted.spatial is not None
        and reference.mu_s is not None
        and reference.sigma_s is not None
    ):
        found["sfid"] = frechet.gaussian_frechet_distance(
            extracted.spatial.mean,
            frechet.covariance(extracted.spatial),
            reference.mu_s,
            reference.sigma_s,
        )
    if not family:
        mean, deviation = scores.inception_score(extracted.classes)
        found |= {"inception_score": mean, "inception_score_split_deviation": deviation}
    if reference_pool is not None and not brief:
        found |= _feature_set_metrics(extracted.pool, reference_pool, family, seed)
    return found


def _frechet_uncertainty(
    pool: np.ndarray, reference: frechet.GaussianRoot, name: str, value: float, seed: int
) -> dict[str, float]:
    """The interval of a distance, and of many samples the distance of infinitely many."""
    whole = uncertainty.frechet_influence(pool, reference)
    interval = uncertainty.bootstrap_interval(value, whole.influence, seed)
    found = {f"{name}_low": max(0.0, interval.low), f"{name}_high": interval.high}
    if len(pool) // max(LEVELS) > len(reference.mean):
        limit = uncertainty.frechet_infinite(pool, reference, seed, LEVELS, whole)
        found |= {f"{name}_inf": limit.value, f"{name}_inf_se": limit.standard_error}
    return found


def distance_name(family: str) -> str:
    """Return the Fréchet distance's name. Only the 2015 Inception features give 'fid'."""
    return f"fd_{family}" if family else "fid"


def _feature_set_metrics(
    pool: np.ndarray, reference: np.ndarray, family: str, seed: int
) -> dict[str, float]:
    """The metrics of two feature sets, each with its interval.

    Intervals are over the samples, but those of recall and coverage, which are means over the
    reference's images.
    """
    found: dict[str, float] = {}

    def add(name: str, value: float, influence: np.ndarray, least: float = 0.0) -> None:
        interval = uncertainty.bootstrap_interval(value, influence, seed)
        # A sum that is 0 may be rounded below it.
        low = max(least, interval.low)
        found.update({name: value, f"{name}_low": low, f"{name}_high": interval.high})

    suffix = f"_{family}" if family else ""
    smaller = min(len(pool), len(reference))
    if smaller > DC_NEIGHBOURS:
        balls = neighbours.compare_neighbourhoods(reference, pool, PR_NEIGHBOURS, DC_NEIGHBOURS)
        pr, dc, authentic = balls
        add(f"precision{suffix}", pr.precision, pr.in_reference)
        add(f"recall{suffix}", pr.recall, pr.in_samples)
        add(f"authenticity{suffix}", float(authentic.mean()), authentic)
        add(f"density{suffix}", dc.density, dc.balls)
        add(f"coverage{suffix}", dc.coverage, dc.covered)
    size = min(KID_SUBSET_SIZE, smaller)
    subsets = list(scores.random_subsets(len(pool), len(reference), KID_SUBSETS, size, seed))
    mean, deviation = scores.kid(pool, reference, subsets)
    name = f"kd_{family}" if family else "kid"
    add(name, mean, scores.kid_influence(pool, reference, subsets[0]), -math.inf)
    found[f"{name}_subset_deviation"] = deviation
    monge = sliced.monge_distance(pool, reference, seed)
    add(f"md_{family}" if family else "mind", monge.value, monge.influence)
    return found


class Reference(NamedTuple):
    """What samples are compared with: statistics, and features f[n,F] if they are known.

    `name` is for readers; `record` identifies the reference and is part of the protocol.
    """

    statistics: Statistics
    pool: np.ndarray | None
    name: str
    record: dict[str, Any]


def open_reference(
    reference: str | Split,
    extractor: Extractor,
    side: int,
    data_dir: str = "",
    save_to: str | Path = "",
    frames: int = 1,
    stride: int = 1,
) -> Reference:
    """Open a reference: statistics, images, or a split of a data set ('imagenet2012/validation').

    Features of images come from `extractor`. A data set's images are centre-cropped to
    side x side, or are clips of `frames`, and their statistics are cached beside the data.
    `save_to` is a file to save the reference to in any case. Statistics of other programs do
    not say what features they are of, so their SHA-256 is recorded. Raises UserError for
    anything else, and for statistics by ditjax with other features.
    """
    if isinstance(reference, Split):
        found = _from_dataset(reference, extractor, side, data_dir, frames, stride)
    else:
        found = _by_name(reference, extractor, side, data_dir, frames, stride)
    if save_to and is_primary():
        save_statistics(save_to, found.statistics, found.pool)
    return found


def _by_name(
    text: str, extractor: Extractor, side: int, data_dir: str, frames: int, stride: int
) -> Reference:
    path = place(text)
    there = faults.exists(path)
    if there and not faults.is_folder(path) and _holds_statistics(path):
        return _from_statistics(path, extractor)
    if there:
        images = open_images(path)
        report_reading(f"reference: {images}")
        check_frames_of(extractor, images.frames, str(path))
        batches = images.batches(extractor.batch_size)
        return _from_images(batches, images.count, extractor, path.name)
    if path.is_absolute() or path.suffix in (".npz", ".npy", ".pkl", ".zip"):
        raise UserError(
            f"reference {text} does not exist: expected statistics or images there, or the name of"
            " a data set, such as imagenet2012/validation."
        )
    images_of = source.images_of(source.parse_split(text, data_dir or None))
    return _from_dataset(images_of, extractor, side, data_dir, frames, stride)


def _from_dataset(
    of: Split, extractor: Extractor, side: int, data_dir: str, frames: int, stride: int
) -> Reference:
    side = extractor.side or side
    spec = source.DataSpec(
        name=of.name,
        split=of.split,
        image_size=side,
        channels=1 if parse_name(of.name).base == "digits" else 3,
        flip=False,
        frames=frames,
        frame_stride=stride,
        data_dir=data_dir or None,
        cache_mb=0,
        threads=4,
    )
    info = source.dataset_info(of.name, of.split, spec.data_dir)
    title = f"{info.full_name}-{of.split}-{side}" + (f"-{frames}x{stride}" if frames > 1 else "")
    words = f"{title} {info.num_examples} {sorted(extractor.record.items())}"
    key = hashlib.sha256(words.encode()).hexdigest()[:12]
    file = re.sub(r"[^\w.-]", "_", f"{title}-{key}.npz")
    name = f"{of}, {side}x{side}"
    cached = source.data_root(spec.data_dir) / "references" / file
    # All processes extract features together: none may load the cache while another extracts.
    if processes.everywhere(cached.exists()):
        return _from_statistics(cached, extractor)._replace(name=name)
    batches = (as_uint8(rows["image"]) for rows in stream.in_order(spec, extractor.batch_size))
    found = _from_images(batches, info.num_examples, extractor, name)
    if is_primary():
        save_statistics(cached, found.statistics, found.pool)
    return found


def _from_images(
    batches: Iterable[np.ndarray], count: int, extractor: Extractor, name: str
) -> Reference:
    digest = hashlib.sha256()
    extracted = extract_features(
        extractor,
        _hash_batches(batches, digest),
        count,
        title="reference",
        max_pool=REFERENCE_FEATURES,
    )
    record = {
        "reference_sha256": digest.hexdigest(),
        "reference_count": count,
        "reference_features": len(extracted.pool),
    }
    statistics = statistics_of(extracted, {**extractor.record, **record, "reference": name})
    return Reference(statistics, extracted.pool, name, record)


def _hash_batches(batches: Iterable[np.ndarray], digest: Any) -> Iterator[np.ndarray]:
    """Yield the batches and add their bytes to a digest, which is the same on every machine."""
    for k, images in enumerate(batches):
        if k == 0:
            digest.update(f"{images.shape[1:]}".encode())
        digest.update(np.ascontiguousarray(images).data)
        yield images


def as_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images in [-1, 1], as the readers yield them, back to their bytes."""
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _holds_statistics(path: Path) -> bool:
    with npz.reading(path) as archive:
        return "mu" in npz.names(archive)


def _from_statistics(path: Path, extractor: Extractor) -> Reference:
    found = load_statistics(path)
    provenance = found.provenance
    # Features without weights, such as statistics of rain, have no digest.
    ours, theirs = (each.get("features_sha256") for each in (extractor.record, provenance))
    if theirs not in (None, ours):
        raise UserError(
            f"{path} has features {theirs[:12]}, the samples have {(ours or 'others')[:12]}: make"
            " the reference again with those."
        )
    if "reference_sha256" in provenance:  # written by ditjax, which recorded the set of images
        record = {key: provenance[key] for key in provenance if key.startswith("reference_")}
        pool = load_features(path) if "features" in found.arrays else None
        return Reference(found, pool, str(provenance.get("reference", path.name)), record)
    pool = None
    if "arr_0" in found.arrays:
        images = open_images(path)
        batches = images.batches(extractor.batch_size)
        extracted = extract_features(
            extractor, batches, images.count, title="reference", max_pool=REFERENCE_FEATURES
        )
        pool = extracted.pool
    record = {
        "reference_sha256": statistics_hash(found),
        "reference_features": 0 if pool is None else len(pool),
    }
    return Reference(found, pool, path.name, record)
