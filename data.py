"""Detectors, the open simulator, data files, splits and conditions.

The GEANT data of the papers belong to ALICE. This file brings a parametrised shower Monte Carlo of the two zero degree
calorimeters instead, calibrated on what has been published about those data (the table of `--check`). It follows one
particle from its vertex over 112.5 m: decays in flight, the bending of charged particles, collisions with the beam pipe,
electromagnetic and hadronic showers, Cherenkov light in fibres, the cut of 10 photons. It is not GEANT. What it offers
instead is an exact oracle (`simulate`, another run of the same particle) and as many unseen particles as one wants.

    python data.py --detector zn --out zn.h5     write the data set, 306 780 rows for ZN and 129 676 for ZP, as published
    python data.py --detector zn --check         its statistics beside the published ones; exit code 1 if a row is out

Sources named below: [P] statistics published with the papers (README, "The data"); [PDG] Review of Particle Physics 2024;
[TDR] ALICE ZDC technical design report, CERN/LHCC 99-5; [C] calibrated here until the table of `--check` agreed.
"""
import io
import sys
import zipfile
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import h5py
import numpy as np

import common
from common import UserError

VERSION = 1           # of the simulated bytes: raised whenever a number below that moves them is changed
CUT = 10              # photons; the papers' data sets hold no emptier response [P]
BEAM_GEV = 7100.0     # more than the LHC's protons have: larger energies are in MeV by mistake
FLIGHT_CM = 11250.0   # from the interaction point to the face of the calorimeters [TDR]
FEATURES = ("E", "vx", "vy", "vz", "px", "py", "pz", "mass", "charge")   # GeV, cm, GeV, MeV, e
UNSEEN = 20_000       # rows of fresh particles to test on, at most
ROWS = {"zn": 306_780, "zp": 129_676}   # [P]


class Detector(NamedTuple):
    """A matrix of fibres. Axis 0 of a response is x (horizontal), axis 1 is y; lengths in cm."""
    name: str
    shape: tuple        # fibres in x and y [TDR]
    pitch: float        # cm between fibres [TDR]
    centre: float       # x of the middle of the matrix, from the 0-degree axis
    light: float        # photons per GeV of an electromagnetic shower, from the published example rows [P]
    core: float         # width of the core of a shower against tungsten's [C]
    spread: float       # width of everything else, about the ratio of the Moliere radii [C]
    interaction: float  # cm, nuclear interaction length [PDG]

    @property
    def half(self):
        """Half widths of the matrix in x and y, cm."""
        return self.shape[0] * self.pitch / 2, self.shape[1] * self.pitch / 2


DETECTORS = {
    "zn": Detector("zn", (44, 44), 0.16, 0.0, light=0.56, core=1.0, spread=1.0, interaction=10.0),
    "zp": Detector("zp", (56, 30), 0.40, 19.3, light=0.47, core=0.75, spread=1.9, interaction=16.0),
}


# ------------------------------------------------------------------------------------------- particles and their spectra

class Species(NamedTuple):
    name: str
    mass: float         # MeV [PDG]
    charge: int
    ctau: float = 0.0   # cm [PDG]; 0: lives long enough to arrive
    decays: tuple = ()  # (branching ratio, daughter, daughter) [PDG], rarer ones left out


SPECIES = {
    22: Species("gamma", 0.0, 0),
    111: Species("pi0", 134.977, 0, 2.55e-6, ((1.0, 22, 22),)),
    211: Species("pi+", 139.570, 1),
    -211: Species("pi-", 139.570, -1),
    321: Species("K+", 493.677, 1),
    -321: Species("K-", 493.677, -1),
    310: Species("K0S", 497.611, 0, 2.684, ((0.692, 211, -211), (0.308, 111, 111))),
    130: Species("K0L", 497.611, 0),
    2212: Species("p", 938.272, 1),
    -2212: Species("p-bar", 938.272, -1),
    2112: Species("n", 939.565, 0),
    -2112: Species("n-bar", 939.565, 0),
    3122: Species("Lambda", 1115.683, 0, 7.89, ((0.641, 2212, -211), (0.359, 2112, 111))),
    -3122: Species("Lambda-bar", 1115.683, 0, 7.89, ((0.641, -2212, 211), (0.359, -2112, 111))),
    3222: Species("Sigma+", 1189.37, 1, 2.404, ((0.516, 2212, 111), (0.484, 2112, 211))),
    -3222: Species("Sigma+-bar", 1189.37, -1, 2.404, ((0.516, -2212, 111), (0.484, -2112, -211))),
    3112: Species("Sigma-", 1197.449, -1, 4.434, ((1.0, 2112, -211),)),
    -3112: Species("Sigma--bar", 1197.449, 1, 4.434, ((1.0, -2112, 211),)),
    3322: Species("Xi0", 1314.86, 0, 8.71, ((1.0, 3122, 111),)),
    -3322: Species("Xi0-bar", 1314.86, 0, 8.71, ((1.0, -3122, 111),)),
    3312: Species("Xi-", 1321.71, -1, 4.91, ((1.0, 3122, -211),)),
    3334: Species("Omega-", 1672.45, -1, 2.461, ((0.764, 3122, -321), (0.236, 3322, -211))),
}
PDG_NAMES = {pdg: species.name for pdg, species in SPECIES.items()}
CODES = np.array(sorted(SPECIES))
CHARGES = np.array([SPECIES[code].charge for code in CODES])


class Primary(NamedTuple):
    particles: int      # unique particles
    share: float        # of the runs before the cut, per cent
    spectrum: tuple     # energy / 7 TeV: a, b of a beta distribution; photons: median GeV, width of a log-normal
    kt: float           # GeV, mean transverse momentum at 1 TeV
    miss: float = 0.0   # cm, |x| of the straight line at the ZDC is at least this


PRIMARIES = {   # [C] on the published mix, feature means, unique particles and shares of direct hits
    22: Primary(660, 63.0, (305.0, 1.06), 0.245),
    2112: Primary(208, 14.4, (1.3, 3.2), 0.32),
    2212: Primary(390, 7.6, (1.0, 2.1), 0.26),
    3122: Primary(47, 2.2, (2.0, 4.6), 0.74),
    310: Primary(94, 1.4, (1.8, 5.4), 1.50),
    130: Primary(70, 1.6, (0.9, 4.2), 0.42),
    211: Primary(480, 4.5, (0.75, 6.0), 0.36),
    -211: Primary(240, 1.6, (0.7, 6.0), 0.36),
    321: Primary(70, 0.7, (0.8, 5.0), 0.40),
    -321: Primary(36, 0.3, (0.7, 5.0), 0.40),
    -2112: Primary(24, 0.55, (0.9, 5.0), 0.40),
    -2212: Primary(20, 0.2, (0.9, 5.0), 0.40),
    -3122: Primary(10, 0.2, (0.9, 5.0), 0.40),
    3222: Primary(20, 0.25, (2.3, 2.8), 0.10, 3.55),
    3112: Primary(14, 0.25, (1.2, 3.2), 0.40),
    3322: Primary(10, 0.2, (1.2, 3.2), 0.40),
    3312: Primary(8, 0.1, (1.2, 3.2), 0.40),
    -3222: Primary(4, 0.04, (1.0, 4.0), 0.40),
    -3112: Primary(4, 0.04, (1.0, 4.0), 0.40),
    -3322: Primary(4, 0.04, (1.0, 4.0), 0.40),
    3334: Primary(3, 0.03, (1.2, 5.0), 0.40),
}
RUNS_SHAPE = 3.0     # of the gamma distribution of the runs per particle [C]
KT_GROWTH = 0.15     # mean transverse momentum ~ (E / 1 TeV)^KT_GROWTH [C]


def _lattice(rng, count):
    """Numbers in [0, 1), (5, count): a Kronecker lattice at random offsets. It fills the space evenly, so that the statistics
    of a list of 40 particles do not hang on luck. [Roberts 2018, the R_d sequence, d = 5]"""
    steps = 1.134724138401519 ** -np.arange(1.0, 6.0)   # the root of x^6 = x + 1
    return (rng.random((5, 1)) + steps[:, None] * np.arange(count)) % 1


def _energies(pdg, rng, u):
    """Energies of the primaries of one type, GeV, at the quantiles `u` of the spectrum."""
    a, b = PRIMARIES[pdg].spectrum
    if pdg == 22:
        normal = np.array([NormalDist().inv_cdf(value) for value in np.clip(u, 1e-6, 1 - 1e-6)])
        return np.clip(a * np.exp(b * normal), 1.1, 6000.0)
    return 7000.0 * np.quantile(rng.beta(a, b, 20_000), u)


def primaries(seed, fresh=False):
    """Draw the list of particles.

    Returns particles float32 (P, 9) as FEATURES, pdg int32 (P,) and the probability (P,) that a run belongs to each.
    `fresh` draws another list of the same spectrum.
    """
    particles, pdgs, weights = [], [], []
    for pdg, primary in PRIMARIES.items():
        rng = np.random.default_rng([VERSION, seed, int(fresh), pdg % 2**32])   # a stream for each type
        species, count = SPECIES[pdg], primary.particles
        mass = species.mass / 1000
        u_energy, u_kt, u_phi, u_runs, u_length = _lattice(rng, count)
        energy = np.maximum(_energies(pdg, rng, u_energy), 1.1 + mass)
        kt = primary.kt * (energy / 1000) ** KT_GROWTH * np.quantile(rng.gamma(2.0, 0.5, 20_000), u_kt)
        kt = np.minimum(kt, 0.1 * energy)
        px, py = kt * np.cos(2 * np.pi * u_phi), kt * np.sin(2 * np.pi * u_phi)
        px = np.copysign(np.maximum(np.abs(px), primary.miss / FLIGHT_CM * energy), px)
        pz = np.sqrt(energy**2 - mass**2 - px**2 - py**2) * rng.choice([-1.0, 1.0], count)
        # a photon starts where its pi0 decayed, c tau E / m away with E about the photon's; the others at 0
        length = -np.log(1 - u_length) * SPECIES[111].ctau / 0.135 * energy * (pdg == 22)
        vx, vy, vz = length * px / energy, length * py / energy, length * pz / energy
        particles.append(np.stack([energy, vx, vy, vz, px, py, pz, np.full(count, species.mass),
                                   np.full(count, float(species.charge))], axis=1))
        pdgs.append(np.full(count, pdg, np.int32))
        runs = np.quantile(rng.gamma(RUNS_SHAPE, size=20_000), u_runs)
        weights.append(primary.share * runs / runs.sum())
    weights = np.concatenate(weights)
    return np.concatenate(particles).astype(np.float32), np.concatenate(pdgs), weights / weights.sum()


# --------------------------------------------------------------------------------------------- from the vertex to the ZDC

MAGNET_CM = 6500.0    # where the bend of the separation dipole acts, as one kick [TDR, about the middle of D1]
BEAM_CM = 9.4         # a 7 TeV proton passes the ZDC this far from the axis [TDR]; slower ones are bent in proportion

# What happens in the beam pipe in front of the ZDC is where this simulator is furthest from GEANT, with its full geometry:
# a few numbers [C] stand for all of the material. WINDOW_CM: x from, x to, |y| below; protons come through it to ZP.
APERTURE_CM = 3.7           # beyond it a straight line meets the beam pipe
WINDOW_CM = (8.5, 31.0, 6.5)
COLLIMATOR_CM = 1.6         # protons in the window whose straight line ends further out lose most of their energy on the way
HIT = {"inside": 0.008, "collimator": 0.985, "window": 0.8, "charged": 0.85, "neutral": 0.98}   # chance of a collision
THIN = {"collimator": 0.01, "window": 0.99}   # chance that a collision in the window is with thin material
LOST_THIN, LOST_THICK = (1.0, 12.0), (5.0, 1.0)   # beta distributions of the energy lost in a collision; thick: all of it
SWEPT = (2.0, 1.5)          # beta distribution of the part of it that flies on where a charged particle is swept away
FORWARD = {"photon": 1.0, "neutral": 0.8}   # the same for the others
SECONDARIES = 20            # of a collision; their energies are gamma distributed, with these shapes
EVEN = {"charged": 1.0, "neutral": 0.3}
UPSTREAM_CM = {"charged": (1000.0, 4500.0), "neutral": (200.0, 1500.0)}   # place of the collision in front of the ZDC
KICK = {"photon": 0.14, "charged": 0.38, "neutral": 0.35}   # GeV, transverse momentum of a secondary
PHOTONIC = {"photon": 0.97, "hadron": 0.4}   # chance that a secondary is electromagnetic: a third of all pions are pi0
WALL_CM = 26.0              # a swept particle is in the wall before it is this far off
NEAR = (0.3, 60.0, 40.0)    # GeV, and |x| and |y| in cm: secondaries that are softer or further out give no light
HAZE = {"charged": (0.735, 0.6), "neutral": (0.21, 1.5)}   # light of soft particles everywhere: photons per GeV lost if the
HAZE_LIMIT = 1.0            # calorimeter had no end, width of their log-normal distribution; never more than HAZE_LIMIT


class Particles(NamedTuple):
    """Particles on their way: `row` of the response, energy in GeV, position in cm, slopes dx/dz and dy/dz."""
    row: np.ndarray
    pdg: np.ndarray
    energy: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    slope_x: np.ndarray
    slope_y: np.ndarray


class Arrivals(NamedTuple):
    """Particles at the face of the ZDC: electromagnetic or hadronic, energy in GeV, impact and bend in cm."""
    row: np.ndarray
    em: np.ndarray
    energy: np.ndarray
    x: np.ndarray
    y: np.ndarray
    charge: np.ndarray
    bend: np.ndarray


def _pick(arrays, mask):
    return type(arrays)(*(array[mask] for array in arrays))


def _join(parts):
    return type(parts[0])(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _two_body(rng, parent, daughters, energy):
    """Isotropic two-body decay, boosted. Yields for each daughter energy, momentum along the parent and the two across it,
    GeV, shapes (N,). [PDG, Kinematics, Eq. 49.17]"""
    m, m1, m2 = (SPECIES[pdg].mass / 1000 for pdg in (parent, *daughters))
    p = np.sqrt((m**2 - (m1 + m2) ** 2) * (m**2 - (m1 - m2) ** 2)) / (2 * m)
    cos = rng.uniform(-1, 1, energy.shape)
    phi = rng.uniform(0, 2 * np.pi, energy.shape)
    gamma = np.maximum(energy / m, 1.0)
    beta = np.sqrt(1 - 1 / gamma**2)
    across = p * np.sqrt(1 - cos**2)
    for mass, sign in ((m1, 1), (m2, -1)):
        e = np.sqrt(p**2 + mass**2)
        along = gamma * (sign * p * cos + beta * e)
        yield (gamma * (e + beta * sign * p * cos), np.maximum(along, 1e-3),
               sign * across * np.cos(phi), sign * across * np.sin(phi))


def _bend(charge, energy):
    """Change of dx/dz at the dipole."""
    return charge * BEAM_CM / (FLIGHT_CM - MAGNET_CM) * 7000 / np.maximum(energy, 1.0)


def _decay(rng, particles):
    """Let particles decay in flight until only those are left that reach the ZDC."""
    arrived = []
    while len(particles.row):
        daughters = [_pick(particles, slice(0))]
        for pdg in np.unique(particles.pdg):
            species = SPECIES[int(pdg)]
            here = _pick(particles, particles.pdg == pdg)
            if not species.decays:
                arrived.append(here)
                continue
            length = rng.exponential(species.ctau * here.energy / (species.mass / 1000))   # cm, gamma beta c tau
            alive = here.z + length >= FLIGHT_CM
            arrived.append(_pick(here, alive))
            daughters += _decay_at(rng, int(pdg), _pick(here, ~alive), length[~alive])
        particles = _join(daughters)
    return _join(arrived)


def _decay_at(rng, pdg, here, length):
    """The daughters of particles of one type that decay after `length` cm."""
    species = SPECIES[pdg]
    z = here.z + length
    behind = np.maximum(z - np.maximum(MAGNET_CM, here.z), 0)   # cm flown behind the dipole
    kick = _bend(species.charge, here.energy) * ((here.z < MAGNET_CM) & (z > MAGNET_CM))
    x = here.x + here.slope_x * length + kick * behind
    y = here.y + here.slope_y * length
    mode = rng.choice(len(species.decays), len(z), p=[ratio for ratio, *_ in species.decays])
    for i, (_, *pair) in enumerate(species.decays):
        now = mode == i
        for daughter, (energy, along, tx, ty) in zip(pair, _two_body(rng, pdg, pair, here.energy[now])):
            yield Particles(here.row[now], np.full(now.sum(), daughter), energy, x[now], y[now], z[now],
                            (here.slope_x + kick)[now] + tx / along, here.slope_y[now] + ty / along)


def _arrive(particles):
    """Straight lines, and one kick in x for the charged ones."""
    charge = CHARGES[np.searchsorted(CODES, particles.pdg)]
    left = FLIGHT_CM - particles.z
    bend = _bend(charge, particles.energy) * (particles.z < MAGNET_CM) * (FLIGHT_CM - MAGNET_CM)
    return Arrivals(particles.row, particles.pdg == 22, particles.energy, particles.x + particles.slope_x * left + bend,
                    particles.y + particles.slope_y * left, charge, bend)


def _scrape(rng, at):
    """Collisions with the beam pipe: the Arrivals behind it, and the haze (Lights) of soft particles.

    A line outside the aperture meets the pipe and ends in a spray of secondaries around it. In ZP's window most protons lose
    only a little and go on.
    """
    charged = at.charge != 0
    low, high, tall = WINDOW_CM
    window = charged & (at.x > low) & (at.x < high) & (np.abs(at.y) < tall)
    wide = np.hypot(at.x - at.bend, at.y) > COLLIMATOR_CM
    inside = np.maximum(np.abs(at.x), np.abs(at.y)) < APERTURE_CM
    places = [inside, window & wide, window, charged]
    chance = np.select(places, [HIT["inside"], HIT["collimator"], HIT["window"], HIT["charged"]], HIT["neutral"])
    hit = rng.random(len(at.row)) < chance
    thin = window & (rng.random(len(at.row)) < np.where(wide, THIN["collimator"], THIN["window"]))
    missed, at, thin = _pick(at, ~hit), _pick(at, hit), thin[hit]
    lost = np.where(thin, rng.beta(*LOST_THIN, len(thin)), rng.beta(*LOST_THICK, len(thin)))
    spray, x = _spray(rng, at, lost, thin)
    rest = _pick(at._replace(energy=at.energy * (1 - lost)), thin)
    return _join([missed, rest, spray]), _haze(rng, at, lost, x)


def _spray(rng, at, lost, thin):
    """Secondaries (Arrivals) of collisions that cost the share `lost` of the energy, and the x (N,) around which they come.

    They lie (transverse momentum / energy) x distance away from the line of the particle.
    """
    size, charged = (len(at.row), SECONDARIES), at.charge != 0
    swept = rng.beta(*SWEPT, len(at.row))
    forward = np.select([thin, charged, at.em], [1.0, swept, FORWARD["photon"]], FORWARD["neutral"])
    share = rng.standard_gamma(np.where(charged, EVEN["charged"], EVEN["neutral"])[:, None], size) + 1e-9   # (n, secondaries)
    energy = share * (forward * lost * at.energy / share.sum(1))[:, None]
    far, near = (rng.uniform(*UPSTREAM_CM[kind], len(at.row)) for kind in ("charged", "neutral"))
    kick = np.select([at.em, charged], [KICK["photon"], KICK["charged"]], KICK["neutral"])
    radius = kick[:, None] * np.sqrt(rng.standard_exponential(size)) * np.where(charged, far, near)[:, None] / energy
    phi = rng.uniform(0, 2 * np.pi, size)
    # a swept particle is stopped before it has its full bend
    bend = at.bend * rng.random(len(at.row)) * np.minimum(1, WALL_CM / np.maximum(np.abs(at.bend), WALL_CM))
    centre = at.x - at.bend + bend
    x, y = centre[:, None] + radius * np.cos(phi), at.y[:, None] + radius * np.sin(phi)
    em = rng.random(size) < np.where(at.em, PHOTONIC["photon"], PHOTONIC["hadron"])[:, None]
    soft, wide, tall = NEAR
    seen = (energy > soft) & (np.abs(x) < wide) & (np.abs(y) < tall)
    row, none = np.broadcast_to(at.row[:, None], size)[seen], np.zeros(seen.sum())
    return Arrivals(row, em[seen], energy[seen], x[seen], y[seen], none, none), centre


def _haze(rng, at, lost, x):
    """Soft particles from the pipe, too many and too wide to be followed: Lights at x (N,) and the particle's y."""
    (much, narrow), (little, broad) = HAZE["charged"], HAZE["neutral"]
    charged = at.charge != 0
    spread = np.where(charged, narrow, broad)
    yields = np.where(charged, much, little) * np.exp(spread * rng.standard_normal(len(x)) - spread**2 / 2)
    photons = lost * at.energy * np.minimum(yields, HAZE_LIMIT)
    return Lights(at.row, photons, x, at.y, np.ones(len(x)), np.full(len(x), HAZY))


# ------------------------------------------------------------------------------------------------------ showers and light

# Lateral profiles, PROFILES[Lights.profile], as sums of (share of the light, scale in cm in tungsten, law): "exp" is
# exp(-r / scale) in the plane, "tail" is (1 + r^2 / scale^2)^-2 (Grindhammer and Peters, hep-ex/0001020, Eq. 14). [C]: a 300-photon photon puts a third
# of its light within +-1 fibre, a 1000-photon neutron has a peak of 30 to 60 and a halo over +-10 fibres [P].
ELECTROMAGNETIC = ((0.575, 0.16, "exp"), (0.325, 0.42, "exp"), (0.09, 1.3, "tail"), (0.01, 7.0, "exp"))
HALO = ((0.38, 1.0, "exp"), (0.24, 2.2, "exp"), (3.25, 9.0, "exp"))   # above 1: neutrons far out add light
PIPE_CM = 30.0       # width of the haze; it comes from the beam pipe, so it is as wide at both detectors [C]
PROFILES = ELECTROMAGNETIC, HALO, ((1.0, PIPE_CM, "exp"),)
SHOWERY, HALOED, HAZY = range(3)
CORE_CM = 0.2        # narrower components scale with Detector.core, wider ones with Detector.spread
FAR_CM = 5.0         # wider components fluctuate from shower to shower, because few neutrons make them [C]
FAR_FLUCTUATION = (-0.32, 0.8)   # log-normal with mean 1
BURST = 1.15         # mean photons of one track in one fibre, geometric [C]


class Lights(NamedTuple):
    """Light sources: `row`, expected photons, position in cm, width against the profile, number of PROFILES."""
    row: np.ndarray
    photons: np.ndarray
    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    profile: np.ndarray


def _electromagnetic(rng, detector, at):
    """One source per photon; 38 % / sqrt(E) sampling fluctuation and a 2 % constant term [TDR]. Showers that start late are
    narrow, early ones wide [C]."""
    n = len(at.row)
    resolution = np.sqrt(0.38**2 / at.energy + 0.02**2)
    photons = detector.light * at.energy * np.maximum(1 + resolution * rng.standard_normal(n), 0.0)
    width = np.exp(np.maximum(0.32 * rng.standard_normal(n), -0.62))
    return Lights(at.row, photons, at.x, at.y, width, np.full(n, SHOWERY))


CASCADES = 14          # pi0 cascades of a hadronic shower; their shares of the light are gamma distributed, CASCADE_SHAPE [C]
CASCADE_SHAPE = 0.4
CASCADE_KT = 0.35      # GeV, their transverse momentum at the first interaction [C]
PI0_SPREAD = 20.0      # a + b of the beta distribution of the pi0 share of the energy [C]
HADRON_LIGHT = 0.88    # photons of a pi0 cascade in a hadronic shower against those of a photon of that energy [C]
QUENCHED = 0.3         # the same for what is not pi0: most hadrons are too slow for Cherenkov light [C]
FAINT = 0.2            # photons; fainter cascades are left out


def _hadronic(rng, detector, at):
    """Sub-cascades of pi0 with their own positions, and a halo.

    The pi0 share is 1 - E^-0.18 on average (Gabriel et al., NIM A 338, 336), with a beta distribution around it.
    """
    n, size = len(at.row), (len(at.row), CASCADES)
    mean = np.clip(1 - np.maximum(at.energy, 1.5) ** -0.18, 0.1, 0.95)
    pi0 = rng.beta(PI0_SPREAD * mean, PI0_SPREAD * (1 - mean))
    photons = HADRON_LIGHT * detector.light * at.energy * np.exp(0.05 * rng.standard_normal(n))
    share = rng.standard_gamma(CASCADE_SHAPE, size) + 1e-12                             # (n, CASCADES)
    share /= share.sum(1, keepdims=True)
    depth = detector.interaction * (1 + rng.standard_exponential(size))
    energy = np.maximum(share * (at.energy * pi0)[:, None], 0.5)
    radius = CASCADE_KT * np.sqrt(rng.standard_exponential(size)) * depth / energy
    radius = np.minimum(radius, 3 * detector.spread * rng.random(size))                 # soft ones are absorbed on the way
    phi = rng.uniform(0, 2 * np.pi, size)
    light = share * (photons * pi0)[:, None]
    keep = light > FAINT
    core = Lights(np.broadcast_to(at.row[:, None], size)[keep], light[keep],
                  (at.x[:, None] + radius * np.cos(phi))[keep], (at.y[:, None] + radius * np.sin(phi))[keep],
                  1.1 * np.exp(0.2 * rng.standard_normal(keep.sum())), np.full(keep.sum(), SHOWERY))
    halo = Lights(at.row, QUENCHED * (1 - pi0) * photons, at.x, at.y, np.exp(0.25 * rng.standard_normal(n)), np.full(n, HALOED))
    return _join([core, halo])


def _tracks(rng, detector, lights, share, scale, law):
    """Draw the tracks of one component of the profile and the fibre that each one lights.

    Returns row (T,), ix (T,), iy (T,) of the tracks inside the matrix.
    """
    half_x, half_y = detector.half
    stretch = detector.core if scale < CORE_CM else detector.spread if scale < PIPE_CM else 1.0
    width = scale * lights.width * stretch
    x, y = lights.x - detector.centre, lights.y
    gap = np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)
    expected = share / BURST * lights.photons * (gap < 10 * width)
    if FAR_CM < scale < PIPE_CM:
        expected = expected * rng.lognormal(*FAR_FLUCTUATION, len(expected))
    source = np.repeat(np.arange(len(x)), rng.poisson(expected))
    u = 1 - rng.random(len(source), np.float32)
    if law == "exp":
        radius = -np.log(u * (1 - rng.random(len(source), np.float32)))
    else:
        radius = np.sqrt((1 - u) / u)
    radius *= width.astype(np.float32)[source]
    phi = rng.random(len(source), np.float32) * np.float32(2 * np.pi)
    ix = np.floor((x[source] + radius * np.cos(phi) + half_x) / detector.pitch).astype(np.int64)
    iy = np.floor((y[source] + radius * np.sin(phi) + half_y) / detector.pitch).astype(np.int64)
    inside = (ix >= 0) & (ix < detector.shape[0]) & (iy >= 0) & (iy < detector.shape[1])
    return lights.row[source][inside], ix[inside], iy[inside]


def _respond(rng, detector, rows, lights):
    """Photons per fibre, uint16 (rows, H, W): each track gives a geometric number of photons in its fibre."""
    h, w = detector.shape
    fibres = []
    for number, profile in enumerate(PROFILES):
        sources = _pick(lights, lights.profile == number)
        for component in profile:
            row, ix, iy = _tracks(rng, detector, sources, *component)
            fibres.append((row * h + ix) * w + iy)
    fibres = np.concatenate(fibres)
    photons = rng.geometric(1 / BURST, len(fibres))
    return np.bincount(fibres, photons, rows * h * w).reshape(rows, h, w).astype(np.uint16)


def _run(rng, detector, particles, pdg):
    """One independent run of each particle, no cut: uint16 (N, H, W)."""
    energy, vx, vy, vz, px, py, pz = particles[:, :7].astype(np.float64).T
    z = np.sign(pz) * vz   # both sides look alike: z counts towards the ZDC that the particle flies to
    start = Particles(np.arange(len(pdg)), pdg.astype(np.int64), energy, vx, vy, z, px / np.abs(pz), py / np.abs(pz))
    at, haze = _scrape(rng, _arrive(_decay(rng, start)))
    lights = _join([_electromagnetic(rng, detector, _pick(at, at.em)), _hadronic(rng, detector, _pick(at, ~at.em)), haze])
    return _respond(rng, detector, len(pdg), lights)


BLOCK = 2000          # runs simulated at a time: bounds the memory


def simulate(detector, particles, pdg, seed, cut=CUT, tries=3000):
    """The oracle: an independent run of every particle, repeated until it has at least `cut` photons.

    particles (N, 9) as FEATURES, pdg (N,); returns uint16 (N, H, W). Rows that fail `tries` times stay as they are last.
    """
    rng = np.random.default_rng([VERSION, seed, len(pdg)])
    responses = np.zeros((len(pdg), *detector.shape), np.uint16)
    todo = np.arange(len(pdg))
    attempts = np.zeros(len(pdg), np.int64)
    while len(todo):
        failed = []
        for block in np.array_split(todo, -(-len(todo) // BLOCK)):
            copies = max(1, min(tries, BLOCK // len(todo)))   # few rows left: many tries of each at once
            which = np.repeat(block, copies)
            runs = _run(rng, detector, particles[which], pdg[which])
            passed = (runs.sum((1, 2)) >= cut).reshape(-1, copies)
            first = passed.argmax(1)                          # 0 where none passed
            responses[block] = runs[np.arange(len(block)) * copies + first]
            attempts[block] += copies
            failed.append(block[~passed.any(1)])
        todo = np.concatenate(failed)
        todo = todo[attempts[todo] < tries]
    return responses


class Dataset(NamedTuple):
    responses: np.ndarray   # uint16 (N, H, W), photons
    particles: np.ndarray   # float32 (N, 9), as FEATURES
    pdg: np.ndarray         # int32 (N,); 0 where a file does not say


def simulated_blocks(name, n, seed=0, fresh=False, quiet=False):
    """Simulate runs of the primaries, drawn at random, until `n` have passed the cut; yields them as Datasets."""
    detector = DETECTORS[name]
    particles, pdg, weights = primaries(seed, fresh)
    rng = np.random.default_rng([VERSION, seed, int(fresh), sorted(DETECTORS).index(name)])
    filled = 0
    with common.progress(n, f"simulating {name.upper()} responses", quiet) as bar:
        while filled < n:
            which = rng.choice(len(pdg), BLOCK, p=weights)
            runs = _run(rng, detector, particles[which], pdg[which])
            passed = np.flatnonzero(runs.sum((1, 2)) >= CUT)[:n - filled]
            yield Dataset(runs[passed], particles[which[passed]], pdg[which[passed]])
            filled += len(passed)
            bar.update(len(passed))


def generate_dataset(name, n, seed=0, fresh=False, quiet=False):
    """The open data set of open_data, simulated."""
    try:
        dataset = Dataset(np.empty((n, *DETECTORS[name].shape), np.uint16), np.empty((n, len(FEATURES)), np.float32), np.empty(n, np.int32))
    except MemoryError as error:
        raise UserError(f"--n {n}: {error}") from None
    filled = 0
    for block in simulated_blocks(name, n, seed, fresh, quiet):
        for whole, part in zip(dataset, block):
            whole[filled:filled + len(part)] = part
        filled += len(block.pdg)
    return dataset


# ------------------------------------------------------------------------------------------------------------------ files

def save(path, dataset, **attributes):
    """Write `dataset` as HDF5 (responses, particles, pdg; gzip), whole or not at all."""
    starts = range(0, len(dataset.pdg), 8192)
    blocks = ({name: array[start:start + 8192] for name, array in dataset._asdict().items()} for start in starts)
    save_blocks(path, len(dataset.pdg), blocks, cut=CUT, version=VERSION, **attributes)


class _Sink(io.FileIO):
    """A file for HDF5, which crashes at exit after a failed write: the first failure is kept, all that follows is dropped."""
    failure = None

    def write(self, data):
        rest = memoryview(data)
        while len(rest) and self.failure is None:
            try:
                rest = rest[super().write(rest):]   # a disk that is almost full takes a part
            except OSError as error:
                self.failure = error
        return len(data)

    def truncate(self, size=None):
        try:
            return super().truncate(size) if self.failure is None else size
        except OSError as error:
            self.failure = error

    def check(self):
        """Raise the failure, if there was one."""
        if self.failure is not None:
            raise self.failure


def save_blocks(path, total, blocks, **attributes):
    """Stream `blocks`, dicts of arrays that add up to `total` rows, into one HDF5 file: whole or not at all.

    Raises UserError if the disk is full or the file cannot be written.
    """
    filled = 0
    with common.write_atomic(path) as temporary, _Sink(temporary, "w+") as sink:
        with h5py.File(sink, "w") as file:
            for block in blocks:
                rows = len(next(iter(block.values())))
                for name, array in block.items():
                    if name not in file:
                        file.create_dataset(name, (total, *array.shape[1:]), array.dtype, chunks=(min(total, 256), *array.shape[1:]),
                                            compression="gzip", compression_opts=1, shuffle=True)
                    file[name][filled:filled + rows] = array
                sink.check()
                filled += rows
            file.attrs.update(attributes)
        sink.check()


def open_data(name, n=None, seed=0, fresh=False, quiet=False):
    """The open data set of detector `name`: `n` rows (the published number if None), simulated on first use and cached.

    The same (name, n, seed, VERSION) gives the same bytes. `fresh=True` holds other particles of the same spectrum: none of
    them occurs in the plain set of that seed.
    """
    n = n or ROWS[name]
    path = common.cache_folder() / f"{name}-{n}-seed{seed}{'-fresh' * fresh}-v{VERSION}.h5"
    if path.exists():
        return load(path, name)
    dataset = generate_dataset(name, n, seed, fresh, quiet)
    save(path, dataset, detector=name, seed=seed)
    return dataset


def load(path, name):
    """Read and check a data set: this file's HDF5, or the papers' pair of npz files (a folder, or either of the two).

    Raises UserError for anything that is missing, damaged, of another detector, or out of its range.
    """
    path = Path(path)
    responses, particles, pdg = _read_npz(path) if path.is_dir() or path.suffix == ".npz" else _read_hdf5(path, name)
    shape = DETECTORS[name].shape
    if responses.ndim != 3 or responses.shape[1:] != shape:
        raise UserError(f"{path}: {name} responses must have the shape (N, {shape[0]}, {shape[1]}), not {responses.shape}")
    if len(responses) != len(particles) or len(pdg) != len(particles):
        raise UserError(f"{path}: {len(responses)} responses for {len(particles)} particles")
    return Dataset(_check_counts(path, responses), check_particles(path, particles), pdg)


def _read_hdf5(path, name=None, needed=("responses", "particles")):
    with open_hdf5(path) as file:
        try:
            here = [key for key in (*needed, "pdg") if isinstance(file.get(key), h5py.Dataset)]
            if "pdg" in file and "pdg" not in here:
                raise ValueError("pdg is not a data set")
            made_for = file.attrs.get("detector", name)
            arrays = {key: np.asarray(file[key][()]) for key in here}
        except Exception as error:   # h5py raises nearly every type of error on a damaged file
            raise UserError(f"{path}: damaged HDF5 file: {error}") from None
    missing = [key for key in needed if key not in here]
    if missing:
        raise UserError(f"{path}: expected the HDF5 data sets {', '.join(needed)}; {missing[0]} is missing")
    if name and made_for != name:
        raise UserError(f"{path}: holds {made_for} data, not {name}; see --detector")
    pdg = arrays.get("pdg", np.zeros(arrays["particles"].shape[:1]))
    return *(arrays[key] for key in needed), _check_pdg(path, pdg)


def open_hdf5(path):
    """Open an HDF5 file for reading. Raises UserError if it is not there or not HDF5."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return h5py.File(path, "r")
    except OSError:
        raise UserError(f"{path}: expected an HDF5 file") from None


def _read_npz(path):
    """The papers' layout: data_nonrandom_responses.npz (N, H, W) and data_nonrandom_particles.npz (N, 10), key arr_0."""
    folder = path if path.is_dir() else path.parent
    responses, table = (_npz_array(folder / f"data_nonrandom_{kind}.npz") for kind in ("responses", "particles"))
    if table.ndim != 2 or table.shape[1] not in (9, 10):
        raise UserError(f"{folder}: particles must have 9 features and the PDG id, shape (N, 10), not {table.shape}")
    pdg = table[:, 9] if table.shape[1] == 10 else np.zeros(len(table))
    return responses, table[:, :9], _check_pdg(folder, pdg)


def _npz_array(path):
    if not path.is_file():
        raise UserError(f"{path}: no such file; a folder of the papers' data holds data_nonrandom_responses.npz and "
                        "data_nonrandom_particles.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"]
    except (ValueError, OSError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: expected an npz file with a plain array under the key arr_0") from None


def _check_pdg(path, pdg):
    """int32 (N,)."""
    if pdg.ndim > 1 or pdg.dtype.kind not in "iuf" or not (np.abs(pdg.astype(np.float64)) < 2**31).all() or not np.array_equal(pdg, np.rint(pdg)):
        raise UserError(f"{path}: PDG ids must be one column of whole numbers")
    return pdg.astype(np.int32)


def _check_counts(path, responses):
    """uint16 photon counts; anything that is not a count from 0 to 65535 is an error."""
    if responses.dtype.kind not in "iuf":
        raise UserError(f"{path}: responses must be numbers, not {responses.dtype}")
    for start in range(0, len(responses), 8192):   # in blocks: the comparisons below would copy 1 GB
        block = responses[start:start + 8192]
        if not np.isfinite(block).all():
            raise UserError(f"{path}: responses hold NaN or infinity near row {start}")
        if block.size and (block.min() < 0 or block.max() > 65535):
            raise UserError(f"{path}: photon counts must lie between 0 and 65535, see the rows after {start}")
        if block.dtype.kind == "f" and not np.array_equal(block, np.rint(block)):
            raise UserError(f"{path}: responses must be whole photon counts, see the rows after {start}; are they scaled?")
    return np.ascontiguousarray(responses, dtype=np.uint16)


def check_particles(path, particles):
    """float32 (N, 9) features in the units of FEATURES.

    Raises UserError for another shape, values that are not finite, and energies that do not fit E^2 = p^2 + m^2 within 2 %
    (momenta in MeV or masses in GeV, for instance) or exceed the beam's.
    """
    if particles.ndim != 2 or particles.shape[1] != len(FEATURES) or particles.dtype.kind not in "iuf":
        raise UserError(f"{path}: particles must be numbers of the shape (N, 9): {', '.join(FEATURES)}; "
                        f"got {particles.dtype} {particles.shape}")
    if not len(particles):
        raise UserError(f"{path}: no particles")
    wide = particles.astype(np.float64)
    bad = ~np.isfinite(wide).all(1)
    if bad.any():
        raise UserError(f"{path}: particle row {bad.argmax()} holds NaN or infinity")
    energy, momentum, mass = wide[:, 0], wide[:, 4:7], wide[:, 7] / 1000
    expected = np.sqrt((momentum**2).sum(1) + mass**2)
    bad = (energy <= 0) | (mass < 0) | (np.abs(energy - expected) > 0.02 * np.maximum(energy, 1e-9))
    bad |= (energy > BEAM_GEV) | (np.abs(momentum[:, 2]) <= 1e-6 * energy)
    bad |= (mass > 1e-6) & (mass < 0.1) & (np.abs(mass - 0.000511) > 1e-6)   # in GeV by mistake: only the electron is so light
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{path}: particle row {row} has E = {energy[row]:g} but sqrt(p^2 + m^2) = {expected[row]:g} GeV with "
                        f"pz = {momentum[row, 2]:g}, mass = {wide[row, 7]:g} MeV; expected E and p in GeV up to {BEAM_GEV:g}, mass in MeV, pz not 0")
    return particles.astype(np.float32)


def read_particles(path):
    """A particle list for generation: HDF5 (`particles`, optional `pdg`), npz (N, 9 or 10, key arr_0) or CSV with a header.

    Returns particles float32 (N, 9), pdg int32 (N,) (0 where not known). Raises UserError on anything else.
    """
    path = Path(path)
    if path.suffix == ".csv":
        particles, pdg = _read_csv(path)
    elif path.suffix == ".npz":
        table = _npz_array(path)
        wide = table.ndim == 2 and table.shape[1] == 10
        particles, pdg = (table[:, :9], table[:, 9]) if wide else (table, np.zeros(table.shape[:1]))
        pdg = _check_pdg(path, pdg)
    else:
        particles, pdg = _read_hdf5(path, needed=("particles",))
    particles = check_particles(path, particles)
    if pdg.shape != (len(particles),):
        raise UserError(f"{path}: PDG ids of the shape {pdg.shape} for {len(particles)} particles")
    return particles, pdg


def _read_csv(path):
    """Columns in any order, named as FEATURES, and optionally pdg."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, encoding="utf-8", errors="replace") as file:
        header = [name.strip() for name in file.readline().strip().split(",")]
        missing = [name for name in FEATURES if name not in header]
        if missing:
            raise UserError(f"{path}: the first line must name the columns {', '.join(FEATURES)}; missing {', '.join(missing)}")
        lines = [line for line in file if line.strip()]
    if not lines:
        raise UserError(f"{path}: no particles")
    try:
        table = np.loadtxt(lines, delimiter=",", ndmin=2)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if table.shape[1] != len(header):
        raise UserError(f"{path}: {len(header)} names in the header but {table.shape[1]} columns")
    columns = {name: table[:, i] for i, name in enumerate(header)}
    pdg = columns.get("pdg", np.zeros(len(table)))
    return np.stack([columns[name] for name in FEATURES], axis=1), _check_pdg(path, pdg)


# ------------------------------------------------------------------------------------------- splits, conditions and batches

def split_rows(n, seed):
    """Random rows, 70 / 10 / 20 % (the papers): three index arrays train, validation, test."""
    order = np.random.default_rng([seed, 70]).permutation(n)
    return np.split(order, [int(0.7 * n), int(0.8 * n)])


def unique_particles(particles):
    """Rows with equal features are runs of one particle: ids (N,) from 0 and the first row of each particle (U,)."""
    keys = np.ascontiguousarray(particles, np.float32).view(f"V{4 * particles.shape[1]}").ravel()
    _, first, ids = np.unique(keys, return_index=True, return_inverse=True)
    return ids.ravel(), first


def split_particles(particles, seed):
    """70 / 10 / 20 % of the particles with all of their runs: no particle of one part occurs in another."""
    ids, first = unique_particles(particles)
    parts = split_rows(len(first), seed)
    return tuple(np.flatnonzero(np.isin(ids, part)) for part in parts)


def select(dataset, rows):
    """The Dataset of the given rows."""
    return Dataset(*(field[rows] for field in dataset))


def open_split(args, seed):
    """(Dataset, (train, validation, test)): what --detector, --data, --n and --split name, and the row numbers of its parts.
    UserError if the training rows do not fill a --batch-size, of a script that trains a generator (and has --load)."""
    dataset = load(args.data, args.detector) if args.data else open_data(args.detector, args.n, seed, quiet=args.quiet)
    split = split_particles(dataset.particles, seed) if args.split == "particles" else split_rows(len(dataset.pdg), seed)
    if "load" in args and not args.load and not 2 <= args.batch_size <= len(split[0]):
        raise UserError(f"--batch-size {args.batch_size}: expected 2 to {len(split[0])}, the training rows")
    return dataset, split


def test_sets(args, dataset, rows, seed):
    """{"seen": Dataset, "unseen": Dataset} to test on: the test `rows` are one of them, by --split; fresh particles of the
    simulator, at most UNSEEN, the other."""
    test = select(dataset, rows)
    if args.split == "particles":
        return {"unseen": test}
    if args.data:
        return {"seen": test}
    return {"seen": test, "unseen": open_data(args.detector, min(len(rows), UNSEEN), seed, fresh=True, quiet=args.quiet)}


class Scaler(NamedTuple):
    """Mean and standard deviation (C,) of the conditions on the training rows; mode "raw" or "physics"."""
    mean: np.ndarray
    std: np.ndarray
    mode: str


CONDITIONS = {"raw": 9, "physics": 14}   # how many
PLACE_CM = DETECTORS["zn"].half[0]      # unit of the places among them


def _features(particles, mode):
    """Conditions before scaling, float64 (N, CONDITIONS[mode]).

    "physics" adds what geometry gives for free: log E, charge / momentum, on which the magnets act, and three places, last:
    x and y of the straight-line impact point, and x where the dipole bends a charged particle to, from the middle of ZP, as
    arcsinh in units of PLACE_CM: linear inside, logarithmic far outside.
    """
    wide = particles.astype(np.float64)
    if mode == "raw":
        return wide
    energy, vx, vy, _, px, py, pz, _, charge = wide.T
    x, y = (v + FLIGHT_CM * p / np.abs(pz) for v, p in ((vx, px), (vy, py)))
    bent = x + (FLIGHT_CM - MAGNET_CM) * _bend(charge, energy) - DETECTORS["zp"].centre
    places = np.arcsinh(np.column_stack([x, y, bent]) / PLACE_CM)
    return np.column_stack([wide, np.log(energy), 1000 * charge / energy, places])


def fit_conditions(particles, mode):
    """Scaler of `conditions` from the training particles (N, 9). Places keep their scale, so that a network can compare them
    with the positions of its fibres."""
    values = _features(particles, mode)
    mean, std = values.mean(0), values.std(0)
    mean[11:], std[11:] = 0.0, 1.0                                     # the three of "physics"
    return Scaler(mean, np.where(std > 0, std, 1.0), mode)             # a constant column stays 0


def conditions(particles, scaler):
    """Standardised conditions float32 (N, C), cut at +-10; C is CONDITIONS[mode]."""
    values = (_features(particles, scaler.mode) - scaler.mean) / scaler.std
    return np.clip(values, -10, 10).astype(np.float32)


def save_model(args, flags, scaler, times, net):
    """Write model.eqx into the run folder, a small checkpoint for `read_model`; returns the network as it is there.

    `flags`: those that decided the training; `times`: what the Logbook found."""
    header = {"script": args.script, "detector": args.detector, "flags": flags, "scaler": scaler._asdict(),
              "parameters": common.count_parameters(net), "scores": times}
    common.save_checkpoint(args.run / "model.eqx", header, net, small=True)
    return common.rounded(net)


def read_model(args, names):
    """(Scaler, header) of the checkpoint --load; its flags `names` replace those of `args`. UserError if it is of another script
    or detector, or the state of a run."""
    header = common.read_header(args.load, args.script, args.detector)
    if "scaler" not in header:
        raise UserError(f"{args.load}: the state of a run, expected its model.eqx")
    if missing := [name for name in names if name not in header["flags"]]:
        raise UserError(f"{args.load}: made by another version, without --{missing[0]}")
    vars(args).update({name: header["flags"][name] for name in names})
    return Scaler(*(np.array(header["scaler"][name]) for name in ("mean", "std")), args.cond), header


def batches(rows, size, rng):
    """Index arrays (size,) that visit `rows` once in random order; the last short batch is dropped."""
    order = rng.permutation(rows)
    return order[:len(order) // size * size].reshape(-1, size)


# ------------------------------------------------------------------------------------- the check against published figures

RUNS_BEFORE_CUT = 511_810   # [P]
# The published rows with their photon sums in ZN and ZP: pdg, E, px, py, pz in GeV, ZN, ZP [P]
EXAMPLES = (
    (22, 513.318, 0.035456, -0.051821, -513.318, 291, 0),
    (22, 1304.34, -0.509192, 0.461106, 1304.34, 8, 9),
    (22, 1014.72, -0.335473, 0.256277, 1014.72, 130, 0),
    (-211, 325.158, 0.269915, -0.081921, 325.157, 0, 5),
    (2112, 3192.38, 0.022422, -0.182957, -3192.38, 1256, 16),
    (2212, 3961.55, -0.076487, 0.179845, 3961.55, 55, 1195),
    (310, 2770.10, 0.305187, 0.412760, -2770.10, 1122, 23),
    (2212, 3195.12, 0.560528, -0.149980, 3195.11, 230, 78),
    (2112, 1714.07, 0.457768, 0.145639, -1714.07, 655, 34),
    (3122, 4071.23, 0.089305, 0.069410, -4071.23, 34, 1246),
    (3122, 4003.60, 0.769178, -0.276743, 4003.60, 1419, 36),
)
PUBLISHED = {   # [P]
    "zn": {"unique": 1805, "quartiles": (12, 111, 510), "lit": 3.90, "peak": 591, "median": 234, "MAE": 16.41, "RMSE": 59.87, "W": 0.53,
           "shares": {22: 60.83, 2112: 23.34, 2212: 5.30, 3122: 3.08, 310: 2.09, 130: 1.79, 211: 1.30},
           "hits": {22: 45, 2112: 78, 3122: 46, 310: 21, 3222: 0}, "diversity": {22: 0.10, 2112: 0.30, 3122: 0.48, 310: 0.47, 3222: 0.58},
           "after": {"E mean": 1366.7, "E std": 1259.8, "vz std": 0.0245, "px std": 0.2346, "py std": 0.2581, "pz std": 1858,
                     "mass mean": 353.7, "mass std": 455.0, "charge std": 0.257},
           "regressions": {"linear regression": 60.06, "gradient boosting": 3.86, "decision tree": 3.86, "k nearest neighbours": 2.98,
                           "dense network": 2.48}},
    "zp": {"unique": 2027, "quartiles": (2, 5, 18), "lit": 1.11, "peak": 765, "median": None, "MAE": 13.00, "RMSE": None, "W": 0.56,
           "shares": {2112: 26.92, 22: 26.67, 2212: 23.64, 211: 8.38, 3122: 4.86, 130: 2.16, 310: 2.06, -211: 1.62, 321: 1.41},
           "hits": {}, "diversity": {}, "after": {},
           "regressions": {"linear regression": 34.65, "gradient boosting": 3.83, "decision tree": 3.76, "k nearest neighbours": 3.48,
                           "dense network": 3.22}},
}
BEFORE = {"E mean": 1067, "E std": 1190, "vz std": 0.0201, "px std": 0.297, "py std": 0.293, "pz std": 1598, "mass mean": 293,
          "mass std": 423.5, "charge mean": 0.111, "charge std": 0.388}   # [P] runs before the cut, both detectors


def _row(name, published, ours, relative=0.0, absolute=0.0):
    """A row of the table; in the band if ours is within relative x published, or within absolute, of the published figure."""
    width = relative * abs(published) + absolute
    band = f"{100 * relative:.0f} %" if relative else f"{absolute:g}"
    ours = None if ours is None else float(ours)
    return {"row": name, "published": float(published), "ours": ours, "band": band,
            "in": None if ours is None else abs(ours - published) <= width}


def _moments(particles, published, where):
    for name, value in published.items():
        feature, kind = name.split()
        column = particles[:, FEATURES.index(feature)].astype(np.float64)
        yield _row(f"{name}, {where}", value, column.mean() if kind == "mean" else column.std(), relative=0.25)


def _check_before(name, seed, quiet):
    """Rows on runs before the cut: quartiles of the photon sum, lit fibres, largest pixel, features."""
    published, detector = PUBLISHED[name], DETECTORS[name]
    particles, pdg, weights = primaries(seed)
    rng, blocks = np.random.default_rng([VERSION, seed, 7]), -(-RUNS_BEFORE_CUT // BLOCK)
    sums, lit, peak, drawn = [], 0.0, 0, []
    for _ in common.progress(blocks, "runs before the cut", quiet):
        drawn.append(rng.choice(len(pdg), BLOCK, p=weights))
        runs = _run(rng, detector, particles[drawn[-1]], pdg[drawn[-1]])
        sums.append(runs.sum((1, 2), dtype=np.int64))
        lit, peak = lit + 100 * np.count_nonzero(runs) / runs.size / blocks, max(peak, runs.max())
    sums = np.concatenate(sums)
    for share, value in zip((25, 50, 75), published["quartiles"]):
        yield _row(f"photon sum before the cut, {share} % of the non-empty", value, np.percentile(sums[sums > 0], share), relative=0.2)
    yield _row("lit fibres before the cut, %", published["lit"], lit, relative=0.2)
    yield _row("zero fibres before the cut, %", 100 - published["lit"], 100 - lit, relative=0.2)
    yield _row("largest pixel before the cut", published["peak"], peak, relative=0.2)
    yield from _moments(particles[np.concatenate(drawn)], BEFORE, "before the cut")


def _check_rows(name, dataset):
    """Rows on the data set after the cut: counts, mix, photon sum, direct hits, diversity, features."""
    published, (responses, particles, pdg) = PUBLISHED[name], dataset
    ids, first = unique_particles(particles)
    yield _row("rows", ROWS[name], len(pdg), relative=0.05)
    yield _row("unique particles", published["unique"], len(first), relative=0.05)
    for code, share in published["shares"].items():
        yield _row(f"share of {PDG_NAMES[code]}, %", share, 100 * np.mean(pdg == code), absolute=1.5)
    if published["median"]:
        yield _row("median photon sum", published["median"], np.median(responses.sum((1, 2), dtype=np.int64)), relative=0.1)
    x, y = (FLIGHT_CM * particles[first, i] / np.abs(particles[first, 6]) for i in (4, 5))
    hits = (np.abs(x) < DETECTORS["zn"].half[0]) & (np.abs(y) < DETECTORS["zn"].half[1])
    for code, share in published["hits"].items():
        yield _row(f"unique {PDG_NAMES[code]} whose straight line hits, %", share, 100 * hits[pdg[first] == code].mean(), absolute=5)
    if published["diversity"]:
        order = np.argsort(ids, kind="stable")
        groups = np.split(order, np.cumsum(np.bincount(ids))[:-1])
        spread = np.array([responses[rows].astype(np.float32).std(0).sum() if len(rows) >= 5 else np.nan for rows in groups])
        spread = (spread - np.nanmin(spread)) / (np.nanmax(spread) - np.nanmin(spread))   # f_div of paper 000, from 0 to 1
        for code, value in published["diversity"].items():
            held = spread[ids[pdg == code]]
            known = np.isfinite(held)
            yield _row(f"diversity of {PDG_NAMES[code]}", value, held[known].mean() if known.any() else None, absolute=0.1)
    yield from _moments(particles, published["after"], "after the cut")


def _check_oracle(name, dataset, seed):
    """Rows on the spread between runs of one particle: the oracle's MAE and RMSE, and W of paired halves, on the test rows."""
    import metrics   # the check stands above the modules that it checks the data with
    published, rows = PUBLISHED[name], split_rows(len(dataset.pdg), seed)[2]
    real, particles, pdg = select(dataset, rows)
    again = simulate(DETECTORS[name], particles, pdg, 1000)
    yield _row("oracle MAE", published["MAE"], metrics.mae(metrics.channels(real), metrics.channels(again)), relative=0.1)
    if published["RMSE"]:
        yield _row("oracle RMSE", published["RMSE"], metrics.rmse(real, again), relative=0.2)
    left, right = metrics.pair_rows(unique_particles(particles)[0])
    w = metrics.channels(real)
    yield _row("W of paired halves of the test rows", published["W"], metrics.wasserstein(w[left], w[right]), relative=0.15)


def _examples():
    """Particles (11, 9) and pdg (11,) of EXAMPLES."""
    particles = [(energy, 0, 0, 0, px, py, pz, SPECIES[pdg].mass, SPECIES[pdg].charge) for pdg, energy, px, py, pz, *_ in EXAMPLES]
    return np.array(particles, np.float32), np.array([example[0] for example in EXAMPLES])


def _check_examples(name):
    """Rows for the published responses: within three standard deviations of 1000 runs of the particle."""
    for particle, pdg, (*_, zn, zp) in zip(*_examples(), EXAMPLES):
        runs = simulate(DETECTORS[name], np.tile(particle, (1000, 1)), np.full(1000, pdg), 5, cut=0).sum((1, 2), dtype=np.int64)
        published = {"zn": zn, "zp": zp}[name]
        row = _row(f"photons, {PDG_NAMES[pdg]} of {particle[0]:.0f} GeV", published, runs.mean(), absolute=3 * runs.std())
        yield row | {"band": f"3 x {runs.std():.0f}"}


def _check_regressions(name, dataset, seed):
    """Rows for W of the regressions of channels.py (paper 002, Table 6); those that need scikit-learn are None without it."""
    import channels
    found = channels.direct_estimates(dataset, name, seed)
    for label, value in PUBLISHED[name]["regressions"].items():
        yield _row(f"W of {label}", value, found[label], relative=0.3)


def check(name, seed=0, quiet=False):
    """The statistics of the full open data set beside the published ones: a list of rows, each a dict."""
    dataset = open_data(name, seed=seed, quiet=quiet)
    return [*_check_rows(name, dataset), *_check_before(name, seed, quiet), *_check_oracle(name, dataset, seed), *_check_examples(name),
            *_check_regressions(name, dataset, seed)]


def print_check(rows):
    """Print the rows of `check` as one table."""
    print(f"{'':52} {'published':>10} {'ours':>10}  band")
    for row in rows:
        ours, verdict = ("-", "not run: needs scikit-learn") if row["ours"] is None else (f"{row['ours']:.4g}", "" if row["in"] else "MISSED")
        print(f"{row['row']:52} {row['published']:10.4g} {ours:>10}  {row['band']:10} {verdict}".rstrip())
    print(f"{sum(row['in'] is False for row in rows)} of {len(rows)} rows missed")


def sheet(name, path):
    """Draw independent runs (rows) of the published example particles (columns)."""
    particles, pdg = _examples()
    titles = [f"{PDG_NAMES[code]} {energy:.0f} GeV" for code, energy in zip(pdg, particles[:, 0])]
    common.plot_samples(path, {f"run {i + 1}": simulate(DETECTORS[name], particles, pdg, i, cut=0) for i in range(4)}, titles)


def main(argv=None):
    """Write the data set, or check it, or draw a sheet of examples. Returns the rows of the check, or what was written."""
    parser = common.parser(__doc__, "data", flags=("detector", "n", "seed", "out", "quiet"))
    parser.add_argument("--check", action="store_true", help="compare the full data set with the published figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --check: write the table there as well")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw independent runs of the published example particles (PNG)")
    args = parser.parse_args(argv)
    if not (args.check or args.sheet or args.out):
        raise UserError("nothing to do: give --out FILE, --check or --sheet FILE")
    if args.sheet:
        sheet(args.detector, args.sheet)
    if args.out:
        n = args.n or ROWS[args.detector]
        blocks = (block._asdict() for block in simulated_blocks(args.detector, n, args.seed, quiet=args.quiet))
        save_blocks(args.out, n, blocks, cut=CUT, version=VERSION, detector=args.detector, seed=args.seed)
        print(f"{n} responses -> {args.out}")
    if not args.check:
        return {"out": str(args.out or args.sheet)}
    rows = check(args.detector, args.seed, args.quiet)
    print_check(rows)
    if args.json:
        common.write_json(args.json, {"script": "data", "detector": args.detector, "command": args.command, "versions": common.versions(), "table": rows})
    if any(row["in"] is False for row in rows):
        sys.exit(1)
    return {"table": rows}


if __name__ == "__main__":
    common.run(main)
