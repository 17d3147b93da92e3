"""Noise schedules: tables of β and ᾱ in float64 NumPy, and respacing to fewer steps."""

import re
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError, nearest


def linear_betas(timesteps: int) -> np.ndarray:
    """DDPM Sec. 4, rescaled to any T as in ADM: β from 1e-4·1000/T to 0.02·1000/T -> f64[T].

    Raises UserError for T <= 20, where the last β would reach 1.
    """
    if timesteps <= 20:
        raise UserError(
            f"linear schedule of {timesteps} timesteps: expected at least 21, because the last beta"
            " is 20/T and must be below 1; use the cosine schedule, or respace a longer one."
        )
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def cosine_betas(timesteps: int) -> np.ndarray:
    """Nichol & Dhariwal Eq. 17: ᾱ(u) = cos²((u + .008)/1.008 · π/2), β clipped at .999 -> f64[T].

    Raises UserError for T < 1.
    """
    if timesteps < 1:
        raise UserError(f"cosine schedule of {timesteps} timesteps: expected at least 1.")
    u = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    alphas_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_bar[1:] / alphas_bar[:-1], 0.999)


def _table(values: np.ndarray) -> np.ndarray:
    """A read-only copy, because programs are traced with a schedule as a constant."""
    table = np.array(values)
    table.flags.writeable = False
    return table


@dataclass(frozen=True, eq=False)
class Schedule:
    """DDPM Sec. 2: the forward process q over the S retained steps, every table f64[S].

    Everywhere in `diffusion`, `t i32[B]` indexes these tables; 0 is the cleanest step. The network
    receives `timesteps[t]`, the original integer in [0, num_train_timesteps), respaced or not.
    Equal schedules have equal hashes, so a schedule may be a static argument of jit.

    Raises UserError for betas outside (0, 1) and for timesteps out of order or out of range.
    """

    betas: np.ndarray
    timesteps: np.ndarray
    num_train_timesteps: int

    def __post_init__(self) -> None:
        betas = _table(np.asarray(self.betas, np.float64))
        timesteps = _table(np.asarray(self.timesteps, np.int64))
        if betas.ndim != 1 or betas.size == 0 or not np.all((betas > 0) & (betas < 1)):
            raise UserError("schedule's betas: expected a non-empty table of numbers in (0, 1).")
        if (
            timesteps.shape != betas.shape
            or np.any(np.diff(timesteps) <= 0)
            or timesteps[0] < 0
            or timesteps[-1] >= self.num_train_timesteps
        ):
            raise UserError(
                "schedule's timesteps: expected one ascending integer for each beta, in"
                f" [0, {self.num_train_timesteps})."
            )
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timesteps", timesteps)

    def __len__(self) -> int:
        """S, the number of retained steps."""
        return len(self.betas)

    @cached_property
    def _content(self) -> tuple[bytes, bytes, int]:
        return self.betas.tobytes(), self.timesteps.tobytes(), self.num_train_timesteps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def alphas_bar(self) -> np.ndarray:
        """DDPM Eq. 4: ᾱ_t = Π_{s<=t} (1 - β_s)."""
        return _table(np.cumprod(1 - self.betas))

    @cached_property
    def alphas_bar_prev(self) -> np.ndarray:
        """ᾱ_{t-1}, with ᾱ = 1 before the first step."""
        return _table(np.append(1.0, self.alphas_bar[:-1]))

    @cached_property
    def posterior_mean_x0(self) -> np.ndarray:
        """DDPM Eq. 7: the weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return _table(self.betas * np.sqrt(self.alphas_bar_prev) / (1 - self.alphas_bar))

    @cached_property
    def posterior_mean_x_t(self) -> np.ndarray:
        """DDPM Eq. 7: the weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return _table((1 - self.alphas_bar_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_bar))

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """DDPM Eq. 7: β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · β_t, which is 0 at t = 0."""
        return _table(self.betas * (1 - self.alphas_bar_prev) / (1 - self.alphas_bar))

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """log β̃_t, where t = 0 copies t = 1, as β̃_0 = 0 (β_0 if there is no t = 1)."""
        first = self.posterior_variance[1:2] if len(self) > 1 else self.betas
        return _table(np.log(np.append(first, self.posterior_variance[1:])))

    @cached_property
    def log_betas(self) -> np.ndarray:
        """log β_t: the upper end of the learned range."""
        return _table(np.log(self.betas))

    @cached_property
    def log_betas_clipped(self) -> np.ndarray:
        """log β_t, where t = 0 is log β̃_1 as in ADM: β_0 makes a needlessly wide decoder."""
        return _table(np.append(self.posterior_log_variance_clipped[0], self.log_betas[1:]))


_BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def make_schedule(name: str, timesteps: int = 1000) -> Schedule:
    """The training schedule 'linear' or 'cosine' with T = timesteps steps, all of them retained.

    Raises UserError for an unknown name and for a T that the schedule does not allow.
    """
    if name not in _BETAS:
        raise UserError(
            f"noise schedule {name!r} is unknown: expected one of {', '.join(_BETAS)}."
            f"{nearest(name, _BETAS)}"
        )
    return Schedule(_BETAS[name](timesteps), np.arange(timesteps), timesteps)


def space_timesteps(num_timesteps: int, spec: str) -> np.ndarray:
    """Improved DDPM's and ADM's respacing: which of num_timesteps to retain -> i64[S], ascending.

    '250'       250 steps, evenly strided from the first to the last
    '10,15,20'  this many in each of three equal sections, cleanest first, strided likewise
    'ddim50'    DDIM's: every k-th from 0, with the smallest integer k that gives exactly 50

    Raises UserError for any other spec, and for more steps than there are.
    """
    if spec.startswith("ddim"):
        return _ddim_timesteps(num_timesteps, spec)
    counts = [_count(part) for part in spec.replace(" ", "").split(",")]
    if min(counts) < 1:
        raise UserError(
            f"respacing {spec!r}: expected a number of steps such as '250', numbers for equal"
            " sections such as '10,15,20', or 'ddim50'; each at least 1."
        )
    if len(counts) > num_timesteps:
        raise UserError(
            f"respacing {spec!r}: {len(counts)} sections, but there are only {num_timesteps}"
            " timesteps; give fewer sections."
        )
    size, extra = divmod(num_timesteps, len(counts))
    retained = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise UserError(
                f"respacing {spec!r}: {count} steps asked of section {section + 1}, which has"
                f" {length} of the {num_timesteps} timesteps; give at most {length}."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # Sum the stride instead of multiplying it, and round half to even: the timesteps of the
        # published samples depend on both.
        offsets = np.cumsum(np.append(0.0, np.full(count - 1, stride)))
        retained.append(start + np.rint(offsets).astype(np.int64))
        start += length
    return np.concatenate(retained)


def _count(text: str) -> int:
    """The number, or 0 for other text; at most nine digits, as int() refuses thousands of them."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


def _ddim_timesteps(num_timesteps: int, spec: str) -> np.ndarray:
    """DDIM App. D.2, linear τ: 'ddim50' -> 0, 20, 40, ... for 1000 timesteps."""
    count = _count(spec[4:])
    if count < 1:
        raise UserError(f"respacing {spec!r}: expected 'ddim' and a number of steps: 'ddim50'.")
    reachable = {-(-num_timesteps // k): k for k in range(num_timesteps, 0, -1)}
    if count not in reachable:
        near = sorted(sorted(reachable, key=lambda steps: abs(steps - count))[:3])
        raise UserError(
            f"respacing {spec!r}: no integer stride over {num_timesteps} timesteps gives {count}"
            f" steps; the nearest possible: {', '.join(f'ddim{steps}' for steps in near)}."
        )
    return np.arange(0, num_timesteps, reachable[count], dtype=np.int64)


def retained(schedule: Schedule, steps: np.ndarray) -> Schedule:
    """Nichol & Dhariwal Eq. 19: retained steps i[S] keep their ᾱ, so β' = 1 - ᾱ_i / ᾱ_{i-1}."""
    alphas_bar = schedule.alphas_bar[steps]
    betas = 1 - alphas_bar / np.append(1.0, alphas_bar[:-1])
    return Schedule(betas, schedule.timesteps[steps], schedule.num_train_timesteps)


def respace(schedule: Schedule, spec: str) -> Schedule:
    """Retain the steps of a respacing (`space_timesteps`). Raises UserError as that does."""
    return retained(schedule, space_timesteps(len(schedule), spec))


def extract(table: np.ndarray, t: jax.Array, ndim: int) -> jax.Array:
    """table f64[S], t i32[B] -> f32[B,1,...,1] of rank ndim: the table's value for each sample.

    A t beyond the table gives NaN; by default JAX would silently return the last entry.
    """
    values = jnp.asarray(table, jnp.float32).at[t].get(mode="fill", fill_value=jnp.nan)
    return values.reshape(t.shape + (1,) * (ndim - 1))
