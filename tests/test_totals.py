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


@pytest.mark.parametrize("conditions", data.CONDITIONS.values())
def test_features_tell_sums_apart(conditions):
    """A log and three waves of it follow the features of the particle, the same as without it."""
    c, log = jnp.linspace(-1, 1, conditions), np.log(500) / 2 - 2
    given = totals.with_sum(c, jnp.float32(500))
    found, without = (np.asarray(data.features(c, DETECTORS["zp"])) for c in (given, c))
    expected = [log, *np.sin([log, 2 * log, 4 * log]), *np.cos([log, 2 * log, 4 * log])]
    np.testing.assert_array_equal(*(data.vicinity(c, DETECTORS["zp"], 4)[1] for c in (given, c)))
    if conditions == 14:
        np.testing.assert_array_equal(found[:-7], without)
        np.testing.assert_allclose(found[-7:], expected, rtol=1e-4, atol=1e-5)


def constant(value):
    """A network of the path that returns what it is given of the particle."""
    return lambda x, t, c: value + 0 * x + c[-1]


def test_a_network_is_given_the_sum():
    """In training that of the counts, in sampling one from P(S | c), in both as one condition more."""
    net, numbers, p = mixture()
    model = totals.SumFirst(net, constant(0.0))
    counts, c = np.random.default_rng(0).poisson(1.5, (5, 6, 7)), jnp.zeros((5, 3))
    nats, given = model.known(jnp.float32(counts), c)
    sums = counts.sum((1, 2))
    assert nats == pytest.approx(-np.log(p[sums - numbers[0]]).mean(), rel=2e-3)
    np.testing.assert_allclose(given[:, 3], np.log(sums) / 2 - 2, rtol=1e-5)
    assert model(jnp.zeros(4), 0.5, c[0], jnp.float32(500))[2] == pytest.approx(np.log(500) / 2 - 2)
    drawn = model.draw(jnp.zeros((4000, 3)), KEY)
    expected = np.log(totals.draw_totals(net, jnp.zeros((4000, 3)), KEY)) / 2 - 2
    np.testing.assert_allclose(drawn[:, 3], expected, rtol=1e-5)
    assert model.with_least(np.array([40, 7])).totals.low == 7


def test_a_published_network_is_not():
    model, c = totals.SumFirst(None, constant(1.0)), jnp.ones((5, 3))
    assert model.known(jnp.ones((5, 2, 2)), c)[0] == 0 and model.with_least(np.array([7])) is model
    assert model.draw(c, KEY) is c and (model(jnp.zeros(4), 0.5, c[0], 500) == 2).all()
