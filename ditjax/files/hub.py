"""Files on the Hugging Face hub: hf:OWNER/NAME[@REVISION][/FILE], through the hub's own cache.

`files/store.py` takes such a name for the path of the copy, so that it may stand wherever weights,
statistics or latents are read. Data sets are hf:datasets/OWNER/NAME. The client is imported when
the first name is met, and its variables hold: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ditjax.errors import FaultError, UserError, one_line, reason

PREFIX = "hf:"
_EXPECTED = (
    "expected hf:OWNER/NAME, or hf:datasets/OWNER/NAME; @REVISION and /FILE or /FOLDER may follow"
)
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = rf"{_PART}/{_PART}"
_NAME = re.compile(
    rf"hf:(?P<data>datasets/)?(?P<repo>{_REPOSITORY})(?:@(?P<revision>[\w.-]+))?(?:/(?P<path>.+))?"
)


class _Named(NamedTuple):
    """The parts of a name."""

    repo: str
    kind: str  # 'model' or 'dataset'
    revision: str
    path: str


def _parse(text: str) -> _Named:
    found = _NAME.fullmatch(text.rstrip("/"))
    if found is None or {".", ".."} & set((found["path"] or "").split("/")):
        raise UserError(f"{text}: {_EXPECTED}.")
    kind = "dataset" if found["data"] else "model"
    return _Named(found["repo"], kind, found["revision"] or "main", found["path"] or "")


def _client(what: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"{what} needs a package that is not installed ({reason(error)}): pip install"
            " 'ditjax[hub]'"
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@functools.cache
def fetched(text: str) -> Path:
    """The copy of what a name stands for, a file or a folder, made now unless it is there.

    Once in a process. Without a connection an earlier whole copy is taken, and a line says so.
    Raises UserError for a name that stands for nothing, FaultError if it cannot be copied.
    """
    named, client = _parse(text), _client(text)
    there = _answers(text, named, client)
    wanted = [named.path, f"{named.path}/*"] if named.path else None
    try:
        root = client.snapshot_download(
            named.repo,
            repo_type=named.kind,
            revision=named.revision,
            allow_patterns=wanted,
            endpoint=_endpoint(),
            local_files_only=not there,
        )
    except Exception as error:  # of the client, of its cache, or of one of its transports
        if not there:
            raise FaultError(
                f"{text}: the hub cannot be reached, and no whole copy of it is on this machine:"
                " run the same command with a connection first."
            ) from error
        raise FaultError(
            f"cannot copy {text}: {reason(error)}. Run the same command again: files that came"
            " whole are kept."
        ) from error
    place = Path(root, named.path)
    if not place.exists():
        raise UserError(f"{text}: {named.kind} {named.repo} has no {named.path!r}.")
    line = f"{text}: commit {Path(root).name[:12]}" + ("" if there else ", a copy: no connection")
    print(one_line(line), file=sys.stderr, flush=True)
    return place


def _answers(text: str, named: _Named, client: Any) -> bool:
    """Whether the hub answers. Raises UserError if it has no such repository or revision."""
    errors = client.errors
    try:
        client.HfApi(endpoint=_endpoint()).repo_info(
            named.repo, repo_type=named.kind, revision=named.revision
        )
    except errors.RevisionNotFoundError:
        raise UserError(f"{text}: it has no revision {named.revision!r}.") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{text}: the hub has no such {named.kind}, or it is not yours to read: check the name,"
            " or run `hf auth login`."
        ) from None
    except Exception:  # no connection, or HF_HUB_OFFLINE
        return False
    return True


# ---- to the hub


def check_push(repo: str) -> None:
    """Raise UserError for a name that cannot be pushed to, and if the client is missing."""
    if not re.fullmatch(_REPOSITORY, repo):
        raise UserError(f"--push={repo}: expected OWNER/NAME.")
    _client(f"--push={repo}")


def push(repo: str, source: Path, card: str) -> str:
    """Write a file, or the files of a folder, with a model card by one commit. Returns its URL.

    The repository is made if it does not exist, as a private one. Raises UserError without the
    right to write, FaultError if the hub does not answer; nothing is left there then.
    """
    client = _client(f"--push={repo}")
    below = sorted(source.rglob("*")) if source.is_dir() else [source]
    root = source if source.is_dir() else source.parent
    operations = [
        client.CommitOperationAdd(path.relative_to(root).as_posix(), str(path))
        for path in below
        if path.is_file() and not path.name.startswith(".")  # such as a lease
    ]
    operations.append(client.CommitOperationAdd("README.md", card.encode()))
    api = client.HfApi(endpoint=_endpoint())
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        made = api.create_commit(repo, operations, commit_message="Weights of ditjax")
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403) or isinstance(error, client.errors.LocalTokenNotFoundError):
            raise UserError(
                f"--push={repo}: the hub refuses it ({reason(error)}): run `hf auth login` with"
                f" a token that may write. {source} is written."
            ) from error
        raise FaultError(
            f"--push={repo}: {reason(error)}. {source} is written: run the same command again."
        ) from error
    return str(made.commit_url)
