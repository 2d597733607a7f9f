"""iaf.py: splines against other arithmetic, masks by Jacobians, likelihoods by integrals, samplers against each other, every kind of run."""
import json
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import common
import data
import iaf
import metrics
import tiny
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "1", "--sum-epochs", "1", "--student-epochs", "1", "--batch-size", "64", "--quiet"]
CONSTANTS = {"mean": -1.75, "std": 1.9, "low": 10, "teacher_epochs": 1}
SMALL = {"local": partial(iaf.Flow, orders=("forwards", "backwards"), width=8, hidden=4, group=4, outputs=2, embedding=8),
         "paper": partial(iaf.Flow, orders=("backwards", 3), width=6, hidden=None, group=1, outputs=iaf.NUMBERS, embedding=8)}
TOY = data.DETECTORS["zn"]._replace(shape=(4, 6))


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(iaf, "NETWORKS", SMALL)
        patch.setattr(iaf, "SCORED", 128)
        patch.setattr(iaf, "TIMED", 2)
        yield


def arguments(*flags, stage="teacher"):
    return common.with_flags(iaf.flags().parse_args([*FLAGS, *map(str, flags)]), stage=stage, **CONSTANTS)


def perturbed(net, scale=0.3):
    """A network whose weights, zero or small at first, are all at work."""
    keys = iter(jax.random.split(jax.random.key(5), 200))
    return jax.tree.map(lambda a: a + scale * jax.random.normal(next(keys), a.shape) if eqx.is_inexact_array(a) else a, net)


def toy_flow(monkeypatch, kind="local", shape=(4, 6), stage="teacher", conditions=14, scale=None):
    monkeypatch.setitem(data.DETECTORS, "zn", TOY._replace(shape=shape))
    return perturbed(SMALL[kind](arguments(stage=stage), conditions, KEY), scale or (0.3 if kind == "paper" else 0.1)).masked()


# -------------------------------------------------------------------------------------------------------------- splines

def numbers_like(rows, seed=0, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (iaf.NUMBERS, rows)), jnp.float32)


def exact(x, numbers):
    """The spline of Gregory and Delbourgo by its definition, a number at a time, float64."""
    softmax = lambda n: np.exp(n) / np.exp(n).sum()
    knots = [np.concatenate([[0], np.cumsum(1e-3 + (1 - 8e-3) * softmax(np.float64(part)))]) * 12 - 6 for part in (numbers[:8], numbers[8:16])]
    slopes = np.concatenate([[1], 1e-3 + np.logaddexp(0, np.float64(numbers[16:]) + math.log(math.expm1(1 - 1e-3))), [1]])
    if not -6 < x < 6:
        return x
    k = np.searchsorted(knots[0], x) - 1
    (x0, x1), (y0, y1), (d0, d1) = (a[k:k + 2] for a in (*knots, slopes))
    s, t = (y1 - y0) / (x1 - x0), (x - x0) / (x1 - x0)
    return y0 + (y1 - y0) * (s * t**2 + d0 * t * (1 - t)) / (s + (d0 + d1 - 2 * s) * t * (1 - t))


def test_spline_is_its_definition():
    x, numbers = np.random.default_rng(1).uniform(-7, 7, 300), numbers_like(300)
    y, log_slope = iaf.spline(jnp.asarray(x, jnp.float32), numbers)
    x = np.float64(np.float32(x))
    np.testing.assert_allclose(y, [exact(a, n) for a, n in zip(x, np.asarray(numbers).T)], atol=2e-4)
    h = 1e-6
    slope = [(exact(a + h, n) - exact(a - h, n)) / (2 * h) for a, n in zip(x, np.asarray(numbers).T)]
    np.testing.assert_allclose(log_slope, np.log(slope), atol=5e-3)


def test_gradient_of_the_spline():
    """By differences of the definition, for y and for its log slope, to x and to every number."""
    rng, h = np.random.default_rng(3), 1e-4
    x, numbers = rng.uniform(-6.5, 6.5, 40), rng.normal(0, 1, (iaf.NUMBERS, 40))

    def values(x, numbers):
        y = exact(x, numbers)
        return np.array([y, np.log((exact(x + h, numbers) - exact(x - h, numbers)) / (2 * h))])
    for which in range(2):
        pull = np.eye(2)[which]
        to_x, to_numbers = jax.grad(lambda x, n: sum((a * b).sum() for a, b in zip(pull, iaf.spline(x, n))), (0, 1))(
            jnp.asarray(x, jnp.float32), jnp.asarray(numbers, jnp.float32))
        for i, (place, column) in enumerate(zip(x, numbers.T)):
            expected = [values(place, column + h * e)[which] - values(place, column - h * e)[which] for e in np.eye(iaf.NUMBERS)]
            np.testing.assert_allclose(to_numbers[:, i], np.array(expected) / (2 * h), rtol=1e-2, atol=2e-3)
            slope = (values(place + h, column)[which] - values(place - h, column)[which]) / (2 * h)
            assert to_x[i] == pytest.approx(slope, rel=1e-2, abs=5e-3)


@pytest.mark.parametrize("scale, error", [(1.0, 1e-4), (2.0, None)])
def test_spline_rises_and_is_undone(scale, error):
    """Over the whole range, tails included; where a wild spline is flat, y tells little of x, but x comes back to the same y."""
    x = jnp.tile(jnp.linspace(-8, 8, 500), 20)
    numbers = numbers_like(20, seed=2, scale=scale).repeat(500, axis=1)
    y = iaf.spline(x, numbers)[0]
    assert (jnp.diff(y.reshape(20, 500), axis=1) > 0).all()
    np.testing.assert_array_equal(y[jnp.abs(x) >= 6], x[jnp.abs(x) >= 6])
    back = iaf.inverse_spline(y, numbers)
    np.testing.assert_allclose(iaf.spline(back, numbers)[0], y, atol=2e-4)
    assert error is None or jnp.abs(back - x).max() < error
    same = jnp.zeros((iaf.NUMBERS, 500))
    np.testing.assert_allclose(iaf.spline(x[:500], same)[0], x[:500], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- flows

def test_orders():
    fibres = np.arange(48).reshape(2, 24)
    found = iaf.arrange(fibres, 3)
    assert sorted(found[1]) == list(range(24, 48)) and (found != fibres).any()
    np.testing.assert_array_equal(iaf.arrange(found, 3, back=True), fibres)
    assert iaf.arrange(fibres, "backwards") is fibres


@pytest.mark.parametrize("kind, conditions", [("local", 14), ("paper", 9)])
def test_blocks_are_autoregressive(kind, conditions, monkeypatch):
    """dy_i / dx_j is 0 for j after i in the order, by automatic differentiation; log slopes are those of the diagonal."""
    flow = toy_flow(monkeypatch, kind, conditions=conditions)
    c, total = 0.3 * jax.random.normal(KEY, (1, conditions)), jnp.array([50.0])
    e, near = flow.given(c, total)
    x = jax.random.normal(jax.random.key(1), (24,))
    for block in flow.blocks:
        moved = jax.jit(lambda x: block(x[None], near, e, total))
        jacobian, log_slopes = jax.jit(jax.jacobian(lambda x: moved(x)[0][0]))(x), moved(x)[1][0]
        jacobian = np.asarray(jacobian)[::-1, ::-1] if block.backwards else np.asarray(jacobian)
        assert (np.triu(jacobian, 1) == 0).all() and (np.tril(jacobian, -1) != 0).mean() > 0.2
        np.testing.assert_allclose(np.log(np.diag(jacobian)), log_slopes[::-1] if block.backwards else log_slopes, atol=1e-3)


@pytest.mark.parametrize("kind", SMALL)
def test_determinant_of_all_blocks(kind, monkeypatch):
    flow = toy_flow(monkeypatch, kind, scale=0.03)
    c, total, x = 0.3 * jax.random.normal(KEY, (3, 14)), jnp.array([12.0, 200.0, 2000.0]), jax.random.normal(KEY, (3, 24))
    one = lambda x, c, total: flow(x[None], c[None], total[None])[0][0, -1]
    jacobians = np.float64(jax.jit(jax.vmap(jax.jacobian(one)))(x, c, total))
    np.testing.assert_allclose(flow(x, c, total)[1], np.linalg.slogdet(jacobians)[1], atol=1e-3)


def test_every_earlier_fibre_counts(monkeypatch):
    """The masks leave a way from each group to all later ones, and the particle reaches the first fibre."""
    flow = toy_flow(monkeypatch, "paper")
    c, total = jnp.ones((1, 14)), jnp.array([50.0])
    e, near = flow.given(c, total)
    x = jax.random.normal(KEY, (24,))
    block = flow.blocks[1]
    told = np.abs(jax.jacobian(lambda x: block.numbers(x[None], near, e, total)[:, 0])(x)).sum(0)
    assert (told[-1, :-1] > 0).mean() > 0.7                                    # 24 fibres share 6 hidden numbers
    assert np.abs(jax.jacobian(lambda e: block.numbers(x[None], near, e, total)[:, 0, 0])(e)).max() > 0


@pytest.mark.parametrize("kind, stage", [("local", "teacher"), ("local", "student"), ("paper", "student")])
def test_naive_and_incremental_are_the_way_back(kind, stage, monkeypatch):
    """Equal numbers for equal noise, and called again they give the noise: the student too can be undone."""
    flow = toy_flow(monkeypatch, kind, stage=stage)
    c, total = 0.3 * jax.random.normal(KEY, (3, 14)), jnp.array([12.0, 200.0, 2000.0])
    z = jax.random.normal(jax.random.key(1), (3, 24))
    naive, incremental = (jax.jit(partial(flow.invert, how=how))(z, c, total) for how in ("naive", "incremental"))
    np.testing.assert_allclose(naive, incremental, atol=2e-3)
    np.testing.assert_allclose(flow(incremental, c, total)[0][:, -1], z, atol=5e-3)
    assert flow.orders == (SMALL[kind].keywords["orders"] if stage == "teacher" else SMALL[kind].keywords["orders"][::-1])


def test_likelihood_integrates_to_one(monkeypatch):
    """The density of the continuous counts of a detector of two fibres, over all that they can be."""
    monkeypatch.setitem(SMALL, "pair", partial(iaf.Flow, orders=("forwards", "backwards"), width=6, hidden=4, group=1, outputs=2,
                                               embedding=4))
    flow, args = toy_flow(monkeypatch, "pair", shape=(1, 2), scale=0.05), arguments("--noise", 0.5)
    c, total = 0.3 * jnp.ones((1, 14)), jnp.array([3.0])

    @jax.jit
    def density(x):                                                            # over logits, where the density is smooth
        states, log_det = flow(x, c.repeat(len(x), 0), total.repeat(len(x)))
        return jnp.exp(stats_normal(states[:, -1]) + log_det)
    stats_normal = lambda z: jax.scipy.stats.norm.logpdf(z).sum(1)
    edges = np.linspace(-9, 9, 901)
    a, b = np.meshgrid(edges, edges)
    values = np.asarray(density(jnp.asarray(np.stack([a.ravel(), b.ravel()], 1), jnp.float32))).reshape(a.shape)
    assert integrate.trapezoid(integrate.trapezoid(values, edges), edges) == pytest.approx(1, abs=2e-3)
    n = np.linspace(0.01, 3.4, 50)
    x, log_slope = iaf.to_logit(jnp.asarray(n), 3.0, args)
    np.testing.assert_allclose(np.gradient(np.asarray(x), n)[2:-2], np.exp(log_slope)[2:-2], rtol=0.1)
    np.testing.assert_allclose(iaf.from_logit(x, 3.0, args), n, rtol=1e-3, atol=1e-4)


def test_bits_of_a_flow_that_does_nothing(monkeypatch):
    """teacher_loss by hand for the identity: normal numbers and the slope of the logit."""
    args, counts = arguments("--noise", 0.75), np.random.default_rng(0).poisson(0.3, (16, 44, 44))

    class Identity:
        masked = lambda self: self
        __call__ = lambda self, x, c, total: (x[:, None], jnp.zeros(len(x)))
    nats, told = iaf.teacher_loss(Identity(), jnp.asarray(counts, jnp.float32), jnp.zeros((16, 14)), KEY, args)
    u = np.float64(jax.random.uniform(KEY, (16, 1936)))
    total = counts.sum((1, 2))[:, None]
    p = 1e-6 + (1 - 2e-6) * (counts.reshape(16, -1) + 0.75 * u) / (total + 0.75)
    x = (np.log(p / (1 - p)) - np.log(0.75 / (total + 0.75)) - args.mean) / args.std
    slope = (1 - 2e-6) / (total + 0.75) / (p * (1 - p)) / args.std
    expected = -(stats.norm.logpdf(x) + np.log(slope)).mean()
    assert nats == pytest.approx(expected, rel=1e-4)
    assert told["bits per fibre"] == pytest.approx((expected - np.log(0.75)) / np.log(2), rel=1e-4)


def test_a_photon_lies_at_the_same_place_for_every_sum():
    args = arguments("--noise", 0.5)
    x = iaf.to_logit(jnp.array([0.5, 1.0]), jnp.array([[10.0], [3000.0]]), args)[0]
    assert jnp.abs(args.std * x[:, 0] + args.mean).max() < 0.06 and jnp.abs(jnp.diff(x[:, 1])).max() < 0.08


def test_sums_before():
    values = np.random.default_rng(0).random((2, 24)).astype(np.float32)
    np.testing.assert_allclose(iaf.sums_before(jnp.asarray(values), 6), np.cumsum(values, 1) - values, atol=1e-5)
    after = np.cumsum(values[:, ::-1], 1)[:, ::-1] - values
    np.testing.assert_allclose(iaf.sums_before(jnp.asarray(values), 6, backwards=True), after, atol=1e-5)


# ------------------------------------------------------------------------------------------------- sums and noise removal

class Fixed(eqx.Module):
    """A Mixture that does not look at the particle."""
    values: jax.Array

    def __call__(self, c):
        return self.values


def mixture(low=10):
    """Two logistic distributions of log S, cut below `low`: P(S) for S = low .. 6000 by scipy, and the network that tells it."""
    weights, places, scales = np.array([0.3, 0.7]), np.array([2.0, 6.0]), np.array([0.4, 0.1])
    numbers = np.arange(low, 6000)
    cdf = lambda s, k: stats.logistic.cdf(np.log(s), places[k], scales[k])
    p = sum(w * (cdf(numbers + 0.5, k) - cdf(numbers - 0.5, k)) / (1 - cdf(low - 0.5, k)) for k, w in enumerate(weights))
    return Fixed(jnp.asarray(np.stack([np.log(weights), places, np.log(scales)]), jnp.float32)), numbers, p


def test_likelihood_of_sums():
    net, numbers, p = mixture()
    assert p.sum() == pytest.approx(1, abs=1e-4)
    for total in (10, 11, 57, 403, 1200):
        nats = iaf.sum_loss(net, jnp.full((1, 1, 1), total, jnp.float32), jnp.zeros((1, 3)), KEY, arguments())[0]
        assert nats == pytest.approx(-np.log(p[total - 10]), rel=2e-3)


def test_sums_are_drawn_from_that_distribution():
    net, numbers, p = mixture()
    drawn = np.asarray(iaf.draw_totals(net, jnp.zeros((20_000, 3)), KEY, 10))
    assert drawn.min() >= 10 and (drawn == np.round(drawn)).all()
    ranks = np.searchsorted(numbers, np.sort(drawn), side="right") - 1
    assert np.abs(np.cumsum(p)[ranks] - (np.searchsorted(np.sort(drawn), numbers[ranks], side="right")) / 20_000).max() < 0.015


def test_sum_network_learns_a_distribution(tmp_path):
    """Two particles, of 20 and of about 500 photons."""
    rng, kind = np.random.default_rng(0), np.arange(2048) % 2
    totals = np.where(kind, rng.poisson(500, 2048), 20)
    particles = data.open_data("zn", 700, quiet=True).particles[[0, 1]][kind]
    dataset = data.Dataset(totals[:, None, None].astype(np.uint16), particles, kind)
    args = common.with_flags(arguments("--epochs", 40, "--lr", 5e-3, "--ema", 0.9, "--run", tmp_path, stage="sum"))
    scaler = data.fit_conditions(particles, "physics")
    net = iaf.train(args, dataset, np.arange(2048), scaler)[0]
    drawn = np.asarray(iaf.draw_totals(net, jnp.asarray(data.conditions(particles, scaler)), KEY, 10))
    assert np.median(drawn[kind == 0]) == pytest.approx(20, abs=1.5)
    assert drawn[kind == 1].mean() == pytest.approx(500, rel=0.1)


@pytest.mark.parametrize("how, expected", [("floor", [[0, 1, 2, 1]]), ("round", [[0, 1, 2, 2]]), ("floor-renormalise", [[0, 2, 4, 2]]),
                                           ("round-renormalise", [[0, 2, 3, 2]]), ("scale-floor", [[0, 2, 3, 2]]),
                                           ("scale-round", [[0, 2, 3, 2]])])
def test_noise_removal(how, expected):
    """0.4, 1.3, 2.1 and 1.8 with noise below 0.5: counts 0, 1, 2, 1 (or 2, where noise cannot have been), scaled to 7."""
    found = iaf.remove_noise(jnp.array([[0.4, 1.3, 2.1, 1.8]]), jnp.array([7.0]), how, 0.5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5, 0.75, 1.0])
def test_counts_come_back(noise):
    """Counts to logits and back, for every range of the noise; subtracting the mean of a range of 1 may end at either side."""
    args, rng = arguments("--noise", noise), np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.05, 8.0, (4, 1936)) + 0.01).astype(np.float32)
    total = counts.sum(1)
    x = iaf.to_logit(jnp.asarray(counts + noise * rng.uniform(0.01, 0.99, counts.shape).astype(np.float32)), total[:, None], args)[0]
    light = iaf.from_logit(x, jnp.asarray(total)[:, None], args)
    exact = {1.0: ("floor",), 0.75: iaf.REMOVALS[:3]}.get(noise, ("floor", "round", "floor-renormalise", "scale-floor", "scale-round"))
    for how in exact:
        np.testing.assert_array_equal(iaf.remove_noise(light, jnp.asarray(total), how, noise), counts)


@pytest.mark.parametrize("how, offset", [("scale-floor", 0.0), ("scale-round", 0.4)])
def test_scaling_to_the_photon_sum(how, offset):
    """The most photons that any scale leaves at or below the sum, found here by trying 20 000."""
    rng = np.random.default_rng(4)
    light = np.where(rng.random((6, 40)) < 0.3, rng.gamma(0.7, 12.0, (6, 40)), 0.2 * rng.random((6, 40)))
    total = np.round(light.sum(1) * rng.uniform(0.7, 1.4, 6))
    found = np.asarray(iaf.remove_noise(jnp.asarray(light, jnp.float32), jnp.asarray(total), how, 0.2))
    tried = np.floor(np.linspace(0.5, 2, 20_000)[:, None, None] * light + offset).sum(2)
    np.testing.assert_allclose(found.sum(1), np.where(tried <= total, tried, 0).max(0), atol=1)
    assert (found.sum(1) <= total).all() and (found.sum(1) > 0.9 * total).all()


# -------------------------------------------------------------------------------------------------------------- student

def test_distances_by_hand():
    """States z, y, x of a teacher, x' and so on of a student: the ends, and what lies between."""
    teacher = jnp.asarray([[[1.0, 2], [3, 4], [5, 6]]])                        # x, after a block, z
    student = jnp.asarray([[[5.0, 6], [3, 5], [2, 4]]])                        # z, after a block, x'
    ends, between = iaf.distance(student, teacher)
    assert ends[0] == pytest.approx((1 + 4) / 2) and between[0] == pytest.approx(1 / 2)


def test_shares_of_a_response():
    """The channels of the counts, over their sum."""
    args, counts = arguments(), np.random.default_rng(0).poisson(0.3, (3, 44, 44)).astype(np.float32)
    light = counts.reshape(3, -1)
    x = iaf.to_logit(jnp.asarray(light), light.sum(1)[:, None], args)[0]
    found = iaf.shares(x, jnp.asarray(light.sum(1))[:, None], args)
    np.testing.assert_allclose(found, metrics.channels(counts) / counts.sum((1, 2))[:, None], atol=2e-3)


def test_loss_of_a_student_that_is_the_teacher_undone(monkeypatch):
    """No distance and no channel loss; the loss of another is the sum of its parts, the channels with their weights."""
    class Affine(eqx.Module):
        a: float
        masked = lambda self: self

        def __call__(self, x, c, total):
            return jnp.stack([x, self.a * x + (1 - self.a)], axis=1), jnp.zeros(len(x))
    args = arguments("--channel-loss", 10)
    counts, c, weights = jnp.asarray(np.random.default_rng(0).poisson(0.3, (4, 44, 44)), jnp.float32), jnp.zeros((4, 14)), jnp.arange(4.0)
    loss, parts = iaf.student_loss(Affine(0.5), counts, weights, Affine(2.0), c, KEY, args)
    assert max(parts[name] for name in ("data loop", "latent loop", "blocks", "channels", "light")) < 1e-7
    loss, parts = iaf.student_loss(Affine(0.25), counts, weights, Affine(2.0), c, KEY, args)
    assert parts["data loop"] > 0.1 and parts["channels"] > 1e-5 and parts["light"] > 1e-3
    even, _ = iaf.student_loss(Affine(0.25), counts, jnp.ones(4), Affine(2.0), c, KEY, args)
    assert even == pytest.approx(float(parts["data loop"] + parts["latent loop"] + parts["blocks"] + 10 * parts["channels"] + 5 * parts["light"]), rel=1e-4)
    assert loss != pytest.approx(float(even), rel=1e-6)


def test_diversity_weights():
    """f_div by two loops over fibres and rows; a particle of one row trusts nothing but EPSILON."""
    rng, ids = np.random.default_rng(0), np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    responses = rng.poisson(np.array([1, 5, 20, 3])[ids][:, None, None], (10, 4, 4)).astype(np.uint16)
    particles = np.arange(9, dtype=np.float32) + 100 * ids[:, None].astype(np.float32)
    spread = [sum(math.sqrt(np.mean([(float(r[i, j]) - np.mean(responses[ids == k][:, i, j].astype(float)))**2 for r in responses[ids == k]]))
                  for i in range(4) for j in range(4)) for k in range(4)]
    found, numbers = iaf.spreads(responses, particles)
    np.testing.assert_allclose(found[numbers], np.array(spread)[ids], rtol=1e-4)
    inverse = 1 / np.array(spread[:3])
    scaled = np.append((inverse - inverse.min()) / np.ptp(inverse), 0) * np.array([4, 2, 3, 1])
    expected = scaled[ids] / scaled[ids].mean() + iaf.EPSILON
    np.testing.assert_allclose(iaf.diversity_weights(responses, particles), expected / (1 + iaf.EPSILON), rtol=1e-4)
    assert iaf.diversity_weights(responses, particles).mean() == pytest.approx(1)
    alone = iaf.diversity_weights(responses[:3], 100 * np.arange(3, dtype=np.float32)[:, None] * np.ones((1, 9), np.float32))
    np.testing.assert_allclose(alone, 1)


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def coarse(small_detectors):
    """Splines of two bins from here on, and few fibres: without optimisation, all take the time of all other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iaf, "BINS", 2)
        patch.setattr(iaf, "NUMBERS", 5)
        patch.setitem(SMALL, "paper", partial(SMALL["paper"], outputs=5))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, coarse):
    folder = tmp_path_factory.mktemp("iaf") / "run"
    return folder, iaf.main([*FLAGS, "--epochs", "2", "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert [(row["flow"], row["sums"]) for row in result["flows"]] == [
        ("teacher", "true"), ("teacher", "predicted"), ("student", "true"), ("student", "predicted"), ("oracle", "-")]
    assert len(result["removals"]) == 2 * len(iaf.REMOVALS) and result["flags"]["removal"] in iaf.REMOVALS and np.isfinite(result["bits_per_fibre"])
    assert set(result["speed"]["ms"]) == {"naive", "incremental", "student"} and result["sums"]["oracle_MAE"] > 0
    bits = [record["bits per fibre"] for record in common.read_log(folder / "teacher")]
    assert np.isfinite(bits).all() and result["rows"] == {"train": 489, "seen": 140, "unseen": 140}
    assert {path.name for path in folder.iterdir()} == {"sum", "teacher", "student", "model.eqx", "metrics.json", "samples.png", "channels.png"}


@pytest.mark.parametrize("sampler", ["student", "teacher"])
def test_saved_and_loaded(trained, sampler, tmp_path):
    """A loaded student scores as it did; a teacher comes from its own folder."""
    folder, result = trained
    again = iaf.main(["--load", str(folder / "model.eqx"), "--sampler", sampler, "--quiet", "--run", str(tmp_path)])
    assert again["flags"]["sampler"] == sampler
    assert (again["seen"] == result["seen"]) == (sampler == "student")


def test_a_teacher_is_no_student(trained):
    with pytest.raises(UserError, match="a teacher, expected a student"):
        iaf.main(["--load", str(trained[0] / "teacher" / "model.eqx"), "--quiet"])


def test_one_stage_after_the_other(trained, tmp_path):
    """The same numbers as all in one run; a later stage leaves the others as they are."""
    flags = [*FLAGS, "--epochs", "2", "--run", str(tmp_path)]
    assert iaf.main([*flags, "--stage", "sum"]).keys() == {"sum", "train_seconds"}
    assert iaf.main([*flags, "--stage", "teacher"])["flags"]["sampler"] == "teacher"
    states = [(tmp_path / name / "state.eqx").read_bytes() for name in ("sum", "teacher")]
    assert iaf.main([*flags, "--stage", "student"])["seen"] == trained[1]["seen"]
    assert [(tmp_path / name / "state.eqx").read_bytes() for name in ("sum", "teacher")] == states


def test_stages_need_those_before(trained, tmp_path):
    with pytest.raises(UserError, match="train that stage first"):
        iaf.main([*FLAGS, "--stage", "student", "--run", str(tmp_path)])
    with pytest.raises(UserError, match="different: noise, mean, std"):
        iaf.main([*FLAGS, "--epochs", "2", "--noise", "1", "--stage", "student", "--run", str(trained[0])])


def test_every_kind_of_run(tmp_path, coarse):
    """All that the runs above leave out."""
    flags = ["--net", "paper", "--precision", "bf16", "--detector", "zp", "--cond", "raw", "--noise", "1", "--removal", "floor", "--no-diversity"]
    result = iaf.main([*FLAGS, *flags, "--run", str(tmp_path)])
    assert np.isfinite(result["seen"]["W"]["value"])


def test_table(tmp_path, coarse, monkeypatch):
    monkeypatch.setattr(iaf, "ABLATION", {name: iaf.ABLATION[name] for name in ("base", "channel and diversity")})
    result = iaf.main([*FLAGS, "--table", "--run", str(tmp_path)])
    assert [row["flow"] for row in result["table"][::2]] == ["teacher", "base", "channel and diversity", "oracle"]
    assert {"W", "MAE_c", "MAE_cw", "MAE_cond"} <= result["table"][0].keys() and (tmp_path / "table.json").exists()
    with pytest.raises(UserError, match="--load"):
        iaf.main(["--table", "--load", str(tmp_path / "model.eqx")])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch, coarse):
    """A kill in the last stage, which needs the others."""
    monkeypatch.setattr(common, "time", tiny.clock())
    monkeypatch.setattr(iaf, "NETWORKS", {"local": partial(SMALL["local"], width=4, hidden=2)})
    dataset = data.open_data("zn", 700, quiet=True)
    scaler, rows = data.fit_conditions(dataset.particles, "physics"), data.split_rows(700, 0)[0]
    flags = [*FLAGS, "--student-epochs", "3"]

    def run(*more):
        args, nets = common.with_flags(iaf.flags().parse_args([*flags, *map(str, more)]), **CONSTANTS), {}
        for stage in iaf.STAGES:
            nets[stage] = iaf.train(iaf.stage_flags(args, stage), dataset, rows, scaler, nets.get("teacher"))[0]
        return nets
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("student",))
