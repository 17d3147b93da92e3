"""A tiny run that every command can be tried on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from ditjax import train
from ditjax.data import stream

TINY = (
    "--config=experiments/digits.py:1x32x2/4",
    "--config.model.unroll=1",
    "--config.train.steps=20",
    "--config.train.batch_size=16",
    "--config.optim.warmup_steps=2",
    "--config.train.log_every_steps=5",
    "--config.train.checkpoint_every_steps=10",
    "--config.train.evaluate_every_steps=0",
    "--config.sample.steps=ddim3",
    "--config.sample.batch_size=40",
    "--config.sample.num=40",
    "--config.evaluate.num_samples=40",
    "--config.evaluate.guided_num=20",
    "--config.evaluate.val_loss_num=0",  # one program less to compile; tests that are of it ask
)
# Where the network is not the point.
TOY = (
    "--config=tests/toys/digits.py",
    *(word for word in TINY if not word.startswith(("--config=", "--config.model."))),
)
# On latents of an autoencoder that a test names.
LATENTS = (
    "--config=tests/toys/latents.py",
    *(word for word in TOY if not word.startswith("--config=") and "batch" not in word),
)


class CutError(Exception):
    """The end of a run that nothing announces."""


def cut_after(batches: int) -> Callable[..., Any]:
    """In place of `stream.train_batches`: it ends with an error."""
    real = stream.train_batches

    def cut(*args: Any, **kwargs: Any) -> Any:
        source = real(*args, **kwargs)

        class Cut:
            count = 0

            def __iter__(self) -> Self:
                return self

            def __next__(self) -> Any:
                self.count += 1
                if self.count > batches:
                    raise CutError
                return next(source)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                source.close()

        return Cut()

    return cut


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def _environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITJAX_DATA", str(data_dir))
    monkeypatch.chdir(Path(__file__).parent.parent.parent)


def run_of(words: tuple[str, ...], data_dir: Path, workdir: Path) -> Path:
    """Train a run with a grid of samples at its end; return its work directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_dir))
        patch.chdir(Path(__file__).parent.parent.parent)
        assert (
            train.main([*words, f"--workdir={workdir}", "--config.train.sample_every_steps=20"])
            == 0
        )
    return workdir


@pytest.fixture(scope="session")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a finished tiny run."""
    return run_of(TINY, data_dir, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def toy(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the toy network."""
    return run_of(TOY, data_dir, tmp_path_factory.mktemp("toy"))
