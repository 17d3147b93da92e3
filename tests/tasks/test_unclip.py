"""unCLIP's decoder: its vectors in training, guidance and samples, what draws them, and a run."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax import sample, train
from ditjax.config import changed, read
from ditjax.diffusion import samplers
from ditjax.errors import UserError
from ditjax.files.assets import asset_bytes, unflatten
from ditjax.models.clip import CLIP, ClipConfig, ClipKeys, ImageConfig, tower_layers
from ditjax.models.network import Conditions
from ditjax.models.text import TextConfig
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.given import GivenRows, given_prompts, held_out_given
from ditjax.sampling.pipeline import Source
from ditjax.sampling.program import abstract_arguments, sampling_of
from ditjax.sampling.unclip import Bipartite, Unclip, text_direction, towards
from ditjax.tasks import diffusion, image_vectors, make_task, prior, text_conditions
from ditjax.tasks.clip import open_clip
from ditjax.tasks.image_vectors import IMAGE_CLIP, PRIOR, with_image_vectors
from ditjax.tasks.opened import Opened
from ditjax.weights import writing
from ditjax.weights.clip import write_clip
from ditjax.weights.networks import from_run, shapes_of
from tests.seeded import seeded_params, seeded_state
from tests.tasks.test_prior import TINY as PRIOR_RECIPE
from tests.tasks.test_text2image import TINY as TEXT_RECIPE
from tests.tasks.test_text2image import Letters

B, E = 4, 8
TINY: dict[str, Any] = {
    **TEXT_RECIPE,
    "task": "unclip",
    "model": {"size": "1x32x2", "patch": 4, "label_dropout": 0.5, "vector_tokens": 2},
    "unclip": {"width": E},
    "data": {**TEXT_RECIPE["data"], "image_size": 8},
}


def clip_at(folder, seed):
    """Write a tiny random CLIP of transformers with the shipped tokenizer."""
    layers = tower_layers(ClipKeys(), "1x16x2", 32)
    text = TextConfig("clip", 360, layers, 12, projection=E, end=1)
    config = ClipConfig(ImageConfig(layers, 8, 3, 4, E), text)
    x, ids = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 12), jnp.int32)
    params = seeded_params(lambda key: CLIP(config).init(key, x, ids), seed=seed)["params"]
    write_clip(folder, config, params)
    (folder / "tokenizer.json").write_bytes(asset_bytes("scene_bpe", ".json")[0])
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_at(tmp_path_factory.mktemp("unclip") / "clip", 1)


def of_prior(folder):
    return read({**PRIOR_RECIPE, "prior": {"clip": folder}})


@pytest.fixture
def letters(monkeypatch, folder):
    """A tokenizer that needs no package, and a prior's recipe that needs no run."""
    monkeypatch.setattr(text_conditions, "tokenizer_of", lambda path: Letters())
    monkeypatch.setattr(prior, "open_tokenizer", lambda path: Letters())
    opened = Opened(None, lambda mesh: {}, "prior", of_prior(folder))
    monkeypatch.setattr(image_vectors, "opened_run", lambda *names: opened)


def recipe(folder, **changes):
    own = {
        "text": {**TINY["text"], "encoder": folder},
        "unclip": {**TINY["unclip"], "clip": folder},
    }
    tree = {**TINY, **own}
    return read({**tree, **{k: {**tree.get(k, {}), **v} for k, v in changes.items()}})


@functools.cache
def random_params(c):
    return {"params": unflatten(seeded_state(shapes_of(c), 1))}


@functools.cache
def loaded(c):
    return text_conditions.load_texts(c, make_mesh(-1, 1))


def captions(c):
    texts = ["red", "a blue two", "", "the digit nine, cut here"]
    return jnp.asarray(text_conditions.tokens_of(c, texts))


@pytest.fixture
def setting(folder, letters):
    """A recipe, its frozen weights, and images."""
    c = recipe(folder)
    images = np.random.default_rng(0).uniform(-1, 1, (B, 8, 8, 3)).astype(np.float32)
    return c, dict(loaded(c)), images


@functools.cache
def embedded(c, images):
    """√E times the unit vectors that CLIP makes of images, and of `captions`."""
    clip, params = CLIP(open_clip(c, "unclip.clip").config), loaded(c)[IMAGE_CLIP]
    images = np.frombuffer(images, np.float32).reshape(B, 8, 8, 3)
    found: Any = jax.jit(clip.apply)(params, images, captions(c))
    both = (found.image, found.text)
    return [np.sqrt(E) * x / np.linalg.norm(x, axis=1, keepdims=True) for x in both]


def test_an_example_has_the_vector_of_its_image_which_is_dropped_apart_from_its_caption(setting):
    c, frozen, images = setting
    task = make_task(c)
    batch = {"image": images, "label": jnp.zeros(B, jnp.int32), "caption": captions(c)}
    prepared = jax.jit(task.prepare)(frozen, batch, jax.random.key(0))
    assert {n: x.shape[1:] for n, x in prepared.items()} == {
        name: one.shape for name, one in task.inputs.items()
    }
    np.testing.assert_allclose(prepared["vector"], embedded(c, images.tobytes())[0], atol=1e-5)
    np.testing.assert_allclose(jnp.square(prepared["vector"]).mean(1), 1, rtol=1e-5)
    many = {name: jnp.repeat(x, 500, 0) for name, x in prepared.items()}
    drawn = jax.jit(task.draw)(many, jax.random.key(2))
    gone = np.asarray(drawn["vector"] == 0).all(1)
    silent = np.asarray(drawn["y"]) == c.data.num_classes
    assert gone.mean() == pytest.approx(0.1, abs=0.03)
    assert silent.mean() == pytest.approx(0.5, abs=0.05)
    assert (gone & silent).mean() == pytest.approx(0.05, abs=0.02)
    np.testing.assert_array_equal(drawn["vector"][~gone], many["vector"][~gone])
    # The network needs it, and finds it in the loss.
    assert jax.eval_shape(task.loss, random_params(c), frozen, drawn)[0].shape == ()


def test_guidance_is_from_neither_caption_nor_image(setting):
    c, frozen, images = setting
    params, t = random_params(c), jnp.full(B, 300)
    x, keys = images[:, ::-1], jax.random.split(jax.random.key(0), B)

    @jax.jit
    def guided():
        given = Conditions(label=jnp.zeros(B, jnp.int32), context=captions(c), vector=images)
        given, of = text_conditions.encoded_conditions(c, frozen, given, None, keys)
        variables = text_conditions.with_null(of, params)
        apply, g = diffusion.apply_of(c), diffusion.guidance_of(c)
        return diffusion.denoiser(c, apply, variables, given, g)(x, t)

    @jax.jit
    def plain(ids, vector):
        fields = text_conditions.encode_texts(c, frozen["text"], ids)
        given = Conditions(**fields, vector=vector)
        return diffusion.denoiser_module(c).apply(params, x, t, given)

    conditional = plain(captions(c), embedded(c, images.tobytes())[0])
    null = jnp.asarray(text_conditions.tokens_of(c, [""] * B))
    away = plain(null, jnp.zeros((B, E)))
    np.testing.assert_allclose(guided(), away + 3 * (conditional - away), atol=2e-5)
    assert np.abs(conditional - away).max() > 1e-3


def test_a_samples_vector_is_of_its_source(folder, setting, monkeypatch):
    c, frozen, images = setting
    ids, keys = captions(c), jax.random.split(jax.random.key(1), B)
    frozen[PRIOR] = seeded_params(prior.make(of_prior(folder)).init)

    def found(source, ids=ids, keys=keys, vector=None):
        at = changed(c, {"unclip": {"source": source}})
        given = Conditions(context=ids, vector=vector)
        return with_image_vectors(at, frozen, given, keys).vector

    image, text = embedded(c, images.tobytes())
    others = jax.jit(lambda: [found("text"), found("other", vector=images), found("none")])()
    for ours, wanted in zip(others, (text, image, np.zeros((B, E))), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    np.testing.assert_array_equal(found("prior", vector=text), text)  # given: nothing is drawn
    drawn = jax.jit(functools.partial(found, "prior"))
    one = drawn(ids, keys)
    np.testing.assert_allclose(jnp.square(one).mean(1), 1, rtol=1e-5)
    np.testing.assert_allclose(drawn(ids[::-1], keys[::-1])[::-1], one, atol=1e-5)
    assert np.abs(drawn(jnp.roll(ids, 1, 0), keys) - one).max() > 1e-4
    # Of other keys than those of the noise that the image is made of.
    seen: list[Any] = []

    def stand_in(*given: Any) -> Any:
        seen.append(given[-1])
        return jnp.asarray(text)

    monkeypatch.setattr(image_vectors, "vectors_of_captions", stand_in)
    found("prior")
    of_image = [keys, *(samplers._stream(keys, n) for n in range(3))]
    assert all((seen[0] != each).all() for each in of_image)
    few = changed(c, {"unclip": {"source": "prior", "candidates": 1}})
    assert image_vectors.vector_protocol(few)["unclip"]["prior"]["candidates"] == 1
    for source, behind in (("image", 0), ("other", 1), ("text", None)):
        sampling = make_task(changed(c, {"unclip": {"source": source}})).sampling
        assert sampling
        assert sampling.needs
        assert sampling.needs.image == behind


def test_what_does_not_go_together_is_one_line(folder, setting, monkeypatch, tmp_path):
    c, _, _ = setting
    drawn = {"source": "prior", "prior": "p"}
    other = of_prior(clip_at(tmp_path / "other", 2))
    theirs = Opened(None, lambda mesh: {}, "prior", other)
    for unclip, message in (
        ({"width": 5}, "width is 5, and the CLIP at .* has vectors of width 8: set it to that"),
        ({**drawn}, "draws vectors of another CLIP"),
    ):
        monkeypatch.setattr(image_vectors, "opened_run", lambda *names: theirs)
        with pytest.raises(UserError, match=message) as error:
            image_vectors.load_vectors(recipe(folder, unclip=unclip), make_mesh(-1, 1))
        assert "\n" not in str(error.value)
    lost = changed(other, {"prior": {"clip": "nowhere"}})
    monkeypatch.setattr(image_vectors, "opened_run", lambda *names: theirs._replace(recipe=lost))
    with pytest.raises(
        UserError, match=r"unclip\.prior is p: config\.prior\.clip=nowhere is no run"
    ):
        image_vectors.load_vectors(recipe(folder, unclip=drawn), make_mesh(-1, 1))
    longer = changed(other, {"text": {"tokens": 11}})
    monkeypatch.setattr(image_vectors, "opened_run", lambda *names: theirs._replace(recipe=longer))
    with pytest.raises(
        UserError, match=r"text\.tokens is 12, and the prior at p was trained with 11"
    ):
        image_vectors.load_vectors(recipe(folder, unclip=drawn), make_mesh(-1, 1))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"config\.unclip\.prior is '': expected a run of task"):
        image_vectors.vector_protocol(recipe(folder, unclip={"source": "prior"}))
    with pytest.raises(UserError, match="set it to 'prior', 'text' or 'none'"):
        given_prompts(c, ["a red three"])
    with pytest.raises(UserError, match="vector_tokens is 2, and this network is given no vector"):
        read({**{k: v for k, v in TINY.items() if k != "unclip"}, "task": "text2image"})
    with pytest.raises(UserError, match="is given texts alone"):
        writing.write_diffusers(tmp_path / "x", from_run(c, random_params(c)))


# ---- images that are given


def test_a_plan_knows_the_images_that_samples_are_given(setting):
    """Their shapes, as the sampler is given them; of captions alone there is no vector."""
    c, frozen, _ = setting
    for source, shape in (("other", (2, *c.data.shape)), ("text", None)):
        at = changed(c, {"unclip": {"source": source}})
        each, conditions, guidance = abstract_arguments(at, make_task(at), 2)
        assert getattr(conditions.vector, "shape", None) == shape
        draw = sampling_of(at, make_task(at)).draw
        drawn = jax.eval_shape(draw, random_params(at), frozen, each, conditions, guidance)
        assert drawn.shape == (2, *c.data.shape)


@pytest.fixture
def pipeline(setting):
    """A decoder that is nearly that of data N(0, 1), whose inversion is exact."""
    c, frozen, _ = setting
    sample = {"steps": "ddim4", "cfg_scale": 1.0}
    c = changed(c, {"sample": sample, "diffusion": {"prediction": "v"}})
    params = random_params(c)
    last = params["params"]["final_layer"]["linear"]
    last |= {name: 0.005 * each for name, each in last.items()}
    return Unclip(Source(c, None, {}, lambda c, mesh: (params, frozen)))


def test_a_given_image_is_drawn_again_varied_interpolated_and_changed(pipeline):
    rng = np.random.default_rng(5)
    first, second = rng.integers(64, 192, (2, 8, 8, 3), dtype=np.uint8)
    same = pipeline.variations(first, num=2, eta=0.0)
    np.testing.assert_array_equal(same.array[0], same.array[1])
    assert np.abs(same.array[0].astype(int) - first).max() <= 2
    varied = pipeline.variations(first, num=2, seed=1)
    assert (varied.array[0] != varied.array[1]).any()
    other = pipeline.variations(first, num=2, seed=2)
    assert (varied.array != other.array).any(axis=(1, 2, 3)).all()
    # To the bit: no change of the text, and the first end of the way, are the image again.
    changed_by = pipeline.text_difference(first, "a red two", "a blue two", num=2)
    np.testing.assert_array_equal(changed_by.array[0], same.array[0])
    way = pipeline.interpolate(first, second, num=2)
    np.testing.assert_array_equal(way.array[0], same.array[0])
    assert np.abs(way.array[1].astype(int) - second).max() <= 2
    assert way.record["unclip"]["use"] == "interpolation"
    assert changed_by.record["unclip"]["texts"] == ["a red two", "a blue two"]
    assert len(varied.images) == 2


def test_the_vector_turns_by_theta_and_the_noise_stays():
    rng = np.random.default_rng(6)
    image = Bipartite(
        np.sqrt(E) * np.eye(1, E, dtype=np.float32), rng.standard_normal((1, 2, 2, 1))
    )
    before, after = rng.standard_normal((2, E)).astype(np.float32)
    direction = text_direction(before, after)
    np.testing.assert_allclose(
        direction, np.sqrt(E) * (after - before) / np.linalg.norm(after - before), rtol=1e-5
    )
    found = towards(image, direction, np.array([0, 0.25, 0.5]))
    np.testing.assert_array_equal(found.noise, np.repeat(image.noise, 3, 0).astype(np.float32))
    np.testing.assert_array_equal(found.vector[:1], image.vector.astype(np.float32))
    np.testing.assert_allclose(jnp.square(found.vector).mean(1), 1, rtol=1e-5)
    middle = image.vector[0] + np.asarray(direction)
    middle *= np.sqrt(E) / np.linalg.norm(middle)
    np.testing.assert_allclose(found.vector[2], middle, rtol=1e-4, atol=1e-5)


def test_without_prompts_captions_of_records_are_drawn(pipeline, monkeypatch, capsys):
    rows = GivenRows(lambda indices: {}, {"captions": "scenes/test", "text": {}, "unclip": {}}, 40)
    monkeypatch.setattr("ditjax.sampling.pipeline.held_out_given", lambda c: rows)
    assert pipeline._beside_edit(pipeline.config, None, None) is rows
    assert "captions: those of scenes/test, in order" in capsys.readouterr().err


def test_uses_that_are_none_are_one_line(pipeline):
    pixels = np.zeros((8, 8, 3), np.uint8)
    cases: Any = (
        (lambda: pipeline.variations(np.zeros((4, 4, 3), np.uint8)), "expected one of 8x8"),
        (lambda: pipeline.variations([pixels] * 2), r"2 image\(s\) of 8x8: expected one"),
        (lambda: pipeline.text_difference(pixels, "a", "a"), "both captions are the same"),
        (lambda: pipeline.text_difference(pixels, "a", "b", theta=2.0), "theta is 2.0"),
        (lambda: pipeline.text_difference(pixels, "a", "b\n"), "without control characters"),
        (lambda: pipeline.variations(pixels, eta=2.0), "eta is 2.0"),
    )
    for use, message in cases:
        with pytest.raises(UserError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    text = read(
        {k: v for k, v in TINY.items() if k != "unclip"}
        | {"task": "text2image", "model": TEXT_RECIPE["model"]}
    )
    with pytest.raises(UserError, match="expected a run of task 'unclip'"):
        Unclip(Source(text, None, {}, lambda c, mesh: ({}, {})))


# ---- a run


@pytest.fixture(scope="module")
def run(folder, data_root, tmp_path_factory):
    """A run of two steps, whose samples follow from a prior of one step."""
    pytest.importorskip("tokenizers")
    out = tmp_path_factory.mktemp("runs")
    own = {"train": {**PRIOR_RECIPE["train"], "steps": 1}, "text": {"tokens": 12}}
    of = read({**PRIOR_RECIPE, **own, "prior": {"clip": folder}})
    steps = {"steps": 2, "sample_every_steps": 0}
    c = recipe(folder, unclip={"source": "prior", "prior": str(out / "prior")}, train=steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_root))
        train.train(of, out / "prior")
        assert train.train(c, out / "run").step == 2
        yield c, out / "run"


def test_a_run_draws_prompts_by_its_prior(run, tmp_path):
    c, workdir = run
    flags = [f"--workdir={workdir}", f"--out={tmp_path}", "--batch_size=8", "--num=2"]
    assert sample.main([*flags, "--prompts=a red three"]) == 0
    protocol = json.loads((tmp_path / "samples.json").read_text())["protocol"]
    assert protocol["unclip"]["source"] == "prior"
    assert protocol["unclip"]["prior"]["candidates"] == 2
    assert {len(each) for each in protocol["vectors"].values()} == {64}
    assert set(protocol["vectors"]) == {IMAGE_CLIP, PRIOR}
    given = held_out_given(c), held_out_given(changed(c, {"unclip": {"source": "other"}}))
    one, next_one = (each.rows(np.arange(3)) for each in given if each)
    assert "beside" not in one
    np.testing.assert_array_equal(next_one["beside"].vector[:2], one["image"][1:])
