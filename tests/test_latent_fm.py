"""latent_fm.py: objectives against integrals and plain definitions of Eq. 7, latents, stages, one run."""
import json
import math
import shutil
from functools import partial
from typing import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import common
import data
import files
import latent_fm
import metrics
import papers
import tiny
from common import UserError

KEY = jax.random.key(0)
FLAGS = "--n 700 --epochs 20 --flow-epochs 3 --batch-size 64 --steps 2 --quiet".split()
NETS = "dense", "paper"


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        small = partial(latent_fm.DenseAutoencoder, width=32, depth=1, hidden=16)
        patch.setattr(latent_fm, "DenseAutoencoder", small)
        # one compilation instead of one for each layer
        patch.setattr(latent_fm, "make_stage1", eqx.filter_jit(latent_fm.make_stage1))
        small = partial(latent_fm.DenseFlow, width=16, depth=1, embedding=16, times=8)
        patch.setattr(latent_fm, "DenseFlow", small)
        yield


class OneLayer(eqx.Module):
    """In place of the flows, which take long to compile; called like papers.UNet."""
    weight: jax.Array

    def __init__(self, inputs, outputs, stem, conditions, key):
        self.weight = common.normal(key, inputs, outputs)

    def __call__(self, x, t, c):
        return x @ self.weight


def random_network(make, *args):
    """make(*args, key) with other random weights, made by NumPy: nothing is compiled."""
    rng, shapes = np.random.default_rng(0), eqx.filter_eval_shape(make, *args, KEY)
    fill = lambda leaf: np.float32(rng.normal(size=leaf.shape) / max([*leaf.shape[:1], 1])**0.5)
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


class Fixed(eqx.Module):
    """An autoencoder that keeps a code and a reconstruction for each example; its number is the condition."""
    code: jax.Array   # (B, 2, L)
    made: jax.Array   # (B, H, W)

    def encode(self, x, c):
        return self.code[c[0].astype(int)]

    def decode(self, z, c):
        return self.made[c[0].astype(int)][None]


# ------------------------------------------------------------------------------------------------------ flags

@pytest.mark.parametrize("flags, latent", [("", 32), ("--detector zp", 16), ("--net paper", 4),
                                           ("--latent 7", 7)])
def test_default_length_of_the_latent(flags, latent):
    assert latent_fm.parse(flags.split()).latent == latent


# -------------------------------------------------------------------------------------------------- objective

def test_elbo_is_that_of_the_integral():
    """Mean over draws of z ~ q, per fibre, for Poisson counts of the rate exp(z)."""
    counts = np.array([[0.0, 1.0, 2.0], [5.0, 0.0, 1.0]])

    class Plain:
        class fibres:
            loss = staticmethod(lambda z, counts: data.poisson_loss(counts, z[0]).mean())
        encode = staticmethod(lambda x, c: jnp.array([[0.3], [math.log(0.6)]]))
        decode = staticmethod(lambda z, c: z)
    loss = lambda key: latent_fm.elbo(Plain, jnp.asarray(counts), None, key)
    reconstruction, kl = jax.jit(jax.vmap(loss))(jax.random.split(KEY, 20_000))
    z, q = np.linspace(-4, 4.6, 801), stats.norm(0.3, 0.6)
    expected = [-stats.poisson.logpmf(counts, np.exp(point)).mean() for point in z]
    assert reconstruction.mean() == pytest.approx(np.trapezoid(q.pdf(z) * expected, z), rel=0.01)
    kl_integral = np.trapezoid(q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), z)
    np.testing.assert_allclose(kl, kl_integral / 6, rtol=1e-3)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.5, 0.3), (-0.7, 2.0)])
def test_divergence_is_that_of_the_integral(mean, std):
    p, q = stats.norm(mean, std), stats.norm()
    integrand = lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z))
    expected = integrate.quad(integrand, mean - 12 * std, mean + 12 * std)[0]
    found = latent_fm.divergence(jnp.full((5,), mean), jnp.full((5,), std))
    np.testing.assert_allclose(found, 5 * expected, rtol=1e-4, atol=1e-6)


def test_flow_loss_is_least_for_the_right_velocity():
    """To one known latent: from (z, t) the noise, and so the velocity, is known."""
    z1, weight = jnp.array([1.0, -2.0, 0.5]), jnp.array([2.0, 0.5, 0.5])
    exact = lambda z, t, c, total: (z1 - z) / (1 - t)
    wrong = lambda z, t, c, total: exact(z, t, c, total) + jnp.array([3.0, 0.0, 1.0])
    for t in (0.0, 0.4, 0.9):
        loss = lambda net, weight: float(latent_fm.flow_loss(net, z1, t, None, None, KEY, weight))
        assert loss(exact, 1.0) < 1e-8
        assert loss(wrong, 1.0) == pytest.approx(10 / 3, rel=1e-3)
        assert loss(wrong, weight) == pytest.approx((2 * 9 + 0.5) / 3, rel=1e-3)


def test_path_loss_prefers_precise_numbers():
    """An error costs more in a number that the encoder knows exactly; the sums are learnt beside."""
    stds, times = np.array([0.1, 0.5, 1.0]), []
    codes = jnp.broadcast_to(jnp.stack([jnp.zeros(3), jnp.log(stds)]), (64, 2, 3))

    class Spy:
        totals = None

        def __call__(self, z, t, c, total):
            jax.debug.callback(lambda t: times.append(float(t)), t)
            return 1e3 * jnp.array([1.0, 0, 0])  # the right velocity hardly matters
    batch = codes, jnp.full(64, 50.0), jnp.zeros((64, 14)), KEY
    loss, parts = jax.jit(partial(latent_fm.path_loss, Spy()))(*batch)
    jax.effects_barrier()
    weights = 1 / (stds**2 + 0.05)
    assert loss == parts["path"] == pytest.approx(1e6 * weights[0] / weights.sum(), rel=1e-2)
    assert np.array_equal(np.sort(np.floor(64 * np.array(times))), np.arange(64))   # stratified
    Spy.totals = "sums"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_fm, "sum_nll", lambda net, total, c: 3.0 * total)
        with_sums, parts = jax.jit(partial(latent_fm.path_loss, Spy()))(*batch)
    assert parts["sum"] == 150 and with_sums - loss == pytest.approx(150, rel=1e-3)


BETA, BATCH = 0.7, 3


@pytest.fixture(scope="module")
def published():
    """(network, counts, losses, gradient) of the paper's stage 1, for given reconstructions, bad and good."""
    counts = jnp.asarray(np.random.default_rng(0).poisson(0.8, (BATCH, 12, 10)), jnp.float32)
    noise = 0.3 * jax.random.normal(KEY, counts.shape) * jnp.array([1.0, 5.0, 0.1])[:, None, None]
    code = 0.5 * jax.random.normal(jax.random.key(1), (BATCH, 2, 4))
    features, critic = random_network(papers.Features, (12, 10)), random_network(papers.Critic)
    net = latent_fm.Stage1(Fixed(code, jnp.log1p(counts) + noise), features, critic)
    loss = lambda net: latent_fm.published_loss(net, counts, jnp.arange(BATCH)[:, None], KEY, BETA)
    gradient, parts = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(net)
    return net, counts, parts, gradient


def plain_terms(net, made, counts):
    """The three terms of Eq. 7 at one reconstruction (H, W), as they are defined, without KL."""
    maps, real_maps = net.features(made)[0], net.features(jnp.log1p(counts))[0]
    unit = lambda m: m / jnp.sqrt(jnp.sum(m**2, axis=-1, keepdims=True) + 1e-2)
    perceptual = sum(jnp.sum((unit(m) - unit(r))**2, axis=-1).mean() for m, r in zip(maps, real_maps))
    return jnp.stack([jnp.sum((made - jnp.log1p(counts))**2), perceptual, -net.critic(maps).mean()])


def test_terms_of_eq_7_have_gradients_of_equal_norm(published):
    """The reconstruction's gradient is the sum of the terms' own, each divided by its norm and the batch; the
    terms keep their values."""
    net, counts, parts, gradient = published
    made = net.autoencoder.made
    terms = partial(plain_terms, net)
    both = jax.jit(jax.vmap(lambda *example: (terms(*example), jax.jacrev(terms)(*example))))
    values, own = both(made, counts)  # (B, 3), (B, 3, H, W)
    found = [parts["squares"] * 120, parts["perceptual"], parts["fooled"]]
    np.testing.assert_allclose(found, values.mean(0), rtol=1e-3)
    own /= jnp.sqrt(jnp.sum(own**2, axis=(2, 3), keepdims=True))
    np.testing.assert_allclose(gradient.autoencoder.made, own.sum(1) / BATCH, atol=1e-4)


def test_kl_is_scaled_as_the_squares(published):
    """Both make L_VAE: KL is divided by the norm of the gradient of the squares."""
    net, counts, parts, gradient = published
    kl = lambda code: 0.5 * jnp.sum(code[0]**2 + jnp.exp(2 * code[1]) - 1 - 2 * code[1])
    assert parts["divergence"] == pytest.approx(float(jax.vmap(kl)(net.autoencoder.code).mean()), rel=1e-4)
    slope = 2 * jnp.sqrt(jnp.sum((net.autoencoder.made - jnp.log1p(counts))**2, axis=(1, 2)))
    expected = BETA * jax.vmap(jax.grad(kl))(net.autoencoder.code) / slope[:, None, None] / BATCH
    np.testing.assert_allclose(gradient.autoencoder.code, expected, rtol=1e-3, atol=1e-7)


def test_features_and_critic_learn_from_their_own_terms(published):
    """Critic from the hinge loss, features from the regression; the autoencoder's terms touch neither."""
    net, counts, _, gradient = published

    def loss(features, critic):
        maps, found = jax.vmap(features)(jnp.log1p(counts))
        made_maps, _ = jax.vmap(features)(net.autoencoder.made)
        real, fake = (jax.vmap(critic)(jax.lax.stop_gradient(m)) for m in (maps, made_maps))
        hinge = jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean()
        return hinge + jnp.mean((found - papers.quantities(counts))**2)
    expected = jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(net.features, net.critic))
    for a, b in zip(jax.tree.leaves((gradient.features, gradient.critic)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_quantities():
    """What the features learn to predict, beside metrics.channels and a plain centre of gravity."""
    counts = np.random.default_rng(2).poisson(0.5, (4, 56, 30)).astype(np.uint16)
    found = papers.quantities(jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(found[:, :5], np.log1p(metrics.channels(counts)), rtol=1e-5)
    total = counts.sum((1, 2))
    np.testing.assert_allclose(found[:, 5], np.log1p(total), rtol=1e-5)
    x = (counts.sum(2) * (2 * np.arange(56) / 55 - 1)).sum(1) / (total + 1)
    y = (counts.sum(1) * (2 * np.arange(30) / 29 - 1)).sum(1) / (total + 1)
    np.testing.assert_allclose(found[:, 6:], np.stack([x, y], axis=1), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- sampler

def test_the_path_of_a_gaussian():
    """Latents N(0, s^2): the exact velocity carries z_0 to s z_0."""
    s = 0.2
    v = lambda z, t: z * (t * s**2 - (1 - t)) / ((1 - t)**2 + t**2 * s**2)
    coarse, fine = (latent_fm.integrate(v, jnp.ones(1), steps)[0] for steps in (16, 64))
    assert abs(fine - s) < 0.03 * s and abs(fine - s) < abs(coarse - s)


class Plain(eqx.Module):
    def decode(self, z, c):
        return z[None, None]  # log responses of one row of fibres


class Moved(eqx.Module):
    """A prior whose velocity follows from latent and photon sum."""
    velocity: Callable
    totals: object = None

    def __call__(self, z, t, c, total):
        return self.velocity(z, total)


def test_new_latents_have_the_stored_spread():
    """A flow that stands still leaves N(0, 1), which mean and std of the checkpoint stretch."""
    mean, std = np.array([6.0, 7.0, 8.0]), np.array([0.5, 0.05, 1.0])
    still = Moved(lambda z, total: jnp.zeros_like(z))
    net = latent_fm.LatentFM(Plain(), jnp.asarray(mean), jnp.asarray(std), still)
    counts = latent_fm.sample(net, jnp.zeros((2000, 14)), KEY, steps=2)
    assert counts.shape == (2000, 1, 3) and counts.dtype == jnp.uint16
    z = np.log1p(np.float64(counts))[:, 0]
    np.testing.assert_allclose(z.std(0), std, rtol=0.1)
    assert (np.abs(z.mean(0) - mean) < 0.1 * std).all()


def test_the_flow_sees_the_sum_that_was_drawn(monkeypatch):
    """Each response its own, drawn from the distribution of the checkpoint."""
    drawn = 100 + jnp.arange(5.0)
    monkeypatch.setattr(latent_fm, "draw_totals", lambda net, c, key: net * drawn)
    prior = Moved(lambda z, total: 1e6 * jnp.log(total) + 0 * z, 3.0)
    net = latent_fm.LatentFM(Plain(), jnp.zeros(3), jnp.full(3, 1e-6), prior)
    counts = latent_fm.sample(net, jnp.zeros((5, 14)), KEY, steps=2)
    expected = np.tile(3 * drawn[:, None, None], (1, 1, 3))
    np.testing.assert_allclose(np.float64(counts) + 1, expected, rtol=0.01)


def test_features_give_counts_and_a_log_response_is_rounded():
    class Plain:
        class fibres:
            draw = staticmethod(lambda h, key: h.reshape(2, 2))
        decode = staticmethod(lambda z, c: z)
    counts = np.arange(8.0).reshape(2, 1, 2, 2)
    rounded = latent_fm.decode_counts(Plain, np.log1p(counts) + 0.01, np.zeros(2), KEY)
    drawn = latent_fm.decode_counts(Plain, counts.reshape(2, 1, 4), np.zeros(2), KEY)
    for found in (rounded, drawn):
        assert np.array_equal(found, counts[:, 0]) and found.dtype == jnp.uint16


# --------------------------------------------------------------------------------------------------- training

def test_a_huge_gradient_of_the_critic_leaves_the_others_alone():
    plan = common.plan(latent_fm.parse(FLAGS))
    net = latent_fm.Stage1(jnp.ones(3), jnp.ones(3), jnp.ones(3))
    gradient = latent_fm.Stage1(jnp.array([0.1, 0.2, 0.3]), jnp.zeros(3), jnp.full(3, 1e6))
    optimiser, alone = latent_fm.make_optimiser(plan, 10), common.adamw(plan, 10)
    updates, _ = optimiser.update(gradient, optimiser.init(net), net)
    for part in ("autoencoder", "features", "critic"):
        values = getattr(net, part)
        expected = alone.update(getattr(gradient, part), alone.init(values), values)[0]
        np.testing.assert_allclose(getattr(updates, part), expected, rtol=1e-6)


def test_latents_are_standardised_on_the_training_rows():
    """Their own spread included: draws from the codes of the rows have mean 0 and standard deviation 1."""
    rng, rows = np.random.default_rng(0), np.arange(300)
    codes = np.stack([rng.normal(2, 3, (400, 5)), rng.normal(-1, 0.5, (400, 5))], axis=1)
    codes[300:, 0] += 50
    codes[3, 1, 0] = -30                                                       # as `gaussian`, not below -8
    net = Fixed(jnp.asarray(codes, jnp.float32), jnp.zeros((400, 2, 2)))
    responses, c = np.zeros((400, 2, 2), np.uint16), np.arange(400)[:, None]
    found, mean, std = latent_fm.encode_all(net, responses, c, rows)
    assert found.shape == (400, 2, 5) and found.dtype == np.float16
    draws = found[rows, 0] + np.exp(np.float64(found[rows, 1])) * rng.normal(size=(500, 300, 5))
    np.testing.assert_allclose(draws.mean((0, 1)), 0, atol=0.02)
    np.testing.assert_allclose(draws.std((0, 1)), 1, rtol=0.02)
    np.testing.assert_allclose(found[:, 0] * std + mean, codes[:, 0], atol=0.05)
    np.testing.assert_allclose(found[:, 1] + np.log(std), np.maximum(codes[:, 1], -8), atol=0.05)


@pytest.mark.parametrize("flags, resumed", [("", (False, False)), ("--stage 2", (True, False)),
                                            ("--resume", (True, True))])
def test_states_of_the_stages(flags, resumed, tmp_path):
    """That of stage 1 does not depend on --flow-epochs, that of stage 2 does on --epochs."""
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "state.eqx").touch()
    args = latent_fm.parse([*FLAGS, *flags.split(), "--run", str(tmp_path)])
    first, second = latent_fm.stage_plans(common.plan(args), args.stage, args.flow_epochs)
    assert (first.run, second.run) == (tmp_path / "stage1", tmp_path / "stage2")
    assert (first.epochs, second.epochs) == (20, 3) and (first.resume, second.resume) == resumed
    assert second.header == args.header and second.header["flags"]["epochs"] == 20
    assert "flow_epochs" not in first.header["flags"]
    assert first.header["flags"] | {"flow_epochs": 3} == args.header["flags"]


def test_a_run_cut_off_in_stage_1_begins_stage_2(tmp_path):
    plan = common.plan(latent_fm.parse([*FLAGS, "--resume", "--run", str(tmp_path)]))
    assert [stage.resume for stage in latent_fm.stage_plans(plan, "both", 3)] == [True, False]


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector", data.DETECTORS)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("conditions, precision", [(14, "f32"), (9, "bf16")])
def test_shapes(net, detector, conditions, precision):
    detector, c = data.DETECTORS[detector], np.zeros((4, conditions), np.float32)
    latent = (*data.patch_grid(detector.shape, 4), 3) if net == "paper" else (3,)
    loss = latent_fm.autoencoder_loss if net == "dense" else partial(latent_fm.published_loss, beta=0.01)
    counts, codes = np.zeros((4, *detector.shape), np.uint16), np.zeros((4, 2, *latent), np.float16)
    for loss, batch, make in ((loss, counts, partial(latent_fm.make_stage1, net, detector)),
                              (partial(latent_fm.path_loss, total=np.full(4, 50, np.float32)), codes,
                               partial(latent_fm.Prior, net, detector))):
        trainee = eqx.filter_eval_shape(make, conditions, 3, KEY)
        lowered = lambda net: loss(common.lower(net, precision), batch, c=c, key=KEY)
        value, _ = eqx.filter_eval_shape(lowered, trainee)
        assert value.shape == () and value.dtype == jnp.float32
    model = eqx.filter_eval_shape(latent_fm.make_latent_fm, net, detector, conditions, 3, KEY)
    assert model.mean.shape == model.std.shape == latent
    drawn = eqx.filter_eval_shape(partial(latent_fm.sample, steps=2), model, c, KEY)
    assert drawn.shape == (4, *detector.shape) and drawn.dtype == jnp.uint16


def test_size_of_the_papers_autoencoder():
    make = partial(latent_fm.make_stage1, "paper", data.DETECTORS["zn"])
    net = eqx.filter_eval_shape(make, 14, 4, KEY).autoencoder
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net)) == pytest.approx(60_000, rel=0.1)
    code = eqx.filter_eval_shape(lambda net: net.encode(jnp.zeros((44, 44)), None), net)
    assert code.shape == (2, 11, 11, 4)


def test_what_is_conditioned_on_the_particle(small_detectors):
    """The flow, and of our autoencoder what the impact points change; the paper's takes none."""
    detector, z, grid = data.DETECTORS["zn"], jnp.ones(3), jnp.ones((3, 3, 3))
    x, flow = jnp.ones(detector.shape), random_network(latent_fm.Prior, "dense", detector, 14, 3)
    make = partial(random_network, latent_fm.make_stage1)
    ours, published = (make(net, detector, 14, 3).autoencoder for net in NETS)
    found = jax.jit(lambda c: (ours.encode(x, c), ours.decode(z, c), flow(z, 0.5, c, 50.0)))
    same = lambda c: [np.array_equal(*pair) for pair in zip(found(jnp.zeros(14)), found(c), strict=True)]
    assert same(jnp.ones(14)) == [False, False, False]
    assert same(jnp.zeros(14).at[:11].set(1)) == [True, True, False]           # the last three are the points
    code, maps = jax.eval_shape(lambda: (published.encode(x, None), published.decode(grid, None)))
    assert code.shape == (2, 3, 3, 3) and maps.shape == (1, 12, 12)


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    """(folder, what main returns, what it draws with)."""
    folder, draws, report = tmp_path_factory.mktemp("latent") / "run", [], metrics.report

    def spy(args, draw, *rest, **result):
        draws.append(draw)
        return report(args, draw, *rest, **result)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "report", spy)
        result = latent_fm.main([*FLAGS, "--run", str(folder)])
    return folder, result, draws[0]


def test_a_run(trained):
    folder, result, _ = trained
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 3
    names = {"model.eqx", "metrics.json", "samples.png", "channels.png", "stage1", "stage2"}
    assert {path.name for path in folder.iterdir()} == names
    reconstruction = [record["reconstruction"] for record in files.read_log(folder / "stage1")]
    assert reconstruction[-1] < 0.8 * reconstruction[0]
    score = result["reconstruction"]
    assert score["R"] == pytest.approx(score["W"] / score["oracle"])


def test_saved_and_loaded(trained, tmp_path, monkeypatch):
    """The same responses, and what the checkpoint keeps of the training."""
    folder, result, draw = trained
    report = lambda args, draw, *rest, **result: (args.header["flags"], draw, result)
    monkeypatch.setattr(metrics, "report", report)
    load = ["--load", str(folder / "model.eqx"), "--steps", "2", "--run", str(tmp_path)]
    flags, again, found = latent_fm.main(load)
    c = np.random.default_rng(0).normal(size=(64, 14)).astype(np.float32)
    assert np.array_equal(draw(c, KEY), again(c, KEY))
    assert flags == result["flags"] and found == {name: result[name] for name in found}


def test_finetuning_starts_from_decoder_and_flow(trained, tmp_path):
    """Without a learning rate they are the same in the end; the length of a training is not the old one's."""
    old, new = trained[0] / "model.eqx", tmp_path / "model.eqx"
    flags = "--n 700 --epochs 1 --flow-epochs 2 --batch-size 64 --steps 2 --lr 0 --validate --quiet".split()
    latent_fm.main([*flags, "--finetune", str(old), "--run", str(tmp_path)])
    make = partial(latent_fm.make_latent_fm, "dense", data.DETECTORS["zn"], 14, 32)
    nets = [common.load_model(path, make) for path in (old, new)]
    for a, b in zip(*(jax.tree.leaves((net.autoencoder, net.prior)) for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
    assert common.read_header(new)["flags"]["flow_epochs"] == 2


def test_one_stage_after_the_other(trained, tmp_path, monkeypatch):
    """The same numbers as both in one run; stage 2 again, with other flags, leaves stage 1 as it is."""
    monkeypatch.setattr(metrics, "report", lambda *args, reconstruction, **result: reconstruction)
    leaves = lambda path: path.read_bytes().partition(b"\n")[2]
    flags, (folder, result, _) = [*FLAGS, "--run", str(tmp_path)], trained
    found = latent_fm.main([*flags, "--stage", "1"])
    assert found["reconstruction"] == result["reconstruction"] and not (tmp_path / "model.eqx").exists()
    first = (tmp_path / "stage1" / "state.eqx").read_bytes()
    assert latent_fm.main([*flags, "--stage", "2"]) == result["reconstruction"]
    assert leaves(tmp_path / "model.eqx") == leaves(folder / "model.eqx")
    assert latent_fm.main([*flags, "--stage", "2", "--flow-epochs", "2"]) == result["reconstruction"]
    assert leaves(tmp_path / "model.eqx") != leaves(folder / "model.eqx")
    assert (tmp_path / "stage1" / "state.eqx").read_bytes() == first


def test_stage_2_needs_its_stage_1(trained, tmp_path):
    with pytest.raises(UserError, match="train stage 1 first"):
        latent_fm.main([*FLAGS, "--stage", "2", "--run", str(tmp_path)])
    with pytest.raises(UserError, match="stage1/state.eqx: --resume needs the flags .* different: beta"):
        latent_fm.main([*FLAGS, "--beta", "5", "--stage", "2", "--run", str(trained[0])])


@pytest.fixture
def train_flags(monkeypatch, small_detectors):
    """Both stages for a list of flags, without any score: the LatentFM."""
    monkeypatch.setattr(metrics, "score_reconstruction", lambda *args: {})
    dataset = data.open_data("zn", 700, quiet=True)
    scaler, split = data.fit_conditions(dataset.particles, "physics"), data.Split(np.arange(489), None, None)

    def run(*flags):
        args = latent_fm.parse([*FLAGS, *map(str, flags)])
        return latent_fm.train_stages(args, dataset, split, scaler)[0]
    return run


def test_resume_is_as_uninterrupted(trained, train_flags, tmp_path, monkeypatch):
    """A kill in the second stage, which needs the first."""
    monkeypatch.setattr(common, "time", tiny.clock())
    for name in ("whole", "cutstage2"):
        shutil.copytree(trained[0] / "stage1", tmp_path / name / "stage1")
    run = partial(train_flags, "--stage", "2")
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("stage2",))


def test_a_flow_goes_with_its_autoencoder(trained, train_flags, tmp_path):
    """A finished stage 2 is not taken for that of an autoencoder trained anew."""
    run = "--run", shutil.copytree(trained[0], tmp_path / "run")
    train_flags(*run, "--stage", "1", "--seed", "1")
    train_flags(*run, "--resume", "--seed", "1")
    assert common.read_header(tmp_path / "run" / "stage2" / "state.eqx")["flags"]["seed"] == 1


def test_two_devices(tmp_path):
    """Two devices share a batch and end in the same flow as one, with the weights of the whole batch."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.normal(size=(500, 4)), rng.normal(-2, 1, (500, 4))], axis=1).astype(np.float16)
    arrays = codes, np.full(500, 50, np.float32), np.zeros((500, 14), np.float32)
    flow = latent_fm.Prior("dense", data.DETECTORS["zn"], 14, 4, KEY)

    def run(devices):
        flags = "--epochs", "2", "--devices", devices, "--run", str(tmp_path / devices)
        plan = common.plan(latent_fm.parse([*FLAGS, *flags]))
        return jax.tree.leaves(latent_fm.train(flow, latent_fm.path_loss, arrays, np.arange(500), plan)[0])
    for a, b in zip(run("1"), run("2"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)


def test_the_papers_model(tmp_path, small_detectors, monkeypatch):
    """Both stages; the parts of Eq. 7 are in the log."""
    monkeypatch.setattr(papers, "UNet", OneLayer)
    report = lambda args, draw, *rest, **result: (args.header["flags"], result)
    monkeypatch.setattr(metrics, "report", report)
    flags = [*FLAGS, "--epochs", "1", "--flow-epochs", "1", "--net", "paper", "--detector", "zp"]
    found, result = latent_fm.main([*flags, "--run", str(tmp_path)])
    parts = {"squares", "divergence", "perceptual", "fooled", "features", "critic"}
    assert parts <= files.read_log(tmp_path / "stage1")[-1].keys()
    assert found["latent"] == 4 and np.isfinite(result["reconstruction"]["W"])
    assert (tmp_path / "model.eqx").exists()
