"""Data sets (files, splits, conditions), the geometry of a detector for networks, and photon counts.

A data set holds `responses` uint16 (N, H, W), photons per fibre; `particles` float32 (N, 9), as FEATURES, in
GeV, cm, MeV and units of e; `pdg` int32 (N,). Without --data it is the open data set of simulator.py,
simulated on first use and kept in the cache folder.

    python data.py --detector zn --out zn.h5     write the open data set, 306 780 rows (ZN) or 129 676 (ZP)
"""
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np

import common
import files
import orientation
import simulator
from common import UserError
from simulator import CUT, DETECTORS, FEATURES, ROWS, VERSION

BEAM_GEV = 7100.0     # more than the LHC's protons have: larger energies are in MeV by mistake
UNSEEN, TESTED = 20_000, 61_356   # rows of fresh particles to test on, and test rows, at most
LARGE = 2**31         # bytes of responses that fit into memory for sure


class Dataset(NamedTuple):
    """Responses and their particles, row by row."""
    responses: np.ndarray   # uint16 (N, H, W), photons
    particles: np.ndarray   # float32 (N, 9), as FEATURES
    pdg: np.ndarray         # int32 (N,); 0 where a file does not say


class Split(NamedTuple):
    """Row numbers of the three parts of a data set."""
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


# ------------------------------------------------------------------------------------------------------ files

def save_blocks(path, total, blocks, **attributes):
    """Stream `blocks`, dicts of arrays with `total` rows together, into one HDF5 file: whole or not at all.
    UserError if the disk is full or the file cannot be written."""
    filled = 0
    with files.write_atomic(path) as temporary, files.Sink(temporary, "w+") as sink:
        with h5py.File(sink, "w") as file:
            for block in blocks:
                rows = len(next(iter(block.values())))
                for name, array in block.items():
                    if name not in file:
                        row = array.shape[1:]
                        file.create_dataset(name, (total, *row), array.dtype, chunks=(min(total, 256), *row),
                                            compression="gzip", compression_opts=1, shuffle=True)
                    file[name][filled:filled + rows] = array
                sink.check()
                filled += rows
            file.attrs.update(attributes)
        sink.check()


def write_open_data(path, name, n, seed=0, fresh=False, quiet=False):
    """Simulate the open data set (see open_data) into an HDF5 file."""
    blocks = simulator.simulated_blocks(name, n, seed, fresh, quiet)
    named = (dict(zip(Dataset._fields, block)) for block in blocks)
    save_blocks(path, n, named, cut=CUT, version=VERSION, detector=name, seed=seed)


def open_data(name, n=None, seed=0, fresh=False, quiet=False):
    """The open data set of detector `name`, simulated on first use: `n` rows, if None as many as the papers'.
    The same (name, n, seed, VERSION) gives the same bytes. `fresh=True` holds other particles of the same
    spectrum: none of them occurs in the plain set of that seed."""
    n = n or ROWS[name]
    path = common.cache_folder() / f"{name}-{n}-seed{seed}{'-fresh' * fresh}-v{VERSION}.h5"
    if not path.exists():
        write_open_data(path, name, n, seed, fresh, quiet)
    return load(path, name)


def load(path, name):
    """Read and check a data set of detector `name`: HDF5 of save_blocks or the papers' npz pair (their folder
    or either file). UserError for what is missing, damaged, of another detector, or out of range."""
    path = Path(path)
    npz = path.is_dir() or path.suffix == ".npz"
    responses, particles, pdg = _read_npz(path) if npz else read_hdf5(path, name)
    if responses.ndim != 3 or responses.shape[1:] != DETECTORS[name].shape:
        expected = "(N, {}, {})".format(*DETECTORS[name].shape)
        raise UserError(f"{path}: {name} responses must have the shape {expected}, not {responses.shape}")
    if len(responses) != len(particles):
        raise UserError(f"{path}: {len(responses)} responses for {len(particles)} particles")
    return Dataset(_check_counts(path, responses), check_particles(path, particles), pdg)


def read_hdf5(path, name=None, needed=("responses", "particles")):
    """The `needed` arrays of a file and its PDG ids. UserError if it is not of detector `name`."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with h5py.File(path) as file:
            here = [key for key in (*needed, "pdg") if isinstance(file.get(key), h5py.Dataset)]
            arrays = {key: _rows(path, file[key]) for key in here}
            made_for = file.attrs.get("detector", name)
            if "pdg" in file and "pdg" not in arrays:
                raise ValueError("pdg is not a data set")
    except UserError:
        raise
    except Exception as error:   # h5py raises nearly every type of error on a damaged file
        raise UserError(f"{path}: damaged, or not an HDF5 file: {error}") from None
    if missing := [key for key in needed if key not in arrays]:
        raise UserError(f"{path}: expected the HDF5 data sets {', '.join(needed)}; {missing[0]} is missing")
    if name and made_for != name:
        raise UserError(f"{path}: holds {made_for} data, not {name}; see --detector")
    return *(arrays[key] for key in needed), check_pdg(path, arrays.get("pdg"), arrays["particles"])


def _rows(path, stored):
    """An HDF5 data set as an array; responses of more than LARGE bytes stay on disk."""
    if stored.ndim < 3 or stored.size * stored.dtype.itemsize < LARGE:
        return np.asarray(stored[()])
    state = Path(path).stat()
    copy = common.cache_folder() / f"{Path(path).stem}-{state.st_size}-{state.st_mtime_ns}.uint16"
    return files.on_disk(stored, copy, partial(_check_counts, path))


def _read_npz(path):
    """Responses, particles and PDG ids of the papers' files: data_nonrandom_responses.npz (N, H, W) and
    data_nonrandom_particles.npz (N, 10), each under the key arr_0."""
    folder = path if path.is_dir() else path.parent
    files = (folder / f"data_nonrandom_{kind}.npz" for kind in ("responses", "particles"))
    responses, table = map(npz_array, files)
    return responses, *split_table(folder, table)


def split_table(path, table):
    """Features (N, 9) and PDG ids (N,) of a table of 9 or 10 columns."""
    if table.ndim != 2 or table.shape[1] not in (9, 10):
        raise UserError(f"{path}: expected 9 features and a PDG id, shape (N, 10), not {table.shape}")
    return table[:, :9], check_pdg(path, table[:, 9] if table.shape[1] == 10 else None, table)


def npz_array(path):
    if not path.is_file():
        raise UserError(f"{path}: no such file; the papers' folder holds data_nonrandom_responses.npz and "
                        "data_nonrandom_particles.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"]
    except (ValueError, OSError, KeyError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path}: expected an npz file with a plain array under the key arr_0") from None


def check_pdg(path, pdg, particles):
    """PDG ids int32 (N,) of particles (N, ...); 0 where `pdg` is None."""
    pdg = np.zeros(particles.shape[:1]) if pdg is None else pdg
    numbers = pdg.shape == particles.shape[:1] and pdg.dtype.kind in "iuf"
    if not (numbers and (np.abs(pdg.astype(np.float64)) < 2**31).all() and np.array_equal(pdg, np.rint(pdg))):
        raise UserError(f"{path}: PDG ids must be one column of whole numbers, shape {particles.shape[:1]}")
    return pdg.astype(np.int32)


def _check_counts(path, responses):
    """Photon counts as uint16; anything that is not a count from 0 to 65535 is an error."""
    if responses.dtype.kind not in "iuf":
        raise UserError(f"{path}: responses must be numbers, not {responses.dtype}")
    for start in range(0, len(responses), 8192):   # in blocks: the comparisons below would copy 1 GB
        block = responses[start:start + 8192]
        if not np.isfinite(block).all():
            raise UserError(f"{path}: responses hold NaN or infinity, see rows after {start}")
        if block.size and (block.min() < 0 or block.max() > 65535):
            raise UserError(f"{path}: photon counts must lie between 0 and 65535, see rows after {start}")
        if block.dtype.kind == "f" and not np.array_equal(block, np.rint(block)):
            raise UserError(f"{path}: responses must be whole counts, not scaled, see rows after {start}")
    return np.ascontiguousarray(responses, dtype=np.uint16)


def check_particles(path, particles):
    """Features float32 (N, 9) of particles, in the units of FEATURES. UserError for another shape, values not
    finite, and energies that exceed the beam's or miss E^2 = p^2 + m^2 by more than 2 % (momenta in MeV or
    masses in GeV, for instance)."""
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
    # only the electron is so light: other masses are in GeV by mistake
    bad |= (mass > 1e-6) & (mass < 0.1) & (np.abs(mass - 0.000511) > 1e-6)
    if bad.any():
        row = int(bad.argmax())
        found = (f"E = {energy[row]:g} but sqrt(p^2 + m^2) = {expected[row]:g} GeV with "
                 f"pz = {momentum[row, 2]:g}, mass = {wide[row, 7]:g} MeV")
        raise UserError(f"{path}: particle row {row} has {found}; expected E and p in GeV up to "
                        f"{BEAM_GEV:g}, mass in MeV, pz not 0")
    return particles.astype(np.float32)


# -------------------------------------------------------------------------------------- splits and conditions

def split_rows(n, seed):
    """A Split of random rows, 70 / 10 / 20 % as in the papers."""
    order = np.random.default_rng([seed, 70]).permutation(n)
    return Split(*np.split(order, [int(0.7 * n), int(0.8 * n)]))


def unique_particles(particles):
    """Ids of the unique particles, (N,) from 0, and the first row of each, (U,). Runs have equal features."""
    keys = np.ascontiguousarray(particles, np.float32).view(f"V{4 * particles.shape[1]}").ravel()
    _, first, ids = np.unique(keys, return_index=True, return_inverse=True)
    return ids.ravel(), first


def split_particles(particles, seed):
    """A Split of whole particles, 70 / 10 / 20 % of them: no particle of one part occurs in another."""
    ids, first = unique_particles(particles)
    parts = split_rows(len(first), seed)
    rng = np.random.default_rng([seed, 71])                                    # files may be sorted
    return Split(*(rng.permutation(np.flatnonzero(np.isin(ids, part))) for part in parts))


def select(dataset, rows):
    """The Dataset of the given rows, numbers or a slice."""
    return Dataset(*(field[rows] for field in dataset))


def open_split(args):
    """(Dataset, Split) of --detector, --data, --n and --split; for a loaded model those of its training.
    UserError if the training rows do not fill a --batch-size."""
    seed = args.header["flags"]["seed"]
    dataset = (load(args.data, args.detector) if args.data
               else open_data(args.detector, args.n, seed, quiet=args.quiet))
    split = (split_particles(dataset.particles, seed) if args.split == "particles"
             else split_rows(len(dataset.pdg), seed))
    if args.data:
        split, dataset = above_cut(dataset, split), turned(args, dataset, split.train)
    if "load" in args and not args.load:
        check_batch(args.batch_size, len(split.train))
    return dataset, split


def check_batch(size, rows):
    """UserError unless that many training rows fill a batch."""
    if not 2 <= size <= rows:
        raise UserError(f"--batch-size {size}: expected 2 to {rows} (training rows)")


def photon_sums(responses):
    """Photons of each response (N,), a block at a time."""
    starts = range(0, len(responses), 8192)
    return np.concatenate([responses[k:k + 8192].sum((1, 2), dtype=np.int64) for k in starts])


def above_cut(dataset, split):
    """The Split without rows below the cut, which are hit.py's to draw; said if there are any."""
    passed = photon_sums(dataset.responses) >= CUT
    if not passed.all():
        print(f"left out: {np.count_nonzero(~passed)} of {len(passed)} responses, below {CUT} photons")
    return Split(*(rows[passed[rows]] for rows in split))


def turned(args, dataset, rows):
    """A Dataset on the axes of the open data: those in the header of a checkpoint, else, kept there, those of
    --axes or what the training `rows` show."""
    if "axes" not in args.header:
        few = select(dataset, np.random.default_rng(0).permutation(rows)[:orientation.SOUGHT])
        places = np.sinh(_features(few.particles, "physics")[:, -3:]) * PLACE_CM
        own, column = (few.particles[:, 8] == 0, 0) if args.detector == "zn" else (few.particles[:, 8] > 0, 2)
        points, responses = places[own][:, [column, 1]], few.responses[own]
        axes, sentence = orientation.find(points, responses, DETECTORS[args.detector], args.axes)
        args.header["axes"] = axes._asdict()
        print(sentence)
    axes = orientation.Axes(**args.header["axes"])
    return dataset._replace(responses=axes.read(dataset.responses), particles=axes.move(dataset.particles))


def test_sets(args, dataset, split):
    """Data sets to score on, {"seen": Dataset, "unseen": Dataset}; with --validate, {"validation": Dataset}.
    The test rows are one of the two, by --split; fresh particles of the simulator are the other."""
    if "validate" in args and args.validate:
        return {"validation": select(dataset, split.validation)}
    test = select(dataset, split.test[:TESTED])
    if args.split == "particles":
        return {"unseen": test}
    if args.data:
        return {"seen": test}
    rows, seed = min(len(test.pdg), UNSEEN), args.header["flags"]["seed"]
    return {"seen": test, "unseen": open_data(args.detector, rows, seed, fresh=True, quiet=args.quiet)}


class Scaler(NamedTuple):
    """Mean and standard deviation (C,) of the conditions on the training rows; mode "raw" or "physics"."""
    mean: np.ndarray
    std: np.ndarray
    mode: str


CONDITIONS = {"raw": 9, "physics": 14}   # their number, by --cond
PLACE_CM = DETECTORS["zn"].half[0]       # unit of the coordinates among them


def _features(particles, mode, xp=np):
    """Conditions before scaling, (N, CONDITIONS[mode]), by NumPy or jax.numpy (`xp`). "physics" adds what
    geometry gives for free: log E; charge / momentum, on which the magnets act; and three coordinates, last:
    x and y of the straight-line impact point, and x of the point to which the dipole bends a charged
    particle, from the middle of ZP. They are arcsinh of lengths in PLACE_CM: linear near the detector,
    logarithmic far away."""
    wide = particles.astype(float)
    if mode == "raw":
        return wide
    energy, vx, vy, vz, px, py, pz, _, charge = wide.T
    x, y = (v + p * (simulator.FLIGHT_CM / abs(pz) - vz / pz) for v, p in ((vx, px), (vy, py)))
    bend = (simulator.FLIGHT_CM - simulator.MAGNET_CM) * simulator.dipole_kick(charge, energy)
    places = xp.arcsinh(xp.column_stack([x, y, x + bend - DETECTORS["zp"].centre]) / PLACE_CM)
    return xp.column_stack([wide, xp.log(energy), 1000 * charge / energy, places])


def fit_conditions(particles, mode):
    """Scaler of `conditions` from the training particles (N, 9). The coordinates of "physics" keep their
    scale, so that a network can compare them with the positions of its fibres."""
    values = _features(particles, mode)
    mean, std = values.mean(0), values.std(0)
    mean[11:], std[11:] = 0.0, 1.0
    return Scaler(mean, np.where(std > 0, std, 1.0), mode)             # a constant column stays 0


def first_scaler(args, particles):
    """The Scaler of --finetune, else of the training particles (N, 9)."""
    header = args.finetune and common.read_header(args.finetune)
    return stored_scaler(header) if header else fit_conditions(particles, args.cond)


def conditions(particles, scaler, xp=np):
    """Standardised conditions float32 (N, C), clipped at +-10, C = CONDITIONS[scaler.mode]; `xp` as above."""
    values = (_features(particles, scaler.mode, xp) - scaler.mean) / scaler.std
    return xp.clip(values, -10, 10).astype(np.float32)


def stored_scaler(header):
    """The Scaler in the header of a checkpoint."""
    found = header["scaler"]
    return Scaler(np.array(found["mean"]), np.array(found["std"]), found["mode"])


# ------------------------------------------------------------------------ geometry of a detector for networks

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


def windows(x, size):
    """What x (h, w) holds in each patch of size x size and half a patch around it: (P, 4 size^2)."""
    h, w = patch_grid(x.shape, size)
    margins = [(size // 2, (n + 1) * size - size // 2 - length) for n, length in zip((h, w), x.shape)]
    quarters = to_patches(jnp.pad(x, margins), size).reshape(h + 1, w + 1, -1)
    quarters = [quarters[i:i + h, j:j + w] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(quarters, axis=-1).reshape(h * w, -1)


def neighbour_mean(h, grid):
    """Mean of h (P, D) over the patches of a grid that share an edge; 0 beyond the matrix. (P, D)"""
    h = jnp.pad(h.reshape(*grid, -1), [(1, 1), (1, 1), (0, 0)])
    return (h[:-2, 1:-1] + h[2:, 1:-1] + h[1:-1, :-2] + h[1:-1, 2:]).reshape(-1, h.shape[-1]) / 4


def patch_grid(shape, size):
    """Number of patches along each side of a response."""
    return tuple(-(-n // size) for n in shape)


def features(c, detector):
    """A particle as our networks see it, from its conditions c (C,): what decides how much light it leaves in
    a detector. Mass, charge, log E, charge / E and impact points, how far the straight line ends from the
    beam, waves of mass and distance, since types and the edge of the beam pipe are steps, and how much of a
    shower at either point falls on it; then the photon sum, if totals.py appended one. With momenta and
    vertex, or waves of all, a network knows its training particles by heart: W of unseen ones is up to twice
    as large. "raw": all, with waves of px and py.
    """
    if len(c) < CONDITIONS["physics"]:
        angles = jnp.concatenate([jnp.outer(2.0 ** jnp.arange(3), c).ravel(),
                                  jnp.outer(2.0 ** jnp.arange(3, 7), c[4:6]).ravel()])
        return jnp.concatenate([c, jnp.sin(angles), jnp.cos(angles)])
    mass, distance = c[7], jnp.arcsinh(jnp.hypot(*jnp.sinh(c[11:13])))                 # in PLACE_CM
    angles = jnp.append(2.0 ** jnp.arange(3) * mass, 2.0 ** jnp.arange(5) * distance)
    seen, falls = jnp.append(c[7:14], distance), vicinity(c, detector, 4)[1].sum((0, 2))
    known = jnp.concatenate([seen, jnp.sin(angles), jnp.cos(angles), jnp.log(falls + 1e-3) / 2])
    return jnp.append(known, waves(c[14:])) if len(c) > CONDITIONS["physics"] else known


def waves(numbers):
    """Numbers (N,) with three waves of each, (7 N,)."""
    angles = jnp.outer(2.0 ** jnp.arange(3), numbers).ravel()
    return jnp.concatenate([numbers, jnp.sin(angles), jnp.cos(angles)])


def feature_count(conditions, detector):
    """The length of `features` for that many conditions."""
    return len(features(jnp.zeros(conditions), detector))


def vicinity(c, detector, size):
    """Offset of each patch from the two possible impact points (straight, bent by the dipole), from c (C,).

    It makes a network translation-aware: a shower looks the same wherever it starts. Without it, W of unseen
    particles is four times as high. Returns (P, 3), offsets in x, bent x and y, and (P, 4, size * size),
    bumps around both points, fibre by fibre: 1 / (1 + (r / 2 fibres)^2) and a Gaussian of one fibre. With raw
    conditions: (P, 0), (P, 0, size * size).
    """
    counts = zip(patch_grid(detector.shape, size), detector.shape)
    middles = [size * jnp.arange(patches) + (size - fibres) / 2 for patches, fibres in counts]
    x, y = (axis.ravel() for axis in jnp.meshgrid(*middles, indexing="ij"))            # (P,), in fibres
    if len(c) < CONDITIONS["physics"]:
        return jnp.zeros((len(x), 0)), jnp.zeros((len(x), 0, size**2))
    straight, across, bent = jnp.sinh(c[11:14]) * PLACE_CM                             # bent from ZP's middle
    dx, dy = x - (straight - detector.centre) / detector.pitch, y - across / detector.pitch
    bent_dx = x - (bent + DETECTORS["zp"].centre - detector.centre) / detector.pitch
    fibres = jnp.arange(size) + (1 - size) / 2
    squares = lambda offset: jnp.square(offset[:, None] + fibres)                      # (P, size)
    r2 = [(squares(d)[:, :, None] + squares(dy)[:, None]).reshape(len(x), -1) for d in (dx, bent_dx)]
    bumps = [bump for square in r2 for bump in (1 / (1 + square / 4), jnp.exp(-square / 2))]
    return jnp.arcsinh(jnp.stack([dx, bent_dx, dy], axis=1) / 2) / 2, jnp.stack(bumps, axis=1)


def near_impact(c, detector, size):
    """All of `vicinity` for each patch in one row, (P, 3 + 4 size^2)."""
    offsets, bumps = vicinity(c, detector, size)
    return jnp.concatenate([offsets, bumps.reshape(len(offsets), -1)], axis=1)


def impact_light(bumps, patches):
    """Sums of patches (P, size^2) under bumps (P, K, size^2) of unit length, as noisy as one fibre: (K,)."""
    return jnp.sum(bumps * patches[:, None], (0, 2)) / jnp.sqrt(jnp.sum(bumps**2, (0, 2)) + 1e-2)


# ----------------------------------------------------------------------------- photon counts as distributions
# On the axis 2 sqrt(n) a Poisson count n has a variance of about 1. Photons come in bursts and spread more,
# so networks give each fibre a logistic distribution on this axis, discretised to whole counts.

def few_logits(location, scale, odds):
    """log P(n) / P(> n) of n = 0, 1, ... photons, one for each of `odds`."""
    return [(2 * (n + 0.5)**0.5 - location) / scale + more for n, more in enumerate(odds)]


def count_loss(counts, location, scale, odds=()):
    """-log P(n) of each fibre in nats, with the logistic distribution function F:
    P(n) = F(2 sqrt(n + 1/2)) - F(2 sqrt(n - 1/2)), P(0) = F(sqrt 2). Two numbers do not fit the shares of
    ones, twos and bright fibres at once. So k `odds`, if given, correct the counts n < k by
    log P(n) / P(> n) = (2 sqrt(n + 1/2) - location) / scale + odds_n; larger counts keep their ratios."""
    edge = lambda n: jnp.where(n > 0, 2 * jnp.sqrt(jnp.maximum(n - 0.5, 0)) - location, -1e6) / scale
    upper, lower, first = edge(counts + 1), edge(counts), edge(len(odds))
    relu, rest = jax.nn.relu, lambda x: 1 + jnp.exp(-jnp.abs(x))               # softplus: relu + log(rest)
    # F(u) - F(l) = F(u) F(-l) (1 - exp(l - u)), which does not cancel, over F(-first)
    product = rest(upper) * rest(lower) / rest(first) / jnp.maximum(1 - jnp.exp(lower - upper), 1e-6)
    loss = relu(-upper) + relu(lower) - relu(first) + jnp.log(product)
    loss = jnp.where(counts >= len(odds), loss, 0.0)
    for n, logit in enumerate(few_logits(location, scale, odds)):
        loss += jnp.where(counts >= n, jax.nn.softplus(jnp.where(counts == n, -logit, logit)), 0.0)
    return loss


def draw_counts(location, scale, key, odds=()):
    """Photon counts from the distributions of count_loss, by inversion."""
    u = jax.random.uniform(key, location.shape, minval=1e-6, maxval=1 - 1e-6)
    few, above = 0.0, 1.0
    for logit in few_logits(location, scale, odds):
        above = above / (1 + jnp.exp(logit))                                   # P(> n)
        few += u < above
    tail = u / above                                                           # P(> x) of the logistic
    if odds:
        tail = tail / (1 + jnp.exp((2 * (len(odds) - 0.5)**0.5 - location) / scale))
    tail = jnp.clip(tail, 1e-37, 1 - 1e-7)
    many = root_counts(location + scale * jnp.log(1 / tail - 1))
    return jnp.where(u < above, jnp.maximum(many, len(odds)), few)


def root_counts(x):
    """The whole counts that numbers x on the axis 2 sqrt(n) stand for."""
    return jnp.floor(jnp.square(jnp.maximum(x, 0) / 2) + 0.5)


def bounded_scale(log_scale):
    """The scale of a count distribution from a network's output."""
    return jnp.exp(jnp.clip(log_scale, -4, 3))


def poisson_loss(counts, log_rate):
    """-log P(n) of each fibre in nats for Poisson distributions, P(n) = exp(-r) r^n / n!."""
    log_rate = jnp.clip(log_rate, -15, 9)
    return jnp.exp(log_rate) - counts * log_rate + jax.lax.lgamma(counts + 1)


def rounded_counts(x):
    """Photon counts from the papers' log responses x = log(1 + n), rounded."""
    return jnp.maximum(jnp.round(jnp.expm1(x)), 0)


def as_uint16(counts):
    """Counts in the number format of files."""
    return jnp.minimum(counts, 65535).astype(jnp.uint16)


def main(argv=None):
    """Write the open data set. Returns {"rows", "out"}."""
    parser = common.parser(__doc__, "data", flags=("detector", "n", "seed", "out", "quiet"))
    args = parser.parse_args(argv)
    if not args.out:
        raise UserError("nothing to do: give --out FILE")
    n = args.n or ROWS[args.detector]
    write_open_data(args.out, args.detector, n, args.seed, quiet=args.quiet)
    print(f"{n} responses -> {args.out}")
    return {"rows": n, "out": str(args.out)}


if __name__ == "__main__":
    common.run(main)
