"""checkerboard.py: probabilities of whole responses, and draws that follow them."""
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare, poisson

import data
from checkerboard import COLOURS, ODDS, Checkerboard

KEY = jax.random.key(0)


def random_net(shape, size, width=6, scale=0.7):
    net = eqx.filter_eval_shape(Checkerboard, width, shape, size, KEY)
    rng = np.random.default_rng(0)
    fill = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)
    return jax.tree.map(lambda leaf: fill(leaf) if hasattr(leaf, "shape") else leaf, net)


@pytest.mark.parametrize("shape, size", [((12, 12), 4), ((14, 10), 4), ((14, 10), 8)])
def test_colours_cover_the_response_once(shape, size):
    net, x = random_net(shape, size), np.random.default_rng(0).normal(size=shape).astype(np.float32)
    again = np.full(shape, np.nan, np.float32)
    for k, (i, j) in enumerate(COLOURS):
        again[i::2, j::2] = net.picture(net.patches(jnp.asarray(x), k), k)
    np.testing.assert_array_equal(again, x)


def log_probability(net, h, counts):
    """log P of counts (H, W), without the Poisson term of the loss."""
    rates = np.zeros(net.shape)
    for k, (i, j) in enumerate(COLOURS):
        rates[i::2, j::2] = net.picture(net.log_rates(h)[k], k)
    loss = jax.jit(jax.vmap(net.loss, (None, 0)))(h, jnp.asarray(counts, jnp.float32))
    return poisson(np.exp(rates)).logpmf(counts).sum((1, 2)) * -1 - np.asarray(loss, np.float64) * rates.size


def test_draws_follow_the_probabilities_of_whole_responses():
    """Over all responses of 2 x 2 fibres, one of each colour, with less than 12 photons each."""
    net, h = random_net((2, 2), 2, scale=0.5), jax.random.normal(KEY, (1, 6))
    every = np.stack(np.meshgrid(*4 * [np.arange(12)], indexing="ij"), -1).reshape(-1, 2, 2)
    probability = np.exp(log_probability(net, h, every))
    drawn = np.asarray(jax.jit(jax.vmap(net.draw, (None, 0)))(h, jax.random.split(KEY, 50_000)))
    inside = drawn[(drawn < 12).all((1, 2))].astype(int).reshape(-1, 4)
    assert len(inside) / 50_000 == pytest.approx(probability.sum(), abs=0.006)
    found = np.bincount(np.ravel_multi_index(inside.T, 4 * (12,)), minlength=len(every))
    often = 50_000 * probability >= 20
    found, expected = found[often], 50_000 * probability[often]
    found, expected = np.append(found, 50_000 - found.sum()), np.append(expected, 50_000 - expected.sum())
    assert often.sum() > 30 and chisquare(found, expected).pvalue > 1e-4


def test_fibres_beyond_the_edge_count_nothing():
    """A net of zeros gives all fibres one distribution: a rate of 1, no shift, no odds."""
    net = jax.tree.map(jnp.zeros_like, random_net((14, 10), 8))
    counts = np.random.default_rng(0).poisson(1, (14, 10))
    odds = [jnp.zeros(counts.shape)] * ODDS
    each = data.count_loss(jnp.float32(counts), jnp.full(counts.shape, 2.0), jnp.ones(counts.shape), odds)
    expected = np.asarray(each).mean() - poisson(1).logpmf(counts).mean()
    found = float(net.loss(jnp.zeros((4, 6)), jnp.float32(counts)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_stay_finite_and_reach_every_weight():
    net, h = random_net((14, 10), 4), 3 * jax.random.normal(KEY, (12, 6))
    counts = jnp.float32(np.random.default_rng(0).choice([0, 1, 2, 3, 2000, 65535], (14, 10)))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda net: net.loss(h, counts)))(net)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_colour_depends_on_those_before():
    """The draws of the first colour do not change with the weights of the context, those of others do."""
    net, h, keys = random_net((12, 12), 4), jax.random.normal(KEY, (9, 6)), jax.random.split(KEY, 20)
    blind = eqx.tree_at(lambda net: net.context, net, jax.tree.map(jnp.zeros_like, net.context))
    a, b = (np.asarray(jax.vmap(net.draw, (None, 0))(h, keys)) for net in (net, blind))
    changed = [np.any(a[:, i::2, j::2] != b[:, i::2, j::2]) for i, j in COLOURS]
    assert changed == [False, True, True, True]
