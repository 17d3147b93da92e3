"""diffusers' DDPM and DDIM schedulers, run on the network and noise of `tests.trajectories`."""

from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from tests.trajectories import CASES, SHAPE, Case, network, noise, snapshots

PACKAGES = ("torch", "diffusers", "numpy")
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def alphas_bar(beta_schedule: str) -> np.ndarray:
    """alphas_cumprod f32[1000] of diffusers' 'linear' or 'squaredcos_cap_v2'."""
    return DDPMScheduler(1000, beta_schedule=beta_schedule).alphas_cumprod.numpy()


def scheduler(case: Case, double: bool = False, **changes: Any) -> DDPMScheduler | DDIMScheduler:
    """The scheduler that is to do what our sampler does, but for changes to its configuration.

    Our '250' has both ends, diffusers' 'linspace'; our 'ddim50' starts at 0, its 'leading'.
    double: ᾱ in float64, as ours is, instead of diffusers' float32.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "prediction_type": PREDICTION[case.prediction],
        "clip_sample": case.clip_x0,
        "steps_offset": 0,
        "timestep_spacing": "leading" if case.spec.startswith("ddim") else "linspace",
    }
    made: DDPMScheduler | DDIMScheduler
    if case.sampler == "ddpm":
        made = DDPMScheduler(**(common | {"variance_type": case.variance} | changes))
    else:
        made = DDIMScheduler(**(common | {"set_alpha_to_one": True} | changes))
    if double:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        made.alphas_cumprod = torch.cumprod(1 - betas, 0)
    made.set_timesteps(int(case.spec.removeprefix("ddim")))
    return made


def trajectory(
    case: Case, made: DDPMScheduler | DDIMScheduler, rederive_eps: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """x_t f32[S+1,B,H,W,C] from x_T to x0, and the network's timesteps i64[S].

    rederive_eps: DDIM's ε agrees with a clipped x0, which diffusers does only when asked.
    """
    steps = len(made.timesteps)
    z = torch.from_numpy(noise(steps)).permute(0, 1, 4, 2, 3).contiguous()
    x = [z[-1]]
    for i, t in enumerate(made.timesteps):
        last = x[-1].permute(0, 2, 3, 1)
        out = network(torch, case.prediction, last, torch.full((SHAPE[0],), int(t)))
        out = out.permute(0, 3, 1, 2)
        if case.variance != "learned_range" or case.sampler == "ddim":
            out = out[:, : SHAPE[-1]]  # diffusers splits channels for a learned variance only
        if isinstance(made, DDIMScheduler):
            new = made.step(
                out,
                t,
                x[-1],
                eta=case.eta,
                use_clipped_model_output=rederive_eps,
                variance_noise=z[i] if case.eta else None,
            ).prev_sample
        else:
            with mock.patch.object(scheduling_ddpm, "randn_tensor", _given(z[i])):
                new = made.step(out, t, x[-1]).prev_sample
        x.append(new)
    return torch.stack(x).permute(0, 1, 3, 4, 2).numpy(), made.timesteps.numpy()


def _given(z: torch.Tensor) -> Any:
    """A stand-in for diffusers' own draw, which takes no noise from outside in DDPM's step."""

    def draw(shape: torch.Size, **options: Any) -> torch.Tensor:
        assert shape == z.shape
        return z

    return draw


def goldens() -> dict[str, np.ndarray]:
    """Snapshots of every case's trajectory, its timesteps, and two tables of ᾱ."""
    arrays = {f"alphas_bar-{name}": alphas_bar(name) for name in ("linear", "squaredcos_cap_v2")}
    for case in CASES:
        x, timesteps = trajectory(case, scheduler(case))
        arrays[case.name] = snapshots(x)
        arrays[f"{case.name}-timesteps"] = timesteps.astype(np.int32)
    return arrays
