"""Diffuse 48 coins, of which exactly 36 show heads. Takes half a minute on a CPU.

python experiments/coins.py
"""

import support.terminal  # isort: skip  # noqa: F401

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

import diffusion_jax as dj
from support import vectors
from support.command_line import one_line_errors, parse_command_line
from support.figures import save_coins_figure
from support.machine import prepare_machine
from support.workdir import one_line_if_unwritable

COINS, HEADS = 48, 36
NUM_TIMESTEPS = 100
TARGET_TYPE = "pred_v"  # with the original's pred_x_0, samples have 42.6 ± 1.8 heads
NUM_SHOWN = 2000


def draw_coins(key: Key[Array, ""]) -> Float[Array, " 48"]:
    """1 for each head and -1 for each tail, in a random order."""
    return jax.random.permutation(key, jnp.where(jnp.arange(COINS) < HEADS, 1.0, -1.0).astype(jnp.float32))


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(vectors.Config(embed_dim=96, learning_rate=1e-3, workdir="runs/coins"), __doc__)
        schedule = dj.cosine_schedule(NUM_TIMESTEPS)
        workdir, train = vectors.set_up(config, draw_coins, schedule, TARGET_TYPE)

    denoise = dj.make_denoiser(schedule, train(), TARGET_TYPE)
    _, keys = vectors.examples(config, draw_coins, NUM_SHOWN)
    samples = jax.jit(lambda keys: dj.sample(denoise, dj.ancestral_table(schedule, "lower_bound"), keys, (COINS,)))(keys)
    heads = np.asarray((samples > 0).sum(1))
    prior = np.random.default_rng(config.seed).binomial(COINS, 0.5, NUM_SHOWN)
    with one_line_if_unwritable(workdir):
        save_coins_figure(workdir / "figure.png", heads, prior, HEADS)
    print(
        f"heads of {COINS}: samples {heads.mean():.2f} ± {heads.std():.2f}, exactly {HEADS} in {np.mean(heads == HEADS):.0%};"
    )
    print(f"fair coins {prior.mean():.2f} ± {prior.std():.2f}, exactly {HEADS} in {np.mean(prior == HEADS):.0%}")
    print(f"wrote {workdir / 'figure.png'}", file=sys.stderr)


if __name__ == "__main__":
    main()
