"""vqgan.py: codes and their averages, Eq. 5 to 7, the transformer and its cache, masked decoding, the sampler, every kind of run."""
import json
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
import tiny
import vqgan
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--prior", "gpt", "--n", "700", "--epochs", "1", "--prior-epochs", "1", "--batch-size", "64", "--prior-batch", "64", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        small = {"gpt": lambda *args: vqgan.GPT(*args, width=16, depth=2, heads=2),
                 "masked": lambda *args: vqgan.Masked(*args, width=16, depth=1, hidden=8, embedding=8)}
        patch.setattr(vqgan, "PRIORS", vqgan.PRIORS | small)
        patch.setattr(vqgan, "Decoder", partial(vqgan.Decoder, width=32, depth=1, hidden=24))
        patch.setattr(vqgan, "SEGMENTS", 1)                                    # each compiles the network once more
        yield


def arguments(*flags):
    args = vqgan.flags().parse_args([*FLAGS, *map(str, flags)])
    return common.with_flags(args, stage1_epochs=1, stage1_batch=64, stage="1" if args.stage == "both" else args.stage)


def counts_like(rows, detector="zn", seed=0):
    return jnp.asarray(np.random.default_rng(seed).poisson(0.3, (rows, *data.DETECTORS[detector].shape)), jnp.float32)


def units(rows, seed=0):
    return vqgan.unit(jax.random.normal(jax.random.key(seed), (rows, vqgan.DIMENSION)))


def codebook(vectors, counts):
    return eqx.tree_at(lambda book: (book.sums, book.counts), vqgan.Codebook(len(vectors), KEY),
                       (vectors * counts[:, None], jnp.asarray(counts, jnp.float32)))


# ---------------------------------------------------------------------------------------------------------------- codes

def test_lookup_is_the_nearest():
    vectors, h = units(64), units(300, 1)
    distances = np.square(np.asarray(h)[:, None] - np.asarray(vectors)).sum(-1)
    np.testing.assert_array_equal(vqgan.lookup(vectors, h), distances.argmin(1))


def test_gradient_goes_straight_through():
    """As if the code vector were the encoder's, and none of it to the codes; the commitment by hand."""
    book, h, towards = codebook(units(5), np.ones(5)), units(7, 1), units(7, 2)

    def value(book, h):
        return jnp.sum(vqgan.quantise(book, h)[0] * towards)
    to_book, to_h = eqx.filter_grad(lambda both: value(*both))((book, h))
    np.testing.assert_allclose(to_h, towards, atol=1e-6)
    assert not np.any(to_book.sums) and not np.any(to_book.counts)
    codes, tokens, distance = vqgan.quantise(book, h)
    np.testing.assert_allclose(codes, book.vectors[tokens], atol=1e-6)
    np.testing.assert_allclose(distance, np.square(np.asarray(h) - np.asarray(book.vectors)[tokens]).sum(1), atol=1e-6)
    slope = jax.grad(lambda h: vqgan.quantise(book, h)[2].sum())(h)
    np.testing.assert_allclose(slope, 2 * (h - book.vectors[tokens]), atol=1e-5)


def test_codes_are_moving_averages():
    """A step of k-means with memory, by a loop."""
    counts = np.array([3.0, 1.0, 5.0, 2.0])
    book, h = codebook(units(4), counts), units(50, 1)
    tokens = vqgan.lookup(book.vectors, h)
    found = vqgan.renew(book, h, tokens, KEY)
    for k in range(4):
        mine = np.asarray(h)[np.asarray(tokens) == k]
        total = vqgan.DECAY * np.asarray(book.sums[k]) + (1 - vqgan.DECAY) * mine.sum(0)
        assert found.counts[k] == pytest.approx(vqgan.DECAY * counts[k] + (1 - vqgan.DECAY) * len(mine), rel=1e-5)
        np.testing.assert_allclose(found.vectors[k], total / np.linalg.norm(total), atol=1e-5)


def test_dead_codes_are_put_on_far_vectors():
    """One that nothing falls to goes to a vector of the batch: to the far one, not to those that have their code."""
    book = codebook(units(3), np.array([9.0, 9.0, 1e-3]))
    h = jnp.concatenate([jnp.repeat(book.vectors[:2], 50, axis=0), vqgan.unit(-book.vectors[:1] - book.vectors[1:2])])
    found = vqgan.renew(book, h, vqgan.lookup(book.vectors[:2], h), KEY)
    np.testing.assert_allclose(found.vectors[2], h[-1], atol=1e-5)
    assert found.counts[2] > vqgan.DEAD and np.allclose(found.vectors[:2], book.vectors[:2], atol=0.2)


@pytest.mark.parametrize("fallen, perplexity, used", [([5, 5, 5, 5], 4, 1), ([8, 0, 0, 0], 1, 0.25), ([2, 2, 0, 4], 2**1.5, 0.75)])
def test_usage(fallen, perplexity, used):
    found = vqgan.usage(jnp.array(fallen, jnp.float32))
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5) and found["used"] == used


def test_a_collapse_is_said(capsys):
    vqgan.tell_usage("patches", np.zeros((9, 4), np.uint16), 11)
    vqgan.tell_usage("patches", np.arange(4), 11)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("COLLAPSED: patches: 9.1 % of 11") and second.startswith("patches: 36.4 %")


# ------------------------------------------------------------------------------------------------------------ objective

@pytest.mark.parametrize("counts", ["sample", "round"])
def test_loss_of_the_vqvae(counts):
    """-log p by scipy, or squares, and the commitment times 0.25, per patch."""
    args, x, c = arguments("--counts", counts), counts_like(3), jnp.zeros((3, 14))
    net = vqgan.make_network(args, 14, KEY)
    loss, (parts, fallen) = vqgan.batch_loss(net, x, c, KEY, args)
    h = np.asarray(jax.vmap(net.autoencoder.encode)(x, c))
    vectors = np.asarray(net.autoencoder.codebook.vectors)
    tokens = (h @ vectors.T).argmax(-1)
    maps = np.float64(jax.vmap(net.autoencoder.decode)(jnp.asarray(vectors[tokens]), c))
    n = np.asarray(x)
    if counts == "sample":
        rate = np.exp(maps[:, 2])
        law = stats.logistic(maps[:, 0] + 2 * np.sqrt(rate), np.exp(maps[:, 1]))
        below = np.where(n > 0, law.cdf(2 * np.sqrt(np.maximum(n - 0.5, 0))), 0)
        expected = -np.log(law.cdf(2 * np.sqrt(n + 0.5)) - below).sum() - stats.poisson.logpmf(n, rate).sum()
    else:
        expected = np.square(maps[:, 0] - np.log1p(n)).sum()
    expected += 0.25 * np.square(h - vectors[tokens]).sum()
    np.testing.assert_allclose(loss, expected / (3 * 121), rtol=1e-3)
    np.testing.assert_array_equal(fallen[0][1], tokens.ravel())


@pytest.mark.parametrize("counts", ["sample", "round"])
@pytest.mark.parametrize("term", range(3), ids=("reconstruction", "perceptual", "adversarial"))
def test_each_term_of_eq_7_has_the_stated_gradient(term, counts):
    """Norm 1 / B in every example, however bright."""
    args = arguments("--variant", "vqgan", "--counts", counts)
    net, x = vqgan.make_network(args, 14, KEY), counts_like(3) * jnp.array([1.0, 20.0, 2.0])[:, None, None]
    maps = jax.random.normal(KEY, (3, vqgan.MAPS[counts], 44, 44))
    real = jax.vmap(net.features)(jnp.log1p(x))[0]
    found = jax.grad(lambda maps: vqgan.judge(net, maps, x, real, KEY, args)[term].sum())(maps)
    np.testing.assert_allclose(jnp.sqrt(jnp.sum(found**2, axis=(1, 2, 3))), 1 / 3, rtol=1e-3)


def test_every_part_learns_from_its_own_terms():
    """The features from the regression, the critic from the hinge loss, the autoencoder from both reconstruction and judges."""
    args = arguments("--variant", "vqgan", "--counts", "round")
    net, x, c = vqgan.make_network(args, 14, KEY), counts_like(3), jnp.zeros((3, 14))
    found = eqx.filter_grad(lambda net: vqgan.batch_loss(net, x, c, KEY, args)[0])(net)
    expected = eqx.filter_grad(lambda features: jnp.mean((jax.vmap(features)(jnp.log1p(x))[1] - vqgan.quantities(x))**2))(net.features)
    for a, b in zip(jax.tree.leaves(found.features), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    weights = [part.layers[0].weight for part in (found.critic, found.autoencoder.encoder, found.autoencoder.decoder.head)]
    assert all(np.any(weight) for weight in weights)
    assert not np.any(found.autoencoder.codebook.sums)                         # it is averaged, not descended


def test_a_picture_is_a_response():
    """Drawn counts are whole; the gradient is there in dark fibres as well."""
    args, maps = arguments(), jax.random.normal(KEY, (3, 8, 8)).at[1].set(-2.0)
    counts = np.expm1(vqgan.picture(maps, KEY, args))
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    assert np.all(jax.grad(lambda maps: vqgan.picture(maps, KEY, args).sum())(maps)[2] > 0)


# --------------------------------------------------------------------------------------------------------------- priors

def prior(*flags, conditions=14):
    """(flags, a network of stage 2 whose weights are no longer small, tokens (4, P), what it knows of four particles)."""
    args = arguments("--stage", "2", *flags)
    net = vqgan.make_network(args, conditions, KEY)
    net = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEY, a.shape) if eqx.is_inexact_array(a) else a, net)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vqgan.GRIDS[args.tokens][1], (4, int(np.prod(vqgan.grid(args))))))
    c = jnp.asarray(rng.normal(size=(4, conditions)), jnp.float32) if args.particle == "embed" else jnp.asarray(rng.integers(0, 512, (4, 2)))
    return args, net, tokens, c


@pytest.mark.parametrize("flags", [(), ("--particle", "tokens", "--detector", "zp"), ("--tokens", 36)])
def test_cached_logits_equal_the_others(flags, monkeypatch):
    """The sampler, made to draw given tokens, sees the logits of the whole sequence at once."""
    monkeypatch.setattr(vqgan, "SEGMENTS", 3)
    args, net, tokens, c = prior(*flags)
    seen = []

    def forced(logits, key):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), logits, ordered=True)
        return jax.random.key_data(key)[..., 0].astype(jnp.int32)
    # the key of each place carries the tokens: one row of tokens for all four particles
    row = tokens[0]
    monkeypatch.setattr(vqgan, "draw_tokens", lambda logits, key: forced(logits, key) + jnp.zeros(len(logits), jnp.int32))
    monkeypatch.setattr(jax.random, "split", lambda key, n: jax.random.wrap_key_data(jnp.stack([row, row], axis=1).astype(jnp.uint32)))
    drawn = jax.jit(lambda c: vqgan.generate_gpt(net, c, KEY, args))(c)
    jax.effects_barrier()
    np.testing.assert_array_equal(drawn, np.tile(row, (4, 1)))
    expected = jax.vmap(net)(jnp.tile(row, (4, 1)), c)                         # (B, P, K)
    np.testing.assert_allclose(np.stack(seen, axis=1), expected, rtol=1e-3, atol=1e-3)


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


def test_the_cache_makes_time_linear_in_the_tokens(monkeypatch):
    """A token of 121 costs what a token of 36 does but for the sums over its keys; without a cache it costs more than thrice. The
    network is the real one, for which those sums are few."""
    monkeypatch.setattr(vqgan, "PRIORS", {"gpt": vqgan.GPT})
    cached, whole = [], []
    for size in (36, 121):
        args, net, tokens, c = prior("--tokens", size)
        sample = jax.make_jaxpr(lambda c: vqgan.generate_gpt(net, c, KEY, args))(c)
        cached.append(operations(sample.jaxpr) / tokens.size)
        whole.append(operations(jax.make_jaxpr(jax.vmap(net))(tokens, c).jaxpr) / len(tokens))
    assert cached[0] < cached[1] < 1.2 * cached[0] and whole[1] > 3 * whole[0]
    assert cached[1] == pytest.approx(whole[1] / 121, rel=0.1)                 # each place is computed once


@pytest.mark.parametrize("flags", [(), ("--particle", "tokens")])
def test_the_transformer_is_causal(flags):
    """A token changes the logits after it and no others; the particle changes all."""
    _, net, tokens, c = prior(*flags)
    call = eqx.filter_jit(net)
    before, after = call(tokens[0], c[0]), call(tokens[0].at[50].set((tokens[0, 50] + 1) % 512), c[0])
    changed = np.any(np.abs(before - after) > 1e-6, axis=1)
    assert not changed[:51].any() and changed[51:].all()
    assert np.any(np.abs(before - call(tokens[0], c[1])) > 1e-6, axis=1).all()


def test_the_masked_prior_sees_what_is_known_alone():
    _, net, tokens, c = prior("--prior", "masked")
    order, call = vqgan.spread_order(net.grid), eqx.filter_jit(net)
    places = order[20:30]
    change = lambda place: tokens[0].at[place].set((tokens[0, place] + 1) % 512)
    before = call(tokens[0], 20, places, c[0])
    assert before.shape == (10, 512)
    np.testing.assert_array_equal(before, call(change(order[20:]), 20, places, c[0]))
    assert np.any(before != call(change(order[19]), 20, places, c[0]))


@pytest.mark.parametrize("shape", [(11, 11), (14, 8), (6, 6), (1, 1)])
def test_spread_order(shape):
    """Every patch once; the first quarter has no neighbours."""
    order = vqgan.spread_order(shape)
    assert sorted(order) == list(range(shape[0] * shape[1]))
    x, y = np.unravel_index(order[:len(order) // 5], shape)
    apart = np.maximum(np.abs(x[:, None] - x), np.abs(y[:, None] - y)) + 99 * np.eye(len(x))
    assert len(x) < 2 or apart.min() >= 2


@pytest.mark.parametrize("number, steps", [(121, 1), (121, 8), (112, 12), (36, 100)])
def test_masked_decoding_fills_every_token_once(number, steps):
    stages = vqgan.passes(number, steps)
    assert len(stages) <= steps and [end - start > 0 for start, end in stages] == [True] * len(stages)
    assert [place for start, end in stages for place in range(start, end)] == list(range(number))


def test_masked_decoding_draws_what_each_pass_tells(monkeypatch):
    """A prior that counts what is known: each token tells in which pass it was drawn."""
    args, net, _, c = prior("--prior", "masked", "--steps", 4)
    monkeypatch.setattr(vqgan.Masked, "__call__", lambda self, tokens, number, places, c: 99.0 * jax.nn.one_hot(
        jnp.full(len(places), number), 512))
    found = np.asarray(vqgan.generate_masked(net, c, KEY, args))[:, vqgan.spread_order(net.grid)]
    for start, end in vqgan.passes(121, 4):
        assert (found[:, start:end] == start).all()


@pytest.mark.parametrize("name", ["gpt", "masked"])
def test_a_prior_learns_known_frequencies(name, monkeypatch):
    """Four tokens, of which the third copies the first and the last depends on the particle: drawn as often as they were seen."""
    monkeypatch.setattr(data, "DETECTORS", data.DETECTORS | {"zn": data.DETECTORS["zn"]._replace(shape=(8, 8))})
    args = arguments("--stage", "2", "--prior", name, "--steps", 4, "--lr", 0.01)
    rng = np.random.default_rng(0)
    tokens = rng.choice(5, (4096, 4), p=[0.4, 0.3, 0.15, 0.1, 0.05])
    c = rng.choice([-1.0, 1.0], 4096).astype(np.float32)[:, None] * np.ones(14, np.float32)
    tokens[:, 2], tokens[:, 3] = tokens[:, 0], np.where(c[:, 0] > 0, 7, 9)
    optimiser = vqgan.make_optimiser(args, 600)
    state, step = vqgan.start(args, 14, optimiser, KEY), vqgan.make_step(args, optimiser)
    for number in range(600):
        rows = rng.integers(0, 4096, 256)
        state, losses = step((tokens[rows], c[rows], KEY, np.int32(number)), state)
    found = np.asarray(jax.jit(lambda c: vqgan.generate_tokens(state.net, c, KEY, args))(c))
    for place in range(3):
        np.testing.assert_allclose(np.bincount(found[:, place], minlength=5)[:5] / 4096, [0.4, 0.3, 0.15, 0.1, 0.05], atol=0.05)
    assert (found[:, 2] == found[:, 0]).mean() > 0.9 and (found[:, 3] == tokens[:, 3]).mean() > 0.97
    if name == "gpt":
        entropy = stats.entropy([0.4, 0.3, 0.15, 0.1, 0.05])
        assert losses["nats per token"] == pytest.approx(2 * entropy / 4, abs=0.1)


# -------------------------------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("flags", [(), ("--top-k", 3), ("--top-p", 0.6), ("--temperature", 2.0, "--top-k", 5, "--top-p", 0.8), ("--top-p", 0.0),
                                   ("--top-k", 999)])
def test_narrowed(flags):
    """Beside a plain loop over the ranked tokens."""
    args, logits = arguments(*flags), np.random.default_rng(0).normal(0, 2, (20, 30))
    found = np.asarray(vqgan.narrowed(jnp.asarray(logits), args))
    for row, seen in zip(logits / args.temperature, found):
        ranked = np.argsort(-row)[:args.top_k or None]
        share = np.exp(row[ranked]) / np.exp(row[ranked]).sum()
        kept = [token for rank, token in enumerate(ranked) if rank == 0 or share[:rank].sum() < args.top_p]
        assert sorted(np.flatnonzero(np.isfinite(seen))) == sorted(kept)
        np.testing.assert_allclose(seen[kept], row[kept], rtol=1e-5)


def test_no_temperature_is_the_likeliest():
    logits = jax.random.normal(KEY, (50, 40))
    np.testing.assert_array_equal(vqgan.draw_tokens(vqgan.narrowed(logits, arguments("--temperature", 0)), KEY), logits.argmax(1))


def test_tokens_come_as_often_as_the_logits_say():
    share = np.array([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    found = vqgan.draw_tokens(jnp.tile(jnp.log(share), (20_000, 1)), KEY)
    assert stats.chisquare(np.bincount(found, minlength=7)[share > 0], 20_000 * share[share > 0]).pvalue > 0.001
    assert set(np.unique(found)) == {1, 3, 4, 5}


# -------------------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector, tokens, patches", [("zn", 121, 121), ("zp", 121, 112), ("zn", 36, 36), ("zp", 36, 28)])
@pytest.mark.parametrize("flags", [("--cond", "raw", "--precision", "bf16", "--particle", "tokens"), ("--variant", "vqgan", "--counts", "round"),
                                   ("--prior", "masked", "--precision", "bf16")])
def test_shapes(detector, tokens, patches, flags):
    args = arguments("--detector", detector, "--tokens", tokens, *flags)
    conditions, shape = data.CONDITIONS[args.cond], data.DETECTORS[detector].shape
    known = jnp.zeros((4, conditions)) if args.particle == "embed" else jnp.zeros((4, 2), int)
    for stage, batch, c in (("1", jnp.zeros((4, *shape)), jnp.zeros((4, conditions))), ("2", jnp.zeros((4, patches), int), known)):
        here = common.with_flags(args, stage=stage)
        net = eqx.filter_eval_shape(vqgan.make_network, here, conditions, KEY)
        loss, _ = eqx.filter_eval_shape(lambda net: vqgan.batch_loss(net, batch, c, KEY, here), net)
        assert loss.shape == () and loss.dtype == jnp.float32
    made = eqx.filter_eval_shape(vqgan.make_vqgan, args, conditions, KEY)
    counts = eqx.filter_eval_shape(lambda net: vqgan.to_counts(vqgan.decode_new(net, jnp.zeros((4, conditions)), KEY, args), KEY, args), made)
    assert counts.shape == (4, *shape) and counts.dtype == jnp.uint16


def test_sizes():
    """As the papers': 512 codes of 8 numbers, a prior of about a million parameters; no checkpoint much above 2.5 million."""
    args, size = arguments(), lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))
    decoder = eqx.filter_eval_shape(vqgan.Decoder.func, args, 14, KEY)
    for network, least, most in ((vqgan.GPT, 1e6, 1.5e6), (vqgan.Masked, 1e6, 1.6e6)):
        assert least < size(eqx.filter_eval_shape(network, args, 14, KEY)) < most and size(decoder) < 1.05e6
    assert vqgan.Codebook(vqgan.GRIDS[121][1], KEY).vectors.shape == (512, 8)


def test_who_knows_the_particle():
    """Both stages by default; with its tokens the prior alone, and that from the tokens alone."""
    c, other, x = jnp.zeros(14), jnp.ones(14), counts_like(1)[0]
    for flag in ("embed", "tokens"):
        net = vqgan.make_network(arguments("--particle", flag), 14, KEY).autoencoder
        both = eqx.filter_jit(lambda net, c: (net.encode(x, c), net.decode(units(121), c)))
        assert [np.array_equal(a, b) for a, b in zip(both(net, c), both(net, other))] == 2 * [flag == "tokens"]


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    folder = tmp_path_factory.mktemp("vqgan") / "run"
    return folder, vqgan.main([*FLAGS, "--epochs", "15", "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 9
    assert {"model.eqx", "metrics.json", "samples.png", "channels.png", "stage1", "stage2"} <= {path.name for path in folder.iterdir()}
    records = common.read_log(folder / "stage1")
    assert {"reconstruction", "commitment", "perplexity", "used"} <= records[-1].keys()
    assert result["reconstruction"]["R"] == pytest.approx(result["reconstruction"]["W"] / result["reconstruction"]["oracle"])
    assert result["reconstruction"]["R"] < 3 and 1 <= result["codebook"]["perplexity"] <= 512 and 0 < result["codebook"]["used"] <= 1


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    load = lambda *flags: vqgan.main(["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path), *flags])
    again, other = load(), load("--temperature", "0.5", "--top-k", "9")
    names = "seen", "unseen", "flags", "reconstruction", "codebook"
    assert [again[name] for name in names] == [result[name] for name in names]
    assert other["seen"]["W"] != again["seen"]["W"] and (other["temperature"], other["top_k"]) == (0.5, 9)


def test_another_prior_on_the_same_autoencoder(trained, tmp_path):
    """--stage 2 leaves stage 1 as it is; it needs one, with the same flags."""
    folder, result = trained
    first = (folder / "stage1" / "state.eqx").read_bytes()
    flags = [*FLAGS, "--epochs", "15", "--stage", "2", "--prior", "masked", "--steps", "3"]
    found = vqgan.main([*flags, "--run", str(folder)])
    assert found["evaluations"] == 3 and found["reconstruction"] == result["reconstruction"] and found["seen"] != result["seen"]
    assert (folder / "stage1" / "state.eqx").read_bytes() == first
    with pytest.raises(UserError, match="train stage 1 first"):
        vqgan.main([*flags, "--run", str(tmp_path)])
    with pytest.raises(UserError, match="needs the flags of the first run; different: lr"):
        vqgan.main([*flags, "--lr", "0.5", "--run", str(folder)])


def test_every_kind_of_run(tmp_path, small_detectors):
    """All that the runs above leave out; combinations are traced above."""
    flags = ["--variant", "vqgan", "--counts", "round", "--particle", "tokens", "--tokens", "36", "--cond", "raw", "--detector", "zp"]
    result = vqgan.main([*FLAGS, *flags, "--run", str(tmp_path)])
    assert {"perceptual", "fooled", "features", "critic"} <= common.read_log(tmp_path / "stage1")[-1].keys()
    assert np.isfinite(result["seen"]["W"]["value"]) and "particle codebook" in result


def test_stage_1_alone(tmp_path, small_detectors):
    told = vqgan.main([*FLAGS, "--stage", "1", "--run", str(tmp_path)])
    assert {"stage1", "codebook", "reconstruction"} == told.keys() and not (tmp_path / "model.eqx").exists()
    with pytest.raises(UserError, match="--prior-batch 5000: expected 2 to 489"):
        vqgan.main([*FLAGS, "--prior-batch", "5000", "--run", str(tmp_path)])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch, small_detectors):
    """A kill in the second stage, which needs the first."""
    monkeypatch.setattr(common, "time", tiny.clock())
    dataset = data.open_data("zn", 700, quiet=True)
    scaler = data.fit_conditions(dataset.particles, "physics")
    flags = [*FLAGS, "--prior-epochs", "3", "--prior", "masked"]

    def run(*more):
        return vqgan.train_stages(vqgan.flags().parse_args([*flags, *map(str, more)]), dataset, np.arange(489), scaler)[0]

    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("stage2",))


def test_sweep_and_compare(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(vqgan, "TEMPERATURES", (0.5,))
    monkeypatch.setattr(vqgan, "TOP_KS", (3,))
    monkeypatch.setattr(vqgan, "STEPS", (2,))
    found = vqgan.main(["--load", str(trained[0] / "model.eqx"), "--sweep", "--quiet", "--run", str(tmp_path)])
    kept = [point for point in found["points"] if point["label"] == "top-k 3"]
    assert [point["temperature"] for point in kept] == [0.5] and (tmp_path / "sweep.json").exists()
    monkeypatch.setattr(vqgan, "COMPARED", ((36, "masked", "bf16", 4, 0.1), (36, "masked", "f32", 4, None)))
    rows = vqgan.main([*FLAGS, "--compare", "--run", str(tmp_path)])["rows"]
    assert [row["precision"] for row in rows] == ["bf16", "f32"] and all(row["ms_per_response"] > 0 for row in rows)
    assert rows[1]["change"] == pytest.approx(rows[1]["ms_per_response"] / rows[0]["ms_per_response"] - 1)
