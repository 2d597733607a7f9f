"""Photon counts of a decoder, drawn in four colours of a checkerboard.

A latent does not hold the place of every faint spot, so given the latent the fibres depend on each other. The
fibres of a colour are drawn at once, from distributions that depend on the colours before:
    p(x | z) = product over colours k of p(x_k | x_1 ... x_(k-1), z)
In training the colours before are the real ones, so the likelihood is exact.
"""
import equinox as eqx
import jax
import jax.numpy as jnp

import data
from common import Linear, normal

COLOURS = (0, 0), (1, 1), (0, 1), (1, 0)   # first fibre of each, which has every second along both axes
ODDS = 4                                   # 0 to 3 photons have odds of their own, in data.count_loss
MAPS = 2 + ODDS                            # with shift and log scale


class Checkerboard(eqx.Module):
    """Distributions of the counts of one response, from features h (P, width) of its patches of size x size
    fibres. A patch has half x half fibres of each colour, F in all."""
    rate: Linear
    context: list
    heads: list
    shape: tuple = eqx.field(static=True)
    half: int = eqx.field(static=True)

    def __init__(self, width, shape, size, key):
        keys = jax.random.split(key, 8)
        self.shape, self.half = shape, size // 2
        fibres, before = self.half**2, range(1, len(COLOURS))
        self.rate = Linear(width, size**2, keys[0], scale=0.1)
        self.context = [Linear(4 * fibres * k, width, key, bias=False) for k, key in zip(before, keys[1:])]
        self.heads = [0.1 * jnp.sqrt(MAPS) * normal(key, MAPS, width, fibres) for key in keys[4:]]

    def patches(self, x, k):
        """The fibres of colour k in x (H, W): (P, F)."""
        i, j = COLOURS[k]
        return data.to_patches(x[i::2, j::2], self.half)

    def picture(self, patches, k):
        """The inverse of `patches`, (h, w) with half the resolution."""
        shape = [(n + 1 - first) // 2 for n, first in zip(self.shape, COLOURS[k])]
        return data.from_patches(patches, self.half, shape)[0]

    def log_rates(self, h):
        """(P, F) for each colour, whatever the counts of the others."""
        return jnp.split(self.rate(jax.nn.silu(h)).astype(jnp.float32), len(COLOURS), axis=1)

    def distribution(self, h, log_rate, seen):
        """Location, scale and odds (P, F) of the next colour; `seen` are pictures of sqrt(n) before it."""
        if seen:
            around = jnp.concatenate([data.windows(x, self.half) for x in seen], axis=1)
            h = h + self.context[len(seen) - 1](around)
        # vmap: where maps are cut out of one product, their gradient takes XLA four times as long
        maps = jax.vmap(lambda head: jax.nn.silu(h) @ head)(self.heads[len(seen)])     # (MAPS, P, F)
        shift, log_scale, *odds = maps.astype(jnp.float32)
        return shift + 2 * jnp.exp(jnp.clip(log_rate, -15, 9) / 2), data.bounded_scale(log_scale), odds

    def loss(self, h, counts):
        """-log P of counts (H, W), mean in nats per fibre, plus that of Poisson counts of the rates alone,
        which is strict with bright fibres: without it, a wide distribution explains a narrow shower and the
        latent is ignored (W of ZP's reconstruction is three times as high)."""
        nats, seen, inside = 0.0, [], jnp.ones(self.shape)
        for k, log_rate in enumerate(self.log_rates(h)):
            n, law = self.patches(counts, k), self.distribution(h, log_rate, seen)
            losses = data.count_loss(n, *law) + data.poisson_loss(n, log_rate)
            nats += jnp.sum(self.patches(inside, k) * losses)
            seen.append(jnp.sqrt(self.picture(n, k)))
        return nats / counts.size

    def draw(self, h, key):
        """Photon counts (H, W)."""
        return jnp.round(jnp.square(self.draw_roots(h, key, lambda *law: jnp.sqrt(data.draw_counts(*law)))))

    def draw_roots(self, h, key, draw):
        """Roots of counts (H, W), each by draw(location, scale, key, odds), with no gradient to another."""
        seen, drawn = [], {}
        for k, (log_rate, key) in enumerate(zip(self.log_rates(h), jax.random.split(key, len(COLOURS)))):
            location, scale, odds = self.distribution(h, log_rate, seen)
            roots = draw(location, scale, key, odds)
            # else XLA draws a count again for each window that holds it: twice the time
            roots = jnp.matmul(roots, jnp.eye(roots.shape[1]), precision="highest")
            drawn[COLOURS[k]] = self.picture(roots, k)
            seen.append(jax.lax.stop_gradient(drawn[COLOURS[k]]))
        blocks = jnp.stack([drawn[first] for first in sorted(drawn)], axis=-1)     # (H / 2, W / 2, 4)
        return data.from_patches(blocks.reshape(-1, len(COLOURS)), 2, self.shape)[0]
