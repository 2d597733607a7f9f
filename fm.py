"""Conditional flow matching for the zero degree calorimeters.

A straight line leads from noise x_0 ~ N(0, 1) at t = 0 to a response x_1 at t = 1 (paper 002, M. Wojnar, "Even faster
simulations with flow matching"):
    x_t = (1 - t) x_0 + t x_1            (Eq. 3)      v_t = x_1 - x_0                            (Eq. 4)
    x_(t+dt) = x_t + dt v_t              (Eq. 5)      L = E || v_theta(x_t, t, c) - v_t ||^2      (Eq. 6)
A network learns v_theta for the particle c; a response is drawn by following it from noise.

Photons are counts, and most fibres hold 0 or 1 of them, so the last part of the path is not integrated. With x = 2 sqrt(n) the
counting noise is about 1 in every fibre; once the noise of the path, (1 - t) / t, has fallen below that (t = 0.6), x_t fixes
everything that the fibres have in common, and the same network gives each fibre its own distribution of counts, trained by
exact likelihood. Drawing from it is one uniform number per fibre. `--counts round` and `floor` are the usual ways, to compare.

    python fm.py --detector zn --steps 11                               eight minutes on two CPU cores, data included
    python fm.py --detector zn --n 306780 --epochs 14 --steps 11        the row in README, half an hour
    python fm.py --load weights/fm-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py for seen and unseen particles beside its oracle; writes runs/fm-zn/.
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

SWEEP = 1, 2, 4, 8, 11, 16, 32   # steps


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    parser = common.parser(__doc__, "fm", n=60_000, epochs=12, lr=2e-3, steps=11)
    parser.add_argument("--net", choices=NETWORKS, default="dense", help="network (default: dense)")
    parser.add_argument("--counts", choices=("sample", "round", "floor"), default="sample",
                        help="how photons become numbers and back: likelihood from --exit on, rounded log1p, or floored "
                             "square roots of dequantised counts (default: sample)")
    parser.add_argument("--exit", type=common.number(float, 0.05, 0.95), default=0.6, metavar="T",
                        help="time at which the counts are drawn, with --counts sample (default: 0.6)")
    parser.add_argument("--solver", choices=SOLVERS, default="ab2",
                        help="of the path: ab2 is Adams-Bashforth, second order at Euler's cost (default: ab2)")
    parser.add_argument("--sweep", action="store_true",
                        help="score 1 to 32 steps on the validation rows, with a figure; with --load nothing else")
    parser.add_argument("--compare", action="store_true", help="only print the cost of the networks, side by side")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# A network maps x (H, W), t () and the condition c (C,) of ONE example to maps (K, H, W); vmap makes the batch.

def linear(key, inputs, outputs, scale=1.0):
    return eqx.tree_at(lambda layer: layer.weight, layer := eqx.nn.Linear(inputs, outputs, key=key), scale * layer.weight)


def apply(layer, h):
    """A Linear on the last axis of h. vmap of the layer leaves the product in an order that costs a CPU twice the time."""
    return h @ layer.weight.T + layer.bias


def normalise(h):
    """Root mean square norm over the last axis."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def to_patches(x, size):
    """(H, W) -> (patches, size * size), padded with zeros where the size does not divide."""
    x = jnp.pad(x, [(0, -n % size) for n in x.shape])
    h, w = x.shape
    x = x.reshape(h // size, size, w // size, size).transpose(0, 2, 1, 3)      # (h, w, size, size)
    return x.reshape(-1, size * size)


def from_patches(patches, size, shape):
    """(patches, K * size * size) -> (K, H, W), the inverse of to_patches for each of K maps."""
    h, w = (-(-n // size) for n in shape)
    x = patches.reshape(h, w, -1, size, size).transpose(2, 0, 3, 1, 4)         # (K, h, size, w, size)
    return x.reshape(-1, h * size, w * size)[:, :shape[0], :shape[1]]


def waves(c):
    """Sines and cosines of the conditions (C,) one by one: slow ones of all, and fast ones, which tell fibres apart, of the
    places, the last three (px and py if there are only the nine features).

    Random mixtures of the conditions, the usual Fourier features, place a narrow shower as well, but with them, or with fast
    waves of every condition, the network knows its training particles by heart: W of unseen ones doubles and more.
    """
    places = c[4:6] if len(c) < data.CONDITIONS["physics"] else c[-3:]
    angles = jnp.concatenate([jnp.outer(2.0 ** jnp.arange(3), c).ravel(), jnp.outer(2.0 ** jnp.arange(3, 7), places).ravel()])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


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


def light(bumps, patches):
    """Sum of patches (P, 16) under each of the bumps (P, K, 16), of unit length so that its noise is that of a fibre: (K,)."""
    return jnp.sum(bumps * patches[:, None], (0, 2)) / jnp.sqrt(jnp.sum(bumps**2, (0, 2)) + 1e-2)


class Dense(eqx.Module):
    """Ours, made for CPUs: few large matrix products and nothing else.

    Patches of 4 x 4 fibres shrink to a few numbers each; all of them, with the light around the places where the particle may
    hit, pass through residual blocks as one wide vector, which returns a few numbers to each patch. A small network that every
    patch shares puts these together with the patch's own x_t, so that single fibres are not lost in the narrow middle, and with
    its vicinity to those places; the wide vector scales and shifts it.
    """
    embedding: Embedding
    squeeze: eqx.nn.Linear
    enter: eqx.nn.Linear
    blocks: list
    leave: eqx.nn.Linear
    position: jax.Array
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: eqx.nn.Linear
    detector: data.Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, maps, key, width, depth, down, up, hidden, embedding, size=4):
        keys = iter(jax.random.split(key, 7 + depth))
        offsets, bumps = vicinity(jnp.zeros(conditions), detector, size)
        patches, near = len(bumps), offsets.shape[1] + bumps[0].size
        self.detector, self.size = detector, size
        self.embedding = Embedding(conditions, embedding, next(keys))
        self.squeeze = linear(next(keys), size**2, down)
        self.enter = linear(next(keys), down * patches + bumps.shape[1], width)
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave = linear(next(keys), width, up * patches)
        self.position = jnp.zeros((patches, hidden))
        self.local = linear(next(keys), up + size**2 + near, hidden)
        self.modulation = linear(next(keys), width, 2 * hidden)
        self.head = linear(next(keys), hidden, maps * size**2, scale=0.1)

    def __call__(self, x, t, c):
        patches, offsets, bumps = common.cast((to_patches(0.5 * x, self.size), *vicinity(c, self.detector, self.size)),
                                              self.enter.weight.dtype)         # (P, 16), (P, 3), (P, 4, 16)
        h = self.enter(jnp.concatenate([apply(self.squeeze, patches).ravel(), light(bumps, patches)]))       # (width,)
        e = self.embedding(t, c)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        context = self.leave(h).reshape(len(patches), -1)                      # (P, up)
        own, near = jnp.concatenate([context, patches], axis=1), jnp.concatenate([offsets, bumps.reshape(len(patches), -1)], axis=1)
        own_weight, near_weight = jnp.split(self.local.weight, [own.shape[1]], axis=1)
        ground = near @ near_weight.T + self.local.bias + self.position        # the same at all times: the sampler computes it once
        scale, shift = jnp.split(self.modulation(h), 2)
        h = (own @ own_weight.T + ground) * (1 + scale) + shift                # (P, hidden)
        return from_patches(apply(self.head, jax.nn.silu(h)), self.size, self.detector.shape)


def convolve(x, kernel, stride=1):
    """x (H, W, C_in), kernel (k, k, C_in, C_out); channels last is the fast layout on CPU."""
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def weight(key, *shape, scale=None):
    """Normal weights, variance 1 / fan-in unless a scale is given."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


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


def pixelwise(layer, x):
    return jax.vmap(jax.vmap(layer))(x)


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


class PaperUNet(eqx.Module):
    """The U-Net of paper 002, section 4: levels of 8, 12 and 16 channels, two blocks each, attention with the condition as a
    token on the second level and in the middle; 77 372 parameters with 9 conditions and one map, as the public code has."""
    condition: tuple
    time: tuple
    stem: jax.Array
    down: list
    middle: list
    up: list
    resample: list
    norm: eqx.nn.LayerNorm
    head: jax.Array

    def __init__(self, detector, conditions, maps, key, widths=(8, 12, 16)):
        keys = iter(jax.random.split(key, 64))
        a, b, c = widths
        embedding = 2 * a
        res = lambda inputs, outputs: ResBlock(inputs, outputs, embedding, next(keys))
        attend = lambda inputs, width: Attention(inputs, width, embedding, next(keys))
        self.condition = weight(next(keys), conditions, embedding), weight(next(keys), embedding, embedding)
        self.time = weight(next(keys), a, embedding), weight(next(keys), embedding, embedding)
        self.stem = weight(next(keys), 3, 3, 1, a // 2)
        self.down = [[res(a // 2, a), res(a, a)], [attend(a, b), res(a, b), attend(b, b), res(b, b)], [res(b, c), res(c, c)]]
        self.middle = [res(c, c), attend(c, c), res(c, c), attend(c, c), res(c, c)]
        self.up = [[res(2 * c, c), res(2 * c, c)],
                   [attend(c + b, b), res(c + 2 * b, b), attend(2 * b, b), res(2 * b + a, b)],
                   [res(b + a, a), res(2 * a, a)]]
        self.resample = [weight(next(keys), 3, 3, width, width) for width in (a, b, c, b)]
        self.norm, self.head = eqx.nn.LayerNorm(a), weight(next(keys), a, maps)

    def __call__(self, x, t, c):
        angles = t * 1e4 ** -jnp.linspace(0, 1, len(self.time[0]) // 2, endpoint=False)
        x, t, c = common.cast((x, jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]), c), self.stem.dtype)
        t = jax.nn.silu(t @ self.time[0]) @ self.time[1]
        c = jax.nn.silu(c @ self.condition[0]) @ self.condition[1]
        x = convolve(x[..., None], self.stem)                                  # (H, W, 4)
        skips = []
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
                x = convolve(x.repeat(2, axis=0).repeat(2, axis=1), self.resample[2 + level])[:h, :w]
        return jnp.moveaxis(jax.nn.silu(pixelwise(self.norm, x)) @ self.head, -1, 0)


NETWORKS = {"paper": PaperUNet,
            "compact": partial(Dense, width=48, depth=2, down=4, up=4, hidden=44, embedding=32),   # at most 100 000 parameters
            "dense": partial(Dense, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)}


def make_network(args, conditions, key):
    """One map is the velocity (the paper's network with the papers' counts), four are the denoised response, three more
    the distribution of the counts."""
    maps = 7 if args.counts == "sample" else 1 if args.net == "paper" else 4
    return NETWORKS[args.net](data.DETECTORS[args.detector], conditions, maps, key)


# ------------------------------------------------------------------------------------------------------------ objective
# t = 0 is noise, t = 1 is the response.

def to_state(counts, how, key):
    """Photon counts (H, W) -> x_1."""
    if how == "round":
        return jnp.log1p(counts)                                               # the papers
    noise = jax.random.uniform(key, counts.shape) if how == "floor" else 0.0
    return 2 * jnp.sqrt(counts + noise)                                        # variance of a Poisson count: about 1


def to_counts(x, how):
    """The inverse, to whole photons."""
    counts = jnp.round(jnp.expm1(x)) if how == "round" else jnp.floor(jnp.square(jnp.maximum(x, 0) / 2))
    return jnp.maximum(counts, 0)


def velocity(maps, x, t):
    """v_theta(x_t, t, c) from the maps of the network: a single map itself, else by (x_1 - x_t) / (1 - t) (Eq. 3 and 4) from
    the mean of x_1, which is linear in x_t times the probability that the fibre holds light at all."""
    if len(maps) == 1:
        return maps[0]
    x1 = (maps[0] + maps[1] * x) * jax.nn.sigmoid(maps[2] + maps[3] * x)
    return (x1 - x) / jnp.maximum(1 - t, 0.05)


def count_distribution(maps, x):
    """Location and scale of each fibre's logistic distribution on the axis 2 sqrt(n), from x_t and the last three maps."""
    return maps[-3] + maps[-2] * x, jnp.exp(jnp.clip(maps[-1], -4, 3))


def count_loss(counts, location, scale):
    """-log P(n) per fibre, P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)) with F the logistic distribution; P(0) = F(sqrt 2)."""
    upper = (2 * jnp.sqrt(counts + 0.5) - location) / scale
    lower = (2 * jnp.sqrt(jnp.maximum(counts - 0.5, 0)) - location) / scale
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel
    lit = jax.nn.softplus(lower) - jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    return jax.nn.softplus(-upper) + jnp.where(counts > 0, lit, 0.0)


def draw_counts(location, scale, key):
    """Photon counts from the distribution of count_loss, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    x = jnp.maximum(location + scale * jnp.log(u / (1 - u)), 0)
    return jnp.floor(jnp.square(x / 2) + 0.5)


def path_error(net, counts, t, c, how, key):
    """v_theta - v_t (H, W) of Eq. 6 for one response, the maps of the network and x_t."""
    noise_key, state_key = jax.random.split(key)
    x1 = to_state(counts, how, state_key)
    x0 = jax.random.normal(noise_key, x1.shape)
    x = (1 - t) * x0 + t * x1                                                  # Eq. 3
    maps = net(x, t, c).astype(jnp.float32)
    return velocity(maps, x, t) - (x1 - x0), maps, x                           # Eq. 4


def emphasis(error, c, detector):
    """A number to add to the square of an error (H, W), summed over fibres: the squares of some of its sums, weighted.

    How bright a shower is this time hardly shows in any one fibre, and a network that learns fibres first makes responses too
    alike. The mean response minimises every square of a sum of the error as well, so this changes what is learnt first,
    not what is right. The sums have weights of unit length: the bumps at the impact, blocks of 4 and of 16 fibres, and all.
    """
    bumps = vicinity(c, detector, 4)[1]
    blocks = sum(weight * jnp.sum(jnp.square(to_patches(error, size).sum(1) / size)) for size, weight in ((4, 0.6), (16, 2.4)))
    own = jnp.sum(light(bumps, to_patches(error, 4))**2)
    return 4 * own + blocks + 6 * jnp.sum(error)**2 / error.size               # weights: [validation rows]


def batch_loss(net, counts, c, key, args):
    """counts (B, H, W), c (B, C) -> loss and its parts. With sampled counts, half of the batch trains the path below `exit`, half
    the distribution of the counts at `exit`, where alone it is needed. Early times come more often: a bright narrow shower finds
    its place there, and no later time mends it."""
    size, counts = len(counts), counts.astype(jnp.float32)
    time_key, *keys = jax.random.split(key, size + 1)
    if args.precision == "bf16":
        net = common.cast(net, jnp.bfloat16)                                   # the conditions hold places: float32
    grid = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size   # stratified: less noise in the gradient
    half = size // 2 if args.counts == "sample" else size
    t = args.exit * jnp.minimum(1.0, grid * size / half) ** 3 if args.counts == "sample" else grid
    errors, maps, x = jax.vmap(lambda n, t, c, k: path_error(net, n, t, c, args.counts, k))(counts, t, c, jnp.stack(keys))
    path = jnp.mean(errors[:half]**2)                                          # Eq. 6
    if args.counts != "sample":
        return path, {"path": path}
    sums = jax.vmap(lambda e, c: emphasis(e, c, data.DETECTORS[args.detector]))(errors[:half], c[:half]).mean() / counts[0].size
    location, scale = jax.vmap(count_distribution)(maps[half:], x[half:])
    likelihood = count_loss(counts[half:], location, scale).mean()
    # 10: gradients of like size [validation rows]
    return path + sums + 10 * likelihood, {"path": path, "sums": sums, "nats per fibre": likelihood}


# -------------------------------------------------------------------------------------------------------------- sampler

def euler(v, x, t, h):
    return x + h * v(x, t)                                                     # Eq. 5


def midpoint(v, x, t, h):
    return x + h * v(x + h / 2 * v(x, t), t + h / 2)


def rk4(v, x, t, h):
    """The classical Runge-Kutta method of fourth order."""
    a = v(x, t)
    b = v(x + h / 2 * a, t + h / 2)
    c = v(x + h / 2 * b, t + h / 2)
    d = v(x + h * c, t + h)
    return x + h / 6 * (a + 2 * b + 2 * c + d)


SOLVERS = {"ab2": None, "euler": euler, "midpoint": midpoint, "rk4": rk4}      # ab2 has a memory, see integrate
STAGES = {"ab2": 1, "euler": 1, "midpoint": 2, "rk4": 4}


def evaluations(args):
    """Evaluations of the network per response: those of the solver, and one to draw the counts."""
    return args.steps * STAGES[args.solver] + (args.counts == "sample")


def integrate(v, x, end, steps, solver):
    """Follow dx/dt = v(x, t) from t = 0 to `end`; unrolled, since XLA is slow on loops on a CPU (`--steps` is small).

    "ab2", the two-step method of Adams and Bashforth, is of second order for one evaluation a step; its first step is Euler's.
    Steps that grow with t are no better [validation rows], although bright showers settle early.
    """
    h, before = end / steps, None
    for step in range(steps):
        if solver == "ab2":
            now = v(x, h * step)
            x = x + h * (now if before is None else 1.5 * now - 0.5 * before)
            before = now
        else:
            x = SOLVERS[solver](v, x, h * step, h)
    return x


def sample(net, c, key, args):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    noise_key, count_key = jax.random.split(key)
    x = jax.random.normal(noise_key, (len(c), *data.DETECTORS[args.detector].shape))
    maps = lambda x, t: jax.vmap(net, (0, None, 0))(x, t, c).astype(jnp.float32)
    v = lambda x, t: jax.vmap(velocity, (0, 0, None))(maps(x, t), x, t)
    end = args.exit if args.counts == "sample" else 1.0
    x = integrate(v, x, end, args.steps, args.solver)
    if args.counts == "sample":
        location, scale = jax.vmap(count_distribution)(maps(x, end), x)
        counts = draw_counts(location, scale, count_key)
    else:
        counts = to_counts(x, args.counts)
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


def sampler(args, net):
    """draw(c (B, C), key) -> uint16 (B, H, W): `sample`, compiled once for each batch size."""
    compiled = eqx.filter_jit(lambda net, c, key: sample(net, c, key, args))
    return lambda c, key: compiled(net, c, key)


# ------------------------------------------------------------------------------------------------------------- training

class State(eqx.Module):
    """What a step changes: weights, their moving average, the optimiser."""
    net: eqx.Module
    ema: eqx.Module
    optimiser: optax.OptState


def make_optimiser(args, steps):
    """AdamW behind a clip of the gradient norm; the learning rate ends near 0 after `steps` steps."""
    schedule = (optax.cosine_onecycle_schedule(steps, args.lr, 0.1, 10, 100) if args.schedule == "onecycle"
                else optax.cosine_decay_schedule(args.lr, steps))
    return optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))


def start(args, conditions, optimiser, key):
    """The State before the first step."""
    net = make_network(args, conditions, key)
    ema = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, net)   # a copy: the step gives its buffers away
    return State(net, ema, optimiser.init(eqx.filter(net, eqx.is_inexact_array)))


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
    return common.training_flags(args, "net", "counts", "exit")


# ------------------------------------------------------------------------------------------------ scoring and generating

def repeat(step, batch, state):
    """Train on one batch for ever, a step for each next()."""
    while True:
        state, losses = step(batch, state)
        yield losses


def compare(args):
    """Cost of the networks side by side, in turn and several times: parameters, MFLOP, training step and ms per response."""
    detector, conditions = data.DETECTORS[args.detector], data.CONDITIONS[args.cond]
    counts = np.random.default_rng(0).poisson(0.2, (args.batch_size, *detector.shape)).astype(np.uint16)
    c, key = np.zeros((args.batch_size, conditions), np.float32), jax.random.key(0)
    costs, functions = [], {}
    for name in NETWORKS:
        here = common.with_flags(args, net=name, counts="round" if name == "paper" else args.counts)
        optimiser = make_optimiser(here, 1000)
        net = make_network(here, conditions, key)
        costs.append({"net": name, **common.network_cost(net, detector.shape, (), (conditions,)), "evaluations": evaluations(here)})
        state = start(here, conditions, optimiser, key)
        functions[name, "step"] = partial(next, repeat(make_step(here, optimiser), (counts, c, key, np.int32(0)), state))
        functions[name, "draw"] = partial(sampler(here, net), c, key)
    seconds = common.race(functions)
    for row in costs:
        first, name = costs[0]["net"], row["net"]
        row |= {"step_seconds": seconds[name, "step"], "step_ratio": seconds[first, "step"] / seconds[name, "step"],
                "ms_per_response": 1e3 * seconds[name, "draw"] / args.batch_size,
                "response_ratio": seconds[first, "draw"] / seconds[name, "draw"]}
    common.print_rows(costs)
    result = {"script": "fm", "detector": args.detector, "command": args.command, "batch": args.batch_size,
              "device": common.device_name(), "networks": costs}
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
        scaler, header = data.read_model(args, ("net", "counts", "exit", "cond", "n", "split"))
        like = eqx.filter_eval_shape(make_network, args, len(scaler.mean), jax.random.key(0))  # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, times = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    if not args.load:
        scaler, trained = data.fit_conditions(dataset.particles[split[0]], args.cond), training_flags(args)
        net, times = train(args, dataset, split[0], scaler)
        net = data.save_model(args, trained, scaler, times, net)
    if args.sweep:
        cases = [common.with_flags(args, steps=steps) for steps in SWEEP]
        found = metrics.sweep(args, [({"steps": case.steps, "evaluations": evaluations(case)},
                                      metrics.generator(args, sampler(case, net), scaler)) for case in cases], dataset, split[1])
        if args.load:
            return found
    cost = common.network_cost(net, data.DETECTORS[args.detector].shape, (), (len(scaler.mean),))
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost, "steps": args.steps, "solver": args.solver,
              "evaluations": evaluations(args), **times}
    return metrics.report(args, sampler(args, net), scaler, data.test_sets(args, dataset, split[2], seed), result)


if __name__ == "__main__":
    common.run(main)
