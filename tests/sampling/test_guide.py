"""Autoguidance: a weak network of any size in place of the unconditional one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.config import changed, check_used, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.models.network import Conditions
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.draw import digests_of, sampling_protocol
from ditjax.sampling.pipeline import Pipeline
from ditjax.tasks import cost_of, diffusion, make_task, sampling_gflops
from ditjax.tasks.guide import guide_place, guide_recipe, load_guide
from ditjax.weights import networks, tensors, vocabulary, writing
from tests.seeded import seeded_state


def recipe(size="1x16x2", **sections):
    """A tiny flow without a null label: a weak network needs none."""
    return read(
        {
            "model": {"size": size, "patch": 4, "label_dropout": 0.0},
            "data": {"image_size": 8, "channels": 1, "num_classes": 10, **sections.get("data", {})},
            "autoencoder": {"kind": "none", **sections.get("autoencoder", {})},
            "diffusion": {
                "process": "flow",
                "prediction": "velocity",
                "loss": "simple",
                "variance": "none",
                **sections.get("diffusion", {}),
            },
            "sample": {"sampler": "ddim", "steps": "3", "cfg_channels": "all"},
        }
    )


def written(path, c, seed):
    params = {"params": unflatten(seeded_state(networks.shapes_of(c), seed))}
    return str(writing.write_ditjax(path, networks.LoadedNetwork(c, params, "ditjax", (path,))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a network, and of a smaller one that guides it."""
    root = tmp_path_factory.mktemp("guide")
    written(root / "good.safetensors", recipe("2x32x2"), 3)
    written(root / "weak.safetensors", recipe(), 4)
    return root


def opened(folder, guide):
    return Pipeline.from_pretrained(folder / "good.safetensors", guide=str(folder / guide))


@pytest.fixture(scope="module")
def guided(folder):
    return opened(folder, "weak.safetensors")


def drawn(pipeline, scale):
    return pipeline([1, 2, 3], seed=5, cfg_scale=scale, quiet=True).array


def test_a_network_that_guides_itself_changes_nothing(folder):
    """u + s (c - u) with u = c."""
    own = opened(folder, "good.safetensors")
    np.testing.assert_array_equal(drawn(own, 3.0), drawn(own, 1.0))


def test_the_guided_prediction_is_the_papers(guided):
    """Karras et al. 2024: D_weak + w (D - D_weak), both of the asked label, at every step."""
    c = changed(guided.config, {"sample": {"cfg_scale": 2.5}})
    x, t, label = jnp.full((2, 8, 8, 1), 0.3), jnp.full(2, 700.0), jnp.asarray([3, 7])
    conditions = Conditions(label=label)
    good, weak = (
        functools.partial(jax.jit(diffusion.denoiser_module(each).apply), params)
        for each, params in ((c, guided._params), (guide_recipe(c), guided._frozen["guide"]))
    )
    found = diffusion.denoiser(
        c, diffusion.denoiser_module(c).apply, guided._params, conditions,
        diffusion.guidance_of(c), weak,
    )  # fmt: skip
    found = jax.jit(found)(x, t)
    of_weak = weak(x, t, conditions=conditions)
    expected = of_weak + 2.5 * (good(x, t, conditions=conditions) - of_weak)
    assert np.abs(expected - of_weak).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    assert (drawn(guided, 2.5) != drawn(guided, 1.0)).any()


def test_the_weak_network_is_an_argument_of_the_program(guided):
    """Its weights are no constants: with other ones, the same program draws other images."""
    c = changed(guided.config, {"sample": {"cfg_scale": 2.5}})
    sampling = make_task(c).sampling
    assert sampling
    draw = jax.jit(sampling.draw)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 2)
    conditions = Conditions(label=jnp.asarray([1, 2]))

    def images(guide):
        return draw(guided._params, {"guide": guide}, keys, conditions, sampling.guidance)

    weak = guided._frozen["guide"]
    other = jax.tree.map(lambda leaf: jax.device_put(2 * leaf, leaf.sharding), weak)
    assert (images(weak) != images(other)).any()
    assert draw._cache_size() == 1  # type: ignore[attr-defined]


def test_its_digest_is_in_the_protocol_where_it_guides(guided, folder, tmp_path):
    def protocol(scale):
        c = changed(guided.config, {"sample": {"cfg_scale": scale}})
        return sampling_protocol(c, seed=0, labels="uniform", **digests_of(guided._frozen))

    digest = digests_of(guided._frozen)["guide"]
    assert protocol(2.0)["guide"] == digest
    assert "guide" not in protocol(1.0)
    record = guided.write(tmp_path / "x.npz", [1], num=1)
    assert record["protocol"].get("guide") is None, "this recipe's scale is 1"
    with pytest.raises(UserError, match=r"config\.sample\.guide has no effect: .*cfg_scale is 1"):
        check_used(guided.config, ["sample.guide"])
    # A file of weights names no other files.
    kept = tensors.read_tensors(written(tmp_path / "y.safetensors", guided.config, 1), "ema", ())
    assert json.loads(kept.metadata[vocabulary.METADATA])["config"]["sample"]["guide"] == ""


def test_its_gflops_count(guided):
    """Three evaluations of each network, or one of the weak one inside an interval."""
    good, weak = cost_of(guided.config).gflops, cost_of(recipe()).gflops
    assert weak < good / 4

    def gflops(**sample):
        return sampling_gflops(changed(guided.config, {"sample": {"cfg_scale": 2.0, **sample}}))

    assert gflops() == pytest.approx(3 * good + 3 * weak)
    assert gflops(cfg_interval=(0.5, 0.9)) == pytest.approx(3 * good + weak)
    assert gflops(cfg_scale=1.0) == pytest.approx(3 * good)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"num_classes": 12}}, r"whose data\.num_classes is 12, and .* guides 10"),
        ({"data": {"image_size": 16}}, r"whose input is \(16, 16, 1\), and .* guides \(8, 8, 1\)"),
        ({"diffusion": {"process": "gvp"}}, r"diffusion\.process is 'gvp', and .* guides 'flow'"),
        ({"diffusion": {"prediction": "x0"}}, r"prediction is 'x0', and .* guides 'velocity'"),
        ({"diffusion": {"time_scale": 1.0}}, r"time_scale is 1\.0, and .* guides 1000\.0"),
    ],
)
def test_another_kind_of_network_is_refused(folder, tmp_path, sections, words):
    path = written(tmp_path / "other.safetensors", recipe(**sections), 1)
    with pytest.raises(UserError, match=words):
        Pipeline.from_pretrained(folder / "good.safetensors", guide=path)


def test_latents_of_another_scale_are_refused(tmp_path):
    section = {"kind": "kl", "multipliers": (1,), "base_width": 32}
    ours, theirs = (
        recipe(data={"channels": 3}, autoencoder={**section, "scale": scale})
        for scale in (0.2, 0.3)
    )
    path = written(tmp_path / "other.safetensors", theirs, 1)
    c = changed(ours, {"sample": {"guide": path}})
    with pytest.raises(UserError, match=r"autoencoder is \{'scale': 0\.3.*\{'scale': 0\.2"):
        guide_recipe(c)


def test_places(tmp_path):
    assert guide_place("runs/a@400") == ("runs/a", 400)
    assert guide_place("runs/a@best") == ("runs/a", "best")
    assert guide_place("runs/a@b") == ("runs/a@b", "latest")
    (tmp_path / "a@7").mkdir()
    assert guide_place(str(tmp_path / "a@7")) == (str(tmp_path / "a@7"), "latest")
    c = recipe()
    assert load_guide(c, make_mesh(1, 1, jax.devices()[:1])) == {}
    for guide, words in (("none", "none"), (f"{tmp_path}/w@5", "is not a run, and @5 a step")):
        with pytest.raises(UserError, match=rf"config\.sample\.guide is '.*{words}"):
            make_task(changed(c, {"sample": {"guide": guide}}))
