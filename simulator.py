"""The open simulator: a parametrised shower Monte Carlo of the two zero degree calorimeters.

The GEANT data of the papers belong to ALICE. This simulator stands in for GEANT: it follows one particle from
its vertex over 112.5 m to a response: decays in flight, the bending of charged particles, collisions with the
beam pipe, electromagnetic and hadronic showers, Cherenkov light in fibres, the cut of 10 photons. Its
constants are calibrated on what has been published about those data (`python -m benchmarks.check zn` prints
the table). It is not GEANT, but it offers an exact oracle (`simulate`, another run of the same particles) and
as many unseen particles as wanted.

Sources named below: [P] statistics published with the papers (docs/DATA.md); [PDG] Review of Particle Physics
2024; [TDR] ALICE ZDC technical design report, CERN/LHCC 99-5; [C] calibrated here until that table agreed.
"""
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

import common

VERSION = 1           # of the simulated bytes: raised whenever a number below that moves them is changed
CUT = 10              # photons; the papers' data sets hold no emptier response [P]
FLIGHT_CM = 11250.0   # from the interaction point to the face of the calorimeters [TDR]
FEATURES = ("E", "vx", "vy", "vz", "px", "py", "pz", "mass", "charge")   # GeV, cm, GeV, MeV, e
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


# -------------------------------------------------------------------------------- particles and their spectra

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
    spectrum: tuple     # beta distribution of energy / 7 TeV: a, b; photons: log-normal, median GeV and width
    kt: float           # GeV, mean transverse momentum at 1 TeV
    miss: float = 0.0   # cm, smallest |x| of the straight line at the ZDC


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
    """Kronecker lattice at random offsets, numbers in [0, 1), (5, count) [Roberts 2018, R_d sequence, d = 5].
    It fills the space evenly, so that the statistics of a list of 40 particles do not depend on chance."""
    steps = 1.134724138401519 ** -np.arange(1.0, 6.0)   # the root of x^6 = x + 1
    return (rng.random((5, 1)) + steps[:, None] * np.arange(count)) % 1


def _energies(pdg, rng, u):
    """Energies in GeV of the primaries of one type, at the quantiles `u` of their spectrum."""
    a, b = PRIMARIES[pdg].spectrum
    if pdg == 22:
        normal = np.array([NormalDist().inv_cdf(value) for value in np.clip(u, 1e-6, 1 - 1e-6)])
        return np.clip(a * np.exp(b * normal), 1.1, 6000.0)
    return 7000.0 * np.quantile(rng.beta(a, b, 20_000), u)


def primaries(seed, fresh=False):
    """The list of particles of a data set, drawn at random; with `fresh` another one of the same spectrum.

    Returns particles float32 (P, 9) as FEATURES, pdg int32 (P,) and the probability (P,) that a run belongs
    to each.
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


# --------------------------------------------------------------------------------- from the vertex to the ZDC

MAGNET_CM = 6500.0    # where the separation dipole acts, as a single kick [TDR, about the middle of D1]
BEAM_CM = 9.4         # distance at which a 7 TeV proton passes the axis at the ZDC [TDR]; it goes as 1 / E

# What happens in the beam pipe in front of the ZDC is where this simulator is furthest from GEANT, with its
# full geometry: a few numbers [C] stand for all of the material.
APERTURE_CM = 3.7           # a straight line beyond it meets the beam pipe
WINDOW_CM = (8.5, 31.0, 6.5)    # x from, x to, largest |y|: through it protons reach ZP
COLLIMATOR_CM = 1.6         # protons in the window with a straight line beyond it lose most of their energy
# chance of a collision, and that a collision in the window is one with thin material
HIT = {"inside": 0.008, "collimator": 0.985, "window": 0.8, "charged": 0.85, "neutral": 0.98}
THIN = {"collimator": 0.01, "window": 0.99}
# beta distributions of the share of the energy that is lost in a collision with thin, and with thick material
LOST_THIN, LOST_THICK = (1.0, 12.0), (5.0, 1.0)
# share of the lost energy that secondaries carry on: beta distributed where a magnet sweeps them away
SWEPT, FORWARD = (2.0, 1.5), {"photon": 1.0, "neutral": 0.8}
SECONDARIES = 20            # of a collision; their energies are gamma distributed, with the shapes EVEN
EVEN = {"charged": 1.0, "neutral": 0.3}
UPSTREAM_CM = {"charged": (1000.0, 4500.0), "neutral": (200.0, 1500.0)}   # from the collision to the ZDC
KICK = {"photon": 0.14, "charged": 0.38, "neutral": 0.35}   # GeV, transverse momentum of a secondary
PHOTONIC = {"photon": 0.97, "hadron": 0.4}   # chance that a secondary is electromagnetic
WALL_CM = 26.0              # a swept particle is in the wall before it is this far off
NEAR = (0.3, 60.0, 40.0)    # GeV, largest |x| and |y| in cm: other secondaries give no light
# Light of soft particles everywhere: photons per GeV lost, in a calorimeter without end, at most HAZE_LIMIT,
# and the width of their log-normal distribution.
HAZE = {"charged": (0.735, 0.6), "neutral": (0.21, 1.5)}
HAZE_LIMIT = 1.0


class Particles(NamedTuple):
    """Particles in flight: `row` of the response, energy in GeV, position in cm, slopes dx/dz and dy/dz."""
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
    """Isotropic two-body decay, boosted [PDG, Kinematics, Eq. 49.17]. Yields for each daughter its energy,
    its momentum along the parent and the two across it, in GeV, shapes (N,)."""
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


def dipole_kick(charge, energy):
    """Change of dx/dz at the dipole."""
    return charge * BEAM_CM / (FLIGHT_CM - MAGNET_CM) * 7000 / energy.clip(1.0)


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
            length = rng.exponential(species.ctau * here.energy / (species.mass / 1000))   # gamma beta c tau
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
    kick = dipole_kick(species.charge, here.energy) * ((here.z < MAGNET_CM) & (z > MAGNET_CM))
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
    bend = dipole_kick(charge, particles.energy) * (particles.z < MAGNET_CM) * (FLIGHT_CM - MAGNET_CM)
    x, y = particles.x + particles.slope_x * left + bend, particles.y + particles.slope_y * left
    return Arrivals(particles.row, particles.pdg == 22, particles.energy, x, y, charge, bend)


def _scrape(rng, at):
    """Collisions with the beam pipe: the Arrivals behind it, and the haze (Lights) of soft particles.

    A particle outside the aperture meets the pipe and ends in a spray of secondaries. In ZP's window most
    protons lose only a little energy and go on.
    """
    charged = at.charge != 0
    low, high, tall = WINDOW_CM
    window = charged & (at.x > low) & (at.x < high) & (np.abs(at.y) < tall)
    wide = np.hypot(at.x - at.bend, at.y) > COLLIMATOR_CM
    inside = np.maximum(np.abs(at.x), np.abs(at.y)) < APERTURE_CM
    places = [inside, window & wide, window, charged]
    chances = [HIT[place] for place in ("inside", "collimator", "window", "charged")]
    chance = np.select(places, chances, HIT["neutral"])
    hit = rng.random(len(at.row)) < chance
    thin = window & (rng.random(len(at.row)) < np.where(wide, THIN["collimator"], THIN["window"]))
    missed, at, thin = _pick(at, ~hit), _pick(at, hit), thin[hit]
    lost = np.where(thin, rng.beta(*LOST_THIN, len(thin)), rng.beta(*LOST_THICK, len(thin)))
    spray, x = _spray(rng, at, lost, thin)
    rest = _pick(at._replace(energy=at.energy * (1 - lost)), thin)
    return _join([missed, rest, spray]), _haze(rng, at, lost, x)


def _spray(rng, at, lost, thin):
    """Secondaries (Arrivals) of collisions that cost the share `lost` of the energy, and the x (N,) of their
    centre. They lie (transverse momentum / energy) x distance away from the line of the particle."""
    size, charged = (len(at.row), SECONDARIES), at.charge != 0
    swept = rng.beta(*SWEPT, len(at.row))
    forward = np.select([thin, charged, at.em], [1.0, swept, FORWARD["photon"]], FORWARD["neutral"])
    even = np.where(charged, EVEN["charged"], EVEN["neutral"])
    share = rng.standard_gamma(even[:, None], size) + 1e-9                              # (N, SECONDARIES)
    energy = share * (forward * lost * at.energy / share.sum(1))[:, None]
    far, near = (rng.uniform(*UPSTREAM_CM[kind], len(at.row)) for kind in ("charged", "neutral"))
    kick = np.select([at.em, charged], [KICK["photon"], KICK["charged"]], KICK["neutral"])
    momentum = kick[:, None] * np.sqrt(rng.standard_exponential(size))
    radius = momentum * np.where(charged, far, near)[:, None] / energy
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
    """Lights at x (N,) and the particle's y: soft particles from the pipe, too many to be followed."""
    (much, narrow), (little, broad) = HAZE["charged"], HAZE["neutral"]
    charged = at.charge != 0
    spread = np.where(charged, narrow, broad)
    yields = np.where(charged, much, little) * np.exp(spread * rng.standard_normal(len(x)) - spread**2 / 2)
    photons = lost * at.energy * np.minimum(yields, HAZE_LIMIT)
    return Lights(at.row, photons, x, at.y, np.ones(len(x)), np.full(len(x), HAZY))


# ------------------------------------------------------------------------------------------ showers and light

# Lateral profiles, PROFILES[Lights.profile], as sums of (share of the light, scale in cm in tungsten, law):
# "exp" is exp(-r / scale) in the plane, "tail" is (1 + r^2 / scale^2)^-2 (Grindhammer and Peters,
# hep-ex/0001020, Eq. 14). [C] on [P]: a photon that gives 300 photons of light has a third of them within +-1
# fibre, a neutron that gives 1000 has a peak of 30 to 60 and a halo over +-10 fibres.
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
    """Light sources: `row`, expected photons, position in cm, width relative to a profile, its number."""
    row: np.ndarray
    photons: np.ndarray
    x: np.ndarray
    y: np.ndarray
    width: np.ndarray
    profile: np.ndarray


def _electromagnetic(rng, detector, at):
    """Electromagnetic showers: one source per photon, with a sampling fluctuation of 38 % / sqrt(E) and a
    constant term of 2 % [TDR]. Showers that start late are narrow, early ones wide [C]."""
    n = len(at.row)
    resolution = np.sqrt(0.38**2 / at.energy + 0.02**2)
    photons = detector.light * at.energy * np.maximum(1 + resolution * rng.standard_normal(n), 0.0)
    width = np.exp(np.maximum(0.32 * rng.standard_normal(n), -0.62))
    return Lights(at.row, photons, at.x, at.y, width, np.full(n, SHOWERY))


CASCADES = 14          # pi0 cascades of a hadronic shower [C]
CASCADE_SHAPE = 0.4    # of the gamma distribution of their shares of the light [C]
CASCADE_KT = 0.35      # GeV, their transverse momentum at the first interaction [C]
PI0_SPREAD = 20.0      # a + b of the beta distribution of the pi0 share of the energy [C]
HADRON_LIGHT = 0.88    # light of a pi0 cascade in a hadronic shower relative to a photon's of that energy [C]
QUENCHED = 0.3         # the same for what is not pi0: most hadrons are too slow for Cherenkov light [C]
FAINT = 0.2            # photons; fainter cascades are left out


def _hadronic(rng, detector, at):
    """Hadronic showers: cascades of pi0 with their own positions, and a halo. The pi0 share of the energy is
    beta distributed around 1 - E^-0.18 (Gabriel et al., NIM A 338, 336)."""
    n, size = len(at.row), (len(at.row), CASCADES)
    mean = np.clip(1 - np.maximum(at.energy, 1.5) ** -0.18, 0.1, 0.95)
    pi0 = rng.beta(PI0_SPREAD * mean, PI0_SPREAD * (1 - mean))
    photons = HADRON_LIGHT * detector.light * at.energy * np.exp(0.05 * rng.standard_normal(n))
    share = rng.standard_gamma(CASCADE_SHAPE, size) + 1e-12                             # (N, CASCADES)
    share /= share.sum(1, keepdims=True)
    depth = detector.interaction * (1 + rng.standard_exponential(size))
    energy = np.maximum(share * (at.energy * pi0)[:, None], 0.5)
    radius = CASCADE_KT * np.sqrt(rng.standard_exponential(size)) * depth / energy
    radius = np.minimum(radius, 3 * detector.spread * rng.random(size))   # soft ones are absorbed on the way
    phi = rng.uniform(0, 2 * np.pi, size)
    x, y = at.x[:, None] + radius * np.cos(phi), at.y[:, None] + radius * np.sin(phi)
    light, row = share * (photons * pi0)[:, None], np.broadcast_to(at.row[:, None], size)
    keep = light > FAINT
    width = 1.1 * np.exp(0.2 * rng.standard_normal(keep.sum()))
    core = Lights(row[keep], light[keep], x[keep], y[keep], width, np.full(keep.sum(), SHOWERY))
    width = np.exp(0.25 * rng.standard_normal(n))
    halo = Lights(at.row, QUENCHED * (1 - pi0) * photons, at.x, at.y, width, np.full(n, HALOED))
    return _join([core, halo])


def _tracks(rng, detector, lights, share, scale, law):
    """Random tracks of one component of a profile: row (T,) and fibre ix (T,), iy (T,), inside the matrix."""
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
    """Photons per fibre, uint16 (rows, H, W): each track gives its fibre a geometric number of photons."""
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


def run_uncut(rng, detector, particles, pdg):
    """One independent run of each particle, without the cut: uint16 (N, H, W)."""
    energy, vx, vy, vz, px, py, pz = particles[:, :7].astype(np.float64).T
    z = np.sign(pz) * vz   # both sides are alike: z counts towards the ZDC to which the particle flies
    slopes = px / np.abs(pz), py / np.abs(pz)
    start = Particles(np.arange(len(pdg)), pdg.astype(np.int64), energy, vx, vy, z, *slopes)
    at, haze = _scrape(rng, _arrive(_decay(rng, start)))
    photons = _electromagnetic(rng, detector, _pick(at, at.em))
    hadrons = _hadronic(rng, detector, _pick(at, ~at.em))
    return _respond(rng, detector, len(pdg), _join([photons, hadrons, haze]))


BLOCK = 2000          # runs simulated at a time: bounds the memory


def simulate(detector, particles, pdg, seed, cut=CUT, tries=3000):
    """The oracle: an independent run of every particle, repeated until it has at least `cut` photons.

    particles (N, 9) as FEATURES, pdg (N,); returns uint16 (N, H, W). A row that fails `tries` times keeps its
    last run.
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
            runs = run_uncut(rng, detector, particles[which], pdg[which])
            passed = (runs.sum((1, 2)) >= cut).reshape(-1, copies)
            first = passed.argmax(1)                          # 0 where none passed
            responses[block] = runs[np.arange(len(block)) * copies + first]
            attempts[block] += copies
            failed.append(block[~passed.any(1)])
        todo = np.concatenate(failed)
        todo = todo[attempts[todo] < tries]
    return responses


def simulated_blocks(name, n, seed=0, fresh=False, quiet=False):
    """Random runs of the primaries until `n` have passed the cut, in blocks: responses uint16 (B, H, W),
    particles (B, 9) and pdg (B,)."""
    detector = DETECTORS[name]
    particles, pdg, weights = primaries(seed, fresh)
    rng = np.random.default_rng([VERSION, seed, int(fresh), sorted(DETECTORS).index(name)])
    filled = 0
    with common.progress(n, f"simulating {name.upper()} responses", quiet) as bar:
        while filled < n:
            which = rng.choice(len(pdg), BLOCK, p=weights)
            runs = run_uncut(rng, detector, particles[which], pdg[which])
            passed = np.flatnonzero(runs.sum((1, 2)) >= CUT)[:n - filled]
            yield runs[passed], particles[which[passed]], pdg[which[passed]]
            filled += len(passed)
            bar.update(len(passed))
