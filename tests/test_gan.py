"""gan.py: each term against hand-made numbers or brute force, who learns from what, every variant."""
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
import data
import gan
import metrics
import tiny
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "1", "--batch-size", "64", "--warm", "3", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(gan, "WIDTH", 8)
        patch.setattr(gan, "BLOCKS", 1)
        patch.setattr(gan, "PEAK_STEPS", 3)
        yield


def arguments(*flags):
    return gan.flags().parse_args([*FLAGS, *map(str, flags)])


def batch(rows=6, seed=0):
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(rows, 15)).astype(np.float32)
    c[:, -1] = rng.uniform(size=rows)
    return rng.poisson(0.5, (rows, 44, 44)).astype(np.uint16), jnp.asarray(c)


def gradient(net, *flags):
    args = arguments(*flags)
    return eqx.filter_grad(lambda net: gan.batch_loss(net, *batch(), KEY, args)[0])(net)


def moved(tree):
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------------------ objective

def test_diversity_term_by_hand():
    """f_div |z_1 - z_2| / |e_1 - e_2|, mean absolute differences: 0.5 * 2 / 4."""
    found = gan.diversity_term(jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0]), jnp.array([0.0, 1.0]), jnp.array([3.0, 0.0]), 0.5)
    assert found == pytest.approx(0.5 * 2 / 4, rel=1e-3)
    alike = gan.diversity_term(jnp.ones(2), jnp.ones(2), jnp.zeros(2), jnp.ones(2), 1.0)
    assert np.isfinite(alike) and alike > 100


def test_spreads_by_brute_force():
    """Equation below Eq. 3 of paper 000: for each particle the sum over fibres of the root of the mean square deviation."""
    rng = np.random.default_rng(0)
    particles, ids = rng.normal(size=(3, 9)).astype(np.float32), np.array([0, 1, 0, 2, 1, 0, 2])
    responses = rng.poisson(3, (7, 4, 5)).astype(np.uint16)
    expected = np.zeros(3)
    for k in range(3):
        rows = [responses[t].astype(float) for t in range(7) if ids[t] == k]
        for i in range(4):
            for j in range(5):
                mean = sum(row[i, j] for row in rows) / len(rows)
                expected[k] += (sum((row[i, j] - mean)**2 for row in rows) / len(rows))**0.5
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(gan.spreads(responses, particles[ids]), expected[ids], atol=1e-5)
    assert gan.spreads(responses[:1], particles[:1]).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(44, 44), (56, 30)])
def test_peak(shape):
    x = jnp.zeros(shape).at[3, 7].set(5).at[0, 0].set(4)
    np.testing.assert_allclose(gan.peak(x), [2 * 3 / (shape[0] - 1) - 1, 2 * 7 / (shape[1] - 1) - 1], rtol=1e-6)


def test_drawn_pictures_hold_whole_counts_and_pass_the_gradient():
    """Counts as draw_counts makes them; the gradient against differences of a softened count."""
    args = arguments()
    maps = jnp.stack([jnp.linspace(-3, 20, 1936).reshape(44, 44), jnp.full((44, 44), -0.5)])
    made = gan.draw_picture(maps, KEY, args)
    np.testing.assert_allclose(made**2, np.round(made**2), atol=1e-3)
    u = np.float64(jax.random.uniform(KEY, (44, 44), minval=1e-6, maxval=1 - 1e-6))
    draw = lambda location, log_scale: location + np.exp(log_scale) * np.log(u / (1 - u))
    expected = np.floor(np.maximum(draw(*np.float64(maps)), 0)**2 / 4 + 0.5)
    assert (np.round(made**2) == expected).mean() > 0.999

    def soft(location, log_scale):                                             # a slope of 1/2 above sqrt 2, and a step up to 1 there
        over = (draw(location, log_scale) - np.sqrt(2)) / gan.SOFTNESS
        return gan.SOFTNESS * np.log1p(np.exp(over)) / 2 + (1 - np.sqrt(0.5)) / (1 + np.exp(-over))
    slope = jax.grad(lambda maps: gan.draw_picture(maps, KEY, args).sum())(maps)
    location, log_scale = np.float64(maps)
    np.testing.assert_allclose(slope[0], (soft(location + 1e-4, log_scale) - soft(location - 1e-4, log_scale)) / 2e-4, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(slope[1], (soft(location, log_scale + 1e-4) - soft(location, log_scale - 1e-4)) / 2e-4, rtol=1e-2, atol=1e-3)
    bright = draw(location, log_scale) > 4
    np.testing.assert_allclose(slope[0][bright], 0.5, atol=1e-2)
    assert np.abs(slope[0][draw(location, log_scale) < -1]).max() < 1e-2       # a dark fibre stays out of it


@pytest.mark.parametrize("flags", [("--loss", "plain"), (), ("--l2", 1, "--sdi", 1, "--aux", 1), ("--penalty", 0)])
def test_adversaries_learn_from_their_own_terms(flags):
    """The critic from its loss alone, whatever the generator's; neither touches the peak finder, which `aux` needs."""
    args = arguments(*flags)
    net = gan.Adversaries(args, 14, KEY)
    found = gradient(net, *flags)
    counts, c = batch()
    noise, key = jax.random.normal(jax.random.split(KEY, 4)[0], (6, gan.NOISE)), jax.random.split(KEY, 4)[1]
    maps = jax.vmap(net.generator)(c[:, :-1], noise)
    made = jax.vmap(lambda maps, key: gan.draw_picture(maps, key, args))(maps, jax.random.split(key, 6))
    x = jnp.sqrt(jnp.float32(counts))

    def critic_loss(critic):                                                   # plain logarithms; penalties of the first row
        real, fake = (jax.vmap(critic)(x, c[:, :-1])[0] for x in (x, made))
        slopes = [jax.grad(lambda x: critic(x, c[0, :-1])[0])(x[0]) for x in (x, made)]
        won = [jax.nn.sigmoid(real), jax.nn.sigmoid(-fake)] if args.loss == "plain" else [jax.nn.sigmoid(real - fake)]
        return -sum(jnp.log(w).mean() for w in won) + args.penalty / 2 * sum(jnp.sum(slope**2) for slope in slopes)
    expected = eqx.filter_jit(eqx.filter_grad(critic_loss))(net.critic)
    for a, b in zip(jax.tree.leaves(found.critic), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-5)
    assert moved(found.generator) and not moved(found.finder)


@pytest.mark.parametrize("loss", ["plain", "relativistic"])
def test_generator_loss(loss):
    args = arguments("--loss", loss)
    net = gan.Adversaries(args, 14, KEY)
    counts, c = batch()
    parts = gan.batch_loss(net, counts, c, KEY, args)[1]
    keys = jax.random.split(KEY, 4)
    maps = jax.vmap(net.generator)(c[:, :-1], jax.random.normal(keys[0], (6, gan.NOISE)))
    made = jax.vmap(lambda maps, key: gan.draw_picture(maps, key, args))(maps, jax.random.split(keys[1], 6))
    real, fake = (np.float64(jax.vmap(net.critic)(x, c[:, :-1])[0]) for x in (jnp.sqrt(jnp.float32(counts)), made))
    chance = 1 / (1 + np.exp((real if loss == "relativistic" else 0) - fake))  # that the made one is taken for real
    assert parts["generator"] == pytest.approx(-np.log(chance).mean(), rel=1e-4)


def test_the_generator_begins_at_the_likelihood():
    """Light where the data have it, before the critic says anything; a finder that finds, and nothing without flags."""
    dataset, rows = data.open_data("zn", 700, quiet=True), np.arange(489)
    conditions = data.conditions(dataset.particles, data.fit_conditions(dataset.particles, "physics"))
    args = arguments("--warm", 60, "--aux", 1, "--batch-size", 32)
    net = gan.Adversaries(args, 14, KEY)
    lit = lambda net: float((gan.draw_picture(net.generator(jnp.asarray(conditions[0]), jnp.zeros(gan.NOISE)), KEY, args) > 0).mean())
    begun = gan.begin(args, net, dataset, conditions, rows)
    truth = (dataset.responses > 0).mean()
    assert abs(lit(begun) - truth) < 0.5 * abs(lit(net) - truth)
    assert eqx.tree_equal(begun.critic, net.critic) and not eqx.tree_equal(begun.finder, net.finder)
    none = arguments("--warm", 0)
    net = gan.Adversaries(none, 14, KEY)
    assert eqx.tree_equal(gan.begin(none, net, dataset, conditions, rows), net)


@pytest.mark.parametrize("term", ["l2", "sdi", "aux", "anchor"])
def test_terms_reach_the_generator_with_their_weight(term):
    args = arguments("--aux", 1)
    net = gan.Adversaries(args, 14, KEY)
    slope = lambda weight: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient(net, "--aux", 0, f"--{term}", weight).generator)])
    plain, once, twice = slope(0), slope(1), slope(2)
    assert np.abs(once - plain).max() > 0
    np.testing.assert_allclose(twice - plain, 2 * (once - plain), rtol=1e-2, atol=1e-5 * np.abs(twice).max())


def test_balanced_rows():
    pdg = np.repeat([22, 2112, 3122], [900, 90, 10])
    rows = gan.balanced(np.arange(1000), pdg, np.random.default_rng(0))
    shares = np.array([(pdg[rows] == code).mean() for code in (22, 2112, 3122)])
    np.testing.assert_allclose(shares, np.sqrt([900, 90, 10]) / np.sqrt([900, 90, 10]).sum(), atol=0.05)


def test_factor_is_that_of_a_grid_search(monkeypatch):
    """A generator whose responses are the data's, a fifth too bright."""
    rng = np.random.default_rng(0)
    dataset = data.open_data("zn", 700, quiet=True)
    bright = np.round(1.2 * dataset.responses)
    args, rows = arguments(), np.arange(300)
    monkeypatch.setattr(metrics, "generator", lambda *_: lambda particles, seed: bright[rows])
    net = gan.fit_factor(args, gan.make_network(args, 14, KEY), dataset, rows, None)
    truth = metrics.channels(dataset.responses[rows])
    scores = {f: metrics.wasserstein(truth, metrics.channels(np.round(f * bright[rows]))) for f in np.linspace(0.75, 1.25, 51)}
    assert float(net.factor) == pytest.approx(min(scores, key=scores.get)) and 0.8 < net.factor < 0.9
    doubled = gan.GAN(net.generator, jnp.array(2.0))
    one, two = (gan.to_counts((jnp.full((1, 2, 44, 44), 3.0), f), KEY, args) for f in (1.0, doubled.factor))
    np.testing.assert_array_equal(two, 2 * one)


def test_collapse_is_said(capsys):
    record = lambda auc, spread: {"critic AUC": auc, "spread of sums": spread}
    for case, said in ((record(0.8, 1.0), False), (record(0.999, 1.0), True), (record(0.7, 0.1), True)):
        gan.tell_collapse([case] * 3)
        assert ("COLLAPSED" in capsys.readouterr().out) == said


# -------------------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector", data.DETECTORS)
@pytest.mark.parametrize("flags, conditions", [((), 14), (("--counts", "round", "--cond", "raw", "--precision", "bf16", "--sdi", 1, "--aux", 1), 9)])
def test_shapes(detector, flags, conditions):
    args, shape = arguments("--detector", detector, *flags), data.DETECTORS[detector].shape
    net = eqx.filter_eval_shape(gan.Adversaries, args, conditions, KEY)
    loss, parts = eqx.filter_eval_shape(lambda net: gan.batch_loss(net, np.zeros((4, *shape), np.uint16), np.zeros((4, conditions + 1)), KEY,
                                                                   args), net)
    assert loss.shape == () and {"generator", "critic", "slope", "critic AUC", "spread of sums"} <= parts.keys()
    made = eqx.filter_eval_shape(gan.make_network, args, conditions, KEY)
    counts = eqx.filter_eval_shape(lambda net: gan.to_counts(gan.decode_new(net, jnp.zeros((4, conditions)), KEY, args), KEY, args), made)
    assert counts.shape == (4, *shape) and counts.dtype == jnp.uint16


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    folder = tmp_path_factory.mktemp("gan") / "run"
    return folder, gan.main([*FLAGS, "--post", "--epochs", "8", "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 1
    assert {"critic AUC", "spread of sums"} <= common.read_log(folder)[-1].keys()


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    again = gan.main(["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)])
    assert (again["seen"], again["unseen"], again["factor"]) == (result["seen"], result["unseen"], result["factor"])


@pytest.mark.parametrize("flags", [("--sdi", "0.1", "--aux", "1", "--l2", "1", "--balance"), ("--counts", "round", "--detector", "zp", "--penalty", "0", "--loss", "plain", "--warm", "0")])
def test_every_kind_of_run(flags, tmp_path, small_detectors):
    result = gan.main([*FLAGS, *flags, "--run", str(tmp_path)])
    assert np.isfinite(result["seen"]["W"]["value"])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch, small_detectors):
    monkeypatch.setattr(common, "time", tiny.clock())
    dataset, rows = data.open_data("zn", 700, quiet=True), np.arange(489)
    scaler, flags = data.fit_conditions(dataset.particles, "physics"), ("--epochs", 3, "--sdi", 0.1)
    run = lambda *more: gan.train(arguments(*flags, *more), dataset, rows, scaler)[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch)


@pytest.mark.parametrize("name, rows", [("models", 6), ("stabilisers", 2)])
def test_table(name, rows, tmp_path, monkeypatch, small_detectors):
    stabilisers = gan.TABLES["stabilisers"]
    monkeypatch.setitem(gan.TABLES, "stabilisers", {key: stabilisers[key] for key in ("all", "balanced")})
    result = gan.main([*FLAGS, "--table", name, "--run", str(tmp_path)])
    kinds = (False, True) if name == "models" else (False,)
    assert [(row["model"], row["post"]) for row in result["table"]] == [(model, post) for model in gan.TABLES[name] for post in kinds]
    assert len(result["table"]) == rows and all(0 <= row["AUC_low"] <= 1 and row["W"] > 0 for row in result["table"])
    assert json.loads((tmp_path / "table.json").read_text()) == common.plain(result)


def test_table_needs_no_checkpoint(trained):
    with pytest.raises(UserError, match="does not go with --load"):
        gan.main(["--load", str(trained[0] / "model.eqx"), "--table", "models"])
