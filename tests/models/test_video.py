"""A DiT of clips: Latte's outputs, counts, one frame, one device and eight, and clear errors."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.cli import load_recipe
from ditjax.config import changed, read
from ditjax.errors import UserError
from ditjax.files.assets import unflatten
from ditjax.machines.hlo import collectives
from ditjax.models import dit, video
from ditjax.models.mup import kind_of
from ditjax.models.network import Conditions, Inputs
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import make_task
from ditjax.tasks.diffusion import placement
from ditjax.weights import layouts
from ditjax.weights.networks import initial_shapes
from tests.seeded import seeded_state

GOLDEN = Path(__file__).parents[1] / "goldens" / "latte.npz"
INPUTS = Inputs((4, 8, 8, 1), out_channels=1, num_classes=10)
IMAGE = INPUTS._replace(shape=(8, 8, 1))


def keys(**changes: Any) -> video.VideoKeys:
    return video.VideoKeys(**{"kind": "video", "size": "2x32x2", "patch": 4, **changes})


def example(inputs: Inputs, batch: int = 2) -> Any:
    x = np.random.default_rng(0).standard_normal((batch, *inputs.shape)).astype(np.float32)
    label = Conditions(label=jnp.arange(batch, dtype=jnp.int32))
    return jnp.asarray(x), jnp.arange(batch, dtype=jnp.int32) * 300 % 1000, label


def shapes(k: video.VideoKeys, inputs: Inputs = INPUTS) -> dict[str, tuple[int, ...]]:
    args = example(inputs, 1)
    return initial_shapes(lambda key: video.module(k, inputs).init(key, *args))


def random_params(found: dict[str, tuple[int, ...]]) -> Any:
    rng = np.random.default_rng(1)
    leaves = {n: (0.2 * rng.standard_normal(s)).astype(np.float32) for n, s in found.items()}
    return {"params": unflatten(leaves)}


def recipe(**model: Any) -> Any:
    """Clips of 4 frames of moving digits."""
    d = load_recipe(["--config=digits"])
    d = {**d, "model": {"kind": "video", "size": "2x32x2", "patch": 4, **model}, "sweep": {}}
    d["data"] = {**d["data"], "name": "moving_digits", "frames": 4}
    d["evaluate"] = {"features": "none"}
    d["train"] = {**d["train"], "evaluate_every_steps": 0}
    return changed(read(d), {"train": {"batch_size": 8}, "sample": {"batch_size": 8}})


def test_output_of_latte():
    """Its own code's output on seeded weights, and its frozen tables; none of the weights is 0."""
    with np.load(GOLDEN) as file:
        golden = dict(file)
    theirs = {name: tuple(shape) for name, shape in json.loads(str(golden["shapes"])).items()}
    state = seeded_state(theirs, 0)
    inputs, k = Inputs((3, 8, 8, 4), 8, 10), keys(size="4x32x2", patch=2)
    ours = shapes(k, inputs)
    tables = {"pos_embed": golden["pos_embed"], "temp_embed": golden["temp_embed"]}
    expected = layouts.expected_shapes(layouts.LATTE, ours, patch=2)
    assert {**expected, **{name: table.shape for name, table in tables.items()}} == theirs
    np.testing.assert_allclose(tables["temp_embed"][0], video.temporal_table(3, 32), atol=2e-7)
    params = {"params": unflatten(layouts.to_ours(layouts.LATTE, state, ours))}
    x = jnp.asarray(golden["x"].transpose(0, 1, 3, 4, 2))
    label = Conditions(label=jnp.asarray(golden["y"], jnp.int32))
    found = jax.jit(video.module(k, inputs).apply)(params, x, jnp.asarray(golden["t"]), label)
    output = golden["output"]
    np.testing.assert_allclose(
        np.asarray(found).transpose(0, 1, 4, 2, 3), output, atol=1e-5 * np.abs(output).max()
    )


@pytest.mark.parametrize(
    ("pattern", "tubelet"), [("joint", 2), ("alternate", 1), ("late", 2), ("divided", 1)]
)
def test_parameters_are_those_of_the_closed_form(pattern, tubelet):
    k = keys(video=pattern, tubelet=tubelet, qk_norm=True)
    leaves = shapes(k)
    assert sum(map(np.prod, leaves.values())) == video.cost(k, INPUTS).parameters
    for path in leaves:  # each has one μP kind
        kind_of(path, dit.KINDS)


@pytest.mark.parametrize("pattern", ["joint", "alternate", "divided"])
def test_xla_counts_the_gflops_of_the_formula(pattern):
    """Unrolled forward: XLA's flops are 2 MACs each within 2 %."""
    k = keys(size="2x256x4", patch=2, video=pattern, tubelet=2, unroll=2)
    inputs = Inputs((8, 16, 16, 4), 8, 10)
    args = example(inputs, 1)
    model = video.module(k, inputs)
    params = jax.eval_shape(model.init, jax.random.key(0), *args)
    cost: Any = jax.jit(model.apply).lower(params, *args).cost_analysis()
    assert cost["flops"] == pytest.approx(2 * video.clip_macs(k, inputs), rel=0.02)


def test_gflops_of_latte_xl():
    """5,572.69 in Latte's table are 3 clips, without attention, and with adaLN once per frame."""
    inputs = Inputs((16, 32, 32, 4), 8, 1000)
    k = keys(size="XL", patch=2)
    assert video.cost(k, inputs).gflops == pytest.approx(1863.1, abs=0.05)
    N, D, L = 16 * 256, 1152, 28
    attention = L // 2 * 2 * N * D * (256 + 16)
    # norms and our one vector a clip; theirs are 16 a clip in spatial blocks, 256 in temporal ones
    norms, again = (2 * L + 1) * N * D, L // 2 * 6 * D * D * (16 + 256 - 2)
    # Their counter counts the elements of a norm twice.
    counted = video.clip_macs(k, inputs) - attention + norms
    # Each frame has its vectors of the last layer, as well; times and labels are the clip's.
    assert 3 * (counted + again + 15 * 2 * D * D) / 1e9 == pytest.approx(5572.69, abs=0.05)


def test_one_frame_of_joint_is_the_dit():
    """The same parameters and the same program, to the letter."""
    k = keys(video="joint")
    fields = {n: getattr(k, n) for n in dit.DiTKeys.__dataclass_fields__}
    args = example(IMAGE)
    ours, theirs = video.module(k, IMAGE), dit.module(dit.DiTKeys(**fields), IMAGE)
    params = random_params(shapes(k, IMAGE))
    text = [str(jax.make_jaxpr(module.apply)(params, *args)) for module in (ours, theirs)]
    assert re.sub(r"0x[0-9a-f]+", "", text[0]) == re.sub(r"0x[0-9a-f]+", "", text[1])


def test_one_frame_without_temporal_blocks_is_a_dit_of_the_spatial_ones():
    k = keys(size="4x32x2", video_image="skip")
    params = random_params(shapes(k, IMAGE))
    args = example(IMAGE)
    found = jax.jit(video.module(k, IMAGE).apply)(params, *args)
    spatial = {**params["params"], "blocks": params["params"]["blocks"]["spatial"]}
    half = dit.module(dit.DiTKeys(size="2x32x2", patch=4), IMAGE)
    np.testing.assert_allclose(found, jax.jit(half.apply)({"params": spatial}, *args), atol=2e-6)
    costs = [video.clip_macs(keys(size="4x32x2", video_image=v), IMAGE) for v in ("run", "skip")]
    assert costs[0] > 1.5 * costs[1]


@functools.cache
def of_pattern(pattern: str) -> tuple[Any, Any]:
    k = keys(video=pattern)
    return jax.jit(video.module(k, INPUTS).apply), random_params(shapes(k))


def test_no_frame_of_the_spatial_baseline_sees_another():
    k = keys(video="spatial")
    params = random_params(shapes(k))
    apply = jax.jit(video.module(k, INPUTS).apply)
    x, t, label = example(INPUTS)
    moved = np.abs(apply(params, x.at[:, 3].add(1.0), t, label) - apply(params, x, t, label))
    assert moved[:, 3].max() > 1e-3
    assert moved[:, :3].max() == 0
    assert video.cost(k, INPUTS).parameters == sum(map(np.prod, shapes(k).values()))
    assert video.clip_macs(k, INPUTS) < video.clip_macs(keys(video="joint"), INPUTS)


@pytest.mark.parametrize("pattern", ["joint", "late", "divided"])
def test_every_frame_sees_the_others_and_its_own_time(pattern):
    apply, params = of_pattern(pattern)
    x, t, label = example(INPUTS)
    before = np.asarray(apply(params, x, t, label))
    after = np.asarray(apply(params, x.at[0, 3].add(1.0), t, label))
    moved = np.abs(after - before).max((2, 3, 4))
    assert (moved[0] > 1e-4).all()
    assert (moved[1] == 0).all()  # another clip
    still = jnp.broadcast_to(x[:, :1], x.shape)
    out = np.asarray(apply(params, still, t, label))
    assert np.abs(out[:, 1:] - out[:, :1]).max() > 1e-3  # equal frames at other times


def gradients(c: Any, mesh: Any, params: Any, batch: Any) -> Any:
    task = make_task(c, mesh)
    placed = jax.device_put(params, rules.state_shardings(params, mesh, task.rules))
    drawn = task.draw(batch, jax.random.key(1))

    def loss(params: Any, drawn: Any) -> Any:
        return task.loss(params, {}, drawn)[0]

    where = rules.batch_sharding(mesh)
    return jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(drawn, where))


def test_gradients_on_a_mesh_are_those_of_one_device():
    c, rng = recipe(), np.random.default_rng(0)
    params = random_params(shapes(keys(), Inputs((4, 8, 8, 1), 2, 10)))
    batch = {
        "x0": jnp.asarray(rng.standard_normal((8, 4, 8, 8, 1)), jnp.float32),
        "label": jnp.arange(8, dtype=jnp.int32),
    }
    one = make_mesh(1, 1, jax.devices()[:1])
    value, expected = gradients(c, one, params, batch)
    found, grads = gradients(c, make_mesh(1, 2, context=2, tensor=2), params, batch)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5 * max(1e-3, float(jnp.abs(b).max())))


def test_context_exchanges_frames_for_places_and_gathers_nothing():
    """Forward, a pair of blocks moves the tokens by two all-to-alls; no device sees all keys."""
    c = recipe()
    mesh = make_mesh(1, 1, jax.devices()[:4], context=4)
    inputs = Inputs((4, 8, 8, 1), 2, 10)
    model = video.module(c.model, inputs, placement(c, mesh))
    args = example(inputs)
    params = random_params(shapes(keys(), inputs))
    text = jax.jit(model.apply).lower(params, *args).compile().as_text() or ""
    found = collectives(text, 4)
    assert [each.kind for each in found] == ["all-to-all"] * 2
    # A device's share of 2 clips of 4 frames, 4 places and 32 channels.
    assert [each.payload for each in found] == [2 * 4 * 4 * 32 * 4 / 4] * 2


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"tubelet": 3}, r"tubelet is 3: it does not divide the 4 frames .* 1, 2, 4\."),
        ({"size": "3x32x2"}, r"size is '3x32x2', of 3 blocks: .*expected an even depth"),
        ({"block": "in_context"}, r"block is 'in_context', which a DiT of clips"),
        ({"rope": True}, r"rope is True, which a DiT of clips"),
        ({"patch": 3}, r"patch is 3: it does not divide the 8x8 input"),
        ({"video": "spiral"}, r"video is 'spiral': expected one of 'joint', 'alternate'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(model, match):
    with pytest.raises(UserError, match=match):
        recipe(**model)


def test_a_network_of_images_refuses_clips():
    with pytest.raises(UserError, match=r"frames is 4, and config.model.kind is 'dit', a network"):
        recipe(kind="dit")


def test_a_mesh_that_does_not_divide_the_frames_is_refused():
    c = changed(recipe(), {"data": {"frames": 3}})
    with pytest.raises(
        UserError, match=r"context=2 does not divide the model's 3 groups of frames"
    ):
        make_task(c, make_mesh(4, 1, context=2))
