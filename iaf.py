"""Autoregressive flows for the zero degree calorimeters: a teacher that knows the likelihood, a student that draws in one pass.

A flow takes a response x to numbers z ~ N(0, 1), fibre by fibre, knowing the particle c and its photon sum S (paper 000, Eq. 7, 8):
    log p(x | c, S) = log N(z) + sum over blocks of log |det df / dx|
In a block each fibre is moved by a monotonic spline whose numbers follow from the fibres before it (MADE, Germain et al. 2015), so
that the determinant is a product. Three networks, three stages of training (paper 004, "Inverse Autoregressive Flows"):
    sum      p(S | c), a mixture of distributions of log S, since a mean is not a photon sum
    teacher  x -> z in one pass, by exact likelihood (MAF); z -> x takes a step for every fibre
    student  z -> x in one pass (IAF); it learns the teacher's map by two loops,
             L = |x' - x|^2 + |z' - z|^2 + the same after each block,     data: x -> z -> x', latent: z -> x' -> z'
             + W f(c) sum_k (w_k - w'_k)^2 / 5 of the light's share in each channel, after each block (Eq. 2: --channel-loss W),
             f(c) = [1 / f_div(c)] |X_c| + eps, which trusts particles that are common and alike (Eq. 3: --diversity)
             + W' sum over fibres of (2 sqrt(n) - 2 sqrt(n'))^2 / D, ours: photons in units of their noise (--light-loss W')
Counts n become x = logit of (n + nu u) / (S + nu), u uniform (--noise, paper 000, Table 7); --removal takes the noise away again.

    python iaf.py --detector zn                                       three stages on 60 000 rows of the open data
    python iaf.py --detector zn --stage student                       the student again, on the teacher of the run folder
    python iaf.py --detector zn --stage student --table               base, + channel, + channel + diversity (paper 004, Table 1)
    python iaf.py --load weights/iaf-zn.eqx --generate particles.csv --out responses.h5

Prints the trainings, scores of the sums, of both flows with true and predicted sums, of the ways to take the noise away, the
time of each sampler, then every score of metrics.py beside its oracle; writes runs/iaf-zn/, stages and the teacher in folders.
"""
import argparse
import math
from functools import cache, partial, reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
from common import UserError

BINS, BOX, LEAST = 8, 6.0, 1e-3   # of a spline: bins, half width of its box, smallest width, height and slope (Durkan et al. 2019)
NUMBERS = 3 * BINS - 1            # of a spline: widths, heights, slopes at the inner knots
ALPHA = 1e-6                      # of the logit (paper 000)
CHUNK = 64                        # responses at a time on a CPU: the numbers for every fibre of more leave its cache
COMPONENTS = 12                   # of the distribution of log sums
EPSILON = 0.1                     # of --diversity: the least weight, in units of the mean one
REMOVALS = "floor", "round", "floor-renormalise", "round-renormalise", "scale-floor", "scale-round"   # the last two are ours
STAGES = "sum", "teacher", "student"
SCORED = 10_240                   # rows at most that the teacher draws for its scores
TIMED = 16                        # fibres that the naive sampler is timed on; each costs a full pass


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    shared = tuple(name for name in common.FLAGS if name != "steps")           # there are no steps to choose
    parser = common.parser(__doc__, "iaf", flags=shared, n=60_000, epochs=3, batch_size=64, lr=2e-3)
    parser.add_argument("--net", choices=NETWORKS, default="local", help="blocks of both flows (default: local)")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all",
                        help="train one, on those before it in --run, with the same flags but the later stages' own (default: all)")
    parser.add_argument("--sum-epochs", type=common.number(int, 1, 10**6), default=10, metavar="N",
                        help="passes over the training rows in stage sum (default: 10)")
    parser.add_argument("--student-epochs", type=common.number(int, 1, 10**6), default=2, metavar="N",
                        help="passes over the training rows in stage student (default: 2)")
    parser.add_argument("--noise", type=common.number(float, 1e-3, 1), default=0.5, metavar="NU",
                        help="photons, range of the noise that makes counts continuous (default: 0.5)")
    parser.add_argument("--removal", choices=REMOVALS,
                        help="of the noise: floor, or subtract its mean and round, alone or before scaling to the photon sum, or scaling "
                             "to it before the floor (default: the one with the least W on validation rows)")
    parser.add_argument("--channel-loss", type=common.number(float, 0), default=100.0, metavar="WEIGHT",
                        help="of the light's shares in the channels, in stage student (default: 100)")
    parser.add_argument("--light-loss", type=common.number(float, 0), default=5.0, metavar="WEIGHT",
                        help="of the squared errors of photons in units of their noise, in stage student (default: 5)")
    parser.add_argument("--diversity", action=argparse.BooleanOptionalAction, default=True,
                        help="weight the channel loss by how common and alike a particle's responses are")
    parser.add_argument("--sampler", choices=("student", "teacher"), default="student",
                        help="which flow draws; the teacher's file is DIR/teacher/model.eqx beside --load (default: student)")
    parser.add_argument("--table", action="store_true", help="only train three students and score them as paper 004 does")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# For a batch: x (B, D), a number for each of the D = H W fibres, conditions c (B, C), photon sums (B,). What is many numbers for a
# fibre has them first, (K, B, D): products and sums over few numbers that lie together take a CPU four times as long.

# same as fm.py: linear
def linear(key, inputs, outputs, scale=1.0):
    return eqx.tree_at(lambda layer: layer.weight, layer := eqx.nn.Linear(inputs, outputs, key=key), scale * layer.weight)


# same as fm.py: apply
def apply(layer, h):
    """A Linear on the last axis of h. vmap of the layer leaves the product in an order that costs a CPU twice the time."""
    return h @ layer.weight.T + layer.bias


# same as fm.py: weight
def weight(key, *shape, scale=None):
    """Normal weights, variance 1 / fan-in unless a scale is given."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


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


def surroundings(c, detector):
    """What each fibre knows of the places where the particle may hit, for c (C,), (9, D): offsets, bumps, logs of the wide bumps."""
    offsets, bumps = vicinity(c, detector, 1)
    return jnp.concatenate([offsets, bumps[:, :, 0], jnp.log(bumps[:, ::2, 0]) / 4], axis=1).T


class Mixture(eqx.Module):
    """p(S | c): a mixture of logistic distributions of log S, cut into whole numbers from `low` on. Returns log weights,
    locations and log scales, (3, COMPONENTS)."""
    layers: list

    def __init__(self, conditions, key, width=192):
        keys, inputs = jax.random.split(key, 3), conditions + len(waves(np.zeros(conditions)))
        self.layers = [eqx.nn.Linear(inputs, width, key=keys[0]), eqx.nn.Linear(width, width, key=keys[1]),
                       linear(keys[2], width, 3 * COMPONENTS, scale=0.1)]

    def __call__(self, c):
        h = jnp.concatenate([c, waves(c)]).astype(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            h = jax.nn.silu(layer(h))
        weights, locations, scales = self.layers[-1](h).astype(jnp.float32).reshape(3, COMPONENTS)
        spread = jnp.linspace(2.0, 8.0, COMPONENTS)                            # logs of 7 to 3000 photons
        return jnp.stack([jax.nn.log_softmax(weights), spread + 3 * locations, jnp.clip(scales - 1, -6, 2)])


def mix(matrix, h):
    """matrix (M, K) times h (K, ...), as one plain product: with its axes apart, XLA transposes h on a CPU first."""
    return (matrix @ h.reshape(len(h), math.prod(h.shape[1:]))).reshape(len(matrix), *h.shape[1:])


def knots(raw):
    """Knots of a spline from -BOX to BOX, BINS + 1 arrays (...), from numbers (BINS, ...), and log of the sum of their exponentials."""
    top = reduce(jnp.maximum, raw)                                             # raw.max(0) takes a CPU five times as long
    parts = [jnp.exp(part - top) for part in raw]
    total = sum(parts)
    places = [jnp.full_like(top, -BOX)]
    for part in parts:
        places.append(places[-1] + 2 * BOX * LEAST + 2 * BOX * (1 - BINS * LEAST) / total * part)
    return places, top + jnp.log(total)


def find_bin(x, numbers, inverse=False):
    """The bin (...) of a spline that each x (...) is in, by numbers (NUMBERS, ...), and its knots x_0, x_1, y_0, y_1 and the numbers of
    the slopes there; then the logs of the sums of `knots`. A chain of comparisons: looking up takes a CPU far longer."""
    (xs, x_norm), (ys, y_norm) = knots(numbers[:BINS]), knots(numbers[BINS:2 * BINS])
    edge = jnp.zeros_like(x)                                                   # the lines outside the box have slope 1
    slopes = [edge, *numbers[2 * BINS:], edge]
    arrays = xs[:-1], xs[1:], ys[:-1], ys[1:], slopes[:-1], slopes[1:]
    found, number = [array[0] for array in arrays], jnp.zeros(x.shape, jnp.int32)
    for k in range(1, BINS):
        beyond = x >= (ys if inverse else xs)[k]
        found, number = [jnp.where(beyond, array[k], before) for array, before in zip(arrays, found)], number + beyond
    return number, found, (x_norm, y_norm)


def slope_of(number):
    """Slope of a spline at a knot, 1 for the number 0."""
    return LEAST + jax.nn.softplus(number + math.log(math.expm1(1 - LEAST)))


def rational(x, x0, x1, y0, y1, s0, s1):
    """The spline in one bin: y and log dy/dx (Durkan et al. 2019, Eq. 4 and 5)."""
    slope, t, d0, d1 = (y1 - y0) / (x1 - x0), jnp.clip((x - x0) / (x1 - x0), 0, 1), slope_of(s0), slope_of(s1)
    both = t * (1 - t)
    below = slope + (d1 + d0 - 2 * slope) * both
    y = y0 + (y1 - y0) * (slope * t**2 + d0 * both) / below
    log_slope = 2 * jnp.log(slope / below) + jnp.log(d1 * t**2 + 2 * slope * both + d0 * (1 - t)**2)
    inside = jnp.abs(x) < BOX
    return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)


@jax.custom_vjp
def spline(x, numbers):
    """Monotonic rational quadratic spline of x (...), numbers (NUMBERS, ...), the identity outside the box: y and log dy/dx."""
    return rational(x, *find_bin(x, numbers)[1])


def spline_forward(x, numbers):
    return spline(x, numbers), (x, numbers)


def spline_backward(kept, slopes):
    """The gradient by hand: a number moves x_0 and x_1 of the bin it is in or left of, and nothing else of the spline's value. What JAX
    would keep of a chain of comparisons for this takes a CPU three times as long."""
    x, numbers = kept
    number, found, norms = find_bin(x, numbers)
    to_x, *to_found = jax.vjp(rational, x, *found)[1](slopes)
    number, found, norms, to_x, to_found = jax.lax.optimization_barrier((number, found, norms, to_x, to_found))
    k = jnp.arange(BINS).reshape(-1, *(1 for _ in x.shape))
    parts = []
    for raw, norm, low, high, to_low, to_high in zip((numbers[:BINS], numbers[BINS:2 * BINS]), norms, found[::2], found[1::2],
                                                     to_found[::2], to_found[1::2]):
        both = to_low + to_high
        mean = both * (low + BOX - number * 2 * BOX * LEAST) + to_high * (high - low - 2 * BOX * LEAST)
        pull = jnp.where(k < number, both, jnp.where(k == number, to_high, 0.0)) * (2 * BOX * (1 - BINS * LEAST))
        parts.append(jnp.exp(raw - norm) * (pull - mean))                      # the gradient of a softmax
    knot = k[1:]
    parts.append(jnp.where(knot == number, to_found[4], 0.0) + jnp.where(knot == number + 1, to_found[5], 0.0))
    return to_x, jnp.concatenate(parts)


spline.defvjp(spline_forward, spline_backward)


def inverse_spline(y, numbers):
    """x of spline(x, numbers) = y (Durkan et al. 2019, Eq. 6 to 8)."""
    x0, x1, y0, y1, s0, s1 = find_bin(y, numbers, inverse=True)[1]
    d0, d1 = slope_of(s0), slope_of(s1)
    slope, rise = (y1 - y0) / (x1 - x0), jnp.clip(y - y0, 0, y1 - y0)
    mixed = rise * (d1 + d0 - 2 * slope)
    a, b, c = (y1 - y0) * (slope - d0) + mixed, (y1 - y0) * d0 - mixed, -slope * rise
    t = 2 * c / (-b - jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0)))
    return jnp.where(jnp.abs(y) < BOX, x0 + jnp.clip(t, 0, 1) * (x1 - x0), y)


def arrange(a, order, back=False):
    """The fibres, last axis of a (..., D), in the random order of that number, or `back`; with a word for an order as they are. It
    costs a CPU as much as a block."""
    if isinstance(order, str):
        return a
    places = np.random.default_rng(order).permutation(a.shape[-1])
    return a[..., np.argsort(places) if back else places]


class Local(eqx.Module):
    """Makes the numbers of a fibre's spline from what is near: a small network that all fibres share, on a few numbers that the
    masked layers give its group, the fibres next to it that came before, the light that is left, and its surroundings. The
    particle scales and shifts its hidden numbers."""
    near: jax.Array
    position: jax.Array
    known: jax.Array
    modulation: eqx.nn.Linear
    head: jax.Array
    bias: jax.Array

    def __init__(self, fibres, near, known, embedding, hidden, key):
        keys = jax.random.split(key, 4)
        self.near = weight(keys[0], hidden + 2, near, scale=3**-0.5).at[hidden:].set(0.0)      # the last two: see `lit`
        self.position = jnp.zeros((hidden + 2, 1, fibres))
        self.known = weight(keys[1], hidden, known, scale=known**-0.5)
        self.modulation = linear(keys[2], embedding, 2 * hidden)
        self.head, self.bias = weight(keys[3], NUMBERS, hidden, scale=0.1 * hidden**-0.5), jnp.zeros(NUMBERS)

    def ground(self, near):
        """What hangs on the place alone, (hidden + 2, B, D)."""
        return mix(self.near, near.astype(self.near.dtype)) + self.position

    def numbers(self, ground, known, e):
        """(NUMBERS, B, N) of N fibres from `ground` (hidden + 2, B, N) and what is known of the fibres before, (K, B, N)."""
        scale, shift = jnp.split(apply(self.modulation, e).T[:, :, None], 2)
        h = (ground[:-2] + mix(self.known, known.astype(self.known.dtype))) * (1 + scale) + shift
        return (mix(self.head, jax.nn.silu(h)) + self.bias[:, None, None]).astype(jnp.float32)


class Block(eqx.Module):
    """One MADE block, from the first fibre on or `backwards` from the last: masked layers, in which the fibres of a group share what they learn of the groups before, and `Local`;
    without it the groups are single fibres, and the layers give the numbers themselves (the published block)."""
    first: jax.Array
    second: jax.Array
    last: jax.Array
    biases: tuple
    modulation: eqx.nn.Linear
    local: Local | None
    group: int = eqx.field(static=True)
    row: int = eqx.field(static=True)
    scales: tuple = eqx.field(static=True)
    backwards: bool = eqx.field(static=True)

    def __init__(self, fibres, row, near, embedding, scales, backwards, key, width, hidden, group, outputs):
        keys = jax.random.split(key, 5)
        self.group, self.row, self.scales, self.backwards = group, row, scales, backwards
        self.first, self.second = weight(keys[0], fibres, width), weight(keys[1], width, width)
        self.last = weight(keys[2], fibres // group, outputs, width, scale=(0.1 if hidden is None else 1) * width**-0.5)
        self.biases = jnp.zeros((2, width)), jnp.zeros((fibres // group, outputs))
        self.modulation = linear(keys[3], embedding, 4 * width)
        self.local = hidden and Local(fibres, near, outputs + len(self.before) + 2, embedding, hidden, keys[4])

    @property
    def before(self):
        """How far before a fibre its neighbours are: two in its row, three in the row before. At the ends of a row they are those
        of the next row's end, which came before as well."""
        return 1, 2, self.row - 1, self.row, self.row + 1

    def masked(self):
        """The block with 0 for each weight that would tell a group of itself or of later ones (Germain et al. 2015, Eq. 12, 13).
        The first hidden numbers see no fibre at all, so that the first group knows the particle."""
        groups = np.arange(len(self.last))[::-1 if self.backwards else 1]
        seen = np.linspace(-1, len(self.last) - 2, len(self.second)).round()
        masks = (groups.repeat(self.group)[:, None] <= seen, seen[:, None] <= seen, (seen < groups[:, None])[:, None])
        return eqx.tree_at(lambda b: (b.first, b.second, b.last), self,
                           tuple(w * jnp.asarray(m, w.dtype) for w, m in zip((self.first, self.second, self.last), masks)))

    def lit(self, x, ground, total):
        """What later fibres see of x (B, N), log photons if x is a response, and the share of the light that it is. Other states of
        the flow are made like a response by a scale and a shift that depend on the place."""
        if self.local is None:
            return x, jnp.zeros_like(x)
        mean, std, noise = self.scales
        log_photons = std * ((1 + ground[-2]) * x + ground[-1]).astype(jnp.float32) + mean
        photons = noise * (jnp.exp(jnp.minimum(log_photons, jnp.log(total / noise + 1)[:, None])) - 0.5)
        return jax.nn.leaky_relu(log_photons, 0.1), jnp.where(log_photons > 0, photons, 0.0) / (total + noise)[:, None]

    def context(self, h, e, last, bias):
        """Outputs (B, G, k) of the masked layers for G groups, `last` (G, k, width) and `bias` (G, k) theirs, from h (B, width), what
        the first layer has added up."""
        parts = jnp.split(apply(self.modulation, e), 4, axis=1)
        for number in range(2):
            h = h @ self.second if number else h
            h = jax.nn.silu((h + self.biases[0][number]) * (1 + parts[2 * number]) + parts[2 * number + 1])
        return jnp.tensordot(h, last, (1, 2)) + bias

    def known(self, context, neighbours, used, total):
        """Rows (K, B, N) for `Local`: outputs (k, B, N), neighbours (5, B, N), the share of the light before a fibre (B, N)."""
        left = jnp.clip(1 - used, -1, 1)
        return jnp.concatenate([context, neighbours, jnp.stack([left, jnp.log1p(jax.nn.relu(left) * total[:, None]) / 4])])

    def numbers(self, x, near, e, total):
        """Spline numbers (NUMBERS, B, D) of all fibres x (B, D); needs `masked`."""
        ground = None if self.local is None else self.local.ground(near)
        seen, share = self.lit(x, ground, total)
        context = self.context(seen.astype(self.first.dtype) @ self.first, e, self.last, self.biases[1])
        context = jnp.moveaxis(context, 2, 0).repeat(self.group, axis=2)       # (k, B, D)
        if self.local is None:
            return context.astype(jnp.float32)
        most, fibres = max(self.before), x.shape[1]
        pad = jnp.pad(seen, ((0, 0), (most, most)))
        neighbours = jnp.stack([jax.lax.slice_in_dim(pad, start, start + fibres, axis=1)
                                for start in (most + (n if self.backwards else -n) for n in self.before)])
        return self.local.numbers(ground, self.known(context, neighbours, sums_before(share, self.row, self.backwards), total), e)

    def __call__(self, x, near, e, total):
        return spline(x, self.numbers(x, near, e, total))

    def naive(self, y, near, e, total, count=None):
        """x (B, D) of block(x) = y, right in the first `count` fibres of its order: a full pass for each, of all fibres, as flow libraries
        do it."""
        pass_on = lambda _, x: inverse_spline(y, self.numbers(x, near, e, total))
        return jax.lax.fori_loop(0, y.shape[1] if count is None else count, pass_on, jnp.zeros_like(y))

    def incremental(self, y, near, e, total):
        """x (B, D) of block(x) = y as `naive` finds it: a new x adds one row to the first layer's sums, and only the outputs of the
        next group are computed, and the spline of the next fibre."""
        pad, groups, size = max(self.before), len(self.last), len(y)
        ground = jnp.zeros((2, *y.shape)) if self.local is None else self.local.ground(near)
        along = -1 if self.backwards else 1
        by_group = lambda a: a[::along].reshape(groups, self.group, *a.shape[1:])
        parts = by_group(y.T), by_group(jnp.moveaxis(ground, 2, 0)), by_group(self.first), self.last[::along], self.biases[1][::along]

        def step(carry, part):
            h, seen, used, start = carry                                       # seen: (pad + D, B)
            targets, grounds, rows, last, bias = part
            context, found = self.context(h, e, last[None], bias[None])[:, 0].T, []
            for k in range(self.group):
                numbers = context.astype(jnp.float32)
                if self.local is not None:
                    neighbours = jnp.stack([seen[pad + start + k - n] for n in self.before])[:, :, None]
                    known = self.known(context[:, :, None], neighbours, used[:, None], total)
                    numbers = self.local.numbers(grounds[k][:, :, None], known, e)[:, :, 0]
                x = inverse_spline(targets[k], numbers)
                now, share = (a[:, 0] for a in self.lit(x[:, None], grounds[k][:, :, None], total))
                h, seen, used = h + now[:, None] * rows[k], seen.at[pad + start + k].set(now), used + share
                found.append(x)
            return (h, seen, used, start + self.group), jnp.stack(found)

        begin = jnp.zeros((size, self.first.shape[1])), jnp.zeros((pad + y.shape[1], size)), jnp.zeros(size), 0
        return jax.lax.scan(step, begin, parts)[1].reshape(y.shape[1], size)[::along].T


def sums_before(values, row, backwards=False):
    """Sum of the values (B, D) before each, `backwards` after it: within rows and over rows, by two small products; cumsum is slow on
    a CPU."""
    table = values.reshape(len(values), -1, row)
    ones = lambda n: np.triu(np.ones((n, n), np.float32), 1)
    within, over = (jnp.asarray(ones(n).T if backwards else ones(n)) for n in (row, table.shape[1]))
    return (table @ within + (table.sum(2) @ over)[:, :, None]).reshape(values.shape)


class Flow(eqx.Module):
    """Blocks in their orders and the embedding of particle and photon sum. Called, it is parallel: teacher x -> z, student z -> x;
    `invert` is the way back, a step for each fibre."""
    embedding: list
    blocks: list
    orders: tuple = eqx.field(static=True)
    detector: data.Detector = eqx.field(static=True)

    def __init__(self, args, conditions, key, orders, width=None, embedding=96, **sizes):
        keys = iter(jax.random.split(key, 2 + len(orders)))
        self.detector, self.orders = data.DETECTORS[args.detector], orders if args.stage == "teacher" else orders[::-1]
        inputs, near = conditions + len(waves(np.zeros(conditions))) + 7, len(surroundings(jnp.zeros(conditions), self.detector))
        self.embedding = [eqx.nn.Linear(n, embedding, key=next(keys)) for n in (inputs, embedding)]
        scales, (height, row) = (args.mean, args.std, args.noise), self.detector.shape
        sizes["width"] = width or height * row // 20
        self.blocks = [Block(height * row, row, near, embedding, scales, order == "backwards", next(keys), **sizes) for order in self.orders]

    def masked(self):
        return eqx.tree_at(lambda flow: flow.blocks, self, [block.masked() for block in self.blocks])

    def given(self, c, total):
        """Embedding (B, E) of particle and photon sum, and `surroundings` (9, B, D)."""
        log_total = jnp.log(total)[:, None] / 2 - 2
        angles = log_total * 2.0 ** jnp.arange(3)
        h = jnp.concatenate([c, jax.vmap(waves)(c), log_total, jnp.sin(angles), jnp.cos(angles)], axis=1)
        h = h.astype(self.embedding[0].weight.dtype)
        for layer in self.embedding:
            h = jax.nn.silu(apply(layer, h))
        return h, jax.vmap(lambda c: surroundings(c, self.detector), out_axes=1)(c)

    def __call__(self, x, c, total):
        """x (B, D) and what each block makes of it, (B, blocks + 1, D), each in the order of the fibres, and log |det| (B,)."""
        (e, near), states, log_det = self.given(c, total), [x], 0.0
        for order, block in zip(self.orders, self.blocks):
            place = partial(arrange, order=order)
            y, log_slopes = block(place(states[-1]), place(near), e, total)
            states.append(place(y, back=True))
            log_det += log_slopes.sum(1)
        return jnp.stack(states, axis=1), log_det

    def invert(self, y, c, total, how="incremental", **options):
        """x (B, D) of flow(x) = y, `how` naive or incremental."""
        e, near = self.given(c, total)
        for order, block in zip(self.orders[::-1], self.blocks[::-1]):
            place = partial(arrange, order=order)
            y = place(getattr(block, how)(place(y), place(near), e, total, **options), back=True)
        return y


NETWORKS = {"local": partial(Flow, orders=("forwards", "backwards"), hidden=24, group=4, outputs=4),
            "paper": partial(Flow, orders=("forwards", "backwards", 2, 3, 4, 5, 6, 7), width=1452, hidden=None, group=1,
                             outputs=NUMBERS)}


class Generator(eqx.Module):
    """What a checkpoint keeps: a network for the photon sums and a flow, the teacher or the student."""
    totals: Mixture
    flow: Flow


def make_network(args, conditions, key):
    """What a stage trains."""
    return Mixture(conditions, key) if args.stage == "sum" else NETWORKS[args.net](args, conditions, key)


def make_generator(args, conditions, key):
    """A Generator that is not trained, of --sampler's flow: the shapes of a checkpoint."""
    stage = lambda name: make_network(common.with_flags(args, stage=name), conditions, key)
    return Generator(stage("sum"), stage(args.sampler))


# ------------------------------------------------------------------------------------------------------------ objective

def over_rows(function, *arrays):
    """function(*arrays) of arrays (B, ...), on a CPU in chunks of rows that stay in its cache, computed again for the gradient, since
    what it would keep does not."""
    size = math.gcd(len(arrays[0]), CHUNK)
    if jax.default_backend() != "cpu" or size == len(arrays[0]):
        return function(*arrays)
    chunks = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), [a.reshape(-1, size, *a.shape[1:]) for a in arrays])
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks)


def to_logit(photons, total, args):
    """Standardised logit x (...) of continuous counts n + nu u (...) and log dx/dn; x = -mean / std where n + nu u = nu, whatever
    the sum: no photon lies below, one photon above."""
    p = ALPHA + (1 - 2 * ALPHA) * photons / (total + args.noise)
    x = jnp.log(p) - jnp.log1p(-p) - jnp.log(args.noise / (total + args.noise))
    return (x - args.mean) / args.std, jnp.log((1 - 2 * ALPHA) / (total + args.noise) / args.std) - jnp.log(p) - jnp.log1p(-p)


def from_logit(x, total, args):
    """Continuous counts (...) of x, at least 0."""
    p = jax.nn.sigmoid(args.std * x + args.mean + jnp.log(args.noise / (total + args.noise)))
    return jnp.maximum(p - ALPHA, 0) / (1 - 2 * ALPHA) * (total + args.noise)


def sum_loss(net, counts, c, key, args):
    """-log p(S | c) of Mixture: F(log(S + 1/2)) - F(log(S - 1/2)) of each logistic F, over 1 - F(log(low - 1/2)); nats."""
    log_weights, locations, log_scales = jnp.moveaxis(jax.vmap(net)(c), 1, 0)                       # (B, COMPONENTS)
    z = lambda total: (jnp.log(total)[..., None] - locations) * jnp.exp(-log_scales)
    total = counts.sum((1, 2))
    upper, lower, floor = z(total + 0.5), z(total - 0.5), z(jnp.asarray(args.low - 0.5))
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), and 1 - F(f) = F(-f)
    part = -jax.nn.softplus(-upper) - jax.nn.softplus(lower) + jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    nats = -jnp.mean(jax.nn.logsumexp(log_weights + part + jax.nn.softplus(floor), axis=1))
    return nats, {"nats": nats}


def teacher_loss(net, counts, c, key, args):
    """-log p(x | c, S) per fibre (paper 000, Eq. 7 and 8), nats. Told as bits per fibre, -log2(nu^D p(n + nu u | c, S)) / D, which is
    never below those of the counts, -log2 P(n | c, S) / D, so that it compares over --noise."""
    net, total = net.masked(), counts.sum((1, 2))

    def chunk(counts, c, total, noise):
        x, log_slope = to_logit(counts + args.noise * noise, total[:, None], args)
        states, log_det = net(x, c, total)
        normal = jax.scipy.stats.norm.logpdf(states[:, -1]).sum(1)
        return -(normal + log_det + log_slope.sum(1)) / counts.shape[1]
    counts = counts.reshape(len(counts), -1)
    nats = jnp.mean(over_rows(chunk, counts, c, total, jax.random.uniform(key, counts.shape)))
    return nats, {"bits per fibre": (nats - math.log(args.noise)) / math.log(2)}


def shares(x, total, args):
    """Shares of the light in the five channels (..., 5) of states x (..., D), after sigmoid and normalisation (paper 004)."""
    light, shape = from_logit(x, total, args), data.DETECTORS[args.detector].shape
    return light @ metrics.channel_weights(shape).reshape(-1, 5) / (light.sum(-1, keepdims=True) + 1e-9)


def distance(student, teacher):
    """Mean squares (B,) between the states of the student (B, blocks + 1, D) and those of the teacher, which come in the other
    order: at both ends, one of which a loop began with, and after the blocks between."""
    squares = jnp.mean(jnp.square(student - teacher[:, ::-1]), axis=2)
    return squares[:, 0] + squares[:, -1], squares[:, 1:-1].sum(1)


def student_loss(net, counts, weights, teacher, c, key, args):
    """The two loops of paper 004 and Krause and Shih 2023, and the channel loss of Eq. 2: counts (B, H, W), weights (B,). Ours are the
    squares of 2 sqrt(n), in units of a fibre's Poisson noise: in logits a hundred photons weigh no more than none."""
    keys, total, net, teacher = jax.random.split(key), counts.sum((1, 2)), net.masked(), teacher.masked()
    photons = counts.reshape(len(counts), -1)
    x = to_logit(photons + args.noise * jax.random.uniform(keys[0], photons.shape), total[:, None], args)[0]
    known = jax.lax.stop_gradient(over_rows(lambda *rows: teacher(*rows)[0], x, c, total))

    def chunk(known, z, c, total):
        made, other = net(known[:, -1], c, total)[0], net(z, c, total)[0]      # data loop: x -> z -> x', and z -> x' ...
        back = teacher(other[:, -1], c, total)[0]                              # latent loop: ... -> z'
        truth = shares(known[:, :1], total[:, None, None], args)               # of the noisy counts, as those of the student are
        channel = jnp.mean(jnp.square(shares(made[:, 1:], total[:, None, None], args) - truth), axis=(1, 2))              # Eq. 2
        roots = jnp.sqrt(from_logit(jnp.stack([made[:, -1], known[:, 0]]), total[:, None], args) + args.noise)
        return *distance(made, known), *distance(other, back), channel, 4 * jnp.mean(jnp.square(roots[0] - roots[1]), axis=1)
    data_end, data_between, latent_end, latent_between, channel, light = over_rows(chunk, known, jax.random.normal(keys[1], x.shape), c, total)
    parts = {"data loop": data_end.mean(), "latent loop": latent_end.mean(), "blocks": (data_between + latent_between).mean()}
    loss = sum(parts.values()) + args.channel_loss * jnp.mean(weights * channel) + args.light_loss * light.mean()
    return loss, parts | {"channels": channel.mean(), "light": light.mean()}


def batch_loss(net, batch, c, key, args):
    """The loss of the stage and its parts: batch is (counts (B, H, W), weights (B,), teacher or None), c (B, C)."""
    counts, weights, teacher = batch
    counts = counts.astype(jnp.float32)
    if args.precision == "bf16":
        net, teacher = common.cast((net, teacher), jnp.bfloat16)               # the conditions hold places: float32
    if args.stage == "student":
        return student_loss(net, counts, weights, teacher, c, key, args)
    return {"sum": sum_loss, "teacher": teacher_loss}[args.stage](net, counts, c, key, args)


def spreads(responses, particles):
    """f_div (U,) of paper 000, Eq. 4: standard deviation over the rows of a particle, summed over fibres; and the number of the
    particle of each row (N,)."""
    ids = data.unique_particles(particles)[0]
    groups = np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids))[:-1])
    return np.array([responses[rows].astype(np.float32).std(0).sum() for rows in groups]), ids


def diversity_weights(responses, particles):
    """f(c) = [1 / f_div(c)]_norm |X_c| + eps of each row (paper 004, Eq. 3), float32 (N,), of mean 1. A particle of one row has
    no spread to tell: its inverse counts as the smallest, 0."""
    spread, ids = spreads(responses, particles)
    inverse = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0.0)
    low = inverse[spread > 0].min(initial=np.inf)
    scaled = np.clip((inverse - low) / ((inverse.max() - low) or 1.0), 0, 1) if np.isfinite(low) else 0 * inverse
    weights = (scaled * np.bincount(ids))[ids]
    weights = weights / (weights.mean() or 1.0) + EPSILON
    return (weights / weights.mean()).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- sampler

def draw_totals(net, c, key, low):
    """Photon sums (B,) float32, at least `low`, from Mixture by inversion, for conditions c (B, C)."""
    log_weights, locations, log_scales = jnp.moveaxis(jax.vmap(net)(c), 1, 0)
    kind_key, key = jax.random.split(key)
    # components cut at `low` keep their weights, as in sum_loss
    kind = jax.random.categorical(kind_key, log_weights)[:, None]
    location, scale = (jnp.take_along_axis(a, kind, 1)[:, 0] for a in (locations, jnp.exp(log_scales)))
    floor = (math.log(low - 0.5) - location) / scale
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    log_above = jnp.log1p(-u) - jax.nn.softplus(floor)                         # log(1 - F), between 0 and 1 - F(floor)
    z = jnp.log(-jnp.expm1(jnp.minimum(log_above, -1e-7))) - log_above
    return jnp.clip(jnp.round(jnp.exp(jnp.minimum(location + scale * z, 11.0))), low, 60_000)


def draw_light(flow, c, total, key, args):
    """Continuous counts n + nu u (B, D) of the flow of --sampler for conditions c (B, C) and photon sums (B,)."""
    z = jax.random.normal(key, (len(c), math.prod(flow.detector.shape)))
    flow = flow.masked()
    x = flow.invert(z, c, total) if args.sampler == "teacher" else over_rows(lambda *rows: flow(*rows)[0][:, -1], z, c, total)
    return from_logit(x, total[:, None], args)


@cache
def compiled_light(sampler, noise, mean, std):
    """draw_light(flow, c, total, key) of these flags, compiled once for each kind and size."""
    args = argparse.Namespace(sampler=sampler, noise=noise, mean=mean, std=std)
    return eqx.filter_jit(lambda flow, c, total, key: draw_light(flow, c, total, key, args))


predict_totals = eqx.filter_jit(draw_totals)


def remove_noise(light, total, how, noise):
    """Photon counts float32 (B, D) from continuous ones (B, D), the noise in [0, noise) taken away, and their sum (B,).

    `how` is one of the four ways of paper 000, or floors or rounds s x with the largest s of 1/2 to 2 that leaves no more than the
    photon sum: a photon that the flow made a little dark is lost by a floor, and scaling afterwards gives its light to others.
    """
    if "scale" in how:
        counts = lambda scale: jnp.floor(scale * light + (0.5 - noise / 2 if how == "scale-round" else 0.0))

        def halve(_, bounds):
            middle = (bounds[0] + bounds[1]) / 2
            fits = counts(middle).sum(1, keepdims=True) <= total[:, None]
            return jnp.where(fits, middle, bounds[0]), jnp.where(fits, bounds[1], middle)
        bounds = jax.lax.fori_loop(0, 16, halve, (jnp.full((len(light), 1), 0.5), jnp.full((len(light), 1), 2.0)))
        return jnp.minimum(counts(bounds[0]), 65535)
    counts = jnp.floor(light) if "floor" in how else jnp.maximum(light - noise / 2, 0)
    if "renormalise" in how:
        counts = counts * (total / jnp.maximum(counts.sum(1), 1e-9))[:, None]
    return jnp.minimum(jnp.round(counts), 65535)


def sampler(args, net):
    """draw(c (B, C), key) -> one response for each condition, uint16 (B, H, W), compiled once for each batch size."""
    def sample(net, c, key):
        sum_key, light_key = jax.random.split(key)
        total = draw_totals(net.totals, c, sum_key, args.low)
        counts = remove_noise(draw_light(net.flow, c, total, light_key, args), total, args.removal, args.noise)
        return counts.astype(jnp.uint16).reshape(-1, *net.flow.detector.shape)
    compiled = eqx.filter_jit(sample)
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


def train(args, dataset, rows, scaler, teacher=None):
    """Train a stage on the given rows of the data set. Returns the averaged network and {"train_seconds", "step_seconds"}.

    As fm.py's: a plain loop over epochs whose numbers follow from --seed and the number of the step; a batch has the weights of
    the channel loss and the teacher beside the counts.
    """
    mesh, conditions = common.batch_mesh(args.devices), data.conditions(dataset.particles, scaler)
    weights, per_epoch = np.ones(len(conditions), np.float32), len(rows) // args.batch_size
    if args.stage == "student" and args.diversity and args.channel_loss:
        weights[rows] = diversity_weights(dataset.responses[rows], dataset.particles[rows])
    model_key, train_key = jax.random.split(jax.random.key(args.seed))
    optimiser = make_optimiser(args, args.epochs * per_epoch)
    header = {"script": args.script, "detector": args.detector, "flags": training_flags(args), "rows": len(rows)}
    with common.Logbook(args, header, args.epochs * per_epoch) as book:
        state = common.replicate(book.begin(start(args, conditions.shape[1], optimiser, model_key)), mesh)
        teacher, step = common.replicate(teacher, mesh), make_step(args, optimiser)
        for epoch in range(book.step // per_epoch, args.epochs):
            order = data.batches(rows, args.batch_size, np.random.default_rng([args.seed, epoch]))
            for batch_rows in order[book.step % per_epoch:]:
                batch_rows = np.split(batch_rows, jax.process_count())[jax.process_index()]   # those of this host
                counts, c, w = common.shard_batch((dataset.responses[batch_rows], conditions[batch_rows], weights[batch_rows]), mesh)
                state, losses = step(((counts, w, teacher), c, train_key, np.int32(book.step)), state)
                book.record(state, losses)
    return state.ema, book.end()


OWN = {"sum": ("noise",), "teacher": ("net", "sum_epochs"), "student": ("channel_loss", "light_loss", "diversity", "teacher_epochs")}
CONSTANTS = "mean", "std", "low"   # of the training rows


def training_flags(args):
    """The flags that decide what a stage trains, with those of the stages before, for the header of a checkpoint."""
    own = [name for stage in STAGES[:STAGES.index(args.stage) + 1] for name in OWN[stage]]
    return common.training_flags(args, *own, *CONSTANTS)


def stage_flags(args, stage):
    """The flags of one stage, which has a folder of its own. Stages before the one of --stage are read there (and finished if need
    be)."""
    run, before = args.run / stage, args.stage in STAGES and STAGES.index(stage) < STAGES.index(args.stage)
    epochs = {"sum": args.sum_epochs, "teacher": args.epochs, "student": args.student_epochs}[stage]
    resume = before or args.resume and (stage == "sum" or (run / "state.eqx").exists())      # a run may end before a later stage
    return common.with_flags(args, stage=stage, run=run, resume=resume, epochs=epochs, teacher_epochs=args.epochs)


def constants(args, responses):
    """Mean and standard deviation that bring the logits of training responses (N, H, W) into three quarters of the box, and the
    least photon sum, of 1 to data.CUT."""
    rng, part = np.random.default_rng(0), responses[:4000].astype(np.float32)
    total = part.sum((1, 2))[:, None, None]
    raw = common.with_flags(args, mean=0.0, std=1.0)
    x = np.asarray(to_logit(part + args.noise * rng.random(part.shape, np.float32), total, raw)[0])
    half = (float(x.max()) - float(x.min())) / 2
    low = int(responses.sum((1, 2), dtype=np.int64).min())
    return {"mean": float(x.min()) + half, "std": half / (0.75 * BOX), "low": min(max(low, 1), data.CUT)}


def train_stages(args, dataset, rows, scaler):
    """The stages that --stage names. Returns the Generators {"teacher", "student"} that are there, and {stage: what its Logbook
    found}; the teacher's model.eqx goes into its folder, the student's into --run."""
    nets, told, flows = {}, {}, {}
    wanted = STAGES[:STAGES.index(args.stage) + 1] if args.stage in STAGES else STAGES
    missing = [stage for stage in wanted[:-1] if args.stage in STAGES and not (args.run / stage / "state.eqx").exists()]
    if missing:
        raise UserError(f"--stage {args.stage} needs {args.run / missing[0]}: train that stage first, with the same flags")
    for stage in wanted:
        here = stage_flags(args, stage)
        nets[stage], told[stage] = train(here, dataset, rows, scaler, nets.get("teacher"))
        told["train_seconds"] = sum(told[name]["train_seconds"] for name in nets)
        if stage != "sum":
            here = common.with_flags(here, sampler=stage, run=args.run if stage == "student" else here.run)
            flows[stage] = finish(here, Generator(nets["sum"], nets[stage]), dataset, scaler, told)
    return flows, told


def finish(args, net, dataset, scaler, told):
    """Choose the removal of a Generator's noise and write model.eqx to --run; returns (flags, Generator, table)."""
    table = removals(args, net, scaler, data.select(dataset, args.validation))
    args = common.with_flags(args, removal=args.removal or min(table, key=lambda row: row["W"])["removal"])
    flags = training_flags(args) | {"removal": args.removal, "sampler": args.sampler}
    masked = eqx.tree_at(lambda net: net.flow, net, net.flow.masked())         # zeros make half a file
    return args, data.save_model(args, flags, scaler, told, masked), table


# ------------------------------------------------------------------------------------------------ scoring and generating

# W of one model on GEANT's ZN data, arXiv 2608.12795
PUBLISHED = {"floor": 2.60, "round": 4.33, "floor-renormalise": 1.73, "round-renormalise": 2.46}


# same as latent_fm.py: in_blocks
def in_blocks(function, *arrays):
    """function(*blocks, key) over the rows of arrays (N, ...) in blocks of one shape: an array (N, ...)."""
    found, rows = [], len(arrays[0])
    for start in range(0, rows, metrics.BLOCK):
        blocks = [np.resize(array[start:start + metrics.BLOCK], (metrics.BLOCK, *array.shape[1:])) for array in arrays]
        found.append(np.asarray(function(*blocks, jax.random.key(start))))     # the last block is filled up with repeated rows
    return np.concatenate(found)[:rows]


def make_light(args, net, scaler, part, true_sums=False):
    """Continuous counts (N, D) and photon sums (N,) for the particles of a Dataset, with its own sums or predicted ones."""
    c, totals = data.conditions(part.particles, scaler), part.responses.sum((1, 2), dtype=np.float32)
    if not true_sums:
        totals = in_blocks(lambda c, key: predict_totals(net.totals, c, key, args.low), c)
    draw = compiled_light(args.sampler, args.noise, args.mean, args.std)
    return in_blocks(partial(draw, net.flow), c, totals), totals


def removals(args, net, scaler, part):
    """Rows for the ways to take the noise away, on at most SCORED rows of a Dataset, with predicted sums."""
    part = data.select(part, slice(SCORED // 2))
    light, totals = make_light(args, net, scaler, part)
    truth, rows = metrics.channels(part.responses), []
    for how in REMOVALS:
        counts = np.asarray(remove_noise(light, totals, how, args.noise)).reshape(part.responses.shape)
        rows.append({"flow": args.sampler, "removal": how, "paper_W": PUBLISHED.get(how),
                     "W": metrics.wasserstein(truth, metrics.channels(counts)), "lit": float((counts > 0).mean()), "real_lit": float((part.responses > 0).mean())})
    common.print_rows(rows)
    return rows


def channel_scores(truth, sums, particles):
    """{"W", "MAE", "MAE_c", "MAE_cw", "MAE_cond"} of channels (N, 5) made for particles (N, 9)."""
    ids = data.unique_particles(particles)[0]
    terms = metrics.mae_particles(truth, sums, ids)
    return {"W": metrics.wasserstein(truth, sums), "MAE": metrics.mae(truth, sums)} | {
        name: metrics.weighted_mean(terms, metrics.particle_weights(ids, name)) for name in ("MAE_c", "MAE_cw", "MAE_cond")}


def score_flows(flows, scaler, test, oracle):
    """Rows for each flow (args, Generator, ...) with the true and with the predicted photon sums, on at most SCORED test rows;
    `oracle` are the channels of another run of the simulator, or None."""
    test, rows = data.select(test, slice(SCORED)), []
    truth = metrics.channels(test.responses)
    again = None if oracle is None else channel_scores(truth, oracle[:SCORED], test.particles)
    for name, (args, net, *_) in flows.items():
        for sums in ("true", "predicted"):
            light, totals = make_light(args, net, scaler, test, sums == "true")
            counts = np.asarray(remove_noise(light, totals, args.removal, args.noise)).reshape(test.responses.shape)
            found = channel_scores(truth, metrics.channels(counts), test.particles)
            rows.append({"flow": name, "sums": sums, **found, "R": again and found["W"] / again["W"]})
    if again:
        rows.append({"flow": "oracle", "sums": "-", **again, "R": 1.0})
    common.print_rows(rows)
    return rows


def score_sums(args, net, scaler, test, oracle):
    """{"nats", "W", "MAE", "oracle_W", "oracle_MAE"} of predicted photon sums; the network of paper 000 has an MAE of 53.2."""
    c, totals = data.conditions(test.particles, scaler), test.responses.sum((1, 2), dtype=np.float32)[:, None]
    drawn = in_blocks(lambda c, key: predict_totals(net, c, key, args.low), c)
    nats = eqx.filter_jit(lambda total, c, key: jnp.full(len(c), sum_loss(net, total[:, :, None], c, key, args)[0]))
    score = {"nats": float(in_blocks(nats, totals, c).mean()), "W": metrics.wasserstein(totals, drawn),
             "MAE": metrics.mae(totals[:, 0], drawn)}
    if oracle is not None:
        score |= {"oracle_W": metrics.wasserstein(totals, oracle.sum(1)), "oracle_MAE": metrics.mae(totals[:, 0], oracle.sum(1))}
    print("photon sums: " + ", ".join(f"{name} {value:.3f}" for name, value in score.items()))
    return score


def score_likelihood(args, net, scaler, test):
    """Bits per fibre of test responses (see teacher_loss), for a Generator with the teacher."""
    loss = eqx.filter_jit(lambda counts, c, key: jnp.full(len(c), teacher_loss(net.flow, counts, c, key, args)[1]["bits per fibre"]))
    test = data.select(test, slice(SCORED))
    return float(in_blocks(loss, test.responses.astype(np.float32), data.conditions(test.particles, scaler)).mean())


def race(args, teacher, student, scaler):
    """ms per response of the samplers in turn, a block of metrics.BLOCK at a time: the teacher's naive one, timed on the first TIMED
    fibres of each block, as each fibre costs the same full pass, its incremental one, and the student."""
    z = jax.random.normal(jax.random.key(0), (metrics.BLOCK, math.prod(student.detector.shape)))
    c, total = np.zeros((len(z), len(scaler.mean)), np.float32), np.full(len(z), 200, np.float32)
    naive = eqx.filter_jit(lambda flow: over_rows(lambda *rows: flow.masked().invert(*rows, "naive", count=TIMED), z, c, total))
    draw = {name: compiled_light(name, args.noise, args.mean, args.std) for name in STAGES[1:]}
    seconds = common.race({"naive": partial(naive, teacher), "incremental": partial(draw["teacher"], teacher, c, total, jax.random.key(0)),
                           "student": partial(draw["student"], student, c, total, jax.random.key(0))}, repeats=1)
    seconds["naive"] *= z.shape[1] / TIMED
    ms = {name: 1e3 * value / len(z) for name, value in seconds.items()}
    print(", ".join(f"{name} {value:.3f} ms, 1 / {ms['naive'] / value:.0f}" for name, value in ms.items()) + " of naive")
    return {"batch": len(z), "ms": ms, "ratio": {name: ms["naive"] / value for name, value in ms.items()}}


def cost(net, conditions):
    """{"parameters", "mflop"} of a Generator: all its numbers, and one pass of its flow."""
    fibres = math.prod(net.flow.detector.shape)
    mflop = common.network_cost(lambda *inputs: net.flow.masked()(*inputs)[0], (1, fibres), (1, conditions), (1,))["mflop"]
    return {"parameters": common.count_parameters(net), "mflop": mflop}


# paper 004, Table 1: the student alone, with the channel loss, and with its weights; then ours
ABLATION = {"base": {"channel_loss": 0.0, "light_loss": 0.0}, "channel": {"diversity": False, "light_loss": 0.0},
            "channel and diversity": {"diversity": True, "light_loss": 0.0}, "channel, diversity and light": {"diversity": True}}


def table(args, dataset, split, scaler):
    """Train a student of the same teacher for each row of ABLATION and score them beside the teacher; writes table.json."""
    test = data.select(dataset, split[2])
    if not args.channel_loss:
        raise UserError("--table needs a --channel-loss above 0")
    flows, told = train_stages(common.with_flags(args, stage="teacher" if args.stage == "student" else args.stage,
                                                 resume=args.resume or args.stage == "student"), dataset, split[0], scaler)
    nets = {"teacher": flows["teacher"]}
    for name, changed in ABLATION.items():
        run = args.run / f"student-{name.replace(' ', '-')}"
        here = stage_flags(common.with_flags(args, **changed), "student")
        here = common.with_flags(here, run=run, resume=args.resume and (run / "state.eqx").exists(), sampler="student")
        net, found = train(here, dataset, split[0], scaler, flows["teacher"][1].flow)
        nets[name] = finish(here, Generator(flows["teacher"][1].totals, net), dataset, scaler, {"student": found})
    rows = score_flows(nets, scaler, test, metrics.rerun(args, test))
    result = {"script": "iaf", "detector": args.detector, "command": args.command, "device": common.device_name(),
              "versions": common.versions(), "rows": {"train": len(split[0]), "test": min(len(split[2]), SCORED)}, "table": rows,
              "removals": [row for flow in nets.values() for row in flow[2]]}
    common.write_json(args.run / "table.json", result)
    return result


def main(argv=None):
    """Train (or load) and score, or generate. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.initialize_hosts()
    common.enable_compilation_cache()
    if args.table and args.load:
        raise UserError("--table trains its own networks, it does not go with --load")
    if args.load:
        args.load = args.load.parent / "teacher" / "model.eqx" if args.sampler == "teacher" else args.load
        asked = args.removal
        scaler, header = data.read_model(args, ("net", "noise", *CONSTANTS, "removal", "cond", "n", "split"))
        if header["flags"]["sampler"] != args.sampler:
            raise UserError(f"{args.load}: a {header['flags']['sampler']}, expected a {args.sampler}")
        args.removal = asked or args.removal
        like = eqx.filter_eval_shape(make_generator, args, len(scaler.mean), jax.random.key(0))     # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, result = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    tests = data.test_sets(args, dataset, split[2], seed)
    if not args.load:
        scaler = data.fit_conditions(dataset.particles[split[0]], args.cond)
        vars(args).update(constants(args, dataset.responses[split[0]]), validation=split[1])
        if args.table:
            return table(args, dataset, split, scaler)
        flows, result = train_stages(args, dataset, split[0], scaler)
        if args.stage == "sum":
            return result
        args.sampler = args.sampler if args.sampler in flows else "teacher"
        chosen, net, _ = flows[args.sampler]
        trained, args.removal = training_flags(chosen) | {"removal": chosen.removal, "sampler": args.sampler}, chosen.removal
        test = next(iter(tests.values()))
        again = metrics.rerun(args, test)
        result |= {"sums": score_sums(args, net.totals, scaler, test, again), "flows": score_flows(flows, scaler, test, again),
                   "removals": [row for flow in flows.values() for row in flow[2]],
                   "bits_per_fibre": score_likelihood(args, flows["teacher"][1], scaler, test)}
        if "student" in flows:
            result["speed"] = race(args, flows["teacher"][1].flow, flows["student"][1].flow, scaler)
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost(net, len(scaler.mean)), "evaluations": 1, **result}
    return metrics.report(args, sampler(args, net), scaler, tests, result)


if __name__ == "__main__":
    common.run(main)
