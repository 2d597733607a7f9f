"""iaf.py: objectives by hand, densities by integrals, masks by Jacobians, inverses of flows, one run."""
import json
import math
import shutil
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

import common
import data
import files
import iaf
import metrics
import papers
import tiny
from common import UserError
from simulator import DETECTORS
from splines import NUMBERS

KEY = jax.random.key(0)
FLAGS = "--n 700 --batch-size 64 --epochs 2 --sum-epochs 2 --student-epochs 2 --quiet".split()
LOGIT = iaf.Logit(noise=0.5, mean=-1.75, std=1.9)
OURS = partial(iaf.Flow, width=8, hidden=4, group=4, outputs=2, embedding=8)
PAPER = partial(iaf.Flow, width=6, hidden=None, group=1, outputs=NUMBERS, embedding=8)
SMALL = {"local": partial(OURS, orders=(1, -1)), "paper": partial(PAPER, orders=(-1, 3)),
         "one": partial(OURS, orders=(-1,)), "pair": partial(OURS, orders=(-1,), group=1)}


def compiled(make, order):
    """A network of runs, with one block, made in one call."""
    def network(detector, conditions, logit, kind, key):
        return eqx.filter_jit(partial(make, detector, conditions, logit, kind, orders=(order,)))(key=key)
    return network


def score_w(args, generate, tests, label):
    """In place of metrics.score_model: W alone."""
    pairs = {name: (test.responses, generate(test.particles, 0)) for name, test in tests.items()}
    return {name: {"W": metrics.wasserstein(*map(metrics.channels, pair))} for name, pair in pairs.items()}


@pytest.fixture(scope="module", autouse=True)
def shrunk(small_detectors):
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setattr(iaf, "NETWORKS", {"local": compiled(OURS, -1), "paper": compiled(PAPER, 3)})
        patch.setattr(metrics, "score_model", score_w)
        yield


@cache
def toy_flow(name="local", kind="teacher", shape=(4, 6), conditions=14, scale=0.1):
    """A flow of a detector of few fibres whose weights, zero or small at first, are all at work."""
    detector, rng = DETECTORS["zn"]._replace(shape=shape), np.random.default_rng(5)
    shapes = eqx.filter_eval_shape(partial(SMALL[name], detector, conditions, LOGIT, kind), key=KEY)
    fill = lambda leaf: np.float32(scale * rng.normal(size=leaf.shape))        # by NumPy: nothing is compiled
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


def one_pass(flow):
    """Its last state for a batch, compiled."""
    return jax.jit(jax.vmap(lambda *row: flow(*row)[0][-1]))


def examples(rows=3, fibres=24, conditions=14):
    """Numbers (rows, fibres), conditions and photon sums."""
    rng, totals = np.random.default_rng(1), np.float32([12, 200, 2000])
    x, c = rng.normal(size=(rows, fibres)), 0.3 * rng.normal(size=(rows, conditions))
    return np.float32(x), np.float32(c), totals[:rows]


class Steps(eqx.Module):
    """A flow that is a list of functions."""
    functions: tuple = eqx.field(static=True)
    logit: iaf.Logit = eqx.field(static=True, default=LOGIT)

    @property
    def detector(self):
        return DETECTORS["zn"]

    def __call__(self, x, c, total):
        states = [x]
        for function in self.functions:
            states.append(function(states[-1]))
        return jnp.stack(states), jnp.zeros(())


def poisson(rows, seed=0):
    return np.random.default_rng(seed).poisson(0.3, (rows, *DETECTORS["zn"].shape)).astype(np.uint16)


# ------------------------------------------------------------------------------------------------------ flags

def test_the_flow_that_is_scored():
    assert [iaf.parse(flags).sampler for flags in ([], ["--stage", "teacher"], ["--sampler", "teacher"])] == [
        "student", "teacher", "teacher"]
    with pytest.raises(SystemExit):
        iaf.parse(["--stage", "teacher", "--sampler", "student"])


# ------------------------------------------------------------------------------------------------- likelihood

def test_likelihood_of_an_affine_flow():
    """x -> (x - m) / s makes a normal distribution of mean m and deviation s."""
    class Affine(eqx.Module):
        def __call__(self, x, c, total):
            return jnp.stack([x, (x - 0.7) / 0.2]), -len(x) * jnp.log(0.2)
    x = jnp.array([0.5, 0.9, 1.4])
    expected = -stats.norm(0.7, 0.2).logpdf(x).sum()
    assert iaf.flow_nll(Affine(), x, None, None) == pytest.approx(expected, rel=1e-5)


def test_likelihood_integrates_to_one():
    """Over all logits of a detector of two fibres."""
    flow, (_, c, _) = toy_flow("pair", shape=(1, 2), scale=0.05), examples(1)
    nll = jax.jit(jax.vmap(lambda x: iaf.flow_nll(flow, x, c[0], jnp.float32(3))))
    edges = np.linspace(-9, 9, 601)
    points = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    values = np.exp(-np.float64(nll(jnp.asarray(points, jnp.float32)))).reshape(601, 601)
    assert integrate.trapezoid(integrate.trapezoid(values, edges), edges) == pytest.approx(1, abs=2e-3)


def test_teacher_loss_by_hand():
    """Of the identity: normal numbers and the slope of the logit."""
    counts = poisson(16)
    nats, parts = iaf.teacher_loss(Steps((lambda x: x,)), jnp.asarray(counts), jnp.zeros((16, 14)), KEY)
    u, total = np.float64(jax.random.uniform(KEY, (16, 144))), counts.sum((1, 2))[:, None]
    p = 1e-6 + (1 - 2e-6) * (counts.reshape(16, -1) + 0.5 * u) / (total + 0.5)
    x = (np.log(p / (1 - p)) - np.log(0.5 / (total + 0.5)) - LOGIT.mean) / LOGIT.std
    slope = (1 - 2e-6) / (total + 0.5) / (p * (1 - p)) / LOGIT.std
    expected = -(stats.norm.logpdf(x) + np.log(slope)).mean()
    assert nats == pytest.approx(expected, rel=1e-4)
    assert parts["bits per fibre"] == pytest.approx((expected - np.log(0.5)) / np.log(2), rel=1e-4)


# ----------------------------------------------------------------------------------------- counts as numbers

@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 1), st.integers(1, 5000), st.floats(0.001, 0.999))
def test_logit_is_undone(noise, total, part):
    """With the slope that differences give."""
    logit = LOGIT._replace(noise=noise)
    light = np.float32(part * total)
    x, log_slope = iaf.to_logit(light, total, logit)
    np.testing.assert_allclose(iaf.from_logit(x, total, logit), light, rtol=2e-3, atol=1e-4)
    step = np.float32(1e-2 * min(light, total - light))
    rise = [float(iaf.to_logit(light + sign * step, total, logit)[0]) for sign in (-1, 1)]
    assert np.log((rise[1] - rise[0]) / (2 * np.float64(step))) == pytest.approx(float(log_slope), abs=0.02)


def test_a_photon_lies_at_the_same_place_for_every_sum():
    x = iaf.to_logit(jnp.array([0.5, 1.0]), jnp.array([[10.0], [3000.0]]), LOGIT)[0]
    assert jnp.abs(LOGIT.std * x[:, 0] + LOGIT.mean).max() < 0.06 and jnp.abs(jnp.diff(x[:, 1])).max() < 0.08


def test_fitted_logits_fill_three_quarters_of_the_box():
    responses = poisson(300)
    logit = iaf.fit_logit(0.5, responses)
    light = responses + 0.5 * np.random.default_rng(0).random(responses.shape, np.float32)
    total = responses.sum((1, 2), keepdims=True)
    x = iaf.to_logit(light, total, logit)[0]
    assert float(x.max()) == pytest.approx(4.5, abs=1e-3) and float(x.min()) == pytest.approx(-4.5, abs=1e-3)


# ----------------------------------------------------------------------------------------------- distillation

@pytest.mark.parametrize("error, between", [(0.0, 0.0), (0.0, 0.3), (0.2, 0.0)])
def test_both_loops_by_hand(error, between):
    """The teacher adds 1 and doubles; the student undoes that but for an error at its end or between."""
    teacher = Steps((lambda x: x + 1, lambda x: 2 * x))
    student = Steps((lambda z: z / 2 + between, lambda y: y - between - 1 + error))
    x, z = jnp.array([0.3, -1.0]), jnp.array([2.0, 0.1])
    parts, states = iaf.two_loops(student, teacher, x, z, None, None)
    assert parts["data loop"] == pytest.approx(error**2, abs=1e-6)
    assert parts["latent loop"] == pytest.approx((2 * error)**2, abs=1e-6)
    assert parts["blocks"] == pytest.approx(between**2 + (between - error)**2, abs=1e-6)
    np.testing.assert_allclose(states[-1], x + error, atol=1e-6)


def test_only_the_student_learns_from_the_data_loop():
    """x -> z of the teacher is the student's input: it has no gradient."""
    class Scale(eqx.Module):
        a: jax.Array

        def __call__(self, x, c, total):
            return jnp.stack([x, self.a * x]), 0.0
    loss = lambda a, part: iaf.two_loops(Scale(0.4), Scale(a), jnp.ones(2), jnp.ones(2), None, None)[0][part]
    assert jax.grad(loss)(2.0, "data loop") == 0 and jax.grad(loss)(2.0, "latent loop") != 0


def test_channel_and_light_losses_by_hand():
    """Squared differences of the channels' shares, mean over blocks and channels, and of 2 sqrt(n + nu)."""
    made, truth = np.float32(poisson(3, seed=1)), np.float32(poisson(1, seed=2))
    shares = [metrics.channels(counts) / counts.sum((1, 2))[:, None] for counts in (made, truth)]
    found = iaf.channel_loss(made.reshape(3, -1), truth.ravel(), DETECTORS["zn"])
    assert found == pytest.approx(np.mean((shares[0] - shares[1])**2), rel=1e-4)
    found = iaf.light_loss(made[0].ravel(), truth.ravel(), 0.5)
    roots = [2 * np.sqrt(counts[0] + 0.5) for counts in (made, truth)]
    assert found == pytest.approx(np.mean((roots[0] - roots[1])**2), rel=1e-4)


def test_student_loss_is_the_weighted_sum_of_its_parts():
    counts, c, weights = poisson(4), np.zeros((4, 14)), np.array([0.0, 1.0, 2.0, 5.0])
    teacher, right, wrong = (Steps((lambda x, a=a: a * x + (1 - a),)) for a in (2.0, 0.5, 0.25))
    run = partial(iaf.student_loss, wrong, counts, c, teacher=teacher, key=KEY, channel_weight=10.0)
    loss = jax.jit(lambda weights, light: run(weights, light_weight=light))
    total, parts = iaf.student_loss(right, counts, c, weights, teacher, KEY, 10.0, 3.0)
    assert total < 1e-6 and max(parts.values()) < 1e-7                         # it is the teacher undone
    even, parts = loss(np.ones(4), 3.0)
    assert min(parts[name] for name in ("data loop", "latent loop", "channels", "light")) > 1e-5
    expected = parts["data loop"] + parts["latent loop"] + 10 * parts["channels"] + 3 * parts["light"]
    assert even == pytest.approx(float(expected), rel=1e-4)
    channels = lambda weights: float(loss(weights, 0.0)[0] - loss(0 * weights, 0.0)[0])
    expected = sum(w * channels(np.float64(weights == w)) for w in weights)
    assert channels(weights) == pytest.approx(expected, rel=1e-2)


def test_diversity_weights():
    """f_div by two loops over fibres and rows; a particle of one row gets the least weight; others keep 1."""
    rng, ids = np.random.default_rng(0), np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    responses = rng.poisson(np.array([1, 5, 20, 3])[ids][:, None, None], (10, 4, 4)).astype(np.uint16)
    particles = np.arange(9, dtype=np.float32) + 100 * ids[:, None].astype(np.float32)
    spread = [sum(math.sqrt(np.mean([(float(r[i, j]) - np.mean(responses[ids == k][:, i, j], dtype=float))**2
                                     for r in responses[ids == k]])) for i in range(4) for j in range(4))
              for k in range(3)]
    inverse = 1 / np.array(spread)
    scaled = np.append((inverse - inverse.min()) / np.ptp(inverse), 0) * np.array([4, 2, 3, 1])
    expected = (scaled[ids] / scaled[ids].mean() + 0.1) / 1.1
    order = rng.permutation(12)                                                # ten of twelve are trained on
    everything = lambda a: np.concatenate([a, a[:2]])[np.argsort(order)]
    found = papers.diversity_weights(everything(responses), everything(particles), order[:10])
    np.testing.assert_allclose(found[order], [*expected, 1, 1], rtol=1e-4)
    alone = papers.diversity_weights(responses, particles, np.array([0, 4, 6]))
    np.testing.assert_allclose(alone, 1)                                       # no particle has two rows


# ---------------------------------------------------------------------------------------------------- sampler

def test_the_student_draws_in_chunks():
    """70 responses, of 64 and 6, are those of one pass."""
    flow, keys = toy_flow("one", "student"), jax.random.split(KEY)
    c, total = 0.3 * jax.random.normal(keys[0], (70, 14)), jnp.linspace(10, 900, 70)
    found = jax.jit(lambda *rows: iaf.draw_light(iaf.Generator(None, flow), *rows))(c, total, keys[1])
    z = jax.random.normal(keys[1], (70, 24))
    x = one_pass(flow)(z, c, total)
    np.testing.assert_allclose(found, iaf.from_logit(x, total[:, None], LOGIT), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how, expected", [
    ("floor", [0, 1, 2, 1]), ("round", [0, 1, 2, 2]), ("floor-renormalise", [0, 2, 4, 2]),
    ("round-renormalise", [0, 2, 3, 2]), ("scale-floor", [0, 2, 3, 2]), ("scale-round", [0, 2, 3, 2])])
def test_noise_removal(how, expected):
    """0.4, 1.3, 2.1 and 1.8 with noise below 0.5 and a photon sum of 7."""
    found = iaf.remove_noise(jnp.array([[0.4, 1.3, 2.1, 1.8]]), jnp.array([7.0]), how, 0.5)
    np.testing.assert_array_equal(found, [expected])


@pytest.mark.parametrize("noise", [0.01, 0.5, 0.75, 1.0])
def test_counts_come_back(noise):
    """Counts to logits and back; subtracting the mean of a range of 1 may end at either side."""
    rng, logit = np.random.default_rng(0), LOGIT._replace(noise=noise)
    counts = rng.poisson(rng.gamma(0.05, 8.0, (4, 400)) + 0.01).astype(np.float32)
    noisy, total = counts + np.float32(noise * rng.uniform(0.01, 0.99, counts.shape)), counts.sum(1)
    light = iaf.from_logit(iaf.to_logit(noisy, total[:, None], logit)[0], total[:, None], logit)
    exact = {1.0: ("floor",), 0.75: iaf.REMOVALS[:3]}.get(noise, set(iaf.REMOVALS) - {"round-renormalise"})
    for how in exact:
        np.testing.assert_array_equal(iaf.remove_noise(light, total, how, noise), counts)


@pytest.mark.parametrize("how, offset", [("scale-floor", 0.0), ("scale-round", 0.4)])
def test_scaling_to_the_photon_sum(how, offset):
    """The most photons that any scale leaves at or below the sum, found here by trying 20 000."""
    rng = np.random.default_rng(4)
    light = np.where(rng.random((6, 40)) < 0.3, rng.gamma(0.7, 12.0, (6, 40)), 0.2 * rng.random((6, 40)))
    total = np.round(light.sum(1) * rng.uniform(0.7, 1.4, 6))
    found = np.asarray(iaf.remove_noise(jnp.asarray(light, jnp.float32), jnp.asarray(total), how, 0.2))
    tried = np.floor(np.linspace(0.5, 2, 20_000)[:, None, None] * light + offset).sum(2)
    np.testing.assert_allclose(found.sum(1), np.where(tried <= total, tried, 0).max(0), atol=1)
    assert (found.sum(1) <= total).all() and (found.sum(1) > 0.9 * total).all()


# ---------------------------------------------------------------------------------------------------- network

def test_orders():
    fibres = np.arange(48).reshape(24, 2)
    for order in (1, -1, 3):
        found = iaf.arrange(fibres, order)
        assert sorted(found[:, 1]) == list(range(1, 49, 2)) and (found == fibres).all() == (order == 1)
        np.testing.assert_array_equal(iaf.arrange(found, order, back=True), fibres)
    assert toy_flow(kind="student").orders == (-1, 1) and toy_flow().orders == (1, -1)


@pytest.mark.parametrize("name, conditions", [("local", 14), ("paper", 9)])
def test_blocks_are_autoregressive(name, conditions):
    """d numbers_i / d x_j is 0 for j >= i, by automatic differentiation; the particle reaches every fibre."""
    flow, (x, c, total) = toy_flow(name, conditions=conditions, scale=0.3), examples(conditions=conditions)
    e, near = flow.given(c[0], total[1])
    for order, block in zip(flow.orders, flow.blocks):
        numbers = lambda x, e: block.numbers(x, iaf.arrange(near, order), e, total[1])
        to_x, to_e = (np.abs(part).max(1) for part in jax.jit(jax.jacfwd(numbers, (0, 1)))(x[0], e))
        assert np.triu(to_x).max() < 1e-9 and (to_x[np.tril_indices(24, -1)] > 0).mean() > 0.7
        assert (to_e.max(1) > 0).all()


@pytest.mark.parametrize("name", ["local", "paper"])
def test_determinant_of_the_flow(name):
    flow, rows = toy_flow(name, scale=0.03), examples()
    jacobians = np.float64(jax.jit(jax.vmap(jax.jacfwd(lambda *row: flow(*row)[0][-1])))(*rows))
    np.testing.assert_allclose(jax.jit(jax.vmap(flow))(*rows)[1], np.linalg.slogdet(jacobians)[1], atol=1e-3)


@pytest.mark.parametrize("name, kind", [("local", "teacher"), ("paper", "student")])
def test_naive_and_incremental_are_the_way_back(name, kind):
    """Equal numbers for equal noise, and called again they give the noise."""
    flow, (z, c, total) = toy_flow(name, kind), examples()
    naive, incremental = (jax.jit(jax.vmap(partial(flow.invert, how=how)))(z, c, total)
                          for how in ("naive", "incremental"))
    np.testing.assert_allclose(naive, incremental, atol=2e-3)
    np.testing.assert_allclose(one_pass(flow)(incremental, c, total), z, atol=5e-3)


def test_naive_passes_make_a_fibre_each():
    flow, (z, c, total) = toy_flow(scale=0.7), examples()
    block, (e, near) = flow.blocks[0], flow.given(c[0], total[0])
    whole, two = (jax.jit(lambda z: block.naive(z, near, e, total[0], fibres=n))(z[0]) for n in (None, 2))
    np.testing.assert_allclose(two[:2], whole[:2], atol=1e-5)
    assert abs(two - whole)[2:].max() > 1e-3


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iaf") / "run"
    return folder, iaf.main([*FLAGS, "--run", str(folder)])


def leaves(path):
    return path.read_bytes().partition(b"\n")[2]


def test_a_run(trained, capsys):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert {path.name for path in folder.iterdir()} == {
        "sum", "teacher", "student", "model.eqx", "metrics.json"}
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["removal"] in iaf.REMOVALS
    assert all(set(result["removals"][kind]) == set(iaf.REMOVALS) for kind in ("teacher", "student"))
    assert np.isfinite(result["seen"]["W"]) and result["parameters"] > 1000
    for stage, part in ("sum", "nats"), ("teacher", "bits per fibre"), ("student", "latent loop"):
        assert all(np.isfinite(record[part]) for record in files.read_log(folder / stage))
        assert (folder / stage / "training.png").exists()


def test_checkpoints_hold_their_logit_and_removal(trained):
    folder, result = trained
    logit = iaf.fit_logit(0.5, data.open_data("zn", 700, quiet=True).responses[data.split_rows(700, 0).train])
    for path, kind in (folder / "model.eqx", "student"), (folder / "teacher" / "model.eqx", "teacher"):
        header, scores = common.read_header(path), result["removals"][kind]
        assert header["logit"] == files.plain(logit._asdict()) and header["flags"]["sampler"] == kind
        assert header["removal"] == min(scores, key=scores.get)
    for stage in iaf.STAGES:
        assert common.read_header(folder / stage / "state.eqx")["logit"] == header["logit"]


def test_masked_weights_stay_zero(trained):
    """Those of the checkpoint are those of the flow with masks, and about half are zero."""
    make = partial(iaf.make_generator, "local", "student", DETECTORS["zn"], LOGIT, 14)
    for block in common.load_model(trained[0] / "model.eqx", make).flow.blocks:
        for saved, masked in zip((block.first, block.second, block.last), block.masked()):
            np.testing.assert_array_equal(saved, masked)
            assert 0.3 < (saved == 0).mean() < 0.7


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    flags = ["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)]
    again = iaf.main(flags)
    names = "flags", "removal", "removals", "seen", "unseen", "parameters", "train_seconds"
    assert [again[name] for name in names] == [result[name] for name in names]


def test_another_removal(trained, monkeypatch):
    """--removal of the command goes before that of the checkpoint."""
    monkeypatch.setattr(metrics, "report", lambda args, draw, *rest, **result: (draw.keywords, result))
    monkeypatch.setattr(eqx, "filter_jit", lambda function: function)
    other = next(how for how in iaf.REMOVALS if how != trained[1]["removal"])
    keywords, result = iaf.main(["--load", str(trained[0] / "model.eqx"), "--removal", other, "--quiet"])
    assert keywords["removal"] == result["removal"] == other


def test_the_teacher_generates(trained, tmp_path):
    """From its own file."""
    dataset, out = data.open_data("zn", 700, quiet=True), tmp_path / "out.h5"
    tiny.save(tmp_path / "list.h5", dataset)
    iaf.main(["--load", str(trained[0] / "teacher" / "model.eqx"), "--generate", str(tmp_path / "list.h5"),
              "--out", str(out), "--all-hit", "--quiet"])
    made = data.load(out, "zn")
    assert made.responses.any() and np.array_equal(made.particles, dataset.particles)


def test_one_stage_after_the_other_each_cut_off(trained, tmp_path, monkeypatch):
    """A kill in each stage, and other flags of later ones: the same states as all stages in one run."""
    monkeypatch.setattr(common, "time", tiny.clock())
    monkeypatch.setattr(common, "LOGGED", 4)
    monkeypatch.setattr(iaf, "finish", lambda args, scaler, part, found, run, net: (net, None))
    monkeypatch.setattr(metrics, "report", lambda *args, **result: result)
    log = files.log_line

    def cut(path, record):
        log(path, record)
        if record["step"] == 12:                                               # the state of step 8 is saved
            raise KeyboardInterrupt

    later = {"sum": ["--net", "paper", "--noise", "1", "--epochs", "7"], "teacher": ["--channel-loss", "3"],
             "student": ["--sampler", "teacher"]}
    for stage in iaf.STAGES:
        flags = [*FLAGS, *later[stage], "--run", str(tmp_path), "--stage", stage]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "log_line", cut)
            iaf.main(flags)
        iaf.main([*flags, "--resume"])
    for stage in iaf.STAGES:
        assert leaves(tmp_path / stage / "state.eqx") == leaves(trained[0] / stage / "state.eqx"), stage


def test_stages_need_those_before(trained, tmp_path):
    shutil.copytree(trained[0] / "sum", tmp_path / "sum")
    with pytest.raises(UserError, match="teacher: train that stage first"):
        iaf.main([*FLAGS, "--stage", "student", "--run", str(tmp_path)])
    with pytest.raises(UserError, match="teacher/state.eqx: --resume needs the flags .* different: noise"):
        iaf.main([*FLAGS, "--noise", "1", "--stage", "student", "--run", str(trained[0])])


def test_the_papers_flow(tmp_path, monkeypatch):
    """What the run above leaves out, on two devices."""
    monkeypatch.setattr(iaf, "finish", lambda args, scaler, part, found, run, net: (net, args.removal))
    monkeypatch.setattr(metrics, "report", lambda *args, **result: result)
    flags = ["--net", "paper", "--precision", "bf16", "--detector", "zp", "--cond", "raw", "--noise", "1",
             "--removal", "floor", "--stage", "teacher", "--devices", "2", "--run", str(tmp_path)]
    with pytest.raises(UserError, match="sum: train that stage first"):
        iaf.main([*FLAGS, *flags])
    iaf.main([*FLAGS, *flags, "--stage", "sum"])
    result = iaf.main([*FLAGS, *flags])
    assert result["removal"] == "floor" and result["mflop"] > 0
    assert all(np.isfinite(record["bits per fibre"]) for record in files.read_log(tmp_path / "teacher"))
