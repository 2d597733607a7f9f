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
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare, logistic

import common
import data
import fm
import metrics
import tiny
from common import UserError

SHAPES = {name: detector.shape for name, detector in data.DETECTORS.items()}
KEY = jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def shrunk():
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        yield


@pytest.fixture(scope="module")
def dataset():
    return data.open_data("zn", 700, quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, metrics.json as a dict) of one short run."""
    folder = tmp_path_factory.mktemp("fm") / "run"
    return folder, fm.main([*tiny.FLAGS, "--run", str(folder)])


def arguments(*flags):
    return fm.flags().parse_args([*tiny.FLAGS, *map(str, flags)])


def run(dataset, folder, *flags):
    """Train on the data set; the averaged network."""
    args = arguments("--run", folder, *flags)
    rows = data.split_rows(len(dataset.pdg), 0)[0]
    return fm.train(args, dataset, rows, data.fit_conditions(dataset.particles[rows], args.cond))[0]


def losses(folder):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in common.read_log(folder)]


def leaves(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def assert_equal_bits(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# -------------------------------------------------------------------------------------------------------------- solvers

def denoised(a, b=0.0):
    """The maps of a network whose mean of x_1 is a + b x."""
    return jnp.stack([a, 0 * a + b, 0 * a + 50, 0 * a])                        # the probability of light is 1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("ab2", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    error = [abs(fm.integrate(lambda x, t: -x, np.float64(1), 2.0, steps, solver) - math.exp(-2)) for steps in
             (64, 128)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver, degree", [("euler", 0), ("midpoint", 1), ("rk4", 3)])
def test_times_of_the_stages(solver, degree):
    """dx/dt = t^p is a quadrature: exact up to the degree of the rule, if each stage is asked at its own time."""
    for p in range(degree + 2):
        error = fm.integrate(lambda x, t: t**p, np.float64(0), 0.6, 3, solver) - 0.6 ** (p + 1) / (p + 1)
        assert (abs(error) < 1e-12) == (p <= degree)


@pytest.mark.parametrize("solver", fm.SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 11])
def test_straight_lines_are_exact(solver, steps):
    x0, x1 = jax.random.normal(KEY, (2, 44, 44))
    for end in (0.6, 0.95):
        x = fm.integrate(lambda x, t: fm.velocity(denoised(x1), x, t), x0, end, steps, solver)
        np.testing.assert_allclose(x, (1 - end) * x0 + end * x1, atol=2e-5)


@pytest.mark.parametrize("end", [0.6, 0.94])
@pytest.mark.parametrize("solver, error", [("rk4", 1e-3), ("ab2", 1e-2)])
def test_flow_of_a_gaussian(end, solver, error):
    """For x_1 ~ N(m, s^2) the mean of x_1 is linear in x_t, m + slope (x_t - t m), and the flow keeps each quantile."""
    m, s = 1.7, 0.3

    def v(x, t):
        slope = t * s**2 / ((1 - t) ** 2 + t**2 * s**2)
        return fm.velocity(denoised(jnp.full_like(x, m - slope * t * m), slope), x, t)
    x0 = jax.random.normal(KEY, (100, 100))
    spread = math.hypot(1 - end, end * s)
    x = fm.integrate(v, x0, end, 64, solver)
    np.testing.assert_allclose(x, end * m + spread * x0, atol=error)
    assert float(x.mean()) == pytest.approx(end * m, abs=0.05) and float(x.std()) == pytest.approx(spread, rel=0.03)


# ------------------------------------------------------------------------------------------------------------ objective

@pytest.mark.parametrize("how", ["round", "floor"])
def test_counts_survive_the_state(how):
    counts = jnp.arange(3000.0)
    found = fm.to_counts(fm.to_state(counts, how, KEY), how)
    np.testing.assert_array_equal(found[:300], counts[:300])
    assert abs(found - counts).max() <= 1 and (found != counts).mean() < 1e-3  # the last bit of float32
    assert (fm.to_counts(jnp.array([-3.0, -1e-3, 0.0]), how) == 0).all()


def test_state_of_sampled_counts_has_no_noise():
    counts = jnp.arange(100.0)
    np.testing.assert_allclose(fm.to_state(counts, "sample", KEY), 2 * np.sqrt(np.arange(100)), rtol=1e-6)


def test_velocity_from_an_exact_response():
    x0, x1 = jax.random.normal(KEY, (2, 5, 4))
    for t in (0.0, 0.3, 0.94):
        x = (1 - t) * x0 + t * x1
        for maps in (denoised(x1), denoised(x1 - 0.5 * x, 0.5), jnp.concatenate([denoised(x1), jnp.stack([x, x, x])])):
            np.testing.assert_allclose(fm.velocity(maps, x, t), x1 - x0, atol=2e-5)
    np.testing.assert_array_equal(fm.velocity(x0[None], x, t), x0)             # the paper's network gives it directly


def test_path_error_is_zero_for_the_right_velocity():
    counts, key = jnp.asarray(np.random.default_rng(2).poisson(0.5, (44, 44)), jnp.float32), jax.random.key(3)
    x1 = fm.to_state(counts, "sample", key)
    error, maps, x = fm.path_error(lambda x, t, c: denoised(x1), counts, 0.4, None, "sample", key)
    assert abs(error).max() < 1e-4 and maps.shape == (4, 44, 44)
    np.testing.assert_allclose((x - 0.4 * x1).std(), 0.6, rtol=0.05)
    wrong = fm.path_error(lambda x, t, c: denoised(x1 + 0.6), counts, 0.4, None, "sample", key)[0]
    np.testing.assert_allclose(wrong, 1, rtol=1e-4)


@pytest.mark.parametrize("detector", data.DETECTORS.values(), ids=data.DETECTORS)
def test_emphasis(detector):
    """Against sums written out, and for white noise the sum of its weights, since every direction has unit length."""
    rng, (h, w) = np.random.default_rng(4), detector.shape
    c = np.zeros(14, np.float32)
    c[[11, 13]] = np.arcsinh(np.array([detector.centre, detector.centre - 19.3]) / 3.52)     # both places in the middle
    r2 = (np.arange(h)[:, None] + 0.5 - h / 2)**2 + (np.arange(w) + 0.5 - w / 2)**2
    directions = [(4 * 2, bump / np.sqrt((bump**2).sum())) for bump in (1 / (1 + r2 / 4), np.exp(-r2 / 2))]    # two places
    directions.append((6, np.full((h, w), (h * w) ** -0.5)))
    for size, weight in ((4, 0.6), (16, 2.4)):
        for i in range(0, h, size):
            for j in range(0, w, size):
                block = np.zeros((h, w))
                block[i:i + size, j:j + size] = 1 / size
                directions.append((weight, block))
    error = rng.normal(size=(h, w)).astype(np.float32)
    expected = sum(weight * (direction * error).sum()**2 for weight, direction in directions)
    assert fm.emphasis(jnp.asarray(error), jnp.asarray(c), detector) == pytest.approx(expected, rel=2e-3)
    assert fm.emphasis(jnp.asarray(error), jnp.zeros(9), detector) < expected      # raw conditions know no places


def probabilities(counts, location, scale):
    return np.exp(-np.asarray(fm.count_loss(jnp.asarray(counts, jnp.float32), location, scale), np.float64))


@settings(deadline=None, max_examples=60)
@given(st.floats(-5, 40), st.floats(-4, 3))
def test_probabilities_sum_to_one(location, log_scale):
    found = probabilities(np.arange(40_001), np.float32(location), np.float32(np.exp(log_scale)))
    assert found.sum() == pytest.approx(1, abs=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.floats(-3, 20), st.floats(-2, 2))
def test_count_loss_by_brute_force(location, log_scale):
    counts, scale = np.arange(200), np.exp(log_scale)
    edges = logistic.cdf(2 * np.sqrt(np.maximum(np.arange(201) - 0.5, 0)), location, scale)
    expected = np.diff(edges)
    expected[0] = edges[1]                                                     # everything below counts as no photon
    found = probabilities(counts, np.float32(location), np.float32(scale))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-9)


def test_count_loss_stays_finite():
    grid = [0.0, 1, 7, 65535], [-1e3, 0, 30, 1e3], np.exp([-4.0, 0, 3])
    counts, location, scale = (jnp.asarray(axis, jnp.float32) for axis in np.meshgrid(*grid))
    value, gradient = jax.value_and_grad(lambda a, b: fm.count_loss(counts, a, b).mean(), (0, 1))(location, scale)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("location, scale", [(0.3, 0.5), (-2.0, 1.5), (6.0, 0.4)])
def test_draws_follow_the_loss(location, scale):
    draws = fm.draw_counts(jnp.full(100_000, location), jnp.full(100_000, scale), jax.random.key(7))
    draws = np.asarray(draws).astype(int)
    expected = len(draws) * probabilities(np.arange(draws.max() + 1), location, scale)
    often = expected >= 20
    found = np.append(np.bincount(draws)[often], np.bincount(draws)[~often].sum())
    expected = np.append(expected[often], len(draws) - expected[often].sum())
    assert chisquare(found, expected).pvalue > 1e-3


def test_halves_of_a_batch(monkeypatch):
    """With sampled counts half of the batch trains the path, at times exit u^3 for even u, the other half the counts, at
    exit."""
    seen, loss = [], fm.count_loss
    maps = jnp.zeros((7, 44, 44))
    monkeypatch.setattr(fm, "path_error", lambda net, n, t, c, how, key: (jnp.sqrt(jnp.full(n.shape, t)), maps, jnp.full(n.shape, t)))
    monkeypatch.setattr(fm, "emphasis", lambda error, c, detector: 44 * 44 * error[0, 0])
    monkeypatch.setattr(fm, "count_distribution", lambda maps, x: (x, jnp.ones_like(x)))
    monkeypatch.setattr(fm, "count_loss", lambda *args: seen.append(args) or loss(*args))
    counts, c = np.zeros((64, 44, 44), np.uint16), np.zeros((64, 14), np.float32)
    total, parts = fm.batch_loss(None, counts, c, KEY, arguments("--exit", "0.5"))
    [(_, location, _)] = seen
    assert parts["path"] == pytest.approx(0.5 / 4, abs=0.01) and len(location) == 32 and (location == 0.5).all()
    assert parts["nats per fibre"] == pytest.approx(-logistic.logcdf(math.sqrt(2) - 0.5), rel=1e-5)
    assert parts["sums"] == pytest.approx(0.4 * 0.5**0.5, abs=0.02)            # the mean of u^(3/2)
    assert total == pytest.approx(float(parts["path"] + parts["sums"] + 10 * parts["nats per fibre"]))
    for how in ("round", "floor"):
        assert fm.batch_loss(None, counts, c, KEY, arguments("--counts", how))[0] == pytest.approx(0.5, abs=0.01)


# -------------------------------------------------------------------------------------------------------------- network

def untrained(*flags, conditions=14):
    """The network of the flags, shapes only."""
    return eqx.filter_eval_shape(fm.make_network, arguments(*flags), conditions, KEY)


def size(net):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net) if getattr(leaf, "dtype", None) == jnp.float32)


@pytest.mark.parametrize("conditions, places", [(14, {11, 12, 13}), (9, {4, 5})])
def test_fast_waves_are_those_of_the_places(conditions, places):
    """A wave's slope is at most its frequency: 64 for the places, 4 for everything else, so that it cannot tell particles apart."""
    slopes = np.abs(jax.vmap(jax.jacobian(fm.waves))(jax.random.normal(KEY, (200, conditions)))).max((0, 1))
    assert {j for j in range(conditions) if slopes[j] > 60} == places
    assert all(3 < slopes[j] <= 4 for j in range(conditions) if j not in places)


def test_sizes_of_the_networks():
    assert size(untrained("--net", "paper", "--counts", "round", conditions=9)) == 77_372
    for detector in SHAPES:
        assert size(untrained("--net", "compact", "--detector", detector)) <= 100_000
    assert size(untrained()) == common.count_parameters(fm.make_network(arguments(), 14, KEY))


@pytest.mark.parametrize("shape", [*SHAPES.values(), (5, 9)])
def test_patches(shape):
    x = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    patches = fm.to_patches(x, 4)
    assert patches.shape == (-(-shape[0] // 4) * -(-shape[1] // 4), 16)
    np.testing.assert_array_equal(patches[0].reshape(4, 4), x[:4, :4])
    np.testing.assert_array_equal(fm.from_patches(patches, 4, shape), x[None])
    both = jnp.concatenate([patches, -patches], axis=1)                        # (P, 2 * 16)
    np.testing.assert_array_equal(fm.from_patches(both, 4, shape), jnp.stack([x, -x]))


@pytest.mark.parametrize("detector", data.DETECTORS.values(), ids=data.DETECTORS)
@pytest.mark.parametrize("charge", (0, 1))
def test_vicinity(detector, charge):
    """A bump stands where the simulator puts the light, straight on or bent; whole patches away everything looks the same."""
    def near(x, y):
        """Of a particle that hits at x and y, in fibres from the middle of the matrix."""
        energy, mass, pdg = (3500.0, 938.27, 2212) if charge else (1000.0, 0.0, 22)
        x_cm = x * detector.pitch + detector.centre - charge * data.BEAM_CM * 7000 / energy
        px, py = (energy * cm / data.FLIGHT_CM for cm in (x_cm, y * detector.pitch))
        particle = np.array([[energy, 0, 0, 0, px, py, np.sqrt(energy**2 - px**2 - py**2 - (mass / 1000)**2), mass, charge]], np.float32)
        c = data.conditions(particle, data.Scaler(np.zeros(14), np.ones(14), "physics"))[0]
        light = data.simulate(detector, np.repeat(particle, 300, 0), np.full(300, pdg), 0)
        return *fm.vicinity(jnp.asarray(c), detector, 4), light.mean(0)

    grid = lambda features: np.asarray(features).reshape(-(-detector.shape[0] // 4), -(-detector.shape[1] // 4), -1)
    offsets, bumps, light = near(5.3, -2.1)
    wide, narrow = (fm.from_patches(bumps[:, 2 * charge + i], 4, detector.shape)[0] for i in (0, 1))
    expected = detector.shape[0] // 2 + 5, detector.shape[1] // 2 - 3          # the fibre from 5 to 6 and -3 to -2
    assert wide[expected] == pytest.approx(1 / (1 + (0.2**2 + 0.4**2) / 4), abs=2e-3) and wide.max() == wide[expected]
    assert narrow[expected] == pytest.approx(np.exp(-(0.2**2 + 0.4**2) / 2), abs=2e-3) and narrow.max() == narrow[expected]
    assert wide[expected[0] + 3, expected[1]] == pytest.approx(1 / (1 + (3.2**2 + 0.4**2) / 4), abs=2e-3)
    assert np.abs(np.subtract(np.unravel_index(light.argmax(), light.shape), expected)).max() <= 1
    patch = tuple(n // 4 for n in expected)                                    # its middle lies at whole fibres from the matrix's
    middle = 4 * np.array(patch) + 2 - np.array(detector.shape) / 2 - (5.3, -2.1)
    np.testing.assert_allclose(2 * np.sinh(2 * grid(offsets)[patch][[charge, 2]]), middle, atol=5e-3)
    moved = near(5.3 - 8, -2.1 + 4)
    for there, here in zip(moved[:2], (offsets, bumps)):
        kept = [0, 1, 2] if there.ndim == 2 else range(32 * charge, 32 * charge + 32)
        np.testing.assert_allclose(grid(there)[:-2, 1:, kept], grid(here)[2:, :-1, kept], atol=5e-3)


@pytest.mark.parametrize("detector", SHAPES)
@pytest.mark.parametrize("counts", ["sample", "round", "floor"])
@pytest.mark.parametrize("name", ["paper", "compact", "dense"])
def test_every_variant_has_its_shapes(name, counts, detector):
    """Traced, not compiled."""
    flags, shape = ("--detector", detector, "--net", name, "--counts", counts), SHAPES[detector]
    args, net = arguments(*flags), untrained(*flags)
    batch = np.zeros((4, *shape), np.uint16), np.zeros((4, 14), np.float32), KEY
    loss, parts = eqx.filter_eval_shape(lambda net: fm.batch_loss(net, *batch, args), net)
    assert loss.shape == () and len(parts) == (3 if counts == "sample" else 1)
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if hasattr(leaf, "dtype") else leaf, net)
    maps = eqx.filter_eval_shape(lambda net: net(jnp.zeros(shape), 0.5, jnp.zeros(14)), half)
    assert maps.dtype == jnp.bfloat16                                          # nothing on the way makes float32 of it
    for solver in fm.SOLVERS:
        here = common.with_flags(args, solver=solver, steps=1)
        responses = eqx.filter_eval_shape(lambda net: fm.sample(net, *batch[1:], here), net)
        assert responses.shape == (4, *shape) and responses.dtype == jnp.uint16


@pytest.mark.parametrize("solver", fm.SOLVERS)
@pytest.mark.parametrize("counts", ["sample", "round"])
def test_evaluations(solver, counts):
    args, calls = arguments("--solver", solver, "--counts", counts, "--steps", "3"), []

    def net(x, t, c):
        calls.append(t)
        return jnp.zeros((4 + 3 * (counts == "sample"), *x.shape))
    fm.sample(net, np.zeros((2, 14), np.float32), KEY, args)
    assert len(calls) == fm.evaluations(args)


def test_largest_count_fits():
    net = lambda x, t, c: denoised(jnp.full_like(x, 1e4))
    for counts in ("round", "floor"):
        assert (fm.sample(net, np.zeros((2, 14), np.float32), KEY, arguments("--counts", counts)) == 65535).all()


# ------------------------------------------------------------------------------------------------------------- training

def test_a_step_compiles_once(dataset, tmp_path, monkeypatch):
    traces, loss = [], fm.batch_loss
    monkeypatch.setattr(fm, "batch_loss", lambda *args: traces.append(1) or loss(*args))
    run(dataset, tmp_path, "--epochs", 3)
    assert len(traces) == 1 and losses(tmp_path)[-1]["step"] == 3 * (489 // 64)


def test_the_sampler_compiles_once(dataset, monkeypatch):
    traces, draw = [], fm.sample
    monkeypatch.setattr(fm, "sample", lambda *args: traces.append(1) or draw(*args))
    scaler = data.fit_conditions(dataset.particles, "physics")
    net = fm.make_network(arguments(), 14, KEY)
    generate = metrics.generator(arguments(), fm.sampler(arguments(), net), scaler)
    responses = generate(dataset.particles[:150], 0)                           # 150 = 2 blocks and a short one
    assert len(traces) == 1 and responses.shape == (150, 44, 44)
    np.testing.assert_array_equal(generate(dataset.particles[:130], 0), responses[:130])
    assert not np.array_equal(generate(dataset.particles[:130], 1), responses[:130])
    first, second = np.split(generate(dataset.particles[[0] * 128], 0), 2)     # two blocks of the same particle
    assert not np.array_equal(first, second)


def test_training_lowers_the_loss(dataset, tmp_path):
    """On one and the same batch with the same noise, for the averaged network of a short run against the untrained one."""
    net, args = run(dataset, tmp_path, "--epochs", 8, "--batch-size", 16), arguments()
    c = data.conditions(dataset.particles, data.fit_conditions(dataset.particles, "physics"))
    loss = eqx.filter_jit(lambda net: fm.batch_loss(net, dataset.responses[:400], c[:400], KEY, args)[1])
    before, after = loss(fm.make_network(args, 14, KEY)), loss(net)
    assert all(after[name] < before[name] for name in before) and before.keys() == {"path", "sums", "nats per fibre"}


def test_same_seed_same_run(dataset, trained, tmp_path):
    folder, first = trained
    second = fm.main([*tiny.FLAGS, "--run", str(tmp_path)])
    assert (second["seen"], second["unseen"]) == (first["seen"], first["unseen"])
    assert losses(folder) == losses(tmp_path)
    one, two = ((run / "model.eqx").read_bytes().partition(b"\n")[2] for run in (folder, tmp_path))
    assert one == two
    run(dataset, tmp_path / "other", "--seed", 1)
    assert losses(tmp_path / "other") != losses(tmp_path)


def test_two_devices(dataset, tmp_path):
    one, two = (run(dataset, tmp_path / str(devices), "--devices", devices, "--epochs", 2) for devices in (1, 2))
    for a, b in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(leaves(one), leaves(two)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bf16(dataset, tmp_path):
    net = run(dataset, tmp_path / "bf16", "--precision", "bf16")
    run(dataset, tmp_path / "f32")
    assert {leaf.dtype for leaf in leaves(net)} == {jnp.dtype("float32")}
    assert losses(tmp_path / "bf16")[-1] == pytest.approx(losses(tmp_path / "f32")[-1], rel=0.1)     # the gradient norm: 7 %


def test_seconds_of_a_step(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    args, rows = arguments("--run", tmp_path, "--batch-size", 16, "--epochs", 2), np.arange(489)
    times = fm.train(args, dataset, rows, data.fit_conditions(dataset.particles, args.cond))[1]
    assert times["step_seconds"] == pytest.approx(6.1)                         # 61 s between steps 50 and 60


HOST = f"""
import sys
sys.path[:0] = [{str(Path(fm.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import common, fm, metrics, tiny
tiny.shrink()
metrics.report = lambda *args: None
common.run(fm.main)
"""


def test_two_hosts(trained, tmp_path):
    """Each host takes its own half of every batch: the losses are those of one host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ZDC_COORDINATOR": f"localhost:{port}", "ZDC_PROCESSES": "2", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", HOST, *tiny.FLAGS, "--devices", "2", "--run", str(tmp_path)]
    hosts = [subprocess.Popen(command, env=environment | {"ZDC_PROCESS_ID": str(i)}) for i in range(2)]
    assert [host.wait(timeout=200) for host in hosts] == [0, 0]
    for one, two in zip(losses(trained[0]), losses(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


class Cut(Exception):
    pass


def test_resume_is_as_uninterrupted(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    flags = "--batch-size", 16, "--epochs", 7                                  # 7 x 30 steps, a log line every 50
    whole = run(dataset, tmp_path / "whole", *flags)
    log = common.log_line

    def cut(folder, record):
        log(folder, record)
        if record["step"] == 150:                                              # saved last: the state of step 100
            raise Cut
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common, "log_line", cut)
        run(dataset, tmp_path / "cut", *flags)
    assert common.read_header(tmp_path / "cut" / "state.eqx")["step"] == 100
    assert [record["step"] for record in common.read_log(tmp_path / "cut")] == [50, 100, 150]
    resumed = run(dataset, tmp_path / "cut", *flags, "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5
    assert_equal_bits(resumed, whole)
    assert_equal_bits(run(dataset, tmp_path / "cut", *flags, "--resume"), whole)   # nothing is left to do

    with pytest.raises(UserError, match="state.eqx: --resume needs the flags of the first run; different: lr, ema"):
        run(dataset, tmp_path / "cut", *flags, "--resume", "--lr", "0.1", "--ema", "0.5")
    short = data.Dataset(*(field[:600] for field in dataset))
    with pytest.raises(UserError, match="rows of the data"):
        run(short, tmp_path / "cut", *flags, "--resume")
    assert_equal_bits(run(dataset, tmp_path / "cut", *flags, "--resume"), whole)


def test_nan_stops_the_run(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "time", tiny.clock())
    loss = fm.batch_loss

    def poisoned(net, counts, c, key, args):
        value, parts = loss(net, counts, c, key, args)
        bad = jnp.isnan(c).any()
        return jnp.where(bad, jnp.nan, value), {name: jnp.where(bad, jnp.nan, part) for name, part in parts.items()}
    monkeypatch.setattr(fm, "batch_loss", poisoned)
    batches, served = common.shard_batch, []

    def serve(batch, mesh):
        served.append(1)
        return batches((batch[0], batch[1] * (np.nan if len(served) > 60 else 1)), mesh)
    monkeypatch.setattr(common, "shard_batch", serve)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: run(dataset, tmp_path, "--batch-size", 16, "--epochs", 4))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and "step 100" in error and str(tmp_path / "state.eqx") in error
    _, state = common.load_checkpoint(tmp_path / "state.eqx", like=fresh_state(tmp_path), script="fm")
    assert all(np.isfinite(leaf).all() for leaf in leaves(state))
    assert [record["step"] for record in common.read_log(tmp_path)] == [50]


def fresh_state(folder):
    args = arguments("--batch-size", 16, "--epochs", 4, "--run", folder)
    net = fm.make_network(args, 14, KEY)
    return fm.State(net, net, fm.make_optimiser(args, 120).init(eqx.filter(net, eqx.is_inexact_array)))


def test_nan_before_the_first_checkpoint(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(fm, "batch_loss", lambda net, *rest: (net.position.sum(), {"path": jnp.float32(jnp.nan)}))
    with pytest.raises(UserError, match="loss is nan at step 7, last good checkpoint: none"):
        run(dataset, tmp_path)


# ---------------------------------------------------------------------------------------------------------- whole runs

WRITTEN = {"model.eqx", "metrics.json", "samples.png", "channels.png", "training.png"}


def test_what_a_run_leaves(trained):
    folder, result = trained
    assert {path.name for path in folder.iterdir()} == {"state.eqx", "log.jsonl", *WRITTEN}
    assert json.loads((folder / "metrics.json").read_text()) == common.plain(result)
    assert {"script", "detector", "command", "versions", "device", "rows", "parameters", "train_seconds",
            "step_seconds", "ms_per_response", "seen", "unseen"} <= result.keys()
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140}
    for part in ("seen", "unseen"):
        assert set(metrics.SCORES) <= result[part].keys()
        assert {"value", "spread", "oracle", "R"} <= result[part]["W"].keys()
    header = common.read_header(folder / "model.eqx")
    assert (header["script"], header["detector"], len(header["scaler"]["mean"])) == ("fm", "zn", 14)
    assert header["parameters"] == result["parameters"]


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    weights = folder / "model.eqx"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    again = fm.main([*tiny.FLAGS, "--net", "dense", "--lr", "0.5", "--load", str(weights), "--run", str(tmp_path)])
    assert (again["seen"], again["unseen"]) == (result["seen"], result["unseen"])
    assert again["flags"] == result["flags"] and again["train_seconds"] == result["train_seconds"]
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    more = fm.main([*tiny.FLAGS[2:], "--load", str(weights), "--run", str(tmp_path), "--steps", "3"])
    assert more["seen"]["W"]["value"] != result["seen"]["W"]["value"]


def test_a_loaded_model_meets_its_own_test_rows(trained, tmp_path):
    """With the rows, seed and split it was trained with: other ones would score training rows."""
    folder, result = trained
    again = fm.main(["--load", str(folder / "model.eqx"), "--steps", "2", "--quiet", "--run", str(tmp_path)])
    assert again["rows"] == result["rows"] and again["seen"] == result["seen"]


def test_scoring_keeps_the_model_of_the_run(trained, tmp_path):
    common.write_json(tmp_path / "model.eqx", "another model")
    fm.main([*tiny.FLAGS, "--load", str(trained[0] / "model.eqx"), "--run", str(tmp_path)])
    assert (tmp_path / "model.eqx").read_text() == '"another model"\n'


def random_network(make_network, *args):
    """A network of the right shapes, with weights from NumPy."""
    shapes, rng = eqx.filter_eval_shape(make_network, *args), np.random.default_rng(0)
    array = lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(lambda leaf: array(leaf) if hasattr(leaf, "dtype") else leaf, shapes)


# Every network, way to counts, solver and detector; all of their combinations are traced above.
@pytest.mark.parametrize("flags", [
    "zp --net paper --counts sample --solver euler --n 60 --batch-size 16",
    "zn --net compact --counts floor --solver midpoint", "zp --net dense --counts round --solver rk4",
    "zp --net tiny --split particles --schedule cosine", "zn --net tiny --cond raw --precision bf16 --counts round"])
def test_every_kind_of_run(flags, tmp_path, monkeypatch):
    if "paper" in flags:                                                       # its start takes long to compile
        monkeypatch.setattr(fm, "make_network", partial(random_network, fm.make_network))
    result = fm.main([*tiny.FLAGS, "--steps", "1", "--run", str(tmp_path), "--detector", *flags.split()])
    part = "unseen" if "particles" in flags else "seen"
    assert result[part]["W"]["value"] > 0 and result[part]["W"]["oracle"] > 0
    assert (result["seen"] is None) == ("particles" in flags)
    assert len(common.read_header(tmp_path / "model.eqx")["scaler"]["mean"]) == (9 if "raw" in flags else 14)
    assert WRITTEN <= {path.name for path in tmp_path.iterdir()}


def test_few_rows(tmp_path):
    result = fm.main([*tiny.FLAGS, "--n", "12", "--batch-size", "2", "--run", str(tmp_path)])
    assert result["rows"] == {"train": 8, "seen": 3, "unseen": 3} and result["seen"]["FPD"]["value"] is None


@pytest.mark.parametrize("kind", ["HDF5", "npz"])
def test_own_data(kind, dataset, tmp_path):
    path = tmp_path / "own.h5"
    if kind == "HDF5":
        data.save(path, dataset, detector="zn")
    else:
        path = tmp_path / "own"
        path.mkdir()
        np.savez(path / "data_nonrandom_responses.npz", dataset.responses.astype(np.float64))
        np.savez(path / "data_nonrandom_particles.npz", np.column_stack([dataset.particles, dataset.pdg]))
    result = fm.main([*tiny.FLAGS, "--data", str(path), "--run", str(tmp_path / "run")])
    assert result["rows"] == {"train": 489, "seen": 140} and result["unseen"] is None
    assert result["seen"]["W"]["R"] is None and "oracle" not in result["seen"]["W"] and result["seen"]["W"]["value"] > 0
    assert losses(tmp_path / "run")[-1]["step"] == 7


@pytest.mark.parametrize("oracle", [True, False])
def test_sweep(oracle, dataset, tmp_path):
    def case(steps):
        return {"steps": steps, "evaluations": 4 * steps}, lambda particles, seed: np.full((len(particles), 44, 44), steps, np.uint16)
    args = arguments("--run", tmp_path, *([] if oracle else ["--data", "own.h5"]))
    result = metrics.sweep(args, map(case, (1, 4, 32)), dataset, np.arange(50))
    assert [point["steps"] for point in result["points"]] == [1, 4, 32] and result["script"] == "fm"
    for point in result["points"]:
        truth = metrics.channels(dataset.responses[:50])
        assert point["evaluations"] == 4 * point["steps"] and ("oracle" in point) == oracle
        assert point["W"] == metrics.wasserstein(truth, metrics.channels(np.full((50, 44, 44), point["steps"])))
    assert json.loads((tmp_path / "sweep.json").read_text()) == common.plain(result)
    assert (tmp_path / "sweep.png").exists()


def test_a_loaded_model_is_only_swept(trained, tmp_path, monkeypatch):
    swept, flags = [], ["--load", str(trained[0] / "model.eqx"), "--sweep", "--run", str(tmp_path / "run")]
    monkeypatch.setattr(metrics, "sweep", lambda args, cases, dataset, rows: swept.append((cases, rows)) or "points")
    assert fm.main([*tiny.FLAGS, *flags, "--solver", "rk4"]) == "points"
    [(cases, rows)] = swept
    assert [tuple(entry.values()) for entry, _ in cases] == [(steps, 4 * steps + 1) for steps in (1, 2, 4, 8, 11, 16, 32)]
    np.testing.assert_array_equal(rows, data.split_rows(700, 0)[1])            # the validation rows
    assert not (tmp_path / "run").exists()


def test_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fm, "NETWORKS", {"tiny": fm.NETWORKS["tiny"]})
    result = fm.main(["--compare", "--batch-size", "4", "--steps", "2", "--run", str(tmp_path)])
    assert [row["net"] for row in result["networks"]] == ["tiny"] and len(capsys.readouterr().out.splitlines()) == 2
    assert json.loads((tmp_path / "compare.json").read_text()) == common.plain(result)


# ---------------------------------------------------------------------------------------------------------- generating

@pytest.fixture
def job(trained, dataset, tmp_path):
    """generate(name of the list, ...) -> the written file as a dict of arrays; 300 particles in each kind of list."""
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
                          "--steps", "2", "--quiet", *flags])
        assert result == {"rows": 300, "out": str(out)}
        with h5py.File(out) as file:
            assert dict(file.attrs) == {"detector": "zn", "script": "fm", "checkpoint": model}
            return {name: file[name][:] for name in file}
    return SimpleNamespace(generate=generate, out=tmp_path / "out.h5", particles=particles, pdg=pdg, folder=tmp_path)


def test_generated_files(job):
    found = {kind: job.generate(kind) for kind in ("h5", "npz", "csv")}
    for arrays in found.values():
        assert arrays["responses"].dtype == np.uint16 and arrays["responses"].shape == (300, 44, 44)
        np.testing.assert_array_equal(arrays["channels"], metrics.channels(arrays["responses"]))
        np.testing.assert_array_equal(arrays["particles"], job.particles)
        np.testing.assert_array_equal(arrays["pdg"], job.pdg)
        np.testing.assert_array_equal(arrays["responses"], found["h5"]["responses"])
    assert not np.array_equal(job.generate("h5", "--seed", "1")["responses"], found["h5"]["responses"])
    loaded = data.load(job.out, "zn")                                          # metrics.py reads it
    assert len(loaded.pdg) == 300 and loaded.responses.any()


def test_generating_streams(job, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 4)
    sizes, channels = [], metrics.channels
    monkeypatch.setattr(metrics, "channels", lambda responses: sizes.append(len(responses)) or channels(responses))
    assert len(job.generate()["responses"]) == 300 and sizes == [128, 128, 44]


@pytest.mark.parametrize("existing", [None, b"an old file"])
@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt])
def test_nothing_half_written(job, monkeypatch, existing, error):
    monkeypatch.setattr(metrics, "BLOCK", 4)
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
    assert {path.name for path in job.folder.iterdir()} == before and (not existing or job.out.read_bytes() == existing)
