"""calodream.py: losses by hand, causality, published sizes, and one run."""
import json
import math
import shutil
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calodream
import calorimeter
import common
import files
import papers
import preprocessing
import shower_metrics
import solvers
import tiny
from benchmarks import tables
from calorimeter import CALORIMETERS, THRESHOLD

KEY, SMALL = jax.random.key(0), CALORIMETERS["small"]
FLAGS = "--n 300 --epochs 4 --energy-epochs 4 --batch-size 64 --steps 2 --quiet".split()
E, C = jnp.array([0.4]), jnp.linspace(-1, 1, 11)                               # E_inc, and all conditions


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small networks, solvers and scores for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        patch.setitem(calodream.ENERGY, "vit", dict(depth=1, hidden=16, head=(16,)))
        patch.setitem(calodream.SHAPE, "vit", dict(width=12, depth=1, heads=2, hidden=24))
        patch.setattr(calodream, "make_model", random_model)                   # whose weights compile long
        patch.setattr(calodream, "ENERGY_BATCH", 64)
        patch.setattr(calodream, "BNS_STEPS", 2)
        patch.setattr(calodream, "bespoke", partial(calodream.bespoke, number=8))
        few = dict(rows=60, width=8, depth=1, epochs=1, batch=20, trainings=1)
        patch.setattr(shower_metrics, "CLASSIFIER", shower_metrics.CLASSIFIER | few)
        patch.setattr(shower_metrics, "fpd", lambda *args, **options: (1.0, 0.1))
        yield


def random_network(make, *args, **sizes):
    """make(*args, key, **sizes) with random weights, none of them 0, made by NumPy: nothing is compiled."""
    rng, shapes = np.random.default_rng(0), eqx.filter_eval_shape(make, *args, KEY, **sizes)
    fill = lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
    return jax.tree.map(lambda leaf: fill(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)


MAKE_MODEL = calodream.make_model


def random_model(*args):
    """make_model of these arguments with random weights, and a solver."""
    model = random_network(MAKE_MODEL, *args[:-1])
    return eqx.tree_at(lambda m: m.solver, model, solvers.runge_kutta("euler", calodream.BNS_STEPS))


def make():
    return random_model("vit", "small", SMALL.shape, (2, 8, 5), False, KEY)


# -------------------------------------------------------------------------------------------------- objective

def test_flow_loss():
    x1, states = jnp.full((200, 200), 3.0), []
    for t in (0.0, 0.4, 1.0):
        calodream.flow_loss(lambda x, t: states.append(x) or x, x1, t, KEY)
        assert float(states[-1].mean()) == pytest.approx(3 * t, abs=0.02)
        assert float(states[-1].std()) == pytest.approx(1 - t, abs=0.02)
    right = lambda off: lambda x, t: (x1 - x) / (1 - t) + off
    assert calodream.flow_loss(right(0), x1, 0.3, KEY) < 1e-8
    assert calodream.flow_loss(right(2), x1, 0.3, KEY) == pytest.approx(4, rel=1e-4)


def test_energy_loss_by_hand():
    """A velocity u(t) + t + context shows that each layer has a time and a context of its own."""
    u, e = np.random.default_rng(0).normal(size=(2, 5, 10)).astype(np.float32)
    net = SimpleNamespace(context=lambda u, e: u**2 + e, velocity=lambda x, t, context: x + t + context)
    found, parts = calodream.energy_loss(net, u, e[:, :1], KEY)
    time_key, noise_key = jax.random.split(KEY)
    t, noise = jax.random.uniform(time_key, (5, 10)), jax.random.normal(noise_key, (5, 10))
    velocity = (1 - t) * noise + t * u + t + u**2 + e[:, :1]
    assert found == parts["energy"] == pytest.approx(float(np.mean((velocity - (u - noise))**2)), rel=1e-5)


def test_shape_loss_by_hand():
    """The network is evaluated at one time in each of B equal intervals."""
    x1, c, times = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32), np.arange(4.0), []
    net = lambda x, t, c, empty: jax.debug.callback(times.append, t) or 0 * x + c + empty
    space = SimpleNamespace(encode=lambda voxels, c, key: voxels, empty=lambda: 2.0)
    found, _ = calodream.shape_loss(net, x1, c, KEY, space)
    keys = jax.random.split(jax.random.split(KEY, 3)[1], 4)
    noise = np.array([jax.random.normal(key, (2, 3)) for key in keys])
    assert found == pytest.approx(np.mean((c[:, None, None] + 2 - (x1 - noise))**2), rel=1e-5)
    assert sorted(int(4 * t) for t in times) == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------- sampler

def test_ratios_are_drawn_one_after_the_other():
    """u_i = noise + context for a velocity that is the context, here u_(i-1) + E_inc; far out it is 5."""
    net = SimpleNamespace(layers=4, encode=lambda e: e, empty_cache=lambda: jnp.zeros(()),
                          next_context=lambda before, i, memory, cache: (before + memory[0], cache + 1),
                          velocity=lambda u, t, context: context)
    u = 0.0
    for noise, found in zip(jax.random.normal(KEY, (4,)), calodream.sample_energies(net, E, KEY)):
        u = float(noise + u + E[0])
        u = u if abs(u) < 4.5 else 5.0
        assert found == pytest.approx(u, abs=1e-5)
    assert u == 5


def test_solvers_of_the_flags(monkeypatch):
    model = SimpleNamespace(solver="the checkpoint's")
    choose = lambda *flags: calodream.choose_solver(calodream.parse([*FLAGS, *flags]), model)
    monkeypatch.setattr(calodream, "bespoke", lambda model, *args: args)
    assert choose() == "the checkpoint's" and choose("--steps", "5", "--seed", "7") == (5, "bns", 7)
    assert choose("--solver", "bns-global") == (2, "bns-global", 0)
    for method, evaluations in (("euler", 2), ("midpoint", 4), ("rk4", 8)):
        assert len(choose("--solver", method).times) == evaluations


# ----------------------------------------------------------------------------------------------------- energy

@pytest.fixture(scope="module")
def transfusion():
    return random_network(calodream.Transfusion, 10, **calodream.ENERGY["vit"])


def test_contexts_are_causal(transfusion):
    """Context i depends on all ratios before i, and on no other."""
    jacobians = jax.jit(jax.jacfwd(lambda *inputs: transfusion.context(*inputs), argnums=(0, 1)))
    depends, on_energy = (np.abs(derivative).sum(1) > 0 for derivative in jacobians(C[:10], E))
    assert np.array_equal(depends, np.tri(10, k=-1)) and on_energy.all()


def test_cached_contexts_are_the_same(transfusion):
    u, memory, cache = C[:10], transfusion.encode(E), transfusion.empty_cache()
    step = eqx.filter_jit(transfusion.next_context)
    for i, expected in enumerate(eqx.filter_jit(transfusion.context)(u, E)):
        context, cache = step(u[i - 1] if i else jnp.zeros(()), jnp.int32(i), memory, cache)
        np.testing.assert_allclose(context, expected, atol=1e-5)


def test_velocities_depend_on_their_own_context(transfusion):
    jacobians = jax.jit(jax.jacrev(lambda *inputs: transfusion.velocity(*inputs), argnums=(0, 1, 2)))
    for derivative in jacobians(C[:10], C[1:], jax.random.normal(KEY, (10, 64))):
        depends = np.abs(derivative).reshape(10, 10, -1).sum(2) > 0
        assert np.array_equal(depends, np.eye(10))


# ------------------------------------------------------------------------------------------------------ shape

VIT = partial(calodream.ViT, width=12, depth=1, heads=2, hidden=24)


@cache
def untrained(maps):
    return eqx.filter_jit(VIT)(SMALL.shape, (2, 8, 1), 11, KEY, maps=maps)


def random_vit():
    return random_network(VIT, SMALL.shape, (2, 8, 1), 11, maps=1)


def test_an_untrained_transformer():
    """Blocks start as the identity, the velocity as 0 or, with four maps, as that of half-lit voxels at 0."""
    x, h, e = (jax.random.normal(KEY, shape) for shape in ((25, 16), (25, 12), (12,)))
    for block, identity in ((untrained(1).blocks[0], True), (random_vit().blocks[0], False)):
        assert np.array_equal(eqx.filter_jit(block)(h, e), h) == identity
    assert not eqx.filter_jit(untrained(1))(x, 0.3, C).any()
    velocity = eqx.filter_jit(untrained(4))(x, 0.3, C, jnp.full(x.shape, -5.0))
    np.testing.assert_allclose(velocity, (-2.5 - x) / 0.7, rtol=1e-4)


def test_four_maps_predict_x1():
    x, empty = jax.random.normal(KEY, (25, 16)), jnp.full((25, 16), -5.0)
    maps = jnp.repeat(jnp.array([1.5, 0.25, 0.5, -2.0]), 16)
    net = eqx.filter_jit(eqx.tree_at(lambda net: net.leave.bias, untrained(4), maps))
    lit = 1 / (1 + np.exp(-(0.5 - 2.0 * x)))
    x1 = (1 - lit) * -5 + lit * (1.5 + 0.25 * x)
    for t in (0.0, 0.6, 0.95):
        np.testing.assert_allclose(net(x, jnp.float32(t), C, empty), (x1 - x) / (1 - t), rtol=1e-3, atol=1e-4)
    assert np.isfinite(net(x, jnp.float32(1), C, empty)).all()


def test_patches_are_told_apart_and_seen_by_all():
    found, net, x = untrained(1).positions(), random_vit(), jnp.ones((25, 16))
    assert found.shape == (25, 12) and len(np.unique(np.round(found, 4), axis=0)) == 25
    both = lambda *inputs: 2 * (net(*inputs).sum(1),)
    jacobians = jax.jit(jax.jacfwd(both, argnums=(0, 1, 2), has_aux=True))
    (by_x, by_t, by_c), out = jacobians(x, 0.3, C)
    assert len(np.unique(np.round(out, 4))) == 25                              # equal patches, other places
    assert (np.abs(by_x).sum(2) > 0).all() and by_t.all() and by_c.all()


# ---------------------------------------------------------------------------------------------- autoencoders

def test_autoencoder_loss_by_hand():
    """Binary cross entropy, and 10^-6 times the KL divergence from a standard normal distribution."""
    rng = np.random.default_rng(0)
    mean, log_std, shift = rng.normal(size=(3, 2, 2, 2)).astype(np.float32)
    net = SimpleNamespace(encode=lambda shares, c: (mean, log_std), decode=lambda r, c: r + shift)
    voxels = rng.exponential(1, (1, 2, 2, 2)).astype(np.float32)
    found, parts = calodream.autoencoder_loss(net, voxels, C[None], KEY)
    logits = mean + np.exp(log_std) * jax.random.normal(KEY, (1, 2, 2, 2))[0] + shift
    p, shares = 1 / (1 + np.exp(-logits)), voxels[0] / voxels[0].sum((1, 2), keepdims=True)
    cross_entropy = -np.mean(shares * np.log(p) + (1 - shares) * np.log(1 - p))
    kl = np.mean((mean**2 + np.exp(2 * log_std) - 1) / 2 - log_std)
    assert parts["cross entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert parts["KL"] == pytest.approx(kl, rel=1e-5)
    assert found == pytest.approx(cross_entropy + 1e-6 * kl, rel=1e-6)


def test_patches_have_latents_of_their_own():
    """A latent depends on its patch and the conditions, and what it decodes to on this latent alone."""
    net = random_network(calodream.PatchAutoencoder, SMALL.shape, (2, 8, 1), 11, width=8)
    shares = preprocessing.layer_shares(jnp.ones(SMALL.shape))
    encode, decode = eqx.filter_jit(net.encode), eqx.filter_jit(net.decode)
    mean, log_std = encode(shares, C)
    assert mean.shape == log_std.shape == (25, 6) and net.latent_shape() == ((5, 1, 30), (1, 1, 6))
    for patch in (0, 7, 24):
        change = preprocessing.from_patches(jnp.zeros((25, 16)).at[patch].set(0.1), (2, 8, 1), SMALL.shape)
        changed = (encode(shares + change, C)[0] != mean).any(1)
        assert np.array_equal(np.flatnonzero(changed), [patch])
        logits = decode(mean.at[patch].add(1.0), C)
        changed = preprocessing.to_patches(logits != decode(mean, C), (2, 8, 1)).any(1)
        assert np.array_equal(np.flatnonzero(changed), [patch])
    assert (encode(shares, C + 1)[0] != mean).any(1).all()
    assert (decode(mean, C + 1) != decode(mean, C)).all()
    assert len(np.unique(np.round(mean, 4), axis=0)) == 25                     # equal patches, other places


def test_the_published_autoencoder():
    net = random_network(papers.ShowerAutoencoder, SMALL.shape, (1, 1, 1), 11, width=4)
    mean, log_std = eqx.filter_jit(net.encode)(jnp.full(SMALL.shape, 0.1), C)
    latent, patch = net.latent_shape()
    assert (latent, patch) == ((5, 5, 10), (1, 1, 2)) and mean.shape == log_std.shape == (125, 2)
    assert eqx.filter_jit(net.decode)(mean, C).shape == SMALL.shape
    for name, shape in (("ds2", (15, 9, 18)), ("ds3", (15, 26, 36))):
        make = partial(papers.ShowerAutoencoder, CALORIMETERS[name].shape, calodream.LATENT[name], 46)
        assert eqx.filter_eval_shape(make, KEY).latent_shape()[0] == shape


# -------------------------------------------------------------------------------------------- published sizes

@pytest.mark.parametrize("name, latent, tokens, size", [
    ("ds2", False, (135, 48), 26_042_688), ("ds3", False, (1350, 30), 5_868_870),
    ("ds2", True, (405, 6), 10_711_566)])
def test_published_sizes(name, latent, tokens, size):
    """[CaloDREAM, Table 1 and 2]: 1.69 M for the energies; 26.0 M, 5.87 M and 10.7 M for the shapes."""
    shape, patch = CALORIMETERS[name].shape, (calodream.LATENT if latent else calodream.PUBLISHED)[name]
    model = eqx.filter_eval_shape(MAKE_MODEL, "paper", name, shape, patch, latent, KEY)
    count = lambda net: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(net) if hasattr(leaf, "shape"))
    assert (count(model.energy), count(model.shape), model.shape.tokens) == (1_687_809, size, tokens)


def test_default_patches_divide_the_calorimeters():
    for name, cylinder in CALORIMETERS.items():
        for patches in (calodream.PATCHES, calodream.PUBLISHED):
            assert not any(size % p for size, p in zip(cylinder.shape, patches[name]))
    for sizes in calodream.SHAPE.values():
        assert sizes["width"] % 6 == 0 and sizes["width"] % sizes["heads"] == 0


def test_a_step_of_the_published_energy_network(tmp_path):
    """With one block instead of four, which compile longer."""
    net = random_network(calodream.Transfusion, 10, **calodream.ENERGY["paper"] | {"depth": 1})
    plan = common.plan(calodream.parse([*FLAGS, "--run", str(tmp_path)]))
    before, optimiser = np.asarray(net.head.layers[0].weight), common.adamw(plan, 10)
    step = calodream.make_step(calodream.energy_loss, optimiser, plan)
    u, e = np.random.default_rng(0).normal(size=(2, 8, 10)).astype(np.float32)
    state, losses = step((u, e[:, :1], KEY, np.int32(3)), common.first_state(net, optimiser))
    assert all(np.isfinite(float(value)) for value in losses.values()) and losses["gradient norm"] > 0
    assert all((part.head.layers[0].weight != before).all() for part in (state.net, state.ema))


# ------------------------------------------------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, what main returns, the model, what it draws with, a number for each loss that was traced)."""
    folder, models, traces = tmp_path_factory.mktemp("calodream") / "run", [], []
    report, flow_loss = calodream.report, calodream.flow_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calodream, "report", lambda *args: models.append(args[1:3]) or report(*args))
        patch.setattr(calodream, "flow_loss", lambda *args: traces.append(1) or flow_loss(*args))
        result = calodream.main([*FLAGS, "--run", str(folder)])
    return folder, result, *models[0], traces


@pytest.fixture
def scored(monkeypatch):
    """The arguments of the scores, which are not computed; nor is a solver fitted."""
    calls = []
    monkeypatch.setattr(calodream, "bespoke", lambda model, *args: model.solver)
    monkeypatch.setattr(shower_metrics, "evaluate", lambda *args: calls.append(args) or {"AUC_low": 0.5})
    monkeypatch.setattr(shower_metrics, "print_table", lambda *args: None)
    monkeypatch.setattr(shower_metrics, "plot_showers", lambda *args: None)
    return calls


def load(folder):
    return "--load", str(folder / "model.eqx"), "--steps", "2", "--quiet"


def test_a_run(trained):
    folder, result, *_ = trained
    assert json.loads((folder / "metrics.json").read_text()) == files.plain(result)
    assert result["rows"] == {"train": 270, "test": 60} and result["evaluations"] == 2
    assert set(result["parameters"]) == {"energy", "shape"} and result["mflop"] > 0
    assert result["train_seconds"] == sum(result[name]["train_seconds"] for name in ("energy", "shape"))
    assert {"AUC_low", "AUC_high", "FPD", "separation"} <= result["scores"].keys()
    assert {"value", "oracle"} <= result["scores"]["AUC_low"].keys()
    names = {"model.eqx", "metrics.json", "sheet.png", "showers.png", "energy", "shape"}
    assert {path.name for path in folder.iterdir()} == names
    for stage in ("energy", "shape"):
        assert files.read_log(folder / stage)[-1]["step"] == 16 and (folder / stage / "training.png").exists()


def test_a_step_compiles_once(trained):
    assert len(trained[4]) == 2                                                # once for each network


def test_showers_follow_from_the_key(trained):
    first, again, other = (trained[3](np.zeros((64, 1), np.float32), jax.random.key(k)) for k in (0, 0, 1))
    assert first.shape == (64, *SMALL.shape) and len(np.unique(first, axis=0)) == 64
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first >= 0).all() and first[first > 0].min() >= THRESHOLD


def test_a_shower_has_the_energies_of_its_ratios(trained):
    _, _, model, draw, _ = trained
    e, keys = np.linspace(0, 1, 64, dtype=np.float32)[:, None], jax.random.split(jax.random.split(KEY)[0], 64)
    u = jax.jit(jax.vmap(partial(calodream.sample_energies, model.energy)))(e, keys)
    layers = jax.vmap(model.ratios.layers)(jnp.concatenate([e, u], axis=1))
    cut = 40 * THRESHOLD                                           # at most, from 40 voxels
    assert (np.abs(draw(e, KEY).sum((2, 3)) - layers) <= cut + 1e-3 * layers).all()
    assert (layers.max(1) > 10).all()


def test_saved_and_loaded(trained, tmp_path, scored):
    """The same showers, and what the checkpoint keeps of the training."""
    folder, result, _, draw, _ = trained
    found = calodream.main([*load(folder), "--run", str(tmp_path)])
    real, made, binning, oracle, cut, _ = scored[0]
    e = preprocessing.incident(real.energies)
    assert np.array_equal(made.voxels, common.in_blocks(draw, jax.random.key(1), e)) and binning == SMALL
    assert np.array_equal(made.energies, real.energies) and np.array_equal(oracle.energies, real.energies)
    assert not np.array_equal(oracle.voxels, real.voxels)
    kept = "flags", "rows", "parameters", "train_seconds", "energy", "shape"
    assert all(found[name] == files.plain(result[name]) for name in kept)


def test_validation_rows(trained, tmp_path, scored):
    result = calodream.main([*load(trained[0]), "--validate", "--run", str(tmp_path)])
    showers, real = calorimeter.open_showers(SMALL, 300), scored[0][0]
    assert result["rows"] == {"train": 270, "test": 30} and np.isin(real.energies, showers.energies).all()


@pytest.mark.parametrize("suffix", ["csv", "hdf5"])
def test_generated_files(suffix, trained, tmp_path, capsys):
    """A shower for each energy, of which there are more than a block; the same from the same seed."""
    energies, particles = np.geomspace(1e3, 1e6, 70), tmp_path / f"list.{suffix}"
    out, again = tmp_path / "showers.hdf5", tmp_path / "again.hdf5"
    if suffix == "csv":
        particles.write_text("incident_energies\n" + "\n".join(map(str, energies)))
    else:
        with h5py.File(particles, "w") as file:
            file["incident_energies"] = energies[:, None]
    flags = *load(trained[0]), "--generate", str(particles)
    assert calodream.main([*flags, "--out", str(out)]) == {"rows": 70, "out": str(out)}
    assert f"70 showers -> {out}" in capsys.readouterr().out
    showers = calorimeter.load_showers(out, SMALL)
    np.testing.assert_allclose(showers.energies, energies, rtol=1e-6)
    totals = showers.voxels.sum((1, 2, 3)) / energies
    assert 0.1 < np.median(totals) < 2 and totals.max() < 1.01 * preprocessing.FACTOR
    calodream.main([*flags, "--out", str(again)])
    assert np.array_equal(calorimeter.load_showers(again, SMALL).voxels, showers.voxels)
    calodream.main([*flags, "--out", str(again), "--seed", "1"])
    assert not np.array_equal(calorimeter.load_showers(again, SMALL).voxels, showers.voxels)


def test_files_of_the_challenge(tmp_path, scored, monkeypatch):
    """--data, --test and --binning; without --test the validation rows are scored."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("1", 300), ("2", 40)):
        calorimeter.main(["--set", "small", "--n", str(rows), "--seed", name, "--out", f"{name}.hdf5",
                          "--binning", "small.xml", "--quiet"])
    files = "--data", "1.hdf5", "--binning", "small.xml"
    result = calodream.main([*FLAGS, *files, "--test", "2.hdf5"])
    real, _, binning, oracle, *_ = scored[0]
    assert np.array_equal(real.voxels, calorimeter.load_showers("2.hdf5", SMALL).voxels)
    assert oracle is None and binning.shape == SMALL.shape and result["flags"]["data"] == "1.hdf5"
    assert calodream.main([*load(Path("runs/calodream-small")), *files])["rows"] == {"train": 270, "test": 30}
    assert np.isin(scored[1][0].energies, calorimeter.load_showers("1.hdf5", SMALL).energies).all()


def test_a_latent_run(tmp_path, scored):
    result = calodream.main([*FLAGS, "--run", str(tmp_path), "--latent", "--patch", "2", "8", "1"])
    assert result["flags"]["latent"] and (tmp_path / "autoencoder" / "state.eqx").exists()
    assert {"reconstruction", "scores"} <= result.keys()
    calodream.main([*load(tmp_path), "--run", str(tmp_path)])
    (real, *_), *_ = scored
    rebuilt, first, rebuilt_again, again = (made.voxels for _, made, *_ in scored)
    assert np.array_equal(rebuilt, rebuilt_again) and np.array_equal(first, again) and first.any()
    np.testing.assert_allclose(rebuilt.sum((2, 3)), real.voxels.sum((2, 3)), rtol=1e-3, atol=40 * THRESHOLD)


def test_table_of_solvers(trained, scored, tmp_path, monkeypatch):
    """[CaloDREAM, Fig. 9]: scores and times of each solver, for the model of weights/."""
    (tmp_path / "weights").mkdir()
    shutil.copy(trained[0] / "model.eqx", tmp_path / "weights/calodream-small.eqx")
    monkeypatch.setattr(tables, "SOLVED", {"midpoint": (2,), "bns": (2, 4)})
    monkeypatch.setattr(tables, "SHOWERS", 25)
    (tmp_path / "pictures").mkdir()
    found = tables.solvers("small", tmp_path)
    assert found["showers"] == 25 and (tmp_path / "pictures/calodream-small-solvers.png").exists()
    assert [(row["label"], row["evaluations"]) for row in found["rows"]] == [
        ("midpoint", 2), ("bns", 2), ("bns", 4)]
    for row in found["rows"]:
        assert 0 <= row["AUC_high"] <= 1 and 0 <= row["AUC_low"] <= 1 and row["ms_per_response"]


def test_batches_of_all_networks_fit_the_devices(tmp_path, scored, monkeypatch):
    """Also that of the energy network, which takes all rows if there are few."""
    sizes = []
    train = lambda net, loss, arrays, rows, plan: sizes.append(plan.batch_size) or (net, {"train_seconds": 0})
    monkeypatch.setattr(calodream, "train", train)
    args = calodream.parse([*FLAGS, "--devices", "2", "--batch-size", "32", "--run", str(tmp_path)])
    calodream.train_model(args, make(), calorimeter.open_showers(SMALL, 300), np.arange(55))
    assert sizes == [54, 32]


def test_resume_is_as_uninterrupted(tmp_path, monkeypatch):
    """A kill in either network."""
    monkeypatch.setattr(common, "time", tiny.clock())
    monkeypatch.setattr(calodream, "bespoke", lambda model, *args: model.solver)
    showers, rows = calorimeter.open_showers(SMALL, 300), np.arange(270)
    steps, make_step = {}, calodream.make_step
    once = lambda *args: steps.setdefault(args[2].run.name, make_step(*args))  # traced once, not nine times
    monkeypatch.setattr(calodream, "make_step", once)

    def run(*flags):
        args = calodream.parse([*FLAGS, *map(str, flags)])
        return calodream.train_model(args, make(), showers, rows)[0]
    tiny.assert_resume_is_as_uninterrupted(run, tmp_path, monkeypatch, ("energy", "shape"))


# -------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, named", [
    ("--patch 3 8 5", "--patch (3, 8, 5): expected divisors of the calorimeter's (10, 8, 5)"),
    ("--batch-size 500", "--batch-size 500: there are 270 training rows"),
    ("--batch-size 5 --n 60 --validate", "expected at least 20 showers to score, not 6"),
    ("--net paper --latent --patch 2 2 2", "expected divisors of the latent's (5, 5, 10), not (2, 2, 4)"),
    ("--resume --run new", "new/energy/state.eqx: expected a checkpoint"),
    ("--data missing.hdf5", "missing.hdf5: no such file"),
    ("--data ds2.hdf5", "ds2.hdf5: expected showers of 400 voxels"),
    ("--data small.xml", "small.xml: expected an HDF5 file"),
    ("--binning missing.xml", "missing.xml: expected the binning"),
    ("--binning ds2.hdf5", "ds2.hdf5: expected the binning"),
    ("--load missing.eqx", "missing.eqx: expected a checkpoint"),
    ("--load ds2.hdf5", "ds2.hdf5: not a checkpoint"),
    ("--load model.eqx --set ds2", "model.eqx: made by detector small, expected detector ds2"),
    ("--load state.eqx", "state.eqx: the state of a run"),
    ("--load model.eqx --generate missing.csv --out x.hdf5", "missing.csv: expected one energy in MeV"),
    ("--load model.eqx --generate small.xml --out x.hdf5", "small.xml: expected one energy in MeV"),
    ("--generate small.xml --out x.hdf5", "--generate needs --out and --load"),
    ("--energy-epochs 0", "--energy-epochs"), ("--cut -1", "--cut"), ("--patch 2 8", "--patch"),
])
def test_bad_input(flags, named, trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained[0] / "model.eqx", ".")
    shutil.copy(trained[0] / "shape" / "state.eqx", ".")
    calorimeter.write_binning("small.xml", SMALL)
    with h5py.File("ds2.hdf5", "w") as file:
        file["incident_energies"], file["showers"] = np.full((4, 1), 1e4), np.ones((4, 6480))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: calodream.main([*FLAGS, *flags.split()]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.index("\n") == len(error) - 1
    assert named in error and sorted(tmp_path.rglob("*")) == before
