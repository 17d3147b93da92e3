"""diffusers' and k-diffusion's solvers, run on the denoiser and noise of `tests.solver_cases`."""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from ditjax.diffusion.schedule import make_schedule
from ditjax.diffusion.solvers import SAMPLERS
from tests.solver_cases import (
    CASES,
    STEPS,
    SolverCase,
    clean,
    process_of_case,
    step_noise,
    target,
    times_of_case,
)

PACKAGES = ("torch", "diffusers", "k-diffusion", "numpy")
PREDICTION = {"eps": "epsilon", "v": "v_prediction"}


def _k_diffusion_sampling() -> Any:
    """k_diffusion.sampling alone: the package imports its trainer, and its utils torchvision."""
    spec = find_spec("k_diffusion")
    assert spec
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or ())
    stubs = {f"torchvision{rest}": mock.MagicMock() for rest in ("", ".transforms")}
    with mock.patch.dict(sys.modules, {"k_diffusion": package, **stubs}):
        return importlib.import_module("k_diffusion.sampling")


sampling = _k_diffusion_sampling()


def theirs(case: SolverCase) -> np.ndarray:
    """The public solver's x0 f32[B,H,W,C]."""
    z = torch.from_numpy(step_noise())
    if case.theirs.startswith("sample_"):
        return _k_diffusion(case, z).numpy()
    return {"ddpm": _ddpm, "flow": _flow, "edm": _edm}[case.process](case, z).numpy()


def _k_diffusion(case: SolverCase, z: torch.Tensor) -> torch.Tensor:
    sigmas = torch.from_numpy(times_of_case(case)).float()
    x = 80 * z[-1]

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = clean(torch, x, 1.0, float(sigma[0]))
        return found

    given = iter(z[:-1])
    if case.theirs == "sample_heun":
        names = {"s_churn": "s_churn", "s_min": "s_tmin", "s_max": "s_tmax", "s_noise": "s_noise"}
        churn = {names[key]: value for key, value in case.options}
        with mock.patch.object(torch, "randn_like", side_effect=given):
            found: torch.Tensor = sampling.sample_heun(model, x, sigmas, disable=True, **churn)
        return found
    options: dict[str, Any] = {"disable": True}
    if case.theirs == "sample_dpmpp_2m_sde":
        # Its own noise is a Brownian tree.
        options |= {"noise_sampler": lambda *args: next(given), "solver_type": "midpoint"}
    solve: Callable[..., torch.Tensor] = getattr(sampling, case.theirs)
    return solve(model, x, sigmas, **options)


def _loop(scheduler: Any, x: torch.Tensor, predicted: Any) -> torch.Tensor:
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predicted(scaled, t, x), t, x, return_dict=False)[0]
    return x


def _ddpm(case: SolverCase, z: torch.Tensor) -> torch.Tensor:
    kind = getattr(diffusers, f"{case.theirs}Scheduler")
    options: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": PREDICTION[case.prediction],
    }
    variance_exploding = case.theirs in ("EulerDiscrete", "HeunDiscrete")
    if not variance_exploding:
        options |= {"final_sigmas_type": "zero", "solver_order": dict(case.options).get("order", 2)}
    made = kind(**options)
    bar = make_schedule("linear").alphas_bar
    made.set_timesteps(STEPS)
    # Our times, in float64: diffusers' own tables are float32, and its spacing another.
    times = SAMPLERS[case.sampler].evaluated(process_of_case(case), times_of_case(case))
    c = process_of_case(case).at(times)
    made.sigmas = torch.from_numpy(np.append(c.sigma / c.alpha, 0.0)).float()
    kind_of_time = np.float32 if case.theirs == "EulerDiscrete" else np.int64
    made.timesteps = torch.from_numpy(np.rint(times).astype(kind_of_time))
    ratio = np.sqrt(1 / bar - 1)

    def predicted(scaled: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        alpha, sigma = float(np.sqrt(bar[int(t)])), float(np.sqrt(1 - bar[int(t)]))
        found: torch.Tensor = target(torch, case, scaled, alpha, sigma)
        return found

    x = z[-1]
    if variance_exploding:
        x = x * float(np.sqrt(ratio[999] ** 2 + 1))
    return _loop(made, x, predicted)


def _flow(case: SolverCase, z: torch.Tensor) -> torch.Tensor:
    kind = getattr(diffusers, f"{case.theirs}DiscreteScheduler")
    made = kind(num_train_timesteps=1000, shift=1.0)
    sigmas = times_of_case(case)[:-1]
    if case.theirs == "FlowMatchEuler":
        made.set_timesteps(sigmas=sigmas)
    else:
        made.set_timesteps(len(sigmas))
        every = torch.from_numpy(np.append(sigmas, 0.0)).float()
        inner = every[1:-1].repeat_interleave(2)
        made.sigmas = torch.cat([every[:1], inner, every[-1:]])
        made.timesteps = made.sigmas[:-1] * 1000

    def predicted(scaled: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sigma = float(t) / 1000
        found: torch.Tensor = target(torch, case, x, 1 - sigma, sigma)
        return found

    return _loop(made, z[-1], predicted)


def _edm(case: SolverCase, z: torch.Tensor) -> torch.Tensor:
    kind = getattr(diffusers, f"{case.theirs}Scheduler")
    made = kind(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    made.set_timesteps(25)
    sigmas = times_of_case(case)[:-1]
    k = iter(range(len(sigmas)))

    def predicted(scaled: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = target(torch, case, x, 1.0, float(made.sigmas[next(k)]))
        return found

    return _loop(made, 80 * z[-1], predicted)


def goldens() -> dict[str, np.ndarray]:
    """Every case's x0."""
    return {case.name: theirs(case) for case in CASES}
