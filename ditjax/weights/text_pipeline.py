"""Whole folders of text-to-image: network, autoencoder, scheduler, text encoder and tokenizer.

The layout is diffusers' PixArtAlphaPipeline. model_index.json is data: it names classes, and none
of them is imported. One with T5's encoder runs in diffusers; others hold BERT's or CLIP's, which
that pipeline does not take.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ditjax.config import changed
from ditjax.data.tokenizers import SHIPPED_TOKENIZER
from ditjax.errors import UserError, shown
from ditjax.files.assets import asset_bytes
from ditjax.files.atomic import read_json, write_atomic, write_json
from ditjax.files.store import local_copy
from ditjax.weights import tensors as weights
from ditjax.weights import vocabulary, writing
from ditjax.weights.networks import LoadedNetwork, check_fit, combined_recipe
from ditjax.weights.reading import load_network, with_scheduler
from ditjax.weights.text import load_text_encoder

TEXT_PIPELINE = "PixArtAlphaPipeline"
# Component -> its library and classes.
_COMPONENTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "transformer": ("diffusers", ("PixArtTransformer2DModel", "Transformer2DModel")),
    "vae": ("diffusers", ("AutoencoderKL",)),
    "scheduler": (
        "diffusers",
        ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"),
    ),
    "text_encoder": (
        "transformers",
        ("T5EncoderModel", "BertModel", "CLIPTextModel", "CLIPTextModelWithProjection"),
    ),
    "tokenizer": (
        "transformers",
        (
            *("PreTrainedTokenizerFast", "TokenizersBackend", "T5Tokenizer", "T5TokenizerFast"),
            *("BertTokenizer", "BertTokenizerFast", "CLIPTokenizer", "CLIPTokenizerFast"),
        ),
    ),
}
# model_type of a text encoder's config.json -> its class
_ENCODERS = {
    "t5": "T5EncoderModel",
    "bert": "BertModel",
    "clip": "CLIPTextModelWithProjection",
    "clip_text_model": "CLIPTextModel",
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "spiece.model"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)


class TextPipelineFolder(NamedTuple):
    """The network, whose recipe names the folder's encoder and tokenizer, and its autoencoder.

    The autoencoder is None of a network of pixels.
    """

    network: LoadedNetwork
    autoencoder: LoadedNetwork | None


def is_text_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder with a model_index.json says that it is one of these."""
    index = read_json(local_copy(path) / vocabulary.MODEL_INDEX)
    return index.get("_class_name") == TEXT_PIPELINE


def _check_index(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each component that a folder has. Raises UserError for an unknown one."""
    found = {}
    for name, stated in index.items():
        if name.startswith("_") or stated in ([None, None], None):
            continue
        library, classes = _COMPONENTS.get(name, ("", ()))
        pair = stated if isinstance(stated, list) else [stated]
        if len(pair) != 2 or pair[0] != library or pair[1] not in classes:
            expected = f"{library} with {' or '.join(classes)}" if classes else "no such component"
            raise UserError(
                f"{path}: {shown(name)} is {shown(stated)}: expected {expected}; it is data, and"
                " nothing that it names is imported."
            )
        found[name] = str(pair[1])
    for name in ("transformer", "scheduler"):
        if name not in found:
            raise UserError(f"{path} names no {name}: the folder is incomplete.")
    return found


def load_text_pipeline(path: str | os.PathLike[str], which: str = "ema") -> TextPipelineFolder:
    """Load a folder of diffusers or of ours. The encoder is read when texts are.

    Raises UserError for any other folder, and for networks that do not fit together.
    """
    folder = local_copy(path)
    index = read_json(folder / vocabulary.MODEL_INDEX)
    components = _check_index(folder / vocabulary.MODEL_INDEX, index)
    network = load_network(folder / "transformer", which=which, wanted="dit")
    if not hasattr(network.config, "text"):
        raise UserError(f"{folder}/transformer holds a {network.name}: expected a DiT of texts.")
    text = {"encoder": os.fspath(folder / "text_encoder")} if "text_encoder" in components else {}
    if "tokenizer" in components:
        text["tokenizer"] = os.fspath(folder / "tokenizer")
    c = with_scheduler(network.config, folder / "scheduler")
    network = network._replace(config=changed(c, {"text": text}))
    autoencoder = None
    if "vae" in components:
        autoencoder = load_network(folder / "vae", which=which, wanted="autoencoder")
        check_fit(network, autoencoder)
    return TextPipelineFolder(network, autoencoder)


def write_text_pipeline(
    path: str | os.PathLike[str],
    network: LoadedNetwork,
    autoencoder: LoadedNetwork | None,
    write_encoder: Callable[[Path], str],
) -> str:
    """Write a folder, with the encoder that `write_encoder` writes. Returns a note, or ''.

    Raises UserError for networks that do not fit together, or that the layout cannot express.
    """
    folder, c = Path(path), network.config
    if c.data.frames > 1:
        raise UserError(
            f"{TEXT_PIPELINE} draws images, and the network clips of {c.data.frames} frames: write"
            " it with --to=diffusers or --to=ditjax."
        )
    if autoencoder is None and c.latent:
        raise UserError("the network is of latents: --to=pipeline needs its --autoencoder, too.")
    if autoencoder is not None:
        combined = combined_recipe(network, autoencoder)  # before anything is written
        scale, side = combined.autoencoder.scale, combined.data.image_size
        changes = {"autoencoder": {"scale": scale}, "data": {"image_size": side}}
        autoencoder = autoencoder._replace(config=changed(autoencoder.config, changes))
    writing.write_diffusers(folder / "transformer", network)
    class_of = write_encoder(folder / "text_encoder")
    components = {
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", class_of],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    }
    if autoencoder is not None:
        writing.write_diffusers(folder / "vae", autoencoder)
        components["vae"] = ["diffusers", "AutoencoderKL"]
    write_json(folder / "scheduler" / "scheduler_config.json", writing.scheduler_config(c))
    _write_tokenizer(folder / "tokenizer", c.text.tokenizer, c.text.tokens)
    index = {
        "_class_name": TEXT_PIPELINE,
        "_diffusers_version": writing.DIFFUSERS_VERSION,
        **components,
    }
    # Last, because a folder without it is not a pipeline.
    write_json(folder / vocabulary.MODEL_INDEX, index)
    if class_of == "T5EncoderModel" and autoencoder is not None:
        return ""
    return (
        f"note: diffusers' {TEXT_PIPELINE} takes T5's encoder and latents alone: this folder, of"
        f" {class_of}{'' if autoencoder else ' and pixels'}, is for ditjax"
    )


def copy_encoder(source: str, folder: Path) -> str:
    """Copy a text encoder's folder of transformers; returns its class. Raises UserError."""
    found = load_text_encoder(source)
    kind = str(read_json(Path(source) / weights.CONFIG_FILE)["model_type"])
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*found.files, Path(source) / weights.CONFIG_FILE):
        shutil.copyfile(file, folder / Path(file).name)
    return _ENCODERS[kind]


def _write_tokenizer(folder: Path, tokenizer: str, tokens: int) -> None:
    """The files of a tokenizer; for the shipped one also what transformers asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer == SHIPPED_TOKENIZER:
        write_atomic(folder / "tokenizer.json", asset_bytes("scene_bpe", ".json")[0])
        ends = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}
        stated = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokens, **ends}
        write_json(folder / "tokenizer_config.json", stated)
        return
    source = Path(tokenizer)
    files = [source / name for name in _TOKENIZER_FILES] if source.is_dir() else [source]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
