"""Lists of particles and the jobs that draw their responses.

    python fm.py --load weights/fm-zn.eqx --generate list.h5 --rows 0:8192 --out part-0.h5  one job of some
    python lists.py part-*.h5 --out whole.h5                                 the arrays of one job, bit by bit

A list is HDF5, npz, CSV or an event file (hep.py). Its responses are drawn in chunks of 8192 rows, each with
its own key, whatever rows a job asks for.
"""
import resource
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np

import common
import data
import files
import hep
import hit
import orientation
from common import UserError
from simulator import FEATURES

FAR_CM = 100   # from the collision: beyond it are products of decays, not primary particles


def aimed(generate, args):
    """A function like `generate` (see metrics.generator) for particles and responses on the axes of --axes or
    of the model's --data; without --all-hit, particles that miss get no response of the model."""
    axes = orientation.Axes(**args.header.get("axes", {"word": args.axes or "xy"}))
    every = lambda particles, number: axes.write(generate(axes.move(particles), number))
    return every if args.all_hit else hit.with_misses(every, args.hit, args.detector, args.seed, axes)


def mark(args):
    """A checksum of the list, the model and all flags that decide about responses: parts of one have one."""
    apart = "rows", "out", "events", "quiet", "threads", "run", "command", "load", "hit", "generate", "header"
    flags = sorted((name, str(value)) for name, value in vars(args).items() if name not in apart)
    flags += [str(args.generate).partition(".root:")[2]]                       # the tree
    found = zlib.crc32(repr(flags).encode())
    for path in (tree_file(args.generate), args.load, *([] if args.all_hit else [args.hit])):
        found = zlib.crc32(path.read_bytes(), found)
    return found


def tree_file(path):
    """The file of `file.root:NAME`."""
    return Path(str(path).partition(".root:")[0] + ".root") if ".root:" in path.name else path


def check_paths(args):
    """UserError if an output would replace another one, or what is read."""
    read = {path.resolve() for path in (args.load, tree_file(args.generate), args.hit) if path}
    if args.events and args.events.suffix == ".root":
        raise UserError(f"{args.events}: sums over events are written as HDF5, not ROOT")
    for path in (args.out, args.events):
        if path and path.resolve() in read:
            raise UserError(f"{path}: would replace another file of this command")
        read |= {path.resolve()} if path else set()


def part(text, total):
    """First row and the one after the last of --rows, "A:B" or None for all of `total` rows; a last job may
    ask for more than there are. UserError."""
    first, colon, last = (text or f"0:{total}").partition(":")
    numbers = colon and all(text.isascii() and text.isdecimal() for text in (first, last))
    if not (numbers and int(first) < min(int(last), total)):
        raise UserError(f"--rows {text}: expected A:B with 0 <= A < B and A < {total} (rows of the list)")
    return int(first), min(int(last), total)


def write(args, generate, channels):
    """--generate: write responses of a list, those of --rows, and their channels(responses); all or none."""
    check_paths(args)
    columns = (hep.read(args.generate, args.min_eta) if hep.is_event_file(args.generate)
               else dict(zip(("particles", "pdg"), read_particles(args.generate))))
    particles, dark, sums = columns["particles"], np.isin(np.abs(columns["pdg"]), hep.DARK), []
    first, last = part(args.rows, len(particles))
    if args.events and ("event" not in columns or args.rows):
        raise UserError("--events needs a whole HepMC file, or a tree with a branch event, and no --rows")
    far = np.count_nonzero((np.abs(particles[:, 1:4]).max(1) > FAR_CM) & (particles[:, 8] != 0))
    if far:
        print(f"{args.generate}: {far} charged particles start more than {FAR_CM / 100:g} m from the "
              "collision, the magnets bend them here as if they came from it")
    generate, chunk, began = aimed(generate, args), 32 * common.BLOCK, time.perf_counter()

    def blocks():
        for start in common.progress(range(first - first % chunk, last, chunk), "generating", args.quiet):
            whole, kept = slice(start, start + chunk), slice(max(first - start, 0), last - start)
            responses = generate(particles[whole], start)                      # the same for all --rows
            responses[dark[whole]] = 0                                         # neutrinos
            responses = responses[kept]
            found = channels(responses)
            sums.extend([found] if args.events else [])
            yield {"responses": responses, "channels": found} | {
                name: column[whole][kept] for name, column in columns.items()}

    about = dict(detector=args.detector, script=args.script, seed=args.seed, checkpoint=str(args.load),
                 hit="" if args.all_hit else str(args.hit), convention="papers", mark=mark(args))
    save = hep.save_tree if args.out.suffix == ".root" else data.save_blocks
    with files.write_atomic(args.events) if args.events else nullcontext() as temporary:
        if temporary:
            temporary.touch()                                                  # fails now or not at all
        save(args.out, last - first, blocks(), **about, rows=(first, last, len(particles)))
        if temporary:
            found = hep.event_sums(columns["event"], particles, np.concatenate(sums))
            data.save_blocks(temporary, len(found["event"]), [found], **about)
    rate = (last - first) / (time.perf_counter() - began)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    print(f"{last - first} responses -> {args.out}; {rate:.0f} per second, at most {memory:.0f} MiB in use")
    return {"rows": last - first, "out": str(args.out)}


def read_particles(path):
    """A particle list to generate for: particles float32 (N, 9) and pdg int32 (N,), 0 where not known.
    HDF5 (`particles`, optional `pdg`), npz (N, 9 or 10, key arr_0) or CSV with a header; else UserError, and
    for nuclei."""
    path = Path(path)
    if path.suffix == ".csv":
        particles, pdg = _read_csv(path)
    elif path.suffix == ".npz":
        particles, pdg = data.split_table(path, data.npz_array(path))
    else:
        particles, pdg = data.read_hdf5(path, needed=("particles",))
    if (nuclei := np.abs(pdg) > hep.NUCLEI).any():
        raise UserError(f"{path}: row {nuclei.argmax()} is a nucleus, which no model has seen")
    return data.check_particles(path, particles), pdg


def _read_csv(path):
    """Columns in any order, named as FEATURES, and optionally pdg."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    header, *lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
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
    parts = []
    for path in paths:
        try:
            with h5py.File(path) as file:
                about = {name: file.attrs[name] for name in file.attrs}
                first, last, total = map(int, about.pop("rows"))
                whole = {len(file[name]) for name in file} == {last - first}
                parts.append((first, last, total, int(about["mark"]), path, about))
        except Exception:                                                      # as in data.read_hdf5
            raise UserError(f"{path}: expected an HDF5 file that --generate has written") from None
        if not whole or path.resolve() == out.resolve():
            raise UserError(f"{path}: expected {last - first} rows, and another file than --out")
    parts.sort(key=lambda part: part[:2])
    end, about = 0, parts[0][-1]
    for first, last, total, mark, path, _ in parts:
        if mark != parts[0][3]:
            raise UserError(f"{path}: made of another list, model or flags than {parts[0][4]}")
        if first != end:
            raise UserError(f"{path}: begins at row {first}, expected row {end} of {total}")
        end = last
    if end != total:
        raise UserError(f"{path}: ends at row {end} of {total}, a part is missing")

    def blocks():
        for first, last, _, _, path, _ in parts:
            with h5py.File(path) as file:
                for start in range(0, last - first, 8192):
                    yield {name: file[name][start:start + 8192] for name in file}

    data.save_blocks(out, total, blocks(), **about, rows=(0, total, total))
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
