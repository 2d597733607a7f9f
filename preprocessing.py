"""Showers as the networks of calodream.py see them [CaloDREAM, 2], and back.

The energy network draws standardised ratios of the layers' energies (`Ratios`), the shape network patches x
(T, P) of the voxels' logits (`Logits`) or of an autoencoder's latent (`Latent`). All is for one shower, in
JAX, and vmap makes the batch; energy_ratios and the functions called measure go through a data set. Means and
standard deviations are of what is lit, as in the authors' later work (arXiv 2601.05289).

    logits = energy_ratios(showers)                        u = measure_ratios(logits).standardise(logits)
    space = measure_logits(voxels, rows, patch)            x = space.encode(voxels, c, key)
"""
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from calorimeter import THRESHOLD


# ------------------------------------------------------------------------------------------ ratios and shares

FACTOR = 2.85              # the largest E_tot / E_inc is 2.83, so that u_0 <= 1 [CaloDREAM, Eq. 2]
ALPHA = 1e-6               # [CaloDREAM, Eq. 3]


def logit(x):
    """log x / (1 - x) of shares x in [0, 1], kept away from both ends."""
    x = (1 - 2 * ALPHA) * x + ALPHA                                            # [CaloDREAM, Eq. 3]
    return jnp.log(x) - jnp.log1p(-x)


def unlogit(x):
    """The inverse of `logit`; of numbers beyond its ends, shares beyond 0 and 1."""
    return (jax.nn.sigmoid(x) - ALPHA) / (1 - 2 * ALPHA)


def energy_ratios(showers):
    """logit u (N, Z) [CaloDREAM, Eq. 2, 3] of Showers, in float64: a last lit layer has u = 1."""
    layers = showers.voxels.sum((2, 3), dtype=np.float64)
    rest = np.cumsum(layers[:, ::-1], axis=1)[:, ::-1]                         # sum over j >= i
    first = rest[:, :1] / FACTOR / showers.energies[:, None].astype(np.float64)
    x = np.concatenate([first, layers[:, :-1] / np.maximum(rest[:, :-1], 1e-10)], axis=1)
    x = ALPHA + (1 - 2 * ALPHA) * np.minimum(x, 1)
    return np.log(x / (1 - x)).astype(np.float32)


def layer_energies(logits, energy):
    """Energies of the layers (Z,), MeV, from logit u (Z,) and E_inc: the last layer takes the rest."""
    u, rest = (jnp.clip(unlogit(x), 0, 1) for x in (logits, -logits))          # rest: 1 - u, also where u ~ 1
    left = jnp.concatenate([jnp.ones(1), jnp.cumprod(rest[1:])])               # before each layer
    return FACTOR * energy * u[0] * left * jnp.append(u[1:], 1.0)


def layer_shares(voxels):
    """Voxels (Z, A, R) as shares of the energy of their layer, 0 in an empty one."""
    return voxels / (voxels.sum((1, 2), keepdims=True) + 1e-10)


def to_voxels(shares, layers):
    """The inverse: each layer is scaled to its energy (Z,). Voxels below the threshold are cut off before
    that, except the largest one of a layer: in one of little energy they would add up, and light all over."""
    flat = shares.reshape(len(layers), -1)                                     # (Z, A R)
    sums = jnp.maximum(flat, 0).sum(1, keepdims=True)
    lit = flat * layers[:, None] >= THRESHOLD * jnp.maximum(sums, 1)
    lit |= jnp.arange(flat.shape[1]) == flat.argmax(1, keepdims=True)
    flat = jnp.where(lit, jnp.maximum(flat, 1e-8), 0)
    voxels = flat * (layers / flat.sum(1))[:, None]
    return jnp.where(voxels < THRESHOLD, 0, voxels).reshape(shares.shape)


def incident(energies):
    """E_inc (N,), MeV, as the network sees it, (N, 1): 0 at 1 GeV, 1 at 1 TeV."""
    return (np.log(energies[:, None]) / math.log(1e3) - 1).astype(np.float32)


def to_patches(x, patch):
    """(Z, A, R) -> (T, P), patches of shape `patch`."""
    x = x.reshape(*(n for size, p in zip(x.shape, patch) for n in (size // p, p)))  # (z, pz, a, pa, r, pr)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, math.prod(patch))


def from_patches(x, patch, shape):
    """The inverse: (T, P) -> (Z, A, R)."""
    x = x.reshape(*(size // p for size, p in zip(shape, patch)), *patch)       # (z, a, r, pz, pa, pr)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(shape)


# -------------------------------------------------------------------------------------------- energy network

class Ratios(eqx.Module):
    """Means and standard deviations (Z,) of logit u, without empty layers and last lit ones, u = 0 and 1.
    Those lie far off; they are put one unit outside of all others, which end at four standard deviations."""
    mean: jax.Array
    std: jax.Array

    def standardise(self, logits):
        """(..., Z) -> (..., Z)."""
        x = jnp.clip((logits - self.mean) / self.std, -4, 4)
        return jnp.where(at_end(logits), 5 * jnp.sign(logits), x)

    def layers(self, c):
        """Energies of the layers (Z,), MeV, of a condition c (Z + 1,): E_inc as `incident` gives it, and
        standardised ratios."""
        x = snap(c[1:])
        logits = jnp.where(jnp.abs(x) == 5, 100 * jnp.sign(x), x * self.std + self.mean)
        return layer_energies(logits, jnp.exp(math.log(1e3) * (1 + c[0])))


def snap(x):
    """Standardised ratios as drawn, of which those outside of four standard deviations are 0 or 1."""
    return jnp.where(jnp.abs(x) > 4.5, 5 * jnp.sign(x), x)


def at_end(logits):
    """Whether these are logits of 0 or 1."""
    return abs(logits) > 0.999 * math.log(1 / ALPHA)


def measure_ratios(logits):
    """Ratios of logit u (N, Z)."""
    inner = np.where(at_end(logits), np.nan, logits)
    inner[:, np.isnan(inner).all(axis=0)] = 0                                  # a layer that is always empty
    return Ratios(*(jnp.asarray(a, jnp.float32) for a in (np.nanmean(inner, 0), np.nanstd(inner, 0) + 1e-3)))


# --------------------------------------------------------------------------------------------- shape network
# x = encode(voxels, c, key) for the condition c (Z + 1,), and voxels = decode(x, c, layers) for the energies
# of the layers (Z,) that c stands for

class Logits(eqx.Module):
    """Logits of the shares in the layers [CaloDREAM, Eq. 3], with means and standard deviations (Z, A, R) of
    the lit voxels. Empty ones lie far off: they would rule the deviation, and what varies between electrons
    of one energy would be small beside a network's errors."""
    mean: jax.Array
    std: jax.Array
    patch: tuple = eqx.field(static=True)

    def encode(self, voxels, c, key):
        return to_patches((logit(layer_shares(voxels)) - self.mean) / self.std, self.patch)

    def decode(self, x, c, layers):
        x = from_patches(x, self.patch, self.mean.shape)
        return to_voxels(unlogit(x * self.std + self.mean), layers)

    def empty(self):
        """x (T, P) of a shower without energy."""
        return to_patches((logit(0.0) - self.mean) / self.std, self.patch)


def measure_logits(voxels, rows, patch):
    """Logits of the given rows of voxels (N, Z, A, R)."""
    @jax.jit
    def moments(voxels):
        x, lit = jax.vmap(lambda x: logit(layer_shares(x)))(voxels), voxels > 0
        return jnp.stack([jnp.where(lit, power, 0).sum((0, 2)) for power in (jnp.ones_like(x), x, x**2)])

    parts = np.array_split(rows, -(-len(rows) // 2048))                        # that fit the memory
    number, sums, squares = sum(np.asarray(moments(voxels[part]), np.float64) for part in parts)
    number = np.maximum(number, 1)
    mean = sums / number
    std = np.sqrt(np.maximum(squares / number - mean**2, 0.25))                # a ring that is hardly lit
    whole = lambda a: jnp.broadcast_to(jnp.asarray(a, jnp.float32)[:, None], voxels.shape[1:])   # over A
    return Logits(whole(mean), whole(std), patch)


class Latent(eqx.Module):
    """The latent r of an autoencoder, with means and standard deviations (T, P)."""
    autoencoder: eqx.Module
    mean: jax.Array
    std: jax.Array

    def encode(self, voxels, c, key):
        mean, log_std = self.autoencoder.encode(layer_shares(voxels), c)
        r = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return (r - self.mean) / self.std

    def decode(self, x, c, layers):
        shares = jax.nn.sigmoid(self.autoencoder.decode(x * self.std + self.mean, c))
        return to_voxels(jnp.where(shares < 1e-6, 0, shares), layers)          # [CaloDREAM, Eq. 14]

    def empty(self):
        return None


def measure_latent(autoencoder, voxels, c, key):
    """The Latent of an autoencoder, standardised on voxels (N, Z, A, R) with conditions c (N, Z + 1)."""
    encode = eqx.filter_jit(jax.vmap(lambda *one: Latent(autoencoder, 0.0, 1.0).encode(*one)))
    r = encode(voxels, c, jax.random.split(key, len(c)))
    return Latent(autoencoder, r.mean(0), jnp.maximum(r.std(0), 1e-3))
