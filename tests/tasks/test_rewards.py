"""Training on a reward: what a step draws, by which weights, what it learns, what is refused."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import fft

from ditjax.cli import load_recipe
from ditjax.config import changed, merged, read, replaced
from ditjax.diffusion import chains
from ditjax.diffusion.losses import simple_loss
from ditjax.errors import UserError
from ditjax.evaluation.features import digits_extractor, mixer_extractor
from ditjax.files.assets import unflatten
from ditjax.machines.roofline import hardware_flops
from ditjax.models.network import Conditions, training_flops
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh
from ditjax.tasks import cost_of, make_task, rewards
from ditjax.tasks.diffusion import policy_of, to_uint8
from ditjax.tasks.objective import objective_of
from ditjax.training import keys
from ditjax.training.program import precise, training
from ditjax.weights.networks import shapes_of
from ditjax.weights.shipped import shipped_classifier
from tests.seeded import seeded_state

B, GROUP, STEPS = 8, 4, 2
WORDS = ("--config=digits", f"--config.train.batch_size={B}")
NETWORK = {"kind": "tests.toys.network", "width": 8}  # compiles fast
DDPO = {"method": "ddpo", "source": "ink", "group": GROUP, "advantage_clip": 1.2}


def recipe(reward=DDPO, **sections):
    constant = {"warmup_steps": 0, "schedule": "constant"}
    tree = {**load_recipe(list(WORDS)), "model": sections.pop("model", NETWORK), "sweep": {}}
    changes = {**sections, "optim": {**constant, **sections.get("optim", {})}}
    # Unclipped: of weights at random, nearly every x0 is beyond its bounds, and has no gradient.
    sample = {"steps": f"ddim{STEPS}", "clip_x0": False}
    changes["sample"] = {**sample, **sections.get("sample", {})}
    changes["adapt"] = {"base": "x", **sections.get("adapt", {})}
    return read(merged(tree, {"reward": reward, **changes}))


@functools.cache
def weights():
    """No weight is zero."""
    return {"params": unflatten(seeded_state(shapes_of(recipe()), 1))}


def rows(k=0):
    label = np.random.default_rng(k).integers(0, 10, B).astype(np.int32)
    return {"image": np.zeros((B, 8, 8, 1), np.float32), "label": label, "index": None}


@functools.cache
def of(c, devices=1, **axes):
    """The programs of a recipe, and its frozen weights."""
    mesh = make_mesh(**({"data": 1, "fsdp": 1} | axes), devices=jax.devices()[:devices])
    p = training(c, make_task(c, mesh), mesh)
    return p, {"base": weights()} if c.adapt.kind == "partial" else {}


def run(c, steps, devices=1, **axes):
    """(states, metrics) after each step from the seeded weights."""
    (p, frozen), found = of(c, devices, **axes), []
    state = p.init(weights())
    with precise(c):
        for k in range(steps):
            examples = p.prepare(frozen, p.put(rows(k)), state.step)
            before = jax.tree.map(np.array, jax.device_get(state))
            state, metrics = p.step(state, frozen, examples)
            found.append((before, jax.device_get(metrics)))
    return [*found, (jax.device_get(state), {})]


def leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@functools.cache
def rolled(c):
    """What a step draws: the batch before its rollout and after it."""
    task = make_task(c)
    drawn = task.draw({"label": jnp.asarray(rows()["label"])}, jax.random.key(5))
    held = {name: jax.tree.map(lambda x: 1.1 * x, weights()) for name in task.holds}
    assert task.rollout
    return drawn, jax.jit(task.rollout)(weights(), held, drawn), held


# ---- DDPO


def test_chains_are_drawn_as_samples_are():
    """By the recipe's sampler, and one label for each group."""
    c = recipe()
    drawn, found, _ = rolled(c)
    np.testing.assert_array_equal(found["y"], np.repeat(rows()["label"][::GROUP], GROUP))
    sampling = make_task(c).sampling
    assert sampling

    def draw(each, label):
        return sampling.draw(weights(), {}, each, Conditions(label=label), sampling.guidance)

    images = np.asarray(jax.jit(draw)(drawn["key"], found["y"]), int)
    assert np.abs(images - np.asarray(to_uint8(found["mean"][:, -1]), int)).max() <= 1
    spread = (found["x"][:, -1] - found["mean"][:, -1]).std()
    np.testing.assert_allclose(spread, (found["x"][:, -2] - found["mean"][:, -2]).std(), rtol=0.2)
    ink = jnp.clip(found["x"][:, -1], -1, 1).mean((1, 2, 3))
    np.testing.assert_allclose(found["reward"], ink, atol=1e-6)
    np.testing.assert_allclose(found["advantage"], chains.advantages(ink, GROUP, 1.2), atol=1e-3)


def test_the_gradient_is_the_sum_over_steps_written_out():
    """-mean of A ∇ log p over chains and steps, with logarithms divided by the dimensions."""
    c = recipe({**DDPO, "kl": 0.3})
    task, (_, batch, held) = make_task(c), rolled(c)
    (loss, metrics), found = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        weights(), held, batch
    )
    policy, n = policy_of(c), STEPS

    @jax.jit
    @jax.grad
    def expected(params):
        def along(params):
            steps = rewards._steps_of(c, policy.guided(params, batch["y"]), batch["x"][:, 0])
            sigma = chains.deviations(steps)
            means = [chains.step_mean(steps, batch["x"][:, i], jnp.int32(i)) for i in range(n)]
            return means, sigma

        ours, sigma = along(params)
        theirs, _ = along(held[rewards.AT_START])
        total = 0.0
        for i in range(n):
            log_p = -jnp.square(batch["x"][:, i + 1] - ours[i]).mean((1, 2, 3)) / (
                2 * sigma[i] ** 2
            )
            kl = jnp.square(ours[i] - theirs[i]).mean((1, 2, 3)) / (2 * sigma[i] ** 2)
            total += (-batch["advantage"] * log_p + 0.3 * kl).mean() / n
        return total

    want = leaves(expected(weights()))
    np.testing.assert_allclose(leaves(found), want, atol=2e-4 * np.abs(want).max())
    np.testing.assert_allclose(loss, metrics["surrogate"] + 0.3 * metrics["kl"], rtol=1e-5)
    # The ratio is 1 to the bit, so that the surrogate is the mean advantage.
    np.testing.assert_allclose(metrics["surrogate"], -batch["advantage"].mean(), atol=1e-6)
    assert metrics["kl"] > 0


def test_the_chains_of_a_round_are_of_the_weights_that_it_began_with():
    """On a mesh, in two parts: as on one device in one, as groups are compared before."""
    c = recipe(
        {**DDPO, "updates": 2, "clip": 1e-5, "kl": 0.1},
        adapt={"kind": "partial", "train": "^out/"},
        optim={"learning_rate": 1e-2},
    )
    parts = changed(c, {"train": {"microbatches": 2}})
    states = run(parts, 4, devices=2, fsdp=2)
    trained, task = states[0][0].params, make_task(c)
    assert trained["params"].keys() == {"out"}
    for k, (state, metrics) in enumerate(states[:-1]):
        held = state.averages.trees
        np.testing.assert_array_equal(leaves(held["held:2"]), leaves(states[k - k % 2][0].params))
        np.testing.assert_array_equal(leaves(held[rewards.AT_START]), leaves(trained))
        assert (metrics["clipped"] > 0.5) == bool(k % 2), "a ratio of 1 at the first update only"
    assert states[0][1]["kl"] < 1e-9 < states[1][1]["kl"]
    key = jax.random.fold_in(keys.stream(c.seed, keys.TRAIN), 0)
    drawn = task.draw({"label": jnp.asarray(rows()["label"])}, key)
    frozen = {"base": weights(), "held:2": trained, rewards.AT_START: trained}
    assert task.rollout
    batch = jax.jit(task.rollout)(trained, frozen, drawn)
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        trained, frozen, batch
    )
    expected = {**metrics, "loss": loss, "grad_norm": np.linalg.norm(leaves(gradient))}
    for name, value in expected.items():
        np.testing.assert_allclose(states[0][1][name], value, rtol=2e-3, atol=1e-5, err_msg=name)


# ---- Diffusion-DPO


def test_pairs_are_drawn_by_the_base_and_ranked():
    c = recipe({"method": "dpo", "source": "ink", "dpo_beta": 100.0})
    task, (_, batch, held) = make_task(c), rolled(c)
    ink = [jnp.clip(batch[name], -1, 1).mean((1, 2, 3)) for name in ("preferred", "other")]
    assert bool((ink[0] > ink[1]).all())
    np.testing.assert_allclose(batch["gap"], ink[0] - ink[1], atol=1e-6)
    loss = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (start, _), gradient = loss(weights(), {rewards.AT_START: weights()}, batch)
    np.testing.assert_allclose(start, np.log(2), rtol=1e-5)
    # By the errors of the network at the times and noise of the batch.
    policy, objective = policy_of(c), objective_of(c)

    @jax.jit
    def margin(params):
        denoise = policy.plain(params, batch["y"])
        preferred, other = (
            simple_loss(objective, denoise, batch[x], batch["t"], batch["eps"])["mse"]
            for x in ("preferred", "other")
        )
        return preferred - other

    expected = np.log1p(np.exp(50 * (margin(weights()) - margin(held[rewards.AT_START])))).mean()
    (found, _), _ = loss(weights(), held, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    down = jax.tree.map(lambda p, g: p - 1e-4 * g, weights(), gradient)
    assert loss(down, {rewards.AT_START: weights()}, batch)[0][0] < start


# ---- rewards


def test_rewards_are_what_they_say():
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (4, 12, 16, 3)).astype(np.float32)
    label = jnp.array([1, 2, 3, 4])
    np.testing.assert_allclose(
        rewards.ink_reward(jnp.asarray(x), label), x.mean((1, 2, 3)), atol=1e-6
    )
    grey = np.pad(127.5 * x.mean(-1), ((0, 0), (0, 4), (0, 0)), mode="edge")
    blocks = grey.reshape(4, 2, 8, 2, 8).swapaxes(2, 3)
    found = fft.dctn(blocks, axes=(-2, -1), norm="ortho")
    bits = np.log2(1 + np.abs(np.rint(found / rewards._LUMINANCE))).sum((1, 2, 3, 4)) / (12 * 16)
    np.testing.assert_allclose(rewards.jpeg_reward(jnp.asarray(x), label), -bits, atol=0.02)
    assert rewards.jpeg_reward(jnp.zeros((1, 8, 8, 1)), label)[0] == 0
    digits = jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 1)), jnp.float32)
    network, params = shipped_classifier("digits_convnet")
    apply: Callable[..., Any] = network.apply
    logits = np.asarray(apply({"params": params}, digits).logits, np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(
        rewards.digit_reward(digits, label), expected[np.arange(4), label], atol=1e-4
    )


def of_pixels(images, labels):
    assert images.shape == (B, 32, 32, 1), "a latent network's images are decoded"
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("method", ["ddpo", "dpo"])
def test_a_latent_networks_images_are_decoded(method):
    """By the frozen autoencoder, an argument of the step, whose shapes a plan knows."""
    c = read(load_recipe(["--config=digits_latent", f"--config.train.batch_size={B}"]))
    source = "tests.tasks.test_rewards.of_pixels"
    reward = {"method": method, "source": source, **({"group": 4} if method == "ddpo" else {})}
    small = {"sweep": {}, "sample": {"steps": "ddim2", "sampler": "ddim", "eta": 1.0}}
    c = replaced(changed(c, {"adapt": {"base": "x"}, **small}), reward=rewards.Reward(**reward))
    task = make_task(c)
    assert task.reads == ("autoencoder",)
    frozen = task.shapes()
    paths = jax.tree_util.tree_leaves_with_path(frozen["autoencoder"])
    layers = {rules.path_of(path).split("/")[1] for path, _ in paths}
    assert {"encoder", "decoder"} <= layers
    params = jax.eval_shape(task.init, jax.random.key(0))
    label = {"label": jax.ShapeDtypeStruct((B,), jnp.int32)}
    drawn = jax.eval_shape(task.draw, label, jax.random.key(0))
    frozen |= dict.fromkeys(task.holds, params)
    assert task.rollout is not None
    batch = jax.eval_shape(task.rollout, params, frozen, drawn)
    assert batch["reward"].shape == (B,)
    loss, _ = jax.eval_shape(task.loss, params, frozen, batch)
    assert loss.shape == ()


def test_the_features_of_the_judge_are_not_those_of_the_reward():
    mesh = make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    ours, digits = mixer_extractor(mesh, 0), digits_extractor()
    found = ours.extract(images)
    assert found.pool.shape == (3, 48)
    assert ours.record["features_sha256"] == digits.record["judge_sha256"]
    assert ours.judge
    np.testing.assert_array_equal(ours.judge(images), found.logits.argmax(1))


def test_the_cost_counts_what_is_drawn_and_what_is_differentiated():
    plain = cost_of(recipe({}))
    ddpo, penalised = (cost_of(recipe({**DDPO, "kl": kl})) for kl in (0.0, 0.1))
    assert (plain.passes, ddpo.passes, penalised.passes) == (3, 4 * STEPS, 5 * STEPS)
    assert hardware_flops(ddpo, 1) == training_flops(ddpo.macs, 1, ddpo.passes + STEPS)
    guided = cost_of(recipe(sample={"steps": f"ddim{STEPS}", "cfg_scale": 2.0}))
    assert guided.passes == 2 * ddpo.passes
    dpo = cost_of(recipe({"method": "dpo"}))
    assert dpo.passes == 2 * STEPS + 8
    assert (plain.drawn, ddpo.drawn, guided.drawn, dpo.drawn) == (0, STEPS, 2 * STEPS, 2 * STEPS)


def test_circular_scores_are_named(capsys):
    make_task(recipe({**DDPO, "source": "digit"})).open_rows()
    assert "measured with digits_convnet, the network of the reward" in capsys.readouterr().err
    make_task(recipe()).open_rows()
    assert not capsys.readouterr().err


DIT = {"kind": "dit", "size": "1x32x2", "align_block": 1, "align_features": 48}


def wrong(images, labels):
    return images.mean()


@pytest.mark.parametrize(
    ("reward", "sections", "expected"),
    [
        ({"group": 4}, {}, "config.reward.group has no effect: config.reward.method is 'none'"),
        ({**DDPO, "clip": 0.1}, {}, "config.reward.clip has no effect: config.reward.updates is 1"),
        ({**DDPO, "group": 3}, {}, "expected a batch of whole groups"),
        ({**DDPO, "source": "tests.tasks.test_rewards.wrong"}, {}, "that returns f32[B]"),
        ({**DDPO, "source": "math.hypot"}, {}, "which fails for images of 8x8x1"),
        ({**DDPO, "source": "beauty"}, {}, "expected one of 'digit', 'ink', 'jpeg'"),
        (DDPO, {"adapt": {"base": ""}}, "config.adapt.base '': expected the weights to start from"),
        (DDPO, {"sample": {"steps": "ddim3", "eta": 0.0}}, "set sampler to 'ddim' and eta to 1"),
        (DDPO, {"sample": {"sampler": "ddpm", "eta": 0.0}}, "each step needs noise of a known"),
        (DDPO, {"sample": {"sampler": "dpmpp_2m", "eta": 0.0}}, "each step needs noise of a known"),
        (
            {**DDPO, "updates": 2},
            {"model": {**NETWORK, "dtype": "bfloat16"}},
            "which rounds away what the clip compares",
        ),
        (
            DDPO,
            {"align": {"teacher": "random"}, "model": DIT},
            "config.align.teacher 'random': expected 'none'",
        ),
        (
            DDPO,
            {"adapt": {"kind": "control"}, "control": {"blocks": 1}, "model": DIT},
            "config.adapt.kind 'control': expected no control branch",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(reward, sections, expected):
    with pytest.raises(UserError) as error:
        recipe(reward, **sections)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
