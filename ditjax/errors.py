"""The one exception that means "the user can mend this": every floor may raise it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake, told in one line: what came, what was expected, the remedy.

    Commands print it without a traceback and exit with status 2 (`ditjax.cli`).
    """


def nearest(word: str, words: Iterable[str]) -> str:
    """' Did you mean X?' for the word closest to what was typed, or '' when none is close."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
