"""Multiply-accumulates of a program, counted in its trace: nothing is compiled or run.

Dense products and convolutions count, as in the paper's Gflops; a scan counts its body as often as
it runs, a branch as its costliest side. For networks, and parts of programs, that have no closed
form.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ditjax.errors import UserError

COUNTED = "counted in the traced program"


def traced_macs(f: Callable[..., Any], *args: Any) -> int:
    """Multiply-accumulates of f(*args), whose arguments may be shapes.

    Raises UserError for a loop with products whose trips are not known before it runs.
    """
    return _macs(jax.make_jaxpr(f)(*args).jaxpr)


def _macs(jaxpr: Jaxpr) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(e: Any) -> int:
    name = e.primitive.name
    if name == "dot_general":
        (contracted, _), _ = e.params["dimension_numbers"]
        shape = e.invars[0].aval.shape
        return int(math.prod(shape[i] for i in contracted) * e.outvars[0].aval.size)
    if name == "conv_general_dilated":
        kernel = e.invars[1].aval
        outputs = kernel.shape[e.params["dimension_numbers"].rhs_spec[0]]
        return int(e.outvars[0].aval.size * kernel.size // outputs)
    inner = [_macs(each) for each in _within(list(e.params.values()))]
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise UserError("its loop ends by what it computes, so that its products are not known.")
    return int(e.params["length"] if name == "scan" else 1) * sum(inner)


def _within(values: list[Any]) -> Iterator[Jaxpr]:
    """The programs among the parameters of an equation."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _within(list(value))
