"""The simulator against closed forms, the files against everything that can be wrong with them, splits and conditions."""
import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

import channels
import data
from common import UserError
from data import DETECTORS, FEATURES, SPECIES

ROOT = Path(__file__).parent.parent
ZN, ZP = DETECTORS["zn"], DETECTORS["zp"]
NAMES = {name: code for code, name in data.PDG_NAMES.items()}


def particle(code, energy, px=0.0, py=0.0, side=1, vertex=(0.0, 0.0, 0.0)):
    """One row of features (9,)."""
    species = SPECIES[code]
    pz = side * np.sqrt(energy**2 - (species.mass / 1000) ** 2 - px**2 - py**2)
    return np.array([energy, *vertex, px, py, pz, species.mass, species.charge])


def sums(detector, row, code, runs, seed=0):
    """Photon sums (runs,) of one particle, without a cut."""
    responses = data.simulate(detector, np.tile(row, (runs, 1)), np.full(runs, code), seed, cut=0)
    return responses.sum((1, 2), dtype=np.int64)


@pytest.fixture(scope="module")
def dataset():
    return data.generate_dataset("zn", 300, quiet=True)


# ------------------------------------------------------------------------------------------------------ the same bytes

DIGEST = """
import hashlib, sys, data
for name in ("zn", "zp"):
    for fresh in (False, True):
        dataset = data.generate_dataset(name, 60, seed=3, fresh=fresh, quiet=True)
        print(hashlib.sha256(b"".join(array.tobytes() for array in dataset)).hexdigest())
"""


def test_same_bytes_in_another_process(capsys):
    exec(DIGEST, {})
    here = capsys.readouterr().out
    there = subprocess.run([sys.executable, "-c", DIGEST], cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert here == there and len(set(here.split())) == 4


@pytest.mark.parametrize("changed", [dict(seed=1), dict(fresh=True), dict(name="zp")])
def test_other_bytes_for_anything_else(dataset, changed):
    other = data.generate_dataset(**(dict(name="zn", n=300, quiet=True) | changed))
    assert not np.array_equal(dataset.particles, other.particles)


def test_cached_data_are_the_simulated_ones(dataset, monkeypatch):
    first = data.open_data("zn", 300, quiet=True)
    monkeypatch.setattr(data, "generate_dataset", None)                        # from now on only the file is left
    for again in (first, data.open_data("zn", 300, quiet=True)):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(dataset, again))


def test_version_is_part_of_the_bytes(monkeypatch):
    before = data.primaries(0)[0]
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    assert not np.array_equal(before, data.primaries(0)[0])


# ------------------------------------------------------------------------------------------------------- the particles

@pytest.mark.parametrize("fresh", [False, True])
def test_primaries_are_particles(fresh):
    particles, pdg, weights = data.primaries(0, fresh)
    data.check_particles("list", particles)                                    # finite, E^2 = p^2 + m^2
    assert particles.dtype == np.float32 and pdg.dtype == np.int32 and abs(weights.sum() - 1) < 1e-12 and (weights > 0).all()
    assert len(np.unique(pdg)) == 21 and particles[:, 0].max() <= 7000
    for code in np.unique(pdg):
        assert (particles[pdg == code, 7] == np.float32(SPECIES[code].mass)).all()
        assert (particles[pdg == code, 8] == SPECIES[code].charge).all()
    line = data.FLIGHT_CM * np.abs(particles[:, 4] / particles[:, 6])
    assert (line[pdg == NAMES["Sigma+"]] > ZN.half[0]).all()                   # none of the published ones hits directly
    side = (particles[:, 6] > 0).mean()
    assert 0.45 < side < 0.55


def test_fresh_particles_are_others_of_the_same_kind():
    (plain, pdg, w), (fresh, fresh_pdg, fresh_w) = data.primaries(0), data.primaries(0, fresh=True)
    ids, _ = data.unique_particles(np.concatenate([plain, fresh]))
    assert not set(ids[:len(plain)]) & set(ids[len(plain):])
    assert len(set(ids)) == len(plain) + len(fresh)                            # nor does one occur twice
    assert np.array_equal(np.bincount(pdg + 4000), np.bincount(fresh_pdg + 4000))
    assert np.average(plain[:, 0], weights=w) == pytest.approx(np.average(fresh[:, 0], weights=fresh_w), rel=0.05)


def test_fresh_data_share_no_particle(dataset):
    fresh = data.generate_dataset("zn", 300, fresh=True, quiet=True)
    ids, _ = data.unique_particles(np.concatenate([dataset.particles, fresh.particles]))
    assert not set(ids[:300]) & set(ids[300:])


# --------------------------------------------------------------------------------------------------------- kinematics

DECAYS = [(code, tuple(pair)) for code, species in SPECIES.items() for _, *pair in species.decays]


@settings(max_examples=60, deadline=None)
@given(decay=st.sampled_from(DECAYS), energy=st.floats(50, 7000), seed=st.integers(0, 2**32 - 1))
def test_decays_conserve_energy_and_momentum(decay, energy, seed):
    code, pair = decay
    mass, masses = SPECIES[code].mass / 1000, [SPECIES[daughter].mass / 1000 for daughter in pair]
    daughters = list(data._two_body(np.random.default_rng(seed), code, pair, np.full(50, energy)))
    total = sum(np.array(daughter) for daughter in daughters)                  # (4, 50): E, along, across, across
    np.testing.assert_allclose(total[0], energy, rtol=1e-9)
    # a daughter that would fly backwards is made to stand still, see _two_body
    forward = np.all([along > 0.002 for _, along, *_ in daughters], axis=0)
    np.testing.assert_allclose(total[1, forward], np.sqrt(energy**2 - mass**2), rtol=1e-9)
    np.testing.assert_allclose(total[2:], 0, atol=1e-9)
    for (e, along, tx, ty), m in zip(daughters, masses):
        on_shell = e**2 - along**2 - tx**2 - ty**2 - m**2
        np.testing.assert_allclose(on_shell[forward] / energy**2, 0, atol=1e-9)


def test_photons_of_a_pi0_are_uniform_in_energy():
    energy, mass = 80.0, SPECIES[NAMES["pi0"]].mass / 1000
    (e1, *_), (e2, *_) = data._two_body(np.random.default_rng(1), NAMES["pi0"], (22, 22), np.full(4000, energy))
    p = np.sqrt(energy**2 - mass**2)
    for e in (e1, e2):
        assert stats.kstest(e, stats.uniform((energy - p) / 2, p).cdf).pvalue > 0.01
    np.testing.assert_allclose(e1 + e2, energy)


def test_transverse_momentum_in_a_decay_at_rest():
    """K0S -> pi+ pi-: p* = sqrt(m^2 / 4 - m_pi^2) = 0.206 GeV, and sqrt(1 - cos^2) p* across."""
    k, pi = SPECIES[310].mass / 1000, SPECIES[211].mass / 1000
    _, _, tx, ty = next(iter(data._two_body(np.random.default_rng(2), 310, (211, -211), np.full(4000, 900.0))))
    momentum = np.sqrt(k**2 / 4 - pi**2)
    assert momentum == pytest.approx(0.206, abs=5e-4)                          # Review of Particle Physics
    across = np.hypot(tx, ty) / momentum
    assert across.max() <= 1 + 1e-9
    assert stats.kstest(np.sqrt(1 - across**2), "uniform").pvalue > 0.01


def start(code, energy, count):
    """`count` equal particles on their way along the axis."""
    zero = np.zeros(count)
    return data.Particles(np.arange(count), np.full(count, code), np.full(count, energy), zero, zero, zero, zero, zero)


def test_decay_lengths_are_exponential():
    energy = 100.0
    arrived = data._decay(np.random.default_rng(3), start(310, energy, 3000))
    row, first = np.unique(arrived.row, return_index=True)
    assert len(row) == 3000 and 310 not in arrived.pdg
    mean = SPECIES[310].ctau * energy / (SPECIES[310].mass / 1000)             # 539 cm: none is left after 112.5 m
    assert stats.kstest(arrived.z[first], stats.expon(scale=mean).cdf).pvalue > 0.01
    charged = np.isin(arrived.pdg[first], (211, -211)).mean()
    assert charged == pytest.approx(0.692, abs=4 * np.sqrt(0.692 * 0.308 / 3000))


@pytest.mark.parametrize("name, energy", [("K0S", 2770.0), ("Lambda", 1500.0)])
def test_some_live_long_enough(name, energy):
    species = SPECIES[NAMES[name]]
    alive = np.exp(-data.FLIGHT_CM / (species.ctau * energy / species.mass * 1000))
    found = (data._decay(np.random.default_rng(4), start(NAMES[name], energy, 4000)).pdg == NAMES[name]).sum() / 4000
    assert found == pytest.approx(alive, abs=4 * np.sqrt(alive * (1 - alive) / 4000))


@pytest.mark.parametrize("code", list(SPECIES))
def test_every_decay_ends_in_what_arrives(code):
    arrived = data._decay(np.random.default_rng(5), start(code, 300.0, 200))
    assert set(arrived.row) == set(range(200))
    charge = np.bincount(arrived.row, [SPECIES[pdg].charge for pdg in arrived.pdg])
    assert (charge == SPECIES[code].charge).all()
    np.testing.assert_allclose(np.bincount(arrived.row, arrived.energy), 300.0, rtol=1e-9)


# ------------------------------------------------------------------------------------------------------ lines and bends

def test_neutral_particles_fly_straight():
    rng, zero = np.random.default_rng(6), np.zeros(20)
    x, y, z, a, b = rng.normal(size=(5, 20))
    at = data._arrive(data.Particles(np.arange(20), np.full(20, 2112), np.full(20, 900.0), x, y, z, a, b))
    np.testing.assert_allclose(at.x, x + a * (data.FLIGHT_CM - z))
    np.testing.assert_allclose(at.y, y + b * (data.FLIGHT_CM - z))
    assert np.array_equal(at.bend, zero) and not at.em.any()


@pytest.mark.parametrize("energy, x", [(7000.0, 9.4), (3500.0, 18.8)])
def test_magnets_sort_by_charge_and_momentum(energy, x):
    proton, antiproton = (data._arrive(start(code, energy, 1)) for code in (2212, -2212))
    assert proton.x[0] == pytest.approx(x) and antiproton.x[0] == pytest.approx(-x) and proton.y[0] == 0
    behind = start(2212, energy, 1)._replace(z=np.full(1, data.MAGNET_CM + 1))
    assert data._arrive(behind).x[0] == 0


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("x, y", [(0.0, 0.0), (2.1, -1.3), (-2.5, 0.4)])
def test_light_lies_where_the_straight_line_ends(side, x, y):
    px, py = 800 / data.FLIGHT_CM * np.array([x, y])
    row = particle(22, 800.0, px, py, side)
    light = data.simulate(ZN, np.tile(row, (60, 1)), np.full(60, 22), 0).sum(0, dtype=np.int64)
    light = np.where(light > 0.1 * light.max(), light, 0)                      # the core: the halo is cut at the edges
    centre = [(np.indices(light.shape)[axis] - 21.5) * ZN.pitch for axis in (0, 1)]
    assert np.average(centre[0], weights=light) == pytest.approx(x, abs=0.1)
    assert np.average(centre[1], weights=light) == pytest.approx(y, abs=0.1)


def test_protons_reach_zp_and_neutrons_zn():
    for code, near, far in ((2112, ZN, ZP), (2212, ZP, ZN)):
        row = particle(code, 4000.0)
        assert np.median(sums(near, row, code, 60)) > 800 and np.median(sums(far, row, code, 60)) < 100


# ------------------------------------------------------------------------------------------------------ showers and light

def profile(law, scale, half_x, half_y):
    """Share of a lateral profile within |x| < half_x, |y| < half_y."""
    density = {"exp": lambda r: np.exp(-r / scale) / (2 * np.pi * scale**2),
               "tail": lambda r: (1 + r**2 / scale**2) ** -2 / (np.pi * scale**2)}[law]
    value, _ = integrate.dblquad(lambda y, x: density(np.hypot(x, y)), 0, half_x, 0, half_y)
    return 4 * value


def lights(photons, width=1.0, code=data.SHOWERY):
    zero = np.zeros(1)
    return data.Lights(np.zeros(1, int), np.full(1, float(photons)), zero, zero, np.full(1, width), np.full(1, code))


@pytest.mark.parametrize("detector", ["zn", "zp"])
@pytest.mark.parametrize("component", [c for c in data.ELECTROMAGNETIC + data.HALO if c[1] < data.FAR_CM])
def test_lateral_profile(detector, component):
    detector, (share, scale, law) = DETECTORS[detector], component
    source = lights(2e5)._replace(x=np.full(1, detector.centre))
    _, ix, iy = data._tracks(np.random.default_rng(8), detector, source, *component)
    total = share * 2e5 / data.BURST
    width = scale * (detector.core if scale < data.CORE_CM else detector.spread)
    for fibres in (1, 3, 10):
        middle = (detector.shape[0] // 2, detector.shape[1] // 2)
        inside = (np.abs(ix + 0.5 - middle[0]) < fibres) & (np.abs(iy + 0.5 - middle[1]) < fibres)
        expected = total * profile(law, width, fibres * detector.pitch, fibres * detector.pitch)
        assert inside.sum() == pytest.approx(expected, abs=5 * np.sqrt(expected))


def test_photons_come_in_bursts_of_the_stated_mean():
    response = data._respond(np.random.default_rng(9), ZN, 1, lights(1e6))
    mean, variance = data.BURST, data.BURST * (data.BURST - 1)                  # of a geometric distribution
    kept = sum(share * profile(law, scale, *ZN.half) for share, scale, law in data.ELECTROMAGNETIC[:3])
    assert response.sum(dtype=np.int64) == pytest.approx(1e6 * kept, abs=5 * np.sqrt(1e6 * (mean + variance / mean)) + 1e6 * 0.012)


def test_light_yield_of_photons():
    kept = sum(share * profile(law, scale, *ZN.half) for share, scale, law in data.ELECTROMAGNETIC)
    found = {energy: sums(ZN, particle(22, energy), 22, 400) for energy in (200.0, 400.0, 1600.0)}
    for energy, photons in found.items():
        assert np.median(photons) == pytest.approx(kept * ZN.light * energy, rel=0.04)
        sampling = np.sqrt(0.38**2 / energy + 0.02**2 + 2 * data.BURST / np.median(photons))
        middle = np.subtract(*np.percentile(photons, [84, 16])) / 2 / np.median(photons)
        assert 0.5 * sampling < middle < 1.5 * sampling


def test_hadrons_are_wider_and_fluctuate_more():
    def radius(response):
        x, y = (np.average(axis, weights=response) for axis in np.indices(response.shape))
        return np.sqrt(np.average((np.indices(response.shape)[0] - x) ** 2 + (np.indices(response.shape)[1] - y) ** 2, weights=response))
    photon, neutron = (data.simulate(ZN, np.tile(particle(code, 2000.0), (100, 1)), np.full(100, code), 0) for code in (22, 2112))
    assert np.median([radius(r) for r in neutron]) > 1.1 * np.median([radius(r) for r in photon])
    spread = [np.subtract(*np.percentile(r.sum((1, 2), dtype=np.int64), [84, 16])) / np.median(r.sum((1, 2))) for r in (photon, neutron)]
    assert spread[1] > 2 * spread[0]


# ------------------------------------------------------------------------------------------------------------- the oracle

def test_oracle_respects_the_cut_and_repeats(dataset):
    again = data.simulate(ZN, dataset.particles, dataset.pdg, 1)
    assert again.shape == dataset.responses.shape and again.dtype == np.uint16
    assert (again.sum((1, 2)) >= data.CUT).all() and (dataset.responses.sum((1, 2)) >= data.CUT).all()
    np.testing.assert_array_equal(again, data.simulate(ZN, dataset.particles, dataset.pdg, 1))
    other = data.simulate(ZN, dataset.particles, dataset.pdg, 2)
    assert (again != other).any((1, 2)).all() and (again != dataset.responses).any((1, 2)).all()


def test_runs_are_independent(dataset):
    """Sums of the same particles in two runs differ by as much as those of two sets of runs, and are not correlated."""
    row, code = dataset.particles[dataset.responses.sum((1, 2)).argmax()], dataset.pdg[dataset.responses.sum((1, 2)).argmax()]
    a, b = (data.simulate(ZN, np.tile(row, (300, 1)), np.full(300, code), seed).sum((1, 2), dtype=np.int64) for seed in (1, 2))
    assert abs(stats.spearmanr(a, b).statistic) < 0.2 and stats.ks_2samp(a, b).pvalue > 0.01
    assert abs(stats.spearmanr(a[1:], a[:-1]).statistic) < 0.2


def test_without_a_cut_empty_responses_stay():
    photons = sums(ZN, particle(22, 50.0, 1.0), 22, 200)                       # 225 cm away
    assert (photons == 0).mean() > 0.9


def test_hopeless_particles_end():
    row = particle(22, 2.0, 0.5)
    assert data.simulate(ZN, row[None], np.array([22]), 0, tries=50).sum() < data.CUT


@pytest.mark.parametrize("name", ["zn", "zp"])
def test_every_type_simulates(name):
    particles, pdg, _ = data.primaries(0)
    first = [np.flatnonzero(pdg == code)[0] for code in data.PRIMARIES]
    responses = data.simulate(DETECTORS[name], particles[first], pdg[first], 0, cut=0)
    assert responses.shape == (21, *DETECTORS[name].shape) and responses.max() < 2000


# ----------------------------------------------------------------------------------------------------------------- files

def equal(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b))


def test_hdf5_round_trip(dataset, tmp_path):
    data.save(tmp_path / "set.h5", dataset, detector="zn", seed=0)
    assert equal(data.load(tmp_path / "set.h5", "zn"), dataset)
    assert equal(data.read_particles(tmp_path / "set.h5"), dataset[1:])
    with h5py.File(tmp_path / "set.h5") as file:
        assert dict(file.attrs) == {"detector": "zn", "seed": 0, "cut": data.CUT, "version": data.VERSION}
        assert {file[name].compression for name in file} == {"gzip"}


def npz_pair(folder, responses, table):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data_nonrandom_responses.npz", responses)
    np.savez(folder / "data_nonrandom_particles.npz", table)


def test_npz_pair(dataset, tmp_path):
    table = np.column_stack([dataset.particles.astype(np.float64), dataset.pdg])
    npz_pair(tmp_path / "alice", dataset.responses.astype(np.float32), table)
    paths = [tmp_path / "alice", *(tmp_path / "alice").iterdir()]
    assert len(paths) == 3 and all(equal(data.load(path, "zn"), dataset) for path in paths)
    assert equal(data.read_particles(tmp_path / "alice" / "data_nonrandom_particles.npz"), dataset[1:])
    npz_pair(tmp_path / "nine", dataset.responses, table[:, :9])               # without the PDG ids
    assert not data.load(tmp_path / "nine", "zn").pdg.any()


def test_csv(dataset, tmp_path):
    names = ["pdg", *FEATURES[::-1]]                                           # any order
    table = np.column_stack([dataset.pdg, dataset.particles[:, ::-1]])
    np.savetxt(tmp_path / "list.csv", table, fmt="%.9g", delimiter=", ", header=" , ".join(names), comments="")
    assert equal(data.read_particles(tmp_path / "list.csv"), dataset[1:])
    np.savetxt(tmp_path / "one.csv", table[:1, 1:], fmt="%.9g", delimiter=",", header=",".join(names[1:]), comments="")
    particles, pdg = data.read_particles(tmp_path / "one.csv")
    assert np.array_equal(particles, dataset.particles[:1]) and np.array_equal(pdg, [0])


ROW = particle(22, 500.0, 0.3, 0.4)
GOOD = {"responses": np.ones((3, 44, 44), np.uint16), "particles": np.tile(ROW, (3, 1)), "pdg": np.full(3, 22)}


def scaled(columns, factor):
    table = np.tile(particle(2112, 500.0, 0.3), (3, 1))
    table[:, columns] *= factor
    return table


def with_value(array, value):
    array = array.astype(np.float64)
    array.flat[-1] = value
    return array


BAD = {   # what is wrong: (changed arrays, attributes, what the message says)
    "responses of zp": (dict(responses=np.ones((3, 56, 30), np.uint16)), {}, r"shape \(N, 44, 44\)"),
    "flat responses": (dict(responses=np.ones((3, 1936), np.uint16)), {}, r"shape \(N, 44, 44\)"),
    "text responses": (dict(responses=np.full((3, 44, 44), b"1")), {}, "numbers"),
    "complex responses": (dict(responses=np.ones((3, 44, 44), complex)), {}, "numbers"),
    "NaN responses": (dict(responses=with_value(GOOD["responses"], np.nan)), {}, "NaN"),
    "infinite responses": (dict(responses=with_value(GOOD["responses"], np.inf)), {}, "infinity"),
    "negative responses": (dict(responses=with_value(GOOD["responses"], -1)), {}, "between 0 and 65535"),
    "negative integers": (dict(responses=np.full((3, 44, 44), -1, np.int16)), {}, "between 0 and 65535"),
    "too many photons": (dict(responses=with_value(GOOD["responses"], 70000)), {}, "between 0 and 65535"),
    "fractions": (dict(responses=with_value(GOOD["responses"], 0.5)), {}, "whole photon counts"),
    "log responses": (dict(responses=np.log1p(GOOD["responses"])), {}, "scaled"),
    "too few responses": (dict(responses=np.ones((2, 44, 44), np.uint16)), {}, "2 responses for 3 particles"),
    "too few ids": (dict(pdg=np.full(2, 22)), {}, "3"),
    "no responses": (dict(responses=None), {}, "responses is missing"),
    "no particles": (dict(particles=None), {}, "particles is missing"),
    "eight features": (dict(particles=np.ones((3, 8))), {}, r"\(N, 9\)"),
    "text features": (dict(particles=np.full((3, 9), b"1")), {}, "numbers"),
    "NaN feature": (dict(particles=with_value(GOOD["particles"], np.nan)), {}, "row 2 holds NaN"),
    "momenta in MeV": (dict(particles=scaled(slice(4, 7), 1000)), {}, "in GeV"),
    "everything in MeV": (dict(particles=scaled(slice(0, 7), 1000)), {}, "GeV"),
    "mass in GeV": (dict(particles=scaled(7, 0.001)), {}, "mass = 0.939565 MeV"),
    "mass in keV": (dict(particles=scaled(7, 1000)), {}, "mass in MeV"),
    "no momentum along z": (dict(particles=np.tile([5.0, 0, 0, 0, 3, 4, 0, 0, 0], (3, 1))), {}, "pz not 0"),
    "negative energy": (dict(particles=with_value(scaled(0, -1), 0)), {}, "E = -500"),
    "fractional ids": (dict(pdg=np.full(3, 22.5)), {}, "PDG"),
    "two columns of ids": (dict(pdg=np.full((3, 2), 22)), {}, "PDG"),
    "another detector": ({}, {"detector": "zp"}, "zp data, not zn"),
    "empty": ({name: array[:0] for name, array in GOOD.items()}, {}, "no particles"),
}


def assert_user_error(read, path, pattern):
    with pytest.raises(UserError) as raised:
        read()
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and re.search(pattern, message), message


def test_a_group_is_no_data_set(tmp_path):
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file.create_group("responses")
        file["particles"] = GOOD["particles"]
    assert_user_error(lambda: data.load(tmp_path / "bad.h5", "zn"), tmp_path / "bad.h5", "responses is missing")


@pytest.mark.parametrize("case", BAD)
def test_bad_hdf5(case, tmp_path):
    changed, attributes, pattern = BAD[case]
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        for name, array in (GOOD | changed).items():
            if array is not None:
                file[name] = array
        file.attrs.update(attributes)
    assert_user_error(lambda: data.load(tmp_path / "bad.h5", "zn"), tmp_path / "bad.h5", pattern)


def test_everything_in_mev_is_not_missed_for_photons(tmp_path):
    """Massless particles keep E = p in any unit; 500 GeV in MeV is more than any beam gives."""
    with pytest.raises(UserError, match="GeV"):
        data.check_particles("list", np.tile(ROW * np.where(np.arange(9) < 7, 1000, 1), (3, 1)))


@pytest.mark.parametrize("case", ["responses of zp", "complex responses", "NaN responses", "negative responses", "too many photons",
                                  "fractions", "too few responses", "eight features", "NaN feature", "momenta in MeV",
                                  "no momentum along z"])
def test_bad_npz(case, tmp_path):
    arrays = GOOD | BAD[case][0]
    npz_pair(tmp_path / "bad", arrays["responses"], np.column_stack([arrays["particles"], arrays["pdg"]]))
    with pytest.raises(UserError) as raised:
        data.load(tmp_path / "bad", "zn")
    assert "\n" not in str(raised.value) and str(tmp_path / "bad") in str(raised.value)


@pytest.mark.parametrize("damage", ["half", "nothing", "text", "other keys", "objects", "one missing"])
def test_damaged_npz(damage, tmp_path):
    npz_pair(tmp_path / "bad", GOOD["responses"], np.column_stack([GOOD["particles"], GOOD["pdg"]]))
    path = tmp_path / "bad" / "data_nonrandom_responses.npz"
    if damage == "other keys":
        np.savez(path, responses=GOOD["responses"])
    elif damage == "objects":
        np.savez(path, np.array([GOOD["responses"], None], object))            # would need pickle
    elif damage == "one missing":
        path.unlink()
    else:
        path.write_bytes({"half": path.read_bytes()[:200], "nothing": b"", "text": b"E,vx\n"}[damage])
    assert_user_error(lambda: data.load(tmp_path / "bad", "zn"), path, "arr_0|no such file")


@pytest.mark.parametrize("keep", [0, 100, 2000, 0.5, 0.98])
def test_damaged_hdf5(dataset, keep, tmp_path):
    path = tmp_path / "set.h5"
    data.save(path, dataset)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_user_error(lambda: data.load(path, "zn"), path, "HDF5")


@settings(max_examples=60, deadline=None, derandomize=True)                    # HDF5 itself may crash on damaged bytes
@given(place=st.floats(0, 1), value=st.integers(0, 255))
def test_one_wrong_byte_is_an_error_or_harmless(dataset, tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "flipped.h5"
    data.save(path, dataset._replace(responses=dataset.responses[:5], particles=dataset.particles[:5], pdg=dataset.pdg[:5]))
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] = value
    path.write_bytes(content)
    try:
        data.load(path, "zn")
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text, pattern", [
    ("", "first line must name"),
    ("500,0,0,0,0.3,0.4,499.99968,0,0\n", "first line must name"),
    (",".join(FEATURES[:8]) + "\n" + "1," * 7 + "1\n", "missing charge"),
    (",".join(FEATURES) + "\n", "no particles"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,many,0,0\n", "many"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,nan,0,0\n", "row 0 holds NaN"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,499.99968,0\n", "9 names in the header but 8 columns"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,499.99968,0,0\n500,0\n", "columns"),
    (",".join(FEATURES) + ",pdg\n500,0,0,0,0.3,0.4,499.99968,0,0,2.5\n", "PDG"),
    (",".join(FEATURES) + "\n500,0,0,0,300,400,499999.68,0,0\n", "in GeV"),
])
def test_bad_csv(text, pattern, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(text)
    assert_user_error(lambda: data.read_particles(path), path, pattern)


@pytest.mark.parametrize("name", ["missing.h5", "missing.csv", "missing.npz", "missing"])
def test_missing_files(name, tmp_path):
    assert_user_error(lambda: data.read_particles(tmp_path / name), tmp_path / name, "no such file")
    if not name.endswith("csv"):
        assert_user_error(lambda: data.load(tmp_path / name, "zn"), tmp_path, "no such file")


def test_failed_writes_keep_the_old_file(dataset, tmp_path):
    """A limit on the size of a file fails in the middle of a write, as a full disk does; HDF5 must not crash of it."""
    path, size = tmp_path / "set.h5", 8000
    data.save(path, dataset)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(old) > size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, 3000, size, len(old) // 2, len(old) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            assert_user_error(lambda: data.save(path, dataset), path, "not written")
            assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    data.save(path, dataset)
    assert path.read_bytes() == old


# ----------------------------------------------------------------------------------------------------- splits and batches

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_rows_are_split_once_and_completely(n, seed):
    parts = data.split_rows(n, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part, share in zip(parts, (0.7, 0.1, 0.2)):
        assert abs(len(part) - share * n) < 1.01
    assert all(np.array_equal(a, b) for a, b in zip(parts, data.split_rows(n, seed)))


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.integers(0, 40), min_size=1, max_size=200), seed=st.integers(0, 1000))
def test_particles_are_split_whole(kinds, seed):
    particles = np.outer(np.array(kinds) + 1, np.arange(1, 10)).astype(np.float32)
    parts = data.split_particles(particles, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(kinds)))
    held = [set(np.array(kinds)[part]) for part in parts]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    for part, share in zip(held, (0.7, 0.1, 0.2)):
        assert abs(len(part) - share * len(set(kinds))) < 1.01


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.integers(0, 20), min_size=1, max_size=100))
def test_unique_particles(kinds):
    particles = np.outer(np.array(kinds), np.arange(1, 10)).astype(np.float32)
    ids, first = data.unique_particles(particles)
    assert np.array_equal(particles[first][ids], particles) and len(first) == len(set(kinds)) == ids.max() + 1
    assert np.array_equal(ids[first], np.arange(len(first)))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 200), size=st.integers(1, 50))
def test_batches_visit_every_row_once(n, size):
    rows = np.arange(n) * 3 + 1
    found = data.batches(rows, size, np.random.default_rng(0))
    assert found.shape == (n // size, size) and len(set(found.ravel())) == found.size and set(found.ravel()) <= set(rows)


# ------------------------------------------------------------------------------------------------------------- conditions

@pytest.mark.parametrize("mode, width", [("raw", 9), ("physics", 14)])
def test_conditions_are_standardised_on_the_training_rows(dataset, mode, width):
    particles, pdg, _ = data.primaries(0)
    scaler = data.fit_conditions(particles, mode)
    c = data.conditions(particles, scaler)
    assert c.shape == (len(particles), width) and c.dtype == np.float32 and np.isfinite(c).all() and np.abs(c).max() <= 10
    scaled = (np.abs(c).max(0) < 10) & (np.arange(width) < 11)                 # the rest is clipped, or a place
    np.testing.assert_allclose(c.mean(0)[scaled], 0, atol=2e-3)
    np.testing.assert_allclose(c.std(0)[scaled], 1, atol=2e-2)
    assert scaled.sum() >= 4 and (scaler.mean[11:] == 0).all() and (scaler.std[11:] == 1).all()
    half = data.fit_conditions(particles[::2], mode)                           # on other rows than it is used for
    assert np.array_equal(data.conditions(particles[:5], half), data.conditions(particles, half)[:5])


def test_raw_conditions_are_the_nine_features():
    particles = data.primaries(0)[0]
    scaler = data.fit_conditions(particles, "raw")
    np.testing.assert_allclose(scaler.mean, particles.astype(np.float64).mean(0))
    plain = (particles - scaler.mean) / scaler.std
    np.testing.assert_allclose(data.conditions(particles, scaler), np.clip(plain, -10, 10), atol=1e-5)


def test_conditions_of_extremes_stay_finite():
    particles = np.stack([particle(22, 1.1, 1.0), particle(2212, 7000.0, 5.0, -5.0, -1), particle(22, 1e30), particle(22, 1e-30)])
    for mode in ("raw", "physics"):
        for train in (particles, particles[:1], np.tile(particles[:1], (5, 1))):   # constant columns too
            c = data.conditions(particles, data.fit_conditions(train, mode))
            assert np.isfinite(c).all() and np.abs(c).max() <= 10


def test_impact_is_a_condition():
    particles = np.stack([particle(22, 900.0, 900 * x / data.FLIGHT_CM) for x in (-3.0, 0.0, 3.0)])
    scaler = data.Scaler(np.zeros(14), np.ones(14), "physics")
    np.testing.assert_allclose(data.conditions(particles, scaler)[:, 11], np.arcsinh(np.array([-3, 0, 3]) / 3.52), atol=1e-4)


def test_bend_is_a_condition():
    """The beam passes 9.4 cm from the axis; a proton of half its energy 18.8 cm, half a centimetre from the middle of ZP."""
    particles = np.stack([particle(2212, 7000.0), particle(2212, 3500.0), particle(2112, 3500.0)])
    found = data.conditions(particles, data.Scaler(np.zeros(14), np.ones(14), "physics"))[:, 13]
    np.testing.assert_allclose(found, np.arcsinh((np.array([9.4, 18.8, 0]) - 19.3) / 3.52), atol=2e-3)


# ------------------------------------------------------------------------------------------------------------ the commands

def test_command_writes_the_open_data(dataset, tmp_path, capsys):
    out = tmp_path / "new" / "zn.h5"
    assert data.main(["--n", "300", "--out", str(out), "--quiet"]) == {"out": str(out)}
    assert equal(data.load(out, "zn"), dataset) and str(out) in capsys.readouterr().out
    data.save(tmp_path / "same.h5", dataset, detector="zn", seed=0)
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in (out, tmp_path / "same.h5")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["zn", "zp"])
def test_command_checks(name, tmp_path, capsys, monkeypatch):
    """A small set is far from the published figures: the table says so, and the exit code."""
    monkeypatch.setattr(data, "ROWS", {"zn": 400, "zp": 400})
    monkeypatch.setattr(data, "RUNS_BEFORE_CUT", 2000)
    missing = "gradient boosting"
    monkeypatch.setattr(channels, "direct_estimates", lambda dataset, name, seed:
                        {label: None if label == missing else w for label, w in data.PUBLISHED[name]["regressions"].items()})
    with pytest.raises(SystemExit) as stop:
        data.main(["--detector", name, "--check", "--json", str(tmp_path / "check.json"), "--quiet"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    rows = {row["row"]: row for row in json.loads((tmp_path / "check.json").read_text())["table"]}
    assert set(rows) <= set(re.split(r"  +|\n", out)) and "MISSED" in out and "scikit-learn" in out
    assert rows["unique particles"]["in"] is False and rows["W of k nearest neighbours"]["in"] and rows[f"W of {missing}"]["in"] is None
    assert len(rows) > 40
    assert sum(row["in"] is False for row in rows.values()) == out.count("MISSED")


def test_check_passes_when_every_row_is_in(monkeypatch, capsys):
    rows = [data._row("one", 10, 10.9, relative=0.1), data._row("two", 1, None, relative=0.1)]
    monkeypatch.setattr(data, "check", lambda *_: rows)
    assert data.main(["--check"]) == {"table": rows} and "0 of 2 rows missed" in capsys.readouterr().out


@pytest.mark.parametrize("published, ours, band, verdict", [
    (10, 11, dict(relative=0.1), True), (10, 11.2, dict(relative=0.1), False), (-10, -11, dict(relative=0.1), True),
    (0, 5, dict(absolute=5), True), (0, 5.1, dict(absolute=5), False), (1, None, dict(relative=0.1), None),
    (500, np.uint16(490), dict(relative=0.1), True)])
def test_rows_judge_their_bands(published, ours, band, verdict):
    assert data._row("a", published, ours, **band)["in"] is verdict


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:Mean of empty slice")   # no particle has five rows
def test_rows_of_the_data_set(dataset):
    rows = {row["row"]: row["ours"] for row in data._check_rows("zn", dataset)}
    assert rows["share of gamma, %"] == pytest.approx(100 * np.mean(dataset.pdg == 22))
    assert rows["median photon sum"] == np.median(dataset.responses.sum((1, 2)))
    assert rows["E std, after the cut"] == pytest.approx(dataset.particles[:, 0].std(), rel=1e-4)


def test_command_draws_examples(tmp_path):
    assert data.main(["--sheet", str(tmp_path / "sheet.png")])["out"] == str(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_command_needs_something_to_do():
    with pytest.raises(UserError, match="--out"):
        data.main([])


def test_bars_are_quiet_when_asked(capsys):
    data.generate_dataset("zn", 5, quiet=True)
    assert capsys.readouterr().err == ""
