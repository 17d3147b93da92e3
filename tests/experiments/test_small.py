"""The small studies hold what the paper's claims need, and their cells are legal."""

from collections import Counter

import pytest

from ditjax.cli import load_recipe
from ditjax.config import read
from ditjax.models.dit import parse_size
from ditjax.studies.cells import cells
from ditjax.tasks.objective import times_of


def of(name):
    name, colon, arg = name.partition(":")
    return cells(load_recipe([f"--config=experiments/small/{name}.py{colon}{arg}"]))


@pytest.fixture(scope="module")
def scaling():
    return of("scaling")


def test_scaling_has_twelve_models_two_seeds_and_curves(scaling):
    models = Counter((c.config.model.size, c.config.model.patch) for c in scaling)
    assert len(models) >= 12
    assert min(models.values()) >= 2
    assert len({size for size, _ in models}) == 4
    for cell in scaling:
        c = cell.config
        assert c.evaluate.val_loss_num
        assert c.train.steps // c.train.evaluate_every_steps >= 8
        assert not c.train.steps % c.train.evaluate_every_steps
    # Matched in all but the model and the seed.
    assert len({(c.config.train, c.config.optim, c.config.data) for c in scaling}) == 1


def test_compute_is_the_same_for_every_size(scaling):
    found = of("compute")
    assert {c.config.model.size for c in found} == {c.config.model.size for c in scaling}
    assert max(c.training_gflops for c in found) < 1.01 * min(c.training_gflops for c in found)
    assert max(c.config.train.steps for c in found) > 10 * min(c.config.train.steps for c in found)
    for cell in found:  # curves go on nearly to the end
        left = cell.config.train.steps % cell.config.train.evaluate_every_steps
        assert left < 0.06 * cell.config.train.steps


def test_blocks_are_matched_but_for_the_block():
    found = of("blocks")
    blocks = Counter(c.config.model.block for c in found)
    assert set(blocks) == {"adaln_zero", "adaln", "cross_attention", "in_context"}
    assert min(blocks.values()) >= 3
    assert len({(c.config.train, c.config.optim, c.config.model.size) for c in found}) == 1


def test_sampling_takes_the_runs_of_scaling(scaling):
    assert of("sampling") == scaling


def test_guidance_is_on_more_than_three_channels():
    c = read(load_recipe(["--config=experiments/small/guidance.py"]))
    assert c.input_channels == c.autoencoder.latent_channels == 4
    assert c.latent


def test_scenes_are_larger_images_in_colour():
    found = of("scenes")
    assert len(found) >= 4
    for cell in found:
        data = cell.config.data
        assert (data.name, data.image_size, data.channels) == ("digit_scenes", 32, 3)
        assert cell.config.evaluate.features == "scenes"


def test_jit_has_every_prediction_with_every_loss():
    found = of("jit")
    pairs = {(c.config.diffusion.prediction, c.config.diffusion.weighting) for c in found}
    assert len(pairs) == len(found) == 9
    for cell in found:
        c = cell.config
        assert 3 * c.model.patch**2 > parse_size(c.model.size).width, "a patch is wider"
        assert (c.diffusion.t_eps > 0) == (c.diffusion.prediction == "x0")
    assert len({(c.config.train, c.config.optim, c.config.model) for c in found}) == 1


def test_the_weak_network_of_the_guidance_rules_is_kept():
    found = of("guidance_rules")
    assert len({c.config.seed for c in found}) >= 2
    for cell in found:
        train = cell.config.train
        assert train.keep_every_steps == train.steps // 10
        assert not train.steps % train.checkpoint_every_steps


def test_few_steps_cost_the_same_training():
    found = of("meanflow")
    arms = Counter((c.config.diffusion.process, c.config.diffusion.loss) for c in found)
    assert arms == {
        ("ddpm", "simple"): 2,
        ("flow", "simple"): 4,
        ("flow", "meanflow"): 2,
        ("flow", "meanflow_v"): 2,
    }
    assert max(c.training_gflops for c in found) < 1.01 * min(c.training_gflops for c in found)
    steps = {c.config.diffusion.loss: c.config.train.steps for c in found}
    assert steps["meanflow_v"] < steps["meanflow"] < steps["simple"]
    for cell in found:  # from pure noise, in one step, too
        noise = 999 if cell.config.diffusion.process == "ddpm" else 1
        assert times_of(cell.config)[0] == noise


def test_mnist_scaling_has_twelve_models_and_repeats_no_image():
    found = of("mnist_scaling")
    models = Counter((c.config.model.size, c.config.model.patch) for c in found)
    assert len(models) == 12
    assert set(models.values()) == {2}
    assert max(c.gflops for c in found) > 50 * min(c.gflops for c in found)
    for cell in found:
        train = cell.config.train
        assert train.steps * train.batch_size < 60_000, "no image is seen twice"
        assert cell.config.evaluate.split == "test"
        assert train.steps == 4 * train.evaluate_every_steps


@pytest.mark.parametrize("budget", [300, 900])
def test_sizes_of_mnist_compute_train_for_equal_gflops(budget):
    found = of(f"mnist_compute:{budget}")
    assert len({c.config.model.size for c in found}) == len(found) == 7
    for cell in found:
        assert cell.training_gflops == pytest.approx(budget, rel=0.01)


def test_dit_and_unet_have_equal_gflops_and_rates_that_were_chosen_on_another_seed():
    tried, found = of("unet:rates"), of("unet:2e-3/2e-3/1e-3,1e-3/1e-3/3e-3")
    assert not {c.config.seed for c in tried} & {c.config.seed for c in found}
    assert Counter(c.config.model.kind for c in tried) == {"dit": 12, "unet": 9}
    by_kind = {
        kind: sorted({c.gflops for c in found if c.config.model.kind == kind})
        for kind in ("dit", "unet")
    }
    assert len(found) == 18
    for dit, unet in zip(*by_kind.values(), strict=True):
        assert abs(unet / dit - 1) < 0.06
    for kind, smaller, largest in (("dit", 2e-3, 1e-3), ("unet", 1e-3, 3e-3)):
        for cell in found:
            if cell.config.model.kind == kind:
                rate = largest if cell.gflops == by_kind[kind][-1] else smaller
                assert cell.config.optim.learning_rate == rate
    assert len({(c.config.train, c.config.data) for c in (*tried, *found)}) == 1
