"""DINOv2 from the release's names and transformers', against a golden of transformers'."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ditjax.errors import UserError
from ditjax.evaluation.features import open_extractor
from ditjax.models.dinov2 import DinoV2, preprocess_dino
from ditjax.parallel.mesh import make_mesh
from ditjax.weights.dinov2 import fitted_positions, load_dinov2
from tests import dinov2_files as tiny


@pytest.fixture(scope="module")
def golden():
    with np.load("tests/goldens/dinov2.npz") as file:
        return dict(file)


def test_the_class_token_is_that_of_transformers(tmp_path, golden):
    save_file(tiny.transformers_state(), tmp_path / "dino.safetensors")
    found = load_dinov2(tmp_path / "dino.safetensors", tiny.SIDE)
    assert found.config.layers.heads == tiny.HEADS
    ours = jax.jit(DinoV2(found.config).apply)({"params": found.params}, tiny.images())
    theirs = golden["class_token"]
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_positions_of_the_release_are_read_at_its_offset(tmp_path, golden):
    found = load_dinov2(tiny.save_release(tmp_path / "dinov2.safetensors"), tiny.SIDE)
    ours = np.asarray(found.params["positions"])[1:, :8]
    np.testing.assert_allclose(ours, golden["release_positions"], rtol=1e-5, atol=1e-5)
    table = tiny.release_state()["pos_embed"]
    assert np.abs(fitted_positions(table, 6)[1:, :8] - ours).max() > 1e-2
    np.testing.assert_array_equal(fitted_positions(table, tiny.GRID), table[0])


def test_both_names_give_the_same_network(tmp_path):
    save_file(tiny.transformers_state(), tmp_path / "theirs.safetensors")
    tiny.save_release(tmp_path / "release.safetensors")
    side = tiny.GRID * tiny.PATCH
    found = [load_dinov2(tmp_path / f"{name}.safetensors", side) for name in ("theirs", "release")]
    assert found[0].config == found[1].config
    jax.tree.map(np.testing.assert_array_equal, found[0].params, found[1].params)


def test_another_file_is_refused_in_one_line(tmp_path):
    for change, match in (
        ({"register_tokens": np.zeros((1, 4, 8), np.float32)}, "with registers"),
        ({"blocks.0.mlp.w12.weight": np.zeros((4, 4), np.float32)}, "with SwiGLU"),
        ({"pos_embed": np.zeros((1, 20, tiny.WIDTH), np.float32)}, "a square grid"),
        ({"blocks.0.ls1.gamma": np.zeros(3, np.float32)}, "blocks.0.ls1.gamma"),
    ):
        save_file({**tiny.release_state(), **change}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=match):
            load_dinov2(tmp_path / "x.safetensors", tiny.SIDE)
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="expected DINOv2"):
        load_dinov2(tmp_path / "x.safetensors")


def test_features_of_any_size_and_colour_have_a_family_of_their_own(tmp_path):
    path = tiny.save_release(tmp_path / "dinov2.safetensors")
    extractor = open_extractor(f"dinov2:{path}", make_mesh(1, 1, jax.devices()[:1]), 4)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8)
    found = extractor.extract(images)
    assert found.pool.shape == (3, tiny.WIDTH)
    assert extractor.family == "dinov2"
    rgb = extractor.extract(images.repeat(3, -1)).pool
    np.testing.assert_array_equal(found.pool, rgb)


def test_pixels_are_resized_as_pil_does_in_floats():
    from PIL import Image

    rng = np.random.default_rng(1)
    for side in (32, 300):
        image = rng.integers(0, 256, (side, side, 3), np.uint8)
        theirs = np.stack(
            [
                np.asarray(
                    Image.fromarray(image[..., c].astype(np.float32)).resize(
                        (224, 224), Image.Resampling.BICUBIC
                    )
                )
                for c in range(3)
            ],
            -1,
        ).clip(0, 255)
        ours = np.asarray(preprocess_dino(jax.numpy.asarray(image[None])))[0]
        back = (ours * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
        np.testing.assert_allclose(back, theirs, atol=2e-2)
