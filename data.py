"""Data sets: files, splits, conditions; what a detector is to a network; photon counts as numbers and as
distributions.

A data set holds `responses` uint16 (N, H, W), photons per fibre; `particles` float32 (N, 9), as FEATURES, in
GeV, cm, MeV and units of e; `pdg` int32 (N,). Without --data it is the open data set of simulator.py,
simulated on first use and kept in the cache folder.

    python data.py --detector zn --out zn.h5     write the open data set, by default 306 780 rows (ZN), 129 676 (ZP)
"""
import io
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np

import common
import simulator
from common import UserError
from simulator import CUT, DETECTORS, FEATURES, VERSION

BEAM_GEV = 7100.0     # more than the LHC's protons have: larger energies are in MeV by mistake
UNSEEN = 20_000       # rows of fresh particles to test on, at most
ROWS = {"zn": 306_780, "zp": 129_676}   # of the papers' data sets


class Dataset(NamedTuple):
    responses: np.ndarray   # uint16 (N, H, W), photons
    particles: np.ndarray   # float32 (N, 9), as FEATURES
    pdg: np.ndarray         # int32 (N,); 0 where a file does not say


class Split(NamedTuple):
    """Row numbers of the three parts of a data set."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


# ------------------------------------------------------------------------------------------------------ files

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


def simulate_dataset(name, n, seed=0, fresh=False, quiet=False):
    """The open data set of open_data, simulated."""
    try:
        dataset = Dataset(np.empty((n, *DETECTORS[name].shape), np.uint16),
                          np.empty((n, len(FEATURES)), np.float32), np.empty(n, np.int32))
    except MemoryError as error:
        raise UserError(f"--n {n}: {error}") from None
    filled = 0
    for block in simulator.simulated_blocks(name, n, seed, fresh, quiet):
        for whole, part in zip(dataset, block):
            whole[filled:filled + len(part)] = part
        filled += len(block[0])
    return dataset


def open_data(name, n=None, seed=0, fresh=False, quiet=False):
    """The open data set of detector `name`: `n` rows (the published number if None), simulated on first use
    and cached.

    The same (name, n, seed, VERSION) gives the same bytes. `fresh=True` holds other particles of the same
    spectrum: none of them occurs in the plain set of that seed.
    """
    n = n or ROWS[name]
    path = common.cache_folder() / f"{name}-{n}-seed{seed}{'-fresh' * fresh}-v{VERSION}.h5"
    if path.exists():
        return load(path, name)
    dataset = simulate_dataset(name, n, seed, fresh, quiet)
    save(path, dataset, detector=name, seed=seed)
    return dataset


def load(path, name):
    """Read and check a data set: this file's HDF5, or the papers' pair of npz files (a folder, or either of
    the two).

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

    Raises UserError for another shape, values that are not finite, and energies that do not fit E^2 = p^2 +
    m^2 within 2 % (momenta in MeV or masses in GeV, for instance) or exceed the beam's.
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
    """A particle list for generation: HDF5 (`particles`, optional `pdg`), npz (N, 9 or 10, key arr_0) or CSV
    with a header.

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


# ----------------------------------------------------------------------------- splits, conditions and batches

def split_rows(n, seed):
    """Random rows, 70 / 10 / 20 %, as the papers: a Split."""
    order = np.random.default_rng([seed, 70]).permutation(n)
    return Split(*np.split(order, [int(0.7 * n), int(0.8 * n)]))


def unique_particles(particles):
    """Rows with equal features are runs of one particle: ids (N,) from 0 and the first row of each particle (U,)."""
    keys = np.ascontiguousarray(particles, np.float32).view(f"V{4 * particles.shape[1]}").ravel()
    _, first, ids = np.unique(keys, return_index=True, return_inverse=True)
    return ids.ravel(), first


def split_particles(particles, seed):
    """70 / 10 / 20 % of the particles with all of their runs: no particle of one part occurs in another."""
    ids, first = unique_particles(particles)
    parts = split_rows(len(first), seed)
    return Split(*(np.flatnonzero(np.isin(ids, part)) for part in parts))


def select(dataset, rows):
    """The Dataset of the given rows."""
    return Dataset(*(field[rows] for field in dataset))


def open_split(args):
    """(Dataset, Split): what --detector, --data, --n and --split name; a loaded model meets the rows of its
    own training. UserError where the training rows do not fill a --batch-size."""
    seed = args.header["flags"]["seed"]
    dataset = load(args.data, args.detector) if args.data else open_data(args.detector, args.n, seed, quiet=args.quiet)
    split = split_particles(dataset.particles, seed) if args.split == "particles" else split_rows(len(dataset.pdg), seed)
    if not args.load and not 2 <= args.batch_size <= len(split.train):
        raise UserError(f"--batch-size {args.batch_size}: expected 2 to {len(split.train)}, the training rows")
    return dataset, split


def test_sets(args, dataset, split):
    """{"seen": Dataset, "unseen": Dataset} to score on: the test rows are one of them, by --split; fresh
    particles of the simulator, at most UNSEEN, the other. With --validate {"validation": Dataset} alone."""
    if args.validate:
        return {"validation": select(dataset, split.validation)}
    test = select(dataset, split.test)
    if args.split == "particles":
        return {"unseen": test}
    if args.data:
        return {"seen": test}
    rows, seed = min(len(split.test), UNSEEN), args.header["flags"]["seed"]
    return {"seen": test, "unseen": open_data(args.detector, rows, seed, fresh=True, quiet=args.quiet)}


class Scaler(NamedTuple):
    """Mean and standard deviation (C,) of the conditions on the training rows; mode "raw" or "physics"."""
    mean: np.ndarray
    std: np.ndarray
    mode: str


CONDITIONS = {"raw": 9, "physics": 14}   # how many
PLACE_CM = DETECTORS["zn"].half[0]      # unit of the places among them


def _features(particles, mode):
    """Conditions before scaling, float64 (N, CONDITIONS[mode]).

    "physics" adds what geometry gives for free: log E, charge / momentum, on which the magnets act, and three
    places, last: x and y of the straight-line impact point, and x where the dipole bends a charged particle
    to, from the middle of ZP, as arcsinh in units of PLACE_CM: linear inside, logarithmic far outside.
    """
    wide = particles.astype(np.float64)
    if mode == "raw":
        return wide
    energy, vx, vy, _, px, py, pz, _, charge = wide.T
    x, y = (v + simulator.FLIGHT_CM * p / np.abs(pz) for v, p in ((vx, px), (vy, py)))
    bent = x + (simulator.FLIGHT_CM - simulator.MAGNET_CM) * simulator.dipole_kick(charge, energy) - DETECTORS["zp"].centre
    places = np.arcsinh(np.column_stack([x, y, bent]) / PLACE_CM)
    return np.column_stack([wide, np.log(energy), 1000 * charge / energy, places])


def fit_conditions(particles, mode):
    """Scaler of `conditions` from the training particles (N, 9). Places keep their scale, so that a network
    can compare them with the positions of its fibres."""
    values = _features(particles, mode)
    mean, std = values.mean(0), values.std(0)
    mean[11:], std[11:] = 0.0, 1.0                                     # the three of "physics"
    return Scaler(mean, np.where(std > 0, std, 1.0), mode)             # a constant column stays 0


def conditions(particles, scaler):
    """Standardised conditions float32 (N, C), cut at +-10; C is CONDITIONS[mode]."""
    values = (_features(particles, scaler.mode) - scaler.mean) / scaler.std
    return np.clip(values, -10, 10).astype(np.float32)


def stored_scaler(header):
    """The Scaler that the header of a checkpoint holds."""
    found = header["scaler"]
    return Scaler(np.array(found["mean"]), np.array(found["std"]), found["mode"])


# ----------------------------------------------------------------------------------- a detector, to a network

def to_patches(x, size):
    """(H, W) -> (patches, size * size), padded with zeros where the size does not divide."""
    x = jnp.pad(x, [(0, -n % size) for n in x.shape])
    h, w = x.shape
    x = x.reshape(h // size, size, w // size, size).transpose(0, 2, 1, 3)      # (h, w, size, size)
    return x.reshape(-1, size * size)


def from_patches(patches, size, shape):
    """(patches, K * size * size) -> (K, H, W), the inverse of to_patches for each of K maps."""
    h, w = patch_grid(shape, size)
    x = patches.reshape(h, w, -1, size, size).transpose(2, 0, 3, 1, 4)         # (K, h, size, w, size)
    return x.reshape(-1, h * size, w * size)[:, :shape[0], :shape[1]]


def patch_grid(shape, size):
    """Number of patches along each side of a matrix of fibres."""
    return tuple(-(-n // size) for n in shape)


def sinusoids(c):
    """Sinusoidal features of the conditions (C,): low frequencies of each one, high ones only of the impact
    coordinates.

    The coordinates are the last three ("raw": px and py). High frequencies of every condition, or random
    mixtures as in the usual Fourier features, let a network learn its training particles by heart: W of
    unseen ones doubles and more.
    """
    places = c[4:6] if len(c) < CONDITIONS["physics"] else c[-3:]
    low, high = jnp.outer(2.0 ** jnp.arange(3), c), jnp.outer(2.0 ** jnp.arange(3, 7), places)
    angles = jnp.concatenate([low.ravel(), high.ravel()])
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def with_sinusoids(c):
    """Conditions (C,) and their sinusoids, (features(C),): what our networks see of a particle."""
    return jnp.concatenate([c, sinusoids(c)])


def features(conditions):
    """The length of with_sinusoids for that many conditions."""
    return conditions + len(sinusoids(np.zeros(conditions)))


def vicinity(c, detector, size):
    """Offset of each patch from the two possible impact points (straight, bent by the dipole), for conditions
    c (C,).

    It makes a network translation-aware: a shower looks the same wherever it starts. Without it, W of unseen
    particles is four times as high. Returns (P, 3), offsets in x, bent x and y, and (P, 4, size * size),
    bumps around both points, fibre by fibre: 1 / (1 + (r / 2 fibres)^2) and a Gaussian of one fibre. With raw
    conditions: (P, 0), (P, 0, size * size).
    """
    middles = [size * jnp.arange(n) + (size - m) / 2 for n, m in zip(patch_grid(detector.shape, size), detector.shape)]
    x, y = (axis.ravel() for axis in jnp.meshgrid(*middles, indexing="ij"))                    # (P,), in fibres
    if len(c) < CONDITIONS["physics"]:
        return jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0, size**2))
    straight, across, bent = jnp.sinh(c[-3:]) * PLACE_CM                       # bent counts from the middle of ZP
    dx, dy = x - (straight - detector.centre) / detector.pitch, y - across / detector.pitch
    bent_dx = x - (bent + DETECTORS["zp"].centre - detector.centre) / detector.pitch
    fibres = jnp.arange(size) + (1 - size) / 2
    squares = lambda offset: jnp.square(offset[:, None] + fibres)                              # (P, size)
    r2 = [(squares(d)[:, :, None] + squares(dy)[:, None]).reshape(len(x), -1) for d in (dx, bent_dx)]
    bumps = [bump for square in r2 for bump in (1 / (1 + square / 4), jnp.exp(-square / 2))]
    return jnp.arcsinh(jnp.stack([dx, bent_dx, dy], axis=1) / 2) / 2, jnp.stack(bumps, axis=1)


def near_impact(c, detector, size):
    """All of `vicinity` for each patch in one row, (P, 3 + 4 size^2)."""
    offsets, bumps = vicinity(c, detector, size)
    return jnp.concatenate([offsets, bumps.reshape(len(offsets), -1)], axis=1)


def impact_light(bumps, patches):
    """Sums of patches (P, size^2) under bumps (P, K, size^2) of unit length, so that noise is a fibre's: (K,)."""
    return jnp.sum(bumps * patches[:, None], (0, 2)) / jnp.sqrt(jnp.sum(bumps**2, (0, 2)) + 1e-2)


# ----------------------------------------------------------------------------- photon counts as distributions
# A fibre's count n lives on the axis 2 sqrt(n), where a Poisson count has a variance of about 1. Photons come
# in bursts and spread more than that, so networks give each fibre a logistic distribution there, cut into
# whole counts.

def count_loss(counts, location, scale):
    """-log P(n) of each fibre in nats, P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)), P(0) = F(sqrt 2), F logistic."""
    upper = (2 * jnp.sqrt(counts + 0.5) - location) / scale
    lower = (2 * jnp.sqrt(jnp.maximum(counts - 0.5, 0)) - location) / scale
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel
    lit = jax.nn.softplus(lower) - jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-6)))
    return jax.nn.softplus(-upper) + jnp.where(counts > 0, lit, 0.0)


def draw_roots(location, scale, key):
    """Numbers on the axis 2 sqrt(n) from the logistic distributions, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    return location + scale * jnp.log(u / (1 - u))


def root_counts(x):
    """The whole counts that numbers x on the axis 2 sqrt(n) stand for."""
    return jnp.floor(jnp.square(jnp.maximum(x, 0) / 2) + 0.5)


def draw_counts(location, scale, key):
    """Photon counts from the distributions of count_loss."""
    return root_counts(draw_roots(location, scale, key))


def bounded_scale(log_scale):
    """The scale of a count distribution from a network's output."""
    return jnp.exp(jnp.clip(log_scale, -4, 3))


def decoded_counts(maps):
    """Location and scale (..., H, W) from decoded maps (..., 3, H, W): shift from the root of the rate, log scale, log rate."""
    shift, log_scale, log_rate = jnp.moveaxis(maps, -3, 0)
    return shift + 2 * jnp.exp(jnp.clip(log_rate, -15, 9) / 2), bounded_scale(log_scale)


def decoded_loss(counts, maps):
    """-log P(n) of each fibre (..., H, W) for decoded maps (..., 3, H, W), plus that of a Poisson
    distribution of the rate.

    The Poisson term is strict with bright fibres: alone, the first one takes a wide distribution for a narrow
    shower and ignores the latent (W of ZP's reconstruction three times as high, on validation rows).
    """
    return count_loss(counts, *decoded_counts(maps)) + poisson_loss(counts, maps[..., 2, :, :])


def poisson_loss(counts, log_rate):
    """-log P(n) of each fibre in nats, P(n) = exp(-r) r^n / n!."""
    log_rate = jnp.clip(log_rate, -15, 9)
    return jnp.exp(log_rate) - counts * log_rate + jax.lax.lgamma(counts + 1)


TERMS, FEW = 30, 10.0   # of draw_poisson: a count above 29 has a probability of 3e-7 at a rate of 10


def draw_poisson(log_rate, key):
    """Photon counts of Poisson distributions, one uniform number per fibre: by inversion, term by term, below
    a rate of FEW; above, a rounded normal with its skewness corrected (Cornish and Fisher 1938).
    jax.random.poisson is 20 times slower."""
    rate = jnp.exp(jnp.clip(log_rate, -15, 9))
    u = jax.random.uniform(key, rate.shape, minval=1e-7, maxval=1 - 1e-7)
    low = jnp.minimum(rate, FEW)
    term = total = jnp.exp(-low)
    counts = (u > total).astype(jnp.float32)
    for n in range(1, TERMS):
        term = term * low / n
        total = total + term
        counts += u > total
    z = jax.scipy.special.ndtri(u)
    normal = jnp.round(jnp.maximum(rate + jnp.sqrt(rate) * z + (z**2 - 1) / 6, 0))
    return jnp.where(rate < FEW, counts, normal)


def rounded_counts(x):
    """The papers' way back from log responses x = log(1 + n): rounded counts."""
    return jnp.maximum(jnp.round(jnp.expm1(x)), 0)


def as_uint16(counts):
    """Counts as a file holds them."""
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


def main(argv=None):
    """Write the open data set. Returns what was written."""
    parser = common.parser(__doc__, "data", flags=("detector", "n", "seed", "out", "quiet"))
    args = parser.parse_args(argv)
    if not args.out:
        raise UserError("nothing to do: give --out FILE")
    n = args.n or ROWS[args.detector]
    blocks = (dict(zip(Dataset._fields, block))
              for block in simulator.simulated_blocks(args.detector, n, args.seed, quiet=args.quiet))
    save_blocks(args.out, n, blocks, cut=CUT, version=VERSION, detector=args.detector, seed=args.seed)
    print(f"{n} responses -> {args.out}")
    return {"rows": n, "out": str(args.out)}


if __name__ == "__main__":
    common.run(main)
