"""What users type: for any text or JSON value a parser gives its value, or one line that says why.

Never another exception, and never a wait.
"""

import argparse
import copy
import dataclasses
import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ditjax import plan, train
from ditjax.cli import load_recipe
from ditjax.config import Config, changed, leaf_keys, migrated, read
from ditjax.data.classes import parse_classes
from ditjax.data.source import dataset_info, prepare
from ditjax.diffusion.schedule import space_timesteps
from ditjax.errors import UserError, divisors, nearest, shown
from ditjax.machines import topology
from ditjax.models.dit import PAPER_SIZES, parse_size
from ditjax.parallel.processes import parse_place
from ditjax.runs import rundir

RECIPE = json.loads(json.dumps(load_recipe(["--config=experiments/digits.py"])))
KEYS = leaf_keys(Config)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([10**400, "x" * 10_000, "\0", "\ud800"]),
    st.just(5000).map(lambda digits: -(10**digits)),
    st.sampled_from(["S", "1x4x1", "none", "ddim", "250", "train", "float32", 1, 2, 0.5]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.text("0123456789,.: x+-eE٣²ddim", max_size=24)
WORDS = st.text(max_size=24) | NUMBERS | st.sampled_from(["9" * 5000, "1," * 3000, "\0", ""])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("digits", folder)
    return folder


def or_line(call, *arguments):
    """Its value, or None for a UserError that tells something and is not long."""
    line = ""
    try:
        return call(*arguments)
    except UserError as error:
        line = str(error)
    assert 10 < len(line) < 20_000
    return None


def with_leaf(recipe, key, value):
    recipe = copy.deepcopy(recipe)
    *groups, leaf = key.split(".")
    node = recipe
    for group in groups:
        node = node[group]
    node[leaf] = value
    return recipe


# ---- recipes


@settings(QUICK, max_examples=400)
@given(key=st.sampled_from(KEYS), value=JSON)
@example(key="optim.learning_rate", value=10**400)
@example(key="sweep.grid", value=[["autoencoder.multipliers", [[1, 2], [1, 2]]]])
@example(key="sweep.lists", value=[[["autoencoder.multipliers", [1, 2]]], []])
@example(
    key="sweep.zips", value=[[["optim.b1", [0, 0.5]], ["autoencoder.multipliers", [[1], [2]]]]]
)
@example(key="sweep.seeds", value=[2, 1])
@example(key="sweep.budget", value=["gflops", 0.5])
@example(key="autoencoder.multipliers", value=[1] * 5000)
@example(key="data.image_size", value=2**61)
def test_any_leaf_may_hold_anything(key, value):
    c = or_line(read, with_leaf(RECIPE, key, value))
    if c is not None:
        tree = json.loads(json.dumps(dataclasses.asdict(c)))
        assert read(tree) == c
        assert read(migrated(tree)) == c
        assert changed(c, {}) == c


@QUICK
@given(tree=JSON, section=st.sampled_from(["", "model", "data", "sweep", "mesh"]))
def test_any_group_may_be_anything(tree, section):
    or_line(read, {**RECIPE, section: tree} if section else tree)


@QUICK
@given(values=st.lists(JSON, max_size=3), key=st.sampled_from(KEYS) | st.text(max_size=9))
def test_any_grid(key, values):
    c = or_line(read, with_leaf(RECIPE, "sweep.grid", [[key, values]]))
    if c is not None:
        ((axis, found),) = c.sweep.grid
        assert (axis, len(found)) == (key, len(values))


@settings(QUICK, max_examples=60)
@given(key=st.sampled_from([*KEYS, "no.such", ""]), text=WORDS)
@example(key="sweep.grid", text="(" * 3000)
@example(key="sweep.grid", text="((1,2),{'a':nan})")
def test_any_override(key, text):
    recipe = or_line(load_recipe, ["--config=experiments/digits.py", f"--config.{key}={text}"])
    if recipe is not None:
        or_line(read, recipe)


@QUICK
@given(value=JSON)
def test_what_is_shown_is_short_and_on_one_line(value):
    text = shown(value)
    assert len(text) < 10_000
    assert "\n" not in text


def test_what_is_shown_of_the_absurd():
    for value in (10**5000, [[[[[[1]]]]]], "x" * 10**6, {"a" * 10**6: 10**5000}):
        assert len(shown(value)) < 400
    assert nearest("a" * 1000, ["a" * 1000]) == ""


# ---- words


@QUICK
@given(text=WORDS | st.from_regex(r"[0-9]{1,5}x[0-9]{1,7}x[0-9]{1,5}", fullmatch=True))
def test_sizes(text):
    size = or_line(parse_size, text)
    if size is not None and text not in PAPER_SIZES:
        assert tuple(map(int, text.split("x"))) == size
        assert size.width % size.heads == size.width % 4 == 0


@QUICK
@given(number=st.integers(1, 3000))
def test_divisors_are_all_of_them(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_divisors_of_large_numbers_come_at_once():
    assert len(divisors(2**40)) == 41


@QUICK
@given(T=st.integers(1, 300), text=WORDS | st.from_regex(r"(ddim)?[0-9]{1,3}(,[0-9]{1,2}){0,3}"))
def test_sampling_steps(T, text):
    retained = or_line(space_timesteps, T, text)
    if retained is not None:
        assert retained[0] >= 0
        assert retained[-1] < T
        assert (retained[1:] > retained[:-1]).all()


@QUICK
@given(text=WORDS, count=st.sampled_from([1, 10, 1000]))
def test_classes(text, count):
    numbers = or_line(parse_classes, text, count)
    assert numbers is None or all(0 <= k < count for k in numbers)


@QUICK
@given(text=WORDS | st.sampled_from(["v5e:16x16", "h100:8", "v5e:", ":", "v4:1x1", "v5e:16X16"]))
def test_topologies(text):
    found = or_line(topology.parse_topology, text)
    assert found is None or found.name == text


@QUICK
@given(text=WORDS | st.from_regex(r"(data|fsdp|x)=-?[0-9]{1,3}(,tensor=[0-9])?"))
def test_meshes(text):
    words = or_line(plan._mesh_flags, text)
    if words:
        assert all(word.startswith("--config.mesh.") and "=" in word for word in words)


@QUICK
@given(text=WORDS | st.from_regex(r"[0-9]{1,3}:[0-9]{1,3}", fullmatch=True))
def test_profiled_steps(text):
    try:
        steps = train._steps(text)
    except (argparse.ArgumentTypeError, ValueError):  # either is an error of the command line
        return
    assert 1 <= steps[0] <= steps[-1]


@QUICK
@given(text=WORDS | st.from_regex(r"[a-z]{1,3}:[0-9]{1,7}"), count=st.integers(-1, 3))
@example(text="host:" + "9" * 5000, count=2)
def test_coordinators(text, count):
    place = or_line(parse_place, text, count, 0)
    assert place is None or 0 < place.port < 2**16


@settings(QUICK, max_examples=60)
@given(text=WORDS, kind=st.sampled_from(["", "folder:/nowhere/x", "latents:/nowhere/x"]))
@example(text="x" * 300, kind="folder:/nowhere/x")
@example(text="x" * 300, kind="latents:/nowhere/x")
@example(text="x" * 300, kind="")
def test_data_sets(tmp_path, text, kind):
    name = kind + text.replace("/", "_")  # no way up
    assert or_line(dataset_info, name, "train", tmp_path) is None


@pytest.mark.parametrize("kind", ["folder:", "latents:"])
def test_the_home_of_nobody(tmp_path, kind):
    with pytest.raises(UserError, match="Give the whole path"):
        dataset_info(f"{kind}~nobody_is_called_so/x", "train", tmp_path)
    with pytest.raises(UserError, match="Give the whole path"):
        dataset_info("digits", "train", "~nobody_is_called_so/x")


@settings(QUICK, max_examples=60)
@example(text="train[3:1]+test")
@given(text=WORDS | st.from_regex(r"(train|test)(\[[0-9]{0,4}%?:[0-9]{0,4}%?\])?(\+test)?"))
def test_splits(data_dir, text):
    info = or_line(dataset_info, "digits", text, data_dir)
    assert info is None or 0 < info.num_examples <= 2 * 1797
    assert info is None or text != "train[3:1]+test"


@QUICK
@given(text=st.text(max_size=300), longest=st.sampled_from([128, 200]))
def test_run_names(text, longest):
    name = rundir.legal_name(text, longest)
    assert re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{longest - 1}}}", name)
    assert rundir.legal_name(name, longest) == name
