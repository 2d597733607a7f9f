"""diffusion.py: schedules, loss and steps against closed forms, samplers on a Gaussian, one run."""
import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit
from scipy.stats import logistic

import common
import data
import diffusion
import tiny
from simulator import DETECTORS

pytestmark = pytest.mark.usefixtures("small_detectors", "shrunk")
KEY = jax.random.key(0)
FULL = dict(DETECTORS)                                                         # before they are made small
FLAGS = [*tiny.FLAGS, "--steps", "3"]
VARIANCES = "linear", "cosine"


@pytest.fixture(scope="module")
def shrunk():
    small = partial(diffusion.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(diffusion, "NETWORKS", diffusion.NETWORKS | {"tiny": small})
        yield


def levels(variance):
    """abar_t for t = 0 to 999, and 1 for t = -1, the response itself."""
    return np.append(diffusion.schedule(variance), 1.0)


# ------------------------------------------------------------------------------------------------------ flags

def test_steps_are_as_many_as_there_are_times(capsys):
    assert diffusion.parse(["--counts", "round", "--steps", "1000"]).steps == 1000
    with pytest.raises(SystemExit) as stop:
        diffusion.parse(["--steps", "1000"])
    assert stop.value.code == 2
    longest = 999 - diffusion.end_time("sample", "linear")
    assert f"error: --steps 1000: expected at most {longest}" in capsys.readouterr().err
    assert diffusion.parse(["--steps", str(longest)]).steps == longest


# -------------------------------------------------------------------------------------------------- objective

def predicts(x0):
    """A network whose x^_0 is the given one, at any time."""
    return lambda x, t, c: jnp.stack([x0 + 0 * x, 0 * x, 50 + 0 * x, 0 * x])


@pytest.mark.parametrize("t", [0, 300, 999])
def test_loss_is_the_squared_error_of_the_noise(t):
    """Eq. 11, with the x_t of a noise drawn from the key: 0 for the right x_0, SNR e^2 for an error e."""
    abar = jnp.asarray(diffusion.schedule("linear"), jnp.float32)
    rng, snr = np.random.default_rng(0), float(abar[t] / (1 - abar[t]))
    x0 = jnp.asarray(rng.normal(size=(9, 7)), jnp.float32)
    loss = lambda net: diffusion.denoising_loss(net, x0, t, None, KEY, abar)
    assert loss(predicts(x0)) == pytest.approx(0, abs=1e-6)
    assert loss(predicts(x0 + 1000)) == pytest.approx(snr * 1e6, rel=1e-3)     # never clipped
    noise = np.asarray(jax.random.normal(KEY, (9, 7)))
    state = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise

    def net(x, time, c):
        assert time == t / 1000
        np.testing.assert_allclose(x, state, rtol=1e-5, atol=1e-6)
        return jnp.stack([0 * x, 0 * x + 0.5, 50 + 0 * x, 0 * x])              # x^_0 = x_t / 2
    expected = np.mean((state * (1 - np.sqrt(abar[t]) / 2) / np.sqrt(1 - abar[t]) - noise)**2)
    assert loss(net) == pytest.approx(float(expected), rel=1e-4)


def test_clean_response_is_linear_times_the_probability_of_light():
    maps, x = np.random.default_rng(1).normal(size=(7, 3, 4)), np.random.default_rng(2).normal(size=(3, 4))
    expected = (maps[0] + maps[1] * x) * expit(maps[2] + maps[3] * x)
    np.testing.assert_allclose(diffusion.clean(jnp.asarray(maps), jnp.asarray(x)), expected, rtol=1e-5)


@pytest.mark.parametrize("variance, first, last", [("linear", 1 - 1e-4, 4.036e-5),
                                                   ("cosine", 0.99996, 2.4e-9)])
def test_ends_of_the_schedules(variance, first, last):
    """Almost only signal at t = 0, almost none at the end (Ho et al. 2020; Nichol and Dhariwal 2021)."""
    abar = diffusion.schedule(variance)
    assert len(abar) == 1000 and (np.diff(abar) < 0).all()
    assert abar[0] == pytest.approx(first, abs=2e-5) and abar[-1] == pytest.approx(last, rel=0.02)


def test_cosine_is_its_formula_in_the_middle():
    """abar_t = cos^2 at t / 1000, but for the bound on beta at the end."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    t = np.arange(1, 990)
    np.testing.assert_allclose(diffusion.schedule("cosine")[t - 1], f(t) / f(0), rtol=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
def test_marginals_by_adding_noise_a_step_at_a_time(variance):
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t): the chain x <- sqrt(1 - beta) x + sqrt(beta) noise."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    betas = {"linear": np.linspace(1e-4, 0.02, 1000),
             "cosine": [min(1 - f(t + 1) / f(t), 0.999) for t in range(1000)]}
    abar, mean, noise = diffusion.schedule(variance), 1.0, 0.0
    for t, beta in enumerate(betas[variance]):
        mean, noise = np.sqrt(1 - beta) * mean, (1 - beta) * noise + beta
        assert (mean, noise) == pytest.approx((np.sqrt(abar[t]), 1 - abar[t]), rel=1e-9)


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_weights_are_those_of_what_is_predicted(predict):
    """The weighted square of the error of epsilon is the square of the error of the velocity or of x_0."""
    rng, abar = np.random.default_rng(0), np.array([0.9, 0.4, 1e-3])
    x0, noise, guess = rng.normal(size=(3, 3))
    x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    guess_noise = (x - np.sqrt(abar) * guess) / np.sqrt(1 - abar)              # Eq. 9
    velocity = lambda x0, noise: np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0
    expected = {"noise": (guess_noise - noise)**2, "clean": (guess - x0)**2,
                "velocity": (velocity(guess, guess_noise) - velocity(x0, noise))**2}[predict]
    found = diffusion.WEIGHTS[predict](abar) * (guess_noise - noise)**2
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
def test_counts_are_drawn_where_the_noise_is_two_thirds(variance):
    abar = diffusion.schedule(variance)[diffusion.end_time("sample", variance)]
    assert np.sqrt((1 - abar) / abar) == pytest.approx(2 / 3, rel=0.003)
    assert diffusion.end_time("round", variance) == -1


def nats(counts, location, scale):
    """-log P(n) of a logistic distribution of 2 sqrt(n), cut between whole counts; all below is no photon."""
    law = logistic(location, scale)
    below = np.where(counts > 0, law.cdf(2 * np.sqrt(np.maximum(counts - 0.5, 0))), 0)
    return -np.log(law.cdf(2 * np.sqrt(counts + 0.5)) - below)


def test_likelihood_of_the_counts():
    """Location linear in x_t, scale the exponential of the last map."""
    abar, rng = jnp.asarray(diffusion.schedule("linear"), jnp.float32), np.random.default_rng(3)
    counts, maps = rng.poisson(3.0, (6, 5)), rng.normal(0.5, 0.3, (7, 6, 5))
    x = np.sqrt(abar[230]) * 2 * np.sqrt(counts) + np.sqrt(1 - abar[230]) * jax.random.normal(KEY, (6, 5))
    expected = nats(counts, maps[4] + maps[5] * np.asarray(x, np.float64), np.exp(maps[6])).mean()
    net, counts = lambda x, t, c: jnp.asarray(maps, jnp.float32), jnp.asarray(counts, jnp.float32)
    found = diffusion.count_nats(net, counts, 2 * jnp.sqrt(counts), 230, None, KEY, abar)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("counts", ["sample", "round"])
def test_states_of_a_batch(counts):
    """Half of a batch (all of it, if counts are rounded) meets one time in each equal part of the path, the
    rest its end; x_t is sqrt(abar) x_0 and noise of variance 1 - abar. The loss of a network that returns
    zeros follows from the times that it met."""
    seen, response = [], np.random.default_rng(0).poisson(3.0, (44, 44)).astype(np.uint16)
    x0 = 2 * np.sqrt(response) if counts == "sample" else np.log1p(response)
    abar, end = diffusion.schedule("linear"), diffusion.end_time(counts, "linear")

    class Spy(eqx.Module):
        def __call__(self, x, t, c):
            jax.debug.callback(lambda x, t: seen.append((round(float(t) * 1000), np.asarray(x))), x, t)
            return jnp.zeros((7, *x.shape))
    loss = jax.jit(partial(diffusion.batch_loss, Spy(), how=counts, variance="linear", predict="velocity"))
    loss, parts = loss(np.repeat(response[None], 128, 0), jnp.zeros((128, 14)), KEY)
    jax.effects_barrier()
    trained, first = (64, end) if counts == "sample" else (128, 0)
    times = np.sort([t for t, _ in seen])
    assert len(seen) == 128 and (times[:128 - trained] == end).all()
    part = (1000 - first) / trained
    offset = times[128 - trained:] - first - part * np.arange(trained)
    assert (-1 < offset).all() and (offset < part).all() and np.ptp(offset) > 0.5 * part
    noises = [(x - np.sqrt(abar[t]) * x0) / np.sqrt(1 - abar[t]) for t, x in seen]
    np.testing.assert_allclose(np.std(noises, axis=(1, 2)), 1, atol=0.08)
    np.testing.assert_allclose(np.mean(noises, axis=(1, 2)), 0, atol=0.12)
    assert len({float(noise[0, 0]) for noise in noises}) == 128                # each has its own
    expected = np.mean(1 / (1 - abar[times[128 - trained:]])) * np.mean(x0**2)
    assert parts["path"] == pytest.approx(expected, rel=1e-4)
    if counts == "round":
        assert loss == parts["path"]
    else:
        assert parts["nats per fibre"] == pytest.approx(nats(response, 0, 1).mean(), rel=1e-4)
        assert loss == pytest.approx(float(parts["path"] + 10 * parts["nats per fibre"]), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- sampler

def factors(now, then, eta):
    """ddim_step as factors of x, x^_0 and the noise, in float64."""
    with jax.enable_x64(True):
        step = lambda *inputs: np.asarray(diffusion.ddim_step(*inputs[:2], now, then, eta, inputs[2]))
        return step(1.0, 0.0, 0.0), step(0.0, 1.0, 0.0), step(0.0, 0.0, 1.0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_eta_1_is_ancestral_sampling(variance):
    """Eq. 12 with eta = 1 is, step by step, the posterior q(x_(t-1) | x_t, x_0) of Ho et al. 2020, Eq. 6."""
    now, then = diffusion.schedule(variance), np.append(1.0, diffusion.schedule(variance)[:-1])
    beta = 1 - now / then
    of_x, of_x0, of_noise = factors(now, then, 1.0)
    np.testing.assert_allclose(of_x, np.sqrt(1 - beta) * (1 - then) / (1 - now), atol=1e-7)
    np.testing.assert_allclose(of_x0, np.sqrt(then) * beta / (1 - now), atol=1e-7)
    np.testing.assert_allclose(of_noise**2, (1 - then) / (1 - now) * beta, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-5, 0.98), st.floats(0.001, 0.999), st.just(0.0) | st.floats(0.01, 1))
def test_a_step_with_the_right_response_keeps_the_marginal(now, share, eta):
    """x_s = sqrt(abar_s) x_0 + noise of variance 1 - abar_s for any eta; without eta of the same epsilon."""
    then = now + share * (1 - now)
    of_x, of_x0, of_noise = factors(now, then, eta)
    assert of_x * np.sqrt(now) + of_x0 == pytest.approx(np.sqrt(then), rel=1e-9)
    assert of_x**2 * (1 - now) + of_noise**2 == pytest.approx(1 - then, abs=1e-9)
    assert (of_noise > 0) == (eta > 0)


def visited(counts, steps, variance="linear"):
    """The times of evenly spaced steps from noise to the end of the path."""
    end = diffusion.end_time(counts, variance)
    return np.rint(999 - np.arange(steps + 1) / steps * (999 - end)).astype(int)


def test_second_order_is_dpm_solver():
    """Algorithm 2 of Lu et al. 2022, on a sequence of clean responses; its first step is of first order."""
    abar = levels("linear")[visited("sample", 7)]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    level, clean = np.log(alpha / sigma), np.random.default_rng(0).normal(size=7)
    found = expected = 1.3
    for i, r in enumerate(diffusion.extrapolations(abar)):
        h = level[i + 1] - level[i]
        half = h / (level[i] - level[i - 1]) / 2 if i else 0                   # 1 / (2 r_i) there
        d = (1 + half) * clean[i] - half * clean[i - 1]
        expected = sigma[i + 1] / sigma[i] * expected - alpha[i + 1] * np.expm1(-h) * d
        of_x, of_x0, _ = factors(abar[i], abar[i + 1], 0)
        found = of_x * found + of_x0 * (clean[i] + r * (clean[i] - clean[i - 1]))
        assert found == pytest.approx(expected, rel=1e-9)


def spread(s, counts, steps, solver="ddim", eta=0.0):
    """Standard deviation that a sampler ends with where the data are N(0, s^2), whose x^_0 is known: by
    recursion on the covariances of x and of the x^_0 of the step before."""
    abar = levels("linear")[visited(counts, steps)]
    ahead = diffusion.extrapolations(abar) if solver == "dpm" else np.zeros(steps)
    xx, xb, bb = 1.0, 0.0, 0.0
    for now, r, *step in zip(abar, ahead, *factors(abar[:-1], abar[1:], eta)):
        of_x, of_x0, of_noise = step
        gain = np.sqrt(now) * s**2 / (now * s**2 + 1 - now)                    # x^_0 = gain x_t
        forward, back = of_x + of_x0 * (1 + r) * gain, -of_x0 * r
        after = forward**2 * xx + 2 * forward * back * xb + back**2 * bb + of_noise**2
        xb, bb = gain * (forward * xx + back * xb), gain**2 * xx
        xx = after
    return np.sqrt(xx)


@pytest.mark.parametrize("how", [dict(eta=0), dict(eta=0.7), dict(eta=1), dict(solver="dpm")], ids=str)
@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("counts", ["sample", "round"])
def test_reverse_of_a_gaussian(how, s, counts):
    """Many steps end in the marginal of the last state, whatever the noise on the way."""
    abar = levels("linear")[diffusion.end_time(counts, "linear")]
    assert spread(s, counts, 500, **how) == pytest.approx(np.sqrt(abar * s**2 + 1 - abar), rel=0.03)


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_response_itself_in_50_steps_of_the_second_order(s):
    """The last step, to no noise at all, is of first order."""
    assert spread(s, "round", 50, solver="dpm") == pytest.approx(s, rel=0.02)


def test_second_order_needs_fewer_steps():
    exact = np.sqrt(levels("linear")[diffusion.end_time("sample", "linear")] * (4 - 1) + 1)
    error = lambda solver, steps: abs(spread(2.0, "sample", steps, solver) - exact)
    assert error("dpm", 20) < 0.3 * error("ddim", 20) and error("dpm", 40) < 0.4 * error("dpm", 20)


@pytest.mark.parametrize("counts, solver, eta", [("sample", "ddim", 0.5), ("sample", "dpm", 0.5),
                                                 ("round", "ddim", 0)])
def test_sample_takes_these_steps(counts, solver, eta, monkeypatch):
    """By a plain loop, with the same noise; DPM-Solver adds none."""
    monkeypatch.setattr(data, "draw_counts", lambda location, scale, key: jnp.maximum(jnp.round(location), 0))
    target, shape = np.random.default_rng(0).uniform(0, 9, (12, 12)), (2, 12, 12)
    net = lambda x, t, c: jnp.stack([target * (1 - t), 0.1 + 0 * x, 30 + 0 * x, 0 * x,     # x^_0
                                     9 * t + 0 * x, 1 + 0 * x, 0 * x])                     # the counts
    found = diffusion.sample(net, jnp.zeros((2, 14)), KEY, shape[1:], counts, "linear", 4, solver, eta)
    start, step_key, _ = jax.random.split(KEY, 3)
    x, before, times = np.asarray(jax.random.normal(start, shape), np.float64), 0.0, visited(counts, 4)
    abar = levels("linear")[times]
    ahead, eta = (diffusion.extrapolations(abar), 0) if solver == "dpm" else (np.zeros(4), eta)
    steps = zip(times / 1000, ahead, *factors(abar[:-1], abar[1:], eta), jax.random.split(step_key, 4))
    for t, r, of_x, of_x0, of_noise, key in steps:
        x0 = np.maximum(target * (1 - t) + 0.1 * x, 0)
        noise = np.asarray(jax.random.normal(key, shape))
        x, before = of_x * x + of_x0 * (x0 + r * (x0 - before)) + of_noise * noise, x0
    drawn = x + 9 * times[-1] / 1000                                           # the location of the counts
    expected = np.maximum(np.round(drawn if counts == "sample" else np.expm1(x)), 0)
    assert found.dtype == np.uint16
    assert (np.abs(found - expected) <= 1 + 1e-3 * expected).all() and (found == expected).mean() > 0.99


@pytest.mark.parametrize("x0, photons", [(1e4, 4000), (-1e4, 0)])
def test_sampler_keeps_the_predicted_response_in_the_range_of_the_data(x0, photons):
    """The last step to the response itself is x^_0."""
    net = predicts(jnp.full((12, 12), x0))
    found = diffusion.sample(net, jnp.zeros((2, 14)), KEY, (12, 12), "round", "linear", 1, "ddim", 0)
    assert (found == photons).all()


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("net", ["dense", "paper", "paper-4m"])
@pytest.mark.parametrize("detector", FULL)
@pytest.mark.parametrize("counts, maps", [("sample", 7), ("round", 4)])
def test_maps_of_the_networks(net, detector, counts, maps):
    shape = FULL[detector].shape
    network = eqx.filter_eval_shape(diffusion.make_network, net, counts, FULL[detector], 14, KEY)
    found = eqx.filter_eval_shape(network, jnp.zeros(shape), 0.0, jnp.zeros(14))
    assert found.shape == (maps, *shape)


@pytest.mark.parametrize("net, parameters", [("paper", 77_396), ("paper-4m", 3_996_560)])
def test_sizes_of_the_published_networks(net, parameters):
    """[FM] has 77 372 with one map, [Comparison] 4 million."""
    network = eqx.filter_eval_shape(diffusion.make_network, net, "round", FULL["zn"], 9, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == parameters


def test_published_network_has_a_loss():
    """With weights from NumPy, which need not be compiled."""
    rng = np.random.default_rng(0)
    shapes = eqx.filter_eval_shape(diffusion.make_network, "paper", "sample", DETECTORS["zn"], 14, KEY)
    net = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
                       if hasattr(leaf, "shape") else leaf, shapes)
    counts, c = rng.poisson(1.0, (2, 12, 12)), jnp.asarray(rng.normal(size=(2, 14)), jnp.float32)
    loss = eqx.filter_jit(partial(diffusion.batch_loss, how="sample", variance="linear", predict="velocity"))
    value, parts = loss(net, jnp.asarray(counts), c, KEY)
    assert np.isfinite(value) and parts["path"] > 0 and parts["nats per fibre"] > 0


# ------------------------------------------------------------------------------------------------------- main

@pytest.fixture(scope="module")
def trained(small_detectors, shrunk, tmp_path_factory):
    """(folder, metrics.json as a dict) of one short run."""
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    return folder, diffusion.main([*FLAGS, "--epochs", "20", "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    log = common.read_log(folder)
    assert log[-1]["nats per fibre"] < log[0]["nats per fibre"] and log[-1]["path"] < log[0]["path"]
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140}
    assert (result["evaluations"], result["steps"], result["solver"], result["eta"]) == (4, 3, "ddim", 0.7)
    assert {path.name for path in folder.iterdir()} == {
        "state.eqx", "model.eqx", "log.jsonl", "metrics.json", "samples.png", "channels.png", "training.png"}


def test_a_loaded_model_has_its_scores_and_its_flags(trained, tmp_path):
    folder, result = trained
    load = ["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path), "--steps", "3"]
    others = "--net", "dense", "--counts", "round", "--variance", "cosine", "--predict", "noise"
    again = diffusion.main([*load, *others])
    assert all(again[name] == result[name] for name in ("seen", "unseen", "flags"))
    kept = {"net": "tiny", "counts": "sample", "variance": "linear", "predict": "velocity"}
    assert kept.items() <= result["flags"].items()
    other = diffusion.main([*load, "--solver", "dpm", "--validate"])
    first = diffusion.main([*load, "--validate"])
    assert other["validation"]["W"]["value"] != first["validation"]["W"]["value"] and other["solver"] == "dpm"


def test_every_other_flag(tmp_path):
    flags = ("--counts round --variance cosine --predict noise --detector zp --cond raw --precision bf16 "
             "--solver dpm --validate")
    result = diffusion.main([*FLAGS, *flags.split(), "--run", str(tmp_path)])
    assert np.isfinite(result["validation"]["W"]["value"]) and result["evaluations"] == 3
