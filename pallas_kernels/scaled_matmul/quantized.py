"""FP8 values with scales: e4m3fn has three bits of mantissa, exponents from 2**-6 (denormals from 2**-9) to 448, NaN and no infinity.

Of a group of entries of x that share a scale:

    scale = max(max|x| / 448, 2**-126)        value = e4m3(x / scale), to nearest, ties to even        x ~ value * scale

A group is 128 entries along K, the axis that a product contracts, of one row; or a 128 x 128 block. The last one may be shorter.

- A power-of-two scale is the least that keeps the group within 448: multiplying by it is exact, and up to one bit of range is lost.
- A group of zeros has the smallest scale, 2**-126, and so has one whose largest magnitude is below 448 * 2**-126: smaller scales would
  be fp32 denormals, which some platforms flush to zero. Entries of at most 2**-10 scales round to zero. A product flushes where the product
  of two scales is below 2**-126, so results below some 1e-30 may vanish.
- Finite entries never exceed 448: x / scale is clipped there, as platforms differ in what they convert larger values to.
- NaN and infinite entries become NaN. They do not count for the scale, so their neighbours keep their values, and in a product exactly
  those sums are NaN that an entry enters: a run that diverges shows it, where saturation would hide it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

GROUP = 128
"""Entries of K that share a scale, and the side of a block."""
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126


class Quantized(NamedTuple):
    """An operand of a scaled product: e4m3fn values [R, K] and fp32 scales, K being the axis that is contracted.

    Scales are [K / 128, R], one a row and 128 columns, or [K / 128, R / 128], one a block: groups of K in front, as a kernel reads them.
    """

    values: Any
    scales: Any


class QuantizedRows(NamedTuple):
    """Activations [*rows, K] on their way to products in FP8, as the layer in front of them leaves them.

    plain [*rows, K]: in the dtype of activations, or None where nothing reads them.
    values [*rows, K] and scales [K / 128, N], of the N rows flat: the operand of a product, or None where only its gradient wants them.
    columns: the rows flat, quantised along the rows, [K, N]: the operand of the gradient of its weight, or None.
    carrier [*rows, K]: what gradients flow through; the plain rows, or zeros that nothing reads, or None where there is no gradient.
    """

    plain: Any
    values: Any
    scales: Any
    columns: Quantized | None = None
    carrier: Any = None

    @property
    def quantized(self) -> Quantized:
        """Return the rows, flat, as an operand of a product."""
        return Quantized(self.values.reshape(-1, self.values.shape[-1]), self.scales)

    @property
    def flat(self) -> "QuantizedRows":
        """Return the rows, flat."""
        return self.shaped(-1)

    def shaped(self, *lead: int) -> "QuantizedRows":
        """Return the rows with other leading axes."""
        shaped = lambda x: None if x is None else x.reshape(*lead, x.shape[-1])
        return self._replace(plain=shaped(self.plain), values=shaped(self.values), carrier=shaped(self.carrier))

    def moved(self, move: Callable[[jax.Array], jax.Array]) -> "QuantizedRows":
        """Return flat rows after a move of rows, [N, columns] -> [M, columns], whose new rows are zero.

        Raises ValueError for rows that have a gradient but are not plain (too): their columns are those of other rows.
        """
        if self.plain is None and self.carrier is not None:
            raise ValueError("rows in FP8 whose layer emitted no plain ones cannot be moved where there is a gradient")
        values, scales = moved_rows(lax.stop_gradient(self.quantized), move)
        carrier = None if self.carrier is None else move(self.carrier)
        return QuantizedRows(carrier, values, scales, None, carrier)


def moved_rows(x: Quantized, move: Callable[[jax.Array], jax.Array]) -> Quantized:
    """Return rows after a move of rows, [N, columns] -> [M, columns], whose new rows are zero."""
    values = lax.bitcast_convert_type(move(lax.bitcast_convert_type(x.values, jnp.uint8)), x.values.dtype)
    return Quantized(values, jnp.maximum(move(x.scales.T).T, SMALLEST_SCALE))


class Product(NamedTuple):
    """A product's result y [*rows, N] whose gradient comes back in FP8, as the layer behind it emits it.

    rows [M, N] and columns [N, M], of the M rows flat, are zeros that nothing reads: what the layer returns as their gradients is that
    of y, quantised along its columns and along its rows, as the products of the gradient take it. That of y itself is not read.
    """

    y: Any
    rows: Quantized | None
    columns: Quantized | None

    @classmethod
    def of(cls, y: Float[Array, "M N"]) -> "Product":
        """Return the result with what carries its gradient."""
        zeros = lambda x: Quantized(jnp.zeros(x.shape, jnp.float8_e4m3fn), jnp.zeros((-(-x.shape[1] // GROUP), x.shape[0]), jnp.float32))
        return cls(y, zeros(y), zeros(y.T))


def group_scales(largest: jax.Array, power_of_two: bool) -> jax.Array:
    """Return the scales of groups whose largest finite magnitudes are given, fp32."""
    largest = jnp.maximum(largest.astype(jnp.float32), LARGEST * SMALLEST_SCALE)
    if not power_of_two:
        return jnp.maximum(largest / LARGEST, SMALLEST_SCALE)
    # 448 is 1.75 * 2**8: a larger mantissa carries into the exponent, then the mantissa goes.
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    return lax.bitcast_convert_type(((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23), jnp.float32)


def finite_magnitude(x: jax.Array) -> jax.Array:
    """Return |x|, and 0 for what is not finite: that does not count for a scale."""
    magnitude = jnp.abs(x)
    return jnp.where(magnitude < jnp.inf, magnitude, 0)


def to_e4m3(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Return the values of x for scales that broadcast to it."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x / scales, -LARGEST, LARGEST), jnp.nan).astype(jnp.float8_e4m3fn)


def quantize(x: Float[Array, "R K"], *, block: bool = False, transpose: bool = False, power_of_two: bool = False) -> Quantized:
    """Return x as e4m3fn values with an fp32 scale for each row and 128 columns, or with `block` for each 128 x 128 block.

    Args:
        transpose: quantise x.T: x is [K, R], and its groups run down its columns.
        power_of_two: round scales up to powers of two.
    """
    x = x.T if transpose else x
    rows, depth = x.shape
    height = GROUP if block else 1
    padding = (-rows % height, -depth % GROUP)
    grouped = jnp.pad(x, [(0, p) for p in padding]).reshape((rows + padding[0]) // height, height, -1, GROUP)
    scales = group_scales(finite_magnitude(grouped).max((1, 3)), power_of_two)
    values = to_e4m3(grouped, scales[:, None, :, None]).reshape(rows + padding[0], -1)[:rows, :depth]
    return Quantized(values, scales.T)


def quantize_weights(w: Float[Array, "*lead K N"], *, transpose: bool = True, power_of_two: bool = False) -> Quantized:
    """Return matrices in FP8 by blocks of 128 x 128, to be contracted along K: [*lead, N, K], scales [*lead, K / 128, N / 128].

    Not transposed they are contracted along N, as for the gradient of rows: [*lead, K, N], scales [*lead, N / 128, K / 128].
    """
    one = functools.partial(quantize, block=True, transpose=transpose, power_of_two=power_of_two)
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w)


def blocks_of(w: Float[Array, "*lead K N"] | Quantized, power_of_two: bool) -> Quantized:
    """Return a weight as a product takes it: by `quantize_weights`, if it is not in FP8 already."""
    return w if isinstance(w, Quantized) else quantize_weights(w, power_of_two=power_of_two)


def check_gradient(w: Float[Array, "*lead K N"] | Quantized) -> None:
    """Raise ValueError for a weight that is in FP8 already: it has no gradient, nor has its product."""
    if isinstance(w, Quantized):
        raise ValueError("a product with a weight that is in FP8 already has no gradient")


def quantize_rows(x: Float[Array, "*rows K"] | QuantizedRows, *, power_of_two: bool = False) -> QuantizedRows:
    """Return activations with their FP8 values and scales, which those that have them keep.

    Raises ValueError for such with power_of_two: layers emit other scales.
    """
    if isinstance(x, QuantizedRows):
        if power_of_two:
            raise ValueError("rows that are in FP8 already have scales that are no powers of two")
        return x
    rows = quantize(lax.stop_gradient(x).reshape(-1, x.shape[-1]), power_of_two=power_of_two)
    return QuantizedRows(x, rows.values.reshape(x.shape), rows.scales, None, x)


def as_bytes(x: Quantized) -> Quantized:
    """Return the values as their bytes, uint8, for what is kept for a gradient; `as_values` takes them back.

    `jax.checkpoint` rounds floats that it keeps to the range that their exponent's bits have in IEEE (`lax.reduce_precision`), where
    the exponents of e4m3fn's largest values, from 256 on, are infinity's.
    """
    return Quantized(lax.bitcast_convert_type(x.values, jnp.uint8), x.scales)


def as_values(x: Quantized) -> Quantized:
    """Return the values whose bytes `as_bytes` returned."""
    return Quantized(lax.bitcast_convert_type(x.values, jnp.float8_e4m3fn), x.scales)


def columns_of(
    carrier: Float[Array, "N K"] | None, columns: Quantized | None, power_of_two: bool, move: Callable[[jax.Array], jax.Array] = lambda x: x
) -> Quantized:
    """Return rows quantised along the rows, as bytes, for the gradient of a weight: of the carrier, moved, if their layer did not.

    Raises ValueError if they were left without a carrier.
    """
    if carrier is None:
        raise ValueError("a product of rows in FP8 whose layer emitted neither plain rows nor columns has no gradient")
    return columns or as_bytes(quantize(move(carrier), transpose=True, power_of_two=power_of_two))


def gradient_in_fp8(dy: Float[Array, "M N"] | Product, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """Return a result's gradient quantised along its columns, and along its rows: as the layer behind it did, if it did."""
    if isinstance(dy, Product):
        assert dy.rows
        assert dy.columns
        return dy.rows, dy.columns
    return quantize(dy, power_of_two=power_of_two), quantize(dy, transpose=True, power_of_two=power_of_two)


def result_dtype(rows: QuantizedRows, out_dtype: DTypeLike | None) -> Any:
    """Return the dtype of a product of rows: by default theirs. Raises ValueError if they have none but FP8."""
    if out_dtype is None and rows.carrier is None:
        raise ValueError("a product of rows in FP8 alone needs an out_dtype")
    return jnp.dtype(rows.carrier.dtype if out_dtype is None else out_dtype)
