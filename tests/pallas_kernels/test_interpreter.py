"""What tests of values rest on: what an interpreted kernel does not write is NaN, and loops of plain JAX write all that they return."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from pallas_kernels import compat
from pallas_kernels.cross_entropy import cases as cross_entropy
from pallas_kernels.cross_entropy import head_logits, token_logprobs
from pallas_kernels.flash_attention import cases as flash
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.fused_layers import cases as fused_layers
from pallas_kernels.grouped_matmul import cases as grouped
from pallas_kernels.grouped_matmul import gather_groups, group_rows, grouped_matmul, grouped_mlp
from pallas_kernels.grouped_scaled_matmul import fp8_grouped_matmul
from pallas_kernels.lightning_attention import cases as lightning
from pallas_kernels.lightning_attention import lightning_attention
from pallas_kernels.matmul import cases as products
from pallas_kernels.matmul import matmul
from tests.pallas_kernels.programs import jit_for_values, random_like, with_gradients
from tests.pallas_kernels.tolerances import assert_same_bits

q, k, v, *bounds = flash.inputs(flash.TEST_CASES["odd_length"], jnp.float32)
*qkv, log_decay, _, _ = lightning.inputs(lightning.TEST_CASES["odd_length"], jnp.float32)
hidden, head, targets = cross_entropy.inputs(cross_entropy.TEST_CASES["odd_rows"], jnp.float32)
tokens, w, experts = grouped.inputs(grouped.Case(33, 2, 128, 256, 5), jnp.float32)
groups = group_rows(experts.reshape(-1), 5, 16)
rows, w_out = gather_groups(tokens, groups, 2), jnp.swapaxes(w[:, :, :128], 1, 2)
of_groups = {"tiles": groups.tiles, "row_tile": 16}


def grouped_experts(x, w_in, w_out, weights, **how):
    return grouped_mlp(x, w_in, w_out, groups, weights, row_tile=16, **how)


OPS = {
    "flash_attention": (lambda q, k, v, **how: flash_attention(q, k, v, *bounds, **how), (q, k, v)),
    "lightning_attention": (lambda q, k, v, **how: lightning_attention(q, k, v, log_decay, **how)[0], qkv),
    "matmul": (matmul, products.inputs(products.TEST_CASES["odd_rows"], jnp.float32)),
    "grouped_matmul": (functools.partial(grouped_matmul, **of_groups), (rows, w)),
    "grouped_mlp": (grouped_experts, (tokens, w, w_out, jnp.linspace(0.1, 2.0, 66).reshape(33, 2))),
    "fp8_grouped_matmul": (functools.partial(fp8_grouped_matmul, **of_groups), (rows, w)),
    "fused_layers": (fused_layers.TEST_CASES["gated"].function(jnp.float32), fused_layers.TEST_CASES["gated"].inputs(jnp.float32)),
    "cross_entropy": (lambda hidden, w, **how: token_logprobs(hidden, w, targets, **how), (hidden, head)),
    "head_logits": (head_logits, (hidden, head)),
}


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_that_write_nothing_give_nan(op, implementation, monkeypatch):
    call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda kernel, **how: call(lambda *refs: None, **how))
    f, arguments = OPS[op]
    for out in jax.tree.leaves(jit_for_values(functools.partial(f, implementation=implementation))(*arguments)):
        assert np.isnan(out).all()


ROWS, BLOCK = 20, 8
"""Rows of an array, and of a block, of which the last one hangs over."""


def on_a_tpu(x):
    """Called as the kernels for TPUs are: blocks, scalars in front of them, scratch behind."""

    def kernel(skipped_ref, x_ref, out_ref, scratch_ref):
        @pl.when(pl.program_id(0) != skipped_ref[0])
        def _write():
            out_ref[0], out_ref[1] = x_ref[...].sum(0), scratch_ref[0]

    block = pl.BlockSpec((BLOCK, x.shape[1]), lambda i, skipped: (i, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(ROWS, BLOCK),),
            in_specs=[block],
            out_specs=block,
            scratch_shapes=[pltpu.VMEM((BLOCK, x.shape[1]), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=compat.interpreted("tpu"),
    )(jnp.ones(1, jnp.int32), x)


def on_a_gpu(x):
    """Called as the kernels for GPUs are: whole arrays, of which a program loads and stores some rows."""

    def kernel(x_ref, out_ref):
        rows = pl.ds(pl.program_id(0) * BLOCK, BLOCK)
        y = triton.load(x_ref.at[rows, :])
        here = (jnp.arange(BLOCK) == 0) & (pl.program_id(0) != 1)
        triton.store(out_ref.at[rows, :], jnp.broadcast_to(y.sum(0), y.shape), mask=jnp.broadcast_to(here[:, None], y.shape))

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(ROWS, BLOCK),),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=compat.interpreted("gpu"),
    )(x)


@pytest.mark.parametrize("call", [on_a_tpu, on_a_gpu])
def test_what_a_kernel_leaves_out_or_reads_outside_is_nan(call):
    """Of three blocks the first is summed, the second left out, and the last one has rows that the array has not."""
    x = np.random.default_rng(0).standard_normal((ROWS, 128), np.float32)
    out = np.asarray(call(x))
    np.testing.assert_allclose(out[0], x[:BLOCK].sum(0), rtol=1e-5, atol=1e-5)
    assert np.isnan(out[1:]).all()


@pytest.mark.parametrize(
    ("op", "aligned"),
    [
        *((op, True) for op in ("matmul", "lightning_attention", "grouped_mlp", "fused_layers", "cross_entropy")),
        ("lightning_attention", False),
        ("grouped_mlp", False),
    ],
)
def test_loops_write_all_that_they_return(op, aligned, monkeypatch):
    """And read nothing else of it: values and gradients are those of arrays that were NaN."""
    f, arguments = OPS[op]
    run = lambda *args: f(*args, aligned=aligned, implementation="xla")
    cotangents = random_like(jax.eval_shape(run, *arguments))
    both = lambda: jit_for_values(lambda *given: with_gradients(run)(*given))(arguments, cotangents)
    expected, asked = both(), []

    def poisoned(*args):
        y = compat.unwritten(*args)
        asked.append(y)
        return jnp.full_like(y, jnp.nan)

    for name, module in list(sys.modules.items()):
        if name.startswith("pallas_kernels.") and module is not compat and hasattr(module, "unwritten"):
            monkeypatch.setattr(module, "unwritten", poisoned)
    assert_same_bits(both(), expected)
    assert asked
