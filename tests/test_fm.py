"""fm.py, and by it what every script does: a run and its files, loading, generating, resuming, devices."""
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import common
import data
import files
import fm
import metrics
import solvers
import tiny
from common import UserError
from totals import SumFirst

KEY = jax.random.key(0)
SHAPES = {name: detector.shape for name, detector in data.DETECTORS.items()}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Small detectors, networks and scores for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        tiny.shrink_detectors(patch, tmp_path_factory.mktemp("data"))
        yield


@pytest.fixture(scope="module")
def dataset():
    return data.open_data("zn", 700, quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, metrics.json as a dict) of one short run."""
    folder = tmp_path_factory.mktemp("fm") / "run"
    return folder, fm.main([*tiny.FLAGS, "--run", str(folder)])


def make(net="tiny", how="sample", detector="zn", conditions=14):
    return fm.make_network(net, how, data.DETECTORS[detector], conditions, KEY)


def run(dataset, folder, *flags, loss=fm.batch_loss):
    """Train on the training rows of the data set with these flags; the averaged network and the times."""
    args = fm.parse([*tiny.FLAGS, "--run", str(folder), *map(str, flags)])
    rows = data.split_rows(len(dataset.pdg), 0).train
    scaler = data.fit_conditions(dataset.particles[rows], args.cond)
    arrays, plan = (dataset.responses, data.conditions(dataset.particles, scaler)), common.plan(args)
    net = common.first_network(args, partial(solvers.unfitted, lambda key: make(), args.steps), plan).net
    return fm.train(net, partial(loss, how=args.counts), arrays, rows, plan)


def losses(folder):
    return [{name: value for name, value in record.items() if name != "seconds"}
            for record in files.read_log(folder)]


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def assert_equal_bits(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# -------------------------------------------------------------------------------------------------- objective

def predicted(a, b=0.0):
    """The maps of a network whose prediction of x_1 is a + b x, every fibre being lit."""
    return jnp.stack([a, 0 * a + b, 0 * a + 50, 0 * a])


def test_velocity_of_a_right_prediction_is_the_straight_line():
    x0, x1 = jax.random.normal(KEY, (2, 5, 4))
    for t in (0.0, 0.3, 0.94):
        x = (1 - t) * x0 + t * x1
        longer = jnp.concatenate([predicted(x1), jnp.stack([x] * 7)])          # with the maps of the counts
        for maps in (predicted(x1), predicted(x1 - 0.5 * x, 0.5), longer):
            np.testing.assert_allclose(fm.velocity(maps, x, t), x1 - x0, atol=2e-5)
    np.testing.assert_array_equal(fm.velocity(x0[None], x, t), x0)  # one map is the velocity itself


def test_flow_loss_is_the_squared_error_of_the_velocity():
    x1 = jnp.asarray(np.random.default_rng(2).normal(size=(12, 12)), jnp.float32)
    assert fm.flow_loss(lambda x, t, c: predicted(x1), x1, 0.4, None, KEY)[0] < 1e-8
    # a prediction that is off by 0.6 at t = 0.4 gives a velocity that is off by 1
    off = fm.flow_loss(lambda x, t, c: predicted(x1 + 0.6), x1, 0.4, None, KEY)[0]
    assert off == pytest.approx(1, rel=1e-4)


def test_factor_loss_is_least_at_the_probabilities_and_means():
    """A fifth of the fibres is lit, with x_1 of 2 or 4: P(lit) = 1/5 and E[x_1 | lit] = 3."""
    x1 = jnp.tile(jnp.array([2.0, 4.0, *[0.0] * 8]), (10, 10))
    loss = lambda level, lit: fm.factor_loss(level, jnp.full_like(x1, lit), x1)
    slopes = jax.grad(loss, (0, 1))(3.0, -math.log(4))
    np.testing.assert_allclose(slopes, 0, atol=1e-6)
    assert min(loss(2.5, -math.log(4)), loss(3.0, -1.0)) > loss(3.0, -math.log(4))
    assert fm.flow_loss(lambda x, t, c: x[None], x1, 0.4, None, KEY)[1] == 0  # one map has no factors


def test_factors_are_linear_in_the_state():
    maps, x = np.random.default_rng(0).normal(size=(11, 3, 4)), np.random.default_rng(1).normal(size=(3, 4))
    level, lit = fm.factors(maps, x)
    np.testing.assert_array_equal([level, lit], [maps[0] + maps[1] * x, maps[2] + maps[3] * x])
    expected = (level / (1 + np.exp(-lit)) - x) / (1 - 0.3)
    np.testing.assert_allclose(fm.velocity(jnp.asarray(maps), jnp.asarray(x), 0.3), expected, rtol=1e-4)


def test_lit_odds_are_bayes_rule():
    x = np.linspace(-2, 4, 7)
    for t in (0.0, 0.4, 0.94):
        with_photon, without = (scipy.stats.norm.logpdf(x, t * x1, 1 - t) for x1 in (2, 0))
        np.testing.assert_allclose(fm.lit_odds(x, t), with_photon - without, rtol=1e-5)
    assert np.isfinite(fm.lit_odds(x, 1.0)).all()


def test_path_of_the_loss_starts_in_noise_and_ends_in_data():
    x1 = jnp.full((200, 200), 3.0)
    for t in (0.0, 0.5, 1.0):
        states = []
        fm.flow_loss(lambda x, t, c: states.append(x) or x[None], x1, t, None, KEY)
        assert float(states[0].mean()) == pytest.approx(3 * t, abs=0.02)
        assert float(states[0].std()) == pytest.approx(1 - t, abs=0.02)


def test_count_nats_are_those_of_the_counts_at_the_state():
    counts = jnp.asarray(np.random.default_rng(2).poisson(2.0, (12, 12)), jnp.float32)
    x1 = 2 * jnp.sqrt(counts)
    odds = [0.3, -0.2, 0.1, 0.0]
    maps = jnp.stack([jnp.full_like(x1, n) for n in (0, 1, -1, *odds)])        # location x_t, scale 1 / e
    found = fm.count_nats(lambda x, t, c: maps, counts, x1, 0.6, None, KEY)
    x = 0.4 * jax.random.normal(KEY, (12, 12)) + 0.6 * x1
    assert found == pytest.approx(float(data.count_loss(counts, x, jnp.exp(-1.0), odds).mean()), rel=1e-5)


@pytest.mark.parametrize("how", ["round", "floor"])
def test_counts_survive_the_state(how):
    counts = jnp.arange(3000.0)
    found = fm.to_counts(fm.to_state(counts, how, KEY), how)
    np.testing.assert_array_equal(found[:300], counts[:300])
    assert abs(found - counts).max() <= 1 and (found != counts).mean() < 1e-3  # the last bit of float32
    assert (fm.to_counts(jnp.array([-3.0, -1e-3, 0.0]), how) == 0).all()


def test_halves_of_a_batch(monkeypatch):
    """Half of the batch learns the path, at times 0.6 u^1.5 for even u, the other half the counts."""
    monkeypatch.setattr(fm, "flow_loss", lambda net, x1, t, c, key: (t, 2 * t))
    monkeypatch.setattr(fm, "count_nats", lambda net, counts, x1, t, c, key: t * jnp.ones(()))
    counts, c = np.zeros((64, 12, 12), np.uint16), np.zeros((64, 14), np.float32)
    total, parts = fm.batch_loss(SumFirst(None, None), counts, c, KEY, "sample")
    assert parts["path"] == pytest.approx(0.6 / 2.5, abs=0.01) and parts["sum"] == 0
    assert parts["nats per fibre"] == pytest.approx(0.6)
    assert total == pytest.approx(3 * float(parts["path"]) + 6)
    for how in ("round", "floor"):
        assert fm.batch_loss(SumFirst(None, None), counts, c, KEY, how)[0] == pytest.approx(1.5, abs=0.03)


# ---------------------------------------------------------------------------------------------------- sampler

def solved(net, steps, method="euler"):
    """A model that is not given a photon sum, with a known method."""
    return solvers.Solved(SumFirst(None, net), solvers.runge_kutta(method, steps))


def test_a_solver_is_followed_as_in_solvers():
    """With any numbers, those of a fitted solver too."""
    rng = np.random.default_rng(0)
    solver = solvers.Solver(*(jnp.float32(rng.normal(size=shape)) for shape in (5, 5, (5, 5))))
    for solver in (solver, solvers.runge_kutta("rk4", 2)):
        v, x0 = lambda x, t: jnp.sin(3 * x + t), jnp.linspace(-1, 1, 7)
        expected = solvers.integrate(v, x0, solver._replace(b=jnp.tril(solver.b)))
        np.testing.assert_allclose(fm.integrate(v, x0, solver), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [0.6, 1.0])
def test_straight_lines_are_followed_exactly(end):
    """If the network knows x_1, one step of Euler ends in x_t of the noise at the end of the path."""
    x0, x1 = jax.random.normal(KEY, (2, 3, 6, 5))
    net = lambda x, t, c: predicted(x1[0])
    slope = lambda x, s: fm.slope(net, x, s, jnp.zeros((3, 1)), end)
    x = fm.integrate(slope, x0, solvers.runge_kutta("euler", 1))
    np.testing.assert_allclose(x, (1 - end) * x0 + end * x1[0], atol=2e-5)


@pytest.mark.parametrize("end", [0.6, 0.94])
def test_flow_of_a_gaussian(end):
    """For x_1 ~ N(m, s^2) the mean of x_1 is m + slope (x_t - t m), and x keeps the distribution of x_t."""
    m, s = 1.7, 0.3

    def net(x, t, c):
        slope = t * s**2 / ((1 - t) ** 2 + t**2 * s**2)
        return predicted(jnp.full_like(x, m - slope * t * m), slope)
    slope = lambda x, time: fm.slope(net, x, time, jnp.zeros((1, 1)), end)
    x = fm.integrate(slope, jax.random.normal(KEY, (1, 200, 200)), solvers.runge_kutta("midpoint", 12))
    np.testing.assert_allclose([x.mean(), x.std()], [end * m, math.hypot(1 - end, end * s)], rtol=0.02)


def test_a_fitted_solver_ends_where_the_path_does(monkeypatch):
    """A fifth as far from it as Euler's method of as many steps."""
    monkeypatch.setattr(solvers, "ITERATIONS", 200)
    target = np.random.default_rng(0).uniform(0, 9, (6, 6))
    net = lambda x, t, c: jnp.stack([target + jnp.tanh(x) + c[0], 0.3 + 0 * x, 1 + jnp.tanh(x), 0 * x])
    c = np.linspace(0, 1, 32)[:, None]
    fitted = fm.fit_solver(SumFirst(None, net), c, (6, 6), 0.6, 3).solver
    x0, v = jax.random.normal(jax.random.key(1), (32, 6, 6)), lambda x, s: fm.slope(net, x, s, c, 0.6)
    ends = [solvers.integrate(v, x0, solver) for solver in
            (solvers.runge_kutta("rk4", 40), fitted, solvers.runge_kutta("euler", 3))]
    error = [float(jnp.mean((end - ends[0])**2)**0.5) for end in ends[1:]]
    assert error[0] < 0.2 * error[1]


@pytest.mark.parametrize("how", ["sample", "round"])
def test_evaluations(how):
    calls = []

    def net(x, t, c):
        calls.append(t)
        return jnp.zeros((4 + 7 * (how == "sample"), *x.shape))
    fm.sample(solved(net, 3), np.zeros((2, 14), np.float32), KEY, (12, 12), how)
    assert len(calls) == 3 + (how == "sample")
    np.testing.assert_allclose(calls[:3], fm.END[how] * np.arange(3) / 3, rtol=1e-6)


def test_the_largest_count_fits():
    net, c = lambda x, t, c: predicted(jnp.full_like(x, 1e4)), np.zeros((2, 14), np.float32)
    for how in ("round", "floor"):
        assert (fm.sample(solved(net, 2), c, KEY, (12, 12), how) == 65535).all()


def test_the_sampler_compiles_once(dataset):
    traces, net = [], make()

    def traced(net, c, key):
        traces.append(1)
        return fm.sample(solvers.unfitted(lambda _: net, 2, KEY), c, key, (12, 12), "sample")
    scaler = data.fit_conditions(dataset.particles, "physics")
    generate = metrics.generator(eqx.filter_jit(eqx.Partial(traced, net)), scaler, 0)
    responses = generate(dataset.particles[:150], 0)  # 150 = 2 blocks and a short one
    assert len(traces) == 1 and responses.shape == (150, 12, 12) and responses.dtype == np.uint16
    np.testing.assert_array_equal(generate(dataset.particles[:130], 0), responses[:130])
    assert not np.array_equal(generate(dataset.particles[:130], 1), responses[:130])
    first, second = np.split(generate(dataset.particles[[0] * 128], 0), 2)     # two blocks of one particle
    assert not np.array_equal(first, second)


# ---------------------------------------------------------------------------------------------------- network

def size(net):
    arrays = [leaf for leaf in jax.tree.leaves(net) if getattr(leaf, "dtype", None) == jnp.float32]
    return sum(math.prod(leaf.shape) for leaf in arrays)


def test_sizes_of_the_networks():
    shapes = partial(eqx.filter_eval_shape, fm.make_network)
    full = {name: data.DETECTORS[name]._replace(shape=SHAPES[name]) for name in SHAPES}
    assert size(shapes("paper", "round", full["zn"], 9, KEY)) == 77_372        # as the public code of [FM]
    assert size(shapes("tiny", "sample", full["zn"], 14, KEY)) == common.count_parameters(
        fm.make_network("tiny", "sample", full["zn"], 14, KEY))


@pytest.mark.parametrize("name, how, detector", [
    ("paper", "sample", "zn"), ("paper", "round", "zn"),                       # long to trace
    *itertools.product(("dense",), ("sample", "round", "floor"), SHAPES)])
def test_every_variant_has_its_shapes(name, how, detector):
    """Traced, not compiled."""
    shape = data.DETECTORS[detector].shape
    net = eqx.filter_eval_shape(make, name, how, detector)
    batch = np.zeros((4, *shape), np.uint16), np.zeros((4, 14), np.float32), KEY
    loss, parts = eqx.filter_eval_shape(lambda net: fm.batch_loss(net, *batch, how), net)
    assert loss.shape == () and len(parts) == (4 if how == "sample" else 3)
    model = solvers.unfitted(lambda _: net, 1, KEY)
    responses = eqx.filter_eval_shape(lambda model: fm.sample(model, *batch[1:], shape, how), model)
    assert responses.shape == (4, *shape) and responses.dtype == jnp.uint16


# --------------------------------------------------------------------------------------------------- training

SLOWLY = "--batch-size", 16, "--epochs", 7                                      # 7 x 30 steps


def test_training_lowers_the_loss(dataset, tmp_path):
    """On one batch with the same noise, for the averaged network of a short run and the untrained one; a step
    compiles once."""
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return fm.batch_loss(*args, **kwargs)
    net = run(dataset, tmp_path, *SLOWLY, loss=counted)[0]
    assert len(traces) == 1 and losses(tmp_path)[-1]["step"] == 7 * (489 // 16)
    c = data.conditions(dataset.particles, data.fit_conditions(dataset.particles, "physics"))
    batch = dataset.responses[:400], c[:400], KEY
    loss = eqx.filter_jit(lambda net: fm.batch_loss(net, *batch, "sample")[1])
    before, after = loss(jax.device_get(make())), loss(jax.device_get(net))
    assert all(after[name] < before[name] for name in before)


def test_same_seed_same_run(dataset, trained, tmp_path):
    folder, first = trained
    second = fm.main([*tiny.FLAGS, "--run", str(tmp_path)])
    assert (second["seen"], second["unseen"]) == (first["seen"], first["unseen"])
    assert losses(folder) == losses(tmp_path)
    one, two = ((run / "model.eqx").read_bytes().partition(b"\n")[2] for run in (folder, tmp_path))
    assert one == two
    run(dataset, tmp_path / "other", "--seed", 1)
    assert losses(tmp_path / "other") != losses(tmp_path)


def test_two_devices_take_the_steps_of_one(dataset, tmp_path):
    one, two = (run(dataset, tmp_path / str(n), "--devices", n, "--epochs", 2)[0] for n in (1, 2))
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(leaves(one), leaves(two)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bf16_trains_float32_weights(dataset, trained, tmp_path):
    net = run(dataset, tmp_path, "--precision", "bf16")[0]
    assert {leaf.dtype for leaf in leaves(net.path)} == {jnp.dtype("float32")}
    found, expected = losses(tmp_path)[-1], losses(trained[0])[-1]
    assert found.pop("gradient norm") == pytest.approx(expected.pop("gradient norm"), rel=0.3)
    assert found == pytest.approx(expected, rel=0.1)


HOST = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(fm.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import common, fm, metrics, pytest, tiny
tiny.shrink()
tiny.shrink_detectors(pytest.MonkeyPatch(), sys.argv.pop())
metrics.report = lambda *args, **kwargs: None
common.run(fm.main)
"""


def test_two_hosts_take_the_steps_of_one(trained, tmp_path):
    """Each host takes its own half of every batch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ZDC_COORDINATOR": f"localhost:{port}", "ZDC_PROCESSES": "2",
                                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=2", "count=1")}
    flags = [*tiny.FLAGS, "--devices", "2", "--run", str(tmp_path), os.environ["ZDC_CACHE"]]
    command = [sys.executable, "-c", HOST, *flags]
    hosts = [subprocess.Popen(command, env=environment | {"ZDC_PROCESS_ID": str(i)}) for i in range(2)]
    assert [host.wait(timeout=200) for host in hosts] == [0, 0]
    for one, two in zip(losses(trained[0]), losses(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_resume_is_as_uninterrupted(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    flags = SLOWLY                                                             # a log line every 50 steps
    whole = run(dataset, tmp_path / "whole", *flags)[0]
    log, cut = files.log_line, tmp_path / "cut"

    def stop(folder, record):
        log(folder, record)
        if record["step"] == 150:  # saved last: the state of step 100
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "log_line", stop)
        run(dataset, cut, *flags)
    assert common.read_header(cut / "state.eqx")["step"] == 100
    assert [record["step"] for record in files.read_log(cut)] == [50, 100, 150]
    assert_equal_bits(run(dataset, cut, *flags, "--resume")[0], whole)
    assert losses(cut) == losses(tmp_path / "whole") and len(losses(cut)) == 5
    assert_equal_bits(run(dataset, cut, *flags, "--resume")[0], whole)         # nothing is left to do

    with pytest.raises(UserError, match="--resume needs the flags of the first run; different: lr, ema"):
        run(dataset, cut, *flags, "--resume", "--lr", "0.1", "--ema", "0.5")
    short = data.Dataset(*(field[:600] for field in dataset))
    with pytest.raises(UserError, match="rows of the data"):
        run(short, cut, *flags, "--resume")
    assert_equal_bits(run(dataset, cut, *flags, "--resume")[0], whole)


def test_nan_stops_the_run(dataset, tmp_path, monkeypatch, capsys):
    """With the step and the last good checkpoint, which holds finite numbers."""
    monkeypatch.setattr(common, "time", tiny.clock())
    serve, served = common.shard_batch, []

    def poison(batch, mesh):
        served.append(1)
        return serve((batch[0], batch[1] * (np.nan if len(served) > 60 else 1)), mesh)
    monkeypatch.setattr(common, "shard_batch", poison)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: run(dataset, tmp_path, *SLOWLY))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "step 100" in error and str(tmp_path / "state.eqx") in error
    optimiser = common.adamw(common.plan(fm.parse(tiny.FLAGS)), 210)
    state = common.load_checkpoint(tmp_path / "state.eqx", common.first_state(make(), optimiser))[1]
    assert all(np.isfinite(leaf).all() for leaf in leaves(state))


def test_nan_before_the_first_checkpoint(dataset, tmp_path):
    loss = lambda net, *rest, **kwargs: (net.path.position.sum(), {"path": jnp.float32(jnp.nan)})
    with pytest.raises(UserError, match="loss is nan at step 7, last good checkpoint: none"):
        run(dataset, tmp_path, loss=loss)


# ------------------------------------------------------------------------------------------------- whole runs

WRITTEN = {"model.eqx", "metrics.json", "samples.png", "channels.png", "training.png"}


def test_what_a_run_leaves(trained):
    folder, result = trained
    assert {path.name for path in folder.iterdir()} == {"state.eqx", "log.jsonl", *WRITTEN}
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert {"script", "detector", "command", "versions", "device", "rows", "parameters", "mflop",
            "train_seconds", "step_seconds", "ms_per_response", "seen", "unseen"} <= result.keys()
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140}
    for part in ("seen", "unseen"):
        assert set(metrics.SCORES) <= result[part].keys()
        assert {"value", "spread", "oracle", "R"} <= result[part]["W"].keys()
    header = common.read_header(folder / "model.eqx")
    assert (header["script"], header["detector"], len(header["scaler"]["mean"])) == ("fm", "zn", 14)
    assert header["parameters"] == result["parameters"] + 2 + 2 + 4            # and the solver of two steps


def test_saved_and_loaded(trained, tmp_path):
    """The same scores; flags that decided the training, rows, seed and split are the checkpoint's."""
    folder, result = trained
    weights, before = str(folder / "model.eqx"), {path: path.read_bytes() for path in folder.iterdir()}
    files.write_json(tmp_path / "model.eqx", "another model")
    flags = ["--net", "dense", "--lr", "0.5", "--n", "99", "--steps", "9", "--quiet"]
    again = fm.main([*flags, "--load", weights, "--run", str(tmp_path)])
    assert all(again[name] == result[name] for name in ("seen", "unseen", "rows"))
    assert again["flags"] == result["flags"] and again["train_seconds"] == result["train_seconds"]
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert (tmp_path / "model.eqx").read_text() == '"another model"\n'  # of the run, not of what was scored


def test_validation(trained, dataset, tmp_path):
    """--validate scores validation rows alone."""
    flags = ["--load", str(trained[0] / "model.eqx"), "--validate", "--quiet"]
    result = fm.main([*flags, "--run", str(tmp_path)])
    assert result["rows"] == {"train": 489, "validation": 71} and "seen" not in result
    assert result["validation"]["W"]["value"] > result["validation"]["W"]["oracle"] > 0
    assert result["evaluations"] == 3
    assert json.loads((tmp_path / "metrics.json").read_text()) == files.plain(result)


def test_every_other_flag(tmp_path):
    """The other detector, counts, split, conditions and number format; all ways to counts are traced."""
    flags = "--detector zp --counts floor --split particles --cond raw --precision bf16 --lr 1e-3 --steps 1"
    result = fm.main([*tiny.FLAGS, *flags.split(), "--run", str(tmp_path)])
    assert result["unseen"]["W"]["value"] > 0 and result["unseen"]["W"]["oracle"] > 0
    assert result["seen"] is None and len(common.read_header(tmp_path / "model.eqx")["scaler"]["mean"]) == 9
    assert WRITTEN <= {path.name for path in tmp_path.iterdir()}


def test_few_rows(tmp_path):
    result = fm.main([*tiny.FLAGS, "--n", "12", "--batch-size", "2", "--run", str(tmp_path)])
    assert result["rows"] == {"train": 8, "seen": 3, "unseen": 3} and result["seen"]["FPD"]["value"] is None


@pytest.mark.parametrize("kind", ["HDF5", "npz"])
def test_own_data(kind, dataset, tmp_path):
    path = tmp_path / "own.h5"
    if kind == "HDF5":
        tiny.save(path, dataset, detector="zn")
    else:
        path = tmp_path / "own"
        path.mkdir()
        np.savez(path / "data_nonrandom_responses.npz", dataset.responses.astype(np.float64))
        np.savez(path / "data_nonrandom_particles.npz", np.column_stack([dataset.particles, dataset.pdg]))
    result = fm.main([*tiny.FLAGS, "--data", str(path), "--run", str(tmp_path / "run")])
    assert result["rows"] == {"train": 489, "seen": 140} and result["unseen"] is None
    w = result["seen"]["W"]
    assert w["R"] is None and "oracle" not in w and w["value"] > 0
    assert losses(tmp_path / "run")[-1]["step"] == 7


def test_finetuning_starts_from_a_checkpoint(trained, dataset, tmp_path):
    """Without a learning rate it ends in the same network, with the same scaling, whatever its flags were."""
    tiny.save(tmp_path / "own.h5", data.select(dataset, slice(300)))
    model = trained[0] / "model.eqx"
    fm.main(["--data", str(tmp_path / "own.h5"), "--finetune", str(model), "--lr", "0", "--epochs", "1",
             "--batch-size", "64", "--steps", "2", "--validate", "--quiet", "--run", str(tmp_path / "run")])
    old, new = (common.read_header(path) for path in (model, tmp_path / "run" / "model.eqx"))
    assert new["scaler"] == old["scaler"] and new["flags"]["net"] == "tiny" and "axes" in new
    make = partial(solvers.unfitted, partial(fm.make_network, "tiny", "sample", data.DETECTORS["zn"], 14), 2)
    nets = [common.load_model(path, make).net for path in (model, tmp_path / "run" / "model.eqx")]
    for a, b in zip(*map(jax.tree.leaves, nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)


def test_a_cut_off_finetuning_resumes(trained, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    begin = "--finetune", trained[0] / "model.eqx", "--epochs", 3
    again = lambda *flags: run(dataset, tmp_path, *begin, *flags)[0]
    tiny.assert_resume_is_as_uninterrupted(again, tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------------- generating

@pytest.fixture
def job(trained, dataset, tmp_path):
    """generate(kind of list, ...) -> the written file as a dict of arrays, of 300 particles."""
    particles, pdg = dataset.particles[:300], dataset.pdg[:300]
    with h5py.File(tmp_path / "list.h5", "w") as file:
        file["particles"], file["pdg"] = particles, pdg
    np.savez(tmp_path / "list.npz", np.column_stack([particles, pdg]))
    names = ["pdg", *reversed(data.FEATURES)]
    np.savetxt(tmp_path / "list.csv", np.column_stack([pdg, particles[:, ::-1]]), fmt="%.9g", delimiter=",",
               header=",".join(names), comments="")
    model = str(trained[0] / "model.eqx")

    def generate(kind="h5", *flags):
        out = tmp_path / "out.h5"
        result = fm.main(["--load", model, "--generate", str(tmp_path / f"list.{kind}"), "--out", str(out),
                          "--steps", "2", "--quiet", "--all-hit", *flags])
        assert result == {"rows": 300, "out": str(out)}
        with h5py.File(out) as file:
            attributes = dict(file.attrs)
            assert attributes.pop("rows").tolist() == [0, 300, 300] and "seed" in attributes
            assert attributes.items() >= {"detector": "zn", "script": "fm", "checkpoint": model}.items()
            return {name: file[name][:] for name in file}
    return SimpleNamespace(generate=generate, out=tmp_path / "out.h5", particles=particles, pdg=pdg,
                           folder=tmp_path)


def test_generated_files(job):
    found = {kind: job.generate(kind) for kind in ("h5", "npz", "csv")}
    for arrays in found.values():
        assert arrays["responses"].dtype == np.uint16 and arrays["responses"].shape == (300, 12, 12)
        np.testing.assert_array_equal(arrays["channels"], metrics.channels(arrays["responses"]))
        np.testing.assert_array_equal(arrays["particles"], job.particles)
        np.testing.assert_array_equal(arrays["pdg"], job.pdg)
        np.testing.assert_array_equal(arrays["responses"], found["h5"]["responses"])
    assert not np.array_equal(job.generate("h5", "--seed", "1")["responses"], found["h5"]["responses"])
    loaded = data.load(job.out, "zn")                                          # metrics.py reads it
    assert len(loaded.pdg) == 300 and loaded.responses.any()


def test_generating_streams(job, monkeypatch):
    monkeypatch.setattr(common, "BLOCK", 4)
    sizes, channels = [], metrics.channels
    monkeypatch.setattr(metrics, "channels", lambda counts: sizes.append(len(counts)) or channels(counts))
    assert len(job.generate()["responses"]) == 300 and sizes == [128, 128, 44]


@pytest.mark.parametrize("existing, error", [
    (None, UserError), (b"an old file", OSError), (b"an old file", KeyboardInterrupt)])
def test_nothing_half_written(job, monkeypatch, existing, error):
    monkeypatch.setattr(common, "BLOCK", 4)
    if existing:
        job.out.write_bytes(existing)
    before, calls, channels = {path.name for path in job.folder.iterdir()}, [], metrics.channels

    def fail(responses):
        calls.append(1)
        if len(calls) == 2:
            raise error("stop")
        return channels(responses)
    monkeypatch.setattr(metrics, "channels", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        job.generate()
    assert {path.name for path in job.folder.iterdir()} == before
    assert not existing or job.out.read_bytes() == existing
