"""Adapters beside peft on diffusers' DiT: outputs, gradients, and files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training.transforms import merged_factors
from ditjax.weights import reading
from ditjax.weights.adapters import factors_of, read_adapter, write_lora_file, write_peft
from tests.adapter_files import factor_gradients
from tests.oracles import adapters, networks
from tests.oracles.test_networks import apply_dit, nhwc, relative

FILE = "adapter_model.safetensors"
RELEASE_TARGETS = ["qkv", "proj", "fc1", "fc2", "adaLN_modulation.1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    networks.dit(networks.SMALL_DIT).save_pretrained(folder)
    return reading.load_network(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "rank_pattern": {}},
        {"target_modules": ["to_q"], "layers_to_transform": [1], "lora_dropout": 0.5}
        | {"layers_pattern": "transformer_blocks"},
    ],
    ids=["patterns", "rslora", "part"],
)
def test_outputs(base, changes, tmp_path):
    """Factored and merged: within 2e-5 of the largest value."""
    theirs = adapters.adapted(**changes)
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    factors = unflatten(factors_of([(adapter, 1.0)], base.shapes, "blocks"))
    inputs, expected = networks.dit_inputs(networks.SMALL_DIT), adapters.output(theirs)
    plain = apply_dit(base, *inputs)
    assert relative(plain, expected) > 0.05, "an adapter that does nothing compares with anything"
    merged = base._replace(params={"params": merged_factors(base.params["params"], factors)})
    factored = base._replace(params={**base.params, "lora": factors})
    for network in (merged, factored):
        assert relative(apply_dit(network, *inputs), expected) < 2e-5


def test_gradients_of_the_factors(base, tmp_path):
    """Of one step on the mean square of the output: within 1e-4 of each one's largest value."""
    theirs = adapters.adapted()
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    x, t, y = networks.dit_inputs(networks.SMALL_DIT)
    model, labels = denoiser_module(base.config), Conditions(label=jnp.asarray(y))

    def loss(factors):
        params = {**base.params, "lora": factors}
        return (model.apply(params, jnp.asarray(nhwc(x)), jnp.asarray(t), labels) ** 2).mean()

    factors = unflatten(factors_of([(adapter, 1.0)], base.shapes, "blocks"))
    found = factor_gradients(adapter, jax.jit(jax.grad(loss))(factors))
    expected = adapters.gradients(theirs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 1e-4, name


def loaded(network: nn.Module, folder) -> PeftModel:
    """peft's own loading, which says what it misses and what it does not know."""
    model = get_peft_model(network, LoraConfig.from_pretrained(folder))
    result = model.load_adapter(str(folder), "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


def test_peft_loads_our_folder(base, tmp_path):
    """And computes with it what it computed: the same tensors, the same bits."""
    theirs = adapters.adapted()
    theirs.save_pretrained(tmp_path / "theirs")
    write_peft(tmp_path / "ours", read_adapter(tmp_path / "theirs"))
    a, b = (load_file(tmp_path / folder / FILE) for folder in ("theirs", "ours"))
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    again = loaded(networks.dit(networks.SMALL_DIT), tmp_path / "ours")
    np.testing.assert_array_equal(adapters.output(again), adapters.output(theirs))
    whole = PeftModel.from_pretrained(networks.dit(networks.SMALL_DIT), tmp_path / "ours").eval()
    np.testing.assert_array_equal(adapters.output(whole), adapters.output(theirs))


def test_diffusers_loads_our_file_and_we_its(base, tmp_path):
    theirs = networks.seeded_network(adapters.AdaptedDiT(**networks.SMALL_DIT))
    theirs.add_adapter(LoraConfig(**adapters.stated()))
    adapters.seed_factors(theirs)
    theirs.save_lora_adapter(tmp_path / "theirs")
    expected = adapters.output(theirs)
    np.testing.assert_array_equal(expected, adapters.output(adapters.adapted()))
    adapter = read_adapter(tmp_path / "theirs")
    write_lora_file(tmp_path / "pytorch_lora_weights.safetensors", adapter)
    for more in ({}, {"use_safetensors": True}):  # which alone reads alpha
        again = networks.seeded_network(adapters.AdaptedDiT(**networks.SMALL_DIT))
        again.load_lora_adapter(str(tmp_path / "pytorch_lora_weights.safetensors"), **more)
        assert relative(adapters.output(again), expected) < 1e-6


class Block(nn.Module):
    """The linear layers of a block of the release, by their names there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class Release(nn.Module):
    """What peft sees of the release's network: its code is on no package index."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))


def test_peft_loads_the_names_of_the_release(base, tmp_path):
    """Its merged matrices are ours, q, k and v in one."""
    theirs = adapters.adapted(target_modules=adapters.TARGETS)
    theirs.save_pretrained(tmp_path / "theirs")
    write_peft(tmp_path / "ours", read_adapter(tmp_path / "theirs"), "release")
    model = loaded(Release(), tmp_path / "ours")
    for i in range(2):
        ours, *split = (
            network.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
            for network, name in (
                (model, f"blocks.{i}.attn.qkv"),
                *((theirs, f"transformer_blocks.{i}.attn1.to_{x}") for x in "qkv"),
            )
        )
        expected = torch.cat(split).detach().numpy()
        assert relative(ours.detach().numpy(), expected) < 1e-6


def test_a_folder_of_peft_for_the_release_is_split(tmp_path):
    """peft on the release's names: what it writes is read as three projections with one A."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=RELEASE_TARGETS, init_lora_weights=False)
    get_peft_model(Release(), config).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.layout == "release"
    a, b = (
        load_file(tmp_path / FILE)[f"base_model.model.blocks.1.attn.qkv.lora_{half}.weight"].numpy()
        for half in "AB"
    )
    for (layer, block, k), module in adapter.modules.items():
        if (layer, block) == ("blocks/attn/qkv", 1):
            np.testing.assert_array_equal(module.a, a)
            np.testing.assert_array_equal(module.b, b[48 * k : 48 * (k + 1)])


def test_diffusers_own_class_still_lacks_these_files():
    assert not hasattr(DiTTransformer2DModel, "load_lora_adapter"), "then AdaptedDiT is needless"
