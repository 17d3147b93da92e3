"""Pictures of every kind become what is given to an edit, and the edit keeps what is known."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ditjax import sample
from ditjax.config import changed, check_recorded, read
from ditjax.data.crop import normalize
from ditjax.diffusion.denoising import estimate_noise, posterior_mean
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.files.npz import load_array
from ditjax.models.autoencoder import Moments
from ditjax.models.network import Conditions
from ditjax.sampling.draw import sampling_protocol
from ditjax.sampling.editing import inpaint_request, request_of, upscale_request
from ditjax.sampling.pipeline import Pipeline
from ditjax.sampling.program import sampling_of
from ditjax.tasks import autoencoder, make_task
from ditjax.tasks import editing as task
from ditjax.tasks.diffusion import denoiser_module
from ditjax.tasks.objective import objective_of
from ditjax.training.task import Known
from ditjax.weights import networks, writing
from tests.seeded import seeded_state

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (8, 8, 1), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[4:] = 255
FAST: dict[str, Any] = {"steps": "ddim4", "sampler": "ddim", "quiet": True, "eta": 1.0}
QUICK: dict[str, Any] = {**FAST, "jump": 2, "resample": 2}


def weights(path, **sections):
    """A tiny pixel DiT of seeded weights."""
    c = read(
        {
            "model": {"size": "1x16x2", "patch": 4},
            "data": {"image_size": 8, "channels": 1, "num_classes": 10},
            "autoencoder": {"kind": "none"},
            "sample": {"cfg_channels": "all", "clip_x0": True},
            **sections,
        }
    )
    leaves = seeded_state(networks.shapes_of(c), 5)
    network = networks.LoadedNetwork(c, {"params": unflatten(leaves)}, "ditjax", (path,))
    return writing.write_ditjax(path, network)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("ours") / "x.safetensors")


@pytest.fixture(scope="module")
def pixels(file):
    return Pipeline.from_pretrained(file)


@pytest.fixture(scope="module")
def repainted(pixels):
    return pixels.inpaint(IMAGE, MASK, [3], num=3, seed=1, **QUICK)


def test_what_is_known_is_kept_to_the_byte(repainted):
    assert repainted.array.shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(repainted.array[:, :4], np.stack([IMAGE[:4]] * 3))
    assert len({x[4:].tobytes() for x in repainted.array}) == 3
    found = repainted.record["edit"]
    assert found["method"] == "repaint"
    assert (found["jump"], found["resample"], found["edit"]) == (2, 2, "inpaint")


@pytest.fixture(scope="module")
def canvas():
    """8x8 known in the middle of 12x16."""
    image = np.zeros((12, 16, 1), np.uint8)
    image[2:10, 4:12] = IMAGE
    mask = np.full((12, 16), 255, np.uint8)
    mask[2:10, 4:12] = 0
    return image, mask


def test_a_larger_canvas_is_completed(pixels, canvas, monkeypatch):
    """The known pixels stay, windows draw the rest, and sample i is of (seed, i) alone."""
    image, mask = canvas
    seen, real = [], task.on_canvas

    def on_canvas(denoise, size, shape):
        seen.append((size, shape))
        return real(denoise, size, shape)

    monkeypatch.setattr(task, "on_canvas", on_canvas)
    found = pixels.inpaint(image, mask, [3], num=3, seed=1, **QUICK).array
    assert found.shape == (3, 12, 16, 1)
    assert seen == [(8, (12, 16, 1))]
    np.testing.assert_array_equal(found[:, 2:10, 4:12], np.stack([IMAGE] * 3))
    assert len({x.tobytes() for x in found}) == 3
    assert all(x[:2].std() > 1 for x in found)
    whole = np.stack([image, 255 - image, image])
    other = pixels.inpaint(whole, mask, [3], seed=1, **QUICK).array
    np.testing.assert_array_equal(other[[0, 2]], found[[0, 2]])


def test_the_denoiser_of_a_canvas_is_the_average_of_its_windows():
    """Exact where windows agree; a window that disagrees weighs what its Hann weight says."""
    x = jnp.asarray(RNG.normal(size=(2, 12, 16, 1)), jnp.float32)

    def pixelwise(x, t):
        return jnp.concatenate([2 * x + t[:, None, None, None], x], axis=-1)

    t = jnp.asarray([1.0, 3.0])
    whole = task.on_canvas(pixelwise, 8, (12, 16, 1))(x, t)
    np.testing.assert_allclose(whole, pixelwise(x, t), rtol=1e-5, atol=1e-5)
    assert task.on_canvas(pixelwise, 8, (8, 8, 1)) is pixelwise
    means = task.on_canvas(
        lambda x, t: jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), 8, (8, 12, 1)
    )(x[:, :8, :12], t)
    hann = np.sin(np.pi * (np.arange(8) + 0.5) / 8) ** 2
    left, right = (np.asarray(x[:, :8, a : a + 8]).mean((1, 2)) for a in (0, 4))
    np.testing.assert_allclose(means[:, 3, 2], left, atol=1e-6)
    expected = (hann[5] * left + hann[1] * right) / (hann[5] + hann[1])
    np.testing.assert_allclose(means[:, 3, 5], expected, atol=1e-6)


def test_a_larger_canvas_that_a_network_cannot_complete(pixels, canvas):
    request = inpaint_request(pixels.config, *canvas)
    for sections, match in (
        ({"given": {"kind": "mask"}}, "12x16 to complete, .* config.given.kind is 'mask'"),
        (
            {"autoencoder": {"kind": "kl"}, "data": {"image_size": 64}},
            "a network of latents, whose",
        ),
        (
            {"sample": {"cfg_rule": "apg", "apg_momentum": -0.5, "cfg_scale": 2.0}},
            "apg_momentum is -0.5: it remembers one window",
        ),
    ):
        with pytest.raises(UserError, match=match):
            task.edit_protocol(changed(pixels.config, sections), request.given)
    with pytest.raises(UserError, match="image of 7x16: expected at least 8x8"):
        inpaint_request(pixels.config, canvas[0][:7], canvas[1][:7])


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (Image.fromarray(IMAGE[..., 0]), Image.fromarray(MASK)),
        (IMAGE[..., 0], MASK > 0),
        (IMAGE[None], MASK[None]),
        (IMAGE, np.where(MASK > 0, 128, 127).astype(np.uint8)),
        ([IMAGE], [Image.fromarray(MASK).convert("1")]),
    ],
)
def test_pictures_of_every_kind_are_the_same(pixels, repainted, image, mask):
    request = inpaint_request(pixels.config, image, mask)
    np.testing.assert_array_equal(request.given.image, normalize(IMAGE)[None])
    np.testing.assert_array_equal(np.asarray(request.given.mask)[0, :, :, 0], MASK == 0)
    assert request.record.items() <= repainted.record["edit"].items()


def test_a_sample_is_of_its_own_image_in_any_batch(pixels, repainted):
    """Image i % N, with the noise of (seed, i) alone."""
    images = np.stack([IMAGE, 255 - IMAGE, IMAGE])
    other = pixels.inpaint(images, MASK, [3], seed=1, batch_size=8, **QUICK)
    np.testing.assert_array_equal(other.array[[0, 2]], repainted.array[[0, 2]])
    np.testing.assert_array_equal(other.array[1, :4], 255 - IMAGE[:4])
    again = pixels.inpaint(images, np.stack([MASK] * 3), [3], num=6, seed=1, **QUICK)
    np.testing.assert_array_equal(again.array[4, :4], 255 - IMAGE[:4])


def test_without_classes_an_image_has_the_null_label(pixels, repainted):
    output = pixels.inpaint(IMAGE, MASK, num=3, seed=1, **QUICK)
    np.testing.assert_array_equal(output.label, [10] * 3)
    assert output.record["classes"] == []
    assert output.array.tobytes() != repainted.array.tobytes()
    with pytest.raises(UserError, match=r"label_dropout is 0, .* give the classes of the images"):
        pixels._null_label(changed(pixels.config, {"model": {"label_dropout": 0.0}}))


def test_methods_differ_and_serve_any_sampler(pixels, repainted):
    drawn = {repainted.array.tobytes()}
    for keys in (
        {"method": "pigdm", "sampler": "dpmpp_2m", "steps": "2", "quiet": True},
        {"method": "dps", "strength": 2.0, **FAST},
    ):
        output = pixels.inpaint(IMAGE, MASK, [3], num=3, seed=1, **keys)
        np.testing.assert_array_equal(output.array[0, :4], IMAGE[:4])
        drawn.add(output.array.tobytes())
    assert len(drawn) == 3


def test_an_image_is_enlarged_to_one_with_its_means(pixels):
    low = RNG.integers(64, 192, (2, 4, 4, 1), np.uint8)
    output = pixels.upscale(low, [3], method="ddnm", **FAST)
    means = output.array.astype(float).reshape(2, 4, 2, 4, 2).mean((2, 4))
    # Clipping of x̂0 moves a mean, of a network that was not trained.
    assert np.abs(means - low[..., 0]).mean() < 10
    assert output.record["edit"]["factor"] == 2


def test_nothing_is_edited_without_an_image(pixels):
    """Off is off: without an image, the keys of config.edit leave the program as it is."""
    programs = []
    edits: list[dict[str, Any]] = [{}, {"method": "pigdm", "strength": 3.0}]
    for edit in edits:
        c = changed(pixels.config, {"edit": edit, "sample": {"steps": "4"}})
        sampling = sampling_of(c, make_task(c))
        keys = jax.random.split(jax.random.key(0), 2)
        label = Conditions(label=jnp.zeros(2, jnp.int32))
        lowered = jax.jit(sampling.draw).lower(pixels._params, {}, keys, label, sampling.guidance)
        programs.append(lowered.as_text())
    assert programs[0] == programs[1]
    assert "edit" not in sampling_protocol(c, seed=0, labels="uniform", decoder="pixels")


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (IMAGE, MASK[:4], "mask of 4x8 and image of 8x8: expected one mask, or one of each"),
        (IMAGE, np.stack([MASK] * 2), "mask of 2 x 8x8 and image of 8x8"),
        (
            IMAGE[:4],
            MASK[:4],
            "image of 4x8: expected at least 8x8, the size of the network's",
        ),
        (np.repeat(IMAGE, 3, 2), MASK, r"image is uint8\[8, 8, 3\]: expected u8\[H,W,1\].*'L'"),
        (Image.new("RGBA", (8, 8)), MASK, "image is of mode 'RGBA': expected 'L', 'RGB'"),
        (normalize(IMAGE), MASK, r"image is float32\[8, 8, 1\]: expected u8"),
        (IMAGE, MASK.astype(np.float32), r"mask is float32\[8, 8\]: expected u8\[H,W\] or bool"),
        (IMAGE, np.zeros_like(MASK), "mask is black everywhere: expected white, at least 128"),
        ("no.png", MASK, "image no.png cannot be read"),
        (7, MASK, "image is 7: expected a path"),
        ([], MASK, "images of none: expected at least one"),
        (IMAGE, [MASK > 0, MASK], r"masks of bool\[8, 8\] and uint8\[8, 8\]: expected"),
    ],
)
def test_pictures_that_do_not_fit(pixels, image, mask, words):
    with pytest.raises(UserError, match=words):
        inpaint_request(pixels.config, image, mask)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**FAST, "method": "pigdmm"}, r"edit\.method: 'pigdmm': .*Did you mean 'pigdm'"),
        ({**FAST, "method": "ddnm", "jump": 2}, r"edit\.jump has no effect: config\.edit\.method"),
        ({**QUICK, "eta": 0.0}, r"'repaint', whose steps need noise, .*eta is 0\.0: set it to 1"),
        ({"sampler": "dpmpp_2m", "steps": "4"}, r"'repaint', which takes .*sampler is 'dpmpp_2m'"),
        (
            {**FAST, "method": "dps", "strength": np.nan},
            r"edit\.strength is nan: expected a finite",
        ),
        (FAST, r"edit\.jump is 10 and the sampler takes 4 steps: expected fewer"),
    ],
)
def test_methods_that_do_not_go_with_the_sampler(pixels, keys, words):
    with pytest.raises(UserError, match=words):
        pixels.inpaint(IMAGE, MASK, **keys)


def test_a_recorded_method_is_not_pythons_own():
    """A downloaded recipe must not run code."""
    with pytest.raises(UserError, match=r"names 'os\.system' as config\.edit\.method"):
        check_recorded({"edit": {"method": "os.system"}}, "config.json")


def test_sizes_that_cannot_be_enlarged(pixels):
    for size in ((3, 3), (8, 8), (4, 2)):
        with pytest.raises(UserError, match=f"image of {size[0]}x{size[1]} to enlarge: expected"):
            upscale_request(pixels.config, np.zeros(size, np.uint8))


def test_a_latent_is_known_where_all_its_pixels_are(monkeypatch):
    c = read({"data": {"image_size": 32}, "sample": {"cfg_channels": "all"}})
    encoded = jnp.ones((1, 4, 4, 4))
    monkeypatch.setattr(autoencoder, "encode_images", lambda *_: Moments(encoded, 0 * encoded))
    known = np.ones((1, 32, 32, 1), np.float32)
    known[0, 9, 17] = 0
    image = np.full((1, 32, 32, 3), 0.5, np.float32)
    measured = task._measured(c, {"autoencoder": None}, Known(image, known))
    kept = np.ones((1, 4, 4, 4))
    kept[0, 1, 2] = 0
    np.testing.assert_array_equal(measured.project(encoded), kept)
    np.testing.assert_allclose(measured.image, c.autoencoder.scale * kept, rtol=1e-6)
    # A decoder changes pixels that are known.
    drawn = np.asarray(task.pasted(Known(image, known), jnp.full((1, 32, 32, 3), -1.0)))
    assert drawn[0, 9, 17].tolist() == [-1] * 3
    assert (drawn == 0.5).sum() == 3 * (32 * 32 - 1)
    c = changed(c, {"edit": {"method": "ddnm"}})
    with pytest.raises(UserError, match="network of latents, which lack the means"):
        task.edit_protocol(c, Known(image))


def test_denoising_is_one_evaluation_of_each_window(pixels):
    """Of floats, too; the corner of a larger image belongs to one window alone."""
    c = pixels.config
    large = 127.5 + 80 * RNG.standard_normal((1, 12, 9, 1))
    output = pixels.denoise(large, 20.0, quiet=True)
    assert output.array.shape == (1, 12, 9, 1)
    assert output.record["edit"]["sigma"] == [20.0]
    small = pixels.denoise(large[:, :8, :8], 20.0, quiet=True).array
    apply: Any = denoiser_module(c).apply
    conditions = Conditions(label=jnp.array([10]))
    denoise = jax.jit(functools.partial(apply, pixels._params, conditions=conditions))
    y = jnp.asarray(large[:, :8, :8] / 127.5 - 1, jnp.float32)
    x0 = posterior_mean(denoise, objective_of(c), y, jnp.array([20 / 127.5], jnp.float32))
    expected = np.clip(127.5 * np.asarray(x0) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(small.astype(float), expected, atol=1)
    assert output.array[0, 0, 0] == small[0, 0, 0]
    assert np.ptp(small.astype(float) - np.clip(large[:, :8, :8], 0, 255)) > 20


def test_noise_is_estimated(pixels):
    rng = np.random.default_rng(5)
    noisy = 100 + np.array([10.0, 30.0])[:, None, None, None] * rng.standard_normal((2, 16, 16, 1))
    edit = pixels.denoise(noisy, quiet=True).record["edit"]
    assert edit["estimated"]
    assert edit["sigma"] == [estimate_noise(each) for each in noisy]
    assert edit["sigma"] == pytest.approx([10, 30], rel=0.3)


def test_noise_is_what_is_removed(pixels):
    """rms(y - x̂0) = σ, by the network itself, of each image; it is 0 for a given σ."""
    noisy = 127.5 + np.array([15.0, 40.0])[:, None, None, None] * RNG.standard_normal((2, 8, 8, 1))
    output = pixels.denoise(noisy, estimate="residual", quiet=True)
    assert output.record["edit"]["estimated"] == "residual"
    removed = np.sqrt(((noisy - output.array) ** 2).mean((1, 2, 3)))
    again = pixels.denoise(noisy[1:], float(removed[1]), quiet=True).array
    assert np.abs(again.astype(float) - output.array[1:]).mean() < 2
    with pytest.raises(UserError, match=r"edit\.estimate has no effect: config\.edit\.sigma"):
        pixels.denoise(noisy, 20.0, estimate="residual", quiet=True)


@pytest.mark.parametrize(
    ("image", "keys", "words"),
    [
        (IMAGE, {"sigma": np.nan}, r"edit\.sigma is nan: expected a finite"),
        (IMAGE, {"sigma": -1.0}, r"edit\.sigma is -1\.0: expected at least 0"),
        (IMAGE, {"sigma": 3e4}, r"noise of 3e\+04, on pixels from 0 to 255: expected 1\.275 to 2"),
        (IMAGE, {"sigma": 1.0}, r"noise of 1, on pixels from 0 to 255: expected 1\.275 to 2"),
        (IMAGE[:7], {"sigma": 20.0}, "image of 7x8 to denoise: expected at least 8x8"),
        (np.full((8, 8, 1), np.inf), {}, "image has pixels that are not finite"),
        (np.zeros_like(IMAGE), {}, "has no noise that could be estimated"),
        (IMAGE.astype(int), {}, r"image is int64\[8, 8, 1\]: expected u8"),
        (IMAGE, {"sigma": 20.0, "cfg_scale": 2.0}, r"cfg_scale is 2\.0 and an image to denoise"),
        (IMAGE, {"sigma": 20.0, "steps": 3}, r"sample\.steps has no effect on edit 'denoise'"),
        (IMAGE, {"sigma": 20.0, "method": "dps"}, r"edit\.method has no effect on edit 'denoise'"),
    ],
)
def test_images_that_cannot_be_denoised(pixels, image, keys, words):
    with pytest.raises(UserError, match=words):
        pixels.denoise(image, **keys)


def test_noise_of_latents_is_not_white():
    c = read({"data": {"image_size": 32}, "sample": {"cfg_channels": "all"}})
    given = Known(np.zeros((1, 32, 32, 3)), sigma=np.array([0.1]))
    with pytest.raises(UserError, match="network of latents, in which its noise is not white"):
        task.edit_protocol(c, given)


def test_flags(pixels, tmp_path):
    c = pixels.config
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "x.png")
    flags = {"image": str(tmp_path / "x.png"), "mask": ""}
    assert request_of(c, "", {"image": "", "mask": ""}) is None
    for edit, keys, words in (
        ("", (), "--image: no effect without --edit, one of inpaint, upscale, denoise: remove it"),
        ("", ("edit.jump",), r"--image and --config\.edit\.jump: no effect without --edit"),
        ("inpaint", (), "--edit=inpaint needs --mask"),
    ):
        with pytest.raises(UserError, match=words):
            request_of(c, edit, flags, keys)
    with pytest.raises(UserError, match=r"sigma has no effect on edit 'upscale'"):
        request_of(c, "upscale", flags, ["edit.sigma"])
    request_of(c, "denoise", flags, ["edit.sigma", "sample.adapters", "control.scale"])
    with pytest.raises(UserError, match="--mask: no effect with --edit=upscale"):
        request_of(c, "upscale", {**flags, "mask": "x"})


def test_the_command_edits(file, tmp_path, capsys):
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / "x,1.png")
    Image.fromarray(255 - IMAGE[..., 0]).save(tmp_path / "y.png")
    Image.fromarray(MASK).save(tmp_path / "m.png")
    words = [
        f"--weights={file}",
        f"--out={tmp_path / 'out'}",
        "--edit=inpaint",
        f"--image={tmp_path / 'x,1.png'},{tmp_path / 'y.png'}",
        f"--mask={tmp_path / 'm.png'}",
        *("--sampler=ddim", "--eta=1", "--steps=ddim4", "--classes=3,4,5"),
        "--config.edit.method=ddnm",
    ]
    assert sample.main(words) == 0  # as many as are given: of images and of classes
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"][:2, :4], [IMAGE[:4], 255 - IMAGE[:4]])
        np.testing.assert_array_equal(archive["label"], [3, 4, 5])
    assert "left out" not in capsys.readouterr().err
    assert sample.main([*words, "--config.sample.num=1"]) == 0
    assert load_array(tmp_path / "out" / "samples.npz", "label").tolist() == [3]
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].startswith("1 images in")
    for line in ("the last 1 of 2 images are left out", "the last 2 of 3 classes are left out"):
        assert line in told.err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["protocol"]["edit"] == record["edit"]
    assert record["edit"]["method"] == "ddnm"


def test_the_command_denoises(file, tmp_path):
    Image.fromarray(RNG.integers(0, 256, (12, 9), np.uint8)).save(tmp_path / "x.png")
    words = [f"--weights={file}", f"--out={tmp_path / 'out'}", "--edit=denoise"]
    words += [f"--image={tmp_path / 'x.png'}", "--config.edit.sigma=25", "--cfg_scale=1"]
    assert sample.main(words) == 0
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (1, 12, 9, 1)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["protocol"]["edit"] == record["edit"]
    assert record["edit"]["sigma"] == [25.0]
