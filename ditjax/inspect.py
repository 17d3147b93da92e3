"""python -m ditjax.inspect: look inside a trained network, and write a page, figures and tables."""

import argparse
import json
import shlex
import time
from collections.abc import Callable
from typing import Any

import jax

from ditjax import __version__, cli
from ditjax.errors import UserError, nearest
from ditjax.evaluation.analyses import ANALYSES, analyses_of
from ditjax.evaluation.inspection import NOISE_SHARES, Reading, open_instrument
from ditjax.files.atomic import protocol_hash, write_atomic, write_json, write_text
from ditjax.files.durations import duration
from ditjax.files.store import place
from ditjax.reporting.inspection import Part, inspection_part, render_inspection
from ditjax.reporting.table import csv_of
from ditjax.sample import add_source, parse_source

RECORD_FILE = "inspection.json"


def _list_of(kind: Callable[[str], Any], what: str) -> Callable[[str], tuple[Any, ...]]:
    """A reader of flags: values separated by commas."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(each) for each in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what}") from None

    return read


def _parser() -> cli.Parser:
    parser = cli.parser(
        "inspect", "Look inside a trained network: its average weights, block by block."
    )
    add_source(parser)
    parser.add_argument(
        "--what",
        type=_list_of(str, "analyses separated by commas"),
        default=(),
        metavar="NAMES",
        help=f"some of {','.join(ANALYSES)} (default: all; words of networks of texts alone)",
    )
    parser.add_argument(
        "--blocks",
        type=_list_of(int, "numbers of blocks separated by commas, such as 1,4"),
        default=(),
        help="blocks to read, from 1 (default: all)",
    )
    parser.add_argument(
        "--times",
        type=_list_of(float, "shares of the noise separated by commas, such as 0.1,0.5"),
        default=NOISE_SHARES,
        help="where to read: shares of the noise between 0 and 1; with 1,000 timesteps, 0.3 is"
        f" timestep 300 (default: {','.join(map(str, NOISE_SHARES))})",
    )
    parser.add_argument(
        "--num",
        type=int,
        default=Reading().num,
        help="images to fit probes and lenses, and as many held-out ones to measure",
    )
    parser.add_argument("--batch_size", type=int, default=Reading().batch_size)
    parser.add_argument("--out", default="", help="output folder (default: WORKDIR/inspection)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command. Raises UserError."""
    args, config, source = parse_source(_parser(), argv)
    if wrong := [name for name in args.what if name not in ANALYSES]:
        raise UserError(
            f"--what={','.join(args.what)}: {wrong[0]!r} is no analysis; expected some of"
            f" {', '.join(ANALYSES)}.{nearest(wrong[0], ANALYSES)}"
        )
    folder = place(args.out or place(args.workdir or ".") / "inspection")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file: give a folder.")
    reading = Reading(args.times, args.blocks, args.num, args.batch_size)
    features = not args.what or "cknna" in args.what
    tool = open_instrument(config, source.load, reading, features=features)
    asked = args.what or analyses_of(tool)
    what = tuple(name for name in ANALYSES if name in asked)
    for note in source.notes:
        print(note, flush=True)
    sections: list[Part] = []
    for name in what:
        start = time.monotonic()
        found = ANALYSES[name](tool)
        section = inspection_part(name, found.line, found.tables, found.pictures)
        for table, rows in found.tables.items():
            write_text(folder / f"{table}.csv", csv_of(rows))
        for sketch in section.sketches:
            write_atomic(folder / f"{sketch.name}.png", sketch.png())
        sections.append(section)
        print(f"{name}: {found.line} ({duration(time.monotonic() - start)})", flush=True)
    record = json.loads(json.dumps({**tool.record, "weights": config.sample.weights}))
    write_json(
        folder / RECORD_FILE,
        {
            "protocol": record,
            "protocol_hash": protocol_hash(record),
            "source": source.record,
            "found": {section.name: section.line for section in sections},
            "environment": {
                "ditjax": __version__,
                "jax": jax.__version__,
                "command": shlex.join(["python", "-m", "ditjax.inspect", *argv]),
            },
        },
    )
    title = f"Inside {tool.record['model']}"
    write_text(folder / "index.html", render_inspection(title, sections, record))
    print(f"{folder}: index.html, {RECORD_FILE}, a CSV of each table and a PNG of each figure")
    return 0


if __name__ == "__main__":
    cli.run(main)
