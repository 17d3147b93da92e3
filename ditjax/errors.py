"""The ways a command ends early, and how errors put values and texts on one line."""

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
    """A user's mistake, in one line: what came, what was expected, the remedy.

    Commands print it without a traceback and exit with status 2 (`ditjax.cli`).
    """


class FaultError(RuntimeError):
    """A fault outside the program, such as a full disk, in one line with the remedy.

    Commands print it without a traceback and exit with status 1.
    """


class StoppedError(Exception):
    """Raised when a command shut down cleanly on request; running it again resumes.

    `status` is the command's exit status.
    """

    def __init__(self, line: str, status: int = 0) -> None:
        super().__init__(line)
        self.status = status


def nearest(word: str, words: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean X?' for the word closest to what was typed, or '' if none is close."""
    if len(word) > _LONGEST:
        return ""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f" Did you mean {found[0]!r}?" if found else ""


def nearest_key(key: str, keys: Iterable[str]) -> str:
    """' Did you mean X?' for a dotted key that is not among `keys`, or '' if none is close.

    The last name counts more than the section: it may be that of another section, a word of the
    name that is meant, its initials ('lr') or a misspelling of it.
    """
    section, _, last = key.rpartition(".")
    if len(last) > _LONGEST:
        return ""
    names = {each: each.rpartition(".")[2] for each in keys}
    here = [each for each in names if each.rpartition(".")[0] == section]
    spelt = difflib.get_close_matches(last, [names[each] for each in here], n=1, cutoff=0.7)
    close = difflib.get_close_matches(last, list(names.values()), n=1, cutoff=0.7)
    groups = (
        [each for each in here if last in names[each].split("_") or names[each] in spelt],
        [each for each, name in names.items() if name == last],
        [each for each, name in names.items() if _initials(name) == last],
        [each for each, name in names.items() if last in name.split("_")],
        [each for each, name in names.items() if name in close],
    )
    found = list(dict.fromkeys((groups[0] + groups[1]) or groups[2] or groups[3] or groups[4]))
    if not found:
        return nearest(key, names)
    found.sort(key=lambda each: each not in here)
    return f" Did you mean {' or '.join(map(repr, found[:3]))}?"


def _initials(name: str) -> str:
    """'lr' for 'learning_rate', '' for a single word."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else ""


def shown(value: object) -> str:
    """The repr of any value, even a hostile one, on one line and cut to a bounded length."""
    try:
        return _REPR.repr(value)
    except Exception:  # an integer of 5,000 digits, or an object whose repr fails
        return f"a {type(value).__name__}"


def reason(error: BaseException, longest: int = 300) -> str:
    """An error's message on one line without its full stop, or its type if it has none.

    The middle of a message longer than `longest` characters is left out.
    """
    line = " ".join(str(error).split()).rstrip(". ") or type(error).__name__
    if len(line) > longest:
        half = longest // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return line


def first_few(names: Iterable[str], most: int = 3) -> str:
    """'a, b, c and 5 more'."""
    listed = list(names)
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def one_line(text: object) -> str:
    """The text on one line, with control and bidirectional characters escaped ('\\x1b')."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def printable(text: object, keep: str = "") -> str:
    """The text with '?' for control and bidirectional characters, except those in `keep`."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def divisors(number: int) -> list[int]:
    """All divisors in ascending order: 1, 2, 4 for 4."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
