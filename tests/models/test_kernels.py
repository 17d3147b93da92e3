"""Backends' attention kernels against the plain form, and which one a device is given."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models import kernels
from ditjax.models.attention import attend

flash = functools.partial(kernels.flash, interpret=True)


def operands(B, H, N, M, d, dtype=jnp.float32):
    """q, k, v and the gradient of the output; logits of standard deviation 2, far from uniform."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v, g = draw(B, H, N, d) * 2, draw(B, H, M, d), draw(B, H, M, d), draw(B, H, N, d)
    return tuple(x.astype(dtype) for x in (q, k, v, g))


def output_and_gradients(f, q, k, v, g):
    @jax.jit
    def run(q, k, v, g):
        out, back = jax.vjp(f, q, k, v)
        return out, *back(g)

    return run(q, k, v, g)


def distance(a, b):
    """||a - b|| / ||b||."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(
    ("shape", "key_block"),
    [
        ((1, 2, 256, 256, 72), 1024),  # XL/2: one block of keys, the fused backward pass
        ((1, 1, 64, 66, 64), 1024),  # queries and keys are padded, not alike
        ((2, 1, 258, 258, 8), 128),  # in-context XL/2's tokens: several blocks of keys, one ragged
    ],
)
def test_flash_is_the_plain_form(shape, key_block, monkeypatch):
    """Sums of up to 258 float32 terms: 1e-7 each, 7e-7 measured."""
    monkeypatch.setattr(kernels, "KEY_BLOCK", key_block)
    values = operands(*shape)
    expected = output_and_gradients(attend, *values)
    for ours, plain in zip(output_and_gradients(flash, *values), expected, strict=True):
        assert ours.shape == plain.shape
        assert distance(ours, plain) < 5e-6


def test_flash_in_bfloat16_is_as_exact_as_the_plain_form():
    """Both against the same numbers in float32; were the softmax bfloat16, ours would be 3x off."""
    values = operands(1, 1, 64, 66, 72, jnp.bfloat16)
    exact = output_and_gradients(attend, *(x.astype(jnp.float32) for x in values))
    plain = output_and_gradients(attend, *values)
    for ours, theirs, true in zip(output_and_gradients(flash, *values), plain, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours, true) < 1.25 * distance(theirs, true)


def test_cudnn_takes_the_operands_as_they_were_made(monkeypatch):
    """Lowered for an NVIDIA GPU, on none: one kernel each way over [B,N,H,d]."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((2, 4, 256, 72), jnp.bfloat16)
    traced = jax.jit(functools.partial(output_and_gradients, kernels.cudnn)).trace(x, x, x, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (text.count(f"__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward"))
    assert (forward, backward) == (1, 1)
    assert "tensor<2x256x4x72xbf16>" in text
    assert r"\22fmha_scale\22: 0.11785" in text  # 1 / √72


CPU = SimpleNamespace(platform="cpu")
TPU = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
V100 = SimpleNamespace(platform="gpu", compute_capability="7.0")
MI250 = SimpleNamespace(platform="gpu", compute_capability="gfx90a")


def choose(name, device, tokens=256, head_width=72, dtype=jnp.bfloat16):
    return kernels.choose(name, device, tokens=tokens, head_width=head_width, dtype=dtype)


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (CPU, {}, attend),
        (TPU, {}, kernels.flash),
        (TPU, {"dtype": jnp.float32}, kernels.flash),
        (TPU, {"tokens": 64}, attend),
        (H100, {}, kernels.cudnn),
        (H100, {"tokens": 64}, kernels.cudnn),
        (H100, {"dtype": jnp.float32}, attend),
        (H100, {"head_width": 68}, attend),
        (H100, {"head_width": 136}, attend),
        (V100, {}, attend),
        (MI250, {}, attend),
    ],
)
def test_auto_is_what_the_device_has(device, changes, expected):
    assert choose("auto", device, **changes) is expected
    assert choose("plain", device, **changes) is attend


def test_a_kernel_that_is_named_is_had():
    assert choose("cudnn", H100) is kernels.cudnn
    assert choose("flash", TPU, tokens=16) is kernels.flash


@pytest.mark.parametrize(
    ("name", "device", "changes", "said"),
    [
        ("cudnn", CPU, {}, r"'cudnn' and the devices are cpu: .* Set it to 'auto' or 'plain'\."),
        ("cudnn", TPU, {}, r"the devices are tpu: .* Set it to 'auto' or 'plain' or 'flash'\."),
        ("cudnn", V100, {}, r"of compute capability 7\.0: it needs NVIDIA's 8\.0"),
        ("cudnn", MI250, {}, "of compute capability gfx90a"),
        ("cudnn", H100, {"dtype": jnp.float32}, "dtype is 'float32': it computes in 'bfloat16'"),
        ("cudnn", H100, {"head_width": 68}, "heads are 68 wide: it takes multiples of 8 up to 128"),
        ("flash", CPU, {}, r"'flash' and the devices are cpu: .* Set it to 'auto' or 'plain'\."),
        ("flash", H100, {}, r"devices are gpu: .* Set it to 'auto' or 'plain' or 'cudnn'\."),
        ("flash", V100, {}, r"devices are gpu: .* Set it to 'auto' or 'plain'\."),
    ],
)
def test_a_kernel_that_is_not_there_is_refused(name, device, changes, said):
    with pytest.raises(UserError, match=said) as error:
        choose(name, device, **changes)
    assert "\n" not in str(error.value)
