"""Lists of particles and the jobs that draw their responses.

    python fm.py --load weights/fm-zn.eqx --generate list.h5 --rows 0:8192 --out part-0.h5  one job of some
    python lists.py part-*.h5 --out whole.h5                                 the file of one job, bit for bit

A list is HDF5, npz, CSV or an event file (hep.py). Its responses are drawn in chunks of 8192 rows, each with
its own key, whatever rows a job asks for.
"""
import resource
import time
from pathlib import Path

import h5py
import numpy as np

import common
import data
import hep
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


def part(text, total):
    """First row and the one after the last of --rows, "A:B" or None for all of `total` rows; a last job may
    ask for more than there are. UserError."""
    first, colon, last = (text or f"0:{total}").partition(":")
    if not (colon and first.isdigit() and last.isdigit() and int(first) < min(int(last), total)):
        raise UserError(f"--rows {text}: expected A:B with 0 <= A < B and A < {total} (rows of the list)")
    return int(first), min(int(last), total)


def write(args, generate, channels):
    """--generate: write responses of a list, those of --rows, and their channels(responses); all or none."""
    if args.out.resolve() in (args.load.resolve(), args.generate.resolve()):
        raise UserError(f"{args.out}: --out would replace a file that --load or --generate reads")
    columns = (hep.read(args.generate, args.min_eta) if hep.is_event_file(args.generate)
               else dict(zip(("particles", "pdg"), read_particles(args.generate))))
    particles, sums = columns["particles"], []
    first, last = part(args.rows, len(particles))
    if args.events and ("event" not in columns or args.rows):
        raise UserError("--events needs a whole event file, HepMC or ROOT, and no --rows")
    generate, chunk, began = aimed(generate, args), 32 * common.BLOCK, time.perf_counter()

    def blocks():
        for start in common.progress(range(first - first % chunk, last, chunk), "generating", args.quiet):
            whole, kept = slice(start, start + chunk), slice(max(first - start, 0), last - start)
            responses = generate(particles[whole], start)[kept]                # the same for all --rows
            sums.append(channels(responses))
            yield {"responses": responses, "channels": sums[-1]} | {
                name: column[whole][kept] for name, column in columns.items()}

    about = dict(detector=args.detector, script=args.script, seed=args.seed, checkpoint=str(args.load),
                 hit="" if args.all_hit else str(args.hit))
    save = hep.save_tree if args.out.suffix == ".root" else data.save_blocks
    save(args.out, last - first, blocks(), **about, rows=(first, last, len(particles)))
    if args.events:
        found = hep.event_sums(columns["event"], particles, np.concatenate(sums))
        data.save_blocks(args.events, len(found["event"]), [found], **about)
    rate = (last - first) / (time.perf_counter() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{last - first} responses -> {args.out}; {rate:.0f} per second, at most {memory:.0f} MiB in use")
    return {"rows": last - first, "out": str(args.out)}


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


def merge(paths, out):
    """Join files that --generate --rows wrote for parts of one list. UserError unless they are all of it,
    each row once, by the same model and flags. Returns the number of rows."""
    attributes, files = {}, []
    for path in paths:
        try:
            with h5py.File(path) as file:
                attributes[path] = dict(file.attrs) | {"names": sorted(file)}
                first, last, total = map(int, attributes[path].pop("rows"))
        except (OSError, KeyError, ValueError, TypeError):
            raise UserError(f"{path}: expected a file that --generate has written") from None
        files.append((first, last, total, path))
    files, end = sorted(files), 0
    for first, last, total, path in files:
        if attributes[path] != attributes[paths[0]] or total != files[0][2]:
            raise UserError(f"{path}: made of another list, model or flags than {paths[0]}")
        if first != end:
            raise UserError(f"{path}: begins at row {first}, expected row {end} of {total}")
        end = last
    if end != total:
        raise UserError(f"{path}: ends before row {end} of {total}, a part is missing")

    def blocks():
        for first, last, _, path in files:
            with h5py.File(path) as file:
                for start in range(0, last - first, 8192):
                    yield {name: file[name][start:start + 8192] for name in file}

    names = attributes[paths[0]].pop("names")
    data.save_blocks(out, total, blocks(), **attributes[paths[0]], rows=(0, total, total))
    return total


def main(argv=None):
    """Join the files of jobs. Returns {"rows", "out"}."""
    parser = common.parser(__doc__, "lists", flags=())
    parser.set_defaults(detector=None)                                         # that of the files
    parser.add_argument("parts", type=Path, nargs="+", metavar="PART", help="files of the parts of one list")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="write this HDF5 file")
    args = parser.parse_args(argv)
    rows = merge(args.parts, args.out)
    print(f"{rows} responses -> {args.out}")
    return {"rows": rows, "out": str(args.out)}


if __name__ == "__main__":
    common.run(main)
