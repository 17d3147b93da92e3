"""Fused attention kernels of the backends, and the choice between them.

All map q [B,H,N,d], k and v [B,H,M,d] -> softmax(q kᵀ / √d) v [B,H,N,d] with a float32 softmax, as
`attention.attend` does, and store no [N, M] array for the backward pass. XLA cannot partition a
kernel, so with several devices each computes its own rows and heads (`parallel/rules.by_heads`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ditjax.errors import UserError
from ditjax.models.attention import attend
from ditjax.models.embed import Attend

LANES = 128  # minor axis of a TPU register: sequence blocks and head widths are multiples of it
QUERY_BLOCK, KEY_BLOCK = 512, 1024  # float32 logits of a block: 2 MiB of the 16 that v5e allows

# With fewer tokens, a TPU uses the plain form. Temporaries of a step of XL compiled for v5e (not
# run) in bfloat16 without remat, with 4,096 tokens per chip, flash and plain: N = 64, 17.0 and
# 16.0 GB (keys padded to 128); 256, 12.8 and 16.7; 1,024, 12.8 and 24.7. Flash moves as many bytes
# for attention at 256 and half as many at 1,024.
FLASH_TOKENS = 256


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Flash attention of cuDNN, forward and backward, in bfloat16 on NVIDIA GPUs.

    cuDNN takes [B,N,H,d]: XLA cancels these transposes with those in `models/attention.py`.
    """
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.transpose(0, 2, 1, 3)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Dao et al. 2022, as JAX's Pallas kernel for TPUs ("splash"), forward and backward.

    Works for any N, M and d. Tokens are padded to whole blocks, and padded keys are masked. d is
    padded with zeros to 128 lanes, which a TPU's memory tiles occupy anyway; the scale uses the
    true d. `interpret` runs the kernel on any device.
    """
    # Importing Pallas takes most of a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    N, M, d = q.shape[2], k.shape[2], q.shape[3]
    q = _padded(q * d**-0.5)
    k, v = _padded(k), _padded(v)
    rows, keys = q.shape[2], k.shape[2]
    block_q, block_kv = _block(rows, QUERY_BLOCK), _block(keys, KEY_BLOCK)
    # With all keys in one block, the backward pass is one kernel that recomputes the softmax once
    # for dq, dk and dv; with several blocks, that kernel would sum dq in q's precision.
    one = block_kv == keys
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if one else block_q,
        block_kv_dq=None if one else block_kv,
        use_fused_bwd_kernel=one,
    )
    mask = splash.MultiHeadMask([splash.FullMask((rows, keys))] * q.shape[1])
    kernel = splash.make_splash_mha(
        mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    # Padded queries attend to the true keys too: a row without keys would be 0 / 0.
    segments = splash.SegmentIds(
        jnp.zeros(rows, jnp.int32), jnp.asarray(np.arange(keys) >= M, jnp.int32)
    )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segments if keys > M else None))(q, k, v)
    return out[:, :, :N, :d]


def _padded(x: jax.Array) -> jax.Array:
    """Pad N and d of [B,H,N,d] with zeros to the next multiples of 128."""
    *_, N, d = x.shape
    return jnp.pad(x, ((0, 0), (0, 0), (0, -N % LANES), (0, -d % LANES)))


def _block(length: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides a multiple of 128."""
    return max(b for b in range(LANES, most + 1, LANES) if length % b == 0)


def choose(name: str, device: Any, *, tokens: int, head_width: int, dtype: Any) -> Attend:
    """Choose the attention of `config.model.attention` for a device or a description of one.

    'auto' uses the platform's kernel where it is supported and faster, and the plain form
    otherwise. Raises UserError for a kernel that the device or the recipe does not support.
    """
    platform = device.platform
    if name == "auto":
        if platform == "tpu" and tokens >= FLASH_TOKENS:
            return flash
        supported = _cudnn_unsupported(device, head_width, dtype) is None
        return cudnn if supported else attend
    if name == "cudnn" and (reason := _cudnn_unsupported(device, head_width, dtype)):
        legal = "'auto' or 'plain'" + (" or 'flash'" if platform == "tpu" else "")
        raise UserError(f"config.model.attention is 'cudnn' and {reason}. Set it to {legal}.")
    if name == "flash" and platform != "tpu":
        instead = "" if _cudnn_unsupported(device, head_width, dtype) else " or 'cudnn'"
        raise UserError(
            f"config.model.attention is 'flash' and the devices are {platform}: it is a kernel for"
            f" TPUs. Set it to 'auto' or 'plain'{instead}."
        )
    known: dict[str, Attend] = {"plain": attend, "cudnn": cudnn, "flash": flash}
    return known[name]


def _cudnn_unsupported(device: Any, head_width: int, dtype: Any) -> str | None:
    """The reason that cuDNN's attention is not supported, or None if it is."""
    if device.platform != "gpu":
        return f"the devices are {device.platform}: it is a kernel for NVIDIA GPUs"
    capability = str(device.compute_capability)  # '9.0', or 'gfx90a' of AMD
    if not capability[:1].isdigit() or float(capability) < 8:
        return f"the devices are of compute capability {capability}: it needs NVIDIA's 8.0"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"config.model.dtype is '{jnp.dtype(dtype)}': it computes in 'bfloat16'"
    if head_width % 8 or head_width > LANES:
        return f"heads are {head_width} wide: it takes multiples of 8 up to {LANES}"
    return None
