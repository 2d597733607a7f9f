"""totals.py: the distribution of photon sums against scipy, draws from it, a training."""
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import data
import totals
from simulator import CUT, DETECTORS

KEY = jax.random.key(0)


class Fixed(eqx.Module):
    """Totals that do not look at the particle."""
    values: jax.Array
    low: int

    def __call__(self, c):
        return self.values


def mixture(low=10):
    """Two logistic distributions of log S, cut below `low`: a network, S = low .. 6000, and P(S) by scipy."""
    weights, places, scales, numbers = np.array([0.3, 0.7]), [2.0, 6.0], [0.4, 0.1], np.arange(low, 6000)
    cdf = lambda s, k: stats.logistic.cdf(np.log(s), places[k], scales[k])
    p = sum(w * (cdf(numbers + 0.5, k) - cdf(numbers - 0.5, k)) / (1 - cdf(low - 0.5, k))
            for k, w in enumerate(weights))
    values = jnp.asarray(np.stack([np.log(weights), places, np.log(scales)]), jnp.float32)
    return Fixed(values, low), numbers, p


@pytest.mark.parametrize("low", [1, 10])
def test_likelihood_of_sums(low):
    net, numbers, p = mixture(low)
    nats = np.float64(jax.vmap(lambda total: totals.sum_nll(net, total, None))(np.float32(numbers)))
    assert np.exp(-nats).sum() == pytest.approx(1, abs=2e-3)
    np.testing.assert_allclose(nats[[0, 1, 47, 393, 1190]], -np.log(p[[0, 1, 47, 393, 1190]]), rtol=2e-3)


@pytest.mark.parametrize("low", [1, 10])
def test_sums_are_drawn_from_that_distribution(low):
    net, numbers, p = mixture(low)
    drawn = np.sort(np.asarray(totals.draw_totals(net, jnp.zeros((20_000, 3)), KEY)))
    assert drawn[0] >= low and (drawn == np.round(drawn)).all()
    ranks = np.searchsorted(numbers, drawn, side="right") - 1
    found = np.searchsorted(drawn, numbers[ranks], side="right") / 20_000
    assert np.abs(np.cumsum(p)[ranks] - found).max() < 0.015


def test_least_total():
    """At least 1, at most the cut of the papers' data."""
    responses = np.array([[[4, 3]], [[60_000, 60_000]]], np.uint16)
    least = lambda part: totals.least_total(data.photon_sums(part)).item()
    assert least(responses) == 7 and least(responses[1:]) == CUT and least(0 * responses) == 1


def test_the_network_learns_a_distribution():
    """Two particles, of 20 and of about 500 photons."""
    rng, kind = np.random.default_rng(0), np.arange(1024) % 2
    sums = jnp.float32(np.where(kind, rng.poisson(500, 1024), 20))
    c = jnp.float32((2.0 * kind - 1)[:, None] * np.ones(14))
    net, optimiser = totals.Totals(DETECTORS["zn"], 14, KEY, width=32), optax.adam(5e-3)
    loss = lambda net: jax.vmap(partial(totals.sum_nll, net))(sums, c).mean()

    @eqx.filter_jit
    def step(net, state):
        updates, state = optimiser.update(eqx.filter_grad(loss)(net), state)
        return eqx.apply_updates(net, updates), state
    state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(300):
        net, state = step(net, state)
    drawn = np.asarray(totals.draw_totals(net, c, KEY))
    assert np.median(drawn[kind == 0]) == pytest.approx(20, abs=1.5)
    assert drawn[kind == 1].mean() == pytest.approx(500, rel=0.1) and net.low == CUT


def test_features_tell_sums_apart():
    """A log and three waves of it."""
    log = np.log(500) / 2 - 2
    expected = [log, *np.sin([log, 2 * log, 4 * log]), *np.cos([log, 2 * log, 4 * log])]
    np.testing.assert_allclose(totals.sum_features(jnp.float32(500)), expected, rtol=1e-4, atol=1e-5)
    assert len(expected) == totals.SUM_FEATURES
