"""Photon sum S of the response to a particle c: its distribution P(S | c), a mixture, and draws from it.

A generator that draws the sum first makes the rest of a response for it, p(x | c) = P(S | c) p(x | c, S). One
number is learnt by exact likelihood, so that the light is right where a network of whole responses, which
follows its training particles, is a few per cent too dark (ZP's unseen particles).
"""
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import data
from common import Linear
from simulator import CUT, Detector

COMPONENTS = 12   # of the mixture


class Totals(eqx.Module):
    """P(S | c) for S of at least `low`, by a mixture of logistic distributions of log S. A call gives their
    log weights, locations and log scales, (3, K)."""
    layers: list
    low: jax.Array                # int32 (), not trained
    detector: Detector = eqx.field(static=True)

    def __init__(self, detector, conditions, key, low=CUT, width=192):
        keys, self.detector, self.low = jax.random.split(key, 3), detector, jnp.int32(low)
        inputs = data.feature_count(conditions, detector)
        self.layers = [Linear(inputs, width, keys[0]), Linear(width, width, keys[1]),
                       Linear(width, 3 * COMPONENTS, keys[2], scale=0.1)]

    def __call__(self, c):
        first, second, last = self.layers
        h = jax.nn.silu(second(jax.nn.silu(first(data.features(c, self.detector)))))
        weights, locations, scales = last(h).astype(jnp.float32).reshape(3, COMPONENTS)
        spread = jnp.linspace(2.0, 8.0, COMPONENTS)                            # logs of 7 to 3000 photons
        return jnp.stack([jax.nn.log_softmax(weights), spread + 3 * locations, jnp.clip(scales - 1, -6, 2)])


def least_total(sums):
    """The least of photon sums (N,), int32 () of 1 to that of the papers' data."""
    return jnp.int32(np.clip(sums.min(), 1, CUT))


def sum_nll(net, total, c):
    """-log P(S | c) in nats of one photon sum S: P(S) = F(log(S + 1/2)) - F(log(S - 1/2)) of each logistic F
    in the mixture, over 1 - F(log(low - 1/2))."""
    log_weights, locations, log_scales = net(c)
    z = lambda total: (jnp.log(total) - locations) * jnp.exp(-log_scales)
    upper, lower, floor = z(total + 0.5), z(total - 0.5), z(net.low - 0.5)
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel, and 1 - F(f) = F(-f)
    rise = jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    log_p = rise - jax.nn.softplus(-upper) - jax.nn.softplus(lower) + jax.nn.softplus(floor)
    return -jax.nn.logsumexp(log_weights + log_p)


def draw_totals(net, c, key):
    """Photon sums (B,) from the distribution of sum_nll by inversion, for c (B, C)."""
    log_weights, locations, log_scales = jnp.moveaxis(jax.vmap(net)(c), 1, 0)                # (B, COMPONENTS)
    kind_key, key = jax.random.split(key)
    # Gumbel's way to draw a component, which export.py can write down
    u = jax.random.uniform(kind_key, log_weights.shape, minval=jnp.finfo(jnp.float32).tiny)
    score = log_weights - jnp.log(-jnp.log(u))
    chosen = score == score.max(1, keepdims=True)
    location, scale = (jnp.sum(jnp.where(chosen, a, 0.0), 1) for a in (locations, jnp.exp(log_scales)))
    floor = (jnp.log(net.low - 0.5) - location) / scale
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    log_above = jnp.log1p(-u) - jax.nn.softplus(floor)                         # log(1 - F)
    z = jnp.log(-jnp.expm1(jnp.minimum(log_above, -1e-7))) - log_above
    return jnp.clip(jnp.round(jnp.exp(jnp.minimum(location + scale * z, 11.0))), net.low, 60_000)


class SumFirst(eqx.Module):
    """A network `path` of responses that is given their photon sum S as one condition more, and P(S | c), or
    None where it is not given S, as in the papers."""
    totals: Totals | None
    path: eqx.Module

    def known(self, counts, c):
        """-log P(S | c) in nats of counts (B, H, W), their mean, and c (B, C) with the sums (B, C + 1)."""
        if self.totals is None:
            return 0.0, c
        total = counts.sum((1, 2))
        return jax.vmap(partial(sum_nll, self.totals))(total, c).mean(), jax.vmap(with_sum)(c, total)

    def __call__(self, x, t, c, total):
        """Maps of x and t () for a particle c (C,) and a photon sum ()."""
        return self.path(x, t, with_sum(c, total) if self.totals else c)

    def draw(self, c, key):
        """c (B, C) with sums drawn from P(S | c), (B, C + 1)."""
        return jax.vmap(with_sum)(c, draw_totals(self.totals, c, key)) if self.totals else c

    def with_least(self, sums):
        """The same with the least of photon sums (N,), to which P(S | c) reaches down."""
        return eqx.tree_at(lambda net: net.totals.low, self, least_total(sums)) if self.totals else self


def scaled_sum(total):
    """A photon sum as networks see it, about -2 to 2."""
    return jnp.log(total) / 2 - 2


def with_sum(c, total):
    """Conditions c (C,) with a photon sum () as one more, which data.features knows."""
    return jnp.append(c, scaled_sum(total))
