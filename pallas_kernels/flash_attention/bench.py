"""Times flash attention beside its peers: `python -m pallas_kernels.flash_attention.bench [--json FILE] [--quick]`.

The peers are `jax.nn.dot_product_attention`, on a GPU by cuDNN too, and the kernels that come with jax: on a TPU splash, on a GPU the ones
in Pallas-Triton. "decode" cases are one token of so many slots, each at the end of its keys.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import GRID
from pallas_kernels.benchmark import Problem, main, native
from pallas_kernels.compat import platform
from pallas_kernels.flash_attention import flash_attention, flash_attention_paged, reference
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS
from pallas_kernels.flash_attention.cases import (
    BENCH_CASES,
    BENCH_DECODE_CASES,
    BENCH_GPU_CASES,
    BENCH_GPU_DECODE_CASES,
    CacheCase,
    Case,
    cache_inputs,
    inputs,
)

BLOCK = 512
"""Queries of which the reference has the scores at a time."""
JAX_NN, CUDNN, IN_TREE, SPLASH = "peer: jax.nn", "peer: cudnn", "peer: in-tree", "peer: splash"


def truth(q, k, v, start, stop):
    """Return the reference's outputs; T is a multiple of BLOCK, or less."""
    blocks = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, min(BLOCK, x.shape[1]), *x.shape[2:]), 1, 0)
    out = lax.map(jax.checkpoint(lambda x: reference.flash_attention(x[0], k, v, *x[1:])), tuple(map(blocks, (q, start, stop))))
    return jnp.moveaxis(out, 0, 1).reshape(*q.shape[:3], v.shape[3])


def dot_product_attention(q, k, v, start, stop, implementation=None):
    """Return causal attention by jax.nn; the bounds of the benchmark are causal."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


def decode_attention(q, k, v, start, stop, implementation=None):
    """Return by jax.nn the attention of one token of each row, to the row's first keys."""
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=stop[:, 0], implementation=implementation)


def in_tree(q, k, v, start, stop, interpret=False):
    """Return causal attention by jax's Pallas kernels for GPUs, to which each query head brings its own copy of its keys."""
    from jax.experimental.pallas.ops.gpu import attention

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return attention.mha(q, k, v, None, sm_scale=q.shape[3] ** -0.5, causal=True, interpret=interpret)


def in_tree_decode(q, k, v, start, stop, interpret=False):
    """Return by jax's Pallas kernel for GPUs, which first moves the heads before the keys, the same as `decode_attention`."""
    from jax.experimental.pallas.ops.gpu import decode_attention

    out = decode_attention.gqa(q[:, 0], k, v, kv_seq_len=stop[:, 0], interpret=interpret)
    return out[:, None].astype(q.dtype)


def splash(q, k, v, start, stop):
    """Return causal attention by the splash kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    batch, num_tokens, heads, size = q.shape
    groups = k.shape[2]
    mask = splash_attention_mask.CausalMask((num_tokens, num_tokens))
    kernel = splash_attention_kernel.make_splash_mqa_single_device(splash_attention_mask.MultiHeadMask([mask] * (heads // groups)))
    queries = jnp.moveaxis((q * size**-0.5).astype(q.dtype).reshape(batch, num_tokens, groups, -1, size), 1, 3)
    out: Any = jax.vmap(jax.vmap(kernel))(queries, k.swapaxes(1, 2), v.swapaxes(1, 2))
    return jnp.moveaxis(out, 3, 1).reshape(*q.shape[:3], v.shape[3])


def paged(q, k, v, start, stop, implementation):
    """Return the attention over the same keys as pages."""
    keys, values = (x.reshape(-1, GRID, *x.shape[2:]) for x in (k, v))
    table = jnp.arange(keys.shape[0], dtype=jnp.int32).reshape(k.shape[0], -1)
    return flash_attention_paged(q, keys, values, table, start, stop, implementation=implementation)


def sequences(name: str, case: Case, dtype: DTypeLike) -> Problem:
    """Return the problem of a causal sequence; the FLOPs are those of the causal half of the scores."""
    scores, size, here = case.B * case.H * case.T * (case.T + 1) / 2, case.K + (case.V or case.K), platform()
    moved = jnp.dtype(dtype).itemsize * case.B * case.T * (case.H + case.G) * size
    implementations: dict[str, Any] = {x: functools.partial(flash_attention, implementation=x) for x in native(IMPLEMENTATIONS)}
    if here == "cpu":
        implementations["xla aligned"] = functools.partial(flash_attention, aligned=True, implementation="xla")
    if here == "gpu":
        implementations |= {CUDNN: functools.partial(dot_product_attention, implementation="cudnn"), IN_TREE: in_tree}
    elif here == "tpu":
        implementations[SPLASH] = splash
    if case.T <= 8192:  # it has all scores at once
        implementations[JAX_NN] = dot_product_attention
    return Problem(
        case=name,
        tokens=case.B * case.T,
        inputs=functools.partial(inputs, case, dtype),
        differentiable=(0, 1, 2),
        implementations=implementations,
        truth=truth,
        flops=(2 * scores * size, 5 * scores * size),
        bytes=(moved, 2 * moved),
        peer={"cpu": JAX_NN, "gpu": CUDNN, "tpu": SPLASH}[here],
    )


def decode(name: str, case: CacheCase, dtype: DTypeLike) -> Problem:
    """Return the problem of a decode step."""
    implementations: dict[str, Any] = {}
    for kernel in native(IMPLEMENTATIONS):
        for aligned in (False, True) if platform() == "cpu" else (False,):
            implementations[kernel + " aligned" * aligned] = functools.partial(flash_attention, aligned=aligned, implementation=kernel)
        implementations[f"{kernel}, pages"] = functools.partial(paged, implementation=kernel)
    if platform() == "gpu":
        implementations |= {CUDNN: functools.partial(decode_attention, implementation="cudnn"), IN_TREE: in_tree_decode}
    return Problem(
        case=name,
        tokens=case.slots,
        inputs=functools.partial(cache_inputs, case, dtype),
        differentiable=(),
        implementations=implementations | {JAX_NN: decode_attention},
        truth=truth,
        flops=(4 * case.slots * case.H * case.S * case.K, 0),
        bytes=(2 * jnp.dtype(dtype).itemsize * case.slots * case.K * (case.S * case.G + case.H), 0),
        peer=CUDNN if platform() == "gpu" else JAX_NN,
    )


def problems(dtype: DTypeLike, quick: bool) -> Iterator[Problem]:
    """Yield the cases of the benchmark."""
    on_cpu = platform() == "cpu"
    for name, case in (BENCH_CASES if on_cpu else BENCH_GPU_CASES).items():
        if not quick or case.T <= 1024:
            yield sequences(name, case, dtype)
    for name, case in (BENCH_DECODE_CASES if on_cpu else BENCH_GPU_DECODE_CASES).items():
        yield decode(name, case, dtype)


if __name__ == "__main__":
    main("flash_attention", problems)
