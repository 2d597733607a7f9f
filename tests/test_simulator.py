"""simulator.py: its bytes, and kinematics, decay lengths, bends, profiles and light against closed forms."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

import data
import simulator
from simulator import DETECTORS, SPECIES

ROOT = Path(__file__).parent.parent
ZN, ZP = DETECTORS["zn"], DETECTORS["zp"]
NAMES = {name: code for code, name in simulator.PDG_NAMES.items()}


def simulated(name, n, seed=0, fresh=False):
    """The open data set, simulated."""
    blocks = simulator.simulated_blocks(name, n, seed, fresh, quiet=True)
    return data.Dataset(*map(np.concatenate, zip(*blocks)))


def particle(code, energy, px=0.0, py=0.0, side=1):
    """One row of features (9,)."""
    species = SPECIES[code]
    pz = side * np.sqrt(energy**2 - (species.mass / 1000) ** 2 - px**2 - py**2)
    return np.array([energy, 0, 0, 0, px, py, pz, species.mass, species.charge])


def repeated(detector, row, code, runs, seed=0, cut=0):
    """Responses (runs, H, W) of one particle."""
    return simulator.simulate(detector, np.tile(row, (runs, 1)), np.full(runs, code), seed, cut)


def sums(responses):
    """Photon sums (N,)."""
    return responses.sum((1, 2), dtype=np.int64)


def start(code, energy, count):
    """`count` equal particles on their way along the axis."""
    places = np.zeros((5, count))
    return simulator.Particles(np.arange(count), np.full(count, code), np.full(count, energy), *places)


@pytest.fixture(scope="module")
def dataset():
    return simulated("zn", 300)


# --------------------------------------------------------------------------------------------- the same bytes

DIGEST = """
import hashlib, sys, simulator
for name in ("zn", "zp"):
    for fresh in (False, True):
        blocks = simulator.simulated_blocks(name, 60, seed=3, fresh=fresh, quiet=True)
        print(hashlib.sha256(b"".join(array.tobytes() for block in blocks for array in block)).hexdigest())
"""


def test_same_bytes_in_another_process(capsys):
    exec(DIGEST, {})
    here = capsys.readouterr().out
    there = subprocess.check_output([sys.executable, "-c", DIGEST], cwd=ROOT, text=True)
    assert here == there and len(set(here.split())) == 4


@pytest.mark.parametrize("changed", [dict(seed=1), dict(fresh=True), dict(name="zp")])
def test_other_bytes_for_anything_else(dataset, changed):
    other = simulated(**(dict(name="zn", n=300) | changed))
    assert not np.array_equal(dataset.particles, other.particles)


def test_version_is_part_of_the_bytes(monkeypatch):
    before = simulator.primaries(0)[0]
    monkeypatch.setattr(simulator, "VERSION", simulator.VERSION + 1)
    assert not np.array_equal(before, simulator.primaries(0)[0])


def test_bars_are_quiet_when_asked(capsys):
    simulated("zn", 5)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------- particles and their spectra

@pytest.mark.parametrize("fresh", [False, True])
def test_primaries_are_particles(fresh):
    particles, pdg, weights = simulator.primaries(0, fresh)
    data.check_particles("list", particles)                                    # finite, E^2 = p^2 + m^2
    assert particles.dtype == np.float32 and pdg.dtype == np.int32
    assert abs(weights.sum() - 1) < 1e-12 and (weights > 0).all()
    assert len(np.unique(pdg)) == 21 and particles[:, 0].max() <= 7000
    for code in np.unique(pdg):
        assert (particles[pdg == code, 7] == np.float32(SPECIES[code].mass)).all()
        assert (particles[pdg == code, 8] == SPECIES[code].charge).all()
    line = simulator.FLIGHT_CM * np.abs(particles[:, 4] / particles[:, 6])
    assert (line[pdg == NAMES["Sigma+"]] > ZN.half[0]).all()                  # no published one hits directly
    assert 0.45 < (particles[:, 6] > 0).mean() < 0.55                          # both sides


def test_fresh_particles_are_others_of_the_same_kind():
    (plain, pdg, w), (fresh, fresh_pdg, fresh_w) = simulator.primaries(0), simulator.primaries(0, fresh=True)
    ids, _ = data.unique_particles(np.concatenate([plain, fresh]))
    assert len(set(ids)) == len(plain) + len(fresh)                            # none occurs twice
    assert np.array_equal(np.bincount(pdg + 4000), np.bincount(fresh_pdg + 4000))
    means = [np.average(particles[:, 0], weights=p) for particles, p in ((plain, w), (fresh, fresh_w))]
    assert means[0] == pytest.approx(means[1], rel=0.05)


# ------------------------------------------------------------------------------------------- decays in flight

DECAYS = [(code, tuple(pair)) for code, species in SPECIES.items() for _, *pair in species.decays]


@settings(max_examples=60, deadline=None)
@given(decay=st.sampled_from(DECAYS), energy=st.floats(50, 7000), seed=st.integers(0, 2**32 - 1))
def test_decays_conserve_energy_and_momentum(decay, energy, seed):
    code, pair = decay
    mass, masses = SPECIES[code].mass / 1000, [SPECIES[daughter].mass / 1000 for daughter in pair]
    daughters = list(simulator._two_body(np.random.default_rng(seed), code, pair, np.full(50, energy)))
    total = sum(np.array(daughter) for daughter in daughters)                  # (4, 50): E, along, two across
    np.testing.assert_allclose(total[0], energy, rtol=1e-9)
    # a daughter that would fly backwards is made to stand still, see _two_body
    forward = np.all([along > 0.002 for _, along, *_ in daughters], axis=0)
    np.testing.assert_allclose(total[1, forward], np.sqrt(energy**2 - mass**2), rtol=1e-9)
    np.testing.assert_allclose(total[2:], 0, atol=1e-9)
    for (e, along, tx, ty), m in zip(daughters, masses):
        on_shell = e**2 - along**2 - tx**2 - ty**2 - m**2
        np.testing.assert_allclose(on_shell[forward] / energy**2, 0, atol=1e-9)


def test_photons_of_a_pi0_are_uniform_in_energy():
    energy, pi0 = 80.0, NAMES["pi0"]
    daughters = simulator._two_body(np.random.default_rng(1), pi0, (22, 22), np.full(4000, energy))
    p = np.sqrt(energy**2 - (SPECIES[pi0].mass / 1000) ** 2)
    e1, e2 = (e for e, *_ in daughters)
    for e in (e1, e2):
        assert stats.kstest(e, stats.uniform((energy - p) / 2, p).cdf).pvalue > 0.01
    np.testing.assert_allclose(e1 + e2, energy)


def test_transverse_momentum_of_a_decay():
    """K0S -> pi+ pi-: sqrt(1 - cos^2) p* across, p* = sqrt(m^2 / 4 - m_pi^2) = 0.206 GeV."""
    k, pi = SPECIES[310].mass / 1000, SPECIES[211].mass / 1000
    daughters = simulator._two_body(np.random.default_rng(2), 310, (211, -211), np.full(4000, 900.0))
    _, _, tx, ty = next(daughters)
    momentum = np.sqrt(k**2 / 4 - pi**2)
    assert momentum == pytest.approx(0.206, abs=5e-4)                          # Review of Particle Physics
    across = np.hypot(tx, ty) / momentum
    assert across.max() <= 1 + 1e-9
    assert stats.kstest(np.sqrt(1 - across**2), "uniform").pvalue > 0.01


def test_decay_lengths_are_exponential():
    energy = 100.0
    arrived = simulator._decay(np.random.default_rng(3), start(310, energy, 3000))
    row, first = np.unique(arrived.row, return_index=True)
    assert len(row) == 3000 and 310 not in arrived.pdg
    mean = SPECIES[310].ctau * energy / (SPECIES[310].mass / 1000)             # 539 cm: all decay on the way
    assert stats.kstest(arrived.z[first], stats.expon(scale=mean).cdf).pvalue > 0.01
    charged = np.isin(arrived.pdg[first], (211, -211)).mean()
    assert charged == pytest.approx(0.692, abs=4 * np.sqrt(0.692 * 0.308 / 3000))


@pytest.mark.parametrize("name, energy", [("K0S", 2770.0), ("Lambda", 1500.0)])
def test_some_live_long_enough(name, energy):
    species = SPECIES[NAMES[name]]
    alive = np.exp(-simulator.FLIGHT_CM / (species.ctau * energy / species.mass * 1000))
    arrived = simulator._decay(np.random.default_rng(4), start(NAMES[name], energy, 4000))
    found = (arrived.pdg == NAMES[name]).sum() / 4000
    assert found == pytest.approx(alive, abs=4 * np.sqrt(alive * (1 - alive) / 4000))


@pytest.mark.parametrize("code", list(SPECIES))
def test_every_decay_ends_in_what_arrives(code):
    arrived = simulator._decay(np.random.default_rng(5), start(code, 300.0, 200))
    assert set(arrived.row) == set(range(200))
    charge = np.bincount(arrived.row, [SPECIES[pdg].charge for pdg in arrived.pdg])
    assert (charge == SPECIES[code].charge).all()
    np.testing.assert_allclose(np.bincount(arrived.row, arrived.energy), 300.0, rtol=1e-9)


# -------------------------------------------------------------------------------------------- lines and bends

def test_neutral_particles_fly_straight():
    x, y, z, a, b = np.random.default_rng(6).normal(size=(5, 20))
    at = simulator._arrive(start(2112, 900.0, 20)._replace(x=x, y=y, z=z, slope_x=a, slope_y=b))
    np.testing.assert_allclose(at.x, x + a * (simulator.FLIGHT_CM - z))
    np.testing.assert_allclose(at.y, y + b * (simulator.FLIGHT_CM - z))
    assert not at.bend.any() and not at.em.any()


@pytest.mark.parametrize("energy, x", [(7000.0, 9.4), (3500.0, 18.8)])
def test_magnets_sort_by_charge_and_momentum(energy, x):
    proton, antiproton = (simulator._arrive(start(code, energy, 1)) for code in (2212, -2212))
    assert proton.x[0] == pytest.approx(x) and antiproton.x[0] == pytest.approx(-x) and proton.y[0] == 0
    behind = start(2212, energy, 1)._replace(z=np.full(1, simulator.MAGNET_CM + 1))
    assert simulator._arrive(behind).x[0] == 0


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("x, y", [(0.0, 0.0), (2.1, -1.3), (-2.5, 0.4)])
def test_light_lies_where_the_straight_line_ends(side, x, y):
    px, py = 800 / simulator.FLIGHT_CM * np.array([x, y])
    light = repeated(ZN, particle(22, 800.0, px, py, side), 22, 60).sum(0, dtype=np.int64)
    light = np.where(light > 0.1 * light.max(), light, 0)                      # the core: edges cut the halo
    centre = [(np.indices(light.shape)[axis] - 21.5) * ZN.pitch for axis in (0, 1)]
    assert np.average(centre[0], weights=light) == pytest.approx(x, abs=0.1)
    assert np.average(centre[1], weights=light) == pytest.approx(y, abs=0.1)


def test_protons_reach_zp_and_neutrons_zn():
    for code, near, far in ((2112, ZN, ZP), (2212, ZP, ZN)):
        row = particle(code, 4000.0)
        light = [np.median(sums(repeated(detector, row, code, 60))) for detector in (near, far)]
        assert light[0] > 800 and light[1] < 100


# ------------------------------------------------------------------------------------------ showers and light

def inside(law, scale, half_x, half_y):
    """Share of a lateral profile within |x| < half_x, |y| < half_y, by integration."""
    density = {"exp": lambda r: np.exp(-r / scale) / (2 * np.pi * scale**2),
               "tail": lambda r: (1 + r**2 / scale**2) ** -2 / (np.pi * scale**2)}[law]
    return 4 * integrate.dblquad(lambda y, x: density(np.hypot(x, y)), 0, half_x, 0, half_y)[0]


def source(photons, x=0.0):
    """One source of light at (x, 0)."""
    columns = (np.full(1, value) for value in (0, photons, x, 0.0, 1.0, simulator.SHOWERY))
    return simulator.Lights(*columns)


NARROW = [c for c in simulator.ELECTROMAGNETIC + simulator.HALO if c[1] < simulator.FAR_CM]  # not fluctuating


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
@pytest.mark.parametrize("component", NARROW)
def test_lateral_profile(detector, component):
    share, scale, law = component
    light = source(2e5, detector.centre)
    _, ix, iy = simulator._tracks(np.random.default_rng(8), detector, light, *component)
    width = scale * (detector.core if scale < simulator.CORE_CM else detector.spread)
    x, y = (np.abs(i + 0.5 - n // 2) for i, n in zip((ix, iy), detector.shape))   # from the middle, in fibres
    for fibres in (1, 3, 10):
        half = fibres * detector.pitch
        expected = share * 2e5 / simulator.BURST * inside(law, width, half, half)
        assert ((x < fibres) & (y < fibres)).sum() == pytest.approx(expected, abs=5 * np.sqrt(expected))


def test_photons_come_in_bursts_of_the_stated_mean():
    response = simulator._respond(np.random.default_rng(9), ZN, 1, source(1e6))
    mean, variance = simulator.BURST, simulator.BURST * (simulator.BURST - 1)        # geometric
    kept = sum(share * inside(law, scale, *ZN.half) for share, scale, law in simulator.ELECTROMAGNETIC[:3])
    far = 1e6 * simulator.ELECTROMAGNETIC[3][0] * 1.2                                # its light fluctuates
    error = 5 * np.sqrt(1e6 * (mean + variance / mean)) + far
    assert response.sum(dtype=np.int64) == pytest.approx(1e6 * kept, abs=error)


def test_light_yield_of_photons():
    kept = sum(share * inside(law, scale, *ZN.half) for share, scale, law in simulator.ELECTROMAGNETIC)
    for energy in (200.0, 400.0, 1600.0):
        photons = sums(repeated(ZN, particle(22, energy), 22, 400))
        assert np.median(photons) == pytest.approx(kept * ZN.light * energy, rel=0.04)
        sampling = np.sqrt(0.38**2 / energy + 0.02**2 + 2 * simulator.BURST / np.median(photons))
        spread = np.subtract(*np.percentile(photons, [84, 16])) / 2 / np.median(photons)
        assert 0.5 * sampling < spread < 1.5 * sampling


def test_hadrons_are_wider_and_fluctuate_more():
    def radius(response):
        grid = np.indices(response.shape)
        centre = [np.average(axis, weights=response) for axis in grid]
        squares = sum((axis - middle) ** 2 for axis, middle in zip(grid, centre))
        return np.sqrt(np.average(squares, weights=response))

    def spread(responses):
        return np.subtract(*np.percentile(sums(responses), [84, 16])) / np.median(sums(responses))
    photon, neutron = (repeated(ZN, particle(code, 2000.0), code, 100, cut=10) for code in (22, 2112))
    assert np.median([radius(r) for r in neutron]) > 1.1 * np.median([radius(r) for r in photon])
    assert spread(neutron) > 2 * spread(photon)


# ------------------------------------------------------------------------------------------------- the oracle

def test_oracle_respects_the_cut_and_repeats(dataset):
    again, same, other = (simulator.simulate(ZN, dataset.particles, dataset.pdg, seed) for seed in (1, 1, 2))
    assert again.shape == dataset.responses.shape and again.dtype == np.uint16
    assert (sums(again) >= simulator.CUT).all() and (sums(dataset.responses) >= simulator.CUT).all()
    np.testing.assert_array_equal(again, same)
    assert (again != other).any((1, 2)).all() and (again != dataset.responses).any((1, 2)).all()


def test_runs_are_independent(dataset):
    """Sums of the same particle in two runs have one distribution and are not correlated."""
    brightest = sums(dataset.responses).argmax()
    row, code = dataset.particles[brightest], dataset.pdg[brightest]
    a, b = (sums(repeated(ZN, row, code, 300, seed, cut=10)) for seed in (1, 2))
    assert abs(stats.spearmanr(a, b).statistic) < 0.2 and stats.ks_2samp(a, b).pvalue > 0.01
    assert abs(stats.spearmanr(a[1:], a[:-1]).statistic) < 0.2


def test_without_a_cut_empty_responses_stay():
    assert (sums(repeated(ZN, particle(22, 50.0, 1.0), 22, 200)) == 0).mean() > 0.9  # it passes 225 cm away


def test_hopeless_particles_end():
    row = particle(22, 2.0, 0.5)
    assert simulator.simulate(ZN, row[None], np.array([22]), 0, tries=50).sum() < simulator.CUT


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_every_type_simulates(detector):
    particles, pdg, _ = simulator.primaries(0)
    first = [np.flatnonzero(pdg == code)[0] for code in simulator.PRIMARIES]
    responses = simulator.simulate(detector, particles[first], pdg[first], 0, cut=0)
    assert responses.shape == (21, *detector.shape) and responses.max() < 2000
