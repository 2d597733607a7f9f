"""What every script needs and no script is about: flags, files, checkpoints, logs, plots, timing and devices.

No network, no loss and no training loop stands here. Whatever can go wrong for a user (a flag, a file, a full disk)
ends in one line on stderr and exit code 2; a file is written under another name first, so an old one is never lost.
"""
import argparse
import functools
import glob
import io
import itertools
import json
import lzma
import math
import os
import platform
import secrets
import shlex
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

VERSION = "0.1.0"
FORMAT = "zdc-checkpoint-3"
CHANNEL_NAMES = ("x < 0, y < 0", "x < 0, y > 0", "x > 0, y < 0", "x > 0, y > 0", "common")


# ---------------------------------------------------------------------------------------------------------- errors

class UserError(Exception):
    """What the user can put right. The message is one line that names the file or flag and what was expected."""


def run(main):
    """Call `main()` as the command line does: a user's error becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    except (UserError, OSError, MemoryError) as error:
        sys.exit(_fail(str(error) or "out of memory"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(_fail("the device is out of memory, try a smaller --batch-size"))


def _fail(message):
    """Print one `error:` line and return the exit code."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


class Diverged(UserError):
    """A training whose loss is not finite any more."""


def check_finite(loss, step, checkpoint):
    """Diverged if the loss of `step` is not a finite number; `checkpoint` is the last good one, or None."""
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}, last good checkpoint: {checkpoint or 'none'}")


# ----------------------------------------------------------------------------------------------------------- flags

def number(kind, low, high=math.inf):
    """An argparse type: a finite `kind` (int or float) with low <= value <= high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value
    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value: 'x'"
    return parse


# The shared flags: the same name, meaning and unit in every script. A script changes the defaults, not the meaning.
FLAGS = {
    "detector": dict(choices=("zn", "zp"), default="zn", help="neutron or proton calorimeter"),
    "data": dict(type=Path, metavar="PATH", help="HDF5 file, or the papers' npz pair; without it the open data set"),
    "n": dict(type=number(int, 1, 10**9), metavar="ROWS", help="rows of the open data set; --data has its own"),
    "split": dict(choices=("rows", "particles"), default="rows",
                  help="70:10:20 split into train, validation and test, by rows or by whole particles"),
    "cond": dict(choices=("raw", "physics"), default="physics",
                 help="condition on the nine features, or also on impact point and log energy"),
    "epochs": dict(type=number(int, 1, 10**6), default=10, metavar="N", help="passes over the training rows"),
    "batch_size": dict(type=number(int, 1, 10**7), default=256, metavar="ROWS", help="responses per training step"),
    "lr": dict(type=number(float, 0, 1), default=1e-3, metavar="RATE", help="peak learning rate per step"),
    "schedule": dict(choices=("onecycle", "cosine"), default="onecycle", help="learning rate over the run"),
    "clip": dict(type=number(float, 0), default=1.0, metavar="NORM", help="largest gradient norm"),
    "ema": dict(type=number(float, 0, 0.99999), default=0.999, metavar="DECAY", help="of the averaged weights, per step"),
    "seed": dict(type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="fixes every random number of the run"),
    "steps": dict(type=number(int, 1, 1000), default=11, metavar="N", help="steps of the sampler"),
    "load": dict(type=Path, metavar="FILE", help="checkpoint to score or to generate with, instead of training"),
    "resume": dict(action="store_true", help="continue the run that was cut off in --run"),
    "generate": dict(type=Path, metavar="FILE", help="particle list to generate responses for; needs --out"),
    "out": dict(type=Path, metavar="FILE", help="HDF5 file to write"),
    "precision": dict(choices=("f32", "bf16"), default="f32", help="of the network in training; bf16 pays on accelerators only"),
    "devices": dict(type=number(int, 1), default=1, metavar="N", help="devices, over all hosts, that share a batch"),
    "quiet": dict(action="store_true", help="no progress bars"),
    "run": dict(type=Path, metavar="DIR", help="folder of the run"),
}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, defaults that may depend on the detector, and the command line as `command`."""

    def error(self, message):
        sys.exit(_fail(f"{message} (--help lists the flags)"))

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        args = super().parse_args(args, namespace)
        args.command = shlex.join(["python", f"{args.script}.py", *words])
        for name, value in vars(args).items():
            if isinstance(value, dict):
                setattr(args, name, value[args.detector])
        if getattr(args, "generate", None):
            if not args.load:
                self.error(f"--generate needs --load, a checkpoint such as weights/{args.script}-zn.eqx")
            if not args.out:
                self.error("--generate needs --out")
        if getattr(args, "load", None) and args.resume:
            self.error("--resume continues a training, it does not go with --load")
        if "devices" in args and args.batch_size % args.devices:
            self.error("--batch-size must be a multiple of --devices")
        return args


def parser(doc, script=None, flags=tuple(FLAGS), **defaults):
    """The command line of a script: the shared `flags` it has, with its own `defaults` and the text `doc` for --help.

    A default may be a dict {"zn": ..., "zp": ...}. `script` (the running file's name if None) names the run folder
    and stands in `args.script`, the whole line in `args.command`. The script adds its own flags with `add_argument`.
    """
    if unknown := defaults.keys() - set(flags):
        raise TypeError(f"defaults for flags that the script does not have: {unknown}")
    script = script or Path(sys.argv[0]).stem
    defaults = {"run": {name: Path("runs", f"{script}-{name}") for name in FLAGS["detector"]["choices"]}} | defaults
    result = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    result.set_defaults(script=script)
    for name in flags:
        options = FLAGS[name] | ({"default": defaults[name]} if name in defaults else {})
        default = options.get("default")
        if isinstance(default, dict):
            default = ", ".join(f"{detector} {value}" for detector, value in default.items())
        if default is not None:
            options["help"] += f" (default: {default})"
        result.add_argument("--" + name.replace("_", "-"), **options)
    return result


def with_flags(args, **changed):
    """A copy of the parsed flags with some of them changed."""
    return argparse.Namespace(**vars(args) | changed)


def training_flags(args, *own):
    """{flag: value} of those that decide what is trained, for the header of a checkpoint: the shared ones and a script's `own`."""
    names = (*own, "cond", "split", "n", "seed", "epochs", "batch_size", "lr", "schedule", "clip", "ema", "precision")
    return {name: getattr(args, name) for name in names} | {"data": str(args.data) if args.data else None}


# ----------------------------------------------------------------------------------------------------------- files

def first_host_only(write):
    """Decorator: in a run over several hosts all compute the same numbers, and the first host alone writes them."""
    @functools.wraps(write)
    def wrapped(*args, **kwargs):
        if jax.process_index() == 0:
            write(*args, **kwargs)
    return wrapped


@contextmanager
def _writing(path):
    try:
        yield
    except OSError as error:  # a full disk does not say which file it was
        raise UserError(f"{path}: not written, {error}") from error


@contextmanager
def write_atomic(path):
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds and vanishes if it fails.

    A kill or a full disk in the middle leaves the old file as it was. UserError if `path` is a folder or a device,
    and for every OSError on the way. HDF5 files go through data.save_blocks, since HDF5 crashes after a failed write.
    """
    path = Path(path).resolve()  # through a link: its target is replaced, not the link
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be written, it is not a regular file")
    name = ".{}.{}.part{}"  # the suffix stays: NumPy and matplotlib look at it
    temporary = path.with_name(name.format(path.stem, secrets.token_hex(4), path.suffix))
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(name.format(glob.escape(path.stem), "*", path.suffix)):
            with suppress(FileNotFoundError):  # another process may clean up as well
                if time.time() - stale.stat().st_mtime > 86400:  # left by a kill, a day ago
                    stale.unlink()
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def plain(value):
    """`value` as JSON can hold it: arrays as lists, paths as text, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@first_host_only
def write_json(path, value):
    """Write `value` (see `plain`) as an indented JSON file, atomically."""
    with write_atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


@first_host_only
def log_line(folder, record):
    """Append `record`, a dict with a "step", as one line to `folder`/log.jsonl."""
    path = Path(folder, "log.jsonl")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")


def read_log(folder):
    """The records of `folder`/log.jsonl, without a last line that a kill cut short; none if there is no file."""
    path = Path(folder, "log.jsonl")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: damaged, expected a JSON object in each line") from error


@first_host_only
def cut_log(folder, step=-1):
    """Drop the lines of the log past `step`: what a resumed run will repeat. A fresh run drops all of them."""
    kept = [record for record in read_log(folder) if record["step"] <= step]
    with write_atomic(Path(folder, "log.jsonl")) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))


# ----------------------------------------------------------------------------------------------------- checkpoints
# One JSON line, then the leaves of a tree as NumPy arrays (equinox.tree_serialise_leaves). No pickle, so a checkpoint
# from a stranger can be loaded; a checksum in the JSON line finds every truncated, extended or altered file.

def cast(tree, dtype):
    """`tree` with its floating-point arrays, or their shapes, in another type."""
    def change(leaf):
        if not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            return leaf
        return leaf.astype(dtype) if hasattr(leaf, "astype") else jax.ShapeDtypeStruct(leaf.shape, dtype)
    return jax.tree.map(change, tree)


PAIRS = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "lc": 1, "lp": 1, "pb": 1}]}      # of bytes
LEVELS = 64                                  # of a small checkpoint per root mean square of a row: 8.5 bits a weight compressed, error 0.45 %


def _is_matrix(leaf):
    return getattr(leaf, "ndim", 0) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _coded(matrix):
    """(step (..., 1) float32, whole numbers (..., N) int16) whose product is nearly `matrix` (..., N)."""
    matrix = np.asarray(matrix, np.float32)
    step = np.sqrt(np.mean(np.square(matrix), axis=-1, keepdims=True)) / LEVELS
    return step, np.round(matrix / np.where(step, step, 1)).astype(np.int16)


def _half_vectors(tree):
    return jax.tree.map(lambda leaf: leaf if _is_matrix(leaf) else cast(leaf, np.float16), tree)


def rounded(tree):
    """`tree` with its numbers as a checkpoint with small=True keeps them: float16; in matrices multiples of a step of each row."""
    coarse = jax.tree.map(lambda leaf: jnp.asarray(math.prod(_coded(leaf))) if _is_matrix(leaf) else leaf, tree)
    return cast(_half_vectors(coarse), np.float32)


@first_host_only
def save_checkpoint(path, header, tree, small=False):
    """Write `tree` (a model, or any tree of arrays, numbers and PRNG keys) behind the JSON-ready dict `header`.

    `small`: about a quarter of the size; loaded again it is `rounded(tree)`.
    """
    leaves, tree = io.BytesIO(), jax.device_get(tree)
    if small:
        eqx.tree_serialise_leaves(leaves, _half_vectors(tree), filter_spec=_save_small_leaf)
    else:
        eqx.tree_serialise_leaves(leaves, tree, filter_spec=_save_leaf)
    header = plain({"format": FORMAT, "small": small} | header | {"versions": versions()})
    line = json.dumps(header | {"crc32": _checksum(header, leaves.getvalue())}, allow_nan=False)
    with write_atomic(path) as temporary:
        temporary.write_bytes(line.encode() + b"\n" + leaves.getvalue())


def read_header(path, script=None, detector=None):
    """The header of a checkpoint, a dict. UserError as load_checkpoint."""
    return _read_checkpoint(path, script, detector)[0]


def load_checkpoint(path, like, script=None, detector=None):
    """(header, tree) of a checkpoint; the leaves of `like`, a tree made by the same code, are replaced by those saved.

    UserError if the file is missing or damaged, if it is of another `script` or `detector`, or if it holds other
    arrays than `like`.
    """
    header, leaves = _read_checkpoint(path, script, detector)
    stream = io.BytesIO(leaves)
    try:
        if header.get("small"):
            tree = cast(eqx.tree_deserialise_leaves(stream, _half_vectors(like), filter_spec=_load_small_leaf), np.float32)
        else:
            tree = eqx.tree_deserialise_leaves(stream, like, filter_spec=_load_leaf)
    except RuntimeError as error:
        raise UserError(f"{path}: holds other arrays than this model and these flags expect: {error}") from error
    if stream.read(1):
        raise UserError(f"{path}: holds more arrays than this model and these flags expect")
    return header, tree


def resume(path, header, like):
    """load_checkpoint of the state of a run that was cut off; UserError if its script, detector, flags or rows differ from
    those of `header`, which this run saves with its own states."""
    found, tree = load_checkpoint(path, like, header["script"], header["detector"])
    changed = [name for name, value in header["flags"].items() if found["flags"].get(name) != value]
    if changed or found["rows"] != header["rows"]:
        raise UserError(f"{path}: --resume needs the flags of the first run; different: {', '.join(changed) or 'rows of the data'}")
    return found, tree


def _read_checkpoint(path, script, detector):
    """(header, bytes of the leaves) of a checkpoint file, checked."""
    try:
        line, _, leaves = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"{path}: expected a checkpoint, {error.strerror or error}") from error
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint, expected a first line of JSON with format {FORMAT}")
    if header.pop("crc32", None) != _checksum(header, leaves):
        raise UserError(f"{path}: damaged, expected the header and {len(leaves)} bytes of arrays to match the checksum")
    for name, expected in (("script", script), ("detector", detector)):
        if expected not in (None, header.get(name)):
            raise UserError(f"{path}: made by {name} {header.get(name)}, expected {name} {expected}")
    return header, leaves


def _checksum(header, leaves):
    return zlib.crc32(leaves, zlib.crc32(json.dumps(header).encode()))


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _save_leaf(file, leaf):
    eqx.default_serialise_filter_spec(file, jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _load_leaf(file, leaf):
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.load(file), impl=jax.random.key_impl(leaf))
    return eqx.default_deserialise_filter_spec(file, leaf)


def _save_small_leaf(file, leaf):
    """A matrix as its steps and its whole numbers, compressed."""
    if not _is_matrix(leaf):
        return _save_leaf(file, leaf)
    step, whole = _coded(leaf)
    np.save(file, step)
    np.save(file, np.frombuffer(lzma.compress(whole.astype(">i2").tobytes(), **PAIRS), np.uint8))


def _load_small_leaf(file, leaf):
    if not _is_matrix(leaf):
        return _load_leaf(file, leaf)
    step, packed = np.load(file), np.load(file)
    whole = np.frombuffer(lzma.decompress(packed.tobytes(), **PAIRS), ">i2").astype(np.float32)
    if step.shape != (*leaf.shape[:-1], 1) or whole.size != math.prod(leaf.shape):
        raise RuntimeError(f"a matrix of {whole.size} numbers in {step.size} rows, expected the shape {leaf.shape}")
    return jnp.asarray(step * whole.reshape(leaf.shape))


# ----------------------------------------------------------------------------------------------------------- plots

def _figure(rows, columns, width, height):
    """A matplotlib figure and its (rows, columns) axes, each width x height inches, without any global state."""
    from matplotlib.figure import Figure  # 0.5 s to import: only where something is drawn
    figure = Figure(figsize=(columns * width + 1, rows * height + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@first_host_only
def _save_figure(path, figure):
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


def plot_samples(path, rows, titles):
    """Draw responses, one row of pictures for each entry of `rows`, {"data": (K, H, W) counts, "model": ...}.

    `titles`: K texts above the columns. Colours are logarithmic and shared in a column; no photon is black.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    _, height, width = np.shape(next(iter(rows.values())))
    figure, axes = _figure(len(rows), len(titles), 1.7, 1.7 * width / height)
    for column, title in enumerate(titles):
        peak = max(np.max(responses[column]) for responses in rows.values())
        norm = LogNorm(0.5, max(peak, 2))  # from 0.5, so that a single photon is not black
        for axis, (name, responses) in zip(axes[:, column], rows.items()):
            image = axis.imshow(np.asarray(responses[column]).T, norm=norm, origin="lower",  # (H, W) is (x, y)
                                cmap=colormaps["inferno"].with_extremes(bad="black"))
            axis.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
        axes[0, column].set_title(title, fontsize=8)
        bar = figure.colorbar(image, ax=axes[:, column], location="bottom", aspect=12, ticks=(1, 10, 100), format="%d")
        bar.set_label("photons", fontsize=8)
        bar.minorticks_off()
    _save_figure(path, figure)


def plot_channels(path, real, generated):
    """Draw the histograms of the five channels, (N, 5) photon sums each, as Fig. 9 of the flow matching paper (Wojnar).

    The bins follow the real data; the last one also holds what the model put beyond.
    """
    figure, axes = _figure(1, len(CHANNEL_NAMES), 2.6, 2.4)
    for axis, name, a, b in zip(axes[0], CHANNEL_NAMES, np.asarray(real).T, np.asarray(generated).T):
        bins = np.linspace(0, 1.1 * max(a.max(), 1), 61)
        axis.hist(a, bins, density=True, log=True, color="0.75", label="data")
        axis.hist(np.clip(b, 0, bins[-1]), bins, density=True, log=True, histtype="step", label="model")
        axis.set(title=name, xlabel="photons")
    axes[0, 0].set_ylabel("density")
    axes[0, 0].legend()
    _save_figure(path, figure)


@first_host_only
def plot_training(path, records):
    """Draw every number in the `records` of a log (see `read_log`), at least one, against the step, one panel each."""
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name != "step"]
    figure, axes = _figure(1, len(names), 3, 2.4)
    for axis, name in zip(axes[0], names):
        values = [(record["step"], record[name]) for record in records if isinstance(record.get(name), (int, float))]
        axis.plot(*zip(*values), marker="." if len(values) < 20 else "")
        axis.set(title=name, xlabel="step")
    _save_figure(path, figure)


def plot_sweep(path, points):
    """Draw the score W against what a sampler is given: its steps and the time they take, eta, temperature.

    `points`: dicts with "steps", "W", "ms_per_response", where there are several curves their "label" and, where the simulator
    can be run again, "oracle". A panel holds the curves that differ in its quantity from point to point.
    """
    curves = {}
    for point in points:
        curves.setdefault(point.get("label"), []).append(point)
    differ = lambda name: [label for label, curve in curves.items() if len({point.get(name) for point in curve}) > 1]
    steps, eta, temperature = (differ(name) for name in ("steps", "eta", "temperature"))
    panels = [("steps", steps), ("ms_per_response", steps), ("eta", eta), ("temperature", temperature)]
    panels = [panel for panel in panels if panel[1]] or [("steps", list(curves))]
    figure, axes = _figure(1, len(panels), 3.4, 2.6)
    for axis, (name, labels) in zip(axes[0], panels):
        for label in labels:
            axis.plot(*zip(*[(point[name], point["W"]) for point in curves[label]]), marker="o", label=label or "model")
        if "oracle" in points[0]:
            axis.axhline(points[0]["oracle"], color="0.5", linestyle="--", label="oracle")
        axis.set(xscale="log" if name in ("steps", "ms_per_response") else "linear", xlabel=name.replace("_", " "), ylabel="W")
        axis.set_ylim(bottom=0)
        ticks = [point[name] for point in curves[labels[0]]]
        axis.set_xticks(ticks, [f"{tick:.2g}" if name == "ms_per_response" else f"{tick:g}" for tick in ticks], fontsize=7)
        axis.minorticks_off()
        if name != "ms_per_response":                                          # it has the curves of the panel before
            axis.legend()
    _save_figure(path, figure)


# ---------------------------------------------------------------------------------------------- progress and timing

def progress(what, label, quiet=False):
    """`what`, an iterable or a number of rounds, with a bar that shows the remaining time; none if `quiet`."""
    rounds = range(what) if isinstance(what, int) else what
    interval = 0.2 if sys.stderr.isatty() else 30  # s; a log file need not hold every state of the bar
    return tqdm(rounds, desc=label, disable=quiet, mininterval=interval, dynamic_ncols=True)


LOGGED = 50                                    # steps from one line of log.jsonl to the next


class Logbook:
    """The book that a training loop keeps: a progress bar, log.jsonl every LOGGED steps and its picture, the state once a minute
    and at the end.

    `header` stands before each saved state and holds its "script", "detector", "flags" and "rows", which --resume wants
    unchanged. `step` counts the steps done, out of `steps`. Used in a `with`, so that the bar is closed before an error is told.
    """

    def __init__(self, args, header, steps):
        self.args, self.header, self.steps, self.path = args, header, steps, args.run / "state.eqx"
        self.step, self.before, self.checkpoint = 0, 0.0, None
        label = f"training {header['script']} on {header['detector']}"
        self.bar = progress(steps, label, args.quiet)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def begin(self, state):
        """The state to start from: `state` itself or, with --resume, the saved one, a tree of the same shapes."""
        if self.args.resume:
            found, state = resume(self.path, self.header, state)
            self.step, self.before, self.checkpoint = found["step"], found["seconds"], self.path
        cut_log(self.args.run, self.step if self.args.resume else -1)
        self.bar.update(self.step)
        self.began = self.saved = time.perf_counter()
        return state

    def record(self, state, losses):
        """To be called after each step with its state and its losses, a dict of scalars, which the device is asked for only
        now and then. Diverged if one is not finite."""
        self.step += 1
        self.bar.update()
        if self.step % LOGGED and self.step < self.steps:
            return
        losses = {name: float(value) for name, value in losses.items()}
        now = time.perf_counter()
        here = {"step": self.step, "seconds": self.before + now - self.began}
        check_finite(sum(losses.values()), self.step, self.checkpoint)
        log_line(self.args.run, here | losses)
        if now - self.saved > 60 or self.step == self.steps:
            save_checkpoint(self.path, self.header | here, state)
            self.saved, self.checkpoint = now, self.path

    def end(self):
        """Draws training.png. {"train_seconds": of this run and those before, "step_seconds": median, None without two lines in
        the log}."""
        lines = read_log(self.args.run)
        if lines:
            plot_training(self.args.run / "training.png", lines)
        per_step = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(lines)]
        return {"train_seconds": self.before + time.perf_counter() - self.began,
                "step_seconds": float(np.median(per_step)) if per_step else None}


BATCHES = 1, 32, 256, 1024, 8192, 16384   # to time where a response costs little (paper 001, Table 3)


def time_sampler(sample, sizes, repeats=5):
    """Time `sample(batch_size) -> array`: {"ms_per_response": {"1": ms, ...}, "compile_seconds": {"1": s, ...}}.

    The first call of each size compiles; then the median of `repeats` calls counts, each waited for to its end.
    compile_seconds is what the first call took longer than that.
    """
    times = {size: [_seconds(sample, size) for _ in range(1 + repeats)] for size in sizes}
    medians = {size: float(np.median(t[1:])) for size, t in times.items()}
    return {"ms_per_response": {str(size): 1e3 * medians[size] / size for size in sizes},
            "compile_seconds": {str(size): max(times[size][0] - medians[size], 0.0) for size in sizes}}


def _seconds(function, *arguments):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def race(functions, repeats=3):
    """Seconds of each function() in the dict `functions`, the fastest of `repeats`, called in turn so that all see the same
    machine; a first round compiles and does not count."""
    rounds = [{name: _seconds(function) for name, function in functions.items()} for _ in range(1 + repeats)]
    return {name: min(seconds[name] for seconds in rounds[1:]) for name in functions}


def print_rows(rows):
    """Print dicts with the same keys as a table."""
    text = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [[name.replace("_", " ") for name in rows[0]], *text]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths)))


def network_cost(net, *inputs):
    """{"parameters", "mflop"}: trainable numbers, and 10^6 floating-point operations of net(*inputs) as XLA counts them.
    `inputs` are the shapes of one example's."""
    arrays, rest = eqx.partition(net, eqx.is_array)
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in inputs]
    call = jax.jit(lambda arrays, *inputs: eqx.combine(arrays, rest)(*inputs))
    return {"parameters": count_parameters(net), "mflop": call.lower(arrays, *inputs).compile().cost_analysis()["flops"] / 1e6}


def count_parameters(tree):
    """The number of trainable numbers in a model: all its floating-point arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


# ---------------------------------------------------------------------------------------------- machine and devices

def versions():
    """{"zdc": ..., "python": ..., "jax": ..., ...}: what made a result."""
    packages = ("jax", "jaxlib", "equinox", "optax", "numpy")
    return {"zdc": VERSION, "python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _cpuinfo(*fields):
    """The first of the `fields` in Linux's /proc/cpuinfo, "" on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fields)), "")


def device_name():
    """The devices that JAX computes on: CPU model and usable cores, or number and kind of the accelerators."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpuinfo('model name') or platform.processor() or platform.machine()}, {cores} cores"


def cache_folder():
    """Where data sets and compiled code are kept between runs: ZDC_CACHE, else ~/.cache/zdc."""
    return Path(os.environ.get("ZDC_CACHE") or Path.home() / ".cache" / "zdc")


def enable_compilation_cache():
    """Keep compiled code on disk, so that a second run starts in seconds. Call it before anything is compiled."""
    features = _cpuinfo("flags", "Features")  # code compiled for one CPU may crash another that shares the folder
    folder = cache_folder() / "xla" / f"{zlib.crc32(features.encode()):08x}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the defaults skip everything small,
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # and a script is many small functions


def initialize_hosts():
    """Join the hosts of one run, if these are set; call it before JAX is first used.

    ZDC_COORDINATOR: host:port of the first host; ZDC_PROCESSES: how many hosts; ZDC_PROCESS_ID: this one's number,
    from 0. UserError if only some are set. Every host then runs the same command; the first writes the files.
    """
    names = ("ZDC_COORDINATOR", "ZDC_PROCESSES", "ZDC_PROCESS_ID")
    values = [os.environ.get(name) for name in names]
    if not any(values):
        return
    if not all(values) or not (values[1] + values[2]).isdigit():
        raise UserError(f"{', '.join(names)}: expected host:port and two numbers, got {values}")
    jax.distributed.initialize(values[0], num_processes=int(values[1]), process_id=int(values[2]))


def batch_mesh(n):
    """A mesh of `n` devices, over all hosts, with the one axis "batch". UserError if JAX sees fewer."""
    devices = jax.devices()
    if n > len(devices):
        raise UserError(f"--devices {n}: JAX sees {len(devices)} of kind {devices[0].device_kind}")
    return jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,), devices=devices[:n])


def shard_batch(tree, mesh):
    """The arrays of `tree`, (B, ...) with this host's rows, as arrays of all hosts' rows, spread over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree)


def replicate(tree, mesh):
    """The arrays of `tree`, equal on all hosts, copied to every device of the mesh."""
    return eqx.filter_shard(tree, NamedSharding(mesh, PartitionSpec()))
