"""CaloDREAM: flow matching of calorimeter showers in two networks [CaloDREAM].

The energy network draws how an electron of E_inc shares its energy among the layers, as ratios u, one layer
after the other; the shape network draws the voxels x, given them. Both learn a velocity from noise at t = 0
to data at t = 1:
    u_0 = sum_i E_i / (f E_inc),   u_i = E_i / sum_(j >= i) E_j                                    (Eq. 2)
    u_i ~ p(u_i | u_0 ... u_(i-1), E_inc),   x ~ p(x | u, E_inc)                                   (Eq. 4, 9)
    L = E || v_theta((1 - t) e + t x, t) - (x - e) ||^2                                            (Eq. 8)
--latent puts an autoencoder between x and the flow (Eq. 12 to 14). --solver bns follows the velocity with a
solver whose steps are fitted to it, at a fifth of the evaluations (Eq. 15 to 17).

    python calodream.py                                    a small calorimeter, five minutes on two CPU cores
    python calodream.py --set ds2                          CaloChallenge's data set 2, an open stand-in
    python calodream.py --data dataset_2_1.hdf5 --test dataset_2_2.hdf5 --binning binning_dataset_2.xml
    python calodream.py --set ds2 --load weights/calodream-ds2.eqx --generate energies.csv --out showers.hdf5

Prints the trainings, then the scores of shower_metrics.py beside their oracle; ends with `written: runs/...`.
"""
import math
import resource
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import calorimeter
import common
import files
import metrics
import papers
import shower_metrics
import solvers
from calorimeter import CALORIMETERS, Showers
from common import MLP, Linear, UserError
from preprocessing import (Latent, Logits, Ratios, energy_ratios, from_patches, incident, layer_shares, logit,
                           measure_latent, measure_logits, measure_ratios, snap, to_patches)


# ------------------------------------------------------------------------------------------------------ flags

PATCHES = {"ds2": (3, 16, 3), "ds3": (3, 25, 6), "small": (2, 8, 5)}           # for two CPU cores
PUBLISHED = {"ds2": (3, 16, 1), "ds3": (3, 5, 2), "small": (2, 8, 1)}          # [CaloDREAM, Table 2]
LATENT = {"ds2": (3, 1, 1), "ds3": (3, 2, 2), "small": (1, 1, 1)}              # of the published latent
ROWS = {"ds2": 60_000, "ds3": 12_000, "small": 20_000}
FIBRES = "detector", "cond", "split", "axes", "hit", "all_hit", "rows", "min_eta", "events", "finetune"
SHARED = tuple(name for name in common.FLAGS if name not in FIBRES)


def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "latent", "patch", "energy_epochs"
    rows = lambda args: None if args.data else ROWS.get(args.detector, 20_000)
    epochs = lambda args: 20 if args.detector == "small" else 16
    parser = common.parser(__doc__, "calodream", SHARED, own, n=rows, epochs=epochs, batch_size=128, steps=8)
    parser.add_argument("--set", "--detector", dest="detector", choices=CALORIMETERS,
                        default=lambda args: getattr(args.binning, "name", "small"),
                        help="calorimeter: CaloChallenge's data set 2 or 3, or a small one (default: small)")
    parser.add_argument("--binning", type=calorimeter.read_binning, metavar="FILE",
                        default=lambda args: CALORIMETERS[args.detector],
                        help="binning file (XML) of the calorimeter, if it is not that of --set")
    parser.add_argument("--test", type=Path, metavar="FILE", help="showers to score on, with --data")
    parser.add_argument("--net", choices=("vit", "paper"), default="vit",
                        help="networks for two CPU cores or of the published sizes (default: vit)")
    parser.add_argument("--latent", action="store_true", help="flow in the latent of an autoencoder (laViT)")
    parser.add_argument("--patch", type=common.number(int, 1), nargs=3, default=default_patch, metavar="N",
                        help="layers, angular bins and rings of a patch (default: by --set and --net)")
    parser.add_argument("--energy-epochs", type=common.number(int, 1, 10**6), default=20, metavar="N",
                        help="passes over the training rows for the energy network (default: 20)")
    parser.add_argument("--solver", choices=("euler", "midpoint", "rk4", "bns", "bns-global"), default="bns",
                        help="follow the velocity of the shape network with this solver (default: bns)")
    parser.add_argument("--cut", type=common.number(float, 0), default=0.0, metavar="MEV",
                        help="voxels up to this energy count as empty in the scores (default: 0)")
    return parser.parse_args(argv)


def default_patch(args):
    """By --set, --net and --latent."""
    if args.detector not in PATCHES:
        raise UserError(f"--patch: needed for the calorimeter {args.detector}, of shape {args.binning.shape}")
    published = LATENT if args.latent else PUBLISHED
    return (published if args.net == "paper" else PATCHES)[args.detector]


# -------------------------------------------------------------------------------------------------- objective

def flow_loss(velocity, x1, t, key):
    """Flow matching of one example x_1 with velocity(x, t): t = 0 is noise, t = 1 is data."""
    x0 = jax.random.normal(key, x1.shape)
    x = (1 - t) * x0 + t * x1
    return jnp.mean((velocity(x, t) - (x1 - x0))**2)                           # [CaloDREAM, Eq. 8]


def energy_loss(net, u, e, key):
    """Loss of ratios u (B, Z), standardised logits, for E_inc as e (B, 1). One network gives all velocities,
    [Eq. 10]; each layer has a time of its own."""
    time_key, noise_key = jax.random.split(key)
    context = jax.vmap(net.context)(u, e)                                      # (B, Z, D)
    t = jax.random.uniform(time_key, u.shape)
    loss = flow_loss(lambda x, t: net.velocity(x, t, context), u, t, noise_key)
    return loss, {"energy": loss}


def shape_loss(net, voxels, c, key, space):
    """Loss of voxels (B, Z, A, R), which `space` encodes as x_1 (B, T, P), and conditions c (B, Z + 1)."""
    size, (time_key, noise_key, latent_key) = len(voxels), jax.random.split(key, 3)
    x1 = jax.vmap(space.encode)(voxels, c, jax.random.split(latent_key, size))
    t = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size      # stratified: less noise
    loss = lambda x, c, t, k: flow_loss(lambda x, t: net(x, t, c, space.empty()), x, t, k)
    loss = jax.vmap(loss)(x1, c, t, jax.random.split(noise_key, size)).mean()
    return loss, {"shape": loss}


def autoencoder_loss(net, voxels, c, key):
    """Loss of voxels (B, Z, A, R): Bernoulli likelihood of their shares in the layers, and a small KL."""
    shares = jax.vmap(layer_shares)(voxels)
    mean, log_std = jax.vmap(net.encode)(shares, c)
    r = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    logits = jax.vmap(net.decode)(r, c)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, shares).mean()            # [Eq. 12]
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std)
    return cross_entropy + 1e-6 * kl, {"cross entropy": cross_entropy, "KL": kl}


# ---------------------------------------------------------------------------------------------------- sampler

ENERGY_STEPS = 8           # of RK4, for each ratio


def sample_energies(net, e, key):
    """Draw the ratios u (Z,) of one shower, standardised logits, for E_inc as e (1,): layer by layer, with
    the keys and values of the layers before kept."""
    noise, memory = jax.random.normal(key, (net.layers,)), net.encode(e)
    solver = solvers.runge_kutta("rk4", ENERGY_STEPS)

    def layer(carry, i):
        before, cache = carry
        context, cache = net.next_context(before, i, memory, cache)            # c_i [CaloDREAM, Eq. 9]
        u = snap(solvers.integrate(lambda u, t: net.velocity(u, t, context), noise[i], solver))
        return (u, cache), u

    start = jnp.zeros(()), net.empty_cache()
    return jax.lax.scan(layer, start, jnp.arange(net.layers))[1]


def sample(model, e, key, solver):
    """Draw a shower for each e (B, 1), E_inc as `incident` gives it: voxels (B, Z, A, R) in MeV."""
    energy_key, shape_key = jax.random.split(key)
    keys = jax.random.split(energy_key, len(e))
    u = jax.vmap(partial(sample_energies, model.energy))(e, keys)              # [CaloDREAM, Eq. 4]
    c, x0 = jnp.concatenate([e, u], axis=1), jax.random.normal(shape_key, (len(e), *model.shape.tokens))
    x = solvers.integrate(lambda x, t: jax.vmap(model.velocity, (0, None, 0))(x, t, c), x0, solver)
    return jax.vmap(lambda x, c: model.space.decode(x, c, model.ratios.layers(c)))(x, c)


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


def stage(plan, name, **changes):
    """The plan of one of the networks, with a folder of its own; --resume finishes those that were begun, the
    first one at least."""
    run = plan.run / name
    begun = name == "energy" or (run / "state.eqx").exists()
    return plan._replace(run=run, resume=plan.resume and begun, **changes)


# ---------------------------------------------------------------------------------------------------- network
# For ONE shower; vmap makes the batch.

class Attention(eqx.Module):
    """Multi-head attention of queries x (T, D) over keys and values (M, D), which `pair` makes."""
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width, heads, key):
        keys = jax.random.split(key, 4)
        self.query, self.key, self.value, self.out = (Linear(width, width, k) for k in keys)
        self.heads = heads

    def pair(self, memory):
        return self.key(memory), self.value(memory)

    def __call__(self, x, keys, values, mask=None):
        # the heads in front: as the axis in the middle they cost a CPU three times the time
        heads = lambda h: h.reshape(len(h), self.heads, -1).swapaxes(0, 1)    # (T, D) -> (H, T, D / H)
        q, k, v = heads(self.query(x)), heads(keys), heads(values)
        scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])                 # (H, T, M)
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return self.out((jax.nn.softmax(scores) @ v).swapaxes(0, 1).reshape(x.shape))


class CausalBlock(eqx.Module):
    """Transformer layer with norms after the sums: attention over itself, over a memory (M, D) if there is
    one, and a feed-forward network. `past` are keys and values (T, D) of the tokens so far."""
    own: Attention
    cross: Attention | None
    up: Linear
    down: Linear
    norms: list

    def __init__(self, width, heads, hidden, cross, key):
        keys = jax.random.split(key, 4)
        self.own = Attention(width, heads, keys[0])
        self.cross = Attention(width, heads, keys[1]) if cross else None
        self.up, self.down = Linear(width, hidden, keys[2]), Linear(hidden, width, keys[3])
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(3 if cross else 2)]

    def __call__(self, x, past, mask=None, memory=None):
        first, *second, last = (jax.vmap(norm) for norm in self.norms)
        x = first(x + self.own(x, *past, mask))
        for norm in second:
            x = norm(x + self.cross(x, *self.cross.pair(memory)))
        return last(x + self.down(jax.nn.relu(self.up(x))))


FREQUENCIES = 2 * np.pi * np.random.default_rng(0).normal(size=128).astype(np.float32)          # of the time


def time_features(t, number):
    """Random Fourier features (..., 2 number) of the times t (...)."""
    angles = jnp.asarray(t)[..., None] * FREQUENCIES[:number]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Transfusion(eqx.Module):
    """The energy network: a causal transformer makes a context c_i (D,) of E_inc and the ratios before i
    [CaloDREAM, Eq. 9]; one small network of c_i, t and u_i(t) gives all velocities [Eq. 10]."""
    encoder: list
    decoder: list
    head: MLP
    layers: int = eqx.field(static=True)
    width: int = eqx.field(static=True)

    def __init__(self, layers, key, depth, hidden, head, heads=4):
        self.layers, self.width = layers, -(-(layers + 1) // 64) * 64
        keys = iter(jax.random.split(key, 2 * depth + 1))
        self.encoder, self.decoder = ([CausalBlock(self.width, heads, hidden, cross, next(keys))
                                       for _ in range(depth)] for cross in (False, True))
        self.head = MLP(next(keys), 1 + 64 + self.width, *head, 1)

    def encode(self, e):
        """The memory (1, D) of E_inc as e (1,)."""
        x = jnp.pad(e, (0, self.width - 1))[None]
        for block in self.encoder:
            x = block(x, block.own.pair(x))
        return x

    def tokens(self, before, position):
        """Tokens (..., D) of the ratios before (...) at one-hot positions (..., Z)."""
        x = jnp.concatenate([before[..., None], position], axis=-1)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.width - x.shape[-1])])

    def context(self, u, e):
        """All c_i (Z, D) from the ratios u (Z,)."""
        memory, mask = self.encode(e), np.tri(self.layers, dtype=bool)
        x = self.tokens(jnp.concatenate([jnp.zeros(1), u[:-1]]), jnp.eye(self.layers))
        for block in self.decoder:
            x = block(x, block.own.pair(x), mask, memory)
        return x

    def empty_cache(self):
        return jnp.zeros((len(self.decoder), 2, self.layers, self.width))

    def next_context(self, before, i, memory, cache):
        """c_i (D,) from the ratio before and the cache of earlier tokens' keys and values, and the cache."""
        x = self.tokens(before, jnp.arange(self.layers) == i)[None]
        for k, block in enumerate(self.decoder):
            cache = cache.at[k, :, i].set(jnp.concatenate(block.own.pair(x)))
            x = block(x, cache[k], jnp.arange(self.layers) <= i, memory)
        return x[0], cache

    def velocity(self, u, t, context):
        """Velocities (...) of u (...) at t (...) given contexts (..., D)."""
        time = time_features(jnp.broadcast_to(t, u.shape), 32)
        return self.head(jnp.concatenate([u[..., None], time, context], axis=-1))[..., 0]


def layer_norm(x):
    """Layer normalisation without parameters."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def zero_linear(inputs, outputs):
    """A Linear that starts at 0, so that a block starts as the identity (adaLN-zero)."""
    return jax.tree.map(jnp.zeros_like, Linear(inputs, outputs, jax.random.key(0)))


class ViTBlock(eqx.Module):
    """Block of a vision transformer on tokens (T, D), scaled, shifted and gated by an embedding (D,)."""
    attention: Attention
    up: Linear
    down: Linear
    modulation: Linear

    def __init__(self, width, heads, hidden, key):
        keys = jax.random.split(key, 3)
        self.attention = Attention(width, heads, keys[0])
        self.up, self.down = Linear(width, hidden, keys[1]), Linear(hidden, width, keys[2])
        self.modulation = zero_linear(width, 6 * width)

    def __call__(self, x, e):
        a, b, gate, a2, b2, gate2 = jnp.split(self.modulation(jax.nn.silu(e)), 6)
        h = layer_norm(x) * (1 + a) + b
        x = x + gate * self.attention(h, *self.attention.pair(h))              # [CaloDREAM, Eq. 11]
        h = layer_norm(x) * (1 + a2) + b2
        return x + gate2 * self.down(jax.nn.gelu(self.up(h)))


class ViT(eqx.Module):
    """The shape network: the velocity of patches x (T, P) at t for conditions c (Z + 1,). `maps` = 1 is the
    velocity itself, as published. With 4, which a narrow network needs, the maps predict x_1 and
    v = (x_1 - x_t) / (1 - t): a mean of `empty` (T, P) and of what a lit voxel is, linear in x_t."""
    enter: Linear
    frequencies: jax.Array
    condition: MLP
    time: MLP
    blocks: list
    modulation: Linear
    leave: Linear
    grid: tuple = eqx.field(static=True)
    tokens: tuple = eqx.field(static=True)

    def __init__(self, shape, patch, conditions, key, width, depth, heads, hidden, maps):
        keys = iter(jax.random.split(key, 4 + depth))
        self.grid = tuple(size // p for size, p in zip(shape, patch))
        self.tokens = math.prod(self.grid), math.prod(patch)
        self.enter = Linear(self.tokens[1], width, next(keys))
        self.frequencies = 2 * jnp.pi * jax.random.normal(next(keys), (3, width // 6))
        self.condition = MLP(next(keys), conditions, width, width)
        self.time = MLP(next(keys), 256, width, width)
        self.blocks = [ViTBlock(width, heads, hidden, next(keys)) for _ in range(depth)]
        self.modulation, self.leave = zero_linear(width, 2 * width), zero_linear(width, maps * self.tokens[1])

    def positions(self):
        """Sines and cosines (T, D) of the places of the patches, along each axis."""
        places = jnp.stack([(i / n).ravel() for i, n in zip(np.indices(self.grid), self.grid)], axis=1)
        angles = (places[:, :, None] * self.frequencies).reshape(len(places), -1)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)

    def __call__(self, x, t, c, empty=None):
        e = self.condition(c) + self.time(time_features(t, 128))
        h = self.enter(x) + self.positions()
        for block in self.blocks:
            h = block(h, e)
        scale, shift = jnp.split(self.modulation(jax.nn.silu(e)), 2)
        maps = self.leave(layer_norm(h) * (1 + scale) + shift).reshape(len(x), -1, x.shape[1])  # (T, maps, P)
        maps = maps.astype(jnp.float32)
        if maps.shape[1] == 1:
            return maps[:, 0]
        lit = jax.nn.sigmoid(maps[:, 2] + maps[:, 3] * x)
        x1 = empty + (maps[:, 0] + maps[:, 1] * x - empty) * lit
        return (x1 - x) / jnp.maximum(1 - t, 0.05)


class PatchAutoencoder(eqx.Module):
    """Ours: every patch of the shares has a latent of its own, (T, L); one network for all patches, told
    apart by embeddings of their places, and conditioned on c."""
    enter: Linear
    code: Linear
    condition: Linear
    place: jax.Array
    latent: Linear
    leave: Linear
    shape: tuple = eqx.field(static=True)
    patch: tuple = eqx.field(static=True)

    def __init__(self, shape, patch, conditions, key, width=256, reduction=2.5):
        keys, size = jax.random.split(key, 6), math.prod(patch)
        latent = max(1, round(size / reduction))                               # F of [CaloDREAM, 3.3]
        self.shape, self.patch = shape, patch
        self.enter, self.code = Linear(size, width, keys[0]), Linear(width, 2 * latent, keys[1])
        self.condition = Linear(conditions, 2 * width, keys[2])
        self.place = 0.1 * jax.random.normal(keys[3], (math.prod(shape) // size, 2 * width))
        self.latent, self.leave = Linear(latent, width, keys[4]), Linear(width, size, keys[5])

    def latent_shape(self):
        """Shape (z, a, r) of the latent, and that of a patch, one token of the flow."""
        grid = tuple(size // p for size, p in zip(self.shape, self.patch))
        length = self.latent.weight.shape[1]
        return (*grid[:2], grid[2] * length), (1, 1, length)

    def encode(self, shares, c):
        """Means and log standard deviations (T, L) of the latent."""
        given = jnp.split(self.place + self.condition(c), 2, axis=1)[0]
        x = to_patches(logit(shares) / 4, self.patch)
        mean, log_std = jnp.split(self.code(jax.nn.silu(self.enter(x) + given)), 2, axis=1)
        return mean, jnp.clip(log_std - 2, -8, 4)

    def decode(self, r, c):
        """Logits (Z, A, R) of the shares."""
        given = jnp.split(self.place + self.condition(c), 2, axis=1)[1]
        return from_patches(self.leave(jax.nn.silu(self.latent(r) + given)), self.patch, self.shape)


class CaloDREAM(eqx.Module):
    """The generative model, with the bespoke solver of BNS_STEPS evaluations."""
    energy: Transfusion
    shape: ViT
    ratios: Ratios
    space: Logits | Latent
    solver: solvers.Solver

    def velocity(self, x, t, c):
        """Of x (T, P) at t for the condition c (Z + 1,)."""
        return self.shape(x, t, c, self.space.empty())


ENERGY_BATCH = 256         # showers per step of the energy network
BNS_STEPS = 8              # evaluations of the solver that a checkpoint brings

# Sizes for two CPU cores, and those of [CaloDREAM, Table 1 and 2]
ENERGY = {"vit": dict(depth=2, hidden=128, head=(128,) * 3),
          "paper": dict(depth=4, hidden=1024, head=(256,) * 7)}
SHAPE = {"vit": dict(width=96, depth=4, heads=4, hidden=192),
         "paper": dict(width=480, depth=6, heads=6, hidden=1920),
         "paper ds3": dict(width=240, depth=6, heads=6, hidden=720),
         "paper latent": dict(width=240, depth=10, heads=6, hidden=960)}


def make_model(net, name, shape, patch, latent, key):
    """An untrained CaloDREAM for showers of `shape`."""
    layers, keys = shape[0], jax.random.split(key, 3)
    sizes = SHAPE.get(f"{net} {'latent' if latent else name}", SHAPE[net])
    if latent:
        Autoencoder = papers.ShowerAutoencoder if net == "paper" else PatchAutoencoder
        autoencoder = Autoencoder(shape, patch, layers + 1, keys[2])
        grid, patch = autoencoder.latent_shape()
        if any(size % p for size, p in zip(grid, patch)):
            raise UserError(f"--patch: expected divisors of the latent's {grid}, not {patch}")
    else:
        grid, space = shape, Logits(jnp.zeros(shape), jnp.ones(shape), patch)
    maps = 1 if latent or net == "paper" else 4
    flow = ViT(grid, patch, layers + 1, keys[1], maps=maps, **sizes)
    if latent:
        space = Latent(autoencoder, jnp.zeros(flow.tokens), jnp.ones(flow.tokens))
    energy, ratios = Transfusion(layers, keys[0], **ENERGY[net]), Ratios(jnp.zeros(layers), jnp.ones(layers))
    return CaloDREAM(energy, flow, ratios, space, solvers.runge_kutta("euler", BNS_STEPS))


# ------------------------------------------------------------------------------------------------------- main

def open_training(args):
    """Showers to train on, with the split of their rows, (train, validation)."""
    if args.data:
        showers = calorimeter.load_showers(args.data, args.binning, args.n)
    else:
        showers = calorimeter.open_showers(args.binning, args.n, args.seed, args.quiet)
    rows = np.split(np.random.default_rng([args.seed, 90]).permutation(len(showers.energies)),
                    [int(0.9 * len(showers.energies))])
    if len(rows[0]) < args.batch_size:
        raise UserError(f"--batch-size {args.batch_size}: there are {len(rows[0])} training rows")
    return showers, rows


def open_test(args):
    """Showers to score on: those of --test, fresh ones of the stand-in, or the validation rows."""
    if args.validate or (args.data and not args.test):
        showers, (_, rows) = open_training(args)
        test = Showers(*(array[np.sort(rows)] for array in showers))
    elif args.test:
        test = calorimeter.load_showers(args.test, args.binning)
    else:
        test = calorimeter.open_showers(args.binning, max(args.n // 5, 20), args.seed + 1, args.quiet)
    if len(test.energies) < 20:
        raise UserError(f"expected at least 20 showers to score, not {len(test.energies)}")
    return test


def train_model(args, model, showers, rows):
    """Train the networks of an untrained CaloDREAM, one after the other. Returns it and what its checkpoint
    keeps: times, and the error of the autoencoder."""
    plan, found = common.plan(args), {}
    logits = energy_ratios(showers)
    ratios = measure_ratios(logits[rows])
    e, u = incident(showers.energies), np.array(ratios.standardise(logits))
    c = np.concatenate([e, u], axis=1)
    arrays = showers.voxels, c
    batch = min(len(rows), ENERGY_BATCH) // args.devices * args.devices
    energy, found["energy"] = train(model.energy, energy_loss, (u, e), rows,
                                    stage(plan, "energy", epochs=args.energy_epochs, batch_size=batch))
    if args.latent:
        net, found["autoencoder"] = train(model.space.autoencoder, autoencoder_loss, arrays, rows,
                                          stage(plan, "autoencoder"))
        some = rows[:2048]
        space = measure_latent(net, showers.voxels[some], c[some], jax.random.key(args.seed))
    else:
        space = measure_logits(showers.voxels, rows, model.space.patch)
    model = eqx.tree_at(lambda m: (m.energy, m.ratios, m.space), model, (energy, ratios, space))
    loss = partial(shape_loss, space=space)
    net, found["shape"] = train(model.shape, loss, arrays, rows, stage(plan, "shape"))
    model = eqx.tree_at(lambda m: m.shape, model, net)
    model = eqx.tree_at(lambda m: m.solver, model, bespoke(model, BNS_STEPS, "bns", args.seed))
    seconds = sum(part["train_seconds"] for part in found.values())
    return model, found | {"train_seconds": seconds, "rows": {"train": len(rows)}}


def bespoke(model, steps, how, seed, number=128):
    """A bespoke Solver, fitted on electrons of random energies: no data are needed."""
    energy_key, u_key, key = jax.random.split(jax.random.key(seed), 3)
    number = min(number, max(16, 10**6 // math.prod(model.shape.tokens)))      # of a million voxels at most
    e = jax.random.uniform(energy_key, (number, 1))
    draw = eqx.filter_jit(jax.vmap(partial(sample_energies, model.energy)))
    c = jnp.concatenate([e, draw(e, jax.random.split(u_key, number))], axis=1)
    x0 = jax.random.normal(key, (number, *model.shape.tokens))
    return solvers.fit(jax.vmap(model.velocity, (0, None, 0)), x0, c, steps, how)


def choose_solver(args, model):
    """The Solver of --solver and --steps: a Runge-Kutta method, the checkpoint's, or a newly fitted one."""
    if args.solver in solvers.METHODS:
        return solvers.runge_kutta(args.solver, args.steps)
    if args.solver == "bns" and args.steps == BNS_STEPS:
        return model.solver
    return bespoke(model, args.steps, args.solver, args.seed)


def generate_showers(draw, energies, key):
    """Showers for the incident energies (N,), MeV."""
    return Showers(energies, common.in_blocks(draw, key, incident(energies)))


def reconstruct(model, showers, key):
    """Showers encoded to the latent and decoded again, with the energies of their own layers."""
    def one(voxels, c, key):
        return model.space.decode(model.space.encode(voxels, c, key), c, voxels.sum((1, 2)))

    again = eqx.filter_jit(lambda voxels, c, key: jax.vmap(one)(voxels, c, jax.random.split(key, len(c))))
    c = np.hstack([incident(showers.energies), model.ratios.standardise(energy_ratios(showers))])
    return showers._replace(voxels=common.in_blocks(again, key, showers.voxels, c))


def generate_file(args, draw):
    """--generate: write showers of a list of energies in the format of the challenge, all or none."""
    energies, key = calorimeter.read_energies(args.generate), jax.random.key(args.seed)
    size = 8 * common.BLOCK
    starts = common.progress(range(0, len(energies), size), "generating", args.quiet)
    blocks = (generate_showers(draw, energies[k:k + size], jax.random.fold_in(key, k)) for k in starts)
    calorimeter.save_showers(args.out, args.binning, len(energies), blocks)
    print(f"{len(energies)} showers -> {args.out}")
    return {"rows": len(energies), "out": str(args.out)}


def report(args, model, draw, solver, test, found):
    """Time and score the sampler: print the table, draw the pictures, write metrics.json and return it."""
    cost = common.network_cost(model.velocity, model.shape.tokens, (), (1 + model.energy.layers,))
    parameters = {name: common.count_parameters(getattr(model, name)) for name in ("energy", "shape")}
    result = {**metrics.origin(args), **found, "rows": found["rows"] | {"test": len(test.energies)},
              "parameters": parameters, "mflop": cost["mflop"], "solver": args.solver,
              "evaluations": len(solver.times),
              **common.time_sampler(draw, 1, (1, 100), repeats=3)}
    print(f"{parameters} parameters, {len(solver.times)} evaluations of {cost['mflop']:.1f} MFLOP each; "
          f"ms per shower: {result['ms_per_response']}")
    made = generate_showers(draw, test.energies, jax.random.key(args.seed + 1))
    again = None
    if not args.data:
        again = Showers(test.energies, calorimeter.simulate(args.binning, test.energies, 1000 + args.seed))
    evaluate = lambda made: shower_metrics.evaluate(test, made, args.binning, again, args.cut, args.seed)
    if args.latent:
        result["reconstruction"] = evaluate(reconstruct(model, test, jax.random.key(args.seed)))
        shower_metrics.print_table(result["reconstruction"], f"{args.detector}, reconstruction")
    scores = evaluate(made)
    shower_metrics.print_table(scores, f"{args.detector}, {args.solver}, {len(solver.times)} evaluations")
    shower_metrics.plot_showers(args.run, test, made, args.binning, scores)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024         # kB on Linux
    result |= {"scores": scores, "peak_memory_mb": memory}
    metrics.plot_logs(args.run)
    files.write_json(args.run / "metrics.json", result)
    print(f"written: {args.run}/")
    return result


def maker(args):
    """make(key) of an untrained model. UserError if the patches do not fit."""
    shape, patch = args.binning.shape, tuple(args.patch)
    if any(size % p for size, p in zip(shape, patch)) and not (args.latent and args.net == "paper"):
        raise UserError(f"--patch {patch}: expected divisors of the calorimeter's {shape}")
    return partial(make_model, args.net, args.detector, shape, patch, args.latent)


def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    make, test = maker(args), None if args.generate else open_test(args)
    if args.load:
        model, found = common.load_model(args.load, make), args.header["scores"]
    else:
        showers, (rows, _) = open_training(args)
        model, found = train_model(args, make(common.plan(args).keys[0]), showers, rows)
        model = common.save_model(args.run, args.header, args.binning, found, model)
    solver = choose_solver(args, model)
    draw = eqx.filter_jit(eqx.Partial(sample, model, solver=solver))
    if args.generate:
        return generate_file(args, draw)
    return report(args, model, draw, solver, test, found)


if __name__ == "__main__":
    common.run(main)
