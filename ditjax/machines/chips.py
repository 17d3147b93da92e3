"""Published peak rates of accelerators: dense matrix products, in TFLOP/s per chip.

TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. GPUs: NVIDIA's data sheets, not sparse.
"""

from typing import NamedTuple

GB, GIB = 1e9, 2**30


class Rates(NamedTuple):
    """The peak rates of one chip. A JAX device is one of its `cores`."""

    kinds: tuple[str, ...]  # device_kind in JAX
    bfloat16: float
    float32: float  # the default precision of the backend: one pass of bfloat16, or TF32
    exact: float  # float32 without rounding to a shorter type
    cores: int = 1

    def device_flops(self, dtype: str, matmul: str) -> float:
        """Peak FLOP/s of one device with the model.dtype and model.matmul of a recipe."""
        float32 = self.exact if matmul == "float32" else self.float32
        return 1e12 * (self.bfloat16 if dtype == "bfloat16" else float32) / self.cores


def _tpu(kind: str, rate: float, cores: int = 1) -> Rates:
    """On TPUs a float32 product is one pass of bfloat16 by default, and six passes if exact."""
    return Rates((kind,), rate, rate, rate / 6, cores)


RATES = {
    "v4": _tpu("TPU v4", 275),
    "v5e": _tpu("TPU v5 lite", 197),
    "v5p": _tpu("TPU v5", 459),
    "v6e": _tpu("TPU v6 lite", 918),
    "tpu7x": _tpu("TPU7x", 2307, cores=2),
    "a100": Rates(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312, 156, 19.5),
    "h100-pcie": Rates(("NVIDIA H100 PCIe",), 756, 378, 51),
    "h100": Rates(("NVIDIA H100 80GB HBM3",), 989.4, 494.7, 66.9),
    "h200": Rates(("NVIDIA H200",), 989.4, 494.7, 66.9),
    "b200": Rates(("NVIDIA B200",), 2250, 1125, 75),
}


def peak_flops(device_kind: str, dtype: str, matmul: str = "default") -> float | None:
    """Peak FLOP/s of one device by its device_kind; None if no rate is on record."""
    for rates in RATES.values():
        if device_kind in rates.kinds:
            return rates.device_flops(dtype, matmul)
    return None


class CompilerFlags(NamedTuple):
    """Flags of XLA that others publish for a kind of chip, and the variable that takes them."""

    variable: str
    flags: str
    source: str


# None was measured here, so that none is a default: `bench --flags=gpu` compares.
COMPILER_FLAGS = {
    "gpu": CompilerFlags(
        "XLA_FLAGS",
        "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_triton_gemm_any=true",
        "docs.jax.dev/en/latest/gpu_performance_tips.html",
    ),
    "tpu": CompilerFlags(
        "LIBTPU_INIT_ARGS",
        "--xla_tpu_enable_async_collective_fusion=true"
        " --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
        " --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
        " --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true",
        "maxdiffusion, guides/optimization, for Wan 2.1 on v5p",
    ),
}


def compiler_flags(text: str) -> CompilerFlags:
    """The flags of a kind of chip by its name, 'gpu' or 'tpu', or those that are written out."""
    if text in COMPILER_FLAGS:
        return COMPILER_FLAGS[text]
    of_tpu = "--xla_tpu" in text
    return CompilerFlags("LIBTPU_INIT_ARGS" if of_tpu else "XLA_FLAGS", text, "the command line")
