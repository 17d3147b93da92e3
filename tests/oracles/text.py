"""Tiny random text encoders and CLIP of transformers: their folders, and what they compute."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

PACKAGES = ("transformers", "torch")
_TEXT = {"vocab_size": 24, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
_CLIP = {**_TEXT, "num_attention_heads": 2, "max_position_embeddings": 12}
_T5 = {"vocab_size": 24, "d_model": 12, "d_kv": 5, "num_heads": 2, "d_ff": 20, "num_layers": 2}
_ENDS = {"bos_token_id": 22, "eos_token_id": 23}


def clip_config(**changes):
    """A CLIP of two towers of two layers, 8x8 images in patches of 4."""
    vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "projection_dim": 10}
    text = {**_CLIP, **_ENDS, "projection_dim": 10, **changes}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)


MODELS = {
    "bert": lambda: BertModel(
        BertConfig(**_TEXT, num_attention_heads=4, max_position_embeddings=12)
    ),
    "clip_text": lambda: CLIPTextModel(CLIPTextConfig(**_CLIP, **_ENDS)),
    "clip_gelu": lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(**_CLIP, projection_dim=10, hidden_act="gelu", eos_token_id=2)
    ),
    "t5": lambda: T5EncoderModel(T5Config(**_T5)),
    "t5_gated": lambda: T5EncoderModel(T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "clip": lambda: CLIPModel(clip_config()),
}


def random_model(name):
    """The model of a name with every leaf drawn, so that none hides a mistake."""
    torch.manual_seed(sorted(MODELS).index(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            noise = torch.randn_like(leaf)
            norm = "norm" in path.lower() and path.endswith("weight")
            if not leaf.ndim:  # logit_scale
                leaf.copy_(2 + 0.1 * noise)
            else:
                leaf.copy_(1 + 0.1 * noise if norm else noise * leaf.shape[-1] ** -0.5)
    return model


def inputs(name):
    """ids i[3,M] that end and are padded, and their mask."""
    rng = np.random.default_rng(0)
    M = 10 if name.startswith(("bert", "clip")) else 40
    ids, mask = rng.integers(3, 22, (3, M)), np.ones((3, M), np.int64)
    for row, length in enumerate((M, M - 3, 4)):
        ids[row, length - 1 :] = 23
        mask[row, length:] = 0
    return ids, mask


def images():
    """f32[3,8,8,3]."""
    return np.random.default_rng(1).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)


@torch.no_grad()
def outputs(name, model):
    """What a model computes: hidden states, pooled vectors, CLIP's embeddings and loss."""
    ids, mask = map(torch.from_numpy, inputs(name))
    if name == "clip":
        x = torch.from_numpy(images()).permute(0, 3, 1, 2)
        out = model(input_ids=ids, attention_mask=mask, pixel_values=x, return_loss=True)
        found = {"text": out.text_embeds, "image": out.image_embeds, "loss": out.loss}
        found["tokens"] = out.text_model_output.last_hidden_state
        return {key: value.numpy() for key, value in found.items()}
    out = model(input_ids=ids, attention_mask=mask)
    found = {"tokens": out.last_hidden_state}
    if name.startswith("clip"):
        found["pooled"] = out.text_embeds if name == "clip_gelu" else out.pooler_output
    return {key: value.numpy() for key, value in found.items()}


def goldens():
    """Of every model NAME/config as JSON, NAME/tensor/.., NAME/ids, NAME/mask and NAME/out/.."""
    found = {"images": images()}
    for name in MODELS:
        model = random_model(name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_text())
            tensors = load_file(Path(folder) / "model.safetensors")
        found[f"{name}/config"] = np.array(json.dumps(config))
        found |= {f"{name}/tensor/{key}": value for key, value in tensors.items()}
        found[f"{name}/ids"], found[f"{name}/mask"] = inputs(name)
        found |= {f"{name}/out/{key}": value for key, value in outputs(name, model).items()}
    return found
