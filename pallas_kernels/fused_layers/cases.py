"""Named shapes of the fused layers, shared by the tests, the benchmark and the compile gates."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.aot.case import CompileCase
from pallas_kernels.fused_layers import api, reference
from pallas_kernels.grouped_matmul import gather_groups, gather_weights, moves_of
from pallas_kernels.grouped_matmul.cases import ACTIVE, allotted_rows, experts_of
from pallas_kernels.scaled_matmul import Product, QuantizedRows, quantize

EPS = 1e-6


class Case(NamedTuple):
    """A layer at some sizes: its name in the api, its static arguments, and the arguments' shapes with "x" for the compute dtype.

    Letters: "x" activations and norm weights in the compute dtype, "s" the same, whose gradient is another's; "f" fp32 whatever the
    dtype is, "c" the same, a constant.
    """

    op: str
    how: dict[str, Any]
    shapes: tuple[tuple[str, tuple[int, ...]] | None, ...]

    def function(self, dtype: DTypeLike, **kwargs) -> Callable:
        """Return the layer."""
        how = self.how | ({"dtype": dtype} if self.op in NORMS else {})
        return functools.partial(next_norm if self.op == "next_norm" else getattr(api, self.op), **how, **kwargs)

    @property
    def truth(self) -> Callable:
        """Return its reference."""
        return functools.partial(_next_norm_truth if self.op == "next_norm" else getattr(reference, self.op), **self.how)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Return which arguments have a gradient."""
        return tuple(i for i, x in enumerate(self.shapes) if x and x[0] not in "cs")

    def structs(self, dtype: DTypeLike) -> list[jax.ShapeDtypeStruct | None]:
        """Return the arguments' shapes."""
        return [x and jax.ShapeDtypeStruct(x[1], dtype if x[0] in "xs" else jnp.float32) for x in self.shapes]

    def inputs(self, dtype: DTypeLike, seed: int = 0) -> list[jax.Array | None]:
        """Return random arguments; norm weights are numbers of the dtype, as a model's forward has them."""
        rng = np.random.default_rng(seed)
        return [x if x is None else jnp.asarray(rng.standard_normal(x.shape).astype(x.dtype)) for x in self.structs(dtype)]


NORMS = ("residual_rms_norm", "next_norm")


def next_norm(x: jax.Array, routed: jax.Array, shared: jax.Array, weight: jax.Array, **how: Any) -> Any:
    """Return a layer's end, x and its experts' results, and the first norm of the next layer: no op of the api, but what a model does.

    A norm that added them would save nothing: it would want their sum, which then is written and read.
    """
    return api.residual_rms_norm(x + (routed + shared).astype(jnp.float32), None, weight, **how)


def _next_norm_truth(x, routed, shared, weight, **how):
    return reference.residual_rms_norm(x + routed.astype(x.dtype) + shared.astype(x.dtype), None, weight, **how)


def residual_rms_norm(num: int, D: int, first: bool = False) -> Case:
    """Return the residual add and the norm behind it; the first norm of a model adds nothing."""
    return Case("residual_rms_norm", {"eps": EPS}, (("f", (num, D)), None if first else ("x", (num, D)), ("x", (D,))))


def gated_group_norm(num: int, D: int, num_groups: int) -> Case:
    """Return the gated norm of a linear mixer."""
    return Case("gated_group_norm", {"eps": EPS, "num_groups": num_groups}, (("x", (num, D)), ("x", (num, D)), ("x", (D,))))


def swiglu(num: int, F: int, weighted: bool = False) -> Case:
    """Return the gate of an FFN; an expert's rows may have weights."""
    return Case("swiglu", {}, (("x", (num, 2 * F)), ("f", (num,)) if weighted else None))


def qk_norm_rope(num: int, H: int, G: int, K: int, half: int) -> Case:
    """Return what follows the product with the qkv weight."""
    tables = (("c", (num, half)), ("c", (num, half)))
    return Case("qk_norm_rope", {"eps": EPS, "num_kv_heads": G}, (("x", (num, (H + 2 * G) * K)), *tables, ("x", (K,)), ("x", (K,))))


def route(num: int, E: int, A: int, num_groups: int, num_active_groups: int, normalise: bool = True) -> Case:
    """Return the router's choice."""
    how = {"num_active": A, "num_groups": num_groups, "num_active_groups": num_active_groups, "normalise": normalise, "factor": 2.5}
    return Case("route", how, (("f", (num, E)), ("c", (E,))))


TEST_CASES = {
    "norm": residual_rms_norm(21, 48),
    "norm_odd": residual_rms_norm(21, 96),
    "first_norm": residual_rms_norm(5, 48, first=True),
    "gated": gated_group_norm(19, 256, 2),
    "gated_odd": gated_group_norm(19, 72, 3),
    "swiglu": swiglu(21, 256),
    "swiglu_odd": swiglu(3, 24),
    "swiglu_weighted": swiglu(19, 256, weighted=True),
    "swiglu_one_row": swiglu(1, 256, weighted=True),
    "heads": qk_norm_rope(19, 2, 1, 128, 32),
    "heads_small": qk_norm_rope(5, 1, 1, 16, 4),
    "heads_whole": qk_norm_rope(9, 1, 1, 128, 64),
    "route": route(21, 16, 2, 4, 2),
    "route_odd": route(5, 24, 3, 1, 1, normalise=False),
    "route_wide": route(19, 128, 4, 8, 4),
    "route_groups": route(9, 24, 3, 4, 2),
    "route_of_a_model": route(9, 256, 8, 8, 4),
}
REFUSED = {
    ("gated_odd", "pallas_tpu"): "24 columns are not whole lanes",
    ("swiglu_odd", "pallas_tpu"): "24 columns are not whole lanes",
    ("heads_small", "pallas_tpu"): "16 columns are not whole lanes",
    ("route_groups", "pallas_gpu"): "groups of 6 experts do not divide a tile of 32",
}
"""What a kernel does not take, and how it says so."""

BENCH_CASES = {"norm": residual_rms_norm(1024, 512), "gated": gated_group_norm(1024, 512, 4), "swiglu": swiglu(1024, 1024)} | {
    "heads": qk_norm_rope(1024, 4, 2, 128, 32),
    "route": route(1024, 32, 4, 4, 2),
}
"""On a CPU."""


def model_cases(name: str, num: int) -> dict[str, Case]:
    """Return the layers of a released model over `num` rows."""
    D, H, G, K, E, A, F, dense = {"mini": (2048, 16, 4, 128, 256, 8, 512, 5120), "flash": (4096, 32, 4, 128, 256, 8, 1024, 9216)}[name]
    return {
        "residual_rms_norm": residual_rms_norm(num, D),
        "gated_group_norm": gated_group_norm(num, H * K, 4),
        "swiglu": swiglu(num, dense),
        "swiglu expert": swiglu(num * A, F, weighted=True),
        "qk_norm_rope": qk_norm_rope(num, H, G, K, 32),
        "qk_norm_rope linear": qk_norm_rope(num, H, H, K, 32),
        "route": route(num, E, A, 8, 4),
    }


def between_products(name: str, num: int, mixer: str) -> list[Case]:
    """Return what stands between the products of a released model's layer with experts over `num` rows.

    The last two are the SwiGLU of the routed experts (`ROUTED`), of rows as `group_rows` allots them, and of the shared one.
    """
    of, (D, F) = model_cases(name, num), {"mini": (2048, 512), "flash": (4096, 1024)}[name]
    end = Case("next_norm", {"eps": EPS}, (("f", (num, D)), ("x", (num, D)), ("s", (num, D)), ("x", (D,))))
    routed, shared = swiglu(allotted_rows(num * ACTIVE), F, weighted=True), swiglu(num, F)
    mixed = [of["qk_norm_rope linear"], of["gated_group_norm"]] if mixer == "linear" else [of["qk_norm_rope"]]
    return [end, *mixed, of["residual_rms_norm"], of["route"], routed, shared]


ROUTED = -2


def trained(layers: list[tuple[Callable, Case]], dtype: DTypeLike) -> tuple[Callable, tuple[Any, ...]]:
    """Return a program of the values and gradients of layers, each with inputs of its own, and the shapes of its arguments."""
    arguments, cotangents = [], []
    for _, case in layers:
        structs = case.structs(dtype)
        outs = jax.eval_shape(case.function(dtype, implementation="xla"), *structs)
        arguments.append(tuple(structs))
        cotangents.append(jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, outs))

    def run(arguments, cotangents):
        return [_both(layer, case, given, d_outs) for (layer, case), given, d_outs in zip(layers, arguments, cotangents, strict=True)]

    return run, (arguments, cotangents)


def _both(layer: Callable, case: Case, arguments: Any, d_outs: Any) -> tuple[Any, Any]:
    """A layer's results, and the gradients of its arguments that have one; those of rows in FP8 come through their carriers."""

    def of_chosen(*values):
        full = list(arguments)
        for at, value in zip(case.differentiable, values, strict=True):
            full[at] = value
        outs = layer(*full)
        carried = jax.tree.map(lambda x: x.carrier if is_rows(x) else x, outs, is_leaf=is_rows)
        return jax.tree.map(lambda x, d: x if d is not None else None, carried, d_outs, is_leaf=lambda x: x is None), outs

    _, pull_back, outs = jax.vjp(of_chosen, *(arguments[at] for at in case.differentiable), has_aux=True)
    return outs, pull_back(d_outs)


def equations_of(case: Case, dtype: DTypeLike) -> Callable:
    """Return the reference of a case with results as the layer gives them."""
    like = jax.eval_shape(case.function(dtype, implementation="xla"), *case.structs(dtype))
    return lambda *arguments: jax.tree.map(lambda y, x: y.astype(x.dtype).reshape(x.shape), case.truth(*arguments), like)


FEEDING = (*NORMS, "gated_group_norm", "swiglu")
"""Layers in front of products, which can emit FP8."""


def is_rows(x: Any) -> bool:
    """Return whether x is a layer's rows for products in FP8."""
    return isinstance(x, QuantizedRows)


def written(outs: Any) -> Any:
    """Return a layer's results without the carriers of gradients, which are no arrays of their own."""
    return jax.tree.map(lambda x: x._replace(carrier=None) if is_rows(x) else x, outs, is_leaf=is_rows)


def emissions(layers: list[Case]) -> list[tuple[Case, dict[str, Any]]]:
    """Return what layers emit for products in FP8, without gradients: the rows of the last norm plain, too, since a router reads them."""
    last = max((i for i, case in enumerate(layers) if case.op == "residual_rms_norm"), default=-1)
    emit = lambda i: ("plain", "rows") if i == last else ("rows",)
    return [(case, {"emit": emit(i)} if case.op in FEEDING else {}) for i, case in enumerate(layers)]


def in_fp8(layers: list[Case], dtype: DTypeLike, implementation: str | None) -> Callable:
    """Return a program of the values of layers for products in FP8, without gradients: fused, or their equations, then quantisation."""

    def values(case: Case, how: dict[str, Any], given: Any) -> Any:
        if implementation:
            return written(case.function(dtype, **how, implementation=implementation)(*given))
        outs = jax.tree.leaves(equations_of(case, dtype)(*given))
        return [*outs[: len(outs) - ("plain" not in how["emit"])], quantize(outs[-1])] if how else outs

    return lambda arguments: [values(*layer, given) for layer, given in zip(emissions(layers), arguments, strict=True)]


class AroundExperts(NamedTuple):
    """What a layer's experts read and write: tokens, rows in their groups' tiles, the gradients of these, and the matrices."""

    x: Any
    weights: Any
    groups: Any
    gate_up: Any
    hidden: Any
    rows: Any
    d_gathered: Any
    d_gate_up: Any
    d_hidden: Any
    d_y: Any
    matrices: Any

    @classmethod
    def of(cls, model: str, num: int) -> "AroundExperts":
        """Return the shapes for so many tokens of a released model."""
        x, w_in, w_out, weights, groups, hidden, gate_up, _ = experts_of(model, num).arguments
        wide = jax.ShapeDtypeStruct((hidden.shape[0], x.shape[1]), x.dtype)
        return cls(x, weights, groups, gate_up, hidden, wide, wide, gate_up, hidden, x, (w_in, w_out))

    def as_equations(self) -> Any:
        """What is outside of the products, values and gradients: rows gathered, SwiGLU, their weighted sums; all moves are gathers."""
        gather = lambda x: gather_groups(x, self.groups, ACTIVE)
        routed = swiglu(*self.hidden.shape)
        combined = lambda rows, weights: _weighted_sums(rows, weights, self.groups)
        return (
            _with_gradients(gather, (self.x,), self.d_gathered),
            _with_gradients(lambda y: equations_of(routed, y.dtype)(y, None), (self.gate_up,), self.d_hidden),
            _with_gradients(combined, (self.rows, self.weights), self.d_y),
        )

    @property
    def on_gpu(self) -> tuple[Any, ...]:
        """The arguments of a GPU's experts (see `experts_of`), whose products do much of it."""
        return self.x, *self.matrices, self.weights, self.groups, self.hidden, self.d_gate_up, self.d_y


def _with_gradients(f: Callable, given: tuple[Any, ...], d: Any) -> Any:
    y, pull_back = jax.vjp(f, *given)
    return y, pull_back(d)


@jax.custom_vjp
def _weighted_sums(rows, weights, groups):
    """Each token's rows summed by weight, from one pass over them; in plain JAX, and so its gradients."""
    return sum(weights[:, a, None] * slot for a, slot in enumerate(_slots(rows, weights, groups))).astype(rows.dtype)  # pyright: ignore


def _slots(rows, weights, groups):
    place = groups.destination.reshape(weights.shape)
    return [jnp.take(rows, index, axis=0, mode="fill", fill_value=0).astype(jnp.float32) for index in place.T]


def _weighted_sums_gradient(residuals, dy):
    rows, weights, groups = residuals
    weight, token = gather_weights(weights, groups), moves_of(len(weights), groups, ACTIVE)[0]
    d_rows = weight[:, None] * jnp.take(dy, token, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
    d_weights = jnp.stack([(dy.astype(jnp.float32) * slot).sum(-1) for slot in _slots(rows, weights, groups)], axis=1)
    return d_rows.astype(rows.dtype), d_weights, None


_weighted_sums.defvjp(lambda *given: (_weighted_sums(*given), given), _weighted_sums_gradient)


def trained_layer(model: str, mixer: str, target: str, num: int) -> dict[str, Any]:
    """Return a `CompileCase`'s programs of what stands between the products of a layer, values and gradients, their arguments and bytes.

    On a GPU with `AroundExperts`: there much of it is done by the experts' products, which are `products` alone, too. On a TPU with the
    experts' SwiGLU of it; moves of rows are the compiler's with and without kernels.
    """
    layers, how = between_products(model, num, mixer), {"implementation": "pallas_gpu" if target == "h200" else "pallas_tpu"}
    if target == "h200":
        del layers[ROUTED]
    own, arguments = trained([(case.function(jnp.bfloat16, **how), case) for case in layers], jnp.bfloat16)
    plain, _ = trained([(equations_of(case, jnp.bfloat16), case) for case in layers], jnp.bfloat16)
    size = sum(moved_bytes(case, jnp.bfloat16, backward) for case in layers for backward in (False, True))
    if target != "h200":
        return {"program": own, "unfused": lambda *given: plain(*given), "arguments": arguments, "bytes": size}
    experts, around = experts_of(model, num), AroundExperts.of(model, num)
    # The sums of rows: of the experts' results, and of the gradients of what was gathered.
    sums = 2 * sum(x.size * x.dtype.itemsize for x in (around.rows, around.x))
    return {
        "program": lambda arguments, cotangents, given: (own(arguments, cotangents), experts.program(*given.on_gpu)),
        "unfused": lambda arguments, cotangents, given: (plain(arguments, cotangents), given.as_equations()),
        "products": lambda arguments, cotangents, given: experts.products(*given.on_gpu),
        "arguments": (*arguments, around),
        "bytes": size + sums,
    }


RETURNING = {"gated_group_norm": 1, "swiglu": 0, "qk_norm_rope": 0}
"""Layers behind products in FP8, which want the gradient of this operand quantised both ways."""


def trained_in_fp8(layers: list[Case], dtype: DTypeLike, implementation: str | None) -> tuple[Callable, tuple[Any, ...]]:
    """Return a program of the values and gradients of layers between products in FP8, and the shapes of its arguments.

    They emit rows and columns, and the gradients of products' results both ways; or their equations, then quantisation.
    """
    both_ways = lambda x: (quantize(x), quantize(x, transpose=True))

    def fused(case: Case, how: dict[str, Any], given: Any, d_outs: Any) -> Any:
        how = {"emit": (*how["emit"], "columns")} if how else {}
        layer, at = case.function(dtype, **how, implementation=implementation), RETURNING.get(case.op)
        given = [Product.of(x) if i == at else x for i, x in enumerate(given)]
        outs, gradients = _both(layer, case, given, d_outs)
        return written(outs), [(d.rows, d.columns) if isinstance(d, Product) else d for d in gradients]

    def plain(case: Case, how: dict[str, Any], given: Any, d_outs: Any) -> Any:
        outs, gradients = _both(equations_of(case, dtype), case, given, d_outs)
        *outs, last = jax.tree.leaves(outs)
        outs = [*outs, *([last] if not how or "plain" in how["emit"] else []), *(both_ways(last) if how else ())]
        at = RETURNING.get(case.op)
        return outs, [both_ways(d) if i == at else d for i, d in zip(case.differentiable, gradients, strict=True)]

    one = fused if implementation else plain
    _, (arguments, cotangents) = trained([(equations_of(case, dtype), case) for case in layers], dtype)

    def run(arguments, cotangents):
        return [one(*layer, given, d) for layer, given, d in zip(emissions(layers), arguments, cotangents, strict=True)]

    return run, (arguments, cotangents)


def program(case: Case, dtype: DTypeLike, backward: bool, **kwargs) -> tuple[Callable, tuple[Any, ...]]:
    """Return the layer, or its gradient as a program of its own, and the shapes of its arguments."""
    layer, structs = case.function(dtype, **kwargs), tuple(case.structs(dtype))
    if not backward:
        return layer, structs
    both, (arguments, d_outs) = trained([(layer, case)], dtype)
    return lambda arguments, d_outs: both([arguments], [d_outs])[0][1], (arguments[0], d_outs[0])


def moved_bytes(case: Case, dtype: DTypeLike, backward: bool, **how) -> int:
    """Return what a layer moves at least: arguments and results; its gradient: what is kept for it, what comes in, and what goes out."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    arguments = case.structs(dtype)
    outs = written(jax.eval_shape(case.function(dtype, implementation="xla", **how), *arguments))
    if not backward:
        return size((arguments, outs))
    kept, incoming = arguments, outs
    if case.op in NORMS:  # the sum is, not what was added
        kept = [outs[0], arguments[-1]]
    if case.op == "route":
        kept, incoming = [arguments[0], outs[0], outs[2]], outs[1:]
    if case.op == "qk_norm_rope":  # the values' gradient passes
        kept = [*arguments[1:], outs[:2]]
    return size((kept, incoming, [arguments[at] for at in case.differentiable]))


_RATIOS = {
    "residual_rms_norm": (1.05, 1.05),
    "gated_group_norm": (1.25, 1.05),
    "swiglu": (1.05, 1.05),
    "qk_norm_rope": (2.1, 1.7),
    "route": (10, 9),
}
"""Estimates over 8192 rows, in units of the floor of the bytes, for TPUs and GPUs."""
_COMPILED = {
    ("mini", 8192, False): None,
    ("mini", 8192, True): ("residual_rms_norm", "gated_group_norm", "swiglu", "qk_norm_rope", "route"),
    ("mini", 64, False): ("residual_rms_norm", "gated_group_norm", "swiglu", "qk_norm_rope", "route"),
    ("flash", 8192, False): ("residual_rms_norm", "gated_group_norm", "swiglu", "qk_norm_rope"),
    ("flash", 8192, True): ("residual_rms_norm", "gated_group_norm", "swiglu expert"),
    ("flash", 64, False): ("residual_rms_norm", "gated_group_norm"),
}
"""The layers that are compiled for a model, a number of rows, and backward or not; None: all. Both models' heads are of one size."""


def compile_cases() -> Iterator[CompileCase]:
    """Yield the layers of both released models, forward and backward, over a training step's rows and a decode step's."""
    for (model, num, backward), names in _COMPILED.items():
        for name, case in model_cases(model, num).items():
            if names is not None and name not in names:
                continue
            size = moved_bytes(case, jnp.bfloat16, backward)
            if backward and case.op in ("residual_rms_norm", "route"):
                size += moved_bytes(case, jnp.bfloat16, False)  # its results are kept, so the program computes them
            for implementation, targets in {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("h200",)}.items():
                run, arguments = program(case, jnp.bfloat16, backward, implementation=implementation)
                yield CompileCase(
                    kernel=f"fused_layers.{case.op}{'.backward' * backward}",
                    shape=f"{model} {name.removeprefix(case.op)} {num}".replace("  ", " "),
                    targets=targets,
                    program=run,
                    arguments=arguments,
                    bytes=size,
                    flops=0,
                    floor_ratio=_RATIOS[case.op][0 if targets != ("h200",) else 1] if num > 64 else None,
                )
    for name in ("residual_rms_norm", "gated_group_norm", "swiglu", "swiglu expert"):
        for emit in (("rows",), ("rows", "columns")) if name.startswith("swiglu") else (("plain", "rows"),):
            case = model_cases("mini", 8192)[name]
            yield CompileCase(
                kernel=f"fused_layers.{case.op}.fp8",
                shape=f"mini {name.removeprefix(case.op)} 8192 {' '.join(emit)}".replace("  ", " "),
                targets=("h200",),
                program=lambda *given, layer=case.function(jnp.bfloat16, emit=emit, implementation="pallas_gpu"): written(layer(*given)),
                arguments=tuple(case.structs(jnp.bfloat16)),
                bytes=moved_bytes(case, jnp.bfloat16, False, emit=emit),
                flops=0,
                floor_ratio=1.9 if "columns" in emit else 1.05,
            )
    for model, mixer in (("mini", "linear"), ("flash", "softmax")):
        layers = between_products(model, 8192, mixer)
        yield CompileCase(
            kernel="fused_layers.layer.fp8",
            shape=f"{model} {mixer} 8192",
            targets=("h200",),
            program=in_fp8(layers, jnp.bfloat16, "pallas_gpu"),
            arguments=([tuple(case.structs(jnp.bfloat16)) for case in layers],),
            bytes=sum(moved_bytes(case, jnp.bfloat16, False, **how) for case, how in emissions(layers)),
            flops=0,
            unfused=in_fp8(layers, jnp.bfloat16, None),
            fewer_bytes=1 / 1.5,
        )
        run, arguments = trained_in_fp8(layers, jnp.bfloat16, "pallas_gpu")
        yield CompileCase(
            kernel="fused_layers.layer.fp8.trained",
            shape=f"{model} {mixer} 8192",
            targets=("h200",),
            program=run,
            arguments=arguments,
            # A gradient of a product's result takes as many bytes in FP8, both ways, as plain.
            bytes=sum(
                moved_bytes(case, jnp.bfloat16, False, **({"emit": (*how["emit"], "columns")} if how else {}))
                + moved_bytes(case, jnp.bfloat16, True)
                for case, how in emissions(layers)
            ),
            flops=0,
            unfused=trained_in_fp8(layers, jnp.bfloat16, None)[0],
            fewer_bytes=1 / 1.5,
        )
    for model, mixer, targets in (
        ("mini", "linear", ("v5p", "v6e", "h200")),
        ("mini", "softmax", ("v5p", "h200")),
        ("flash", "linear", ("v5p", "h200")),
        ("flash", "softmax", ("v6e", "h200")),
    ):
        for target in targets:
            yield CompileCase(
                kernel="fused_layers.layer.trained",
                shape=f"{model} {mixer} 8192",
                targets=(target,),
                flops=0,
                fewer_bytes=1 / 1.5,
                **trained_layer(model, mixer, target, 8192),
            )
