"""diffusers' DiT in PyTorch: the process that `ditjax.bench --against=torch` times against ours.

bench starts it as `python -m ditjax.machines.peer`, in another environment if need be, and the two
exchange lines of JSON. The first line specifies the network. Each later one is {"run": "train",
"steps": n} or {"run": "sample"}, and the answer is the seconds that it took. The process ends with
its input. PyTorch and diffusers are imported inside functions, so that the module imports without.

A training step consists of q_sample at random t and eps, the forward pass with dropped labels, the
mean squared error of eps, the backward pass, AdamW (fused) and the parameters' average (foreach).
diffusers keeps a copy of the embedders in every block; here they are shared, as in the paper. This
is less work than our step, which also computes L_vlb and the norm of the gradient.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

Spec = dict[str, Any]  # what `bench.peer_spec` returns
Device = Any  # torch.device


def torch_network(spec: Spec, device: Device) -> Any:
    """Build the DiT of spec["dit"], with the embedders of all blocks shared."""
    import diffusers
    import torch

    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**spec["dit"]).to(device)
    for block in dit.transformer_blocks:
        block.norm1.emb = dit.transformer_blocks[0].norm1.emb
    return dit


def torch_training(spec: Spec, device: Device) -> tuple[Callable[[int], None], int]:
    """Return a function that trains for n steps, and the number of parameters."""
    import torch
    from torch.nn.functional import mse_loss

    dit = torch_network(spec, device).train()
    params = list(dit.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(
        params,
        spec["learning_rate"],
        betas=(spec["b1"], spec["b2"]),
        eps=spec["eps"],
        weight_decay=spec["weight_decay"],
        fused=True,
    )
    forward = torch.compile(dit) if spec["compile"] else dit
    B, C, side = spec["batch_size"], spec["dit"]["in_channels"], spec["dit"]["sample_size"]
    x0 = torch.randn(B, C, side, side, device=device)
    y = torch.arange(B, device=device) % spec["dit"]["num_embeds_ada_norm"]
    beta = torch.linspace(1e-4, 0.02, 1000, device=device, dtype=torch.float64)
    alphas_bar = torch.cumprod(1 - beta, 0)
    signal, noise = alphas_bar.sqrt().float(), (1 - alphas_bar).sqrt().float()

    def run(steps: int) -> None:
        for _ in range(steps):
            t = torch.randint(0, 1000, (B,), device=device)
            eps = torch.randn_like(x0)
            x_t = signal[t][:, None, None, None] * x0 + noise[t][:, None, None, None] * eps
            with computing_in(spec["dtype"], device):
                out = forward(x_t, timestep=t, class_labels=y).sample
            mse_loss(out[:, :C].float(), eps).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - spec["ema_decay"])

    return run, sum(p.numel() for p in params)


def torch_sampling(spec: Spec, device: Device) -> Callable[[], None]:
    """Return a function that draws a batch: DiTPipeline, DDIM with guidance, a trivial decoder."""
    import diffusers

    dit = torch_network(spec, device).eval()
    decoder = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=spec["dit"]["in_channels"]
    ).to(device)
    pipeline = diffusers.DiTPipeline(dit, decoder, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    if spec["compile"]:
        # Compile in place: the pipeline reads the module's own attributes.
        dit.compile()

    def run() -> None:
        with computing_in(spec["dtype"], device):
            pipeline(
                class_labels=[i % 1000 for i in range(spec["sample"]["batch_size"])],
                guidance_scale=spec["sample"]["cfg_scale"],
                num_inference_steps=spec["sample"]["steps"],
                output_type="np",
            )

    return run


def computing_in(dtype: str, device: Device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 or not; parameters stay float32, as ours do."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def peak_bytes(device: Device) -> int:
    """Peak memory of the GPU, or of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    """Answer requests until the input ends."""
    import diffusers
    import torch

    answers = sys.stdout
    sys.stdout = sys.stderr  # keep what libraries print out of the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    spec = json.loads(sys.stdin.readline())
    device = torch.device(spec["device"])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision(spec["matmul"])
    train, parameters = torch_training(spec, device)
    sample = torch_sampling(spec, device) if spec.get("sample") else None
    answer(
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        parameters=parameters,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        if request["run"] == "train":
            train(request["steps"])
        elif sample:
            sample()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        answer(seconds=time.perf_counter() - began, peak_bytes=peak_bytes(device))


if __name__ == "__main__":
    main()
