"""How a command ends: its status, and one line."""

import asyncio
import gc
import sys

import pytest

from ditjax import cli
from ditjax.errors import FaultError, StoppedError, UserError
from ditjax.parallel import compilations, host

AGAIN = ". Run the same command again when the file system answers."
SET = ". JAX_PLATFORMS is 'nowhere': set it to 'cpu', or to nothing."
OTHER = ": give another path, or one that can be read and written."


@pytest.fixture
def unchanged(monkeypatch):
    """What a command sets for its process stays as the tests have it."""
    monkeypatch.setattr(host, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(compilations, "enable_cache", lambda: None)
    monkeypatch.setattr("absl.logging.set_verbosity", lambda level: None)


@pytest.mark.parametrize(
    ("error", "status", "out", "err"),
    [
        (None, 0, "", ""),
        (UserError("a\nb"), 2, "", "error: a b\n"),
        (FaultError("the disk is\nfull"), 1, "", "error: the disk is full\n"),
        (StoppedError("stopped at step 7"), 0, "stopped at step 7\n", ""),
        (StoppedError("stopped", 143), 143, "stopped\n", ""),
        (RuntimeError(f"{cli._NO_DEVICE} 'tpu'"), 2, "", f"error: {cli._NO_DEVICE} 'tpu'{SET}\n"),
        (KeyboardInterrupt(), 130, "", "interrupted\n"),
        (
            OSError(24, "Too many open files", "a.npz"),
            1,
            "",
            f"error: a.npz: Too many open files{AGAIN}\n",
        ),
        (OSError(36, "File name too long", "x"), 2, "", f"error: x: File name too long{OTHER}\n"),
        (
            PermissionError(13, "Permission denied", b"x"),
            2,
            "",
            f"error: x: Permission denied{OTHER}\n",
        ),
    ],
)
def test_the_end_of_a_command(error, status, out, err, unchanged, monkeypatch, capsys):
    def main(argv: list[str]) -> int:
        if error:
            raise error
        return 0

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == status
    assert capsys.readouterr() == (out, err)


def test_the_rest_of_a_failed_restore_ends_without_a_word(unchanged, capsys):
    """Orbax raises an error of its own where an unfinished read is collected, whenever that is."""

    def abandon(words):
        async def read():
            try:
                await asyncio.sleep(0)
            except BaseException as error:
                raise Exception(words) from error

        reading = read()
        reading.send(None)
        del reading
        gc.collect()

    def main(argv: list[str]) -> int:
        abandon("Encountered error while reading array index: (slice(0, 2, 1),).")
        abandon("Event loop is closed")
        assert capsys.readouterr() == ("", "")
        abandon("another")
        assert "Exception: another" in capsys.readouterr().err
        return 0

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == 0


def test_a_recipe_of_a_package_in_a_package_finds_its_neighbours(tmp_path, monkeypatch):
    inner = tmp_path / "outer_recipes" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    (inner.parent / "neighbour.py").write_text("from ditjax.recipes.digits import get_config")
    recipe = inner / "recipe.py"
    recipe.write_text("from outer_recipes.neighbour import get_config")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.load_recipe([f"--config={recipe}"])["data"]["name"] == "digits"
    assert str(tmp_path) in sys.path


def test_the_flags_that_are_given(capsys):
    parser = cli.parser("x", "")
    parser.add_argument("--which", default="ema")
    parser.add_argument("--heads", type=int, default=0)
    cli.add_processes(parser)
    argv = ["--which=ema", "--config.a.b", "1"]
    assert {"which"} <= cli.given_flags(parser, argv)
    assert "heads" not in cli.given_flags(parser, argv)
    assert parser.parse_known_args([])[0].heads == 0
    with pytest.raises(UserError, match="--which: no effect for a run: remove it"):
        cli.check_unused(parser, argv, ["heads", "which"], "for a run")
    cli.check_unused(parser, argv, ["heads"], "for a run")
