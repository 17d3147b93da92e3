"""python -m ditjax.bench: time a recipe's train step on the local devices.

The compiled train step is timed in blocks of steps. Blocks of matrix products (the ceiling) and,
with --against=torch, of the PyTorch peer (`ditjax/machines/peer.py`) alternate with it, so that a
ratio compares neighbours in time. --suite measures several models (`ditjax/machines/suite.py`), and
--flags a compiler's flags, in processes of their own.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring
from jax.sharding import Mesh

import ditjax
from ditjax import cli
from ditjax.config import Config, changed, replaced
from ditjax.data import stream
from ditjax.data.prefetch import ahead
from ditjax.errors import UserError
from ditjax.files import atomic
from ditjax.machines.chips import CompilerFlags, compiler_flags, peak_flops
from ditjax.machines.suite import SUITE_BATCHES, SUITE_SIZES, run_suite, suite_text
from ditjax.models.dit import parse_size
from ditjax.models.network import DTYPES, NetworkCost, training_flops
from ditjax.parallel.mesh import mesh_of
from ditjax.runs import opening
from ditjax.runs.provenance import commit, cores, environment, typed
from ditjax.sampling.draw import Drawer
from ditjax.studies.words import aligned
from ditjax.tasks import cost_of, make_task
from ditjax.train import IN_FLIGHT
from ditjax.training.program import precise, training

BLOCK_SECONDS = 2.0  # approximate length of a block of steps, unless --steps is given
SIDES = {"cpu": (1024, 2048), "other": (4096, 8192, 16384)}  # of the ceiling's square products
DDIM_STEPS, GUIDANCE = 50, 4.0  # the sampler of --sample
_GIB = 2.0**30
COMPILED = "/jax/core/compile/backend_compile_duration"


# ---- alternating blocks


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the measurement of each side in each round; every other round is in reverse order.

    A first round is not counted: in it each side allocates its memory.
    """
    for run in sides.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(rounds):
        for name in list(sides)[:: -1 if k % 2 else 1]:
            time.sleep(0.25)  # the previous side's threads spin for a while
            found[name].append(sides[name]())
    return found


def quartiles(values: Any) -> dict[str, float]:
    """Return {"low", "median", "high"}: the 25th, 50th and 75th percentile."""
    low, median, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(median), "high": float(high)}


# ---- ditjax


class TimedStep:
    """Timings of the recipe's train step: alone on a batch of noise, and in a training loop."""

    def __init__(self, c: Config, mesh: Mesh) -> None:
        task = make_task(c, mesh)
        self._program = training(c, task, mesh)
        self._frozen = {"base": task.start(mesh).params} if task.start else {}
        self._frozen |= task.frozen(mesh) if task.shapes() else {}
        self._config, self._first = c, True
        self._batch = self._program.put(noise_batch(c))
        self._state = self._program.init()
        self._prefetch = c.train.prefetch
        self.host_seconds: list[float] = []  # host time per step, one entry per call of `looped`
        jax.block_until_ready(self._state)

    @property
    def average(self) -> Any:
        """The current average (EMA) of the weights."""
        return self._state.ema

    def run(self, steps: int) -> float:
        """Return seconds per step, with the batch on the devices already."""
        began = time.perf_counter()
        for _ in range(steps):
            self._step(self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps

    def _step(self, batch: Any) -> Any:
        """Take one step as `train` does. Returns its metrics."""
        p = self._program
        with precise(self._config), p.compiling(self._first):
            examples = p.prepare(self._frozen, batch, self._state.step)
            self._state, metrics = p.step(self._state, self._frozen, examples)
        self._first = False
        return metrics

    def looped(self, batches: stream.Batches, steps: int) -> float:
        """Return seconds per step as `train` runs it: batches from the data set, metrics kept."""
        began, waited = time.perf_counter(), 0.0
        pending: list[Any] = []
        for batch in ahead(batches, self._program.put, self._prefetch, steps):
            metrics = self._step(batch)
            pending.append(metrics)
            if len(pending) > IN_FLIGHT:
                paused = time.perf_counter()
                jax.block_until_ready(pending[-1 - IN_FLIGHT])
                waited += time.perf_counter() - paused
        self.host_seconds.append((time.perf_counter() - began - waited) / steps)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps

    def fed(self, batches: stream.Batches, steps: int) -> float:
        """Return seconds per batch: read, decode and copy to the devices, without a step."""
        began = time.perf_counter()
        for batch in ahead(batches, self._program.put, self._prefetch, steps):
            jax.block_until_ready(batch)
        return (time.perf_counter() - began) / steps


def input_pipeline(c: Config) -> stream.Batches | str:
    """Return the recipe's batches, or the reason why there are none."""
    try:
        opening.check_data(c)
        return stream.train_batches(opening.data_spec(c), c.seed, c.train.batch_size)
    except UserError as error:
        return str(error)


def noise_batch(c: Config) -> dict[str, np.ndarray]:
    """Return a random batch of the recipe's shapes: cached moments if latent, else images."""
    rng, B = np.random.default_rng(0), c.train.batch_size
    labels = rng.integers(0, c.data.num_classes, B).astype(np.int32)
    shape = (B, *c.input_shape)
    noise = rng.standard_normal(shape).astype(np.float32)
    if not c.latent:
        return {"image": np.clip(noise, -1, 1), "label": labels}
    return {"mean": noise, "log_variance": np.full(shape, -5, np.float32), "label": labels}


def timed_sampler(c: Config, mesh: Mesh, params: Any) -> Callable[[], float]:
    """Return a timer of one batch of samples of the recipe's DiT, without decoding, in seconds."""
    # A DiT on pixels of the latents' shape has the same network and program, without autoencoder.
    channels: Any = c.input_channels  # legal here, although no image has 4
    c = replaced(
        c,
        data=dataclasses.replace(c.data, image_size=c.input_size, channels=channels),
        autoencoder=dataclasses.replace(c.autoencoder, kind="none"),
    )
    drawer = Drawer(mesh, {})

    def run() -> float:
        began = time.perf_counter()
        drawer.whole(c, params, c.sample.batch_size, seed=0)
        return time.perf_counter() - began

    return run


def ceiling(c: Config, device: jax.Device) -> tuple[Callable[[], float], int]:
    """Return (timer of square matrix products in the recipe's precision, in FLOP/s; their side)."""
    sides = SIDES.get(device.platform, SIDES["other"])

    def of(side: int) -> Callable[[float], float]:
        a, b = (
            jax.device_put(
                np.random.default_rng(i).standard_normal((side, side)).astype(np.float32), device
            ).astype(DTYPES[c.model.dtype])
            for i in range(2)
        )
        with precise(c):
            product = jax.jit(jnp.matmul).lower(a, b).compile()
        jax.block_until_ready(product(a, b))

        def measure(seconds: float) -> float:
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                # Several at a time, so that an accelerator never waits for its host.
                jax.block_until_ready([product(a, b) for _ in range(4)])
                done += 4
            return 2.0 * side**3 * done / (time.perf_counter() - began)

        return measure

    measured = {side: of(side) for side in sides}
    best = max(sides, key=lambda side: measured[side](0.5))
    return lambda: measured[best](BLOCK_SECONDS / 2), best


# Prints the FLOP/s of PyTorch's square product of float32, if there is PyTorch.
_TORCH_PRODUCT = """
import sys, time, torch
n, seconds = int(sys.argv[1]), float(sys.argv[2])
a, b = torch.randn(n, n), torch.randn(n, n)
torch.mm(a, b)
began, done = time.perf_counter(), 0
while not done or time.perf_counter() - began < seconds:
    torch.mm(a, b)
    done += 1
print(2 * n**3 * done / (time.perf_counter() - began))
"""


def host_products(python: str) -> dict[str, float]:
    """FLOP/s of square products of float32 on all cores: NumPy's, and PyTorch's if it is there.

    XLA's own product is not always the best of a machine, and a ceiling should be.
    """
    n, seconds = SIDES["cpu"][-1], BLOCK_SECONDS / 2
    a, b = (np.random.default_rng(i).standard_normal((n, n), np.float32) for i in range(2))
    a @ b
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds:
        a @ b
        done += 1
    found = {"NumPy": 2.0 * n**3 * done / (time.perf_counter() - began)}
    with contextlib.suppress(OSError, ValueError):
        words = [python, "-c", _TORCH_PRODUCT, str(n), str(seconds)]
        found["PyTorch"] = float(subprocess.run(words, capture_output=True, check=False).stdout)
    return found


@contextlib.contextmanager
def record_compile_seconds() -> Iterator[list[float]]:
    """Record the seconds of each compilation in the context, with the persistent cache off."""
    found: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            found.append(duration_secs)

    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(listen)
        jax.config.update("jax_enable_compilation_cache", cached)


def peak_memory(mesh: Mesh) -> tuple[int, str]:
    """Return (peak bytes, owner): of the fullest device, or on CPUs of this process."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats if s), "a device"
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process"


# ---- the peer


class Peer:
    """diffusers' DiT in a separate process. Leaving the context ends the process."""

    def __init__(self, python: str, spec: Mapping[str, Any]) -> None:
        self.name = "torch compiled" if spec["compile"] else "torch eager"
        self._python = python
        # Not a pipe, which would fill up because nobody reads it.
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        try:
            self._process = subprocess.Popen(
                [python, "-m", "ditjax.machines.peer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": _import_path()},
            )
        except OSError as error:
            raise UserError(f"--torch_python={python}: {error.strerror}.") from None
        self.facts = self._ask(spec)
        self.peak_bytes = 0

    def train(self, steps: int) -> float:
        """Return seconds per step."""
        return self._timed({"run": "train", "steps": steps}) / steps

    def sample(self) -> float:
        """Return the seconds of one batch of samples."""
        return self._timed({"run": "sample"})

    def _timed(self, request: Mapping[str, Any]) -> float:
        answer = self._ask(request)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            lines = self._stderr.read().strip().splitlines()
            why = lines[-1] if lines else "it printed nothing"
            if "No module named" in why:
                raise UserError(
                    f"--against=torch: {why} in {self._python}: install"
                    " tests/oracles/requirements.txt, or name an interpreter that has it with"
                    " --torch_python=PATH."
                )
            raise UserError(f"--against=torch: the PyTorch process failed: {why}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


def _import_path() -> str:
    """Return the PYTHONPATH of the peer: this ditjax, and the user's own entries."""
    ours = str(Path(ditjax.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))


def peer_spec(c: Config, *, compiled: bool, sample: bool) -> dict[str, Any]:
    """Return the recipe's network for the peer. Raises UserError if the peer does not have it."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None:
        raise UserError(
            f"--against=torch: there is no PyTorch peer on {jax.default_backend()}: leave it out."
        )
    for key, ours, theirs in (
        ("task", c.task, "diffusion"),
        ("model.kind", c.model.kind, "dit"),
        ("model.block", c.model.block, "adaln_zero"),
        ("model.mlp_ratio", c.model.mlp_ratio, 4.0),
        ("diffusion.timesteps", c.diffusion.timesteps, 1000),
    ):
        if ours != theirs:
            raise UserError(f"--against=torch: config.{key} is {ours!r}, diffusers has {theirs!r}.")
    if sample and c.data.num_classes != 1000:
        raise UserError(
            f"--against=torch --sample: config.data.num_classes is {c.data.num_classes}, and"
            " diffusers' pipeline is for 1000: leave --sample out."
        )
    size, channels = parse_size(c.model.size), c.input_channels
    learned = c.diffusion.variance == "learned_range"
    return {
        "dit": {
            "num_attention_heads": size.heads,
            "attention_head_dim": size.width // size.heads,
            "in_channels": channels,
            "out_channels": channels * (2 if learned else 1),
            "num_layers": size.depth,
            "sample_size": c.input_size,
            "patch_size": c.model.patch,
            "num_embeds_ada_norm": c.data.num_classes,
        },
        "compile": compiled,
        "batch_size": c.train.batch_size,
        "dtype": c.model.dtype,
        "device": device,
        "threads": len(cores()),
        # The same products of float32 as ours: TF32 where the backend has it, or exact.
        "matmul": "high" if c.model.matmul == "default" else "highest",
        "learning_rate": c.optim.learning_rate,
        "b1": c.optim.b1,
        "b2": c.optim.b2,
        "eps": c.optim.eps,
        "weight_decay": c.optim.weight_decay,
        "ema_decay": c.train.ema_decay,
        "sample": {
            "batch_size": c.sample.batch_size,
            "steps": DDIM_STEPS,
            "cfg_scale": GUIDANCE,
        }
        if sample
        else None,
    }


# ---- the whole


def bench(
    c: Config, *, steps: int, rounds: int, against: Sequence[str], sample: bool, torch_python: str
) -> dict[str, Any]:
    """Measure all figures of a recipe: the content of --out but for environment and recipe."""
    mesh, cost = mesh_of(c), cost_of(c)
    specs = [peer_spec(c, compiled=kind == "torch-compiled", sample=sample) for kind in against]
    with contextlib.ExitStack() as stack:
        # The peers first: a missing package is reported within seconds.
        peers = [stack.enter_context(Peer(torch_python, spec)) for spec in specs]
        with record_compile_seconds() as compiling:
            ours = TimedStep(c, mesh)
            compiling.clear()
            first = ours.run(1)
            compiled = sum(compiling)
        once = ours.run(1)
        memory, memory_of = peak_memory(mesh)
        steps = steps or max(1, round(BLOCK_SECONDS / once))
        rate, side = ceiling(c, jax.devices()[0])
        sides: dict[str, Callable[[], float]] = {
            "ceiling": rate,
            "ours": functools.partial(ours.run, steps),
        }
        batches = input_pipeline(c)
        if isinstance(batches, stream.Batches):
            stack.enter_context(batches)
            sides["input"] = functools.partial(ours.fed, batches, steps)
            # If a frozen autoencoder encodes the images, only their reading is measured.
            if not make_task(c).reads:
                sides["loop"] = functools.partial(ours.looped, batches, steps)
        first_of = {peer.name: peer.train(1) for peer in peers}
        sides |= {peer.name: functools.partial(peer.train, steps) for peer in peers}
        products = host_products(torch_python) if jax.default_backend() == "cpu" else {}
        found = alternate(sides, rounds)
        sampling = _sampling_figures(c, mesh, ours.average, peers, rounds) if sample else None
    return {
        "schema": 1,
        **_step_figures(c, cost, mesh, found, steps, side),
        "compile_seconds": compiled,
        "first_step_seconds": first,
        "peak_bytes": memory,
        "peak_bytes_of": memory_of,
        "host_products_flops": products,
        "peers": [_peer_figures(peer, found, first_of[peer.name]) for peer in peers],
        "input": batches
        if isinstance(batches, str)
        else _input_figures(c, found, ours.host_seconds[-rounds:]),
        "sampling": sampling,
    }


def _step_figures(
    c: Config,
    cost: NetworkCost,
    mesh: Mesh,
    found: Mapping[str, list[float]],
    steps: int,
    side: int,
) -> dict[str, Any]:
    """Return the recipe's size, and the speed of its step beside peak and ceiling."""
    seconds = np.array(found["ours"])
    flops = training_flops(cost.macs, c.train.batch_size, cost.passes)
    attained = flops / seconds / mesh.size
    peak = peak_flops(jax.devices()[0].device_kind, c.model.dtype, c.model.matmul)
    return {
        "model": cost.name,
        "parameters": cost.parameters,
        "gflops": cost.gflops,
        "batch_size": c.train.batch_size,
        "dtype": c.model.dtype,
        "mesh": dict(mesh.shape),
        "steps_a_block": steps,
        "rounds": len(seconds),
        "step_seconds": quartiles(seconds),
        "images_per_second": quartiles(c.train.batch_size / seconds),
        "step_flops": flops,
        "attained_flops_a_device": quartiles(attained),
        "peak_flops": peak,
        "mfu": quartiles(attained / peak) if peak else None,
        "ceiling_flops": quartiles(found["ceiling"]),
        "ceiling_side": side,
        "of_ceiling": quartiles(attained / np.array(found["ceiling"])),
    }


def _peer_figures(peer: Peer, found: Mapping[str, list[float]], first: float) -> dict[str, Any]:
    """Return the speed of a peer's step; `ratio` is its time over that of ditjax."""
    return {
        "name": peer.name,
        **peer.facts,
        "step_seconds": quartiles(found[peer.name]),
        "first_step_seconds": first,
        "peak_bytes": peer.peak_bytes,
        "ratio": quartiles(np.array(found[peer.name]) / np.array(found["ours"])),
    }


def _input_figures(
    c: Config, found: Mapping[str, list[float]], host: Sequence[float]
) -> dict[str, Any]:
    """Return the rate of the input pipeline, and the cost of the loop around the step."""
    alone, read = np.array(found["ours"]), np.array(found["input"])
    figures: dict[str, Any] = {
        "images_per_second": quartiles(c.train.batch_size / read),
        "headroom": quartiles(alone / read),
    }
    if "loop" in found:
        loop = np.array(found["loop"])
        figures["loop_step_seconds"] = quartiles(loop)
        # The share of a loop's step beyond the step alone; and the seconds of Python, most of which
        # overlap with the devices' work.
        figures["between_steps"] = quartiles(1 - alone / loop)
        figures["host_seconds"] = quartiles(host)
    return figures


def _sampling_figures(
    c: Config, mesh: Mesh, params: Any, peers: Sequence[Peer], rounds: int
) -> dict[str, Any]:
    """Time a batch of samples by guided DDIM, with ditjax and with diffusers' pipeline."""
    c = with_bench_sampler(c)
    ours = timed_sampler(c, mesh, params)
    sides: dict[str, Callable[[], float]] = {"ours": ours, **{p.name: p.sample for p in peers}}
    found = alternate(sides, rounds)
    return {
        "sampler": c.sample.sampler,
        "steps": DDIM_STEPS,
        "cfg_scale": GUIDANCE,
        "batch_size": c.sample.batch_size,
        "batch_seconds": quartiles(found["ours"]),
        "peers": [
            {
                "name": peer.name,
                "batch_seconds": quartiles(found[peer.name]),
                "ratio": quartiles(np.array(found[peer.name]) / np.array(found["ours"])),
            }
            for peer in peers
        ],
    }


def with_bench_sampler(c: Config) -> Config:
    """Return the recipe with the sampler of --sample."""
    sample = {
        "sampler": "ddim",
        "steps": f"ddim{DDIM_STEPS}",
        "eta": 0.0,
        "cfg_scale": GUIDANCE,
        "cfg_interval": (0.0, 1.0),
    }
    return changed(c, {"sample": sample})


def bench_text(found: Mapping[str, Any]) -> str:
    """Return the figures as a table for the terminal."""
    rows = [*_step_rows(found)]
    for peer in found["peers"]:
        step = _quartile_text(peer["step_seconds"], " s per step")
        memory = f"{peer['peak_bytes'] / _GIB:.2f} GiB"
        facts = f"PyTorch {peer['torch']}, {peer['parameters']:,} parameters"
        rows += [(peer["name"], f"{step}, {memory}, {facts}"), _ratio_row(peer)]
    rows += _input_rows(found["input"])
    if sampled := found["sampling"]:
        title = f"{sampled['batch_size']} samples, {sampled['steps']} guided DDIM steps"
        rows.append((title, _quartile_text(sampled["batch_seconds"], " s")))
        for peer in sampled["peers"]:
            rows += [(peer["name"], _quartile_text(peer["batch_seconds"], " s")), _ratio_row(peer)]
    env = found["environment"]
    title = (
        f"{found['model']}, {found['parameters']:,} parameters, {found['gflops']:.4g} Gflops, batch"
        f" {found['batch_size']}, {found['dtype']}, {env['devices']} x {env['device']}"
        f" ({env['cpus']} cores)"
    )
    return "\n".join([title, *aligned(rows, [False, False])])


def _quartile_text(q: Mapping[str, float], unit: str = "", scale: float = 1.0) -> str:
    return (
        f"{q['median'] * scale:.4g}{unit} (quartiles {q['low'] * scale:.4g} to"
        f" {q['high'] * scale:.4g})"
    )


def _ratio_row(peer: Mapping[str, Any]) -> tuple[str, str]:
    return "", f"ditjax is {_quartile_text(peer['ratio'])} times as fast"


def _step_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    mfu = "no peak is published for this device in this precision"
    if found["mfu"]:
        mfu = _quartile_text(found["mfu"], " %", 100)
        mfu += f" of {found['peak_flops'] / 1e12:.4g} TFLOP/s"
    ceiling_rate = _quartile_text(found["ceiling_flops"], " GFLOP/s per device", 1e-9)
    seconds = f"{found['compile_seconds']:.2f} s, first step {found['first_step_seconds']:.2f} s"
    products = ", ".join(
        f"{name} {rate * 1e-9:.4g} GFLOP/s" for name, rate in found["host_products_flops"].items()
    )
    return [
        ("step", _quartile_text(found["step_seconds"], " s")),
        ("images/s", _quartile_text(found["images_per_second"])),
        (
            "attained",
            _quartile_text(found["attained_flops_a_device"], " GFLOP/s per device", 1e-9),
        ),
        ("matmul ceiling", f"{ceiling_rate}, squares of {found['ceiling_side']}"),
        *([("others' products", f"{products}, float32, on all cores")] if products else []),
        ("of the ceiling", _quartile_text(found["of_ceiling"], " %", 100)),
        ("MFU", mfu),
        ("compilation", seconds),
        ("peak memory", f"{found['peak_bytes'] / _GIB:.2f} GiB of {found['peak_bytes_of']}"),
    ]


def _input_rows(figures: Mapping[str, Any] | str) -> list[tuple[str, str]]:
    if isinstance(figures, str):
        return [("input pipeline", f"not measured: {figures}")]
    rows = [
        ("input pipeline", _quartile_text(figures["images_per_second"], " images/s")),
        ("", f"{_quartile_text(figures['headroom'])} times what the step takes"),
    ]
    if "between_steps" in figures:
        share = _quartile_text(figures["between_steps"], " %", 100)
        rows.append(("between steps", f"{share} of a step in the loop"))
        rows.append(("Python", _quartile_text(figures["host_seconds"], " ms per step", 1e3)))
    return rows


PEERS = {
    "none": (),
    "torch": ("torch-eager", "torch-compiled"),
    "torch-eager": ("torch-eager",),
    "torch-compiled": ("torch-compiled",),
}


# ---- a compiler's flags


def compare_flags(argv: Sequence[str], flags: CompilerFlags) -> dict[str, Any]:
    """Run bench four times, without, with, with and without flags, and compare the steps.

    `argv` is the command line without --flags and --out. Raises UserError if a run fails.
    """
    found: dict[bool, list[float]] = {False: [], True: []}
    before = os.environ.get(flags.variable, "")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bench.json"
        for tuned in (False, True, True, False):
            value = f"{before} {flags.flags}" if tuned else before
            done = subprocess.run(
                [sys.executable, "-m", "ditjax.bench", *argv, f"--out={out}"],
                env={**os.environ, "PYTHONPATH": _import_path(), flags.variable: value},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                raise UserError(
                    f"--flags: the run {'with' if tuned else 'without'} them failed:"
                    f" {lines[-1] if lines else f'status {done.returncode}'}"
                )
            figures = json.loads(out.read_text())
            found[tuned].append(figures["step_seconds"]["median"])
    without, with_flags = (np.array(found[tuned]) for tuned in (False, True))
    return {
        "schema": 1,
        **flags._asdict(),
        "model": figures["model"],
        "batch_size": figures["batch_size"],
        "step_seconds_without": found[False],
        "step_seconds_with": found[True],
        "ratio": quartiles(without / with_flags),
    }


def flags_text(found: Mapping[str, Any]) -> str:
    """Return the comparison of flags as a line for the terminal."""
    times = [
        " and ".join(f"{value:.4g}" for value in found[f"step_seconds_{name}"])
        for name in ("without", "with")
    ]
    return (
        f"{found['variable']}={found['flags']} ({found['source']}):\n{found['model']}, batch"
        f" {found['batch_size']}: {times[0]} s a step without, {times[1]} with:"
        f" {_quartile_text(found['ratio'])} times as fast"
    )


def _parser() -> cli.Parser:
    parser = cli.parser("bench", "Time a recipe's train step on the local devices.")
    parser.add_argument(
        "--steps", type=int, default=0, help="steps per block (default: as many as fill 2 seconds)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="counted blocks of each side (default 5)"
    )
    parser.add_argument(
        "--against",
        default="none",
        choices=sorted(PEERS),
        help="torch: also time diffusers' DiT, eager and compiled, in alternation; or only one",
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help=f"also draw config.sample.batch_size samples: {DDIM_STEPS} guided DDIM steps",
    )
    parser.add_argument(
        "--torch_python",
        default=sys.executable,
        metavar="PATH",
        help="Python interpreter with PyTorch and diffusers (default: this one)",
    )
    parser.add_argument(
        "--suite",
        action="store_true",
        help="measure the recipe's network at several --sizes, each at the best of several"
        " --batches, the features of FID and the numerics of attention",
    )
    parser.add_argument(
        "--sizes", default=",".join(SUITE_SIZES), help="with --suite: values of config.model.size"
    )
    parser.add_argument(
        "--batches",
        default=",".join(map(str, SUITE_BATCHES)),
        help="with --suite: values of config.train.batch_size",
    )
    parser.add_argument(
        "--flags",
        default="",
        help="compare the step without and with flags of XLA: gpu or tpu, those that are published"
        " for it (ditjax/machines/chips.py), or the flags themselves",
    )
    parser.add_argument("--out", help="JSON file for the figures")
    return parser


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    parser = _parser()
    args, config = cli.parse(parser, argv)
    if not args.suite:
        cli.check_unused(parser, argv, ["sizes", "batches"], "without --suite")
    if args.against == "none":
        cli.check_unused(parser, argv, ["torch_python"], "without --against=torch")
    if args.steps < 0 or args.rounds < 1:
        raise UserError(
            f"--steps={args.steps} --rounds={args.rounds}: expected at least 0 and at least 1."
        )
    if args.against != "none":
        # Two programs share the device: neither may preallocate its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.flags:
        return _flags(args, argv)

    def measure(c: Config, full: bool = True) -> dict[str, Any]:
        return bench(
            c,
            steps=args.steps,
            rounds=args.rounds if full else 1,
            against=PEERS[args.against] if full else (),
            sample=args.sample and full,
            torch_python=args.torch_python,
        )

    found = run_suite(config, measure, *_axes(args)) if args.suite else measure(config)
    found["environment"] = {
        **environment(typed("bench", argv, drop=("--out", "--torch_python"))),
        "commit": commit(),
    }
    found["config"] = args.recipe
    print(suite_text(found) if args.suite else bench_text(found))
    if args.out:
        atomic.write_json(args.out, found)
    return 0


def _axes(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The sizes and batches of --suite. Raises UserError for what is no number."""
    try:
        batches = [int(word) for word in args.batches.split(",")]
    except ValueError:
        raise UserError(f"--batches={args.batches}: expected sizes such as 64,256.") from None
    return args.sizes.split(","), batches


def _flags(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compare flags of the compiler: this process takes no device."""
    if args.suite:
        raise UserError("--flags and --suite exclude each other: give one of them.")
    ours = shlex.split(typed("bench", argv, drop=("--flags", "--out")))[3:]
    found = compare_flags(ours, compiler_flags(args.flags))
    print(flags_text(found))
    if args.out:
        atomic.write_json(args.out, {**found, "config": args.recipe})
    return 0


if __name__ == "__main__":
    cli.run(main)
