"""Rows 1 to 6, 8 and 15 to 18: a run is killed, told to end, damaged, starved of disk, poisoned."""

import contextlib
import json
import resource
import shutil
import signal
import time
from pathlib import Path

from tests.faults.harness import (
    INTERVAL,
    STEPS,
    Child,
    Outcome,
    Run,
    SmallDisk,
    Trial,
    check,
    judge,
    log_lines,
    saved,
)

# A process that hears of a peer's end, by a closed connection or by silence, has so long to go.
PEER_SECONDS = 30.0
IN_FLIGHT = 2  # steps that may have begun before it is known that one was bad
GONE_BY = {-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL}
MORE_MESHES = ("1", "8", "2x2x2")


def _until(child: Child, step: int) -> None:
    child.until(lambda: child.last() >= step, f"step {step}")


def _somewhere(trial: Trial, children: list[Child], pause: float = 0.03) -> int:
    """Waits for a random step, and a moment more."""
    step = trial.rng.randint(1, STEPS - 2)
    for child in children:
        _until(child, step)
    trial.pause(pause)
    return step


def killed_mid_step(trial: Trial) -> Outcome:
    """Row 1."""
    mesh = MORE_MESHES[trial.number % len(MORE_MESHES)]
    reference = trial.battery.unbroken(mesh)
    run = trial.battery.run("killed", mesh)
    (child,) = run.start()
    _somewhere(trial, [child])
    child.kill(signal.SIGKILL)
    child.wait()
    run.finish()
    return Outcome(judge(run, reference), f"mesh {mesh}")


# Chains of three steps, in rounds of three updates: a round ends at no checkpoint.
REWARD = (
    "--config.reward.method=ddpo",
    "--config.reward.updates=3",
    "--config.reward.kl=0.1",
    "--config.sample.steps=ddim3",
)


def killed_finetuning(trial: Trial) -> Outcome:
    """Row 18: LoRA beside the weights of a finished run; in every other trial, on a reward."""
    how = "reward" if trial.number % 2 else "data"
    mesh = "1, DiT"
    base = trial.battery.unbroken(mesh).workdir
    lora = (f"--config.adapt.base={base}", "--config.adapt.kind=lora", "--config.adapt.rank=2")
    words = lora + REWARD if how == "reward" else lora
    reference = trial.battery.unbroken(mesh, f"lora, {how}", *words)
    run = trial.battery.run("finetuned", mesh)
    (child,) = run.start(*words)
    _somewhere(trial, [child])
    child.kill(signal.SIGKILL)
    child.wait()
    run.finish(*words)
    return Outcome(judge(run, reference), how)


def killed_while_saving(trial: Trial) -> Outcome:
    """Row 2: at a random moment of a random save."""
    reference = trial.battery.unbroken()
    run = trial.battery.run("saving")
    (child,) = run.start()
    save = INTERVAL * trial.rng.randint(1, STEPS // INTERVAL)
    child.until(lambda: child.last() >= save, f"step {save}")
    trial.pause(0.08)
    child.kill(signal.SIGKILL)
    child.wait()
    halves = [path for path in run.checkpoints.iterdir() if not path.name.isdecimal()]
    run.finish()
    return Outcome(judge(run, reference), "a save cut in two" if halves else "between saves")


def _ended_in_order(run: Run, children: list[Child]) -> None:
    """All said so, with status 0, and their newest step is a checkpoint."""
    statuses = [child.wait() for child in children]
    check(set(statuses) == {0}, f"statuses {statuses}: {children[0].said()[-300:]!r}")
    (last,) = {child.last() for child in children} if len(children) == 1 else [_same(children)]
    if last < STEPS:
        told = f"stopped at step {last} by SIGTERM"
        check(any(told in child.said() for child in children), f"not a word of '{told}'")
    check((run.checkpoints / str(last)).is_dir(), f"step {last} was not saved")


def _same(children: list[Child]) -> int:
    steps = {child.last() for child in children}
    check(len(steps) == 1, f"they stopped at steps {sorted(steps)}")
    return steps.pop()


def _told_to_end(trial: Trial, mesh: str) -> Outcome:
    reference = trial.battery.unbroken(mesh)
    run = trial.battery.run("told", mesh)
    children = run.start(pace=0.05)
    _somewhere(trial, children)
    # Of two, one or both are told, in any order: a scheduler has no clock for it.
    told = children if trial.rng.random() < 0.5 else [trial.rng.choice(children)]
    for child in told:
        child.kill(signal.SIGTERM)
        trial.pause(0.05 * (len(told) - 1))
    at = max(child.last() for child in children)
    _ended_in_order(run, children)
    went_on = children[0].last() - at
    check(went_on <= INTERVAL, f"it went on for {went_on} steps")
    run.finish()
    lost = judge(run, reference)
    check(lost == 0, f"{lost} steps lost to a SIGTERM")
    return Outcome(lost)


def terminated(trial: Trial) -> Outcome:
    """Row 3, one process."""
    return _told_to_end(trial, "1")


def terminated_pair(trial: Trial) -> Outcome:
    """Row 3, two processes."""
    return _told_to_end(trial, "pair")


def out_of_grace(trial: Trial) -> Outcome:
    """Row 4: a second SIGTERM, or the scheduler's SIGKILL, soon after the first."""
    reference = trial.battery.unbroken()
    run = trial.battery.run("grace")
    second = (signal.SIGTERM, signal.SIGKILL)[trial.number % 2]
    if second == signal.SIGTERM:  # in a long step; within a second of the first it is the same one
        step = trial.rng.randint(2, STEPS - 2)
        (child,) = run.start(env={"FAULTS_HOLD": f"{step + 1}:2.5"})
        child.until(lambda: child.last() >= step, f"step {step}")
        child.kill(signal.SIGTERM)
        trial.pause(2.0)
    else:
        (child,) = run.start()
        _somewhere(trial, [child])
        child.kill(signal.SIGTERM)
        trial.pause(0.2)
    child.kill(second)
    status = child.wait()
    check(status in GONE_BY | {0}, f"status {status}: {child.said()[-300:]!r}")
    run.finish()
    return Outcome(judge(run, reference), f"{signal.Signals(second).name}, status {status}")


# ---- damage


def damage(path: Path, how: str, trial: Trial) -> None:
    """Deletes, halves or empties a file, or flips one of its bits."""
    if how == "deleted":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "emptied":
        data.clear()
    elif how == "halved":
        del data[len(data) // 2 :]
    elif data:
        data[trial.rng.randrange(len(data))] ^= 1 << trial.rng.randrange(8)
    path.write_bytes(data)


DAMAGE = ("flipped", "deleted", "halved", "emptied")


def damaged_checkpoint(trial: Trial) -> Outcome:
    """Row 5: any file of the newest checkpoint; every fifth trial a bit in each of its files."""
    reference = trial.battery.unbroken()
    run = trial.battery.copy(trial.battery.cut(), "damaged")
    newest = max(saved(run.checkpoints), default=0)
    check(newest == 3 * INTERVAL, f"the newest checkpoint is of step {newest}")
    folder = run.checkpoints / str(newest)
    there = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    how = DAMAGE[trial.number % len(DAMAGE)]
    chosen = there if trial.number % 5 == 4 else [trial.rng.choice(there)]
    if trial.number == 0:  # the trap itself: a bit of the largest file, which holds the arrays
        chosen = [max(there, key=lambda path: path.stat().st_size)]
    for path in chosen:
        damage(path, how, trial)
    name = str(chosen[0].relative_to(folder)) if len(chosen) == 1 else "every file"
    (child,) = run.finish()
    lost = judge(run, reference)
    start = child.start()
    if start != newest:
        aside = [p.name for p in run.checkpoints.iterdir() if p.name.startswith("damaged")]
        check(bool(aside), f"step {newest} is gone ({how}: {name})")
        check(f"{newest}" in child.said(), f"not a word of step {newest} ({how}: {name})")
    used = "harmless" if start == newest else f"step {start} used"
    return Outcome(lost, f"{how}: {name}: {used}")


# ---- a full disk


def full_disk(trial: Trial) -> Outcome:
    """Row 6: a tmpfs that is filled while it trains; without namespaces, a limit on file sizes."""
    reference = trial.battery.unbroken()
    run = trial.battery.run("full")
    disk = SmallDisk(run.folder / "disk", 16)
    if not disk.ready:
        disk.close()
        return _limited(trial, run, reference)
    try:
        inside = {"workdir": disk.inside / "run", "namespace": disk.namespace}
        (child,) = run.start(pace=0.02, **inside)  # type: ignore[arg-type]
        filled_at = _somewhere(trial, [child])
        disk.fill()
        if child.last() < STEPS:  # else it was done before the disk was full
            child.until(lambda: _filled_again(disk), "its end")
            _loud(child, filled_at)
        child.wait()
        kept = saved(disk.outside / "run" / "checkpoints")
        disk.free()
        (again,) = run.finish(**inside)
        start = again.start()
        check(start is not None and start in {0, *kept}, f"{kept} were kept, {start} was used")
        shutil.copytree(disk.outside / "run", run.workdir)
    finally:
        disk.close()
    return Outcome(judge(run, reference), "tmpfs")


def _filled_again(disk: SmallDisk) -> bool:
    """What a run removes makes room. Never enough of it."""
    disk.fill()
    return False


def _limited(trial: Trial, run: Run, reference: Run) -> Outcome:
    (child,) = run.start(pace=0.02)
    limited_at = _somewhere(trial, [child])
    _, hard = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (2048, hard))
    _loud(child, limited_at)
    run.finish()
    return Outcome(judge(run, reference), "limit on file sizes")


def _loud(child: Child, since: int) -> None:
    """It ended with one line, at once: by the next save at the latest."""
    status = child.wait()
    check(status == 1, f"status {status} on a full disk: {child.said()[-300:]!r}")
    check("checkpoints" in child.error() or "run" in child.error(), child.error())
    late = child.last() - since
    check(late <= 2 * INTERVAL, f"it went on for {late} steps")


# ---- numbers


def poisoned(trial: Trial) -> Outcome:
    """Row 8: records of NaN; in every other trial the run is killed on the way, too."""
    clean = trial.battery.unbroken().starts[0][0].steps()
    steps = sorted(trial.rng.sample(range(2, 6), 2))
    bad = {clean[step]["ids"][0] for step in steps}
    words = ("--config.train.max_bad_steps=5",)
    env = {"FAULTS_NAN": ",".join(map(str, bad))}
    reference = trial.battery.unbroken("1", f"nan {sorted(bad)}", *words, env=env)
    run = reference
    lost = 0
    if trial.number % 2:
        run = trial.battery.run("poisoned")
        (child,) = run.start(*words, env=env)
        _somewhere(trial, [child])
        child.kill(signal.SIGKILL)
        child.wait()
        run.finish(*words, env=env)
        lost = judge(run, reference)
    line = reference.starts[0][0].steps()
    hit = [step for step in line if bad & set(line[step]["ids"])]
    check(len(hit) >= len(steps), f"only {hit} had a bad record")
    for step in range(2, STEPS + 1):
        same = line[step]["weights"] == line[step - 1]["weights"]
        check(same == (step in hit), f"step {step}: the weights {'stood' if same else 'moved'}")
    named = {
        index
        for logged in log_lines(reference)
        for skipped in logged.get("skipped_steps", ())
        for index in skipped["index"]
    }
    check(bad <= named, f"examples {sorted(bad - named)} are not in the log")
    check("skipped" in reference.starts[0][0].said(), "not a word of the skipped steps")
    # Steps 2 to 5 are bad, and one more than may be: it stops, with its last good state kept.
    dead = trial.battery.run("dead")
    (child,) = dead.start(
        "--config.train.max_bad_steps=3",
        pace=0.0,
        env={"FAULTS_NAN": ",".join(str(i) for step in range(2, 6) for i in clean[step]["ids"])},
    )
    status = child.wait()
    check(status in (1, 2), f"status {status} after bad steps in a row: {child.said()[-300:]!r}")
    child.error()
    check(child.last() <= 5 + IN_FLIGHT, f"it went on to step {child.last()}")
    check(bool(saved(dead.checkpoints)), "no checkpoint is left")
    return Outcome(lost, f"steps {len(hit)}")


# ---- two processes


def peer_lost(trial: Trial) -> Outcome:
    """Row 15: one of two dies, or stands still."""
    reference = trial.battery.unbroken("pair")
    run = trial.battery.run("peers", "pair")
    children = run.start(pace=0.02)
    _somewhere(trial, children)
    victim = trial.rng.randrange(2)
    how = (signal.SIGKILL, signal.SIGSTOP)[trial.number % 2]
    children[victim].kill(how)
    began = time.monotonic()
    try:
        status = children[1 - victim].wait(PEER_SECONDS)
    finally:
        children[victim].kill(signal.SIGKILL)
    seconds = time.monotonic() - began
    children[victim].wait()
    check(status == 1, f"status {status} of the other: {children[1 - victim].said()[-300:]!r}")
    check(f"process {victim} of 2" in children[1 - victim].error(), "the dead one is not named")
    run.finish()
    return Outcome(judge(run, reference), f"{how.name}: {seconds:.1f} s")


# ---- other meshes


def other_mesh(trial: Trial) -> Outcome:
    """Row 16: 8 devices -> 1, or 1 -> 2x2x2."""
    before, after = (("8", "1"), ("1, DiT", "2x2x2"))[trial.number % 2]
    reference = trial.battery.unbroken(before)
    run = trial.battery.copy(trial.battery.cut(before), "moved")
    (child,) = run.finish(mesh=after)
    check(child.start() == 3 * INTERVAL, f"it began at step {child.start()}")
    began = next(line for line in child.lines() if "start" in line)
    expected = reference.starts[0][0].steps()[3 * INTERVAL]
    check(began["state"] == expected["state"], "what was restored is not bit-equal")
    lost = judge(run, reference, rtol=1e-5)
    worst = max(
        abs(float.fromhex(line["loss"]) / float.fromhex(theirs["loss"]) - 1)
        for step, line in child.steps().items()
        if (theirs := reference.starts[0][0].steps()[step])
    )
    return Outcome(lost, f"{before} -> {after}: {worst:.1e}")


# ---- logs


def torn_log(trial: Trial) -> Outcome:
    """Row 17: the last line of metrics.jsonl is cut anywhere, or one of later steps is begun."""
    from ditjax.runs.log import last_metrics

    reference = trial.battery.unbroken()
    run = trial.battery.copy(trial.battery.cut(), "torn")
    log = run.workdir / "metrics.jsonl"
    text = log.read_bytes()
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    whole = json.loads(text[:last].splitlines()[-1])
    if trial.number % 2:
        following = json.dumps({"step": STEPS - 1, "loss": 1.0}).encode()
        text += following + b"\n" + following[: trial.rng.randint(1, len(following) - 1)]
    else:
        text = text[: trial.rng.randint(last + 1, len(text) - 2)]
        log.write_bytes(text)
        found = last_metrics(run.workdir)
        check(found["step"] == whole["step"], f"a torn line was read: {found}")
    log.write_bytes(text)
    run.finish()
    return Outcome(judge(run, reference))
