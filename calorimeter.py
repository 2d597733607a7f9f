"""Calorimeters of the CaloChallenge [CaloChallenge]: geometry, shower files, an open stand-in, features.

A shower is the energy that one electron of 1 GeV to 1 TeV deposits in the voxels of a cylinder, layer by
layer, in MeV: showers (N, Z, A, R) with Z layers, A bins of the angle and R rings. The files of the challenge
lie on Zenodo and not here. A parametrised simulation (GFlash, hep-ex/0001020) in their format stands in for
them; it is not Geant4, and `python -m benchmarks.check ds2` puts its statistics beside the published ones.
What it is good for is an oracle: the same electrons again give the ideal value of every score.

    python calorimeter.py --set ds2 --n 100000 --out ds2.hdf5      open showers in the format of the challenge
    python calorimeter.py --set ds3 --n 1000 --out ds3.hdf5 --binning ds3.xml         and their binning file
"""
import os
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

import common
import data
import files
from common import UserError

VERSION = 1                # of the simulated bytes: raised whenever a number below that moves them is changed
THRESHOLD = 0.01515        # MeV; the challenge's files hold no smaller voxel [CaloChallenge]
ENERGIES = 1e3, 1e6        # MeV, of the electrons, log-uniform [CaloDREAM, Eq. 1]


# --------------------------------------------------------------------------------------------------- geometry

class Calorimeter(NamedTuple):
    """A cylinder of equal layers: shape (layers, bins of the angle, rings), edges (R + 1) of the rings in mm.
    `thickness` of a layer, mm, matters to the stand-in only. Angular bin 0 starts at -pi."""
    name: str
    shape: tuple
    edges: tuple
    thickness: float

    @property
    def middles(self):
        """Middle radius (R,) of the rings in mm, and middle angle (A,) of the bins."""
        edges, bins = np.array(self.edges), self.shape[1]
        return (edges[1:] + edges[:-1]) / 2, np.pi * ((2 * np.arange(bins) + 1) / bins - 1)


def _rings(number, width):
    return tuple((width * np.arange(number + 1)).tolist())


# [CaloChallenge]; "small" is ours, the same stack in coarser bins, for tests and a first run
LAYER = 3.4                # mm
CALORIMETERS = {"ds2": Calorimeter("ds2", (45, 16, 9), _rings(9, 4.65), LAYER),
                "ds3": Calorimeter("ds3", (45, 50, 18), _rings(18, 2.325), LAYER),
                "small": Calorimeter("small", (10, 8, 5), _rings(5, 8.37), 15.3)}


def read_binning(path):
    """The Calorimeter of a binning file of the challenge (XML). UserError unless its layers are equal."""
    try:
        layers = ElementTree.parse(path).getroot().findall(".//Layer")
        bins = [(tuple(map(float, layer.attrib["r_edges"].split(","))), int(layer.attrib["n_bin_alpha"]))
                for layer in layers]
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path}: expected the binning of a calorimeter as XML: {error}") from None
    if len(set(bins)) != 1:
        raise UserError(f"{path}: expected layers of equal bins, found {len(set(bins))} kinds")
    (edges, angles), = set(bins)
    rise = np.diff(edges)
    if edges[0] != 0 or not len(rise) or not ((rise > 0) & np.isfinite(rise)).all() or angles < 1:
        raise UserError(f"{path}: expected r_edges that rise from 0 and at least one angular bin")
    shape = len(layers), angles, len(edges) - 1
    known = {calorimeter.shape: calorimeter for calorimeter in CALORIMETERS.values()}
    found = Calorimeter(Path(path).stem, shape, edges, LAYER)
    return known.get(shape, found)._replace(edges=edges)


def write_binning(path, calorimeter):
    """Write the binning file (XML) of a Calorimeter."""
    root = ElementTree.Element("Bins")
    particle = ElementTree.SubElement(root, "Bin", pid="11", name="electron")
    edges = ",".join(f"{edge:.6g}" for edge in calorimeter.edges)
    for layer in range(calorimeter.shape[0]):
        ElementTree.SubElement(particle, "Layer", id=str(layer), r_edges=edges,
                               n_bin_alpha=str(calorimeter.shape[1]))
    ElementTree.indent(root)
    with files.write_atomic(path) as temporary:
        ElementTree.ElementTree(root).write(temporary)


# ------------------------------------------------------------------------------------------------------ files

class Showers(NamedTuple):
    """Incident energies float32 (N,) and voxels float32 (N, Z, A, R), both in MeV."""
    energies: np.ndarray
    voxels: np.ndarray


def save_showers(path, calorimeter, total, blocks):
    """Stream blocks of Showers, `total` together, into one file of the challenge's format."""
    named = ({"incident_energies": block.energies[:, None],
              "showers": block.voxels.reshape(len(block.energies), -1)} for block in blocks)
    data.save_blocks(path, total, named, calorimeter=calorimeter.name, version=VERSION)


def load_showers(path, calorimeter, n=None):
    """Read and check the first `n` showers, if None all, of a file. UserError for what is missing, damaged,
    of another calorimeter, or out of range."""
    energies, voxels = _read(path, ("incident_energies", "showers"), n)
    if voxels.ndim != 2 or voxels.shape[1] != np.prod(calorimeter.shape):
        raise UserError(f"{path}: expected showers of {np.prod(calorimeter.shape)} voxels "
                        f"{calorimeter.shape}, not of shape {voxels.shape}; see --set and --binning")
    if len(voxels) != len(energies):
        raise UserError(f"{path}: {len(energies)} incident energies for {len(voxels)} showers")
    for k in range(0, len(voxels), 4096):
        if not (np.isfinite(voxels[k:k + 4096]).all() and (voxels[k:k + 4096] >= 0).all()):
            raise UserError(f"{path}: showers hold negative or non-finite energies, expected MeV")
    return Showers(check_energies(path, energies), voxels.reshape(-1, *calorimeter.shape))


def read_energies(path):
    """Incident energies float32 (N,) in MeV of a file of showers (HDF5) or of a list, one in a line (CSV)."""
    if Path(path).suffix in (".h5", ".hdf5"):
        return check_energies(path, *_read(path, ("incident_energies",)))
    try:
        lines = Path(path).read_text().split()
        return check_energies(path, np.array([float(line) for line in lines if line != "incident_energies"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected one energy in MeV in each line: {error}") from None


def _read(path, names, n=None):
    """The first n rows of the data sets `names` of an HDF5 file, float32."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with h5py.File(path) as file:
            if missing := [name for name in names if not isinstance(file.get(name), h5py.Dataset)]:
                raise ValueError(f"the data set {missing[0]} is missing")
            return [file[name][:n].astype(np.float32) for name in names]
    except Exception as error:   # h5py raises nearly every type of error on a damaged file
        raise UserError(f"{path}: expected an HDF5 file with {' and '.join(names)}: {error}") from None


def check_energies(path, energies):
    """Energies as float32 (N,). UserError unless all of them are between 1 GeV and 1 TeV, in MeV."""
    if energies.shape not in ((len(energies),), (len(energies), 1)) or not len(energies):
        raise UserError(f"{path}: expected incident energies of shape (N, 1), not {energies.shape}")
    low, high = ENERGIES
    if not ((energies >= 0.999 * low) & (energies <= 1.001 * high)).all():
        raise UserError(f"{path}: expected incident energies of {low:g} to {high:g} MeV, found "
                        f"{energies.min():g} to {energies.max():g}")
    return energies.reshape(-1).astype(np.float32)


# --------------------------------------------------------------------------------------------------- stand-in
# GFlash: a shower's depth is gamma distributed, its radial density is 2 r R^2 / (r^2 + R^2)^2 for a core and
# a tail (hep-ex/0001020, appendix; its constants stand below as numbers). Added to it: branches, a diffuse
# halo and the electron's own track.

# Two sheets of 1.4 mm W and 0.3 mm Si in a layer of 3.4 mm (Geant4, example Par04); GFlash's mixture of both
RADIATION_MM, MOLIERE_MM, CRITICAL_MEV = 4.221, 10.87, 8.233
Z, F, E_HAT = 72.49, 1 / 2.483, 1 - 0.7042      # effective Z, 1 / F_s, 1 - e^

# Constants of the stand-in, found by CMA-ES from the published statistics of ds2 (benchmarks/check.py)
MODEL = {
    "mean": 0.839,          # E_tot / E_inc, before what leaks out of the cylinder
    "sampling": 0.298,      # its relative width at 1 GeV, which falls with the root of the energy
    "alpha": 0.664,         # GFlash's <alpha> times this
    "depth": -0.96,         # added to GFlash's <T>, in X0
    "spread": 0.347,        # GFlash's fluctuations of ln T and ln alpha times this
    "radii": 1.47,          # GFlash's radii times this
    "shares": 0.908,        # Dirichlet parameter of the energies of the branches
    "first": 0.159,         # X0, mean depth at which the shower begins
    "start": 1.48,          # X0, mean depth from there at which a branch begins
    "angle": 0.38,          # mm per X0 that a branch of 1 GeV drifts from the axis; as 1 / sqrt E
    "layer": 0.0509,        # relative fluctuation of 1 GeV in a layer
    "spot": 13.3,           # MeV, mean energy of a spot far from the axis; Poisson many fall into a voxel
    "fine": 1.3,            # mm; at this distance from the axis a spot has half of that energy
    "spot_shape": 0.224,    # of the gamma distribution of a spot's energy
    "halo": 0.0456,         # of the energy, in a diffuse halo of photons and neutrons
    "upstream": 5.13,       # layers of ds2, reach of the halo towards the front
    "downstream": 4.75,     # and towards the back
    "early": 0.00448,       # of the energy, mean of what is radiated and converted before GFlash's profile
    "early_shape": 1.27,    # of its gamma distribution
    "early_reach": 0.64,    # layers of ds2
    "halo_radius": 2.28,    # Moliere radii
    "halo_spot": 1.25,      # MeV
    "halo_shape": 0.408,
    "track": 3.82,          # MeV, a minimum-ionising electron in one sheet of silicon
}
BRANCHES = 4
BLOCK = 250                # showers simulated at a time, with random numbers of their own: it fits the cache


def draw_energies(n, seed):
    """Incident energies float32 (n,) in MeV of the open data set, log-uniform."""
    low, high = np.log(ENERGIES)
    return np.exp(np.random.default_rng([VERSION, seed, 2]).uniform(low, high, n)).astype(np.float32)


def simulate(calorimeter, energies, seed, model=MODEL):
    """Showers of electrons of `energies` (N,), MeV, as the stand-in makes them: float32 (N, Z, A, R) in MeV.
    Block by block, in two threads; the same arguments give the same bytes."""
    starts = range(0, len(energies), BLOCK)
    draw = lambda k: _simulate(np.random.default_rng([VERSION, k, seed]), calorimeter,
                               energies[k:k + BLOCK].astype(np.float64) / 1e3, model)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # NumPy lets go of the interpreter
        return np.concatenate([np.zeros((0, *calorimeter.shape), np.float32), *pool.map(draw, starts)])


def _simulate(rng, calorimeter, energy, m):
    """One block; energy (N,) in GeV."""
    layers, angles, _ = calorimeter.shape
    n, step = len(energy), calorimeter.thickness / RADIATION_MM                # X0 of a layer
    edges = step * np.arange(layers + 1)
    share, start, t_max, alpha, mean_alpha = _branches(rng, energy, m)         # (N, B) each
    inside = _depth_profile(edges, start, alpha, t_max, share)                 # (N, B, Z)
    reach = np.exp(-edges / step * calorimeter.thickness / LAYER / m["early_reach"])
    inside[:, 0] -= m["early"] * _gamma(rng, np.full((n, 1), m["early_shape"])) * np.diff(reach)
    core, tail, p = _radii(energy, edges, start, t_max, alpha, mean_alpha, m)                   # (N, B, Z)
    ring = p[..., None] * _ring_shares(core, calorimeter)
    ring += (1 - p)[..., None] * _ring_shares(tail, calorimeter)

    visible = 1e3 * energy * m["mean"] * _gamma(rng, energy / m["sampling"]**2)
    per_layer = inside.sum(1)                                                  # (N, Z), of all the energy
    wobble = _gamma(rng, per_layer * energy[:, None] / m["layer"]**2)
    spread = (1 - m["halo"]) * visible[:, None, None] * inside * wobble[:, None]                  # (N, B, Z)
    expected = _turned(rng, (spread[..., None] * ring).astype(np.float32), energy[:, None] * share,
                       np.maximum((edges[1:] + edges[:-1]) / 2 - start[..., None], 0),
                       p * core + (1 - p) * tail, calorimeter, m)              # (N, Z, A, R)
    r = calorimeter.middles[0]
    voxels = _spots(rng, expected, (m["spot"] * r / (r + m["fine"])).astype(np.float32), m["spot_shape"])

    halo = m["halo"] * visible[:, None] * (per_layer @ _halo_reach(layers, calorimeter.thickness, m))
    halo = halo[:, :, None] * _ring_shares(np.full(1, m["halo_radius"] * MOLIERE_MM), calorimeter) / angles
    voxels += _spots(rng, np.repeat(halo[:, :, None].astype(np.float32), angles, 2), m["halo_spot"],
                     m["halo_shape"])
    _add_track(rng, voxels, step, calorimeter.thickness / 1.7, m)
    voxels[voxels < THRESHOLD] = 0
    return voxels


def _gamma(rng, shape):
    """Gamma distributed factors of mean 1 and relative variance 1 / shape."""
    shape = np.maximum(shape, 1e-9)
    return rng.standard_gamma(shape) / shape


def _branches(rng, energy, m):
    """Early branching: shares of the energy, depths of the start in X0, and GFlash's T and alpha of each
    branch, with its mean alpha; (N, B) each."""
    n = len(energy)
    share = rng.dirichlet(np.full(BRANCHES, m["shares"]), n)
    start = m["start"] * rng.standard_exponential((n, BRANCHES))
    start[:, 0] = 0
    start += m["first"] * rng.standard_exponential((n, 1))
    y = np.log(np.maximum(1e3 * energy[:, None] * share, 30.0) / CRITICAL_MEV)                   # ln y
    mean_t = np.log(np.maximum(y - 0.812 - 0.55 * F - 0.69 * E_HAT + m["depth"], 0.3))
    mean_alpha = np.log(np.maximum((0.81 + (0.458 + 2.26 / Z) * y - 0.476 * F) * m["alpha"], 1.2))
    sigma_t, sigma_alpha = (m["spread"] / np.clip(s, 2, None) for s in (1.25 * y - 2.5, 0.79 * y - 0.82))
    rho, (z1, z2) = 0.784 - 0.023 * y, rng.standard_normal((2, *y.shape))
    plus, minus = np.sqrt((1 + rho) / 2) * z1, np.sqrt((1 - rho) / 2) * z2
    t_max = np.exp(mean_t + sigma_t * (plus + minus))
    alpha = np.maximum(np.exp(mean_alpha + sigma_alpha * (plus - minus)), 1.05)
    return share, start, t_max, alpha, np.exp(mean_alpha)


def _depth_profile(edges, start, alpha, t_max, share, fine=4):
    """Shares (N, B, Z) of the incident energy in each layer: the gamma distribution of the depth, summed over
    `fine` points of a layer. It is normalised on twice the depth, so that late showers leak."""
    step, layers = edges[1], len(edges) - 1
    t = (step * (np.arange(2 * fine * layers) + 0.5) / fine).astype(np.float32)
    beta = ((alpha - 1) / t_max)[..., None].astype(np.float32)
    depth = np.maximum(t - start[..., None].astype(np.float32), 1e-3)
    density = np.exp((alpha - 1)[..., None].astype(np.float32) * np.log(depth) - beta * depth)
    density *= (t > start[..., None])
    density *= (share / np.maximum(density.sum(-1), 1e-30))[..., None]
    return density[..., :fine * layers].reshape(*share.shape, layers, fine).sum(-1)


def _radii(energy, edges, start, t_max, alpha, mean_alpha, m):
    """Radii of core and tail in mm, and the share of the core, (N, B, Z) each."""
    factor = (alpha - 1) / alpha * mean_alpha / (mean_alpha - 1) / t_max
    tau = np.maximum((edges[1:] + edges[:-1]) / 2 - start[..., None], 0) * factor[..., None]
    tau, log_e = np.minimum(tau, 8), np.log(energy)[:, None, None]
    core = 0.0251 + 0.00319 * log_e + (0.1162 - 0.000381 * Z) * tau
    core += -0.0203 * E_HAT + 0.0397 * F * np.exp(-tau)
    tail = (0.659 - 0.00309 * Z) * (np.exp(-2.59 * (tau - 0.645)) + np.exp((0.3585 + 0.0421 * log_e)
                                                                           * (tau - 0.645)))
    tail += -0.14 * E_HAT - 0.495 * F * np.exp(-tau)
    q = (0.401 + 0.00187 * Z - tau) / (1.313 - 0.0686 * log_e)
    p = (2.632 - 0.00094 * Z) * np.exp(q - np.exp(q)) + E_HAT * (0.348 - 0.642 * F * np.exp(-(tau - 1)**2))
    scale = m["radii"] * MOLIERE_MM
    return np.maximum(core, 0.01) * scale, np.maximum(tail, 0.05) * scale, np.clip(p, 0, 1)


def _ring_shares(radius, calorimeter):
    """Shares (..., R) of the rings in the radial density of `radius` (...), mm."""
    squares = np.array(calorimeter.edges)**2
    return np.diff(squares / (squares + radius[..., None]**2), axis=-1)


def _turned(rng, per_ring, energy, depth, radius, calorimeter, m):
    """Energies (N, Z, A, R) of `per_ring` (N, B, Z, R), summed over the branches. A branch drifts from the
    axis by d into a direction of its own: over the angle D from there, a density 2 R^2 r / (r^2 + R^2)^2
    that is d off the axis goes as (1 - q^2)^(3/2) / (1 - q cos D)^2 with q = 2 r d / (r^2 + R^2 + d^2)."""
    r, angle = calorimeter.middles
    drift = m["angle"] * np.sqrt(rng.standard_exponential(energy.shape) / np.maximum(energy, 0.03))
    d = np.minimum(drift[..., None] * depth, 20)[..., None]                    # (N, B, Z, 1), mm
    q = (2 * r * d / (r**2 + radius[..., None]**2 + d**2)).astype(np.float32)[:, :, :, None]
    direction = rng.uniform(-np.pi, np.pi, energy.shape)
    cosine = np.cos(angle - direction[..., None]).astype(np.float32)[:, :, None, :, None]    # (N, B, 1, A, 1)
    weight = (per_ring[:, :, :, None] * (1 - q**2)**1.5 / len(angle)).astype(np.float32)
    return sum(weight[:, b] / np.square(1 - q[:, b] * cosine[:, b]) for b in range(energy.shape[1]))


def _spots(rng, expected, size, shape):
    """Voxels of mean `expected`, in MeV: Poisson many spots of `size`, gamma distributed with `shape`."""
    number = rng.poisson(expected / size)
    lit = np.nonzero(number)
    voxels = np.zeros(expected.shape, np.float32)
    voxels[lit] = rng.standard_gamma(shape * number[lit]) * np.broadcast_to(size / shape, number.shape)[lit]
    return voxels


def _halo_reach(layers, thickness, m):
    """Shares (Z, Z) of the halo of a layer's energy (row) in the layers (column): exponential both ways."""
    apart = (np.arange(layers) - np.arange(layers)[:, None]) * thickness / LAYER
    reach = np.where(apart < 0, np.exp(apart / m["upstream"]), np.exp(-apart / m["downstream"]))
    whole = np.exp(-np.arange(400) * thickness / LAYER / m["upstream"]).sum()
    return reach / (whole + np.exp(-np.arange(1, 400) * thickness / LAYER / m["downstream"]).sum())


def _add_track(rng, voxels, step, sheets, m):
    """The electron's own track in the first ring: minimum-ionising in the `sheets` of silicon of each layer
    until it has radiated, some X0 deep."""
    n, layers, angles, _ = voxels.shape
    middle = step * (np.arange(layers) + 0.5)
    alive = np.exp(-np.maximum(middle - rng.standard_exponential((n, 1)), 0))
    number = rng.poisson(sheets * alive)
    deposit = rng.standard_gamma(np.maximum(4.0 * number, 1e-9)) * (m["track"] / 4) * (number > 0)
    rows, depth = np.indices(number.shape)
    voxels[rows, depth, rng.integers(0, angles, number.shape), 0] += deposit.astype(np.float32)


def open_showers(calorimeter, n, seed=0, quiet=False):
    """The open data set of a Calorimeter, simulated on first use and kept: Showers of `n` electrons."""
    path = common.cache_folder() / f"{calorimeter.name}-{n}-seed{seed}-v{VERSION}.hdf5"
    if not path.exists():
        write_open_showers(path, calorimeter, n, seed, quiet)
    return load_showers(path, calorimeter)


def write_open_showers(path, calorimeter, n, seed=0, quiet=False):
    """Simulate the open data set into a file of the challenge's format."""
    save_showers(path, calorimeter, n, simulated_blocks(calorimeter, n, seed, quiet))


def simulated_blocks(calorimeter, n, seed=0, quiet=False):
    """The open data set, block by block: Showers."""
    energies, size = draw_energies(n, seed), 8 * BLOCK
    for k in common.progress(range(0, n, size), f"simulating {calorimeter.name}", quiet):
        part = energies[k:k + size]
        yield Showers(part, simulate(calorimeter, part, (seed << 32) + k))


# --------------------------------------------------------------------------------------------------- features

def features(showers, calorimeter, cut=0.0):
    """High-level features (N, 8 Z + 2) of Showers, 362 for 45 layers, as the challenge's classifier sees them
    [CaloChallenge]: log10 E_inc; log10 of the layers' energies; centres and widths in eta = r cos(angle) and
    phi = r sin(angle) [CaloDREAM, Eq. 18], in 100 mm; log10 E_tot; the share of empty voxels in each layer;
    centres and widths in r. Voxels of at most `cut` MeV [CaloDREAM, Eq. 20] count as empty."""
    r, angle = calorimeter.middles
    axes = (np.cos(angle)[:, None] * r, np.sin(angle)[:, None] * r, np.broadcast_to(r, (len(angle), len(r))))
    moments = np.stack([np.ones_like(axes[0]), *axes, *np.square(axes)], axis=-1)
    moments = moments.reshape(-1, 7).astype(np.float32)
    parts = []
    for k in range(0, len(showers.energies), 1024):
        voxels = showers.voxels[k:k + 1024].reshape(-1, calorimeter.shape[0], len(moments))
        voxels = np.where(voxels > cut, voxels, 0)
        sums = (voxels @ moments).astype(np.float64)                            # (N, Z, 7)
        energy, means, squares = sums[..., 0], *np.split(sums[..., 1:] / (sums[..., :1] + 1e-8), 2, axis=-1)
        widths = np.sqrt(np.maximum(squares - means**2, 0)) / 100               # (N, Z, 3)
        means, empty = means / 100, (voxels == 0).mean(-1)
        log = lambda e: np.log10(e + 1e-8)
        parts.append(np.concatenate([
            log(showers.energies[k:k + 1024, None]), log(energy), means[..., 0], means[..., 1],
            widths[..., 0], widths[..., 1], log(energy.sum(1, keepdims=True)), empty,
            means[..., 2], widths[..., 2]], axis=1))
    return np.concatenate(parts).astype(np.float32)


def ring_depths(voxels):
    """Mean layer of the energy in each ring, (N, R), 0 where a ring is empty [CaloDREAM, Eq. 19]."""
    rings = voxels.sum(2, dtype=np.float64)                                     # (N, Z, R)
    return np.einsum("z,nzr->nr", np.arange(voxels.shape[1]), rings) / np.maximum(rings.sum(1), 1e-8)


def main(argv=None):
    """Write an open data set; returns its path."""
    parser = common.parser(__doc__, "calorimeter", flags=("n", "seed", "out", "quiet"), n=100_000)
    parser.add_argument("--set", dest="detector", choices=CALORIMETERS, default="ds2",
                        help="binning of the challenge's data set 2 or 3, or our small one (default: ds2)")
    parser.add_argument("--binning", type=Path, metavar="FILE", help="write the binning file (XML) as well")
    args = parser.parse_args(argv)
    calorimeter = CALORIMETERS[args.detector]
    out = args.out or Path(f"{calorimeter.name}.hdf5")
    write_open_showers(out, calorimeter, args.n, args.seed, args.quiet)
    if args.binning:
        write_binning(args.binning, calorimeter)
    print(f"{args.n} showers of {calorimeter.name} -> {out}")
    return out


if __name__ == "__main__":
    common.run(main)
