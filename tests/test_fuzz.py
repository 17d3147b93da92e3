"""The fuzzer's quick form, and that it sees what it is there for (long: python -m tests.fuzz)."""

import pickle
import time

import pytest

from ditjax.errors import UserError
from tests import fuzz


def test_files_are_read_or_refused():
    tally = fuzz.fuzz_files(400, seed=int(time.time()))
    assert not tally.failures
    whole = {kind for kind in tally.read if kind.endswith("whole")}
    assert whole == {
        f"{kind}, whole" for kind in ("zip", "legacy", "safetensors", "npz", "json", "jsonl")
    }
    assert tally.read.total() > 60
    assert tally.refused.total() > 150


def test_recipes_are_read_or_refused():
    tally = fuzz.fuzz_configs(300, seed=int(time.time()))
    assert not tally.failures
    assert tally.read["recipe, whole"] == 5
    assert tally.read["recipe"] > 10
    assert tally.refused["recipe"] > 100


def test_the_same_number_is_the_same_input(tmp_path):
    import random

    files = fuzz.real_files(tmp_path, tmp_path / "canary")
    made = [fuzz.a_file(random.Random(f"3 {k}"), files) for k in range(20)]
    assert made == [fuzz.a_file(random.Random(f"3 {k}"), files) for k in range(20)]
    assert len(set(made)) > 10


@pytest.mark.parametrize("number", range(8))
def test_the_watch_sees_what_an_attack_does(tmp_path, number):
    """Python's own unpickler does it: what the readers must never do."""
    body = pickle.dumps(fuzz.attacks(tmp_path / "canary")[number], 4)
    watched = fuzz.watch()
    watched.path, watched.seen, watched.on = "/nowhere", [], True
    try:
        try:
            made = pickle.loads(body)
            if callable(made):  # a method, got and not yet called
                made()
        except ImportError:
            pass
    finally:
        watched.on = False
    assert watched.seen
    watched.seen = []


def test_failures_are_failures():
    tally = fuzz.Tally()

    def hangs():
        while True:
            pass

    def refuses():
        raise UserError("no")

    def breaks():
        raise KeyError("x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 0.05)
        tally.run("a", "hanging", hangs)
    tally.run("a", "refused", refuses)
    tally.run("a", "broken", breaks)
    assert (tally.read["a"], tally.refused["a"]) == (0, 1)
    assert [line.partition(":")[0] for line in tally.failures] == ["hanging", "broken"]
