"""Reading the named values of a program: the same jaxpr with every `checkpoint_name` as an extra output, scans included."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from pallas_kernels import compat


class Tap(NamedTuple):
    """A named value: inside `depth` scans, whose axes it has in front."""

    label: str
    value: jax.Array
    depth: int


def tapped(fun: Callable, wanted: Callable[[int], bool] = lambda index: True) -> Callable[..., tuple[Any, list[Tap]]]:
    """Return a function that gives what `fun` gives and the values it names, in program order, or those whose index is wanted.

    Names inside scans (stacked), remat and jitted calls are found; those inside custom gradients' rules, while loops and branches are
    not (ops name nothing inside). Tapping adds outputs, so the compiler may fuse differently than in the untapped program.
    """

    def run(*args: Any) -> tuple[Any, list[Tap]]:
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        outputs, taps = _evaluate(closed, jax.tree.leaves(args), _Numbering(wanted), 0)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs), taps

    return run


class _Numbering:
    """Counts the names met; a scan's body is traced more than once, so counting can be rewound."""

    def __init__(self, wanted: Callable[[int], bool]):
        self.wanted, self.next = wanted, 0

    def take(self) -> bool:
        self.next += 1
        return self.wanted(self.next - 1)


def _evaluate(closed: Any, args: Sequence[Any], numbering: _Numbering, depth: int) -> tuple[list[Any], list[Tap]]:
    """Outputs of a jaxpr and the wanted values named in it."""
    jaxpr, consts = compat.open_jaxpr(closed)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    taps: list[Tap] = []
    read = lambda v: v.val if isinstance(v, compat.Literal) else env[v]
    for equation in jaxpr.eqns:
        inputs = [read(v) for v in equation.invars]
        kind, params, found = equation.primitive.name, equation.params, []
        if kind == "scan" and _has_names(params["jaxpr"]):
            outputs, found = _scan(params, inputs, numbering, depth)
        elif (inner := _call_jaxpr(equation)) is not None and _has_names(inner):
            outputs, found = _evaluate(inner, inputs, numbering, depth)
        elif kind == "name":
            outputs = inputs
            if numbering.take():
                found = [Tap(params["name"], inputs[0], depth)]
        else:
            outputs = compat.bind_equation(equation, inputs)
        taps += found
        env |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars], taps


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


def _scan(params: dict[str, Any], inputs: list[Any], numbering: _Numbering, depth: int) -> tuple[list[Any], list[Tap]]:
    num_consts, num_carry = compat.scan_counts(params)
    consts, carry, xs = inputs[:num_consts], inputs[num_consts : num_consts + num_carry], inputs[num_consts + num_carry :]
    first, inside = numbering.next, []

    def turn(carry, xs):
        numbering.next = first
        outputs, inside[:] = _evaluate(params["jaxpr"], [*consts, *carry, *xs], numbering, depth + 1)
        return tuple(outputs[:num_carry]), (tuple(outputs[num_carry:]), tuple(tap.value for tap in inside))

    options = {"reverse": params["reverse"], "length": params["length"], "unroll": params["unroll"]}
    carry, (ys, values) = lax.scan(turn, tuple(carry), tuple(xs), **options)
    return [*carry, *ys], [tap._replace(value=value) for tap, value in zip(inside, values, strict=True)]
