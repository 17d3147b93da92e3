"""Published peak rates of accelerators: dense products, floating-point operations a second."""

# By jax's device_kind: bfloat16 products, from the vendors' data sheets (NVIDIA's without sparsity;
# cloud.google.com/tpu/docs/system-architecture for TPUs, a chip).
_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str, dtype: str, matmul: str = "default") -> float | None:
    """Of one device; None where no figure is published for it.

    dtype: of the operands. matmul: "default" lets products of float32 take the fast form (one
    bfloat16 pass on a TPU, TF32 on NVIDIA's, at half bfloat16's rate).
    """
    peak = _BFLOAT16.get(device_kind)
    if peak is None or dtype == "bfloat16":
        return peak
    if matmul != "default":
        return None
    return peak if device_kind.startswith("TPU") else peak / 2
