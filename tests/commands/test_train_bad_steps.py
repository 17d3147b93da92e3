"""Numbers that go bad in a run: what is skipped and told, when it ends, how a resume counts on."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from ditjax import train
from ditjax.data import stream
from ditjax.errors import UserError
from tests.commands.conftest import TOY, CutError
from tests.commands.test_train import ema, lines


@contextlib.contextmanager
def spoilt(bad, cut=None) -> Iterator[dict[int, list[int]]]:
    """Batches of the steps `bad` have a NaN, that of `cut` never comes; yields their examples."""
    real, seen = stream.train_batches, {}

    def train_batches(*args, start_step=0, **kwargs):
        source = real(*args, start_step=start_step, **kwargs)

        class Spoilt:
            step = start_step

            def __iter__(self):
                return self

            def __next__(self):
                self.step += 1
                if self.step == cut:
                    raise CutError
                batch = dict(next(source))
                seen[self.step] = batch["index"].tolist()
                if self.step in bad:
                    batch["image"] = batch["image"].copy()
                    batch["image"][3, 2, 5] = np.nan
                return batch

            def __enter__(self):
                return self

            def __exit__(self, *_):
                source.close()

        return Spoilt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "train_batches", train_batches)
        yield seen


def run(workdir, bad, *words, cut=None):
    """Whether it came to its end; else what it said, in one line."""
    with spoilt(bad, cut):
        try:
            return train.main([*TOY, f"--workdir={workdir}", *words]) == 0
        except UserError as error:
            said = str(error)
    assert "\n" not in said
    return said


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def same(one, other):
    (a, a_step), (b, b_step) = ema(one), ema(other)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    return a_step, b_step


def test_skipped_steps_are_told_and_a_resume_among_them_is_exact(tmp_path, capsys):
    bad = (7, 9, 10, 11, 12)
    # The checkpoint of step 10 lies between two lines of the log.
    words = ["--config.train.max_bad_steps=4", "--config.train.log_every_steps=4"]
    with spoilt(bad) as seen:
        assert train.main([*TOY, f"--workdir={tmp_path / 'whole'}", *words]) == 0
    out, err = capsys.readouterr()
    rows = lines(tmp_path / "whole")
    assert [(r["step"], r.get("skipped")) for r in rows] == [
        (4, None),
        (8, 1),
        (12, 4),
        (16, None),
        (20, None),
    ]
    told = [each for row in rows for each in row.get("skipped_steps", [])]
    assert [(each["step"], each["index"]) for each in told] == [(k, seen[k]) for k in bad]
    assert {each["loss"] for each in told} == {"nan"}
    # No step of the third line was taken: it has no means.
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 16, 20]
    assert all(np.isfinite(row[name]) for row in rows for name in ("loss", "mse") if name in row)
    first = ", ".join(map(str, seen[7]))
    assert f"step 7 skipped: loss nan, gradient norm nan; of examples {first}\n" in err
    assert err.count(" skipped: ") == 5
    assert "20 steps (5 skipped), loss" in out
    # The checkpoint is of step 10, two bad ones in a row: two more are not too many.
    with pytest.raises(CutError):
        run(tmp_path / "cut", bad, *words, cut=14)
    assert checkpoints(tmp_path / "cut") == [10]
    assert run(tmp_path / "cut", bad, *words)
    assert same(tmp_path / "whole", tmp_path / "cut") == (20, 20)
    assert lines(tmp_path / "cut") == rows
    assert "20 steps (5 skipped), loss" in capsys.readouterr().out


def test_a_resume_ends_where_the_unbroken_run_does(tmp_path):
    bad, words = (9, 10, 11, 12), ["--config.train.max_bad_steps=3"]
    said = run(tmp_path / "whole", bad, *words)
    assert said.startswith("steps 9 to 12, 4 in a row, were skipped: step 9 of examples ")
    assert said.endswith("checkpoint 14 has the last good state.")
    # Steps 13 and 14, both good, were under way when step 12 was looked at.
    assert [row["step"] for row in lines(tmp_path / "whole")] == [5, 10, 14]
    with pytest.raises(CutError):
        run(tmp_path / "cut", bad, *words, cut=12)
    assert checkpoints(tmp_path / "cut") == [10]
    assert run(tmp_path / "cut", bad, *words) == said
    assert same(tmp_path / "whole", tmp_path / "cut") == (14, 14)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    # The same command goes on.
    assert run(tmp_path / "cut", bad, *words) is True


def test_the_last_good_state_is_kept_and_no_older_one_is_lost(tmp_path):
    bad = range(7, 21)
    words = ["--config.train.checkpoint_every_steps=6", "--config.train.keep_checkpoints=1"]
    said = run(tmp_path / "six", bad, *words)
    assert said.startswith("steps 7 to 12, 6 in a row")
    assert said.endswith("checkpoint 6 has the last good state.")
    assert checkpoints(tmp_path / "six") == [6]
    # Nor is one written anew where nothing changed.
    assert run(tmp_path / "six", bad, *words) == said
    assert checkpoints(tmp_path / "six") == [6]
    assert lines(tmp_path / "six")[-1]["skipped"] == 2
    # Without a checkpoint of step 6 one is made: to the bit the same.
    said = run(
        tmp_path / "seven",
        bad,
        "--config.train.checkpoint_every_steps=20",
        "--config.train.log_every_steps=6",
    )
    assert said.endswith("checkpoint 12 has the last good state.")
    assert same(tmp_path / "six", tmp_path / "seven") == (6, 12)


def test_none_in_a_row(tmp_path):
    said = run(tmp_path, (7,), "--config.train.max_bad_steps=0")
    assert said.startswith("step 7 was skipped, of examples ")
    assert checkpoints(tmp_path) == [9]


def test_a_run_that_ends_in_bad_steps_has_not_ended_well(tmp_path):
    bad, words = range(17, 21), ["--config.train.max_bad_steps=3"]
    said = run(tmp_path, bad, *words)
    assert said.startswith("steps 17 to 20, 4 in a row")
    assert run(tmp_path, bad, *words).startswith("steps 17 to 20, 4 in a row")
    assert run(tmp_path, bad, "--config.train.max_bad_steps=4") is True


def test_a_run_of_bad_steps_alone_has_trained_nothing(tmp_path):
    said = run(tmp_path, (1, 2, 3), "--config.train.steps=3")
    assert said.startswith("steps 1 to 3, 3 in a row")
    assert said.endswith("nothing was learned.")
    assert checkpoints(tmp_path) == []
