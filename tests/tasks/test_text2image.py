"""Text-to-image: the null text, guidance and negative prompts, features kept, refusals, a run."""

import csv
import functools
import hashlib
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax import evaluate, inspect, sample, train
from ditjax.config import changed, read
from ditjax.convert import convert
from ditjax.data.records import load_arrays
from ditjax.data.tokenizers import Tokens
from ditjax.errors import UserError
from ditjax.evaluation.analyses import ANALYSES
from ditjax.evaluation.clip_score import ClipScorer, clip_scores
from ditjax.evaluation.features import captions_extractor
from ditjax.evaluation.given import CaptionScores
from ditjax.files.assets import asset_bytes, unflatten
from ditjax.machines import planning
from ditjax.models.clip import CLIP, ClipConfig, ClipKeys, ImageConfig, tower_layers
from ditjax.models.network import Conditions
from ditjax.models.text import TextConfig
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.sampling.given import held_out_given, read_prompts
from ditjax.sampling.pipeline import Pipeline
from ditjax.sampling.program import abstract_weights, sampling_of
from ditjax.sampling.text2image import Text2Image
from ditjax.tasks import diffusion, make_task, text_conditions
from ditjax.tasks.text_conditions import NULL, live_tokens
from ditjax.training.task import Additions
from ditjax.weights.clip import load_clip, write_clip, write_clip_text
from ditjax.weights.networks import from_run, shapes_of
from ditjax.weights.text import load_text_encoder
from ditjax.weights.writing import write_ditjax
from tests.seeded import seeded_state
from tests.text_encoders import relative, tiny_bert

B = 4
TINY: dict[str, Any] = {
    "task": "text2image",
    "model": {"size": "1x32x2", "patch": 4, "label_dropout": 0.1},
    "text": {"width": 16, "tokens": 12},
    "data": {"name": "caption_scenes/40", "image_size": 16, "num_classes": 10, "flip": False},
    "autoencoder": {"kind": "none"},
    "diffusion": {"schedule": "cosine", "loss": "simple", "variance": "fixed_small"},
    "sample": {"sampler": "ddim", "steps": "ddim2", "cfg_scale": 3.0, "cfg_channels": "all"}
    | {"batch_size": 8},
    "train": {"batch_size": 8, "steps": 4, "sample_every_steps": 4, "ema_decay": 0.0},
    "evaluate": {"features": "captions", "num_samples": 8, "val_loss_num": 8, "split": "train"}
    | {"reference": "caption_scenes/40"},
}


class Letters:
    """A tokenizer of letters: 1 ends a text and pads it."""

    vocabulary, end, pad, sha256 = 360, 1, 1, "letters"

    def __call__(self, texts, length):
        ids = np.ones((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            found = [0, *(2 + ord(each) % 300 for each in text)][: length - 1]
            ids[row, : len(found)] = found
        return Tokens(ids, ids != 1, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert") / "encoder")


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(text_conditions, "tokenizer_of", lambda path: Letters())


def recipe(folder, **changes):
    tree = {**TINY, "text": {**TINY["text"], "encoder": str(folder)}}
    return read({**tree, **{k: {**tree.get(k, {}), **v} for k, v in changes.items()}})


def random_params(c):
    return {"params": unflatten(seeded_state(shapes_of(c), 1))}


def loaded(c):
    return text_conditions.load_texts(c, make_mesh(-1, 1))


def started(c):
    """What a run of a recipe begins with."""
    start = make_task(c).start
    assert start is not None
    return start(make_mesh(-1, 1))


def captions(c):
    texts = ["red", "a blue two", "", "the digit nine, cut here"]
    return jnp.asarray(text_conditions.tokens_of(c, texts))


def test_a_text_ends_with_its_first_end():
    ids = jnp.asarray([[0, 5, 1, 1], [0, 1, 7, 1], [0, 5, 6, 7]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(live_tokens(ids, 1, 1), np.array(expected, bool))
    np.testing.assert_array_equal(live_tokens(ids, -1, 1), np.asarray(ids) != 1)


@pytest.mark.usefixtures("letters")
def test_a_dropped_caption_is_the_null_text(folder):
    """Whatever it was, the loss is that of the null text for all; and otherwise it is not."""
    c = recipe(folder)
    task, frozen, params = make_task(c), loaded(c), random_params(c)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(-1, 1, (B, 16, 16, 3)), jnp.float32)
    batch = {"image": image, "label": jnp.zeros(B, jnp.int32), "caption": captions(c)}
    prepared = jax.jit(task.prepare)(frozen, batch, jax.random.key(0))
    assert {n: x.shape[1:] for n, x in prepared.items()} == {
        name: one.shape for name, one in task.inputs.items()
    }
    drawn = task.draw(prepared, jax.random.key(1))
    loss = jax.jit(lambda drawn: task.loss(params, frozen, drawn)[0])
    null = jnp.full(B, c.data.num_classes)
    alone = {**drawn, **{n: jnp.repeat(x, B, 0) for n, x in frozen[NULL].items()}}
    kept = {**drawn, "y": jnp.zeros(B, jnp.int32)}
    dropped = loss({**drawn, "y": null})
    assert dropped == loss({**alone, "y": null}) == loss({**alone, "y": kept["y"]})
    assert loss(kept) != dropped
    # Training drops whole captions, as often as labels.
    many = {name: jnp.repeat(x, 500, 0) for name, x in prepared.items()}
    share = float((task.draw(many, jax.random.key(2))["y"] == c.data.num_classes).mean())
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.usefixtures("letters")
def test_a_spread_encoder_gives_the_same_features(folder, monkeypatch):
    """Each device holds a quarter of the encoder; features and samples are those of one device."""
    monkeypatch.setattr(rules, "SPREAD", 32)
    c, rng = recipe(folder, text={"negative": "blue"}), np.random.default_rng(3)
    image = rng.uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    ids = np.tile(captions(c), (2, 1))
    batch = {"image": image, "label": np.zeros(8, np.int32), "caption": ids}
    keys = jax.random.split(jax.random.key(5), 8)
    given = Conditions(label=batch["label"], context=ids)
    features, drawn = [], []
    for shape in ((1, 1), (2, 4)):
        mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
        task = make_task(c, mesh)
        frozen = task.frozen(mesh)
        leaves = jax.tree.leaves(frozen["text"])
        share = sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)
        assert share == 1 if mesh.size == 1 else share < 0.3
        planned = abstract_weights(c, task, mesh)[1]["text"]
        assert [x.sharding for x in leaves] == [x.sharding for x in jax.tree.leaves(planned)]
        held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        assert planning._held_beside(task, mesh) == (held, "")
        rows = jax.device_put(batch, rules.batch_sharding(mesh))
        prepare = jax.jit(task.prepare).lower(frozen, rows, jax.random.key(0)).compile()
        found = prepare(frozen, rows, jax.random.key(0))
        assert found["context"].sharding.shard_shape((8, 12, 16)) == (8 // mesh.size, 12, 16)
        features.append(found["context"])
        params = jax.device_put(random_params(c), rules.replicated(mesh))
        sampling = sampling_of(c, task)
        draw = jax.jit(sampling.draw)
        drawn.append(np.asarray(draw(params, frozen, keys, given, sampling.guidance), np.int32))
    np.testing.assert_allclose(features[1], features[0], atol=2e-6)
    assert np.ptp(drawn[0]) > 100
    assert np.max(np.abs(drawn[1] - drawn[0])) <= 1
    missing = make_task(recipe(folder, text={"encoder": "t5-xxl"}))
    assert planning._held_beside(missing, mesh)[1].startswith("t5-xxl does not exist")


@pytest.fixture
def denoisers(folder, letters):
    """Predictions of the captions at a scale, and what they are made of."""
    c = recipe(folder)
    frozen, params = loaded(c), random_params(c)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((B, 16, 16, 3)), jnp.float32)
    t = jnp.full(B, 300)
    conditions = Conditions(label=jnp.zeros(B, jnp.int32), context=captions(c))

    @functools.partial(jax.jit, static_argnums=(0,))
    def predict(scale, negative=None):
        at = changed(c, {"sample": {"cfg_scale": scale}})
        given, of = text_conditions.encoded_conditions(at, frozen, conditions, negative)
        variables = text_conditions.with_null(of, params)
        apply, g = diffusion.apply_of(at), diffusion.guidance_of(at)
        return diffusion.denoiser(at, apply, variables, given, g)(x, t)

    @jax.jit
    def plain(ids):
        fields = text_conditions.encode_texts(c, frozen["text"], ids)
        return diffusion.denoiser_module(c).apply(params, x, t, Conditions(**fields))

    return c, predict, plain


def test_guidance_is_towards_the_caption_from_the_null_or_negative_text(denoisers):
    c, predict, plain = denoisers
    conditional = plain(captions(c))
    np.testing.assert_allclose(predict(1.0), conditional, atol=2e-6)
    for text in ("", "a blue two"):
        ids = jnp.asarray(text_conditions.tokens_of(c, [text]))
        away = plain(jnp.repeat(ids, B, 0))
        found = predict(3.0, ids if text else None)
        np.testing.assert_allclose(found, away + 3 * (conditional - away), atol=2e-5)


@pytest.mark.usefixtures("letters")
def test_a_negative_prompt_is_a_key_of_the_recipe(folder):
    c = recipe(folder, text={"negative": "blue"})
    np.testing.assert_array_equal(
        diffusion.guidance_of(c).negative, text_conditions.tokens_of(c, ["blue"])
    )
    assert text_conditions.text_protocol(c)["text"]["negative"] == "blue"
    assert diffusion.guidance_of(recipe(folder)).negative is None
    with pytest.raises(UserError, match="without guidance no prompt is negative"):
        recipe(folder, text={"negative": "blue"}, sample={"cfg_scale": 1.0})
    with pytest.raises(UserError, match="expected at most 4096"):
        recipe(folder, text={"negative": "x" * 10_000})


@pytest.mark.usefixtures("letters")
def test_kept_features_are_a_texts_own(folder):
    """To the bit the same in any batch, and those that are computed, rounded to float16."""
    c = recipe(folder, text={"cache": True})
    rows = {"caption": np.asarray(captions(c)), "label": np.zeros(B, np.int32)}
    found = text_conditions.cached_texts(c, Additions()).add(rows)
    order = np.array([3, 1])
    again = text_conditions.cached_texts(c, Additions()).add(
        {name: x[order] for name, x in rows.items()}
    )
    computed = text_conditions.encode_texts(c, loaded(c)["text"], captions(c))
    for name in ("context", "context_mask"):
        np.testing.assert_array_equal(again[name], found[name][order])
        np.testing.assert_allclose(found[name], computed[name], atol=2e-3)
    assert found["context"].dtype == np.float16
    pooled = recipe(folder, text={"features": "pooled"})
    one = text_conditions.encode_texts(pooled, loaded(c)["text"], captions(c))
    live = np.asarray(computed["context_mask"])[..., None]
    mean = (np.asarray(computed["context"]) * live).sum(1) / live.sum(1)
    np.testing.assert_allclose(one["context"][:, 0], mean, atol=1e-5)
    assert make_task(pooled).inputs["context"].shape == (1, 16)
    contents = text_conditions.cached_texts(recipe(folder), Additions()).contents
    assert contents.keys() == {"text.tokenizer", "text.encoder"}


@pytest.mark.usefixtures("letters")
def test_what_does_not_go_together_is_one_line(folder):
    for changes, message in (
        ({"data": {"flip": True}}, "a mirrored image's caption"),
        ({"data": {"name": "latents:X"}, "autoencoder": {"kind": "kl"}}, "hold no captions"),
        ({"evaluate": {"labels": "balanced"}}, "drawn of the captions of records"),
        ({"sample": {"guide": "runs/x"}}, "config.sample.guide is set"),
        ({"model": {"kind": "dit"}}, "a network of texts .* goes with task 'text2image'"),
        ({"model": {"label_dropout": 0.0}}, "guidance needs the null label"),
    ):
        with pytest.raises(UserError, match=message):
            recipe(folder, **changes)
    for text, message in (
        ({"width": 12}, "has features of width 16: set it to that"),
        ({"tokens": 40}, "has 32 positions: expected at most as many"),
        ({"encoder": ""}, "expected a folder of transformers with a text encoder"),
        ({"encoder": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            loaded(recipe(folder, text=text))
    small = tiny_bert(folder.parent / "small", vocabulary=50)
    with pytest.raises(UserError, match=r"has 360 tokens, and the encoder .* a table of 50"):
        loaded(recipe(small))


@pytest.mark.usefixtures("letters")
def test_a_class_conditional_dit_is_a_start(folder, tmp_path):
    """At t = 500 its first prediction is the DiT's without a class, whatever the caption."""
    sections = {"model": {"size": "1x32x2", "patch": 4}, "data": {**TINY["data"]}}
    plain = read({**{k: TINY[k] for k in ("autoencoder", "diffusion")}, **sections})
    base = from_run(plain, random_params(plain))
    write_ditjax(tmp_path / "dit.safetensors", base)
    c = recipe(folder, adapt={"base": str(tmp_path / "dit.safetensors")})
    start = started(c)
    record = start.record
    assert set(record["adapted"]) == {"blocks/table", "final_layer/table"}
    assert {"caption/in/kernel", "adaln_single/linear/kernel"} <= set(record["fresh"])
    assert "y_embedder/table" in record["unused"]
    assert "blocks/attn/qkv/kernel" in record["copied"]
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 16, 16, 3)), jnp.float32)
    texts = Conditions(context=x[:, :6, :, 0], context_mask=jnp.ones((2, 6), bool))
    null = Conditions(label=jnp.full(2, 10))
    ours, theirs = (
        functools.partial(jax.jit(diffusion.denoiser_module(each).apply), params)
        for each, params in ((c, start.params), (plain, base.params))
    )
    for t, same in ((500, True), (100, False)):
        found, expected = (
            each(x, jnp.full(2, t), given) for each, given in ((ours, texts), (theirs, null))
        )
        assert (relative(found, expected) < 2e-5) == same, t
    for model, words in (
        ({"block": "adaln"}, "the base has block 'adaln': expected 'adaln_zero'"),
        ({"norm": "rms"}, "the base has norm 'rms': expected 'layer'"),
    ):
        other = changed(plain, {"model": model})
        write_ditjax(tmp_path / "other.safetensors", from_run(other, random_params(other)))
        c = recipe(folder, adapt={"base": str(tmp_path / "other.safetensors")})
        with pytest.raises(UserError, match=words):
            started(c)


# ---- a run


@pytest.fixture(scope="module")
def clip_folder(folder):
    """A tiny random CLIP of transformers with the shipped tokenizer."""
    layers = tower_layers(ClipKeys(), "1x16x2", 32)
    text = TextConfig("clip", 360, layers, 12, projection=8, end=1)
    config = ClipConfig(ImageConfig(layers, 8, 3, 4, 8), text)
    x, ids = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 12), jnp.int32)
    params = jax.jit(CLIP(config).init)(jax.random.key(3), x, ids)["params"]
    write_clip(folder.parent / "clip", config, jax.tree.map(np.asarray, params))
    (folder.parent / "clip" / "tokenizer.json").write_bytes(asset_bytes("scene_bpe", ".json")[0])
    return folder.parent / "clip"


@pytest.fixture(scope="module")
def run(folder, clip_folder, data_root):
    """A run of four steps at a large rate, so that texts count, and its directory."""
    pytest.importorskip("tokenizers")
    c = recipe(folder, optim={"learning_rate": 0.03}, evaluate={"clip": str(clip_folder)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITJAX_DATA", str(data_root))
        trained = train.train(c, folder.parent / "run")
        assert trained.step == 4
        assert np.isfinite(trained.loss)
        yield c, folder.parent / "run"


def test_samples_are_judged_by_their_captions(run):
    """Every attribute by what the record shows, and by a CLIP; the protocol says how."""
    c, workdir = run
    assert len(list((workdir / "samples").glob("*.png"))) == 1
    record = evaluate.evaluate_run(c, workdir)
    found, protocol = record["metrics"], record["protocol"]
    for name in ("digit", "colour", "place", "all"):
        assert 0 <= found[f"accuracy_{name}"] <= 1
    assert found["accuracy_all"] <= found["accuracy_digit"]
    assert found["val_loss"] > 0
    assert found["fd_captions"] > 0
    assert {"clip_score", "clip_score_shuffled"} <= found.keys()
    assert protocol["captions"].endswith("/train")
    assert protocol["text"]["tokens"] == 12
    assert len(protocol["text_encoder"]) == 64
    assert protocol["clip"]["tokenizer"] == protocol["text"]["tokenizer"]


def test_real_scenes_follow_their_captions(folder, own_data):
    """Sample i is judged beside record i, also behind the last one."""
    pytest.importorskip("tokenizers")
    c = recipe(folder, data={"image_size": 32})
    images = load_arrays(c.data.name, "train")["image"]
    given = held_out_given(c)
    assert given is not None
    scores = CaptionScores(c, given, captions_extractor())
    for part in np.split(np.concatenate([images, images]), 4):
        scores.add(part)
    found, each = scores.means(), scores.records()
    exact = ("accuracy_colour", "accuracy_place", "pair_colours")
    assert [found[name] for name in exact] == [1, 1, 1]
    assert found["pair_colours_swapped"] == 0
    assert 3 < np.sum(each["pair_colours"] == 1) < 20
    assert np.all(np.isnan(each["accuracy_colour"]) | np.isnan(each["pair_colours"]))
    shifted = CaptionScores(c, given, captions_extractor())
    shifted.add(np.roll(images, 1, axis=0))
    assert shifted.means()["pair_colours"] < 0.5


def test_another_encoder_is_noticed(run, folder):
    c, workdir = run
    other = tiny_bert(folder.parent / "other", width=16, layers=2)
    moved = changed(c, {"text": {"encoder": str(other)}, "train": {"steps": 5}})
    with pytest.raises(UserError, match=r"text\.encoder"):
        train.train(moved, workdir)


def test_an_image_is_of_its_own_prompt(run):
    pipeline = Pipeline.from_pretrained(run[1])
    drawn = [
        pipeline(prompts=prompts, quiet=True, cfg_scale=3.0)
        for prompts in (["a red three", "the digit two"], ["a red three", "a blue digit"])
    ]
    one, other = (each.array for each in drawn)
    np.testing.assert_array_equal(one[0], other[0])
    assert (one[1] != other[1]).any()
    assert drawn[0].record["prompts"] == ["a red three", "the digit two"]
    assert drawn[0].record["captions"] != drawn[1].record["captions"]
    again = pipeline(prompts=["e\u0301"], num=1, quiet=True).record["captions"]
    assert again == pipeline(prompts=["\u00e9"], num=1, quiet=True).record["captions"]


def test_prompts_that_are_none_are_one_line(run, tmp_path):
    pipeline = Pipeline.from_pretrained(run[1])
    cases: Any = (
        ([], "0 prompts: expected 1 to 10,000"),
        (["x"] * 10_001, "10,001 prompts"),
        (["x" * 10_000], "10,000 characters; expected at most 4,096"),
        (["a\0b"], "expected a text without control characters"),
        (["a\nb"], "expected a text without control characters"),
        ([3], "prompt 3"),
    )
    for prompts, message in cases:
        with pytest.raises(UserError, match=message) as error:
            pipeline(prompts=prompts)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the network takes texts: give --prompts"):
        pipeline(classes=[3])
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    with pytest.raises(UserError, match="line 2: it is empty"):
        read_prompts(str(tmp_path / "p.txt"))


def test_the_command_draws_a_file_of_prompts(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red three\na blue two\n")
    flags = [f"--workdir={run[1]}", f"--out={tmp_path}", "--batch_size=8", "--negative=green"]
    assert sample.main([*flags, f"--prompts={tmp_path / 'prompts.txt'}", "--num=4"]) == 0
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["prompts"] == ["a red three", "a blue two"]
    assert record["protocol"]["text"]["negative"] == "green"
    assert record["protocol"]["labels"] == "prompts"
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (4, 16, 16, 3)


# ---- folders and custom pipelines


def test_the_inside_of_a_network_of_texts_is_read(run, tmp_path, capsys):
    """All analyses; the clean and the corrupted run of a patch have different texts."""
    folder = run[1]
    words = ["--times=0.5", "--num=32", "--batch_size=32", "--config.evaluate.features=none"]
    words += ["--config.evaluate.split=train", "--config.data.name=caption_scenes/80"]
    assert inspect.main([f"--workdir={folder}", f"--out={tmp_path / 'in'}", *words]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{printed}" for name in ANALYSES)
    page = (tmp_path / "in" / "index.html").read_text()
    assert "words_maps" in page
    protocol = json.loads((tmp_path / "in" / "inspection.json").read_text())["protocol"]
    assert (protocol["captions"], protocol["text"]["tokens"]) == ("first", 12)
    with (tmp_path / "in" / "words.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {
        "map",
        "same map",
        "centre",
        "block",
        "uniform",
        "word",
    }
    assert any(row["word"] for row in rows)
    with (tmp_path / "in" / "patch.csv").open() as file:
        effects = [float(row["effect"]) for row in csv.DictReader(file) if row["kind"] == "all"]
    assert effects[-1] == pytest.approx(1, abs=1e-4), "all that a text does is in the tokens"


@pytest.fixture(scope="module")
def pipeline_folder(run):
    """The run as a whole folder, with its encoder and tokenizer."""
    out = run[1].parent / "whole"
    convert(str(run[1]), "pipeline", str(out))
    return out


def drawn_by(pipeline, **keys):
    options = {"cfg_scale": 3.0, "sampler": "ddim", "steps": "ddim2", "seed": 5, "quiet": True}
    return pipeline(["a red three", "a blue digit"], **{**options, **keys})


def test_a_folder_draws_what_its_run_draws(run, pipeline_folder):
    of_run = Text2Image.from_pretrained(run[1], precision="float32")
    of_folder = Text2Image.from_pretrained(pipeline_folder)
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"
    assert index["text_encoder"] == ["transformers", "BertModel"]
    assert "vae" not in index
    one, other = drawn_by(of_run), drawn_by(of_folder)
    np.testing.assert_array_equal(one.array, other.array)
    assert (one.array != drawn_by(of_run, negative_prompt="a blue digit").array).any()
    assert of_run.config.text.negative == ""
    with pytest.raises(UserError, match="without guidance no prompt is negative"):
        drawn_by(of_run, negative_prompt="green", cfg_scale=1.0)


def test_a_clip_runs_text_tower_is_written_as_it_is_read(clip_folder, tmp_path):
    loaded = load_clip(clip_folder)
    assert write_clip_text(tmp_path, loaded.config.text, loaded.params["text"]) == (
        "CLIPTextModelWithProjection"
    )
    again = load_text_encoder(tmp_path)
    assert again.config == loaded.config.text
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params["text"])


CUSTOM = """
from ditjax.config import changed
from ditjax.sampling.text2image import Text2Image


class Late(Text2Image):
    \"\"\"Guides the last steps alone.\"\"\"

    def __call__(self, prompt, **keys):
        self.config = changed(self.config, {"sample": {"cfg_interval": (0.0, 0.4)}})
        return super().__call__(prompt, **keys)
"""


def test_a_custom_pipeline_is_a_file_that_the_caller_names(pipeline_folder, tmp_path):
    file = tmp_path / "late.py"
    file.write_text(CUSTOM)
    late = Text2Image.from_pretrained(pipeline_folder, custom_pipeline=str(file))
    drawn = drawn_by(late)
    assert type(late).__name__ == "Late"
    assert drawn.record["custom_pipeline"] == hashlib.sha256(CUSTOM.encode()).hexdigest()
    plain = drawn_by(Text2Image.from_pretrained(pipeline_folder))
    assert (drawn.array != plain.array).any()
    assert "custom_pipeline" not in plain.record
    for text, message in (
        (f"{CUSTOM}\nclass Other(Late): pass\n", "defines Late, Other: expected one subclass"),
        ("x = 1\n", "defines none: expected one subclass"),
        ("1 / 0\n", "cannot be imported .ZeroDivisionError"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            Text2Image.from_pretrained(pipeline_folder, custom_pipeline=str(file))
    for name in ("diffusers/late", str(tmp_path), str(tmp_path / "missing.py")):
        with pytest.raises(UserError, match="expected the path of a Python file"):
            Text2Image.from_pretrained(pipeline_folder, custom_pipeline=name)


def test_a_hostile_folder_runs_nothing(pipeline_folder, tmp_path):
    """What model_index.json names is data, and a Python file beside the weights is left alone."""
    folder = tmp_path / "hostile"
    shutil.copytree(pipeline_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{CUSTOM}")
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for changes, message in (
        ({"_class_name": ["evil", "Late"]}, "describes a .*Late"),
        ({"_class_name": "os.system"}, "describes a os.system"),
        ({"transformer": ["evil", "Late"]}, "nothing that it names is imported"),
        ({"tokenizer": ["os", "system"]}, "nothing that it names is imported"),
        ({"text_encoder": "evil"}, "nothing that it names is imported"),
        ({"evil": ["evil", "Late"]}, "'evil' is .*expected no such component"),
        ({"scheduler": [None, None]}, "names no scheduler"),
    ):
        path.write_text(json.dumps({**index, **changes}))
        with pytest.raises(UserError, match=message) as error:
            Text2Image.from_pretrained(folder)
        assert "\n" not in str(error.value)
    path.write_text(json.dumps(index))
    Text2Image.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_the_clip_score_is_of_unit_vectors():
    v = np.array([[1.0, 0], [0, 1.0], [0.6, 0.8]])
    w = np.array([[1.0, 0], [0, -1.0], [0.8, 0.6]])
    np.testing.assert_allclose(clip_scores(v, w), [100, 0, 96])


def test_images_are_embedded_as_transformers_does(clip_folder, letters):
    """Of bytes, by the mean and deviation that the folder states; another size is resized."""
    scorer = ClipScorer(clip_folder)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    loaded = load_clip(clip_folder)
    apply = functools.partial(CLIP(loaded.config).apply, {"params": loaded.params})
    expected: Any = apply(images.astype(np.float32) / 127.5 - 1, method="embed_image")
    np.testing.assert_allclose(scorer.embed_images(images), expected, atol=1e-5)
    large = images.repeat(2, 1).repeat(2, 2)
    assert np.abs(scorer.embed_images(large) - expected).max() < 0.5
    assert scorer.protocol["clip"]["resize"] == "bicubic to 8"
