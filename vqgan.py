"""Vector quantisation with a learned prior [Comparison], [Poster], [FM, appendix C].

Stage 1 is an autoencoder whose latent is a grid of tokens. An encoder E makes a vector of each patch of 4 x 4
fibres, the nearest of 512 code vectors z replaces it, and a decoder makes the response x of the codes:
    z_q = argmin_z || E(x) - z ||                                 [Comparison, Eq. 5]
    L = -log p(x | z_q) + beta || E(x) - sg(z_q) ||^2             [Comparison, Eq. 6]
The code vectors are moving averages of the vectors that they replace. Stage 2 is a prior of the tokens
t_1 ... t_T of a particle c: a transformer (--prior gpt), which draws one after the other,
    L = -sum_i log p(t_i | t_1 ... t_(i-1), c)
or ours (--prior masked), which draws many at once, as MaskGIT (Chang et al. 2022), but in a fixed order of
patches that lie far apart, so that a pass is a small dense network. The papers use --prior gpt with
--particle tokens, --counts round and the terms of [FM, Eq. 7] (--variant vqgan), [Comparison] --tokens 36.

    python vqgan.py --detector zn                                 both stages, ten minutes on two CPU cores
    python vqgan.py --detector zn --stage 2 --prior gpt           another prior, same autoencoder
    python vqgan.py --load weights/vqgan-zn.eqx --generate particles.csv --out responses.h5

Prints both trainings, the use of the codes, the score of the autoencoder alone, then every score of
metrics.py beside its oracle; ends with `written: runs/vqgan-zn/`.
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
import metrics
import papers
from checkerboard import Checkerboard
from common import MLP, Linear, UserError, normalise
from simulator import DETECTORS, Detector

GRIDS = {121: (4, 512), 36: (8, 256)}   # --tokens: fibres along a patch, codes [FM, appendix C], [Comparison]
DIMENSION = 8                           # of a code vector [FM, appendix C]
BETA = 0.25                             # of Eq. 6 (van den Oord et al. 2017)
DECAY, DEAD = 0.99, 0.05                # of the moving averages; a code with fewer patches per step is dead
AHEAD = 48                              # tokens that the masked prior learns to predict at once


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    own = "variant", "tokens", "counts", "particle", "prior", "prior_epochs", "prior_batch"
    shared = tuple(name for name in common.FLAGS if name != "finetune")        # no encoder, no tokens
    parser = common.parser(__doc__, "vqgan", shared, own, n=60_000, epochs=6, lr=2e-3, steps=8)
    parser.add_argument("--variant", choices=("vqvae", "vqgan"), default="vqvae",
                        help="train the autoencoder by likelihood alone (vqvae) or, with --counts round, "
                             "with perceptual and adversarial terms as well (vqgan) (default: vqvae)")
    parser.add_argument("--tokens", type=int, choices=GRIDS, default=121,
                        help="describe a ZN response by 121 patches of 4 x 4 fibres with 512 codes (ZP: 112 "
                             "patches), or by 36 of 8 x 8 fibres with 256 codes (ZP: 28) (default: 121)")
    parser.add_argument("--counts", choices=("sample", "round"), default="sample",
                        help="get photon counts by drawing them from each fibre's distribution or by "
                             "rounding log1p responses (default: sample)")
    parser.add_argument("--particle", choices=("embed", "tokens"), default="embed",
                        help="condition both stages on the particle's numbers, or the prior alone on two "
                             "tokens of a VQ-VAE of the particle (default: embed)")
    parser.add_argument("--prior", choices=PRIORS, default="masked",
                        help="network of stage 2: masked draws many tokens at once, gpt (1 million "
                             "parameters) and gpt-4m (4 million) one after the other (default: masked)")
    parser.add_argument("--stage", choices=("1", "2", "both"), default="both",
                        help="train the autoencoder (1), the prior for the autoencoder in --run (2), which "
                             "needs the same flags except those of the prior, or both (default: both)")
    parser.add_argument("--prior-epochs", type=common.number(int, 1, 10**6), metavar="N",
                        default=lambda args: 12 if args.prior == "masked" else 1,
                        help="passes over the training rows in stage 2 (default: masked 12, gpt 1)")
    parser.add_argument("--prior-batch", type=common.number(int, 1, 10**7), metavar="ROWS",
                        default=lambda args: min(256 if args.prior == "masked" else 64, args.batch_size),
                        help="responses per training step in stage 2 (default: masked 256, gpt 64, at most "
                             "--batch-size)")
    parser.add_argument("--temperature", type=common.number(float, 0, 100), default=1.0, metavar="T",
                        help="divide the logits of the tokens by T; 0 takes the likeliest (default: 1)")
    parser.add_argument("--top-k", type=common.number(int, 0), default=0, metavar="K",
                        help="draw among the K likeliest tokens only; 0 draws among all (default: 0)")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------------- objective

def vq_loss(net, counts, c):
    """VQ-VAE for one response, counts (H, W), of a particle c (C,): reconstruction and commitment, the two
    terms of the loss in nats, and what is decoded, encoder's vectors (P, D) and tokens (P,)."""
    h = unit(net.encode(counts, c))
    codes, tokens, distance = quantise(net.codebook, h)                        # [Comparison, Eq. 5]
    decoded = net.decoder(codes, c)
    reconstruction = reconstruction_loss(net.decoder, decoded, counts)
    return (reconstruction, BETA * jnp.sum(distance)), decoded, h, tokens      # [Comparison, Eq. 6]


def quantise(codebook, h):
    """Code vectors z_q (..., D) of vectors h (..., D), their tokens (...) and || h - sg(z_q) ||^2 (...)."""
    tokens = codebook.nearest(jax.lax.stop_gradient(h))
    z = jax.lax.stop_gradient(codebook.vectors)[tokens]
    straight_through = h + jax.lax.stop_gradient(z - h)                        # gradient of z_q: that of h
    return straight_through, tokens, jnp.sum(jnp.square(h - z), axis=-1)


def unit(h):
    """Vectors of length 1 on the last axis, for codes compared by their angle [Comparison]."""
    return h * jax.lax.rsqrt(jnp.sum(h**2, axis=-1, keepdims=True) + 1e-12)


def reconstruction_loss(decoder, decoded, counts):
    """-log p(counts | z_q) of one response; with --counts round squared errors of the log response."""
    if decoder.fibres is None:
        return jnp.sum(jnp.square(decoded - jnp.log1p(counts)))
    return decoder.fibres.loss(decoded, counts) * counts.size


def update_codebook(codebook, h, tokens, key):
    """A step of the moving averages, with vectors h (N, D) of a batch and their tokens (N,). A dead code is
    revived on one of these vectors, drawn by the squared distance from its own code (as in k-means++)."""
    assigned = jnp.zeros_like(codebook.counts).at[tokens].add(1.0)
    counts = DECAY * codebook.counts + (1 - DECAY) * assigned
    sums = DECAY * codebook.sums + (1 - DECAY) * jnp.zeros_like(codebook.sums).at[tokens].add(h)
    dead, revived = counts < DEAD, 1.1 * DEAD            # dead again after 10 steps without a patch
    distance = jnp.cumsum(jnp.sum(jnp.square(h - codebook.vectors[tokens]), axis=1) + 1e-9)
    chosen = jnp.searchsorted(distance, distance[-1] * jax.random.uniform(key, counts.shape))
    sums = jnp.where(dead[:, None], revived * h[jnp.minimum(chosen, len(h) - 1)], sums)
    return eqx.tree_at(lambda book: (book.sums, book.counts), codebook,
                       (sums, jnp.where(dead, revived, counts)))


def usage(tokens, codes):
    """Perplexity of tokens (...), and the share of the codes that occur among them."""
    share = jnp.bincount(tokens.ravel(), length=codes) / tokens.size
    return {"perplexity": jnp.exp(jnp.sum(jax.scipy.special.entr(share))), "used": jnp.mean(share > 0)}


def judged_loss(net, made, commitment, counts):
    """[FM, Eq. 7] for log responses `made` (B, H, W) of counts, and its parts: each term over the norm of its
    gradient. Features and critic learn from losses of their own."""
    reconstruction = jax.vmap(partial(reconstruction_loss, net.decoder))
    again = lambda: papers.unit_gradient(made)                                 # 1 / || dL_k / dx' || / B
    perceptual, fooled, own = papers.judge(net.features, net.critic, again, counts)
    terms = reconstruction(again(), counts) + perceptual + fooled
    # the commitment has no gradient at x': it is divided by that of the reconstruction, as both make Eq. 6
    slope = jax.grad(lambda made: reconstruction(made, counts).sum())(jax.lax.stop_gradient(made))
    scaled = commitment / (jnp.sqrt(jnp.sum(slope**2, axis=(1, 2))) + 1e-12)
    parts = {"perceptual": perceptual.mean(), "fooled": fooled.mean()} | own
    return terms.sum() + scaled.mean() + sum(own.values()), parts


def autoencoder_loss(net, counts, c, key):
    """Stage 1: loss of counts (B, H, W) and conditions c (B, C), and (its parts, the vectors (N, D) and
    tokens (N,) of each of `codebooks`)."""
    counts = counts.astype(jnp.float32)
    (reconstruction, commitment), decoded, h, tokens = jax.vmap(partial(vq_loss, net))(counts, c)
    patches = tokens.shape[1]
    parts = {"reconstruction": reconstruction.mean() / counts[0].size,
             "commitment": commitment.mean() / patches} | usage(tokens, len(net.codebook.counts))
    loss, quantised = jnp.mean(reconstruction + commitment) / patches, [(h, tokens)]
    if net.critic is not None:
        loss, judged = judged_loss(net, decoded, commitment, counts)
        parts |= judged
    if net.particle is not None:
        h = unit(jax.vmap(net.particle.encode)(c))
        codes, tokens, distance = quantise(net.particle.codebook, h)
        parts["particle"] = jnp.mean(jnp.square(jax.vmap(net.particle.decode)(codes) - c))
        loss += parts["particle"] + BETA * distance.mean()                     # [Comparison, Eq. 6]
        quantised.append((h, tokens))
    return loss, (parts, [(h.reshape(-1, DIMENSION), tokens.ravel()) for h, tokens in quantised])


def gpt_loss(prior, tokens, c, key):
    """Cross entropy of the next token for one response with tokens (P,): its sum in nats over all tokens, and
    their number."""
    return cross_entropy(prior(tokens, c), tokens).sum(), len(tokens)


def masked_loss(prior, tokens, c, key):
    """The same where a random number of the tokens are known, over the next ones in `spread_order`, at most
    AHEAD."""
    order, ahead = jnp.asarray(spread_order(prior.grid.shape)), min(AHEAD, len(tokens))
    known = jax.random.randint(key, (), 0, len(tokens))
    first = jnp.minimum(known, len(tokens) - ahead)
    places = jax.lax.dynamic_slice(order, (first,), (ahead,))
    unknown = first + jnp.arange(ahead) >= known
    return jnp.sum(unknown * cross_entropy(prior(tokens, known, places, c), tokens[places])), unknown.sum()


def cross_entropy(logits, tokens):
    """-log p of tokens (...) in nats, from logits (..., K)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)


def prior_loss(net, tokens, c, key):
    """Stage 2: loss of tokens (B, P) and what the prior is conditioned on, c (B, ...), and its parts."""
    loss, keys = masked_loss if isinstance(net, Masked) else gpt_loss, jax.random.split(key, len(c))
    nats, number = jax.vmap(partial(loss, net))(tokens.astype(jnp.int32), c, keys)
    nats = nats.sum() / number.sum()
    return nats, ({"nats per token": nats}, [])


# ---------------------------------------------------------------------------------------------------- sampler

def sample(net, c, key, steps, temperature, top_k):
    """Draw one response for each condition c (B, C) from a VQGAN: photon counts uint16 (B, H, W)."""
    token_key, count_key = jax.random.split(key)
    given = c if net.particle is None else jax.vmap(net.particle.tokens)(c)
    generate = partial(generate_masked, steps=steps) if isinstance(net.prior, Masked) else generate_gpt
    tokens = generate(net.prior, given, token_key, temperature=temperature, top_k=top_k)
    return decode_counts(net.decoder, net.codes[tokens], c, count_key)


def decode_counts(decoder, codes, c, key):
    """Photon counts uint16 (B, H, W) of code vectors (B, P, D)."""
    decoded = jax.vmap(decoder)(codes, c)
    if decoder.fibres is None:
        return data.as_uint16(data.rounded_counts(decoded))                    # log responses (B, H, W)
    return data.as_uint16(jax.vmap(decoder.fibres.draw)(decoded, jax.random.split(key, len(c))))


def reconstruct(net, counts, c, key):
    """Responses (B, H, W) encoded and decoded again, once."""
    return decode_counts(net.decoder, net.codebook.vectors[encode_block(net, counts, c, key)], c, key)


def encode_block(net, counts, c, key):
    """Tokens uint16 (B, P) of responses (B, H, W)."""
    return net.codebook.nearest(jax.vmap(net.encode)(counts.astype(jnp.float32), c)).astype(jnp.uint16)


SEGMENTS = 4   # of the loop over the places: the cache grows with each, so that little of it is empty


def generate_gpt(prior, c, key, temperature, top_k):
    """Tokens (B, P), place by place for the whole batch. A cache of keys and values makes the time linear in
    the number of places."""
    particle, added = jax.vmap(prior.prompt)(c)                      # (B, F, width), (B, F - 1 + P, width)
    extend, first = jax.vmap(prior.extend, (0, 0, None)), particle.shape[1] - 1
    caches = jax.vmap(lambda c: prior.caches(first))(c)
    if first:
        caches = extend(particle[:, :first] + added[:, :first], caches, 0)[1]

    def draw_next(carry, item):
        (h, caches), (place, key) = carry, item
        logits, caches = extend(h + added[:, place, None], caches, place)      # (B, 1, K)
        tokens = draw_tokens(logits, key, temperature, top_k)
        return (prior.table[tokens], caches), tokens[:, 0]

    def grow(cache, n):
        keys, values = cache
        return jnp.pad(keys, ((0, 0), (0, 0), (0, n))), jnp.pad(values, ((0, 0), (0, n), (0, 0)))

    h, found, keys = particle[:, first:], [], jax.random.split(key, added.shape[1] - first)
    for part in np.array_split(np.arange(len(keys)), SEGMENTS):
        caches = [grow(cache, len(part)) for cache in caches]
        (h, caches), tokens = jax.lax.scan(draw_next, (h, caches), (first + part, keys[part]))
        found.append(tokens)                                         # (part, B)
    return jnp.concatenate(found).T


def generate_masked(prior, c, key, steps, temperature, top_k):
    """Tokens (B, P) in at most `steps` passes; the tokens of one pass are independent of each other."""
    order = spread_order(prior.grid.shape)
    tokens, stages = jnp.zeros((len(c), len(order)), jnp.int32), passes(len(order), steps)
    for (known, end), key in zip(stages, jax.random.split(key, len(stages))):
        places = order[known:end]
        logits = jax.vmap(lambda tokens, c: prior(tokens, known, places, c))(tokens, c)
        tokens = tokens.at[:, places].set(draw_tokens(logits, key, temperature, top_k))
    return tokens


def passes(number, steps):
    """(known before, known after) of each pass: few tokens first, by a cosine, and no pass without one."""
    share = 1 - np.cos(np.pi / 2 * np.arange(steps + 1) / steps)
    ends = np.unique(np.round(number * share).astype(int))
    return list(zip(ends[:-1], ends[1:]))


def draw_tokens(logits, key, temperature, top_k):
    """Tokens int32 (...) from logits (..., K), by inversion: one random number each, jax.random takes K."""
    logits = logits.astype(jnp.float32) / max(temperature, 1e-4)
    if top_k:
        # the barrier keeps XLA from sorting all logits, which takes 20 times as long
        highest = jax.lax.optimization_barrier(jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0])
        logits = jnp.where(logits < highest[..., -1:], -jnp.inf, logits)
    total = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    u = 1 - jax.random.uniform(key, total[..., :1].shape)            # above 0: no token of probability 0
    return jnp.sum(total < u * total[..., -1:], axis=-1, dtype=jnp.int32)


# --------------------------------------------------------------------------------------------------- training

# same as latent_fm.py: make_optimiser
def make_optimiser(plan, steps):
    """AdamW for the model, and one each for the features and the critic of [FM, Eq. 7], so that the clip of
    one gradient does not depend on the others."""
    part = lambda path, _: path[0].name if path[0].name in ("features", "critic") else "model"
    optimisers = dict.fromkeys(("model", "features", "critic"), common.adamw(plan, steps))
    return optax.partition(optimisers, partial(jax.tree.map_with_path, part))


def codebooks(net):
    """All codebooks of a network: an autoencoder has one or two, a prior none."""
    is_book = lambda node: isinstance(node, Codebook)
    return [node for node in jax.tree.leaves(net, is_leaf=is_book) if is_book(node)]


def make_step(loss, optimiser, plan):
    """step((batch, c, key, number), state) -> (state, losses): gradient, update, moving average, codebooks,
    compiled once. The codebooks are averages: they stay in float32, and no optimiser changes them."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, state):
        batch, c, key, number = batch
        loss_key, code_key = jax.random.split(jax.random.fold_in(key, number))
        lower = lambda net: eqx.tree_at(codebooks, common.lower(net, plan.precision), codebooks(net))
        objective = lambda net: loss(lower(net), batch, c, loss_key)
        gradient, (losses, quantised) = eqx.filter_grad(objective, has_aux=True)(state.net)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser,
                                                    eqx.filter(state.net, eqx.is_inexact_array))
        net = eqx.apply_updates(state.net, updates)
        ema = common.moving_average(state.ema, net, plan.ema, number)
        books = [update_codebook(book, h, tokens, code_key)
                 for book, (h, tokens) in zip(codebooks(state.net), quantised)]
        net, ema = eqx.tree_at(codebooks, net, books), eqx.tree_at(codebooks, ema, books)
        return common.State(net, ema, optimiser_state), losses | {"gradient norm": optax.tree.norm(gradient)}

    return step


def train(net, loss, arrays, rows, plan):
    """Minimise loss(net, *batch, key) on the given rows of `arrays`: responses or tokens (N, ...), and what
    they are conditioned on (N, ...).

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


def stage_plans(plan, stage, epochs, batch_size):
    """The plans of both stages, each with a folder for its state; `epochs` and `batch_size` are those of the
    prior. --stage 2 reads the state of stage 1, which does not depend on the prior's flags, and finishes it
    if need be."""
    flags = {name: value for name, value in plan.header["flags"].items() if not name.startswith("prior")}
    first = plan._replace(run=plan.run / "stage1", header=plan.header | {"flags": flags})
    second = plan._replace(run=plan.run / "stage2", epochs=epochs, batch_size=batch_size)
    if stage == "2" and not (first.run / "state.eqx").exists():
        raise UserError(f"--stage 2 needs the autoencoder of {first.run}: train stage 1 first, "
                        "with the same flags")
    cut_off = plan.resume and common.saved_after(second.run, first.run)        # else before stage 2 began
    return first._replace(resume=plan.resume or stage == "2"), second._replace(resume=cut_off)


# ---------------------------------------------------------------------------------------------------- network
# For ONE example: codes (P, D), tokens (P,), conditions c (C,); vmap makes the batch.

class Grid(NamedTuple):
    """The grid of tokens: patches of size x size fibres, `codes` to choose from, and how many conditions the
    networks see, 0 with --particle tokens."""
    detector: Detector
    size: int
    codes: int
    conditions: int

    @property
    def shape(self):
        """Patches along each side."""
        return data.patch_grid(self.detector.shape, self.size)

    def near(self, c):
        """data.near_impact of each patch, (P, N); N = 0 where the networks do not see the impact points."""
        return data.near_impact(c[:self.conditions], self.detector, self.size)

    @property
    def sizes(self):
        """P and N."""
        return jax.eval_shape(self.near, jnp.zeros(self.conditions)).shape


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


class PatchNetwork(eqx.Module):
    """Ours, made for CPUs like Dense in fm.py: what all patches hold passes residual blocks as one vector,
    which returns a few numbers to each patch. A small network that every patch shares joins these with the
    patch's own input; the vector scales and shifts it."""
    enter: Linear
    blocks: list
    leave: Linear
    position: jax.Array
    local: Linear
    modulation: Linear
    head: MLP

    def __init__(self, inputs, own, outputs, patches, keys, width, depth, hidden, middle, embedding, up=12):
        self.enter = Linear(inputs * patches, width, next(keys))
        self.blocks = [DenseBlock(width, embedding, next(keys)) for _ in range(depth)]
        self.leave, self.position = Linear(width, up * patches, next(keys)), jnp.zeros((patches, hidden))
        self.local = Linear(up + own, hidden, next(keys))
        self.modulation = Linear(width, 2 * hidden, next(keys))
        self.head = MLP(next(keys), hidden, middle, outputs)

    def __call__(self, x, e, own, places=slice(None)):
        """Outputs (M, outputs) at M `places`, from inputs x (P, inputs), an embedding e and what each patch
        has of its own, (P, own)."""
        h = self.enter(x.ravel())                                              # (width,)
        for block in self.blocks:
            h = block(h, e)
        h = normalise(h)
        own = jnp.concatenate([self.leave(h).reshape(len(own), -1), own], axis=1)
        scale, shift = jnp.split(self.modulation(h), 2)
        h = (self.local(own[places]) + self.position[places]) * (1 + scale) + shift
        return self.head(jax.nn.silu(h))                                       # (M, hidden) -> (M, outputs)


class Decoder(eqx.Module):
    """Code vectors (P, D) -> features (P, 64) of the patches, from which `fibres` draws counts, or with
    --counts round the log response (H, W)."""
    embedding: Embedding
    dense: PatchNetwork
    fibres: Checkerboard | None
    grid: Grid = eqx.field(static=True)

    def __init__(self, grid, how, key, width=192, depth=2, hidden=96, embedding=128, features=64):
        keys, (patches, near) = iter(jax.random.split(key, 7 + depth)), grid.sizes
        self.grid, self.embedding = grid, Embedding(grid.detector, grid.conditions, embedding, next(keys))
        outputs = grid.size**2 if how == "round" else features
        self.dense = PatchNetwork(DIMENSION, DIMENSION + near, outputs, patches, keys, width, depth, hidden,
                                  64, embedding)
        shape = grid.detector.shape
        self.fibres = None if how == "round" else Checkerboard(features, shape, grid.size, next(keys))

    def __call__(self, codes, c):
        own = jnp.concatenate([codes, self.grid.near(c)], axis=1)
        h = self.dense(codes, self.embedding(0.0, c[:self.grid.conditions]), own)        # (P, outputs)
        if self.fibres is not None:
            return h
        return data.from_patches(h, self.grid.size, self.grid.detector.shape)[0].astype(jnp.float32)


class Codebook(eqx.Module):
    """K code vectors as moving averages: the sum of the vectors that each replaces in a step, (K, D), and
    their number, (K,). Every code is dead until the first batch."""
    sums: jax.Array
    counts: jax.Array

    def __init__(self, codes, key):
        self.sums, self.counts = jax.random.normal(key, (codes, DIMENSION)), jnp.zeros(codes)

    @property
    def vectors(self):
        """(K, D), of unit length."""
        return unit(self.sums)

    def nearest(self, h):
        """Tokens int32 (...) of vectors h (..., D): the code at the smallest angle."""
        return jnp.argmax(h @ self.vectors.T, axis=-1).astype(jnp.int32)       # [Comparison, Eq. 5]


class Autoencoder(eqx.Module):
    """What stage 1 trains. The encoder is a network that every patch shares; with it may come the VQ-VAE of
    the particle, and what judges a reconstruction with --variant vqgan."""
    encoder: MLP
    codebook: Codebook
    decoder: Decoder
    particle: papers.ParticleVQ | None
    features: papers.Features | None
    critic: papers.Critic | None
    how: str = eqx.field(static=True)

    def __init__(self, grid, conditions, how, variant, key):
        key, *others = jax.random.split(key, 4)
        keys, judged = jax.random.split(key, 3), variant == "vqgan"
        self.decoder, self.codebook = Decoder(grid, how, keys[0]), Codebook(grid.codes, keys[1])
        self.encoder, self.how = MLP(keys[2], grid.size**2 + 1 + grid.sizes[1], 128, 128, DIMENSION), how
        self.particle = None if grid.conditions else papers.ParticleVQ(conditions, Codebook, others[0])
        self.features = papers.Features(grid.detector.shape, others[1]) if judged else None
        self.critic = papers.Critic(others[2]) if judged else None

    def encode(self, counts, c):
        """Counts (H, W) -> vectors (P, D)."""
        grid, x = self.decoder.grid, 0.5 * jnp.log1p(counts) if self.how == "round" else jnp.sqrt(counts)
        light = jnp.log1p(data.to_patches(counts, grid.size).sum(1, keepdims=True))
        h = jnp.concatenate([data.to_patches(x, grid.size), light, grid.near(c)], axis=1)
        return self.encoder(h).astype(jnp.float32)


class Particle(eqx.Module):
    """Vectors (F, width) of what a prior is conditioned on: one of conditions (C,), or one per token (2,)."""
    net: Embedding | jax.Array

    def __init__(self, grid, width, key):
        shape = papers.PARTICLE_TOKENS, papers.PARTICLE_CODES, width
        self.net = (Embedding(grid.detector, grid.conditions, width, key) if grid.conditions
                    else common.normal(key, *shape, scale=0.5))

    def __call__(self, c):
        embed = isinstance(self.net, Embedding)
        return self.net(0.0, c)[None] if embed else self.net[jnp.arange(len(c)), c]


def spread_order(shape):
    """Patches of a grid in an order in which neighbours lie far apart: Bayer's threshold matrix (1973)."""
    matrix = np.zeros((1, 1), int)
    while len(matrix) < max(shape):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return np.argsort(matrix[:shape[0], :shape[1]].ravel())


class Masked(eqx.Module):
    """Ours: logits of unknown tokens at some patches from all known tokens, where the patch lies, and the
    tokens around it."""
    particle: Particle
    table: jax.Array
    dense: PatchNetwork
    grid: Grid = eqx.field(static=True)

    def __init__(self, grid, key, width=192, depth=2, hidden=128, embedding=128, own=8):
        keys, (patches, near) = iter(jax.random.split(key, 8 + depth)), grid.sizes
        self.grid, self.particle = grid, Particle(grid, embedding, next(keys))
        self.table = jax.random.normal(next(keys), (grid.codes + 1, own))      # the last vector: unknown
        self.dense = PatchNetwork(own, near + 9 * own, grid.codes, patches, keys, width, depth, hidden, 128,
                                  embedding)

    def __call__(self, tokens, known, places, c):
        """Logits (M, K) at `places` (M,), with the first `known` () of tokens (P,) in spread_order known."""
        rank, (width, height) = np.argsort(spread_order(self.grid.shape)), self.grid.shape
        vectors = self.table[jnp.where(rank < known, tokens, len(self.table) - 1)]        # (P, own)
        padded = jnp.pad(vectors.reshape(width, height, -1), ((1, 1), (1, 1), (0, 0)))
        around = [padded[i:i + width, j:j + height].reshape(len(tokens), -1)
                  for i in range(3) for j in range(3)]
        own = jnp.concatenate([self.grid.near(c), *around], axis=1)                       # (P, N + 9 own)
        return self.dense(vectors, self.particle(c).mean(0), own, places)


# of about 1, 4 and 1.5 million parameters
PRIORS = {"gpt": partial(papers.GPT, Particle), "gpt-4m": partial(papers.GPT, Particle, width=256),
          "masked": Masked}


class VQGAN(eqx.Module):
    """What a checkpoint keeps of both stages: code vectors (K, D), decoder, VQ-VAE of the particle, prior."""
    codes: jax.Array
    decoder: Decoder
    particle: papers.ParticleVQ | None
    prior: eqx.Module

    def __init__(self, autoencoder, prior):
        self.codes, self.decoder = autoencoder.codebook.vectors, autoencoder.decoder
        self.particle, self.prior = autoencoder.particle, prior


# ------------------------------------------------------------------------------------------------------- main

def train_stages(args, grid, dataset, split, scaler):
    """Train the stages of --stage. Returns the VQGAN, None after stage 1 alone, and what its checkpoint keeps
    of the training: times, use of the codes, and the score of the autoencoder."""
    rows, c = split.train, data.conditions(dataset.particles, scaler)
    if not 2 <= args.prior_batch <= len(rows) or args.prior_batch % args.devices:
        raise UserError(f"--prior-batch {args.prior_batch}: expected 2 to {len(rows)}, the training rows, "
                        "and a multiple of --devices")
    first, second = stage_plans(common.plan(args), args.stage, args.prior_epochs, args.prior_batch)
    net = Autoencoder(grid, c.shape[1], args.counts, args.variant, first.keys[0])
    net, times = train(net, autoencoder_loss, (dataset.responses, c), rows, first)
    encode = eqx.filter_jit(eqx.Partial(encode_block, net))
    tokens, given = common.in_blocks(encode, jax.random.key(0), dataset.responses, c), c
    found = {"stage1": times, "codebook": print_usage("patches", tokens[rows], grid.codes)}
    if net.particle is not None:
        given = np.asarray(eqx.filter_jit(lambda net, c: jax.vmap(net.tokens)(c))(net.particle, c))
        found["particle codebook"] = print_usage("particles", given[rows], papers.PARTICLE_CODES)
    redraw = eqx.filter_jit(eqx.Partial(reconstruct, net))
    found["reconstruction"] = metrics.score_reconstruction(args, redraw, scaler, dataset, split)
    if args.stage == "1":
        return None, found
    prior, times = train(PRIORS[args.prior](grid, second.keys[0]), prior_loss, (tokens, given), rows, second)
    seconds = found["stage1"]["train_seconds"] + times["train_seconds"]
    return VQGAN(net, prior), found | {"stage2": times, "train_seconds": seconds}


def print_usage(name, tokens, codes):
    """The `usage` of the codes over the tokens of all responses, printed, with a warning of a collapse."""
    found = jax.jit(usage, static_argnums=1)(tokens, codes)
    found = {score: float(value) for score, value in found.items()}
    warning = "COLLAPSED: " if found["used"] < 0.1 else ""
    print(f"{warning}{name}: {100 * found['used']:.1f} % of {codes} codes used, "
          f"perplexity {found['perplexity']:.1f}")
    return found


def cost(net, conditions, steps):
    """{"parameters", "mflop", "evaluations"} of a response: all evaluations of the prior, and the decoder."""
    order, c = spread_order(net.decoder.grid.shape), jnp.zeros(conditions)
    tokens = jnp.zeros(len(order), jnp.int32)
    given = c if net.particle is None else jnp.zeros(papers.PARTICLE_TOKENS, jnp.int32)
    stages, calls = order, [eqx.Partial(net.prior, tokens, given)]             # the cache: each place once
    if isinstance(net.prior, Masked):
        stages = passes(len(order), steps)
        calls = [eqx.Partial(net.prior, tokens, known, order[known:end], given) for known, end in stages]
    calls.append(eqx.Partial(net.decoder, jnp.zeros((len(order), DIMENSION)), c))
    mflop = sum(common.network_cost(call)["mflop"] for call in calls)
    return {"parameters": common.count_parameters(net), "mflop": mflop, "evaluations": len(stages)}


def main(argv=None):
    """Train (or load), then score or generate. Returns what metrics.json holds."""
    args = parse(argv)
    if args.variant == "vqgan" and args.counts == "sample":
        raise UserError("--variant vqgan needs --counts round: its features and critic see log responses")
    common.prepare_jax()
    conditions = data.CONDITIONS[args.cond]
    grid = Grid(DETECTORS[args.detector], *GRIDS[args.tokens], conditions if args.particle == "embed" else 0)
    if args.load:
        make = lambda key: VQGAN(Autoencoder(grid, conditions, args.counts, args.variant, key),
                                 PRIORS[args.prior](grid, key))
        net, scaler = common.load_model(args.load, make), data.stored_scaler(args.header)
        found = args.header["scores"]
    if not args.generate:
        dataset, split = data.open_split(args)
    if not args.load:
        scaler = data.fit_conditions(dataset.particles[split.train], args.cond)
        net, found = train_stages(args, grid, dataset, split, scaler)
        if args.stage == "1":
            return found
        net = common.save_model(args.run, args.header, scaler, found, net)
    draw = eqx.filter_jit(eqx.Partial(sample, net, steps=args.steps, temperature=args.temperature,
                                      top_k=args.top_k))
    if args.generate:
        return metrics.generate_file(args, draw, scaler)
    sizes = common.BATCHES if args.prior == "masked" else common.BATCHES[:4]
    return metrics.report(args, draw, scaler, dataset, split, sizes, **cost(net, conditions, args.steps),
                          steps=args.steps, temperature=args.temperature, top_k=args.top_k, **found)


if __name__ == "__main__":
    common.run(main)
