"""hit.py: runs before the cut, scores against closed forms, generated lists, one small training."""
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.stats import chi2

import common
import data
import files
import hit
import simulator
from common import UserError
from orientation import Axes
from simulator import CUT, DETECTORS

KEY = jax.random.key(0)
FLAGS = ["--detector", "zp", "--n", "6000", "--epochs", "2", "--batch-size", "256", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def shrunk(small_detectors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hit, "TESTED", 100)
        patch.setattr(common, "LOGGED", 5)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("hit") / "run"
    return run, hit.main([*FLAGS, "--run", str(run)])


# ------------------------------------------------------------------------------------------------------- data

def test_runs_of_a_list_have_the_rates_of_the_simulator():
    """The share of passing runs of each tested particle is that of other runs; the light is of the others."""
    particles, sums, light = hit.runs_before_the_cut("zn", 2000, 0, fresh=True, copies=200, quiet=True)
    assert particles.shape == (2000, 9) and sums.max() == CUT and light.shape == DETECTORS["zn"].shape
    assert light.sum() == sums[sums < CUT].sum()
    particles, sums = particles[::200], sums.reshape(10, 200)
    lists = simulator.primaries(1000, True)
    rows = [np.flatnonzero((lists[0] == particle).all(1))[0] for particle in particles]
    again = simulator.run_uncut(np.random.default_rng(9), DETECTORS["zn"], np.repeat(particles, 200, 0),
                                np.repeat(lists[1][rows], 200)).sum((1, 2)).reshape(10, 200)
    rate, other = (sums == CUT).mean(1), (again >= CUT).mean(1)
    error = np.sqrt(np.maximum(rate * (1 - rate) + other * (1 - other), 1e-3) / 200)
    assert np.square((rate - other) / error).sum() < chi2(10).ppf(0.9999)


def test_seeds_and_fresh_lists_share_no_particle():
    runs = hit.runs_before_the_cut
    draw = lambda *which: {row.tobytes() for row in runs("zp", 4000, *which, quiet=True)[0]}
    sets = [draw(0), draw(1), draw(0, True)]
    assert draw(0) == sets[0] and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert not sets[0] & {row.tobytes() for row in simulator.primaries(0)[0]}


# ---------------------------------------------------------------------------------------- objective and draws

def test_log_score_and_sums_follow_the_network():
    logits = jnp.log(jnp.array([0.5, 0.2, *[0.01] * 8, 0.22]))
    net = lambda c: logits + c[0]                                              # a shift changes nothing
    c = jnp.array([3.0])
    assert hit.log_score(net, jnp.int32(1), c) == pytest.approx(-np.log(0.2), rel=1e-5)
    sums = np.asarray(hit.sample(net, jnp.zeros((20_000, 1)), KEY))
    found = np.bincount(sums, minlength=CUT + 1)
    expected = 20_000 * np.exp(np.asarray(logits, float))
    assert np.sum((found - expected)**2 / expected) < chi2(CUT).ppf(0.9999)


def test_single_photons_add_up_and_fall_where_light_is():
    light = np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 4.0]])
    sums = np.random.default_rng(0).integers(0, CUT, 5000)
    made = hit.single_photons(sums, light, np.random.default_rng(1))
    assert made.dtype == np.uint16 and made.shape == (5000, 2, 3)
    np.testing.assert_array_equal(made.sum((1, 2)), sums)
    np.testing.assert_allclose(made.sum(0) / sums.sum(), light / 8, atol=0.02)
    assert not made.sum(0)[light == 0].any()


# ----------------------------------------------------------------------------------------------------- scores

def test_the_true_probabilities_score_like_the_oracle():
    """And any others score worse, by the mean square of what they are off."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, 4000)
    passed = rng.random((4000, 100)) < p[:, None]
    true, off = hit.calibration(p, passed), hit.calibration(p / 2 + 0.1, passed)
    assert true["Brier score"]["oracle"] == pytest.approx(np.mean(p * (1 - p)), rel=0.01)
    assert true["Brier score"]["value"] == pytest.approx(true["Brier score"]["oracle"], rel=0.01)
    assert true["log score"]["value"] == pytest.approx(true["log score"]["oracle"], abs=1 / 150)
    excess = off["Brier score"]["value"] - true["Brier score"]["value"]
    assert excess == pytest.approx(np.mean((p / 2 - 0.1)**2), rel=0.05)
    curve = np.array(true["reliability"])
    assert curve[:, 2].sum() == 4000 and np.abs(curve[:, 0] - curve[:, 1]).max() < 0.01
    assert true["passed"] == {"value": p.mean(), "real": pytest.approx(passed.mean())}


def test_one_run_of_each_particle_has_no_oracle():
    scores = hit.calibration(np.array([0.9, 0.1]), np.array([[True], [False]]))
    assert scores["Brier score"] == {"value": pytest.approx(0.01), "oracle": None}


# ------------------------------------------------------------------------------------------------------- runs

def test_a_run(trained):
    run, result = trained
    assert json.loads((run / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 6000, "test": 10_000}
    log = files.read_log(run)
    assert log[-1]["log score"] < 0.8 * log[0]["log score"]
    always = result["passed"]["real"] * (1 - result["passed"]["real"])         # that of the mean rate
    assert result["Brier score"]["oracle"] < result["Brier score"]["value"] < 0.8 * always


def test_resume_is_as_uninterrupted(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    run, train = [], hit.train

    def main(*flags):
        hit.main([*FLAGS, *map(str, flags)])
        return run.pop()
    monkeypatch.setattr(hit, "train", lambda *args: run.append((found := train(*args))[0]) or found)
    tiny.assert_resume_is_as_uninterrupted(main, tmp_path, monkeypatch)


def test_generated_lists_have_empty_responses(trained):
    """As many as the network says, and a model's responses for the others alone."""
    particles, sums, _ = hit.runs_before_the_cut("zp", 2000, 5, quiet=True)
    asked = []

    def generate(particles, number):
        asked.append(particles)
        return np.full((len(particles), *DETECTORS["zp"].shape), 7, np.uint16)
    with_misses = hit.with_misses(generate, trained[0] / "model.eqx", "zp", 3, Axes())
    made = with_misses(particles, 4)
    total = made.sum((1, 2))
    passed = total >= CUT
    assert (made[passed] == 7).all() and 0 < (total == 0).sum() < (~passed).sum()
    np.testing.assert_array_equal(asked[0], particles[passed])
    assert passed.mean() == pytest.approx((sums == CUT).mean(), abs=0.05)
    np.testing.assert_array_equal(made, with_misses(particles, 4))
    assert not np.array_equal(made, with_misses(particles, 5))


def test_a_list_of_misses(trained):
    """No particle passes: the model is not asked."""
    particles = hit.runs_before_the_cut("zp", 2000, 5, quiet=True)[0][:20].copy()
    particles[:, 4:6] = 0.3 * np.abs(particles[:, 6:7])                        # far off the axis
    made = hit.with_misses(None, trained[0] / "model.eqx", "zp", 0, Axes())(particles, 0)
    assert made.shape == (20, *DETECTORS["zp"].shape) and (made.sum((1, 2)) < CUT).all()


def test_a_complete_list_of_a_user(tmp_path):
    """Training and test rows of the file; responses after the cut are refused."""
    particles, pdg, weights = simulator.primaries(7)
    which = np.random.default_rng(0).choice(len(pdg), 1500, p=weights)
    responses = simulator.run_uncut(np.random.default_rng(1), DETECTORS["zp"], particles[which], pdg[which])
    tiny.save(tmp_path / "all.h5", data.Dataset(responses, particles[which], pdg[which]))
    flags = ["--detector", "zp", "--data", str(tmp_path / "all.h5"), "--epochs", "1", "--batch-size", "64"]
    result = hit.main([*flags, "--quiet", "--run", str(tmp_path / "run")])
    assert result["rows"] == {"train": 1050, "test": 300} and result["Brier score"]["oracle"] is None
    tiny.save(tmp_path / "cut.h5", data.open_data("zp", 300, quiet=True))
    flags[3] = str(tmp_path / "cut.h5")
    with pytest.raises(UserError, match="cut.h5: no response has less than 10 photons"):
        hit.main([*flags, "--quiet", "--run", str(tmp_path / "run")])


@pytest.mark.parametrize("change, message", [
    ("missing", "expected a checkpoint"), ("detector", "made by detector zp, expected detector zn"),
    ("script", "made by script fm, expected script hit")])
def test_wrong_networks_are_refused(trained, tmp_path, change, message):
    path, name = trained[0] / "model.eqx", "zn" if change == "detector" else "zp"
    if change == "missing":
        path = tmp_path / "none.eqx"
    if change == "script":
        path = tmp_path / "fm.eqx"
        header = {"script": "fm", "detector": "zp", "flags": {}, "scaler": {}}
        common.save_checkpoint(path, header, jnp.ones(1))
    with pytest.raises(UserError, match=message):
        hit.with_misses(None, path, name, 0, Axes())


def test_every_weight_learns():
    net = hit.Hit(DETECTORS["zn"], KEY)
    c, n = jax.random.normal(KEY, (50, 14)), jnp.arange(50) % (CUT + 1)
    gradient = eqx.filter_grad(lambda net: hit.batch_loss(net, n, c, KEY)[0])(net)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient.net)) and not np.any(gradient.light)
