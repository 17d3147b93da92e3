"""Rain on a radar: cells with texture that drift, turn, grow and decay. Nothing is downloaded.

Clip i of a split is a function of (seed, split, i) alone, as a digit scene is (`data/scenes.py`).
Pixels are 0 to 255 as SEVIR's vertically integrated liquid. In the set 'advect' rain only moves, so
that extrapolating the motion is nearly perfect; in the default one it also grows, decays and
changes its texture, which no extrapolation knows.
"""

import io
import re
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ditjax.data.clips import as_animation
from ditjax.data.scenes import GeneratedBuilder, scene_uniforms
from ditjax.errors import UserError

RADAR_FRAMES = 13  # as SEVIR-LR's: 7 are seen, 6 to be forecast
RADAR_SIDE = 32
DEFAULT_RADAR = 4_000

_SPLITS = ("train", "test")
_STREAM = 4  # of this data set among those of `scene_uniforms`
_CONFIG = re.compile(r"([1-9]\d{1,7})(-advect)?(?:-seed(\d{1,9}))?")
_MARGIN = 16  # around the picture, so that cells come in
_CELLS = (3, 8)
_WAVES = 16  # of the texture
_DRY = 8  # fainter pixels are 0
_WORDS = 16 + _CELLS[1] * 12 + _WAVES * 4


class _Flow(NamedTuple):
    """dz/dt = velocity + rate (z - centre) of points z = row + i column; rate turns and widens."""

    velocity: complex
    rate: complex
    centre: complex

    def carried(self, z: Any, t: float) -> Any:
        """Where points are a time t later; t may be negative."""
        growth = np.exp(self.rate * t)
        drift = self.velocity * (t if abs(self.rate) < 1e-9 else (growth - 1) / self.rate)
        return self.centre + (z - self.centre) * growth + drift


def radar_clip(seed: int, split: str, index: int, advect: bool = False) -> np.ndarray:
    """Clip `index` of a split: u8[13, 32, 32]. With `advect`, rain moves and does nothing else.

    Three to eight anisotropic Gaussian cells times a log-normal texture of spectrum f^-2, in one
    flow of drift, rotation and divergence. Each cell grows by e^gt, |g| <= .15 a frame, and has a
    birth and a death.
    """
    u = scene_uniforms(seed, _STREAM + _SPLITS.index(split), index, _WORDS)
    full = RADAR_SIDE + 2 * _MARGIN
    speed, angle = 0.3 + 1.7 * next(u), 2 * np.pi * next(u)
    rate = complex(0.02 * (2 * next(u) - 1), 0.04 * (2 * next(u) - 1))
    flow = _Flow(speed * np.exp(1j * angle), rate, complex(full, full) / 2)
    rows, columns = np.mgrid[:RADAR_SIDE, :RADAR_SIDE] + _MARGIN
    times = np.arange(RADAR_FRAMES)
    origin = np.stack([flow.carried(rows + 1j * columns, -float(t)) for t in times])
    texture = _texture(origin, times, u, advect)
    rain = np.zeros(origin.shape)
    for _ in range(_CELLS[0] + int(next(u) * (_CELLS[1] - _CELLS[0] + 1))):
        rain += _cell(origin, times, u, full, advect)
    rain *= texture
    # Rounded to six places first, so that the last bit of a product cannot change a pixel.
    frames = np.rint(np.round(np.minimum(rain, 255), 6))
    return np.where(frames < _DRY, 0, frames).astype(np.uint8)


def _texture(origin: np.ndarray, times: np.ndarray, u: Iterator[float], advect: bool) -> np.ndarray:
    """A log-normal field on points as they were at time 0, c[F,H,W]; its waves drift in phase."""
    log = np.zeros(origin.shape)
    for _ in range(_WAVES):
        # Cycles a pixel, as many waves an octave: the spectrum f^-2 of a plane.
        frequency = 0.02 * 8.0 ** next(u)
        direction, phase = 2 * np.pi * next(u), 2 * np.pi * next(u)
        turn = 0.0 if advect else 0.8 * (2 * next(u) - 1)
        wave = 2 * np.pi * frequency * np.exp(-1j * direction)
        angles = (origin * wave).real + (phase + turn * times)[:, None, None]
        log += np.cos(angles)
    return np.exp(0.5 * (2 / _WAVES) ** 0.5 * log)


def _cell(
    origin: np.ndarray, times: np.ndarray, u: Iterator[float], full: int, advect: bool
) -> np.ndarray:
    """The rain of one cell at points as they were at time 0, c[F,H,W]."""
    centre = full * complex(next(u), next(u))
    long, short = 3 + 6 * next(u), 2 + 3 * next(u)
    towards, peak = np.pi * next(u), 60 + 195 * next(u)
    growth, birth, life = 0.15 * (2 * next(u) - 1), 24 * next(u) - 14, 8 + 16 * next(u)
    from_centre = (origin - centre) * np.exp(-1j * towards)
    shape = np.exp(-((from_centre.real / long) ** 2 + (from_centre.imag / short) ** 2) / 2)
    if advect:
        return np.asarray(peak * shape)
    middle = (RADAR_FRAMES - 1) / 2
    alive = np.clip((times - birth) / 2, 0, 1) * np.clip((birth + life - times) / 2, 0, 1)
    strength = peak * np.exp(growth * (times - middle)) * alive
    return np.asarray(strength[:, None, None] * shape)


# ---- the data set


class RadarSet(NamedTuple):
    """The clips of 'N[-advect][-seedS]': N training clips and N // 10 test clips."""

    examples: int
    advect: bool
    seed: int

    @property
    def name(self) -> str:
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.examples}{'-advect' * self.advect}{seed}"


def parse_radar_set(config: str) -> RadarSet:
    """'4000', '4000-advect' or '4000-seed1' -> RadarSet. Raises UserError."""
    match = _CONFIG.fullmatch(config)
    if match is None:
        raise UserError(
            f"data set 'radar/{config}': expected 'radar', 'radar/N', 'radar/N-advect' or the same"
            " with '-seedS', with N from 10 to 99999999 training clips."
        )
    return RadarSet(int(match[1]), bool(match[2]), int(match[3] or 0))


class Radar(
    GeneratedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """Clips of rain as a data set: 13 frames of 32x32 grey, one class."""

    KIND: ClassVar[str] = "Clips"
    HOMEPAGE: ClassVar[str] = ""
    LICENSE: ClassVar[str] = "none needed: computed"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.info_of(
            f"{RADAR_FRAMES} frames of {RADAR_SIDE}x{RADAR_SIDE}, an animated PNG each, of rain"
            " that moves"
            + ("" if self._size.advect else ", grows and decays")
            + ". Clip i is a function of (seed, split, i).",
            {
                "image": tfds.features.Image(
                    shape=(RADAR_SIDE, RADAR_SIDE, 1), encoding_format="png"
                ),
                "label": tfds.features.ClassLabel(names=["rain"]),
            },
        )

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            frames = radar_clip(self._size.seed, split, i, self._size.advect)
            encoded = as_animation([Image.fromarray(frame) for frame in frames])
            yield i, {"image": io.BytesIO(encoded), "label": 0}
