"""The core takes any network and any data: here both are plain JAX and NumPy, without Flax or the training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import diffusion_jax as dj

SCHEDULE = dj.cosine_schedule(20)


def plain_network(params, x_t, t):
    """Two layers by hand, over data of any shape."""
    flat = x_t.reshape(len(x_t), -1)
    time = t[:, None] / SCHEDULE.num_timesteps
    hidden = jnp.tanh(jnp.concatenate([flat, time, 1 - time], 1) @ params["in"])
    return (hidden @ params["out"] + flat @ params["skip"]).reshape(x_t.shape)


def test_a_plain_function_learns_plain_arrays():
    """Data on the line from -u to u: after training, samples lie on it, and one is as far from another as the data are."""
    size, shape, rng = 12, (3, 4), np.random.default_rng(0)
    u = rng.normal(size=size)
    data = (rng.choice([-1.0, 1.0], (64, 1)) * u / np.sqrt(np.mean(u**2))).reshape(64, *shape).astype(np.float32)
    weights = {"in": (size + 2, 64), "out": (64, size), "skip": (size, size)}
    params = {name: jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for name, s in weights.items()}
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 1500))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(carry, key):
        params, opt_state = carry
        loss = lambda params: dj.diffusion_loss(  # noqa: E731
            SCHEDULE, lambda x_t, t: plain_network(params, x_t, t), jnp.asarray(data), jax.random.split(key, 64), "pred_x_0"
        ).mean()
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, opt_state), jax.random.split(jax.random.key(0), 1500))
    denoise = dj.make_denoiser(SCHEDULE, lambda x_t, t: plain_network(params, x_t, t), "pred_x_0")
    samples = dj.sample(denoise, dj.ddim_table(SCHEDULE), jax.random.split(jax.random.key(1), 200), shape)
    distances = np.abs(np.asarray(samples)[:, None] - np.unique(data, axis=0)[None]).reshape(200, 2, -1).max(-1)
    assert (distances.min(1) < 0.3).mean() > 0.8  # 0.95 are; of noise, a fiftieth would be
    assert 0.3 < (distances.argmin(1) == 0).mean() < 0.7
