"""The processes of one run: how they start and end, and what they agree on."""

import ctypes
import dataclasses
import ipaddress
import os
import re
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from ditjax.errors import UserError
from ditjax.parallel import watch

# JAX's own heartbeat is the second line: the watch speaks first, and says who it was.
_LATER_SECONDS = 10
_HEARD_SECONDS = 1.0  # for the watch to hear of a closed connection, after a collective failed


@dataclasses.dataclass(frozen=True)
class Place:
    """Which one of how many processes this is, and where number 0 is met.

    `device_ids`: the local devices that are its own; None is all.
    """

    host: str
    port: int
    count: int
    index: int
    device_ids: tuple[int, ...] | None = None


def place_of(coordinator: str, count: int, index: int) -> Place:
    """'HOST:PORT' of process 0, as it was given. Raises UserError."""
    host, colon, port = coordinator.rpartition(":")
    legal = re.fullmatch("[0-9]{1,5}", port) is not None and 0 < int(port) < 2**16
    if not colon or not host or not legal:
        raise UserError(
            f"coordinator {coordinator!r}: expected HOST:PORT of process 0, such as 10.0.0.2:8476"
        )
    if count < 1:
        raise UserError(f"{count} processes: expected at least 1.")
    if not 0 <= index < count:
        raise UserError(f"process {index} of {count}: they are numbered from 0 to {count - 1}.")
    return Place(host.strip("[]"), int(port), count, index)


def detected(seconds: int) -> Place:
    """What JAX finds of Slurm, Open MPI, Kubernetes or a TPU pod. Raises UserError for none."""
    # jax.distributed.initialize finds the same, but does not tell before it has met the others.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
        )
    except Exception as error:  # of metadata servers, Kubernetes' client, variables not set
        raise UserError(
            f"JAX could not find out about the other processes ({type(error).__name__}: {error}):"
            " give --coordinator, --processes and --process."
        ) from None
    if address is None or count is None or index is None:
        raise UserError(
            "--distributed: nothing here tells JAX of other processes (no Slurm, Open MPI,"
            " Kubernetes or TPU pod): give --coordinator, --processes and --process."
        )
    place = place_of(address, count, index)
    return dataclasses.replace(place, device_ids=tuple(devices) if devices else None)


# As jax.distributed itself: a process is part of one run, from its start to its end.
_watch: watch.Watch | None = None


def start(
    place: Place,
    said: Mapping[str, Any],
    *,
    initialization_seconds: float,
    heartbeat_seconds: float,
) -> None:
    """Meets the other processes, before any computation: from here on all end together.

    `said` is what all must say alike: the command and its recipe. Raises UserError.
    """
    global _watch
    if place.count == 1 or _watch:
        return
    said = {**said, "jax": jax.__version__}
    local = loopback(place.host)
    _wait_at_abort()
    if place.index == 0:
        _watch = watch.first(
            place.port,
            place.count,
            said,
            initialization_seconds,
            heartbeat_seconds,
            {"port": _free_port(local)},
            bind=local,
        )
    else:
        _watch = watch.another(
            place.host,
            place.port,
            place.index,
            place.count,
            said,
            initialization_seconds,
            heartbeat_seconds,
        )
    # JAX would catch SIGTERM and leave it to the program to ask for it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{bracketed(place.host)}:{_watch.go['port']}",
        place.count,
        place.index,
        place.device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(initialization_seconds)),
        coordinator_bind_address=f"{bracketed(local)}:{_watch.go['port']}" if local else None,
        heartbeat_timeout_seconds=int(heartbeat_seconds) + _LATER_SECONDS,
    )
    try:
        count = jax.process_count()
    except RuntimeError as error:
        raise UserError(
            f"{_watch.name(place.index)} found no device of its own ({error}): expected one process"
            " for each host, or for each GPU."
        ) from None
    if count != place.count:
        raise UserError(
            f"{place.count} processes were started, and their devices make {count}: expected one"
            " process for each host of the slice."
        )


def loopback(host: str) -> str:
    """The address of a host that is this machine to itself, where no other can come; else ''."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ""
    return str(address) if ipaddress.ip_address(address).is_loopback else ""


def bracketed(host: str) -> str:
    """As an address with a port after it has it."""
    return f"[{host}]" if ":" in host else host


def _free_port(bind: str) -> int:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, 0), family=family) as server:
        return int(server.getsockname()[1])


def _wait_at_abort() -> None:
    """JAX's C++ aborts as soon as process 0 is gone: it sleeps first, so that the watch speaks.

    sleep(SIGABRT) is sleep(6): C's own, called where the signal is handled. No Python runs there.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def leave(line: str, status: int) -> None:
    """Of several processes: all end, this one with `line`. Of one: returns."""
    if _watch:
        _watch.leave(line, status)


def hear_first() -> None:
    """Of several processes: what failed here may be another's end. Then the watch ends this one."""
    if _watch:
        time.sleep(_HEARD_SECONDS)


def finish() -> None:
    """Of several processes: waits until all have done their work."""
    global _watch
    if _watch:
        jax.distributed.shutdown()
        _watch.close()
        _watch = None


def several() -> bool:
    """Whether this process is one of several of a run."""
    return _watch is not None


def wish_to_stop(why: str) -> None:
    """Of several processes: all shall stop after the same step; `stops_at` says when."""
    if _watch:
        _watch.wish(why)


def stops_at(step: int) -> str:
    """Of several processes: why all stop after this step, '' while they do not.

    Every process asks after each step, and before the first.
    """
    return _watch.stop.why if _watch and _watch.stop.passed(step) else ""


def name() -> str:
    """'process 1 of 2 (HOST)'; 'this process' where there is one."""
    return _watch.name(_watch.index) if _watch else "this process"


def agreed(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first process's [start, stop) ranges, on every process: only it looks at the disk."""
    if jax.process_count() == 1:
        return list(ranges)
    count = multihost_utils.broadcast_one_to_all(np.int32(len(ranges)))
    mine = np.zeros((int(count), 2), np.int32)
    if jax.process_index() == 0:
        mine[:] = np.asarray(ranges, np.int32).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in multihost_utils.broadcast_one_to_all(mine)]


def agreed_step(step: int | None) -> int | None:
    """The first process's step of a checkpoint, on every process."""
    found = agreed([] if step is None else [(step, 0)])
    return found[0][0] if found else None


def everywhere(condition: bool) -> bool:
    """Whether it holds on every process; all call it."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.bool_(condition)).all())


def gathered(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """A leaf whole in this process's memory, wherever its shards are; every process calls it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def meet() -> None:
    """Returns when every process has called it: what the others read may then be removed."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ditjax")


def local_rows(sharding: Sharding, count: int) -> np.ndarray:
    """Which rows of a global [count, ...] array this process's devices hold: i[n], ascending.

    In no way a block by the process's number: a mesh orders the devices, and axes that do not split
    the rows repeat them, on other processes too.
    """
    held = sharding.addressable_devices_indices_map((count,))
    parts = {index[0].indices(count)[:2] for index in held.values() if index is not None}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in parts]))


def global_rows(sharding: Sharding, count: int, rows: np.ndarray, value: np.ndarray) -> jax.Array:
    """The global array [count, ...] of which this process has its `local_rows`, value[n, ...]."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(count)
        first = int(np.searchsorted(rows, start))
        return value[first : first + stop - start]

    return jax.make_array_from_callback((count, *value.shape[1:]), sharding, part)


def from_whole(sharding: Sharding, value: np.ndarray) -> jax.Array:
    """The global array of a value that every process has whole."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0
