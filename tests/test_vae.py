"""vae.py: the bound against integration, the Sinkhorn divergence against POT and exact transport, draws
against scipy, one run."""
import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import norm, poisson

import common
import data
import files
import tiny
import vae
from common import UserError
from totals import sum_nll

KEY = jax.random.key(0)
EVERY = [(arch, variant) for arch in vae.BLOCKS for variant in vae.LOSSES]
FLAGS = ["--n", "700", "--epochs", "8", "--lr", "0.01", "--batch-size", "64", "--latent", "3",
         "--prior-epochs", "3", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(vae, "WIDTH", {"cnn": 4, "vit": 8, "mixer": 8})
        patch.setattr(common, "LOGGED", 5)
        yield


def network(arch="mixer", variant="vae", likelihood="checkerboard", detector="zn", conditions=14):
    return vae.Autoencoder(arch, variant, 3, likelihood, data.DETECTORS[detector], conditions, KEY)


def filled_network(*which):
    """network(*which) with weights from NumPy, which need not be compiled."""
    shapes, rest = eqx.partition(eqx.filter_eval_shape(network, *which), lambda leaf: hasattr(leaf, "shape"))
    rng = np.random.default_rng(0)
    weights = lambda leaf: 10 if leaf.dtype == jnp.int32 else 0.3 * rng.normal(size=leaf.shape)
    fill = lambda leaf: jnp.asarray(weights(leaf), leaf.dtype)
    return eqx.combine(jax.tree.map(fill, shapes), rest)


# -------------------------------------------------------------------------------------------------- objective

class NormalPrior:
    """The photon sum is 4 and does not matter."""
    totals = None
    log = staticmethod(lambda z, total, c: -jnp.sum(z**2) / 2 + jnp.where(total == 4, 0.0, jnp.nan))
    draw = staticmethod(lambda noise, total, c: noise)


class Photons:
    """Photons from Poisson distributions of the rates exp(h)."""
    class head:
        loss = staticmethod(lambda h, counts: data.poisson_loss(counts, h).mean())
        draw = staticmethod(lambda h, key: jax.random.poisson(key, jnp.exp(h)))


class OneFibre:
    """Latent z ~ N(0, 1), photons from a Poisson distribution of the rate exp(z), any normal q(z | x)."""
    decoder = Photons
    mean, std, prior = 0.3, 0.6, NormalPrior
    encode = staticmethod(lambda x, c: jnp.log(jnp.array([math.exp(0.3), 0.6])))
    decode = staticmethod(lambda z, total, c: z.reshape(1, 1))


def test_elbo_misses_the_likelihood_by_the_divergence_from_the_posterior():
    """-elbo = log p(x) - KL(q || p(z | x)), the right side by integration."""
    n, z = 4, np.linspace(-8, 8, 20_001)
    joint = norm.logpdf(z) + poisson.logpmf(n, np.exp(z))
    log_p = np.log(np.exp(joint).sum() * (z[1] - z[0]))
    q = norm(OneFibre.mean, OneFibre.std)
    divergence = (q.pdf(z) * (q.logpdf(z) - joint + log_p)).sum() * (z[1] - z[0])
    loss = lambda noise: vae.elbo(OneFibre, jnp.full((1, 1), float(n)), jnp.zeros(14), noise, "checkerboard")
    reconstruction, kl = jax.vmap(loss)(jax.random.normal(KEY, (100_000, 1)))
    assert reconstruction.mean() + kl.mean() == pytest.approx(divergence - log_p, rel=0.01)
    expected = (q.pdf(z) * (q.logpdf(z) - norm.logpdf(z))).sum() * (z[1] - z[0])
    assert kl.mean() == pytest.approx(expected, rel=0.01)


def test_loss_of_the_prior_alone_is_the_cross_entropy():
    """- E log p(z, S | c) for z ~ q(z | x, c), by integration, but for the constant."""
    code, z = np.log(np.array([[math.exp(0.3), 0.6]], np.float32)), np.linspace(-8, 8, 20_001)
    codes = code.repeat(50_000, axis=0)
    total, c = np.full(50_000, 4.0, np.float32), np.zeros((50_000, 14), np.float32)
    nats, parts = vae.prior_loss(NormalPrior, codes, total, c, KEY)
    density = norm(OneFibre.mean, OneFibre.std).pdf(z)
    assert nats == parts["nats"] == pytest.approx((density * z**2 / 2).sum() * (z[1] - z[0]), rel=0.02)


class ThreeLatents:
    """Encoder and generator whose latents are known."""
    prior = NormalPrior
    encode = staticmethod(lambda x, c: 3 * c)
    generate = staticmethod(lambda c, noise: c + noise)
    decode = staticmethod(lambda z, total, c: jnp.zeros((2, 2)))


def test_latents_of_eq_1_and_of_the_noise_generator():
    counts, c = jnp.ones((2, 2)), jnp.array([1.0, 2.0])
    error, distance = vae.supervised_loss(ThreeLatents, counts, c, jnp.zeros(0), "mse")
    assert error == pytest.approx(math.log(2)**2) and distance == pytest.approx((2**2 + 4**2) / 2)
    error, distance = vae.noise_l2_loss(ThreeLatents, counts, c, jnp.array([1.0, 1.0]), "mse")
    assert error == pytest.approx(math.log(2)**2) and distance == pytest.approx((1**2 + 3**2) / 2)


def test_sinkhorn_generator_matches_the_latents_of_each_particle():
    """Right latents of the wrong particles are wrong, the order within a particle does not matter."""
    counts, c = jnp.ones((40, 2, 2)), jnp.repeat(jnp.array([[-1.0], [1.0]]), 20, axis=0)
    spread = jnp.linspace(-1, 1, 20)[:, None]

    class Net(ThreeLatents):
        encode = staticmethod(lambda x, c: 3 * c + x.sum() - 4 * math.log(2))
    counts = jnp.expm1(math.log(2) + jnp.tile(spread, (2, 1))[:, :, None] / 4 * jnp.ones((2, 2)))
    distance = lambda noise: vae.noise_sinkhorn_loss(Net, counts, c, noise, "mse")[1]
    offsets = jnp.tile(spread[::-1], (2, 1))
    assert distance(2 * c + offsets) == pytest.approx(0, abs=1e-3)
    assert distance(-4 * c + offsets) > 0.5                                    # latents of the other particle
    assert distance(2 * c) > 0.05                                              # their means alone


class Decoder:
    class head:
        loss = staticmethod(lambda h, counts: jnp.mean(3 * h - counts))
        draw = staticmethod(lambda h, key: h)


def test_reconstruction_loss_is_the_log_likelihood():
    """That of checkerboard.py, or squares."""
    rng = np.random.default_rng(1)
    decoded, counts = np.float32(rng.normal(0, 1.5, (10, 20))), rng.poisson(3, (10, 20)).astype(np.float32)

    class Net:
        decode, decoder = staticmethod(lambda z, total, c: z + c), Decoder
    expected = {"checkerboard": (3 * decoded - counts).mean(),
                "mse": np.mean((decoded - np.log1p(counts))**2)}
    for likelihood, value in expected.items():
        found = vae.reconstruction_loss(Net, decoded - 1, counts, 1.0, likelihood)
        assert found == pytest.approx(float(value), rel=1e-4)


def test_batch_loss_weighs_its_terms():
    """Both terms of "checkerboard" count the latent; squares are a normal likelihood of best variance."""
    counts, c = np.full((5, 1, 1), 4, np.uint16), np.zeros((5, 14), np.float32)

    class Net(OneFibre):
        noise = 1
        decoder = Decoder
    for likelihood, weight in (("checkerboard", 2), ("mse", 1)):
        loss, parts = vae.batch_loss(Net, counts, c, KEY, "vae", likelihood, beta=0.7)
        first = float(parts["reconstruction"])
        if likelihood == "mse":                # -log N(x; 0, v) at v = <x^2>, but for a constant
            first = -norm(0, math.sqrt(first)).logpdf(math.sqrt(first)) - 0.5 * math.log(2 * math.pi) - 0.5
        assert loss == pytest.approx(first + 0.7 * weight * float(parts["latent"]), rel=1e-5)
    each = jax.vmap(lambda noise: vae.elbo(Net, jnp.full((1, 1), 4.0), c[0], noise, "checkerboard"))
    parts = vae.batch_loss(Net, counts, c, KEY, "vae", "checkerboard", beta=1.0)[1]
    np.testing.assert_allclose([parts["reconstruction"], parts["latent"]],
                               np.mean(each(jax.random.normal(KEY, (5, 1))), axis=1), rtol=1e-6)


# ---------------------------------------------------------------------------------------- Sinkhorn divergence

def points(seed, rows=40, dimensions=3, shift=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(shift, 1, (rows, dimensions)), jnp.float32)


def test_sinkhorn_is_exact_transport_without_blur():
    """With uniform weights of equally many points, optimal transport is an assignment."""
    a, b = points(0), points(1, shift=0.7)
    cost = cdist(a, b, "sqeuclidean") / 2
    exact = cost[linear_sum_assignment(cost)].mean()
    assert vae.sinkhorn(a, b, rounds=3000, blur=1e-3) == pytest.approx(exact, rel=0.01)
    dual = vae.transport(jnp.asarray(cost, jnp.float32), 1e-3 * cost.mean(), 3000)
    assert dual == pytest.approx(exact, rel=2e-2)


def test_transport_is_that_of_pot():
    """Dual value and plan of POT's Sinkhorn in logarithms, float64; the gradient by the cost is the plan."""
    cost = cdist(points(2, 12), points(3, 12, shift=1.0), "sqeuclidean") / 2
    weights, epsilon = np.full(12, 1 / 12), 0.5
    plan = ot.sinkhorn(weights, weights, cost, epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
    expected = (plan * cost).sum() + epsilon * (plan * np.log(plan * 144)).sum()
    value, gradient = jax.value_and_grad(vae.transport)(jnp.asarray(cost, jnp.float32), epsilon, 200)
    assert value == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(gradient, plan, atol=2e-5)


def test_sinkhorn_is_that_of_pot():
    """The debiased divergence, and its gradient with respect to the points."""
    a, b = points(8, 30), points(9, 30, shift=0.6)
    epsilon = 0.2 * (cdist(a, b, "sqeuclidean") / 2).mean()
    plan = lambda x, y: ot.sinkhorn([], [], cdist(x, y, "sqeuclidean") / 2, epsilon, method="sinkhorn_log",
                                    numItermax=20_000, stopThr=1e-9)

    def value(x, y):
        p = plan(x, y)
        entropy = (p * np.log(np.maximum(p, 1e-300) * 900)).sum()
        return (p * cdist(x, y, "sqeuclidean") / 2).sum() + epsilon * entropy
    expected = value(a, b) - (value(a, a) + value(b, b)) / 2
    found, gradient = jax.value_and_grad(lambda a: vae.sinkhorn(a, b, rounds=1000, blur=0.2))(a)
    assert found == pytest.approx(expected, rel=2e-3)
    drawn = lambda p, x, y: p.sum(1)[:, None] * x - p @ y                      # sum_j P_ij (x_i - y_j)
    np.testing.assert_allclose(gradient, drawn(plan(a, b), a, b) - drawn(plan(a, a), a, a), atol=2e-4)


def test_sinkhorn_is_a_divergence():
    a, b = points(4), points(5, shift=0.5)
    assert vae.sinkhorn(a, a) == pytest.approx(0, abs=1e-5) and vae.sinkhorn(a, b) > 0.05
    assert vae.sinkhorn(a, b) == pytest.approx(float(vae.sinkhorn(b, a)), rel=1e-3)
    assert vae.sinkhorn(a, a[::-1]) == pytest.approx(0, abs=1e-4)              # of distributions, not of rows
    far = vae.sinkhorn(a + 1000, b + 1000)
    assert far == pytest.approx(float(vae.sinkhorn(a, b)), rel=1e-2)           # nothing cancels
    moved = a + jnp.array([1.0, 0, 0])
    assert vae.sinkhorn(a, moved) == pytest.approx(0.5, rel=0.05)              # |shift|^2 / 2


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_sinkhorn_stays_finite(scale):
    a, b = scale * points(6), scale * points(7, shift=3.0)
    value, gradient = jax.value_and_grad(lambda a: vae.sinkhorn(a, b))(a)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    if scale in (1e-3, 1e3):
        expected = scale**2 * float(vae.sinkhorn(points(6), points(7, shift=3.0)))
        assert value == pytest.approx(expected, rel=1e-2)


# ---------------------------------------------------------------------------------------------------- sampler

def test_counts_are_those_of_the_checkerboard():
    decoded = jnp.arange(8.0).reshape(2, 2, 2)
    found = vae.draw_response(SimpleNamespace(decoder=Decoder), decoded, "checkerboard", KEY)
    np.testing.assert_array_equal(found, decoded)


def test_log_responses_are_rounded():
    counts = np.random.default_rng(3).poisson(2, (2, 44, 44))
    drawn = vae.draw_response(None, jnp.log1p(jnp.float32(counts)), "mse", KEY)
    np.testing.assert_array_equal(drawn, counts)


def test_new_latents_are_those_of_the_loss():
    """The prior's noise, the particle, or what the generator makes of both."""
    for variant, expected in (("vae", [5.0]), ("supervised", [1.0, 2.0]), ("noise-l2", [6.0, 7.0])):
        ThreeLatents.variant = variant
        drawn = vae.draw_latent(ThreeLatents, jnp.array([1.0, 2.0]), jnp.array([5.0]), jnp.array(4.0))
        assert drawn.tolist() == expected


def test_samples_have_a_fresh_latent_each_and_fresh_photons_in_each_fibre(monkeypatch):
    monkeypatch.setattr(vae, "draw_totals", lambda net, c, key: jnp.full(len(c), 4.0))

    class Net(ThreeLatents):
        variant, noise, decoder = "vae", 1, Photons
        decode = staticmethod(lambda z, total, c: jnp.broadcast_to(c[0] + z[0], (10, 10)))  # rate exp(c + z)
    many = jax.jit(partial(vae.sample, Net, likelihood="checkerboard"))(jnp.full((2000, 14), 5.0), KEY)
    assert many.shape == (2000, 10, 10) and many.dtype == jnp.uint16
    rates = np.mean(many, axis=(1, 2))
    assert np.log(rates).mean() == pytest.approx(5, abs=0.1)
    assert np.log(rates).std() == pytest.approx(1, abs=0.1)
    assert np.median(np.var(many, axis=(1, 2)) / rates) == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("latent", [1, 2, 3, 24])
def test_prior_is_the_density_of_its_draws(latent):
    """log p of a draw is that of its noise and of the sum less the log of the determinant of the Jacobian."""
    prior, rng = vae.Prior(latent, data.DETECTORS["zn"], 14, KEY, depth=4, width=8), np.random.default_rng(0)
    draw, total = jax.jit(jax.vmap(prior.draw)), jnp.array([10.0, 12, 50, 300, 2000, 9000])
    noise, c = (jnp.asarray(rng.normal(size=(6, n)), jnp.float32) for n in (latent, 14))
    z, slope = draw(noise, total, c), jax.jit(jax.vmap(jax.jacobian(prior.draw)))(noise, total, c)
    expected = -np.sum(noise**2, axis=1) / 2 - np.linalg.slogdet(np.asarray(slope, np.float64))[1]
    expected -= jax.vmap(partial(sum_nll, prior.totals))(total, c)
    np.testing.assert_allclose(jax.jit(jax.vmap(prior.log))(z, total, c), expected, rtol=1e-3, atol=1e-3)
    for other in (draw(noise, total, c + 1), draw(noise, 2 * total, c)):
        assert (np.abs(other - z) > 1e-5).all()


@pytest.mark.parametrize("detector, likelihood, conditions, precision", [
    ("zn", "checkerboard", 14, "f32"), ("zp", "mse", 9, "bf16")])
@pytest.mark.parametrize("arch, variant", EVERY)
def test_shapes(arch, variant, detector, likelihood, conditions, precision):
    shape = data.DETECTORS[detector].shape
    net = eqx.filter_eval_shape(network, arch, variant, likelihood, detector, conditions)
    counts, c = np.zeros((4, *shape), np.uint16), np.zeros((4, conditions), np.float32)
    lowered = common.lower(net, precision), counts, c, KEY
    loss, parts = eqx.filter_eval_shape(vae.batch_loss, *lowered, variant, likelihood, 1.0)
    assert loss.shape == () and loss.dtype == jnp.float32 and parts.keys() == {"reconstruction", "latent"}
    responses = eqx.filter_eval_shape(vae.sample, net, c, KEY, likelihood)
    assert responses.shape == (4, *shape) and responses.dtype == jnp.uint16


@pytest.mark.parametrize("variant", vae.LOSSES)
def test_what_encoder_and_decoder_see_of_the_particle(variant, small_detectors):
    """The particle only where the variant says so; a noise generator depends on particle and noise."""
    net = filled_network("mixer", variant)

    @jax.jit
    def outputs(c, noise, total=50.0):
        made = net.generate(c, noise) if variant.startswith("noise") else c + noise.sum()
        return net.encode(jnp.zeros((12, 12)), c), net.decode(jnp.zeros(net.latent), total, c), made
    before = outputs(jnp.zeros(14), jnp.zeros(vae.NOISE))
    changed = [not np.array_equal(a, b) for a, b in zip(before, outputs(jnp.ones(14), jnp.zeros(vae.NOISE)))]
    assert changed == [variant == "vae", variant == "vae", True]
    assert not np.array_equal(before[2], outputs(jnp.zeros(14), jnp.ones(vae.NOISE))[2])
    brighter = outputs(jnp.zeros(14), jnp.zeros(vae.NOISE), 500.0)[1]
    assert np.array_equal(before[1], brighter) == (variant != "vae")
    elsewhere = outputs(jnp.ones(14).at[-3:].set(0.0), jnp.zeros(vae.NOISE))[1]
    np.testing.assert_array_equal(before[1], elsewhere)                        # the impact points alone


@pytest.mark.parametrize("arch, variant, likelihood", [
    ("cnn", "noise-sinkhorn", "mse"), ("mixer", "vae", "checkerboard"), ("vit", "supervised", "mse")])
def test_every_weight_learns(arch, variant, likelihood, small_detectors):
    rng = np.random.default_rng(0)
    counts, c = rng.poisson(2, (6, 12, 12)).astype(np.uint16), rng.normal(size=(6, 14)).astype(np.float32)
    loss = lambda net: vae.batch_loss(net, counts, c, KEY, variant, likelihood, 1.0)[0]
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(filled_network(arch, variant, likelihood))
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.device_get(jax.tree.leaves(gradient)))


# ------------------------------------------------------------------------------------------------------- runs
# Step and loop are fm.py's, where resuming is tested.

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    folder = tmp_path_factory.mktemp("vae") / "run"
    return folder, vae.main([*FLAGS, "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    log = files.read_log(folder)
    assert log[-1]["reconstruction"] < 0.8 * log[0]["reconstruction"] and log[-1]["latent"] > 0
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 1
    assert {path.name for path in folder.iterdir()} == {"state.eqx", "model.eqx", "log.jsonl", "metrics.json",
                                                        "samples.png", "channels.png", "training.png",
                                                        "prior"}


def test_the_prior_learns_on_alone(trained):
    log = files.read_log(trained[0] / "prior")
    assert log[-1]["step"] == 3 * (489 // 64) and log[-1]["nats"] < log[0]["nats"]


def test_resumed_before_the_prior_learns(trained, tmp_path):
    """A run that was cut off between the two trainings ends in the same numbers."""
    folder, result = trained
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("prior"))
    assert vae.main([*FLAGS, "--resume", "--run", str(tmp_path / "run")])["seen"] == result["seen"]


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    again = vae.main(["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)])
    assert all(again[name] == result[name] for name in ("seen", "unseen", "flags"))


@pytest.mark.parametrize("flags, message", [
    ("--batch-size 500", "expected 2 to 489"), ("--steps 3", "unrecognized"),
    ("--arch resnet", "invalid choice"), ("--latent 0", "between 1 and 1024"),
    ("--generate a.csv", "--generate needs --out and --load")])
def test_wrong_flags(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: vae.main([*FLAGS, *flags.split(), "--run", str(tmp_path / "run")]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_checkpoint_of_another_script(tmp_path):
    header = {"script": "fm", "detector": "zn", "flags": {}, "scaler": {}}
    common.save_checkpoint(tmp_path / "model.eqx", header, {})
    with pytest.raises(UserError, match="made by script fm, expected script vae"):
        vae.main(["--load", str(tmp_path / "model.eqx")])
