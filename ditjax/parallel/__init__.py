"""Meshes, sharding rules, processes and compilation. Importing it sets the XLA flags it needs."""

import os
from importlib.metadata import version

_SHARDING_FLAG = "--xla_enable_hlo_sharding_v3"


def xla_flags(flags: str, jaxlib: str) -> str:
    """Return `flags` with what `ditjax.parallel` needs of this version of jaxlib.

    jaxlib 0.11 and 0.12 write shardings by mesh axis by default. XLA's partitioner compares them
    with tiled ones and warns of an involuntary full rematerialization where there is none (fsdp
    beside context or tensor, data = 1), which `no_rematerialization` would turn into an error. XLA
    aborts on flags that it does not know, so other versions get none.
    """
    major, minor = (int(number) for number in jaxlib.split(".")[:2])
    if not (0, 11) <= (major, minor) < (0, 13) or _SHARDING_FLAG in flags:
        return flags
    return f"{flags} {_SHARDING_FLAG}=false".strip()


# XLA reads the variable when JAX starts its first backend; child processes inherit it.
_given = os.environ.get("XLA_FLAGS", "")
if (_flags := xla_flags(_given, version("jaxlib"))) != _given:
    os.environ["XLA_FLAGS"] = _flags
