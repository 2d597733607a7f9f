"""export.py: noise out of ten numbers, both forms of a model beside JAX, and O2's contract."""
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import common  # noqa: E402
import data  # noqa: E402
import export  # noqa: E402
import files  # noqa: E402
import graph  # noqa: E402
import hit  # noqa: E402
import metrics  # noqa: E402
from orientation import Axes  # noqa: E402
from benchmarks import events, o2, o2_call  # noqa: E402

WEIGHTS = o2.ROOT / "weights"
RNG = np.random.default_rng(0)
PARTICLES = np.array([[2000, 0, 0, 0, 0.1, -0.2, 1999.9, 939.565, 0],
                      [1400, 0, 0, 1, 0.3, 0.1, -1399, 938.272, 1],
                      [310, 0.1, 0, -5, 0.03, 0.02, 310, 0, 0],
                      [700, 0, 0.2, 0, 0, 0.3, -699.9, 139.57, -1]], np.float32)


def session(model):
    return onnxruntime.InferenceSession(model.SerializeToString())


# ------------------------------------------------------------------------------------------------------ noise

def lowbias32(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = np.uint32((int(factor) * np.uint64(x ^ (x >> np.uint32(shift)))) & np.uint64(0xFFFFFFFF))
    return x


def uniforms(noise, count):
    """What export.hashed_uniforms promises, with Python's whole numbers."""
    wrap = lambda numbers: np.array([int(n) % 2**32 for n in numbers], np.uint32)
    bits = wrap(int(np.float32(z) * np.float32(2**20)) + i * 0x9E3779B9 for i, z in enumerate(noise))
    seeds = []
    for _ in range(2):
        bits = lowbias32(bits)
        seeds.append(sum(map(int, bits)))
    x = lowbias32(wrap(i * 0x9E3779B9 + seeds[0] for i in range(count)))
    x = lowbias32(wrap(int(n) + seeds[1] for n in x))
    return (x >> 8) * 2.0**-24 + 2.0**-25


def normals(uniform):
    first, second = np.split(uniform, 2)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


@pytest.fixture(scope="module")
def numbers():
    """Uniform and normal numbers (500, 2000) of 500 noises (500, 10)."""
    made, count = graph.Graph(), 2000
    uniform = export.hashed_uniforms(made, "noise", count)
    outputs = {"u": uniform, "z": export.normals(made, uniform, count)}
    model = session(made.model({"noise": ("noise", np.float32, (1, 10))},
                               {name: (tensor, np.float32, (1, count)) for name, tensor in outputs.items()}))
    noise = RNG.normal(size=(500, 10)).astype(np.float32)
    found = [model.run(None, {"noise": row[None]}) for row in noise]
    return noise, *np.array(found)[:, :, 0].swapaxes(0, 1)


def test_noise_is_the_hash_of_ten_numbers(numbers):
    noise, uniform, normal = numbers
    for k in range(5):
        expected = uniforms(noise[k], uniform.shape[1])
        np.testing.assert_allclose(uniform[k], expected, rtol=1e-6)
        np.testing.assert_allclose(normal[k], normals(expected), rtol=1e-3, atol=1e-4)


def test_noise_is_as_random_as_it_should_be(numbers):
    """Shares of 100 intervals, moments, and no correlation along a row, between rows or columns."""
    _, uniform, normal = numbers
    shares = np.histogram(uniform, 100, (0, 1))[0]
    assert 50 < np.sum((shares - shares.mean())**2) / shares.mean() < 160      # chi^2 of 99 degrees
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert np.mean(normal**moment) == pytest.approx(expected, abs=0.04)
    for rows in (uniform[:100], uniform[:, :100].T):
        correlations = np.corrcoef(rows)[np.triu_indices(100, 1)]
        assert np.abs(correlations).max() < 5.5 / rows.shape[1]**0.5
    assert abs(np.corrcoef(uniform[:, :-1].ravel(), uniform[:, 1:].ravel())[0, 1]) < 0.005


# ------------------------------------------------------------------------------------------------------ forms

@pytest.fixture(scope="module", params=["gan-zn", "latent_fm-zp"])
def exported(request, tmp_path_factory):
    """(flags, draw, files): one takes O2's numbers for its noise, the other has a latent of its own."""
    path, folder = WEIGHTS / f"{request.param}.eqx", tmp_path_factory.mktemp(request.param)
    return *export.open_model(path), export.write(folder, export.generator_models(path))


def test_any_number_of_particles_gives_jaxs_counts(exported):
    _, draw, (batched, _, _) = exported
    assert o2.compare(draw, batched, PARTICLES) == {"equal": 1.0, "furthest": 0}


def test_o2s_form_gives_jaxs_counts_for_the_hashed_noise(exported):
    """The noise of gan.py are the ten numbers themselves; latent_fm.py draws a sum, a latent and counts."""
    args, draw, (_, single, _) = exported
    shapes = export.count_draws(lambda p: draw(p, jax.random.key(0)), graph.placeholder(PARTICLES[:1]))
    sample = lambda particle: draw(particle, jax.random.key(0))

    def run(particle, *noise):
        numbers = iter(noise)
        return graph.evaluate(sample, lambda *_: next(numbers), particle)[0]
    run = jax.jit(run)
    model = onnxruntime.InferenceSession(str(single))
    for particle in PARTICLES:
        noise = RNG.normal(size=(1, 10)).astype(np.float32)
        latent = 0 if args.script == "gan" else args.latent
        lengths = [np.prod(shape) for name, shape in shapes if name == "uniform"]
        uniform = uniforms(noise[0], latent + sum(lengths)).astype(np.float32)
        first = noise if args.script == "gan" else normals(uniform[:latent]).astype(np.float32)[None]
        rest = iter(np.split(uniform[latent:], np.cumsum(lengths)[:-1]))
        parts = [first if name == "normal" else next(rest).reshape(shape) for name, shape in shapes]
        expected = run(particle[None], *parts)
        found = np.expm1(model.run(None, {"noise": noise, "particle": particle[None]})[0]).astype(int)
        assert np.mean(found != np.swapaxes(expected, 1, 2)) < 0.001


def test_o2s_contract(exported):
    args, _, (_, single, scales) = exported
    model = onnx.load(single)
    assert [(entry.domain, entry.version <= 21) for entry in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""} and single.stat().st_size < 200e6
    shape = lambda value: [n.dim_value for n in value.type.tensor_type.shape.dim]
    assert [shape(value) for value in model.graph.input] == [[1, 10], [1, 9]]
    assert [shape(value) for value in model.graph.output] == [[1, *data.DETECTORS[args.detector].shape[::-1]]]
    lines = scales.read_text().split("\n")
    assert len(lines) == 22 and lines[0] == "#means" and lines[10:12] == ["", "#scales"]


def test_equal_inputs_give_equal_responses(exported):
    single = exported[2][1]
    found = [o2_call.call(single, np.repeat(PARTICLES[:2], 3, axis=0), seed)[0] for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert not np.array_equal(found[0][0], found[0][1])                        # fresh noise in each call


def test_channels_are_those_of_metrics(exported):
    model = onnxruntime.InferenceSession(str(exported[2][0]))
    sizes = {node.name: node.shape[1] for node in model.get_inputs()}
    feeds = {name: RNG.random((4, n), np.float32) for name, n in sizes.items()} | {"particles": PARTICLES}
    counts, channels = model.run(None, feeds)
    assert counts.dtype == np.uint16 and np.array_equal(channels, metrics.channels(counts))


def test_conditions_are_those_of_numpy():
    particles = data.open_data("zn", 700, 0, quiet=True).particles
    for mode in data.CONDITIONS:
        scaler = data.fit_conditions(particles, mode)
        here = jax.jit(lambda p: data.conditions(p, scaler, jnp))(particles)   # noqa: B023
        np.testing.assert_allclose(here, data.conditions(particles, scaler), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------- calls and main

def test_a_call_as_o2_makes_it(tmp_path):
    """Scaled features, charges in e / 3, dynamic lengths of 1, whole photons by truncation."""
    made = graph.Graph()
    shown = made.node("Log", made.node("Add", "particle", made.constant(np.float32(1.01))))
    inputs = {name: (name, np.float32, ("B", n)) for name, n in (("noise", 10), ("particle", 9))}
    pixels = made.node("Reshape", shown, made.ints([1, 3, 3]))
    model = made.model(inputs, {"pixels": (pixels, np.float32, (1, 3, 3))})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".txt").write_text("\n".join(["#means", *"000000000", "", "#scales", *"111111113", ""]))
    particle = np.array([[5, 0, 1, 2, 3, 4, 7, 900, 1]], np.float32)
    responses, seconds = o2_call.call(path, particle)
    assert np.array_equal(responses[0].ravel(), particle[0]) and (seconds > 0).all()


def test_a_process_of_its_own(exported, tmp_path):
    responses, printed = o2.call(exported[2][1], PARTICLES, 0, tmp_path)
    assert responses.shape == (4, *data.DETECTORS[exported[0].detector].shape)
    assert printed["ms"] <= printed["ms_99"] and 20 < printed["memory_mib"] < 500


def test_command_line(tmp_path, capsys):
    written = export.main([str(WEIGHTS / "gan-zp.eqx"), "--out", str(tmp_path / "o2")])
    assert sorted(path.name for path in written) == ["gan-zp-o2.onnx", "gan-zp-o2.txt", "gan-zp.onnx"]
    assert sorted(tmp_path.glob("o2/*")) == sorted(written)
    assert capsys.readouterr().out.splitlines() == [f"written: {path}" for path in written]


@pytest.mark.parametrize("name, message", [("iaf-zn.eqx", "a model of iaf.py; those of gan, vae"),
                                           ("nothing.eqx", "nothing.eqx")])
def test_what_cannot_be_exported(name, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: export.main([str(WEIGHTS / name), "--out", str(tmp_path / "o2")]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "o2").exists()


def test_names_are_those_of_script_and_detector(tmp_path):
    """Not of the files: every run has a model.eqx. Two of one name would replace each other."""
    paths = [tmp_path / name / "model.eqx" for name in ("a", "b")]
    for path, name in zip(paths, ("vae-zn", "vae-zp")):
        path.parent.mkdir()
        path.write_bytes((WEIGHTS / f"{name}.eqx").read_bytes())
    found = export.named(paths)
    assert list(found) == ["vae-zn", "vae-zp"] and [path for path, _ in found.values()] == paths
    with pytest.raises(common.UserError, match="another vae-zp beside"):
        export.named([*paths, WEIGHTS / "vae-zp.eqx"])


def test_what_cannot_be_converted_names_its_file(monkeypatch):
    def refuse(draw):
        raise common.UserError("no node of ONNX for the operation scan")
    monkeypatch.setattr(export, "batched_model", refuse)
    with pytest.raises(common.UserError, match="gan-zn.eqx: no node of ONNX"):
        export.generator_models(WEIGHTS / "gan-zn.eqx")


def test_the_classifier_sees_the_axes_of_the_generators(tmp_path, monkeypatch):
    header, net = common.load_checkpoint(WEIGHTS / "gan-zn.eqx", *gan_like())
    axes = Axes("yX", (0.4, -0.2))._asdict()
    common.save_checkpoint(tmp_path / "mine.eqx", header | {"axes": axes}, net)
    seen = {}
    monkeypatch.setattr(export, "hit_models", lambda paths, axes: seen.update(axes) or {})
    monkeypatch.setattr(export, "generator_models", lambda *_: {})
    export.main([str(tmp_path / "mine.eqx"), str(WEIGHTS / "hit-zn.eqx"), "--out", str(tmp_path)])
    assert Axes(**seen["zn"]) == Axes("yX", [0.4, -0.2])


def test_a_model_of_a_user_keeps_its_axes(tmp_path):
    """Its particles are moved, its responses turned, in both forms."""
    header, net = common.load_checkpoint(WEIGHTS / "gan-zn.eqx", *gan_like())
    axes = Axes("yX", (0.4, -0.2))
    common.save_checkpoint(tmp_path / "gan-zn.eqx", header | {"axes": axes._asdict()}, net)
    _, usual = export.open_model(WEIGHTS / "gan-zn.eqx")
    _, draw = export.open_model(tmp_path / "gan-zn.eqx")
    key = jax.random.key(1)
    expected = axes.write(np.asarray(usual(axes.move(PARTICLES), key)))
    np.testing.assert_array_equal(draw(PARTICLES, key), expected)
    models = export.generator_models(tmp_path / "gan-zn.eqx", WEIGHTS / "hit-zn.eqx")
    batched, *_ = export.write(tmp_path, models)
    assert o2.compare(draw, batched, PARTICLES) == {"equal": 1.0, "furthest": 0}


def gan_like():
    """What load_checkpoint needs for a generator in float16."""
    args = export.gan.parse(["--load", str(WEIGHTS / "gan-zn.eqx")])
    make, _ = export.MODELS["gan"](args, data.DETECTORS["zn"], data.CONDITIONS["physics"])
    return [eqx.filter_eval_shape(lambda key: common.cast(make(key), jnp.float16), jax.random.key(0))]


# --------------------------------------------------------------------------------------- whom they give light

@pytest.fixture(scope="module")
def hits(tmp_path_factory):
    """(particles, sessions of hit-zn, hit-o2 and gan-zn-o2)."""
    folder = tmp_path_factory.mktemp("hits")
    models = [str(WEIGHTS / name) for name in ("hit-zn.eqx", "hit-zp.eqx", "gan-zn.eqx")]
    export.main([*models, "--out", str(folder)])
    particles = hit.runs_before_the_cut("zn", 2000, 5, quiet=True)[0]
    names = "hit-zn", "hit-zp", "hit-o2", "gan-zn-o2"
    return particles, *(onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in names)


def classified(model, particles):
    return np.array([model.run(None, {"particle": row[None]})[0].item() for row in particles])


def test_probabilities_are_those_of_jax(hits):
    particles, zn, *_ = hits
    net, scaler, _ = hit.open_hit(WEIGHTS / "hit-zn.eqx", "zn", Axes())
    here = hit.probabilities(net, data.conditions(particles, scaler))
    np.testing.assert_allclose(zn.run(None, {"particles": particles})[0], here, atol=1e-4)


def test_the_classifier_says_one_as_often_as_the_probabilities(hits):
    """In bins of the chance that one of two independent detectors gets light."""
    particles, zn, zp, o2_classifier, _ = hits
    miss = [1 - model.run(None, {"particles": particles})[0][:, -1] for model in (zn, zp)]
    chance, found = 1 - miss[0] * miss[1], classified(o2_classifier, particles)
    assert set(found) == {0.0, 1.0}
    np.testing.assert_array_equal(found, classified(o2_classifier, particles))
    bins = (chance * 4.999).astype(int)
    for k in range(5):
        mine = bins == k
        error = np.sqrt((chance * (1 - chance))[mine].sum()) + 1
        assert abs(found[mine].sum() - chance[mine].sum()) < 4 * error


def test_a_generator_gives_light_only_where_the_classifier_says_so(hits):
    particles, zn, _, o2_classifier, generator = hits
    particles, noise = particles[:400], RNG.normal(size=(400, 10)).astype(np.float32)
    made = [generator.run(None, {"noise": z[None], "particle": row[None]})[0]
            for z, row in zip(noise, particles)]
    lit = np.array([np.expm1(logs).astype(int).sum() > 0 for logs in made])
    assert not lit[classified(o2_classifier, particles) == 0].any()
    passing = zn.run(None, {"particles": particles})[0][:, -1]
    assert lit.mean() == pytest.approx(passing.mean(), abs=0.08)


# -------------------------------------------------------------------------------------------- command, table

def test_without_the_extra(tmp_path):
    (tmp_path / "onnx.py").write_text("raise ModuleNotFoundError('no', name='onnx')")
    result = subprocess.run([sys.executable, "export.py", "x"], cwd=o2.ROOT, capture_output=True, text=True,
                            env={"PYTHONPATH": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"})
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "needs onnx" in result.stderr


def test_table(tmp_path, monkeypatch):
    """A whole row, of few rows and without the scores."""
    small = data.open_data("zp", 700, 0, quiet=True), data.split_rows(700, 0)
    monkeypatch.setattr(data, "open_split", lambda args: small)
    monkeypatch.setattr(metrics, "resimulate", lambda *_: None)
    scores = dict.fromkeys(o2.SCORES) | {"marginals": {"lit_percent": 1}}
    monkeypatch.setattr(metrics, "evaluate", lambda *_, **__: scores)
    monkeypatch.setattr(o2, "EQUAL", 20)
    row = files.plain(o2.row(WEIGHTS / "gan-zp.eqx", tmp_path))
    assert row["label"] == "gan" and row["equal"] == 1 and row["rows"] == {"seen": 140} and row["ms"] > 0


def test_sums_over_events(monkeypatch):
    """The light of the particles of an event adds up; the simulator twice is its own oracle."""
    monkeypatch.setattr(events, "EVENTS", 30)
    particles, pdg = events.random_particles("zp", 300)
    responses = np.arange(300, dtype=np.uint16)[:, None, None] * np.ones((1, 4, 4), np.uint16)
    total = events.sums(lambda rows, start: responses[start:start + len(rows)], particles)
    assert total.shape == (30, 5)
    np.testing.assert_array_equal(total.sum(1), 16 * np.arange(300).reshape(30, 10).sum(1))
    with_hits, every = files.plain(list(events.rows("zp", ["gan"])))
    assert [with_hits["label"], every["label"]] == ["gan", "gan, --all-hit"]
    assert every["seen"]["MAE"]["value"] > with_hits["seen"]["MAE"]["value"] > 0
    assert every["seen"]["MAE"]["oracle"] == with_hits["seen"]["MAE"]["oracle"] > 0
