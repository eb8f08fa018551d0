"""Layers that run fast on XLA:CPU. You can delete this file and its uses in layers.py: only speed on CPUs and rounding change.

XLA:CPU multiplies matrices at full speed. It is much slower at convolution gradients, and at the gradient of a matrix product
with respect to its kernel, because these sum over pixels, which are not contiguous. So here

  - the kernel gradient of a product first transposes the output's gradient in memory, in blocks of pixels that fit a core's
    cache;
  - a 3x3 convolution is one matrix product: with M[(i, c), (j, d)] = kernel[i, j, c, d], rows i and columns j of the filter,

        y[h, w] = sum_j (sum_i x[h+i-1, w+j-1] M[i, j])     gather three rows, multiply, add up three columns

    XLA's own convolution is used for y and the input gradient in float32 on images larger than 4x4, where it is faster;
  - optimization barriers keep a normalization from recomputing per-channel values for every pixel.

Each function has a `jax.custom_jvp`. Its tangent consists of linear operations whose transposes, the gradients, are fast. So
derivatives of any order exist, in forward and reverse mode. `jax.checkpoint` saves the input for the backward pass instead of
values computed from it.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

BLOCK = 1024  # pixels per product in a gradient, so that its operands fit a core's cache
SMALL_IMAGE = 16  # pixels; up to this size XLA:CPU's float32 convolution is slower than a matrix product


@jax.custom_jvp
def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """x @ kernel."""
    return x @ kernel


@partial(matmul.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    along_x: Any = 0.0 if isinstance(dx, SymbolicZero) else dx @ kernel
    along_kernel: Any = 0.0 if isinstance(dkernel, SymbolicZero) else _product_with_tangent(x, dkernel)
    return x @ kernel, along_x + along_kernel


@jax.checkpoint
def _product_with_tangent(x, dkernel):
    """x @ dkernel."""
    pixels, (channels, features) = math.prod(x.shape[:-1]), dkernel.shape
    block = _block(pixels, BLOCK)
    blocks = x.reshape(pixels // block, block, channels)
    return _by_blocks(blocks, dkernel).swapaxes(1, 2).reshape(*x.shape[:-1], features)


def _by_blocks(blocks: Float[Array, "blocks P C"], dkernel: Float[Array, "C D"]) -> Float[Array, "blocks D P"]:
    """(block @ dkernel).T for each block. The gradient of dkernel sums products over the blocks, in float32."""
    turned = dkernel.T.astype(jnp.promote_types(dkernel.dtype, jnp.float32))
    turned = jax.lax.optimization_barrier(turned)  # keeps XLA from transposing the products' operands instead
    copies = jnp.broadcast_to(turned, (len(blocks), *turned.shape)).astype(blocks.dtype)
    products = jax.lax.dot_general(copies, blocks, (((2,), (2,)), ((0,), (0,))))
    return jax.lax.optimization_barrier(with_layout_constraint(products, Layout((0, 1, 2))))


@jax.custom_jvp
def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """sum_ij x[h+i-1, w+j-1] kernel[i, j], with zero padding."""
    return _convolution(x, kernel) if _xla_is_faster(x) else _columns_added(_rows_gathered(x) @ _as_matrix(kernel))


@partial(conv3x3.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    along_x: Any = 0.0 if isinstance(dx, SymbolicZero) else _convolution_of_tangent(dx, kernel)
    along_kernel: Any = 0.0 if isinstance(dkernel, SymbolicZero) else _convolution_with_tangent(x, dkernel)
    return conv3x3(x, kernel), along_x + along_kernel


def _convolution_of_tangent(dx, kernel):
    """conv3x3(dx, kernel)."""
    if not _xla_is_faster(dx):
        return _columns_added(_rows_concatenated(dx) @ _as_matrix(kernel))
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    like = jax.ShapeDtypeStruct((*dx.shape[:-1], kernel.shape[-1]), dx.dtype)
    return jax.linear_transpose(lambda g: _convolution(g, turned), like)(dx)[0]  # so its transpose is a plain convolution


@jax.checkpoint
def _convolution_with_tangent(x, dkernel):
    """conv3x3(x, dkernel)."""
    batch, height, width, channels = x.shape
    images = _block(batch, max(1, BLOCK // (height * width)))
    features, count = dkernel.shape[-1], batch // images
    blocks = _rows_gathered(x).reshape(count, images * height * width, 3 * channels)
    products = _by_blocks(blocks, _as_matrix(dkernel)).reshape(count, 3 * features, images, height, width)
    return _columns_added(products, 1, 4).swapaxes(0, 1).reshape(features, *x.shape[:3]).transpose(1, 2, 3, 0)


def _xla_is_faster(x: Array) -> bool:
    return x.dtype != jnp.bfloat16 and x.shape[1] * x.shape[2] > SMALL_IMAGE


def _convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _as_matrix(kernel: Array) -> Array:
    return kernel.swapaxes(1, 2).reshape(3 * kernel.shape[2], -1)


def _padded(x: Array, padding: dict[int, tuple[int, int]]) -> Array:
    """x padded with (before, after) zeros on each axis of `padding`; negative counts crop."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(*padding.get(axis, (0, 0)), 0) for axis in range(x.ndim)])


@jax.custom_jvp
def _rows_gathered(x: Float[Array, "B H W C"]) -> Float[Array, "B H W 3*C"]:
    """Rows h - 1, h and h + 1, with zero padding, concatenated as channels.

    Combines padded copies with a bitwise or, which is faster on XLA:CPU than a concatenation.
    """
    bits = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(x), f"uint{8 * x.dtype.itemsize}")
    size = x.shape[-1]
    first, second, third = (_padded(bits, {1: (1 - i, i - 1), 3: (i * size, (2 - i) * size)}) for i in range(3))
    return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(first | second | third, x.dtype))


@_rows_gathered.defjvp
def _(primals, tangents):
    ((x,), (dx,)) = primals, tangents
    return _rows_gathered(x), _rows_concatenated(dx)


def _rows_concatenated(dx):
    return jnp.concatenate([_padded(dx, {1: (1 - i, i - 1)}) for i in range(3)], -1)


def _columns_added(products: Array, channel_axis: int = 3, column_axis: int = 2) -> Array:
    """For each column w, the sum of the first third of the channels at w - 1, the second at w and the last at w + 1."""
    products, size = jax.lax.optimization_barrier(products), products.shape[channel_axis] // 3
    if products.dtype == jnp.bfloat16:  # its transpose is a concatenation; in float32 a sum of padded copies is faster
        columns = jnp.split(products, 3, channel_axis)
        first, second, third = (_padded(column, {column_axis: (1 - j, j - 1)}) for j, column in enumerate(columns))
    else:
        cuts = [{channel_axis: (-j * size, (j - 2) * size), column_axis: (1 - j, j - 1)} for j in range(3)]
        first, second, third = (_padded(products, cut) for cut in cuts)
    return first + second + third


def _block(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`, or `count` itself if this divisor is below a quarter of `most`."""
    divisor = next((size for size in range(min(count, most), 0, -1) if count % size == 0), 1)
    return divisor if 4 * divisor >= most else max(count, 1)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def group_norm(
    x: Float[Array, "B H W C"], scale: Float[Array, "1 1 1 C"], offset: Float[Array, "B 1 1 C"], groups: int
) -> Float[Array, "B H W C"]:
    """(x - mean) / deviation * scale + offset, with the mean and deviation of each group of channels."""
    mean, inverse = _mean_and_inverse(x, groups)
    slope, intercept = jax.lax.optimization_barrier((scale * inverse, offset - mean * (scale * inverse)))
    return x * slope + intercept


@group_norm.defjvp
def _(groups, primals, tangents):
    x, scale, offset = primals
    mean, inverse = _mean_and_inverse(x, groups)
    slope, intercept = jax.lax.optimization_barrier((scale * inverse, offset - mean * (scale * inverse)))
    return x * slope + intercept, _normalization_with_tangents(groups, x, scale, mean, inverse, *tangents)


@partial(jax.checkpoint, static_argnums=0)
def _normalization_with_tangents(groups, x, scale, mean, inverse, dx, dscale, doffset):
    distance, slope = x - mean, jax.lax.optimization_barrier(scale * inverse)
    level = slope * mean_of_groups(dx, groups)
    curve = slope * inverse**2 * mean_of_groups(distance * dx, groups)
    along, level = jax.lax.optimization_barrier((inverse * dscale - curve, doffset - level))
    return jax.lax.optimization_barrier(slope * dx + distance * along + level)


def _mean_and_inverse(x, groups):
    mean = mean_of_groups(x, groups)
    return mean, 1 / jnp.sqrt(mean_of_groups((x - mean) ** 2, groups) + 1e-6)


def mean_of_groups(x: Float[Array, "B H W C"], groups: int) -> Float[Array, "B 1 1 C"]:
    """The mean of each group over its pixels and channels, repeated for each of its channels."""
    batch, _, _, channels = x.shape
    means = x.mean((1, 2), keepdims=True).reshape(batch, 1, 1, groups, channels // groups).mean(-1)
    return jnp.repeat(means, channels // groups, -1)
