"""Guidance and editing with a trained network: inpainting, image to image, encoding and interpolation.

Nothing here has its own loop. `guided` and `inpainting` wrap a network or denoiser; `resampled`, `part_way` and
`encoding_table` make tables for `sample` and `sample_trajectory` (eq. 8).
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.diffusion import Denoise, Predict, check_shape, with_fraction, with_prediction
from diffusion_jax.sampling import SamplerTable, Steps, as_times, make_table
from diffusion_jax.schedules import NoiseSchedule


def guided(conditional: Predict, unconditional: Predict, scale: ArrayLike) -> Predict:
    """Classifier-free guidance, u + scale (c - u), for the conditional and unconditional predictions c and u (eq. 17) [Ho &
    Salimans 2022, eq. 6, where scale = 1 + w].

    A scale of 1 gives the conditional network. A larger scale gives samples that match the condition better but vary less. All
    target types give the same result. A learned variance is the conditional network's. `scale` may be an array that broadcasts
    to the prediction, such as [B, 1, 1, 1]. Raises ValueError unless scale >= 0, except if it is traced.
    """
    if not isinstance(scale, Tracer) and not np.all(np.asarray(scale) >= 0):
        raise ValueError(f"the guidance scale must be at least 0, got {scale}")

    def predict(x_t, t):
        output, (without, _) = conditional(x_t, t), with_fraction(unconditional(x_t, t))
        prediction = without + scale * (with_fraction(output)[0] - without)
        return with_prediction(output, prediction)

    return predict


def inpainting(denoise: Denoise, known: ArrayLike, mask: ArrayLike) -> Denoise:
    """Wrap `denoise` to return `known` in place of x_0_hat where `mask` is true. Both must broadcast to x_0_hat's shape.

    Samples then equal `known` exactly there. On the way, DDIM and ancestral sampling with the lower bound give the known part
    the forward process's noise at each t; the upper bound makes it slightly noisier. `resampled` makes the rest agree with it.
    Raises ValueError unless the mask is boolean, and unless both broadcast to x_0_hat's shape.
    """
    if jnp.asarray(mask).dtype != bool:
        raise ValueError(f"the mask must be boolean, true where the data is known, got {jnp.asarray(mask).dtype}")

    def replaced(x_t, t):
        output = denoise(x_t, t)
        x_0_hat, _ = with_fraction(output)
        x_0_hat = jnp.where(mask, jnp.asarray(known, x_0_hat.dtype), x_0_hat)
        check_shape("the known part", x_0_hat, x_t)
        return with_prediction(output, x_0_hat)

    return replaced


def resampled(schedule: NoiseSchedule, table: SamplerTable, times: int) -> SamplerTable:
    """Take each step but the last `times` times, noising back to t in between [Lugmayr et al. 2022, alg. 1].

    A step from t to s and the forward process back to t make one affine step (eq. 18), so a repetition is one row and one
    network call. Use it with the upper bound's noise: with less, repetitions reduce the variance of the unknown part.
    Raises ValueError unless `times` is a whole number of at least 1, and if the table's times increase or its steps use an
    earlier x_0_hat or a learned variance.
    """
    if not (times >= 1 and times % 1 == 0):
        raise ValueError(f"times must be a whole number of at least 1, got {times}")
    if np.any(table.d) or np.any(table.r):
        raise ValueError("steps that use a learned variance or an earlier x_0_hat cannot be resampled: use ancestral or DDIM")
    _check_goes_down(table)
    (signal_t, noise_t), (signal_s, noise_s) = schedule.at(table.t[:-1]), schedule.at(table.t[1:])
    up = signal_t / signal_s
    c = np.sqrt(noise_t**2 - (up * noise_s) ** 2 + (up * table.c[:-1]) ** 2)
    rounds = make_table(schedule, table.t[:-1], up * table.a[:-1], up * table.b[:-1], c)

    def interleaved(again: np.ndarray, step: np.ndarray) -> np.ndarray:
        rows = np.stack([again] * (int(times) - 1) + [step[:-1]], axis=1)
        return np.concatenate([rows.reshape(-1, *step.shape[1:]), step[-1:]])

    return SamplerTable(*map(interleaved, rounds, table))


def part_way(table: SamplerTable, t: int | float) -> SamplerTable:
    """The rows of a table that start at times of at most t. Start sampling from data noised to the first of these, `.t[0]`.

    Steps that use values from removed rows use their own instead. This lowers UniPC's order; a new table for the remaining
    times does not. Raises ValueError if no row remains, or if the table's times increase.
    """
    _check_goes_down(table)
    rest = SamplerTable(*(column[(table.t <= t) & (table.t > 0)] for column in table))
    if len(rest.t) == 0:
        raise ValueError(f"the table must have a step from t = {t} or below, and its last is from {table.t[table.t > 0][-1]}")
    for i in range(min(len(rest.t), rest.d.shape[1])):  # there are no values from before the first row: step i uses its own
        missing = rest.d[i, i:].sum()
        rest.a[i] += missing * rest.e[i]
        rest.b[i] += missing * rest.f[i]
        rest.d[i, i:] = 0
    return rest


def _check_goes_down(table: SamplerTable) -> None:
    rises = np.diff(table.t) > 0
    if np.any(rises):
        row = int(np.argmax(rises))
        raise ValueError(f"the table's times must go down, from noise to data, got {table.t[row]} before {table.t[row + 1]}")


def encoding_table(schedule: NoiseSchedule, sampling_timesteps: Steps = None) -> SamplerTable:
    """DDIM in reverse, from an image to the noise that DDIM at eta = 0 turns into it (eq. 9) [Song et al. 2021, sec. 4.3].

    Pass the image to `sample` as `start`; the result is x_T. The first step calls the network on the image at the lowest t
    above 0. Encoding and decoding give the image back only in the limit of many steps. Raises ValueError on steps outside 1..T.
    """
    times = as_times(schedule, sampling_timesteps)[::-1]
    signal, noise = schedule.at(times)
    t = np.concatenate([times[1:2], times[1:-1]])  # where each step calls the network for eps_hat
    signal_there, noise_there = schedule.at(t)
    on_eps = noise[1:] - signal[1:] / signal[:-1] * noise[:-1]  # x_s = (signal_s / signal_start) x_start + on_eps eps_hat
    return make_table(schedule, t, signal[1:] / signal[:-1] + on_eps / noise_there, -on_eps * signal_there / noise_there)


def spherical(x: Float[Array, "*shape"], y: Float[Array, "*shape"], share: ArrayLike) -> Float[Array, "*shape"]:
    """Spherical interpolation from x (`share` 0) to y (`share` 1), which keeps the norm of noise [Shoemake 1985].

    x and y are single points of any shape, not batches. The result is NaN for opposite points, where the path is not unique.
    Raises ValueError unless `share` is one number.
    """
    if jnp.ndim(share) != 0:
        raise ValueError(f"share must be one number, got the shape {jnp.shape(share)}")
    towards_x, towards_y = x / jnp.linalg.norm(x), y / jnp.linalg.norm(y)
    apart, together = jnp.linalg.norm(towards_x - towards_y), jnp.linalg.norm(towards_x + towards_y)
    angle = jnp.where(together == 0, jnp.nan, 2 * jnp.arctan2(apart, together))

    def weight(part: Array) -> Array:
        """sin(part angle) / sin(angle), or its limit `part` at angle 0."""
        return part * jnp.sinc(part * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    share = jnp.asarray(share, angle.dtype)
    return weight(1 - share) * x + weight(share) * y
