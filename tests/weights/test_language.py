"""Layers of language models from every layout are transformers', and other files are refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models.frozen import LayerStack
from ditjax.weights.gguf import _q4_1, _q8_0, read_gguf
from ditjax.weights.language import load_layers
from tests import language_files as files

GOLDEN = Path(__file__).parent.parent / "goldens" / "language.npz"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("language")
    return {
        "bert": str(files.write_folder(root / "bert", "bert")),
        "llama": str(files.write_folder(root / "llama", "llama", "model.")),
        "release": str(files.write_release(root / "release")),
        "gguf": str(files.write_gguf(root / "x.gguf")),
    }


def test_two_layers_are_transformers(places):
    """Grouped heads, RMSNorm, SwiGLU and the final norm; post-norm, biases and erf."""
    for kind in ("bert", "llama"):
        found = load_layers(places[kind], files.FIRST, files.LAST)
        stack = LayerStack(found.layers, found.final_norm)
        out = jax.jit(stack.apply)({"params": found.params}, files.tokens())
        golden = np.load(GOLDEN)[kind]
        np.testing.assert_allclose(out, golden, atol=1e-5 * np.abs(golden).max())


def test_the_layouts_of_llama_hold_the_same(places):
    whole = load_layers(places["llama"], 1, 3)
    for name in ("release", "gguf"):
        found = load_layers(places[name], 1, 3)
        assert found.layers._replace(eps=0) == whole.layers._replace(eps=0)
        assert found.layers.eps == pytest.approx(whole.layers.eps)
        for a, b in zip(_leaves(found.params), _leaves(whole.params), strict=True):
            np.testing.assert_array_equal(a, b)


def _leaves(tree):
    return [leaf for _, leaf in sorted(_flat(tree))]


def _flat(tree, path=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}/{name}")
        else:
            yield f"{path}/{name}", value


def test_blocks_of_gguf():
    """Q4_1: d q + m, low halves first. Q8_0: d q."""
    half = np.array([0.5, -2.0], np.float16).view(np.uint8)
    q = np.arange(16, dtype=np.uint8) | (np.arange(16, dtype=np.uint8)[::-1] << 4)
    values = _q4_1(np.concatenate([half, q])[None])[0]
    np.testing.assert_array_equal(values[:16], 0.5 * np.arange(16) - 2)
    np.testing.assert_array_equal(values[16:], 0.5 * np.arange(16)[::-1] - 2)
    q8 = np.arange(-16, 16, dtype=np.int8).view(np.uint8)
    values = _q8_0(np.concatenate([half[:2], q8])[None])[0]
    np.testing.assert_array_equal(values, 0.5 * np.arange(-16, 16))


def _other_kind(folder: Path) -> str:
    copy = shutil.copytree(folder, folder.parent / "gpt2")
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return str(copy)


def test_other_files_are_refused_in_one_line(places, tmp_path):
    broken = tmp_path / "short.gguf"
    broken.write_bytes(Path(places["gguf"]).read_bytes()[:-500])
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    cases = {
        _other_kind(Path(places["llama"])): "model_type='gpt2': expected 'bert' or 'llama'",
        str(files.write_gguf(tmp_path / "falcon.gguf", "falcon")): "a model of 'falcon'",
        str(files.write_gguf(tmp_path / "q6.gguf", kind=14)): "of GGUF type 14: expected F32",
        str(broken): "ends within tensor",
        str(text): "cannot be read as a GGUF file .it does not begin",
        str(tmp_path / "nothing"): "does not exist",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            load_layers(path, 0, 3)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"layers 2 to 3 are asked for .* and it lacks 3"):
        load_layers(places["bert"], 2, 4)
    assert read_gguf(places["gguf"]).values["llama.attention.head_count_kv"] == 2
