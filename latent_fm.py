"""Latent flow matching [FM].

In stage 1 an autoencoder learns to compress a response x of a particle c to a latent z, q(z | x, c), and to
decode it, p(x | z, c). In stage 2 flow matching as in fm.py learns the latents, on a straight line from noise
z_0 at t = 0 to the latent z_1 of a response at t = 1:
    z_t = (1 - t) z_0 + t z_1   (Eq. 3)        L = E || v_theta(z_t, t, c) - (z_1 - z_0) ||^2   (Eq. 4 and 6)
A response costs a few small steps in the latent and one pass of the decoder.

--net dense (ours): the latent is a short vector, photon counts are drawn as in checkerboard.py, and stage 1
minimises -log p(x | z, c) + KL(q(z | x, c) || N(0, 1)), with no weight to tune. The flow also sees the photon
sum of the response; another network learns its distribution, from which a sum is drawn first (totals.py).
--net paper (appendix B): a convolutional autoencoder of log responses, whose latent is a grid with a quarter
of the resolution, and at the reconstruction x'
    L = sum of L_k / || dL_k / dx' ||   over k = autoencoder, perceptual, adversarial                  (Eq. 7)

    python latent_fm.py --detector zn --steps 7                       about nine minutes on two CPU cores
    python latent_fm.py --detector zn --steps 7 --stage 2             the flow again, same autoencoder
    python latent_fm.py --load weights/latent_fm-zn.eqx --generate particles.csv --out responses.h5

Prints both trainings, the score of the autoencoder alone, then every score of metrics.py beside its oracle;
ends with `written: runs/latent_fm-zn/`.
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
from checkerboard import Checkerboard
from common import Linear, UserError, normalise
from simulator import DETECTORS, Detector
from totals import Totals, draw_totals, least_total, sum_nll, with_sum


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "net", "latent", "beta", "flow_epochs"
    parser = common.parser(__doc__, "latent_fm", common.FLAGS, own, n=60_000, epochs=12, lr=2e-3, steps=7)
    parser.add_argument("--net", choices=("dense", "paper"), default="dense",
                        help="networks of both stages, ours or those of the paper (default: dense)")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both",
                        help="train the autoencoder (1), the flow for the autoencoder in --run (2), which "
                             "needs the same flags except --flow-epochs, or both (default: both)")
    parser.add_argument("--flow-epochs", type=common.number(int, 1, 10**6), default=40, metavar="N",
                        help="passes over the training rows in stage 2, where steps are cheap; --epochs "
                             "counts those of stage 1 (default: 40)")
    # with 32 for ZP, W is a quarter higher, since the flow loses the brightness (chosen on validation rows)
    dense = {"zn": 32, "zp": 16}
    parser.add_argument("--latent", type=common.number(int, 1, 1024), metavar="N",
                        default=lambda args: 4 if args.net == "paper" else dense[args.detector],
                        help="length of the latent vector (default: zn 32, zp 16), or with --net paper of "
                             "the vector in each place of the latent grid (default: 4)")
    parser.add_argument("--beta", type=common.number(float, 0), default=0.01, metavar="WEIGHT",
                        help="weight of KL against the squared error with --net paper (default: 0.01)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def elbo(autoencoder, counts, c, key):
    """The negative evidence lower bound (Kingma and Welling 2014) for one response, counts (H, W), of the
    particle c (C,): -log p(x | z, c), to which checkerboard.py adds a like term of the rates alone, and
    KL(q(z | x, c) || N(0, 1)), in nats per fibre."""
    mean, std = gaussian(autoencoder.encode(jnp.log1p(counts), c))             # q(z | x, c) = N(mean, std^2)
    z = mean + std * jax.random.normal(key, mean.shape)
    reconstruction = autoencoder.fibres.loss(autoencoder.decode(z, c), counts)
    return reconstruction, divergence(mean, std) / counts.size


def gaussian(code):
    """Mean and standard deviation of a latent from its code (2, ...), the output of the encoder."""
    return code[0], jnp.exp(jnp.clip(code[1], -8, 4))


def divergence(mean, std):
    """KL(N(mean, std^2) || N(0, 1)), summed over the numbers of a latent."""
    return 0.5 * jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std))


def flow_loss(net, z1, t, c, total, key, weight=1.0):
    """Flow matching for one latent z_1 of the particle c (C,) and the photon sum: t = 0 is noise, t = 1 is
    data. `weight`: how much an error in each number of the latent counts."""
    z0 = jax.random.normal(key, z1.shape)
    z = (1 - t) * z0 + t * z1                                                  # [FM, Eq. 3]
    v = z1 - z0                                                                # [FM, Eq. 4]
    return jnp.mean(weight * (net(z, t, c, total) - v)**2)                     # [FM, Eq. 6]


def autoencoder_loss(net, counts, c, key):
    """Stage 1, ours: loss of counts (B, H, W) and conditions c (B, C), and its parts."""
    keys = jax.random.split(key, len(counts))
    terms = jax.vmap(partial(elbo, net.autoencoder))(counts.astype(jnp.float32), c, keys)
    reconstruction, kl = (term.mean() for term in terms)
    return reconstruction + kl, {"reconstruction": reconstruction, "divergence": kl}


def path_loss(net, codes, total, c, key):
    """Stage 2: loss of codes (B, 2, ...) of standardised latents, photon sums (B,), c (B, C); its parts."""
    size, (time_key, noise_key, latent_key) = len(codes), jax.random.split(key, 3)
    mean, std = jax.vmap(gaussian)(codes.astype(jnp.float32))
    z1 = mean + std * jax.random.normal(latent_key, mean.shape)
    # stratified times: a quieter gradient
    t = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size
    # weights by the precision of the encoder: an error counts most in the numbers that are kept exactly
    precision = 1 / (jnp.mean(std**2, axis=0) + 0.05)
    weight, noise_keys = precision / precision.mean(), jax.random.split(noise_key, size)
    path = jax.vmap(partial(flow_loss, net, weight=weight))(z1, t, c, total, noise_keys).mean()
    if net.totals is None:
        return path, {"path": path}
    nats = jax.vmap(partial(sum_nll, net.totals))(total, c).mean()
    return path + nats, {"path": path, "sum": nats}


def published_loss(net, counts, c, key, beta):
    """Stage 1 of the paper [FM, Eq. 7] for counts (B, H, W), and its parts. Features and critic learn from
    losses of their own."""
    counts = counts.astype(jnp.float32)
    x = jnp.log1p(counts)
    mean, std = jax.vmap(gaussian)(jax.vmap(net.autoencoder.encode)(x, c))
    z = mean + std * jax.random.normal(key, mean.shape)
    made = jax.vmap(net.autoencoder.decode)(z, c)[:, 0]                        # x', (B, H, W)
    again = lambda: papers.unit_gradient(made)                                 # 1 / || dL_k / dx' || / B
    squares = jnp.sum((again() - x)**2, axis=(1, 2))
    perceptual, fooled, own = papers.judge(net.features, net.critic, again, counts)
    # KL has no gradient at x': it is divided by that of the squares, with which it makes L_VAE
    kl = jax.vmap(divergence)(mean, std)
    scaled = kl / (2 * jnp.sqrt(jax.lax.stop_gradient(squares)) + 1e-12)
    parts = {"squares": squares.mean() / x[0].size, "divergence": kl.mean(), "perceptual": perceptual.mean(),
             "fooled": fooled.mean()} | own
    return (squares + perceptual + fooled).sum() + beta * scaled.mean() + sum(own.values()), parts


# ---------------------------------------------------------------------------------------------------- sampler

def integrate(v, z, steps):
    """Follow dz/dt = v(z, t) from noise at t = 0 to data at t = 1 with the slope half a step ahead, from this
    one and the one before (Adams and Bashforth): of second order at Euler's cost. Unrolled: XLA is slow on
    loops on a CPU."""
    h, before = 1 / steps, None
    for t in h * np.arange(steps):
        now = v(z, t)
        slope = now if before is None else 1.5 * now - 0.5 * before
        z, before = z + h * slope, now                                         # [FM, Eq. 5]
    return z


def sample(net, c, key, steps):
    """Draw one response for each condition c (B, C) from a LatentFM: photon counts uint16 (B, H, W)."""
    sum_key, latent_key, count_key = jax.random.split(key, 3)
    total = draw_totals(net.prior.totals, c, sum_key) if net.prior.totals else c[:, 0]       # not looked at
    v = lambda z, t: jax.vmap(net.prior, (0, None, 0, 0))(z, t, c, total)
    z = integrate(v, jax.random.normal(latent_key, (len(c), *net.mean.shape)), steps)
    return decode_counts(net.autoencoder, z * net.std + net.mean, c, count_key)


def decode_counts(autoencoder, z, c, key):
    """Photon counts uint16 (B, H, W) of latents z (B, ...): drawn from each fibre's distribution or, where
    the decoder gives log responses, rounded."""
    decoded = jax.vmap(autoencoder.decode)(z, c)                               # (B, P, hidden), (B, 1, H, W)
    if decoded.ndim == 4:
        return data.as_uint16(data.rounded_counts(decoded[:, 0]))
    return data.as_uint16(jax.vmap(autoencoder.fibres.draw)(decoded, jax.random.split(key, len(z))))


def reconstruct(autoencoder, counts, c, key):
    """Responses (B, H, W) encoded and decoded again, once."""
    latent_key, count_key = jax.random.split(key)
    mean, std = jax.vmap(gaussian)(jax.vmap(autoencoder.encode)(jnp.log1p(counts.astype(jnp.float32)), c))
    return decode_counts(autoencoder, mean + std * jax.random.normal(latent_key, mean.shape), c, count_key)


# --------------------------------------------------------------------------------------------------- training

def make_optimiser(plan, steps):
    """AdamW for the model, and one each for the features and the critic of [FM, Eq. 7], so that the clip of
    one gradient does not depend on the others."""
    part = lambda path, _: path[0].name if path[0].name in ("features", "critic") else "model"
    optimisers = dict.fromkeys(("model", "features", "critic"), common.adamw(plan, steps))
    return optax.partition(optimisers, partial(jax.tree.map_with_path, part))


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


def train(net, loss, arrays, rows, plan):
    """Minimise loss(net, *batch, key) on the given rows of `arrays`, each (N, ...).

    Returns the network of averaged weights and {"train_seconds", "step_seconds"}. Order and noise follow from
    --seed and the number of the step, so that a run continued with --resume ends in the same numbers.
    """
    steps = plan.epochs * (len(rows) // plan.batch_size)
    mesh, optimiser, key = common.batch_mesh(plan.devices), make_optimiser(plan, steps), plan.keys[1]
    step = make_step(loss, optimiser, plan)
    with common.Logbook(plan, len(rows), steps) as book:
        state = common.replicate(book.begin(common.first_state(net, optimiser)), mesh)
        for batch in common.batches(arrays, rows, plan, mesh, book.step):
            state, losses = step((*batch, key, np.int32(book.step)), state)
            book.record(state, losses)
    return state.ema, book.end()


def stage_plans(plan, stage, flow_epochs):
    """The plans of both stages, each with a folder for its state. --stage 2 reads that of stage 1, and
    finishes it if need be. The state of stage 1 does not depend on --flow-epochs, that of stage 2 does on
    --epochs."""
    flags = {name: value for name, value in plan.header["flags"].items() if name != "flow_epochs"}
    first = plan._replace(run=plan.run / "stage1", header=plan.header | {"flags": flags})
    second = plan._replace(run=plan.run / "stage2", epochs=flow_epochs)
    if stage == "2" and not (first.run / "state.eqx").exists():
        raise UserError(f"--stage 2 needs the autoencoder of {first.run}: train stage 1 first, "
                        "with the same flags")
    cut_off = plan.resume and common.saved_after(second.run, first.run)        # else before stage 2 began
    return first._replace(resume=plan.resume or stage == "2"), second._replace(resume=cut_off)


def encode_block(autoencoder, counts, c, key):
    """Codes (B, 2, ...) of responses (B, H, W), for common.in_blocks; nothing is drawn with the key."""
    return jax.vmap(autoencoder.encode)(jnp.log1p(counts.astype(jnp.float32)), c).astype(jnp.float16)


def encode_all(autoencoder, responses, c, rows):
    """Codes (N, 2, ...) in float16 of the latents of all responses, standardised by the mean and the standard
    deviation of the latents of the given rows, their own spread included; and these two."""
    encode = eqx.filter_jit(eqx.Partial(encode_block, autoencoder))
    codes = common.in_blocks(encode, jax.random.key(0), responses, c)
    np.clip(codes[:, 1], -8, 4, out=codes[:, 1])                               # as in `gaussian`
    means, log_stds = codes[rows].astype(np.float32).swapaxes(0, 1)            # (rows, ...) each
    mean, std = means.mean(0), np.sqrt(means.var(0) + np.exp(2 * log_stds).mean(0))
    codes[:, 0] -= mean                                                        # in place: up to a gigabyte
    codes[:, 0] /= std
    codes[:, 1] -= np.log(std)
    return codes, mean, std


# ---------------------------------------------------------------------------------------------------- network
# For ONE example: log response x (H, W), conditions c (C,), latent z, a vector (L,) or a grid (h, w, L), and
# time t (); vmap makes the batch. encode(x, c) gives the mean and the log standard deviation of z, (2, ...);
# decode(z, c) gives features (P, hidden) of the patches or, with --net paper, a log response (1, H, W).

class Block(eqx.Module):
    """Residual block on one vector (width,)."""
    up: Linear
    down: Linear

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.up, self.down = Linear(width, 2 * width, keys[0]), Linear(2 * width, width, keys[1])

    def __call__(self, h):
        return h + self.down(jax.nn.silu(self.up(normalise(h))))


class DenseAutoencoder(eqx.Module):
    """Ours, in two halves made like Dense in fm.py: patches of 4 x 4 fibres shrink to a few numbers each and
    pass, with the light around the possible impact points, residual blocks as one wide vector; in the
    decoder, such a vector returns a few numbers to each patch, which a small network that all patches share
    joins with their vicinity to the impact points. Of the particle both see these points alone: a decoder
    that sees all of it knows the brightness of each training particle, so that the latent does not hold it,
    and an unseen particle gets that of another one."""
    encoder: list
    enter: Linear
    blocks: list
    leave: Linear
    position: jax.Array
    local: Linear
    modulation: Linear
    fibres: Checkerboard
    detector: Detector = eqx.field(static=True)
    size: int = eqx.field(static=True)

    def __init__(self, detector, conditions, latent, key, width=256, depth=2, down=8, up=12, hidden=64,
                 size=4):
        keys, self.detector, self.size = iter(jax.random.split(key, 8 + 2 * depth)), detector, size
        offsets, bumps = data.vicinity(jnp.zeros(conditions), detector, size)
        patches, near = len(bumps), offsets.shape[1] + bumps[0].size
        self.encoder = [Linear(size**2, down, next(keys)),
                        Linear(down * patches + bumps.shape[1], width, next(keys)),
                        [Block(width, next(keys)) for _ in range(depth)],
                        Linear(width, 2 * latent, next(keys))]
        self.enter = Linear(latent, width, next(keys))
        self.blocks = [Block(width, next(keys)) for _ in range(depth)]
        self.leave = Linear(width, up * patches, next(keys))
        self.position = jnp.zeros((patches, hidden))
        self.local = Linear(up + near, hidden, next(keys))
        self.modulation = Linear(width, 2 * hidden, next(keys))
        self.fibres = Checkerboard(hidden, detector.shape, size, next(keys))

    def encode(self, x, c):
        squeeze, enter, blocks, out = self.encoder
        patches, bumps = data.to_patches(x, self.size), data.vicinity(c, self.detector, self.size)[1]
        light = data.impact_light(bumps, patches)
        h = enter(jnp.concatenate([squeeze(patches).ravel(), light]))                              # (width,)
        for block in blocks:
            h = block(h)
        return out(normalise(h)).reshape(2, -1).astype(jnp.float32)                                # (2, L)

    def decode(self, z, c):
        h = self.enter(z)                                                                          # (width,)
        for block in self.blocks:
            h = block(h)
        h = normalise(h)
        near = data.near_impact(c, self.detector, self.size)                                       # (P, 67)
        own = jnp.concatenate([self.leave(h).reshape(len(near), -1), near], axis=1)
        scale, shift = jnp.split(self.modulation(h), 2)
        return (self.local(own) + self.position) * (1 + scale) + shift                           # (P, hidden)


class FlowBlock(eqx.Module):
    """Residual block on one vector (width,), scaled, shifted and gated by embeddings of particle and time."""
    up: Linear
    down: Linear
    particle: Linear
    time: Linear

    def __init__(self, width, particle, time, key):
        keys = jax.random.split(key, 4)
        self.up, self.down = Linear(width, 2 * width, keys[0]), Linear(2 * width, width, keys[1])
        self.particle, self.time = Linear(particle, 3 * width, keys[2]), Linear(time, 3 * width, keys[3])

    def __call__(self, h, particle, time):
        scale, shift, gate = jnp.split(self.particle(particle) + self.time(time), 3)
        return h + gate * self.down(jax.nn.silu(self.up(normalise(h) * (1 + scale) + shift)))


class DenseFlow(eqx.Module):
    """Ours: the velocity (L,) at z (L,) and t for the numbers of `particle`, by residual blocks. Particle and
    time are embedded apart, so that XLA computes what depends on the particle alone once for all steps."""
    particle: list
    time: Linear
    enter: Linear
    blocks: list
    out: Linear

    def __init__(self, seen, latent, key, width=112, depth=3, embedding=192, times=32):
        keys = iter(jax.random.split(key, 5 + depth))
        self.particle = [Linear(n, embedding, next(keys)) for n in (seen, embedding)]
        self.time, self.enter = Linear(16, times, next(keys)), Linear(latent, width, next(keys))
        self.blocks = [FlowBlock(width, embedding, times, next(keys)) for _ in range(depth)]
        self.out = Linear(width, latent, next(keys), scale=0.1)

    def __call__(self, z, t, particle):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        for layer in self.particle:
            particle = jax.nn.silu(layer(particle))
        time = jax.nn.silu(self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])))
        h = self.enter(z)
        for block in self.blocks:
            h = block(h, particle, time)
        return self.out(normalise(h)).astype(jnp.float32)


class Stage1(eqx.Module):
    """What stage 1 trains: the autoencoder and, with --net paper, the networks of its loss."""
    autoencoder: eqx.Module
    features: papers.Features | None
    critic: papers.Critic | None


class Prior(eqx.Module):
    """What stage 2 trains: the flow from N(0, 1) to latents and, but for --net paper, P(S | c)."""
    totals: Totals | None
    flow: eqx.Module
    detector: Detector = eqx.field(static=True)

    def __init__(self, net, detector, conditions, latent, key):
        self.totals, self.detector, (flow_key, sum_key) = None, detector, jax.random.split(key)
        if net == "paper":
            self.flow = papers.UNet(latent, latent, 8, conditions, flow_key)
        else:
            self.flow = DenseFlow(data.feature_count(conditions + 1, detector), latent, flow_key)
            self.totals = Totals(detector, conditions, sum_key)

    def __call__(self, z, t, c, total):
        """The velocity at z and t () for a particle c (C,) and a photon sum ()."""
        if self.totals is None:
            return self.flow(z, t, c)
        return self.flow(z, t, data.features(with_sum(c, total), self.detector))


class LatentFM(eqx.Module):
    """The generative model: the autoencoder without its encoder, mean and standard deviation of the latents,
    and the prior of latents standardised by them."""
    autoencoder: eqx.Module
    mean: jax.Array
    std: jax.Array
    prior: Prior


def make_stage1(net, detector, conditions, latent, key):
    keys = jax.random.split(key, 3)
    if net == "dense":
        return Stage1(DenseAutoencoder(detector, conditions, latent, keys[0]), None, None)
    autoencoder = papers.ConvAutoencoder(detector.shape, latent, keys[0])
    return Stage1(autoencoder, papers.Features(detector.shape, keys[1]), papers.Critic(keys[2]))


def make_latent_fm(net, detector, conditions, latent, key):
    """An untrained LatentFM: the shapes of a checkpoint."""
    shape = (*data.patch_grid(detector.shape, 4), latent) if net == "paper" else (latent,)
    autoencoder = without_encoder(make_stage1(net, detector, conditions, latent, key).autoencoder)
    prior = Prior(net, detector, conditions, latent, key)
    return LatentFM(autoencoder, jnp.zeros(shape), jnp.ones(shape), prior)


def without_encoder(autoencoder):
    """The part of an autoencoder that a checkpoint keeps."""
    if isinstance(autoencoder, papers.ConvAutoencoder):
        return eqx.tree_at(lambda net: (net.down, net.code), autoencoder, (None, None))
    return eqx.tree_at(lambda net: net.encoder, autoencoder, None)


# ------------------------------------------------------------------------------------------------------- main

def train_stages(args, dataset, split, scaler):
    """Train the stages of --stage. Returns the LatentFM, None after stage 1 alone, and what its checkpoint
    keeps of the training: times, and the score of the autoencoder."""
    detector, c = DETECTORS[args.detector], data.conditions(dataset.particles, scaler)
    first, second = stage_plans(common.plan(args), args.stage, args.flow_epochs)
    loss = autoencoder_loss if args.net == "dense" else partial(published_loss, beta=args.beta)
    shapes = args.net, detector, c.shape[1], args.latent
    net, prior = make_stage1(*shapes, first.keys[0]), Prior(*shapes, second.keys[0])
    if args.finetune:                                  # from a new encoder, which learns the decoder's latent
        old = common.load_model(args.finetune, partial(make_latent_fm, *shapes))
        net = Stage1(eqx.combine(old.autoencoder, net.autoencoder), net.features, net.critic)
        prior = old.prior
    net, times = train(net, loss, (dataset.responses, c), split.train, first)
    redraw = eqx.filter_jit(eqx.Partial(reconstruct, net.autoencoder))
    score = metrics.score_reconstruction(args, redraw, scaler, dataset, split)
    found = {"stage1": times, "reconstruction": score}
    if args.stage == "1":
        return None, found
    codes, mean, std = encode_all(net.autoencoder, dataset.responses, c, split.train)
    sums = data.photon_sums(dataset.responses).astype(np.float32)
    if prior.totals:
        prior = eqx.tree_at(lambda net: net.totals.low, prior, least_total(sums[split.train]))
    prior, times = train(prior, path_loss, (codes, sums, c), split.train, second)
    seconds = found["stage1"]["train_seconds"] + times["train_seconds"]
    net = LatentFM(without_encoder(net.autoencoder), jnp.asarray(mean), jnp.asarray(std), prior)
    return net, found | {"stage2": times, "train_seconds": seconds}


def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    detector, conditions = DETECTORS[args.detector], data.CONDITIONS[args.cond]
    make = partial(make_latent_fm, args.net, detector, conditions, args.latent)
    if args.load:
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        found = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        scaler = data.first_scaler(args, dataset.particles[split.train])
        net, found = train_stages(args, dataset, split, scaler)
        if args.stage == "1":
            return found
        net = common.save_model(args.run, args.header, scaler, found, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, steps=args.steps))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    decoder = common.network_cost(net.autoencoder.decode, net.mean.shape, (conditions,))["mflop"]
    flow = common.network_cost(net.prior, net.mean.shape, (), (conditions,), ())["mflop"]
    parameters = common.count_parameters((net.autoencoder, net.prior))
    return metrics.report(args, draw, scaler, dataset, split, common.BATCHES, parameters=parameters,
                          mflop=decoder + args.steps * flow, steps=args.steps,
                          evaluations=args.steps + 1, **found)


if __name__ == "__main__":
    common.run(main)
