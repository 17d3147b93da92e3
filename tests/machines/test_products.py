"""Multiply-accumulates counted in a trace, against numbers by hand."""

import jax
import jax.numpy as jnp
import pytest

from ditjax.errors import UserError
from ditjax.machines.products import traced_macs


def shape(*sides):
    return jax.ShapeDtypeStruct(sides, jnp.float32)


def product(x, w):
    return x @ w


def test_products_and_convolutions():
    assert traced_macs(product, shape(5, 3, 4), shape(4, 7)) == 5 * 3 * 4 * 7
    assert traced_macs(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shape(2, 3, 4), shape(2, 5, 4)
    ) == (2 * 3 * 4 * 5)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    # 4x4 places of 6 outputs, each of 3x3 places of half of the 8 inputs.
    assert traced_macs(convolve, shape(1, 8, 8, 8), shape(3, 3, 4, 6)) == 16 * 6 * 9 * 4


def test_loops_count_as_often_as_they_run_and_branches_as_their_costliest_side():
    w, x = shape(4, 4), shape(2, 4)

    def scanned(x, w):
        inner = lambda x, _: (jax.checkpoint(product)(jax.jit(product)(x, w), w), None)  # noqa: E731
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.scan(inner, x, None, 5)[0], x)

    assert traced_macs(scanned, x, w) == 3 * 5 * 2 * (2 * 4 * 4)

    def branched(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert traced_macs(branched, x, w) == 2 * (2 * 4 * 4)


def test_a_loop_that_ends_by_what_it_computes_is_refused_if_it_has_products():
    def search(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ w, x)

    with pytest.raises(UserError, match="not known"):
        traced_macs(search, shape(2, 4), shape(4, 4))
    assert traced_macs(lambda x: jax.lax.while_loop(lambda x: x < 1, jnp.exp, x), shape()) == 0
