"""Denoising diffusion [Comparison, after Ho et al. 2020 and Song et al. 2021].

In 1000 steps a response x_0 becomes noise epsilon ~ N(0, 1): t = 0 is data, t = 999 noise. A network learns
to predict x_0, and with it epsilon, from x_t for the particle c; a response is drawn step by step from noise:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon
    x^_0 = (x_t - sqrt(1 - abar_t) epsilon^) / sqrt(abar_t)                                      (Eq. 9)
    L = E || epsilon - epsilon^ ||^2                                                             (Eq. 11)
    x_s = sqrt(abar_s) x^_0 + sqrt(1 - abar_s - eta_t^2) epsilon^ + eta_t noise,  s < t          (Eq. 12)

Photons are counts, so the last steps are not taken, as in fm.py. With x_0 = 2 sqrt(n) the counting noise is
about 1 in every fibre. Once the noise of x_t has fallen below that, to 2/3, x_t fixes everything that the
fibres have in common, and the same network gives each fibre its own distribution of counts, trained by exact
likelihood. `--counts round` is the papers' way, to compare.

    python diffusion.py --detector zn --steps 50           a quarter of an hour on two CPU cores
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
from common import Linear, normalise
from simulator import DETECTORS, Detector

LENGTH = 1000        # steps of the noise
RATIO = 2 / 3        # sqrt((1 - abar) / abar), noise to signal in x_t, where counts are drawn
BRIGHTEST = 4000.0   # photons in a fibre at most: four times the brightest of the open data


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "counts", "variance", "predict"
    parser = common.parser(__doc__, "diffusion", own=own, n=60_000, epochs=12, lr=2e-3, steps=50)
    parser.add_argument("--net", choices=NETWORKS, default="dense",
                        help="our network, or for accelerators the U-Net of [FM] (paper), or that with the 4 "
                             "million parameters of [Comparison] (paper-4m) (default: dense)")
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="get photon counts by drawing them from each fibre's distribution, or by "
                             "rounding log responses (default: sample)")
    parser.add_argument("--variance", choices=("linear", "cosine"), default="linear",
                        help="schedule of the noise variance over the steps (default: linear)")
    parser.add_argument("--predict", choices=WEIGHTS, default="velocity",
                        help="train on the squared error of the noise, of the velocity or of the clean "
                             "response, which weigh the times differently (default: velocity)")
    parser.add_argument("--solver", choices=("ddim", "dpm"), default="ddim",
                        help="sample with DDIM, or with DPM-Solver++(2M), which is of second order and "
                             "needs fewer steps (default: ddim)")
    parser.add_argument("--eta", type=common.number(float, 0, 1), default=0.7, metavar="ETA",
                        help="fresh noise in each step of ddim: 0 none, 1 as much as DDPM (default: 0.7)")
    args = parser.parse_args(argv)
    longest = LENGTH - 1 - end_time(args.counts, args.variance)
    if args.steps > longest:
        parser.error(f"--steps {args.steps}: expected at most {longest}, the times before counts are drawn")
    return args


# -------------------------------------------------------------------------------------------------- objective

def denoising_loss(net, x0, t, c, key, abar):
    """Denoising diffusion for one response x_0 (H, W) of a particle c (C,) at time t of the schedule abar
    (LENGTH,): t = 0 is data with a little noise, t = LENGTH - 1 is noise."""
    noise = jax.random.normal(key, x0.shape)
    x = jnp.sqrt(abar[t]) * x0 + jnp.sqrt(1 - abar[t]) * noise                 # Ho et al. 2020, Eq. 4
    predicted = clean(net(x, t / LENGTH, c), x)
    return jnp.mean((noise_in(x, predicted, abar[t]) - noise)**2)              # [Comparison, Eq. 11]


def clean(maps, x):
    """x^_0 from the maps of the network: linear in x_t, times the probability that a fibre is lit at all."""
    return (maps[0] + maps[1] * x) * jax.nn.sigmoid(maps[2] + maps[3] * x)


def noise_in(x, x0, abar):
    """epsilon^ in x_t, given x^_0."""
    return (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)                      # [Comparison, Eq. 9]


def schedule(variance):
    """abar_t for t = 0 to LENGTH - 1, (LENGTH,): the share of the signal in the variance of x_t."""
    if variance == "linear":
        return np.cumprod(1 - np.linspace(1e-4, 0.02, LENGTH))                 # Ho et al. 2020, section 4
    # Nichol and Dhariwal 2021, Eq. 17
    level = np.cos((np.arange(LENGTH + 1) / LENGTH + 0.008) / 1.008 * np.pi / 2)**2
    return np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))


# Factors that make Eq. 11 the squared error of the velocity sqrt(abar) epsilon - sqrt(1 - abar) x_0 (Salimans
# and Ho 2022) or of x_0. Eq. 11 gives an error of x_0 little weight at the noisiest times, where place and
# brightness of a shower are settled. The default was chosen on validation rows.
WEIGHTS = {"noise": lambda abar: 1, "velocity": lambda abar: 1 / abar, "clean": lambda abar: 1 / abar - 1}


def end_time(how, variance):
    """The t at which counts are drawn; -1, the response itself, where they are rounded. `how` is --counts."""
    abar = schedule(variance)
    return int(np.argmin(np.abs(np.sqrt((1 - abar) / abar) - RATIO))) if how == "sample" else -1


def count_nats(net, counts, x0, t, c, key, abar):
    """-log P(counts | x_t) per fibre of one response (H, W), in nats; counts are drawn from it at the end."""
    x = jnp.sqrt(abar[t]) * x0 + jnp.sqrt(1 - abar[t]) * jax.random.normal(key, x0.shape)
    return jnp.mean(data.count_loss(counts, *count_distribution(net(x, t / LENGTH, c), x)))


def count_distribution(maps, x):
    """Location and scale (H, W) of the distributions of 2 sqrt(n), from x_t and the last three maps."""
    return maps[-3] + maps[-2] * x, data.bounded_scale(maps[-1])


def to_state(counts, how):
    """Photon counts (H, W) -> x_0, in which a Poisson count has a variance of about 1, or as the papers."""
    return 2 * jnp.sqrt(counts) if how == "sample" else jnp.log1p(counts)


def batch_loss(net, counts, c, key, how, variance, predict):
    """Loss of counts (B, H, W) and conditions c (B, C), and its parts."""
    size, counts = len(counts), counts.astype(jnp.float32)
    time_key, noise_key = jax.random.split(key)
    keys, x0 = jax.random.split(noise_key, size), to_state(counts, how)
    abar, end = jnp.asarray(schedule(variance), jnp.float32), end_time(how, variance)
    # half of the batch learns the way back, half the counts at its end, where alone they are drawn
    half, first = (size // 2, end) if how == "sample" else (size, 0)
    u = (jnp.arange(half) + jax.random.uniform(time_key, (half,))) / half      # stratified: less noise
    t = jnp.minimum(first + jnp.floor(u * (LENGTH - first)).astype(int), LENGTH - 1)
    path_losses = jax.vmap(partial(denoising_loss, net, abar=abar))
    path = jnp.mean(WEIGHTS[predict](abar[t]) * path_losses(x0[:half], t, c[:half], keys[:half]))
    if how != "sample":
        return path, {"path": path}
    count_losses = jax.vmap(partial(count_nats, net, t=end, abar=abar))
    nats = count_losses(counts[half:], x0[half:], c=c[half:], key=keys[half:]).mean()
    # 10: gradients of like size, chosen on validation rows
    return path + 10 * nats, {"path": path, "nats per fibre": nats}


# ---------------------------------------------------------------------------------------------------- sampler

def ddim_step(x, x0, now, then, eta, noise):
    """One step from x_t to x_s, s < t, with the predicted x^_0; `now` and `then` are abar_t and abar_s."""
    eta = eta * jnp.sqrt((1 - then) / (1 - now) * (1 - now / then))            # below [Comparison, Eq. 12]
    kept = jnp.sqrt(jnp.maximum(1 - then - eta**2, 0))
    return jnp.sqrt(then) * x0 + kept * noise_in(x, x0, now) + eta * noise     # [Comparison, Eq. 12]


def extrapolations(abar):
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2) is Eq. 12 without noise for x^_0 + r (x^_0 - x^_0 of the
    step before); r of each step (steps,), 0 in the first and in a last one to the response itself."""
    h = np.diff(np.log(abar / np.maximum(1 - abar, 1e-8)) / 2)                 # of log signal-to-noise
    return np.where(abar[1:] < 1, np.append(0, h[1:] / h[:-1] / 2), 0)


def sample(net, c, key, shape, how, variance, steps, solver, eta):
    """Draw one response for each condition c (B, C): photon counts uint16 (B, H, W)."""
    start_key, step_key, count_key = jax.random.split(key, 3)
    end = end_time(how, variance)
    t = LENGTH - 1 - np.round(np.linspace(0, LENGTH - 1 - end, steps + 1)).astype(int)    # noise to the end
    abar = np.append(schedule(variance), 1.0)[t]                               # t = -1 is the response itself
    eta, r = (eta, np.zeros(steps)) if solver == "ddim" else (0, extrapolations(abar))
    maps = lambda x, t: jax.vmap(net, (0, None, 0))(x, t / LENGTH, c)

    def step(carry, row):
        x, before = carry
        t, now, then, r, key = row
        x0 = jnp.clip(jax.vmap(clean)(maps(x, t), x), 0, to_state(BRIGHTEST, how))  # the loss never clips
        noise = jax.random.normal(key, x.shape) if eta else 0
        return (ddim_step(x, x0 + r * (x0 - before), now, then, eta, noise), x0), None

    x = jax.random.normal(start_key, (len(c), *shape))
    rows = t[:-1], abar[:-1], abar[1:], r, jax.random.split(step_key, steps)
    # XLA is slow on loops on a CPU: ten steps unrolled are as fast as fifty and compile sooner
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), rows, unroll=min(steps, 10))
    if how != "sample":
        return data.as_uint16(data.rounded_counts(x))
    location, scale = jax.vmap(count_distribution)(maps(x, end), x)
    return data.as_uint16(data.draw_counts(location, scale, count_key))


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

    def __init__(self, conditions, width, key):
        keys = jax.random.split(key)
        self.first = Linear(data.features(conditions) + 16, width, keys[0])
        self.second = Linear(width, width, keys[1])

    def __call__(self, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        h = jnp.concatenate([data.with_sinusoids(c), jnp.sin(angles), jnp.cos(angles)])
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


NETWORKS = {"paper": lambda detector, *rest: papers.ResponseUNet(*rest),
            "paper-4m": lambda detector, *rest: papers.ResponseUNet(*rest, widths=(64, 88, 112)),
            "dense": partial(Dense, width=256, depth=3, down=6, up=12, hidden=64, embedding=128)}


def make_network(net, how, detector, conditions, key):
    """Four maps are the predicted response, three more the distribution of the counts."""
    return NETWORKS[net](detector, conditions, 7 if how == "sample" else 4, key)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector = DETECTORS[args.detector]
    make = partial(make_network, args.net, args.counts, detector, data.CONDITIONS[args.cond])
    if args.load:
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        times = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        plan = common.plan(args)
        loss = partial(batch_loss, how=args.counts, variance=args.variance, predict=args.predict)
        scaler = data.fit_conditions(dataset.particles[split.train], args.cond)
        arrays = dataset.responses, data.conditions(dataset.particles, scaler)
        net, times = train(make(plan.keys[0]), loss, arrays, split.train, plan)
        net = common.save_model(args.run, args.header, scaler, times, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, shape=detector.shape, how=args.counts, steps=args.steps,
                                      variance=args.variance, solver=args.solver, eta=args.eta))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    cost = common.network_cost(net, detector.shape, (), (len(scaler.mean),))
    return metrics.report(args, draw, scaler, dataset, split, **cost, steps=args.steps, solver=args.solver,
                          eta=args.eta, evaluations=args.steps + (args.counts == "sample"), **times)


if __name__ == "__main__":
    common.run(main)
