"""The networks as published, for --net paper and the variants of the papers.

The U-Net of flow matching and diffusion, the convolutional autoencoder of latent flow matching, the
perceptual and adversarial terms with the gradient normalisation of [FM, Eq. 7], the blocks of [Comparison,
Fig. 11 and 12], the VQ-VAE of the particle and the head of a MADE block. All work on ONE example with
channels last, (h, w, C); vmap makes the batch.
"""
import math
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import data
import metrics
from common import MLP, Linear, normal, normalise
from layers import attend, convolve, convolve_in_loop, enlarge, in_blocks, pixelwise
from preprocessing import from_patches, to_patches


# --------------------------------------------------------------------------------------- the U-Net of [FM, 4]

class ResBlock(eqx.Module):
    """norm, SiLU, 3 x 3 convolution, twice, with the time embedding added in between."""
    norms: list
    kernels: list
    time: jax.Array
    shortcut: jax.Array | None
    convolve: Callable = eqx.field(static=True)

    def __init__(self, inputs, outputs, embedding, convolve, key):
        keys, self.convolve = jax.random.split(key, 4), convolve
        self.norms = [eqx.nn.LayerNorm(inputs), eqx.nn.LayerNorm(outputs)]
        self.kernels = [normal(keys[0], 3, 3, inputs, outputs),
                        normal(keys[1], 3, 3, outputs, outputs, scale=1e-4)]
        self.time = normal(keys[2], embedding, outputs)
        self.shortcut = None if inputs == outputs else normal(keys[3], inputs, outputs)

    def __call__(self, x, t, c):
        h = self.convolve(jax.nn.silu(pixelwise(self.norms[0], x)), self.kernels[0])
        h = h + jax.nn.silu(t @ self.time)
        h = self.convolve(jax.nn.silu(pixelwise(self.norms[1], h)), self.kernels[1])
        return h + (x if self.shortcut is None else x @ self.shortcut)


class Attention(eqx.Module):
    """Self-attention over the pixels and one more token, made of the condition."""
    token: jax.Array
    norm: eqx.nn.LayerNorm
    qkv: jax.Array
    out: jax.Array
    heads: int = eqx.field(static=True)

    def __init__(self, inputs, width, embedding, key, heads=2):
        keys = jax.random.split(key, 3)
        self.token, self.heads = normal(keys[0], embedding, inputs), heads
        self.norm, self.qkv = eqx.nn.LayerNorm(inputs), normal(keys[1], inputs, 3 * width)
        self.out = normal(keys[2], width, inputs, scale=0.2 * width**-0.5)

    def __call__(self, x, t, c):
        tokens = jnp.concatenate([x.reshape(-1, x.shape[-1]), (c @ self.token)[None]])  # (h w + 1, C)
        qkv, scores = jax.vmap(self.norm)(tokens) @ self.qkv, self.heads * len(tokens)**2
        h = in_blocks(partial(attend, heads=self.heads), scores, qkv) @ self.out
        return x + h[:-1].reshape(x.shape)


class UNet(eqx.Module):
    """x (h, w, inputs), t (), c (conditions,) -> (h, w, outputs). [FM, section 4]: levels of 8, 12 and 16
    channels, two blocks each, attention with the condition as a token on the second level and in the middle;
    `stem` channels in front.
    """
    condition: tuple
    time: tuple
    stem: jax.Array
    down: list
    middle: list
    up: list
    resample: list
    norm: eqx.nn.LayerNorm
    head: jax.Array
    convolve: Callable = eqx.field(static=True)

    def __init__(self, inputs, outputs, stem, conditions, key, widths=(8, 12, 16), in_loop=False):
        keys, self.convolve = iter(jax.random.split(key, 64)), convolve_in_loop if in_loop else convolve
        a, b, c = widths
        embedding = 2 * a
        res = lambda inputs, outputs: ResBlock(inputs, outputs, embedding, self.convolve, next(keys))
        attention = lambda inputs, width: Attention(inputs, width, embedding, next(keys))
        self.condition = normal(next(keys), conditions, embedding), normal(next(keys), embedding, embedding)
        self.time = normal(next(keys), a, embedding), normal(next(keys), embedding, embedding)
        self.stem = normal(next(keys), 3, 3, inputs, stem)
        self.down = [[res(stem, a), res(a, a)],
                     [attention(a, b), res(a, b), attention(b, b), res(b, b)],
                     [res(b, c), res(c, c)]]
        self.middle = [res(c, c), attention(c, c), res(c, c), attention(c, c), res(c, c)]
        self.up = [[res(2 * c, c), res(2 * c, c)],
                   [attention(c + b, b), res(c + 2 * b, b), attention(2 * b, b), res(2 * b + a, b)],
                   [res(b + a, a), res(2 * a, a)]]
        self.resample = [normal(next(keys), 3, 3, width, width) for width in (a, b, c, b)]
        self.norm, self.head = eqx.nn.LayerNorm(a), normal(next(keys), a, outputs)

    def __call__(self, x, t, c):
        dtype = self.stem.dtype
        angles = t * 1e4 ** -jnp.linspace(0, 1, len(self.time[0]) // 2, endpoint=False)
        t = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]).astype(dtype)
        t = jax.nn.silu(t @ self.time[0]) @ self.time[1]
        c = jax.nn.silu(c.astype(dtype) @ self.condition[0]) @ self.condition[1]
        x, skips = self.convolve(x.astype(dtype), self.stem), []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, t, c)
                skips.append(x)
            x = self.convolve(x, self.resample[level], stride=2) if level < 2 else x
        for block in self.middle:
            x = block(x, t, c)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                x = block(jnp.concatenate([skips.pop(), x], axis=-1), t, c)
            x = self.convolve(enlarge(x, skips[-1].shape), self.resample[2 + level]) if level < 2 else x
        return (jax.nn.silu(pixelwise(self.norm, x)) @ self.head).astype(jnp.float32)


class ResponseUNet(eqx.Module):
    """The U-Net for whole responses: x (H, W), t (), c (C,) -> maps (K, H, W). 77 372 parameters with nine
    conditions and one map, as the public code of [FM] has."""
    net: UNet

    def __init__(self, conditions, maps, key, widths=(8, 12, 16)):
        self.net = UNet(1, maps, widths[0] // 2, conditions, key, widths, in_loop=True)

    def __call__(self, x, t, c):
        maps = in_blocks(UNet.__call__, 32 * x.size, self.net, x[..., None], t, c)    # 32: channels at once
        return jnp.moveaxis(maps, -1, 0)


# ----------------------------------------------------------------------- blocks of autoencoders, [Comparison]

class ConvBlock(eqx.Module):
    """Residual block of two 3 x 3 convolutions on (h, w, C)."""
    kernels: list

    def __init__(self, grid, width, key):
        keys = jax.random.split(key)
        self.kernels = [normal(keys[0], 3, 3, width, width), normal(keys[1], 3, 3, width, width, scale=0.02)]

    def __call__(self, x):
        h = convolve(jax.nn.silu(normalise(x)), self.kernels[0])
        return x + convolve(jax.nn.silu(normalise(h)), self.kernels[1])


class Feedforward(eqx.Module):
    """Two layers on the last axis, twice as wide in between."""
    up: Linear
    down: Linear

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.up = Linear(width, 2 * width, keys[0], bias=False)
        self.down = Linear(2 * width, width, keys[1], scale=0.5**0.5, bias=False)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.up(x)))


class TransformerBlock(eqx.Module):
    """Self-attention over the tokens of (h, w, C) and a feedforward layer [Comparison, Fig. 11 b]."""
    qkv: Linear
    out: Linear
    feedforward: Feedforward
    heads: int = eqx.field(static=True)

    def __init__(self, grid, width, key, heads=4):
        keys = jax.random.split(key, 3)
        self.qkv = Linear(width, 3 * width, keys[0], bias=False)
        self.out = Linear(width, width, keys[1], scale=0.5, bias=False)
        self.feedforward, self.heads = Feedforward(width, keys[2]), heads

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])                                                          # (T, C)
        tokens += self.out(attend(self.qkv(normalise(tokens)), self.heads))
        return (tokens + self.feedforward(normalise(tokens))).reshape(x.shape)


class MixerBlock(eqx.Module):
    """A feedforward layer over the tokens of (h, w, C) and one over the channels [Comparison, Fig. 12 b]."""
    tokens: Feedforward
    channels: Feedforward

    def __init__(self, grid, width, key):
        keys = jax.random.split(key)
        self.tokens, self.channels = Feedforward(math.prod(grid), keys[0]), Feedforward(width, keys[1])

    def __call__(self, x):
        h = x.reshape(-1, x.shape[-1])                                                               # (T, C)
        h += self.tokens(normalise(h).T).T
        return (h + self.channels(normalise(h))).reshape(x.shape)


# ---------------------------------------------------------- the convolutional autoencoder of [FM, appendix B]

def in_fours(x):
    """(H, W) -> (H / 2, W / 2, 4), the sides rounded up: a convolution at full size is the slowest of all."""
    return data.to_patches(x, 2).reshape(*data.patch_grid(x.shape, 2), 4)


class ConvAutoencoder(eqx.Module):
    """Log response (H, W) <-> latent grid (H / 4, W / 4, L) [FM, appendix B, after Rombach et al. 2022]: two
    convolutions that halve the size, residual blocks at half and at a quarter of it, and back; 56 320
    parameters (paper: 60k).

    It does not see the particle c. No layer has the full size: convolutions there cost a CPU more than all
    others.
    """
    down: list
    code: jax.Array
    enter: jax.Array
    up: list
    head: jax.Array
    shape: tuple = eqx.field(static=True)

    def __init__(self, shape, latent, key, widths=(16, 32)):
        keys, (a, b) = iter(jax.random.split(key, 10)), widths
        self.shape = shape
        self.down = [normal(next(keys), 3, 3, 4, a), ConvBlock(None, a, next(keys)),
                     normal(next(keys), 3, 3, a, b), ConvBlock(None, b, next(keys))]
        self.code, self.enter = normal(next(keys), b, 2 * latent), normal(next(keys), latent, b)
        self.up = [ConvBlock(None, b, next(keys)), normal(next(keys), 3, 3, b, a),
                   ConvBlock(None, a, next(keys))]
        self.head = normal(next(keys), a, 4)

    def encode(self, x, c):
        """Mean and log of the standard deviation of the latent, (2, H / 4, W / 4, L)."""
        stem, first, half, second = self.down
        h = first(convolve(in_fours(x).astype(stem.dtype), stem))  # (H / 2, W / 2, a)
        h = second(convolve(h, half, stride=2)) @ self.code  # (H / 4, W / 4, 2 L)
        return jnp.stack(jnp.split(h, 2, axis=-1)).astype(jnp.float32)

    def decode(self, z, c):
        """Latent -> log response as one map, (1, H, W)."""
        first, wider, second = self.up
        h = first(z.astype(self.enter.dtype) @ self.enter)  # (H / 4, W / 4, b)
        h = second(convolve(enlarge(h, data.patch_grid(self.shape, 2)), wider))  # (H / 2, W / 2, a)
        fibres = (normalise(h) @ self.head).reshape(-1, 4)  # four of each place
        return data.from_patches(fibres, 2, self.shape).astype(jnp.float32)


# ------------------------------------------------------------ perceptual and adversarial terms of [FM, Eq. 7]

class Features(eqx.Module):
    """Stands in for VGG16, which has never seen a calorimeter: convolutions that learn, on the responses
    themselves, to predict their `quantities`. Log response (H, W) -> maps (H / 2, W / 2, 16), (H / 4, W / 4,
    32) and the eight numbers."""
    kernels: list
    head: Linear

    def __init__(self, shape, key, widths=(16, 32)):
        keys = jax.random.split(key, 3)
        self.kernels = [normal(keys[0], 3, 3, 4, widths[0]), normal(keys[1], 3, 3, *widths)]
        self.head = Linear(widths[1] * math.prod(data.patch_grid(shape, 4)), 8, keys[2], scale=0.1)

    def __call__(self, x):
        first = jax.nn.silu(convolve(in_fours(x).astype(self.kernels[0].dtype), self.kernels[0]))
        second = jax.nn.silu(convolve(first, self.kernels[1], stride=2))
        return (first, second), self.head(second.ravel())


class Critic(eqx.Module):
    """Linear on each map of the features: how real every place looks, (places of all maps,)."""
    layers: list

    def __init__(self, key, widths=(16, 32)):
        self.layers = [Linear(width, 1, k) for k, width in zip(jax.random.split(key), widths)]

    def __call__(self, maps):
        return jnp.concatenate([layer(normalise(m)).ravel() for layer, m in zip(self.layers, maps)])


def quantities(counts):
    """What the features learn to predict of counts (B, H, W): log sums of the channels and of all, centre in
    (-1, 1); (B, 8)."""
    sums = jnp.einsum("bhw,hwk->bk", counts, metrics.channel_weights(counts.shape[1:]))
    total = counts.sum((1, 2))
    places = [jnp.linspace(-1, 1, n) for n in counts.shape[1:]]
    centre = [(counts.sum(axis) @ place) / (total + 1) for axis, place in zip((2, 1), places)]
    return jnp.concatenate([jnp.log1p(sums), jnp.log1p(total)[:, None], jnp.stack(centre, axis=1)], axis=1)


@jax.custom_vjp
def unit_gradient(x):
    """x (B, ...) itself, but the gradient that comes back through it has norm 1 / B in each of the B
    examples: the division by || dL_k / dx' || of [FM, Eq. 7]."""
    return x


def unit_backward(_, gradient):
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)), keepdims=True))
    return (gradient / (norm + 1e-12) / len(gradient),)


unit_gradient.defvjp(lambda x: (x, None), unit_backward)


def perceptual_loss(maps, real_maps):
    """LPIPS (Zhang et al. 2018) without weights: mean squared distance of features of unit length, (B,)."""
    unit = lambda m: m / jnp.sqrt(jnp.sum(m**2, axis=-1, keepdims=True) + 1e-2)   # dark places are left alone
    return sum(jnp.sum((unit(m) - unit(r))**2, axis=-1).mean((1, 2)) for m, r in zip(maps, real_maps))


def judge(features, critic, seen, counts):
    """Perceptual and adversarial terms of [FM, Eq. 7] for reconstructions seen() (B, H, W) of counts (B, H,
    W), and what features and critic learn from: (perceptual (B,), fooled (B,), {"features": loss, "critic":
    loss}).

    `seen` is a function that gives the log responses anew, so that each term meets a unit_gradient of its
    own; no term of the reconstruction reaches features or critic.
    """
    real_maps, found = jax.vmap(features)(jnp.log1p(counts))
    frozen = jax.lax.stop_gradient
    real_maps, made_maps = frozen((real_maps, jax.vmap(features)(seen())[0]))
    maps = lambda: jax.vmap(frozen(features))(seen())[0]
    fooled = -jax.vmap(frozen(critic))(maps()).mean(1)  # hinge loss, generator
    real, made = jax.vmap(critic)(real_maps), jax.vmap(critic)(made_maps)
    hinge = jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + made).mean()
    regression = jnp.mean(jnp.square(found - quantities(counts)))
    return perceptual_loss(maps(), real_maps), fooled, {"features": regression, "critic": hinge}


# --------------------------------------------------------------- the VQ-VAE of the particle, [Poster, Fig. 6]

PARTICLE_TOKENS, PARTICLE_CODES = 2, 512


class ParticleVQ(eqx.Module):
    """VQ-VAE of the conditions (C,): PARTICLE_TOKENS tokens of PARTICLE_CODES codes. `codebook(codes, key)`
    makes its codebook."""
    encoder: MLP
    codebook: eqx.Module
    decoder: MLP

    def __init__(self, conditions, codebook, key, width=128):
        keys = jax.random.split(key, 3)
        self.codebook = codebook(PARTICLE_CODES, keys[1])
        numbers = PARTICLE_TOKENS * self.codebook.vectors.shape[1]
        self.encoder = MLP(keys[0], conditions, width, width, numbers)
        self.decoder = MLP(keys[2], numbers, width, width, conditions)

    def encode(self, c):
        """Conditions (C,) -> vectors (PARTICLE_TOKENS, D)."""
        return self.encoder(c).reshape(PARTICLE_TOKENS, -1).astype(jnp.float32)

    def decode(self, codes):
        """Code vectors (PARTICLE_TOKENS, D) -> conditions (C,)."""
        return self.decoder(codes.ravel()).astype(jnp.float32)

    def tokens(self, c):
        """Conditions (C,) -> tokens (PARTICLE_TOKENS,)."""
        return self.codebook.nearest(self.encode(c))


# ----------------------------------------------------------------------------------- flows, [Comparison, IAF]

class DirectHead(eqx.Module):
    """Head of the published blocks of iaf.py: the outputs of the masked layers (D, K) are the numbers of the
    splines. Nothing else is seen of the fibres before, and nothing of the place."""

    def ground(self, near):
        return near[:, :0]

    def see(self, x, ground, total):
        return x, jnp.zeros_like(x)

    def numbers(self, ground, context, neighbours, used, e, total):
        return context.astype(jnp.float32)


def diversity_weights(responses, particles, rows, epsilon=0.1):
    """f(c) = [1 / f_div(c)] |X_c| + eps of the given rows [IAF, Eq. 3], of mean 1, and 1 for others; float32
    (N,). A particle of one row has no spread f_div: it gets the least weight."""
    ids, weights = data.unique_particles(particles[rows])[0], np.ones(len(particles), np.float32)
    groups = np.split(rows[np.argsort(ids, kind="stable")], np.cumsum(np.bincount(ids))[:-1])
    # standard deviation over the rows of a particle, summed over fibres [Comparison, Eq. 4]
    spread = np.array([responses[group].astype(np.float32).std(0).sum() for group in groups])
    inverse = 1 / np.where(spread > 0, spread, np.inf)
    low = inverse[spread > 0].min(initial=inverse.max())
    scaled = np.clip((inverse - low) / ((inverse.max() - low) or 1.0), 0, 1)
    found = (scaled * np.bincount(ids))[ids]
    found = found / (found.mean() or 1.0) + epsilon
    weights[rows] = found / found.mean()
    return weights


# ---------------------------------------------------- the prior of the tokens, [Comparison], [FM, appendix C]

class CausalBlock(eqx.Module):
    """Causal attention whose heads share keys and values (Shazeer 2019), which makes the cache a quarter as
    large, and a feedforward layer."""
    query: Linear
    pair: Linear
    out: Linear
    up: Linear
    down: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        keys, self.heads = jax.random.split(key, 5), heads
        self.query, self.pair = Linear(width, width, keys[0]), Linear(width, 2 * width // heads, keys[1])
        self.out = Linear(width, width, keys[2], scale=0.3)
        self.up, self.down = Linear(width, 4 * width, keys[3]), Linear(4 * width, width, keys[4], scale=0.3)

    def __call__(self, h, cache, place):
        """h (N, width) at the N places from `place` on, each of which sees itself and those before it, and
        the cache with them: keys (D, M), which is faster than (M, D), and values (M, D)."""
        x = normalise(h)
        q, (k, v) = self.query(x).reshape(len(h), self.heads, -1), jnp.split(self.pair(x), 2, axis=1)
        keys = jax.lax.dynamic_update_slice(cache[0], k.T, (0, place))
        values = jax.lax.dynamic_update_slice(cache[1], v, (place, 0))
        visible = jnp.arange(len(values)) <= place + jnp.arange(len(h))[:, None, None]    # (N, 1, M)
        scores = jnp.where(visible, q @ keys / math.sqrt(len(keys)), -jnp.inf)            # (N, heads, M)
        h = h + self.out((jax.nn.softmax(scores) @ values).reshape(len(h), -1))
        return h + self.down(jnp.square(jax.nn.relu(self.up(normalise(h))))), (keys, values)


class GPT(eqx.Module):
    """Transformer on the tokens (P,) of one response, patch by patch, behind F vectors of the particle: each
    place predicts the token of the next one. `grid` is vqgan.Grid, `particle(conditions, width, key)` makes
    the network of those vectors."""
    particle: eqx.Module
    table: jax.Array
    position: jax.Array
    near: Linear
    blocks: list
    head: Linear
    grid: tuple = eqx.field(static=True)

    def __init__(self, particle, grid, key, width=128, depth=6, heads=4):
        keys, (patches, near) = iter(jax.random.split(key, 4 + depth)), grid.sizes
        self.grid, self.particle = grid, particle(grid, width, next(keys))
        self.table = normal(next(keys), grid.codes, width, scale=0.5)
        self.position = jnp.zeros((patches + (0 if grid.conditions else PARTICLE_TOKENS - 1), width))
        self.near = Linear(near, width, next(keys))
        self.head = Linear(width, grid.codes, next(keys), scale=0.1)
        self.blocks = [CausalBlock(width, heads, k) for k in keys]

    def prompt(self, c):
        """Vectors of the particle (F, width), and what is added at each place, (F - 1 + P, width)."""
        particle = self.particle(c)
        added = self.near(self.grid.near(c)) + particle.mean(0)                # where a token is predicted
        return particle, self.position.at[len(particle) - 1:].add(added)

    def extend(self, h, caches, place):
        """Logits (N, K) of vectors h (N, width) at the places from `place` on, and the caches with these."""
        found = []
        for block, cache in zip(self.blocks, caches):
            h, cache = block(h, cache, place)
            found.append(cache)
        return self.head(normalise(h)), found

    def caches(self, places):
        """An empty cache of keys and values for each block."""
        empty = jnp.zeros((places, self.blocks[0].pair.bias.size // 2), self.table.dtype)
        return [(empty.T, empty)] * len(self.blocks)

    def __call__(self, tokens, c):
        """Logits (P, K) of each token (P,) from those before it."""
        particle, added = self.prompt(c)
        h = jnp.concatenate([particle, self.table[tokens[:-1]]]) + added
        return self.extend(h, self.caches(len(h)), 0)[0][len(particle) - 1:]


# ------------------------------------------------------------------------- showers of the CaloChallenge

class ShowerBlock(eqx.Module):
    """3 x 3 x 3 convolution, the condition added, normalised over all channels, SiLU."""
    convolution: eqx.nn.Conv3d
    condition: Linear
    norm: eqx.nn.GroupNorm

    def __init__(self, inputs, outputs, conditions, key):
        keys = jax.random.split(key)
        self.convolution = eqx.nn.Conv3d(inputs, outputs, 3, padding=1, key=keys[0])
        self.condition = Linear(conditions, outputs, keys[1])
        self.norm = eqx.nn.GroupNorm(1, outputs)

    def __call__(self, h, c):
        h = self.convolution(h) + self.condition(c)[:, None, None, None]
        return jax.nn.silu(self.norm(h))


class ShowerAutoencoder(eqx.Module):
    """The published autoencoder [CaloDREAM, A.2]: 3-D convolutions, the last one strided, mirrored in the
    decoder; two channels of latent. Slow on CPUs."""
    encoder: list
    code: eqx.nn.Conv3d
    decoder: list
    grow: eqx.nn.ConvTranspose3d
    out: eqx.nn.Conv3d
    shape: tuple = eqx.field(static=True)
    patch: tuple = eqx.field(static=True)

    def __init__(self, shape, patch, conditions, key, width=64):
        keys, depth = jax.random.split(key, 7), 3 if shape[0] % 3 == 0 else 2
        strided = dict(kernel_size=(depth, 4, 3), stride=(depth, 2, 1), padding=(0, 2, 1))
        self.shape, self.patch = shape, (*patch[:2], 2 * patch[2])
        self.encoder = [ShowerBlock(n, width, conditions, k) for n, k in zip((1, width), keys[:2])]
        self.code = eqx.nn.Conv3d(width, 4, **strided, key=keys[2])
        self.grow = eqx.nn.ConvTranspose3d(2, width, **strided, key=keys[3])
        self.decoder = [ShowerBlock(width, width, conditions, k) for k in keys[4:6]]
        self.out = eqx.nn.Conv3d(width, 1, 3, padding=1, key=keys[6])

    def encode(self, shares, c):
        """Means and log standard deviations (T, P) of the latent (z, a, r, 2), cut into patches."""
        h = shares[None]
        for block in self.encoder:
            h = block(h, c)
        mean, log_std = jnp.split(jnp.moveaxis(self.code(h), 0, -1), 2, axis=-1)                # (z, a, r, 2)
        tokens = lambda x: to_patches(x.reshape(*x.shape[:2], -1), self.patch)
        return tokens(mean), jnp.clip(tokens(log_std), -8, 4)

    def decode(self, r, c):
        """Logits (Z, A, R) of the shares."""
        shape, patch = self.latent_shape()
        h = from_patches(r, patch, shape).reshape(*shape[:2], -1, 2)             # (z, a, r, 2)
        h = self.grow(jnp.moveaxis(h, -1, 0))
        for block in self.decoder:
            h = block(h, c)
        return self.out(h)[0]

    def latent_shape(self):
        """Shape (z, a, r) of the latent, its channels along the rings, and that of a patch."""
        depth = self.code.stride[0]
        return (self.shape[0] // depth, self.shape[1] // 2 + 1, 2 * self.shape[2]), self.patch
