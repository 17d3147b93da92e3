"""The keys of `config.diffusion`, and the process, times and objective that they describe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from ditjax.config import (
    FRACTION,
    SAMPLER_REGISTRY,
    Config,
    Sample,
    Section,
    above,
    at_least,
    at_most,
    between,
    check_used,
    key,
    lookup,
    registered,
)
from ditjax.diffusion import grids, process
from ditjax.diffusion.gaussian import Denoise
from ditjax.diffusion.guidance import (
    DenoisePair,
    GuidanceRule,
    classifier_free,
    guide,
    guide_along,
    projected,
    projected_along,
    rescaled,
    zero_above,
    zero_star,
)
from ditjax.diffusion.losses import Loss, Objective
from ditjax.diffusion.process import Discrete, Process, per_sample, precondition
from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import Sampler
from ditjax.diffusion.times import Times, draw_intervals, draw_times
from ditjax.diffusion.weighting import Weighting, check_weighting
from ditjax.errors import UserError

LOSS_REGISTRY = "ditjax.diffusion.losses.LOSSES"

_OF_DDPM = ("process", ("ddpm",))
_OF_EDM = ("process", ("edm",))
_CONTINUOUS = ("process", ("flow", "gvp", "vp", "edm"))
_OF_MEANFLOW = ("loss", ("meanflow", "meanflow_v"))


@dataclass(frozen=True)
class Diffusion(Section):
    """The process, and the training objective (`diffusion/`)."""

    process: Literal["ddpm", "flow", "gvp", "vp", "edm"] = key("ddpm")
    timesteps: int = key(1000, at_least(2), at_most(100_000), used_if=_OF_DDPM)
    schedule: Literal["linear", "cosine"] = key("linear", used_if=_OF_DDPM)
    prediction: Literal["eps", "x0", "v", "velocity", "F"] = key("eps")
    variance: Literal["learned_range", "fixed_small", "fixed_large", "none", "unused"] = key(
        "learned_range"
    )
    # 'hybrid', 'simple', 'vlb', 'meanflow', 'meanflow_v', 'regression' or the dotted name of your
    # own function
    loss: str = key("hybrid", registered(LOSS_REGISTRY))
    weighting: Literal[
        "none", "eps", "x0", "velocity", "min_snr", "p2", "edm", "sigmoid", "likelihood"
    ] = key("none")
    weighting_gamma: float = key(5.0, above(0), used_if=("weighting", ("min_snr", "p2")))
    weighting_bias: float = key(1.0, used_if=("weighting", ("sigmoid",)))
    # the loss of each level of noise is divided by what is learned of its size (EDM2)
    uncertainty: bool = key(False)
    time: Literal["uniform", "logit_normal", "mode", "cosmap"] = key("uniform")
    time_mean: float = key(0.0, used_if=("time", ("logit_normal",)))
    time_std: float = key(1.0, above(0), used_if=("time", ("logit_normal",)))
    time_mode: float = key(1.29, between(-1, 1.75), used_if=("time", ("mode",)))  # s
    time_stratified: bool = key(False)
    time_shift: float = key(1.0, above(0))
    time_most: float = key(1.0, above(0), at_most(1))
    # the network is given time_scale * t
    time_scale: float = key(1000.0, above(0), used_if=_CONTINUOUS)
    # the network's time and velocity run from noise to data
    time_from_noise: bool = key(False, used_if=("process", ("flow", "gvp", "vp")))
    # bounds a flow's velocity near the data
    t_eps: float = key(0.0, between(0, 0.5), used_if=("process", ("flow",)))
    sigma_data: float = key(0.5, above(0))  # of the data: EDM's
    sigma_min: float = key(0.002, above(0), used_if=_OF_EDM)
    sigma_max: float = key(80.0, above(0), used_if=_OF_EDM)
    # Of MeanFlow: the share of examples with r < t, and ω and κ of the velocity that is learned
    interval_share: float = key(0.25, between(0, 1), used_if=_OF_MEANFLOW)
    target_omega: float = key(1.0, above(0), used_if=_OF_MEANFLOW)
    target_kappa: float = key(0.0, FRACTION, used_if=_OF_MEANFLOW)
    # an example whose squared error is e weighs 1/(e + adaptive_offset)^adaptive_power
    adaptive_power: float = key(1.0, at_least(0), used_if=_OF_MEANFLOW)
    adaptive_offset: float = key(0.01, above(0), used_if=_OF_MEANFLOW)

    def check(self, c: Config) -> None:
        given = (name for name, value in vars(Diffusion()).items() if getattr(self, name) != value)
        check_used(c, (f"diffusion.{name}" for name in given))
        _check_required(self)
        if self.process == "ddpm":
            _check_discrete(self)
        elif self.loss in ("hybrid", "vlb") or self.variance not in ("none", "unused"):
            raise UserError(
                f"config.diffusion.process is {self.process!r}, which has no variational bound and"
                f" no variance, and config.diffusion has loss {self.loss!r} and variance"
                f" {self.variance!r}: set loss 'simple' and variance 'none'."
            )
        if self.uncertainty and self.loss != "simple":
            raise UserError(
                f"config.diffusion.uncertainty with loss {self.loss!r}: it weighs one squared error"
                " by its level of noise; set loss 'simple', or leave it out."
            )
        if self.sigma_min >= self.sigma_max:
            raise UserError(
                f"config.diffusion.sigma_min is {self.sigma_min} and sigma_max {self.sigma_max}:"
                " expected a smaller sigma_min."
            )
        made = process_of(self)
        process.check_prediction(made, self.prediction)
        check_weighting(made, self.weighting)


def training_loss(d: Diffusion) -> Loss:
    """The training objective of a recipe. A plain function, such as your own, reads no keys."""
    found = lookup(d.loss, LOSS_REGISTRY)
    return found if isinstance(found, Loss) else Loss(found)


def loss_options(d: Diffusion) -> dict[str, Any]:
    """The keys that the recipe's objective reads."""
    return {name: getattr(d, name) for name in training_loss(d).options}


def _check_required(d: Diffusion) -> None:
    """Raise UserError for keys without which the objective has no meaning."""
    required = training_loss(d).requires
    found = {name: getattr(d, name) for name in required if getattr(d, name) != required[name]}
    if found:
        raise UserError(
            f"config.diffusion.loss is {d.loss!r} with {_listed(found)}: expected"
            f" {_listed({name: required[name] for name in found})}."
        )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())


def _check_discrete(d: Diffusion) -> None:
    if d.schedule == "linear" and d.timesteps <= 20:
        raise UserError(
            f"config.diffusion.timesteps is {d.timesteps}: the linear schedule needs at"
            " least 21; set more, or config.diffusion.schedule to 'cosine'."
        )
    if d.loss == "hybrid" and d.variance != "learned_range":
        raise UserError(
            f"config.diffusion.loss is 'hybrid' with variance {d.variance!r}: L_vlb would"
            " train nothing. Set variance 'learned_range', or loss 'simple'."
        )
    if d.loss == "simple" and d.variance == "learned_range":
        raise UserError(
            "config.diffusion.loss is 'simple' with variance 'learned_range': nothing would"
            " train the variance. Set loss 'hybrid', or variance 'fixed_small'."
        )
    if d.variance in ("none", "unused"):
        raise UserError(
            f"config.diffusion.variance is {d.variance!r} with process 'ddpm', whose steps have"
            " one: set it to 'learned_range', 'fixed_small' or 'fixed_large'."
        )


def process_of(d: Diffusion) -> Process:
    """The process of a recipe."""
    if d.process == "ddpm":
        return Discrete(make_schedule(d.schedule, d.timesteps))
    if d.process == "edm":
        return process.EDM(d.time_scale, d.sigma_data, d.sigma_min, d.sigma_max)
    return process.SCALED[d.process](d.time_scale, d.time_from_noise)


def objective_of(c: Config) -> Objective:
    """The process of a recipe, what its network predicts of it, and how errors are weighted."""
    d = c.diffusion
    weighting = Weighting(d.weighting, d.weighting_gamma, d.weighting_bias, d.sigma_data, d.t_eps)
    return Objective(process_of(d), d.prediction, d.variance, weighting, d.t_eps)


def time_draw(d: Diffusion) -> Any:
    """Build the draw of training times: (key, batch) -> {"t": f32[B], or i32[B] for DDPM}.

    The losses of intervals have r f32[B], too.
    """
    made = process_of(d)
    shape = (d.time_mean, d.time_std, d.time_mode)
    times = Times(d.time, *shape, d.time_stratified, d.time_shift, d.time_most)

    def drawn(key: jax.Array, batch: int) -> dict[str, jax.Array]:
        if not training_loss(d).interval:
            return {"t": draw_times(times, made, key, batch)}
        t, r = draw_intervals(times, made, key, batch, d.interval_share)
        return {"t": t, "r": r}

    return drawn


def sampler_of(c: Config) -> Sampler:
    """The sampler of a recipe."""
    sampler: Sampler = lookup(c.sample.sampler, SAMPLER_REGISTRY)
    return sampler


def options_of(c: Config) -> dict[str, Any]:
    """The options that the recipe's sampler reads."""
    return {name: getattr(c.sample, name) for name in sampler_of(c).options}


def times_of(c: Config) -> np.ndarray:
    """The times of the recipe's sampler, from noise to data -> f64[n + 1]."""
    s = c.sample
    return grids.grid_times(
        process_of(c.diffusion),
        s.steps,
        prediction=c.diffusion.prediction,
        grid=s.grid,
        rho=s.rho,
        shift=s.shift,
        last_step=s.last_step,
    )


def guided_denoiser(c: Config, pair: DenoisePair, scale: jax.typing.ArrayLike) -> Denoise:
    """The denoiser that a recipe makes of two predictions, by config.sample.cfg_rule."""
    s, process, prediction = c.sample, process_of(c.diffusion), c.diffusion.prediction

    def coefficients(timesteps: jax.Array) -> tuple[jax.Array, ...]:
        p = precondition(process, prediction, process.time_of_noise(timesteps))
        return tuple(per_sample(each, 4) for each in (p.c_in, p.c_skip, p.c_out))

    def combined(along: bool, rule: Any) -> Denoise:
        make: Any = guide_along if along else guide
        channels = {"channels": s.cfg_channels, "x_channels": c.input_channels}
        denoise: Denoise = make(pair, scale, **channels, rule=rule)
        return denoise

    if s.cfg_rule == "apg" and s.apg_momentum:
        return combined(True, projected_along(s.apg_momentum, s.apg_eta, s.apg_norm, coefficients))
    rules: dict[str, GuidanceRule] = {
        "cfg": classifier_free,
        "rescale": rescaled(s.cfg_rescale),
        "apg": projected(s.apg_eta, s.apg_norm, coefficients),
        "zero": zero_star,
    }
    denoise = combined(False, rules[s.cfg_rule])
    if s.cfg_rule == "zero" and s.zero_steps:
        first = float(times_of(c)[s.zero_steps])
        return zero_above(denoise, first, process.time_of_noise)
    return denoise


def _check_guidance(c: Config, steps: int) -> None:
    s = c.sample
    if sampler_of(c).adaptive and s.cfg_scale != 1 and s.cfg_interval != (0.0, 1.0):
        raise UserError(
            f"config.sample.sampler is {s.sampler!r} and cfg_interval {s.cfg_interval}: its samples"
            " are at different times, so that no step is inside for all; guide every step."
        )
    if sampler_of(c).adaptive and s.cfg_scale != 1 and s.cfg_rule == "apg" and s.apg_momentum:
        raise UserError(
            f"config.sample.sampler is {s.sampler!r} and apg_momentum {s.apg_momentum}: it repeats"
            " steps that it refuses, so that the momentum has no order; set it to 0."
        )
    if s.cfg_rule == "zero" and c.diffusion.prediction != "velocity":
        raise UserError(
            "config.sample.cfg_rule is 'zero' and config.diffusion.prediction"
            f" {c.diffusion.prediction!r}: it is a rule for velocities; choose another."
        )
    if s.cfg_rule == "zero" and s.zero_steps >= steps:
        raise UserError(
            f"config.sample.zero_steps is {s.zero_steps} of {steps} steps: expected"
            " fewer, as a step that does not move draws nothing."
        )


# Fields of config.sample that a protocol records only where they differ from the default, so that
# protocols of old results keep their hashes.
_NEW_FIELDS = ("grid", "rho", "shift", "last_step")


def protocol_of(c: Config) -> dict[str, Any]:
    """What the sampler and its grid add to a sampling protocol."""
    options, defaults = options_of(c), Sample()
    found = {"eta": options.pop("eta", None)}
    options |= {name: getattr(c.sample, name) for name in _NEW_FIELDS}
    if c.sample.cfg_scale != 1 and c.sample.cfg_rule != "cfg":
        # Other than cfg's, these rules are not the same in every space.
        found |= {"cfg_rule": c.sample.cfg_rule, "cfg_space": c.diffusion.prediction}
        names = ("cfg_rescale", "apg_eta", "apg_norm", "zero_steps")
        found |= {k: getattr(c.sample, k) for k in names if not c.sample.unused(k, c)}
        options |= {"apg_momentum": c.sample.apg_momentum} if c.sample.cfg_rule == "apg" else {}
    return found | {k: v for k, v in options.items() if v != getattr(defaults, k)}


def _check_intervals(c: Config) -> None:
    """Raise UserError for what a sampler of average velocities cannot use."""
    said = f"config.sample.sampler is {c.sample.sampler!r}, which draws by average velocities"
    if not training_loss(c.diffusion).interval:
        raise UserError(
            f"{said}, and config.diffusion.loss is {c.diffusion.loss!r}, which trains none: choose"
            " another sampler, such as 'euler', or loss 'meanflow'."
        )
    scales = {
        "sample.cfg_scale": c.sample.cfg_scale,
        "evaluate.guided_scale": c.evaluate.guided_scale or 1.0,
    }
    for name, scale in scales.items():
        if scale != 1:
            raise UserError(
                f"{said}, and config.{name} is {scale}: these are guided in training, by"
                " config.diffusion.target_omega and target_kappa; set the scale to 1, or choose"
                " another sampler, such as 'euler'."
            )


def validation_target(d: Diffusion) -> str:
    """What a validation loss is the error of: losses of different targets are not comparable."""
    below = "" if d.time_most == 1 else f", times below {d.time_most:g}"
    if d.process == "ddpm":
        return f"{d.prediction}, {d.schedule}, {d.timesteps} steps{below}"
    scale = f" {d.sigma_min:g} to {d.sigma_max:g} of {d.sigma_data:g}" if d.process == "edm" else ""
    return f"{d.prediction}, {d.process}{scale}{below}"


def check_sampling(c: Config) -> None:
    """Raise UserError for a sampler, grid and options that do not go together."""
    s, defaults, sampler = c.sample, Sample(), sampler_of(c)
    times = times_of(c)  # raises here rather than at the first sample grid, hours later
    made = process_of(c.diffusion)
    discrete = isinstance(made, Discrete)
    if sampler.discrete and not (discrete and not s.grid):
        on = f" on grid {s.grid!r}" if s.grid else ""
        raise UserError(
            f"config.sample.sampler is {s.sampler!r} and config.diffusion.process"
            f" {c.diffusion.process!r}{on}: it needs process 'ddpm' on its own grid; choose"
            " another sampler, such as 'ddim' or 'dpmpp_2m'."
        )
    if sampler.derivatives and discrete:
        raise UserError(
            f"config.sample.sampler is {s.sampler!r}, which integrates dx/dt, and process 'ddpm'"
            " has no derivative by t: choose another, such as 'ddim', 'dpmpp_2m' or 'edm'."
        )
    grid = s.grid or made.grid
    for name, reader in (("rho", "karras"), ("last_step", "uniform")):
        if getattr(s, name) != getattr(defaults, name) and grid != reader:
            raise UserError(
                f"config.sample.{name} is {getattr(s, name)}, which only the grid {reader!r}"
                " reads: leave it out."
            )
    _check_guidance(c, len(times) - 1)
    if sampler.interval:
        _check_intervals(c)
    if sampler.blind != training_loss(c.diffusion).blind:
        raise UserError(
            f"config.sample.sampler is {s.sampler!r} and config.diffusion.loss"
            f" {c.diffusion.loss!r}: a network that estimates x0 without x is trained by"
            " 'regression' and drawn by 'regression'; set both, or neither."
        )
    if c.evaluate.bpd_num and (discrete or c.latent):
        reason = "latents have no density of pixels" if c.latent else "process 'ddpm' has no ODE"
        raise UserError(
            f"config.evaluate.bpd_num is {c.evaluate.bpd_num}, and {reason}: set it to 0."
        )
    if sampler.check:
        sampler.check(made, times, **options_of(c))
