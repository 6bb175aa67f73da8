"""The benchmark's variants of the demo's step: they trace, and only those multiply by `lax.ragged_dot` that say so."""

import contextlib

import jax
import pytest

from ring_jax.train import bench

VARIANTS = {
    "ours": ((), False),
    "layers as equations": ((bench.equations,), False),
    "experts by ragged_dot": ((bench.experts_by_ragged_dot,), True),
    "neither": ((bench.equations, bench.experts_by_ragged_dot), True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_variant_traces(variant):
    patches, ragged = VARIANTS[variant]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        program, batch, _ = bench.demo("fp32")
        state = jax.eval_shape(program.init)
        text = str(jax.make_jaxpr(program.step)(state, program.tables, batch))
    assert ("ragged_dot" in text) == ragged
