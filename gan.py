"""Generative adversarial networks [Comparison].

A generator G makes a response of a particle c and random numbers z, a critic D learns to tell it from a real
one x, and G learns to be taken for real:
    L_D = softplus(-D(x, c)) + softplus(D(G(c, z), c))
    L_G = softplus(-D(G(c, z), c))                                     (Eq. 3, non-saturating)
What keeps the two together: by default D compares a real and a made response of the same particle
(`--loss relativistic`), its gradients at both are penalised, and G learns the likelihood of the counts as
well (`--anchor`): for each x from the best of a few z, so that G uses z (Li and Malik 2018), and for texture,
the law of neighbouring fibres, from nothing else. Variants of [Comparison, Table 6]:
the distance |G(c, z) - x|^2 (`--l2`), as much diversity as a particle has (Eq. 4, `--sdi`), a factor for all
counts (`--post`).

Photons are counts, drawn from the distributions of checkerboard.py, with the gradient of softened counts.
`--counts round` rounds log responses, as the papers do.

    python gan.py --detector zn                          a quarter of an hour on two CPU cores
    python gan.py --load weights/gan-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py beside its oracle; ends with `written: runs/gan-zn/`.
"""
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import files
import metrics
from checkerboard import Checkerboard
from common import MLP, Linear, normalise
from papers import TransformerBlock
from simulator import DETECTORS, Detector

NOISE = 10            # numbers into the generator, as many as ALICE O2 feeds its networks
TRIES = 4             # noises of which the likelihood takes the best: of one, G is the same for all noise
CRITIC = 2.0          # learning rate of the critic in units of the generator's (Heusel et al. 2017)
SOFTNESS = 0.3        # of the step from 0 to 1 photon, on the axis 2 sqrt(n); chosen on validation rows
FACTOR_ROWS = 10_000  # training rows that --post fits its factor to


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    shared = tuple(name for name in common.FLAGS if name != "steps")           # one pass: no steps to choose
    own = "counts", "loss", *Weights._fields, "warm", "post"
    weight = common.number(float, 0)
    parser = common.parser(__doc__, "gan", shared, own, n=60_000, epochs=10, lr=5e-4, batch_size=128)
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="draw photon counts from each fibre's distribution, or round log responses "
                             "(default: sample)")
    parser.add_argument("--loss", choices=LOSSES, default="relativistic",
                        help="adversarial loss: plain, of each response, or relativistic, of pairs of a real "
                             "and a made response (default: relativistic)")
    parser.add_argument("--penalty", type=weight, default=10.0, metavar="WEIGHT",
                        help="weight of the squared gradients of the critic, R1 and R2 (default: 10)")
    parser.add_argument("--anchor", type=weight, default=20.0, metavar="WEIGHT",
                        help="weight of the likelihood of the counts (--counts round: the squared error of "
                             "log responses) in the generator's loss (default: 20)")
    parser.add_argument("--l2", type=weight, default=0.0, metavar="WEIGHT",
                        help="weight of the squared distance to the real response (default: 0)")
    parser.add_argument("--sdi", type=weight, default=0.0, metavar="WEIGHT",
                        help="weight of the term that asks for as much diversity as a particle has "
                             "(default: 0)")
    parser.add_argument("--warm", type=common.number(int, 0), default=500, metavar="STEPS",
                        help="steps before all others in which the generator learns the likelihood alone "
                             "(default: 500)")
    parser.add_argument("--post", action="store_true",
                        help="fit a factor for all counts by the W of training rows")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def adversarial_loss(real, fake):
    """(loss of the critic, loss of the generator) for one real response x and a made one, from the critic's
    values D(x, c) and D(G(c, z), c)."""
    critic, generator = jax.nn.softplus(-real) + jax.nn.softplus(fake), jax.nn.softplus(-fake)
    return critic, generator                                                   # [Comparison, Eq. 3]


def relativistic_loss(real, fake):
    """The same with the two compared (Jolicoeur-Martineau 2019): what counts is the difference for one
    particle, so the critic cannot win by particles that are easy to tell."""
    return jax.nn.softplus(fake - real), jax.nn.softplus(real - fake)


LOSSES = {"plain": adversarial_loss, "relativistic": relativistic_loss}


def gradient_penalty(critic, x, c):
    """|dD(x, c) / dx|^2 of one picture: R1 if it is real, R2 if it is made (Mescheder et al. 2018, Eq. 9 and
    10). Without it the adversaries circle around each other."""
    return jnp.sum(jax.grad(lambda x: critic(x, c)[0])(x)**2)


def anchor_losses(generator, counts, c, noise, how):
    """-log P(n) per fibre of counts (B, H, W) for what a generator makes of c (B, C) and noise (B, NOISE), or
    the squared error of log responses, (B,): it holds single fibres in place, which a critic sees last."""
    made = jax.vmap(generator)(c, noise)
    if how == "round":
        return jnp.mean((made - picture(counts, how))**2, axis=(1, 2))
    return jax.vmap(generator.fibres.loss)(made, counts)


def best_noise(generator, counts, c, tries, how):
    """The noise (B, NOISE) among `tries` (K, B, NOISE) of which the generator makes each response best."""
    losses = jax.lax.map(lambda noise: anchor_losses(generator, counts, c, noise, how), tries)
    return tries[jnp.argmin(losses, axis=0), jnp.arange(len(c))]


def diversity_loss(embedding, other, noise, other_noise, spread):
    """f_div |z_1 - z_2| / |D_e(G(c, z_1)) - D_e(G(c, z_2))| for one particle, with two noises z and the
    critic's embeddings D_e of both responses. Responses that hardly depend on z cost more where the
    particle's real ones differ more, by their spread f_div."""
    distance = jnp.mean(jnp.abs(embedding - other)) + 1e-3
    return spread * jnp.mean(jnp.abs(noise - other_noise)) / distance          # [Comparison, Eq. 4]


class Weights(NamedTuple):
    """Weights of all terms but the adversarial ones; a weight of 0 leaves the term out."""
    penalty: float
    anchor: float
    l2: float
    sdi: float


def batch_loss(net, counts, c, key, how, loss, weights):
    """Loss of counts (B, H, W) and c (B, C + 1), conditions and f_div, and its parts. Each adversary learns
    from its own terms: the other's weights, and for the critic the made pictures, are constants there."""
    size, frozen, pair = len(counts), jax.lax.stop_gradient, LOSSES[loss]
    counts, c, spread = counts.astype(jnp.float32), c[:, :-1], c[:, -1]
    x = picture(counts, how)
    noise_key, count_key, other_key, other_count_key, try_key = jax.random.split(key, 5)

    def make(noise, key):
        features, keys = jax.vmap(net.generator)(c, noise), jax.random.split(key, size)
        # what draws the counts is fixed: the critic would drive it into bright fibres that beget bright ones
        return jax.vmap(partial(draw_picture, frozen(net.generator.fibres)))(features, keys)

    noise = jax.random.normal(noise_key, (size, NOISE))
    made = make(noise, count_key)
    critic = lambda x: jax.vmap(net.critic)(x, c)
    frozen_critic = lambda x: jax.vmap(frozen(net.critic))(x, c)
    real, fake = critic(x)[0], critic(frozen(made))[0]
    fooled, embedding = frozen_critic(made)
    parts = {"critic": pair(real, fake)[0].mean(), "generator": pair(frozen(real), fooled)[1].mean()}
    if weights.penalty:
        few = slice(max(size // 8, 1))                                         # second derivatives are slow
        both = jnp.concatenate([x[few], frozen(made)[few]]), jnp.tile(c[few], (2, 1))
        penalties = jax.vmap(partial(gradient_penalty, net.critic))(*both)
        parts["penalty"] = penalties.mean()                                    # R1 / 2 + R2 / 2
    if weights.anchor:
        tries = jax.random.normal(try_key, (TRIES, size, NOISE))
        best = best_noise(frozen(net.generator), counts, c, tries, how)
        parts["anchor"] = anchor_losses(net.generator, counts, c, best, how).mean()
    if weights.l2:
        parts["l2"] = jnp.mean((made - x)**2)                                  # Isola et al. 2017
    if weights.sdi:
        other_noise = jax.random.normal(other_key, noise.shape)
        other = frozen_critic(make(other_noise, other_count_key))[1]
        parts["sdi"] = jax.vmap(diversity_loss)(embedding, other, noise, other_noise, spread).mean()
    total = parts["critic"] + parts["generator"]
    total += sum(weight * parts[name] for name, weight in weights._asdict().items() if weight)
    # not trained on, but watched: can the critic still tell, do responses still differ?
    watched = {"critic AUC": jnp.mean(real[:, None] > fake),
               "spread of sums": jnp.std(made.sum((1, 2))) / (jnp.std(x.sum((1, 2))) + 1e-6)}
    return total, parts | watched


# -------------------------------------------------------------------------------- pictures that a critic sees
# x (H, W): the roots of photon counts, or log responses with --counts round.

def picture(counts, how):
    """x of photon counts; `how` is --counts. The root of a Poisson count spreads by 1 / 2."""
    return jnp.sqrt(counts) if how == "sample" else jnp.log1p(counts)


def draw_picture(fibres, made, key):
    """x of what a generator made, photon counts drawn, or with --counts round the log response itself."""
    return made if fibres is None else fibres.draw_roots(made, key, draw_softly)


def draw_softly(location, scale, key, odds):
    """Roots of whole counts forward, a smooth gradient backward, that of half a number on the axis 2 sqrt(n)
    with a soft step from 0 to 1 photon. With the gradient straight through the rounding, the many dark
    fibres, which no small change makes bright, would outweigh all others."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)  # that of draw_counts
    dark = data.few_logits(location, scale, odds)[0]                           # log P(0) / P(> 0)
    over = scale * (jnp.log(1 / u - 1) - dark) / SOFTNESS                      # > 0: a photon is drawn
    soft = SOFTNESS * jax.nn.softplus(over) / 2 + (1 - 0.5**0.5) * jax.nn.sigmoid(over)
    return soft + jax.lax.stop_gradient(jnp.sqrt(data.draw_counts(location, scale, key, odds)) - soft)


# ---------------------------------------------------------------------------------------------------- sampler

def sample(net, c, key, how):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    noise_key, count_key = jax.random.split(key)
    made = jax.vmap(net.generator)(c, jax.random.normal(noise_key, (len(c), NOISE)))
    if how == "sample":
        counts = jax.vmap(net.generator.fibres.draw)(made, jax.random.split(count_key, len(c)))
    else:
        counts = jnp.maximum(jnp.expm1(made), 0)
    return data.as_uint16(jnp.round(net.factor * counts))


def fit_factor(net, how, dataset, rows, scaler, seed):
    """The GAN with the factor of least W on the given training rows, in steps of 1 % (the postprocessing of
    [Comparison])."""
    generate = metrics.generator(eqx.filter_jit(eqx.Partial(sample, net, how=how)), scaler, seed)
    truth, factors = metrics.channels(dataset.responses[rows]), np.linspace(0.75, 1.25, 51)
    made = generate(dataset.particles[rows], 0).astype(np.float32)
    found = [metrics.wasserstein(truth, metrics.channels(np.round(factor * made))) for factor in factors]
    return GAN(net.generator, jnp.array(factors[np.argmin(found)], jnp.float32))


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


def make_optimiser(plan, steps):
    """An AdamW for each adversary, the critic's with a learning rate of its own."""
    adamw = lambda factor: common.adamw(plan._replace(lr=factor * plan.lr), steps, b1=0.5)
    owners = {"generator": adamw(1), "critic": adamw(CRITIC)}
    return optax.partition(owners, lambda net: jax.tree.map_with_path(lambda path, _: path[0].name, net))


def train(net, loss, arrays, rows, plan):
    """Minimise loss(net, *batch, key) on the given rows of `arrays`, responses (N, H, W) and conditions with
    f_div (N, C + 1), as fm.py does. Returns the Adversaries of averaged weights and {"train_seconds",
    "step_seconds"}."""
    steps = plan.epochs * (len(rows) // plan.batch_size)
    mesh, optimiser = common.batch_mesh(plan.devices), make_optimiser(plan, steps)
    step, key = make_step(loss, optimiser, plan), plan.keys[1]
    with common.Logbook(plan, len(rows), steps) as book:
        state = common.replicate(book.begin(common.first_state(net, optimiser)), mesh)
        for batch in common.batches(arrays, rows, plan, mesh, book.step):
            state, losses = step((*batch, key, np.int32(book.step)), state)
            book.record(state, losses)
    times = book.end()
    report_collapse(files.read_log(plan.run))
    return state.ema, times


def report_collapse(records):
    """Say so if one adversary won, by the last ten lines of the log."""
    auc, spread = (np.mean([r[name] for r in records[-10:]]) for name in ("critic AUC", "spread of sums"))
    if auc > 0.99 or not 0.5 < spread < 2:
        print(f"COLLAPSED: the critic is right about {100 * auc:.1f} % of the pairs, and photon sums spread "
              f"{spread:.2f} times as much as the data's")


def spreads(responses, particles, rows):
    """f_div of [Comparison, Eq. 4] for the given rows, 0 for others, (N,): standard deviation over the rows
    of a particle, summed over fibres, scaled to (0, 1)."""
    ids = data.unique_particles(particles[rows])[0]
    of_rows = lambda rows: responses[rows].astype(np.float32).std(0).sum()
    found = np.array([of_rows(rows[ids == k]) for k in range(ids.max() + 1)])
    spread = np.zeros(len(particles), np.float32)
    spread[rows] = ((found - found.min()) / (np.ptp(found) or 1.0))[ids]
    return spread


def warm_start(generator, arrays, rows, plan, how, steps):
    """The generator before the training: fitted to the counts by `steps` of Adam, whatever the noise."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = optimiser.init(eqx.filter(generator, eqx.is_inexact_array))
    rng = np.random.default_rng(plan.seed)

    def loss(generator, counts, c, key):
        noise = jax.random.normal(key, (len(c), NOISE))
        return anchor_losses(generator, counts.astype(jnp.float32), c[:, :-1], noise, how).mean()

    @eqx.filter_jit
    def step(generator, state, counts, c, key):
        updates, state = optimiser.update(eqx.filter_grad(loss)(generator, counts, c, key), state)
        return eqx.apply_updates(generator, updates), state

    for number in common.progress(steps, "generator", plan.quiet):
        batch = np.sort(rng.choice(rows, plan.batch_size, replace=False))
        generator, state = step(generator, state, *(array[batch] for array in arrays), jax.random.key(number))
    return generator


# ---------------------------------------------------------------------------------------------------- network
# For ONE example: condition c (C,), noise (NOISE,), picture x (H, W); vmap makes the batch.

SIZE, WIDTH, BLOCKS, EMBEDDING = 8, 64, 1, 64   # fibres of a patch, channels, blocks, numbers of an embedding


class Generator(eqx.Module):
    """(c, noise) -> features (P, hidden) of the patches, from which `fibres` draws counts, or with --counts
    round the log response (H, W). A vision transformer on patches [Comparison, Fig. 11], then a network that
    all patches share, which sees their vicinity to the impact points."""
    code: MLP
    enter: Linear
    position: jax.Array
    blocks: list
    local: Linear
    modulation: Linear
    head: Linear | None
    fibres: Checkerboard | None
    detector: Detector = eqx.field(static=True)

    def __init__(self, how, detector, conditions, key, hidden=64):
        keys = iter(jax.random.split(key, 7 + BLOCKS))
        patches, near = data.near_impact(jnp.zeros(conditions), detector, SIZE).shape
        self.detector = detector
        self.code = MLP(next(keys), data.feature_count(conditions, detector) + NOISE, 128, 128, 128)
        self.enter = Linear(128, patches * WIDTH, next(keys))
        self.position = 0.1 * jax.random.normal(next(keys), (patches, WIDTH))
        self.blocks = [TransformerBlock(None, WIDTH, next(keys)) for _ in range(BLOCKS)]
        self.local = Linear(WIDTH + near, hidden, next(keys))
        self.modulation = Linear(128, 2 * hidden, next(keys))
        self.head, self.fibres = None, Checkerboard(hidden, detector.shape, SIZE, next(keys))
        if how == "round":
            self.head, self.fibres = Linear(hidden, SIZE**2, next(keys), scale=0.1), None

    def __call__(self, c, noise):
        code = self.code(jnp.concatenate([data.features(c, self.detector), noise]))
        h = self.enter(code).reshape(self.position.shape) + self.position      # (P, WIDTH)
        for block in self.blocks:
            h = block(h)
        h = jnp.concatenate([normalise(h), data.near_impact(c, self.detector, SIZE)], axis=1)
        scale, shift = jnp.split(self.modulation(code), 2)
        h = self.local(h) * (1 + scale) + shift                                # (P, hidden)
        if self.fibres is not None:
            return h
        return data.from_patches(self.head(jax.nn.silu(h)), SIZE, self.detector.shape)[0].astype(jnp.float32)


class Critic(eqx.Module):
    """(x, c) -> how real x looks (), and the embedding of the penultimate layer (EMBEDDING,). A vision
    transformer on patches and their photons, roots of photons and lit fibres, with the light around the
    impact points."""
    patches: Linear
    position: jax.Array
    blocks: list
    local: Linear
    modulation: Linear
    known: MLP
    embed: Linear
    out: Linear
    detector: Detector = eqx.field(static=True)

    def __init__(self, detector, conditions, key, hidden=64):
        keys = iter(jax.random.split(key, 7 + BLOCKS))
        patches, bumps, _ = data.vicinity(jnp.zeros(conditions), detector, SIZE)[1].shape
        self.detector = detector
        near = data.near_impact(jnp.zeros(conditions), detector, 4).shape[1]
        self.local = Linear(4**2 + near, hidden, next(keys))
        self.modulation = Linear(128, 2 * hidden, next(keys))
        self.patches = Linear(SIZE**2 + 3, WIDTH, next(keys))
        self.position = 0.1 * jax.random.normal(next(keys), (patches, WIDTH))
        self.blocks = [TransformerBlock(None, WIDTH, next(keys)) for _ in range(BLOCKS)]
        self.known = MLP(next(keys), data.feature_count(conditions, detector), 128, 128, 128)
        self.embed = Linear(patches * WIDTH + bumps + 3 + hidden + 128, EMBEDDING, next(keys))
        self.out = Linear(EMBEDDING, 1, next(keys))

    def __call__(self, x, c):
        known = self.known(data.features(c, self.detector))
        bumps = data.vicinity(c, self.detector, SIZE)[1]
        patches, bumps = common.cast((data.to_patches(x, SIZE), bumps), known.dtype)
        sums = jnp.stack([patches**2, patches, jnp.minimum(patches, 1)]).sum(2).T  # (P, 3)
        sums = jnp.maximum(sums, -0.5)  # a made log response may be < 0
        h = self.patches(jnp.concatenate([patches, jnp.log1p(sums)], axis=1)) + self.position  # (P, WIDTH)
        for block in self.blocks:
            h = block(h)
        # texture: patches of 4 x 4 fibres, wherever they lie
        small = jnp.concatenate([data.to_patches(x, 4), data.near_impact(c, self.detector, 4)], axis=1)
        scale, shift = jnp.split(self.modulation(known), 2)
        texture = jax.nn.silu(self.local(small) * (1 + scale) + shift).sum(0) / len(small)**0.5  # (hidden,)
        whole = jnp.log1p(jnp.maximum(sums.sum(0), -0.5))
        h = jnp.concatenate([normalise(h).ravel(), data.impact_light(bumps, patches), whole, texture, known])
        embedding = jax.nn.silu(self.embed(h))
        return self.out(embedding)[0].astype(jnp.float32), embedding.astype(jnp.float32)


class Adversaries(eqx.Module):
    """What is trained together."""
    generator: Generator
    critic: Critic


class GAN(eqx.Module):
    """What a checkpoint keeps: the generator and the factor of --post."""
    generator: Generator
    factor: jax.Array


def make_adversaries(how, detector, conditions, key):
    keys = jax.random.split(key)
    return Adversaries(Generator(how, detector, conditions, keys[0]), Critic(detector, conditions, keys[1]))


def make_gan(how, detector, conditions, key):
    return GAN(Generator(how, detector, conditions, key), jnp.array(1.0))


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector, conditions = DETECTORS[args.detector], data.CONDITIONS[args.cond]
    make = partial(make_gan, args.counts, detector, conditions)
    if args.load:
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan, scaler = common.plan(args), data.first_scaler(args, dataset.particles[split.train])
        spread = np.zeros(len(dataset.pdg), np.float32)
        if args.sdi:
            spread = spreads(dataset.responses, dataset.particles, split.train)
        arrays = dataset.responses, np.column_stack([data.conditions(dataset.particles, scaler), spread])
        net = make_adversaries(args.counts, detector, conditions, plan.keys[0])
        if args.finetune:                                                      # from a new critic
            net = Adversaries(common.load_model(args.finetune, make).generator, net.critic)
        elif not args.resume:                                                  # which has all weights saved
            warm = warm_start(net.generator, arrays, split.train, plan, args.counts, args.warm)
            net = Adversaries(warm, net.critic)
        weights = Weights(*(getattr(args, name) for name in Weights._fields))
        loss = partial(batch_loss, how=args.counts, loss=args.loss, weights=weights)
        net, times = train(net, loss, arrays, split.train, plan)
        net = GAN(net.generator, jnp.array(1.0))
        if args.post:
            net = fit_factor(net, args.counts, dataset, split.train[:FACTOR_ROWS], scaler, args.seed)
        net = common.save_model(args.run, args.header, scaler, times, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, how=args.counts))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    cost = common.network_cost(net.generator, (conditions,), (NOISE,))
    return metrics.report(args, draw, scaler, dataset, split, common.BATCHES, **cost, evaluations=1,
                          factor=float(net.factor), **times)


if __name__ == "__main__":
    common.run(main)
