"""unCLIP's prior beside diffusers, from a golden file, and its folders."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError
from ditjax.models.network import Conditions
from ditjax.models.prior import PriorKeys, PriorTransformer, prior_cost
from ditjax.weights.prior import load_prior, write_prior
from tests.text_encoders import relative, with_config, write_folder

GOLDENS = Path(__file__).parent.parent / "goldens" / "prior.npz"


@pytest.fixture(scope="module")
def theirs():
    with np.load(GOLDENS) as file:
        return dict(file)


@pytest.fixture(scope="module")
def loaded(theirs, tmp_path_factory):
    return load_prior(write_folder(tmp_path_factory.mktemp("prior") / "a", theirs))


@pytest.fixture(scope="module")
def predict(theirs, loaded):
    """The prediction for the golden's inputs, some of them replaced."""
    apply = jax.jit(PriorTransformer(loaded.config).apply)
    rows = {name.partition("/")[2]: x for name, x in theirs.items() if name.startswith("in/")}

    def predicted(**changes):
        x, vector, context, mask, t = (jnp.asarray({**rows, **changes}[name]) for name in rows)
        given = Conditions(context=context, context_mask=mask, vector=vector)
        return np.asarray(apply({"params": loaded.params}, x, t.astype(jnp.int32), given))

    return predicted


def test_diffusers_computes_the_same(theirs, loaded, predict):
    assert relative(predict(), theirs["out/masked"]) < 5e-6
    whole = predict(mask=np.ones((3, 5), bool))
    assert relative(whole, theirs["out/whole"]) < 5e-6
    assert relative(whole * loaded.std + loaded.mean, theirs["out/vectors"]) < 5e-6


def test_what_is_masked_is_not_seen(theirs, predict):
    context = theirs["in/context"].copy()
    context[~theirs["in/mask"]] = 100
    np.testing.assert_array_equal(predict(context=context), predict())
    assert np.all(predict(vector=-theirs["in/vector"]) != predict())


def test_weights_are_written_as_they_were_read(theirs, loaded, tmp_path):
    write_prior(tmp_path, *loaded[:4])
    again = load_prior(tmp_path)
    assert again.config == loaded.config
    for ours, kept in zip(again[1:4], loaded[1:4], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, kept)
    stated, given = (
        json.loads(text) for text in ((tmp_path / "config.json").read_text(), str(theirs["config"]))
    )
    assert {name: given[name] for name in stated} == stated


def test_the_cost_counts_every_parameter(loaded):
    found = prior_cost(PriorKeys(), loaded.config).parameters
    assert found == sum(x.size for x in jax.tree.leaves(loaded.params))


def test_what_is_no_prior_is_one_line(theirs, loaded, tmp_path):
    with pytest.raises(UserError, match="says _class_name='UNet': expected 'PriorTransformer'"):
        load_prior(write_folder(tmp_path / "a", with_config(theirs, _class_name="UNet")))
    with pytest.raises(UserError, match=r"says added_emb_type=.*: expected 'prd'"):
        load_prior(write_folder(tmp_path / "b", with_config(theirs, added_emb_type=None)))
    less = {name: x for name, x in theirs.items() if name != "tensor/clip_std"}
    with pytest.raises(UserError, match="clip_std is missing"):
        load_prior(write_folder(tmp_path / "c", less))
    wide = loaded.config._replace(context=11)
    with pytest.raises(UserError, match="are 11 and 10: it cannot be written"):
        write_prior(tmp_path, wide, *loaded[1:4])
