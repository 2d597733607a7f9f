"""Autoencoders [Comparison].

An encoder E shrinks a response x to a latent z of a few numbers, a decoder D makes a response of it. There
are four ways to a latent for a new particle c, whose response is then D(z); R is the error of D(E(x)). D of
`vae` also sees the impact points and the photon sum n, which q takes from x and the prior draws (totals.py):
    vae             L = R + beta KL(q(z, n | x, c) || p(z, n | c))            z, n ~ p(z, n | c), see Prior
    supervised      L = R + beta |E(x) - c|^2                      (Eq. 1)    z = c
    noise-l2        L = R + beta |G(c, e) - E(x)|^2                           z = G(c, e), e ~ N(0, 1)
    noise-sinkhorn  L = R + beta S((G(c, e), c), (E(x), c))        (Eq. 2)    z = G(c, e), e ~ N(0, 1)
G is a noise generator and S the Sinkhorn divergence, a distance of two distributions. All terms are per fibre
or per number of the latent, so that beta does not depend on their sizes.

Photons are counts, drawn from what is decoded as in checkerboard.py, so that R = -log p(x | z) has no
weight to tune (`--likelihood mse`: squared error of log responses, as the papers). After this training the
prior of `vae` is trained on alone, since it has to match the latents of the responses of each particle.

    python vae.py --detector zn                          ten minutes of training on two CPU cores
    python vae.py --load weights/vae-zn.eqx --generate particles.csv --out responses.h5

Prints the trainings, then every score of metrics.py beside its oracle; ends with `written: runs/vae-zn/`.
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
from checkerboard import Checkerboard
from common import MLP, Linear, normal, normalise
from layers import convolve, enlarge
from papers import ConvBlock, MixerBlock, TransformerBlock
from simulator import DETECTORS, Detector
from totals import Totals, draw_totals, least_total, scaled_sum, sum_nll, with_sum

NOISE = 10   # numbers into the noise generator, as many as ALICE O2 feeds its networks


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    shared = tuple(name for name in common.FLAGS if name != "steps")           # one pass: no steps to choose
    own = "arch", "variant", "likelihood", "latent", "beta", "prior_epochs"
    parser = common.parser(__doc__, "vae", shared, own, n=60_000, epochs=10, lr=2e-3)
    parser.add_argument("--arch", choices=BLOCKS, default="mixer",
                        help="build encoder and decoder of convolutions, as a vision transformer or as an "
                             "MLP-mixer (default: mixer)")
    parser.add_argument("--variant", choices=LOSSES, default="vae",
                        help="loss, and with it the way to a latent for a new particle (default: vae)")
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="checkerboard",
                        help="draw counts in four colours of a checkerboard, each conditioned on earlier "
                             "ones, or decode a log response with squared error (default: checkerboard)")
    parser.add_argument("--latent", type=common.number(int, 1, 1024), default=24, metavar="N",
                        help="numbers in the latent; `supervised` has one for each condition (default: 24)")
    parser.add_argument("--prior-epochs", type=common.number(int, 1, 10**6), default=40, metavar="N",
                        help="passes over the training rows in which the prior of `vae` learns on, alone, "
                             "where steps are cheap; --epochs counts those before (default: 40)")
    parser.add_argument("--beta", type=common.number(float, 0), default=1.0, metavar="WEIGHT",
                        help="weight of the second term of the loss (default: 1)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective
# A loss returns its two terms, for one response (H, W) of a particle c (C,) and noise (net.noise,).

def elbo(net, counts, c, noise, likelihood):
    """The negative evidence lower bound (Kingma and Welling 2014) in nats per fibre: -log p(x | z, n, c) +
    KL(q(z, n | x, c) || p(z, n | c)), both by one z and the photon sum n of x."""
    z, log_std = draw_code(net.encode(jnp.log1p(counts), c), noise)
    divergence = -jnp.sum(log_std) - jnp.sum(noise**2) / 2 - net.prior.log(z, jnp.sum(counts), c)
    return reconstruction_loss(net, z, counts, c, likelihood), divergence / counts.size


def draw_code(code, noise):
    """z ~ q(z | x, c) (L,) and its log standard deviation, of a code (2 L,) and noise (L,) ~ N(0, 1)."""
    mean, log_std = jnp.split(code, 2)
    log_std = jnp.clip(log_std, -8, 4)
    return mean + jnp.exp(log_std) * noise, log_std


def supervised_loss(net, counts, c, noise, likelihood):
    """The latent learns to be the particle itself; `noise` is empty."""
    z = net.encode(jnp.log1p(counts), c)
    distance = jnp.mean((z - c)**2)                                            # [Comparison, Eq. 1]
    return reconstruction_loss(net, z, counts, c, likelihood), distance


def noise_l2_loss(net, counts, c, noise, likelihood):
    """A generator learns the latent of a particle, at best its mean: the target is the same for all noise."""
    z = net.encode(jnp.log1p(counts), c)
    distance = jnp.mean((net.generate(c, noise) - z)**2)
    return reconstruction_loss(net, z, counts, c, likelihood), distance


def noise_sinkhorn_loss(net, counts, c, noise, likelihood):
    """A generator learns the distribution of latents, which takes a whole batch to compare: counts (B, H, W),
    c (B, C), noise (B, NOISE)."""
    z, made = jax.vmap(net.encode)(jnp.log1p(counts), c), jax.vmap(net.generate)(c, noise)
    # beside the particle: the latents of each particle are to agree, not only those of all together
    distance = sinkhorn(jnp.hstack([made, c]), jnp.hstack([z, c])) / z.shape[1]    # [Comparison, Eq. 2]
    return jax.vmap(partial(reconstruction_loss, net, likelihood=likelihood))(z, counts, c), distance


LOSSES = {"vae": elbo, "supervised": supervised_loss,
          "noise-l2": noise_l2_loss, "noise-sinkhorn": noise_sinkhorn_loss}
LIKELIHOODS = "checkerboard", "mse"


def reconstruction_loss(net, z, counts, c, likelihood):
    """-log p(x | z), mean over the fibres of counts (H, W), or the squared error."""
    decoded = net.decode(z, jnp.sum(counts), c)
    if likelihood == "checkerboard":
        return net.decoder.head.loss(decoded, counts)
    return jnp.mean((decoded - jnp.log1p(counts))**2)                          # as the papers


def batch_loss(net, counts, c, key, variant, likelihood, beta):
    """Loss of counts (B, H, W) and conditions c (B, C), and its parts."""
    noise = jax.random.normal(key, (len(counts), net.noise))
    terms = partial(LOSSES[variant], net, likelihood=likelihood)
    terms = terms if variant == "noise-sinkhorn" else jax.vmap(terms)
    first, second = (term.mean() for term in terms(counts.astype(jnp.float32), c, noise))
    parts = {"reconstruction": first, "latent": second}
    if variant == "vae" and likelihood == "mse":
        # a normal likelihood of the best variance: no weight to tune (Rybkin et al. 2021)
        first = 0.5 * jnp.log(first)
    if variant == "vae" and likelihood == "checkerboard":
        second *= 2                         # its loss has two terms, of the counts and of their rates alone
    return first + beta * second, parts


def prior_loss(prior, codes, total, c, key):
    """-log p(z, n | c) in nats, but for a constant, of latents drawn for codes (B, 2 L) and of photon sums
    (B,) of conditions c (B, C): what is left of the ELBO when encoder and decoder stay as they are."""
    noise = jax.random.normal(jax.random.fold_in(key, 1), (len(c), codes.shape[1] // 2))   # new noise
    z = jax.vmap(draw_code)(codes.astype(jnp.float32), noise)[0]
    nats = -jax.vmap(prior.log)(z, total, c).mean()
    return nats, {"nats": nats}


# ---------------------------------------------------------------------------------------- Sinkhorn divergence

def sinkhorn(a, b, rounds=50, blur=0.05):
    """Debiased Sinkhorn divergence of two batches of points (B, D) with the cost |a - b|^2 / 2 (Feydy et al.
    2019, Eq. 3): OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2, with an entropy of `blur` times the mean cost."""
    cost = lambda a, b: jnp.sum(jnp.square(a[:, None] - b), axis=-1) / 2       # (B, B)
    epsilon = blur * jax.lax.stop_gradient(jnp.mean(cost(a, b))) + 1e-12
    between, first, second = (transport(cost(*pair), epsilon, rounds) for pair in ((a, b), (a, a), (b, b)))
    return between - (first + second) / 2


def transport(cost, epsilon, rounds):
    """Cost of the entropic transport between uniform weights, for the cost (B, B) of each pair: averaged
    Sinkhorn rounds on the dual potentials, in logarithms, which stay in the range of float32. The gradient
    holds the plan fixed (envelope theorem)."""
    fixed, log_weight = jax.lax.stop_gradient(cost), -math.log(len(cost))

    def soft(potential, cost):
        return -epsilon * jax.nn.logsumexp(log_weight + (potential - cost) / epsilon, axis=1)

    def improve(potentials, _):
        f, g = potentials
        return ((f + soft(g, fixed)) / 2, (g + soft(f, fixed.T)) / 2), None

    zeros = jnp.zeros(len(cost))
    (f, g), _ = jax.lax.scan(improve, (zeros, zeros), length=rounds)
    g = soft(f, fixed.T)
    f = soft(g, fixed)                                                         # the plan's rows sum to 1 / B
    plan = jnp.exp((f[:, None] + g - fixed) / epsilon + 2 * log_weight)
    return jnp.mean(f) + jnp.mean(g) + jnp.sum(plan * (cost - fixed))


# ---------------------------------------------------------------------------------------------------- sampler

def draw_latent(net, c, noise, total):
    """The latent (L,) of a new particle c (C,), for "vae" of its photon sum too."""
    if net.variant == "vae":
        return net.prior.draw(noise, total, c)
    return c if net.variant == "supervised" else net.generate(c, noise)


def draw_response(net, decoded, likelihood, key):
    """Photon counts (B, H, W) of what is decoded, (B, ...)."""
    if likelihood == "checkerboard":
        return jax.vmap(net.decoder.head.draw)(decoded, jax.random.split(key, len(decoded)))
    return data.rounded_counts(decoded)


def sample(net, c, key, likelihood):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    latent_key, sum_key, count_key = jax.random.split(key, 3)
    total = draw_totals(net.prior.totals, c, sum_key) if net.prior else c[:, 0]             # not looked at
    z = jax.vmap(partial(draw_latent, net))(c, jax.random.normal(latent_key, (len(c), net.noise)), total)
    return data.as_uint16(draw_response(net, jax.vmap(net.decode)(z, total, c), likelihood, count_key))


# --------------------------------------------------------------------------------------------------- training

# same as fm.py: make_step
def make_step(loss, optimiser, plan):
    """step((*arrays, key, number), state) -> (state, losses): gradient, update and averages, compiled."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, state):
        *arrays, key, number = batch
        key = jax.random.fold_in(key, number)
        objective = lambda net: loss(common.lower(net, plan.precision), *arrays, key)
        gradient, losses = eqx.filter_grad(objective, has_aux=True)(state.net)
        weights = eqx.filter(state.net, eqx.is_inexact_array)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, weights)
        net = eqx.apply_updates(state.net, updates)
        ema = common.moving_average(state.ema, net, plan.ema, number)
        return common.State(net, ema, optimiser_state), losses | {"gradient norm": optax.tree.norm(gradient)}

    return step


# same as fm.py: train
def train(net, loss, arrays, rows, plan):
    """Minimise loss(net, *batch, key) on the given rows of `arrays`, each (N, ...).

    Returns the network of averaged weights and {"train_seconds", "step_seconds"}. Order and noise follow from
    --seed and the number of the step, so that a run continued with --resume ends in the same numbers.
    """
    steps = plan.epochs * (len(rows) // plan.batch_size)
    mesh, optimiser, key = common.batch_mesh(plan.devices), common.adamw(plan, steps), plan.keys[1]
    step = make_step(loss, optimiser, plan)
    with common.Logbook(plan, len(rows), steps) as book:
        state = common.replicate(book.begin(common.first_state(net, optimiser)), mesh)
        for batch in common.batches(arrays, rows, plan, mesh, book.step):
            state, losses = step((*batch, key, np.int32(book.step)), state)
            book.record(state, losses)
    return state.ema, book.end()


def encode_block(net, counts, c, key):
    """Codes (B, 2 L) of responses (B, H, W), for common.in_blocks; nothing is drawn with the key."""
    return jax.vmap(net.encode)(jnp.log1p(counts.astype(jnp.float32)), c).astype(jnp.float16)


def train_prior(net, arrays, rows, plan, epochs):
    """Train the prior alone on the codes of the trained encoder: steps are cheap, and the target stands
    still. Returns the network and the seconds."""
    folder, encode = plan.run / "prior", eqx.filter_jit(eqx.Partial(encode_block, net))
    resume = plan.resume and common.saved_after(folder, plan.run)              # else it had not begun
    codes, (responses, c) = common.in_blocks(encode, jax.random.key(0), *arrays), arrays
    plan = plan._replace(run=folder, epochs=epochs, resume=resume)
    arrays = codes, data.photon_sums(responses).astype(np.float32), c
    prior, times = train(net.prior, prior_loss, arrays, rows, plan)
    return eqx.tree_at(lambda net: net.prior, net, prior), times["train_seconds"]


# ---------------------------------------------------------------------------------------------------- network
# For ONE example: log response x (H, W), condition c (C,), latent z (L,); vmap makes the batch.

BLOCKS = {"cnn": ConvBlock, "vit": TransformerBlock, "mixer": MixerBlock}
PATCH = {"cnn": 4, "vit": 8, "mixer": 8}      # fibres; 8 makes the 36 tokens of the papers for ZN
WIDTH = {"cnn": 16, "vit": 64, "mixer": 64}   # channels of a patch; convolutions double them at half the size


class Resample(eqx.Module):
    """3 x 3 convolution to half the size, or from half the size to `grid`."""
    kernel: jax.Array
    grid: tuple = eqx.field(static=True)

    def __init__(self, grid, inputs, outputs, key):
        self.kernel, self.grid = normal(key, 3, 3, inputs, outputs), grid

    def __call__(self, x):
        if self.grid[0] < x.shape[0]:
            return convolve(x, self.kernel, stride=2)
        return convolve(enlarge(x, self.grid), self.kernel)


def make_layers(arch, grid, key):
    """The layers from the patches (h, w, C) of a grid towards the latent, and the shape that they lead to."""
    width, keys = WIDTH[arch], jax.random.split(key, 3)
    first = BLOCKS[arch](grid, width, keys[0])
    if arch != "cnn":
        return [first, BLOCKS[arch](grid, width, keys[1])], (*grid, width)
    half = data.patch_grid(grid, 2)
    shrink, last = Resample(half, width, 2 * width, keys[2]), ConvBlock(half, 2 * width, keys[1])
    return [first, shrink, last], (*half, 2 * width)


class Encoder(eqx.Module):
    """Log response x (H, W) and an embedding of the particle, or nothing, (K,) -> (outputs,)."""
    patches: Linear
    position: jax.Array
    layers: list
    out: Linear
    grid: tuple = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, arch, shape, embedding, outputs, key):
        keys = jax.random.split(key, 4)
        self.size, self.grid = PATCH[arch], data.patch_grid(shape, PATCH[arch])
        self.patches = Linear(self.size**2, WIDTH[arch], keys[0])
        self.position = 0.1 * jax.random.normal(keys[1], (math.prod(self.grid), WIDTH[arch]))
        self.layers, coarse = make_layers(arch, self.grid, keys[2])
        self.out = Linear(math.prod(coarse) + embedding, outputs, keys[3])

    def __call__(self, x, embedding):
        h = self.patches(data.to_patches(x, self.size)) + self.position        # (P, C)
        h = h.reshape(*self.grid, -1)                                          # (h, w, C)
        for layer in self.layers:
            h = layer(h)
        return self.out(jnp.concatenate([normalise(h).ravel(), embedding])).astype(jnp.float32)


class Decoder(eqx.Module):
    """The encoder's layers in reverse: code (K,) and what each patch knows of its vicinity to the impact
    points, or nothing, (P, N) -> features (P, 64) of the patches, for a Checkerboard, or one number for each
    fibre (H, W)."""
    enter: Linear
    position: jax.Array
    layers: list
    local: Linear
    modulation: Linear
    head: Checkerboard | Linear
    shape: tuple = eqx.field(static=True)
    coarse: tuple = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, arch, shape, code, near, likelihood, key, hidden=64):
        keys = jax.random.split(key, 7)
        self.shape, self.size = shape, PATCH[arch]
        grid, width = data.patch_grid(shape, self.size), WIDTH[arch]
        layers, self.coarse = make_layers(arch, grid, keys[0])
        self.layers = layers[::-1]
        if arch == "cnn":
            self.layers[1] = Resample(grid, 2 * width, width, keys[1])
        self.enter = Linear(code, math.prod(self.coarse), keys[2])
        self.position = 0.1 * jax.random.normal(keys[3], self.coarse)
        self.local, self.modulation = Linear(width + near, hidden, keys[4]), Linear(code, 2 * hidden, keys[5])
        self.head = Linear(hidden, self.size**2, keys[6], scale=0.1)
        if likelihood == "checkerboard":
            self.head = Checkerboard(hidden, shape, self.size, keys[6])

    def __call__(self, code, near):
        h = self.enter(code).reshape(self.coarse) + self.position              # (h, w, C)
        for layer in self.layers:
            h = layer(h)
        h = jnp.concatenate([normalise(h).reshape(len(near), -1), near], axis=1)   # (P, C + N)
        scale, shift = jnp.split(self.modulation(code), 2)
        h = self.local(h) * (1 + scale) + shift                                # (P, hidden)
        if isinstance(self.head, Checkerboard):
            return h
        return data.from_patches(self.head(jax.nn.silu(h)), self.size, self.shape)[0].astype(jnp.float32)


class Prior(eqx.Module):
    """p(z, n | c) = P(n | c) p(z | c, n), n the photon sum: affine couplings (Dinh et al. 2017) from N(0, 1)
    to latents (L,). With z ~ N(0, 1), those are drawn that no response has: ZP lacks a fifth of its light."""
    totals: Totals
    embedding: MLP
    layers: list

    def __init__(self, latent, detector, conditions, key, depth=6, width=128):
        half, (first, last, *keys) = latent // 2, jax.random.split(key, 2 + depth)
        self.totals = Totals(detector, conditions, last)
        seen = data.feature_count(conditions + 1, detector)
        self.embedding = MLP(first, seen, width, width, width)
        self.layers = [MLP(key, half + width, width, 2 * (latent - half)) for key in keys]

    def coupling(self, layer, first, e):
        """Shift and log scale of the second half, from the first one and an embedding e of the particle."""
        shift, log_scale = jnp.split(layer(jnp.concatenate([first, e])).astype(jnp.float32), 2)
        return shift, 2 * jnp.tanh(log_scale / 2)

    def log(self, z, total, c):
        """log p(z, n | c), but for the constant of a normal distribution."""
        e = self.embedding(data.features(with_sum(c, total), self.totals.detector))
        log_determinant = -sum_nll(self.totals, total, c)
        for layer in self.layers:
            first, second = jnp.split(z, [len(z) // 2])
            shift, log_scale = self.coupling(layer, first, e)
            z = jnp.concatenate([first, (second - shift) * jnp.exp(-log_scale)])[::-1]
            log_determinant -= jnp.sum(log_scale)
        return log_determinant - jnp.sum(z**2) / 2

    def draw(self, noise, total, c):
        """z ~ p(z | c, n) of noise (L,) ~ N(0, 1)."""
        e, z = self.embedding(data.features(with_sum(c, total), self.totals.detector)), noise
        for layer in self.layers[::-1]:
            first, second = jnp.split(z[::-1], [len(z) // 2])
            shift, log_scale = self.coupling(layer, first, e)
            z = jnp.concatenate([first, second * jnp.exp(log_scale) + shift])
        return z


class Autoencoder(eqx.Module):
    """Encoder, decoder and what else a variant has. The encoder of "vae" sees the particle c, its decoder of
    it the impact points alone, and the photon sum: else an unseen particle gets the brightness of one that it
    has learnt by heart. The decoder of "supervised" takes its latent for the particle, that of a noise
    generator sees its latent alone."""
    encoder: Encoder
    decoder: Decoder
    embedding: MLP | None
    generator: MLP | None
    prior: Prior | None
    detector: Detector = eqx.field(static=True)
    variant: str = eqx.field(static=True)
    latent: int = eqx.field(static=True)
    noise: int = eqx.field(static=True)

    def __init__(self, arch, variant, latent, likelihood, detector, conditions, key, width=128):
        keys = jax.random.split(key, 5)
        vae, noisy = variant == "vae", variant.startswith("noise")
        self.detector, self.variant = detector, variant
        self.latent = conditions if variant == "supervised" else latent
        self.noise = latent if vae else NOISE if noisy else 0                  # numbers into a new latent
        known = data.feature_count(conditions, detector)
        self.embedding = None if noisy else MLP(keys[0], known, width, width, width)
        self.generator = MLP(keys[1], known + NOISE, width, width, latent) if noisy else None
        seen, outputs = (width, 2 * latent) if vae else (0, self.latent)
        self.prior = Prior(latent, detector, conditions, keys[4]) if vae else None
        self.encoder = Encoder(arch, detector.shape, seen, outputs, keys[2])
        code = latent + len(data.waves(jnp.zeros(1))) if vae else latent if noisy else width
        near = data.near_impact(jnp.zeros(0 if noisy else conditions), detector, PATCH[arch]).shape[1]
        self.decoder = Decoder(arch, detector.shape, code, near, likelihood, keys[3])

    def encode(self, x, c):
        """(L,), for "vae" mean and log of the standard deviation (2 L,)."""
        seen = self.embedding(data.features(c, self.detector)) if self.variant == "vae" else c[:0]
        return self.encoder(x, seen)

    def generate(self, c, noise):
        """A latent (L,) of the noise generator."""
        return self.generator(jnp.concatenate([data.features(c, self.detector), noise])).astype(jnp.float32)

    def decode(self, z, total, c):
        """What the decoder makes of a latent z (L,) and, for "vae", a photon sum () of a particle c (C,)."""
        if self.variant == "vae":
            z = jnp.concatenate([z, data.waves(scaled_sum(total)[None])])
        if self.variant == "supervised":
            c = jnp.clip(z, -10, 10)                                           # as data.conditions
            z = self.embedding(data.features(c, self.detector))
        seen = c[:0] if self.variant.startswith("noise") else c
        return self.decoder(z, data.near_impact(seen, self.detector, self.decoder.size))


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector, conditions = DETECTORS[args.detector], data.CONDITIONS[args.cond]
    make = partial(Autoencoder, args.arch, args.variant, args.latent, args.likelihood, detector, conditions)
    if args.load:
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan, scaler = common.plan(args), data.first_scaler(args, dataset.particles[split.train])
        arrays = dataset.responses, data.conditions(dataset.particles, scaler)
        net = common.first_network(args, make, plan)
        if net.prior:
            low = least_total(data.photon_sums(dataset.responses)[split.train])
            net = eqx.tree_at(lambda net: net.prior.totals.low, net, low)
        loss = partial(batch_loss, variant=args.variant, likelihood=args.likelihood, beta=args.beta)
        net, times = train(net, loss, arrays, split.train, plan)
        if args.variant == "vae":
            net, seconds = train_prior(net, arrays, split.train, plan, args.prior_epochs)
            times["train_seconds"] += seconds
        net = common.save_model(args.run, args.header, scaler, times, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, likelihood=args.likelihood))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    decoded = lambda net, c, noise, total: net.decode(draw_latent(net, c, noise, total), total, c)
    cost = common.network_cost(eqx.Partial(decoded, net), (conditions,), (net.noise,), ())
    return metrics.report(args, draw, scaler, dataset, split, common.BATCHES, **cost, evaluations=1, **times)


if __name__ == "__main__":
    common.run(main)
