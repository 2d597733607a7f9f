"""Lists of particles to generate for: HDF5, npz and CSV; their axes, and who of them gives light."""
from pathlib import Path

import numpy as np

import data
import hit
import orientation
from common import UserError
from simulator import FEATURES


def aimed(generate, args):
    """A function like `generate` (see metrics.generator) for particles and responses on the axes of --axes or
    of the model's --data; without --all-hit, particles that miss get no response of the model."""
    axes = orientation.Axes(**args.header.get("axes", {"word": args.axes or "xy"}))
    some = generate if args.all_hit else hit.with_misses(generate, args.hit, args.detector, args.seed)
    return lambda particles, number: axes.write(some(axes.move(particles), number))


def read_particles(path):
    """A particle list to generate for: particles float32 (N, 9) and pdg int32 (N,), 0 where not known.
    HDF5 (`particles`, optional `pdg`), npz (N, 9 or 10, key arr_0) or CSV with a header; else UserError."""
    path = Path(path)
    if path.suffix == ".csv":
        particles, pdg = _read_csv(path)
    elif path.suffix == ".npz":
        particles, pdg = data.split_table(path, data.npz_array(path))
    else:
        particles, pdg = data.read_hdf5(path, needed=("particles",))
    return data.check_particles(path, particles), pdg


def _read_csv(path):
    """Columns in any order, named as FEATURES, and optionally pdg."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    header, lines = [name.strip() for name in header.split(",")], [line for line in lines if line.strip()]
    if missing := [name for name in FEATURES if name not in header]:
        raise UserError(f"{path}: the first line must name the columns {', '.join(FEATURES)}; "
                        f"missing {', '.join(missing)}")
    if not lines:
        raise UserError(f"{path}: no particles")
    try:
        table = np.loadtxt(lines, delimiter=",", ndmin=2)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if table.shape[1] != len(header):
        raise UserError(f"{path}: {len(header)} names in the header but {table.shape[1]} columns")
    columns = dict(zip(header, table.T))
    particles = np.stack([columns[name] for name in FEATURES], axis=1)
    return particles, data.check_pdg(path, columns.get("pdg"), table)
