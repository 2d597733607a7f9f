"""judge.py: the numbers of a response against loops, classifiers on what differs and on what does not."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

import judge
import metrics
import shower_metrics
import simulator

examples = settings(deadline=None, max_examples=40)


# --------------------------------------------------------------------------------- what a response looks like

def loop_details(response):
    """The same numbers of one response (H, W), fibre by fibre."""
    height, width = response.shape
    fibres = [(int(response[i, j]), i, j) for i, j in np.ndindex(height, width)]
    inside = lambda i, j: int(response[i, j]) if 0 <= i < height and 0 <= j < width else 0
    around = lambda i, j, reach: [inside(i + a, j + b) for a in range(-reach, reach + 1)
                                  for b in range(-reach, reach + 1)]
    light = sum(n for n, _, _ in fibres)
    mean = [sum(f[0] * f[k] for f in fibres) / max(light, 1) for k in (1, 2)]
    moment = lambda k, l: sum(
        f[0] * (f[k] - mean[k - 1]) * (f[l] - mean[l - 1]) for f in fibres) / max(light, 1)
    largest = sorted((n for n, _, _ in fibres), reverse=True)
    _, i, j = max(fibres, key=lambda fibre: fibre[0])                          # the first of equal ones
    lit = [(a, b) for n, a, b in fibres if n]
    return [sum(n == 1 for n, _, _ in fibres), sum(n == 2 for n, _, _ in fibres), moment(1, 1), moment(1, 2),
            *largest[1:judge.LARGEST], i - (height - 1) / 2, j - (width - 1) / 2, sum(around(i, j, 1)),
            sum(around(i, j, 3)), sum((a + 1, b) in lit for a, b in lit),
            sum((a, b + 1) in lit for a, b in lit),
            sum(n > 2 and n == max(around(a, b, 1)) for n, a, b in fibres)]


@examples
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 4), st.sampled_from([4, 6]), st.sampled_from([4, 5])),
                  elements=st.sampled_from([0, 0, 0, 1, 2, 3, 9, 700])))
def test_details_match_loops(responses):
    found = judge.details(responses)
    assert found.shape == (len(responses), len(judge.DETAILS))
    np.testing.assert_allclose(found, [loop_details(r) for r in responses], rtol=1e-5, atol=1e-4)


def test_details_go_through_in_chunks(monkeypatch):
    responses = np.random.default_rng(0).poisson(0.3, (40, 8, 8)).astype(np.uint16)
    whole = judge.details(responses)
    monkeypatch.setattr(judge, "CHUNK", 7)
    np.testing.assert_array_equal(judge.details(responses), whole)


# ------------------------------------------------------------------------------------------------ classifiers

@examples
@given(hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(0, 5)),
       hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(0, 5)))
def test_rank_auc_matches_the_double_loop(positive, negative):
    wins = [1 if p > n else 0.5 if p == n else 0 for p in positive for n in negative]
    assert judge.rank_auc(positive, negative) == pytest.approx(sum(wins) / len(wins))


def test_the_network_tells_what_differs_and_only_that():
    settings = judge.NETWORK | dict(epochs=4, width=64, depth=2, learning_rate=1e-3)
    auc = lambda *features, seed=0: judge.rank_auc(*judge.network_logits(*features, seed, settings)[::-1])
    rng = np.random.default_rng(0)
    real, again = rng.normal(size=(2, 2000, 8)).astype(np.float32)
    assert auc(real, again) == pytest.approx(0.5, abs=0.06)
    assert auc(real, real) == 0.5
    assert auc(real, again + np.float32([2] + [0] * 7)) > 0.85
    assert auc(real, again + 1, seed=1) > 0.95
    assert auc(real, again + 1, seed=1) == auc(real, again + 1, seed=1)


def test_settings_of_the_classifier():
    rng = np.random.default_rng(0)
    real, again = rng.normal(size=(2, 600, 4)).astype(np.float32)
    settings = shower_metrics.CHALLENGE | dict(width=8, epochs=4, batch=100, learning_rate=1e-2)
    logits = judge.network_logits(real, again + 1, 0, settings)
    assert [part.shape for part in logits] == [(120,), (120,)] and logits[0].mean() < 0 < logits[1].mean()
    auc = lambda settings: judge.rank_auc(*judge.network_logits(real, again + 1, 0, settings)[::-1])
    assert auc(settings) == judge.rank_auc(logits[1], logits[0]) > 0.85
    assert auc(settings) != auc(settings | {"learning_rate": 1e-4})


@pytest.fixture
def few_trees(monkeypatch):
    monkeypatch.setitem(judge.TREES, "max_iter", 40)


def high_level(real, generated, seed=0):
    """judge.high_level of features (N, F): the first is the photon sum, every third particle is charged."""
    names = [f"column {k}" for k in range(real.shape[1])]
    charge = np.arange(len(real)) % 3 == 0
    return judge.high_level(real, generated, (real[:, 0], generated[:, 0]), charge, names, seed)


def test_trees_see_what_differs_and_where(few_trees):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2, 6000, 4))
    real[:, 0], generated[:, 0] = rng.uniform(0, 100, (2, 6000))
    assert high_level(real, generated)["AUC"] == pytest.approx(0.5, abs=0.03)
    charged, faint = np.arange(6000) % 3 == 0, generated[:, 0] < 30
    generated[charged, 2] += 2
    found = high_level(real, generated)
    assert found["AUC"] > 0.6 and max(found["columns"], key=found["columns"].get) == "column 2"
    assert found["groups"]["charged"] > 0.85 > found["groups"]["neutral"]
    assert found["groups"]["above 300 photons"] is None
    generated[faint, 3] += 3
    groups = high_level(real, generated)["groups"]
    assert groups["below 30 photons"] > 0.9 > groups["30 to 300 photons"]
    assert high_level(real, generated, seed=1) == high_level(real, generated, seed=1)


def test_a_pair_of_rows_never_stands_on_two_sides(few_trees):
    """Rows that occur twice, once on each side, cannot be told apart by memory."""
    rows = np.random.default_rng(0).normal(size=(2000, 3))
    assert high_level(rows, rows)["AUC"] == 0.5


def test_the_simulator_cannot_be_told_from_itself():
    """30 000 responses of ZN and a second run of their particles, all settings as they are used."""
    blocks = simulator.simulated_blocks("zn", 30_000, seed=3, quiet=True)
    runs, particles, pdg = map(np.concatenate, zip(*blocks))
    again = simulator.simulate(simulator.DETECTORS["zn"], particles, pdg, seed=4)
    faded = again * ~((again == 1) & (np.random.default_rng(0).random(again.shape) < 0.1))
    tables = [metrics.features(metrics.summarise(responses)) for responses in (runs, again, faded)]
    sums, charge = [table[:, metrics.COLUMNS.index("sum")] for table in tables], particles[:, 8]
    found = [judge.high_level(tables[0], tables[k], (sums[0], sums[k]), charge, ()) for k in (1, 2)]
    assert found[0]["AUC"] == pytest.approx(0.5, abs=0.01)
    assert found[1]["AUC"] > 0.55                                              # a tenth of the ones are gone
