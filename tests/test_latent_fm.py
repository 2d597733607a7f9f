"""latent_fm.py: Eq. 7 and what stands in for VGG16, the latents, the stages and their states, every kind of run."""
import json
import math
import shutil
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import common
import data
import latent_fm
import metrics
import tiny
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "1", "--flow-epochs", "1", "--batch-size", "64", "--steps", "2", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(latent_fm, "Encoder", partial(latent_fm.Encoder, width=32, depth=1))
        patch.setattr(latent_fm, "Decoder", partial(latent_fm.Decoder, width=32, depth=1, hidden=16))
        patch.setitem(latent_fm.FLOWS, "dense", partial(latent_fm.DenseFlow, width=16, depth=1, embedding=16, times=8))
        yield


def arguments(*flags):
    args = latent_fm.flags().parse_args([*FLAGS, *map(str, flags)])
    likelihood = "mse" if args.net == "paper" else args.likelihood
    return common.with_flags(args, latent=args.latent or 4, likelihood=likelihood, stage="1" if args.stage == "both" else args.stage)


def counts_like(rows, detector="zn", seed=0):
    return jnp.asarray(np.random.default_rng(seed).poisson(0.3, (rows, *data.DETECTORS[detector].shape)), jnp.float32)


# -------------------------------------------------------------------------------------------------- objective, stage 1

@pytest.fixture(scope="module")
def paper():
    """(network, counts, log responses, reconstructions, feature maps) of the paper's stage 1."""
    net = latent_fm.make_network(arguments("--net", "paper"), 14, KEY)
    counts = counts_like(3)
    x = jnp.log1p(counts)
    made = x + 0.3 * jax.random.normal(KEY, x.shape) * jnp.array([1.0, 5.0, 0.1])[:, None, None]
    return net, counts, x, made, jax.vmap(net.features)(x)[0]


@pytest.mark.parametrize("term", range(3), ids=("squares", "perceptual", "adversarial"))
def test_each_term_of_eq_7_has_the_stated_gradient(paper, term):
    """Norm 1 / B in every example, in the direction of the term's own gradient."""
    net, _, x, made, maps = paper
    found = jax.grad(lambda made: latent_fm.judge(net, made, x, maps)[term].sum())(made)
    np.testing.assert_allclose(jnp.sqrt(jnp.sum(found**2, axis=(1, 2))), 1 / len(x), rtol=1e-4)
    seen = lambda made: jax.vmap(net.features)(made)[0]
    plain = (lambda made: jnp.sum((made - x)**2), lambda made: latent_fm.perceptual(seen(made), maps).sum(),
             lambda made: -jax.vmap(net.critic)(seen(made)).mean(1).sum())[term]
    own = jax.grad(plain)(made)
    cosine = jnp.sum(found * own, axis=(1, 2)) / jnp.sqrt(jnp.sum(found**2, axis=(1, 2)) * jnp.sum(own**2, axis=(1, 2)))
    np.testing.assert_allclose(cosine, 1, atol=1e-4)


def test_terms_keep_their_values(paper):
    """The normalisation changes gradients alone; perceptual is 0 for a perfect reconstruction."""
    net, _, x, made, maps = paper
    squares, percept, fooled = latent_fm.judge(net, made, x, maps)
    np.testing.assert_allclose(squares, np.sum(np.square(np.float64(made) - x), axis=(1, 2)), rtol=1e-5)
    expected = 0.0
    for theirs, ours in zip(maps, jax.vmap(net.features)(made)[0]):
        theirs, ours = (np.float64(m) / np.sqrt(np.square(np.float64(m)).sum(-1, keepdims=True) + 1e-2) for m in (theirs, ours))
        expected += np.square(theirs - ours).sum(-1).mean((1, 2))
    np.testing.assert_allclose(percept, expected, rtol=1e-3)
    assert fooled.shape == (3,) and np.allclose(latent_fm.judge(net, x, x, maps)[1], 0)


def test_every_part_learns_from_its_own_terms(paper):
    """Critic from the hinge loss, features from the regression, and the autoencoder's terms touch neither."""
    net, counts, x, _, maps = paper
    args = arguments("--net", "paper")
    found = eqx.filter_grad(lambda net: latent_fm.paper_loss(net, counts, None, KEY, args)[0])(net)
    mean, std = latent_fm.gaussian(jax.vmap(net.autoencoder.encode)(x, jnp.zeros((3, 14))))
    made = jax.vmap(net.autoencoder.decode)(mean + std * jax.random.normal(KEY, mean.shape), jnp.zeros((3, 14)))[:, 0]
    made_maps = jax.vmap(net.features)(made)[0]
    hinge = lambda critic: (jnp.maximum(1 - jax.vmap(critic)(maps), 0).mean() + jnp.maximum(1 + jax.vmap(critic)(made_maps), 0).mean())
    regression = lambda features: jnp.mean((jax.vmap(features)(x)[1] - latent_fm.quantities(counts))**2)
    for part, loss in (("critic", hinge), ("features", regression)):
        expected = eqx.filter_grad(loss)(getattr(net, part))
        for a, b in zip(jax.tree.leaves(getattr(found, part)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(found.autoencoder))


def test_kl_is_scaled_as_the_squares(paper):
    """d loss / d beta is the mean over examples of KL / |gradient of the squares|, Eq. 7's L_VAE as one term."""
    net, counts, x, _, _ = paper
    loss = lambda beta: latent_fm.paper_loss(net, counts, None, KEY, arguments("--net", "paper", "--beta", beta))[0]
    mean, std = latent_fm.gaussian(jax.vmap(net.autoencoder.encode)(x, jnp.zeros((3, 14))))
    made = jax.vmap(net.autoencoder.decode)(mean + std * jax.random.normal(KEY, mean.shape), jnp.zeros((3, 14)))[:, 0]
    slope = jax.vmap(jax.grad(lambda made, x: jnp.sum((made - x)**2)))(made, x)
    expected = jnp.mean(latent_fm.divergence(mean, std) / jnp.sqrt(jnp.sum(slope**2, axis=(1, 2))))
    np.testing.assert_allclose(float(loss(100.0) - loss(0.0)) / 100, expected, rtol=1e-2)


def test_quantities():
    """What the features learn to tell, beside metrics.channels and a plain centre of gravity."""
    counts = np.random.default_rng(2).poisson(0.5, (4, 56, 30)).astype(np.uint16)
    found = latent_fm.quantities(jnp.asarray(counts, jnp.float32))
    np.testing.assert_allclose(found[:, :5], np.log1p(metrics.channels(counts)), rtol=1e-5)
    total = counts.sum((1, 2))
    np.testing.assert_allclose(found[:, 5], np.log1p(total), rtol=1e-5)
    x = (counts.sum(2) * (2 * np.arange(56) / 55 - 1)).sum(1) / (total + 1)
    y = (counts.sum(1) * (2 * np.arange(30) / 29 - 1)).sum(1) / (total + 1)
    np.testing.assert_allclose(found[:, 6:], np.stack([x, y], axis=1), atol=1e-5)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.5, 0.3), (-0.7, 2.0)])
def test_divergence_is_that_of_the_integral(mean, std):
    p, q = stats.norm(mean, std), stats.norm()
    expected = integrate.quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), mean - 12 * std, mean + 12 * std)[0]
    found = latent_fm.divergence(jnp.full((2, 5), mean), jnp.full((2, 5), std))
    np.testing.assert_allclose(found, 5 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["poisson", "logistic"])
def test_dense_loss_is_the_evidence_bound(likelihood):
    """-log p per fibre by scipy, and KL, for the latents that the same key draws."""
    args, counts, c = arguments("--latent", 3, "--likelihood", likelihood), counts_like(4), jnp.zeros((4, 14))
    net = latent_fm.make_network(args, 14, KEY)
    loss, parts = latent_fm.dense_loss(net, counts, c, KEY, args)
    mean, std = latent_fm.gaussian(jax.vmap(net.autoencoder.encode)(jnp.log1p(counts), c))
    maps = np.float64(jax.vmap(net.autoencoder.decode)(mean + std * jax.random.normal(KEY, (4, 3)), c))
    rate, counts = np.exp(maps[:, -1]), np.asarray(counts)
    expected = -stats.poisson.logpmf(counts, rate).mean()
    if likelihood == "logistic":
        law = stats.logistic(maps[:, 0] + 2 * np.sqrt(rate), np.exp(maps[:, 1]))
        below = np.where(counts > 0, law.cdf(2 * np.sqrt(np.maximum(counts - 0.5, 0))), 0)
        expected -= np.log(law.cdf(2 * np.sqrt(counts + 0.5)) - below).mean()
    np.testing.assert_allclose(parts["reconstruction"], expected, rtol=1e-4)
    np.testing.assert_allclose(loss, expected + latent_fm.divergence(mean, std).mean() / 1936, rtol=1e-4)


# ----------------------------------------------------------------------------------------- latents, objective of stage 2

def test_moments():
    """Of draws from the codes themselves."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.normal(2, 3, (4000, 5)), rng.normal(-1, 0.5, (4000, 5))], axis=1).astype(np.float16)
    draws = codes[:, 0].astype(float) + np.exp(codes[:, 1].astype(float)) * rng.normal(size=(4000, 5))
    mean, std = latent_fm.moments(codes)
    np.testing.assert_allclose(mean, draws.mean(0), atol=0.1)
    np.testing.assert_allclose(std, draws.std(0), rtol=0.05)


def test_flow_loss_is_least_for_the_right_velocity():
    """Codes of one point without spread: from (z, t) the noise, and so the velocity, is known."""
    point = jnp.array([1.0, -2.0, 0.5])
    codes = jnp.broadcast_to(jnp.stack([point, jnp.full(3, -20.0)]), (8, 2, 3))
    exact = lambda z, t, c: (point - z) / (1 - t)
    c, args = jnp.zeros((8, 14)), arguments("--latent", 3)
    assert latent_fm.flow_loss(exact, codes, c, KEY, args)[0] < 1e-4
    assert latent_fm.flow_loss(lambda z, t, c: exact(z, t, c) + 1, codes, c, KEY, args)[0] == pytest.approx(1, rel=1e-2)


def test_flow_loss_weighs_by_precision():
    """An error costs more in a number that the encoder tells exactly; with weights of mean 1."""
    stds = np.array([0.1, 0.5, 1.0])
    codes = jnp.broadcast_to(jnp.stack([jnp.zeros(3), jnp.log(stds)]), (64, 2, 3))
    c, args, draw = jnp.zeros((64, 14)), arguments("--latent", 3), {}

    def spy(z, t, c):
        jax.debug.callback(lambda t: draw.setdefault("t", []).append(float(t)), t)
        return 1e3 * jnp.array([1.0, 0, 0])                                    # so wrong that the right velocity hardly matters
    loss = latent_fm.flow_loss(spy, codes, c, KEY, args)[0]
    jax.effects_barrier()
    weights = 1 / (stds**2 + 0.05)
    assert loss == pytest.approx(1e6 * weights[0] / weights.sum(), rel=1e-2)
    assert stats.kstest(draw["t"], lambda t: np.sqrt(np.clip(t, 0, 1))).pvalue > 0.01   # of u^2, u uniform


@pytest.mark.parametrize("solver, error", [("ab2", 0.03), ("euler", 0.3)])
def test_the_path_of_a_gaussian(solver, error):
    """Latents N(0, s^2): the exact velocity carries z_0 to s z_0."""
    s = 0.2
    v = lambda z, t: z * (t * s**2 - (1 - t)) / ((1 - t)**2 + t**2 * s**2)
    coarse, fine = (latent_fm.integrate(v, jnp.ones(1), steps, solver)[0] for steps in (16, 64))
    assert abs(fine - s) < error * s and abs(fine - s) < abs(coarse - s)


def test_new_latents_have_the_stored_spread():
    """A flow that stands still leaves N(0, 1), which mean and std of the checkpoint stretch."""
    args = arguments("--latent", 3)
    mean, std = jnp.array([1.0, -5.0, 0.0]), jnp.array([1.0, 0.1, 30.0])

    class Plain(eqx.Module):
        def decode(self, z, c):
            return z
    net = latent_fm.LatentFM(Plain(), mean, std, lambda z, t, c: jnp.zeros_like(z))
    seen = latent_fm.decode_new(net, jnp.zeros((2000, 14)), KEY, args)
    assert seen.shape == (2000, 3) and (np.abs(seen.mean(0) - mean) < 0.1 * std).all()
    np.testing.assert_allclose(seen.std(0), std, rtol=0.1)


# -------------------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector", data.DETECTORS)
@pytest.mark.parametrize("net", latent_fm.AUTOENCODERS)
@pytest.mark.parametrize("flags, conditions", [((), 14), (("--cond", "raw", "--precision", "bf16"), 9)])
def test_shapes(net, detector, flags, conditions):
    args = arguments("--net", net, "--detector", detector, *flags)
    shape, z = data.DETECTORS[detector].shape, latent_fm.latent_shape(args)
    batch = {"1": np.zeros((4, *shape), np.uint16), "2": np.zeros((4, 2, *z), np.float16)}
    for stage in "12":
        here = common.with_flags(args, stage=stage)
        trainee = eqx.filter_eval_shape(latent_fm.make_network, here, conditions, KEY)
        loss, _ = eqx.filter_eval_shape(lambda net: latent_fm.batch_loss(net, batch[stage], np.zeros((4, conditions)), KEY, here), trainee)
        assert loss.shape == () and loss.dtype == jnp.float32
    made = eqx.filter_eval_shape(latent_fm.make_latent_fm, args, conditions, KEY)
    autoencoder = eqx.filter_eval_shape(latent_fm.AUTOENCODERS[net], args, conditions, KEY)
    codes = eqx.filter_eval_shape(lambda net: net.encode(jnp.zeros(shape), jnp.zeros(conditions)), autoencoder)
    assert codes.shape == (2, *z)
    counts = eqx.filter_eval_shape(lambda net: latent_fm.to_counts(latent_fm.decode_new(net, jnp.zeros((4, conditions)), KEY, args), KEY,
                                                                   args), made)
    assert counts.shape == (4, *shape) and counts.dtype == jnp.uint16


def test_size_of_the_papers_autoencoder():
    net = latent_fm.PaperAutoencoder(arguments("--net", "paper"), 14, KEY)
    assert math.prod(latent_fm.latent_shape(arguments("--net", "paper"))) == 11 * 11 * 4
    assert common.count_parameters(net) == pytest.approx(60_000, rel=0.1)


def test_who_knows_the_particle():
    """Ours in encoder, decoder and flow; the paper's autoencoder does not."""
    c, other, x = jnp.zeros(14), jnp.ones(14), jnp.ones((44, 44))
    for name in latent_fm.AUTOENCODERS:
        args = arguments("--net", name)
        net, z = latent_fm.AUTOENCODERS[name](args, 14, KEY), jnp.ones(latent_fm.latent_shape(args))
        both = eqx.filter_jit(lambda net, c: (net.encode(x, c), net.decode(z, c)))
        assert [np.array_equal(a, b) for a, b in zip(both(net, c), both(net, other))] == 2 * [name == "paper"]
    flow = latent_fm.DenseFlow(4, 14, KEY)
    assert not np.array_equal(flow(jnp.ones(4), jnp.array(0.5), c), flow(jnp.ones(4), jnp.array(0.5), other))


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    folder = tmp_path_factory.mktemp("latent") / "run"
    return folder, latent_fm.main([*FLAGS, "--epochs", "20", "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 3
    assert {"model.eqx", "metrics.json", "samples.png", "channels.png", "stage1", "stage2"} <= {path.name for path in folder.iterdir()}
    reconstruction = [record["reconstruction"] for record in common.read_log(folder / "stage1")]
    assert reconstruction[-1] < 0.8 * reconstruction[0]
    assert result["reconstruction"]["R"] == pytest.approx(result["reconstruction"]["W"] / result["reconstruction"]["oracle"])


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    again = latent_fm.main(["--load", str(folder / "model.eqx"), "--steps", "2", "--quiet", "--run", str(tmp_path)])
    assert [again[name] for name in ("seen", "unseen", "flags", "reconstruction")] == [
        result[name] for name in ("seen", "unseen", "flags", "reconstruction")]


def test_one_stage_after_the_other(trained, tmp_path):
    """The same numbers as both in one run; stage 2 again, with other flags of its own, leaves stage 1 as it is."""
    folder, result = trained
    flags = [*FLAGS, "--epochs", "20", "--run", str(tmp_path)]
    told = latent_fm.main([*flags, "--stage", "1"])
    assert told["reconstruction"] == result["reconstruction"] and not (tmp_path / "model.eqx").exists()
    first = (tmp_path / "stage1" / "state.eqx").read_bytes()
    second = latent_fm.main([*flags, "--stage", "2"])
    assert (second["seen"], second["reconstruction"]) == (result["seen"], result["reconstruction"])
    other = latent_fm.main([*flags, "--stage", "2", "--flow-epochs", "2"])
    assert other["seen"] != result["seen"] and other["reconstruction"] == result["reconstruction"]
    assert (tmp_path / "stage1" / "state.eqx").read_bytes() == first


def test_a_flow_goes_with_its_autoencoder(trained, tmp_path):
    """A finished stage 2 is not taken for that of an autoencoder trained anew."""
    shutil.copytree(trained[0], tmp_path / "run")
    flags = [*FLAGS, "--epochs", "2", "--run", str(tmp_path / "run")]
    latent_fm.main([*flags, "--stage", "1"])
    with pytest.raises(UserError, match="different: stage1_epochs"):
        latent_fm.main([*flags, "--resume"])


def test_stage_2_needs_its_stage_1(trained, tmp_path):
    with pytest.raises(UserError, match="train stage 1 first"):
        latent_fm.main([*FLAGS, "--stage", "2", "--run", str(tmp_path)])
    with pytest.raises(UserError, match="needs the flags of the first run; different: beta"):
        latent_fm.main([*FLAGS, "--epochs", "20", "--beta", "5", "--stage", "2", "--run", str(trained[0])])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch, small_detectors):
    """A kill in the second stage, which needs the first."""
    monkeypatch.setattr(common, "time", tiny.clock())
    flags = [*FLAGS, "--flow-epochs", "3"]
    dataset = data.open_data("zn", 700, quiet=True)
    scaler = data.fit_conditions(dataset.particles, "physics")

    def run(*more):
        args = common.with_flags(latent_fm.flags().parse_args([*flags, *map(str, more)]), latent=4)
        return latent_fm.train_stages(args, dataset, np.arange(489), scaler)[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("stage2",))


def test_the_papers_model(tmp_path, small_detectors):
    """Both stages and the scores; the parts of Eq. 7 are in the log."""
    result = latent_fm.main([*FLAGS, "--net", "paper", "--detector", "zp", "--run", str(tmp_path)])
    assert {"squares", "divergence", "perceptual", "fooled", "features", "critic"} <= common.read_log(tmp_path / "stage1")[-1].keys()
    assert result["flags"]["latent"] == 4 and np.isfinite(result["seen"]["W"]["value"])


def test_sweep(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_fm, "SWEEP", (1, 2))
    found = latent_fm.main(["--load", str(trained[0] / "model.eqx"), "--sweep", "--quiet", "--run", str(tmp_path)])
    assert [point["steps"] for point in found["points"]] == [1, 2] and (tmp_path / "sweep.png").exists()


def test_two_devices(tmp_path, small_detectors):
    """Two devices share a batch and end in the same numbers as one, in both stages."""
    dataset = data.open_data("zn", 700, quiet=True)
    scaler = data.fit_conditions(dataset.particles, "physics")

    def run(n):
        args = latent_fm.flags().parse_args([*FLAGS, "--devices", str(n), "--run", str(tmp_path / str(n))])
        return latent_fm.train_stages(common.with_flags(args, latent=4), dataset, np.arange(489), scaler)[0]
    one, two = (jax.tree.leaves(eqx.filter(run(n), eqx.is_array)) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-3)
