"""What a person typed, a name, an exception: before it is written down or printed."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

# Tokens of services that are told by their looks.
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bxox[abeprs]-[\w-]{10,}|\bsk-[\w-]{20,}|\bAIza[\w-]{35}|\bya29\.[\w.-]{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----|.*)",
    re.DOTALL,
)
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
_USER_OF_A_URL = re.compile(r"(?<=://)[^/?#\s'\"]*(?=@)")
_NAME = (
    r"(?:passw(?:or)?d|secret|token|credentials?|signature|(?:access|account|api|private)[_-]?key)"
)
# token=VALUE whatever the value; after a colon, which is prose too, only what looks like one.
_NAMED = re.compile(
    rf"({_NAME}['\"]?\s*(?:=\s*['\"]?|:\s*['\"]?(?=\S*\d)(?=\S{{8}})))([^\s&'\",;]+)",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(rf"{_NAME}|_(?:auth|key|pass|pat)$", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** for what looks like a secret.

    That is: tokens of well-known services, user and password of a URL, what stands after 'token='
    and its like, and the values of those environment variables whose names say that they are
    secret.
    """
    return _masked(text, _secrets_of_the_environment())


def masked_tree(value: Any) -> Any:
    """Plain data, nested, with every text in it `masked`; what is not plain stays as it is."""
    return _masked(value, _secrets_of_the_environment())


def visible(text: object, keep: str = "") -> str:
    """'?' for what steers a terminal or turns the direction of a text, but for `keep`."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def printable(text: object) -> str:
    """The text as one line, `visible`."""
    return visible(" ".join(str(text).split()))


def _masked(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, MASK)
        # Almost no text holds a secret, and to look for parts is ten times as fast.
        if any(part in value for part in _PARTS):
            value = _TOKENS.sub(MASK, value)
        if "://" in value:
            value = _USER_OF_A_URL.sub(MASK, value)
        if "=" in value or ":" in value:
            value = _NAMED.sub(rf"\g<1>{MASK}", value)
        return value
    if isinstance(value, Mapping):
        return {_masked(key, secrets): _masked(item, secrets) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_masked(item, secrets) for item in value)
    return value


def _secrets_of_the_environment() -> list[str]:
    """The longest first, as one may be a part of another. A word or a file's name is no secret."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name)
        and len(value) >= 8
        and not value.isalpha()
        and not (value.startswith("/") and os.path.exists(value))
    }
    return sorted(found, key=len, reverse=True)
