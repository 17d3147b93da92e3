"""Lists of paths in a flag, whose own names may have commas."""

import sys
from pathlib import Path

from ditjax.errors import UserError, one_line
from ditjax.files.store import place, present


def split_paths(words: str, flag: str) -> list[Path]:
    """The paths that a flag names, comma-separated; a path's own name may have commas.

    The longest name that exists is taken. Raises UserError if a name is empty.
    """
    parts, paths = words.split(","), []
    while parts:
        lengths = [n for n in range(1, len(parts) + 1) if present(place(",".join(parts[:n])))]
        length = max(lengths, default=1)
        if length > 1 and all(present(place(part)) for part in parts[:length]):
            line = f"note: {flag}: {','.join(parts[:length])!r} is taken for one path"
            print(one_line(f"{line}; write ./ before each of several"), file=sys.stderr)
        paths.append(place(",".join(parts[:length])))
        del parts[:length]
    if not words or Path() in paths:
        raise UserError(f"{flag}={words}: expected one or more paths, comma-separated.")
    return paths
