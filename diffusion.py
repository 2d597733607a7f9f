"""Denoising diffusion [Comparison, after Ho et al. 2020 and Song et al. 2021].

In 1000 steps a response x_0 becomes noise epsilon ~ N(0, 1): t = 0 is data, t = 999 noise. A network learns
to predict x_0, and with it epsilon, from x_t for the particle c; a response is drawn step by step from noise:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
    x^_0 = (x_t - sqrt(1 - abar_t) epsilon^) / sqrt(abar_t)                                      (Eq. 9)
    L = E || epsilon - epsilon^ ||^2                                                             (Eq. 11)
    x_s = sqrt(abar_s) x^_0 + sqrt(1 - abar_s - eta_t^2) epsilon^ + eta_t noise,  s < t          (Eq. 12)
DDIM takes dozens of such steps. Without fresh noise they follow a curve, along which a solver that is fitted
to the trained network takes six evaluations (solvers.py, [CaloDREAM]).

Photons are counts, so the last steps are not taken, as in fm.py. With x_0 = 2 sqrt(n) the counting noise is
about 1 in every fibre. Where that of x_t is 2/3, the same network gives each fibre its own distribution of
counts, trained by exact likelihood.

    python diffusion.py --detector zn                      a quarter of an hour on two CPU cores
    python diffusion.py --load weights/diffusion-zn.eqx --generate particles.csv --out responses.h5

Prints the training, then every score of metrics.py beside its oracle; ends `written: runs/diffusion-zn/`.
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

LENGTH = 1000        # steps of the noise
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, LENGTH))        # abar_t: Ho et al. 2020, section 4
SHARE = np.sqrt(ABAR) / (np.sqrt(ABAR) + np.sqrt(1 - ABAR))   # of the signal in x_t
END = int(np.argmin(np.abs(np.sqrt(1 / ABAR - 1) - 2 / 3)))   # t at which counts are drawn: noise of 2/3
BRIGHTEST = 4000.0   # photons in a fibre at most: four times the brightest of the open data
ODDS = 4             # 0 to 3 photons have odds of their own, in data.count_loss


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "steps"
    parser = common.parser(__doc__, "diffusion", own=own, n=60_000, epochs=12, lr=2e-3, steps=6)
    parser.add_argument("--net", choices=NETWORKS, default="dense",
                        help="our network (dense) or the U-Net of [FM] (paper) (default: dense)")
    parser.add_argument("--ddim", type=common.number(int, 1, LENGTH - 1 - END), metavar="N",
                        help="draw in N steps of DDIM instead of --steps of a fitted solver")
    parser.add_argument("--eta", type=common.number(float, 0, 1), default=0.7, metavar="ETA",
                        help="fresh noise in each step of DDIM: 0 none, 1 as much as DDPM (default: 0.7)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def denoising_loss(net, x0, t, c, key):
    """Denoising diffusion for one response x_0 (H, W) of the particle c (C,), and factor_loss; t = LENGTH - 1
    is noise."""
    noise, abar = jax.random.normal(key, x0.shape), jnp.take(ABAR, t)
    x = jnp.sqrt(abar) * x0 + jnp.sqrt(1 - abar) * noise                       # Ho et al. 2020, Eq. 4
    level, lit = factors(net(x, t / LENGTH, c), x)
    error = noise_in(x, level * jax.nn.sigmoid(lit), abar) - noise
    return jnp.mean(error**2), factor_loss(level, lit, x0)                     # [Comparison, Eq. 11]


def noise_in(x, x0, abar):
    """epsilon^ in x_t, given x^_0."""
    return (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)                      # [Comparison, Eq. 9]


# same as fm.py: factors
def factors(maps, x):
    """The predicted response by its two factors, E[response | lit] and the logit of P(lit), linear in x_t."""
    return maps[0] + maps[1] * x, maps[2] + maps[3] * x


# same as fm.py: factor_loss
def factor_loss(level, lit, x1):
    """Losses of the factors: else the gradient of P(lit) is as small as P(lit), and faint spots are lost."""
    cross_entropy = 3 * optax.sigmoid_binary_cross_entropy(lit, x1 > 0)        # 3: gradients of like size
    return jnp.mean(cross_entropy + jnp.where(x1 > 0, (level - x1)**2, 0))


def count_nats(net, counts, x0, c, key):
    """-log P(counts | x_t) per fibre of one response (H, W), in nats, at END."""
    x = np.sqrt(ABAR[END]) * x0 + np.sqrt(1 - ABAR[END]) * jax.random.normal(key, x0.shape)
    return jnp.mean(data.count_loss(counts, *count_distribution(net(x, END / LENGTH, c), x)))


# same as fm.py: count_distribution
def count_distribution(maps, x):
    """Location, scale and odds of few photons (H, W) of the counts, from x_t and the last 3 + ODDS maps."""
    location, slope, log_scale, *odds = maps[-3 - ODDS:]
    return location + slope * x, data.bounded_scale(log_scale), odds


def lit_odds(x, t):
    """log p(x_t | one photon) / p(x_t | none) of each fibre, for x_0 = 2 and 0; t in units of LENGTH. The
    network sees what x_t alone says of it, since sums of x_t over many dark fibres are all noise."""
    abar = jnp.interp(t * LENGTH, np.arange(LENGTH), ABAR)
    return 2 * jnp.sqrt(abar) * (x - jnp.sqrt(abar)) / jnp.maximum(1 - abar, 0.0025)


def batch_loss(net, counts, c, key):
    """Loss of counts (B, H, W) and conditions c (B, C), and its parts."""
    half, counts = len(counts) // 2, counts.astype(jnp.float32)                # half learns the counts
    time_key, noise_key = jax.random.split(key)
    keys, x0 = jax.random.split(noise_key, len(counts)), 2 * jnp.sqrt(counts)  # Poisson counts: variance 1
    u = (jnp.arange(half) + jax.random.uniform(time_key, (half,))) / half      # stratified: less noise
    t = jnp.minimum(END + jnp.floor(u * (LENGTH - END)).astype(int), LENGTH - 1)
    path, factor = jax.vmap(partial(denoising_loss, net))(x0[:half], t, c[:half], keys[:half])
    # 1 / abar makes Eq. 11 the squared error of the velocity sqrt(abar) epsilon - sqrt(1 - abar) x_0
    # (Salimans and Ho 2022): more weight at noisy times, which settle place and brightness of a shower
    path, factor = jnp.mean(path / jnp.take(ABAR, t)), factor.mean()
    nats = jax.vmap(partial(count_nats, net))(counts[half:], x0[half:], c[half:], keys[half:]).mean()
    # 10: gradients of like size, chosen on validation rows
    return path + factor + 10 * nats, {"path": path, "factors": factor, "nats per fibre": nats}


# ---------------------------------------------------------------------------------------------------- sampler

def ddim_step(x, x0, now, then, eta, noise):
    """One step from x_t to x_s, s < t, with the predicted x^_0; `now` and `then` are abar_t and abar_s."""
    eta = eta * jnp.sqrt((1 - then) / (1 - now) * (1 - now / then))            # below [Comparison, Eq. 12]
    kept = jnp.sqrt(jnp.maximum(1 - then - eta**2, 0))
    return jnp.sqrt(then) * x0 + kept * noise_in(x, x0, now) + eta * noise     # [Comparison, Eq. 12]


def ddim(net, x, c, key, steps, eta):
    """From noise x (B, H, W) of particles c (B, C) to x_t at END, by DDIM."""
    t = np.round(np.linspace(LENGTH - 1, END, steps + 1)).astype(int)

    def step(x, row):
        t, now, then, key = row
        noise = jax.random.normal(key, x.shape) if eta else 0
        return ddim_step(x, predicted(net, x, t, c), now, then, eta, noise), None

    # XLA is slow on loops on a CPU: ten steps unrolled
    rows = t[:-1], ABAR[t[:-1]], ABAR[t[1:]], jax.random.split(key, steps)
    return jax.lax.scan(step, x, rows, unroll=min(steps, 10))[0]


def predicted(net, x, t, c):
    """x^_0 of x_t (B, H, W) of particles c (B, C), in the range of the data: the loss never clips."""
    level, lit = jax.vmap(factors)(jax.vmap(net, (0, None, 0))(x, t / LENGTH, c), x)
    return jnp.clip(level * jax.nn.sigmoid(lit), 0, 2 * BRIGHTEST**0.5)


def slope(net, y, s, c):
    """dy / ds of particles c (B, C), for y = x_t / (sqrt(abar) + sqrt(1 - abar)) (B, H, W) and the share s of
    the signal in it, in units of that at END. Eq. 12 with eta = 0 is dy / ds = x^_0 - epsilon^: as in fm.py,
    straight lines lead from noise to responses."""
    share = s * SHARE[END]
    length = jnp.sqrt(share**2 + (1 - share)**2)                               # sqrt(abar) = share / length
    t = jnp.interp(share, SHARE[::-1], np.arange(LENGTH)[::-1])
    x0 = predicted(net, y / length, t, c)
    return SHARE[END] * (x0 - noise_in(y / length, x0, (share / length)**2))


def fit_solver(net, c, shape, steps):
    """The network with a solver of `steps` evaluations for it, fitted to paths of particles c (M, C)."""
    y0 = jax.random.normal(jax.random.key(0), (len(c), *shape))
    return solvers.Solved(net, solvers.fit(partial(slope, net), y0, c, steps, "bns-global"))


def sample(model, c, key, shape, steps=None, eta=0.0):
    """Draw one response for each condition c (B, C), by the fitted solver or in `steps` of DDIM: photon
    counts uint16 (B, H, W)."""
    start_key, step_key, count_key = jax.random.split(key, 3)
    x = jax.random.normal(start_key, (len(c), *shape))
    if steps:
        x = ddim(model.net, x, c, step_key, steps, eta)
    else:
        y = solvers.integrate(lambda y, s: slope(model.net, y, s, c), x, model.solver, unroll=True)
        x = y * (np.sqrt(ABAR[END]) + np.sqrt(1 - ABAR[END]))
    maps = jax.vmap(model.net, (0, None, 0))(x, END / LENGTH, c)
    location, scale, odds = jax.vmap(count_distribution)(maps, x)
    return data.as_uint16(data.draw_counts(location, scale, count_key, odds))


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


# ---------------------------------------------------------------------------------------------------- network
# A network maps x (H, W), t () and condition c (C,) of ONE example to maps (K, H, W); vmap makes the batch.

# same as fm.py: Embedding
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


# same as fm.py: DenseBlock
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


# same as fm.py: Dense
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


# same as fm.py: modulate
def modulate(h, scale_and_shift):
    """SiLU of h (P, hidden), scaled and shifted by one vector (2 hidden,)."""
    scale, shift = jnp.split(scale_and_shift, 2)
    return jax.nn.silu(h * (1 + scale) + shift)


NETWORKS = {"paper": lambda detector, *rest: papers.ResponseUNet(*rest),
            "dense": partial(Dense, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)}


def make_network(net, detector, conditions, key):
    """Four maps are the predicted response, 3 + ODDS more the distribution of the counts."""
    return NETWORKS[net](detector, conditions, 7 + ODDS, key)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector = DETECTORS[args.detector]
    network = partial(make_network, args.net, detector, data.CONDITIONS[args.cond])
    make = partial(solvers.unfitted, network, args.steps)
    if args.load:
        model, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan, scaler = common.plan(args), data.first_scaler(args, dataset.particles[split.train])
        arrays = dataset.responses, data.conditions(dataset.particles, scaler)
        first = common.first_network(args, make, plan).net
        net, times = train(first, batch_loss, arrays, split.train, plan)
        c = arrays[1][split.train[:solvers.FITTED]]
        model = fit_solver(net, c, detector.shape, args.steps)
        model = common.save_model(args.run, args.header, scaler, times, model)
    draw = eqx.filter_jit(eqx.Partial(sample, model, shape=detector.shape, steps=args.ddim, eta=args.eta))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    cost = common.network_cost(model.net, detector.shape, (), (len(scaler.mean),))
    steps = args.ddim or args.steps
    return metrics.report(args, draw, scaler, dataset, split, **cost, steps=steps, evaluations=steps + 1,
                          **times)


if __name__ == "__main__":
    common.run(main)
