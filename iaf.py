"""Masked and inverse autoregressive flows [Comparison, IAF].

A flow maps a response x of a particle c with the photon sum S to numbers z ~ N(0, 1), one for each fibre, by
blocks f_1, f_2, ... (MADE, Germain et al. 2015). In a block, a monotonic spline moves each fibre, and its
numbers depend only on the fibres before: the Jacobian is triangular, and the likelihood is exact,
    log p(x | c, S) = log N(z; 0, 1) + sum_i log |det df_i / dx_(i-1)|               [Comparison, Eq. 7 and 8]
A teacher x -> z (MAF) learns by likelihood; its way back takes a step for each fibre. A student z -> x (IAF)
takes one pass; it learns by the loops x -> z -> x' and z -> x' -> z' with the teacher (Krause and Shih 2023),
    L = |x' - x|^2 + |z' - z|^2 + the same after each block
        + W f(c) / 5 sum_k (w_k - w'_k)^2, w_k: share of the light in channel k                   [IAF, Eq. 2]
A third network learns P(S | c), see totals.py. Counts n are made continuous as n + nu u, u uniform in 0 to 1
[Comparison, Table 7].

    python iaf.py --detector zn                                       20 minutes on two CPU cores
    python iaf.py --load weights/iaf-zn.eqx --generate particles.csv --out responses.h5

Prints the trainings, W of each --removal, then every score of metrics.py beside its oracle; ends with
`written: runs/iaf-zn/`.
"""
import argparse
import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
import papers
from common import Linear, UserError, normal
from simulator import DETECTORS, Detector
from splines import BOX, NUMBERS, inverse_spline, spline
from totals import Totals, draw_totals, least_total, sum_nll, with_sum

ALPHA = 1e-6                      # keeps logits finite, as in CaloFlow (Krause and Shih 2021)
STAGES = "sum", "teacher", "student"
# Flags that a stage depends on and those before it do not; the first counts its passes over the rows
OWN = {"sum": ("sum_epochs",), "teacher": ("epochs", "net", "noise"),
       "student": ("student_epochs", "channel_loss", "light_loss", "diversity")}
# The last two are ours, the others those of arXiv 2608.12795
REMOVALS = "floor", "round", "floor-renormalise", "round-renormalise", "scale-floor", "scale-round"


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = *(name for stage in STAGES for name in OWN[stage] if name != "epochs"), "sampler"
    shared = tuple(name for name in common.FLAGS if name not in ("steps", "finetune"))   # no teacher is kept
    parser = common.parser(__doc__, "iaf", shared, own, n=60_000, epochs=3, batch_size=64, lr=2e-3)
    parser.add_argument("--net", choices=NETWORKS, default="local",
                        help="blocks of both flows, ours or those of the papers (default: local)")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all",
                        help="train one stage, on the earlier ones in --run, or all of them (default: all)")
    parser.add_argument("--sum-epochs", type=common.number(int, 1, 10**6), default=10, metavar="N",
                        help="passes over the rows in stage sum, --epochs in stage teacher (default: 10)")
    parser.add_argument("--student-epochs", type=common.number(int, 1, 10**6), default=2, metavar="N",
                        help="passes over the training rows in stage student (default: 2)")
    parser.add_argument("--noise", type=common.number(float, 1e-3, 1), default=0.5, metavar="NU",
                        help="range of the noise that makes counts continuous, in photons (default: 0.5)")
    parser.add_argument("--removal", choices=REMOVALS,
                        help="remove the noise by a floor or by rounding without its mean, alone, before or "
                             "after scaling to the photon sum (default: least W on validation rows)")
    parser.add_argument("--channel-loss", type=common.number(float, 0), default=100.0, metavar="WEIGHT",
                        help="weight of the light's shares in the channels in stage student (default: 100)")
    parser.add_argument("--light-loss", type=common.number(float, 0), default=5.0, metavar="WEIGHT",
                        help="weight of the errors of photon counts in stage student (default: 5)")
    parser.add_argument("--diversity", action=argparse.BooleanOptionalAction, default=True,
                        help="weight the channel loss by how common and alike a particle's responses are")
    parser.add_argument("--sampler", choices=STAGES[1:],
                        default=lambda args: "teacher" if args.stage == "teacher" else "student",
                        help="score this flow; --load takes that of the checkpoint (default: student)")
    args = parser.parse_args(argv)
    if args.stage == "teacher" and args.sampler == "student":
        parser.error("--sampler student needs --stage student")
    return args


# -------------------------------------------------------------------------------------------------- objective
# A response is one vector of all fibres, x (D,).

def flow_nll(flow, x, c, total):
    """-log p(x | c, S) in nats of one response x (D,) of a particle c (C,) with the photon sum S, `total`."""
    states, log_det = flow(x, c, total)                                        # from x to z
    log_normal = jax.scipy.stats.norm.logpdf(states[-1]).sum()                 # log N(z; 0, 1)
    return -(log_normal + log_det)                                             # [Comparison, Eq. 8]


class Logit(NamedTuple):
    """How photon counts become numbers x: `noise` is the range of what is added to them; `mean` and `std`
    standardise their logits."""
    noise: float
    mean: float
    std: float


def to_logit(photons, total, logit):
    """x (...) of continuous counts n + nu u (...) and log dx/dn. Whatever the photon sum, fibres without a
    photon lie below x = -mean / std, all others above."""
    p = ALPHA + (1 - 2 * ALPHA) * photons / (total + logit.noise)
    x = jnp.log(p) - jnp.log1p(-p) - jnp.log(logit.noise / (total + logit.noise))
    log_slope = jnp.log((1 - 2 * ALPHA) / (total + logit.noise) / logit.std) - jnp.log(p) - jnp.log1p(-p)
    return (x - logit.mean) / logit.std, log_slope


def from_logit(x, total, logit):
    """The continuous counts (...) of x."""
    p = jax.nn.sigmoid(logit.std * x + logit.mean + jnp.log(logit.noise / (total + logit.noise)))
    return jnp.maximum(p - ALPHA, 0) / (1 - 2 * ALPHA) * (total + logit.noise)


def fit_logit(noise, responses):
    """The Logit of training responses (N, H, W): x fills three quarters of the box of a spline."""
    part = responses[:4000].astype(np.float32)
    light = part + noise * np.random.default_rng(0).random(part.shape, np.float32)
    x = np.asarray(to_logit(light, part.sum((1, 2))[:, None, None], Logit(noise, 0.0, 1.0))[0])
    half = (float(x.max()) - float(x.min())) / 2
    return Logit(noise, float(x.min()) + half, half / (0.75 * BOX))


def dequantise(counts, key, logit):
    """x (B, D) of counts (B, H, W), log dx/dn (B, D) and photon sums (B,)."""
    photons = counts.reshape(len(counts), -1).astype(jnp.float32)
    total = photons.sum(1)
    noisy = photons + logit.noise * jax.random.uniform(key, photons.shape)
    return *to_logit(noisy, total[:, None], logit), total


def two_loops(student, teacher, x, z, c, total):
    """Distillation for one response x (D,) and one latent z (D,) (Krause and Shih 2023): mean squares at the
    ends of both loops and between the blocks, and the states (blocks + 1, D) of the student's x'."""
    to_z = jax.lax.stop_gradient(teacher(x, c, total)[0])                      # data loop: x -> z ...
    to_x = student(to_z[-1], c, total)[0]                                      # ... -> x'
    drawn = student(z, c, total)[0]                                            # latent loop: z -> x' ...
    back = teacher(drawn[-1], c, total)[0]                                     # ... -> z'
    # the student undoes the teacher: its states come in the other order
    between = lambda student, teacher: jnp.mean((student - teacher[::-1])[1:-1]**2, axis=1).sum()
    return {"data loop": jnp.mean((to_x[-1] - x)**2), "latent loop": jnp.mean((back[-1] - z)**2),
            "blocks": between(to_x, to_z) + between(drawn, back)}, to_x


def channel_loss(light, truth, detector):
    """Squared error of the light's shares in the five channels, of continuous counts (K, D), one for each
    block, against `truth` (D,): the place of a shower matters more than single fibres."""
    weights = metrics.channel_weights(detector.shape).reshape(-1, 5)
    shares = lambda light: light @ weights / (light.sum(-1, keepdims=True) + 1e-9)
    return jnp.mean((shares(light) - shares(truth))**2)                        # [IAF, Eq. 2]


def light_loss(light, truth, noise):
    """Squared error of 2 sqrt(n) of continuous counts (D,), ours: photons in units of their Poisson noise. In
    the squares of logits, a hundred photons weigh no more than none."""
    return 4 * jnp.mean((jnp.sqrt(light + noise) - jnp.sqrt(truth + noise))**2)


def sum_loss(net, counts, c, key):
    """Stage sum: loss of counts (B, H, W) and conditions c (B, C), and its parts."""
    nats = jax.vmap(partial(sum_nll, net))(counts.astype(jnp.float32).sum((1, 2)), c).mean()
    return nats, {"nats": nats}


def teacher_loss(net, counts, c, key):
    """Stage teacher: -log p(n + nu u | c, S) in nats per fibre, and as bits that do not depend on the unit of
    nu: -log2(nu^D p) / D is an upper bound of -log2 P(n | c, S) / D."""
    x, log_slope, total = dequantise(counts, key, net.logit)
    nats = jnp.mean(jax.vmap(partial(flow_nll, net))(x, c, total) - log_slope.sum(1)) / x.shape[1]
    return nats, {"bits per fibre": (nats - math.log(net.logit.noise)) / math.log(2)}


def student_loss(net, counts, c, weights, teacher, key, channel_weight, light_weight):
    """Stage student: both loops, and what is added to them; `weights` (B,) of the channel loss are f(c) of
    [IAF, Eq. 3], larger for common particles of like responses, which rare ones do not disturb then."""
    noise_key, latent_key = jax.random.split(key)
    x, _, total = dequantise(counts, noise_key, net.logit)

    def terms(x, z, c, total):
        loops, states = two_loops(net, teacher, x, z, c, total)
        light, truth = (from_logit(numbers, total, net.logit) for numbers in (states[1:], x))
        return loops | {"channels": channel_loss(light, truth, net.detector),
                        "light": light_loss(light[-1], truth, net.logit.noise)}

    parts = jax.vmap(terms)(x, jax.random.normal(latent_key, x.shape), c, total)
    loss = parts["data loop"] + parts["latent loop"] + parts["blocks"] + light_weight * parts["light"]
    loss += channel_weight * weights * parts["channels"]
    return loss.mean(), {name: part.mean() for name, part in parts.items()}


# ---------------------------------------------------------------------------------------------------- sampler

def draw_light(net, c, total, key):
    """Continuous counts (B, D) from a Generator, for conditions c (B, C) and photon sums (B,)."""
    flow, z = net.flow, jax.random.normal(key, (len(c), math.prod(net.flow.detector.shape)))
    if flow.kind == "teacher":
        x = jax.vmap(flow.invert)(z, c, total)
    else:
        size = 64 if jax.default_backend() == "cpu" else len(c)  # fits its cache: a fifth faster
        x = jax.lax.map(lambda row: flow(*row)[0][-1], (z, c, total), batch_size=size)
    return from_logit(x, total[:, None], flow.logit)


def remove_noise(light, total, how, noise):
    """Whole counts, float32 (B, D), of continuous ones (B, D) with the photon sums `total` (B,). The last two
    ways of REMOVALS floor or round s x, with the largest s of 1/2 to 2 that does not exceed the photon sum: a
    floor loses a photon that the flow made a little dark, and scaling after it gives the light to others."""
    if "scale" in how:
        counts = lambda scale: jnp.floor(scale * light + (0.5 - noise / 2 if how == "scale-round" else 0.0))

        def bisect(k, scale):
            larger = scale + 0.75 * 0.5**k
            return jnp.where(counts(larger).sum(1, keepdims=True) <= total[:, None], larger, scale)

        return counts(jax.lax.fori_loop(0, 16, bisect, jnp.full((len(light), 1), 0.5)))
    counts = jnp.floor(light) if "floor" in how else jnp.maximum(light - noise / 2, 0)
    if "renormalise" in how:
        counts = counts * (total / jnp.maximum(counts.sum(1), 1e-9))[:, None]
    return jnp.round(counts)


def sample(net, c, key, removal):
    """Draw one response for each condition c (B, C) from a Generator: photon counts uint16 (B, H, W)."""
    sum_key, light_key = jax.random.split(key)
    total = draw_totals(net.totals, c, sum_key)
    counts = remove_noise(draw_light(net, c, total, light_key), total, removal, net.flow.logit.noise)
    return data.as_uint16(counts).reshape(-1, *net.flow.detector.shape)


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


def train(net, loss, arrays, rows, plan, *fixed):
    """Minimise loss(net, *batch, *fixed, key) on the given rows of `arrays`: responses (N, H, W), conditions
    (N, C) and, for the student, whose teacher is `fixed`, weights (N,).

    Returns the network of averaged weights and {"train_seconds", "step_seconds"}. Order and noise follow from
    --seed and the number of the step, so that a run continued with --resume ends in the same numbers.
    """
    steps = plan.epochs * (len(rows) // plan.batch_size)
    mesh, optimiser, key = common.batch_mesh(plan.devices), common.adamw(plan, steps), plan.keys[1]
    step = make_step(loss, optimiser, plan)
    fixed = common.replicate(common.lower(fixed, plan.precision), mesh)
    with common.Logbook(plan, len(rows), steps) as book:
        state = common.replicate(book.begin(common.first_state(net, optimiser)), mesh)
        for batch in common.batches(arrays, rows, plan, mesh, book.step):
            state, losses = step((*batch, *fixed, key, np.int32(book.step)), state)
            book.record(state, losses)
    return state.ema, book.end()


def stage_plan(args, stage, logit):
    """The plan of a stage, in a folder of its own. Stages before that of --stage are read there, and finished
    if need be; a state does not depend on the flags of later stages."""
    run, later = args.run / stage, STAGES[STAGES.index(stage) + 1:]
    others = ["sampler"] + [name for other in later for name in OWN[other]]
    flags = {name: value for name, value in args.header["flags"].items() if name not in others}
    saved = (run / "state.eqx").exists()
    if args.stage in later and not saved:
        raise UserError(f"--stage {args.stage} needs {run}: train that stage first, with the same flags")
    # --resume may follow a kill before a later stage began
    begun = stage == "sum" or common.saved_after(run, args.run / STAGES[STAGES.index(stage) - 1])
    resume = args.stage in later or args.resume and begun
    header, epochs = args.header | {"flags": flags, "logit": logit._asdict()}, getattr(args, OWN[stage][0])
    return common.plan(args)._replace(header=header, run=run, epochs=epochs, resume=resume)


def train_stages(args, dataset, split, scaler):
    """Train the stages up to that of --stage. Returns the Generator of --sampler and its removal, None after
    stage sum alone, and what checkpoints keep of the training: times, and W of each removal."""
    rows, logit = split.train, fit_logit(args.noise, dataset.responses[split.train])
    c, key, found = data.conditions(dataset.particles, scaler), common.plan(args).keys[0], {"removals": {}}
    make = partial(NETWORKS[args.net], DETECTORS[args.detector], c.shape[1], logit, key=key)
    ready = partial(finish, args, scaler, data.select(dataset, split.validation), found)
    arrays, low = (dataset.responses, c), least_total(data.photon_sums(dataset.responses)[rows])
    plan = stage_plan(args, "sum", logit)
    totals = Totals(DETECTORS[args.detector], c.shape[1], key, low)
    totals, found["sum"] = train(totals, sum_loss, arrays, rows, plan)
    if args.stage == "sum":
        return None, None, found
    plan = stage_plan(args, "teacher", logit)
    teacher, found["teacher"] = train(make("teacher"), teacher_loss, arrays, rows, plan)
    chosen = ready(plan.run, Generator(totals, teacher))
    if args.stage == "teacher":
        return *chosen, found
    weights = np.ones(len(c), np.float32)
    if args.diversity:                                                         # [IAF, Eq. 3]
        weights = papers.diversity_weights(dataset.responses, dataset.particles, rows)
    loss = partial(student_loss, channel_weight=args.channel_loss, light_weight=args.light_loss)
    plan = stage_plan(args, "student", logit)
    student, found["student"] = train(make("student"), loss, (*arrays, weights), rows, plan, teacher)
    other = ready(args.run, Generator(totals, student))
    return *(other if args.sampler == "student" else chosen), found


def finish(args, scaler, part, found, run, net):
    """Choose the removal of a Generator on at most 5120 rows of a Dataset, write model.eqx into the folder
    `run`, and complete what is `found`. Returns the Generator as it is kept there, and the removal."""
    part, key, flow = data.select(part, slice(5120)), jax.random.key(0), net.flow
    c, truth, scores = data.conditions(part.particles, scaler), metrics.channels(part.responses), {}
    draw = eqx.filter_jit(eqx.Partial(draw_totals, net.totals))
    totals = common.in_blocks(draw, key, c)
    light = common.in_blocks(eqx.filter_jit(eqx.Partial(draw_light, net)), key, c, totals)
    for how in REMOVALS:
        counts = np.asarray(remove_noise(light, totals, how, flow.logit.noise)).reshape(part.responses.shape)
        scores[how] = metrics.wasserstein(truth, metrics.channels(counts))
    print(f"{flow.kind}, W on validation rows: " + ", ".join(f"{how} {w:.3f}" for how, w in scores.items()))
    found["removals"][flow.kind], removal = scores, args.removal or min(scores, key=scores.get)
    found["train_seconds"] = sum(found[stage]["train_seconds"] for stage in STAGES if stage in found)
    header = args.header | {"flags": args.header["flags"] | {"sampler": flow.kind}, "removal": removal,
                            "logit": flow.logit._asdict()}
    return common.save_model(run, header, scaler, found, net), removal


# ---------------------------------------------------------------------------------------------------- network
# For ONE example: x (D,), a number for each of the D = H W fibres, conditions c (C,), photon sum (); vmap
# makes the batch. A block gets the fibres in its own order, and the surroundings of each (D, N).

class Local(eqx.Module):
    """Head of our blocks: a small network that all fibres share. It makes the numbers of a fibre's spline
    from the outputs of the masked layers for its group, its neighbours that came before, the light that is
    left, and its surroundings; an embedding of the particle scales and shifts it."""
    near: jax.Array
    position: jax.Array
    known: jax.Array
    modulation: Linear
    head: jax.Array
    bias: jax.Array
    logit: Logit = eqx.field(static=True)

    def __init__(self, fibres, near, known, embedding, hidden, logit, key):
        keys, self.logit = jax.random.split(key, 4), logit
        self.near = normal(keys[0], hidden + 2, near, scale=3**-0.5).at[hidden:].set(0.0)
        self.position = jnp.zeros((fibres, hidden + 2))
        self.known = normal(keys[1], hidden, known, scale=known**-0.5)
        self.modulation = Linear(embedding, 2 * hidden, keys[2])
        self.head, self.bias = normal(keys[3], NUMBERS, hidden, scale=0.1 * hidden**-0.5), jnp.zeros(NUMBERS)

    def ground(self, near):
        """What depends on the place alone, (D, hidden + 2)."""
        return near.astype(self.near.dtype) @ self.near.T + self.position

    def see(self, x, ground, total):
        """What later fibres see of x (...): log photons, and the share of the light that it is. States of a
        flow other than the response become one by a scale and a shift, the last two numbers of `ground`."""
        noise, mean, std = self.logit
        log_photons = std * ((1 + ground[..., -2]) * x + ground[..., -1]) + mean       # in units of the noise
        photons = noise * (jnp.exp(jnp.minimum(log_photons, jnp.log(total / noise + 1))) - 0.5)
        share = jnp.where(log_photons > 0, photons, 0.0) / (total + noise)
        return jax.nn.leaky_relu(log_photons, 0.1), share

    def numbers(self, ground, context, neighbours, used, e, total):
        """Numbers (..., NUMBERS) of splines from `ground` (..., hidden + 2), outputs of the masked layers
        (..., K), neighbours (..., 5), and the share of the light that was used before (...)."""
        left = jnp.clip(1 - used, -1, 1)
        light = jnp.stack([left, jnp.log1p(jax.nn.relu(left) * total) / 4], axis=-1)
        known = jnp.concatenate([context, neighbours, light], axis=-1).astype(self.known.dtype)
        scale, shift = jnp.split(self.modulation(e), 2)
        h = (ground[..., :-2] + known @ self.known.T) * (1 + scale) + shift
        return (jax.nn.silu(h) @ self.head.T + self.bias).astype(jnp.float32)


class Block(eqx.Module):
    """MADE (Germain et al. 2015): masked layers let each group of fibres depend on the groups before it, and
    a head makes the numbers of the splines from their outputs."""
    first: jax.Array
    second: jax.Array
    last: jax.Array
    hidden_bias: jax.Array
    last_bias: jax.Array
    modulation: Linear
    head: Local | papers.DirectHead
    before: tuple = eqx.field(static=True)   # how far before a fibre its neighbours are

    def __init__(self, detector, near, embedding, logit, key, width, hidden, group, outputs):
        keys, fibres, row = jax.random.split(key, 5), math.prod(detector.shape), detector.shape[1]
        self.before = 1, 2, row - 1, row, row + 1                              # in its row, in the row before
        self.head = papers.DirectHead()
        if hidden:
            self.head = Local(fibres, near, outputs + 7, embedding, hidden, logit, keys[4])
        small = (1 if hidden else 0.1) * width**-0.5
        self.first, self.second = normal(keys[0], fibres, width), normal(keys[1], width, width)
        self.last = normal(keys[2], fibres // group, outputs, width, scale=small)
        self.hidden_bias, self.last_bias = jnp.zeros((2, width)), jnp.zeros((fibres // group, outputs))
        self.modulation = Linear(embedding, 4 * width, keys[3])
        self.first, self.second, self.last = self.masked()                     # without gradients they stay 0

    def masked(self):
        """Weights of the layers, 0 where a group would depend on itself or later ones (Germain et al. 2015,
        Eq. 12 and 13). The first hidden numbers depend on the particle alone, for the first group."""
        groups = np.arange(len(self.last))
        # the last group that each hidden number depends on
        seen = np.linspace(-1, len(groups) - 2, len(self.second)).round()
        masks = (groups.repeat(len(self.first) // len(groups))[:, None] <= seen, seen[:, None] <= seen,
                 (seen < groups[:, None])[:, None])
        return [w * mask.astype(w.dtype) for w, mask in zip((self.first, self.second, self.last), masks)]

    def context(self, h, e, second, last, bias):
        """Outputs (G, K) for groups with the weights `last` (G, K, width), from the sums h (width,) of the
        first layer."""
        scale1, shift1, scale2, shift2 = jnp.split(self.modulation(e), 4)
        h = jax.nn.silu((h + self.hidden_bias[0]) * (1 + scale1) + shift1)
        h = jax.nn.silu((h @ second + self.hidden_bias[1]) * (1 + scale2) + shift2)
        return jnp.tensordot(h, last, (0, -1)) + bias

    def numbers(self, x, near, e, total):
        """Numbers (D, NUMBERS) of the splines of all fibres x (D,)."""
        (first, second, last), ground = self.masked(), self.head.ground(near)
        seen, share = self.head.see(x, ground, total)
        context = self.context(seen.astype(first.dtype) @ first, e, second, last, self.last_bias)
        context = context.repeat(len(x) // len(last), axis=0)                                        # (D, K)
        neighbours = jnp.stack([jnp.pad(seen, (n, 0))[:len(x)] for n in self.before], axis=-1)       # (D, 5)
        return self.head.numbers(ground, context, neighbours, jnp.cumsum(share) - share, e, total)

    def naive(self, y, near, e, total, fibres=None):
        """x (D,) of the block's y, right in the first `fibres`, by a full pass for each, as in libraries."""
        step = lambda _, x: inverse_spline(y, self.numbers(x, near, e, total))
        return jax.lax.fori_loop(0, len(y) if fibres is None else fibres, step, jnp.zeros_like(y))

    def incremental(self, y, near, e, total):
        """The same x: each new fibre adds a row to the sums of the first layer, and only the outputs for the
        next group are computed, and the spline of the next fibre."""
        (first, second, last), ground = self.masked(), self.head.ground(near)

        def step(carry, group):
            (h, recent, used), (targets, grounds, rows, last, bias) = carry, group
            context, found = self.context(h, e, second, last, bias), []
            for target, ground, row in zip(targets, grounds, rows):
                numbers = self.head.numbers(ground, context, recent[-np.array(self.before)], used, e, total)
                found.append(inverse_spline(target, numbers))
                seen, share = self.head.see(found[-1], ground, total)
                h, recent, used = h + seen * row, jnp.append(recent[1:], seen), used + share
            return (h, recent, used), jnp.stack(found)

        start = jnp.zeros(first.shape[1]), jnp.zeros(max(self.before)), jnp.zeros(())
        size = len(y) // len(last)
        groups = [a.reshape(len(last), size, *a.shape[1:]) for a in (y, ground, first)]
        return jax.lax.scan(step, start, (*groups, last, self.last_bias))[1].ravel()


def arrange(a, order, back=False):
    """Fibres, axis 0 of a (D, ...), in an order or `back`: 1 forwards, -1 backwards, 2, 3, ... random."""
    if abs(order) == 1:
        return a[::order]
    places = np.random.default_rng(order).permutation(len(a))
    return a[np.argsort(places) if back else places]


class Flow(eqx.Module):
    """Blocks, each with its order of the fibres, and the embedding of particle and photon sum. A call is one
    pass: x -> z of the teacher, z -> x of the student, whose orders are reversed."""
    embedding: list
    blocks: list
    orders: tuple = eqx.field(static=True)
    detector: Detector = eqx.field(static=True)
    logit: Logit = eqx.field(static=True)
    kind: str = eqx.field(static=True)

    def __init__(self, detector, conditions, logit, kind, key, orders, width=None, embedding=96, **sizes):
        self.detector, self.logit, self.kind = detector, logit, kind
        self.orders = orders if kind == "teacher" else orders[::-1]
        keys = iter(jax.random.split(key, 2 + len(orders)))
        inputs = data.feature_count(conditions + 1, detector)
        self.embedding = [Linear(inputs, embedding, next(keys)), Linear(embedding, embedding, next(keys))]
        near = self.given(jnp.zeros(conditions), jnp.ones(()))[1].shape[1]
        sizes["width"] = width or math.prod(detector.shape) // 20
        self.blocks = [Block(detector, near, embedding, logit, next(keys), **sizes) for _ in orders]

    def given(self, c, total):
        """Particle and photon sum as one vector (E,), and the surroundings of each fibre (D, 9):
        data.near_impact with the logs of its wide bumps."""
        h = data.features(with_sum(c, total), self.detector)
        for layer in self.embedding:
            h = jax.nn.silu(layer(h))
        near = data.near_impact(c, self.detector, 1)
        return h, jnp.concatenate([near, jnp.log(near[:, 3::2]) / 4], axis=1)

    def __call__(self, x, c, total):
        """States (blocks + 1, D), x and what each block makes of it, and log |det| ()."""
        (e, near), states, log_det = self.given(c, total), [x], 0.0
        for order, block in zip(self.orders, self.blocks):
            x = arrange(states[-1], order)
            y, log_slopes = spline(x, block.numbers(x, arrange(near, order), e, total))
            states.append(arrange(y, order, back=True))
            log_det += log_slopes.sum()
        return jnp.stack(states), log_det

    def invert(self, y, c, total, how="incremental", **options):
        """x (D,) whose last state is y, `how` naive or incremental."""
        e, near = self.given(c, total)
        for order, block in zip(self.orders[::-1], self.blocks[::-1]):
            x = getattr(block, how)(arrange(y, order), arrange(near, order), e, total, **options)
            y = arrange(x, order, back=True)
        return y


NETWORKS = {"local": partial(Flow, orders=(1, -1), hidden=24, group=4, outputs=4),
            "paper": partial(Flow, orders=(1, -1, 2, 3, 4, 5, 6, 7), hidden=None, group=1, outputs=NUMBERS,
                             width=1452)}


class Generator(eqx.Module):
    """What a checkpoint keeps: the distribution of the photon sum, and a flow, the teacher or the student."""
    totals: Totals
    flow: Flow


def make_generator(net, kind, detector, logit, conditions, key):
    """An untrained Generator: the shapes of a checkpoint."""
    flow = NETWORKS[net](detector, conditions, logit, kind, key)
    return Generator(Totals(detector, conditions, key), flow)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds; after --stage sum its
    times."""
    args = parse(argv)
    common.prepare_jax()
    detector, conditions = DETECTORS[args.detector], data.CONDITIONS[args.cond]
    if args.load:
        logit, removal = Logit(**args.header["logit"]), args.removal or args.header["removal"]
        make = partial(make_generator, args.net, args.sampler, detector, logit, conditions)
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        found = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        scaler = data.fit_conditions(dataset.particles[split.train], args.cond)
        net, removal, found = train_stages(args, dataset, split, scaler)
        if args.stage == "sum":
            return found
    draw = eqx.filter_jit(eqx.Partial(sample, net, removal=removal))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    cost = common.network_cost(net.flow, (math.prod(detector.shape),), (conditions,), ())
    cost["parameters"] = common.count_parameters(net)
    return metrics.report(args, draw, scaler, dataset, split, **cost, evaluations=1, removal=removal, **found)


if __name__ == "__main__":
    common.run(main)
