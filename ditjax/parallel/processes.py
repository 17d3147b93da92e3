"""The processes of one run: how they start and end, and how they exchange values."""

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

# JAX's own heartbeat is the second line of defence: the watch reacts first, and names the process.
_LATER_SECONDS = 10
_NOTICE_SECONDS = 1.0  # for the watch to notice a closed connection after a collective failed


@dataclasses.dataclass(frozen=True)
class Place:
    """The index of this process, the number of processes, and the address of process 0.

    `device_ids` are the local devices of this process; None means all.
    """

    host: str
    port: int
    count: int
    index: int
    device_ids: tuple[int, ...] | None = None


def parse_place(coordinator: str, count: int, index: int) -> Place:
    """Parse the 'HOST:PORT' of process 0, and check the numbers. Raises UserError."""
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


def detect_place(seconds: int) -> Place:
    """What JAX detects of Slurm, Open MPI, Kubernetes or a TPU pod. Raises UserError for none."""
    # jax.distributed.initialize detects the same, but connects to the others before it returns it.
    from jax._src.clusters import ClusterEnv

    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
        )
    except Exception as error:  # metadata servers, the client of Kubernetes, unset variables
        raise UserError(
            f"JAX could not detect the other processes ({type(error).__name__}: {error}):"
            " give --coordinator, --processes and --process."
        ) from None
    if address is None or count is None or index is None:
        raise UserError(
            "--distributed: JAX detected no other processes (no Slurm, Open MPI, Kubernetes or TPU"
            " pod): give --coordinator, --processes and --process."
        )
    place = parse_place(address, count, index)
    return dataclasses.replace(place, device_ids=tuple(devices) if devices else None)


# Global, as jax.distributed is: a process belongs to one run for its lifetime.
_watch: watch.Watch | None = None


def start(
    place: Place,
    shared: Mapping[str, Any],
    *,
    initialization_seconds: float,
    heartbeat_seconds: float,
) -> None:
    """Meet the other processes and initialise JAX, before any computation; then all end together.

    `shared` are the settings that must be the same in all: the command and its recipe. Raises
    UserError.
    """
    global _watch
    if place.count == 1 or _watch:
        return
    shared = {**shared, "jax": jax.__version__}
    local = loopback(place.host)
    _wait_at_abort()
    bounds = initialization_seconds, heartbeat_seconds
    if place.index == 0:
        port = {"port": _free_port(local)}
        _watch = watch.lead(place.port, place.count, shared, *bounds, port, bind=local)
    else:
        _watch = watch.join(place.host, place.port, place.index, place.count, shared, *bounds)
    _initialize_jax(place, local, _watch.go["port"], *bounds)
    _check_devices(place, _watch.name(place.index))


def _initialize_jax(
    place: Place, local: str, port: int, initialization_seconds: float, heartbeat_seconds: float
) -> None:
    # Otherwise JAX would catch SIGTERM, and expect the program to poll for it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{bracketed(place.host)}:{port}",
        place.count,
        place.index,
        place.device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(initialization_seconds)),
        coordinator_bind_address=f"{bracketed(local)}:{port}" if local else None,
        heartbeat_timeout_seconds=int(heartbeat_seconds) + _LATER_SECONDS,
    )


def _check_devices(place: Place, name: str) -> None:
    """Raise UserError unless every process has devices."""
    try:
        count = jax.process_count()
    except RuntimeError as error:
        raise UserError(
            f"{name} found no device ({error}): expected one process for each host, or for each"
            " GPU."
        ) from None
    if count != place.count:
        raise UserError(
            f"{place.count} processes were started, but their devices belong to {count}: expected"
            " one process for each host of the slice."
        )


def loopback(host: str) -> str:
    """The address of `host` if it is a loopback one, which no other machine can reach; or ''."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ""
    return str(address) if ipaddress.ip_address(address).is_loopback else ""


def bracketed(host: str) -> str:
    """`host` as it is written before a port: IPv6 addresses are in brackets."""
    return f"[{host}]" if ":" in host else host


def _free_port(bind: str) -> int:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, 0), family=family) as server:
        return int(server.getsockname()[1])


def _wait_at_abort() -> None:
    """Delay the abort of JAX's C++ when process 0 is gone, so that the watch acts first.

    The signal handler is C's own sleep, called as sleep(SIGABRT) = sleep(6): Python cannot run
    there.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def abort(line: str, status: int) -> None:
    """End all processes, this one with `line`. Returns if there is only one process."""
    if _watch:
        _watch.abort(line, status)


def wait_for_abort() -> None:
    """After an error: if the cause is that another process ended, the watch ends this one here."""
    if _watch:
        time.sleep(_NOTICE_SECONDS)


def finish() -> None:
    """Wait until all processes have done their work."""
    global _watch
    if _watch:
        jax.distributed.shutdown()
        _watch.close()
        _watch = None


def is_distributed() -> bool:
    """Whether this process is one of several of a run."""
    return _watch is not None


def request_stop(why: str) -> None:
    """Ask all processes to stop after the same step, which `stop_reason` then reports."""
    if _watch:
        _watch.request_stop(why)


def stop_reason(step: int) -> str:
    """Why all processes stop after this step; '' if they go on.

    Every process must call it after each step, and before the first.
    """
    return _watch.stop.why if _watch and _watch.stop.passed(step) else ""


def name() -> str:
    """'process 1 of 2 (HOST)', or 'this process' if there is only one."""
    return _watch.name(_watch.index) if _watch else "this process"


def broadcast_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return process 0's [start, stop) ranges in every process: it alone reads the disk."""
    if jax.process_count() == 1:
        return list(ranges)
    count = multihost_utils.broadcast_one_to_all(np.int32(len(ranges)))
    mine = np.zeros((int(count), 2), np.int32)
    if jax.process_index() == 0:
        mine[:] = np.asarray(ranges, np.int32).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in multihost_utils.broadcast_one_to_all(mine)]


def broadcast_step(step: int | None) -> int | None:
    """Return the checkpoint's step of process 0 in every process."""
    found = broadcast_ranges([] if step is None else [(step, 0)])
    return found[0][0] if found else None


def everywhere(condition: bool) -> bool:
    """Whether the condition is true in every process; all must call it."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.bool_(condition)).all())


def gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Copy a whole array to this process's memory, wherever its shards are; all must call it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def barrier() -> None:
    """Return when every process has called it, such as before removing what others read."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ditjax")


def local_rows(sharding: Sharding, count: int) -> np.ndarray:
    """The rows of a global [count, ...] array that this process's devices hold: i[n], ascending.

    They need not be the block of this process's index: the mesh orders the devices, and axes that
    do not split the rows repeat them, in other processes too.
    """
    held = sharding.addressable_devices_indices_map((count,))
    parts = {index[0].indices(count)[:2] for index in held.values() if index is not None}
    return np.unique(np.concatenate([np.arange(start, stop) for start, stop in parts]))


def global_rows(sharding: Sharding, count: int, rows: np.ndarray, value: np.ndarray) -> jax.Array:
    """Make a global array [count, ...] from `value` [n, ...], the `local_rows` of this process."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop, _ = index[0].indices(count)
        first = int(np.searchsorted(rows, start))
        return value[first : first + stop - start]

    return jax.make_array_from_callback((count, *value.shape[1:]), sharding, part)


def from_whole(sharding: Sharding, value: np.ndarray) -> jax.Array:
    """Make a global array from a value that every process has as a whole."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """A batch [B, ...] filled with zero rows to [size, ...], so that one shape is compiled."""
    return np.pad(rows, ((0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)))


def is_primary() -> bool:
    """Whether this is process 0, which writes the files of a run."""
    return jax.process_index() == 0
