"""Generative adversarial networks for the zero degree calorimeters (paper 000, M. Wojnar et al., "Fast simulation of the zero
degree calorimeter responses with generative neural networks", its Table 6).

A generator G makes a response of a particle c and random numbers z, a critic D tells it from a real one (Eq. 3, non-saturating):
    L_D = softplus(-D(x, c)) + softplus(D(G(c, z), c))                          L_G = softplus(-D(G(c, z), c))
What keeps the two together: by default D compares a real and a made response of the same particle (`--loss relativistic`,
Jolicoeur-Martineau 2019), its gradients at both are penalised (R1 and R2), and G starts from the likelihood of the counts, which
stays as a weak term that holds single fibres in place (--anchor).
Variants add to L_G:
    --l2 W     W |G(c, z) - x|^2, mean over fibres (Isola et al. 2017)
    --sdi W    W f_div(c) |z_1 - z_2| / |D_e(G(c, z_1)) - D_e(G(c, z_2))|                 (Eq. 4: SDI-GAN)
               D_e the critic's penultimate layer, f_div the spread of a particle's training responses
    --aux W    W |A(G(c, z)) - A's target|^2, A pretrained to find the peak of a response
    --post     a factor for all counts, fitted to W on training rows

Photons are counts: G gives each fibre a logistic distribution of 2 sqrt(n), as fm.py, and a count is drawn from it; the gradient
is that of a softened count. `--counts round` is the papers' way: log responses, rounded at the end.

    python gan.py --detector zn                                       on 60 000 rows of the open data
    python gan.py --detector zn --table models                        the six rows of paper 000, Table 6
    python gan.py --load weights/gan-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py for seen and unseen particles beside its oracle; writes runs/gan-zn/.
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

NOISE = 10   # numbers into the generator, as many as ALICE O2 feeds its networks
SIZE, WIDTH, BLOCKS, EMBEDDING = 8, 64, 1, 64   # fibres of a patch, channels, transformer blocks, numbers of the penultimate layer
PEAK_STEPS = 2000   # small batches that the peak finder learns from
SOFTNESS = 0.3   # of the step from 0 to 1 photon on the axis 2 sqrt(n), in the gradient alone [validation rows]


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    shared = tuple(name for name in common.FLAGS if name != "steps")           # one pass: there are no steps to choose
    parser = common.parser(__doc__, "gan", flags=shared, n=60_000, epochs=10, lr=5e-4, batch_size=128)
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="how numbers become photons: drawn from each fibre's distribution, or rounded log1p "
                             "(default: sample)")
    weight = common.number(float, 0)
    parser.add_argument("--l2", type=weight, default=0.0, metavar="WEIGHT",
                        help="of the distance to the real response (default: 0)")
    parser.add_argument("--sdi", type=weight, default=0.0, metavar="WEIGHT", help="of the diversity term, Eq. 4 (default: 0)")
    parser.add_argument("--aux", type=weight, default=0.0, metavar="WEIGHT", help="of the auxiliary regressor (default: 0)")
    parser.add_argument("--post", action="store_true", help="fit a factor for all counts on training rows")
    parser.add_argument("--loss", choices=("plain", "relativistic"), default="relativistic",
                        help="Eq. 3, or of pairs of a real and a made response of one particle (default: relativistic)")
    parser.add_argument("--penalty", type=weight, default=1.0, metavar="WEIGHT",
                        help="of the squared gradients of the critic, R1 and R2 (default: 1)")
    parser.add_argument("--warm", type=common.number(int, 0), default=500, metavar="STEPS",
                        help="of the generator alone on the likelihood of the counts, before all others (default: 500)")
    parser.add_argument("--anchor", type=weight, default=2.0, metavar="WEIGHT",
                        help="of the likelihood of the counts (or the squared error) while both train (default: 2)")
    parser.add_argument("--critic-lr", type=weight, default=2.0, metavar="FACTOR",
                        help="learning rate of the critic, times --lr (default: 2)")
    parser.add_argument("--balance", action="store_true", help="show rare particle types more often")
    parser.add_argument("--table", choices=TABLES,
                        help="only train and score side by side: the paper's models, or ours without one of its stabilisers each")
    return parser


# -------------------------------------------------------------------------------------------------------------- network
# For ONE example: conditions c (C,), noise (NOISE,), picture x (H, W): sqrt(n), or log(1 + n) with --counts round.

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


# same as fm.py: weight
def weight(key, *shape, scale=None):
    """Normal weights, variance 1 / fan-in unless a scale is given."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


# same as vae.py: Feedforward
class Feedforward(eqx.Module):
    """Two layers on the last axis, twice as wide in between."""
    up: jax.Array
    down: jax.Array

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.up, self.down = weight(keys[0], width, 2 * width), weight(keys[1], 2 * width, width, scale=0.5 * width**-0.5)

    def __call__(self, x):
        return jax.nn.silu(x @ self.up) @ self.down


# same as vae.py: TransformerBlock
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


# same as fm.py: light
def light(bumps, patches):
    """Sum of patches (P, 16) under each of the bumps (P, K, 16), of unit length so that its noise is that of a fibre: (K,)."""
    return jnp.sum(bumps * patches[:, None], (0, 2)) / jnp.sqrt(jnp.sum(bumps**2, (0, 2)) + 1e-2)


# same as vae.py: Perceptron
class Perceptron(eqx.Module):
    """Two hidden layers on a vector."""
    layers: list

    def __init__(self, inputs, width, outputs, key):
        keys = jax.random.split(key, 3)
        self.layers = [linear(keys[0], inputs, width), linear(keys[1], width, width), linear(keys[2], width, outputs)]

    def __call__(self, x):
        first, second, last = self.layers
        return last(jax.nn.silu(second(jax.nn.silu(first(x.astype(first.weight.dtype))))))


class Generator(eqx.Module):
    """(c, noise) -> maps (M, H, W): location and log of the scale, or log response. A vision transformer on patches (paper 000,
    Fig. 11), then a network that all patches share, which sees their vicinity to the places where the particle may hit."""
    code: Perceptron
    enter: eqx.nn.Linear
    position: jax.Array
    blocks: list
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    head: eqx.nn.Linear
    detector: data.Detector = eqx.field(static=True)

    def __init__(self, args, conditions, key, hidden=64):
        keys = iter(jax.random.split(key, 6 + BLOCKS))
        self.detector = data.DETECTORS[args.detector]
        offsets, bumps = vicinity(jnp.zeros(conditions), self.detector, SIZE)
        patches, known = len(bumps), conditions + len(waves(np.zeros(conditions)))
        self.code = Perceptron(known + NOISE, 128, 128, next(keys))
        self.enter = linear(next(keys), 128, patches * WIDTH)
        self.position = 0.1 * jax.random.normal(next(keys), (patches, WIDTH))
        self.blocks = [TransformerBlock(None, WIDTH, next(keys)) for _ in range(BLOCKS)]
        self.local = linear(next(keys), WIDTH + offsets.shape[1] + bumps[0].size, hidden)
        self.modulation = linear(next(keys), 128, 2 * hidden)
        self.head = linear(next(keys), hidden, (2 if args.counts == "sample" else 1) * SIZE**2, scale=0.1)

    def __call__(self, c, noise):
        code = self.code(jnp.concatenate([c, waves(c), noise]))
        offsets, bumps = common.cast(vicinity(c, self.detector, SIZE), code.dtype)
        h = self.enter(code).reshape(self.position.shape) + self.position                             # (P, WIDTH)
        for block in self.blocks:
            h = block(h)
        h = jnp.concatenate([normalise(h), offsets, bumps.reshape(len(bumps), -1)], axis=1)
        scale, shift = jnp.split(self.modulation(code), 2)
        h = jax.nn.silu(apply(self.local, h) * (1 + scale) + shift)                                   # (P, hidden)
        return from_patches(apply(self.head, h), SIZE, self.detector.shape)


class Critic(eqx.Module):
    """(picture, c) -> how real it looks (), and the penultimate layer (EMBEDDING,): a vision transformer on the patches and their
    photons, roots of photons and lit fibres, with the light around the places where the particle may hit."""
    patches: eqx.nn.Linear
    position: jax.Array
    blocks: list
    local: eqx.nn.Linear
    modulation: eqx.nn.Linear
    known: Perceptron
    embed: eqx.nn.Linear
    out: eqx.nn.Linear
    detector: data.Detector = eqx.field(static=True)

    def __init__(self, args, conditions, key, hidden=64):
        keys = iter(jax.random.split(key, 7 + BLOCKS))
        self.detector = data.DETECTORS[args.detector]
        bumps = vicinity(jnp.zeros(conditions), self.detector, SIZE)[1]
        offsets, close = vicinity(jnp.zeros(conditions), self.detector, 4)
        self.local = linear(next(keys), 16 + offsets.shape[1] + close[0].size, hidden)
        self.modulation = linear(next(keys), 128, 2 * hidden)
        known = conditions + len(waves(np.zeros(conditions)))
        self.patches = linear(next(keys), SIZE**2 + 3, WIDTH)
        self.position = 0.1 * jax.random.normal(next(keys), (len(bumps), WIDTH))
        self.blocks = [TransformerBlock(None, WIDTH, next(keys)) for _ in range(BLOCKS)]
        self.known = Perceptron(known, 128, 128, next(keys))
        self.embed = linear(next(keys), len(bumps) * WIDTH + bumps.shape[1] + 3 + hidden + 128, EMBEDDING)
        self.out = linear(next(keys), EMBEDDING, 1)

    def __call__(self, x, c):
        known = self.known(jnp.concatenate([c, waves(c)]))
        patches, bumps = common.cast((to_patches(x, SIZE), vicinity(c, self.detector, SIZE)[1]), known.dtype)
        sums = jnp.stack([patches**2, patches, jnp.minimum(patches, 1)]).sum(2).T                     # (P, 3)
        sums = jnp.maximum(sums, -0.5)                                         # log responses that are made may be negative
        h = apply(self.patches, jnp.concatenate([patches, jnp.log1p(sums)], axis=1)) + self.position  # (P, WIDTH)
        for block in self.blocks:
            h = block(h)
        small, offsets, close = common.cast((to_patches(x, 4), *vicinity(c, self.detector, 4)), known.dtype)
        scale, shift = jnp.split(self.modulation(known), 2)
        texture = apply(self.local, jnp.concatenate([small, offsets, close.reshape(len(close), -1)], axis=1))
        texture = jax.nn.silu(texture * (1 + scale) + shift).sum(0) / len(small)**0.5       # of patches of 4 x 4, wherever they lie
        whole = jnp.concatenate([light(bumps, patches), jnp.log1p(jnp.maximum(sums.sum(0), -0.5)), texture, known])
        embedding = jax.nn.silu(self.embed(jnp.concatenate([normalise(h).ravel(), whole])))
        return self.out(embedding)[0], embedding


class PeakFinder(eqx.Module):
    """Picture -> place of its brightest fibre, both coordinates in (-1, 1): (2,)."""
    perceptron: Perceptron

    def __init__(self, args, conditions, key):
        self.perceptron = Perceptron(math.prod(data.DETECTORS[args.detector].shape), 128, 2, key)

    def __call__(self, x):
        return self.perceptron(x.ravel())


class Adversaries(eqx.Module):
    """What is trained together; the peak finder, trained before, stays as it is."""
    generator: Generator
    critic: Critic
    finder: PeakFinder | None

    def __init__(self, args, conditions, key):
        keys = jax.random.split(key, 3)
        self.generator, self.critic = Generator(args, conditions, keys[0]), Critic(args, conditions, keys[1])
        self.finder = PeakFinder(args, conditions, keys[2]) if args.aux else None


class GAN(eqx.Module):
    """What a checkpoint keeps: the generator and the factor of the postprocessing."""
    generator: Generator
    factor: jax.Array


# ------------------------------------------------------------------------------------------------------------ objective

def picture(counts, how):
    """Photon counts -> what the critic sees: a spread of 1/2 for each Poisson count, or as in the papers."""
    return jnp.sqrt(counts) if how == "sample" else jnp.log1p(counts)


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


def draw_picture(maps, key, args):
    """A picture (H, W) from the generator's maps. Drawn counts are whole; the gradient is that of a softened root of a count: half
    of x, with a soft step from 0 to 1 photon. Straight through the rounding, the many dark fibres, which no small change makes
    bright, would outweigh all others."""
    if args.counts == "round":
        return maps[0]
    u = jax.random.uniform(key, maps[0].shape, minval=1e-6, maxval=1 - 1e-6)
    x = maps[0] + jnp.exp(jnp.clip(maps[1], -4, 3)) * jnp.log(u / (1 - u))     # on the axis 2 sqrt(n), as draw_counts
    exact = jnp.sqrt(jnp.floor(jnp.square(jnp.maximum(x, 0) / 2) + 0.5))
    over = (x - 2**0.5) / SOFTNESS                                             # where 0 photons become 1
    soft = SOFTNESS * jax.nn.softplus(over) / 2 + (1 - 0.5**0.5) * jax.nn.sigmoid(over)
    return soft + jax.lax.stop_gradient(exact - soft)


def unlikelihood(maps, counts, args):
    """Mean over fibres of -log P(n), nats, or of the squared error of log responses: maps (B, M, H, W), counts (B, H, W)."""
    if args.counts == "round":
        return jnp.mean(jnp.square(maps[:, 0] - picture(counts, args.counts)))
    return count_loss(counts, maps[:, 0], jnp.exp(jnp.clip(maps[:, 1], -4, 3))).mean()


def diversity_term(embeddings, others, noise, other_noise, spread):
    """Eq. 4 for one particle: f_div times the distance of two codes over that of the critic's embeddings of their responses."""
    distance = jnp.mean(jnp.abs(embeddings - others))
    return spread * jnp.mean(jnp.abs(noise - other_noise)) / (distance + 1e-3)


def peak(x):
    """Place of the brightest fibre of x (H, W), each coordinate in (-1, 1)."""
    place = jnp.stack(jnp.unravel_index(jnp.argmax(x), x.shape))
    return 2 * place / (jnp.array(x.shape) - 1) - 1


def batch_loss(net, counts, c, key, args):
    """Eq. 3 for both: counts (B, H, W), c (B, C + 1) conditions and f_div -> loss and its parts. Each adversary learns from its own
    term: the other one's weights, and the pictures that the critic judges, are constants there."""
    c, spread = c[:, :-1], c[:, -1]
    if args.precision == "bf16":
        net = common.cast(net, jnp.bfloat16)                                   # the conditions hold places: float32
    keys, size, counts = jax.random.split(key, 4), len(counts), counts.astype(jnp.float32)
    x, frozen = picture(counts, args.counts), jax.lax.stop_gradient

    def generate(noise, key):
        maps = jax.vmap(net.generator)(c, noise).astype(jnp.float32)
        return maps, jax.vmap(lambda maps, key: draw_picture(maps, key, args))(maps, jax.random.split(key, size))

    noise = jax.random.normal(keys[0], (size, NOISE))
    maps, made = generate(noise, keys[1])
    judge = lambda critic, x: jax.vmap(critic)(x, c)
    fooled, embeddings = judge(frozen(net.critic), made)
    real, fake = (judge(net.critic, x)[0].astype(jnp.float32) for x in (x, frozen(made)))
    rival = frozen(real) if args.loss == "relativistic" else 0.0
    loss = jax.nn.softplus(rival - fooled.astype(jnp.float32)).mean()          # Eq. 3, non-saturating
    parts = {"generator": loss}
    if args.anchor:
        parts["anchor"] = unlikelihood(maps, counts, args)
        loss += args.anchor * parts["anchor"]
    if args.l2:
        parts["l2"] = jnp.mean(jnp.square(made - x))
        loss += args.l2 * parts["l2"]
    if args.sdi:
        other_noise = jax.random.normal(keys[2], noise.shape)
        others = judge(frozen(net.critic), generate(other_noise, keys[3])[1])[1]
        parts["sdi"] = jax.vmap(diversity_term)(embeddings, others, noise, other_noise, spread).mean()
        loss += args.sdi * parts["sdi"]
    if args.aux:
        parts["aux"] = jnp.mean(jnp.square(jax.vmap(frozen(net.finder))(made) - jax.vmap(frozen(net.finder))(x)))
        loss += args.aux * parts["aux"]
    parts["critic"] = (jax.nn.softplus(fake - real) if args.loss == "relativistic"
                       else jax.nn.softplus(-real) + jax.nn.softplus(fake)).mean()                    # Eq. 3
    if args.penalty:
        few = slice(max(size // 8, 1))                                         # of the batch: second derivatives are slow
        slope = jax.vmap(jax.grad(lambda x, c: net.critic(x, c)[0]))(jnp.concatenate([x[few], frozen(made)[few]]),
                                                                     jnp.concatenate([c[few], c[few]]))
        parts["slope"] = jnp.sum(slope**2, axis=(1, 2)).mean()
        loss += args.penalty * parts["slope"]                                  # R1 / 2 + R2 / 2: Mescheder et al. 2018, Eq. 9, 10
    # not trained on, but looked at: can the critic still tell, do responses still differ?
    parts["critic AUC"] = jnp.mean(frozen(real)[:, None] > frozen(fake))
    parts["spread of sums"] = jnp.std(frozen(made).sum((1, 2))) / (jnp.std(x.sum((1, 2))) + 1e-6)
    return loss + parts["critic"], parts


# -------------------------------------------------------------------------------------------------------------- sampler

def decode_new(net, c, key, args):
    """The generator's maps (B, M, H, W) for conditions c (B, C) and new noise, and the factor of the postprocessing."""
    return jax.vmap(net.generator)(c, jax.random.normal(key, (len(c), NOISE))), net.factor


def to_counts(decoded, key, args):
    """What decode_new returns -> photon counts uint16 (B, H, W)."""
    maps, factor = decoded
    if args.counts == "sample":
        counts = draw_counts(maps[:, 0], jnp.exp(jnp.clip(maps[:, 1], -4, 3)), key)
    else:
        counts = jnp.maximum(jnp.expm1(maps[:, 0]), 0)
    return jnp.minimum(jnp.round(factor * counts), 65535).astype(jnp.uint16)


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
    """An optimiser for each adversary: AdamW behind a clip of the gradient norm, the critic with a learning rate of its own (Heusel
    et al. 2017); the rates end near 0 after `steps` steps. The peak finder keeps its weights."""
    def own(lr):
        schedule = (optax.cosine_onecycle_schedule(steps, lr, 0.1, 10, 100) if args.schedule == "onecycle"
                    else optax.cosine_decay_schedule(lr, steps))
        return optax.chain(optax.clip_by_global_norm(args.clip), optax.adamw(schedule, b1=0.5, b2=0.99, weight_decay=1e-4))

    owners = {"generator": own(args.lr), "critic": own(args.lr * args.critic_lr), "finder": optax.set_to_zero()}
    return optax.partition(owners, lambda net: jax.tree.map_with_path(lambda path, _: path[0].name, net))


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


def spreads(responses, particles):
    """f_div of Eq. 4 for each row: standard deviation over the rows of its particle, summed over fibres, scaled to (0, 1); (N,)."""
    ids = data.unique_particles(particles)[0]
    found = np.array([responses[ids == k].astype(np.float32).std(0).sum() for k in range(ids.max() + 1)])
    return ((found - found.min()) / (np.ptp(found) or 1.0))[ids].astype(np.float32)


def balanced(rows, pdg, rng):
    """As many rows, drawn so that a particle type comes as often as the square root of its share."""
    _, ids, counts = np.unique(pdg[rows], return_inverse=True, return_counts=True)
    chance = counts[ids]**-0.5
    return rng.choice(rows, len(rows), p=chance / chance.sum())


def fit(args, net, error, dataset, conditions, rows, steps, label):
    """`net` after `steps` small batches of the given rows on error(net, counts (B, H, W), c (B, C), key)."""
    optimiser, rng = optax.chain(optax.clip_by_global_norm(args.clip), optax.adam(1e-3)), np.random.default_rng(args.seed)
    state = optimiser.init(eqx.filter(net, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(net, state, counts, c, key):
        loss, gradient = eqx.filter_value_and_grad(error)(net, counts.astype(jnp.float32), c, key)
        updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(net, updates), state, loss

    for number in common.progress(steps, label, args.quiet):
        batch = np.sort(rng.choice(rows, min(args.batch_size, len(rows)), replace=False))
        net, state, loss = step(net, state, dataset.responses[batch], conditions[batch], jax.random.key(number))
    print(f"{label}: {steps} steps, loss {float(loss):.3f}")
    return net


def begin(args, net, dataset, conditions, rows):
    """The Adversaries as the training finds them: the generator on the likelihood of the counts (or the mean response), whatever
    the noise, for --warm steps; the peak finder on the places of the peaks."""
    def likelihood(generator, counts, c, key):
        return unlikelihood(jax.vmap(generator)(c, jax.random.normal(key, (len(c), NOISE))), counts, args)

    def misplaced(finder, counts, c, key):
        x = picture(counts, args.counts)
        return jnp.mean(jnp.square(jax.vmap(finder)(x) - jax.vmap(peak)(x)))

    fitted = {}
    if args.warm:
        fitted["generator"] = fit(args, net.generator, likelihood, dataset, conditions, rows, args.warm, "generator")
    if args.aux:
        fitted["finder"] = fit(args, net.finder, misplaced, dataset, conditions, rows, PEAK_STEPS, "peak finder")
    return eqx.tree_at(lambda net: [getattr(net, name) for name in fitted], net, list(fitted.values()))


def start(args, dataset, conditions, rows, optimiser, key):
    """The State before the first step."""
    net = Adversaries(args, conditions.shape[1], key)
    if not args.resume:                                                        # else the saved state holds it all
        net = begin(args, net, dataset, conditions, rows)
    ema = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, net)   # a copy: the step gives its buffers away
    return State(net, ema, optimiser.init(eqx.filter(net, eqx.is_inexact_array)))


def train(args, dataset, rows, scaler):
    """Train on the given rows of the data set. Returns the GAN of averaged weights and {"train_seconds", "step_seconds"}.

    As fm.py's: a plain loop over epochs whose numbers follow from --seed and the number of the step; the conditions have f_div
    beside them.
    """
    mesh = common.batch_mesh(args.devices)
    conditions = data.conditions(dataset.particles, scaler)
    spread = np.zeros(len(conditions), np.float32)
    if args.sdi:
        spread[rows] = spreads(dataset.responses[rows], dataset.particles[rows])
    conditions = np.column_stack([conditions, spread])
    per_epoch = len(rows) // args.batch_size
    model_key, train_key = jax.random.split(jax.random.key(args.seed))
    optimiser = make_optimiser(args, args.epochs * per_epoch)
    header = {"script": args.script, "detector": args.detector, "flags": training_flags(args), "rows": len(rows)}
    with common.Logbook(args, header, args.epochs * per_epoch) as book:
        state = common.replicate(book.begin(start(args, dataset, conditions[:, :-1], rows, optimiser, model_key)), mesh)
        step = make_step(args, optimiser)
        for epoch in range(book.step // per_epoch, args.epochs):
            rng = np.random.default_rng([args.seed, epoch])
            order = data.batches(balanced(rows, dataset.pdg, rng) if args.balance else rows, args.batch_size, rng)
            for batch_rows in order[book.step % per_epoch:]:
                batch_rows = np.split(batch_rows, jax.process_count())[jax.process_index()]   # those of this host
                batch = common.shard_batch((dataset.responses[batch_rows], conditions[batch_rows]), mesh)
                state, losses = step((*batch, train_key, np.int32(book.step)), state)
                book.record(state, losses)
    told = book.end()
    tell_collapse(common.read_log(args.run))
    return GAN(state.ema.generator, jnp.array(1.0)), told


def tell_collapse(records):
    """Say so if the adversaries lost each other, by the last ten lines of the log."""
    auc, spread = (np.mean([record[name] for record in records[-10:]]) for name in ("critic AUC", "spread of sums"))
    if auc > 0.99 or not 0.5 < spread < 2:
        print(f"COLLAPSED: the critic tells {100 * auc:.1f} % of the pairs, and the sums spread {spread:.2f} times as much as the "
              "data's")


def fit_factor(args, net, dataset, rows, scaler):
    """The GAN with the factor of the postprocessing that has the least W on the given training rows (paper 000; a grid)."""
    counts = metrics.generator(args, sampler(args, net), scaler)(dataset.particles[rows], 0).astype(np.float32)
    truth, factors = metrics.channels(dataset.responses[rows]), np.linspace(0.75, 1.25, 51)
    found = [metrics.wasserstein(truth, metrics.channels(np.round(factor * counts))) for factor in factors]
    return GAN(net.generator, jnp.array(factors[int(np.argmin(found))], jnp.float32))


def training_flags(args):
    """The flags that decide what is trained, for the header of a checkpoint."""
    return common.training_flags(args, "counts", "l2", "sdi", "aux", "post", "loss", "penalty", "warm", "anchor", "critic_lr",
                                 "balance")


def make_network(args, conditions, key):
    """A GAN that is not trained: the shapes of a checkpoint."""
    return GAN(Generator(args, conditions, key), jnp.array(1.0))


# ------------------------------------------------------------------------------------------------ scoring and generating

# Flags that differ from those of the command; W, MAE and RMSE on GEANT's ZN data without and with the postprocessing, as far as
# they are published: paper 000, Table 6
TABLES = {"models": {"GAN": ({}, (7.09, 25.65, 104.60), (5.70, 24.71, 100.98)),
                     "GAN + l2": ({"l2": 1.0}, (6.44, 27.37, 109.24), (6.07, 26.78, 107.07)),
                     "SDI-GAN": ({"sdi": 0.1}, (6.57, 27.01, 107.82), (6.36, 26.58, 105.94))},
          "stabilisers": {"all": ({}, ()), "plain loss": ({"loss": "plain"}, ()), "no penalty": ({"penalty": 0.0}, ()),
                          "no warm start": ({"warm": 0}, ()), "no anchor": ({"anchor": 0.0}, ()),
                          "one rate": ({"critic_lr": 1.0}, ()), "no average": ({"ema": 0.0}, ()),
                          "balanced": ({"balance": True}, ())}}
TYPES = {"gamma": 22, "n": 2112, "p": 2212, "Lambda": 3122}   # whose dispersion the tables tell


def table(args, dataset, split):
    """Train the models of one of TABLES and score them on the test rows, those of the paper without and with the postprocessing,
    with the dispersion (metrics.dispersion) of the commonest particle types. Writes table.json after each, a model.eqx for each."""
    scaler, rows = data.fit_conditions(dataset.particles[split[0]], args.cond), []
    test = data.select(dataset, split[2])
    truth, (ids, first) = metrics.summarise(test.responses), data.unique_particles(test.particles)
    types = test.pdg[first]

    def score(sums):
        spread = metrics.dispersion(truth.channels, sums, ids, test.pdg)
        found = {"W": metrics.wasserstein(truth.channels, sums), "MAE": metrics.mae(truth.channels, sums)}
        return found | {f"dispersion_{name}": float(spread[types == code].mean()) for name, code in TYPES.items() if code in types}

    oracle = None if args.data else score(metrics.rerun(args, test))
    for name, (changed, *published) in TABLES[args.table].items():
        run = args.run / name.replace(" + ", "-").replace(" ", "-").lower()
        here = common.with_flags(args, **changed, run=run, resume=args.resume and (run / "state.eqx").exists())
        net, told = train(here, dataset, split[0], scaler)
        for post, paper in zip((False, True), published):                      # a stabiliser has () alone: one row
            net = fit_factor(here, net, dataset, split[0][:metrics.CLASSIFIER["rows"]], scaler) if post else net
            net = data.save_model(common.with_flags(here, post=post), training_flags(here), scaler, told, net)
            made = metrics.summarise(metrics.generator(here, sampler(here, net), scaler)(test.particles, 0))
            found = score(made.channels) | dict(zip(("AUC_low", "AUC_high"), metrics.auc_scores(truth, made, test.particles)))
            rows.append({"model": name, "post": post} | dict(zip(("paper_W", "paper_MAE", "paper_RMSE"), paper)) | found
                        | {"R": oracle and found["W"] / oracle["W"], "RMSE": metrics.rmse(truth.responses, made.responses),
                           "factor": float(net.factor), "seconds": told["train_seconds"]})
        result = {"script": "gan", "detector": args.detector, "command": args.command, "device": common.device_name(),
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
        scaler, header = data.read_model(args, ("counts", "cond", "n", "split"))
        like = eqx.filter_eval_shape(make_network, args, len(scaler.mean), jax.random.key(0))  # compiles nothing
        net = common.load_checkpoint(args.load, like)[1]
        if args.generate:
            return metrics.generate_file(args, metrics.generator(args, sampler(args, net), scaler))
        trained, told = header["flags"], header["scores"]
    seed = trained["seed"] if args.load else args.seed                         # a loaded model meets its own test rows
    dataset, split = data.open_split(args, seed)
    if not args.load:
        if args.table:
            return table(args, dataset, split)
        scaler, trained = data.fit_conditions(dataset.particles[split[0]], args.cond), training_flags(args)
        net, told = train(args, dataset, split[0], scaler)
        net = fit_factor(args, net, dataset, split[0][:metrics.CLASSIFIER["rows"]], scaler) if args.post else net
        net = data.save_model(args, trained, scaler, told, net)
    cost = common.network_cost(net.generator, (len(scaler.mean),), (NOISE,))
    result = {"flags": trained, "rows": {"train": len(split[0])}, **cost, "evaluations": 1, "factor": float(net.factor), **told}
    return metrics.report(args, sampler(args, net), scaler, data.test_sets(args, dataset, split[2], seed), result, common.BATCHES)


if __name__ == "__main__":
    common.run(main)
