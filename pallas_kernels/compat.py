"""Differences between the jax versions and platforms the project supports, in one place."""

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal
from jax.typing import DTypeLike

try:
    from jax.sharding import AbstractDevice  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # jax before 0.11
    from jax._src.mesh import AbstractDevice

__all__ = [
    "INTERPRETS_CLUSTERS",
    "AbstractDevice",
    "Literal",
    "apart",
    "apart_if_interpreted",
    "bind_equation",
    "compiler_options",
    "compiling_for",
    "device_kind",
    "dot_cast",
    "dot_general",
    "dot_operand",
    "dot_precision",
    "equations",
    "interpreted",
    "is_jaxpr",
    "mosaic_gpu_interpreter",
    "mosaic_gpu_load",
    "open_jaxpr",
    "pin",
    "platform",
    "scan_counts",
    "unwritten",
]

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)
_PLATFORMS = {"v5e": "tpu", "v5p": "tpu", "v6e": "tpu", "h200": "gpu"}
_KINDS = (("v5 lite", "v5e"), ("v5e", "v5e"), ("v5", "v5p"), ("v6", "v6e"), ("h100", "h200"), ("h200", "h200"))
"""Parts of a device's own name, the first that fits counts, and what we call its kind."""


@contextlib.contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """Trace and compile as on another machine: `kind` is a chip ("v5e", "v5p", "v6e", "h200") or a platform ("cpu", "gpu", "tpu").

    jax does not know of it and caches what it traced: a program that is traced for several targets must be a new function for each.
    """
    token = _target.set(kind)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """Return what the program is being compiled for: "cpu", "gpu" or "tpu"."""
    kind = _target.get()
    return jax.default_backend() if kind is None else _PLATFORMS.get(kind, kind)


def device_kind() -> str:
    """Return the kind of chip the program is being compiled for, as `tiles` names it; other chips keep their own name."""
    kind = _target.get() or jax.devices()[0].device_kind.lower()
    return next((short for part, short in _KINDS if part in kind), kind)


def interpreted(target: str) -> bool:
    """Return whether a Pallas kernel for `target` ("gpu" or "tpu") has to be interpreted here."""
    return platform() != target


def mosaic_gpu_interpreter() -> Any:
    """Return what interprets a Mosaic GPU kernel; where two threads race for memory it raises (before jax 0.12 it prints)."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.12 on

    return InterpretGPUParams(detect_races=True)


INTERPRETS_CLUSTERS = jax.__version_info__ >= (0, 12, 0)
"""Whether Mosaic GPU's interpreter knows clusters and transposed tiles."""


def mosaic_gpu_load(ref: Any) -> jax.Array:
    """Return what a Mosaic GPU kernel reads from the GPU's memory, in registers."""
    from jax.experimental.pallas import mosaic_gpu

    index: dict[str, Any] = {"idx": ...} if "idx" in inspect.signature(mosaic_gpu.load).parameters else {}  # jax before 0.12
    return mosaic_gpu.load(ref, **index, optimized=False)


def compiler_options(aligned: bool) -> dict[str, Any]:
    """Return the options of `jax.jit` for a program with kernels.

    Aligned, intermediates are rounded where the tile says, not where fusion pleases. A TPU's compiler may fuse a kernel with the update of
    a larger array that takes its result; it then has the program's share of VMEM, not the kernel's own.
    """
    options: dict[str, Any] = {"xla_allow_excess_precision": False} if aligned else {}
    return options | ({"xla_tpu_scoped_vmem_limit_kib": 65536} if platform() == "tpu" else {})


def bind_equation(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of a jaxpr's equation for these inputs."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # jax before 0.10 kept functions apart
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return the jaxpr and the constants of a closed jaxpr, or of an equation's parameter that may be open (jax 0.12 has one type)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def equations(jaxpr: Any) -> Iterator[JaxprEqn]:
    """Yield the equations of a jaxpr, open or closed, and of all jaxprs inside them."""
    for equation in open_jaxpr(jaxpr)[0].eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from equations(inner)


def is_jaxpr(x: Any) -> bool:
    """Return whether an equation's parameter is a jaxpr, closed or not."""
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of a scan equation's inputs are constants and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax >= 0.12
    return len(consts), len(carry)


def dot_operand(x: jax.Array) -> jax.Array:
    """Return x as an operand of a product with fp32 accumulation on this platform.

    XLA:CPU's own bf16 product differs between versions and shapes; products of bf16 values are exact in fp32, so there the operands
    are upcast. Everywhere else the matrix units take bf16 directly.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 and platform() == "cpu" else x


def dot_cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return fp32 intermediate values as an operand of a product whose inputs are of this dtype.

    They are rounded to it, as the matrix units want them; not on a CPU, where products are in fp32 and rounding is work for nothing.
    """
    return x if dtype == jnp.bfloat16 and platform() == "cpu" else x.astype(dtype)


def dot_general(a: jax.Array, b: jax.Array, contract: tuple, batch: tuple = ((), ())) -> jax.Array:
    """Return `lax.dot_general` of two arrays of one dtype, accumulated and returned in fp32."""
    precision = dot_precision(a.dtype)
    return lax.dot_general(dot_operand(a), dot_operand(b), (contract, batch), precision=precision, preferred_element_type=jnp.float32)


def dot_precision(dtype: DTypeLike) -> lax.Precision | None:
    """Return the precision of a product of operands of this dtype: unasked, a TPU rounds fp32 ones to bf16, a GPU to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 and platform() != "cpu" else None


def unwritten(shape: tuple[int, ...], dtype: DTypeLike, like: jax.Array) -> jax.Array:
    """Return an array for a loop to write, of an operand's dtype (see `dot_operand`); until then it holds an entry of `like`.

    Zeros would be one array for all loops of a program, and XLA:CPU copies it for each. It also converts a whole bf16 array there and
    back to update a slice of it, hence the dtype.
    """
    return jnp.full(shape, dot_operand(like[(0,) * like.ndim].astype(dtype)))


def apart(product: jax.Array) -> jax.Array:
    """Return a product that no compiler contracts with a sum into a multiply-add.

    The choice keeps them apart; its second branch is what it replaces (inf or NaN), which no compiler knows.
    """
    return jnp.where(jnp.isfinite(product), product, 2 * product)


def apart_if_interpreted(target: str) -> Callable[[jax.Array], jax.Array]:
    """Return `apart` where a kernel for `target` is interpreted, else what changes nothing.

    XLA:CPU contracts a kernel's products and sums otherwise in another program; a kernel's own compiler sees it alone.
    """
    return apart if interpreted(target) else lambda product: product


def pin(tree: Any, aligned: bool = True) -> Any:
    """Return the arrays, across which the compiler moves and shares nothing, if aligned.

    XLA:CPU has several emitters of fused loops, and they do not contract a multiply and an add alike: which one gets an expression
    depends on what stands around it (a dynamic-update-slice, a slice). On jax 0.12 no fusion crosses a pin either; on 0.10 the barriers
    are gone before fusion, and what keeps a tile's bits there is that it is the body of a loop.
    """
    return lax.optimization_barrier(tree) if aligned else tree
