"""Training on a reward by command: a run that is cut within a round resumes to the bit."""

import json

import jax
import numpy as np
import pytest

from ditjax import train
from ditjax.data import stream
from ditjax.errors import UserError
from ditjax.parallel.mesh import make_mesh
from ditjax.runs import opening
from ditjax.runs.checkpoint import Checkpoints
from ditjax.tasks import make_task
from ditjax.training.program import abstract_state
from tests.commands.conftest import TOY, CutError, cut_after

SHORT = (
    *TOY,
    "--config.optim.warmup_steps=0",
    "--config.train.steps=5",
    "--config.train.batch_size=8",
    "--config.train.log_every_steps=1",
    "--config.train.checkpoint_every_steps=1",
)
TUNED = (
    "--config.adapt.kind=partial",
    "--config.adapt.train=^out/",
    "--config.reward.method=ddpo",
    "--config.reward.updates=3",
    "--config.reward.kl=0.1",
)


def state_of(workdir):
    c = opening.recipe_of(workdir)
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(c, make_task(c), make_mesh(-1, 1)), 5)
    return jax.device_get(state)


def test_a_run_that_is_cut_within_a_round_resumes_to_the_bit(tmp_path):
    """The state has what is trained alone, and the same of those that draw and of the base."""
    base, whole, cut = (tmp_path / name for name in ("base", "whole", "cut"))
    assert train.main([*SHORT, f"--workdir={base}"]) == 0
    words = [*SHORT, *TUNED, f"--config.adapt.base={base}"]
    assert train.main([*words, f"--workdir={whole}"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "train_batches", cut_after(4))
        with pytest.raises(CutError):
            train.main([*words, f"--workdir={cut}"])
    assert train.main([*words, f"--workdir={cut}"]) == 0
    found, expected = state_of(cut), state_of(whole)
    assert found.params["params"].keys() == {"out"}
    assert found.averages.trees.keys() == {"held:0", "held:3"}
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    logs = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (cut, whole)
    ]
    for ours, theirs in zip(*logs, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert logs[0][0]["kl"] < 1e-9 < logs[0][1]["kl"], "it starts from the base"
    with pytest.raises(UserError, match=r"sample\.eta=1.0.*reward\.method='ddpo' depends on it"):
        train.main([*words, f"--workdir={cut}", "--config.sample.eta=0.5"])
