"""The simulator against kinematics and closed forms, the files against everything that can be wrong with them."""
import hashlib
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

import common
import data
from common import UserError

ZN = data.DETECTORS["zn"]


def digest(dataset):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in dataset)).hexdigest()


@pytest.fixture(scope="module")
def small():
    return data.generate_dataset("zn", 600, seed=3, quiet=True)


def photon(energy, x=0.0, y=0.0):
    """A photon whose straight line ends at x, y cm."""
    return np.array([[energy, 0, 0, 0, energy * x / data.FLIGHT_CM, energy * y / data.FLIGHT_CM, energy, 0, 0]], np.float32)


# ----------------------------------------------------------------------------------------------------------- simulator

def test_same_arguments_same_bytes_in_another_process(small):
    code = ("import data, tests.test_data as t; print(t.digest(data.generate_dataset('zn', 600, seed=3, quiet=True)))")
    root = Path(data.__file__).parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                         env={"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": "/usr/bin:/bin"}).stdout.strip()
    assert out == digest(small)
    assert digest(data.generate_dataset("zn", 600, seed=4, quiet=True)) != out


def test_fresh_particles_are_others():
    plain, fresh = data.primaries(0)[0], data.primaries(0, fresh=True)[0]
    assert plain.shape == fresh.shape
    assert not set(map(bytes, plain)) & set(map(bytes, fresh))


def test_primaries_are_on_their_mass_shell_and_weights_are_probabilities():
    particles, pdg, weights = data.primaries(1)
    data.check_particles("list", particles)
    assert weights.sum() == pytest.approx(1) and (weights > 0).all()
    assert set(pdg) == set(data.PRIMARIES) and len(set(pdg)) == 21


@pytest.mark.parametrize("parent", [code for code, species in data.SPECIES.items() if species.decays])
def test_two_body_decays_conserve_energy_and_momentum(parent):
    rng = np.random.default_rng(0)
    energy = rng.uniform(2, 7000, 500)
    for _, *pair in data.SPECIES[parent].decays:
        first, second = data._two_body(rng, parent, pair, energy)
        momentum = np.sqrt(energy**2 - (data.SPECIES[parent].mass / 1000) ** 2)
        np.testing.assert_allclose(first[0] + second[0], energy, rtol=1e-9)
        np.testing.assert_allclose(first[1] + second[1], momentum, rtol=1e-3, atol=2e-3)   # backward daughters are cut at 1 MeV
        for axis in (2, 3):
            np.testing.assert_allclose(first[axis] + second[axis], 0, atol=1e-12)


def test_photons_of_a_pi0_share_its_energy_uniformly():
    energy = np.full(4000, 500.0)
    first, _ = data._two_body(np.random.default_rng(1), 111, (22, 22), energy)
    beta = np.sqrt(1 - (0.134977 / 500) ** 2)
    assert stats.kstest(first[0] / 500, stats.uniform((1 - beta) / 2, beta).cdf).pvalue > 1e-3


def test_decay_lengths_are_exponential():
    n, energy = 4000, 20.0   # short enough that all K0S decay before the ZDC
    zeros = np.zeros(n)
    start = data.Particles(np.arange(n), np.full(n, 310), np.full(n, energy), zeros, zeros, zeros, zeros, zeros)
    ends = data._decay(np.random.default_rng(2), start)
    pions = np.abs(ends.pdg) == 211
    mean = data.SPECIES[310].ctau * energy / 0.497611
    z = np.unique(ends.z[pions])
    assert stats.kstest(z, stats.expon(scale=mean).cdf).pvalue > 1e-3
    assert np.mean(np.bincount(ends.row[pions]) > 0) == pytest.approx(0.692, abs=0.03)


def test_straight_lines_end_where_geometry_says():
    n = 5
    slope = np.linspace(-1e-4, 1e-4, n)
    at = data._arrive(data.Particles(np.arange(n), np.full(n, 22), np.full(n, 100.0), np.zeros(n), np.ones(n), np.full(n, 50.0), slope, -slope))
    np.testing.assert_allclose(at.x, slope * (11250 - 50))
    np.testing.assert_allclose(at.y, 1 - slope * (11250 - 50))
    np.testing.assert_array_equal(at.bend, 0)


def test_a_beam_proton_passes_where_the_beam_does_and_slower_ones_further_out():
    zeros = np.zeros(2)
    at = data._arrive(data.Particles(np.arange(2), np.array([2212, -211]), np.array([7000.0, 3500.0]), *[zeros] * 5))
    np.testing.assert_allclose(at.x, [data.BEAM_CM, -2 * data.BEAM_CM])


def test_lateral_profiles_follow_their_closed_forms():
    rng, n = np.random.default_rng(3), 1
    wide = ZN._replace(shape=(4400, 4400))   # so wide that nothing is lost
    for scale, law, inside in ((0.42, "exp", lambda r: 1 - (1 + r / 0.42) * np.exp(-r / 0.42)), (1.3, "tail", lambda r: r**2 / (r**2 + 1.3**2))):
        lights = data.Lights(np.zeros(n, int), np.full(n, 40_000.0), np.zeros(n), np.zeros(n), np.ones(n), np.zeros(n, int))
        _, ix, iy = data._tracks(rng, wide, lights, 1.0, scale, law)
        radius = np.hypot(*((i + 0.5 - 2200) * wide.pitch for i in (ix, iy)))
        for r in (0.5, 1.0, 3.0):
            assert np.mean(radius < r) == pytest.approx(inside(r), abs=0.02)
    density = lambda r: 2 * np.pi * r * np.exp(-r / 0.42) / (2 * np.pi * 0.42**2)   # the closed form itself
    assert integrate.quad(density, 0, 1.0)[0] == pytest.approx(1 - (1 + 1 / 0.42) * np.exp(-1 / 0.42))


def test_a_central_photon_gives_the_light_of_its_energy():
    particles = np.repeat(photon(500.0, 0.3, -0.2), 400, 0)
    sums = data.simulate(ZN, particles, np.full(400, 22), 0, cut=0).sum((1, 2))
    assert sums.mean() == pytest.approx(ZN.light * 500, rel=0.06)
    assert 0 < sums.std() < 0.2 * sums.mean()


def test_responses_sit_at_the_impact_point():
    responses = data.simulate(ZN, np.repeat(photon(1000.0, 1.6, -2.4), 50, 0), np.full(50, 22), 0)
    x, y = np.unravel_index(responses.sum(0).argmax(), ZN.shape)
    assert abs(x - (22 + 10)) <= 1 and abs(y - (22 - 15)) <= 1


def test_simulate_respects_the_cut_and_repeats_only_failures(small):
    weak = small.responses.sum((1, 2)).argsort()[:40]
    runs = data.simulate(ZN, small.particles[weak], small.pdg[weak], 5)
    assert (runs.sum((1, 2)) >= data.CUT).all()
    again = data.simulate(ZN, small.particles[weak], small.pdg[weak], 5)
    np.testing.assert_array_equal(runs, again)
    assert (runs != small.responses[weak]).any((1, 2)).all()


def test_dataset_passes_the_cut_and_both_detectors_have_their_shape(small):
    assert small.responses.shape == (600, 44, 44) and small.responses.dtype == np.uint16
    assert (small.responses.sum((1, 2)) >= data.CUT).all()
    proton = data.generate_dataset("zp", 50, quiet=True)
    assert proton.responses.shape == (50, 56, 30)


def test_check_rows_judge_their_bands():
    assert data._row("a", 10, 11, relative=0.1)["in"] and not data._row("a", 10, 11.2, relative=0.1)["in"]
    assert data._row("a", -10, -11, relative=0.1)["in"] and data._row("a", 0, 5, absolute=5)["in"]
    assert data._row("a", 1.0, None)["in"] is None


def test_moments_and_mix_of_the_data_set(small):
    rows = {row["row"]: row for row in data._check_rows("zn", small)}
    assert rows["share of gamma, %"]["ours"] == pytest.approx(100 * np.mean(small.pdg == 22))
    assert rows["E std, after the cut"]["ours"] == pytest.approx(small.particles[:, 0].std(), rel=1e-4)
    assert rows["median photon sum"]["ours"] == np.median(small.responses.sum((1, 2)))


# -------------------------------------------------------------------------------------------------------------- files

def test_hdf5_round_trip(small, tmp_path):
    data.save(tmp_path / "a.h5", small, detector="zn", seed=3)
    assert digest(data.load(tmp_path / "a.h5", "zn")) == digest(small)


def test_npz_pair_of_the_papers(small, tmp_path):
    table = np.column_stack([small.particles, small.pdg]).astype(np.float64)
    np.savez(tmp_path / "data_nonrandom_responses.npz", small.responses.astype(np.float32))
    np.savez(tmp_path / "data_nonrandom_particles.npz", table)
    for path in (tmp_path, tmp_path / "data_nonrandom_responses.npz"):
        assert digest(data.load(path, "zn")) == digest(small)


def test_open_data_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("ZDC_CACHE", str(tmp_path))
    first = data.open_data("zn", 40, quiet=True)
    monkeypatch.setattr(data, "generate_dataset", None)
    assert digest(data.open_data("zn", 40, quiet=True)) == digest(first)


@pytest.mark.parametrize("kind", ["h5", "npz", "csv"])
def test_particle_lists(small, tmp_path, kind):
    path, particles, pdg = tmp_path / f"p.{kind}", small.particles[:7], small.pdg[:7]
    if kind == "h5":
        with h5py.File(path, "w") as file:
            file["particles"], file["pdg"] = particles, pdg
    elif kind == "npz":
        np.savez(path, np.column_stack([particles, pdg]))
    else:
        np.savetxt(path, np.column_stack([pdg, particles]), delimiter=",", header="pdg," + ",".join(data.FEATURES), comments="", fmt="%.9g")
    found, codes = data.read_particles(path)
    np.testing.assert_allclose(found, particles, rtol=1e-7)
    np.testing.assert_array_equal(codes, pdg)


def edited(small, **changes):
    return small._replace(**{name: change(getattr(small, name)) for name, change in changes.items()})


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


BAD = {
    "shape": (dict(responses=lambda a: a[:, :, :40]), "shape"),
    "dimensions": (dict(responses=lambda a: a[0]), "shape"),
    "NaN": (dict(responses=lambda a: put(a.astype(np.float32), (3, 1, 1), np.nan)), "NaN"),
    "negative": (dict(responses=lambda a: put(a.astype(np.int32), (3, 1, 1), -1)), "between 0 and 65535"),
    "too large": (dict(responses=lambda a: put(a.astype(np.int64), (3, 1, 1), 70_000)), "between 0 and 65535"),
    "fractions": (dict(responses=lambda a: np.log1p(a)), "whole photon counts"),
    "text": (dict(responses=lambda a: a.astype("S3")), "numbers"),
    "lengths": (dict(particles=lambda a: a[:-1], pdg=lambda a: a[:-1]), "responses for"),
    "pdg length": (dict(pdg=lambda a: a[:-1]), "responses for"),
    "features": (dict(particles=lambda a: a[:, :8]), "(N, 9)"),
    "feature NaN": (dict(particles=lambda a: put(a, (5, 0), np.nan)), "particle row 5"),
    "momenta in MeV": (dict(particles=lambda a: a * np.array([1, 1, 1, 1, 1000, 1000, 1000, 1, 1], np.float32)), "E and p in GeV"),
    "masses in keV": (dict(particles=lambda a: a * np.array([1, 1, 1, 1, 1, 1, 1, 1000, 1], np.float32)), "mass in MeV"),
    "negative energy": (dict(particles=lambda a: a * np.array([-1, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)), "particle row 0"),
    "fractional pdg": (dict(pdg=lambda a: a + 0.5), "whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(small, tmp_path, name):
    changes, message = BAD[name]
    bad = edited(small, **changes)
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        for field, array in bad._asdict().items():
            file[field] = array
    with pytest.raises(UserError) as caught:
        data.load(tmp_path / "bad.h5", "zn")
    assert message in str(caught.value) and "bad.h5" in str(caught.value) and "\n" not in str(caught.value)


def make_missing(path):
    pass


def make_text(path):
    path.write_text("not a data file")


def make_other_detector(path):
    with h5py.File(path, "w") as file:
        file["responses"], file["particles"] = np.zeros((1, 44, 44), np.uint16), photon(10.0)
        file.attrs["detector"] = "zp"


def make_keyless(path):
    with h5py.File(path, "w") as file:
        file["particles"] = photon(10.0)


def make_group(path):
    with h5py.File(path, "w") as file:
        file.create_group("responses")
        file["particles"] = photon(10.0)


@pytest.mark.parametrize("make, message", [(make_missing, "no such file"), (make_text, "HDF5"), (make_other_detector, "not zn"),
                                           (make_keyless, "responses is missing"), (make_group, "responses is missing")])
def test_bad_files(tmp_path, make, message):
    make(tmp_path / "bad.h5")
    with pytest.raises(UserError, match=message):
        data.load(tmp_path / "bad.h5", "zn")


def test_truncated_hdf5(small, tmp_path):
    data.save(tmp_path / "a.h5", small)
    (tmp_path / "a.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:20_000])
    with pytest.raises(UserError, match="a.h5"):
        data.load(tmp_path / "a.h5", "zn")


def test_no_pickle_is_ever_read(tmp_path):
    np.savez(tmp_path / "data_nonrandom_responses.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="plain array"):
        data.load(tmp_path, "zn")


@pytest.mark.parametrize("text, message", [("", "missing"), ("E,vx\n1,2\n", "missing"), (",".join(data.FEATURES) + "\n1,2,x,4,5,6,7,8,9\n", "p.csv"),
                                           (",".join(data.FEATURES) + "\n", "no particles"), (",".join(data.FEATURES) + "\n1,2,3\n", "columns")])
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        data.read_particles(tmp_path / "p.csv")


def test_no_room_on_the_disk(small, tmp_path, monkeypatch):
    data.save(tmp_path / "a.h5", small)
    before = (tmp_path / "a.h5").read_bytes()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="no room"):
        data.save(tmp_path / "a.h5", small)
    assert (tmp_path / "a.h5").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.h5"]


# ------------------------------------------------------------------------------------------------ splits and conditions

@given(n=st.integers(0, 300), seed=st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_row_splits_are_disjoint_and_complete(n, seed):
    parts = data.split_rows(n, seed)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert [len(part) for part in parts[:2]] == [int(0.7 * n), int(0.8 * n) - int(0.7 * n)]


@given(owners=st.lists(st.integers(0, 20), min_size=1, max_size=200), seed=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_particle_splits_keep_particles_whole(owners, seed):
    particles = np.repeat(np.array(owners, np.float32)[:, None], 9, 1)
    parts = data.split_particles(particles, seed)
    assert sorted(np.concatenate(parts)) == list(range(len(owners)))
    held = [set(np.array(owners)[part]) for part in parts]
    assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_unique_particles(small):
    ids, first = data.unique_particles(small.particles)
    assert len(first) == len(np.unique(small.particles, axis=0))
    np.testing.assert_array_equal(small.particles[first][ids], small.particles)


@pytest.mark.parametrize("mode, columns", [("raw", 9), ("physics", 13)])
def test_conditions_are_standardised_and_bounded(small, mode, columns):
    scaler = data.fit_conditions(small.particles, mode)
    c = data.conditions(small.particles, scaler)
    assert c.shape == (600, columns) and c.dtype == np.float32 and np.abs(c).max() <= 10
    values = (data._features(small.particles, mode) - scaler.mean) / scaler.std
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-6)
    assert np.isfinite(data.conditions(photon(7000.0, 900.0), scaler)).all()


def test_batches_visit_each_row_once():
    found = data.batches(np.arange(100, 155), 10, np.random.default_rng(0))
    assert found.shape == (5, 10) and len(np.unique(found)) == 50 and found.min() >= 100


# ------------------------------------------------------------------------------------------------------------ command

def test_command_writes_a_data_set(tmp_path, capsys):
    data.main(["--detector", "zp", "--n", "30", "--out", str(tmp_path / "zp.h5"), "--quiet"])
    assert data.load(tmp_path / "zp.h5", "zp").responses.shape == (30, 56, 30)
    data.main(["--sheet", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="nothing to do"):
        data.main([])


def test_check_prints_and_fails_when_a_row_is_out(tmp_path, monkeypatch, capsys):
    rows = [data._row("one", 10, 10, relative=0.1), data._row("two", 10, 20, relative=0.1), data._row("three", 1, None, relative=0.1)]
    monkeypatch.setattr(data, "check", lambda *_: rows)
    with pytest.raises(SystemExit) as caught:
        data.main(["--check", "--json", str(tmp_path / "c.json")])
    out = capsys.readouterr().out
    assert caught.value.code == 1 and "MISSED" in out and "1 of 3 rows missed" in out and (tmp_path / "c.json").exists()
    monkeypatch.setattr(data, "check", lambda *_: rows[:1])
    assert data.main(["--check"])["table"] == rows[:1]


def test_progress_is_quiet_when_asked(capsys):
    data.generate_dataset("zn", 5, quiet=True)
    assert capsys.readouterr().err == "" and common.progress(3, "x", True).disable
