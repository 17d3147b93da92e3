"""python -m ditjax.peer: diffusers' DiT in PyTorch, in turns with which ditjax.bench times ours.

Started by `ditjax.bench --against=torch`, in a process and, at need, an environment of its own. A
line of JSON each way: the specification first, then {"run": "train", "steps": n} or {"run":
"sample"}, each answered by its seconds; the end of the input ends it.

A training step is q_sample at random t and eps, the forward pass with dropped labels, the mean
squared error of eps, the backward pass, AdamW (fused) and the average of the weights (foreach). The
embedders that diffusers keeps a copy of in every block are one here, as in the paper. It is less
work than our step, which also has L_vlb and the gradient's norm.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import torch
import torch.nn.functional as F


def network(spec: dict[str, Any], device: torch.device) -> Any:
    """The DiT of spec["dit"], the embedders of all blocks shared."""
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**spec["dit"]).to(device)
    for block in dit.transformer_blocks:
        block.norm1.emb = dit.transformer_blocks[0].norm1.emb
    return dit


def training(spec: dict[str, Any], device: torch.device) -> tuple[Callable[[int], None], int]:
    """(runs n steps, number of parameters)."""
    dit = network(spec, device).train()
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
            F.mse_loss(out[:, :C].float(), eps).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1 - spec["ema_decay"])

    return run, sum(p.numel() for p in params)


def sampling(spec: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """diffusers' DiTPipeline by DDIM with guidance; an autoencoder of next to nothing decodes."""
    dit = network(spec, device).eval()
    decoder = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=spec["dit"]["in_channels"]
    ).to(device)
    pipeline = diffusers.DiTPipeline(dit, decoder, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    if spec["compile"]:
        # The pipeline reads the module's own attributes: compiled in place.
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


def computing_in(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """Parameters stay float32, as ours."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def peak_bytes(device: torch.device) -> int:
    """Of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # macOS counts bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    """The loop of requests."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    spec = json.loads(sys.stdin.readline())
    device = torch.device(spec["device"])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    torch.set_float32_matmul_precision(spec["matmul"])
    steps, parameters = training(spec, device)
    sample = sampling(spec, device) if spec.get("sample") else None
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
            steps(request["steps"])
        elif sample:
            sample()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        answer(seconds=time.perf_counter() - began, peak_bytes=peak_bytes(device))


if __name__ == "__main__":
    main()
