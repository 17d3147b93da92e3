"""What launch/ does with stand-ins for clouds and clusters, up to the commands of ditjax.

Those are read by our own parsers, so that a flag that is renamed here breaks a test there.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from ditjax import cli
from ditjax.machines.chips import COMPILER_FLAGS
from tests.launch.conftest import RECORD, ROOT, Machine, executable, flags

INDEX = (ROOT / "docs/README.md").read_text(encoding="utf-8")
MACHINES = (ROOT / "docs/machines.md").read_text(encoding="utf-8")
RECIPE = "--config=experiments/imagenet256.py:XL/2"
TRAIN = f"train {RECIPE} --workdir=/share/run"
POD = {"NAME": "dit", "ZONE": "us-west4-a", "TPU": "v5e:4x4"}
GKE = {"NAME": "dit", "IMAGE": "registry/dit:1", "TPU": "v5e:4x4"}
V5E = "tpu-v5-lite-podslice"


class ParsedError(Exception):
    """A command's flags were read without fault."""


def read_by_ditjax(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`-m ditjax.COMMAND --FLAG...` goes through that command's own parser, and no further."""
    m, module, *rest = words
    assert m == "-m"
    command = importlib.import_module(module)
    real = cli.parse
    monkeypatch.setattr(cli, "start_processes", lambda *_: None)

    def parse(*args: Any) -> None:
        real(*args)
        raise ParsedError

    monkeypatch.setattr(cli, "parse", parse)
    with pytest.raises(ParsedError):
        command.main(rest)
    monkeypatch.undo()


def faults(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """What a JSON schema of types, required and known names, items and enums finds wrong."""
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "number": (int, float),
    }
    legal = schema.get("type", [])
    for name in [legal] if isinstance(legal, str) else legal:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if is_int if name == "integer" else isinstance(value, types[name]):
            break
    else:
        if legal:
            return [f"{where} is no {legal}: {value!r}"]
    found = [] if value in schema.get("enum", [value]) else [f"{where} is {value!r}"]
    if isinstance(value, dict):
        found += [
            f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value
        ]
        others = schema.get("additionalProperties", {})
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, others)
            if inner is False:
                found.append(f"{where}.{name} is unknown")
            else:
                found += faults(item, inner, f"{where}.{name}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{where}[{i}]")
    return found


JOBSET = yaml.safe_load((Path(__file__).parent / "jobset.schema.yaml").read_text())
# SkyPilot 0.14's task, the fields that launch/sky.yaml uses; it knows others.
SKY = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "workdir": {"type": "string"},
        "num_nodes": {"type": "integer"},
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"accelerators": {"type": "string"}, "use_spot": {"type": "boolean"}},
        },
        "envs": {"type": "object"},
        "file_mounts": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["source", "mode"],
                "properties": {
                    "source": {"type": "string"},
                    "mode": {"type": "string", "enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
                },
            },
        },
        "setup": {"type": "string"},
        "run": {"type": "string"},
    },
}


# --- every script ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "variables", "line"),
    [
        ("host.sh", {}, "no command given"),
        ("host.sh trian --config=x", {}, "trian is no command of ditjax"),
        ("host.sh build", {}, "build is no command of ditjax"),
        (f"host.sh {TRAIN}", {"ACCELERATOR": "cuda"}, "ACCELERATOR=cuda: expected cuda12, cuda13"),
        ("tpu_pod.sh", POD, "'' is no action: expected create, run, keep"),
        ("tpu_pod.sh run", POD, "no command given"),
        ("tpu_pod.sh create", POD | {"NAME": ""}, "NAME is not set"),
        ("tpu_pod.sh create", POD | {"ZONE": ""}, "ZONE is not set: expected a zone"),
        ("tpu_pod.sh create", POD | {"TPU": ""}, "TPU is not set: expected a generation"),
        ("tpu_pod.sh create", POD | {"TPU": "v9:4x4"}, "TPU=v9:4x4: expected v4, v5e, v5p or v6e"),
        ("tpu_pod.sh create", POD | {"TPU": "v5e:4x4x4"}, "expected a topology of 2 sides"),
        ("tpu_pod.sh create", POD | {"TPU": "v5p:4x4"}, "of 3 sides, such as 4x4x4"),
        ("tpu_pod.sh create", POD | {"TPU": "v5e:4x0"}, "expected a topology of 2 sides"),
        (f"gke.sh run {TRAIN}", GKE | {"IMAGE": ""}, "IMAGE is not set"),
        (f"gke.sh run {TRAIN}", GKE | {"NAME": "Dit_1"}, "NAME=Dit_1: expected lower-case"),
        (f"gke.sh run {TRAIN}", GKE | {"CHIPS": "3"}, "CHIPS=3 does not divide the 16 chips"),
        (f"gke.sh xpk {TRAIN}", GKE, "CLUSTER is not set"),
        ("gke.sh start", GKE, "'start' is no action: expected image, run, xpk, log or delete"),
        (f"slurm.sh {TRAIN}", {"SLURM_ARRAY_TASK_ID": "0"}, "train in an array: expected sweep"),
        ("slurm.sh sweep", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NUM_NODES": "2"}, "--nodes=1"),
        (
            "slurm.sh encode",
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1"},
            "expected --array=0-N",
        ),
        (f"slurm.sh {TRAIN}", {"SLURM_NTASKS_PER_NODE": "8"}, "expected --ntasks-per-node=1"),
        (f"slurm.sh {TRAIN}", {"SLURM_SUBMIT_DIR": "/"}, "run sbatch from there"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(machine, command, variables, line):
    done = machine.run(f"bash launch/{command}", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not machine.words()


@pytest.mark.parametrize(
    ("command", "variables"),
    [
        ("tpu_pod.sh create", POD),
        ("tpu_pod.sh create", POD | {"TPU": "v5p:4x4x8", "SPOT": "1", "PROJECT": "p"}),
        ("tpu_pod.sh log", POD),
        ("tpu_pod.sh stop", POD),
        ("tpu_pod.sh delete", POD),
        (f"gke.sh xpk {TRAIN} '--config.sample.cfg_interval=(0.0, 0.7)'", GKE | {"CLUSTER": "c"}),
        ("gke.sh log", GKE),
        ("gke.sh delete", GKE),
        (f"slurm.sh {TRAIN} '--config.sample.cfg_interval=(0.0, 0.7)'", {}),
        (
            f"slurm.sh {TRAIN}",
            {"SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "10007"},
        ),
    ],
)
def test_a_dry_run_prints_what_is_run(machine, command, variables):
    machine.worker.joinpath("ditjax.pid").write_text("999999999")
    printed = machine.run(f"bash launch/{command}", DRY_RUN="1", **variables)
    assert printed.returncode == 0, printed.stderr
    assert not machine.words()
    machine.run(f"bash launch/{command}", **variables)
    assert machine.read_back(printed.stdout) == machine.words()[0]


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_a_script_says_how_it_is_used(path):
    head = path.read_text().partition("\nset ")[0].partition("\n\n")[0]
    sourced = head.startswith("# shellcheck shell=bash\n# Sourced by the other scripts")
    assert sourced or (head.startswith("#!/usr/bin/env bash\n") and f"launch/{path.name}" in head)
    assert sourced or "# usage" in head


def test_what_the_manual_recipes_and_launch_name_is_there():
    texts = [INDEX, MACHINES, *(p.read_text() for p in (ROOT / "launch").glob("*.*"))]
    texts += [p.read_text() for p in (ROOT / "experiments").glob("*.py")]
    text = "\n".join(texts)
    commands = set(re.findall(r"python -m ditjax\.(\w+)", text)) - {"NAME", "X"}
    table = INDEX.partition("| command | what it does |")[2].partition("\n\n")[0]
    commands |= set(re.findall(r"^\| `(\w+)", table, re.M))
    assert len(commands) > 10
    assert [name for name in commands if not (ROOT / f"ditjax/{name}.py").is_file()] == []
    recipes = set(re.findall(r"\b(experiments/[a-z]\w*\.py)", text))
    scripts = set(re.findall(r"\b(launch/[\w/]+\.(?:sh|yaml|txt))", text))
    assert len(recipes) > 4
    assert len(scripts) > 7
    assert [name for name in recipes | scripts if not (ROOT / name).is_file()] == []


def test_an_accelerators_requirement_is_the_packages_extra():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    found = sorted((ROOT / "launch/requirements").glob("*.txt"))
    assert [path.stem for path in found] == ["cuda12", "cuda13", "tpu"]
    for path in found:
        assert extras[path.stem].startswith(f"{path.read_text().strip()} ")


def test_the_image_copies_what_is_there():
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    copied = [line.split()[1] for line in lines if line.startswith("COPY ")]
    assert copied == ["requirements.txt", "launch/requirements", "."]
    assert all((ROOT / path).exists() for path in copied)
    (default,) = [line.partition("=")[2] for line in lines if line.startswith("ARG ACCELERATOR=")]
    assert (ROOT / f"launch/requirements/{default}.txt").is_file()


# --- one host --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "starts", "end"),
    [
        ([0], 1, 0),
        ([1, 139, 0], 3, 0),  # died twice
        ([1, 2, 0], 2, 2),  # a user's mistake
        ([130, 0], 1, 130),  # an interrupt
        ([1, 1, 1, 7, 0], 4, 7),  # three restarts are enough
    ],
)
def test_a_command_that_dies_is_started_again(machine, statuses, starts, end):
    machine.statuses.write_text("".join(f"{status}\n" for status in statuses))
    done = machine.run(f"bash launch/host.sh {TRAIN}", RESTARTS="3")
    assert done.returncode == end
    assert machine.words() == starts * [["python", "-m", "ditjax.train", *TRAIN.split()[1:]]]


# A command that saves when it is told to end, and then ends with $SAVED; $TOLD counts how often.
SAVES = (
    RECORD
    + """trap 'echo told >>"$TOLD"; sleep 0.3; exit "${SAVED:-0}"' TERM
echo up >"$UP"
for ((i = 0; i < 200; i++)); do sleep 0.05; done
"""
)


def saving(machine: Machine, python: Path) -> dict[str, str]:
    """That python saves when it is told to end; the variables that it goes by."""
    executable(python, SAVES)
    return {"TOLD": str(machine.root / "told"), "UP": str(machine.root / "up")}


@pytest.mark.parametrize("whom", ["$!", "-$!"])  # the script, or all of its group
@pytest.mark.parametrize(
    ("script", "saved", "end"),
    [
        (f"launch/host.sh {TRAIN}", "0", 143),
        (f"launch/task.sh .venv/bin/python -m ditjax.{TRAIN}", "0", 143),
        (f"launch/task.sh .venv/bin/python -m ditjax.{TRAIN}", "1", 1),
    ],
)
def test_what_is_told_to_end_saves_and_counts_as_stopped(machine, script, saved, end, whom):
    variables = saving(machine, machine.root / ".venv/bin/python")
    done = machine.run(
        f'setsid bash {script} & until [ -e "$UP" ]; do sleep 0.02; done; kill -TERM -- {whom}\n'
        "wait $!",
        SAVED=saved,
        **variables,
    )
    assert done.returncode == end, done.stderr
    assert (machine.root / "told").read_text() == "told\n"
    assert machine.words() == [["python", "-m", "ditjax.train", *TRAIN.split()[1:]]]


def test_a_machine_with_an_old_python_gets_a_newer_one(machine):
    (machine.bin / "python3").unlink()
    executable(machine.bin / "python3", "#!/bin/sh\nexit 1")
    executable(machine.bin / "uv", f"{RECORD}[ $2 = install ] || echo {sys.executable}")
    done = machine.run(f"bash launch/host.sh {TRAIN}")
    assert done.returncode == 0, done.stderr
    assert machine.words("uv") == [
        ["python", "install", "--quiet", "3.12"],
        ["python", "find", "--managed-python", "3.12"],
    ]
    assert len(machine.words("python")) == 1


# --- TPU pods --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpu", "gcloud", "xpk", "label", "hosts"),
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4"], "v4-32", "tpu-v4-podslice", 4),
        ("v5e:1x1", ["--accelerator-type=v5litepod-1"], "v5litepod-1", V5E, 1),
        ("v5e:16x16", ["--accelerator-type=v5litepod-256"], "v5litepod-256", V5E, 64),
        ("v5p:4x4x8", ["--type=v5p", "--topology=4x4x8"], "v5p-256", "tpu-v5p-slice", 32),
        ("v6e:4x8", ["--accelerator-type=v6e-32"], "v6e-32", "tpu-v6e-slice", 8),
    ],
)
def test_what_the_tools_call_a_slice(machine, tpu, gcloud, xpk, label, hosts):
    machine.run("bash launch/tpu_pod.sh create", **POD | {"TPU": tpu})
    (words,) = machine.words("gcloud")
    assert [w for w in words if w.startswith(("--type", "--topology", "--acc"))] == gcloud
    machine.run(f"bash launch/gke.sh xpk {TRAIN}", **GKE | {"TPU": tpu, "CLUSTER": "c"})
    assert flags(machine.words("xpk")[0], "tpu-type") == [xpk]
    machine.run(f"bash launch/gke.sh run {TRAIN}", **GKE | {"TPU": tpu})
    job = yaml.safe_load(machine.manifest())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": tpu.partition(":")[2],
    }


def test_a_pod_gets_the_commit_and_every_worker_its_command(machine, monkeypatch):
    machine.commit()
    done = machine.run(
        f"bash launch/tpu_pod.sh run {TRAIN} '--config.sample.cfg_interval=(0.0, 0.7)'",
        SETUP="sudo mount 'a b'",
        **POD,
    )
    assert done.returncode == 0, done.stderr
    assert wait_for(machine.worker / "ditjax.status").strip() == "0"
    sends, starts = machine.words("gcloud")
    assert sends[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert flags(sends, "worker") == flags(starts, "worker") == ["all"]
    assert machine.words("sudo") == [["mount", "a b"]]
    (words,) = machine.words("python")
    assert words == [
        "-m",
        "ditjax.train",
        RECIPE,
        "--workdir=/share/run",
        "--config.sample.cfg_interval=(0.0, 0.7)",
        "--distributed",
    ]
    read_by_ditjax(words, monkeypatch)


def wait_for(path: Path) -> str:
    """What a process in the background writes to a file."""
    for _ in range(300):
        if path.exists() and path.read_text():
            break
        time.sleep(0.1)
    return path.read_text()


def test_a_pod_that_runs_a_command_gets_no_second(machine):
    machine.commit()
    machine.worker.joinpath("ditjax.pid").write_text(str(os.getpid()))
    done = machine.run(f"bash launch/tpu_pod.sh run {TRAIN}", **POD)
    assert done.returncode == 2
    assert done.stderr.endswith("error: a command is running here: stop it first\n")
    assert not machine.words("python")


def runs(pid: int) -> bool:
    """Whether it is there, and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip().strip("Z"))


def test_a_pod_that_is_stopped_saves_first(machine):
    machine.commit()
    variables = saving(machine, machine.worker / "ditjax/.venv/bin/python")
    machine.run(f"bash launch/tpu_pod.sh run {TRAIN}", **POD, **variables)
    wait_for(machine.root / "up")
    pid = int(machine.worker.joinpath("ditjax.pid").read_text())
    machine.run("bash launch/tpu_pod.sh stop", **POD)
    for _ in range(300):
        if not runs(pid):
            break
        time.sleep(0.1)
    assert (machine.root / "told").read_text() == "told\n"
    assert not machine.worker.joinpath("ditjax.status").exists()  # stopped is no status


def verbs(machine: Machine) -> list[str]:
    """What gcloud was asked for, but for how things stand."""
    return [w[3] for w in machine.words("gcloud") if w[3] != "list" and "--worker=0" not in w]


def test_a_pod_that_is_taken_away_is_asked_for_again(machine):
    machine.commit()
    states = ["NONE", "WAITING_FOR_RESOURCES", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE"]
    machine.states.write_text("".join(f"{state}\n" for state in states))
    done = machine.run(f"bash launch/tpu_pod.sh keep {TRAIN}", **POD)
    assert done.returncode == 0, done.stderr
    assert verbs(machine) == ["create", "delete", "create", "scp", "ssh"]
    assert len(machine.words("python")) == 1


def test_keeping_ends_with_the_commands_own_status(machine):
    machine.commit()
    machine.statuses.write_text("2\n")
    done = machine.run(f"bash launch/tpu_pod.sh keep {TRAIN}", **POD)
    assert done.returncode == 2
    assert verbs(machine) == ["scp", "ssh"]


def test_keeping_a_pod_that_is_refused_ends(machine):
    machine.commit()
    machine.states.write_text("NONE\n")
    done = machine.run(f"bash launch/tpu_pod.sh keep {TRAIN}", REFUSED="1", **POD)
    assert done.returncode == 2
    assert done.stderr == "error: gcloud refused to create dit: its message is above\n"


# --- Kubernetes ------------------------------------------------------------------------------


@pytest.mark.parametrize("variables", [{}, {"CLAIM": "share", "SLICES": "2", "CHIPS": "8"}])
def test_the_jobset_is_what_kubernetes_takes(machine, variables, monkeypatch):
    words = [RECIPE, "--workdir=/share/it's", "--config.sample.cfg_interval=(0.0, 0.7)"]
    done = machine.run(
        f"bash launch/gke.sh run train {' '.join(map(json.dumps, words))}", **GKE, **variables
    )
    assert done.returncode == 0, done.stderr
    assert machine.words() == [["kubectl", "apply", "--filename=-"]]
    jobset = yaml.safe_load(machine.manifest())
    assert faults(jobset, JOBSET) == []
    (jobs,) = jobset["spec"]["replicatedJobs"]
    assert jobs["replicas"] == int(variables.get("SLICES", 1))
    pod = jobs["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == int(variables.get("CHIPS", 4))
    assert jobs["template"]["spec"]["parallelism"] * chips == 16
    assert container["command"] + container["args"] == [
        "bash",
        "launch/task.sh",
        "python",
        "-m",
        "ditjax.train",
        *words,
        "--distributed",
    ]
    read_by_ditjax(container["command"][3:] + container["args"], monkeypatch)
    # Every volume that is mounted is there, and a claim of that name.
    mounted = [mount["name"] for mount in container.get("volumeMounts", ())]
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes", ())}
    assert [claims[name] for name in mounted] == ([variables["CLAIM"]] if variables else [])
    # A user's mistake (2) ends it, anything else starts it again.
    (rule,) = jobs["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 50
    assert pod["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "failurepolicy"), {}, "spec.failurepolicy is unknown"),
        (("spec", "replicatedJobs", 0, "replicas"), "2", "replicas is no integer: '2'"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), {}, "containers"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Fail", "action is 'Fail'"),
        (("kind",), "Job", "kind is 'Job'"),
    ],
)
def test_the_schema_finds_faults(machine, path, value, fault):
    machine.run(f"bash launch/gke.sh run {TRAIN}", **GKE)
    jobset = yaml.safe_load(machine.manifest())
    node = jobset
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (found,) = faults(jobset, JOBSET)
    assert fault in found


# --- Slurm -----------------------------------------------------------------------------------

# Options of sbatch in 22.05, of those that a job of ours may have.
SBATCH = {
    "account",
    "array",
    "constraint",
    "cpus-per-task",
    "error",
    "exclusive",
    "gpus-per-node",
    "gres",
    "job-name",
    "mem",
    "nodes",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "signal",
    "time",
}


def test_the_options_of_slurm_are_known_and_stand_before_any_command():
    head, _, body = (ROOT / "launch/slurm.sh").read_text().partition("\nset -euo pipefail\n")
    assert "#SBATCH" not in body  # Slurm reads none after the first command
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in head.splitlines()
        if line.startswith("#SBATCH")
    )
    assert set(options) <= SBATCH
    assert options["ntasks-per-node"] == "1"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])  # to the script, which has a trap for it
    assert re.search(r"^stoppable USR1 srun ", body, re.M)
    assert {"requeue", "open-mode"} <= set(options)


def test_two_nodes_are_two_processes(machine, monkeypatch):
    variables = {"SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "10007"}
    done = machine.run(f"bash launch/slurm.sh {TRAIN}", **variables)
    assert done.returncode == 0, done.stderr
    ours = ["-m", "ditjax.train", RECIPE, "--workdir=/share/run"]
    assert machine.words("python") == [
        [*ours, "--coordinator=n1:20007", "--processes=2", f"--process={i}"] for i in range(2)
    ]
    for words in machine.words("python"):
        read_by_ditjax(words, monkeypatch)


@pytest.mark.parametrize(
    ("command", "flags_"),
    [
        ("sweep --config=experiments/imagenet256.py --workdir=/w", ["--index=3"]),
        ("encode --config=experiments/imagenet256.py --out=/l", ["--index=3", "--count=12"]),
    ],
)
def test_an_array_is_cells_of_a_sweep_or_shares_of_an_encoding(
    machine, command, flags_, monkeypatch
):
    array = {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_COUNT": "12",
    }
    done = machine.run(f"bash launch/slurm.sh {command}", **array)
    assert done.returncode == 0, done.stderr
    name, *words = command.split()
    assert machine.words("python") == [["-m", f"ditjax.{name}", *words, *flags_]]
    read_by_ditjax(machine.words("python")[0], monkeypatch)


@pytest.mark.parametrize(
    ("status", "restarts", "end", "queued"),
    [("0", "0", 0, False), ("1", "0", 0, True), ("2", "0", 2, False), ("137", "10", 137, False)],
)
def test_a_job_that_dies_is_queued_again(machine, status, restarts, end, queued):
    machine.statuses.write_text(f"{status}\n")
    done = machine.run(
        f"bash launch/slurm.sh {TRAIN}", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts
    )
    assert done.returncode == end
    assert machine.words("scontrol") == ([["requeue", "7"]] if queued else [])


def test_a_job_whose_time_is_up_saves_and_is_queued_again(machine):
    executable(
        machine.bin / "srun",
        RECORD
        + """trap 'printf "saved\\0\\1\\0" >>"$RECORD"; exit 0' TERM
kill -USR1 $PPID
for ((i = 0; i < 200; i++)); do sleep 0.05; done
""",
    )
    done = machine.run(f"bash launch/slurm.sh {TRAIN}", SLURM_JOB_ID="7")
    assert done.returncode == 0
    assert [words[0] for words in machine.words()] == ["srun", "saved", "scontrol"]
    assert machine.words("scontrol") == [["requeue", "7"]]


# --- SkyPilot --------------------------------------------------------------------------------


def sky() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch/sky.yaml").read_text())


def test_the_task_is_what_skypilot_takes():
    task = sky()
    assert faults(task, SKY) == []
    # null: `sky` refuses to start without a value.
    assert [name for name, value in task["envs"].items() if value is None] == ["COMMAND", "BUCKET"]
    assert set(re.findall(r"\$\{(\w+)\}", json.dumps(task["file_mounts"]))) <= set(task["envs"])
    assert task["envs"]["DITJAX_DATA"].startswith(next(iter(task["file_mounts"])))


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilots_nodes_are_processes(machine, nodes, monkeypatch):
    for rank in range(nodes):
        done = machine.run(
            sky()["setup"] + "\n" + sky()["run"],
            COMMAND=TRAIN,
            ACCELERATOR="cuda12",
            SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6",
            SKYPILOT_NUM_NODES=str(nodes),
            SKYPILOT_NODE_RANK=str(rank),
        )
        assert done.returncode == 0, done.stderr
    several = ["--coordinator=10.0.0.5:8476", "--processes=2"]
    assert machine.words("python") == [
        ["-m", "ditjax.train", *TRAIN.split()[1:]]
        + ([*several, f"--process={rank}"] if nodes > 1 else [])
        for rank in range(nodes)
    ]
    read_by_ditjax(machine.words("python")[-1], monkeypatch)


# --- the manual ------------------------------------------------------------------------------


def test_the_manuals_commands_start_what_they_say(machine, monkeypatch):
    """The section's block of commands, run as written."""
    machine.commit()
    machine.states.write_text("NONE\n")
    (machine.bin / "sky").write_text(
        '#!/usr/bin/env bash\nwhile [ $# -gt 1 ]; do [ $1 = --env ] && export "$2"; shift; done\n'
        f"export SKYPILOT_NUM_NODES=1\n{sky()['run']}"
    )
    (machine.bin / "sky").chmod(0o755)
    section = MACHINES.partition("## Scripts\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    done = machine.run(f"set -e\n{commands}", RESTARTS="0")
    assert done.returncode == 0, done.stderr
    started = machine.words("python")
    (container,) = yaml.safe_load(machine.manifest())["spec"]["replicatedJobs"][0]["template"][
        "spec"
    ]["template"]["spec"]["containers"]
    started.append(container["command"][3:] + container["args"])
    names = [words[1].removeprefix("ditjax.") for words in started]
    assert sorted(names) == ["encode"] * 2 + ["sweep"] + 6 * ["train"]
    for words in started:
        read_by_ditjax(words, monkeypatch)


def test_published_flags_of_the_compiler_are_added(machine):
    call = "set -euo pipefail; . launch/machine.sh; PY=python3; compiler_flags; echo $XLA_FLAGS"
    done = machine.run(f"bash -c '{call}'", COMPILER_FLAGS="gpu", XLA_FLAGS="--xla_a=1")
    assert done.stdout.strip() == f"--xla_a=1 {COMPILER_FLAGS['gpu'].flags}", done.stderr
    assert machine.run(f"bash -c '{call}'", XLA_FLAGS="--xla_a=1").stdout == "--xla_a=1\n"
    wrong = machine.run(f"bash -c '{call}'", COMPILER_FLAGS="cpu")
    assert wrong.returncode == 2
    assert "COMPILER_FLAGS=cpu: expected gpu or tpu" in wrong.stderr
