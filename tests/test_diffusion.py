"""diffusion.py: schedules and marginals against closed forms, samplers on a Gaussian whose reverse is known, every kind of run."""
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import logistic

import common
import data
import diffusion
import tiny

KEY = jax.random.key(0)
FULL = diffusion.make_network          # tests replace it by a small one
FLAGS = ["--n", "700", "--epochs", "1", "--batch-size", "64", "--steps", "3", "--quiet"]


def small(args, conditions, key):
    maps = 7 if args.counts == "sample" else 4
    return diffusion.Dense(data.DETECTORS[args.detector], conditions, maps, key, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(diffusion, "make_network", small)
        yield


def arguments(*flags):
    return diffusion.flags().parse_args([*FLAGS, *map(str, flags)])


# ------------------------------------------------------------------------------------------------------------ objective

@pytest.mark.parametrize("variance, first, last", [("linear", 1 - 1e-4, 4.036e-5), ("cosine", 0.99996, 2.4e-9)])
def test_ends_of_the_schedules(variance, first, last):
    """Almost only signal at t = 0, almost none at the end (Ho et al. 2020; Nichol and Dhariwal 2021)."""
    abar = diffusion.signal(variance)
    assert len(abar) == 1000 and (np.diff(abar) < 0).all()
    assert abar[0] == pytest.approx(first, abs=2e-5) and abar[-1] == pytest.approx(last, rel=0.02)


def test_cosine_is_its_formula_in_the_middle():
    """abar_t = cos^2 at t / 1000, but for the bound on beta at the end."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    t = np.arange(1, 990)
    np.testing.assert_allclose(diffusion.signal("cosine")[t - 1], f(t) / f(0), rtol=1e-9)


@pytest.mark.parametrize("variance", ["linear", "cosine"])
def test_marginals_by_adding_noise_a_step_at_a_time(variance):
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t) is the chain x <- sqrt(1 - beta) x + sqrt(beta) noise."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    betas = {"linear": np.linspace(1e-4, 0.02, 1000), "cosine": [min(1 - f(t + 1) / f(t), 0.999) for t in range(1000)]}
    abar, mean, spread = diffusion.signal(variance), 1.0, 0.0
    for t, beta in enumerate(betas[variance]):
        mean, spread = np.sqrt(1 - beta) * mean, (1 - beta) * spread + beta
        assert mean == pytest.approx(np.sqrt(abar[t]), rel=1e-9) and spread == pytest.approx(1 - abar[t], rel=1e-9)


@pytest.mark.parametrize("predict", ["noise", "velocity", "clean"])
def test_weights_are_those_of_what_is_predicted(predict):
    """The weighted square of the error of x^_0 is the square of the error of epsilon or the velocity."""
    rng, abar = np.random.default_rng(0), np.array([0.9, 0.4, 1e-3])
    x0, noise, guess = rng.normal(size=(3, 3))
    x = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    guess_noise = (x - np.sqrt(abar) * guess) / np.sqrt(1 - abar)              # Eq. 9
    velocity = lambda x0, noise: np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0
    expected = {"noise": (guess_noise - noise)**2, "clean": (guess - x0)**2,
                "velocity": (velocity(guess, guess_noise) - velocity(x0, noise))**2}[predict]
    found = diffusion.weights(jnp.asarray(abar), arguments("--predict", predict)) * (guess - x0)**2
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    bounded = diffusion.weights(jnp.asarray(abar), arguments("--predict", predict, "--min-snr", 5))
    np.testing.assert_allclose(bounded, np.minimum(abar / (1 - abar), 5), rtol=1e-5)


def test_counts_are_drawn_where_the_noise_is_two_thirds():
    for variance in ("linear", "cosine"):
        args = arguments("--variance", variance)
        abar = diffusion.signal(variance)[diffusion.last(args)]
        assert np.sqrt((1 - abar) / abar) == pytest.approx(2 / 3, rel=0.01)
        assert diffusion.last(arguments("--variance", variance, "--counts", "round")) == -1


@pytest.mark.parametrize("counts", ["sample", "round"])
def test_states_of_a_batch(counts):
    """The first half (or all) sees every t from the last to noise, the rest the last one alone; x is sqrt(abar) x_0 and noise of
    variance 1 - abar; the loss of a network that returns zeros follows from the t it saw."""
    args, seen = arguments("--counts", counts, "--predict", "velocity"), {}
    response = np.random.default_rng(0).poisson(3.0, (44, 44)).astype(np.uint16)
    x0 = 2 * np.sqrt(response) if counts == "sample" else np.log1p(response)
    abar = diffusion.signal("linear")

    class Spy(eqx.Module):
        def __call__(self, x, t, c):
            jax.debug.callback(lambda x, t: seen.setdefault(round(float(t) * 1000), []).append(x), x, t)
            return jnp.zeros((7, *x.shape))
    loss, parts = diffusion.batch_loss(Spy(), np.repeat(response[None], 128, 0), jnp.zeros((128, 14)), KEY, args)
    jax.effects_barrier()
    end = max(diffusion.last(args), 0)
    assert end <= min(seen) < end + 20 and max(seen) > 980
    assert sum(map(len, seen.values())) == 128 and (len(seen.get(end, ())) >= 64) == (counts == "sample")
    for t, states in seen.items():
        noise = np.asarray(states) - np.sqrt(abar[t]) * x0
        assert np.var(noise) == pytest.approx(1 - abar[t], rel=0.2) and abs(noise.mean()) < 0.15
    trained = [t for t, states in seen.items() for _ in states[64 * (counts == "sample" and t == end):]]
    assert parts["path"] == pytest.approx(np.mean([abar[t] / (1 - abar[t]) + 1 for t in trained]) * np.mean(x0**2), rel=1e-3)
    if counts == "sample":
        nats = -np.mean(logistic.logcdf(2 * np.sqrt(response + 0.5))
                        + np.log1p(-np.where(response > 0, logistic.cdf(2 * np.sqrt(np.maximum(response - 0.5, 0)))
                                             / logistic.cdf(2 * np.sqrt(response + 0.5)), 0)))
        assert parts["nats per fibre"] == pytest.approx(nats, rel=1e-3)
        assert loss == pytest.approx(float(parts["path"] + parts["sums"] + 10 * parts["nats per fibre"]), rel=1e-5)


@pytest.mark.parametrize("detector, shape", [("zn", (44, 44)), ("zp", (56, 30))])
@pytest.mark.parametrize("counts, maps", [("sample", 7), ("round", 4)])
def test_the_network_that_is_trained(detector, shape, counts, maps):
    net = eqx.filter_eval_shape(FULL, arguments("--detector", detector, "--counts", counts), 14, KEY)
    found = eqx.filter_eval_shape(net, jnp.zeros(shape), 0.0, jnp.zeros(14))
    assert found.shape == (maps, *shape)


# -------------------------------------------------------------------------------------------------------------- sampler

@pytest.mark.parametrize("variance", ["linear", "cosine"])
def test_eta_1_is_ancestral_sampling(variance):
    """The 1000 steps of Eq. 12 with eta = 1 are the posterior q(x_(t-1) | x_t, x_0) of Ho et al. 2020, Eq. 6 and 7."""
    args = arguments("--variance", variance, "--counts", "round", "--steps", 1000, "--eta", 1)
    abar = diffusion.signal(variance)[::-1]
    before = np.append(abar[1:], 1.0)
    beta = 1 - abar / before
    found = diffusion.coefficients(args)
    np.testing.assert_allclose(found[:, 0], np.arange(999, -1, -1) / 1000)
    np.testing.assert_allclose(found[:, 1], np.sqrt(1 - beta) * (1 - before) / (1 - abar), atol=1e-7)
    np.testing.assert_allclose(found[:, 2], np.sqrt(before) * beta / (1 - abar), atol=1e-7)
    np.testing.assert_allclose(found[:, 4]**2, (1 - before) / (1 - abar) * beta, atol=1e-9)


def spread(args, s):
    """Standard deviation that a sampler ends with if the data are N(0, s^2), whose x^_0 is known; by recursion on covariances."""
    abar = np.append(diffusion.signal(args.variance), 1.0)[diffusion.times(args)]
    now, cross, before = 1.0, 0.0, 0.0                                         # of x; of x and the x^_0 before; of that
    for (_, a, b, b_before, noise), level in zip(diffusion.coefficients(args), abar):
        gain = np.sqrt(level) * s**2 / (level * s**2 + 1 - level)              # x^_0 = gain x_t
        forward = a + b * gain
        then = forward**2 * now + 2 * forward * b_before * cross + b_before**2 * before + noise**2
        cross, before = gain * (forward * now + b_before * cross), gain**2 * now
        now = then
    return np.sqrt(now)


@pytest.mark.parametrize("flags", [("--eta", 0), ("--eta", 0.7), ("--eta", 1), ("--solver", "dpm")])
@pytest.mark.parametrize("s", [0.3, 2.0])
@pytest.mark.parametrize("counts", ["sample", "round"])
def test_reverse_of_a_gaussian(flags, s, counts):
    """Many steps end in the marginal of the last state, whatever the noise on the way."""
    args = arguments("--counts", counts, "--steps", 500, *flags)
    abar = np.append(diffusion.signal("linear"), 1.0)[diffusion.last(args)]
    assert spread(args, s) == pytest.approx(np.sqrt(abar * s**2 + 1 - abar), rel=0.03)


@pytest.mark.parametrize("s", [0.3, 2.0])
def test_the_response_itself_in_50_steps_of_the_second_order(s):
    """Its last step, to no noise at all, is of first order."""
    assert spread(arguments("--counts", "round", "--steps", 50, "--solver", "dpm"), s) == pytest.approx(s, rel=0.03)


def test_the_second_order_needs_fewer_steps():
    exact = lambda args: np.sqrt(diffusion.signal("linear")[diffusion.last(args)] * (4 - 1) + 1)
    errors = {solver: [abs(spread(args, 2.0) - exact(args)) for args in (arguments("--steps", n, "--solver", solver, "--eta", 0)
                                                                       for n in (20, 40))] for solver in ("ddim", "dpm")}
    assert errors["dpm"][0] < 0.3 * errors["ddim"][0] and errors["dpm"][1] < 0.4 * errors["dpm"][0]


def test_spacing():
    trailing, leading = (diffusion.times(arguments("--counts", "round", "--steps", 10, "--spacing", how)) for how in ("trailing", "leading"))
    assert trailing.tolist() == [*range(999, 0, -100), -1] and leading.tolist() == [*range(900, -1, -100), -1]
    for how in ("trailing", "leading"):
        t = diffusion.times(arguments("--steps", 7, "--spacing", how))
        assert t[-1] == diffusion.last(arguments()) and (np.diff(t) < 0).all() and len(t) == 8


@pytest.mark.parametrize("flags", [("--eta", 0.5), ("--solver", "dpm"), ("--counts", "round", "--eta", 0)])
def test_sample_takes_the_steps_of_the_coefficients(flags, monkeypatch):
    """By a plain loop, with the same noise."""
    args = arguments("--steps", 4, *flags)
    monkeypatch.setattr(diffusion, "draw_counts", lambda location, scale, key: jnp.maximum(jnp.round(location), 0))
    target = np.random.default_rng(0).uniform(0, 9, (44, 44))
    net = lambda x, t, c: jnp.stack([target * (1 - t), 0.1 + 0 * x, 30 + 0 * x, 0 * x, 9 * t + 0 * x, 1 + 0 * x, 0 * x])
    c = jnp.zeros((2, 14))
    found = diffusion.sample(net, c, KEY, args)
    start, step_key, _ = jax.random.split(KEY, 3)
    x, before = np.asarray(jax.random.normal(start, (2, 44, 44)), np.float64), 0.0
    top = diffusion.LARGEST if args.counts == "sample" else np.log1p(4000)
    for (t, a, b, b_before, s), key in zip(diffusion.coefficients(args), jax.random.split(step_key, 4)):
        now = np.clip(target * (1 - t) + 0.1 * x, 0, top)
        x, before = a * x + b * now + b_before * before + s * np.asarray(jax.random.normal(key, x.shape)), now
    counted = x + 9 * diffusion.last(args) / 1000                              # where draw_counts is told that the counts lie
    expected = np.maximum(np.round(counted if args.counts == "sample" else np.expm1(x)), 0)
    assert (np.abs(found - expected) <= 1 + 1e-3 * expected).all() and (found == expected).mean() > 0.99


def test_clean_is_clipped():
    maps = jnp.array([500.0, 0, 90, 0, 0, 0, 0])[:, None, None] * jnp.ones((7, 2, 2))
    for flags, expected in ((("--clip-clean",), diffusion.LARGEST), (("--no-clip-clean",), 500.0)):
        assert diffusion.clean(maps, jnp.zeros((2, 2)), arguments(*flags))[0, 0] == pytest.approx(expected)
    assert diffusion.clean(-maps * 0 - 3, jnp.zeros((2, 2)), arguments())[0, 0] == 0


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion") / "run"
    return folder, diffusion.main([*FLAGS, "--epochs", "20", "--run", str(folder)])


def losses(folder, name):
    return [record[name] for record in common.read_log(folder)]


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert losses(folder, "nats per fibre")[-1] < losses(folder, "nats per fibre")[0]
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and (result["evaluations"], result["steps"]) == (4, 3)
    assert {path.name for path in folder.iterdir()} == {"state.eqx", "model.eqx", "log.jsonl", "metrics.json", "samples.png",
                                                        "channels.png", "training.png"}


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    load = lambda *flags: diffusion.main(["--load", str(folder / "model.eqx"), "--steps", "3", "--quiet", "--run", str(tmp_path), *flags])
    again, other = load(), load("--solver", "dpm")
    assert (again["seen"], again["unseen"], again["flags"]) == (result["seen"], result["unseen"], result["flags"])
    assert other["seen"]["W"] != again["seen"]["W"] and other["solver"] == "dpm"


@pytest.mark.parametrize("flags", [("--counts", "round", "--variance", "cosine", "--predict", "noise", "--detector", "zp"),
                                   ("--predict", "clean", "--min-snr", "5", "--cond", "raw", "--precision", "bf16", "--solver", "dpm")])
def test_every_kind_of_run(flags, tmp_path):
    result = diffusion.main([*FLAGS, *flags, "--run", str(tmp_path)])
    assert np.isfinite(result["seen"]["W"]["value"])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    dataset, rows = data.open_data("zn", 700, quiet=True), np.arange(489)
    scaler, flags = data.fit_conditions(dataset.particles, "physics"), ("--epochs", 3)
    run = lambda *more: diffusion.train(arguments(*flags, *more), dataset, rows, scaler)[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch)


def test_sweep(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "SWEEP", (1, 2))
    monkeypatch.setattr(diffusion, "FEW", (1, 2))
    found = diffusion.main(["--load", str(trained[0] / "model.eqx"), "--sweep", "--steps", "2", "--quiet", "--run", str(tmp_path)])
    assert [(point["label"], point["steps"]) for point in found["points"]] == [
        ("ddim, eta 0.7", 1), ("ddim, eta 0.7", 2), ("ddim, eta 0", 1), ("ddim, eta 0", 2), ("dpm", 1), ("dpm", 2),
        *6 * [("ddim, 2 steps", 2)]]
    assert [point["eta"] for point in found["points"][-6:]] == [0, 0.3, 0.5, 0.7, 0.85, 1] and (tmp_path / "sweep.png").exists()
