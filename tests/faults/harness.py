"""Runs that are hurt, and the oracle that says whether anything was lost.

"Nothing lost": (a) the union of a run's steps over its restarts equals an unbroken run's, (b) no
step has two digests, (c) at most one interval of checkpoints and one save in flight were lost at a
restart, (d) every example comes once an epoch, (e) no temporary file is left after the next start.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.commands.conftest import TINY, TOY
from tests.commands.pair import TRAINED

ROOT = Path(__file__).parents[2]
NOTHING: Mapping[str, str] = {}
SECONDS = 900.0  # far more than anything takes; a hang is a loss
INTERVAL, STEPS, EXAMPLES = 4, 20, 100
# A hundred examples: an epoch ends every 6.25 steps of 16.
SHORT = (
    f"--config.data.split=train[:{EXAMPLES}]",
    "--config.train.log_every_steps=1",
    f"--config.train.checkpoint_every_steps={INTERVAL}",
    "--config.train.keep_checkpoints=2",
    f"--config.train.steps={STEPS}",
)
TRAIN = (*TOY, *SHORT)  # what is lost does not depend on the network
# Where it is asked of: it has heads that are split, and products that LoRA knows.
DIT = (*TINY, *SHORT)
# Devices, processes and flags.
MESHES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "1": (1, 1, TRAIN),
    "8": (8, 1, TRAIN),
    "1, DiT": (1, 1, DIT),
    "2x2x2": (
        8,
        1,
        (*DIT, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    ),
    # Two processes of one device each: collectives of more are slow on a few cores.
    "pair": (
        1,
        2,
        (
            *TRAINED,
            *SHORT,
            "--config.mesh.fsdp=2",
            "--config.distributed.heartbeat_seconds=5",
        ),
    ),
}
_STRAY = re.compile(r"tmp|temp|partial|\.deleted$|\.part$|~$")


class LostError(AssertionError):
    """Something was lost: what."""


def check(holds: bool, what: str) -> None:
    """Raises LostError unless it holds."""
    if not holds:
        raise LostError(what)


class Child:
    """A process that the zygote started."""

    def __init__(self, out: Path, oracle: Path) -> None:
        self.out, self.oracle = out, oracle
        self.pid = 0
        self.status: int | None = None
        self.seconds = 0.0  # of the CPU, what it waited for included
        self.changed = threading.Condition()

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit status, negative for a signal; LostError for one that does not end."""
        with self.changed:
            self.changed.wait_for(lambda: self.status is not None, seconds)
        if self.status is None:
            self.kill(signal.SIGKILL)
            raise LostError(f"still there after {seconds:.0f} s: {self.said()[-300:]!r}")
        return self.status

    def kill(self, number: int) -> None:
        """A signal; none where it has ended."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool], what: str = "") -> bool:
        """Waits for it; False if the process ended first."""
        end = time.monotonic() + SECONDS
        while not condition():
            if self.status is not None:
                return condition()
            check(time.monotonic() < end, f"never came: {what}")
            time.sleep(0.002)
        return True

    def said(self) -> str:
        """Standard output and error."""
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def error(self) -> str:
        """Its one line of error; LostError where it has none, or a traceback."""
        said = self.said()
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        check(len(lines) == 1 and "Traceback" not in said, f"no clear line: {said[-300:]!r}")
        return lines[0]

    def lines(self) -> list[dict[str, Any]]:
        """What the oracle has on record; a torn last line is none."""
        if not self.oracle.exists():
            return []
        text = self.oracle.read_bytes()
        return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]

    def steps(self) -> dict[int, dict[str, Any]]:
        """The record of each step."""
        return {line["step"]: line for line in self.lines() if "step" in line}

    def start(self) -> int | None:
        """The step that it started from; None if it never came to train."""
        return next((line["start"] for line in self.lines() if "start" in line), None)

    def last(self) -> int:
        """Its newest step, or the one that it started from; 0 for none."""
        if not self.oracle.exists():
            return 0
        for line in reversed(self.oracle.read_bytes().split(b"\n")[:-1]):
            told = json.loads(line)
            if "compiled" not in told:
                return int(told.get("step", told.get("start", 0)))
        return 0

    def compiled(self) -> bool:
        """Whether it asked XLA for anything."""
        return any("compiled" in line for line in self.lines())


class Zygote:
    """The process that starts the others (`tests.faults.zygote`)."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env={**os.environ, **environment, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout
        ready = self._process.stdout.readline()
        if not ready:
            raise RuntimeError("the process that starts the others died: its message is above")
        self.threads: int = json.loads(ready)["ready"]
        self._children: dict[int, Child] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def start(
        self,
        words: Sequence[str],
        out: Path,
        oracle: Path,
        env: Mapping[str, str],
        namespace: int = 0,
    ) -> Child:
        """A watched command: words are its name and flags."""
        assert self._process.stdin
        child = Child(out, oracle)
        with self._lock:
            number = next(self._ids)
            self._children[number] = child
            request = {
                "id": number,
                "words": list(words),
                "out": str(out),
                "namespace": namespace,
                "env": {"FAULTS_ORACLE": str(oracle), **env},
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        with child.changed:
            if not child.changed.wait_for(lambda: child.pid or child.status is not None, SECONDS):
                raise RuntimeError("the process that starts the others does not answer")
        return child

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            told = json.loads(line)
            self._tell(self._children[told["id"]], told)
        for child in list(self._children.values()):  # it is gone, and they with it
            if child.status is None:
                self._tell(child, {"status": -signal.SIGKILL})

    def used(self) -> float:
        """Seconds of the CPU that the children took that have ended."""
        return sum(child.seconds for child in list(self._children.values()))

    @staticmethod
    def _tell(child: Child, told: dict[str, Any]) -> None:
        with child.changed:
            child.pid = told.get("pid", child.pid)
            child.seconds = told.get("seconds", child.seconds)
            child.status = told.get("status", child.status)
            child.changed.notify_all()

    def close(self) -> None:
        """Ends it, and it ends its children."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class SmallDisk:
    """A tmpfs of its own in a namespace that a sleeping shell holds: a full disk, without root.

    `inside` is its path for children in the namespace, `outside` for all others.
    """

    def __init__(self, mount: Path, mebibytes: int) -> None:
        self.inside = mount
        mount.mkdir(parents=True)
        command = f"mount -t tmpfs -o size={mebibytes}m faults {mount} && echo ready && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._holder.stdout
        self.ready = self._holder.stdout.readline() == "ready\n"
        self.namespace = self._holder.pid
        self.outside = Path(f"/proc/{self._holder.pid}/root{mount}")

    def fill(self) -> None:
        """Until nothing more fits."""
        with (self.outside / "filler").open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def free(self) -> None:
        """What `fill` took."""
        (self.outside / "filler").unlink()

    def close(self) -> None:
        """The tmpfs ends with its holder."""
        assert self._holder.stdin
        self._holder.stdin.close()
        self._holder.wait()


@dataclass
class Run:
    """A run's directory, and each start of it: one child, or two that are one run."""

    battery: "Battery"
    folder: Path
    mesh: str
    starts: list[list[Child]] = field(default_factory=list)

    @property
    def workdir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def start(
        self,
        *more: str,
        mesh: str = "",
        pace: float = 0.005,
        namespace: int = 0,
        workdir: Path | None = None,
        env: Mapping[str, str] = NOTHING,
    ) -> list[Child]:
        """The same command again, on this mesh or another."""
        devices, count, flags = MESHES[mesh or self.mesh]
        number = len(self.starts)
        words = ["train", *flags, f"--workdir={workdir or self.workdir}", *more]
        if count > 1:
            with socket.create_server(("127.0.0.1", 0)) as server:
                words.append(f"--coordinator=127.0.0.1:{server.getsockname()[1]}")
            words.append(f"--processes={count}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts.append([])
        for i in range(count):
            self.starts[-1].append(
                self.battery.start(
                    [*words, *([f"--process={i}"] if count > 1 else [])],
                    self.folder / f"said-{number}-{i}.txt",
                    self.folder / f"oracle-{number}-{i}.jsonl",
                    {"XLA_FLAGS": xla_flags(devices), "FAULTS_PACE": str(pace), **env},
                    namespace,
                )
            )
        return self.starts[-1]

    def finish(self, *more: str, **kwargs: Any) -> list[Child]:
        """Starts it, and it must come to its end."""
        children = self.start(*more, pace=0.0, **kwargs)
        for child in children:
            status = child.wait()
            check(status == 0, f"status {status}: {child.said()[-300:]!r}")
        return children


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of this process with another number of devices."""
    count = "--xla_force_host_platform_device_count"
    others = [w for w in os.environ.get("XLA_FLAGS", "").split() if not w.startswith(count)]
    return " ".join([*others, f"{count}={devices}"])


class Battery:
    """What all rows share: the zygote, prepared data, unbroken runs, directories of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.data = root / "data"
        # What is lost does not depend on how fast it computes; compiling is most of a trial's time.
        self.zygote = Zygote({"DITJAX_DATA": str(self.data), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
        self._numbers = itertools.count()
        self._locks: dict[str, threading.Lock] = {}
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._making = threading.local()
        self.breaks = ""  # the row whose product is broken, but for what `once` makes

    def folder(self, name: str) -> Path:
        """A new directory."""
        path = self.root / f"{name}-{next(self._numbers)}"
        path.mkdir()
        return path

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, made by the first that asks."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._made:
                self._making.now = True
                try:
                    self._made[name] = make()
                finally:
                    self._making.now = False
        return self._made[name]

    def run(self, name: str, mesh: str = "1") -> Run:
        """A run that has not begun."""
        if mesh != "1":
            self.unbroken("1")  # which prepares the data
        return Run(self, self.folder(name), mesh)

    def unbroken(
        self, mesh: str = "1", key: str = "", *more: str, env: Mapping[str, str] = NOTHING
    ) -> Run:
        """A run that nothing disturbed."""

        def make() -> Run:
            run = self.run("unbroken", mesh)
            run.finish(*more, env=env)
            return run

        return make() if key and self.breaks else self.once(f"unbroken {mesh} {key}", make)

    def cut(self, mesh: str = "1") -> Run:
        """A run that was killed once its checkpoint of step 12 was there: for copies of it.

        A later step was logged, which the copies take again.
        """

        def make() -> Run:
            run = self.run("cut", mesh)
            (child,) = run.start(pace=0.05)
            step = run.checkpoints / str(3 * INTERVAL)
            check(child.until(step.exists), "it ended before it was cut")
            log = run.workdir / "metrics.jsonl"
            later = f'"step": {3 * INTERVAL + 1},'
            check(child.until(lambda: later in log.read_text()), "it ended before it was cut")
            child.kill(signal.SIGKILL)
            child.wait()
            return run

        return self.once(f"cut {mesh}", make)

    def copy(self, run: Run, name: str) -> Run:
        """The same directory, to be hurt, with the same past."""
        made = self.run(name, run.mesh)
        shutil.copytree(run.workdir, made.workdir)
        made.starts = list(run.starts)
        return made

    def command(self, folder: Path, *words: str, devices: int = 1) -> Child:
        """Any command, which ends by itself."""
        number = next(self._numbers)
        return self.start(
            words,
            folder / f"said-{number}.txt",
            folder / f"oracle-{number}.jsonl",
            {"XLA_FLAGS": xla_flags(devices)},
        )

    def start(
        self,
        words: Sequence[str],
        out: Path,
        oracle: Path,
        env: Mapping[str, str],
        namespace: int = 0,
    ) -> Child:
        """As the zygote's, of a product that may be broken."""
        if self.breaks and not getattr(self._making, "now", False):
            env = {**env, "FAULTS_BREAK": self.breaks}
        return self.zygote.start(words, out, oracle, env, namespace)

    def close(self) -> None:
        """Ends every process that it started, and those that they started."""
        self.zygote.close()
        mark = f"FAULTS_ORACLE={self.root}/".encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):  # a sweep's cells; empty on a Mac
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Outcome(NamedTuple):
    """Of a trial in which nothing was lost."""

    steps_lost: int = 0
    note: str = ""


class Trial(NamedTuple):
    """What a row is given: the battery, random numbers of the trial's own, and its number."""

    battery: Battery
    rng: random.Random
    number: int

    def pause(self, seconds: float) -> None:
        """At most so long."""
        time.sleep(self.rng.uniform(0, seconds))


# ---- the oracle


def judge(
    run: Run, reference: Run, *, rtol: float = 0.0, interval: int = INTERVAL, epochs: bool = True
) -> int:
    """The most steps that a restart lost; LostError for anything that should not be lost.

    With an `rtol` losses may differ by so much and states at will: on another mesh. Without
    `epochs` it is another data set.
    """
    lost = 0
    for i in range(len(run.starts[0])):
        attempts = [children[i] for children in run.starts if i < len(children)]
        lost = max(lost, _judge_process(attempts, reference.starts[0][i], rtol, interval))
    if epochs:
        check_epochs(run)
    check_directory(run, reference)
    _check_log(run, reference, rtol)
    return lost


def _judge_process(attempts: Sequence[Child], unbroken: Child, rtol: float, interval: int) -> int:
    expected = unbroken.steps()
    end = max(expected)
    union: dict[int, dict[str, Any]] = {}
    lost = 0
    reached = 0
    for attempt in attempts:
        for step, line in attempt.steps().items():
            same = line if not rtol else {**line, "state": "", "weights": "", "loss": ""}
            earlier = union.setdefault(step, same)
            check(same == earlier, f"step {step} has two digests")
            check(line["ids"] == expected[step]["ids"], f"step {step} had other examples")
            if rtol:
                ours, theirs = (float.fromhex(x["loss"]) for x in (line, expected[step]))
                near = abs(ours - theirs) <= rtol * abs(theirs)
                check(near, f"loss of step {step}: {ours!r} for {theirs!r}")
            else:
                check(line == expected[step], f"step {step} is not the unbroken run's")
        start = attempt.start()
        if start is None:
            continue
        began = next(line for line in attempt.lines() if "start" in line)
        if start and not rtol:
            same_state = began["state"] == expected[start]["state"]
            check(same_state, f"what was restored is not step {start}")
        lost = max(lost, reached - start)
        check(reached - start <= 2 * interval, f"from step {reached} back to step {start}")
        reached = max(reached, attempt.last())
    check(reached == end, f"it ended at step {reached}, not {end}")
    check(set(union) == set(expected), f"steps missing: {sorted(set(expected) - set(union))}")
    return lost


def _ids(run: Run) -> dict[int, list[int]]:
    """The examples of each step, over all processes."""
    found: dict[int, list[int]] = {}
    for i in range(max(map(len, run.starts))):
        mine: dict[int, list[int]] = {}
        for children in run.starts:
            if i < len(children):
                mine |= {step: line["ids"] for step, line in children[i].steps().items()}
        for step, ids in mine.items():
            found.setdefault(step, []).extend(ids)
    return found


def check_epochs(run: Run) -> None:
    """Every example comes once an epoch."""
    count = MESHES[run.mesh][1]
    found = _ids(run)
    if count > 1:  # which rows of the global batch a process has is the mesh's matter
        seen = [i for step in sorted(found) for i in sorted(found[step])]
        times = [seen.count(i) for i in range(EXAMPLES)]
        check(max(times) - min(times) <= 1, "an example came too often, or not at all")
        return
    stream = [i for step in sorted(found) for i in found[step]]
    for first in range(0, len(stream), EXAMPLES):
        epoch = stream[first : first + EXAMPLES]
        whole = len(epoch) == EXAMPLES
        check(len(set(epoch)) == len(epoch), f"epoch {first // EXAMPLES} repeats an example")
        check(not whole or set(epoch) == set(range(EXAMPLES)), "an epoch lacks an example")


def tree(folder: Path) -> Iterator[Path]:
    """Every file and directory below, relative to it."""
    for path in sorted(folder.rglob("*")):
        yield path.relative_to(folder)


def check_directory(run: Run, reference: Run) -> None:
    """What an unbroken run leaves, damaged checkpoints set aside apart, and nothing temporary."""

    def names(folder: Path) -> set[str]:
        return {path.name for path in folder.iterdir() if not path.name.startswith("events.")}

    stray = [str(path) for path in tree(run.workdir) if _STRAY.search(path.name)]
    check(not stray, f"left behind: {', '.join(stray[:3])}")
    there, expected = names(run.workdir), names(reference.workdir)
    check(there == expected, f"the directory holds {sorted(there ^ expected)}")
    # One that was stopped has saved where it stopped, too.
    ours, theirs = saved(run.checkpoints), saved(reference.checkpoints)
    right = (ours[-1:], len(ours)) == (theirs[-1:], len(theirs))
    check(right, f"checkpoints {ours}, not {theirs}")


def saved(checkpoints: Path) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def log_lines(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without its clock; every line must be whole."""
    text = (run.workdir / "metrics.jsonl").read_text()
    try:
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise LostError(f"metrics.jsonl has a line that is none: {error}") from None
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def _check_log(run: Run, reference: Run, rtol: float) -> None:
    ours, theirs = log_lines(run), log_lines(reference)
    if rtol:
        ours, theirs = ([{"step": line["step"]} for line in lines] for lines in (ours, theirs))
    check(ours == theirs, "metrics.jsonl is not the unbroken run's")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below by its name: to see that nothing was touched."""
    there = [path for path in tree(folder) if (folder / path).is_file()]
    return {str(path): (folder / path).read_bytes() for path in there}
