"""Latent flow matching for the zero degree calorimeters (paper 002, M. Wojnar, "Even faster simulations with flow matching").

Stage 1, an autoencoder: q(z | x, c) shrinks a response x to a latent z, p(x | z, c) makes a response of it.
Stage 2, flow matching from noise z_0 to the latents z_1 of a particle's responses:
    z_t = (1 - t) z_0 + t z_1        (Eq. 3)        L = E || v_theta(z_t, t, c) - (z_1 - z_0) ||^2        (Eq. 4 and 6)
A response costs a few small steps in the latent and one pass of the decoder.

`--net dense` (default, ours): a few numbers as latent, a decoder that gives each fibre a distribution of counts to draw from,
    L = -log p(x | z, c) + KL(q(z | x, c) || N(0, 1)), with no weight to tune. `--likelihood poisson` is a rate, but photons
    come in bursts and spread more than that; `logistic` (default), as in vae.py, draws around the rate and learns both.
`--net paper` (its appendix B): a convolutional autoencoder on log responses with a grid of latents, a quarter as fine, and
    L = sum of L_k / || dL_k / dx' ||  over k = autoencoder, perceptual, adversarial, at the reconstruction x'   (Eq. 7);
    the latter two see features of a small network that learns them here, since no VGG16 has ever seen a calorimeter.

    python latent_fm.py --detector zn --steps 7                       both stages on 60 000 rows of the open data
    python latent_fm.py --detector zn --steps 7 --stage 2             the flow again, on the autoencoder of the run folder
    python latent_fm.py --load weights/latent_fm-zn.eqx --generate particles.csv --out responses.h5

Prints the trainings, the score of the reconstruction, then every score of metrics.py beside its oracle; writes
runs/latent_fm-zn/, the states of the stages in folders of their own.
"""
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
from common import UserError

SWEEP = 1, 2, 4, 7, 11, 16, 32           # steps
LATENT = {"zn": 32, "zp": 16}            # with 32 for ZP, W is a quarter higher: the flow loses the brightness [validation rows]
TERMS, FEW = 30, 10.0   # of draw_poisson: a count above 29 has a probability of 3e-7 at a rate of 10


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    parser = common.parser(__doc__, "latent_fm", n=60_000, epochs=12, lr=2e-3, steps=7)
    parser.add_argument("--net", choices=AUTOENCODERS, default="dense", help="networks of both stages (default: dense)")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both",
                        help="train the autoencoder, or the flow on that in --run, with the same flags but --flow-epochs, or both "
                             "(default: both)")
    parser.add_argument("--flow-epochs", type=common.number(int, 1, 10**6), default=40, metavar="N",
                        help="passes over the training rows in stage 2, where steps are cheap (default: 40)")
    parser.add_argument("--latent", type=common.number(int, 1, 1024), metavar="N",
                        help="numbers in the latent (default: 32 for ZN, 16 for ZP), or in each of its places with --net paper "
                             "(default: 4)")
    parser.add_argument("--beta", type=common.number(float, 0), default=0.01, metavar="WEIGHT",
                        help="of KL against the squared error with --net paper (default: 0.01)")
    parser.add_argument("--likelihood", choices=("logistic", "poisson"), default="logistic",
                        help="of the photons, with --net dense: a logistic distribution cut into counts, or counts from a rate "
                             "(default: logistic)")
    parser.add_argument("--solver", choices=("ab2", "euler"), default="ab2",
                        help="of the path: ab2 is Adams-Bashforth, second order at Euler's cost (default: ab2)")
    parser.add_argument("--sweep", action="store_true",
                        help="score 1 to 32 steps on the validation rows, with a figure; with --load nothing else")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# For ONE example: log response x (H, W), conditions c (C,), latent z, a vector (L,) or a grid (h, w, L), time t (); vmap makes
# the batch. encode(x, c) returns mean and log of the standard deviation of z, (2, *z.shape); decode(z, c) maps (M, H, W).

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


# same as fm.py: light
def light(bumps, patches):
    """Sum of patches (P, 16) under each of the bumps (P, K, 16), of unit length so that its noise is that of a fibre: (K,)."""
    return jnp.sum(bumps * patches[:, None], (0, 2)) / jnp.sqrt(jnp.sum(bumps**2, (0, 2)) + 1e-2)


class Encoder(eqx.Module):
    """Log response -> (2, L): patches of 4 x 4 fibres shrink to a few numbers each and pass, with the light around the places
    where the particle may hit, through residual blocks as one vector."""
    squeeze: eqx.nn.Linear
    enter: eqx.nn.Linear
    blocks: list
    out: eqx.nn.Linear
    detector: data.Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, latent, key, width=256, depth=2, down=8, embedding=128, size=4):
        keys = iter(jax.random.split(key, 3 + depth))
        bumps = vicinity(jnp.zeros(conditions), detector, size)[1]
        self.detector, self.size = detector, size
        self.squeeze = linear(next(keys), size**2, down)
        self.enter = linear(next(keys), down * len(bumps) + bumps.shape[1], width)
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.out = linear(next(keys), width, 2 * latent)

    def __call__(self, x, c, e):
        patches, bumps = common.cast((to_patches(x, self.size), vicinity(c, self.detector, self.size)[1]), e.dtype)
        h = self.enter(jnp.concatenate([apply(self.squeeze, patches).ravel(), light(bumps, patches)]))       # (width,)
        for block in self.blocks:
            h = block(h, e)
        return self.out(normalise(h)).reshape(2, -1)


class Decoder(eqx.Module):
    """Latent -> maps (M, H, W) for the likelihood: a few numbers for each patch, which a small network that all patches share
    puts together with the vicinity of the places where the particle may hit."""
    enter: eqx.nn.Linear
    blocks: list
    leave: eqx.nn.Linear
    position: jax.Array
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: eqx.nn.Linear
    detector: data.Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, latent, maps, key, width=256, depth=2, up=12, hidden=64, embedding=128, size=4):
        keys = iter(jax.random.split(key, 5 + depth))
        offsets, bumps = vicinity(jnp.zeros(conditions), detector, size)
        self.detector, self.size = detector, size
        self.enter = linear(next(keys), latent, width)
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave = linear(next(keys), width, up * len(bumps))
        self.position = jnp.zeros((len(bumps), hidden))
        self.local = linear(next(keys), up + offsets.shape[1] + bumps[0].size, hidden)
        self.modulation = linear(next(keys), width, 2 * hidden)
        self.head = linear(next(keys), hidden, maps * size**2, scale=0.1)

    def __call__(self, z, c, e):
        z, offsets, bumps = common.cast((z, *vicinity(c, self.detector, self.size)), e.dtype)
        h = self.enter(z)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        own = jnp.concatenate([self.leave(h).reshape(len(bumps), -1), offsets, bumps.reshape(len(bumps), -1)], axis=1)
        scale, shift = jnp.split(self.modulation(h), 2)
        h = (apply(self.local, own) + self.position) * (1 + scale) + shift                                  # (P, hidden)
        return from_patches(apply(self.head, jax.nn.silu(h)), self.size, self.detector.shape)


class DenseAutoencoder(eqx.Module):
    """Ours: encoder and decoder know the particle; decodes shift, log of the scale and of the rate, or that alone."""
    embedding: Embedding
    encoder: Encoder
    decoder: Decoder

    def __init__(self, args, conditions, key):
        keys, detector, maps = jax.random.split(key, 3), data.DETECTORS[args.detector], MAPS[args.likelihood]
        self.embedding, self.encoder = Embedding(conditions, 128, keys[0]), Encoder(detector, conditions, args.latent, keys[1])
        self.decoder = Decoder(detector, conditions, args.latent, maps, keys[2])

    def encode(self, x, c):
        return self.encoder(x, c, self.embedding(0.0, c))

    def decode(self, z, c):
        return self.decoder(z, c, self.embedding(0.0, c))

    def without_encoder(self):
        return eqx.tree_at(lambda net: net.encoder, self, None)


class FlowBlock(eqx.Module):
    """Residual block on one vector (width,); particle and time scale, shift and gate it, each by a part of its own."""
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    particle: eqx.nn.Linear
    time: eqx.nn.Linear

    def __init__(self, width, particle, time, key):
        keys = jax.random.split(key, 4)
        self.up, self.down = eqx.nn.Linear(width, 2 * width, key=keys[0]), eqx.nn.Linear(2 * width, width, key=keys[1])
        self.particle, self.time = (eqx.nn.Linear(n, 3 * width, key=k) for n, k in zip((particle, time), keys[2:]))

    def __call__(self, h, particle, time):
        scale, shift, gate = jnp.split(self.particle(particle) + self.time(time), 3)
        return h + gate * self.down(jax.nn.silu(self.up(normalise(h) * (1 + scale) + shift)))


class DenseFlow(eqx.Module):
    """Ours: the velocity (L,) at z (L,), t and c, by residual blocks. Particle and time are embedded apart, so that all that hangs
    on the particle alone, most of the products, is the same in each step of a response: XLA computes it once."""
    particle: list
    time: eqx.nn.Linear
    enter: eqx.nn.Linear
    blocks: list
    out: eqx.nn.Linear

    def __init__(self, latent, conditions, key, width=112, depth=3, embedding=192, times=32):
        keys = iter(jax.random.split(key, 5 + depth))
        known = conditions + len(waves(np.zeros(conditions)))
        self.particle = [eqx.nn.Linear(n, embedding, key=next(keys)) for n in (known, embedding)]
        self.time, self.enter = eqx.nn.Linear(16, times, key=next(keys)), linear(next(keys), latent, width)
        self.blocks = [FlowBlock(width, embedding, times, next(keys)) for _ in range(depth)]
        self.out = linear(next(keys), width, latent, scale=0.1)

    def __call__(self, z, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        sines, particle = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]), jnp.concatenate([c, waves(c)])
        z, time, particle = common.cast((z, sines, particle), self.enter.weight.dtype)
        for layer in self.particle:
            particle = jax.nn.silu(layer(particle))
        time, h = jax.nn.silu(self.time(time)), self.enter(z)
        for block in self.blocks:
            h = block(h, particle, time)
        return self.out(normalise(h))


# same as fm.py: convolve
def convolve(x, kernel, stride=1):
    """x (H, W, C_in), kernel (k, k, C_in, C_out); channels last is the fast layout on CPU."""
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


# same as fm.py: weight
def weight(key, *shape, scale=None):
    """Normal weights, variance 1 / fan-in unless a scale is given."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


# same as fm.py: pixelwise
def pixelwise(layer, x):
    return jax.vmap(jax.vmap(layer))(x)


# same as fm.py: ResBlock
class ResBlock(eqx.Module):
    """norm, SiLU, 3 x 3 convolution, twice, with the time embedding added in between."""
    norms: list
    kernels: list
    time: jax.Array
    shortcut: jax.Array | None

    def __init__(self, inputs, outputs, embedding, key):
        keys = jax.random.split(key, 4)
        self.norms = [eqx.nn.LayerNorm(inputs), eqx.nn.LayerNorm(outputs)]
        self.kernels = [weight(keys[0], 3, 3, inputs, outputs), weight(keys[1], 3, 3, outputs, outputs, scale=1e-4)]
        self.time = weight(keys[2], embedding, outputs)
        self.shortcut = None if inputs == outputs else weight(keys[3], inputs, outputs)

    def __call__(self, x, t, c):
        h = convolve(jax.nn.silu(pixelwise(self.norms[0], x)), self.kernels[0]) + jax.nn.silu(t @ self.time)
        h = convolve(jax.nn.silu(pixelwise(self.norms[1], h)), self.kernels[1])
        return h + (x if self.shortcut is None else x @ self.shortcut)


# same as fm.py: Attention
class Attention(eqx.Module):
    """Self-attention over the pixels and one more token, made of the condition."""
    token: jax.Array
    norm: eqx.nn.LayerNorm
    qkv: jax.Array
    out: jax.Array
    heads: int = eqx.field(static=True)

    def __init__(self, inputs, width, embedding, key, heads=2):
        keys = jax.random.split(key, 3)
        self.token, self.norm, self.heads = weight(keys[0], embedding, inputs), eqx.nn.LayerNorm(inputs), heads
        self.qkv, self.out = weight(keys[1], inputs, 3 * width), weight(keys[2], width, inputs, scale=0.2 * width**-0.5)

    def __call__(self, x, t, c):
        tokens = jnp.concatenate([x.reshape(-1, x.shape[-1]), (c @ self.token)[None]])               # (H W + 1, C)
        q, k, v = jnp.moveaxis((jax.vmap(self.norm)(tokens) @ self.qkv).reshape(len(tokens), 3, self.heads, -1), 0, 2)
        scores = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5)               # (heads, T, T)
        h = jnp.einsum("hqk,hkd->qhd", scores, v).reshape(len(tokens), -1)
        return x + (h @ self.out)[:-1].reshape(x.shape)


class ConvBlock(eqx.Module):
    """Residual block of two 3 x 3 convolutions on (h, w, C)."""
    kernels: list

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.kernels = [weight(keys[0], 3, 3, width, width), weight(keys[1], 3, 3, width, width, scale=0.02)]

    def __call__(self, x):
        h = convolve(jax.nn.silu(normalise(x)), self.kernels[0])
        return x + convolve(jax.nn.silu(normalise(h)), self.kernels[1])


def in_fours(x):
    """(H, W) -> (H / 2, W / 2, 4), the sides rounded up: a convolution of one channel at full size is the slowest of all."""
    return to_patches(x, 2).reshape(*(-(-n // 2) for n in x.shape), 4)


class PaperAutoencoder(eqx.Module):
    """The autoencoder of paper 002, appendix B, after Rombach et al. 2022: two convolutions that halve the size, residual blocks
    at half and at a quarter of it, and back; 56 320 parameters (paper: 60k). It works on log responses and does not know the
    particle. No layer has the full size, since convolutions there cost a CPU more than all others together."""
    down: list
    code: jax.Array
    enter: jax.Array
    up: list
    head: jax.Array
    shape: tuple = eqx.field(static=True)

    def __init__(self, args, conditions, key, widths=(16, 32)):
        keys, (a, b), latent = iter(jax.random.split(key, 10)), widths, args.latent
        self.shape = data.DETECTORS[args.detector].shape
        self.down = [weight(next(keys), 3, 3, 4, a), ConvBlock(a, next(keys)),
                     weight(next(keys), 3, 3, a, b), ConvBlock(b, next(keys))]
        self.code, self.enter = weight(next(keys), b, 2 * latent), weight(next(keys), latent, b)
        self.up = [ConvBlock(b, next(keys)), weight(next(keys), 3, 3, b, a), ConvBlock(a, next(keys))]
        self.head = weight(next(keys), a, 4)

    def encode(self, x, c):
        stem, first, half, second = self.down
        h = first(convolve(in_fours(x).astype(stem.dtype), stem))                                   # (H / 2, W / 2, a)
        h = second(convolve(h, half, stride=2)) @ self.code                                         # (H / 4, W / 4, 2 L)
        return jnp.stack(jnp.split(h, 2, axis=-1))

    def decode(self, z, c):
        first, wider, second = self.up
        h = first(z.astype(self.enter.dtype) @ self.enter)                                          # (H / 4, W / 4, b)
        height, width = (-(-n // 2) for n in self.shape)
        h = second(convolve(h.repeat(2, axis=0).repeat(2, axis=1)[:height, :width], wider))         # (H / 2, W / 2, a)
        fibres = (normalise(h) @ self.head).reshape(-1, 4)                                          # four of each place
        return from_patches(fibres, 2, self.shape)

    def without_encoder(self):
        return eqx.tree_at(lambda net: (net.down, net.code), self, (None, None))


class PaperFlow(eqx.Module):
    """The U-Net of fm.py's PaperUNet in the latent: levels of 8, 12 and 16 channels, two blocks each, attention with the condition
    as a token on the second level and in the middle; (h, w, L) -> (h, w, L)."""
    condition: tuple
    time: tuple
    stem: jax.Array
    down: list
    middle: list
    up: list
    resample: list
    norm: eqx.nn.LayerNorm
    head: jax.Array

    def __init__(self, latent, conditions, key, widths=(8, 12, 16)):
        keys = iter(jax.random.split(key, 64))
        a, b, c = widths
        embedding = 2 * a
        res = lambda inputs, outputs: ResBlock(inputs, outputs, embedding, next(keys))
        attend = lambda inputs, width: Attention(inputs, width, embedding, next(keys))
        self.condition = weight(next(keys), conditions, embedding), weight(next(keys), embedding, embedding)
        self.time = weight(next(keys), a, embedding), weight(next(keys), embedding, embedding)
        self.stem = weight(next(keys), 3, 3, latent, a)
        self.down = [[res(a, a), res(a, a)], [attend(a, b), res(a, b), attend(b, b), res(b, b)], [res(b, c), res(c, c)]]
        self.middle = [res(c, c), attend(c, c), res(c, c), attend(c, c), res(c, c)]
        self.up = [[res(2 * c, c), res(2 * c, c)],
                   [attend(c + b, b), res(c + 2 * b, b), attend(2 * b, b), res(2 * b + a, b)],
                   [res(b + a, a), res(2 * a, a)]]
        self.resample = [weight(next(keys), 3, 3, width, width) for width in (a, b, c, b)]
        self.norm, self.head = eqx.nn.LayerNorm(a), weight(next(keys), a, latent)

    def __call__(self, x, t, c):
        angles = t * 1e4 ** -jnp.linspace(0, 1, len(self.time[0]) // 2, endpoint=False)
        x, t, c = common.cast((x, jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]), c), self.stem.dtype)
        t = jax.nn.silu(t @ self.time[0]) @ self.time[1]
        c = jax.nn.silu(c @ self.condition[0]) @ self.condition[1]
        x, skips = convolve(x, self.stem), []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                x = block(x, t, c)
                skips.append(x)
            x = convolve(x, self.resample[level], stride=2) if level < 2 else x
        for block in self.middle:
            x = block(x, t, c)
        for level, blocks in enumerate(self.up):
            for block in blocks:
                x = block(jnp.concatenate([skips.pop(), x], axis=-1), t, c)
            if level < 2:
                h, w, _ = skips[-1].shape
                x = convolve(x.repeat(2, axis=0).repeat(2, axis=1)[:h, :w], self.resample[2 + level])
        return jax.nn.silu(pixelwise(self.norm, x)) @ self.head


class Features(eqx.Module):
    """What stands in for VGG16: convolutions that learn, on the responses themselves, to tell the photons of the five channels,
    of all fibres, and their centre. Returns its maps, (H / 2, W / 2, 16) and (H / 4, W / 4, 32), and those eight numbers."""
    kernels: list
    head: eqx.nn.Linear

    def __init__(self, shape, key, widths=(16, 32)):
        keys = jax.random.split(key, 3)
        places = math.prod(-(-n // 4) for n in shape)
        self.kernels = [weight(keys[0], 3, 3, 4, widths[0]), weight(keys[1], 3, 3, *widths)]
        self.head = linear(keys[2], widths[1] * places, 8, scale=0.1)

    def __call__(self, x):
        first = jax.nn.silu(convolve(in_fours(x).astype(self.kernels[0].dtype), self.kernels[0]))
        second = jax.nn.silu(convolve(first, self.kernels[1], stride=2))
        return (first, second), self.head(second.ravel())


class Critic(eqx.Module):
    """Linear on each map of the features: how real every place looks, (places of all maps,)."""
    layers: list

    def __init__(self, key, widths=(16, 32)):
        self.layers = [linear(k, width, 1) for k, width in zip(jax.random.split(key), widths)]

    def __call__(self, maps):
        return jnp.concatenate([apply(layer, pixelwise(normalise, m)).ravel() for layer, m in zip(self.layers, maps)])


AUTOENCODERS, FLOWS = {"dense": DenseAutoencoder, "paper": PaperAutoencoder}, {"dense": DenseFlow, "paper": PaperFlow}


class Stage1(eqx.Module):
    """What stage 1 trains: the autoencoder, and with --net paper what judges it."""
    autoencoder: eqx.Module
    features: Features | None
    critic: Critic | None

    def __init__(self, args, conditions, key):
        keys, detector = jax.random.split(key, 3), data.DETECTORS[args.detector]
        self.autoencoder = AUTOENCODERS[args.net](args, conditions, keys[0])
        self.features = Features(detector.shape, keys[1]) if args.net == "paper" else None
        self.critic = Critic(keys[2]) if args.net == "paper" else None


class LatentFM(eqx.Module):
    """What a checkpoint keeps: the autoencoder without its encoder, which is never asked again, mean and standard deviation of the
    latents, and the flow from N(0, 1) to latents that are standardised by them."""
    autoencoder: eqx.Module
    mean: jax.Array
    std: jax.Array
    flow: eqx.Module


def latent_shape(args):
    """Of z: a vector, or a grid with --net paper."""
    grid = tuple(-(-n // 4) for n in data.DETECTORS[args.detector].shape) if args.net == "paper" else ()
    return *grid, args.latent


def make_network(args, conditions, key):
    """What a stage trains."""
    return Stage1(args, conditions, key) if args.stage == "1" else FLOWS[args.net](args.latent, conditions, key)


def make_latent_fm(args, conditions, key):
    """A LatentFM that is not trained: the shapes of a checkpoint."""
    autoencoder = AUTOENCODERS[args.net](args, conditions, key).without_encoder()
    flow = FLOWS[args.net](args.latent, conditions, key)
    return LatentFM(autoencoder, jnp.zeros(latent_shape(args)), jnp.ones(latent_shape(args)), flow)


# ------------------------------------------------------------------------------------------------------------ objective

# same as vae.py: poisson_loss
def poisson_loss(x, maps, counts):
    """-log P(n) per fibre, P(n) = exp(-r) r^n / n! with maps (B, 1, H, W) of log r; nats."""
    log_rate = jnp.clip(maps[:, 0], -15, 9)
    return jnp.mean(jnp.exp(log_rate) - counts * log_rate + jax.lax.lgamma(counts + 1))


# same as fm.py: count_loss
def count_loss(counts, location, scale):
    """-log P(n) per fibre, P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)) with F the logistic distribution; P(0) = F(sqrt 2)."""
    upper = (2 * jnp.sqrt(counts + 0.5) - location) / scale
    lower = (2 * jnp.sqrt(jnp.maximum(counts - 0.5, 0)) - location) / scale
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel
    lit = jax.nn.softplus(lower) - jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    return jax.nn.softplus(-upper) + jnp.where(counts > 0, lit, 0.0)


# same as vae.py: logistic_loss
def logistic_loss(x, maps, counts):
    """-log P(n) per fibre of the logistic distribution that counts are drawn from, and of a Poisson distribution with the rate in
    its middle, maps (B, 3, H, W); nats. The latter is strict with bright fibres: alone, the former takes a wide distribution for a
    narrow shower and leaves the latent out of it (W of ZP's reconstruction three times as high [validation rows])."""
    return jnp.mean(count_loss(counts, *logistic(maps))) + poisson_loss(x, maps[:, 2:], counts)


# same as vae.py: logistic
def logistic(maps):
    """Location and scale (B, H, W) on the axis 2 sqrt(n) from maps (B, 3, H, W): shift from the root of the rate, log of the scale,
    log of the rate."""
    return maps[:, 0] + 2 * jnp.exp(jnp.clip(maps[:, 2], -15, 9) / 2), jnp.exp(jnp.clip(maps[:, 1], -4, 3))


LIKELIHOODS, MAPS = {"logistic": logistic_loss, "poisson": poisson_loss}, {"logistic": 3, "poisson": 1}


def gaussian(codes):
    """Mean and standard deviation of the latents (B, ...) from what the encoder returns, (B, 2, ...)."""
    codes = codes.astype(jnp.float32)
    return codes[:, 0], jnp.exp(jnp.clip(codes[:, 1], -8, 4))


def divergence(mean, std):
    """KL(N(mean, std^2) || N(0, 1)) of each latent (B, ...), summed over its numbers: (B,)."""
    return 0.5 * jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std), axis=tuple(range(1, mean.ndim)))


def dense_loss(net, counts, c, key, args):
    """The evidence lower bound, negative and per fibre: counts (B, H, W), c (B, C)."""
    mean, std = gaussian(jax.vmap(net.autoencoder.encode)(jnp.log1p(counts), c))
    z = mean + std * jax.random.normal(key, mean.shape)
    reconstruction = LIKELIHOODS[args.likelihood](None, jax.vmap(net.autoencoder.decode)(z, c).astype(jnp.float32), counts)
    kl = divergence(mean, std).mean() / counts[0].size
    return reconstruction + kl, {"reconstruction": reconstruction, "divergence": kl}


@jax.custom_vjp
def unit_gradient(x):
    """x (B, ...) itself, but the gradient of what is computed from it has norm 1 / B in each of the B examples."""
    return x


def unit_backward(_, gradient):
    norm = jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, gradient.ndim)), keepdims=True))
    return (gradient / (norm + 1e-12) / len(gradient),)


unit_gradient.defvjp(lambda x: (x, None), unit_backward)


def perceptual(maps, real_maps):
    """LPIPS (Zhang et al. 2018) without its weights: squared distance of features of unit length, mean over places, (B,)."""
    unit = lambda m: m / jnp.sqrt(jnp.sum(m**2, axis=-1, keepdims=True) + 1e-2)   # dark places are left alone
    return sum(jnp.sum((unit(m) - unit(r))**2, axis=-1).mean((1, 2)) for m, r in zip(maps, real_maps))


def quantities(counts):
    """What the features learn to tell of counts (B, H, W): log sums of the channels and of all, centre in (-1, 1); (B, 8)."""
    sums = jnp.einsum("bhw,hwk->bk", counts, metrics.channel_weights(counts.shape[1:]))
    total = counts.sum((1, 2))
    places = [jnp.linspace(-1, 1, n) for n in counts.shape[1:]]
    centre = [(counts.sum(axis) @ place) / (total + 1) for axis, place in zip((2, 1), places)]
    return jnp.concatenate([jnp.log1p(sums), jnp.log1p(total)[:, None], jnp.stack(centre, axis=1)], axis=1)


def judge(net, made, x, real_maps):
    """The three terms of Eq. 7 without KL, for reconstructions `made` (B, H, W) of x: squares, perceptual, adversarial, (B,) each.
    Summed over the batch, the gradient of each at `made` has norm 1 / B in every example; none reaches features or critic."""
    features, critic = jax.lax.stop_gradient((net.features, net.critic))
    seen = lambda: jax.vmap(features)(unit_gradient(made))[0]
    return (jnp.sum(jnp.square(unit_gradient(made) - x), axis=(1, 2)), perceptual(seen(), real_maps),
            -jax.vmap(critic)(seen()).mean(1))                                 # the generator's hinge loss


def paper_loss(net, counts, c, key, args):
    """Eq. 7 for the autoencoder; features and critic learn from terms of their own: counts (B, H, W)."""
    x = jnp.log1p(counts)
    mean, std = gaussian(jax.vmap(net.autoencoder.encode)(x, c))
    z = mean + std * jax.random.normal(key, mean.shape)
    made = jax.vmap(net.autoencoder.decode)(z, c)[:, 0].astype(jnp.float32)
    maps, told = jax.vmap(net.features)(x)
    maps, made_maps = jax.lax.stop_gradient((maps, jax.vmap(net.features)(made)[0]))
    squares, percept, fooled = judge(net, made, x, maps)
    norm = 2 * jnp.sqrt(jax.lax.stop_gradient(squares)) + 1e-12                # of the gradient of the squares, which KL goes with
    kl = jnp.mean(args.beta * divergence(mean, std) / norm)
    regression = jnp.mean(jnp.square(told - quantities(counts)))
    hinge = jax.nn.relu(1 - jax.vmap(net.critic)(maps)).mean() + jax.nn.relu(1 + jax.vmap(net.critic)(made_maps)).mean()
    parts = {"squares": squares.mean() / x[0].size, "divergence": divergence(mean, std).mean(), "perceptual": percept.mean(),
             "fooled": fooled.mean(), "features": regression, "critic": hinge}
    return squares.sum() + kl + percept.sum() + fooled.sum() + regression + hinge, parts


def flow_loss(net, codes, c, key, args):
    """Eq. 6 in the latent: codes (B, 2, ...) of the encoder, standardised, c (B, C). t = 0 is noise, t = 1 a response's latent.

    Early times come more often: whether the response will be bright is decided there. Squares count by how exactly the encoder
    tells a number, so that those that hold the brightness are not lost among those of single photons. Neither changes which
    velocity is the best one, the mean. [W of ZP about a sixth lower, validation rows]
    """
    time_key, noise_key, latent_key = jax.random.split(key, 3)
    mean, std = gaussian(codes)
    z1 = mean + std * jax.random.normal(latent_key, mean.shape)
    z0 = jax.random.normal(noise_key, mean.shape)
    t = jnp.square((jnp.arange(len(codes)) + jax.random.uniform(time_key, (len(codes),))) / len(codes))   # stratified: less noise
    mix = jax.vmap(lambda t, z0, z1: (1 - t) * z0 + t * z1)                    # Eq. 3
    error = jax.vmap(net)(mix(t, z0, z1), t, c).astype(jnp.float32) - (z1 - z0)
    precision = 1 / (jnp.mean(std**2, axis=0) + 0.05)
    path = jnp.mean(precision / precision.mean() * error**2)                   # Eq. 4 and 6
    return path, {"path": path}


def batch_loss(net, batch, c, key, args):
    """The loss of the stage and its parts."""
    if args.precision == "bf16":
        net = common.cast(net, jnp.bfloat16)                                   # the conditions hold places: float32
    if args.stage == "2":
        return flow_loss(net, batch, c, key, args)
    return {"dense": dense_loss, "paper": paper_loss}[args.net](net, batch.astype(jnp.float32), c, key, args)


# -------------------------------------------------------------------------------------------------------------- sampler

def integrate(v, z, steps, solver):
    """Follow dz/dt = v(z, t) from t = 0 to 1; unrolled, since XLA is slow on loops on a CPU (`--steps` is small).

    "ab2", the two-step method of Adams and Bashforth, is of second order for one evaluation a step; its first step is Euler's.
    """
    h, before = 1 / steps, None
    for step in range(steps):
        now = v(z, h * step)
        z = z + h * (now if before is None else 1.5 * now - 0.5 * before)                           # euler: Eq. 5
        before = now if solver == "ab2" else None
    return z


# same as vae.py: draw_poisson
def draw_poisson(rate, key):
    """Photon counts float32 of Poisson distributions: by inversion, term by term, below a rate of FEW, and a rounded normal,
    corrected for its skewness (Cornish and Fisher), above. One uniform number per fibre; jax.random.poisson takes 20 times
    as long on a CPU, since its loop runs until the slowest fibre is done."""
    u = jax.random.uniform(key, rate.shape, minval=1e-7, maxval=1 - 1e-7)
    low = jnp.minimum(rate, FEW)
    term = total = jnp.exp(-low)
    counts = (u > total).astype(jnp.float32)
    for n in range(1, TERMS):
        term = term * low / n
        total = total + term
        counts += u > total
    z = jax.scipy.special.ndtri(u)
    return jnp.where(rate < FEW, counts, jnp.round(jnp.maximum(rate + jnp.sqrt(rate) * z + (z**2 - 1) / 6, 0)))


# same as fm.py: draw_counts
def draw_counts(location, scale, key):
    """Photon counts from the distribution of count_loss, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    x = jnp.maximum(location + scale * jnp.log(u / (1 - u)), 0)
    return jnp.floor(jnp.square(x / 2) + 0.5)


# same as vae.py: to_counts
def to_counts(maps, key, args):
    """Decoded maps (B, M, H, W) -> photon counts uint16 (B, H, W)."""
    if args.likelihood == "logistic":
        counts = draw_counts(*logistic(maps), key)
    elif args.likelihood == "poisson":
        counts = draw_poisson(jnp.exp(jnp.clip(maps[:, 0], -15, 9)), key)
    else:
        counts = jnp.maximum(jnp.round(jnp.expm1(maps[:, 0])), 0)
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


def decode_new(net, c, key, args):
    """Decoded maps (B, M, H, W) of one new latent for each condition c (B, C)."""
    z = jax.random.normal(key, (len(c), *latent_shape(args)))
    v = lambda z, t: jax.vmap(net.flow, (0, None, 0))(z, t, c).astype(jnp.float32)
    z = integrate(v, z, args.steps, args.solver) * net.std + net.mean
    return jax.vmap(net.autoencoder.decode)(z, c).astype(jnp.float32)


def decode_again(net, counts, c, key):
    """Decoded maps (B, M, H, W) of the latent of each response, counts (B, H, W); net is an autoencoder."""
    mean, std = gaussian(jax.vmap(net.encode)(jnp.log1p(counts.astype(jnp.float32)), c))
    return jax.vmap(net.decode)(mean + std * jax.random.normal(key, mean.shape), c).astype(jnp.float32)


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


# same as fm.py: make_step
def make_step(args, optimiser):
    """step((counts, c, key, number), state) -> (state, losses): gradient, update and moving average in one compiled call."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, state):
        counts, c, key, number = batch
        key = jax.random.fold_in(key, number)
        (_, losses), gradient = eqx.filter_value_and_grad(batch_loss, has_aux=True)(state.net, counts, c, key, args)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, eqx.filter(state.net, eqx.is_inexact_array))
        net = eqx.apply_updates(state.net, updates)
        decay = jnp.minimum(args.ema, (1 + number) / (10 + number))            # short at first
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new if eqx.is_inexact_array(old) else old, state.ema, net)
        return State(net, ema, optimiser_state), losses | {"gradient norm": optax.tree.norm(gradient)}

    return step


# same as fm.py: train
def train(args, dataset, rows, scaler):
    """Train on the given rows of the data set. Returns the averaged network and {"train_seconds", "step_seconds"}.

    A plain loop over epochs. The order of the rows and all noise follow from --seed and the number of the step, so a run that
    is cut off and continued with --resume ends in the same numbers. The state is saved once a minute.
    """
    mesh, conditions = common.batch_mesh(args.devices), data.conditions(dataset.particles, scaler)
    per_epoch = len(rows) // args.batch_size
    model_key, train_key = jax.random.split(jax.random.key(args.seed))
    optimiser = make_optimiser(args, args.epochs * per_epoch)
    header = {"script": args.script, "detector": args.detector, "flags": training_flags(args), "rows": len(rows)}
    with common.Logbook(args, header, args.epochs * per_epoch) as book:
        state = common.replicate(book.begin(start(args, conditions.shape[1], optimiser, model_key)), mesh)
        step = make_step(args, optimiser)
        for epoch in range(book.step // per_epoch, args.epochs):
            order = data.batches(rows, args.batch_size, np.random.default_rng([args.seed, epoch]))
            for batch_rows in order[book.step % per_epoch:]:
                batch_rows = np.split(batch_rows, jax.process_count())[jax.process_index()]   # those of this host
                batch = common.shard_batch((dataset.responses[batch_rows], conditions[batch_rows]), mesh)
                state, losses = step((*batch, train_key, np.int32(book.step)), state)
                book.record(state, losses)
    return state.ema, book.end()


def training_flags(args):
    """The flags that decide what is trained, for the header of a checkpoint."""
    return common.training_flags(args, "net", "latent", "likelihood", "beta", "stage1_epochs")


def stage_flags(args, stage):
    """The flags of one stage, which has a folder of its own. With --stage 2, stage 1 is read there (and finished if need be)."""
    run, both = args.run / f"stage{stage}", {"stage": stage, "stage1_epochs": args.epochs}
    if stage == "1":
        return common.with_flags(args, **both, run=run, resume=args.resume or args.stage == "2")
    resume = args.resume and (run / "state.eqx").exists()                      # a run may have been cut off before stage 2
    return common.with_flags(args, **both, run=run, resume=resume, epochs=args.flow_epochs)


def in_blocks(function, *arrays):
    """function(*blocks, key) over the rows of arrays (N, ...) in blocks of one shape: an array (N, ...)."""
    found, rows = [], len(arrays[0])
    for start in range(0, rows, metrics.BLOCK):
        blocks = [np.resize(array[start:start + metrics.BLOCK], (metrics.BLOCK, *array.shape[1:])) for array in arrays]
        found.append(np.asarray(function(*blocks, jax.random.key(start))))     # the last block is filled up with repeated rows
    return np.concatenate(found)[:rows]


def train_stages(args, dataset, rows, scaler):
    """Both stages, or one. Returns (LatentFM, None after stage 1 alone, autoencoder, {"stage1", "stage2": of the Logbook})."""
    if args.stage == "2" and not (args.run / "stage1" / "state.eqx").exists():
        raise UserError(f"--stage 2 needs the autoencoder of {args.run / 'stage1'}: train stage 1 first, with the same flags")
    net, first = train(stage_flags(args, "1"), dataset, rows, scaler)
    if args.stage == "1":
        return None, net.autoencoder, {"stage1": first}
    c = data.conditions(dataset.particles, scaler)
    encode = eqx.filter_jit(lambda net, counts, c: jax.vmap(net.encode)(jnp.log1p(counts.astype(jnp.float32)), c))
    codes = in_blocks(lambda counts, c, key: encode(net.autoencoder, counts, c).astype(np.float16), dataset.responses, c)
    np.clip(codes[:, 1], -8, 4, out=codes[:, 1])                               # as in `gaussian`
    mean, std = moments(codes[rows])
    codes[:, 0] -= mean                                                        # in place: they may take a gigabyte
    codes[:, 0] /= std
    codes[:, 1] -= np.log(std)
    flow, second = train(stage_flags(args, "2"), dataset._replace(responses=codes), rows, scaler)   # codes instead of responses
    told = {"stage1": first, "stage2": second, "train_seconds": first["train_seconds"] + second["train_seconds"]}
    return LatentFM(net.autoencoder.without_encoder(), jnp.asarray(mean), jnp.asarray(std), flow), net.autoencoder, told


def moments(codes):
    """Mean and standard deviation of each number of the latents whose codes (N, 2, ...) are given, their own spread included."""
    mean, log_std = codes[:, 0].astype(np.float32), codes[:, 1].astype(np.float32)
    return mean.mean(0), np.sqrt(mean.var(0) + np.exp(2 * log_std).mean(0))


# ------------------------------------------------------------------------------------------------ scoring and generating

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


def main(argv=None):
    """Train (or load) and score, or generate. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.initialize_hosts()
    common.enable_compilation_cache()
    if args.load:
        scaler, header = data.read_model(args, ("net", "latent", "likelihood", "cond", "n", "split"))
        like = eqx.filter_eval_shape(make_latent_fm, args, len(scaler.mean), jax.random.key(0))      # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, told = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    tests = data.test_sets(args, dataset, split[2], seed)
    if not args.load:
        args.latent = args.latent or (4 if args.net == "paper" else LATENT[args.detector])
        args.likelihood = "mse" if args.net == "paper" else args.likelihood
        scaler = data.fit_conditions(dataset.particles[split[0]], args.cond)
        trained = training_flags(common.with_flags(args, stage1_epochs=args.epochs)) | {"flow_epochs": args.flow_epochs}
        net, autoencoder, told = train_stages(args, dataset, split[0], scaler)
        told["reconstruction"] = score_reconstruction(args, autoencoder, scaler, next(iter(tests.values())))
        if args.stage == "1":
            return told
        net = data.save_model(args, trained, scaler, told, net)
    if args.sweep:
        cases = [common.with_flags(args, steps=steps) for steps in SWEEP]
        found = metrics.sweep(args, [({"steps": case.steps, "evaluations": case.steps + 1},
                                      metrics.generator(args, sampler(case, net), scaler)) for case in cases], dataset, split[1])
        if args.load:
            return found
    decoder = common.network_cost(net.autoencoder.decode, latent_shape(args), (len(scaler.mean),))["mflop"]
    flow = common.network_cost(net.flow, latent_shape(args), (), (len(scaler.mean),))["mflop"]
    result = {"flags": trained, "rows": {"train": len(split[0])},
              "parameters": common.count_parameters((net.autoencoder, net.flow)), "mflop": decoder + args.steps * flow,
              "steps": args.steps, "solver": args.solver, "evaluations": args.steps + 1, **told}
    return metrics.report(args, sampler(args, net), scaler, tests, result, common.BATCHES)


if __name__ == "__main__":
    common.run(main)
