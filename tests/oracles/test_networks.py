"""Our networks on the weights of diffusers' folders, beside diffusers itself."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.pipelines.dit import pipeline_dit
from safetensors.torch import load_file, save_file

from ditjax.config import changed
from ditjax.data.classes import class_names
from ditjax.diffusion import samplers
from ditjax.models.embed import sincos_position_embedding
from ditjax.models.network import Conditions
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks.autoencoder import decode_latents, encode_images, normalized
from ditjax.tasks.diffusion import denoiser_module
from ditjax.training import keys
from ditjax.weights import reading, writing
from ditjax.weights.networks import LoadedNetwork
from tests.oracles import networks

WEIGHTS = "diffusion_pytorch_model.safetensors"


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def apply_dit(network: LoadedNetwork, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> np.ndarray:
    model = denoiser_module(network.config)
    labels = Conditions(label=jnp.asarray(y))
    out = model.apply(network.params, jnp.asarray(nhwc(x)), jnp.asarray(t), labels)
    return np.asarray(out).transpose(0, 3, 1, 2)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize(("width", "side", "grid"), [(1152, 16, 0), (1152, 32, 16), (384, 12, 8)])
def test_interpolated_positions_are_diffusers(width, side, grid):
    theirs = get_2d_sincos_pos_embed(width, side, base_size=grid or side, output_type="pt")
    ours = sincos_position_embedding(width, side, side, grid)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("config", [networks.SMALL_DIT, networks.S2_DIT], ids=["small", "S/2"])
def test_dit(config, tmp_path):
    theirs = networks.dit(config)
    theirs.save_pretrained(tmp_path / "theirs")
    network = reading.load_network(tmp_path / "theirs")
    expected = networks.dit_output(theirs, config)
    assert relative(apply_dit(network, *networks.dit_inputs(config)), expected) < 1e-4

    # Its own timestep embedding is not the release's: the same weights, another function.
    release = reading.load_network(tmp_path / "theirs", numerics="release")
    assert relative(apply_dit(release, *networks.dit_inputs(config)), expected) > 0.05

    writing.write_diffusers(tmp_path / "ours", network)
    assert_same(state_of(tmp_path / "theirs"), state_of(tmp_path / "ours"))
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(networks.dit_output(again, config), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_there_and_back(dtype, tmp_path):
    networks.dit(networks.SMALL_DIT).to(dtype).save_pretrained(tmp_path / "theirs")
    writing.write_diffusers(tmp_path / "ours", reading.load_network(tmp_path / "theirs"))
    assert_same(state_of(tmp_path / "theirs"), state_of(tmp_path / "ours"))


def test_release_state_dict_loads_in_torch(tmp_path):
    networks.dit(networks.SMALL_DIT).save_pretrained(tmp_path / "theirs")
    network = reading.load_network(tmp_path / "theirs", numerics="release")
    writing.write_release(tmp_path / "dit.pt", network)
    state = torch.load(tmp_path / "dit.pt", weights_only=True)
    theirs = state_of(tmp_path / "theirs")
    qkv = [theirs[f"transformer_blocks.1.attn1.to_{n}.weight"] for n in "qkv"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"], torch.cat(qkv))
    # And what torch saves of it, wrapped as the training script does, is read back.
    torch.save({"model": state, "ema": state, "args": {"model": "x"}}, tmp_path / "checkpoint.pt")
    back = reading.load_network(tmp_path / "checkpoint.pt", heads=3)
    writing.write_diffusers(tmp_path / "back", back)
    assert_same(theirs, state_of(tmp_path / "back"))


FLUX = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@pytest.mark.parametrize(
    ("width", "levels", "side", "more"),
    [(32, 4, 64, {}), (128, 4, 64, {}), (32, 4, 64, FLUX)],
    ids=["narrow", "Stable Diffusion's", "Flux's layout"],
)
def test_autoencoder(width, levels, side, more, tmp_path):
    theirs = networks.autoencoder({**networks.autoencoder_config(width, levels, 32), **more})
    theirs.save_pretrained(tmp_path / "theirs")
    network = reading.load_network(tmp_path / "theirs")
    x = networks.image(side, side + 16)
    mean, log_variance, again = networks.autoencoder_output(theirs, x)
    c = network.config
    moments = jax.jit(lambda p, x: encode_images(c, p, x))(network.params, nhwc(x))
    assert relative(np.asarray(moments.mean), nhwc(mean)) < 1e-4
    assert relative(np.asarray(moments.log_variance), nhwc(log_variance)) < 1e-4
    z = normalized(c, moments.mean)
    decoded = jax.jit(lambda p, z: decode_latents(c, p, z))(network.params, z)
    assert relative(np.asarray(decoded), nhwc(again)) < 1e-4

    writing.write_diffusers(tmp_path / "ours", network)
    assert_same(state_of(tmp_path / "theirs"), state_of(tmp_path / "ours"))
    AutoencoderKL.from_pretrained(tmp_path / "ours")


def test_autoencoder_in_its_other_names(tmp_path):
    """diffusers itself translates latent diffusion's names and its own old ones."""
    theirs = networks.autoencoder(networks.autoencoder_config(32, 4, 32))
    theirs.save_pretrained(tmp_path / "theirs")
    network = reading.load_network(tmp_path / "theirs")

    writing.write_ldm(tmp_path / "vae.ckpt", network)
    state = torch.load(tmp_path / "vae.ckpt", weights_only=True)["state_dict"]
    assert_same(convert_ldm_vae_checkpoint(dict(state), dict(theirs.config)), theirs.state_dict())
    whole = {f"first_stage_model.{name}": value for name, value in state.items()}
    whole["model.diffusion_model.out.2.weight"] = torch.zeros(4, 3)
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "sd.ckpt")

    rename = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in theirs.state_dict().items():
        for new, before in rename.items():
            if ".attentions.0." in name:
                name = name.replace(f".{new}.", f".{before}.")
        old[name] = value.clone()
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / WEIGHTS)
    config = (tmp_path / "theirs" / "config.json").read_text()
    (tmp_path / "old" / "config.json").write_text(config)
    # diffusers takes the names that we take for its old ones as such.
    assert_same(AutoencoderKL.from_pretrained(tmp_path / "old").state_dict(), theirs.state_dict())

    for path, layout in (("sd.ckpt", "ldm"), ("vae.ckpt", "ldm"), ("old", "diffusers_old")):
        again = reading.load_network(tmp_path / path)
        assert again.layout == layout
        writing.write_diffusers(tmp_path / f"{path}.ours", again)
        assert_same(state_of(tmp_path / f"{path}.ours"), state_of(tmp_path / "theirs"))


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_pipeline_folder(cfg_scale, tmp_path):
    """A folder of ours in DiTPipeline: the same noise, the same image."""
    narrow = {**networks.SMALL_DIT, "num_embeds_ada_norm": 1000}  # its null class is number 1000
    networks.dit(narrow).save_pretrained(tmp_path / "dit")
    networks.autoencoder(networks.autoencoder_config(32, 4, 32)).save_pretrained(tmp_path / "vae")
    writing.write_pipeline(
        tmp_path / "pipeline",
        reading.load_network(tmp_path / "dit"),
        reading.load_network(tmp_path / "vae"),
        class_names(),
    )
    ours = Pipeline.from_pretrained(tmp_path / "pipeline")
    labels = [207, 360]
    drawn = ours(
        ["golden_retriever", 360], cfg_scale=cfg_scale, sampler="ddim", steps="ddim10", seed=5
    )
    assert drawn.label.tolist() == labels

    c = changed(ours.config, {"sample": {"batch_size": 2}})
    each = jax.vmap(jax.random.fold_in, (None, 0))(
        keys.stream(5, keys.SAMPLE), np.arange(2, dtype=np.uint32)
    )
    x_T = samplers.initial_noise(each, (c.input_size, c.input_size, c.input_channels))
    noise = torch.from_numpy(np.array(x_T).transpose(0, 3, 1, 2).copy())
    theirs = DiTPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["golden retriever"]) == [207]
    with mock.patch.object(pipeline_dit, "randn_tensor", return_value=noise):
        images = theirs(labels, guidance_scale=cfg_scale, num_inference_steps=10).images
    for ours_image, theirs_image in zip(drawn.images, images, strict=True):
        a, b = np.asarray(ours_image, int), np.asarray(theirs_image, int)
        assert a.shape == (128, 128, 3)
        assert np.abs(a - b).max() <= 2
        assert a.std() > 5, "a flat image compares with anything"
