"""Parity with the samplers of diffusers, k-diffusion and EDM, and with flow_matching's loss (tests/reference/README.md)."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from walks import PEERS, denoiser, walk

import diffusion_jax as dj
from diffusion_jax import solvers

TABLES = {
    "unipc-bh2-2-zero": dj.unipc_table,
    "unipc-bh2-3-zero": partial(dj.unipc_table, order=3),
    "dpmpp-2-midpoint-zero": dj.dpm_solver_table,
    "dpmpp-3-midpoint-zero": partial(dj.dpm_solver_table, order=3),
    "deis-2-sigma_min-full": partial(dj.deis_table, order=2),
    "deis-3-sigma_min-full": dj.deis_table,
    "k-2m": dj.dpm_solver_table,
    "k-heun": dj.heun_table,
    "k-2m-sde-midpoint": partial(dj.dpm_solver_table, eta=1.0),
    "k-3m-sde-eta0": partial(dj.dpm_solver_table, order=3),
    "k-3m-sde-eta1": partial(dj.dpm_solver_table, eta=1.0, order=3),
    "edm": dj.heun_table,
    "edm-churn8": partial(dj.heun_table, churn=8.0, churn_range=(0.05, 50.0), churn_noise=1.003),
    "edm-churn3": partial(dj.heun_table, churn=3.0, churn_range=(0.05, 50.0), churn_noise=1.003),
}


ours = solvers._weights


def weights_of_3m(nodes, step, zeta, variable="log_snr", exact=False, two_exact=False):
    """Ours, but that the peers' 3M gives its second difference half of a polynomial's weight, so that its order is 2, and that
    k-diffusion's second step integrates its line exactly."""
    if len(nodes) < 3:
        return ours(nodes, step, zeta, variable, two_exact)
    moments = [scipy.integrate.quad(lambda x, k=k: x**k * np.exp(zeta * (x - 1)), 0, 1, epsabs=1e-14)[0] for k in range(3)]
    moments = np.array(moments) / moments[0] * [1, 1, 1 / 2]
    return np.linalg.solve(((nodes - step[0]) / (step[1] - step[0]))[None, :] ** np.arange(3)[:, None], moments)


@pytest.mark.parametrize("name", TABLES)
def test_samples_of_peers(name, monkeypatch):
    if "3m" in name or "dpmpp-3" in name:
        monkeypatch.setattr(solvers, "_weights", partial(weights_of_3m, two_exact="k-3m" in name))
    entry = PEERS["samplers"][name]
    sigma = np.array(entry["sigmas"])[::-1]
    last = sigma[0]
    extra = 2 if last > 0 or "k-3m" in name else 0  # rows after the peer's last but one, whose order is not lowered there
    sigma = np.concatenate([[0, sigma[sigma > 0][0] / 2], sigma[sigma > 0]]) if extra else sigma
    scale = np.sqrt(1 + sigma**2) if entry["coordinates"] == "vp" else np.ones_like(sigma)
    schedule = dj.schedule_from_columns(1 / scale, sigma / scale)
    table = TABLES[name](schedule)
    noises = np.zeros((len(table.t), 8, 2))
    given = np.array(entry.get("noises", np.zeros((0, 8, 2))))
    if "edm" in name:  # the noise before step i is added by the second row of step i - 1
        noises[1::2] = given[1:] if len(given) else 0
    else:
        noises[: len(given)] = given
    end = walk(table, denoiser(schedule), np.array(entry["start"]), noises)[len(table.t) - extra]
    end = denoiser(schedule)(end, 2) if extra and last == 0 else end
    np.testing.assert_allclose(end, entry["samples"], atol=1e-4 if "churn" in name else 1e-8)


def test_the_loss_of_flow_matching():
    """Their time runs from noise to data, and their velocity is minus ours."""
    entry = {name: jnp.asarray(value) for name, value in PEERS["flow_matching"].items() if name != "what"}
    schedule, t = dj.flow_schedule(100), 100 * (1 - entry["t"])
    np.testing.assert_allclose(dj.q_sample(schedule, entry["data"], t, entry["noise"]), entry["x_t"], atol=1e-5)
    zero = lambda x_t, t: 0 * x_t  # noqa: E731
    loss = dj.loss_at(schedule, zero, entry["data"], t, entry["noise"], "pred_u")
    np.testing.assert_allclose(2 * loss, entry["dx_t"] ** 2, atol=1e-4)
    np.testing.assert_allclose(2 * loss.mean(), entry["loss"], rtol=1e-6)
