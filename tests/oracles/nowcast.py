"""pysteps' scores of forecasts, on the fields of `tests.rain`, and goldens."""

import numpy as np
import torch
from pysteps.verification.detcatscores import det_cat_fct
from pysteps.verification.probscores import CRPS

from tests import rain

PACKAGES = ("pysteps", "earthformer", "torch", "numpy")
SCORES = ("CSI", "POD", "FAR", "BIAS")


def contingency_scores(forecast: np.ndarray, observed: np.ndarray, threshold: int) -> np.ndarray:
    """CSI, POD, FAR and bias f64[4, T]; events are above the threshold, ours at or above it."""
    leads = range(forecast.shape[1])
    each = [det_cat_fct(forecast[:, t], observed[:, t], threshold - 0.5, SCORES) for t in leads]
    return np.array([[found[name] for found in each] for name in SCORES])


def crps(members: np.ndarray, observed: np.ndarray) -> float:
    """The mean over all points of members [M, ..]."""
    return float(CRPS(members.astype(np.float64), observed.astype(np.float64)))


def goldens() -> dict[str, np.ndarray]:
    """The arrays of tests/goldens/nowcast.npz."""
    forecast, observed = rain.fields()
    found = {f"scores_{t}": contingency_scores(forecast, observed, t) for t in rain.THRESHOLDS}
    members, truth = rain.untied()
    found["crps"] = np.array(crps(members, truth))
    return found | cuboid_goldens()


def cuboid_layer(case: rain.CuboidCase) -> torch.nn.Module:
    """Earthformer's layer with the seeded weights of a case."""
    from earthformer.cuboid_transformer import cuboid_transformer as theirs

    options = {"norm_layer": "layer_norm", "use_global_vector": case.globals > 0}
    if case.memory:
        layer = theirs.CuboidCrossAttentionLayer(
            *(rain.WIDTH, rain.HEADS),
            n_temporal=1,
            cuboid_hw=(1, 1),
            qkv_bias=True,
            use_relative_pos=False,
            **options,
        )
    else:
        layer = theirs.CuboidSelfAttentionLayer(
            rain.WIDTH,
            rain.HEADS,
            case.cuboid,
            case.shift,
            tuple(case.strategy),
            padding_type="ignore",
            qkv_bias=True,
            use_global_self_attn=case.globals > 0,
            separate_global_qkv=case.separate,
            **options,
        )
    state = layer.state_dict()
    floats = {name: tuple(x.shape) for name, x in state.items() if x.is_floating_point()}
    for name, value in rain.cuboid_weights(floats).items():
        state[name] = torch.from_numpy(value)
    layer.load_state_dict(state)
    return layer.eval()


@torch.no_grad()
def cuboid_goldens() -> dict[str, np.ndarray]:
    """Names and shapes of the weights, and outputs, of every case."""
    found = {}
    for name, case in rain.CUBOIDS.items():
        x, extra = (torch.from_numpy(each) for each in rain.cuboid_inputs(case))
        layer = cuboid_layer(case)
        if case.memory:
            out = (layer(x, extra),)
        else:
            out = layer(x, extra) if case.globals else (layer(x),)
        for i, each in enumerate(out):
            found[f"{name}/{i}"] = each.numpy()
    return found
