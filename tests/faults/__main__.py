"""The battery of faults, at length: python -m tests.faults --trials=50 [--rows=1,2,5] [--jobs=2]

Prints a table: fault, trials, trials survived, steps lost at most, anything lost. Exit status 0
when every trial was survived. Ctrl-C ends it and every process that it started.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401  (the tests' XLA flags and compilation cache)
from tests.faults import table
from tests.faults.harness import Battery


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    known = {row.number for row in table.ROWS}
    if unknown := sorted(set(numbers) - known):
        raise argparse.ArgumentTypeError(f"no row {unknown[0]}: expected some of 1 to {max(known)}")
    return numbers


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50, help="of each row (default 50)")
    parser.add_argument("--rows", type=_numbers, default=None, help="such as 1,2,5 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once (default 1)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table there, too")
    parser.add_argument(
        "--broken", action="store_true", help="break ditjax once a row: each row must see it"
    )
    args = parser.parse_args(argv)
    rows = [row for row in table.ROWS if args.rows is None or row.number in args.rows]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    root = Path(tempfile.mkdtemp(prefix="ditjax-faults-"))
    began = time.monotonic()
    tallies: list[table.Tally] = []

    def tell(tally: table.Tally) -> None:
        tallies.append(tally)
        print(table.line(tally), flush=True)
        for lost in tally.lost:
            print(f"  lost in {tally.row.name}, {lost}", file=sys.stderr)

    if args.broken:
        try:
            with Battery(root) as battery:
                silent = table.untested(battery, rows, args.seed)
        finally:
            table.clean(root, False)
        print("\n".join(f"{name}: nothing was seen" for name in silent) or "every row can fail")
        return 1 if silent else 0
    print(table.HEAD, flush=True)
    try:
        with Battery(root) as battery:
            table.run(battery, rows, args.trials, args.seed, args.jobs, tell)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        failed = any(tally.lost for tally in tallies)
        table.clean(root, failed)
        if args.json:
            told: dict[str, Any] = {
                "seed": args.seed,
                "jobs": args.jobs,
                "rows": [tally.told() for tally in tallies],
                "seconds": round(time.monotonic() - began, 1),
            }
            args.json.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
