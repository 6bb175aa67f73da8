"""What the tests of the kernels call equal: within a dtype's tolerance of the float64 truth, or to the bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import interpreted

FP32_TOLERANCE = 1e-5
"""Of fp32 results: the largest error relative to the largest value."""
HOPPER_FP8_TOLERANCE = 2**-9
"""The same of sums that Hopper's FP8 unit takes: it adds up with about 14 bits (arXiv 2412.19437, section 3.3.2), whoever asks it."""
BF16_FLOORS = 2
"""Of bf16 results: the root mean square error, in units of what rounding the truth to bf16 costs."""
BF16_LARGEST = 2**-6
"""Of bf16 results: the largest error relative to the largest value, so that a single wrong entry cannot hide in the mean."""


def fp8_tolerance(implementation: str) -> float:
    """Return the tolerance of fp32 results of FP8 products."""
    return HOPPER_FP8_TOLERANCE if implementation == "pallas_gpu" and not interpreted("gpu") else FP32_TOLERANCE


def assert_close(actual: Any, expected: Any, dtype: jnp.dtype, tolerance: float = FP32_TOLERANCE) -> None:
    """Check a tree of results computed in `dtype` against the float64 truth; `tolerance` is that of fp32 results."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, (one, truth) in zip(paths(expected), zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True), strict=True):
        assert (truth.dtype, truth.shape) == (np.float64, one.shape), path
        one = np.asarray(one).astype(np.float64)
        assert np.isfinite(one).all(), f"{path}: not finite"
        error, scale = np.abs(one - truth), np.abs(truth).max(initial=0) or 1.0  # terms of order 1 that cancel exactly
        if dtype == jnp.bfloat16:
            floor = rms(truth.astype(jnp.bfloat16).astype(np.float64) - truth) or 2**-9 * scale
            assert rms(error) <= BF16_FLOORS * floor, f"{path}: {rms(error) / floor:.2f} rounding floors"
            assert error.max(initial=0) <= BF16_LARGEST * scale, f"{path}: {error.max() / scale:.1e} of the scale"
        else:
            assert error.max(initial=0) <= tolerance * scale, f"{path}: {error.max() / scale:.1e} of the scale"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Check that two trees of arrays do not differ in a single bit."""
    for path, (one, other) in zip(paths(expected), zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert np.isfinite(one).all(), f"{path}: not finite"
        bits = f"u{one.dtype.itemsize}"
        differ = (one.view(bits) != other.view(bits)) & ((one != 0) | (other != 0))  # 0 and -0 are one value
        assert not differ.any(), f"{path}: {differ.sum()} of {differ.size} values differ, first at {np.argwhere(differ)[0]}"


def paths(tree: Any) -> list[str]:
    """Return the name of each leaf."""
    return [jax.tree_util.keystr(path) or "result" for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def rms(x: np.ndarray) -> float:
    """Return the root of the mean square, 0 for no entries."""
    return float(np.sqrt(np.square(x).sum() / max(x.size, 1)))
