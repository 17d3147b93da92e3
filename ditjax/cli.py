"""What the commands share: flags, the recipe with its overrides, and how a user's mistake ends."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from logging import CRITICAL, getLogger
from typing import Any, NoReturn, cast

from absl import logging

from ditjax import recipes
from ditjax.config import (
    Config,
    Distributed,
    as_tree,
    completed,
    leaf_keys,
    merged,
    migrated,
    of_network,
    parse_value,
    read,
    schema_of,
    type_of,
)
from ditjax.errors import FaultError, StoppedError, UserError, nearest, one_line, printable
from ditjax.files import atomic
from ditjax.files.masking import masked
from ditjax.parallel import compilations, host, processes
from ditjax.parallel.processes import is_primary
from ditjax.runs import rundir
from ditjax.runs.checkpoint import Step


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, so that they read like all the others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parser(command: str, description: str, *, config: bool = True) -> Parser:
    """A command's parser; with `config`, `parse` also takes --config and its overrides."""
    epilog = None
    if config:
        epilog = (
            "--config=NAME[:ARG] names a recipe: a shipped one, such as digits or small/scaling, or"
            " a FILE.py of yours. --config.a.b=value overrides one of its keys. The same command"
            " again resumes."
        )
    return Parser(f"ditjax {command}", description=description, epilog=epilog)


def add_step(parser: Parser) -> None:
    """--step of a run: which checkpoint."""
    parser.add_argument(
        "--step",
        type=_step,
        default="latest",
        help="of a run: latest (default), best (by the evaluation in training) or a step's number",
    )


def _step(text: str) -> Step:
    if text in ("latest", "best"):
        return cast(Step, text)
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected latest, best or a step's number")


def add_reading_of_weights(parser: Parser) -> None:
    """--which, --heads and --numerics: what a weights file leaves open."""
    parser.add_argument(
        "--which", default="ema", choices=("ema", "model"), help="of a training checkpoint"
    )
    parser.add_argument("--heads", type=int, default=0, help="of --weights that do not say it")
    parser.add_argument(
        "--numerics",
        default="auto",
        choices=("auto", "release", "diffusers"),
        help="whose timestep embedding the weights were trained with (see README); auto: the file's"
        " own program's",
    )


def add_processes(parser: Parser) -> None:
    """--distributed, or --coordinator, --processes and --process: `parse` starts them."""
    group = parser.add_argument_group(
        "several processes", "one on each host: the same command on all, but for --process"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="the others are found by JAX: on TPU pods, Slurm, Open MPI, Kubernetes",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is met")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    parser.set_defaults(starts_processes=True)


def start_processes(args: argparse.Namespace, bounds: Distributed) -> None:
    """Meets the processes that the flags of `add_processes` tell of, if they do."""
    given = {flag: getattr(args, flag) for flag in ("coordinator", "processes", "process")}
    missing = [f"--{flag}" for flag, value in given.items() if value is None]
    if len(missing) < len(given) and args.distributed:
        raise UserError("--distributed finds the others: leave --coordinator and its like out.")
    if 0 < len(missing) < len(given):
        raise UserError(f"{' and '.join(missing)} missing: --coordinator, --processes, --process.")
    if missing and not args.distributed:
        return
    if args.distributed:
        place = processes.detect_place(bounds.initialization_seconds)
    else:
        place = processes.parse_place(args.coordinator, args.processes, args.process)
    own = ("process", "coordinator", "recipe")
    said = {f"--{key}": value for key, value in vars(args).items() if key not in own}
    said |= {f"config.{key}": value for key, value in rundir.leaves(args.recipe)}
    # As the others will have it from JSON.
    said = json.loads(json.dumps(said, default=str))
    processes.start(
        place,
        said,
        initialization_seconds=bounds.initialization_seconds,
        heartbeat_seconds=bounds.heartbeat_seconds,
    )


def parse(
    parser: Parser,
    argv: Sequence[str],
    source: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None,
) -> tuple[argparse.Namespace, Config]:
    """(the command's own flags, its checked recipe); `args.recipe` is the recipe's plain dict.

    Of several processes this is where they meet: no JAX computation may come before.

    Without --config=FILE the recipe is the run's, or what `source` makes of the flags.
    """
    args, rest = parser.parse_known_args(joined(argv))
    known = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        if not word.startswith("--config") or word[8:9] not in ("", "=", "."):
            raise UserError(f"{word!r} is no flag of this command.{nearest(word, known)}")
    named = any(word.startswith("--config=") for word in rest)
    recorded = source(args) if source else None
    if getattr(args, "reads_run", False) and not named:
        recorded = migrated(rundir.read_recipe(args.workdir))
    config = read(load_recipe(rest, None if named else recorded))
    args.recipe = as_tree(config)
    if getattr(args, "starts_processes", False):
        start_processes(args, config.distributed)
    return args, config


def load_recipe(words: Sequence[str], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """['--config=NAME[:ARG]', '--config.a.b=value', ...] -> every key of the recipe, not checked.

    With a `recorded` recipe, the one a run was started with, no file is named.
    """
    options = [word.removeprefix("--config").partition("=") for word in joined(words)]
    names = [value for key, _, value in options if not key]
    if recorded is None and len(names) != 1:
        raise UserError(
            f"{len(names) or 'no'} --config=NAME given: expected one, such as --config=digits or"
            " --config=experiments/digits.py"
        )
    tree = completed(_tuples(recorded) if recorded is not None else recipes.load(names[0]))
    given = {key[1:]: value for key, _, value in options if key}
    if "task" in given and given["task"] != tree["task"]:
        raise UserError(
            f"--config.task={given['task']}: the recipe's is {tree['task']!r}, and its keys are"
            " that task's; name a recipe of the other."
        )
    if "model.kind" in given:
        tree["model"] = of_network(tree, given["model.kind"])
    schema = schema_of(tree)
    for key, text in given.items():
        hint = type_of(schema, key)
        if hint is None:
            legal = leaf_keys(schema)
            raise UserError(
                f"'--config.{key}={text}': expected --config.KEY=VALUE with a key of the recipe."
                f"{nearest(key, legal)}"
            )
        section, _, leaf = key.partition(".")
        value = parse_value(text, hint, key)
        tree = merged(tree, {section: {leaf: value} if leaf else value})
    return tree


def joined(words: Sequence[str]) -> list[str]:
    """The words with '--config.a.b VALUE' as one, '--config.a.b=VALUE'."""
    made: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("--config") and word[8:9] in ("", ".") and "=" not in word:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word!r}: expected --config.KEY=VALUE, or --config.KEY VALUE.")
            word = f"{word}={value}"
        made.append(word)
    return made


def _tuples(tree: Any) -> Any:
    """JSON's lists as the tuples that recipes hold."""
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _one_line(error: Any) -> str:
    """On one line, and nothing that a terminal would obey: a name may be out of a hostile file."""
    return masked(one_line(error))


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command and exits: 0 done or stopped in good order, 1 a fault, 2 a user's mistake.

    Faults and mistakes are one line, 130 is interrupted.
    """
    host.keep_freed_memory()
    # Orbax and tfds tell their housekeeping as warnings, and as errors what they raise anyway.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)  # of a save that failed, each leaf once more
    sys.unraisablehook = _without_late_writes
    # Here and not at an import: tests and programs that import us keep their own settings. JAX is
    # imported by now, so that an environment variable would come too late; it opens its cache at
    # the first compilation.
    compilations.enable_cache()
    try:
        status = main(sys.argv[1:])
        processes.finish()
    except UserError as error:
        _end(_one_line(error), 2)
    except FaultError as error:
        _end(_one_line(error), 1)
    except StoppedError as stopped:
        tells = not processes.is_distributed() or is_primary()
        processes.finish()
        if tells:
            print(_one_line(stopped), flush=True)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in atomic.FULL:
            _end(atomic.full_disk(error.filename or "what this run leaves", error), 1)
        processes.wait_for_abort()
        print(printable(masked(traceback.format_exc()), keep="\n"), end="", file=sys.stderr)
        _end(f"{type(error).__name__}: {_one_line(error)}"[:500], 1, said=True)
    sys.exit(status)


def _without_late_writes(unraisable: Any) -> None:
    """TensorStore's writes that end after another has failed find orbax's event loop closed.

    Its C++ prints what it is told then; what failed has been raised where it was asked for.
    """
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)


def _end(line: str, status: int, *, said: bool = False) -> NoReturn:
    """Exits with one line; the other processes of the run, if there are any, end with it."""
    processes.abort(line, status)
    if not said:
        print("interrupted" if status == 130 else f"error: {line}", file=sys.stderr)
    sys.exit(status)
