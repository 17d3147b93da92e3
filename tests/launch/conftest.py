"""A checkout on a machine whose cloud and cluster tools are stand-ins that record their words."""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Every stand-in writes its words down; what it does then stands after it.
RECORD = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" $'\\1' >>"$RECORD"
next() { head -n 1 "$1" 2>/dev/null; sed --in-place 1d "$1" 2>/dev/null; }
"""
STAND_INS = {
    "docker": "cat >/dev/null",
    "kubectl": '[ "$1" != apply ] || cat >"$RECORD.yaml"',
    "scontrol": "",
    "sudo": "",
    "xpk": "",
    # Each task of a step in turn, as if on nodes of its own.
    "srun": """
while [[ $1 = --* ]]; do shift; done
for ((i = 0; i < ${SLURM_JOB_NUM_NODES:-1}; i++)); do SLURM_PROCID=$i "$@" || exit; done
""",
    # One worker, whose home directory is $WORKER; the state of the slice is the next of $STATES.
    "gcloud": """
last=${*: -1}
case "$*" in
  *" list "*) line=$(next "$STATES"); [ "$line" = NONE ] || echo "${line:-ACTIVE}" ;;
  *" create "*) [ -z "${REFUSED:-}" ] ;;
  *" scp "*) cp "$5" "$WORKER/ditjax.tar.gz" ;;
  *" ssh "*) cd "$WORKER" && HOME=$WORKER bash -c "${last#--command=}" ;;
esac
""",
    # The options that say nodes and arrays, and the first job of the array.
    "sbatch": """
while [[ $1 = --* ]]; do
  case $1 in
    --nodes=*) export SLURM_JOB_NUM_NODES=${1#*=} ;;
    --array=0-*) export SLURM_ARRAY_TASK_ID=0 SLURM_ARRAY_TASK_MIN=0
      export SLURM_ARRAY_TASK_COUNT=$((${1#*-*-*-} + 1)) ;;
    *) echo "sbatch: no such option: $1" >&2; exit 1 ;;
  esac
  shift
done
SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=7 SLURMD_NODENAME=node1 bash "$@"
""",
}
# A Python whose command ends with the next of $STATUSES.
PYTHON = 'status=$(next "$STATUSES"); exit "${status:-0}"'


@functools.cache
def stamps() -> bytes:
    """What launch/venv.sh notes of the sets of requirements that it installed."""
    return subprocess.run(
        [
            "bash",
            "-c",
            "cksum <requirements.txt; for f in launch/requirements/*.txt;"
            " do cat requirements.txt $f | cksum; done",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout


def environment(folder: Path) -> None:
    """A .venv that launch/venv.sh finds complete, with the stand-in for its Python."""
    bin_ = folder / ".venv/bin"
    bin_.mkdir(parents=True)
    executable(bin_ / "python", RECORD + PYTHON)
    (folder / ".venv/requirements.cksum").write_bytes(stamps())


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """`run` is a shell command in the checkout; `words` is what the stand-ins were called with."""

    def __init__(self, folder: Path) -> None:
        self.root, self.worker = folder / "checkout", folder / "worker"
        self.bin, self._record = folder / "bin", folder / "record"
        self.states, self.statuses = folder / "states", folder / "statuses"
        self.root.mkdir()
        self.bin.mkdir()
        for name in ("launch", "ditjax", "experiments", "requirements.txt"):
            (self.root / name).symlink_to(ROOT / name)
        for name, does in STAND_INS.items():
            executable(self.bin / name, RECORD + does)
        (self.bin / "python3").symlink_to(sys.executable)
        environment(self.root)
        environment(self.worker / "ditjax")

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """In an environment that has nothing of ours but `variables`."""
        env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.root),
            "PAUSE": "0.1",
            "RECORD": str(self._record),
            "WORKER": str(self.worker),
            "TMPDIR": str(self.root),
            "STATES": str(self.states),
            "STATUSES": str(self.statuses),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a",
            **variables,
        }
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.root,
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    def commit(self) -> None:
        """Makes the checkout a git repository of one commit."""
        made = self.run("echo .venv >.gitignore; git init -q && git add -A && git commit -qm all")
        assert made.returncode == 0, made.stderr

    def words(self, of: str = "") -> list[list[str]]:
        """Of every stand-in, or of one without its name."""
        text = self._record.read_text() if self._record.exists() else ""
        calls = [call.split("\0")[:-1] for call in text.split("\1\0")[:-1]]
        return [call[1:] for call in calls if call[0] == of] if of else calls

    def manifest(self) -> str:
        """What kubectl was given."""
        return Path(f"{self._record}.yaml").read_text()

    def read_back(self, line: str) -> list[str]:
        """A printed command as the words that a shell reads in it."""
        words = subprocess.run(
            ["bash", "-c", 'eval "words=($1)"; printf "%s\\0" "${words[@]}"', "", line],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        return words.split("\0")[:-1]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def flags(words: Sequence[str], name: str) -> list[str]:
    """The values of --name=VALUE among words."""
    return [w.partition("=")[2] for w in words if w.startswith(f"--{name}=")]
