"""Conditional flow matching [FM].

A straight line leads from noise x_0 ~ N(0, 1) at t = 0 to a response x_1 at t = 1. A network learns its
velocity for the particle c; a response is drawn by following that velocity from noise:
    x_t = (1 - t) x_0 + t x_1            (Eq. 3)      v_t = x_1 - x_0                            (Eq. 4)
    x_(t+dt) = x_t + dt v_theta          (Eq. 5)      L = E || v_theta(x_t, t, c) - v_t ||^2      (Eq. 6)

Photons are counts, and most fibres hold 0 or 1 of them, so the last part of the path is not integrated. With
x = 2 sqrt(n) the counting noise is about 1 in every fibre. Once the noise of the path, (1 - t) / t, has
fallen below that (t = 0.6), x_t fixes everything that the fibres have in common, and the same network gives
each fibre its own distribution of counts, trained by exact likelihood. `--counts round` and `floor` are the
usual ways, to compare.

    python fm.py --detector zn --steps 11                  eight minutes on two CPU cores, data included
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
from common import Linear, normalise
from simulator import DETECTORS, Detector


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "counts", "exit"
    parser = common.parser(__doc__, "fm", own=own, n=60_000, epochs=12, lr=2e-3, steps=11)
    parser.add_argument("--net", choices=NETWORKS, default="dense", help="network (default: dense)")
    parser.add_argument("--counts", choices=("sample", "round", "floor"), default="sample",
                        help="get photon counts by drawing them from each fibre's distribution at --exit, by "
                             "rounding log responses or by the floor of dequantised counts (default: sample)")
    parser.add_argument("--exit", type=common.number(float, 0.05, 0.95), default=0.6, metavar="T",
                        help="time of the path at which --counts sample draws the counts (default: 0.6)")
    parser.add_argument("--solver", choices=EVALUATIONS, default="ab2",
                        help="integrate the path with Euler's, the midpoint or the Adams-Bashforth method "
                             "(ab2), which is of second order at Euler's cost (default: ab2)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def flow_loss(net, x1, t, c, key):
    """Flow matching for one response x_1 (H, W) of the particle c (C,): t = 0 is noise, t = 1 is data."""
    x0 = jax.random.normal(key, x1.shape)
    x = (1 - t) * x0 + t * x1                                                  # [FM, Eq. 3]
    v = x1 - x0                                                                # [FM, Eq. 4]
    return jnp.mean((velocity(net(x, t, c), x, t) - v)**2)                     # [FM, Eq. 6]


def velocity(maps, x, t):
    """v_theta from the maps of the network: one map is v_theta itself. Else they predict the response x_1,
    and v_t = (x_1 - x_t) / (1 - t) by Eq. 3 and 4: what is linear in x_t, times the probability that a fibre
    is lit at all."""
    if len(maps) == 1:
        return maps[0]
    x1 = (maps[0] + maps[1] * x) * jax.nn.sigmoid(maps[2] + maps[3] * x)
    return (x1 - x) / jnp.maximum(1 - t, 0.05)


def count_nats(net, counts, x1, t, c, key):
    """-log P(counts | x_t) per fibre of one response (H, W), in nats; counts are drawn from it at --exit."""
    x = (1 - t) * jax.random.normal(key, x1.shape) + t * x1                    # [FM, Eq. 3]
    return jnp.mean(data.count_loss(counts, *count_distribution(net(x, t, c), x)))


def count_distribution(maps, x):
    """Location and scale (H, W) of the distributions of 2 sqrt(n), from x_t and the last three maps."""
    return maps[-3] + maps[-2] * x, data.bounded_scale(maps[-1])


def to_state(counts, how, key):
    """Photon counts (H, W) -> x_1; `how` is --counts."""
    if how == "round":
        return jnp.log1p(counts)                                               # as the papers
    noise = jax.random.uniform(key, counts.shape) if how == "floor" else 0.0
    return 2 * jnp.sqrt(counts + noise)                                        # Poisson counts: variance 1


def to_counts(x, how):
    """The inverse, to whole photons."""
    return data.rounded_counts(x) if how == "round" else jnp.floor(jnp.square(jnp.maximum(x, 0) / 2))


def batch_loss(net, counts, c, key, how, end):
    """Loss of counts (B, H, W) and conditions c (B, C), and its parts; the path ends at the time `end`."""
    size, counts = len(counts), counts.astype(jnp.float32)
    time_key, *keys = jax.random.split(key, size + 1)
    noise_keys, count_keys = jax.vmap(jax.random.split)(jnp.stack(keys)).T     # (B,) each
    x1 = jax.vmap(partial(to_state, how=how))(counts, key=count_keys)
    u = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size      # stratified: less noise
    if how != "sample":
        path = jax.vmap(partial(flow_loss, net))(x1, u, c, noise_keys).mean()
        return path, {"path": path}
    # half of the batch learns the path, half the counts at its end, where alone they are drawn
    half = size // 2
    # early times come more often: a bright narrow shower finds its place there, and no later time mends it
    t = end * (u[:half] * size / half) ** 3
    path = jax.vmap(partial(flow_loss, net))(x1[:half], t, c[:half], noise_keys[:half]).mean()
    count_losses = jax.vmap(partial(count_nats, net, t=end))
    nats = count_losses(counts[half:], x1[half:], c=c[half:], key=noise_keys[half:]).mean()
    # 10: gradients of like size, chosen on validation rows
    return path + 10 * nats, {"path": path, "nats per fibre": nats}


# ---------------------------------------------------------------------------------------------------- sampler

EVALUATIONS = {"ab2": 1, "euler": 1, "midpoint": 2}                            # of the network in a step


def integrate(v, x, end, steps, solver):
    """Follow dx/dt = v(x, t) from noise at t = 0 to t = `end`. Unrolled: XLA is slow on loops on a CPU."""
    h, before = end / steps, None
    for t in h * np.arange(steps):
        now = v(x, t)
        if solver == "midpoint":
            now = v(x + h / 2 * now, t + h / 2)
        # Adams and Bashforth: the slope half a step ahead, from this one and the one before
        slope = 1.5 * now - 0.5 * before if solver == "ab2" and before is not None else now
        x, before = x + h * slope, now                                         # [FM, Eq. 5]
    return x


def sample(net, c, key, shape, how, end, steps, solver):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    noise_key, count_key = jax.random.split(key)
    maps = lambda x, t: jax.vmap(net, (0, None, 0))(x, t, c)
    v = lambda x, t: jax.vmap(velocity, (0, 0, None))(maps(x, t), x, t)
    x = integrate(v, jax.random.normal(noise_key, (len(c), *shape)), end, steps, solver)
    if how != "sample":
        return data.as_uint16(to_counts(x, how))
    location, scale = jax.vmap(count_distribution)(maps(x, end), x)
    return data.as_uint16(data.draw_counts(location, scale, count_key))


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

    def __init__(self, conditions, width, key):
        keys = jax.random.split(key)
        self.first = Linear(data.features(conditions) + 16, width, keys[0])
        self.second = Linear(width, width, keys[1])

    def __call__(self, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        h = jnp.concatenate([data.with_sinusoids(c), jnp.sin(angles), jnp.cos(angles)])
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

    Patches of 4 x 4 fibres shrink to a few numbers each. All of them, with the light around the possible
    impact points, pass residual blocks as one wide vector, which returns a few numbers to each patch. A small
    network that every patch shares joins these with the patch's own x_t, so that single fibres are not lost
    in the narrow middle, and with its vicinity to the impact points; the wide vector scales and shifts it.
    """
    embedding: Embedding
    squeeze: Linear
    enter: Linear
    blocks: list
    leave: Linear
    position: jax.Array
    local: Linear
    modulation: Linear
    head: Linear
    detector: Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, maps, key, width, depth, down, up, hidden, embedding, size=4):
        keys = iter(jax.random.split(key, 7 + depth))
        offsets, bumps = data.vicinity(jnp.zeros(conditions), detector, size)
        patches, near = len(bumps), offsets.shape[1] + bumps[0].size
        self.detector, self.size = detector, size
        self.embedding = Embedding(conditions, embedding, next(keys))
        self.squeeze = Linear(size**2, down, next(keys))
        self.enter = Linear(down * patches + bumps.shape[1], width, next(keys))
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave = Linear(width, up * patches, next(keys))
        self.position = jnp.zeros((patches, hidden))
        self.local = Linear(up + size**2 + near, hidden, next(keys))
        self.modulation = Linear(width, 2 * hidden, next(keys))
        self.head = Linear(hidden, maps * size**2, next(keys), scale=0.1)

    def __call__(self, x, t, c):
        inputs = data.to_patches(0.5 * x, self.size), *data.vicinity(c, self.detector, self.size)
        patches, offsets, bumps = common.cast(inputs, self.position.dtype)     # (P, 16), (P, 3), (P, 4, 16)
        light = data.impact_light(bumps, patches)
        h = self.enter(jnp.concatenate([self.squeeze(patches).ravel(), light]))                     # (width,)
        e = self.embedding(t, c)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        own = jnp.concatenate([self.leave(h).reshape(len(patches), -1), patches], axis=1)       # (P, up + 16)
        near = jnp.concatenate([offsets, bumps.reshape(len(patches), -1)], axis=1)              # (P, 3 + 64)
        own_weight, near_weight = jnp.split(self.local.weight, [own.shape[1]], axis=1)
        # the same in every step of the sampler, so computed once
        ground = near @ near_weight.T + self.local.bias + self.position
        scale, shift = jnp.split(self.modulation(h), 2)
        h = jax.nn.silu((own @ own_weight.T + ground) * (1 + scale) + shift)                    # (P, hidden)
        return data.from_patches(self.head(h), self.size, self.detector.shape).astype(jnp.float32)


def published(detector, conditions, maps, key):
    """The U-Net of [FM]."""
    return papers.ResponseUNet(conditions, maps, key)


NETWORKS = {"paper": published,
            # fewer than 100 000 parameters
            "compact": partial(Dense, width=48, depth=2, down=4, up=4, hidden=44, embedding=32),
            "dense": partial(Dense, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)}


def make_network(net, how, detector, conditions, key):
    """One map is the velocity (the paper's network with the papers' counts), four are the predicted response,
    three more the distribution of the counts."""
    maps = 7 if how == "sample" else 1 if net == "paper" else 4
    return NETWORKS[net](detector, conditions, maps, key)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector, end = DETECTORS[args.detector], args.exit if args.counts == "sample" else 1.0
    make = partial(make_network, args.net, args.counts, detector, data.CONDITIONS[args.cond])
    if args.load:
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan, loss = common.plan(args), partial(batch_loss, how=args.counts, end=end)
        scaler = data.fit_conditions(dataset.particles[split.train], args.cond)
        arrays = dataset.responses, data.conditions(dataset.particles, scaler)
        net, times = train(make(plan.keys[0]), loss, arrays, split.train, plan)
        net = common.save_model(args.run, args.header, scaler, times, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, shape=detector.shape, how=args.counts, end=end,
                                      steps=args.steps, solver=args.solver))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    evaluations = args.steps * EVALUATIONS[args.solver] + (args.counts == "sample")
    cost = common.network_cost(net, detector.shape, (), (len(scaler.mean),))
    return metrics.report(args, draw, scaler, dataset, split, **cost, steps=args.steps, solver=args.solver,
                          evaluations=evaluations, **times)


if __name__ == "__main__":
    common.run(main)
