"""metrics.py: every score against loops, scipy or a closed form, and the command."""
import json
import math
import os
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from scipy.linalg import sqrtm
from scipy.stats import wasserstein_distance

import common
import data
import judge
import metrics
import plots
from common import UserError

ROOT = Path(__file__).parent.parent
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=40)
numbers = st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float)
columns = hnp.arrays(np.float64, st.integers(1, 30), elements=numbers)


def particles_of(ids):
    """Photons (N, 9) that differ only in their energy: one for each id."""
    particles = np.zeros((len(ids), 9), np.float32)
    particles[:, 0] = particles[:, 6] = 100 + np.asarray(ids)
    return particles


def make(rng, rows=60, particles=8, shape=(6, 4), rate=2.0):
    """responses uint16 (N, H, W) and ids (N,): light whose amount depends on the particle."""
    ids = np.unique(rng.integers(particles, size=rows), return_inverse=True)[1]
    light = rate * (1 + ids % 3) * rng.random(rows)
    return rng.poisson(light[:, None, None], (rows, *shape)).astype(np.uint16), ids


def two_sets(seed, **options):
    rng = np.random.default_rng(seed)
    real, ids = make(rng, rows=int(rng.integers(1, 40)), particles=int(rng.integers(1, 8)), **options)
    return real, rng.permutation(real), ids, rng


# ---------------------------------------------------------------------------------------- channels and shapes

def loop_channels(response, convention):
    height, width = response.shape
    sums = [0] * 5
    for i in range(height):
        for j in range(width):
            to_quadrant = (i + j) % 2 == (0 if convention == "papers" else 1)
            quadrant = 2 * (i >= height // 2) + (j >= width // 2)
            sums[quadrant if to_quadrant else 4] += int(response[i, j])
    return sums


def loop_shape(response):
    height, width = response.shape
    light = [(i - (height - 1) / 2, j - (width - 1) / 2, int(response[i, j]))
             for i, j in np.ndindex(height, width)]
    total = sum(n for _, _, n in light)
    if not total:
        return [0] * 6
    x, y = (sum(point[k] * point[2] for point in light) / total for k in (0, 1))
    radius = math.sqrt(sum(n * ((a - x)**2 + (b - y)**2) for a, b, n in light) / total)
    return [x, y, radius, sum(n > 0 for _, _, n in light), max(n for _, _, n in light), total]


@examples
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 5), st.sampled_from([4, 6]), st.sampled_from([2, 4]))),
       st.sampled_from(["papers", "o2"]))
def test_channels_and_shapes_match_loops(responses, convention):
    sample = metrics.summarise(responses, convention)
    expected = np.array([loop_channels(r, convention) for r in responses], np.float32)
    np.testing.assert_array_equal(metrics.channels(responses, convention), expected)
    np.testing.assert_array_equal(sample.channels, expected)
    np.testing.assert_allclose(sample.shapes, [loop_shape(r) for r in responses], rtol=1e-9, atol=1e-6)
    values, counts = np.unique(responses, return_counts=True)
    np.testing.assert_array_equal(np.flatnonzero(sample.spectrum), values)
    np.testing.assert_array_equal(sample.spectrum[values], counts)


def test_one_photon_reaches_the_right_channel():
    for (i, j), channel in {(0, 0): 0, (1, 3): 1, (3, 1): 2, (2, 2): 3, (0, 1): 4, (3, 0): 4}.items():
        response = np.zeros((1, 4, 4), np.uint16)
        response[0, i, j] = 1
        np.testing.assert_array_equal(metrics.channels(response), np.eye(5)[[channel]])
    assert metrics.channels(np.ones((1, 44, 44), np.uint16)).tolist() == [[242] * 4 + [968]]
    assert metrics.channels(np.ones((1, 56, 30), np.uint16)).sum() == 56 * 30
    assert metrics.channels(np.zeros((0, 44, 44), np.uint16)).shape == (0, 5)
    with pytest.raises(UserError, match="convention"):
        metrics.channels(response, "wojnar")


def test_many_rows_go_through_in_chunks(monkeypatch):
    responses, _ = make(np.random.default_rng(0), rows=50)
    whole, total = metrics.summarise(responses), metrics.rmse(responses, responses[::-1])
    monkeypatch.setattr(metrics, "CHUNK", 7)
    for one, other in zip(whole, metrics.summarise(responses)):
        np.testing.assert_array_equal(one, other)
    assert metrics.rmse(responses, responses[::-1]) == pytest.approx(total)
    np.testing.assert_array_equal(metrics.channels(responses), whole.channels)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_what_is_not_a_photon_count_is_refused(value):
    responses = np.ones((3, 4, 4), np.float32)
    np.testing.assert_array_equal(metrics.summarise(responses).channels[:, 4], 8)
    responses[1, 2, 3] = value
    with pytest.raises(UserError, match="negative or non-finite"):
        metrics.summarise(responses)


# -------------------------------------------------------------------------------------------- marginal scores

@examples
@given(columns, columns)
def test_wasserstein_is_scipys(u, v):
    expected = wasserstein_distance(u, v)
    assert metrics.wasserstein(u, v) == pytest.approx(expected, rel=1e-9, abs=1e-9 * (1 + np.abs(u).max()))


@examples
@given(seeds)
def test_wasserstein_of_channels_is_the_mean_over_them(seed):
    rng = np.random.default_rng(seed)
    u, v = (rng.integers(0, 9, size=(rng.integers(1, 50), 5)).astype(np.float32) for _ in range(2))
    expected = np.mean([wasserstein_distance(u[:, k], v[:, k]) for k in range(5)])
    assert metrics.wasserstein(u, v) == pytest.approx(expected)
    assert metrics.wasserstein(u, rng.permutation(u)) == 0
    assert metrics.wasserstein(u, u + 3) == pytest.approx(3)


@examples
@given(seeds)
def test_mae_and_rmse_match_loops(seed):
    real, generated, _, _ = two_sets(seed)
    w, v = metrics.channels(real), metrics.channels(generated)
    gaps = [abs(float(w[k, c]) - float(v[k, c])) for k, c in np.ndindex(w.shape)]
    assert metrics.mae(w, v) == pytest.approx(sum(gaps) / len(gaps))
    squares = [sum((int(a) - int(b))**2 for a, b in zip(one.flat, other.flat))
               for one, other in zip(real, generated)]
    assert metrics.rmse(real, generated) == pytest.approx(math.sqrt(sum(squares) / len(real)))


@examples
@given(seeds)
def test_shower_shape_and_spectrum_match_loops(seed):
    real, generated, _, rng = two_sets(seed)
    generated = generated + rng.integers(0, 2, generated.shape).astype(np.uint16)
    a, b = metrics.summarise(real), metrics.summarise(generated)
    for k, (name, value) in enumerate(metrics.shower_shape(a.shapes, b.shapes).items()):
        scale = statistics.pstdev(a.shapes[:, k]) or 1
        expected = wasserstein_distance(a.shapes[:, k], b.shapes[:, k]) / scale
        assert name == metrics.SHAPES[k] and value == pytest.approx(expected, rel=1e-6, abs=1e-6 / scale)
    expected = 0
    for n in range(int(max(real.max(), generated.max())) + 1):
        p, q = (np.count_nonzero(r == n) / r.size for r in (real, generated))
        expected += (p - q)**2 / (p + q) / 2 if p + q else 0
    assert metrics.spectrum(a.spectrum, b.spectrum) == pytest.approx(expected)
    assert metrics.spectrum(a.spectrum, a.spectrum) == 0
    assert metrics.spectrum(np.array([0, 5]), np.array([3])) == pytest.approx(1)


# ----------------------------------------------------------------------------------------- conditional scores

def rows_of(ids):
    return [[k for k in range(len(ids)) if ids[k] == u] for u in range(max(ids) + 1)]


@examples
@given(seeds)
def test_mae_of_particles_matches_loops(seed):
    real, generated, ids, _ = two_sets(seed)
    w, v = metrics.channels(real), metrics.channels(generated)
    weights = {"MAE_c": lambda n: 1, "MAE_cw": lambda n: n, "MAE_cond": lambda n: math.log(1 + n)}
    for name, p in weights.items():
        top = bottom = 0
        for rows in rows_of(ids):
            gaps = [abs(statistics.fmean(w[rows, c]) - statistics.fmean(v[rows, c])) for c in range(5)]
            top, bottom = top + p(len(rows)) * sum(gaps) / 5, bottom + p(len(rows))
        value = metrics.weighted_mean(metrics.mae_particles(w, v, ids), metrics.particle_weights(ids, name))
        assert value == pytest.approx(top / bottom)


def loop_dispersion(w, v, ids, pdg):
    def mad(values):
        middle = statistics.median(values)
        return statistics.median([abs(value - middle) for value in values])

    groups = rows_of(ids)
    code = [pdg[rows[0]] for rows in groups]
    kind = {c: [u for u in range(len(groups)) if code[u] == c] for c in set(code)}
    top = bottom = 0
    for u, rows in enumerate(groups):
        n, members = len(rows), kind[code[u]]
        kappa = np.percentile([len(groups[m]) for m in members], 10)
        alpha, deltas = n / (n + kappa), []
        for c in range(5):
            often = [m for m in members if len(groups[m]) >= 5] or members
            mads = {m: mad([float(w[k, c]) for k in groups[m]]) for m in often}
            ordered = sorted((mads[m], math.log(1 + len(groups[m]))) for m in often)
            half, below = sum(weight for _, weight in ordered) / 2, 0
            for prior, weight in ordered:
                below += weight
                if below >= half - 1e-12:
                    break
            real, other = (alpha * mad([float(x[k, c]) for k in rows]) + (1 - alpha) * prior for x in (w, v))
            deltas.append(abs(other - real) / (other + real + metrics.TAU))
        if n >= 2:
            top, bottom = top + math.log(1 + n) * sum(deltas) / 5, bottom + math.log(1 + n)
    return top / bottom if bottom else math.nan


@examples
@given(seeds)
def test_dispersion_matches_loops(seed):
    real, generated, ids, _ = two_sets(seed)
    w, v, pdg = metrics.channels(real), metrics.channels(generated), np.array([22, 2112])[ids % 2]
    terms, weights = metrics.dispersion(w, v, ids, pdg), metrics.particle_weights(ids, "dispersion")
    value = metrics.weighted_mean(terms, weights)
    assert value == pytest.approx(loop_dispersion(w, v, ids, pdg), nan_ok=True)


@examples
@given(seeds)
def test_jaccard_error_matches_loops(seed):
    real, generated, ids, _ = two_sets(seed, rate=0.2)
    w, v = metrics.channels(real), metrics.channels(generated)
    top = bottom = 0
    for rows in rows_of(ids):
        gaps = []
        for a, b in metrics.NEIGHBOURS:
            found = []
            for x in (w, v):
                both = sum(x[k, a] > 0 and x[k, b] > 0 for k in rows)
                either = sum(x[k, a] > 0 or x[k, b] > 0 for k in rows)
                found.append(both / either if either else 1)
            gaps.append(abs(found[0] - found[1]))
        top, bottom = top + math.log(1 + len(rows)) * sum(gaps) / len(gaps), bottom + math.log(1 + len(rows))
    value = metrics.weighted_mean(metrics.jaccard_error(w, v, ids), metrics.particle_weights(ids, "JaccErr"))
    assert value == pytest.approx(top / bottom)


def test_bootstrap_covers_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    widths = []
    for size in (50, 5000):
        terms, weights = rng.exponential(size=size), rng.random(size)
        low, high = metrics.bootstrap(terms, weights)
        assert low < metrics.weighted_mean(terms, weights) < high
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.5)
    assert metrics.bootstrap(np.ones(3), np.zeros(3)) is None


# ------------------------------------------------------------------------------------------------- distances

def test_frechet_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.normal(size=(2, 4, 4)))
    shift = rng.normal(size=4)
    expected = (shift**2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert metrics.frechet(shift, a, np.zeros(4), b) == pytest.approx(expected)
    assert metrics.frechet(shift, a, shift, a) == pytest.approx(0, abs=1e-9)


def test_sampled_moments_are_those_of_the_drawn_rows():
    features, sizes = np.random.default_rng(0).normal(size=(40, 3)), np.array([10, 25, 40])
    means, covariances = metrics.sampled_moments(features, sizes, seed=5)
    rng = np.random.default_rng(5)
    for size, mean, covariance in zip(sizes, means, covariances):
        rows = features[rng.integers(40, size=size)]
        np.testing.assert_allclose(mean, rows.mean(axis=0))
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False))


def test_fpd_of_gaussians():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) * [1, 1, 2] + [1, 0, 0]
    largest = np.abs(real).max(axis=0)
    value, error = metrics.fpd(real, generated)
    assert value == pytest.approx((1 / largest[0])**2 + (1 / largest[2])**2, rel=0.15)
    assert 0 <= error < 0.1 * value
    same, _ = metrics.fpd(real, rng.normal(size=(4000, 3)))
    assert 0 <= same < 0.02 * value


@examples
@given(seeds)
def test_mmd_matches_the_double_loop(seed):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(rng.random(), size=(int(rng.integers(2, 9)), 3)) for _ in range(2))

    def kernel(a, b):
        return (sum(a * b) / 3 + 1)**4

    own = [np.mean([kernel(z[i], z[j]) for i, j in np.ndindex(len(z), len(z)) if i != j]) for z in (x, y)]
    expected = sum(own) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.mmd(x, y) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_kpd_sees_a_shift_and_nothing_else():
    rng = np.random.default_rng(0)
    real, again = rng.normal(size=(2, 3000, 4))
    same, error = metrics.kpd(real, again)
    shifted, _ = metrics.kpd(real, again + 0.5)
    assert abs(same) < 3 * error + 0.002 and shifted > 5 * abs(same) and shifted > 0.005


def test_wide_features_have_the_same_distances(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(400, 6)), rng.gumbel(size=(400, 6))
    narrow = *metrics.fpd(real, generated), *metrics.kpd(real, generated)
    assert min(narrow) > 1e-3
    monkeypatch.setattr(metrics, "WIDE", 5)
    wide = *metrics.fpd(real, generated), *metrics.kpd(real, generated)
    np.testing.assert_allclose(wide, narrow, rtol=1e-5)
    real[:, 0] = generated[:, 3] = 1  # covariances without full rank
    wide = metrics.fpd(real, generated)
    monkeypatch.setattr(metrics, "WIDE", 6)
    np.testing.assert_allclose(wide, metrics.fpd(real, generated), rtol=1e-5)


def test_distances_say_nothing_about_a_handful_of_rows():
    assert np.isnan(metrics.fpd(np.ones((5, 2)), np.ones((5, 2)))).all()
    assert np.isnan(metrics.kpd(np.ones((5, 2)), np.ones((5, 2)))).all()
    assert metrics.fpd(np.ones((12, 2)), np.ones((12, 2)))[0] == pytest.approx(0, abs=1e-9)
    assert metrics.fpd_sizes(100_000) == (20_000, 50_000) and metrics.fpd_sizes(1000) == (400, 1000)


# ---------------------------------------------------------------------------------------- everything together

@examples
@given(hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 9)), seeds)
def test_the_floor_pairs_equal_particles_once(ids, seed):
    a, b = metrics.pair_rows(ids, seed)
    np.testing.assert_array_equal(ids[a], ids[b])
    assert len(np.unique(np.concatenate([a, b]))) == 2 * len(a)
    assert len(a) == sum(n // 2 for n in np.bincount(ids))


@pytest.fixture
def small_classifier(monkeypatch):
    monkeypatch.setitem(judge.TREES, "max_iter", 5)
    monkeypatch.setattr(judge, "FEW", 5)
    for key, value in dict(rows=200, epochs=2, width=8).items():
        monkeypatch.setitem(judge.NETWORK, key, value)


def sets(count, seed=0, **options):
    rng = np.random.default_rng(seed)
    real, ids = make(rng, rows=240, **options)
    light = real.mean(axis=(1, 2), keepdims=True)
    others = [rng.poisson(light, real.shape).astype(np.uint16) for _ in range(count)]
    return real, others, particles_of(ids), np.array([22, 2112, 3122])[ids % 3].astype(np.int32)


def test_a_generation_that_is_the_oracle_has_r_one(small_classifier):
    real, generations, particles, pdg = sets(2)
    scores = metrics.evaluate(real, generations, particles, pdg, oracle=generations)
    for name in metrics.SCORES:
        assert scores[name]["value"] == scores[name]["oracle"] and scores[name]["spread"] >= 0
        assert scores[name]["R"] is None or scores[name]["R"] == 1
    others = set(metrics.SCORES) - {"AUC_low", "AUC_high", "FPD", "KPD"}
    assert all(scores[name]["R"] == 1 for name in others)
    assert scores["AUC_low"]["R"] is scores["AUC_high"]["R"] is None
    assert list(scores["types"]) == sorted(scores["types"], key=lambda t: -scores["types"][t]["rows"])
    assert set(scores["types"]) == {"gamma", "n", "Lambda"} and scores["types"]["n"]["W"]["R"] == 1
    assert sum(t["rows"] for t in scores["types"].values()) == 240 and scores["particles"] == 8
    json.dumps(scores, allow_nan=False)


def test_values_are_means_over_generations():
    real, generations, particles, pdg = sets(3)
    together = metrics.evaluate(real, generations, particles, pdg, classifier=False)
    alone = [metrics.evaluate(real, [g], particles, pdg, classifier=False) for g in generations]
    w = metrics.channels(real)
    for name in ("W", "MAE", "RMSE", "MAE_cond", "dispersion", "JaccErr", "shape_radius", "spectrum"):
        values = [scores[name]["value"] for scores in alone]
        assert together[name]["value"] == pytest.approx(np.mean(values))
        assert together[name]["spread"] == pytest.approx(np.std(values, ddof=1))
        assert alone[0][name]["spread"] is None
    assert alone[0]["W"]["value"] == pytest.approx(metrics.wasserstein(w, metrics.channels(generations[0])))
    low, high = together["MAE_cond"]["interval"]
    assert low < together["MAE_cond"]["value"] < high
    assert "AUC_low" not in together and together["W"]["R"] is None and together["W"]["floor"] > 0
    found = {name: cell["real"] for name, cell in together["marginals"].items()}
    assert found["sum_mean"] == pytest.approx(w.sum(axis=1).mean())
    assert found["sum_median"] == pytest.approx(np.median(w.sum(axis=1)))
    assert found["lit_percent"] == pytest.approx(100 * (real > 0).mean())
    assert found["single_percent"] == pytest.approx(100 * (real == 1).sum() / (real > 0).sum())
    o2 = metrics.evaluate(real, generations, particles, pdg, classifier=False, convention="o2")
    assert o2["W"]["value"] != together["W"]["value"] and o2["shape_sum"] == together["shape_sum"]


def test_worse_generations_score_worse():
    real, (good,), particles, pdg = sets(1, rate=10)
    bad = (good * 1.3).astype(np.uint16)
    scores = [metrics.evaluate(real, [g], particles, pdg, [good], classifier=False) for g in (good, bad)]
    for name in ("W", "MAE_c", "MAE_cw", "MAE_cond", "shape_sum", "shape_peak", "spectrum", "FPD", "KPD"):
        assert scores[1][name]["value"] > scores[0][name]["value"], name
    assert scores[1]["W"]["R"] > 2


def test_without_repeated_particles_there_is_no_floor():
    real, generations, _, pdg = sets(1)
    scores = metrics.evaluate(real, generations, particles_of(np.arange(240)), pdg, classifier=False)
    assert scores["W"]["floor"] is None and scores["W"]["value"] > 0
    assert scores["dispersion"]["value"] is None and scores["dispersion"]["interval"] is None
    metrics.print_table(scores, "unique")


def test_same_seed_same_numbers(small_classifier):
    first, second = (metrics.evaluate(*sets(1)) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    both = [[x for x in jax.tree.leaves(result) if not isinstance(x, str)] for result in (first, second)]
    np.testing.assert_allclose(*both, rtol=1e-6)  # FPD: roots of eigenvalues that are rounding


def test_arrays_that_do_not_match_are_refused():
    real, (other,), particles, pdg = sets(1)
    for arguments in ((real, [other[1:]], particles, pdg), (real, other, particles, pdg),
                      (real, [], particles, pdg), (real[:0], [other[:0]], particles[:0], pdg[:0]),
                      (real, [other], particles[1:], pdg), (real, [other], particles, pdg[1:])):
        with pytest.raises(UserError):
            metrics.evaluate(*arguments)


@examples
@given(seeds)
def test_lookup_returns_rows_of_the_same_particle(seed):
    rng = np.random.default_rng(seed)
    train, test = rng.integers(0, 6, 40), rng.integers(0, 8, 30)
    conditions = train[:, None].astype(np.float32), test[:, None].astype(np.float32)
    rows = metrics.lookup(particles_of(train), particles_of(test), seed, *conditions)
    for k, row in enumerate(rows):
        assert abs(train[row] - test[k]) == np.abs(train - test[k]).min()
    if len(set(test) - set(train)):
        with pytest.raises(UserError, match="conditions"):
            metrics.lookup(particles_of(train), particles_of(test), seed)


def test_lookup_draws_every_row():
    rows = metrics.lookup(particles_of([1, 1, 2, 1]), particles_of([1] * 500 + [2]), 0)
    np.testing.assert_allclose(np.bincount(rows[:500]) / 500, [1 / 3, 1 / 3, 0, 1 / 3], atol=0.1)
    assert rows[-1] == 2
    again = metrics.lookup(particles_of([1, 1, 2, 1]), particles_of([1] * 500 + [2]), 0)
    np.testing.assert_array_equal(rows, again)


# ------------------------------------------------------------------------------------- a model and its scores

@pytest.fixture
def test_set():
    """A Dataset of responses (N, 44, 44) and what a second run of the simulator gave."""
    real, (again,), particles, pdg = sets(1, shape=(44, 44), rate=0.2)
    return data.Dataset(real, particles, pdg), again


def test_a_generator_draws_other_responses_for_each_number():
    particles = np.tile(np.float32([500, 0, 0, 0, 0.3, 0.4, 499.99968, 0, 0]), (70, 1))
    draw = lambda c, key: jax.random.uniform(key, (len(c), 2, 2)) + c[:, :1, None]
    scaler = data.Scaler(np.zeros(14), np.ones(14), "physics")
    generate = metrics.generator(draw, scaler, seed=3)
    one = generate(particles, 1)
    assert one.shape == (70, 2, 2) and np.array_equal(one, generate(particles, 1))
    assert not np.array_equal(one, generate(particles, 2))
    assert not np.array_equal(one, metrics.generator(draw, scaler, seed=4)(particles, 1))
    assert (np.floor(one) == data.conditions(particles, scaler)[:, :1, None]).all()


def test_quick_scores(test_set, monkeypatch, capsys):
    test, again = test_set
    monkeypatch.setattr(metrics, "resimulate", lambda detector, part: again)
    truth, sums = (metrics.channels(responses) for responses in (test.responses, again))
    w, mae = metrics.wasserstein(truth, sums), metrics.mae(truth, sums)
    scores = metrics.quick_scores(Namespace(detector="zn", data=None), test, again, "validation")
    assert scores == {"W": {"value": w, "oracle": w, "R": 1}, "MAE": {"value": mae, "oracle": mae, "R": 1}}
    text = f"validation: W {w:.3f} (oracle {w:.3f}), MAE {mae:.3f} (oracle {mae:.3f})\n"
    assert capsys.readouterr().out == text
    scores = metrics.quick_scores(Namespace(detector="zn", data=Path("own.h5")), test, again, "validation")
    assert scores["W"] == {"value": w, "oracle": None, "R": None}
    assert capsys.readouterr().out == f"validation: W {w:.3f}, MAE {mae:.3f}\n"


def test_a_perfect_reconstruction_has_no_error(test_set, monkeypatch):
    test, _ = test_set
    monkeypatch.setattr(data, "test_sets", lambda *args: {"seen": test, "unseen": None})
    monkeypatch.setattr(common, "BLOCK", 100)
    scaler = data.Scaler(np.zeros(9), np.ones(9), "raw")
    args = Namespace(detector="zn", data=Path("own.h5"), seed=0)
    scores = metrics.score_reconstruction(args, lambda counts, c, key: counts, scaler, None, None)
    assert scores == {"W": 0, "oracle": None, "R": None, "MAE": 0}


def test_pictures_show_a_particle_of_each_common_type(test_set, tmp_path, monkeypatch):
    test, again = test_set
    drawn = []
    monkeypatch.setattr(plots, "plot_samples", lambda path, rows, titles: drawn.append((path, rows, titles)))
    monkeypatch.setattr(plots, "plot_channels", lambda path, a, b: drawn.append((path, a, b)))
    metrics.plot(tmp_path, test, again)
    (path, rows, titles), (other, a, b) = drawn
    assert [path.name, other.name] == ["samples.png", "channels.png"] and len(titles) == 8
    codes, rows_of_codes = np.unique(test.pdg, return_counts=True)
    names = [{22: "gamma", 2112: "n", 3122: "Lambda"}[code] for code in codes[np.argsort(-rows_of_codes)]]
    assert [title.split()[0] for title in titles[:3]] == names and len(set(titles)) == 8
    assert len(rows["data"]) == len(rows["model"]) == 8
    np.testing.assert_array_equal(a, metrics.channels(test.responses))


# ---------------------------------------------------------------------------------------------------- command

def write(path, responses, particles, pdg, **attributes):
    with h5py.File(path, "w") as file:
        file.update({"responses": responses, "particles": particles, "pdg": pdg})
        file.attrs.update(detector="zn", **attributes)
    return str(path)


@pytest.fixture
def files(tmp_path):
    real, others, particles, pdg = sets(3, shape=(44, 44), rate=0.2)
    return [write(tmp_path / f"{k}.h5", r, particles, pdg) for k, r in enumerate([real, *others])]


def test_the_command_prints_a_table_and_writes_json(files, tmp_path):
    out = tmp_path / "scores.json"
    code = ("import sys, judge, metrics, common; "
            "judge.NETWORK.update(rows=100, epochs=1, width=8); judge.TREES.update(max_iter=5); "
            "common.run(lambda: metrics.main(sys.argv[1:]))")
    command = [sys.executable, "-c", code, *files[:3], "--oracle", files[3], "--json", str(out), "--explain"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:2 + len(metrics.SCORES)]] == list(metrics.SCORES)
    [explained] = [line for line in lines if line.startswith("seen by AUC_high: ")]
    assert max(len(line) for line in lines[1:] if line != explained) <= 120 and "rows 100" in done.stdout
    assert explained.count(", ") == 33 + 14 - 1 and "AUC_low: rows 100" in done.stdout
    scores = json.loads(out.read_text())
    assert scores["W"]["R"] == pytest.approx(scores["W"]["value"] / scores["W"]["oracle"])
    assert scores["generations"] == 2
    assert {"versions", "types", "marginals", *metrics.SCORES} <= set(scores) and scores["rows"] == 240


def test_the_command_without_classifier(files, capsys):
    scores = metrics.main([*files[:2], "--no-classifier", "--convention", "o2"])
    assert "AUC" not in capsys.readouterr().out
    assert scores["convention"] == "o2" and "classifier" not in scores


def test_empty_responses_against_cut_data_are_pointed_out(tmp_path, capsys):
    """A quarter of the particles miss in one of two generations, but not if the real list has misses too."""
    real, others, particles, pdg = sets(2, shape=(44, 44), rate=0.2)
    missed = np.where(np.arange(len(real))[:, None, None] % 4 == 0, 0, others[1] + 1)
    lists = real + 1, others[0] + 1, missed
    paths = [write(tmp_path / f"{k}.h5", r, particles, pdg) for k, r in enumerate(lists)]
    metrics.main([*paths, "--no-classifier"])
    assert capsys.readouterr().out.startswith("25.0% of the generated responses are empty")
    for arguments in (paths[:2], [paths[2], paths[2]]):
        metrics.main([*arguments, "--no-classifier"])
        assert "are empty" not in capsys.readouterr().out


def test_mistakes_end_in_one_line(files, tmp_path):
    real, others, particles, pdg = sets(1, shape=(44, 44), rate=0.2)
    shuffled = write(tmp_path / "shuffled.h5", others[0], particles[::-1], pdg)
    short = write(tmp_path / "short.h5", others[0][1:], particles[1:], pdg[1:])
    for arguments, word in (([files[0], shuffled], "row by row"), ([files[0], "nowhere.h5"], "nowhere.h5"),
                            ([files[0], short], "240 and 239|239 and 240"),
                            ([files[0], __file__], "test_metrics"),
                            ([files[0], files[1], "--detector", "zp"], "zp")):
        with pytest.raises(UserError, match=word):
            metrics.main([*arguments, "--no-classifier"])
    command = [sys.executable, "metrics.py", files[0], shuffled]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
