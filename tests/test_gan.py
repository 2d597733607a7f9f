"""gan.py: each term against hand-made numbers or brute force, who learns from what, one run."""
import json
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
import data
import files
import gan
import metrics
import tiny

KEY = jax.random.key(0)
FLAGS = ["--n", "700", "--epochs", "1", "--batch-size", "64", "--quiet"]
SHAPES = {name: detector.shape for name, detector in data.DETECTORS.items()}
NOTHING = gan.Weights(0, 0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def shrunk(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        tiny.shrink_detectors(patch, tmp_path_factory.mktemp("data"))
        patch.setattr(gan, "WIDTH", 8)
        patch.setattr(gan, "BLOCKS", 0)                # compiling attention and its gradients takes long
        patch.setattr(gan, "make_adversaries", eqx.filter_jit(gan.make_adversaries))
        yield


class Net:
    """Makes c_0 + noise_0 for all fibres; the counts drawn are its square."""
    factor = jnp.array(2.0)

    class generator:
        def __new__(cls, c, noise):
            return jnp.full((2, 2), c[0] + noise[0])

        class fibres:
            loss = staticmethod(lambda made, counts: (made + counts).mean())
            draw = staticmethod(lambda made, key: jnp.round(made**2 / 4))


def adversaries(how="sample", detector="zn", conditions=14):
    return gan.make_adversaries(how, data.DETECTORS[detector], conditions, KEY)


@pytest.fixture(scope="module")
def net():
    """Adversaries of random weights."""
    return adversaries()


@pytest.fixture(scope="module")
def batch():
    """Counts (6, 12, 12) and conditions with f_div (6, 15)."""
    rng = np.random.default_rng(0)
    c = np.column_stack([rng.normal(size=(6, 14)), rng.uniform(size=6)])
    return rng.poisson(0.5, (6, 12, 12)).astype(np.uint16), jnp.asarray(c, jnp.float32)


# -------------------------------------------------------------------------------------------------- objective

def test_adversarial_losses_are_logarithms_of_probabilities():
    """Eq. 3 with sigmoid(D), non-saturating, and the same of the difference of a pair."""
    real, fake = np.array([0.3, -2.0, 40.0]), np.array([1.5, -0.7, -40.0])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    critic, generator = gan.adversarial_loss(real, fake)
    np.testing.assert_allclose(critic, -np.log(sigmoid(real)) - np.log(sigmoid(-fake)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(generator, -np.log(sigmoid(fake)), rtol=1e-5)
    critic, generator = gan.relativistic_loss(real, fake)
    np.testing.assert_allclose(critic, -np.log(sigmoid(real - fake)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(generator, -np.log(sigmoid(fake - real)), rtol=1e-5)


def test_penalty_is_the_squared_gradient():
    """Of D = sum a x^2: sum (2 a x)^2."""
    a, x = np.random.default_rng(0).normal(size=(2, 4, 5))
    critic = lambda x, c: (jnp.sum(a * x**2), None)
    found = gan.gradient_penalty(critic, jnp.float32(x), None)
    assert found == pytest.approx(np.sum((2 * a * x)**2), rel=1e-5)


class Maker(NamedTuple):
    """A generator that adds the mean of its noise to c, a picture."""
    fibres: object = None

    def __call__(self, c, noise):
        return c + noise.mean()


def test_anchor_is_the_likelihood_of_the_counts():
    """That of checkerboard.py, or squares."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(2, (2, 4, 5)).astype(np.float32)
    made = rng.normal(2, 1, (2, 4, 5)).astype(np.float32)
    zeros = jnp.zeros((2, gan.NOISE))
    found = gan.anchor_losses(Maker(Net.generator.fibres), counts, made, zeros, "sample")
    np.testing.assert_allclose(found, (made + counts).mean((1, 2)), rtol=1e-5)
    expected = np.mean((made - np.log1p(counts))**2, axis=(1, 2))
    np.testing.assert_allclose(gan.anchor_losses(Maker(), counts, made, zeros, "round"), expected, rtol=1e-4)


def test_best_noise_makes_what_is_most_alike():
    """By brute force, each response with its own."""
    rng = np.random.default_rng(2)
    counts, tries = rng.poisson(2, (6, 4, 5)).astype(np.float32), rng.normal(0, 3, (4, 6, gan.NOISE))
    c = np.log1p(counts) - rng.normal(size=(6, 1, 1))
    found = gan.best_noise(Maker(), counts, c, jnp.float32(tries), "round")
    error = np.mean((c + tries.mean(2)[:, :, None, None] - np.log1p(counts))**2, axis=(2, 3))      # (4, 6)
    np.testing.assert_array_equal(found, np.float32(tries)[error.argmin(0), np.arange(6)])
    assert len(set(error.argmin(0))) > 1


def test_diversity_by_hand():
    """f_div |z_1 - z_2| / |e_1 - e_2|, mean absolute differences: 0.5 * 2 / 4."""
    embedding, other = jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0])
    found = gan.diversity_loss(embedding, other, jnp.array([0.0, 1.0]), jnp.array([3.0, 0.0]), 0.5)
    assert found == pytest.approx(0.5 * 2 / 4, rel=1e-3)
    alike = gan.diversity_loss(jnp.ones(2), jnp.ones(2), jnp.zeros(2), jnp.ones(2), 1.0)
    assert np.isfinite(alike) and alike > 100


@pytest.fixture(scope="module")
def made(net, batch):
    """What batch_loss makes of the batch with KEY, for both noises: functions of a generator that return
    pictures (6, 12, 12) and the noise (6, NOISE)."""
    keys, c = jax.random.split(KEY, 5), batch[1][:, :-1]

    @eqx.filter_jit
    def make(generator, noise_key, count_key):
        noise = jax.random.normal(noise_key, (6, gan.NOISE))
        features = jax.vmap(generator)(c, noise)
        draw = partial(gan.draw_picture, jax.lax.stop_gradient(generator.fibres))
        return jax.vmap(draw)(features, jax.random.split(count_key, 6)), noise
    return [partial(make, noise_key=keys[i], count_key=keys[i + 1]) for i in (0, 2)]


WEIGHTS = gan.Weights(penalty=1.0, anchor=2.0, l2=0.3, sdi=0.1)


@pytest.fixture(scope="module")
def found(net, batch):
    """Loss, parts and gradient of batch_loss with all terms."""
    loss = lambda net: gan.batch_loss(net, *batch, KEY, "sample", "relativistic", WEIGHTS)
    return jax.device_get(eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(net))


def test_loss_is_the_weighted_sum_of_its_parts(found):
    (loss, parts), _ = found
    terms = [weight * parts[name] for name, weight in WEIGHTS._asdict().items()]
    assert loss == pytest.approx(parts["critic"] + parts["generator"] + sum(terms), rel=1e-5)
    assert min(terms) > 0


def test_terms_of_weight_0_are_left_out(net, batch):
    nothing = gan.Weights(0, 0, 0, 0)
    parts = eqx.filter_eval_shape(gan.batch_loss, net, *batch, KEY, "sample", "plain", nothing)[1]
    assert parts.keys() == {"critic", "generator", "critic AUC", "spread of sums"}


def test_adversaries_learn_from_their_own_terms(net, batch, made, found):
    """Each gradient is that of the own terms, written out here, with the other's weights and pictures fixed;
    the penalty is that of the first row. The anchor takes the best of the tried noises."""
    counts, c, spread = jnp.float32(batch[0]), batch[1][:, :-1], batch[1][:, -1]
    x, real = jnp.sqrt(counts), jax.vmap(net.critic)(jnp.sqrt(jnp.float32(batch[0])), batch[1][:, :-1])[0]
    log_sigmoid = lambda x: -jnp.log1p(jnp.exp(-x))

    def generator_loss(generator):
        (fake, z), (other, other_z) = (make(generator) for make in made)
        tries = jax.random.normal(jax.random.split(KEY, 5)[4], (gan.TRIES, 6, gan.NOISE))
        likelihood = lambda z: jax.vmap(generator.fibres.loss)(jax.vmap(generator)(c, z), counts)
        nats = jax.vmap(likelihood)(tries)
        (values, codes), (_, other_codes) = (jax.vmap(net.critic)(x, c) for x in (fake, other))
        distances = jnp.abs(codes - other_codes).mean(1) + 1e-3
        terms = {"generator": -log_sigmoid(values - real).mean(),
                 "anchor": nats.min(0).mean(),
                 "l2": jnp.mean((fake - x)**2),
                 "sdi": jnp.mean(spread * jnp.abs(z - other_z).mean(1) / distances)}
        return sum(getattr(WEIGHTS, name, 1.0) * term for name, term in terms.items()), terms

    def critic_loss(critic):
        fake = made[0](net.generator)[0]
        real, values = (jax.vmap(critic)(x, c)[0] for x in (x, fake))
        slopes = [jax.grad(lambda x: critic(x, c[0])[0])(x[0]) for x in (x, fake)]
        penalty = sum(jnp.sum(slope**2) for slope in slopes) / 2
        parts = {"critic": -log_sigmoid(real - values).mean(), "penalty": penalty,
                 "critic AUC": jnp.mean(real[:, None] > values),
                 "spread of sums": fake.sum((1, 2)).std() / x.sum((1, 2)).std()}
        return parts["critic"] + WEIGHTS.penalty * penalty, parts

    both = lambda net: (eqx.filter_grad(generator_loss, has_aux=True)(net.generator),
                        eqx.filter_grad(critic_loss, has_aux=True)(net.critic))
    (generator, parts), (critic, more) = jax.device_get(eqx.filter_jit(both)(net))
    (_, values), gradient = found
    for name, value in (parts | more).items():
        assert values[name] == pytest.approx(value, rel=1e-4), name
    for own, expected in ((gradient.generator, generator), (gradient.critic, critic)):
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-7)
        assert any(np.any(leaf) for leaf in jax.tree.leaves(own))


# -------------------------------------------------------------------------------- pictures that a critic sees

@pytest.mark.parametrize("more", [0.0, 1.5])
def test_drawn_roots_are_those_of_counts_with_a_smooth_gradient(more):
    """The gradient by differences of a softened root of a count."""
    location, odds = jnp.linspace(-3, 20, 1936).reshape(44, 44), [jnp.full((44, 44), more)]
    scale, one = jnp.full((44, 44), np.exp(-0.5)), jnp.float32(1)
    roots = gan.draw_softly(location, scale, KEY, odds)
    np.testing.assert_allclose(roots**2, data.draw_counts(location, scale, KEY, odds), rtol=1e-5, atol=1e-3)
    u = np.float64(jax.random.uniform(KEY, (44, 44), minval=1e-6, maxval=1 - 1e-6))

    def soft(shift, factor):               # a slope of 1/2 above the first photon, and a step up to 1 there
        wide = factor * np.exp(-0.5)
        over = (np.float64(location) + shift - np.sqrt(2) + wide * (np.log(1 / u - 1) - more)) / gan.SOFTNESS
        return gan.SOFTNESS * np.log1p(np.exp(over)) / 2 + (1 - np.sqrt(0.5)) / (1 + np.exp(-over))
    drawn = lambda shift, factor: gan.draw_softly(location + shift, factor * scale, KEY, odds)
    _, by_location = jax.jvp(lambda shift: drawn(shift, one), (0 * one,), (one,))
    _, by_scale = jax.jvp(lambda factor: drawn(0 * one, factor), (one,), (one,))
    np.testing.assert_allclose(by_location, (soft(1e-4, 1) - soft(-1e-4, 1)) / 2e-4, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(by_scale, (soft(0, 1 + 1e-4) - soft(0, 1 - 1e-4)) / 2e-4, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(by_location[roots > 4], 0.5, atol=1e-2)
    assert by_location.min() > -1e-6 and by_location[0].max() < 0.4        # a dark fibre stays out of it


def test_pictures_of_log_responses_are_the_map_itself():
    made = jnp.linspace(-1, 5, 6).reshape(2, 3)
    np.testing.assert_array_equal(gan.draw_picture(None, made, KEY), made)
    np.testing.assert_allclose(gan.picture(np.array([0.0, 3.0]), "round"), [0, np.log(4)], rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- sampler

def test_samples_have_fresh_noise_each_and_the_factor():
    made = gan.sample(Net, jnp.full((4000, 14), 20.0), KEY, "sample")
    assert made.shape == (4000, 2, 2) and made.dtype == jnp.uint16 and not np.any(made % 2)
    roots = 2 * np.sqrt(made / 2)
    assert roots.mean() == pytest.approx(20, abs=0.1)
    assert roots.mean((1, 2)).std() == pytest.approx(1, abs=0.05)


def test_log_responses_are_scaled_and_rounded():
    class Rounded(Net):
        generator = staticmethod(lambda c, noise: jnp.log1p(c[:2])[:, None])
    made = gan.sample(Rounded, jnp.array([[1.3, 7.0], [-0.5, 1e6]]), KEY, "round")
    assert made[..., 0].tolist() == [[3, 14], [0, 65535]]


def test_factor_is_that_of_a_grid_search(net, dataset, monkeypatch):
    """A generator whose responses are the data's, a fifth too bright."""
    rows, bright = np.arange(300), np.round(1.2 * dataset.responses)
    monkeypatch.setattr(metrics, "generator", lambda *_: lambda particles, number: bright[rows])
    truth = metrics.channels(dataset.responses[rows])
    score = lambda factor: metrics.wasserstein(truth, metrics.channels(np.round(factor * bright[rows])))
    fitted = gan.fit_factor(gan.GAN(net.generator, jnp.array(1.0)), "sample", dataset, rows, None, 0)
    assert float(fitted.factor) == pytest.approx(min(np.linspace(0.75, 1.25, 51), key=score))
    assert 0.8 < fitted.factor < 0.9


# --------------------------------------------------------------------------------------------------- training

@pytest.fixture(scope="module")
def dataset():
    return data.open_data("zn", 700, quiet=True)


@pytest.fixture(scope="module")
def arrays(dataset):
    """Responses (700, 12, 12) and conditions with f_div (700, 15)."""
    scaler = data.fit_conditions(dataset.particles, "physics")
    spread = gan.spreads(dataset.responses, dataset.particles, np.arange(489))
    return dataset.responses, np.column_stack([data.conditions(dataset.particles, scaler), spread])


def plan(*flags):
    return common.plan(gan.parse([*FLAGS, *map(str, flags)]))


def test_each_adversary_has_its_own_rate():
    """The first step of AdamW is the learning rate, for any gradient."""
    net = gan.Adversaries(*(jnp.zeros(1) for _ in range(2)))
    optimiser = gan.make_optimiser(plan("--lr", 0.1), 10)
    updates, _ = optimiser.update(jax.tree.map(jnp.ones_like, net), optimiser.init(net), net)
    np.testing.assert_allclose(np.concatenate(jax.tree.leaves(updates)), [-0.01, -0.02], rtol=1e-4)


def test_spreads_by_brute_force():
    """f_div of [Comparison, Eq. 4]: for each particle, root mean square deviations summed over fibres."""
    rng = np.random.default_rng(0)
    particles, ids = rng.normal(size=(3, 9)).astype(np.float32), np.array([0, 1, 0, 2, 1, 0, 2, 2])
    responses, rows = rng.poisson(3, (8, 4, 5)).astype(np.uint16), np.array([6, 0, 1, 2, 3, 4, 5])
    expected = np.zeros(3)
    for k in range(3):
        own = [responses[t].astype(float) for t in rows if ids[t] == k]
        for i in range(4):
            for j in range(5):
                mean = sum(response[i, j] for response in own) / len(own)
                expected[k] += (sum((response[i, j] - mean)**2 for response in own) / len(own))**0.5
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    found = gan.spreads(responses, particles[ids], rows)
    np.testing.assert_allclose(found[:7], expected[ids[:7]], atol=1e-5)
    assert found[7] == 0                                                       # not among the rows
    assert gan.spreads(responses[:1], particles[:1], np.array([0])).tolist() == [0.0]


def test_warm_start_fits_the_generator(net, dataset, arrays):
    """Light where the data have it before the critic says anything."""
    rows, c = np.arange(489), jnp.asarray(arrays[1][:64, :-1])
    warm = gan.warm_start(net.generator, arrays, rows, plan("--batch-size", 32), "sample", 60)

    @eqx.filter_jit
    def error(generator):
        made = gan.sample(gan.GAN(generator, jnp.array(1.0)), c, KEY, "sample")
        return jnp.abs((made > 0).mean() - (dataset.responses[:64] > 0).mean())
    assert error(warm) < 0.5 * error(net.generator)


def test_no_warm_start_changes_nothing(net, arrays):
    warm = gan.warm_start(net.generator, arrays, np.arange(489), plan(), "sample", 0)
    assert eqx.tree_equal(warm, net.generator)


def test_collapse_is_reported(capsys):
    for auc, spread, collapsed in ((0.8, 1.0, False), (0.999, 1.0, True), (0.7, 0.1, True), (0.7, 3.0, True)):
        gan.report_collapse([{"critic AUC": auc, "spread of sums": spread}] * 3)
        assert ("COLLAPSED" in capsys.readouterr().out) == collapsed


# ---------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("detector", data.DETECTORS)
@pytest.mark.parametrize("how, conditions, precision", [("sample", 14, "f32"), ("round", 9, "bf16")])
def test_shapes(how, conditions, precision, detector, monkeypatch):
    monkeypatch.setattr(gan, "BLOCKS", 1)
    shape = SHAPES[detector]
    real = data.DETECTORS[detector]._replace(shape=shape)
    net = eqx.filter_eval_shape(gan.make_adversaries, how, real, conditions, KEY)
    counts, c = np.zeros((4, *shape), np.uint16), np.zeros((4, conditions + 1), np.float32)
    lowered = common.lower(net, precision), counts, c, KEY
    loss, parts = eqx.filter_eval_shape(gan.batch_loss, *lowered, how, "plain", WEIGHTS)
    assert loss.shape == () and loss.dtype == jnp.float32 and {*WEIGHTS._fields} < parts.keys()
    kept = eqx.filter_eval_shape(gan.make_gan, how, real, conditions, KEY)
    responses = eqx.filter_eval_shape(gan.sample, kept, c[:, :-1], KEY, how)
    assert responses.shape == (4, *shape) and responses.dtype == jnp.uint16


# ------------------------------------------------------------------------------------------------------- runs

RUN = "--epochs", "3", "--post", "--sdi", "0.1", "--penalty", "0", "--warm", "0"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "run"
    return folder, gan.main([*FLAGS, *RUN, "--run", str(folder)])


def test_a_run(trained):
    folder, result = trained
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 489, "seen": 140, "unseen": 140} and result["evaluations"] == 1
    assert 0.75 <= result["factor"] <= 1.25 and np.isfinite(result["seen"]["W"]["value"])
    assert {"critic AUC", "spread of sums", "anchor", "sdi"} <= files.read_log(folder)[-1].keys()


def test_saved_and_loaded(trained, tmp_path):
    folder, result = trained
    again = gan.main(["--load", str(folder / "model.eqx"), "--quiet", "--run", str(tmp_path)])
    assert all(again[name] == result[name] for name in ("seen", "unseen", "factor", "flags"))


def test_finetuning_starts_from_the_generator(trained, tmp_path, monkeypatch):
    """Nothing warms it up."""
    untrained = lambda net, *_: (net, {"train_seconds": 0.0, "step_seconds": None})
    monkeypatch.setattr(gan, "train", untrained)
    old, new = trained[0] / "model.eqx", tmp_path / "model.eqx"
    flags = [*FLAGS, "--validate", "--finetune", str(old), "--run", str(tmp_path)]
    gan.main(flags)
    make = partial(gan.make_gan, "sample", data.DETECTORS["zn"], 14)
    for a, b in zip(*(jax.tree.leaves(common.load_model(path, make).generator) for path in (old, new))):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)
    assert common.read_header(new)["scaler"] == common.read_header(old)["scaler"]


def test_resume_is_as_uninterrupted(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "time", tiny.clock())
    weights = gan.Weights(penalty=0.0, anchor=20.0, l2=0.0, sdi=0.1)           # as the run above
    steps, make_step = {}, gan.make_step
    once = lambda *args: steps.setdefault("step", make_step(*args))            # traced once, not three times
    monkeypatch.setattr(gan, "make_step", once)
    net = adversaries()
    loss = partial(gan.batch_loss, how="sample", loss="relativistic", weights=weights)

    def run(*flags):
        return gan.train(net, loss, arrays, np.arange(489), plan(*RUN, *flags))[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch)
