"""A tiny discrete VAE of openai/DALL-E: its two files, and what it computes."""

import io

import attr
import numpy as np
import torch
from dall_e import Decoder, Encoder, map_pixels, unmap_pixels

PACKAGES = ("DALL-E", "torch")


def random_parts():
    """Encoder and decoder of width 4 and 12 codes; their code refuses such small ones."""
    torch.manual_seed(0)
    attr.set_run_validators(False)
    try:
        sizes = {"n_hid": 4, "n_blk_per_group": 2, "vocab_size": 12}
        parts = Encoder(**sizes).eval(), Decoder(n_init=6, **sizes).eval()
    finally:
        attr.set_run_validators(True)
    with torch.no_grad():
        for part in parts:
            for leaf in part.parameters():
                # Biases are 0 at first, and the residual paths are divided by 64.
                leaf.copy_(0.3 * torch.randn_like(leaf) if leaf.ndim == 1 else 1.5 * leaf)
    return parts


def image():
    """f32[2,16,24,3] in [0, 1], channels last."""
    return np.random.default_rng(0).uniform(0, 1, (2, 16, 24, 3)).astype(np.float32)


@torch.no_grad()
def outputs(encoder, decoder):
    """Logits and codes of the images, and the statistics and images of the codes; channels last."""
    x = torch.from_numpy(image()).permute(0, 3, 1, 2)
    logits = encoder(map_pixels(x))
    codes = torch.argmax(logits, axis=1)
    z = torch.nn.functional.one_hot(codes, 12).permute(0, 3, 1, 2).float()
    stats = decoder(z)
    found = {"logits": logits, "stats": stats, "image": unmap_pixels(torch.sigmoid(stats[:, :3]))}
    found = {name: value.permute(0, 2, 3, 1).numpy() for name, value in found.items()}
    return {**found, "codes": codes.numpy()}


def saved(part):
    """The bytes of a pickled module, as the release's files are."""
    buffer = io.BytesIO()
    torch.save(part, buffer)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def goldens():
    """Both files, the images, and out/.."""
    parts = random_parts()
    found = {"encoder": saved(parts[0]), "decoder": saved(parts[1]), "x": image()}
    return found | {f"out/{name}": value for name, value in outputs(*parts).items()}
