"""FID's Inception as torch-fidelity and pytorch-fid run it, and its golden file."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator, Mapping
from unittest import mock

import numpy as np
import torch

from tests.seeded import seeded_images, seeded_state

PACKAGES = ("torch", "torch-fidelity", "pytorch-fid")

# ReLU halves the second moment of what enters a unit: √2 keeps activations alive to the end.
SEED, GAIN = 0, 2**0.5

# What the golden file holds: one image of each size, and every so-manyth number of each output.
TF1_SIZES = ((32, 32), (256, 256), (299, 299), (400, 400), (150, 333))
PYTORCH_FID_SIZES = ((32, 32), (256, 256), (333, 150))
POOL_STRIDE, SPATIAL_STRIDE = 4, 5


@contextlib.contextmanager
def torchvision_to_import() -> Iterator[None]:
    """torchvision or, where it does not load beside torch, names enough for imports that want it.

    Both packages import it at the top. torch-fidelity's Inception takes nothing of it;
    pytorch-fid's takes the layers of torchvision's blocks and overrides their forward. The
    stand-in gives it torch-fidelity's blocks, whose layers have the same names and shapes, so that
    preprocessing, pools and the order of blocks are still pytorch-fid's own. It leaves sys.modules
    again: other packages look there to learn whether there is a torchvision.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        yield
        return
    paths = ("datasets", "transforms", "transforms.functional", "models", "models.inception")
    modules = {path: types.ModuleType(f"torchvision.{path}") for path in paths}
    modules[""] = types.ModuleType("torchvision")
    for path in paths:
        parent, _, child = path.rpartition(".")
        setattr(modules[parent], child, modules[path])
    vars(modules[""])["__version__"] = "0.0"
    vars(modules["datasets"]).update(CIFAR10=object, CIFAR100=object, STL10=object)
    sys.modules.update({module.__name__: module for module in modules.values()})
    try:
        own = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        vars(modules["models.inception"]).update(
            InceptionA=own.InceptionA, InceptionC=own.InceptionC, InceptionE=own.InceptionE_1
        )
        vars(modules["models"])["inception_v3"] = lambda **_: torch_fidelity_network()
        yield
    finally:
        for module in modules.values():
            del sys.modules[module.__name__]


with torchvision_to_import():
    fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    pytorch_fid = importlib.import_module("pytorch_fid.inception")


def torch_fidelity_network() -> torch.nn.Module:
    """torch-fidelity's network before any weights: its constructor would download them."""
    network = fidelity.FeatureExtractorInceptionV3
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url"),
        mock.patch.object(network, "load_state_dict"),
    ):
        return network("inception-v3-compat", ["2048", "logits", "logits_unbiased"]).eval()


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published state dict, counters of batches aside."""
    state = torch_fidelity_network().state_dict()
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def _tensors(state: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in state.items()}


def _with_spatial(network: torch.nn.Module, branch: torch.nn.Module, x: torch.Tensor):
    """network(x), and the first 7 channels of a branch's output, row-major, channels last."""
    seen = []
    hook = branch.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        outputs = network(x)
    hook.remove()
    (spatial,) = seen
    return outputs, spatial[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1).numpy()


def torch_fidelity_features(
    state: Mapping[str, np.ndarray], images: np.ndarray
) -> dict[str, np.ndarray]:
    """images u8[B,H,W,3] -> pool, spatial, logits and logits_unbiased of torch-fidelity."""
    network = torch_fidelity_network()
    network.load_state_dict(_tensors(state))
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    outputs, spatial = _with_spatial(network, network.Mixed_6d.branch1x1, x)
    pool, logits, unbiased = (output.numpy() for output in outputs)
    return {"pool": pool, "spatial": spatial, "logits": logits, "logits_unbiased": unbiased}


def pytorch_fid_features(
    state: Mapping[str, np.ndarray], images: np.ndarray
) -> dict[str, np.ndarray]:
    """images u8[B,H,W,3] -> pool and spatial of pytorch-fid, which has no logits."""
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url", return_value=_tensors(state)):
        network = pytorch_fid.InceptionV3().eval()
    # Its block 2 is Mixed_5b, 5c, 5d, 6a, 6b, 6c, 6d, 6e.
    branch = network.blocks[2][6].branch1x1
    # ToTensor, as pytorch-fid reads image files.
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    (pool,), spatial = _with_spatial(network, branch, x)
    return {"pool": pool[:, :, 0, 0].numpy(), "spatial": spatial}


def goldens() -> dict[str, np.ndarray]:
    """'tf1_32x32_pool', ...: thinned outputs for seeded weights and one seeded image of a size."""
    state = seeded_state(layout(), SEED, GAIN)
    arrays = {}
    for convention, sizes, features in (
        ("tf1", TF1_SIZES, torch_fidelity_features),
        ("pytorch-fid", PYTORCH_FID_SIZES, pytorch_fid_features),
    ):
        for H, W in sizes:
            outputs = features(state, seeded_images((1, H, W, 3), H))
            outputs["pool"] = outputs["pool"][:, ::POOL_STRIDE]
            outputs["spatial"] = outputs["spatial"][:, ::SPATIAL_STRIDE]
            outputs.pop("logits_unbiased", None)
            for name, value in outputs.items():
                arrays[f"{convention}_{H}x{W}_{name}"] = value[0]
    return arrays
