"""PixArt-α beside diffusers: the golden file anew, our folders there, and its pipeline."""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ditjax.diffusion import samplers
from ditjax.files.assets import asset_bytes
from ditjax.sampling.text2image import Text2Image
from ditjax.training import keys
from ditjax.weights.reading import load_network
from ditjax.weights.text_pipeline import copy_encoder, load_text_pipeline, write_text_pipeline
from ditjax.weights.writing import write_diffusers
from tests.oracles import networks, pixart
from tests.text_encoders import relative
from tests.weights.test_pixart import GOLDEN


@pytest.mark.parametrize("kind", pixart.TYPES)
def test_the_golden_file_is_what_they_compute(kind):
    with np.load(GOLDEN) as kept:
        found = pixart.output(kind, pixart.pixart(kind))
        assert relative(found, kept[f"{kind}/output"]) < 1e-5  # two CPUs differ by 4e-6


@pytest.mark.parametrize("kind", pixart.TYPES)
def test_a_folder_of_ours_is_theirs_to_the_bit(kind, tmp_path):
    network = pixart.pixart(kind)
    network.save_pretrained(tmp_path / "theirs")
    write_diffusers(tmp_path / "ours", load_network(tmp_path / "theirs"))
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(pixart.output(kind, again), pixart.output(kind, network))


PROMPTS = ["a red three", "a small blue digit at the top"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A whole PixArtAlphaPipeline, tiny and random, with T5's encoder and the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("pixart")
    file = folder / "tokenizer.json"
    file.write_bytes(asset_bytes("scene_bpe", ".json")[0])
    ends = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=360, d_model=10, d_kv=5, num_heads=2, d_ff=20, num_layers=2)
    pipeline = PixArtAlphaPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(file), **ends),
        text_encoder=T5EncoderModel(t5).eval(),
        vae=networks.autoencoder(networks.autoencoder_config(32, 4, 32)),
        transformer=pixart.pixart("512"),
        scheduler=DDIMScheduler(
            beta_schedule="linear", clip_sample=False, set_alpha_to_one=True, steps_offset=0
        ),
    )
    pipeline.save_pretrained(folder / "theirs")
    return folder / "theirs"


def theirs_drawn(folder, scale, noise, negative):
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        PROMPTS,
        negative_prompt=negative,
        guidance_scale=scale,
        num_inference_steps=10,
        latents=torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2).copy()),
        height=64,
        width=64,
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    return np.stack([np.asarray(each, int) for each in images])


@pytest.mark.parametrize(("scale", "negative"), [(1.0, ""), (4.0, ""), (4.0, "a green digit")])
def test_the_pipeline_draws_the_same(theirs, scale, negative, tmp_path):
    """Theirs here, and a folder of ours there: within one of 255, on the same noise."""
    ours = Text2Image.from_pretrained(theirs)
    drawn = ours(
        PROMPTS, cfg_scale=scale, negative_prompt=negative, sampler="ddim", steps="ddim10", seed=5
    )
    each = jax.vmap(jax.random.fold_in, (None, 0))(
        keys.stream(5, keys.SAMPLE), np.arange(2, dtype=np.uint32)
    )
    noise = samplers.initial_noise(each, (8, 8, 4))
    expected = theirs_drawn(theirs, scale, noise, negative)
    assert np.abs(drawn.array.astype(int) - expected).max() <= 1
    assert expected.std() > 5, "a flat image compares with anything"
    loaded = load_text_pipeline(theirs)
    encoder = functools.partial(copy_encoder, str(theirs / "text_encoder"))
    assert write_text_pipeline(tmp_path / "ours", *loaded, encoder) == ""
    np.testing.assert_array_equal(theirs_drawn(tmp_path / "ours", scale, noise, negative), expected)
