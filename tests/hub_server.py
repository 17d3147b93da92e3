"""A stand-in of the hub's HTTP on loopback: what `files/hub.py` asks for, and its faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ditjax.files import hub


class Hub:
    """Repositories by name, {file: content}. `half` is a file of which half arrives.

    `asked` lists the requests, `created` the repositories that were made, and whether privately.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.half, self.closed = "", False
        self.asked: list[str] = []
        self.created: dict[str, bool] = {}

    def sha(self, repo: str) -> str:
        """The commit of what a repository holds now."""
        files = sorted(self.repositories[repo].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()


def _handler(hub_: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, value: Any, status: int = 200, **headers: Any) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            headers.setdefault("Content-Length", str(len(data)))
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refused(self, code: str, status: int = 404) -> None:
            self.answer({"error": code}, status, X_Error_Code=code)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub_.asked.append(f"{self.command} {path}")
            if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(\w+)/([^/]+)/?", path):
                self.api(*found.groups()[1:])
            elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                self.resolve(*found.groups())
            else:
                self.refused("EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def api(self, repo: str, what: str, revision: str) -> None:
            if repo not in hub_.repositories:
                return self.refused("RepoNotFound")
            sha = hub_.sha(repo)
            if revision not in ("main", sha):
                return self.refused("RevisionNotFound")
            files = hub_.repositories[repo]
            if what == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in files.items()
                ]
                return self.answer(entries)
            return self.answer({"id": repo, "sha": sha, "siblings": []})

        def resolve(self, repo: str, name: str) -> None:
            data = hub_.repositories.get(repo, {}).get(name)
            if data is None:
                return self.refused("EntryNotFound")
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X_Repo_Commit": hub_.sha(repo),
                "Content_Length": str(len(data)),
            }
            if name == hub_.half and self.command == "GET":
                self.close_connection = True
                data = data[: len(data) // 2]
            return self.answer(data, 200, **headers)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub_.asked.append(f"POST {self.path}")
            if hub_.closed:
                return self.refused("Forbidden", 403)
            if self.path == "/api/validate-yaml":  # of a card
                return self.answer({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                wanted = json.loads(body)
                repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
                hub_.created[repo] = "private" in (wanted.get("visibility"), *wanted)
                hub_.repositories.setdefault(repo, {})
                return self.answer({"url": f"https://huggingface.co/{repo}"})
            found = re.fullmatch(
                r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path.partition("?")[0]
            )
            assert found
            if found[2] == "preupload":
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    data = base64.b64decode(value["content"])
                    hub_.repositories[found[1]][value["path"]] = data
            sha = hub_.sha(found[1])
            url = f"https://huggingface.co/{found[1]}/commit/{sha}"
            return self.answer({"success": True, "commitOid": sha, "commitUrl": url})

    return Handler


@pytest.fixture
def stand_in(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, an empty cache, and no other server within reach."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="no huggingface_hub")
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(made))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    hub.fetched.cache_clear()
    try:
        yield made
    finally:
        hub.fetched.cache_clear()
        server.shutdown()
        server.server_close()
        thread.join()
