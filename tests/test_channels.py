import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import channels
import common
import data
import metrics
from common import UserError

TINY = ["--n", "1500", "--epochs", "1", "--quiet"]
FIVE = ["linear regression", "gradient boosting", "decision tree", "k nearest neighbours", "dense network"]


@pytest.fixture(scope="module")
def dataset():
    return data.open_data("zn", 1500, quiet=True)


@pytest.fixture(scope="module")
def sums(dataset):
    return metrics.channels(dataset.responses)


@pytest.fixture
def two_models(monkeypatch):
    """The quickest models alone."""
    quick = {name: channels.MODELS[name] for name in ("flow matching", "lookup")}
    monkeypatch.setattr(channels, "MODELS", quick)


def arguments(*flags):
    return channels.parse(["--quiet", *flags])


def without_times(result):
    return {name: {key: value for key, value in entry.items() if key != "fit_seconds"}
            for name, entry in result["models"].items()}


# ----------------------------------------------------------------------------------------------------- models

def test_linear_regression_is_least_squares(dataset, sums):
    train, test = slice(0, 1000), slice(1000, 1500)
    [(_, predict)] = channels.linear_regression(arguments(), dataset.particles[train], sums[train])
    scaler = data.fit_conditions(dataset.particles[train], "raw")
    x, new = (data.conditions(dataset.particles[rows], scaler) for rows in (train, test))
    fitted = LinearRegression().fit(x.astype(float), np.log1p(sums[train]).astype(float))
    expected = np.expm1(fitted.predict(new))
    found = predict(dataset.particles[test])
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["decision tree", "k nearest neighbours"])
def test_candidates_follow_the_particle_and_are_never_negative(name, dataset, sums):
    particles, mean = dataset.particles, np.broadcast_to(np.expm1(np.log1p(sums).mean(0)), sums.shape)
    for setting, predict in channels.MODELS[name](arguments(), particles, sums):
        found = predict(particles)
        assert found.shape == sums.shape and np.isfinite(found).all() and (found >= 0).all(), setting
        assert metrics.mae(sums, found) < 0.9 * metrics.mae(sums, mean), setting


def test_lookup_draws_from_the_rows_of_the_particle(dataset, sums):
    ids, _ = data.unique_particles(dataset.particles)
    [(_, predict)] = channels.lookup(arguments(), dataset.particles, sums)
    for particle, row in zip(ids, predict(dataset.particles)):
        assert (sums[ids == particle] == row).all(1).any()


def test_lookup_takes_the_nearest_of_an_unknown_particle(dataset, sums):
    known = slice(0, 1)
    [(_, predict)] = channels.lookup(arguments(), dataset.particles[known], sums[known])
    assert (predict(dataset.particles[:20]) == sums[0]).all()


def test_the_best_candidate_on_the_validation_rows_is_kept(sums):
    def model(args, particles, truth):
        for shift in (5, 0, 2):
            yield f"shift {shift}", lambda new, shift=shift: sums + shift

    assert channels.fit(model, None, (None, None), (None, sums))[0] == "shift 0"


# ---------------------------------------------------------------------------------------------- flow matching

POINT = jnp.array([0.3, -1.0, 2.0, 0.0, 5.0])


def to_point(z):
    """The exact velocity towards one point, v = (a - x) / (1 - t); z = (x, t, c)."""
    return (POINT - z[:5]) / (1 - z[5])


def test_the_loss_of_the_exact_velocity_is_zero():
    for t in (0.0, 0.5, 0.9):
        assert channels.flow_loss(to_point, POINT, t, jnp.zeros(1), jax.random.key(0)) < 1e-6
    assert channels.flow_loss(lambda z: -to_point(z), POINT, 0.5, jnp.zeros(1), jax.random.key(0)) > 1
    x1, c = jnp.broadcast_to(POINT, (64, 5)), jnp.zeros((64, 1))
    assert channels.batch_flow_loss(to_point, x1, c, jax.random.key(0)) < 1e-6


def test_the_sampler_follows_the_exact_velocity():
    np.testing.assert_allclose(channels.sample(to_point, jnp.zeros((9, 1)), jax.random.key(0), 7),
                               jnp.broadcast_to(POINT, (9, 5)), atol=1e-5)


@pytest.mark.parametrize("inputs", [1, 5])
def test_flow_matching_learns_a_gaussian(inputs):
    """x_1 ~ N(c / 2, 0.3^2) in each dimension, with `inputs` different conditions."""
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, (4000, inputs)).astype(np.float32)
    centre = 0.5 * np.broadcast_to(c, (4000, 5))
    x1 = (centre + 0.3 * rng.standard_normal((4000, 5))).astype(np.float32)
    plan = channels.plan(arguments("--epochs", "12", "--batch-size", "128"))
    *_, net = channels.train(channels.batch_flow_loss, 6 + inputs, x1, c, plan)
    error = np.asarray(channels.sample(net, c, jax.random.key(1), 25)) - centre
    np.testing.assert_allclose(error.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(error.std(0), 0.3, atol=0.05)
    assert abs(np.corrcoef(error[:, 0], error[:, 1])[0, 1]) < 0.15


def test_the_regression_learns_the_mean():
    rng = np.random.default_rng(0)
    c = rng.uniform(-1, 1, (4000, 2)).astype(np.float32)
    mean = np.stack([c[:, 0], c[:, 1], c[:, 0] * c[:, 1], -c[:, 0], np.zeros(4000)], axis=1)
    x1 = (mean + 0.3 * rng.standard_normal(mean.shape)).astype(np.float32)
    plan = channels.plan(arguments("--epochs", "12", "--batch-size", "128"))
    *_, net = channels.train(channels.regression_loss, 2, x1, c, plan)
    assert np.sqrt(np.mean((jax.vmap(net)(c) - mean)**2)) < 0.1


# ---------------------------------------------------------------------------------------- library and command

def test_direct_estimates(dataset):
    found = channels.direct_estimates(dataset, "zn")
    assert list(found) == FIVE
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert max(found, key=found.get) == "linear regression"


def test_main_writes_what_it_returns(tmp_path, capsys):
    result = channels.main([*TINY, "--run", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert result["rows"] == {"train": 1050, "validation": 150, "seen": 300, "unseen": 300}
    assert list(result["models"]) == ["original data", *FIVE, "flow matching", "lookup"]
    for name, entry in result["models"].items():
        assert any(line.startswith(name) for line in lines)
        for w in (entry["seen"]["W"], entry["unseen"]["W"]):
            assert w["R"] == pytest.approx(w["value"] / w["oracle"])
    published = [result["models"][name]["published"] for name in ("original data", "decision tree", "lookup")]
    assert published == [0.53, 3.86, None]


def test_same_seed_same_numbers(two_models, tmp_path):
    first, second = (without_times(channels.main([*TINY, "--run", str(tmp_path)])) for _ in range(2))
    assert first == second


def test_a_file_is_scored_beside_its_floor(two_models, dataset, tmp_path):
    data.save_blocks(tmp_path / "some.h5", len(dataset.pdg), [dataset._asdict()], detector="zn")
    flags = ["--data", str(tmp_path / "some.h5"), "--split", "particles", "--epochs", "1", "--quiet"]
    result = channels.main([*flags, "--run", str(tmp_path)])
    entry = result["models"]["lookup"]
    assert "seen" not in entry and set(entry["unseen"]["W"]) == {"value", "spread", "floor", "R"}
    assert entry["unseen"]["W"]["floor"] > 0 and entry["unseen"]["W"]["R"] is None


def test_too_few_rows():
    with pytest.raises(UserError, match="too few"):
        channels.main(["--n", "100", "--quiet"])


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"], ["--detector", "zx"], ["--load", "x.eqx"], ["--cond", "all"],
    ["--data", "missing.h5"]])
def test_bad_flags_end_in_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: channels.main(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
