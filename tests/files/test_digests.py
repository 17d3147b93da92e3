"""Digests: the formula, that every changed bit is seen, and that the mesh is not."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ditjax.errors import UserError, first_few
from ditjax.files import digests
from ditjax.models.dit import RULES
from ditjax.parallel import rules
from ditjax.parallel.mesh import make_mesh

M32 = 2**32


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % M32
    x = (x ^ (x >> 15)) * 0x846CA68B % M32
    return x ^ (x >> 16)


def by_hand(words: np.ndarray) -> str:
    """The module's formula, element by element, of u32 words."""
    salt, first, second = 0x9E3779B9, 0, 0
    for index, word in np.ndenumerate(words):
        place = salt + sum(
            mix((salt + (axis + 1) * 0xC2B2AE35 + i) % M32) for axis, i in enumerate(index)
        )
        mixed = mix(int(word) ^ place % M32)
        first, second = first + mixed, second + mixed * (2 * place + 1)
    return f"{first % M32:08x}{second % M32:08x}"


def digest(x, scheme="sum64") -> str:
    kind, _, text = digests.tree_digests({"x": jnp.asarray(x)}, scheme)["x"][2].partition(":")
    assert kind == scheme
    return text


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 9, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_the_formula(shape):
    x = random(shape)
    assert digest(x) == by_hand(x.view(np.uint32) if shape else np.frombuffer(x, np.uint32)[0])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8, np.bool_])
def test_sha256_is_of_the_bytes(dtype):
    x = random((3, 4), dtype)
    assert digest(x, "sha256") == hashlib.sha256(x.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.uint8, np.bool_])
def test_one_flipped_bit_anywhere_changes_it(dtype):
    x = random((3, 4), dtype)
    raw = x.tobytes()
    found = {digest(x), digest(x, "sha256")}
    step = {np.uint8: 1, np.bool_: 8}.get(dtype, 7)  # another bit makes no bool
    bits = range(0, 8 * len(raw), step)
    for bit in bits:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        y = np.frombuffer(bytes(damaged), x.dtype).reshape(x.shape)
        found |= {digest(y), digest(y, "sha256")}
    assert len(found) == 2 * (1 + len(bits))


def test_what_a_plain_sum_would_not_see():
    x = random((4, 6))
    changes = [x[::-1], x[:, ::-1], -x, np.roll(x, 1), np.roll(x, 1, 0), 0 * x]
    swapped = x.copy()
    swapped[0, 0], swapped[3, 5] = x[3, 5], x[0, 0]
    signs = x.copy()
    signs[1, 2:4] *= -1
    moved = x + 0
    moved[0, 0] += 1
    moved[0, 1] -= 1
    found = {digest(y) for y in (x, *changes, swapped, signs, moved)}
    assert len(found) == 4 + len(changes)


@pytest.mark.parametrize("scheme", ["sha256", "sum64"])
def test_the_mesh_is_not_seen(scheme):
    tree = {
        "blocks": {"mlp": {"in": {"kernel": random((2, 8, 32)), "bias": random((2, 32))}}},
        "count": np.int32(7),
    }
    expected = digests.tree_digests(jax.tree.map(jnp.asarray, tree), scheme)
    assert expected["blocks/mlp/in/kernel"][:2] == ["float32", [2, 8, 32]]
    assert list(expected) == ["blocks/mlp/in/bias", "blocks/mlp/in/kernel", "count"]
    placed = set()
    for mesh in (
        make_mesh(8, 1),
        make_mesh(2, 4),
        make_mesh(1, 8),
        make_mesh(1, 1, jax.devices()[:1]),
    ):
        there = jax.device_put(tree, rules.state_shardings(tree, mesh, RULES))
        placed.add(str(there["blocks"]["mlp"]["in"]["kernel"].sharding))
        assert digests.tree_digests(there, scheme) == expected
        assert digests.changed_leaves(expected, there) == []
    assert len(placed) == 4


def test_all_differences_are_named():
    saved: digests.Digests = {"a": ["float32", [2]], "b": ["float32", [3, 1]], "c": ["int32", []]}
    asked: digests.Digests = {"a": ["int32", [2]], "b": ["float32", [3, 1]], "d": ["int32", []]}
    assert digests.type_differences(saved, asked) == [
        "a is float32[2], asked for int32[2]",
        "c is in the checkpoint only",
        "d is not in the checkpoint",
    ]
    assert first_few("abcde") == "a, b, c and 2 more"


def test_what_was_changed_is_named_by_the_scheme_it_was_saved_with():
    tree = {"a": jnp.arange(3), "b": jnp.arange(4.0)}
    for scheme in ("sha256", "sum64"):
        saved = digests.tree_digests(tree, scheme)
        assert digests.changed_leaves(saved, tree) == []
        assert digests.changed_leaves(saved, {**tree, "b": tree["b"].at[2].set(-0.0)}) == ["b"]
        assert digests.changed_leaves(saved, {"a": tree["a"][::-1]}) == ["a"]
    # In this process's memory nothing is compiled.
    assert digests.tree_digests(tree) == digests.tree_digests(tree, "sha256")
    with pytest.raises(UserError, match="of the kind 'crc' are of a newer ditjax"):
        digests.changed_leaves({"a": ["int32", [3], "crc:0"]}, tree)
