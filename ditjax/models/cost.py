"""What a DiT costs, in closed form: parameters and multiply-accumulates.

Notation: L layers, D width, N tokens, p patch, C channels in, K channels out, r MLP ratio,
F = 256 timestep frequencies. The paper's "Gflops" are multiply-accumulates of one forward pass
of one sample / 10⁹, where every LayerNorm counts one per element; hardware FLOPs are twice the
multiply-accumulates.
"""

from typing import Any, NamedTuple

from ditjax.models.sizes import Size

FREQUENCIES = 256


class Shape(NamedTuple):
    """All that the cost of a DiT depends on. `input_size` is the side of x (latent or pixels)."""

    size: Size
    patch: int
    input_size: int
    in_channels: int
    out_channels: int
    num_classes: int
    null_label: bool = True
    block: str = "adaln_zero"
    mlp_ratio: float = 4.0

    @property
    def tokens(self) -> int:
        """N = (I / p)² (DiT Sec. 3.2)."""
        return (self.input_size // self.patch) ** 2

    @property
    def mlp_width(self) -> int:
        """r·D."""
        return int(self.size.width * self.mlp_ratio)


def paper_shape(size: Size, patch: int, resolution: int = 256) -> Shape:
    """A model of the paper: latents of resolution/8 with 4 channels, 8 out, 1,000 classes."""
    return Shape(size, patch, resolution // 8, in_channels=4, out_channels=8, num_classes=1000)


# Vectors of width D that a block, and the final layer, regress from the conditioning.
_BLOCK_MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 4, "adaln_zero": 6}
_FINAL_MODULATIONS = {"in_context": 0, "cross_attention": 0, "adaln": 2, "adaln_zero": 2}


def trainable_parameters(s: Shape) -> int:
    """Every weight and bias that the optimizer sees; the frozen position table is not one."""
    L, D, _ = s.size
    attention = (3 * D * D + 3 * D) + (D * D + D)
    mlp = (D * s.mlp_width + s.mlp_width) + (s.mlp_width * D + D)
    block = attention + mlp + _BLOCK_MODULATIONS[s.block] * (D * D + D)
    final = _FINAL_MODULATIONS[s.block] * (D * D + D)
    if s.block in ("in_context", "cross_attention"):
        block += 2 * 2 * D  # scale and bias of two LayerNorms
        final += 2 * D
    if s.block == "cross_attention":
        block += 4 * (D * D + D)  # q, k, v, output
    patch_in, patch_out = s.patch**2 * s.in_channels, s.patch**2 * s.out_channels
    embed = (patch_in * D + D) + (FREQUENCIES * D + D) + (D * D + D)
    embed += (s.num_classes + int(s.null_label)) * D
    return L * block + embed + final + (D * patch_out + patch_out)


def forward_macs(s: Shape) -> int:
    """Multiply-accumulates of one forward pass of one sample, LayerNorm elements included.

    adaLN-Zero: L(12ND² + 2N²D + 6D²) + p²C·ND + (FD + D²) + 2D² + p²K·ND + (2L+1)·ND for r = 4.
    """
    L, D, _ = s.size
    N = s.tokens
    M = N + 2 if s.block == "in_context" else N  # tokens inside the stack
    block = 4 * M * D * D + 2 * M * M * D + 2 * M * D * s.mlp_width
    block += _BLOCK_MODULATIONS[s.block] * D * D
    norms = 2
    if s.block == "cross_attention":
        block += 2 * N * D * D + 2 * 2 * D * D + 2 * N * 2 * D  # q and output; k and v; scores
        norms = 3
    embed = s.patch**2 * s.in_channels * N * D + (FREQUENCIES * D + D * D)
    final = _FINAL_MODULATIONS[s.block] * D * D + s.patch**2 * s.out_channels * N * D
    return L * (block + norms * M * D) + embed + final + N * D


def gflops(s: Shape) -> float:
    """The paper's Gflops: `forward_macs` / 10⁹."""
    return forward_macs(s) / 1e9


def training_flops(s: Shape, images: int) -> float:
    """FLOPs of training on `images` samples: forward + backward = 3 forwards, 2 a MAC.

    What MFU counts (Chowdhery et al. 2022 App. B): nothing that rematerialization repeats.
    """
    return 6.0 * forward_macs(s) * images


def training_gflops(gflops: float, images: Any) -> Any:
    """Multiply-accumulates / 10⁹ of training: forward + backward = 3 forwards of `gflops` an image.

    images: a number, or f64[n] of them.
    """
    return 3.0 * gflops * images
