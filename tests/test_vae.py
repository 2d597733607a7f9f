"""vae.py: the Sinkhorn divergence against POT and exact transport, draws and likelihood against scipy, every combination."""
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import chisquare, logistic, poisson

import common
import data
import tiny
import vae
from common import UserError

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "1", "--batch-size", "64", "--latent", "3", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(vae, "WIDTH", {"cnn": 4, "vit": 8, "mixer": 8})
        yield


def arguments(*flags):
    return vae.flags().parse_args([*FLAGS, *map(str, flags)])


# ------------------------------------------------------------------------------------------------------------ objective

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
    """Dual value and plan of POT's Sinkhorn in logarithms, float64; the gradient with respect to the cost is the plan."""
    cost, weights, epsilon = cdist(points(2, 12), points(3, 12, shift=1.0), "sqeuclidean") / 2, np.full(12, 1 / 12), 0.5
    plan = ot.sinkhorn(weights, weights, cost, epsilon, method="sinkhorn_log", numItermax=5000, stopThr=1e-12)
    expected = (plan * cost).sum() + epsilon * (plan * np.log(plan * 144)).sum()
    value, gradient = jax.value_and_grad(vae.transport)(jnp.asarray(cost, jnp.float32), epsilon, 200)
    assert value == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(gradient, plan, atol=2e-5)


def test_sinkhorn_is_that_of_pot():
    """The debiased divergence, and its gradient with respect to the points."""
    a, b = points(8, 30), points(9, 30, shift=0.6)
    epsilon = 0.2 * (cdist(a, b, "sqeuclidean") / 2).mean()
    plan = lambda x, y: ot.sinkhorn([], [], cdist(x, y, "sqeuclidean") / 2, epsilon, method="sinkhorn_log", numItermax=20_000,
                                    stopThr=1e-9)

    def value(x, y):
        p = plan(x, y)
        return (p * cdist(x, y, "sqeuclidean") / 2).sum() + epsilon * (p * np.log(np.maximum(p, 1e-300) * 900)).sum()
    expected = value(a, b) - (value(a, a) + value(b, b)) / 2
    found, gradient = jax.value_and_grad(lambda a: vae.sinkhorn(a, b, rounds=1000, blur=0.2))(a)
    assert found == pytest.approx(expected, rel=2e-3)
    drawn = lambda p, x, y: p.sum(1)[:, None] * x - p @ y                      # sum over j of P_ij (x_i - y_j)
    np.testing.assert_allclose(gradient, drawn(plan(a, b), a, b) - drawn(plan(a, a), a, a), atol=2e-4)


def test_sinkhorn_is_a_divergence():
    a, b = points(4), points(5, shift=0.5)
    assert vae.sinkhorn(a, a) == pytest.approx(0, abs=1e-5) and vae.sinkhorn(a, b) > 0.05
    assert vae.sinkhorn(a, b) == pytest.approx(float(vae.sinkhorn(b, a)), rel=1e-3)
    assert vae.sinkhorn(a, a[::-1]) == pytest.approx(0, abs=1e-4)              # of distributions, not of rows
    assert vae.sinkhorn(a + 1000, b + 1000) == pytest.approx(float(vae.sinkhorn(a, b)), rel=1e-2)      # nothing cancels
    moved = a + jnp.array([1.0, 0, 0])
    assert vae.sinkhorn(a, moved) == pytest.approx(0.5, rel=0.05)              # |shift|^2 / 2


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_sinkhorn_stays_finite(scale):
    a, b = scale * points(6), scale * points(7, shift=3.0)
    value, gradient = jax.value_and_grad(lambda a: vae.sinkhorn(a, b))(a)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
    if scale in (1e-3, 1e3):
        assert value == pytest.approx(scale**2 * float(vae.sinkhorn(points(6), points(7, shift=3.0))), rel=1e-2)


def test_poisson_loss_is_the_log_likelihood():
    counts = np.random.default_rng(0).poisson(3, (44, 44))
    log_rate = np.random.default_rng(1).normal(0.5, 1, (44, 44))
    expected = -poisson(np.exp(log_rate)).logpmf(counts).mean()
    assert vae.poisson_loss(None, jnp.float32(log_rate)[None, None], jnp.float32(counts)[None]) == pytest.approx(expected, rel=1e-4)


def logistic_law(maps):
    """Distribution of 2 sqrt(n) from three maps (3,): shift from the root of the rate, log of the scale, log of the rate."""
    return logistic(maps[0] + 2 * np.exp(maps[2] / 2), np.exp(maps[1]))


def test_logistic_loss_is_the_log_likelihood():
    """P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)), all below for n = 0, and the Poisson likelihood of the rate beside it."""
    rng = np.random.default_rng(1)
    maps, counts = rng.normal(0, [[1.5], [0.5], [1.5]], (3, 200)), rng.poisson(3, 200)
    law = logistic_law(maps)
    below = np.where(counts > 0, law.cdf(2 * np.sqrt(np.maximum(counts - 0.5, 0))), 0)
    expected = -np.log(law.cdf(2 * np.sqrt(counts + 0.5)) - below).mean() - poisson(np.exp(maps[2])).logpmf(counts).mean()
    found = vae.logistic_loss(None, jnp.float32(maps).reshape(1, 3, 10, 20), jnp.float32(counts).reshape(1, 10, 20))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("maps", [(-3.0, 0.2, -2.0), (0.3, -0.7, 1.5), (0.0, -0.5, 5.0)])
def test_logistic_draws_follow_the_loss(maps):
    drawn = np.asarray(vae.to_counts(jnp.broadcast_to(jnp.array(maps)[:, None, None], (1, 3, 200, 500)), KEY, arguments())).ravel()
    law = logistic_law(np.array(maps))
    for n in np.unique(np.quantile(drawn, (0.05, 0.3, 0.5, 0.8, 0.99)).astype(int)):
        assert (drawn <= n).mean() == pytest.approx(law.cdf(2 * np.sqrt(n + 0.5)), abs=0.005)


def test_second_terms():
    """Against their definitions: KL by integration, Eq. 1 and the l2 noise generator by hand."""
    class Net:
        detector = data.DETECTORS["zn"]
        generate = staticmethod(lambda c, noise: c[:2] + 1)
    out, c = jnp.array([[0.5, -1.0, math.log(0.5), math.log(2)]] * 4), jnp.ones((4, 14))
    z, second = vae.second_term(Net, out, c, KEY, arguments())
    x = np.linspace(-20, 20, 200_001)
    normal = lambda mean, std: np.exp(-(x - mean)**2 / (2 * std**2)) / np.sqrt(2 * np.pi) / std
    kl = sum(np.sum(q * np.log(np.maximum(q, 1e-300) / normal(0, 1))) * (x[1] - x[0]) for q in (normal(0.5, 0.5), normal(-1, 2)))
    assert second * 44 * 44 == pytest.approx(kl, rel=1e-4) and z.shape == (4, 2)
    z, second = vae.second_term(Net, 3 * c, c, KEY, arguments("--variant", "supervised"))
    assert second == pytest.approx(4) and (z == 3).all()
    assert vae.second_term(Net, 5 * c[:, :2], c, KEY, arguments("--variant", "noise-l2"))[1] == pytest.approx(9)
    assert vae.second_term(Net, 2 * c[:, :2], c, KEY, arguments("--variant", "noise-sinkhorn"))[1] == pytest.approx(0, abs=1e-5)


def test_the_latent_has_the_stated_spread():
    class Net:
        detector = data.DETECTORS["zn"]
    out = jnp.tile(jnp.array([1.0, -2.0, math.log(0.1), math.log(3)]), (20_000, 1))
    z = vae.second_term(Net, out, jnp.zeros((20_000, 14)), KEY, arguments())[0]
    np.testing.assert_allclose(z.mean(0), [1, -2], atol=0.1)
    np.testing.assert_allclose(z.std(0), [0.1, 3], rtol=0.03)


# -------------------------------------------------------------------------------------------------------------- sampler

@settings(deadline=None, max_examples=30)
@given(st.one_of(st.floats(1e-4, 8), st.floats(8, 500)), st.integers(0, 2**31 - 1))
def test_poisson_draws(rate, seed):
    draws = np.asarray(vae.draw_poisson(jnp.full(20_000, rate, jnp.float32), jax.random.key(seed))).astype(int)
    law, grid = poisson(rate), np.arange(draws.max() + 2)
    often = len(draws) * law.pmf(grid) >= 50
    found = np.append(np.bincount(draws, minlength=len(grid))[often], np.bincount(draws, minlength=len(grid))[~often].sum())
    expected = np.append(len(draws) * law.pmf(grid)[often], len(draws) * (1 - law.pmf(grid)[often].sum()))
    if expected[-1] < 5:
        found, expected = np.append(found[:-2], found[-2:].sum()), np.append(expected[:-2], expected[-2:].sum())
    assert len(expected) < 2 or chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-6


def test_poisson_draws_at_the_edges():
    rate = jnp.array([0.0, 1e-6, 5.999, 6.0, 3e4, 8000.0])
    draws = np.stack([vae.draw_poisson(rate, jax.random.key(seed)) for seed in range(2000)])
    assert (np.abs(draws.mean(0) - rate) < 5 * np.sqrt(rate / 2000) + 0.03).all()
    np.testing.assert_allclose(draws.var(0)[2:], rate[2:], rtol=0.2)
    assert np.isfinite(draws).all() and (draws >= 0).all()
    many = np.asarray(vae.draw_poisson(jnp.full(10**6, 5.9, jnp.float32), KEY))
    for n in (12, 16, 18):                                                     # the tail is not cut off
        assert (many > n).mean() == pytest.approx(poisson(5.9).sf(n), rel=0.15, abs=2e-5)


def test_counts_of_log_responses():
    args, counts = arguments("--likelihood", "mse"), np.random.default_rng(3).poisson(2, (2, 44, 44))
    found = vae.to_counts(jnp.log1p(jnp.float32(counts))[:, None], KEY, args)
    np.testing.assert_array_equal(found, counts)
    extreme = vae.to_counts(jnp.array([[[[-5.0, 50.0]]]]), KEY, args)
    assert extreme.tolist() == [[[0, 65535]]] and extreme.dtype == jnp.uint16


# -------------------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector", data.DETECTORS)
@pytest.mark.parametrize("variant", vae.VARIANTS)
@pytest.mark.parametrize("arch", vae.ARCHITECTURES)
def test_shapes(arch, variant, detector):
    shape = data.DETECTORS[detector].shape
    for flags, conditions in (((), 14), (("--likelihood", "mse", "--cond", "raw", "--precision", "bf16"), 9)):
        args = arguments("--arch", arch, "--variant", variant, "--detector", detector, *flags)
        net = eqx.filter_eval_shape(vae.make_network, args, conditions, KEY)
        batch = np.zeros((4, *shape), np.uint16), np.zeros((4, conditions), np.float32), KEY
        loss, parts = eqx.filter_eval_shape(lambda net: vae.batch_loss(net, *batch, args), net)
        assert loss.shape == () and loss.dtype == jnp.float32 and parts.keys() == {"reconstruction", "latent"}
        responses = eqx.filter_eval_shape(lambda net: vae.to_counts(vae.decode_new(net, *batch[1:], args), KEY, args), net)
        assert responses.shape == (4, *shape) and responses.dtype == jnp.uint16


def test_what_the_decoder_knows():
    """The particle only where the variant says so; the noise generators' latents differ from draw to draw."""
    x, c, other = jnp.zeros((44, 44)), jnp.zeros(14), jnp.ones(14)
    for variant in vae.VARIANTS:
        net = vae.make_network(arguments("--variant", variant), 14, KEY)
        z = jnp.zeros(14 if variant == "supervised" else 3)
        assert np.array_equal(net.decode(z, c), net.decode(z, other)) == (variant != "vae")
        assert np.array_equal(net.encode(x, c), net.encode(x, other)) == (variant != "vae")
        if variant.startswith("noise"):
            noise = jnp.ones(vae.NOISE)
            assert not np.allclose(net.generate(c, noise), net.generate(c, -noise))
            assert not np.allclose(net.generate(c, noise), net.generate(other, noise))


# ----------------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_detectors):
    folder = tmp_path_factory.mktemp("vae") / "run"
    return folder, vae.main([*FLAGS, "--epochs", "20", "--run", str(folder)])


def losses(folder, name):
    return [record[name] for record in common.read_log(folder)]


def test_a_run(trained):
    folder, result = trained
    assert losses(folder, "reconstruction")[-1] < 0.8 * losses(folder, "reconstruction")[0]
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 1
    assert {path.name for path in folder.iterdir()} == {"state.eqx", "model.eqx", "log.jsonl", "metrics.json", "samples.png",
                                                        "channels.png", "training.png"}


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    again = vae.main(["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)])
    assert (again["seen"], again["unseen"], again["flags"]) == (result["seen"], result["unseen"], result["flags"])


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch, small_detectors):
    monkeypatch.setattr(common, "time", tiny.clock())
    dataset, rows = data.open_data("zn", 700, quiet=True), np.arange(489)
    scaler, flags = data.fit_conditions(dataset.particles, "physics"), ("--epochs", 3)
    run = lambda *more: vae.train(arguments(*flags, *more), dataset, rows, scaler)[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch)
    assert losses(tmp_path / "cut", "reconstruction") == losses(tmp_path / "whole", "reconstruction")


def test_table_of_all_combinations(tmp_path, monkeypatch, capsys, small_detectors):
    """One of the twelve is made to diverge: the others go on, and the table says so."""
    step = vae.make_step

    def broken(args, optimiser):
        if (args.arch, args.variant) != ("vit", "noise-l2"):
            return step(args, optimiser)
        return lambda batch, state: (state, {"reconstruction": np.nan})
    monkeypatch.setattr(vae, "make_step", broken)
    result = vae.main([*FLAGS, "--table", "--likelihood", "mse", "--run", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vit noise-l2 diverged: the loss is nan at step 7") and len(lines) == 14 and "paper W" in lines[1]
    assert json.loads((tmp_path / "table.json").read_text()) == common.plain(result)
    assert [(row["arch"], row["variant"]) for row in result["table"]] == [(a, v) for a in vae.ARCHITECTURES for v in vae.VARIANTS]
    for row in result["table"]:
        diverged = (row["arch"], row["variant"]) == ("vit", "noise-l2")
        assert row["W"] is None if diverged else row["W"] > 0 and row["R"] > 0 and row["ms_per_response"] > 0
        assert (tmp_path / f"{row['arch']}-{row['variant']}" / "model.eqx").exists() != diverged
    assert result["table"][0]["paper_W"] == 11.52 and result["table"][-1]["paper_W"] is None


@pytest.mark.parametrize("flags, message", [("--batch-size 500", "expected 2 to 489"), ("--generate a.csv", "--generate needs --load"),
                                            ("--steps 3", "unrecognized"), ("--arch resnet", "invalid choice"),
                                            ("--table --load model.eqx", "--table trains its own networks")])
def test_wrong_flags(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: vae.main([*FLAGS, *flags.split(), "--run", str(tmp_path / "run")]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_checkpoint_of_another_script(tmp_path):
    common.save_checkpoint(tmp_path / "model.eqx", {"script": "fm", "detector": "zn", "flags": {}, "scaler": {}}, {})
    with pytest.raises(UserError, match="made by script fm, expected script vae"):
        vae.main(["--load", str(tmp_path / "model.eqx")])
