"""Our command from image files to scores, beside torch-fidelity's from the same images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ditjax import evaluate
from tests.oracles.inception import GAIN, layout, torchvision_to_import
from tests.seeded import seeded_images, seeded_state

COUNT, SIZE = 12, 48  # far fewer images than the 2,048 dimensions: both covariances are singular


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes: u8[3,H,W] at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.images[i]).permute(2, 0, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = seeded_state(layout(), 3, GAIN)
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, path)
    return path


def test_folders_of_images(weights, tmp_path):
    sets = {
        "samples": seeded_images((COUNT, SIZE, SIZE, 3), 1),
        "reference": seeded_images((COUNT + 3, SIZE, SIZE, 3), 2),
    }
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:03}.png")
    words = [
        f"--samples={tmp_path / 'samples'}",
        f"--reference={tmp_path / 'reference'}",
        f"--features=inception:{weights}",
        f"--out={tmp_path / 'out.json'}",
        "--batch_size=8",
    ]
    assert evaluate.main(words) == 0
    ours = json.loads((tmp_path / "out.json").read_text())["metrics"]
    with torchvision_to_import():
        import torch_fidelity

        theirs = torch_fidelity.calculate_metrics(
            input1=Images(sets["samples"]),
            input2=Images(sets["reference"]),
            cuda=False,
            isc=True,
            isc_splits=1,
            fid=True,
            prc=True,
            feature_extractor="inception-v3-compat",
            feature_layer_prc="2048",
            feature_extractor_weights_path=str(weights),
            cache=False,
            verbose=False,
            save_cpu_ram=True,
        )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])
    assert ours["fid"] > 1
    assert 1 < ours["inception_score"] < 1008
