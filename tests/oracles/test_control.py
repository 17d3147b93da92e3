"""The two forms of a control branch beside their loops in PyTorch, with the blocks of diffusers.

`SD3ControlNetModel` has other blocks, and PixArt-δ's class is not in the wheel: the loops are
written here, as in `transformer_sd3.py` of diffusers 0.42.1 and in its pixart research project.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ditjax.models.dit import NETWORK
from ditjax.models.embed import ANYWHERE
from ditjax.models.network import Branch, Conditions
from ditjax.tasks.diffusion import denoiser_module, inputs_of
from ditjax.weights import reading
from tests.oracles import networks
from tests.oracles.test_networks import nhwc, relative
from tests.seeded import seeded_state

CONFIG = {**networks.SMALL_DIT, "num_layers": 4}
N, D, P, SCALE = 3, 48, 4, 0.7


def block(module: Any, h: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return module(h, timestep=t, class_labels=y)


def their_output(
    net: Any, copies: list[Any], zero: dict[str, Any], form: str, inputs: Any
) -> np.ndarray:
    """The controlled prediction, [B,2C,H,W]."""
    x, t, y, control = inputs
    blocks = net.transformer_blocks
    h, residuals = net.pos_embed(x), []
    if form == "sd3":
        h = h + zero["in"](control).flatten(2).transpose(1, 2)
    else:
        h = block(blocks[0], h, t, y) + zero["in"](net.pos_embed(control))
    for each, out in zip(copies, zero["out"], strict=True):
        h = block(each, h, t, y)
        residuals.append(SCALE * out(h))

    def after(j: int) -> Any:  # transformer_sd3.py
        interval = len(blocks) / len(residuals)
        return lambda module, args, h: h + residuals[int(j / interval)]

    def before(i: int) -> Any:  # pixart: before block i of 1 to N
        return lambda module, args: (args[0] + residuals[i - 1], *args[1:])

    if form == "sd3":
        hooks = [each.register_forward_hook(after(j)) for j, each in enumerate(blocks)]
    else:
        hooks = [blocks[i].register_forward_pre_hook(before(i)) for i in range(1, N + 1)]
    found: np.ndarray = net(x, t, y).sample.numpy()
    for hook in hooks:
        hook.remove()
    return found


def linear(kernel: np.ndarray, bias: np.ndarray) -> torch.nn.Linear:
    made = torch.nn.Linear(*kernel.shape)
    made.load_state_dict({"weight": torch.tensor(kernel.T), "bias": torch.tensor(bias)})
    return made


def convolution(kernel: np.ndarray, bias: np.ndarray) -> torch.nn.Conv2d:
    """A patch embedding [p p K, D], the channel fastest, as a convolution."""
    K = len(kernel) // P**2
    made = torch.nn.Conv2d(K, D, P, P)
    weight = kernel.reshape(P, P, K, D).transpose(3, 2, 0, 1)
    made.load_state_dict({"weight": torch.tensor(weight.copy()), "bias": torch.tensor(bias)})
    return made


@pytest.mark.parametrize(("form", "K"), [("sd3", 3), ("pixart", 4)])
def test_a_controlled_prediction_is_that_of_the_loop_in_pytorch(form, K, tmp_path, monkeypatch):
    base = networks.dit(CONFIG)
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(networks, "SEED", 1)
    other = networks.dit(CONFIG)  # whose blocks are the copies, so that they are not the base's
    other.save_pretrained(tmp_path / "other")
    copies = [copy.deepcopy(each) for each in other.transformer_blocks[:N]]
    for each in copies:
        each.norm1.emb = base.transformer_blocks[0].norm1.emb
    features = D if form == "pixart" else P * P * K
    shapes = {"in/kernel": (features, D), "in/bias": (D,)}
    shapes |= {"out/kernel": (N, D, D), "out/bias": (N, D)}
    zero = seeded_state(shapes, 3)
    first = convolution if form == "sd3" else linear
    theirs = {
        "in": first(zero["in/kernel"], zero["in/bias"]),
        "out": [linear(zero["out/kernel"][i], zero["out/bias"][i]) for i in range(N)],
    }
    x, t, y = networks.dit_inputs(CONFIG)
    control = np.random.default_rng(4).standard_normal((3, K, 16, 16)).astype(np.float32)
    with torch.no_grad():
        given = [torch.from_numpy(each) for each in (x, t, y, control)]
        expected = their_output(base, copies, theirs, form, given)
        plain = networks.dit_output(base, CONFIG)

    network = reading.load_network(tmp_path / "base")
    blocks = reading.load_network(tmp_path / "other").params["params"]["blocks"]
    ours = {
        "in": {"kernel": zero["in/kernel"], "bias": zero["in/bias"]},
        "copies": {
            "block": jax.tree.map(lambda leaf: leaf[:N], blocks),
            "out": {"kernel": zero["out/kernel"], "bias": zero["out/bias"]},
        },
    }
    c, branch = network.config, Branch(N, form, (16, 16, K))
    seam: Any = NETWORK.control
    module = seam.module(c.model, inputs_of(c), branch, ANYWHERE)
    label, image = jnp.asarray(y), jnp.asarray(nhwc(control))
    args = (jnp.asarray(nhwc(x)), jnp.asarray(t))
    params = network.params["params"]
    known = seam.variables(params, ours)
    residuals: Any = module.apply(known, *args, Conditions(label=label, channels=image))
    main: Any = denoiser_module(c).clone(hook=lambda tokens, residual: tokens + residual)
    out = main.apply({"params": params}, *args, Conditions(label=label), SCALE * residuals)
    found = np.asarray(out).transpose(0, 3, 1, 2)
    assert relative(found, expected) < 2e-5
    assert relative(expected, plain) > 0.05
