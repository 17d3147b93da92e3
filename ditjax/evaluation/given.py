"""How well samples follow what they are given: control images, what is known of a record, captions.

Samples are added in order, from sample 0 on; sample i is given of record i.
"""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from ditjax.config import Config
from ditjax.data import source, stream
from ditjax.data.crop import normalize
from ditjax.data.records import ImageRecords
from ditjax.evaluation.clip_score import ClipScorer, clip_scores, open_scorer
from ditjax.evaluation.features import Extractor
from ditjax.evaluation.nowcast import NowcastScores
from ditjax.metrics.restoration import SSIM_SIDE, psnr, ssim
from ditjax.metrics.scores import mask_f1
from ditjax.runs import opening
from ditjax.sampling.given import GivenRows
from ditjax.sampling.program import sampling_of
from ditjax.tasks import make_task
from ditjax.training import keys
from ditjax.training.task import Beside

PEAK = 255.0


class Scores(Protocol):
    """Scores of samples that are added in order, from sample 0 on, each given of its record."""

    def add(self, images: np.ndarray) -> None: ...

    def means(self) -> dict[str, float]: ...

    def records(self) -> dict[str, np.ndarray]:
        """The scores f64[N] of each record, NaN where it has none."""
        ...


def scores_of(c: Config, given: GivenRows, seed: int, extractor: Extractor) -> Scores:
    """The scores of a recipe's samples, by what they are given."""
    needs = sampling_of(c, make_task(c)).needs
    if needs is not None and needs.reads == "caption":
        return CaptionScores(c, given, extractor)
    return GivenScores(c, given, seed)


class CaptionScores:
    """Whether samples of captions show what is true of their records.

    `accuracy_NAME` is the share of the samples whose attribute NAME, as `Extractor.attributes`
    judges it, is the record's class of that name; `accuracy_all` that of those with all of them
    right. Records without a class, such as scenes of two digits, do not count. `Extractor.follows`
    scores samples beside the first captions of their records. With config.evaluate.clip,
    `clip_score` is the mean CLIP score of a sample and its caption, and `clip_score_shuffled` that
    with the caption of the next record.
    """

    def __init__(self, c: Config, given: GivenRows, extractor: Extractor) -> None:
        self._clip = open_scorer(c.evaluate.clip) if c.evaluate.clip else None
        spec = opening.held_out(c)
        assert spec.text is not None
        opened = source.open_split(spec.name, spec.split, spec.data_dir)
        self._images = ImageRecords(opened).with_captions(spec.text.feature)
        self._names, self._count = self._images.class_features, opened.info.num_examples
        if self._clip:
            text = spec.text._replace(tokenizer=self._clip.tokenizer, tokens=self._clip.tokens)
            spec = dataclasses.replace(spec, text=text)
        self._spec, self._rows = spec, given.rows
        self._judge, self._follows = extractor.attributes, extractor.follows
        self._found: dict[str, list[np.ndarray]] = {}
        self._start = 0

    def add(self, images: np.ndarray) -> None:
        """Judge the next samples, u8[B,H,W,C]."""
        indices = np.arange(self._start, self._start + len(images))
        self._start += len(images)
        if self._clip is not None:
            self._add_cosines(self._clip, images, indices)
        if self._follows is not None:
            for name, scores in self._follows(images, self._captions(indices)).items():
                self._found.setdefault(name, []).append(scores)
        if self._judge is None:
            return
        classes, every = self._rows(indices)["classes"], []
        for name, found in self._judge(images).items():
            if name in self._names:
                truth = classes[:, self._names.index(name)]
                every.append(np.where(truth < 0, np.nan, found == truth))
                self._found.setdefault(f"accuracy_{name}", []).append(every[-1])
        if every:
            self._found.setdefault("accuracy_all", []).append(np.prod(every, axis=0))

    def _captions(self, indices: np.ndarray) -> list[str]:
        """The first caption of each record."""
        return [self._images.read_words(int(i))[2].captions[0] for i in indices % self._count]

    def _add_cosines(self, clip: ClipScorer, images: np.ndarray, indices: np.ndarray) -> None:
        image = clip.embed_images(images)
        for name, behind in (("clip_score", 0), ("clip_score_shuffled", 1)):
            records = (indices + behind) % self._count
            (rows,) = stream.read_records(self._spec, records, len(records))
            scores = clip_scores(image, clip.embed_texts(rows["caption"]))
            self._found.setdefault(name, []).append(scores)

    def records(self) -> dict[str, np.ndarray]:
        """The scores of each record, the mean of its samples."""
        return {k: _by_record(np.concatenate(v), self._count) for k, v in self._found.items()}

    def means(self) -> dict[str, float]:
        """The mean of each score, over the records that have it."""
        found = {name: np.concatenate(parts) for name, parts in self._found.items()}
        return {k: float(np.nanmean(v)) for k, v in found.items() if not np.isnan(v).all()}


class GivenScores:
    """Scores of samples that are given images.

    What is given of a record is made of the sample in the same way (`Sampling.needs`). Of control
    images, `control_f1` is the F1 of the pixels above 0 against those asked for,
    `control_f1_shuffled` against those of the next sample, and `control_error` the mean squared
    difference. Of a low-resolution or incomplete image, `psnr_db` and `ssim` are the sample's
    against the record itself, and `consistency_db` is the PSNR of the low-resolution images. PSNRs
    are means of each sample's; SSIM is left out below 11 pixels a side. Of the past of a clip, the
    scores are those of `NowcastScores`.
    """

    def __init__(self, c: Config, given: GivenRows, seed: int) -> None:
        needs = sampling_of(c, make_task(c)).needs
        assert needs is not None
        beside_of = needs.beside

        def beside(images: jax.Array, indices: jax.Array) -> Beside:
            key = keys.stream(seed, keys.CONTROL)
            return beside_of(images, jax.vmap(jax.random.fold_in, (None, 0))(key, indices))

        self._beside, self._rows, self._count = jax.jit(beside), given.rows, given.records
        self._forecasts = NowcastScores(given.records)
        self._parts: list[dict[str, np.ndarray]] = []
        self._start = 0

    def add(self, images: np.ndarray) -> None:
        """Score the next samples, u8[B,H,W,C]."""
        indices = np.arange(self._start, self._start + len(images), dtype=np.uint32)
        self._start += len(images)
        samples, records = normalize(images), self._records(indices)
        if images.ndim == 5:  # clips, of which the first frames are given
            mask = self._beside(records, indices).known.mask
            true = np.rint(127.5 * (records + 1)).astype(np.uint8)
            self._forecasts.add(images, true, int(np.asarray(mask)[0].sum()))
            self._parts.append({})
            return
        found, asked = (self._beside(each, indices) for each in (samples, records))
        if asked.known is None:
            others = indices + np.uint32(1)
            other = self._beside(self._records(others), others)
            maps = (np.asarray(each.channels) for each in (found, asked, other))
            self._parts.append(_map_scores(*maps))
            return
        truth = 127.5 * (records + 1)
        scores = {"psnr_db": psnr(images, truth, PEAK)}
        if images.shape[1] >= SSIM_SIDE:
            scores["ssim"] = ssim(images, truth, PEAK)
        if asked.known.mask is None:
            low, wanted = (127.5 * np.asarray(each.known.image) for each in (found, asked))
            scores["consistency_db"] = psnr(low, wanted, PEAK)
        self._parts.append(scores)

    def _records(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self._rows(indices.astype(np.int64))["image"])

    def records(self) -> dict[str, np.ndarray]:
        """The scores of each record, the mean of its samples."""
        parts: Any = self._parts
        if not parts[0]:
            return self._forecasts.records()
        scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: _by_record(values, self._count) for name, values in scores.items()}

    def means(self) -> dict[str, float]:
        """The mean of each score over all samples."""
        parts: Any = self._parts
        if not parts[0]:
            return self._forecasts.means()
        return {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}


def _by_record(values: np.ndarray, count: int) -> np.ndarray:
    """Scores f[N] of samples -> the mean of each record's: sample i is of record i % count.

    With a count of 0, each is of its own.
    """
    values = np.asarray(values, np.float64)
    record, known = np.arange(len(values)) % (count or len(values)), ~np.isnan(values)
    sums = np.bincount(record, np.where(known, values, 0))
    counts = np.bincount(record, known.astype(np.float64))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _map_scores(found: np.ndarray, asked: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    error = np.square(found - asked).reshape(len(found), -1).mean(1)
    return {
        "control_f1": mask_f1(found > 0, asked > 0),
        "control_f1_shuffled": mask_f1(found > 0, other > 0),
        "control_error": error.astype(np.float64),
    }
