"""What a trained network can be asked for beyond a sample: a class, a part that is given, a likeness, a way between two images.

Nothing here has a loop of its own. A class and a given part wrap the network's callable; a likeness, a way back to the noise
and more rounds around a given part are tables for `sample` and `sample_trajectory` (eq. 8).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from diffusion_jax.diffusion import Denoise, Predict, check_shape, with_fraction, with_prediction
from diffusion_jax.sampling import SamplerTable, Steps, as_times, make_table
from diffusion_jax.schedules import NoiseSchedule


def guided(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance: without + scale (with - without) [Ho & Salimans 2022, eq. 6, where 1 + w = scale].

    1 is the conditional network, more is truer to the condition and less varied (eq. 17). It is the same for each target type,
    since eq. 5 is affine. A learned variance is the conditional one's. Raises ValueError unless the scale is at least 0.
    """
    if not scale >= 0:
        raise ValueError(f"the guidance scale must be at least 0, got {scale}")

    def predict(x_t, t):
        output, (without, _) = conditional(x_t, t), with_fraction(unconditional(x_t, t))
        prediction = without + scale * (with_fraction(output)[0] - without)
        return with_prediction(output, prediction)

    return predict


def inpainting(denoise: Denoise, known: ArrayLike, mask: ArrayLike) -> Denoise:
    """The denoiser that knows `known` where `mask` is true: x_0_hat, against whose shape both broadcast, is replaced there.

    Sampling then ends at the known part exactly. On the way, DDIM and ancestral sampling with the lower bound keep it as noisy
    as the forward process has it at each t; the upper bound a little noisier. `resampled` lets the rest agree with it.
    Raises ValueError unless the mask is boolean, and both broadcast against x_0_hat without making it larger.
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
    """Each step but the last taken `times` times, with the noise of the step put back in between [Lugmayr et al. 2022, alg. 1].

    A step from t to s and the forward process back to t are together affine (eq. 18), so a round is a row and costs one network
    call. Rounds need the noise of the upper bound: with less, they take variance from the part that is not given.
    Raises ValueError unless `times` is a whole number from 1 on, and the table's steps go down, need no x_0_hat before them
    and no learned variance.
    """
    if not (times >= 1 and times % 1 == 0):
        raise ValueError(f"each step must be taken at least once, and a whole number of times, got {times}")
    if np.any(table.d) or np.any(table.r):
        raise ValueError("steps with a learned variance or an x_0_hat before them cannot be taken again: use ancestral or DDIM")
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
    """The rows of a table that leave times of at most t. Begin at data noised to the first of them, which is `.t[0]`.

    Steps that take values from before the first of them use their own instead, at a loss of order for UniPC; a table of the
    remaining times has none. Raises ValueError if there is none, or if the table's steps do not go down.
    """
    _check_goes_down(table)
    rest = SamplerTable(*(column[(table.t <= t) & (table.t > 0)].copy() for column in table))
    if len(rest.t) == 0:
        raise ValueError(f"the table must have a step from t = {t} or below, and its last is from {table.t[table.t > 0][-1]}")
    for i in range(min(len(rest.t), rest.d.shape[1])):  # nothing is kept from before the first step: take what step i has
        missing = rest.d[i, i:].sum()
        rest.a[i] += missing * rest.e[i]
        rest.b[i] += missing * rest.f[i]
        rest.d[i, i:] = 0
    return rest


def _check_goes_down(table: SamplerTable) -> None:
    if np.any(np.diff(table.t) > 0):
        raise ValueError("the table's timesteps must go down, from noise to data; these go up")


def encoding_table(schedule: NoiseSchedule, sampling_timesteps: Steps = None) -> SamplerTable:
    """DDIM's steps upwards, from an image to the noise that DDIM at eta = 0 takes to it (eq. 9) [Song et al. 2021, sec. 4.3].

    Begin at the image (`start=`); what comes out is x_T. The first step takes the image for an x_t at the lowest t above 0. The
    way there and back is exact in the limit of many steps only. Raises ValueError on steps outside 1..T.
    """
    times = as_times(schedule, sampling_timesteps)[::-1]
    signal, noise = schedule.at(times)
    t = np.concatenate([times[1:2], times[1:-1]])  # where each step calls the network; eps_hat is of there
    signal_t, noise_t = schedule.at(t)
    on_eps = noise[1:] - signal[1:] / signal[:-1] * noise[:-1]  # x_s = (signal_s / signal_t) x_t + on_eps eps_hat
    return make_table(schedule, t, signal[1:] / signal[:-1] + on_eps / noise_t, -on_eps * signal_t / noise_t)


def spherical(x: Float[Array, "*shape"], y: Float[Array, "*shape"], share: ArrayLike) -> Float[Array, "*shape"]:
    """The point at `share` (0 to 1) of the way from x to y along a great circle, as far from 0 as noise is [Shoemake 1985].

    x and y are one point each, whatever their shape, and not a batch; between opposite ones there is no one way, and so NaN.
    Raises ValueError unless `share` is one number.
    """
    if jnp.ndim(share) != 0:
        raise ValueError(f"share must be one number, got the shape {jnp.shape(share)}")
    towards_x, towards_y = x / jnp.linalg.norm(x), y / jnp.linalg.norm(y)
    apart, together = jnp.linalg.norm(towards_x - towards_y), jnp.linalg.norm(towards_x + towards_y)
    angle = jnp.where(together == 0, jnp.nan, 2 * jnp.arctan2(apart, together))

    def weight(part: Array) -> Array:
        """sin(part angle) / sin(angle), also where that is 0 / 0."""
        return part * jnp.sinc(part * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    share = jnp.asarray(share, angle.dtype)
    return weight(1 - share) * x + weight(share) * y
