"""Masking of secrets: tokens, passwords and keys become *** in every text that is written.

The writers call this (`files/atomic.py`, `files/npz.py`, `runs/log.py`, `data/stream.py`,
`ditjax.cli`); code that hands them a value need not.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

# Tokens that are recognised by their form.
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bxox[abeprs]-[\w-]{10,}|\bsk-[\w-]{20,}|\bAIza[\w-]{35}|\bya29\.[\w.-]{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)
# Every match of _TOKENS holds one of these. Few texts do, and this test is ten times as fast.
_PARTS = (
    "hf_",
    "AKIA",
    "ASIA",
    "gh",
    "glpat-",
    "xox",
    "sk-",
    "AIza",
    "ya29.",
    "eyJ",
    "-----BEGIN ",
)
_URL_USER = re.compile(r"(?<=://)[^/?#\s'\"]*(?=@)")
_NAME = (
    r"(?:passw(?:or)?d|secret|token|credentials?|signature|(?:access|account|api|private)[_-]?key)"
)
# token=VALUE for any value. A colon occurs in prose too: there the value must look like a secret.
_NAMED = re.compile(
    rf"({_NAME}['\"]?\s*(?:=\s*['\"]?|:\s*['\"]?(?=\S*\d)(?=\S{{8}})))([^\s&'\",;]+)", re.IGNORECASE
)
_SECRET_VARIABLE = re.compile(rf"{_NAME}|_(?:auth|key|pass|pat)$", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** in place of what looks like a secret.

    These are the tokens of well-known services, the user and password of a URL, the value after
    'token=' and similar names, and the values of environment variables with such names.
    """
    return _masked(text, _environment_secrets())


def masked_tree(value: Any) -> Any:
    """Nested mappings, lists and tuples with every string in them `masked`."""
    return _masked(value, _environment_secrets())


def _masked(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        if any(part in value for part in _PARTS):
            value = _TOKENS.sub(MASK, value)
        if "://" in value:
            value = _URL_USER.sub(MASK, value)
        if "=" in value or ":" in value:
            value = _NAMED.sub(rf"\g<1>{MASK}", value)
        return value
    if isinstance(value, Mapping):
        return {_masked(key, secrets): _masked(item, secrets) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_masked(item, secrets) for item in value)
    return value


def _environment_secrets() -> list[str]:
    """Values of secret variables, except plain words and paths of files.

    Longest first, because one may be part of another.
    """
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name)
        and len(value) >= 8
        and not value.isalpha()
        and not (value.startswith("/") and os.path.exists(value))
    }
    return sorted(found, key=len, reverse=True)
