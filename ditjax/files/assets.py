"""Weight files that ship with the package: NAME.npz beside a manifest that fixes their SHA-256.

A file holds arrays only, never pickles. An array's name is its path in the parameter tree, with '/'
between keys. The manifest records what each file is, how it was made and what it scored:

    {"schema": 1, "assets": {NAME: {"sha256": hex, "network": {...}, "test_accuracy": float, ...}}}
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditjax.errors import UserError, nearest
from ditjax.files.atomic import read_json, write_atomic

SHIPPED = Path(__file__).parent.parent / "assets"
MANIFEST = "manifest.json"
_REMEDY = "reinstall ditjax, or make the files again with python -m ditjax.classify --out=DIR"


def flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{'a': {'b': x}} -> {'a/b': x}, sorted so that equal trees make equal files."""
    flat: dict[str, np.ndarray] = {}
    for key in sorted(tree):
        if not key or "/" in key:
            raise ValueError(f"parameter name {key!r} cannot be part of a path")
        value = tree[key]
        if isinstance(value, Mapping):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[key] = np.asarray(value)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b': x} -> {'a': {'b': x}}: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def save_assets(
    directory: str | os.PathLike[str],
    assets: Mapping[str, tuple[Mapping[str, Any], dict[str, Any]]],
) -> None:
    """Write {name: (params, record)} as NAME.npz files, then the manifest with their SHA-256.

    The same arrays give the same bytes. Other assets in the folder's manifest are kept. Raises
    UserError if the folder cannot be written.
    """
    files = {}
    for name, (params, record) in assets.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **flatten(params))  # type: ignore[arg-type]
        files[f"{name}.npz"] = (buffer.getvalue(), record)
    save_asset_files(directory, files)


def save_asset_files(
    directory: str | os.PathLike[str], files: Mapping[str, tuple[bytes, dict[str, Any]]]
) -> None:
    """Write {NAME.SUFFIX: (content, record)}, then the manifest. As `save_assets`."""
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        records = _read_manifest(folder) if (folder / MANIFEST).exists() else {}
        for file, (content, record) in files.items():
            write_atomic(folder / file, content)
            digest = hashlib.sha256(content).hexdigest()
            records[Path(file).stem] = {**record, "sha256": digest}
        text = json.dumps({"schema": 1, "assets": records}, indent=2, sort_keys=True) + "\n"
        # The manifest is last: a run that dies before leaves a mismatch, which reading refuses.
        write_atomic(folder / MANIFEST, text.encode())
    except OSError as error:
        raise UserError(f"cannot write assets to {folder}: {error.strerror}.") from error


def load_asset(
    name: str, directory: str | os.PathLike[str] = SHIPPED
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of an asset, a tree of NumPy arrays, and its record in the manifest.

    Raises UserError as `asset_bytes`, and for a file that does not hold plain arrays.
    """
    content, record = asset_bytes(name, ".npz", directory)
    # Parsed from the bytes that were hashed, because the file may change in between.
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return unflatten({path: file[path] for path in file.files}), record
    except (ValueError, zipfile.BadZipFile) as error:
        path = Path(directory) / f"{name}.npz"
        raise UserError(f"{path} is not an npz file of plain arrays: {error}") from error


def asset_bytes(
    name: str, suffix: str, directory: str | os.PathLike[str] = SHIPPED
) -> tuple[bytes, dict[str, Any]]:
    """The content of an asset's file, and its record in the manifest.

    Raises UserError for an unknown name, a missing or unreadable file, or a SHA-256 that differs
    from the manifest's.
    """
    folder = Path(directory)
    records = _read_manifest(folder)
    if name not in records:
        raise UserError(
            f"asset {name!r} is not in {folder / MANIFEST}: it has {', '.join(sorted(records))}."
            f"{nearest(name, records)}"
        )
    path = folder / f"{name}{suffix}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_REMEDY}.") from error
    digest, expected = hashlib.sha256(content).hexdigest(), records[name]["sha256"]
    if digest != expected:
        raise UserError(
            f"{path} has SHA-256 {digest[:12]}, the manifest says {expected[:12]}: the file is"
            f" damaged or not the one that was measured; {_REMEDY}."
        )
    return content, records[name]


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    manifest = read_json(path, _REMEDY)
    schema = manifest.get("schema")
    if schema != 1:
        raise UserError(f"{path} has schema {schema!r}, this version reads 1; {_REMEDY}.")
    records = manifest.get("assets")
    if not isinstance(records, dict) or not all(
        isinstance(record, dict) and isinstance(record.get("sha256"), str)
        for record in records.values()
    ):
        raise UserError(f"{path}: 'assets' is not a table of records with 'sha256'; {_REMEDY}.")
    return records
