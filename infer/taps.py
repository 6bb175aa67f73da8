"""Reading the named values of a program: the same jaxpr with every `checkpoint_name` as an extra output, scans included."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from pallas_kernels import compat

Taps = list[tuple[str, jax.Array]]
"""Labels and values in program order; a value inside a scan has the scan's axis in front."""


def tapped(fun: Callable) -> Callable[..., tuple[Any, Taps]]:
    """Return a function that gives what `fun` gives and the values it names, in program order.

    Names inside scans (stacked), remat and jitted calls are found; those inside custom gradients' rules, while loops and branches are
    not (ops name nothing inside). Tapping adds outputs, so the compiler may fuse differently than in the untapped program.
    """

    def run(*args: Any) -> tuple[Any, Taps]:
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        labels: list[str] = []
        outputs, values = _evaluate(closed, jax.tree.leaves(args), labels)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), list(zip(labels, values, strict=True))

    return run


def _evaluate(closed: Any, args: Sequence[Any], labels: list[str]) -> tuple[list[Any], list[Any]]:
    """Outputs of a jaxpr and the values named in it; their labels are appended to `labels`."""
    jaxpr, consts = compat.open_jaxpr(closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    values: list[Any] = []
    read = lambda v: v.val if isinstance(v, compat.Literal) else env[v]
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        kind, params = equation.primitive.name, equation.params
        if kind == "scan" and _has_names(params["jaxpr"]):
            outputs, found = _scan(params, inputs, labels)
        elif (inner := _call_jaxpr(equation)) is not None and _has_names(inner):
            outputs, found = _evaluate(inner, inputs, labels)
        elif kind == "name":
            labels.append(params["name"])
            outputs = found = inputs
        else:
            outputs, found = compat.bind_equation(equation, inputs), []
        values += found
        env |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars], values


def _call_jaxpr(equation: Any) -> Any:
    """The jaxpr of a call that can be evaluated in line: jit, remat, custom gradients' primal."""
    kind, params = equation.primitive.name, equation.params
    if kind in ("jit", "pjit", "closed_call", "core_call"):
        return params.get("jaxpr", params.get("call_jaxpr"))
    return params["jaxpr"] if kind in ("checkpoint", "remat", "remat2") else None


def _has_names(closed: Any) -> bool:
    for equation in compat.open_jaxpr(closed)[0].eqns:
        if equation.primitive.name == "name":
            return True
        inner = equation.params["jaxpr"] if equation.primitive.name == "scan" else _call_jaxpr(equation)
        if inner is not None and _has_names(inner):
            return True
    return False


def _scan(params: dict[str, Any], inputs: list[Any], labels: list[str]) -> tuple[list[Any], list[Any]]:
    num_consts, num_carry = compat.scan_counts(params)
    consts, carry, xs = inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    inner_labels: list[str] = []

    def turn(carry, xs):
        inner_labels.clear()  # traced more than once
        outputs, values = _evaluate(params["jaxpr"], [*consts, *carry, *xs], inner_labels)
        return tuple(outputs[:num_carry]), (tuple(outputs[num_carry:]), tuple(values))

    options = {"reverse": params["reverse"], "length": params["length"], "unroll": params["unroll"]}
    carry, (ys, values) = lax.scan(turn, tuple(carry), tuple(xs), **options)
    labels += inner_labels
    return [*carry, *ys], list(values)
