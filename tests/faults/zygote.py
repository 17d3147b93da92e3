"""Starts watched commands without their imports, which are most of a small run's time.

A process that has imported everything and has no thread yet; it forks a child for each request. The
children are processes like any other: with a session of their own, killed by the signals of
`tests.faults.harness`, and with this process, should it die.

Lines of JSON, in: {"id", "words", "env", "out", "namespace"}; out: {"ready"}, then {"id", "pid"}
and, when it has ended, {"id", "status", "seconds"}: a negative status is a signal, the seconds are
the CPU's. The end of the input ends all.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


def _call(name: str, *args: int) -> None:
    """A function of libc; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        raise OSError(ctypes.get_errno(), f"{name}{args}")


def _become(request: dict[str, Any]) -> list[str]:
    """In the child: its own session, output, environment and namespaces; its words."""
    os.setsid()
    if sys.platform == "linux":
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(request["env"])
    if request["namespace"]:
        here = os.getcwd()
        for kind, flag in (("user", _CLONE_NEWUSER), ("mnt", _CLONE_NEWNS)):
            space = os.open(f"/proc/{request['namespace']}/ns/{kind}", os.O_RDONLY)
            _call("setns", space, flag)
            os.close(space)
        os.chdir(here)
    return list(request["words"])


def _serve() -> list[str]:
    """Forks until the input ends; returns in a child only, with its words."""
    children: dict[int, int] = {}
    commands, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(ready=len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1)
    rest = b""
    while True:
        readable, _, _ = select.select([commands], [], [], 0.01 if children else None)
        while children:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if not pid:
                break
            seconds = used.ru_utime + used.ru_stime
            answer(id=children.pop(pid), status=os.waitstatus_to_exitcode(status), seconds=seconds)
        if not readable:
            continue
        data = os.read(commands, 1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                os.close(commands)
                answers.close()
                return _become(request)
            children[pid] = request["id"]
            answer(id=request["id"], pid=pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    gc.set_threshold(200_000, 100, 1000)  # as tests/conftest.py, for the children, too
    # What the commands import; nothing here may ask JAX for its devices, which starts threads.
    from ditjax import convert, evaluate, sample, sweep, train  # noqa: F401
    from tests.faults import child

    gc.freeze()
    child.main(_serve())
