"""Mesh axes and the rules from logical to mesh axes; how a program runs on a mesh.

A program (a training step, a forward) is one `jax.shard_map` over the whole mesh: inside it the model is written for one device, the
batch is that device's rows, and each block gathers its weights just before use (ZeRO-3). So there is one code path, a device's bits
cannot depend on how many devices stand beside it, and every collective is one of ours:

    all-gather of a block's weights (reduce-scatter of their gradients)     axes fsdp, expert
    all-gather of tokens for their experts, all-to-all of the sums back     axis expert
    sums of losses, loads and unsharded gradients                           axes data, fsdp, expert
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.scaled_matmul import Quantized
from pallas_kernels.scaled_matmul.quantized import GROUP
from ring_jax.config import ModelConfig

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")
RULES: dict[str, tuple[str, ...]] = {"experts": ("expert",), "embed": ("fsdp", "expert")}
"""Logical axis of a parameter -> mesh axes that shard it. An axis that another dimension of the parameter has taken is left out, and
so is one that does not divide the dimension. Logical axes without a rule (heads, ffn, vocab) are whole on each device."""


def parse_mesh(text: str) -> dict[str, int]:
    """Return the axis sizes of "8x8" (fsdp x expert) or "data=2,fsdp=4". Raises ValueError that says what a mesh looks like."""
    expected = f"a mesh is FSDPxEXPERT (8x8) or a list of {', '.join(AXES)} (data=2,fsdp=4), not {text!r}"
    if "=" in text:
        pairs = [part.split("=") for part in text.split(",")]
        if any(len(pair) != 2 or pair[0] not in AXES for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
            raise ValueError(expected)
    else:
        sizes = text.split("x")
        if len(sizes) not in (1, 2):
            raise ValueError(expected)
        pairs = list(zip(("fsdp", "expert"), sizes, strict=False))
    if any(not size.isdigit() or int(size) < 1 for _, size in pairs):
        raise ValueError(expected)
    return {axis: 1 for axis in AXES} | {axis: int(size) for axis, size in pairs}


def check_mesh(sizes: dict[str, int], config: ModelConfig, batch_size: int | None = None) -> None:
    """Raise ValueError that names the number if the mesh does not fit the model or the batch."""
    if config.num_experts % sizes["expert"]:
        raise ValueError(f"mesh axis expert={sizes['expert']} does not divide the {config.num_experts} experts")
    for heads in (config.num_heads, config.num_kv_heads):
        if heads % sizes["tensor"]:
            raise ValueError(f"mesh axis tensor={sizes['tensor']} does not divide the {heads} heads")
    for axis in ("tensor", "context"):
        if sizes[axis] > 1:
            raise ValueError(f"mesh axis {axis}={sizes[axis]}: only data, fsdp and expert shard a program so far; use {axis}=1")
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch_size is not None and batch_size % shards:
        raise ValueError(f"batch size {batch_size} is not divisible by the {shards} shards of the mesh (data x fsdp x expert)")


def prepare_devices(sizes: dict[str, int]) -> str | None:
    """Make sure there are devices for the mesh, before any is used; return a line to print if they are simulated.

    On a CPU host with fewer devices than the mesh asks for, the missing ones are simulated. Raises ValueError on an accelerator.
    """
    wanted = math.prod(sizes.values())
    if wanted == 1:
        return None
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms in ("", "cpu") and not has_accelerator():
        jax.config.update("jax_num_cpu_devices", wanted)
        if jax.device_count() >= wanted:
            return f"simulating {wanted} devices on the CPU"
    if jax.device_count() < wanted:
        raise ValueError(f"the mesh needs {wanted} devices, this machine has {jax.device_count()}")
    return None


def has_accelerator() -> bool:
    """Return whether jax would pick something else than the CPU, without starting a backend (its device count is fixed by that)."""
    import importlib.util
    import pathlib

    if any(pathlib.Path("/dev").glob("nvidia[0-9]*")) and importlib.util.find_spec("jax_cuda13_plugin"):
        return True
    return any(pathlib.Path("/dev").glob("accel*")) or (
        any(pathlib.Path("/dev/vfio").glob("[0-9]*")) and importlib.util.find_spec("libtpu") is not None
    )


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of these axis sizes over the first of the devices (default: of all there are), neighbours side by side.

    An axis may take a part of an axis of a TPU's torus: 8x8 is a mesh of 4x4x4 chips, too.
    """
    devices = (jax.devices() if devices is None else devices)[: math.prod(sizes.values())]
    placed = mesh_utils.create_device_mesh([sizes[a] for a in AXES], devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(logical_axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> P:
    """Return how a parameter of this (unsharded) shape lies on the mesh; leading axes without a name (stacked layers) are whole."""
    sizes = dict(mesh.shape)
    names = (None,) * (len(shape) - len(logical_axes)) + tuple(logical_axes)
    taken: set[str] = set()
    axes: list[tuple[str, ...] | None] = [None] * len(names)
    for i in sorted(range(len(names)), key=lambda i: names[i] != "experts"):
        wanted = [a for a in RULES.get(names[i] or "", ()) if a not in taken and sizes.get(a, 1) > 1]
        while wanted and shape[i] % math.prod(sizes[a] for a in wanted):
            wanted.pop()
        if wanted:
            axes[i] = tuple(wanted)
            taken.update(wanted)
    return P(*axes)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _each_array(fun: Callable, variable: nnx.Variable) -> Any:
    """The variable's value with `fun` of each array, of the logical axes of the array's last dimensions, and of their unsharded sizes.

    A weight [*lead, K, N] in FP8 is two arrays: values [*lead, N, K], and scales of blocks.
    """
    value, axes, shape = variable.get_value(), variable.get_metadata("logical_axes", ()), variable.get_metadata("full_shape", ())
    if not isinstance(value, Quantized):
        return fun(value, axes, shape)
    *lead, depth, columns = range(len(axes))
    swapped = lambda x: tuple(x[i] for i in (*lead, columns, depth))
    blocks = tuple(size if i in lead else -(-size // GROUP) for i, size in enumerate(shape))
    return Quantized(fun(value.values, swapped(axes), swapped(shape)), fun(value.scales, axes, blocks))


def _array_spec(mesh: Any, array: Any, axes: Sequence[str | None], shape: Sequence[int]) -> P:
    return spec(axes, (1,) * (array.ndim - len(shape)) + tuple(shape), mesh) if axes else P()


def _variable_spec(variable: nnx.Variable, mesh: Any) -> Any:
    return _each_array(functools.partial(_array_spec, mesh), variable)


def specs(state: Any, mesh: Mesh) -> Any:
    """Return the PartitionSpec of each variable of a state, as a tree whose leaves stand where the variables' arrays do."""
    return jax.tree.map(lambda v: v.replace(_variable_spec(v, mesh)) if _is_variable(v) else P(), state, is_leaf=_is_variable)


def shardings(state: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of each variable of a state, in the state's structure."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(state, mesh), is_leaf=lambda x: isinstance(x, P))


def batch_spec() -> P:
    """Return the PartitionSpec of a batch's rows."""
    return P(BATCH_AXES)


def manual_axes() -> dict[str, int]:
    """Return the mesh axes of more than one device of the program being traced; none outside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.manual_axes if mesh.shape[axis] > 1} if not mesh.empty else {}


def gather(state: Any) -> Any:
    """Return a block's state with whole weights, gathered over the axes that shard them; experts stay on their devices."""
    if not manual_axes():
        return state
    mesh = jax.sharding.get_abstract_mesh()

    def whole(array: jax.Array, names: Sequence[str | None], shape: Sequence[int]) -> jax.Array:
        stacked = array.ndim - len(names)
        for dim, axes in enumerate(_array_spec(mesh, array, names, shape)):
            if axes is not None and names[dim - stacked] != "experts":
                array = lax.all_gather(array, axes, axis=dim, tiled=True)
        return array

    return jax.tree.map(lambda v: v.replace(_each_array(whole, v)), state, is_leaf=_is_variable)


def all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """The remat policy that keeps every value but what is gathered, weights and experts' tokens, and what is a part of a weight."""
    return primitive not in (lax.all_gather_p, lax.squeeze_p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_rows(x: jax.Array, axis: str) -> jax.Array:
    """Return the rows x [N, ...] of all devices of a mesh axis, [devices * N, ...]; the gradient is `reduce_scatter_rows`."""
    return lax.all_gather(x, axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def reduce_scatter_rows(x: jax.Array, axis: str) -> jax.Array:
    """Return each device's N rows of x [devices * N, ...] summed over the devices of an axis, in fp32, cast once.

    What travels is of x's dtype, and a sum with zeros is exact: a reduce-scatter would do neither. The gradient is `gather_rows`.
    """
    parts = lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)
    return parts.reshape(lax.axis_size(axis), -1, *x.shape[1:]).astype(jnp.float32).sum(0).astype(x.dtype)


gather_rows.defvjp(lambda x, axis: (gather_rows(x, axis), None), lambda axis, _, d: (reduce_scatter_rows(d, axis),))
reduce_scatter_rows.defvjp(lambda x, axis: (reduce_scatter_rows(x, axis), None), lambda axis, _, d: (gather_rows(d, axis),))


def sum_gradients(gradients: Any) -> Any:
    """Return the gradients summed over the batch axes; those that a gather's reduce-scatter has summed already are left alone."""
    live = manual_axes()
    if not live:
        return gradients
    mesh = jax.sharding.get_abstract_mesh()

    def leaf(variable: nnx.Variable) -> nnx.Variable:
        summed = {axis for entry in _variable_spec(variable, mesh) for axis in ([entry] if isinstance(entry, str) else entry or ())}
        axes = tuple(axis for axis in BATCH_AXES if axis in live and axis not in summed)
        return variable.replace(lax.psum(variable.get_value(), axes)) if axes else variable

    return jax.tree.map(leaf, gradients, is_leaf=_is_variable)


def sum_over_batch(x: Any) -> Any:
    """Return a tree of arrays summed over the devices that share the batch."""
    axes = tuple(axis for axis in BATCH_AXES if axis in manual_axes())
    return lax.psum(x, axes) if axes else x


def on_mesh(fun: Callable, mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable:
    """Return `fun`, which is written for one device, as a program over the mesh; without a mesh `fun` itself."""
    if mesh is None:
        return fun
    return jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
