"""The diffusion process as pure functions: noising, what a network may predict, the training loss, the posterior.

With a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t), a^2 + s^2 = 1, noising the data x_0 is affine:

    x_t = a x_0 + s eps,  eps ~ N(0, I)                                             (4)  [Ho et al. 2020, eq. 4]

A network sees x_t and t and predicts x_0, eps or the velocity

    v = a eps - s x_0                                                               (5)  [Salimans & Ho 2022, sec. 4]

Given x_t, each of the three determines the others: solving (4) and (5),

    x_0 = (x_t - s eps) / a  =  a x_t - s v                                         (6)
    eps = (x_t - a x_0) / s  =  s x_t + a v                                         (7)
    v   = (a x_t - x_0) / s  =  (eps - s x_t) / a                                   (8)

Training minimizes the distance of the prediction to its target, at t uniform on 1..T [Ho et al. 2020, eq. 14].
Given both ends, x at an earlier time s < t is Gaussian as well [Ho et al. 2020, eqs. 6-7, there for s = t - 1]:

    beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s                                      (9)
    q(x_s | x_t, x_0) = N(k x_t + m x_0, w I)                                       (10)
      k = sqrt(alpha_bar_t / alpha_bar_s) (1 - alpha_bar_s) / (1 - alpha_bar_t)
      m = sqrt(alpha_bar_s) beta_{t|s} / (1 - alpha_bar_t)
      w = beta_{t|s} (1 - alpha_bar_s) / (1 - alpha_bar_t)

Arrays are [B, *shape] with any shape; t is [B]. A timestep outside 0..T gives NaN. Results have the data's
dtype, losses and variances at least float32; tables are cast to it, but at least to float32.
docs/derivation.md has the way to each equation.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from diffusion_jax.schedules import NoiseSchedule

TargetType = Literal["pred_x_0", "pred_eps", "pred_v"]
LossType = Literal["l2", "l1"]
Predict = Callable[[Array, Array], Any]
"""A network: predict(x_t, t) -> its target, of x_t's shape; or where it learns its variance, the target and a fraction f
for each element, by which the variance lies between its bounds in log space [Nichol & Dhariwal 2021, eq. 15]."""
Denoise = Callable[[Array, Array], Any]
"""denoise(x_t, t) -> x_0_hat, whatever the network underneath predicts; or x_0_hat and f."""


def q_sample(
    schedule: NoiseSchedule, x_0: Float[Array, "B *shape"], t: Int[Array, " B"], eps: Float[Array, "B *shape"]
) -> Float[Array, "B *shape"]:
    """x_t, the data x_0 noised to time t with the standard normal `eps` of the same shape, else ValueError (eq. 4)."""
    _check_shape("eps", eps, x_0)
    a, s = _signal_and_noise(schedule, t, x_0)
    return (a * x_0 + s * eps).astype(_float_dtype(x_0))


_CONVERSIONS = {  # (from, to): eqs. 6-8
    ("pred_eps", "pred_x_0"): lambda x_t, eps, a, s: (x_t - s * eps) / a,
    ("pred_v", "pred_x_0"): lambda x_t, v, a, s: a * x_t - s * v,
    ("pred_x_0", "pred_eps"): lambda x_t, x_0, a, s: (x_t - a * x_0) / s,
    ("pred_v", "pred_eps"): lambda x_t, v, a, s: s * x_t + a * v,
    ("pred_x_0", "pred_v"): lambda x_t, x_0, a, s: (a * x_t - x_0) / s,
    ("pred_eps", "pred_v"): lambda x_t, eps, a, s: (eps - s * x_t) / a,
}


def convert(
    schedule: NoiseSchedule,
    prediction: Float[Array, "B *shape"],
    x_t: Float[Array, "B *shape"],
    t: Int[Array, " B"],
    from_type: str,
    to_type: str,
) -> Float[Array, "B *shape"]:
    """The same prediction at x_t, told as another target type: "pred_x_0", "pred_eps" or "pred_v" (eqs. 6-8).

    At t = 0 x_t is x_0 and says nothing of eps or v, so "pred_x_0" converts to NaN there.
    Raises ValueError on an unknown type, or unless the prediction has x_t's shape.
    """
    _check_choice("target_type", from_type, get_args(TargetType))
    _check_choice("target_type", to_type, get_args(TargetType))
    _check_shape("prediction", prediction, x_t)
    if from_type == to_type:
        return prediction
    a, s = _signal_and_noise(schedule, t, x_t)
    return _CONVERSIONS[from_type, to_type](x_t, prediction, a, s).astype(jnp.result_type(x_t, prediction))


def make_denoiser(
    schedule: NoiseSchedule, predict: Predict, target_type: str = "pred_eps", clip: float | None = None
) -> Denoise:
    """denoise(x_t, t) -> x_0_hat from a network that predicts `target_type` (eq. 6); with f, if the network has it.

    `clip` bounds x_0_hat to [-clip, clip], in the units of the data; right for images scaled to [-1, 1], and it keeps
    pred_eps finite where eq. 6 divides by a ~ 1e-4. Raises ValueError on an unknown type or a `clip` that is not positive.
    """
    _check_choice("target_type", target_type, get_args(TargetType))
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")

    def denoise(x_t: Float[Array, "B *shape"], t: Int[Array, " B"]) -> Any:
        output = predict(x_t, t)
        x_0_hat = convert(schedule, with_fraction(output)[0], x_t, t, target_type, "pred_x_0")
        return with_prediction(output, x_0_hat if clip is None else jnp.clip(x_0_hat, -clip, clip))

    return denoise


def with_fraction(output: Any) -> tuple[Array, Array | float]:
    """What a network or denoiser returned, as a pair with f = 0 where it learns no variance; ValueError on unlike shapes."""
    if not isinstance(output, tuple):
        return output, 0.0
    if len(output) != 2 or output[0].shape != output[1].shape:
        raise ValueError(f"a prediction with a fraction must be a pair of one shape, got {[part.shape for part in output]}")
    return output


def with_prediction(output: Any, prediction: Array) -> Any:
    """The same output with another prediction, and its f if it has one."""
    return (prediction, output[1]) if isinstance(output, tuple) else prediction


def diffusion_loss(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    keys: Key[Array, " B"],
    target_type: str = "pred_eps",
    loss_type: str = "l2",
    weight: Float[np.ndarray, " times"] | None = None,
) -> Float[Array, "B *shape"]:
    """The unreduced training loss of each example, at its own t ~ Uniform{1..T} and eps ~ N(0, I) [Ho et al. 2020, eq. 14].

    Each example's t and eps come from its own key, so they do not depend on which batch or device it is in. The loss itself
    is `loss_at`, times weight[t] of a table over t = 0..T. Raises ValueError on an unknown type or a table of another length.
    """
    t, eps = _draw(schedule, x_0, keys)
    return _weighted(schedule, weight, t, loss_at(schedule, predict, x_0, t, eps, target_type, loss_type))


def min_snr_weight(schedule: NoiseSchedule, target_type: str = "pred_eps", cap: float = 5.0) -> Float[np.ndarray, " times"]:
    """The weights that make a squared loss that of x_0 times min(SNR_t, cap), SNR_t = alpha_bar_t / (1 - alpha_bar_t).

    So small t, where SNR_t is huge and x_0 all but seen, do not take the network from the others [Hang et al. 2023].
    Raises ValueError on an unknown type or a cap that is not positive.
    """
    _check_choice("target_type", target_type, get_args(TargetType))
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
    a_2, s_2 = schedule.alpha_bar, schedule.sqrt_one_minus_alpha_bar**2
    of_v = np.minimum(a_2, cap * s_2)  # the errors of v and eps are that of x_0 times 1 / s_2 and a_2 / s_2
    with np.errstate(invalid="ignore"):
        return {"pred_v": of_v, "pred_eps": of_v / a_2, "pred_x_0": np.where(s_2 > 0, of_v / s_2, cap)}[target_type]


def _weighted(schedule: NoiseSchedule, weight: Any, t: Array, loss: Array) -> Array:
    if weight is None:
        return loss
    if np.shape(weight) != (schedule.num_timesteps + 1,):
        raise ValueError(f"weight must have the shape {(schedule.num_timesteps + 1,)}, for t = 0..T, got {np.shape(weight)}")
    return _as_column(look_up(weight, t, loss), loss.ndim) * loss


def _draw(schedule: NoiseSchedule, x_0: Array, keys: Array, probabilities: ArrayLike | None = None) -> tuple[Array, Array]:
    """t of 1..T, uniform or with the `probabilities` given, and eps, for each example."""
    t_keys, eps_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    if probabilities is None:
        t = jax.vmap(lambda key: jax.random.randint(key, (), 1, schedule.num_timesteps + 1, jnp.int32))(t_keys)
    else:
        p = jnp.asarray(probabilities, jnp.float32)
        t = 1 + jax.vmap(lambda key: jax.random.choice(key, len(p), p=p))(t_keys).astype(jnp.int32)
    return t, jax.vmap(lambda key: jax.random.normal(key, x_0.shape[1:], jnp.result_type(x_0)))(eps_keys)


def loss_at(
    schedule: NoiseSchedule,
    predict: Predict,
    x_0: Float[Array, "B *shape"],
    t: Int[Array, " B"],
    eps: Float[Array, "B *shape"],
    target_type: str = "pred_eps",
    loss_type: str = "l2",
) -> Float[Array, "B *shape"]:
    """The distance of the network's prediction at x_t (eq. 4) to its target, per element and unweighted.

    "l2" is half the squared error, "l1" the absolute error. Raises ValueError on an unknown type, or unless eps and the
    prediction have x_0's shape.
    """
    _check_choice("target_type", target_type, get_args(TargetType))
    _check_choice("loss_type", loss_type, get_args(LossType))
    a, s = _signal_and_noise(schedule, t, x_0)
    target = {"pred_x_0": x_0, "pred_eps": eps, "pred_v": a * eps - s * x_0}[target_type]
    prediction, _ = with_fraction(predict(q_sample(schedule, x_0, t, eps), t))
    _check_shape("prediction", prediction, x_0)
    error = (prediction - target).astype(jnp.promote_types(_float_dtype(target), jnp.float32))
    return error**2 / 2 if loss_type == "l2" else jnp.abs(error)


def posterior_coefficients(
    schedule: NoiseSchedule, t: Int[np.ndarray, " S"], s: Int[np.ndarray, " S"]
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """k, m and w of q(x_s | x_t, x_0) = N(k x_t + m x_0, w I) for 0 <= s < t <= T, in float64 (eq. 10)."""
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    var_t, var_s = schedule.sqrt_one_minus_alpha_bar[t] ** 2, schedule.sqrt_one_minus_alpha_bar[s] ** 2
    beta = 1 - alpha_bar_t / alpha_bar_s
    return np.sqrt(alpha_bar_t / alpha_bar_s) * var_s / var_t, np.sqrt(alpha_bar_s) * beta / var_t, beta * var_s / var_t


def posterior(
    schedule: NoiseSchedule, x_0: Float[Array, "B *shape"], x_t: Float[Array, "B *shape"], t: Int[Array, " B"]
) -> tuple[Float[Array, "B *shape"], Float[Array, " B"]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0) for t in 1..T (eq. 10 with s = t - 1).

    Raises ValueError unless x_0 has x_t's shape.
    """
    _check_shape("x_0", x_0, x_t)
    times = np.arange(1, schedule.num_timesteps + 1)
    k, m, w = (look_up(column, t - 1, x_t) for column in posterior_coefficients(schedule, times, times - 1))
    mean = _as_column(k, x_t.ndim) * x_t + _as_column(m, x_t.ndim) * x_0
    return mean.astype(_float_dtype(x_t)), w


def _signal_and_noise(schedule: NoiseSchedule, t: Array, x: Array) -> tuple[Array, Array]:
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must have the shape {x.shape[:1]}, a timestep for each example, got {t.shape}")
    columns = schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar
    a, s = (look_up(column, t, x) for column in columns)
    return _as_column(a, x.ndim), _as_column(s, x.ndim)


def _float_dtype(x: ArrayLike) -> jnp.dtype:
    """Of x where it is floating point, in 32 bits unless JAX has 64 enabled; else float32."""
    dtype = jnp.result_type(x)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)


def look_up(table: ArrayLike, t: Int[Array, " B"], like: ArrayLike) -> Float[Array, " B"]:
    """table[t] in the dtype of `like`, of 32 bits at least, and sharded as t is; NaN where t is out of range."""
    table = jnp.asarray(table, jnp.promote_types(_float_dtype(like), jnp.float32))
    sharding = jax.typeof(t).sharding
    return table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding)


def _as_column(per_example: Array, ndim: int) -> Array:
    return per_example.reshape(-1, *(1,) * (ndim - 1))


def _check_shape(name: str, value: Array, like: Array) -> None:
    if value.shape != like.shape:  # else it might be broadcast, and be wrong without a word
        raise ValueError(f"{name} must have the shape of the data, {like.shape}, got {value.shape}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
