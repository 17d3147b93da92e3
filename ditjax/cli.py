"""Shared parts of the commands: flags, the recipe with its overrides, and error handling."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    schema,
    schema_of,
    type_of,
)
from ditjax.errors import (
    FaultError,
    StoppedError,
    UserError,
    first_few,
    nearest,
    nearest_key,
    one_line,
    printable,
    reason,
)
from ditjax.files import atomic, faults, streams
from ditjax.files.masking import masked
from ditjax.parallel import compilations, host, processes
from ditjax.parallel.processes import is_primary
from ditjax.runs import rundir
from ditjax.runs.checkpoint import Step


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that its errors are printed like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def parser(command: str, description: str, *, config: bool = True) -> Parser:
    """Make a command's parser; with `config`, its help describes --config and its overrides."""
    epilog = None
    if config:
        epilog = (
            "--config=NAME[:ARG] names a recipe: a shipped one, such as digits or small/scaling, or"
            " your own FILE.py. --config.a.b=value overrides one of its keys. Run the same command"
            " again to resume."
        )
    return Parser(f"ditjax {command}", description=description, epilog=epilog)


def add_step(parser: Parser) -> None:
    """Add --step, the checkpoint of a run."""
    parser.add_argument(
        "--step",
        type=_step,
        default="latest",
        help="checkpoint of a run: latest (default), best (by evaluation during training) or a"
        " step number",
    )


def _step(text: str) -> Step:
    if text in ("latest", "best"):
        return cast(Step, text)
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected latest, best or a step number")


def add_weights_options(parser: Parser) -> None:
    """Add the flags of `weights_options`: choices that a weights file may leave open."""
    parser.add_argument(
        "--which",
        default="ema",
        help="ema: averaged weights of a training checkpoint (default); model: raw ones; a.b.c:"
        " those below these keys; in a folder also a variant, such as fp16 or non_ema",
    )
    parser.add_argument(
        "--leave_out",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="NAMES",
        help="tensors or modules in the file that the network does not use, separated by commas",
    )
    parser.add_argument(
        "--heads", type=int, default=0, help="number of heads, if the weights file lacks it"
    )
    parser.add_argument(
        "--num_classes",
        type=int,
        default=0,
        help="number of classes, if the weights file lacks it: a label table of one row more ends"
        " with the null label",
    )
    parser.add_argument(
        "--numerics",
        default="auto",
        choices=("auto", "release", "diffusers"),
        help="the program whose timestep embedding the weights were trained with (see"
        " docs/weights.md); auto: the program that the file's layout belongs to",
    )
    parser.add_argument(
        "--class_names",
        default="auto",
        choices=("auto", "imagenet", "none"),
        help="names of the classes; auto: those recorded with the network",
    )


def weights_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags of `add_weights_options`, as the readers of weights take them."""
    return {
        "which": args.which,
        "leave_out": args.leave_out,
        "heads": args.heads,
        "num_classes": args.num_classes,
        "numerics": args.numerics,
    }


def add_processes(parser: Parser) -> None:
    """Add --distributed, --coordinator, --processes and --process, which `parse` acts on."""
    group = parser.add_argument_group(
        "several processes", "one per host: the same command on all, except for --process"
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="let JAX detect the other processes: on TPU pods, Slurm, Open MPI, Kubernetes",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    parser.set_defaults(starts_processes=True)


def start_processes(args: argparse.Namespace, bounds: Distributed) -> None:
    """Connect to the processes that the flags of `add_processes` name, if any."""
    flags = {flag: getattr(args, flag) for flag in ("coordinator", "processes", "process")}
    missing = [f"--{flag}" for flag, value in flags.items() if value is None]
    if len(missing) < len(flags) and args.distributed:
        raise UserError(
            "--distributed detects the other processes: remove --coordinator, --processes and"
            " --process."
        )
    if 0 < len(missing) < len(flags):
        raise UserError(
            f"{' and '.join(missing)} missing: expected all of --coordinator, --processes and"
            " --process."
        )
    if missing and not args.distributed:
        return
    if args.distributed:
        place = processes.detect_place(bounds.initialization_seconds)
    else:
        place = processes.parse_place(args.coordinator, args.processes, args.process)
    local = ("process", "coordinator", "recipe")
    shared = {f"--{key}": value for key, value in vars(args).items() if key not in local}
    shared |= {f"config.{key}": value for key, value in rundir.leaves(args.recipe)}
    # As the other processes decode it from JSON.
    shared = json.loads(json.dumps(shared, default=str))
    processes.start(
        place,
        shared,
        initialization_seconds=bounds.initialization_seconds,
        heartbeat_seconds=bounds.heartbeat_seconds,
    )


def parse(
    parser: Parser,
    argv: Sequence[str],
    source: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None,
) -> tuple[argparse.Namespace, Config]:
    """Return the command's flags and its checked recipe; `args.recipe` is the recipe as a dict.

    With several processes, this connects them: no JAX computation may come before.

    Without --config=NAME, the recipe is that of the run, or `source(args)`.
    """
    args, rest = parser.parse_known_args(join_overrides(argv))
    known = [option for action in parser._actions for option in action.option_strings]
    of_recipe = [
        word for word in rest if word.startswith("--config") and word[8:9] in ("", "=", ".")
    ]

    def recipe() -> dict[str, Any]:
        named = any(word.startswith("--config=") for word in of_recipe)
        recorded = source(args) if source else None
        if getattr(args, "reads_run", False) and not named:
            recorded = migrated(rundir.read_recipe(args.workdir))
        return load_recipe(of_recipe, None if named else recorded)

    for word in rest:
        if word not in of_recipe:
            hint = _hint(word, known, recipe)
            raise UserError(f"{word!r} is not a flag of this command.{hint}")
    config = read(recipe())
    args.recipe = as_tree(config)
    if getattr(args, "starts_processes", False):
        start_processes(args, config.distributed)
    return args, config


def _hint(word: str, known: Sequence[str], recipe: Callable[[], Mapping[str, Any]]) -> str:
    """' Did you mean X?' for an unknown flag: another flag, or a key of the recipe."""
    if hint := nearest(word.partition("=")[0], known, cutoff=0.7):
        return hint
    try:
        keys = leaf_keys(schema_of(recipe()))
    except (UserError, FaultError):  # the flag is at fault first
        keys = leaf_keys(schema())
    keys = [f"--config.{key}" for key in keys]
    return nearest_key(f"--config.{word.lstrip('-').partition('=')[0]}", keys)


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """The names of the flags that a command line gives, whatever their values."""
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_known_args(join_overrides(argv))[0]))
    finally:
        for action, default in defaults:
            action.default = default


def check_unused(
    parser: argparse.ArgumentParser, argv: Sequence[str], flags: Iterable[str], why: str
) -> None:
    """Raise UserError if one of some flags is given, which have no effect for a reason `why`."""
    given = given_flags(parser, argv)
    if found := [f"--{flag}" for flag in flags if flag in given]:
        raise UserError(f"{' and '.join(found)}: no effect {why}: remove it.")


def load_recipe(words: Sequence[str], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """['--config=NAME[:ARG]', '--config.a.b=value', ...] -> every key of the recipe, not checked.

    A `recorded` recipe, with which a run was started, takes the place of --config=NAME.
    """
    options = [word.removeprefix("--config").partition("=") for word in join_overrides(words)]
    names = [value for key, _, value in options if not key]
    if recorded is None and len(names) != 1:
        raise UserError(
            f"{len(names) or 'no'} --config=NAME given: expected one, such as --config=digits or"
            " --config=experiments/digits.py"
        )
    tree = completed(_tuples(recorded) if recorded is not None else recipes.build(names[0]))
    overrides = {key[1:]: value for key, _, value in options if key}
    if "task" in overrides and overrides["task"] != tree["task"]:
        raise UserError(
            f"--config.task={overrides['task']}: the recipe's is {tree['task']!r}, and its keys"
            " belong to that task; name a recipe of the other task."
        )
    if "model.kind" in overrides:
        tree["model"] = of_network(tree, overrides["model.kind"])
    schema = schema_of(tree)
    for key, text in overrides.items():
        hint = type_of(schema, key)
        if hint is None:
            legal = leaf_keys(schema)
            group = [each for each in legal if each.startswith(f"{key}.")]
            if group:
                raise UserError(
                    f"'--config.{key}={text}': {key} is a group of keys: expected one of them,"
                    f" such as {first_few(group)}."
                )
            raise UserError(
                f"'--config.{key}={text}': expected --config.KEY=VALUE with a key of the recipe."
                f"{nearest_key(key, legal)}"
            )
        section, _, leaf = key.partition(".")
        value = parse_value(text, hint, key)
        tree = merged(tree, {section: {leaf: value} if leaf else value})
    return tree


def join_overrides(words: Sequence[str]) -> list[str]:
    """Join '--config.a.b VALUE' into '--config.a.b=VALUE'."""
    joined: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("--config") and word[8:9] in ("", ".") and "=" not in word:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word!r}: expected --config.KEY=VALUE, or --config.KEY VALUE.")
            word = f"{word}={value}"
        joined.append(word)
    return joined


def _tuples(tree: Any) -> Any:
    """Convert JSON's lists to the tuples of recipes."""
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _one_line(error: Any) -> str:
    """The message on one line, without control characters: a file's names may be hostile."""
    return masked(one_line(error))


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run a command and exit: 0 done or stopped cleanly, 1 a fault, 2 a user's mistake.

    Faults and mistakes are printed on one line. The status of an interrupted command is 130.
    """
    streams.keep_streams()
    host.keep_freed_memory()
    # Orbax and tfds log their housekeeping as warnings, and log errors that they also raise.
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel(CRITICAL)  # it repeats the error of a failed save for each leaf
    sys.unraisablehook = _ignore_abandoned_tasks
    # Here and not at import, so that tests and programs that import ditjax keep their settings. JAX
    # is imported already, so an environment variable would be too late; JAX opens its cache at the
    # first compilation.
    compilations.enable_cache()
    try:
        status = main(sys.argv[1:])
        processes.finish()
    except UserError as error:
        _end(_one_line(error), 2)
    except FaultError as error:
        _end(_one_line(error), 1)
    except StoppedError as stopped:
        prints = not processes.is_distributed() or is_primary()
        processes.finish()
        if prints:
            print(_one_line(stopped), flush=True)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in atomic.FULL:
            _end(atomic.full_disk(error.filename or "the output", error), 1)
        if isinstance(error, OSError) and error.filename:
            _end(*_of_file(error))
        if isinstance(error, RuntimeError) and str(error).startswith(_NO_DEVICE):
            chosen = os.environ.get("JAX_PLATFORMS", "")
            _end(
                f"{reason(error)}. JAX_PLATFORMS is {chosen!r}: set it to 'cpu', or to nothing.", 2
            )
        processes.wait_for_abort()
        print(printable(masked(traceback.format_exc()), keep="\n"), end="", file=sys.stderr)
        _end(f"{type(error).__name__}: {_one_line(error)}"[:500], 1, printed=True)
    sys.exit(status)


_NO_DEVICE = "Unable to initialize backend"  # how JAX reports a platform that is not there


def _of_file(error: OSError) -> tuple[str, int]:
    """The line and the status for a file that cannot be opened, where no reader says more."""
    line = f"{os.fsdecode(error.filename)}: {error.strerror or reason(error)}"
    if faults.may_pass(error):
        return f"{line}. Run the same command again when the file system answers.", 1
    return f"{line}: give another path, or one that can be read and written.", 2


# What TensorStore's writes and Orbax's reads say when another write or read has failed before they
# end: they find Orbax's event loop closed, or are collected unfinished.
_ABANDONED = ("Event loop is closed", "Encountered error while reading array index")


def _ignore_abandoned_tasks(unraisable: Any) -> None:
    """Ignore what the rest of a failed save or restore says. Its failure is raised already."""
    if not str(unraisable.exc_value).startswith(_ABANDONED):
        sys.__unraisablehook__(unraisable)


def _end(line: str, status: int, *, printed: bool = False) -> NoReturn:
    """Print one line and exit; the other processes of the run, if any, end too."""
    processes.abort(line, status)
    if not printed:
        print("interrupted" if status == 130 else f"error: {line}", file=sys.stderr)
    sys.exit(status)
