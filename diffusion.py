"""Denoising diffusion for the zero degree calorimeters (paper 000, M. Wojnar et al., "Fast simulation of the zero degree
calorimeter responses with generative neural networks", after Ho et al. 2020 and Song et al. 2021).

Noise is added to a response x_0 in 1000 steps, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon, and a network learns to take it
out for the particle c:
    x^_0 = (x_t - sqrt(1 - abar_t) epsilon^) / sqrt(abar_t)                               (Eq. 9)
    L = E || epsilon - epsilon^ ||^2                                                      (Eq. 11)
    x_s = sqrt(abar_s) x^_0 + sqrt(1 - abar_s - eta_t^2) epsilon^ + eta_t noise, s < t    (Eq. 12; Eq. 10 is eta_t^2 = 1 - abar_s)
The network tells x^_0, which is the same as to tell epsilon^ or the velocity sqrt(abar_t) epsilon - sqrt(1 - abar_t) x_0: what
`--predict` chooses is the weight of each t in the loss. `--min-snr` bounds it (Hang et al. 2023).

Photons are counts: as in fm.py, x = 2 sqrt(n) has a counting noise of about 1 in every fibre, and once the noise of x_t has
fallen below that (a ratio of noise to signal of 2/3), the same network gives each fibre its own distribution of counts, trained by
exact likelihood. `--counts round` goes on to the end and rounds.

    python diffusion.py --detector zn --steps 50                      on 60 000 rows of the open data
    python diffusion.py --detector zn --solver dpm --steps 14         the same network, 15 evaluations: add --load FILE
    python diffusion.py --load weights/diffusion-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py for seen and unseen particles beside its oracle; writes runs/diffusion-zn/.
"""
import argparse
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

LENGTH = 1000                                    # steps of the noising
RATIO = 2 / 3                                    # of noise to signal at which counts are drawn
LARGEST = 2 * math.sqrt(4000)                    # of x_0; four times the brightest fibre that data.py makes
SWEEP, SWEEP_ROWS = (5, 10, 25, 50, 100, 250, 800, 1000), 2048   # steps (paper 000, Fig. 7) and validation rows of --sweep
FEW, ETAS = (5, 10, 14, 25, 50), (0, 0.3, 0.5, 0.7, 0.85, 1)    # there, steps without noise (eta 0 and dpm), and eta at --steps


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    parser = common.parser(__doc__, "diffusion", n=60_000, epochs=12, lr=2e-3, steps=50)
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="how numbers become photons: drawn from each fibre's distribution, or rounded log1p "
                             "(default: sample)")
    parser.add_argument("--variance", choices=("linear", "cosine"), default="linear",
                        help="schedule of the noise (default: linear)")
    parser.add_argument("--predict", choices=("noise", "velocity", "clean"), default="velocity",
                        help="whose squared error is the loss (default: velocity)")
    parser.add_argument("--min-snr", type=common.number(float, 0), default=0.0, metavar="GAMMA",
                        help="bound of the signal-to-noise ratio, which is then the weight whatever --predict; 0: none "
                             "(default: 0)")
    parser.add_argument("--solver", choices=("ddim", "dpm"), default="ddim",
                        help="of the reverse: Eq. 12, or DPM-Solver++ of second order, which needs fewer steps (default: ddim)")
    parser.add_argument("--eta", type=common.number(float, 0, 1), default=0.7, metavar="ETA",
                        help="noise of ddim, as a part of that of DDPM: 0 none, 1 DDPM itself (default: 0.7)")
    parser.add_argument("--spacing", choices=("trailing", "leading"), default="trailing",
                        help="of the steps: from the noisiest state on, or to the cleanest (default: trailing)")
    parser.add_argument("--clip-clean", action=argparse.BooleanOptionalAction, default=True,
                        help="keep the predicted clean response within the range of the data")
    parser.add_argument("--sweep", action="store_true",
                        help="score steps, solvers and eta on validation rows, with a figure; with --load nothing else")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# A network maps x (H, W), t () and the condition c (C,) of ONE example to maps (K, H, W); vmap makes the batch.

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


# same as fm.py: Dense
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


def make_network(args, conditions, key):
    """Four maps are the clean response, three more the distribution of the counts."""
    maps = 7 if args.counts == "sample" else 4
    return Dense(data.DETECTORS[args.detector], conditions, maps, key, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)


# ------------------------------------------------------------------------------------------------------------ objective
# t = 0 is the response with a little noise, t = LENGTH - 1 noise; the network is told t / LENGTH.

def signal(variance):
    """abar_t of t = 0 to LENGTH - 1, (LENGTH,): the share of the signal in the variance of x_t."""
    if variance == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, LENGTH))                 # Ho et al. 2020, section 4
    angle = (np.arange(LENGTH + 1) / LENGTH + 0.008) / 1.008 * np.pi / 2       # Nichol and Dhariwal 2021, Eq. 17
    level = np.cos(angle)**2
    return np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))


def last(args):
    """The t at which counts are drawn; -1, the response itself, if they are rounded."""
    abar = signal(args.variance)
    return int(np.argmin(np.abs(np.sqrt((1 - abar) / abar) - RATIO))) if args.counts == "sample" else -1


def longest(args):
    """The largest number of steps that a sampler can take."""
    return LENGTH - 1 - last(args)


def to_state(counts, how):
    """Photon counts -> x_0: a variance of about 1 for each Poisson count, or as in the papers."""
    return 2 * jnp.sqrt(counts) if how == "sample" else jnp.log1p(counts)


def clean(maps, x, args):
    """x^_0 (H, W): linear in x_t times the probability that the fibre holds light at all."""
    found = (maps[0] + maps[1] * x) * jax.nn.sigmoid(maps[2] + maps[3] * x)
    return jnp.clip(found, 0, LARGEST if args.counts == "sample" else math.log1p(4000)) if args.clip_clean else found


# same as fm.py: count_distribution
def count_distribution(maps, x):
    """Location and scale of each fibre's logistic distribution on the axis 2 sqrt(n), from x_t and the last three maps."""
    return maps[-3] + maps[-2] * x, jnp.exp(jnp.clip(maps[-1], -4, 3))


# same as fm.py: count_loss
def count_loss(counts, location, scale):
    """-log P(n) per fibre, P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)) with F the logistic distribution; P(0) = F(sqrt 2)."""
    upper = (2 * jnp.sqrt(counts + 0.5) - location) / scale
    lower = (2 * jnp.sqrt(jnp.maximum(counts - 0.5, 0)) - location) / scale
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel
    lit = jax.nn.softplus(lower) - jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    return jax.nn.softplus(-upper) + jnp.where(counts > 0, lit, 0.0)


# same as fm.py: draw_counts
def draw_counts(location, scale, key):
    """Photon counts from the distribution of count_loss, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    x = jnp.maximum(location + scale * jnp.log(u / (1 - u)), 0)
    return jnp.floor(jnp.square(x / 2) + 0.5)


# same as fm.py: emphasis
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


def weights(abar, args):
    """Of the squared error of x^_0 in the loss: |epsilon - epsilon^|^2 = SNR |x_0 - x^_0|^2 (Eq. 9 and 11), SNR + 1 for the
    velocity, 1 for x_0 itself; with --min-snr min(SNR, gamma). W of validation rows after 650 steps on 14 000 rows, with 14 steps
    of dpm and 25 of ddim, oracle 2.07: velocity 2.35 and 2.53, clean 2.33 and 3.30, noise 3.96 and 2.99; a bound of 5 is never
    reached where counts are sampled, since the SNR ends at 2.2 there."""
    snr = abar / (1 - abar)
    if args.min_snr:
        return jnp.minimum(snr, args.min_snr)
    return {"noise": snr, "velocity": snr + 1, "clean": jnp.ones_like(snr)}[args.predict]


def batch_loss(net, counts, c, key, args):
    """counts (B, H, W), c (B, C) -> loss and its parts. With sampled counts, half of the batch trains the noisier states, half the
    distribution of the counts at the last, where alone it is needed."""
    size, counts = len(counts), counts.astype(jnp.float32)
    time_key, noise_key = jax.random.split(key)
    if args.precision == "bf16":
        net = common.cast(net, jnp.bfloat16)                                   # the conditions hold places: float32
    half, end = (size // 2, last(args)) if args.counts == "sample" else (size, 0)
    grid = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / half   # stratified: less noise in the gradient
    t = jnp.where(grid < 1, end + jnp.floor(jnp.minimum(grid, 1) * (LENGTH - end)), end).astype(jnp.int32)
    abar = jnp.asarray(signal(args.variance), jnp.float32)[t][:, None, None]
    x0, noise = to_state(counts, args.counts), jax.random.normal(noise_key, counts.shape)
    x = jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise
    maps = jax.vmap(net)(x, t / LENGTH, c).astype(jnp.float32)
    free = common.with_flags(args, clip_clean=False)                           # a clipped number has no gradient
    errors = jnp.sqrt(weights(abar, args)) * (jax.vmap(lambda maps, x: clean(maps, x, free))(maps, x) - x0)
    path = jnp.mean(errors[:half]**2)                                          # Eq. 11
    if args.counts != "sample":
        return path, {"path": path}
    sums = jax.vmap(lambda e, c: emphasis(e, c, data.DETECTORS[args.detector]))(errors[:half], c[:half]).mean() / counts[0].size
    location, scale = jax.vmap(count_distribution)(maps[half:], x[half:])
    likelihood = count_loss(counts[half:], location, scale).mean()
    # 10: gradients of like size [validation rows]
    return path + sums + 10 * likelihood, {"path": path, "sums": sums, "nats per fibre": likelihood}


# -------------------------------------------------------------------------------------------------------------- sampler

def times(args):
    """The t of the states that a sampler visits, from noise to the last, (steps + 1,)."""
    span = np.arange(args.steps + 1) / args.steps * (LENGTH - 1 - last(args))
    t = LENGTH - 1 - np.round(span).astype(int)
    if args.spacing == "leading":                                              # one step lower, the last state as it is
        t = np.append(t[:-1] - int(np.floor(span[1])) + 1, t[-1]) if args.steps > 1 else t
    return t


def coefficients(args):
    """Rows (t, a, b, b', s) of the steps x <- a x + b x^_0 + b' (x^_0 of the step before) + s noise, (steps, 5).

    "ddim" is Eq. 12 with epsilon^ from Eq. 9. "dpm" is DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), which needs x^_0 alone.
    """
    t = times(args)
    abar = np.append(signal(args.variance), 1.0)[t]                            # t = -1 is the response itself
    now, then = abar[:-1], abar[1:]
    if args.solver == "ddim":
        eta = args.eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))    # below Eq. 12: DDPM for 1
        a = np.sqrt(np.maximum(1 - then - eta**2, 0) / (1 - now))
        return np.stack([t[:-1] / LENGTH, a, np.sqrt(then) - a * np.sqrt(now), np.zeros(len(a)), eta], axis=1)
    level = np.log(np.sqrt(abar / np.maximum(1 - abar, 1e-8)))                 # lambda, half the log of the SNR
    h = np.diff(level)
    part = np.append(0.0, h[1:] / h[:-1] / 2)                                  # 1 / (2 r), the first step is of first order
    part[-1] *= t[-1] >= 0                                                     # and so is one to the response itself, h = infinity
    total = -np.sqrt(then) * np.expm1(-h)
    a = np.sqrt((1 - then) / (1 - now))
    return np.stack([t[:-1] / LENGTH, a, total * (1 + part), -total * part, np.zeros(len(a))], axis=1)


def sample(net, c, key, args):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    start_key, step_key, count_key = jax.random.split(key, 3)
    x = jax.random.normal(start_key, (len(c), *data.DETECTORS[args.detector].shape))
    maps = lambda x, t: jax.vmap(net, (0, None, 0))(x, t, c).astype(jnp.float32)

    def step(carry, row):
        x, before = carry
        (t, a, b, b_before, s), key = row
        now = jax.vmap(lambda maps, x: clean(maps, x, args))(maps(x, t), x)
        noise = s * jax.random.normal(key, x.shape) if args.solver == "ddim" and args.eta else 0.0
        return (a * x + b * now + b_before * before + noise, now), None

    rows = jnp.asarray(coefficients(args), jnp.float32), jax.random.split(step_key, args.steps)
    # XLA is slow on loops on a CPU: ten steps are unrolled, which is as fast per step as fifty and compiles sooner
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), rows, unroll=min(args.steps, 10))
    if args.counts == "sample":
        abar = signal(args.variance)[last(args)]
        location, scale = jax.vmap(count_distribution)(maps(x, last(args) / LENGTH), x)
        counts = draw_counts(location, scale, count_key)
    else:
        counts = jnp.maximum(jnp.round(jnp.expm1(x)), 0)
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


# same as fm.py: sampler
def sampler(args, net):
    """draw(c (B, C), key) -> uint16 (B, H, W): `sample`, compiled once for each batch size."""
    compiled = eqx.filter_jit(lambda net, c, key: sample(net, c, key, args))
    return lambda c, key: compiled(net, c, key)


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
    return common.training_flags(args, "counts", "variance", "predict", "min_snr")


# ------------------------------------------------------------------------------------------------ scoring and generating

def evaluations(args):
    """Evaluations of the network per response: one a step, and one to draw the counts."""
    return args.steps + (args.counts == "sample")


def sweep_cases(args):
    """(label, flags) of --sweep: steps of each solver, and eta at the steps of --steps."""
    steps = [(f"{solver}, eta {eta:g}" if solver == "ddim" else solver, common.with_flags(args, solver=solver, eta=eta, steps=n))
             for solver, eta, all_steps in (("ddim", args.eta, SWEEP), ("ddim", 0.0, FEW), ("dpm", 0.0, FEW))
             for n in all_steps if n <= longest(args)]
    return steps + [(f"ddim, {args.steps} steps", common.with_flags(args, solver="ddim", eta=eta)) for eta in ETAS]


def main(argv=None):
    """Train (or load) and score, or generate. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.initialize_hosts()
    common.enable_compilation_cache()
    own = "counts", "variance", "predict", "min_snr", "cond", "n", "split"
    scaler, header = data.read_model(args, own) if args.load else (None, None)
    if args.steps > longest(args):
        raise UserError(f"--steps {args.steps}: at most {longest(args)} lie between noise and the state at which counts are drawn")
    if args.load:
        like = eqx.filter_eval_shape(make_network, args, len(scaler.mean), jax.random.key(0))  # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, told = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    if not args.load:
        scaler, trained = data.fit_conditions(dataset.particles[split[0]], args.cond), training_flags(args)
        net, told = train(args, dataset, split[0], scaler)
        net = data.save_model(args, trained, scaler, told, net)
    if args.sweep:
        found = metrics.sweep(args, [({"label": label, "steps": case.steps, "eta": case.eta, "evaluations": evaluations(case)},
                                      metrics.generator(args, sampler(case, net), scaler)) for label, case in sweep_cases(args)],
                              dataset, split[1][:SWEEP_ROWS])
        if args.load:
            return found
    cost = common.network_cost(net, data.DETECTORS[args.detector].shape, (), (len(scaler.mean),))
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost, "steps": args.steps, "solver": args.solver,
              "eta": args.eta, "evaluations": evaluations(args), **told}
    return metrics.report(args, sampler(args, net), scaler, data.test_sets(args, dataset, split[2], seed), result)


if __name__ == "__main__":
    common.run(main)
