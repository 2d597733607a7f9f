"""vqgan.py: codes and their averages, the objectives, both priors and their samplers, the stages, one run."""
import json
import shutil
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import common
import data
import files
import metrics
import papers
import tiny
import vqgan
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "10", "--prior-epochs", "2", "--batch-size", "64", "--steps", "3",
         "--quiet"]
REAL = vqgan.PRIORS


def random_network(make, *args):
    """make(*args, key) with random weights from NumPy: nothing is compiled."""
    rng, shapes = np.random.default_rng(0), eqx.filter_eval_shape(make, *args, KEY)
    fill = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / max(leaf.shape[-1], 1)**0.5, jnp.float32)
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


def uncompiled(make):
    """`make` with a random_network in place of its own weights, whose compilation takes seconds."""
    return lambda *args: random_network(make, *args[:-1])


AUTOENCODER = vqgan.Autoencoder
SMALL = {"gpt": partial(papers.GPT, vqgan.Particle, width=16, depth=2, heads=2),
         "masked": partial(vqgan.Masked, width=16, depth=1, hidden=8, embedding=8)}


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(vqgan, "PRIORS", vqgan.PRIORS | {name: uncompiled(SMALL[name]) for name in SMALL})
        small = partial(vqgan.Decoder, width=32, depth=1, hidden=24, embedding=16)
        patch.setattr(vqgan, "Decoder", small)
        patch.setattr(vqgan, "Autoencoder", uncompiled(AUTOENCODER))
        # each leaf of a tree would be compiled by itself
        patch.setattr(common, "first_state", eqx.filter_jit(common.first_state))
        cast, jitted = common.cast, eqx.filter_jit(common.cast)
        arrays = lambda tree: all(hasattr(leaf, "addressable_data") for leaf in jax.tree.leaves(tree))
        patch.setattr(common, "cast", lambda tree, dtype: (jitted if arrays(tree) else cast)(tree, dtype))
        patch.setattr(vqgan, "SEGMENTS", 1)                                    # each is compiled by itself
        yield


def grid(shape=(12, 12), size=4, codes=512, conditions=14):
    return vqgan.Grid(data.DETECTORS["zn"]._replace(shape=shape), size, codes, conditions)


def counts_like(rows, shape=(12, 12)):
    return jnp.asarray(np.random.default_rng(0).poisson(0.5, (rows, *shape)), jnp.float32)


def units(rows, seed=0):
    return vqgan.unit(jax.random.normal(jax.random.key(seed), (rows, vqgan.DIMENSION)))


def codebook(vectors, counts):
    counts = jnp.asarray(counts, jnp.float32)
    return eqx.tree_at(lambda book: (book.sums, book.counts), vqgan.Codebook(len(vectors), KEY),
                       (vectors * counts[:, None], counts))


# ------------------------------------------------------------------------------------------------------ flags

def test_defaults_of_the_prior():
    """They follow from the prior, and the batch from --batch-size."""
    found = lambda flags: (lambda args: (args.prior_epochs, args.prior_batch))(vqgan.parse(flags.split()))
    assert found("") == (12, 256) and found("--prior gpt-4m") == (1, 64)
    assert found("--prior gpt --batch-size 32") == (1, 32)
    assert found("--prior-epochs 3 --prior-batch 7") == (3, 7)


# ------------------------------------------------------------------------------------------------------ codes

def test_the_nearest_code_replaces_a_vector():
    vectors, h = units(64), 3 * units(300, 1)
    distances = np.square(np.asarray(h)[:, None] / 3 - np.asarray(vectors)).sum(-1)
    np.testing.assert_array_equal(codebook(vectors, np.ones(64)).nearest(h), distances.argmin(1))


def test_the_gradient_goes_straight_through():
    """That of the decoder as if the encoder had made the code, and none of it to the codes; the commitment by
    hand."""
    book, h, towards = codebook(units(5), np.ones(5)), units(7, 1), units(7, 2)

    @jax.jit
    def run(book, h):
        value = lambda book, h: jnp.sum(vqgan.quantise(book, h)[0] * towards)
        slope = jax.grad(lambda h: vqgan.quantise(book, h)[2].sum())(h)
        return vqgan.quantise(book, h), jax.grad(value, (0, 1))(book, h), slope

    (codes, tokens, distance), (to_book, to_h), slope = run(book, h)
    np.testing.assert_allclose(to_h, towards, atol=1e-6)
    assert not np.any(to_book.sums) and not np.any(to_book.counts)
    offset = np.asarray(h) - np.asarray(book.vectors)[tokens]
    np.testing.assert_allclose(codes, h - offset, atol=1e-6)
    np.testing.assert_allclose(distance, np.square(offset).sum(1), atol=1e-6)
    np.testing.assert_allclose(slope, 2 * offset, atol=1e-5)


update = jax.jit(vqgan.update_codebook)


def test_codes_are_moving_averages():
    """A step of k-means with memory, by a loop."""
    counts = np.array([3.0, 1.0, 5.0, 2.0])
    book, h = codebook(units(4), counts), units(50, 1)
    tokens = jax.jit(lambda book, h: book.nearest(h))(book, h)
    found = update(book, h, tokens, KEY)
    for k in range(4):
        mine = np.asarray(h)[np.asarray(tokens) == k]
        total = vqgan.DECAY * np.asarray(book.sums[k]) + (1 - vqgan.DECAY) * mine.sum(0)
        number = vqgan.DECAY * counts[k] + (1 - vqgan.DECAY) * len(mine)
        assert found.counts[k] == pytest.approx(number, rel=1e-5)
        np.testing.assert_allclose(found.vectors[k], total / np.linalg.norm(total), atol=1e-5)


def test_a_dead_code_is_revived_on_a_far_vector():
    """Not on those that lie on their code."""
    book = codebook(units(3), [9.0, 9.0, 1e-3])
    far = vqgan.unit(-book.vectors[:1] - book.vectors[1:2])
    h = jnp.concatenate([jnp.repeat(book.vectors[:2], 50, axis=0), far])
    found = update(book, h, np.repeat([0, 1], [50, 51]), KEY)
    np.testing.assert_allclose(found.vectors[2], far[0], atol=1e-5)
    assert found.counts[2] > vqgan.DEAD and np.allclose(found.vectors[:2], book.vectors[:2], atol=0.2)


@pytest.mark.parametrize("numbers, perplexity, used", [
    ([5, 5, 5, 5], 4, 1), ([8, 0, 0, 0], 1, 0.25), ([2, 2, 0, 4], 2**1.5, 0.75)])
def test_usage(numbers, perplexity, used):
    found = vqgan.usage(jnp.repeat(jnp.arange(4), jnp.array(numbers)), 4)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5) and found["used"] == used


def test_a_collapse_is_printed(capsys):
    vqgan.print_usage("patches", np.zeros((9, 4), np.uint16), 11)
    vqgan.print_usage("patches", np.arange(4), 11)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("COLLAPSED: patches: 9.1 % of 11") and second.startswith("patches: 36.4 %")


# -------------------------------------------------------------------------------------------------- objective

@pytest.mark.parametrize("how, conditions", [("sample", 14), ("round", 0)])
def test_loss_of_stage_1(how, conditions):
    """Reconstruction of checkerboard.py, or squares, and a quarter of the squared distances, per patch; with
    --particle tokens squares and distances of the particle as well."""
    net = random_network(AUTOENCODER, grid(conditions=conditions), 14, how, "vqvae")
    n, c = counts_like(3), np.random.default_rng(1).normal(size=(3, 14)).astype(np.float32)
    run = jax.jit(lambda n, c: vqgan.autoencoder_loss(net, n, c, KEY))
    loss, (parts, quantised) = run(n.astype(np.uint16), c)

    def quantised_by_hand(h, book):
        h, vectors = (np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (h, book.sums))
        tokens = np.square(h[..., None, :] - vectors).sum(-1).argmin(-1)
        return vectors[tokens], tokens, np.square(h - vectors[tokens]).sum(-1)

    codes, tokens, distance = quantised_by_hand(jax.jit(jax.vmap(net.encode))(n, c), net.codebook)
    decoded = jax.jit(jax.vmap(net.decoder))(jnp.asarray(codes), c)
    if how == "sample":
        error = float(np.mean(jax.jit(jax.vmap(net.decoder.fibres.loss))(decoded, n)))
    else:
        error = np.square(decoded - np.log1p(n)).mean()
    expected = (error * n.size + 0.25 * distance.sum()) / (3 * 9)
    assert parts["reconstruction"] == pytest.approx(float(error), rel=1e-3)
    np.testing.assert_array_equal(quantised[0][1], tokens.ravel())
    if not conditions:
        particle = net.particle
        codes, tokens, distance = quantised_by_hand(jax.jit(jax.vmap(particle.encode))(c), particle.codebook)
        again = jax.jit(jax.vmap(particle.decode))(jnp.asarray(codes))
        expected += np.square(again - c).mean() + 0.25 * distance.mean()
        np.testing.assert_array_equal(quantised[1][1], tokens.ravel())
    assert loss == pytest.approx(expected, rel=1e-3)


def test_terms_of_eq_7_have_gradients_of_equal_norm():
    """The gradient at the log responses is the sum of the terms' own, each divided by its norm and the batch,
    however bright an example is; the commitment is divided as the reconstruction."""
    net = random_network(AUTOENCODER, grid(), 14, "round", "vqgan")
    counts = counts_like(3) * jnp.array([1.0, 20.0, 2.0])[:, None, None]
    made = jax.random.normal(KEY, (3, 12, 12))

    def terms(made, counts):
        found, real = (net.features(x)[0] for x in (made, jnp.log1p(counts)))
        perceptual = papers.perceptual_loss([m[None] for m in found], [m[None] for m in real])[0]
        return jnp.stack([jnp.sum((made - jnp.log1p(counts))**2), perceptual, -net.critic(found).mean()])
    own = jax.jit(jax.vmap(jax.jacrev(terms)))(made, counts)                               # (B, 3, H, W)
    norms = jnp.sqrt(jnp.sum(own**2, axis=(2, 3), keepdims=True))
    loss = lambda made, commitment: vqgan.judged_loss(net, made, commitment, counts)[0]
    to_made, to_commitment = jax.jit(jax.grad(loss, (0, 1)))(made, jnp.ones(3))
    np.testing.assert_allclose(to_made, (own / norms).sum(1) / 3, atol=1e-4)
    np.testing.assert_allclose(to_commitment, 1 / norms[:, 0, 0, 0] / 3, rtol=1e-3)


def test_judged_counts_are_rounded():
    with pytest.raises(UserError, match="--counts round"):
        vqgan.main([*FLAGS, "--variant", "vqgan"])


def test_masked_loss_counts_the_next_unknown_tokens(monkeypatch):
    """A prior that is sure of its place, right for even tokens: nats by hand for the number drawn."""
    monkeypatch.setattr(vqgan, "AHEAD", 4)
    order, tokens, seen = vqgan.spread_order((3, 3)), jnp.arange(9), []

    class Plain:
        def __call__(self, tokens, known, places, c):
            seen.append((int(known), np.asarray(places)))
            return 5.0 * jax.nn.one_hot(places // 2 * 2, 9)
    Plain.grid = grid()
    for seed in range(6):
        total, number = vqgan.masked_loss(Plain(), tokens, None, jax.random.key(seed))
        known, places = seen[-1]
        mine = order[known:known + 4]
        assert number == len(mine) and set(mine) <= set(places)
        expected = sum(math.log(math.exp(5) + 8) - 5 * (place % 2 == 0) for place in mine)
        assert total == pytest.approx(expected, rel=1e-5)
    assert len({known for known, _ in seen}) > 2


# ----------------------------------------------------------------------------------------------------- priors

def prior(name, particle="embed"):
    """(a small prior, tokens (4, P), what it is conditioned on for four particles)."""
    embed, rng = particle == "embed", np.random.default_rng(0)
    here = grid(conditions=14 if embed else 0)
    c = rng.normal(size=(4, 14)).astype(np.float32) if embed else rng.integers(0, 512, (4, 2))
    tokens = rng.integers(0, here.codes, (4, math.prod(here.shape)))
    return random_network(SMALL[name], here), jnp.asarray(tokens), jnp.asarray(c)


@pytest.mark.parametrize("particle", ["embed", "tokens"])
def test_cached_logits_equal_those_of_the_whole(particle, monkeypatch):
    """What the sampler draws from, in three segments, is what the network makes of all tokens at once."""
    monkeypatch.setattr(vqgan, "SEGMENTS", 3)
    (net, _, c), seen, draw = prior("gpt", particle), [], vqgan.draw_tokens

    def watched(logits, *rest):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), logits, ordered=True)
        return draw(logits, *rest)
    monkeypatch.setattr(vqgan, "draw_tokens", watched)
    tokens = jax.jit(lambda c: vqgan.generate_gpt(net, c, KEY, 1.0, 0))(c)
    jax.effects_barrier()
    expected = jax.jit(jax.vmap(net))(tokens, c)                               # (B, P, K)
    assert tokens.shape == (4, 9) and len(np.unique(tokens)) > 9
    np.testing.assert_allclose(np.concatenate(seen, axis=1), expected, rtol=1e-3, atol=1e-3)


def operations(jaxpr):
    """Floating-point operations of the products in a jaxpr, those of a scan for each of its steps."""
    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while"                              # how often, nobody knows
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        inner = [part.jaxpr for part in equation.params.values() if hasattr(part, "jaxpr")]
        total += sum(map(operations, inner)) * equation.params.get("length", 1)
    return total


def test_the_cache_makes_time_linear_in_the_tokens():
    """A token of 121 costs what one of 36 does but for the sums over its keys, few in the real network: every
    place is computed once."""
    cached = {}
    for size in (4, 8):
        net, c = random_network(REAL["gpt"], grid((44, 44), size)), jnp.zeros((4, 14))
        tokens = jnp.zeros((4, math.prod(net.grid.shape)), int)
        sample = jax.make_jaxpr(lambda c: vqgan.generate_gpt(net, c, KEY, 1.0, 0))(c)
        whole = operations(jax.make_jaxpr(jax.vmap(net))(tokens, c).jaxpr)
        cached[size] = operations(sample.jaxpr) / tokens.size
        assert cached[size] * tokens.size == pytest.approx(whole, rel=0.1)
    assert cached[8] < cached[4] < 1.2 * cached[8]


@pytest.mark.parametrize("particle", ["embed", "tokens"])
def test_the_transformer_is_causal(particle):
    """A token changes the logits after it and no others; the particle changes all."""
    net, tokens, c = prior("gpt", particle)
    call = jax.jit(lambda tokens, c: net(tokens, c))
    before, after = call(tokens[0], c[0]), call(tokens[0].at[4].set((tokens[0, 4] + 1) % 512), c[0])
    changed = np.any(np.abs(before - after) > 1e-6, axis=1)
    assert not changed[:5].any() and changed[5:].all()
    assert np.any(np.abs(before - call(tokens[0], c[1])) > 1e-6, axis=1).all()


def test_the_masked_prior_sees_what_is_known_alone():
    net, tokens, c = prior("masked")
    order = vqgan.spread_order(net.grid.shape)
    call = jax.jit(lambda tokens: net(tokens, 4, order[4:7], c[0]))
    change = lambda place: tokens[0].at[place].set((tokens[0, place] + 1) % 512)
    before = call(tokens[0])
    assert before.shape == (3, 512)
    np.testing.assert_array_equal(before, call(change(order[4:])))
    assert np.any(before != call(change(order[3])))


@pytest.mark.parametrize("shape", [(11, 11), (14, 8), (6, 6), (1, 1)])
def test_spread_order(shape):
    """Every patch once; the first fifth has no neighbours."""
    order = vqgan.spread_order(shape)
    assert sorted(order) == list(range(math.prod(shape)))
    x, y = np.unravel_index(order[:len(order) // 5], shape)
    apart = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y)) + 99 * np.eye(len(x))
    assert len(x) < 2 or apart.min() >= 2


@pytest.mark.parametrize("number, steps", [(121, 1), (121, 8), (112, 12), (36, 100)])
def test_passes_fill_every_token_once(number, steps):
    stages = vqgan.passes(number, steps)
    assert len(stages) <= steps and all(end > start for start, end in stages)
    assert [place for start, end in stages for place in range(start, end)] == list(range(number))


def test_masked_decoding_draws_what_each_pass_predicts():
    """A prior that predicts how many tokens are known: each token says in which pass it was drawn."""
    class Plain:
        def __call__(self, tokens, known, places, c):
            return 99.0 * jax.nn.one_hot(jnp.full(len(places), known), 512)
    Plain.grid = grid((44, 44))
    run = jax.jit(lambda c: vqgan.generate_masked(Plain(), c, KEY, 4, 1.0, 0))
    found = np.asarray(run(jnp.zeros((4, 14))))
    for start, end in vqgan.passes(121, 4):
        assert (found[:, vqgan.spread_order((11, 11))[start:end]] == start).all()


@pytest.mark.parametrize("name", ["gpt", "masked"])
def test_a_prior_learns_known_frequencies(name):
    """Four tokens, of which the third copies the first and the last depends on the particle: drawn as often
    as they were seen."""
    rng, share = np.random.default_rng(0), np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    tokens = rng.choice(5, (4096, 4), p=share)
    c = rng.choice([-1.0, 1.0], 4096).astype(np.float32)[:, None] * np.ones(14, np.float32)
    tokens[:, 2], tokens[:, 3] = tokens[:, 0], np.where(c[:, 0] > 0, 7, 9)
    plan = common.plan(vqgan.parse(["--lr", "0.01"]))
    optimiser = vqgan.make_optimiser(plan, 300)
    state = common.first_state(jax.jit(partial(SMALL[name], grid((8, 8), codes=12)))(KEY), optimiser)
    step = vqgan.make_step(vqgan.prior_loss, optimiser, plan)
    for number in range(300):
        rows = rng.integers(0, 4096, 256)
        state, losses = step((tokens[rows], c[rows], KEY, np.int32(number)), state)
    generate = {"gpt": vqgan.generate_gpt, "masked": partial(vqgan.generate_masked, steps=4)}[name]
    found = np.asarray(jax.jit(lambda c: generate(state.net, c, KEY, temperature=1.0, top_k=0))(c))
    for place in range(3):
        np.testing.assert_allclose(np.bincount(found[:, place], minlength=5)[:5] / 4096, share, atol=0.05)
    assert (found[:, 2] == found[:, 0]).mean() > 0.9 and (found[:, 3] == tokens[:, 3]).mean() > 0.97
    if name == "gpt":
        assert losses["nats per token"] == pytest.approx(2 * stats.entropy(share) / 4, abs=0.1)


# ---------------------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (1.0, 3), (0.5, 2), (2.0, 999)])
def test_tokens_come_as_often_as_the_logits_say(temperature, top_k):
    """By hand: powers of the probabilities, but for the likeliest ones 0."""
    share = np.array([0.0, 0.45, 0.0, 0.3, 0.15, 0.1, 0.0])
    found = vqgan.draw_tokens(jnp.tile(jnp.log(share), (20_000, 1)), KEY, temperature, top_k)
    expected = share ** (1 / temperature) * (share >= np.sort(share)[-top_k if 0 < top_k < 7 else 0])
    expected *= 20_000 / expected.sum()
    numbers = np.bincount(found, minlength=7)
    assert (numbers[expected == 0] == 0).all()
    assert stats.chisquare(numbers[expected > 0], expected[expected > 0]).pvalue > 0.001


def test_no_temperature_is_the_likeliest():
    logits = jax.random.normal(KEY, (50, 40))
    np.testing.assert_array_equal(vqgan.draw_tokens(logits, KEY, 0.0, 0), logits.argmax(1))


def test_reconstruction_decodes_the_tokens():
    """The tokens of a response, their codes, the decoder, and the rounding of the log response."""
    net = random_network(AUTOENCODER, grid(), 14, "round", "vqvae")
    counts, c = counts_like(3), jnp.ones((3, 14))
    bright = lambda net: net.decoder.dense.head.layers[-1].bias
    net = eqx.tree_at(bright, net, replace_fn=lambda bias: bias + 2)
    found = jax.jit(lambda counts: vqgan.reconstruct(net, counts, c, KEY))(counts.astype(np.uint16))
    tokens = jax.jit(lambda counts: vqgan.encode_block(net, counts, c, KEY))(counts)
    x = jax.jit(jax.vmap(net.decoder))(net.codebook.vectors[tokens], c)
    np.testing.assert_array_equal(found, np.maximum(np.round(np.expm1(x)), 0))
    assert found.dtype == jnp.uint16 and tokens.dtype == jnp.uint16 and found.max() > 3


# --------------------------------------------------------------------------------------------------- training

def test_codebooks_are_averaged_and_not_descended():
    """A step in bf16 leaves them in float32, where the averages of its vectors put them, also in the moving
    average of the network."""
    plan = common.plan(vqgan.parse(["--precision", "bf16", "--lr", "0.1"]))
    net = random_network(AUTOENCODER, grid(conditions=0, codes=16), 14, "round", "vqvae")
    optimiser, books = vqgan.make_optimiser(plan, 10), jax.tree.map(np.asarray, vqgan.codebooks(net))
    h, tokens = np.asarray(units(40)), np.arange(40, dtype=np.int32) % 16

    def loss(net, batch, c, key):
        error = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array)))
        return error, ({"error": error}, [(jnp.asarray(h), jnp.asarray(tokens))] * 2)
    step, state = vqgan.make_step(loss, optimiser, plan), common.first_state(net, optimiser)
    state, _ = step((h, h, KEY, np.int32(3)), state)
    key = jax.random.split(jax.random.fold_in(KEY, 3))[1]
    assert len(books) == 2
    for k, book in enumerate(books):
        expected = update(book, h, tokens, key)
        for found in (vqgan.codebooks(state.net)[k], vqgan.codebooks(state.ema)[k]):
            np.testing.assert_allclose(found.sums, expected.sums, atol=1e-6)
            assert found.sums.dtype == jnp.float32


def test_stage_1_does_not_depend_on_the_prior(tmp_path):
    flags = lambda *more: common.plan(vqgan.parse(["--run", str(tmp_path), *more]))
    (one, second), (two, _) = (vqgan.stage_plans(flags(*more), "both", 3, 5) for more in
                               ((), ("--prior", "gpt", "--prior-epochs", "7", "--prior-batch", "9")))
    assert one == two and one.header["flags"]["epochs"] == 6 and "prior" in second.header["flags"]
    assert (second.epochs, second.batch_size, second.run.name) == (3, 5, "stage2")


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector, size, patches", [
    ("zn", 4, 121), ("zp", 4, 112), ("zn", 8, 36), ("zp", 8, 28)])
@pytest.mark.parametrize("conditions, particle, how, variant, prior, precision", [
    (9, "tokens", "sample", "vqvae", "gpt", "bf16"), (14, "embed", "round", "vqgan", "gpt", "f32"),
    (14, "embed", "sample", "vqvae", "masked", "bf16"), (14, "tokens", "round", "vqvae", "masked", "f32")])
def test_shapes(detector, size, patches, conditions, particle, how, variant, prior, precision):
    detector = data.DETECTORS[detector]
    here = vqgan.Grid(detector, size, 32, conditions if particle == "embed" else 0)
    c, counts = jnp.zeros((4, conditions)), jnp.zeros((4, *detector.shape), jnp.uint16)
    given = c if particle == "embed" else jnp.zeros((4, 2), int)
    first = eqx.filter_eval_shape(AUTOENCODER, here, conditions, how, variant, KEY)
    second = eqx.filter_eval_shape(SMALL[prior], here, KEY)
    tokens = eqx.filter_eval_shape(vqgan.encode_block, first, counts, c, KEY)
    assert tokens.shape == (4, patches)
    for net, *batch, loss in ((first, counts, c, vqgan.autoencoder_loss),
                              (second, tokens, given, vqgan.prior_loss)):
        lowered = lambda net, *batch: loss(common.lower(net, precision), *batch, KEY)
        value, _ = eqx.filter_eval_shape(lowered, net, *batch)
        assert value.shape == () and value.dtype == jnp.float32
    net = eqx.filter_eval_shape(vqgan.VQGAN, first, second)
    sample = partial(vqgan.sample, steps=2, temperature=1.0, top_k=3)
    found = eqx.filter_eval_shape(sample, net, c, KEY)
    assert found.shape == (4, *detector.shape) and found.dtype == jnp.uint16


def test_sizes():
    """As the papers': 512 codes of 8 numbers, a prior of about one or four million parameters."""
    def size(make, *args):
        leaves = jax.tree.leaves(eqx.filter_eval_shape(make, *args, KEY))
        return sum(leaf.size for leaf in leaves if hasattr(leaf, "size"))
    here = grid((44, 44))
    assert [round(size(REAL[name], here) / 1e6, 1) for name in REAL] == pytest.approx([1, 4, 1.5], rel=0.3)
    assert size(vqgan.Decoder.func, here, "sample") < 1.05e6
    assert vqgan.GRIDS[121] == (4, 512) and vqgan.Codebook(512, KEY).vectors.shape == (512, 8)


@pytest.mark.parametrize("conditions", [14, 0])
def test_what_is_conditioned_on_the_particle(conditions):
    """Both stages by default; with its tokens the prior alone."""
    net = random_network(AUTOENCODER, grid(conditions=conditions), 14, "sample", "vqvae")
    x = counts_like(1)[0]
    both = jax.jit(lambda c: (net.encode(x, c), net.decoder(units(9), c)))
    found = zip(both(jnp.zeros(14)), both(jnp.ones(14)))
    assert [np.array_equal(a, b) for a, b in found] == 2 * [conditions == 0]


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    """(folder, metrics.json as a dict, 64 responses) of one short run."""
    folder, made, report = tmp_path_factory.mktemp("vqgan") / "run", [], metrics.report
    with pytest.MonkeyPatch.context() as patch:
        drawn = lambda *args, **result: made.append(draw(*args)) or report(*args, **result)
        patch.setattr(metrics, "report", drawn)
        patch.setattr(common, "network_cost", lambda *args: {"mflop": 1.0})    # compiles all passes once more
        result = vqgan.main([*FLAGS, "--validate", "--run", str(folder)])
    return folder, result, made[0]


def draw(args, draw, scaler, dataset, *rest):
    """64 responses of a run or a loaded model, from what it hands to metrics.report."""
    return np.asarray(draw(data.conditions(dataset.particles[:64], scaler), KEY))


@pytest.fixture
def unscored(monkeypatch):
    """Runs whose result is what they report, the header of their checkpoint and 64 responses."""
    def report(args, *rest, **result):
        return result | {"header": args.header, "made": draw(args, *rest), "sizes": rest[-1]}
    monkeypatch.setattr(metrics, "report", report)
    monkeypatch.setattr(common, "network_cost", lambda *args: {"mflop": 1.0})


def test_a_run(trained):
    folder, result, _ = trained
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 489, "validation": 71} and result["evaluations"] == 3
    assert {path.name for path in folder.iterdir()} == {"model.eqx", "metrics.json", "stage1", "stage2"}
    assert result["validation"]["W"]["value"] > 0
    records = files.read_log(folder / "stage1")
    assert {"reconstruction", "commitment", "perplexity", "used"} <= records[-1].keys()
    assert records[-1]["reconstruction"] < 0.9 * records[0]["reconstruction"]
    score, codes = result["reconstruction"], result["codebook"]
    assert score["R"] == pytest.approx(score["W"] / score["oracle"])
    assert 1 <= codes["perplexity"] <= 512 and 0 < codes["used"] <= 1


def test_saved_and_loaded(trained, tmp_path, unscored):
    """The same responses, flags and scores of the training; other ones with other flags of the sampler."""
    folder, result, made = trained
    load = ["--load", str(folder / "model.eqx"), "--run", str(tmp_path)]
    again = vqgan.main([*load, "--steps", "3"])
    np.testing.assert_array_equal(again["made"], made)
    names = "reconstruction", "codebook", "stage1", "stage2", "parameters", "evaluations"
    assert [again[name] for name in names] == [result[name] for name in names]
    assert again["header"]["flags"] == result["flags"] and again["sizes"] == common.BATCHES
    other = vqgan.main([*load, "--steps", "2", "--temperature", "0", "--top-k", "9"])
    assert [other[name] for name in ("evaluations", "temperature", "top_k")] == [2, 0.0, 9]
    assert not np.array_equal(other["made"], made)


def test_another_prior_on_the_same_autoencoder(trained, tmp_path, unscored):
    """--stage 2 leaves stage 1 as it is; it needs one, with the same flags."""
    folder, result, _ = trained
    first = (folder / "stage1" / "state.eqx").read_bytes()
    flags = [*FLAGS, "--validate", "--stage", "2", "--prior", "gpt", "--prior-epochs", "1"]
    found = vqgan.main([*flags, "--run", str(folder)])
    assert found["evaluations"] == 9 and found["reconstruction"] == result["reconstruction"]
    assert found["made"].shape == (64, 12, 12) and found["header"]["flags"]["prior"] == "gpt"
    assert (folder / "stage1" / "state.eqx").read_bytes() == first
    with pytest.raises(UserError, match="train stage 1 first"):
        vqgan.main([*flags, "--run", str(tmp_path)])
    with pytest.raises(UserError, match="needs the flags of the first run; different: lr"):
        vqgan.main([*flags, "--lr", "0.5", "--run", str(folder)])
    with pytest.raises(UserError, match="--prior-batch 5000: expected 2 to 489, the training rows"):
        vqgan.main([*flags, "--prior-batch", "5000", "--run", str(folder)])


def test_the_papers_model_stage_by_stage(tmp_path, small_detectors, unscored):
    """All that the other runs leave out; combinations are traced above."""
    flags = ("--variant vqgan --counts round --particle tokens --tokens 36 --cond raw --detector zp "
             f"--prior gpt --epochs 1 --prior-epochs 1 --top-k 5 --run {tmp_path}")
    found = vqgan.main([*FLAGS, *flags.split(), "--stage", "1"])
    names = {"stage1", "codebook", "particle codebook", "reconstruction"}
    assert names == found.keys() and not (tmp_path / "model.eqx").exists()
    parts = {"perceptual", "fooled", "features", "critic", "particle"}
    assert parts <= files.read_log(tmp_path / "stage1")[-1].keys()
    result = vqgan.main([*FLAGS, *flags.split(), "--stage", "2"])
    assert result["reconstruction"] == found["reconstruction"] and result["evaluations"] == 4
    assert result["made"].shape == (64, 14, 10) and result["sizes"] == (1, 32, 256, 1024)
    flags = f"--load {tmp_path / 'model.eqx'} --detector zp --top-k 5 --run {tmp_path}"
    np.testing.assert_array_equal(vqgan.main(flags.split())["made"], result["made"])


def test_cost_of_a_prior_of_tokens():
    """Counted as well where nothing but constants goes in: each pass costs as much but for its logits."""
    here = grid(conditions=0)
    first = random_network(AUTOENCODER, here, 14, "sample", "vqvae")
    net = vqgan.VQGAN(first, random_network(SMALL["masked"], here))
    one, two = (vqgan.cost(net, 14, steps) for steps in (1, 2))
    assert (one["evaluations"], two["evaluations"]) == (1, 2) and one["parameters"] == two["parameters"]
    decoder = common.network_cost(net.decoder, (9, 8), (14,))["mflop"]
    assert decoder < one["mflop"] < two["mflop"] < decoder + 2 * (one["mflop"] - decoder)


def test_resume_is_as_uninterrupted(trained, tmp_path, monkeypatch, small_detectors):
    """A kill in the second stage, which needs the first."""
    monkeypatch.setattr(common, "time", tiny.clock())
    for name in ("whole", "cutstage2"):
        shutil.copytree(trained[0] / "stage1", tmp_path / name / "stage1")
    monkeypatch.setattr(metrics, "score_reconstruction", lambda *args: {})
    dataset = data.open_data("zn", 700, quiet=True)
    scaler, split = data.fit_conditions(dataset.particles, "physics"), data.Split(np.arange(489), None, None)
    here = vqgan.Grid(data.DETECTORS["zn"], 4, 512, 14)

    def run(*more):
        args = vqgan.parse([*FLAGS, "--stage", "2", *map(str, more)])
        return vqgan.train_stages(args, here, dataset, split, scaler)[0]

    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("stage2",))
