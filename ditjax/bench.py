"""python -m ditjax.bench: the speed of a recipe's train step on the devices that are here.

What is timed is the train step itself, compiled, in blocks of steps; the ceiling of matrix
products, and with --against=torch the PyTorch peer (`ditjax/machines/peer.py`), take turns with it,
so that a ratio is of neighbours in time.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
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
from ditjax.machines.chips import peak_flops
from ditjax.models.dit import parse_size
from ditjax.models.network import DTYPES, training_flops
from ditjax.parallel.mesh import mesh_of
from ditjax.runs import opening
from ditjax.runs.provenance import commit, cores, environment, typed
from ditjax.sampling.draw import Drawer
from ditjax.studies.words import aligned
from ditjax.tasks import cost_of, make_task
from ditjax.train import IN_FLIGHT
from ditjax.training.program import precise, training

BLOCK_SECONDS = 2.0  # a block of steps lasts about so long, unless --steps says how many they are
SIDES = {"cpu": (1024, 2048), "other": (4096, 8192, 16384)}  # of the ceiling's square products
DDIM_STEPS, GUIDANCE = 50, 4.0  # of --sample
COMPILED = "/jax/core/compile/backend_compile_duration"


# ---- taking turns


def turns(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side measures in each round; every other round in the reverse order.

    A round before them is not counted: in it a side finds the memory that it keeps.
    """
    for run in sides.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for k in range(rounds):
        for name in list(sides)[:: -1 if k % 2 else 1]:
            time.sleep(0.25)  # the threads of the one before spin for a while
            found[name].append(sides[name]())
    return found


def quartiles(values: Any) -> dict[str, float]:
    """{"low", "median", "high"}: the 25th, 50th and 75th percentile."""
    low, median, high = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
    return {"low": float(low), "median": float(median), "high": float(high)}


# ---- our side


class Ours:
    """The recipe's train step: alone on a batch of noise, and in the loop of `train`."""

    def __init__(self, c: Config, mesh: Mesh) -> None:
        self._program = training(c, make_task(c, mesh), mesh)
        self._config, self._first = c, True
        self._batch = self._program.put(rows_of_noise(c))
        self._state = self._program.init()
        self._prefetch = c.train.prefetch
        self.host_seconds: list[float] = []  # of a step in `looped`, one a call
        jax.block_until_ready(self._state)

    @property
    def average(self) -> Any:
        """The average of the weights so far."""
        return self._state.ema

    def run(self, steps: int) -> float:
        """Seconds of a step, its batch being on the devices."""
        began = time.perf_counter()
        for _ in range(steps):
            self._step(self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - began) / steps

    def _step(self, batch: Any) -> Any:
        """One step as `train` takes it: its metrics."""
        p = self._program
        with precise(self._config), p.compiling(self._first):
            examples = p.prepare({}, batch, self._state.step)
            self._state, metrics = p.step(self._state, {}, examples)
        self._first = False
        return metrics

    def looped(self, batches: stream.Batches, steps: int) -> float:
        """Seconds of a step as `train` takes them: from the data set, metrics kept."""
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
        """Seconds of a batch: read, decoded and put on the devices, and no step taken."""
        began = time.perf_counter()
        for batch in ahead(batches, self._program.put, self._prefetch, steps):
            jax.block_until_ready(batch)
        return (time.perf_counter() - began) / steps


def input_pipeline(c: Config) -> stream.Batches | str:
    """The recipe's batches, or why there are none here."""
    try:
        opening.check_data(c)
        return stream.train_batches(opening.data_spec(c), c.seed, c.train.batch_size)
    except UserError as error:
        return str(error)


def rows_of_noise(c: Config) -> dict[str, np.ndarray]:
    """A batch of the recipe's shapes: of a latent DiT cached moments, else images."""
    rng, B = np.random.default_rng(0), c.train.batch_size
    labels = rng.integers(0, c.data.num_classes, B).astype(np.int32)
    shape = (B, c.input_size, c.input_size, c.input_channels)
    noise = rng.standard_normal(shape).astype(np.float32)
    if not c.latent:
        return {"image": np.clip(noise, -1, 1), "label": labels}
    return {"mean": noise, "log_variance": np.full(shape, -5, np.float32), "label": labels}


def timed_sampler(c: Config, mesh: Mesh, params: Any) -> Callable[[], float]:
    """Seconds of drawing one batch of samples with the recipe's DiT, nothing decoded."""
    # The same network and program as a DiT on pixels of the latents' shape: no autoencoder.
    channels: Any = c.input_channels  # which no image has
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
    """(measures the rate of square products in the recipe's precision, FLOP/s; their side)."""
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
                # Several at once, so that an accelerator never waits for its host.
                jax.block_until_ready([product(a, b) for _ in range(4)])
                done += 4
            return 2.0 * side**3 * done / (time.perf_counter() - began)

        return measure

    measured = {side: of(side) for side in sides}
    best = max(sides, key=lambda side: measured[side](0.5))
    return lambda: measured[best](BLOCK_SECONDS / 2), best


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Seconds of each compilation meanwhile; nothing comes from the persistent cache."""
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
    """(bytes, of what): the fullest device's, or on CPUs this process's so far."""
    stats = [device.memory_stats() for device in mesh.local_devices]
    if all(stats):
        return max(s["peak_bytes_in_use"] for s in stats if s), "a device"
    # macOS counts bytes, Linux KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process"


# ---- the peer


class Peer:
    """diffusers' DiT in a process of its own; a context manager that ends it."""

    def __init__(self, python: str, spec: Mapping[str, Any]) -> None:
        self.name = "torch compiled" if spec["compile"] else "torch eager"
        self._python = python
        # Not a pipe: one that nobody reads fills up.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        try:
            self._process = subprocess.Popen(
                [python, "-m", "ditjax.machines.peer"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env={**os.environ, "PYTHONPATH": _import_path()},
            )
        except OSError as error:
            raise UserError(f"--torch_python={python}: {error.strerror}.") from None
        self.told = self._ask(spec)
        self.peak_bytes = 0

    def train(self, steps: int) -> float:
        """Seconds of a step."""
        return self._timed({"run": "train", "steps": steps}) / steps

    def sample(self) -> float:
        """Seconds of one batch of samples."""
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
            self._said.seek(0)
            said = self._said.read().strip()
            why = said.splitlines()[-1] if said else "it printed nothing"
            if "No module named" in why:
                raise UserError(
                    f"--against=torch: {why} in {self._python}: install"
                    " tests/oracles/requirements.txt, or name an interpreter that has them with"
                    " --torch_python=PATH."
                )
            raise UserError(f"--against=torch: the PyTorch process failed: {why}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()


def _import_path() -> str:
    """Where the peer finds this ditjax, and what else the user has there."""
    ours = str(Path(ditjax.__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))


def peer_spec(c: Config, *, compiled: bool, sample: bool) -> dict[str, Any]:
    """What the peer is to build: the recipe's network. Raises UserError for one it has not."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None:
        raise UserError(f"--against=torch: there is no PyTorch peer on {jax.default_backend()}.")
    for key, ours, theirs in (
        ("task", c.task, "diffusion"),
        ("model.kind", c.model.kind, "dit"),
        ("model.block", c.model.block, "adaln_zero"),
        ("model.mlp_ratio", c.model.mlp_ratio, 4.0),
        ("diffusion.timesteps", c.diffusion.timesteps, 1000),
    ):
        if ours != theirs:
            raise UserError(f"--against=torch: config.{key} is {ours!r}, diffusers' is {theirs!r}.")
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
    """All figures of a recipe: what --out writes."""
    mesh = mesh_of(c)
    cost, device = cost_of(c), jax.devices()[0]
    specs = [peer_spec(c, compiled=kind == "torch-compiled", sample=sample) for kind in against]
    with contextlib.ExitStack() as stack:
        # First, for what they lack is known within seconds.
        peers = [stack.enter_context(Peer(torch_python, spec)) for spec in specs]
        with compile_seconds() as compiling:
            ours = Ours(c, mesh)
            compiling.clear()
            first = ours.run(1)
            compiled = sum(compiling)
        once = ours.run(1)
        memory, memory_of = peak_memory(mesh)
        steps = steps or max(1, round(BLOCK_SECONDS / once))
        rate, side = ceiling(c, device)
        sides: dict[str, Callable[[], float]] = {
            "ceiling": rate,
            "ours": functools.partial(ours.run, steps),
        }
        batches = input_pipeline(c)
        if isinstance(batches, stream.Batches):
            stack.enter_context(batches)
            sides["input"] = functools.partial(ours.fed, batches, steps)
            # Of images that a frozen autoencoder encodes on the way only the reading is measured.
            if not make_task(c).reads:
                sides["loop"] = functools.partial(ours.looped, batches, steps)
        first_of = {}
        for peer in peers:
            first_of[peer.name] = peer.train(1)
            sides[peer.name] = functools.partial(peer.train, steps)
        found = turns(sides, rounds)
        sampled = _sampled(c, mesh, ours.average, peers, rounds) if sample else None
    seconds = np.array(found["ours"])
    flops = training_flops(cost.macs, c.train.batch_size)
    attained = flops / seconds / mesh.size
    peak = peak_flops(device.device_kind, c.model.dtype, c.model.matmul)
    return {
        "schema": 1,
        "model": cost.name,
        "parameters": cost.parameters,
        "gflops": cost.gflops,
        "batch_size": c.train.batch_size,
        "dtype": c.model.dtype,
        "mesh": dict(mesh.shape),
        "steps_a_block": steps,
        "rounds": rounds,
        "step_seconds": quartiles(seconds),
        "images_per_second": quartiles(c.train.batch_size / seconds),
        "step_flops": flops,
        "attained_flops_a_device": quartiles(attained),
        "peak_flops": peak,
        "mfu": quartiles(attained / peak) if peak else None,
        "ceiling_flops": quartiles(found["ceiling"]),
        "ceiling_side": side,
        "of_ceiling": quartiles(attained / np.array(found["ceiling"])),
        "compile_seconds": compiled,
        "first_step_seconds": first,
        "peak_bytes": memory,
        "peak_bytes_of": memory_of,
        "peers": [
            {
                "name": peer.name,
                **peer.told,
                "step_seconds": quartiles(found[peer.name]),
                "first_step_seconds": first_of[peer.name],
                "peak_bytes": peer.peak_bytes,
                "ratio": quartiles(np.array(found[peer.name]) / seconds),
            }
            for peer in peers
        ],
        "input": batches
        if isinstance(batches, str)
        else _input(c, found, ours.host_seconds[-rounds:]),
        "sampling": sampled,
    }


def _input(c: Config, found: Mapping[str, list[float]], host: Sequence[float]) -> dict[str, Any]:
    """What the data path gives, and what the loop around the step costs."""
    alone, read = np.array(found["ours"]), np.array(found["input"])
    figures: dict[str, Any] = {
        "images_per_second": quartiles(c.train.batch_size / read),
        "headroom": quartiles(alone / read),
    }
    if "loop" in found:
        loop = np.array(found["loop"])
        figures["loop_step_seconds"] = quartiles(loop)
        # What the loop's step takes beyond the step alone, as a share; and Python's own seconds,
        # most of which the devices do not wait for.
        figures["between_steps"] = quartiles(1 - alone / loop)
        figures["host_seconds"] = quartiles(host)
    return figures


def _sampled(
    c: Config, mesh: Mesh, params: Any, peers: Sequence[Peer], rounds: int
) -> dict[str, Any]:
    """A batch of samples by DDIM with guidance, here and by diffusers' pipeline."""
    c = changed_sampler(c)
    ours = timed_sampler(c, mesh, params)
    sides: dict[str, Callable[[], float]] = {"ours": ours, **{p.name: p.sample for p in peers}}
    found = turns(sides, rounds)
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


def changed_sampler(c: Config) -> Config:
    """The recipe with the sampler of --sample."""
    sample = {
        "sampler": "ddim",
        "steps": f"ddim{DDIM_STEPS}",
        "eta": 0.0,
        "cfg_scale": GUIDANCE,
        "cfg_interval": (0.0, 1.0),
    }
    return changed(c, {"sample": sample})


def text(found: Mapping[str, Any]) -> str:
    """The table that a person reads."""

    def of(q: Mapping[str, float], unit: str = "", scale: float = 1.0) -> str:
        return (
            f"{q['median'] * scale:.4g}{unit} (quartiles {q['low'] * scale:.4g} to"
            f" {q['high'] * scale:.4g})"
        )

    gb = 2.0**30
    rows = [
        ("step", of(found["step_seconds"], " s")),
        ("images/s", of(found["images_per_second"])),
        ("attained", of(found["attained_flops_a_device"], " GFLOP/s a device", 1e-9)),
        (
            "matmul ceiling",
            of(found["ceiling_flops"], " GFLOP/s a device", 1e-9)
            + f", squares of {found['ceiling_side']}",
        ),
        ("of the ceiling", of(found["of_ceiling"], " %", 100)),
        (
            "MFU",
            of(found["mfu"], " %", 100) + f" of {found['peak_flops'] / 1e12:.4g} TFLOP/s"
            if found["mfu"]
            else "no peak is published for this device in this precision",
        ),
        (
            "compilation",
            f"{found['compile_seconds']:.2f} s, first step {found['first_step_seconds']:.2f} s",
        ),
        ("peak memory", f"{found['peak_bytes'] / gb:.2f} GiB of {found['peak_bytes_of']}"),
    ]
    for peer in found["peers"]:
        rows += [
            (
                peer["name"],
                of(peer["step_seconds"], " s a step")
                + f", {peer['peak_bytes'] / gb:.2f} GiB, PyTorch {peer['torch']},"
                f" {peer['parameters']:,} parameters",
            ),
            ("", f"ours is {of(peer['ratio'])} times as fast"),
        ]
    if isinstance(found["input"], str):
        rows.append(("input pipeline", f"not measured: {found['input']}"))
    else:
        rows.append(("input pipeline", of(found["input"]["images_per_second"], " images/s")))
        rows.append(("", f"{of(found['input']['headroom'])} times what the step takes"))
        if "between_steps" in found["input"]:
            share, host = found["input"]["between_steps"], found["input"]["host_seconds"]
            rows.append(("between steps", of(share, " %", 100) + " of a step in the loop"))
            rows.append(("Python", of(host, " ms a step", 1e3)))
    if sampled := found["sampling"]:
        what = f"{sampled['batch_size']} samples, {sampled['steps']} guided DDIM steps"
        rows.append((what, of(sampled["batch_seconds"], " s")))
        for peer in sampled["peers"]:
            rows += [
                (peer["name"], of(peer["batch_seconds"], " s")),
                ("", f"ours is {of(peer['ratio'])} times as fast"),
            ]
    env = found["environment"]
    title = (
        f"{found['model']}, {found['parameters']:,} parameters, {found['gflops']:.4g} Gflops, batch"
        f" {found['batch_size']}, {found['dtype']}, {env['devices']} x {env['device']}"
        f" ({env['cpus']} cores)"
    )
    return "\n".join([title, *aligned(rows, [False, False])])


PEERS = {
    "none": (),
    "torch": ("torch-eager", "torch-compiled"),
    "torch-eager": ("torch-eager",),
    "torch-compiled": ("torch-compiled",),
}


def main(argv: list[str]) -> int:
    """The command."""
    parser = cli.parser("bench", "Times a recipe's train step on the devices that are here.")
    parser.add_argument(
        "--steps", type=int, default=0, help="steps a block (default: as many as fill 2 seconds)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each side (default 5)")
    parser.add_argument(
        "--against",
        default="none",
        choices=sorted(PEERS),
        help="torch: diffusers' DiT in turns with ours, eager and compiled; or one of the two",
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
        help="an interpreter that has PyTorch and diffusers (default: this one)",
    )
    parser.add_argument("--out", help="a JSON file for the figures")
    args, config = cli.parse(parser, argv)
    if args.steps < 0 or args.rounds < 1:
        raise UserError(
            f"--steps={args.steps} --rounds={args.rounds}: expected at least 0 and at least 1."
        )
    if args.against != "none":
        # Two programs share the device: neither may take its memory in advance.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = bench(
        config,
        steps=args.steps,
        rounds=args.rounds,
        against=PEERS[args.against],
        sample=args.sample,
        torch_python=args.torch_python,
    )
    found["environment"] = {
        **environment(typed("bench", argv, drop=("--out", "--torch_python"))),
        "commit": commit(),
    }
    found["config"] = args.recipe
    print(text(found))
    if args.out:
        atomic.write_json(args.out, found)
    return 0


if __name__ == "__main__":
    cli.run(main)
