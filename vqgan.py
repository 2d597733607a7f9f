"""Vector quantisation with a transformer prior for the zero degree calorimeters (papers 000, 001 and 002 of M. Wojnar et al.).

Stage 1, an autoencoder whose latent is a grid of tokens: each patch of 4 x 4 fibres becomes a unit vector e, which the nearest of
512 code vectors z replaces; the decoder makes a response x' of the codes (paper 000):
    z_q = argmin_z |e - z|               (Eq. 5)      L = -log p(x | z_q) + beta |e - sg(z_q)|^2               (Eq. 6)
The gradient of the decoder goes straight through to e. The code vectors are moving averages of the e that fall to them. With
`--variant vqgan` adds perceptual and adversarial terms of features that learn here, each over its gradient (paper 002, Eq. 7).
Stage 2, a prior of the tokens t_1 ... t_T of a particle c:
    --prior gpt      the papers': a transformer, L = -sum_i log p(t_i | t_1 ... t_(i-1), c), which draws a token after the other;
    --prior masked   (default) draws many tokens at once in a few passes, as MaskGIT (Chang et al. 2022), here in a fixed order of
                     patches that lie far apart: a pass is a small dense network, and needs the logits of its own tokens alone.

Photons are counts, drawn from a distribution that the decoder gives each fibre, as in vae.py; `--counts round` is the papers':
log responses, squared error, rounding. `--particle tokens` is theirs as well: the prior is told two tokens of a small VQ-VAE of the
particle and the autoencoder nothing, where by default both know it. `--tokens 36` is the first paper's, 8 x 8 fibres, 256 codes.

    python vqgan.py --detector zn                                       both stages on 60 000 rows of the open data
    python vqgan.py --detector zn --stage 2 --prior gpt                 another prior, on the autoencoder of the run folder
    python vqgan.py --load weights/vqgan-zn.eqx --generate particles.csv --out responses.h5

Prints the trainings, the use of the codes, the score of the reconstruction, then every score of metrics.py beside its oracle;
writes runs/vqgan-zn/, the states of the stages in folders of their own.
"""
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
from common import UserError

GRIDS = {121: (4, 512), 36: (8, 256)}      # --tokens: fibres along a patch, codes
DIMENSION = 8                              # of a code vector
DECAY, DEAD = 0.99, 0.05                   # of the moving averages; a code with fewer patches a step is put elsewhere
COMMITMENT = 0.25                          # beta of Eq. 6
PARTICLE_TOKENS = 2
SEGMENTS = 4                               # of the sampling loop: the cache grows by one each, so that little of it is empty
HORIZON = 48                               # tokens that the masked prior learns to tell at once
TEMPERATURES, TOP_KS, STEPS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.4), (4, 16, 64, 0), (4, 6, 8, 12, 16, 32)   # of --sweep


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    parser = common.parser(__doc__, "vqgan", n=60_000, epochs=6, lr=2e-3, steps=8)
    parser.add_argument("--variant", choices=("vqvae", "vqgan"), default="vqvae",
                        help="of stage 1: likelihood alone, or with perceptual and adversarial terms (default: vqvae)")
    parser.add_argument("--tokens", type=int, choices=GRIDS, default=121,
                        help="of ZN: 121 patches of 4 x 4 fibres and 512 codes (ZP: 112), or 36 of 8 x 8 and 256 codes (ZP: 28) "
                             "(default: 121)")
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="how numbers become photons: drawn from each fibre's distribution, or rounded log1p "
                             "(default: sample)")
    parser.add_argument("--particle", choices=("embed", "tokens"), default="embed",
                        help="how the networks know it: by its numbers, or the prior alone by two tokens (default: embed)")
    parser.add_argument("--prior", choices=PRIORS, default="masked", help="network of stage 2 (default: masked)")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both",
                        help="train the autoencoder, or the prior on that in --run, with the same flags for stage 1, or both "
                             "(default: both)")
    parser.add_argument("--prior-epochs", type=common.number(int, 1, 10**6), metavar="N",
                        help="passes over the training rows in stage 2 (default: gpt 1, masked 12)")
    parser.add_argument("--prior-batch", type=common.number(int, 1, 10**7), metavar="ROWS",
                        help="responses per training step of stage 2 (default: gpt 64, masked 256, at most --batch-size)")
    parser.add_argument("--temperature", type=common.number(float, 0, 100), default=1.0, metavar="T",
                        help="of the tokens; 0: always the likeliest (default: 1)")
    parser.add_argument("--top-k", type=common.number(int, 0), default=0, metavar="K",
                        help="draw among the K likeliest tokens; 0: all (default: 0)")
    parser.add_argument("--top-p", type=common.number(float, 0, 1), default=1.0, metavar="P",
                        help="draw among the likeliest tokens that hold a share P together (default: 1)")
    parser.add_argument("--sweep", action="store_true",
                        help="score temperatures, top-k and steps of the masked prior on validation rows; with --load that alone")
    parser.add_argument("--compare", action="store_true", help="only print what a response costs by tokens, size, precision, batch")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# For ONE example: patches (P, S * S) of 2 sqrt(n) or log1p(n), c (C,) conditions, codes (P, D), tokens (P,); vmap makes the batch.

# same as fm.py: linear
def linear(key, inputs, outputs, scale=1.0):
    return eqx.tree_at(lambda layer: layer.weight, layer := eqx.nn.Linear(inputs, outputs, key=key), scale * layer.weight)


# same as fm.py: apply
def apply(layer, h):
    """A Linear on the last axis of h. vmap of the layer leaves the product in an order that costs a CPU twice the time."""
    return h @ layer.weight.T + layer.bias


# same as fm.py: normalise
def normalise(h):
    """Root mean square norm over the last axis."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


# same as fm.py: to_patches
def to_patches(x, size):
    """(H, W) -> (patches, size * size), padded with zeros where the size does not divide."""
    x = jnp.pad(x, [(0, -n % size) for n in x.shape])
    h, w = x.shape
    x = x.reshape(h // size, size, w // size, size).transpose(0, 2, 1, 3)      # (h, w, size, size)
    return x.reshape(-1, size * size)


# same as fm.py: from_patches
def from_patches(patches, size, shape):
    """(patches, K * size * size) -> (K, H, W), the inverse of to_patches for each of K maps."""
    h, w = (-(-n // size) for n in shape)
    x = patches.reshape(h, w, -1, size, size).transpose(2, 0, 3, 1, 4)         # (K, h, size, w, size)
    return x.reshape(-1, h * size, w * size)[:, :shape[0], :shape[1]]


# same as fm.py: waves
def waves(c):
    """Sines and cosines of the conditions (C,) one by one: slow ones of all, and fast ones, which tell fibres apart, of the
    places, the last three (px and py if there are only the nine features).

    Random mixtures of the conditions, the usual Fourier features, place a narrow shower as well, but with them, or with fast
    waves of every condition, the network knows its training particles by heart: W of unseen ones doubles and more.
    """
    places = c[4:6] if len(c) < data.CONDITIONS["physics"] else c[-3:]
    angles = jnp.concatenate([jnp.outer(2.0 ** jnp.arange(3), c).ravel(), jnp.outer(2.0 ** jnp.arange(3, 7), places).ravel()])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


# same as fm.py: Embedding
class Embedding(eqx.Module):
    """Time and particle as one vector (width,)."""
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, conditions, width, key):
        keys = jax.random.split(key)
        self.first = eqx.nn.Linear(conditions + len(waves(np.zeros(conditions))) + 16, width, key=keys[0])
        self.second = eqx.nn.Linear(width, width, key=keys[1])

    def __call__(self, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        h = jnp.concatenate([c, waves(c), jnp.sin(angles), jnp.cos(angles)]).astype(self.first.weight.dtype)
        return jax.nn.silu(self.second(jax.nn.silu(self.first(h))))


# same as fm.py: DenseBlock
class DenseBlock(eqx.Module):
    """Residual block on one vector; time and particle scale, shift and gate it (adaptive layer norm, Peebles and Xie 2023)."""
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    modulation: eqx.nn.Linear

    def __init__(self, width, embedding, key):
        keys = jax.random.split(key, 3)
        self.up, self.down = eqx.nn.Linear(width, 2 * width, key=keys[0]), eqx.nn.Linear(2 * width, width, key=keys[1])
        self.modulation = eqx.nn.Linear(embedding, 3 * width, key=keys[2])

    def __call__(self, h, e):
        scale, shift, gate = jnp.split(self.modulation(e), 3)
        return h + gate * self.down(jax.nn.silu(self.up(normalise(h) * (1 + scale) + shift)))


# same as fm.py: vicinity
def vicinity(c, detector, size):
    """Where each patch lies from the two places at which the particle may hit, flying straight on or bent by the dipole. Showers
    look the same wherever they start, which the network is told here: without it, W of unseen particles is four times as high.

    Returns the offsets of the patch in x, bent x and y, (P, 3), and bumps around both places, fibre by fibre, (P, 4, size * size):
    1 / (1 + (r / 2 fibres)^2) and a Gaussian of one fibre. Without places among the conditions: (P, 0) and (P, 0, size * size).
    """
    patches = [size * jnp.arange(-(-n // size)) + (size - n) / 2 for n in detector.shape]      # middles, in fibres
    x, y = (axis.ravel() for axis in jnp.meshgrid(*patches, indexing="ij"))                    # (P,)
    if len(c) < data.CONDITIONS["physics"]:
        return jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0, size**2))
    straight, across, bent = jnp.sinh(c[-3:]) * data.PLACE_CM                  # bent is measured from the middle of ZP
    dx, dy = x - (straight - detector.centre) / detector.pitch, y - across / detector.pitch
    bent_dx = x - (bent + data.DETECTORS["zp"].centre - detector.centre) / detector.pitch
    fibres = jnp.arange(size) + (1 - size) / 2
    squares = lambda offset: jnp.square(offset[:, None] + fibres)                              # (P, size)
    r2 = [(squares(d)[:, :, None] + squares(dy)[:, None]).reshape(len(x), -1) for d in (dx, bent_dx)]
    bumps = [bump for square in r2 for bump in (1 / (1 + square / 4), jnp.exp(-square / 2))]
    return jnp.arcsinh(jnp.stack([dx, bent_dx, dy], axis=1) / 2) / 2, jnp.stack(bumps, axis=1)


def near(c, detector, size):
    """`vicinity` as one array (P, 3 + 4 S S), without places among the conditions (P, 0)."""
    offsets, bumps = vicinity(c, detector, size)
    return jnp.concatenate([offsets, bumps.reshape(len(offsets), -1)], axis=1)


def grid(args):
    """Patches along x and y."""
    return tuple(-(-n // GRIDS[args.tokens][0]) for n in data.DETECTORS[args.detector].shape)


class Perceptron(eqx.Module):
    """Hidden layers on the last axis."""
    layers: list

    def __init__(self, key, *widths):
        self.layers = [linear(k, *pair) for k, pair in zip(jax.random.split(key, len(widths)), zip(widths, widths[1:]))]

    def __call__(self, x):
        x = x.astype(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            x = jax.nn.silu(apply(layer, x))
        return apply(self.layers[-1], x)


class Decoder(eqx.Module):
    """Codes (P, D) -> maps (M, H, W): all codes as one vector pass residual blocks, which return a few numbers to each patch;
    a small network that all patches share puts these together with the patch's own code and its vicinity."""
    embedding: Embedding
    enter: eqx.nn.Linear
    blocks: list
    leave: eqx.nn.Linear
    position: jax.Array
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: Perceptron
    detector: data.Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)
    conditions: int = eqx.field(static=True)

    def __init__(self, args, conditions, key, width=192, depth=2, up=12, hidden=96, embedding=128):
        keys = iter(jax.random.split(key, 6 + depth))
        self.detector, self.size = data.DETECTORS[args.detector], GRIDS[args.tokens][0]
        self.conditions = conditions if args.particle == "embed" else 0
        patches, vicinities = near(jnp.zeros(self.conditions), self.detector, self.size).shape
        self.embedding = Embedding(self.conditions, embedding, next(keys))
        self.enter = linear(next(keys), DIMENSION * patches, width)
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave, self.position = linear(next(keys), width, up * patches), jnp.zeros((patches, hidden))
        self.local, self.modulation = linear(next(keys), up + DIMENSION + vicinities, hidden), linear(next(keys), width, 2 * hidden)
        self.head = Perceptron(next(keys), hidden, 64, MAPS[args.counts] * self.size**2)

    def __call__(self, codes, c):
        c = c[:self.conditions]
        codes, vicinities = common.cast((codes, near(c, self.detector, self.size)), self.enter.weight.dtype)
        h, e = self.enter(codes.ravel()), self.embedding(0.0, c)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        own = jnp.concatenate([self.leave(h).reshape(len(codes), -1), codes, vicinities], axis=1)         # (P, up + D + N)
        scale, shift = jnp.split(self.modulation(h), 2)
        h = jax.nn.silu((apply(self.local, own) + self.position) * (1 + scale) + shift)                   # (P, hidden)
        return from_patches(self.head(h), self.size, self.detector.shape)


class Codebook(eqx.Module):
    """The moving averages that make the code vectors: the sum of what falls to each, (K, D), and how many do, (K,)."""
    sums: jax.Array
    counts: jax.Array

    def __init__(self, codes, key):
        self.sums, self.counts = jax.random.normal(key, (codes, DIMENSION)), jnp.zeros(codes)   # 0: dead until the first batch

    @property
    def vectors(self):
        """(K, D), of unit length."""
        return unit(self.sums)


class Autoencoder(eqx.Module):
    """A network that all patches share makes a vector of each; with --particle embed it knows the vicinity of the patch."""
    encoder: Perceptron
    codebook: Codebook
    decoder: Decoder
    counts: str = eqx.field(static=True)

    def __init__(self, args, conditions, key):
        keys = jax.random.split(key, 3)
        self.decoder, self.codebook = Decoder(args, conditions, keys[0]), Codebook(GRIDS[args.tokens][1], keys[1])
        size, self.counts = self.decoder.size, args.counts
        vicinities = near(jnp.zeros(self.decoder.conditions), self.decoder.detector, size).shape[1]
        self.encoder = Perceptron(keys[2], size**2 + 1 + vicinities, 128, 128, DIMENSION)

    def encode(self, counts, c):
        """Counts (H, W) -> vectors (P, D) of unit length."""
        size, detector = self.decoder.size, self.decoder.detector
        x = 0.5 * to_patches(2 * jnp.sqrt(counts) if self.counts == "sample" else jnp.log1p(counts), size)
        light = jnp.log1p(to_patches(counts, size).sum(1, keepdims=True))
        h = jnp.concatenate([x, light, near(c[:self.decoder.conditions], detector, size)], axis=1)
        return unit(self.encoder(h).astype(jnp.float32))

    def tokens(self, counts, c):
        """Counts (H, W) -> tokens (P,)."""
        return lookup(self.codebook.vectors, self.encode(counts, c))

    def decode(self, codes, c):
        return self.decoder(codes, c)


class ParticleVQ(eqx.Module):
    """The VQ-VAE of the conditions (C,): two tokens of 512 (paper 000)."""
    encoder: Perceptron
    codebook: Codebook
    decoder: Perceptron

    def __init__(self, conditions, key, width=128):
        keys = jax.random.split(key, 3)
        self.encoder = Perceptron(keys[0], conditions, width, width, PARTICLE_TOKENS * DIMENSION)
        self.codebook = Codebook(512, keys[1])
        self.decoder = Perceptron(keys[2], PARTICLE_TOKENS * DIMENSION, width, width, conditions)

    def encode(self, c):
        return unit(self.encoder(c).reshape(PARTICLE_TOKENS, DIMENSION).astype(jnp.float32))

    def tokens(self, c):
        return lookup(self.codebook.vectors, self.encode(c))


class Features(eqx.Module):
    """What stands in for VGG16: layers on patches of 4 and of 8 fibres that learn, on the responses themselves, to tell their
    `quantities`. Log response (H, W) -> maps (P, 32) and (P', 64), and those eight numbers."""
    layers: list
    head: eqx.nn.Linear

    def __init__(self, shape, key):
        keys, places = jax.random.split(key, 3), [math.prod(-(-n // size) for n in shape) for size in (4, 8)]
        self.layers = [linear(keys[0], 16, 32), linear(keys[1], 64, 64)]
        self.head = linear(keys[2], 32 * places[0] + 64 * places[1], 8, scale=0.1)

    def __call__(self, x):
        x = x.astype(self.head.weight.dtype)
        maps = [jax.nn.silu(apply(layer, to_patches(x, size))) for layer, size in zip(self.layers, (4, 8))]
        return maps, self.head(jnp.concatenate([m.ravel() for m in maps]))


class Critic(eqx.Module):
    """Linear on each map of the features: how real every patch looks, (P + P',)."""
    layers: list

    def __init__(self, key):
        self.layers = [linear(k, width, 1) for k, width in zip(jax.random.split(key), (32, 64))]

    def __call__(self, maps):
        return jnp.concatenate([apply(layer, normalise(m)).ravel() for layer, m in zip(self.layers, maps)])


class Stage1(eqx.Module):
    """What stage 1 trains: the autoencoder, the one of the particle, and with --variant vqgan what judges."""
    autoencoder: Autoencoder
    particle: ParticleVQ | None
    features: Features | None
    critic: Critic | None

    def __init__(self, args, conditions, key):
        keys, gan = jax.random.split(key, 4), args.variant == "vqgan"
        self.autoencoder = Autoencoder(args, conditions, keys[0])
        self.particle = ParticleVQ(conditions, keys[1]) if args.particle == "tokens" else None
        self.features = Features(data.DETECTORS[args.detector].shape, keys[2]) if gan else None
        self.critic = Critic(keys[3]) if gan else None


class Known(eqx.Module):
    """What a prior knows of the particle: conditions (C,) or its tokens (2,) -> vectors (F, width), and `near` it (P, N)."""
    net: Embedding | jax.Array
    detector: data.Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, args, conditions, width, key):
        self.detector, self.size = data.DETECTORS[args.detector], GRIDS[args.tokens][0]
        embed = args.particle == "embed"
        self.net = Embedding(conditions, width, key) if embed else 0.5 * jax.random.normal(key, (PARTICLE_TOKENS, 512, width))

    def __call__(self, c):
        if isinstance(self.net, Embedding):
            return self.net(0.0, c)[None], near(c, self.detector, self.size).astype(self.net.first.weight.dtype)
        return self.net[jnp.arange(PARTICLE_TOKENS), c], near(jnp.zeros(0), self.detector, self.size)


def known_shape(args, conditions):
    """(F, N) of Known, and the number of tokens."""
    size, embed = GRIDS[args.tokens][0], args.particle == "embed"
    patches, vicinities = near(jnp.zeros(conditions if embed else 0), data.DETECTORS[args.detector], size).shape
    return 1 if embed else PARTICLE_TOKENS, vicinities, patches


class TransformerBlock(eqx.Module):
    """Causal attention whose heads share keys and values (Shazeer 2019), a quarter of the cache to read, and a dense layer."""
    query: eqx.nn.Linear
    pair: eqx.nn.Linear
    out: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        keys, self.heads = jax.random.split(key, 5), heads
        self.query, self.pair = linear(keys[0], width, width), linear(keys[1], width, 2 * width // heads)
        self.out = linear(keys[2], width, width, scale=0.3)
        self.up, self.down = linear(keys[3], width, 4 * width), linear(keys[4], 4 * width, width, scale=0.3)

    def ask(self, h):
        """Queries (N, heads, D), keys and values (N, D) of h (N, width)."""
        h = normalise(h)
        return apply(self.query, h).reshape(len(h), self.heads, -1), *jnp.split(apply(self.pair, h), 2, axis=1)

    def answer(self, h, seen):
        h = h + apply(self.out, seen.reshape(len(h), -1))
        return h + apply(self.down, jnp.square(jax.nn.relu(apply(self.up, normalise(h)))))

    def __call__(self, h):
        """All places (N, width) at once."""
        q, k, v = self.ask(h)
        scores = jnp.einsum("nhd,md->hnm", q, k) / math.sqrt(k.shape[1])
        seen = jax.nn.softmax(jnp.where(jnp.tri(len(h), dtype=bool), scores, -jnp.inf))                   # (heads, N, N)
        return self.answer(h, jnp.einsum("hnm,md->nhd", seen, v))

    def step(self, h, cache, place):
        """One place, h (1, width), after those whose keys (D, N) and values (N, D) are in the cache."""
        (q, k, v), (keys, values) = self.ask(h), cache
        keys = jax.lax.dynamic_update_slice(keys, k.T, (0, place))
        values = jax.lax.dynamic_update_slice(values, v, (place, 0))
        scores = q[0] @ keys / math.sqrt(k.shape[1])                                                      # (heads, N)
        seen = jax.nn.softmax(jnp.where(jnp.arange(len(values)) <= place, scores, -jnp.inf))
        return self.answer(h, seen @ values), (keys, values)


class GPT(eqx.Module):
    """Tokens of patches from left to right: F places tell the particle, and each place the logits of the token after it."""
    known: Known
    table: jax.Array
    position: jax.Array
    near: eqx.nn.Linear
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, args, conditions, key, width=128, depth=6, heads=4):
        keys, codes = iter(jax.random.split(key, 4 + depth)), GRIDS[args.tokens][1]
        vectors, vicinities, patches = known_shape(args, conditions)
        self.known = Known(args, conditions, width, next(keys))
        self.table, self.position = 0.5 * jax.random.normal(next(keys), (codes, width)), jnp.zeros((vectors - 1 + patches, width))
        self.near, self.head = linear(next(keys), vicinities, width), linear(next(keys), width, codes, scale=0.1)
        self.blocks = [TransformerBlock(width, heads, k) for k in keys]

    def prompt(self, c):
        """Vectors of the particle (F, width), and what is added at the place that tells each token, (P, width)."""
        particle, vicinities = self.known(c)
        return particle, apply(self.near, vicinities) + particle.mean(0) + self.position[len(particle) - 1:]

    def __call__(self, tokens, c):
        """Logits (P, K) of each token (P,) from those before it."""
        particle, ground = self.prompt(c)
        first = len(particle) - 1                                              # place that tells the first token
        h = jnp.concatenate([particle, self.table[tokens[:-1]]])
        h += jnp.concatenate([self.position[:first], ground])
        for block in self.blocks:
            h = block(h)
        return apply(self.head, normalise(h))[first:]

    def step(self, h, caches, place):
        """Logits (K,) after one place, h (width,), and the caches with it."""
        h, found = h[None], []
        for block, cache in zip(self.blocks, caches):
            h, cache = block.step(h, cache, place)
            found.append(cache)
        return apply(self.head, normalise(h))[0], found


def spread_order(shape):
    """Numbers of the patches of a grid in an order in which neighbours lie far apart: by the threshold matrix of Bayer 1973."""
    matrix = np.zeros((1, 1), int)
    while len(matrix) < max(shape):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return np.argsort(matrix[:shape[0], :shape[1]].ravel())


class Masked(eqx.Module):
    """Ours, made for CPUs as fm.py's Dense: embeddings of the tokens that are known, in spread_order, as one vector through
    residual blocks; a network that all places share makes logits of what these return, the vicinity and the tokens around."""
    known: Known
    table: jax.Array
    enter: eqx.nn.Linear
    blocks: list
    leave: eqx.nn.Linear
    position: jax.Array
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: Perceptron
    grid: tuple = eqx.field(static=True)

    def __init__(self, args, conditions, key, width=192, depth=2, own=8, up=12, hidden=128, embedding=128):
        keys, codes, self.grid = iter(jax.random.split(key, 8 + depth)), GRIDS[args.tokens][1], grid(args)
        _, vicinities, patches = known_shape(args, conditions)
        self.known = Known(args, conditions, embedding, next(keys))
        self.table = jax.random.normal(next(keys), (codes + 1, own))           # the last: not known yet
        self.enter = linear(next(keys), own * patches, width)
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave, self.position = linear(next(keys), width, up * patches), jnp.zeros((patches, hidden))
        self.local, self.modulation = linear(next(keys), up + vicinities + 9 * own, hidden), linear(next(keys), width, 2 * hidden)
        self.head = Perceptron(next(keys), hidden, 128, codes)

    def __call__(self, tokens, number, places, c):
        """Logits (M, K) at `places` (M,) when the first `number` () of spread_order are known, those of tokens (P,)."""
        particle, vicinities = self.known(c)
        rank = np.argsort(spread_order(self.grid))
        vectors = self.table[jnp.where(rank < number, tokens, len(self.table) - 1)]                       # (P, own)
        h, e = self.enter(vectors.ravel()), particle.mean(0)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        context, (width, height) = self.leave(h).reshape(len(tokens), -1), self.grid
        padded = jnp.pad(vectors.reshape(width, height, -1), ((1, 1), (1, 1), (0, 0)))
        around = [padded[i:i + width, j:j + height].reshape(len(tokens), -1) for i in range(3) for j in range(3)]
        own = jnp.concatenate([context, vicinities, *around], axis=1)[places]                             # (M, up + N + 9 own)
        scale, shift = jnp.split(self.modulation(h), 2)
        h = (apply(self.local, own) + self.position[places]) * (1 + scale) + shift
        return self.head(jax.nn.silu(h))


PRIORS = {"gpt": GPT, "gpt-4m": partial(GPT, width=256), "masked": Masked}   # about 1, 4 and 1.5 million parameters
PRIOR_EPOCHS, PRIOR_BATCH = {"gpt": 1, "gpt-4m": 1, "masked": 12}, {"gpt": 64, "gpt-4m": 64, "masked": 256}


class VQGAN(eqx.Module):
    """What a checkpoint keeps: the code vectors (K, D), the decoder, the VQ-VAE of the particle and the prior."""
    codes: jax.Array
    decoder: Decoder
    particle: ParticleVQ | None
    prior: eqx.Module


def make_network(args, conditions, key):
    """What a stage trains."""
    return Stage1(args, conditions, key) if args.stage == "1" else PRIORS[args.prior](args, conditions, key)


def make_vqgan(args, conditions, key):
    """A VQGAN that is not trained: the shapes of a checkpoint."""
    particle = ParticleVQ(conditions, key) if args.particle == "tokens" else None
    return VQGAN(jnp.zeros((GRIDS[args.tokens][1], DIMENSION)), Decoder(args, conditions, key), particle,
                 PRIORS[args.prior](args, conditions, key))


# ------------------------------------------------------------------------------------------------------------ objective

def unit(h):
    """Of length 1 over the last axis."""
    return h * jax.lax.rsqrt(jnp.sum(h**2, axis=-1, keepdims=True) + 1e-12)


def lookup(vectors, h):
    """Eq. 5: the nearest of the code vectors (K, D) to each h (..., D), all of unit length, int32 (...)."""
    return jnp.argmax(h @ vectors.T, axis=-1).astype(jnp.int32)                # |h - z|^2 = 2 - 2 h z


def quantise(codebook, h):
    """Code vectors (..., D) of h (..., D), whose gradient goes straight to h; tokens (...); |h - sg(z_q)|^2 of Eq. 6 (...)."""
    vectors = jax.lax.stop_gradient(codebook.vectors)
    tokens = lookup(vectors, jax.lax.stop_gradient(h))
    z = vectors[tokens]
    return h + jax.lax.stop_gradient(z - h), tokens, jnp.sum(jnp.square(h - z), axis=-1)


def renew(codebook, h, tokens, key):
    """A step of the moving averages on h (N, D) with tokens (N,). Dead codes are put on vectors of the batch, taken with a chance
    as the square of their distance from their code (k-means++, Arthur and Vassilvitskii 2007)."""
    fallen = jnp.zeros_like(codebook.counts).at[tokens].add(1.0)
    counts = DECAY * codebook.counts + (1 - DECAY) * fallen
    sums = DECAY * codebook.sums + (1 - DECAY) * jnp.zeros_like(codebook.sums).at[tokens].add(h)
    chance = jnp.cumsum(jnp.sum(jnp.square(h - codebook.vectors[tokens]), axis=1) + 1e-9)
    chosen = jnp.searchsorted(chance, chance[-1] * jax.random.uniform(key, counts.shape))
    dead, fresh = counts < DEAD, 1.1 * DEAD * h[jnp.minimum(chosen, len(h) - 1)]  # dead again after 10 steps without a patch
    found = jnp.where(dead[:, None], fresh, sums), jnp.where(dead, 1.1 * DEAD, counts)
    return eqx.tree_at(lambda book: (book.sums, book.counts), codebook, found)


def usage(fallen):
    """Perplexity and share of the codes in use, from how many patches fell to each, (K,)."""
    share = fallen / jnp.maximum(jnp.sum(fallen), 1)
    return {"perplexity": jnp.exp(jnp.sum(jax.scipy.special.entr(share))), "used": jnp.mean(fallen > 0)}


# same as fm.py: count_loss
def count_loss(counts, location, scale):
    """-log P(n) per fibre, P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)) with F the logistic distribution; P(0) = F(sqrt 2)."""
    upper = (2 * jnp.sqrt(counts + 0.5) - location) / scale
    lower = (2 * jnp.sqrt(jnp.maximum(counts - 0.5, 0)) - location) / scale
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel
    lit = jax.nn.softplus(lower) - jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    return jax.nn.softplus(-upper) + jnp.where(counts > 0, lit, 0.0)


def logistic(maps):
    """Location and scale (H, W) on the axis 2 sqrt(n) from maps (3, H, W): shift from the root of the rate, log of the scale,
    log of the rate, as in vae.py."""
    return maps[0] + 2 * jnp.exp(jnp.clip(maps[2], -15, 9) / 2), jnp.exp(jnp.clip(maps[1], -4, 3))


def count_likelihood(maps, counts):
    """-log P(n) of one response, nats: of the logistic distributions that counts are drawn from, and of Poisson distributions with
    the rates in their middle, which is strict with bright fibres, as in vae.py."""
    log_rate = jnp.clip(maps[2], -15, 9)
    poisson = jnp.exp(log_rate) - counts * log_rate + jax.lax.lgamma(counts + 1)
    return jnp.sum(count_loss(counts, *logistic(maps)) + poisson)


def squared_error(maps, counts):
    """Of log responses, summed over the fibres of one."""
    return jnp.sum(jnp.square(maps[0] - jnp.log1p(counts)))


RECONSTRUCTION, MAPS = {"sample": count_likelihood, "round": squared_error}, {"sample": 3, "round": 1}   # by --counts


def picture(maps, key, args):
    """What features and critic see of a reconstruction, a log response (H, W): with counts that are drawn, log(1 + n) of one, whose
    gradient is that of the number before it is cut into a count, softly above 0."""
    if args.counts == "round":
        return maps[0]
    location, scale = logistic(maps)
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    x = location + scale * jnp.log(u / (1 - u))                                # on the axis 2 sqrt(n), as draw_counts
    soft = jnp.log1p(jnp.square(jax.nn.softplus(x)) / 4)
    exact = jnp.log1p(jnp.floor(jnp.square(jnp.maximum(x, 0) / 2) + 0.5))
    return soft + jax.lax.stop_gradient(exact - soft)


# same as latent_fm.py: unit_gradient
@jax.custom_vjp
def unit_gradient(x):
    """x (B, ...) itself, but the gradient of what is computed from it has norm 1 / B in each of the B examples."""
    return x


# same as latent_fm.py: unit_backward
def unit_backward(_, gradient):
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)), keepdims=True))
    return (gradient / (norm + 1e-12) / len(gradient),)


unit_gradient.defvjp(lambda x: (x, None), unit_backward)


def perceptual(maps, real_maps):
    """LPIPS (Zhang et al. 2018) without its weights: squared distance of features of unit length, mean over patches, (B,)."""
    direction = lambda m: m / jnp.sqrt(jnp.sum(m**2, axis=-1, keepdims=True) + 1e-2)   # dark places are left alone
    return sum(jnp.sum((direction(m) - direction(r))**2, axis=-1).mean(1) for m, r in zip(maps, real_maps))


# same as latent_fm.py: quantities
def quantities(counts):
    """What the features learn to tell of counts (B, H, W): log sums of the channels and of all, centre in (-1, 1); (B, 8)."""
    sums = jnp.einsum("bhw,hwk->bk", counts, metrics.channel_weights(counts.shape[1:]))
    total = counts.sum((1, 2))
    places = [jnp.linspace(-1, 1, n) for n in counts.shape[1:]]
    centre = [(counts.sum(axis) @ place) / (total + 1) for axis, place in zip((2, 1), places)]
    return jnp.concatenate([jnp.log1p(sums), jnp.log1p(total)[:, None], jnp.stack(centre, axis=1)], axis=1)


def judge(net, maps, counts, real_maps, key, args):
    """The three terms of Eq. 7 for decoded maps (B, M, H, W) of counts (B, H, W): reconstruction, perceptual, adversarial, (B,).
    Summed over the batch, the gradient of each at `maps` has norm 1 / B in every example; none reaches features or critic."""
    features, critic = jax.lax.stop_gradient((net.features, net.critic))
    keys = jax.random.split(key, len(counts))
    seen = lambda: jax.vmap(features)(jax.vmap(lambda maps, key: picture(maps, key, args))(unit_gradient(maps), keys))[0]
    return (jax.vmap(RECONSTRUCTION[args.counts])(unit_gradient(maps), counts), perceptual(seen(), real_maps),
            -jax.vmap(critic)(seen()).mean(1))                                 # the generator's hinge loss


def adversarial_loss(net, maps, commitment, counts, key, args):
    """Eq. 7, and the terms that features and critic learn from: maps (B, M, H, W), commitment (B,), counts (B, H, W)."""
    x, keys = jnp.log1p(counts), jax.random.split(key, len(counts))
    made = jax.lax.stop_gradient(jax.vmap(lambda maps, key: picture(maps, key, args))(maps, keys))
    real_maps, told = jax.vmap(net.features)(x)
    frozen_maps, made_maps = jax.lax.stop_gradient((real_maps, jax.vmap(net.features)(made)[0]))
    terms = judge(net, maps, counts, frozen_maps, key, args)
    slope = jax.grad(lambda maps: jax.vmap(RECONSTRUCTION[args.counts])(maps, counts).sum())(jax.lax.stop_gradient(maps))
    norm = jnp.sqrt(jnp.sum(slope**2, axis=(1, 2, 3))) + 1e-12                 # of the gradient that the commitment goes with
    regression = jnp.mean(jnp.square(told - quantities(counts)))
    hinge = jax.nn.relu(1 - jax.vmap(net.critic)(frozen_maps)).mean() + jax.nn.relu(1 + jax.vmap(net.critic)(made_maps)).mean()
    parts = {"perceptual": terms[1].mean(), "fooled": terms[2].mean(), "features": regression, "critic": hinge}
    return sum(term.sum() for term in terms) + jnp.mean(commitment / norm) + regression + hinge, parts


def autoencoder_loss(net, counts, c, key, args):
    """Eq. 6, or Eq. 7 of paper 002, for counts (B, H, W), c (B, C) -> loss, (its parts, [(h, tokens) for each codebook])."""
    autoencoder, counts = net.autoencoder, counts.astype(jnp.float32)
    h = jax.vmap(autoencoder.encode)(counts, c)                                # (B, P, D)
    codes, tokens, distance = quantise(autoencoder.codebook, h)
    maps = jax.vmap(autoencoder.decode)(codes, c).astype(jnp.float32)
    reconstruction = jax.vmap(RECONSTRUCTION[args.counts])(maps, counts)       # (B,)
    commitment = COMMITMENT * distance.sum(1)
    fallen = jnp.zeros_like(autoencoder.codebook.counts).at[tokens.ravel()].add(1.0)
    parts = {"reconstruction": reconstruction.mean() / counts[0].size, "commitment": distance.mean(), **usage(fallen)}
    loss, found = jnp.mean(reconstruction + commitment) / tokens.shape[1], [(h, tokens)]
    if args.variant == "vqgan":
        loss, more = adversarial_loss(net, maps, commitment, counts, key, args)
        parts |= more
    if args.particle == "tokens":
        h = jax.vmap(net.particle.encode)(c)
        codes, tokens, distance = quantise(net.particle.codebook, h)
        parts["particle"] = jnp.mean(jnp.square(net.particle.decoder(codes.reshape(len(c), -1)) - c))
        loss += parts["particle"] + COMMITMENT * distance.mean()               # Eq. 6, of the particle
        found.append((h, tokens))
    return loss, (parts, [(h.reshape(-1, DIMENSION), tokens.ravel()) for h, tokens in found])


def cross_entropy(logits, tokens):
    """-log p of tokens (...), nats, from logits (..., K)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)


def gpt_loss(prior, tokens, c, key):
    """-log p of each token (P,) of one response after those before it."""
    return cross_entropy(prior(tokens, c), tokens), jnp.ones(len(tokens))


def masked_loss(prior, tokens, c, key):
    """-log p of the next HORIZON tokens of spread_order when some number of the first are known, and which count, (M,) each."""
    order, ahead = jnp.asarray(spread_order(prior.grid)), min(HORIZON, len(tokens))
    number = jax.random.randint(key, (), 0, len(tokens))
    first = jnp.minimum(number, len(tokens) - ahead)
    places = jax.lax.dynamic_slice(order, (first,), (ahead,))
    counted = (first + jnp.arange(ahead) >= number).astype(jnp.float32)
    return cross_entropy(prior(tokens, number, places, c), tokens[places]), counted


def batch_loss(net, batch, c, key, args):
    """The loss of the stage, and (its parts, what fell to the codes)."""
    if args.precision == "bf16":
        net = eqx.tree_at(codebooks, common.cast(net, jnp.bfloat16), codebooks(net))                      # averages: float32
    if args.stage == "1":
        return autoencoder_loss(net, batch, c, key, args)
    one = masked_loss if isinstance(net, Masked) else gpt_loss
    nats, weights = jax.vmap(partial(one, net))(batch.astype(jnp.int32), c, jax.random.split(key, len(c)))
    loss = jnp.sum(nats * weights) / jnp.sum(weights)
    return loss, ({"nats per token": loss}, [])


def codebooks(net):
    """Those that stage 1 renews, a list."""
    return [part.codebook for part in (net.autoencoder, net.particle) if part] if isinstance(net, Stage1) else []


# -------------------------------------------------------------------------------------------------------------- sampler

def narrowed(logits, args):
    """Logits (..., K) by --temperature, -inf outside --top-k and --top-p."""
    logits = logits.astype(jnp.float32) / max(args.temperature, 1e-4)
    if args.top_k:
        ranked = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(args.top_k, logits.shape[-1]))[0])
        least = ranked[..., -1:]                                               # without the barrier XLA sorts all, 20 times as long
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if args.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(ranked)
        before = jnp.cumsum(share, axis=-1) - share                            # of the likelier ones
        least = jnp.min(jnp.where((before < args.top_p).at[..., 0].set(True), ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw_tokens(logits, key):
    """Tokens int32 (...) from logits (..., K), by inversion: one random number each, where the usual way needs K."""
    total = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    u = 1 - jax.random.uniform(key, total[..., :1].shape)                      # above 0: no token without a chance
    return jnp.sum(total < u * total[..., -1:], axis=-1, dtype=jnp.int32)


def generate_gpt(prior, c, key, args):
    """Tokens (B, P), one after the other for the whole batch, with a cache of keys and values: all steps cost nearly the same."""
    particle, ground = jax.vmap(prior.prompt)(c)                               # (B, F, width), (B, P, width)
    advance, first, number = jax.vmap(prior.step, (0, 0, None)), particle.shape[1] - 1, ground.shape[1]
    empty = jnp.zeros((len(c), prior.blocks[0].pair.out_features // 2, 0), particle.dtype)
    caches, found, h = [(empty, empty.transpose(0, 2, 1)) for _ in prior.blocks], [], particle[:, 0]
    longer = lambda n: [(jnp.pad(k, ((0, 0), (0, 0), (0, n))), jnp.pad(v, ((0, 0), (0, n), (0, 0)))) for k, v in caches]
    for place in range(first):                                                 # the particle, but for its last vector
        caches = longer(1)
        caches, h = advance(h + prior.position[place], caches, place)[1], particle[:, place + 1]

    def one(carry, item):
        (h, caches), (i, key) = carry, item
        logits, caches = advance(h + ground[:, i], caches, first + i)
        tokens = draw_tokens(narrowed(logits, args), key)
        return (prior.table[tokens], caches), tokens

    keys = jax.random.split(key, number)
    for part in np.array_split(np.arange(number), SEGMENTS):
        caches = longer(len(part))
        (h, caches), tokens = jax.lax.scan(one, (h, caches), (jnp.asarray(part), keys[part[0]:part[-1] + 1]))
        found.append(tokens)                                                   # (part, B)
    return jnp.concatenate(found).T


def passes(number, steps):
    """(known before, known after) of each pass: few tokens first, by a cosine (Chang et al. 2022), none of them empty."""
    ends = np.round(number * (1 - np.cos(np.pi / 2 * np.arange(steps + 1) / steps))).astype(int)
    ends = np.unique(ends)
    return list(zip(ends[:-1], ends[1:]))


def generate_masked(prior, c, key, args):
    """Tokens (B, P) in `--steps` passes; those of one pass are independent of each other."""
    order = spread_order(prior.grid)
    tokens, stages = jnp.zeros((len(c), len(order)), jnp.int32), passes(len(order), args.steps)
    for (known, end), key in zip(stages, jax.random.split(key, len(stages))):
        places = order[known:end]
        logits = jax.vmap(lambda tokens, c: prior(tokens, known, places, c))(tokens, c)
        tokens = tokens.at[:, places].set(draw_tokens(narrowed(logits, args), key))
    return tokens


def generate_tokens(prior, c, key, args):
    """One new grid of tokens (B, P) for each c (B, ...), conditions or tokens of the particle."""
    return (generate_masked if isinstance(prior, Masked) else generate_gpt)(prior, c, key, args)


def known_of(particle, c):
    """What a prior is told of conditions c (B, C): these, or the tokens (B, 2) of a ParticleVQ."""
    return c if particle is None else jax.vmap(particle.tokens)(c)


def decode_new(net, c, key, args):
    """Decoded maps (B, M, H, W) of new tokens for each condition c (B, C)."""
    tokens = generate_tokens(net.prior, known_of(net.particle, c), key, args)
    return jax.vmap(net.decoder)(net.codes[tokens], c).astype(jnp.float32)


def decode_again(net, counts, c, key):
    """Decoded maps (B, M, H, W) of the tokens of each response, counts (B, H, W); net is an Autoencoder."""
    tokens = jax.vmap(net.tokens)(counts.astype(jnp.float32), c)
    return jax.vmap(net.decode)(net.codebook.vectors[tokens], c).astype(jnp.float32)


# same as fm.py: draw_counts
def draw_counts(location, scale, key):
    """Photon counts from the distribution of count_loss, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    x = jnp.maximum(location + scale * jnp.log(u / (1 - u)), 0)
    return jnp.floor(jnp.square(x / 2) + 0.5)


def to_counts(maps, key, args):
    """Decoded maps (B, M, H, W) -> photon counts uint16 (B, H, W)."""
    if args.counts == "sample":
        counts = draw_counts(*jax.vmap(logistic)(maps), key)
    else:
        counts = jnp.maximum(jnp.round(jnp.expm1(maps[:, 0])), 0)
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


# same as vae.py: in_halves
def in_halves(decode, args):
    """draw(*inputs, key) -> photon counts uint16 (B, H, W): `decode`, and counts of what it returns, compiled one by one.
    Together, XLA draws each count while it looks up the patch of its fibre, one at a time, which takes twice as long on a CPU."""
    decode, count = eqx.filter_jit(decode), jax.jit(lambda maps, key: to_counts(maps, key, args))

    def draw(*inputs):
        *inputs, key = inputs
        latent_key, count_key = jax.random.split(key)
        return count(decode(*inputs, latent_key), count_key)

    return draw


# same as vae.py: sampler
def sampler(args, net):
    """draw(c (B, C), key) -> one response for each condition, uint16 (B, H, W), compiled once for each batch size. On a CPU, a
    large batch goes in blocks that stay in its cache."""
    draw, block = in_halves(lambda net, c, key: decode_new(net, c, key, args), args), metrics.BLOCK

    def drawn(c, key):
        if len(c) <= block or jax.default_backend() != "cpu":
            return draw(net, c, key)
        starts = range(0, len(c), block)
        keys = jax.random.split(key, len(starts))
        return jnp.concatenate([draw(net, c[start:start + block], k) for start, k in zip(starts, keys)])

    return drawn


# ------------------------------------------------------------------------------------------------------------- training

# same as fm.py: State
class State(eqx.Module):
    """What a step changes: weights, their moving average, the optimiser."""
    net: eqx.Module
    ema: eqx.Module
    optimiser: optax.OptState


# same as latent_fm.py: make_optimiser
def make_optimiser(args, steps):
    """AdamW behind a clip of the gradient norm, one for the model and one for each that judges it; the learning rate ends near 0
    after `steps` steps."""
    schedule = (optax.cosine_onecycle_schedule(steps, args.lr, 0.1, 10, 100) if args.schedule == "onecycle"
                else optax.cosine_decay_schedule(args.lr, steps))
    own = optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))
    owner = lambda path, _: path[0].name if path[0].name in ("features", "critic") else "model"
    return optax.partition({"model": own, "features": own, "critic": own}, lambda net: jax.tree.map_with_path(owner, net))


# same as fm.py: start
def start(args, conditions, optimiser, key):
    """The State before the first step."""
    net = make_network(args, conditions, key)
    ema = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, net)   # a copy: the step gives its buffers away
    return State(net, ema, optimiser.init(eqx.filter(net, eqx.is_inexact_array)))


def make_step(args, optimiser):
    """step((batch, c, key, number), state) -> (state, losses): gradient, update, codes and moving average in one compiled call."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, state):
        batch, c, key, number = batch
        loss_key, code_key = jax.random.split(jax.random.fold_in(key, number))
        (_, (losses, fallen)), gradient = eqx.filter_value_and_grad(batch_loss, has_aux=True)(state.net, batch, c, loss_key, args)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, eqx.filter(state.net, eqx.is_inexact_array))
        net = eqx.apply_updates(state.net, updates)
        books = [renew(book, h, tokens, code_key) for book, (h, tokens) in zip(codebooks(state.net), fallen)]
        decay = jnp.minimum(args.ema, (1 + number) / (10 + number))            # short at first
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new if eqx.is_inexact_array(old) else old, state.ema, net)
        net, ema = (eqx.tree_at(codebooks, each, books) for each in (net, ema))                          # averages already
        return State(net, ema, optimiser_state), losses | {"gradient norm": optax.tree.norm(gradient)}

    return step


def train(args, responses, conditions, rows):
    """Train a stage on the given rows of responses, or tokens, (N, ...) and conditions, or tokens of the particle, (N, C). Returns
    the averaged network and {"train_seconds", "step_seconds"}.

    As fm.py's: a plain loop over epochs whose numbers follow from --seed and the number of the step.
    """
    mesh = common.batch_mesh(args.devices)
    per_epoch = len(rows) // args.batch_size
    model_key, train_key = jax.random.split(jax.random.key(args.seed))
    optimiser = make_optimiser(args, args.epochs * per_epoch)
    header = {"script": args.script, "detector": args.detector, "flags": training_flags(args), "rows": len(rows)}
    with common.Logbook(args, header, args.epochs * per_epoch) as book:
        state = common.replicate(book.begin(start(args, data.CONDITIONS[args.cond], optimiser, model_key)), mesh)
        step = make_step(args, optimiser)
        for epoch in range(book.step // per_epoch, args.epochs):
            order = data.batches(rows, args.batch_size, np.random.default_rng([args.seed, epoch]))
            for batch_rows in order[book.step % per_epoch:]:
                batch_rows = np.split(batch_rows, jax.process_count())[jax.process_index()]   # those of this host
                batch = common.shard_batch((responses[batch_rows], conditions[batch_rows]), mesh)
                state, losses = step((*batch, train_key, np.int32(book.step)), state)
                book.record(state, losses)
    return state.ema, book.end()


def training_flags(args):
    """The flags that decide what is trained, for the header of a checkpoint; the prior does not change stage 1."""
    own = "variant", "tokens", "counts", "particle"
    return common.training_flags(args, *own, *(() if args.stage == "1" else ("prior", "stage1_epochs", "stage1_batch")))


def stage_flags(args, stage):
    """The flags of one stage, which has a folder of its own. With --stage 2, stage 1 is read there (and finished if need be)."""
    run, both = args.run / f"stage{stage}", {"stage": stage, "stage1_epochs": args.epochs, "stage1_batch": args.batch_size}
    if stage == "1":
        return common.with_flags(args, **both, run=run, resume=args.resume or args.stage == "2")
    resume = args.resume and (run / "state.eqx").exists()                      # a run may have been cut off before stage 2
    return common.with_flags(args, **both, run=run, resume=resume, epochs=args.prior_epochs, batch_size=args.prior_batch)


# same as latent_fm.py: in_blocks
def in_blocks(function, *arrays):
    """function(*blocks, key) over the rows of arrays (N, ...) in blocks of one shape: an array (N, ...)."""
    found, rows = [], len(arrays[0])
    for start in range(0, rows, metrics.BLOCK):
        blocks = [np.resize(array[start:start + metrics.BLOCK], (metrics.BLOCK, *array.shape[1:])) for array in arrays]
        found.append(np.asarray(function(*blocks, jax.random.key(start))))     # the last block is filled up with repeated rows
    return np.concatenate(found)[:rows]


def tokens_of(net, dataset, c):
    """Tokens uint16 (N, P) of all responses by an Autoencoder."""
    encode = eqx.filter_jit(lambda net, counts, c: jax.vmap(net.tokens)(counts.astype(jnp.float32), c))
    return in_blocks(lambda counts, c, key: encode(net, counts, c).astype(np.uint16), dataset.responses, c)


def tell_usage(name, tokens, codes):
    """{"perplexity", "used"} of the codes over tokens (...), printed, and a collapse said."""
    fallen = jnp.asarray(np.bincount(tokens.ravel(), minlength=codes), jnp.float32)
    found = {name: float(value) for name, value in usage(fallen).items()}
    print(f"{'COLLAPSED: ' if found['used'] < 0.1 else ''}{name}: {100 * found['used']:.1f} % of {codes} codes used, perplexity "
          f"{found['perplexity']:.1f}")
    return found


def train_stages(args, dataset, rows, scaler):
    """Both stages, or one. Returns (VQGAN, None after stage 1 alone, Autoencoder, {"stage1", "stage2": of the Logbook, ...})."""
    if args.stage == "2" and not (args.run / "stage1" / "state.eqx").exists():
        raise UserError(f"--stage 2 needs the autoencoder of {args.run / 'stage1'}: train stage 1 first, with the same flags")
    if not 2 <= args.prior_batch <= len(rows):
        raise UserError(f"--prior-batch {args.prior_batch}: expected 2 to {len(rows)}, the training rows")
    c = data.conditions(dataset.particles, scaler)
    first, told = train(stage_flags(args, "1"), dataset.responses, c, rows)
    tokens = tokens_of(first.autoencoder, dataset, c)
    told = {"stage1": told, "codebook": tell_usage("patches", tokens[rows], GRIDS[args.tokens][1])}
    known = c
    if args.particle == "tokens":
        known = np.asarray(eqx.filter_jit(known_of)(first.particle, c))
        told["particle codebook"] = tell_usage("particles", known[rows], 512)
    if args.stage == "1":
        return None, first.autoencoder, told
    prior, told["stage2"] = train(stage_flags(args, "2"), tokens, known, rows)
    told["train_seconds"] = told["stage1"]["train_seconds"] + told["stage2"]["train_seconds"]
    net = VQGAN(first.autoencoder.codebook.vectors, first.autoencoder.decoder, first.particle, prior)
    return net, first.autoencoder, told


# ------------------------------------------------------------------------------------------------ scoring and generating

# same as latent_fm.py: score_reconstruction
def score_reconstruction(args, net, scaler, test):
    """{"W", "oracle", "R", "MAE"} of test responses encoded and decoded again, once; oracle and R are None with --data."""
    draw = in_halves(decode_again, args)
    again = in_blocks(lambda counts, c, key: draw(net, counts, c, key), test.responses, data.conditions(test.particles, scaler))
    truth, found = metrics.channels(test.responses), metrics.channels(again)
    oracle = None if args.data else metrics.wasserstein(truth, metrics.rerun(args, test))
    score = {"W": metrics.wasserstein(truth, found), "oracle": oracle, "MAE": metrics.mae(truth, found)}
    score["R"] = oracle and score["W"] / oracle
    print("reconstruction: " + ", ".join(f"{name} {value:.3f}" for name, value in score.items() if value))
    return score


def evaluations(args):
    """Of the prior per response: places of the transformer, or passes."""
    return len(passes(math.prod(grid(args)), args.steps)) if args.prior == "masked" else math.prod(grid(args))


def cost(args, net, conditions):
    """{"parameters", "mflop"} of a response, as XLA counts them: the prior's evaluations and the decoder."""
    number, codes = math.prod(grid(args)), len(net.codes)
    total = common.network_cost(net.decoder, (number, DIMENSION), (conditions,))["mflop"]
    if args.prior == "masked":
        zeros = known_of(net.particle, jnp.zeros((1, conditions)))[0]
        calls = [lambda _, k=known, e=end: net.prior(jnp.zeros(number, jnp.int32), k, np.arange(k, e), zeros) for known, end in
                 passes(number, args.steps)]
        total += sum(common.network_cost(call, ())["mflop"] for call in calls)
    else:
        width, depth = net.prior.table.shape[1], len(net.prior.blocks)
        narrow = width // net.prior.blocks[0].heads
        products = depth * (10 * width**2 + 2 * width * narrow + width * (number + 1)) + width * codes  # half the places
        total += 2e-6 * number * products
    return {"parameters": common.count_parameters(net), "mflop": total}


def sweep_cases(args):
    """(label, flags) of --sweep: temperature and top-k (paper 001, Fig. 7), and the steps of the masked prior."""
    cases = [(f"top-k {k}" if k else "all", common.with_flags(args, temperature=t, top_k=k)) for k in TOP_KS for t in TEMPERATURES]
    steps = [("steps", common.with_flags(args, steps=steps)) for steps in STEPS] if args.prior == "masked" else []
    return steps + cases


# Of the GPT: tokens, network, precision, batch, each row with one change. ms on one GPU: paper 002, Table 5
COMPARED = ((36, "gpt-4m", "f32", 256, 0.09), (121, "gpt-4m", "f32", 256, 0.80), (121, "gpt", "f32", 256, 0.60),
            (121, "gpt", "bf16", 256, 0.45), (121, "gpt", "f32", 1024, None), (121, "gpt", "f32", 16384, None),
            (121, "masked", "f32", 256, None), (121, "masked", "f32", 16384, None))


def compare(args):
    """ms per response of networks that are not trained, by tokens, size, precision and batch: paper 002, Table 5, 001, Table 2."""
    rows, conditions = [], data.CONDITIONS[args.cond]
    for tokens, prior, precision, batch, published in COMPARED:
        here = common.with_flags(args, tokens=tokens, prior=prior)
        net = common.cast(make_vqgan(here, conditions, jax.random.key(0)), {"f32": jnp.float32, "bf16": jnp.bfloat16}[precision])
        draw = partial(sampler(here, net), np.zeros((batch, conditions), np.float32), jax.random.key(0))
        ms = 1e3 * common.race({"draw": draw}, repeats=2 if batch <= 256 else 1)["draw"] / batch
        rows.append({"tokens": math.prod(grid(here)), "prior": prior, **cost(here, net, conditions), "precision": precision,
                     "batch": batch, "ms_per_response": ms, "change": ms / rows[-1]["ms_per_response"] - 1 if rows else None,
                     "published_ms": published})
    common.print_rows(rows)
    result = {"script": "vqgan", "detector": args.detector, "command": args.command, "device": common.device_name(), "rows": rows}
    common.write_json(args.run / "compare.json", result)
    return result


def main(argv=None):
    """Train (or load) and score, or generate. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.initialize_hosts()
    common.enable_compilation_cache()
    if args.compare:
        return compare(args)
    if args.load:
        scaler, header = data.read_model(args, ("variant", "tokens", "counts", "particle", "prior", "cond", "n", "split"))
        like = eqx.filter_eval_shape(make_vqgan, args, len(scaler.mean), jax.random.key(0))          # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, told = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    tests = data.test_sets(args, dataset, split[2], seed)
    if not args.load:
        args.prior_epochs = args.prior_epochs or PRIOR_EPOCHS[args.prior]
        args.prior_batch = args.prior_batch or min(PRIOR_BATCH[args.prior], args.batch_size)
        scaler, both = data.fit_conditions(dataset.particles[split[0]], args.cond), {"stage1_epochs": args.epochs}
        trained = training_flags(common.with_flags(args, **both, stage1_batch=args.batch_size))
        trained |= {"prior_epochs": args.prior_epochs, "prior_batch": args.prior_batch}
        net, autoencoder, told = train_stages(args, dataset, split[0], scaler)
        told["reconstruction"] = score_reconstruction(args, autoencoder, scaler, next(iter(tests.values())))
        if args.stage == "1":
            return told
        net = data.save_model(args, trained, scaler, told, net)
    if args.sweep:
        found = metrics.sweep(args, [({"label": label, "steps": evaluations(case), "evaluations": evaluations(case),
                                       "temperature": case.temperature, "top_k": case.top_k},
                                      metrics.generator(args, sampler(case, net), scaler)) for label, case in sweep_cases(args)],
                              dataset, split[1])
        if args.load:
            return found
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost(args, net, len(scaler.mean)), "steps": args.steps,
              "evaluations": evaluations(args), "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, **told}
    sizes = common.BATCHES if args.prior == "masked" else (1, 32, 256, 1024)
    return metrics.report(args, sampler(args, net), scaler, tests, result, sizes)


if __name__ == "__main__":
    common.run(main)
