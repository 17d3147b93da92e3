"""How a command ends early: a user's mistake, a fault of the world, or told to. For every floor."""

import difflib
import math
import reprlib
from collections.abc import Iterable

_LONGEST = 100  # characters of a value, or of a word that is compared
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _LONGEST
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = 12
_REPR.maxlevel = 4


class UserError(ValueError):
    """A user's mistake, told in one line: what came, what was expected, the remedy.

    Commands print it without a traceback and exit with status 2 (`ditjax.cli`).
    """


class FaultError(RuntimeError):
    """A fault of the world, a full disk or a damaged file, told in one line with the remedy.

    Commands print it without a traceback and exit with status 1.
    """


class StoppedError(Exception):
    """A command was told to stop, and did so in good order: the same command goes on.

    `status` is what it exits with.
    """

    def __init__(self, line: str, status: int = 0) -> None:
        super().__init__(line)
        self.status = status


def nearest(word: str, words: Iterable[str]) -> str:
    """' Did you mean X?' for the word closest to what was typed, or '' when none is close."""
    if len(word) > _LONGEST:
        return ""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def shown(value: object) -> str:
    """repr of any value, hostile ones too, on one line and cut where it is long."""
    try:
        return _REPR.repr(value)
    except Exception:  # an integer of 5,000 digits, an object whose repr fails
        return f"a {type(value).__name__}"


def reason(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def divisors(number: int) -> list[int]:
    """1, 2, 4 of 4: the sizes that a mesh axis, a patch or a number of parts may have."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
