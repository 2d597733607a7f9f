"""Conditional flow matching [FM].

A straight line leads from noise x_0 ~ N(0, 1) at t = 0 to a response x_1 at t = 1. A network learns its
velocity for the particle c; a response is drawn by following that velocity from noise:
    x_t = (1 - t) x_0 + t x_1            (Eq. 3)      v_t = x_1 - x_0                            (Eq. 4)
    x_(t+dt) = x_t + dt v_theta          (Eq. 5)      L = E || v_theta(x_t, t, c) - v_t ||^2      (Eq. 6)
A solver that is fitted to the trained network follows it in a few steps (solvers.py, [CaloDREAM]).

Photons are counts, most often 0 or 1, so the last part of the path is not integrated. With x = 2 sqrt(n) the
counting noise is about 1 in every fibre. Once the noise of the path, (1 - t) / t, has fallen below that
(t = 0.6), x_t fixes everything that the fibres have in common, and the same network gives each fibre its own
distribution of counts, trained by exact likelihood (`--counts round`, `floor`: the usual ways, to compare).
Our network is given the photon sum of the response, drawn first (totals.py). Faint spots are what is hard to
learn: see factor_loss and lit_odds.

    python fm.py --detector zn --steps 6                           a quarter of an hour on two CPU cores
    python fm.py --load weights/fm-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py beside its oracle; ends with `written: runs/fm-zn/`.
"""
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
import papers
import solvers
from common import Linear, normalise
from simulator import DETECTORS, Detector
from totals import SumFirst, Totals

END = {"round": 1.0, "floor": 1.0, "sample": 0.6}   # time at which the path ends, chosen on validation rows
ODDS = 4   # 0 to 3 photons have odds of their own, in data.count_loss


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "counts", "steps"
    parser = common.parser(__doc__, "fm", own=own, n=60_000, epochs=12, lr=2e-3, steps=6)
    parser.add_argument("--net", choices=NETWORKS, default="dense",
                        help="our network (dense) or the U-Net of [FM] (paper) (default: dense)")
    parser.add_argument("--counts", choices=("sample", "round", "floor"), default="sample",
                        help="get photon counts by drawing them from each fibre's distribution, by rounding "
                             "log responses or by the floor of dequantised counts (default: sample)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def flow_loss(net, x1, t, c, key):
    """Flow matching for one response x_1 (H, W) of the particle c (C,), and factor_loss; t = 0 is noise."""
    x0 = jax.random.normal(key, x1.shape)
    x = (1 - t) * x0 + t * x1                                                  # [FM, Eq. 3]
    v = x1 - x0                                                                # [FM, Eq. 4]
    maps = net(x, t, c)
    path = jnp.mean((velocity(maps, x, t) - v)**2)                             # [FM, Eq. 6]
    return path, factor_loss(*factors(maps, x), x1) if len(maps) > 1 else 0.0


def velocity(maps, x, t):
    """v_theta of the maps: one map itself, else (x_1 - x_t) / (1 - t) of x_1 = E[x_1 | lit] P(lit), Eq. 3."""
    if len(maps) == 1:
        return maps[0]
    level, lit = factors(maps, x)
    return (level * jax.nn.sigmoid(lit) - x) / jnp.maximum(1 - t, 0.05)


def factors(maps, x):
    """The predicted response by its two factors, E[response | lit] and the logit of P(lit), linear in x_t."""
    return maps[0] + maps[1] * x, maps[2] + maps[3] * x


def factor_loss(level, lit, x1):
    """Losses of the factors: else the gradient of P(lit) is as small as P(lit), and faint spots are lost."""
    cross_entropy = 3 * optax.sigmoid_binary_cross_entropy(lit, x1 > 0)        # 3: gradients of like size
    return jnp.mean(cross_entropy + jnp.where(x1 > 0, (level - x1)**2, 0))


def count_nats(net, counts, x1, t, c, key):
    """-log P(counts | x_t) per fibre of one response (H, W), in nats; counts are drawn from it at END."""
    x = (1 - t) * jax.random.normal(key, x1.shape) + t * x1                    # [FM, Eq. 3]
    return jnp.mean(data.count_loss(counts, *count_distribution(net(x, t, c), x)))


def count_distribution(maps, x):
    """Location, scale and odds of few photons (H, W) of the counts, from x_t and the last 3 + ODDS maps."""
    location, slope, log_scale, *odds = maps[-3 - ODDS:]
    return location + slope * x, data.bounded_scale(log_scale), odds


def lit_odds(x, t):
    """log p(x_t | one photon) / p(x_t | none) of each fibre, for x_1 = 2 and 0 in Eq. 3: what x_t alone says
    of it. The network sees it, since sums of x_t over many dark fibres are all noise."""
    return 2 * t * (x - t) / jnp.maximum(1 - t, 0.05)**2


def to_state(counts, how, key):
    """Photon counts (H, W) -> x_1; `how` is --counts."""
    if how == "round":
        return jnp.log1p(counts)                                               # as the papers
    noise = jax.random.uniform(key, counts.shape) if how == "floor" else 0.0
    return 2 * jnp.sqrt(counts + noise)                                        # Poisson counts: variance 1


def to_counts(x, how):
    """The inverse, to whole photons."""
    return data.rounded_counts(x) if how == "round" else jnp.floor(jnp.square(jnp.maximum(x, 0) / 2))


def batch_loss(net, counts, c, key, how):
    """Loss of counts (B, H, W) and conditions c (B, C), and its parts; `how` is --counts."""
    size, counts = len(counts), counts.astype(jnp.float32)
    sum_nats, c, net = *net.known(counts, c), net.path
    time_key, *keys = jax.random.split(key, size + 1)
    noise_keys, count_keys = jax.vmap(jax.random.split)(jnp.stack(keys)).T     # (B,) each
    x1 = jax.vmap(partial(to_state, how=how))(counts, key=count_keys)
    u = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size      # stratified: less noise
    if how != "sample":
        path, factor = (loss.mean() for loss in jax.vmap(partial(flow_loss, net))(x1, u, c, noise_keys))
        return path + factor + sum_nats, {"path": path, "factors": factor, "sum": sum_nats}
    # half of the batch learns the path, half the counts at its end, where alone they are drawn
    half = size // 2
    # early times come more often: a bright narrow shower finds its place there, and no later time mends it
    t = END[how] * (u[:half] * size / half) ** 1.5
    losses = jax.vmap(partial(flow_loss, net))(x1[:half], t, c[:half], noise_keys[:half])
    path, factor = (loss.mean() for loss in losses)
    count_losses = jax.vmap(partial(count_nats, net, t=END[how]))
    nats = count_losses(counts[half:], x1[half:], c=c[half:], key=noise_keys[half:]).mean()
    # 10: gradients of like size, chosen on validation rows
    parts = {"path": path, "factors": factor, "nats per fibre": nats, "sum": sum_nats}
    return path + factor + 10 * nats + sum_nats, parts


# ---------------------------------------------------------------------------------------------------- sampler

def slope(net, x, s, c, end):
    """dx / ds of responses x (B, H, W) of particles c (B, C), where s goes from 0 to 1 as t does to `end`."""
    maps = jax.vmap(net, (0, None, 0))(x, s * end, c)
    return end * jax.vmap(velocity, (0, 0, None))(maps, x, s * end)


def fit_solver(net, c, shape, end, steps):
    """The network with a solver of `steps` evaluations for it, fitted to paths of particles c (M, C)."""
    x0, c = jax.random.normal(jax.random.key(0), (len(c), *shape)), net.draw(c, jax.random.key(1))
    return solvers.Solved(net, solvers.fit(partial(slope, net.path, end=end), x0, c, steps, "bns-global"))


def integrate(v, x0, solver):
    """Follow dx/ds = v(x, s) from noise x_0 by a fitted solver, each of whose states is made of x_0 and all
    slopes so far. With a = 1 and b = ds it is Euler's method [FM, Eq. 5]. Unrolled: XLA is slow on loops."""
    x, slopes = x0, []
    for s, a, b in zip(*solver):
        slopes.append(v(x, s))
        x = a * x0 + sum(weight * slope for weight, slope in zip(b, slopes))   # [CaloDREAM, Eq. 15]
    return x


def sample(model, c, key, shape, how):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    sum_key, noise_key, count_key = jax.random.split(key, 3)
    net, c, end = model.net.path, model.net.draw(c, sum_key), END[how]
    x0 = jax.random.normal(noise_key, (len(c), *shape))
    x = integrate(lambda x, s: slope(net, x, s, c, end), x0, model.solver)
    if how != "sample":
        return data.as_uint16(to_counts(x, how))
    maps = jax.vmap(net, (0, None, 0))(x, end, c)
    location, scale, odds = jax.vmap(count_distribution)(maps, x)
    return data.as_uint16(data.draw_counts(location, scale, count_key, odds))


# --------------------------------------------------------------------------------------------------- training

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


# ---------------------------------------------------------------------------------------------------- network
# A network maps x (H, W), t () and condition c (C,) of ONE example to maps (K, H, W); vmap makes the batch.

class Embedding(eqx.Module):
    """Time t and particle c (C,) as one vector (width,)."""
    first: Linear
    second: Linear
    detector: Detector = eqx.field(static=True)

    def __init__(self, detector, conditions, width, key):
        keys, self.detector = jax.random.split(key), detector
        self.first = Linear(data.feature_count(conditions, detector) + 16, width, keys[0])
        self.second = Linear(width, width, keys[1])

    def __call__(self, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        h = jnp.concatenate([data.features(c, self.detector), jnp.sin(angles), jnp.cos(angles)])
        return jax.nn.silu(self.second(jax.nn.silu(self.first(h))))


class DenseBlock(eqx.Module):
    """Residual block on one vector (width,), scaled, shifted and gated by an embedding: adaptive layer norm
    (Peebles and Xie 2023)."""
    up: Linear
    down: Linear
    modulation: Linear

    def __init__(self, width, embedding, key):
        keys = jax.random.split(key, 3)
        self.up, self.down = Linear(width, 2 * width, keys[0]), Linear(2 * width, width, keys[1])
        self.modulation = Linear(embedding, 3 * width, keys[2])

    def __call__(self, h, e):
        scale, shift, gate = jnp.split(self.modulation(e), 3)
        return h + gate * self.down(jax.nn.silu(self.up(normalise(h) * (1 + scale) + shift)))


class Dense(eqx.Module):
    """Ours, made for CPUs: few large matrix products and nothing else.

    A small network that all patches of 4 x 4 fibres share sees x_t in and around the patch, what x_t says of
    single photons, and its vicinity to the possible impact points, then what its neighbours have seen. A few
    numbers of each patch, with the light around the impact points, pass residual blocks as one wide vector,
    which returns a few to each. A second small network joins the two, and looks at its neighbours again.
    """
    embedding: Embedding
    local: Linear
    position: jax.Array
    mix: Linear
    squeeze: Linear
    enter: Linear
    blocks: list
    leave: Linear
    join: Linear
    mix_again: Linear
    modulations: list
    head: Linear
    detector: Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, maps, key, width, depth, down, up, hidden, embedding, size=4):
        keys = iter(jax.random.split(key, 11 + depth))
        patches, near = data.near_impact(jnp.zeros(conditions), detector, size).shape
        lights = len(data.vicinity(jnp.zeros(conditions), detector, size)[1][0])
        self.detector, self.size = detector, size
        self.embedding = Embedding(detector, conditions, embedding, next(keys))
        self.local = Linear(9 * size**2 + near, hidden, next(keys))
        self.position = jnp.zeros((patches, hidden))
        self.mix = Linear(2 * hidden, hidden, next(keys))
        self.squeeze = Linear(hidden + 2 * size**2, down, next(keys))
        self.enter = Linear(down * patches + lights, width, next(keys))
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave = Linear(width, up * patches, next(keys))
        self.join = Linear(up + hidden, hidden, next(keys))
        self.mix_again = Linear(2 * hidden, hidden, next(keys))
        self.modulations = [Linear(n, 2 * hidden, next(keys)) for n in (embedding, width)]
        self.head = Linear(hidden, maps * size**2, next(keys), scale=0.1)

    def __call__(self, x, t, c):
        size, (offsets, bumps) = self.size, data.vicinity(c, self.detector, self.size)
        lit = [3 * jax.nn.sigmoid(lit_odds(x, t) - prior) for prior in (3, 5)]     # P(lit) at two prior odds
        windows = [data.windows(picture, size) for picture in (x / 2, lit[0])]                      # (P, 64)
        patches = [data.to_patches(picture, size) for picture in (x / 2, *lit)]                     # (P, 16)
        near = jnp.concatenate([offsets, bumps.reshape(len(offsets), -1)], axis=1)              # (P, 3 + 64)
        windows, patches, near, bumps = common.cast((windows, patches, near, bumps), self.position.dtype)
        e, light = self.embedding(t, c), data.impact_light(bumps, patches[0])
        own_weight, near_weight = jnp.split(self.local.weight, [9 * size**2], axis=1)
        ground = near @ near_weight.T + self.local.bias + self.position  # one in all steps: computed once
        own = jnp.concatenate([*windows, patches[2]], axis=1) @ own_weight.T + ground           # (P, hidden)
        own = self.with_neighbours(self.mix, modulate(own, self.modulations[0](e)))
        down = self.squeeze(jnp.concatenate([own, *patches[1:]], axis=1))                         # (P, down)
        h = self.enter(jnp.concatenate([down.ravel(), light]))                                      # (width,)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        own = self.join(jnp.concatenate([self.leave(h).reshape(len(own), -1), own], axis=1))    # (P, hidden)
        own = self.with_neighbours(self.mix_again, modulate(own, self.modulations[1](h)))
        return data.from_patches(self.head(own), size, self.detector.shape).astype(jnp.float32)

    def with_neighbours(self, mix, h):
        """h (P, hidden) plus what a layer makes of it and of the patches that share an edge."""
        around = data.neighbour_mean(h, data.patch_grid(self.detector.shape, self.size))
        return h + jax.nn.silu(mix(jnp.concatenate([h, around], axis=1)))


def modulate(h, scale_and_shift):
    """SiLU of h (P, hidden), scaled and shifted by one vector (2 hidden,)."""
    scale, shift = jnp.split(scale_and_shift, 2)
    return jax.nn.silu(h * (1 + scale) + shift)


NETWORKS = {"paper": lambda detector, *rest: papers.ResponseUNet(*rest),       # the U-Net of [FM]
            "dense": partial(Dense, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)}


def make_network(net, how, detector, conditions, key):
    """Maps: 1 the velocity (paper's network and counts) or 4 the response, 3 + ODDS more those of counts."""
    maps = 7 + ODDS if how == "sample" else 1 if net == "paper" else 4
    sum_key, key = jax.random.split(key)
    totals = None if net == "paper" else Totals(detector, conditions, sum_key)
    return SumFirst(totals, NETWORKS[net](detector, conditions + bool(totals), maps, key))


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector = DETECTORS[args.detector]
    network = partial(make_network, args.net, args.counts, detector, data.CONDITIONS[args.cond])
    make = partial(solvers.unfitted, network, args.steps)
    if args.load:
        model, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan, loss = common.plan(args), partial(batch_loss, how=args.counts)
        scaler = data.first_scaler(args, dataset.particles[split.train])
        arrays = dataset.responses, data.conditions(dataset.particles, scaler)
        net = common.first_network(args, make, plan).net
        net = net.with_least(data.photon_sums(dataset.responses)[split.train])
        net, times = train(net, loss, arrays, split.train, plan)
        c = arrays[1][split.train[:solvers.FITTED]]
        model = fit_solver(net, c, detector.shape, END[args.counts], args.steps)
        model = common.save_model(args.run, args.header, scaler, times, model)
    draw = eqx.filter_jit(eqx.Partial(sample, model, shape=detector.shape, how=args.counts))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    cost = common.network_cost(model.net, detector.shape, (), (len(scaler.mean),), ())
    return metrics.report(args, draw, scaler, dataset, split, **cost, steps=args.steps,
                          evaluations=args.steps + (args.counts == "sample"), **times)


if __name__ == "__main__":
    common.run(main)
