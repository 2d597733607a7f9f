"""Autoencoders for the zero degree calorimeters.

An encoder E shrinks a response x to a latent z of a few numbers, a decoder D makes a response of it (paper 000, M. Wojnar et al.,
"Fast simulation of the zero degree calorimeter responses with generative neural networks"). Four ways to a latent for a new
particle c, whose response is then D(z); R is the reconstruction, -log p(x | z) or the square |D(E(x)) - x|^2:
    vae             L = R + KL(q(z | x, c) || N(0, 1)), summed over fibres;                z ~ N(0, 1)
    supervised      L = R + beta |E(x) - c|^2                           (Eq. 1);           z = c
    noise-l2        L = R + beta |G(c, noise) - E(x)|^2;                                   z = G(c, noise), a noise generator
    noise-sinkhorn  L = R + beta S((G(c, noise), c), (E(x), c))         (Eq. 2);           the same, S a Sinkhorn divergence
The last three take means over fibres and over the numbers of the latent, so that beta does not hang on their sizes.

Photons are counts, drawn from what is decoded, so -log p is exact, with no weight to tune. `--likelihood poisson` decodes the rate
of each fibre, but photons come in bursts and spread more than that: `logistic` (default) draws from a logistic distribution of
2 sqrt(n) around the rate, cut into counts, and learns both. `mse` is the papers' way: log responses, squared error, rounding.

    python vae.py --detector zn                                    trains on 60 000 rows of the open data and scores
    python vae.py --detector zn --table                            the twelve combinations of paper 000, Tables 2 to 4
    python vae.py --load weights/vae-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py for seen and unseen particles beside its oracle; writes runs/vae-zn/.
"""
import itertools
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

ARCHITECTURES, VARIANTS = ("cnn", "vit", "mixer"), ("vae", "supervised", "noise-l2", "noise-sinkhorn")
TERMS, FEW = 30, 10.0   # of draw_poisson: a count above 29 has a probability of 3e-7 at a rate of 10
NOISE = 10   # numbers into the noise generator, as many as ALICE O2 feeds its networks


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    shared = tuple(name for name in common.FLAGS if name != "steps")           # one pass: there are no steps to choose
    parser = common.parser(__doc__, "vae", flags=shared, n=60_000, epochs=10, lr=2e-3)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="mixer",
                        help="of encoder and decoder: convolutions, vision transformer or MLP-mixer (default: mixer)")
    parser.add_argument("--variant", choices=VARIANTS, default="vae", help="the way to a latent (default: vae)")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="logistic",
                        help="of the photons: a logistic distribution cut into counts, counts from a rate, or rounded log "
                             "responses (default: logistic)")
    parser.add_argument("--latent", type=common.number(int, 1, 1024), default=24, metavar="N",
                        help="numbers in the latent; the supervised autoencoder has one for each condition (default: 24)")
    parser.add_argument("--beta", type=common.number(float, 0), default=1.0, metavar="WEIGHT",
                        help="of the second term of the loss (default: 1)")
    parser.add_argument("--table", action="store_true", help="only train and score the twelve combinations, side by side")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# For ONE example: x (H, W) log responses, c (C,) conditions, z (L,) latent; vmap makes the batch.

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


# same as fm.py: convolve
def convolve(x, kernel, stride=1):
    """x (H, W, C_in), kernel (k, k, C_in, C_out); channels last is the fast layout on CPU."""
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


# same as fm.py: weight
def weight(key, *shape, scale=None):
    """Normal weights, variance 1 / fan-in unless a scale is given."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


class ConvBlock(eqx.Module):
    """Residual block of two 3 x 3 convolutions on (h, w, C)."""
    kernels: list

    def __init__(self, grid, width, key):
        keys = jax.random.split(key)
        self.kernels = [weight(keys[0], 3, 3, width, width), weight(keys[1], 3, 3, width, width, scale=0.02)]

    def __call__(self, x):
        h = convolve(jax.nn.silu(normalise(x)), self.kernels[0])
        return x + convolve(jax.nn.silu(normalise(h)), self.kernels[1])


class Resample(eqx.Module):
    """3 x 3 convolution to half the size, or from half the size to `grid`."""
    kernel: jax.Array
    grid: tuple = eqx.field(static=True)

    def __init__(self, grid, inputs, outputs, key):
        self.kernel, self.grid = weight(key, 3, 3, inputs, outputs), grid

    def __call__(self, x):
        if self.grid[0] < x.shape[0]:
            return convolve(x, self.kernel, stride=2)
        return convolve(x.repeat(2, axis=0).repeat(2, axis=1)[:self.grid[0], :self.grid[1]], self.kernel)


class Feedforward(eqx.Module):
    """Two layers on the last axis, twice as wide in between."""
    up: jax.Array
    down: jax.Array

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.up, self.down = weight(keys[0], width, 2 * width), weight(keys[1], 2 * width, width, scale=0.5 * width**-0.5)

    def __call__(self, x):
        return jax.nn.silu(x @ self.up) @ self.down


class TransformerBlock(eqx.Module):
    """Self-attention over the tokens and a feedforward layer (paper 000, Fig. 11 b)."""
    qkv: jax.Array
    out: jax.Array
    feedforward: Feedforward
    heads: int = eqx.field(static=True)

    def __init__(self, grid, width, key, heads=4):
        keys = jax.random.split(key, 3)
        self.qkv, self.out = weight(keys[0], width, 3 * width), weight(keys[1], width, width, scale=0.5 * width**-0.5)
        self.feedforward, self.heads = Feedforward(width, keys[2]), heads

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])                                                           # (T, C)
        qkv = (normalise(tokens) @ self.qkv).reshape(len(tokens), 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 0, 2)                                                             # (heads, T, d) each
        scores = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k) / q.shape[-1] ** 0.5)                # (heads, T, T)
        tokens += jnp.einsum("hqk,hkd->qhd", scores, v).reshape(tokens.shape) @ self.out
        return (tokens + self.feedforward(normalise(tokens))).reshape(x.shape)


class MixerBlock(eqx.Module):
    """A feedforward layer over the tokens and one over the channels (paper 000, Fig. 12 b)."""
    tokens: Feedforward
    channels: Feedforward

    def __init__(self, grid, width, key):
        keys = jax.random.split(key)
        self.tokens, self.channels = Feedforward(math.prod(grid), keys[0]), Feedforward(width, keys[1])

    def __call__(self, x):
        h = x.reshape(-1, x.shape[-1])                                                                # (T, C)
        h += self.tokens(normalise(h).T).T
        return (h + self.channels(normalise(h))).reshape(x.shape)


BLOCKS = {"cnn": ConvBlock, "vit": TransformerBlock, "mixer": MixerBlock}
PATCH = {"cnn": 4, "vit": 8, "mixer": 8}      # fibres; 8 makes the 36 tokens of the papers for ZN
WIDTH = {"cnn": 16, "vit": 64, "mixer": 64}   # channels at the patches; the convolutions double them at half the size


def make_layers(arch, grid, key):
    """The layers from the patches (h, w, C) of a grid towards the latent, and the shape that they lead to."""
    width, keys = WIDTH[arch], jax.random.split(key, 3)
    first, last = BLOCKS[arch](grid, width, keys[0]), keys[1]
    if arch != "cnn":
        return [first, BLOCKS[arch](grid, width, last)], (*grid, width)
    half = tuple(-(-n // 2) for n in grid)
    return [first, Resample(half, width, 2 * width, keys[2]), ConvBlock(half, 2 * width, last)], (*half, 2 * width)


class Encoder(eqx.Module):
    """Log response (H, W) and what is known of the particle (K,) -> (outputs,)."""
    patches: eqx.nn.Linear
    position: jax.Array
    layers: list
    out: eqx.nn.Linear
    grid: tuple = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, arch, shape, known, outputs, key):
        keys = jax.random.split(key, 4)
        self.size, self.grid = PATCH[arch], tuple(-(-n // PATCH[arch]) for n in shape)
        self.patches = linear(keys[0], self.size**2, WIDTH[arch])
        self.position = 0.1 * jax.random.normal(keys[1], (math.prod(self.grid), WIDTH[arch]))
        self.layers, coarse = make_layers(arch, self.grid, keys[2])
        self.out = linear(keys[3], math.prod(coarse) + known, outputs)

    def __call__(self, x, known):
        x, known = common.cast((x, known), self.position.dtype)
        h = apply(self.patches, to_patches(x, self.size)) + self.position                          # (P, C)
        h = h.reshape(*self.grid, -1)
        for layer in self.layers:
            h = layer(h)
        return self.out(jnp.concatenate([normalise(h).ravel(), known]))


class Decoder(eqx.Module):
    """The encoder's layers in reverse: code (K,) and the vicinity of each patch (P, N) -> maps (M, H, W)."""
    enter: eqx.nn.Linear
    position: jax.Array
    layers: list
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: eqx.nn.Linear
    shape: tuple = eqx.field(static=True)
    coarse: tuple = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, arch, shape, code, near, maps, key, hidden=64):
        keys = jax.random.split(key, 7)
        self.shape, self.size = shape, PATCH[arch]
        grid, width = tuple(-(-n // self.size) for n in shape), WIDTH[arch]
        layers, self.coarse = make_layers(arch, grid, keys[0])
        self.layers = layers[::-1]
        if arch == "cnn":
            self.layers[1] = Resample(grid, 2 * width, width, keys[1])
        self.enter = linear(keys[2], code, math.prod(self.coarse))
        self.position = 0.1 * jax.random.normal(keys[3], self.coarse)
        self.local, self.modulation = linear(keys[4], width + near, hidden), linear(keys[5], code, 2 * hidden)
        self.head = linear(keys[6], hidden, maps * self.size**2, scale=0.1)

    def __call__(self, code, near):
        code, near = common.cast((code, near), self.position.dtype)
        h = self.enter(code).reshape(self.coarse) + self.position                                     # (h, w, C)
        for layer in self.layers:
            h = layer(h)
        h = jnp.concatenate([normalise(h).reshape(len(near), -1), near], axis=1)                      # (P, C + N)
        scale, shift = jnp.split(self.modulation(code), 2)
        h = jax.nn.silu(apply(self.local, h) * (1 + scale) + shift)                                # (P, hidden)
        return from_patches(apply(self.head, h), self.size, self.shape)


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


class Perceptron(eqx.Module):
    """Two hidden layers on a vector."""
    layers: list

    def __init__(self, inputs, width, outputs, key):
        keys = jax.random.split(key, 3)
        self.layers = [linear(keys[0], inputs, width), linear(keys[1], width, width), linear(keys[2], width, outputs)]

    def __call__(self, x):
        first, second, last = self.layers
        return last(jax.nn.silu(second(jax.nn.silu(first(x.astype(first.weight.dtype))))))


class Autoencoder(eqx.Module):
    """Encoder, decoder and what else a variant has: the decoder of "vae" knows the particle c, that of "supervised" takes its
    latent for it, and the noise generators make a latent of it."""
    encoder: Encoder
    decoder: Decoder
    embedding: Perceptron | None
    generator: Perceptron | None
    detector: data.Detector = eqx.field(static=True)
    variant: str = eqx.field(static=True)
    latent: int = eqx.field(static=True)

    def __init__(self, args, conditions, key, width=128):
        keys = jax.random.split(key, 4)
        self.detector, self.variant = data.DETECTORS[args.detector], args.variant
        known, latent = conditions + len(waves(np.zeros(conditions))), conditions if args.variant == "supervised" else args.latent
        noisy, vae = args.variant.startswith("noise"), args.variant == "vae"
        self.embedding = None if noisy else Perceptron(known, width, width, keys[0])
        self.generator = Perceptron(known + NOISE, width, latent, keys[1]) if noisy else None
        near = self.near(jnp.zeros(0 if noisy else conditions), PATCH[args.arch]).shape[1]
        code, shape = latent + width if vae else latent if noisy else width, self.detector.shape
        self.latent = latent
        self.encoder = Encoder(args.arch, shape, width if vae else 0, 2 * latent if vae else latent, keys[2])
        self.decoder = Decoder(args.arch, shape, code, near, MAPS[args.likelihood], keys[3])

    def near(self, c, size):
        offsets, bumps = vicinity(c, self.detector, size)
        return jnp.concatenate([offsets, bumps.reshape(len(offsets), -1)], axis=1)                    # (P, 3 + 4 size^2)

    def embed(self, c):
        return self.embedding(jnp.concatenate([c, waves(c)]))

    def encode(self, x, c):
        """(L,), for "vae" mean and log of the standard deviation (2 L,)."""
        return self.encoder(x, self.embed(c) if self.variant == "vae" else c[:0])

    def generate(self, c, noise):
        """A latent (L,) of a noise generator."""
        return self.generator(jnp.concatenate([c, waves(c), noise]))

    def decode(self, z, c):
        """Maps (M, H, W) for the likelihood: shift, log of the scale and of the rate, or that alone, or log response."""
        if self.variant == "vae":
            code = jnp.concatenate([z, self.embed(c)])
        elif self.variant == "supervised":
            c = jnp.clip(z, -10, 10)                                           # as data.conditions
            code = self.embed(c)
        else:
            c, code = c[:0], z
        return self.decoder(code, self.near(c, self.decoder.size))


make_network = Autoencoder


# ------------------------------------------------------------------------------------------------------------ objective

def squared_error(x, maps, counts):
    """The first term of Eq. 1 and 2, per fibre, in log responses: x (B, H, W), maps (B, 1, H, W)."""
    return jnp.mean(jnp.square(maps[:, 0] - x))


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


def logistic_loss(x, maps, counts):
    """-log P(n) per fibre of the logistic distribution that counts are drawn from, and of a Poisson distribution with the rate in
    its middle, maps (B, 3, H, W); nats. The latter is strict with bright fibres: alone, the former takes a wide distribution for a
    narrow shower and leaves the latent out of it (W of ZP's reconstruction three times as high [validation rows])."""
    return jnp.mean(count_loss(counts, *logistic(maps))) + poisson_loss(x, maps[:, 2:], counts)


def logistic(maps):
    """Location and scale (B, H, W) on the axis 2 sqrt(n) from maps (B, 3, H, W): shift from the root of the rate, log of the scale,
    log of the rate."""
    return maps[:, 0] + 2 * jnp.exp(jnp.clip(maps[:, 2], -15, 9) / 2), jnp.exp(jnp.clip(maps[:, 1], -4, 3))


LIKELIHOODS = {"logistic": logistic_loss, "poisson": poisson_loss, "mse": squared_error}
MAPS = {"logistic": 3, "poisson": 1, "mse": 1}   # of the decoder


def sinkhorn(a, b, rounds=50, blur=0.05):
    """Debiased Sinkhorn divergence of two batches of points (B, D) with cost |a - b|^2 / 2 (Feydy et al. 2019, Eq. 3):
    OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2, entropy `blur` times the mean cost. Everything stays in logarithms, so that no
    cost leaves the range of float32. Gradients hold the plans fixed (envelope theorem)."""
    cost = lambda a, b: 0.5 * jnp.sum(jnp.square(a[:, None] - b), axis=-1)     # (B, B); |a|^2 + |b|^2 - 2 a b would cancel
    epsilon = blur * jax.lax.stop_gradient(jnp.mean(cost(a, b))) + 1e-12
    between, one, other = (transport(pairs, epsilon, rounds) for pairs in (cost(a, b), cost(a, a), cost(b, b)))
    return between - (one + other) / 2


def transport(cost, epsilon, rounds):
    """Entropic transport cost between uniform weights (B, B), by averaged Sinkhorn rounds on the dual potentials."""
    fixed, log_weight = jax.lax.stop_gradient(cost), -math.log(len(cost))
    soft = lambda potential, cost: -epsilon * jax.nn.logsumexp(log_weight + (potential - cost) / epsilon, axis=1)

    def improve(potentials, _):
        f, g = potentials
        return ((f + soft(g, fixed)) / 2, (g + soft(f, fixed.T)) / 2), None

    zeros = jnp.zeros(len(cost))
    (f, g), _ = jax.lax.scan(improve, (zeros, zeros), length=rounds)
    g = soft(f, fixed.T)
    f = soft(g, fixed)                                                         # the plan's rows now sum to their weights
    plan = jnp.exp((f[:, None] + g - fixed) / epsilon + 2 * log_weight)
    return jnp.mean(f) + jnp.mean(g) + jnp.sum(plan * (cost - fixed))


def second_term(net, out, c, key, args):
    """(latents (B, L) to decode, second term of the loss) from what the encoder returns, out (B, L or 2 L)."""
    if args.variant == "vae":
        mean, log_std = jnp.split(out, 2, axis=1)
        log_std = jnp.clip(log_std, -8, 4)
        divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std, axis=1).mean()
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape), divergence / math.prod(net.detector.shape)
    if args.variant == "supervised":
        return out, jnp.mean(jnp.square(out - c))                              # Eq. 1
    made = jax.vmap(net.generate)(c, jax.random.normal(key, (len(c), NOISE)))
    if args.variant == "noise-l2":
        return out, jnp.mean(jnp.square(made - out))
    # with the particle beside each latent: the latents of each particle are to be alike, not only those of all together
    return out, sinkhorn(jnp.concatenate([made, c], axis=1), jnp.concatenate([out, c], axis=1)) / out.shape[1]   # Eq. 2


def batch_loss(net, counts, c, key, args):
    """counts (B, H, W), c (B, C) -> loss and its parts."""
    counts = counts.astype(jnp.float32)
    if args.precision == "bf16":
        net = common.cast(net, jnp.bfloat16)                                   # the conditions hold places: float32
    x = jnp.log1p(counts)
    out = jax.vmap(net.encode)(x, c).astype(jnp.float32)
    z, second = second_term(net, out, c, key, args)
    first = LIKELIHOODS[args.likelihood](x, jax.vmap(net.decode)(z, c).astype(jnp.float32), counts)
    parts = {"reconstruction": first, "latent": second}
    if args.variant == "vae" and args.likelihood == "mse":
        first = 0.5 * jnp.log(first)     # a normal likelihood of the best variance: no weight to tune (Rybkin et al. 2021)
    if args.variant == "vae" and args.likelihood == "logistic":
        second *= 2                                                            # the first holds two likelihoods, of one response
    return first + args.beta * second, parts


# -------------------------------------------------------------------------------------------------------------- sampler

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


def decode_new(net, c, key, args):
    """Decoded maps (B, M, H, W) of one new latent for each condition c (B, C)."""
    if args.variant == "vae":
        z = jax.random.normal(key, (len(c), args.latent))
    elif args.variant == "supervised":
        z = c
    else:
        z = jax.vmap(net.generate)(c, jax.random.normal(key, (len(c), NOISE)))
    return jax.vmap(net.decode)(z, c)


def to_counts(maps, key, args):
    """Decoded maps (B, M, H, W) -> photon counts uint16 (B, H, W)."""
    if args.likelihood == "logistic":
        counts = draw_counts(*logistic(maps), key)
    elif args.likelihood == "poisson":
        counts = draw_poisson(jnp.exp(jnp.clip(maps[:, 0], -15, 9)), key)
    else:
        counts = jnp.maximum(jnp.round(jnp.expm1(maps[:, 0])), 0)
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


def in_halves(decode, args):
    """draw(*inputs, key) -> photon counts uint16 (B, H, W): `decode`, and counts of what it returns, compiled one by one.
    Together, XLA draws each count while it looks up the patch of its fibre, one at a time, which takes twice as long on a CPU."""
    decode, count = eqx.filter_jit(decode), jax.jit(lambda maps, key: to_counts(maps, key, args))

    def draw(*inputs):
        *inputs, key = inputs
        latent_key, count_key = jax.random.split(key)
        return count(decode(*inputs, latent_key), count_key)

    return draw


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


# same as fm.py: make_optimiser
def make_optimiser(args, steps):
    """AdamW behind a clip of the gradient norm; the learning rate ends near 0 after `steps` steps."""
    schedule = (optax.cosine_onecycle_schedule(steps, args.lr, 0.1, 10, 100) if args.schedule == "onecycle"
                else optax.cosine_decay_schedule(args.lr, steps))
    return optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))


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
    return common.training_flags(args, "arch", "variant", "likelihood", "latent", "beta")


# ------------------------------------------------------------------------------------------------ scoring and generating

# W, MAE and RMSE on GEANT's ZN data: paper 000, Tables 2 to 4; the crosses there did not converge
PUBLISHED = {("cnn", "vae"): (11.52, 17.76, 50.38), ("cnn", "supervised"): (23.71, 31.90, 72.32),
             ("cnn", "noise-sinkhorn"): (26.53, 29.07, 66.16), ("cnn", "noise-l2"): (37.56, 39.32, 92.28),
             ("vit", "vae"): (11.90, 18.05, 49.48), ("vit", "supervised"): (20.43, 30.60, 74.64),
             ("vit", "noise-sinkhorn"): (11.34, 15.88, 44.17), ("vit", "noise-l2"): (11.19, 15.47, 43.49),
             ("mixer", "vae"): (12.22, 18.00, 49.51), ("mixer", "supervised"): (17.08, 26.90, 104.83)}


def table(args, dataset, split):
    """Train every architecture with every variant and score them beside the papers: W on the validation rows, W, MAE and RMSE on
    the test rows. Writes table.json after each, and a model.eqx into a folder for each."""
    scaler, rows = data.fit_conditions(dataset.particles[split[0]], args.cond), []
    parts = {name: data.select(dataset, part) for name, part in zip(("validation", "test"), split[1:])}
    scores = {"W": metrics.wasserstein, "MAE": metrics.mae}
    truth = {name: metrics.channels(part.responses) for name, part in parts.items()}
    again = metrics.rerun(args, parts["test"])
    oracle = {name: None if args.data else score(truth["test"], again) for name, score in scores.items()}

    def scored(here, net, times):
        net = data.save_model(here, training_flags(here), scaler, times, net)
        draw = sampler(here, net)
        made = {name: metrics.generator(here, draw, scaler)(part.particles, 0) for name, part in parts.items()}
        sums = {name: metrics.channels(responses) for name, responses in made.items()}
        zeros = lambda size: np.zeros((size, len(scaler.mean)), np.float32)
        timed = common.time_sampler(lambda size: draw(zeros(size), jax.random.key(0)), sizes=(256,))["ms_per_response"]
        found = {name: score(truth["test"], sums["test"]) for name, score in scores.items()}
        return {"validation_W": metrics.wasserstein(truth["validation"], sums["validation"]), "W": found["W"],
                "R": oracle["W"] and found["W"] / oracle["W"], "MAE": found["MAE"],
                "RMSE": metrics.rmse(parts["test"].responses, made["test"]), "ms_per_response": timed["256"],
                "parameters": common.count_parameters(net), "seconds": times["train_seconds"]}

    for arch, variant in itertools.product(ARCHITECTURES, VARIANTS):
        run = args.run / f"{arch}-{variant}"
        here = common.with_flags(args, arch=arch, variant=variant, run=run, resume=args.resume and (run / "state.eqx").exists())
        published = PUBLISHED.get((arch, variant)) if args.detector == "zn" else None
        row = {"arch": arch, "variant": variant} | dict(zip(("paper_W", "paper_MAE", "paper_RMSE"), published or 3 * (None,)))
        try:
            net, times = train(here, dataset, split[0], scaler)
        except common.Diverged as error:
            print(f"{arch} {variant} diverged: {error}")
            names = "validation_W", "W", "R", "MAE", "RMSE", "ms_per_response", "parameters", "seconds"
            row |= dict.fromkeys(names)
        else:
            row |= scored(here, net, times)
        rows.append(row)
        result = {"script": "vae", "detector": args.detector, "command": args.command, "device": common.device_name(),
                  "versions": common.versions(), "rows": {"train": len(split[0]), "test": len(split[2])}, "oracle": oracle,
                  "table": rows}
        common.write_json(args.run / "table.json", result)
    common.print_rows(rows)
    return result


def main(argv=None):
    """Train (or load) and score, or generate. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.initialize_hosts()
    common.enable_compilation_cache()
    if args.table and args.load:
        raise UserError("--table trains its own networks, it does not go with --load")
    if args.load:
        scaler, header = data.read_model(args, ("arch", "variant", "likelihood", "latent", "cond", "n", "split"))
        like = eqx.filter_eval_shape(make_network, args, len(scaler.mean), jax.random.key(0))  # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, times = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    if not args.load:
        if args.table:
            return table(args, dataset, split)
        scaler, trained = data.fit_conditions(dataset.particles[split[0]], args.cond), training_flags(args)
        net, times = train(args, dataset, split[0], scaler)
        net = data.save_model(args, trained, scaler, times, net)
    cost = common.network_cost(net.decode, (net.latent,), (len(scaler.mean),))
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost, "evaluations": 1, **times}
    return metrics.report(args, sampler(args, net), scaler, data.test_sets(args, dataset, split[2], seed), result,
                          common.BATCHES)


if __name__ == "__main__":
    common.run(main)
