"""The layers in which the UNet spends its time, written as the products and passes over memory that a CPU runs fast.

XLA:CPU multiplies matrices at the machine's rate, but gradients of layers at a fourth of it: of x^T g over many pixels it runs
x^T slowly, and the filter gradient of a convolution is worse. So here

  - a product's gradient transposes x in memory first, in blocks of pixels whose products stay in cache;
  - a 3x3 convolution is one matrix product: with M[(i, c), (j, d)] = kernel[i, j, c, d], rows i and columns j of the filter,

        y[h, w] = sum_j (sum_i x[h+i-1, w+j-1] M[i, j])     gather three rows, multiply, add up three columns
        dx      = the same with M^T, columns gathered and rows added up;   dM = (gathered rows of x)^T (gathered columns of g)

    XLA's own convolution is faster for y and dx in float32 on images larger than 4x4;
  - a normalization is one affine map of x, and its gradient is written out in terms of x and g, since each array of that size
    that XLA keeps between the two passes, or reads once more, costs time; barriers keep it from that.

On GPU and TPU all are XLA's own. On a CPU they have no forward-mode derivative, like all that have a gradient of their own
(`jax.custom_vjp`).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, DTypeLike, Float

BLOCK = 1024  # pixels of one product in a gradient: its operands fit a core's cache
SMALL_IMAGE = 16  # pixels, up to which XLA:CPU's float32 convolution is slower than a matrix product


class Dense(nn.Module):
    """A linear map of the last axis (a 1x1 convolution of an image), computed in `dtype`."""

    features: int
    dtype: DTypeLike
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... features"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        y = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


class Conv3x3(nn.Module):
    """A 3x3 convolution of stride 1 with zeros beyond the edge and no bias, computed in `dtype`."""

    features: int
    dtype: DTypeLike
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype))


class GroupNorm(nn.Module):
    """Group normalization (Wu & He 2018) in up to 8 groups of 4 channels or more, and a shift of each example; in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], shift: Float[Array, "#B #C"] | float = 0.0) -> Float[Array, "B H W C"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        offset = jnp.broadcast_to(bias[None] + jnp.asarray(shift, jnp.float32), (len(x), x.shape[-1]))
        normalize = _group_norm if jax.default_backend() == "cpu" else lambda *operands: _group_norm_forward(*operands)[0]
        return normalize(x.astype(jnp.float32), scale[None, None, None], offset[:, None, None])


@jax.custom_vjp
def _group_norm(x, scale, offset):
    return _group_norm_forward(x, scale, offset)[0]


def _group_norm_forward(x, scale, offset):
    mean = _over_group(x.mean((1, 2), keepdims=True))
    inverse = 1 / jnp.sqrt(_over_group(((x - mean) ** 2).mean((1, 2), keepdims=True)) + 1e-6)
    slope, intercept = _barrier((scale * inverse, offset - mean * (scale * inverse)))
    return x * slope + intercept, (x, scale, mean, inverse)


def _group_norm_backward(saved, g):
    x, scale, mean, inverse = saved
    g = _barrier(g)
    along, total = _barrier((inverse * (g * (x - mean)).sum((1, 2), keepdims=True), g.sum((1, 2), keepdims=True)))
    level, curve = (_over_group(scale * part) / math.prod(x.shape[1:3]) for part in (total, along))
    slope, level, curve = _barrier((scale * inverse, level * inverse, curve * inverse**2))
    return slope * g - level - (x - mean) * curve, along.sum(0, keepdims=True), total


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _over_group(x: Float[Array, "B 1 1 C"]) -> Float[Array, "B 1 1 C"]:
    """Each channel's mean over its group."""
    channels = x.shape[-1]
    groups = next(n for n in (8, 4, 2, 1) if n == 1 or (channels % n == 0 and channels >= 4 * n))
    return jnp.repeat(x.reshape(len(x), 1, 1, groups, -1).mean(-1), channels // groups, -1)


def _barrier(arrays):
    """The same, computed once: XLA:CPU may else compute them anew in each operation that reads them, or for each pixel."""
    return jax.lax.optimization_barrier(arrays) if jax.default_backend() == "cpu" else arrays


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x sigmoid(x) (Elfwing et al. 2018), by way of tanh, which costs a CPU half of exp and a division; in float32 inside."""
    half = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / 2
    return (half * (1 + jnp.tanh(half))).astype(x.dtype)


def matmul(x: Float[Array, "... C"], kernel: Float[Array, "C D"]) -> Float[Array, "... D"]:
    """x @ kernel."""
    return _matmul(x, kernel) if jax.default_backend() == "cpu" else x @ kernel


@jax.custom_vjp
def _matmul(x, kernel):
    return x @ kernel


def _matmul_backward(saved, g):
    x, kernel = saved
    return g @ kernel.T, _outer_sum(_transposed(x, _block(math.prod(x.shape[:-1]), BLOCK)), g).astype(kernel.dtype)


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def conv3x3(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B H W D"]:
    """sum_ij x[h+i-1, w+j-1] kernel[i, j], with zeros beyond the edge."""
    return _conv3x3(x, kernel) if jax.default_backend() == "cpu" else _xla_convolution(x, kernel)


@jax.custom_vjp
def _conv3x3(x, kernel):
    if _xla_is_faster(x):
        return _xla_convolution(x, kernel)
    before, same, after = jnp.split(_gathered(x, 1, 3) @ _as_matrix(kernel), 3, -1)
    return _padded(before, {2: (1, -1)}) + same + _padded(after, {2: (-1, 1)})


def _conv3x3_backward(saved, g):
    x, kernel = saved
    columns = _gathered(g, 2, 3, -1)
    if _xla_is_faster(x):
        dx = _xla_convolution(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
    else:
        after, same, before = jnp.split(columns @ _as_matrix(kernel).T, 3, -1)
        dx = _padded(before, {1: (1, -1)}) + same + _padded(after, {1: (-1, 1)})
    batch, height, width, channels = x.shape
    images = _block(batch, max(1, BLOCK // (height * width)))
    blocks = _transposed(x, images * height * width).reshape(-1, channels, images, height, width)
    matrix = _outer_sum(_gathered(blocks, 3, 1).reshape(-1, 3 * channels, images * height * width), columns)
    return dx, matrix.reshape(3, channels, 3, -1).swapaxes(1, 2).astype(kernel.dtype)


_conv3x3.defvjp(lambda x, kernel: (_conv3x3(x, kernel), (x, kernel)), _conv3x3_backward)


def _xla_is_faster(x: Array) -> bool:
    return x.dtype != jnp.bfloat16 and x.shape[1] * x.shape[2] > SMALL_IMAGE


def _xla_convolution(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _as_matrix(kernel: Array) -> Array:
    return kernel.swapaxes(1, 2).reshape(3 * kernel.shape[2], -1)


def _padded(x: Array, padding: dict[int, tuple[int, int]]) -> Array:
    """x with so many zeros before and after it on each axis of `padding`, or without so many elements where negative."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(*padding.get(axis, (0, 0)), 0) for axis in range(x.ndim)])


def _gathered(x: Array, axis: int, along: int, step: int = 1) -> Array:
    """x[i - step], x[i] and x[i + step] of `axis`, with zeros beyond the edge, side by side `along` another one.

    Joined as a union of bits, which XLA:CPU writes twice as fast as a concatenation, behind a barrier on x, without which it
    would compute x anew for each part. The barrier on the result keeps what reads it from being fused with it.
    """
    bits, size = jax.lax.bitcast_convert_type(_barrier(x), f"uint{8 * x.dtype.itemsize}"), x.shape[along]
    moves = enumerate((step, 0, -step))
    first, second, third = (_padded(bits, {axis: (by, -by), along: (place * size, (2 - place) * size)}) for place, by in moves)
    return _barrier(jax.lax.bitcast_convert_type(first | second | third, x.dtype))


def _block(count: int, most: int) -> int:
    """The largest divisor of `count` up to `most`; `count` itself where that would make blocks too small to be worth it."""
    divisor = next((size for size in range(min(count, most), 0, -1) if count % size == 0), 1)
    return divisor if 4 * divisor >= most else max(count, 1)


def _transposed(x: Float[Array, "*pixels C"], block: int) -> Float[Array, "blocks C block"]:
    """Blocks of pixels, with each channel's contiguous in memory."""
    x = x.reshape(-1, block, x.shape[-1]).swapaxes(1, 2)
    return _barrier(with_layout_constraint(x, Layout((0, 1, 2))))


def _outer_sum(x_transposed: Float[Array, "blocks C block"], g: Float[Array, "*pixels D"]) -> Float[Array, "C D"]:
    """The sum of x^T g over all pixels, added up across blocks in float32 at least."""
    blocks, _, block = x_transposed.shape
    products = jax.lax.dot_general(x_transposed, g.reshape(blocks, block, g.shape[-1]), (((2,), (1,)), ((0,), (0,))))
    return products.sum(0, dtype=jnp.promote_types(g.dtype, jnp.float32))
