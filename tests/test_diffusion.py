"""diffusion.py: schedule, loss and steps against closed forms, samplers on a Gaussian, one run."""
import json
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit
from scipy.stats import norm

import data
import diffusion
import files
import solvers
import tiny
from simulator import DETECTORS

pytestmark = pytest.mark.usefixtures("small_detectors", "shrunk")
KEY = jax.random.key(0)
FULL = dict(DETECTORS)                                                         # before they are made small
FLAGS = [*tiny.FLAGS, "--steps", "3"]
ABAR, END = diffusion.ABAR, diffusion.END
MOST = 999 - END


@pytest.fixture(scope="module")
def shrunk():
    small = partial(diffusion.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(diffusion, "NETWORKS", diffusion.NETWORKS | {"tiny": small})
        yield


# ------------------------------------------------------------------------------------------------------ flags

def test_steps_of_ddim_are_as_many_as_there_are_times(capsys):
    with pytest.raises(SystemExit) as stop:
        diffusion.parse(["--ddim", "1000"])
    assert stop.value.code == 2
    assert f"must be between 1 and {MOST}, got 1000" in capsys.readouterr().err
    assert diffusion.parse(["--ddim", str(MOST)]).ddim == MOST
    assert (np.diff(visited(MOST)) < 0).all()


# -------------------------------------------------------------------------------------------------- objective

def predicts(x0):
    """A network whose x^_0 is the given one, at any time."""
    return lambda x, t, c: jnp.stack([x0 + 0 * x, 0 * x, 50 + 0 * x, 0 * x])


@pytest.mark.parametrize("t", [0, 300, 999])
def test_loss_is_the_squared_error_of_the_noise(t):
    """Eq. 11, with the x_t of a noise drawn from the key: 0 for the right x_0, SNR e^2 for an error e."""
    abar = jnp.asarray(ABAR, jnp.float32)
    rng, snr = np.random.default_rng(0), float(abar[t] / (1 - abar[t]))
    x0 = jnp.asarray(rng.normal(size=(9, 7)), jnp.float32)
    loss = lambda net: diffusion.denoising_loss(net, x0, t, None, KEY)[0]
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


def test_factor_loss_is_that_of_the_probabilities_and_means():
    """The cross-entropy of lit fibres, three times, and the squared error of those."""
    rng = np.random.default_rng(1)
    x0, maps = 2 * np.sqrt(rng.poisson(0.7, (9, 7))), rng.normal(size=(4, 9, 7))
    states = []
    net = lambda x, t, c: states.append(np.asarray(x)) or jnp.asarray(maps, jnp.float32)
    found = diffusion.denoising_loss(net, jnp.asarray(x0, jnp.float32), 500, None, KEY)[1]
    level, p = maps[0] + maps[1] * states[0], expit(maps[2] + maps[3] * states[0])
    lit, entropy = x0 > 0, -np.log(np.where(x0 > 0, p, 1 - p))
    assert found == pytest.approx(np.mean(3 * entropy + lit * (level - x0)**2), rel=1e-4)


@pytest.mark.parametrize("t", [20, END, 999])
def test_lit_odds_are_bayes_rule(t):
    x, abar = np.linspace(-2, 4, 7), ABAR[t]
    with_photon, without = (norm.logpdf(x, np.sqrt(abar) * x0, np.sqrt(1 - abar)) for x0 in (2, 0))
    np.testing.assert_allclose(diffusion.lit_odds(x, t / 1000), with_photon - without, rtol=1e-3, atol=1e-5)


def test_lit_odds_belong_to_their_time():
    """No time is rounded to another one, and the odds of the clearest responses stay finite."""
    t = jnp.arange(1000)
    found = jax.vmap(lambda t: diffusion.lit_odds(jnp.zeros(1), t / 1000))(t)[:, 0]
    np.testing.assert_allclose(found, -2 * ABAR / np.maximum(1 - ABAR, 0.0025), rtol=1e-3)


def test_ends_of_the_schedule():
    """Almost only signal at t = 0, almost none at the end (Ho et al. 2020)."""
    assert len(ABAR) == 1000 and (np.diff(ABAR) < 0).all()
    assert ABAR[0] == pytest.approx(1 - 1e-4, rel=1e-9) and ABAR[999] == pytest.approx(4.036e-5, rel=0.02)


def test_marginals_by_adding_noise_a_step_at_a_time():
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t): the chain x <- sqrt(1 - beta) x + sqrt(beta) noise."""
    mean, noise = 1.0, 0.0
    for beta, abar in zip(np.linspace(1e-4, 0.02, 1000), ABAR):
        mean, noise = np.sqrt(1 - beta) * mean, (1 - beta) * noise + beta
        assert (mean, noise) == pytest.approx((np.sqrt(abar), 1 - abar), rel=1e-9)


def test_weight_of_the_velocity():
    """The square of the error of epsilon over abar is that of the error of the velocity."""
    rng, abar = np.random.default_rng(0), np.array([0.9, 0.4, 1e-3])
    x0, noise, guess = rng.normal(size=(3, 3))
    x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    with jax.enable_x64(True):
        guess_noise = np.asarray(diffusion.noise_in(x, guess, abar))           # Eq. 9
    velocity = lambda x0, noise: np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0
    expected = (velocity(guess, guess_noise) - velocity(x0, noise))**2
    np.testing.assert_allclose((guess_noise - noise)**2 / abar, expected, rtol=1e-9)


def test_counts_are_drawn_where_the_noise_is_two_thirds():
    abar = ABAR[END]
    assert np.sqrt((1 - abar) / abar) == pytest.approx(2 / 3, rel=0.003)


def test_likelihood_of_the_counts():
    """Location linear in x_t, scale the exponential of a map; then the odds of few photons."""
    abar, rng = ABAR[END], np.random.default_rng(3)
    counts, maps = rng.poisson(3.0, (6, 5)), rng.normal(0.5, 0.3, (11, 6, 5)).astype(np.float32)
    x = np.sqrt(abar) * 2 * np.sqrt(counts) + np.sqrt(1 - abar) * np.asarray(jax.random.normal(KEY, (6, 5)))
    expected = data.count_loss(counts, maps[4] + maps[5] * x, np.exp(maps[6]), maps[7:]).mean()

    def net(x, t, c):
        assert t == END / 1000
        return jnp.asarray(maps)
    found = diffusion.count_nats(net, jnp.asarray(counts, jnp.float32), 2 * np.sqrt(counts), None, KEY)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_states_of_a_batch():
    """Half of a batch meets one time in each equal part of the path, the rest its end; x_t is sqrt(abar) x_0
    and noise of variance 1 - abar. The loss of a network that returns zeros follows from these times."""
    seen, response = [], np.random.default_rng(0).poisson(3.0, (44, 44)).astype(np.uint16)
    x0 = 2 * np.sqrt(response)

    class Spy(eqx.Module):
        def __call__(self, x, t, c):
            jax.debug.callback(lambda x, t: seen.append((round(float(t) * 1000), np.asarray(x))), x, t)
            return jnp.zeros((11, *x.shape))
    loss = jax.jit(partial(diffusion.batch_loss, Spy()))
    loss, parts = loss(np.repeat(response[None], 128, 0), jnp.zeros((128, 14)), KEY)
    jax.effects_barrier()
    times = np.sort([t for t, _ in seen])
    assert len(seen) == 128 and (times[:64] == END).all()
    part = (1000 - END) / 64
    offset = times[64:] - END - part * np.arange(64)
    assert (-1 < offset).all() and (offset < part).all() and np.ptp(offset) > 0.5 * part
    noises = [(x - np.sqrt(ABAR[t]) * x0) / np.sqrt(1 - ABAR[t]) for t, x in seen]
    np.testing.assert_allclose(np.std(noises, axis=(1, 2)), 1, atol=0.08)
    np.testing.assert_allclose(np.mean(noises, axis=(1, 2)), 0, atol=0.12)
    assert len({float(noise[0, 0]) for noise in noises}) == 128                # each has its own
    expected = {"path": np.mean(1 / (1 - ABAR[times[64:]])) * np.mean(x0**2),
                "factors": 3 * np.log(2) + np.mean(x0**2),
                "nats per fibre": data.count_loss(response, 0.0, 1.0, [0.0] * diffusion.ODDS).mean()}
    for name, value in expected.items():
        assert parts[name] == pytest.approx(float(value), rel=1e-4)
    total = parts["path"] + parts["factors"] + 10 * parts["nats per fibre"]
    assert loss == pytest.approx(float(total), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- sampler

def factors(now, then, eta):
    """ddim_step as factors of x, x^_0 and the noise, in float64."""
    with jax.enable_x64(True):
        step = lambda *inputs: np.asarray(diffusion.ddim_step(*inputs[:2], now, then, eta, inputs[2]))
        return step(1.0, 0.0, 0.0), step(0.0, 1.0, 0.0), step(0.0, 0.0, 1.0)


def test_eta_1_is_ancestral_sampling():
    """Eq. 12 with eta = 1 is, step by step, the posterior q(x_(t-1) | x_t, x_0) of Ho et al. 2020, Eq. 6."""
    now, then = ABAR, np.append(1.0, ABAR[:-1])
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


def euler(net, steps):
    return solvers.Solved(net, solvers.runge_kutta("euler", steps))


def visited(steps):
    """The times of DDIM from noise to the end."""
    return np.rint(999 - (999 - END) * np.arange(steps + 1) / steps).astype(int)


def spread(s, steps, eta=0.0):
    """Standard deviation that DDIM ends with where the data are N(0, s^2), whose x^_0 is known."""
    abar, variance = ABAR[visited(steps)], 1.0
    for now, of_x, of_x0, of_noise in zip(abar, *factors(abar[:-1], abar[1:], eta)):
        gain = np.sqrt(now) * s**2 / (now * s**2 + 1 - now)                    # x^_0 = gain x_t
        variance = (of_x + of_x0 * gain)**2 * variance + of_noise**2
    return np.sqrt(variance)


@pytest.mark.parametrize("eta", [0, 0.7, 1])
@pytest.mark.parametrize("s", [0.3, 2.0])
def test_reverse_of_a_gaussian(eta, s):
    """Many steps end in the marginal of the last state, whatever the noise on the way."""
    assert spread(s, MOST, eta) == pytest.approx(np.sqrt(ABAR[END] * (s**2 - 1) + 1), rel=0.03)


def counting(target):
    """A network whose x^_0 depends on x and t, and whose counts on x at the end."""
    return lambda x, t, c: jnp.stack([target * (1 - t), 0.1 + 0 * x, 30 + 0 * x, 0 * x,        # x^_0
                                      9 * t + 0 * x, 1 + 0 * x, *5 * [0 * x]])                 # the counts


@pytest.mark.parametrize("eta", [0.5, 0])
def test_ddim_takes_these_steps(eta, monkeypatch):
    """By a plain loop, with the same noise."""
    monkeypatch.setattr(data, "draw_counts", lambda location, *_: jnp.maximum(jnp.round(location), 0))
    target, shape = np.random.default_rng(0).uniform(0, 9, (12, 12)), (2, 12, 12)
    model = euler(counting(target), 1)
    found = diffusion.sample(model, jnp.zeros((2, 14)), KEY, shape[1:], 4, eta)
    start, step_key, _ = jax.random.split(KEY, 3)
    x, times = np.asarray(jax.random.normal(start, shape), np.float64), visited(4)
    abar = ABAR[times]
    steps = zip(times / 1000, *factors(abar[:-1], abar[1:], eta), jax.random.split(step_key, 4))
    for t, of_x, of_x0, of_noise, key in steps:
        x0 = np.maximum(target * (1 - t) + 0.1 * x, 0)
        x = of_x * x + of_x0 * x0 + of_noise * np.asarray(jax.random.normal(key, shape))
    expected = np.maximum(np.round(x + 9 * times[-1] / 1000), 0)
    assert found.dtype == np.uint16
    assert (np.abs(found - expected) <= 1 + 1e-3 * expected).all() and (found == expected).mean() > 0.99


def test_the_path_of_a_solver_is_that_of_ddim(monkeypatch):
    """Many small steps of either end in the same x_t."""
    states = []
    monkeypatch.setattr(diffusion, "count_distribution", lambda maps, x: (x, x, x))
    monkeypatch.setattr(data, "draw_counts", lambda x, *_: states.append(x) or x)
    target = np.random.default_rng(0).uniform(0, 9, (12, 12))
    model = solvers.Solved(counting(target), solvers.runge_kutta("rk4", 6))
    for steps in (200, None):
        diffusion.sample(model, jnp.zeros((2, 14)), KEY, (12, 12), steps)
    np.testing.assert_allclose(*states, atol=0.05)


def test_a_fitted_solver_ends_where_the_path_does(monkeypatch):
    """A fifth as far from it as Euler's method of as many steps."""
    monkeypatch.setattr(solvers, "ITERATIONS", 200)
    target = np.random.default_rng(0).uniform(0, 9, (6, 6))
    net = lambda x, t, c: jnp.stack([target + jnp.tanh(x) + c[0], 0.3 + 0 * x, 1 + jnp.tanh(x), 0 * x])
    c = np.linspace(0, 1, 32)[:, None]
    fitted = diffusion.fit_solver(net, c, (6, 6), 3).solver
    x0, v = jax.random.normal(jax.random.key(1), (32, 6, 6)), lambda y, s: diffusion.slope(net, y, s, c)
    ends = [solvers.integrate(v, x0, solver) for solver in
            (solvers.runge_kutta("rk4", 40), fitted, solvers.runge_kutta("euler", 3))]
    error = [float(jnp.mean((end - ends[0])**2)**0.5) for end in ends[1:]]
    assert error[0] < 0.2 * error[1]


@pytest.mark.parametrize("x0, root", [(1e4, 4000**0.5), (-1e4, 0)])
def test_sampler_keeps_the_predicted_response_in_the_range_of_the_data(x0, root, monkeypatch):
    """One step from noise leads to sqrt(abar) x^_0 and what is left of the noise."""
    states = []
    monkeypatch.setattr(diffusion, "count_distribution", lambda maps, x: (x, x, x))
    monkeypatch.setattr(data, "draw_counts", lambda x, *_: states.append(x) or x)
    diffusion.sample(euler(predicts(jnp.full((12, 12), x0)), 1), jnp.zeros((2, 14)), KEY, (12, 12), 1)
    noise = np.asarray(jax.random.normal(jax.random.split(KEY, 3)[0], (2, 12, 12)))
    of_x, of_x0, _ = factors(ABAR[999], ABAR[END], 0.0)
    np.testing.assert_allclose(states[0], of_x * noise + of_x0 * 2 * root, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("net", ["dense", "paper"])
@pytest.mark.parametrize("detector", FULL)
def test_maps_of_the_networks(net, detector):
    shape = FULL[detector].shape
    network = eqx.filter_eval_shape(diffusion.make_network, net, FULL[detector], 14, KEY)
    found = eqx.filter_eval_shape(network, jnp.zeros(shape), 0.0, jnp.zeros(14))
    assert found.shape == (11, *shape)


def test_size_of_the_published_network():
    """[FM] has 77 372 parameters with one map; each further one takes a row of eight."""
    network = eqx.filter_eval_shape(diffusion.make_network, "paper", FULL["zn"], 9, KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(network)) == 77_372 + 10 * 8


def test_published_network_has_a_loss():
    """With weights from NumPy, which need not be compiled."""
    rng = np.random.default_rng(0)
    shapes = eqx.filter_eval_shape(diffusion.make_network, "paper", DETECTORS["zn"], 14, KEY)
    net = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32)
                       if hasattr(leaf, "shape") else leaf, shapes)
    counts, c = rng.poisson(1.0, (2, 12, 12)), jnp.asarray(rng.normal(size=(2, 14)), jnp.float32)
    loss = eqx.filter_jit(diffusion.batch_loss)
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
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    log = files.read_log(folder)
    assert log[-1]["nats per fibre"] < log[0]["nats per fibre"] and log[-1]["path"] < log[0]["path"]
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140}
    assert (result["evaluations"], result["steps"]) == (4, 3)
    assert {path.name for path in folder.iterdir()} == {
        "state.eqx", "model.eqx", "log.jsonl", "metrics.json", "samples.png", "channels.png", "training.png"}


def test_a_loaded_model_has_its_scores_and_its_flags(trained, tmp_path):
    folder, result = trained
    load = ["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)]
    again = diffusion.main([*load, "--net", "dense"])
    assert all(again[name] == result[name] for name in ("seen", "unseen", "flags"))
    assert result["flags"]["net"] == "tiny"
    other = diffusion.main([*load, "--ddim", "5", "--validate"])
    first = diffusion.main([*load, "--validate"])
    found, expected = (run["validation"]["W"]["value"] for run in (other, first))
    assert found != expected and (other["evaluations"], first["evaluations"]) == (6, 4)


def test_every_other_flag(tmp_path):
    flags = "--detector zp --cond raw --precision bf16 --ddim 3 --eta 0 --validate"
    result = diffusion.main([*FLAGS, *flags.split(), "--run", str(tmp_path)])
    assert np.isfinite(result["validation"]["W"]["value"]) and result["evaluations"] == 4
