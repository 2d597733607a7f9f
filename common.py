"""What every script needs and no script is about: flags, files, checkpoints, log book, layers, plots, timing,
devices.

No model, no loss and no training loop stands here. Whatever can go wrong for a user (a flag, a file, a full
disk) ends in one line on stderr and exit code 2; a file is written under another name first, so an old one is
never lost.
"""
import argparse
import functools
import glob
import io
import itertools
import json
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
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

VERSION = "0.2.0"
FORMAT = "zdc-checkpoint-4"


# ----------------------------------------------------------------------------------------------------- errors

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


# ------------------------------------------------------------------------------------------------------ flags

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


# The shared flags: the same name, meaning and unit in every script. A script changes the defaults, not the
# meaning.
FLAGS = {
    "detector": dict(choices=("zn", "zp"), default="zn", help="neutron (zn) or proton (zp) calorimeter"),
    "data": dict(type=Path, metavar="PATH",
                 help="train on this HDF5 file or folder with the papers' npz pair, instead of the open data set"),
    "n": dict(type=number(int, 1, 10**9), metavar="ROWS", help="rows of the open data set"),
    "split": dict(choices=("rows", "particles"), default="rows",
                  help="split 70:10:20 into train, validation and test by rows, or by whole particles"),
    "cond": dict(choices=("raw", "physics"), default="physics",
                 help="condition on the nine features, or also on impact points and log energy"),
    "epochs": dict(type=number(int, 1, 10**6), default=10, metavar="N", help="passes over the training rows"),
    "batch_size": dict(type=number(int, 1, 10**7), default=256, metavar="ROWS", help="responses per training step"),
    "lr": dict(type=number(float, 0, 1), default=1e-3, metavar="RATE", help="peak learning rate"),
    "schedule": dict(choices=("onecycle", "cosine"), default="onecycle",
                     help="course of the learning rate over the run"),
    "clip": dict(type=number(float, 0), default=1.0, metavar="NORM", help="gradients are scaled down to this norm"),
    "ema": dict(type=number(float, 0, 0.99999), default=0.999, metavar="DECAY",
                help="decay per step of the moving average of the weights"),
    "seed": dict(type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="fixes every random number of the run"),
    "steps": dict(type=number(int, 1, 1000), default=11, metavar="N", help="steps of the sampler"),
    "load": dict(type=Path, metavar="FILE", help="score or generate with this checkpoint, instead of training"),
    "resume": dict(action="store_true", help="continue the run in --run where it was cut off"),
    "validate": dict(action="store_true",
                     help="score W and MAE on the validation rows only, to choose settings without the test rows"),
    "generate": dict(type=Path, metavar="FILE", help="generate responses for this particle list; needs --out"),
    "out": dict(type=Path, metavar="FILE", help="write this HDF5 file"),
    "precision": dict(choices=("f32", "bf16"), default="f32",
                      help="number format of the network in training; bf16 pays on accelerators only"),
    "devices": dict(type=number(int, 1), default=1, metavar="N", help="devices, over all hosts, that share a batch"),
    "quiet": dict(action="store_true", help="show no progress bars"),
    "run": dict(type=Path, metavar="DIR", help="folder of the run"),
}
TRAINING = ("cond", "split", "n", "seed", "epochs", "batch_size", "lr", "schedule", "clip", "ema", "precision")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and with defaults and a loaded checkpoint resolved in one place."""

    def error(self, message):
        sys.exit(_fail(f"{message} (--help lists the flags)"))

    def parse_args(self, args=None, namespace=None):
        """The resolved flags. Beside them: `command`, the whole line, and for a script that trains `header`:
        the checkpoint's of --load, whose `own` flags and data are then in force, or what a new checkpoint
        will begin with. A default that is a dict or a function is resolved by the detector or with the other
        flags."""
        words = sys.argv[1:] if args is None else args
        args = super().parse_args(args, namespace)
        args.command = shlex.join(["python", f"{args.script}.py", *words])
        if "load" in args:
            self._check(args)
        if getattr(args, "load", None):
            args.header = read_model_header(args.load, args.script, args.detector, (*self.own, "cond", "n", "split"))
            vars(args).update({name: args.header["flags"][name] for name in (*self.own, "cond", "n", "split")})
        for name, value in vars(args).items():
            if isinstance(value, dict) and name != "header":
                setattr(args, name, value[args.detector])
            elif callable(value):
                setattr(args, name, value(args))
        if "load" in args and not args.load:
            flags = {name: getattr(args, name) for name in (*self.own, *TRAINING)}
            flags["data"] = str(args.data) if args.data else None
            args.header = {"script": args.script, "detector": args.detector, "flags": flags}
        return args

    def _check(self, args):
        if args.generate and not args.load:
            self.error(f"--generate needs --load, a checkpoint such as weights/{args.script}-zn.eqx")
        if args.generate and not args.out:
            self.error("--generate needs --out")
        if args.load and args.resume:
            self.error("--resume continues a training, it does not go with --load")
        if args.batch_size % args.devices:
            self.error("--batch-size must be a multiple of --devices")


def parser(doc, script=None, flags=tuple(FLAGS), own=(), **defaults):
    """The command line of a script: the shared `flags` it has, with its own `defaults` and the text `doc` for
    --help.

    A default may be a dict {"zn": ..., "zp": ...}, or a function of the parsed flags. `script` (the running
    file's name if None) names the run folder. The script adds its own flags with `add_argument`; those named
    in `own` decide what is trained: they are kept in checkpoints, and --load brings them back.
    """
    if unknown := defaults.keys() - set(flags):
        raise TypeError(f"defaults for flags that the script does not have: {unknown}")
    script = script or Path(sys.argv[0]).stem
    defaults = {"run": {name: Path("runs", f"{script}-{name}") for name in FLAGS["detector"]["choices"]}} | defaults
    result = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    result.set_defaults(script=script)
    result.own = own
    for name in flags:
        options = FLAGS[name] | ({"default": defaults[name]} if name in defaults else {})
        default = options.get("default")
        if isinstance(default, dict):
            default = ", ".join(f"{detector} {value}" for detector, value in default.items())
        if default not in (None, False):
            options["help"] += f" (default: {default})"
        result.add_argument("--" + name.replace("_", "-"), **options)
    return result


class Plan(NamedTuple):
    """How a network is trained: the shared flags of training, and the `header` of the checkpoint, a dict."""
    header: dict
    run: Path
    epochs: int
    batch_size: int
    lr: float
    schedule: str
    clip: float
    ema: float
    precision: str
    seed: int
    devices: int
    resume: bool
    quiet: bool

    @property
    def keys(self):
        """(key of the initial weights, key of the noise in training)."""
        return jax.random.split(jax.random.key(self.seed))


def plan(args):
    """The Plan of the parsed flags."""
    return Plan(*(getattr(args, name) for name in Plan._fields))


# ------------------------------------------------------------------------------------------------------ files

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
    """Yield a temporary path beside `path`; it replaces `path` if the block succeeds and vanishes if it
    fails.

    A kill or a full disk in the middle leaves the old file as it was. UserError if `path` is a folder or a
    device, and for every OSError on the way. HDF5 files go through data.save_blocks, since HDF5 crashes after
    a failed write.
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


# ------------------------------------------------------------------------------------------------ checkpoints
# One JSON line, then the leaves of a tree as NumPy arrays (equinox.tree_serialise_leaves). No pickle, so a
# checkpoint from a stranger can be loaded; a checksum in the JSON line finds every truncated, extended or
# altered file.

def cast(tree, dtype):
    """`tree` with its floating-point arrays, or their shapes, in another type."""
    def change(leaf):
        if not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            return leaf
        return leaf.astype(dtype) if hasattr(leaf, "astype") else jax.ShapeDtypeStruct(leaf.shape, dtype)
    return jax.tree.map(change, tree)


def lower(net, precision):
    """The network in the number format of --precision, f32 or bf16."""
    return cast(net, jnp.bfloat16) if precision == "bf16" else net


@first_host_only
def save_checkpoint(path, header, tree):
    """Write `tree` (a model, or any tree of arrays, numbers and PRNG keys) behind the JSON-ready dict `header`."""
    leaves = io.BytesIO()
    eqx.tree_serialise_leaves(leaves, jax.device_get(tree), filter_spec=_save_leaf)
    header = plain({"format": FORMAT} | header | {"versions": versions()})
    line = json.dumps(header | {"crc32": _checksum(header, leaves.getvalue())}, allow_nan=False)
    with write_atomic(path) as temporary:
        temporary.write_bytes(line.encode() + b"\n" + leaves.getvalue())


def read_header(path, script=None, detector=None):
    """The header of a checkpoint, a dict. UserError as load_checkpoint."""
    return _read_checkpoint(path, script, detector)[0]


def read_model_header(path, script, detector, flags):
    """The header of a trained model's checkpoint. UserError for the state of a run, or where one of `flags` is missing."""
    header = read_header(path, script, detector)
    if "scaler" not in header:
        raise UserError(f"{path}: the state of a run, expected its model.eqx")
    if missing := [name for name in flags if name not in header["flags"]]:
        raise UserError(f"{path}: made by another version, without --{missing[0]}")
    return header


def load_checkpoint(path, like, script=None, detector=None):
    """(header, tree) of a checkpoint; the leaves of `like`, a tree made by the same code, are replaced by
    those saved.

    UserError if the file is missing or damaged, if it is of another `script` or `detector`, or if it holds
    other arrays than `like`.
    """
    header, leaves = _read_checkpoint(path, script, detector)
    stream = io.BytesIO(leaves)
    try:
        tree = eqx.tree_deserialise_leaves(stream, like, filter_spec=_load_leaf)
    except RuntimeError as error:
        raise UserError(f"{path}: holds other arrays than this model and these flags expect: {error}") from error
    if stream.read(1):
        raise UserError(f"{path}: holds more arrays than this model and these flags expect")
    return header, tree


def save_model(run, header, scaler, scores, net):
    """Write model.eqx into the folder `run`, in float16; returns the network as it is kept there, in float32.

    `header`: script, detector and flags; `scaler`: of the conditions; `scores`: what the Logbook found."""
    header = header | {"scaler": scaler._asdict(), "parameters": count_parameters(net), "scores": scores}
    half = cast(net, jnp.float16)
    save_checkpoint(run / "model.eqx", header, half)
    return cast(half, jnp.float32)


def load_model(path, make):
    """The network of a checkpoint written by `save_model`; `make(key)` builds one of the same shapes."""
    like = cast(eqx.filter_eval_shape(make, jax.random.key(0)), jnp.float16)   # compiles nothing
    return cast(load_checkpoint(path, like)[1], jnp.float32)


def resume(path, header, like):
    """load_checkpoint of the state of a run that was cut off; UserError if its script, detector, flags or
    rows differ from those of `header`, which this run saves with its own states."""
    found, tree = load_checkpoint(path, like, header["script"], header["detector"])
    changed = [name for name, value in header["flags"].items() if found["flags"].get(name) != plain(value)]
    if changed or found["rows"] != header["rows"]:
        different = ", ".join(changed) or "rows of the data"
        raise UserError(f"{path}: --resume needs the flags of the first run; different: {different}")
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


# -------------------------------------------------------------------------------------- progress and log book

def progress(what, label, quiet=False):
    """`what`, an iterable or a number of rounds, with a bar that shows the remaining time; none if `quiet`."""
    rounds = range(what) if isinstance(what, int) else what
    interval = 0.2 if sys.stderr.isatty() else 30  # s; a log file need not hold every state of the bar
    return tqdm(rounds, desc=label, disable=quiet, mininterval=interval, dynamic_ncols=True)


LOGGED = 50  # steps from one line of log.jsonl to the next


class Logbook:
    """The book that a training loop keeps: a progress bar, log.jsonl every LOGGED steps and its picture, the
    state once a minute and at the end.

    Each saved state has the header of the `plan` and the number of training `rows`, which --resume wants
    unchanged. `step` counts the steps done, out of `steps`. Used in a `with`, so that the bar is closed
    before an error is told.
    """

    def __init__(self, plan, rows, steps):
        self.plan, self.header, self.steps = plan, plan.header | {"rows": rows}, steps
        self.path, self.step, self.before, self.checkpoint = plan.run / "state.eqx", 0, 0.0, None
        self.bar = progress(steps, f"training {plan.header['script']} on {plan.header['detector']}", plan.quiet)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def begin(self, state):
        """The state to start from: `state` itself or, with --resume, the saved one, a tree of the same shapes."""
        if self.plan.resume:
            found, state = resume(self.path, self.header, state)
            self.step, self.before, self.checkpoint = found["step"], found["seconds"], self.path
        cut_log(self.plan.run, self.step if self.plan.resume else -1)
        self.bar.update(self.step)
        self.began = self.saved = time.perf_counter()
        return state

    def record(self, state, losses):
        """To be called after each step with its state and its losses, a dict of scalars, which the device is
        asked for only now and then. Diverged if one is not finite."""
        self.step += 1
        self.bar.update()
        if self.step % LOGGED and self.step < self.steps:
            return
        losses = {name: float(value) for name, value in losses.items()}
        now = time.perf_counter()
        here = {"step": self.step, "seconds": self.before + now - self.began}
        check_finite(sum(losses.values()), self.step, self.checkpoint)
        log_line(self.plan.run, here | losses)
        if now - self.saved > 60 or self.step == self.steps:
            save_checkpoint(self.path, self.header | here, state)
            self.saved, self.checkpoint = now, self.path

    def end(self):
        """{"train_seconds": of this run and those before, "step_seconds": median,
        None without two lines in the log}."""
        lines = read_log(self.plan.run)
        per_step = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(lines)]
        return {"train_seconds": self.before + time.perf_counter() - self.began,
                "step_seconds": float(np.median(per_step)) if per_step else None}


# ---------------------------------------------------------------------- layers, optimiser, batches and blocks

def normal(key, *shape, scale=None):
    """Normal weights (..., inputs, outputs), of variance 1 / fan-in or of standard deviation `scale`."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


class Linear(eqx.Module):
    """A linear layer on the last axis, (..., inputs) -> (..., outputs), in the number format of its weights.

    Its first weights, times `scale`, are uniform as in eqx.nn.Linear; without a bias, normal of variance 1 /
    inputs. One product for all axes: vmap over eqx.nn.Linear is twice as slow on a CPU.
    """
    weight: jax.Array
    bias: jax.Array | None

    def __init__(self, inputs, outputs, key, scale=1.0, bias=True):
        layer = eqx.nn.Linear(inputs, outputs, key=key) if bias else None
        self.weight = scale * (layer.weight if bias else normal(key, inputs, outputs).T)
        self.bias = layer.bias if bias else None

    def __call__(self, x):
        x = x.astype(self.weight.dtype) @ self.weight.T
        return x if self.bias is None else x + self.bias


class MLP(eqx.Module):
    """Linear layers with SiLU between them, on the last axis: (..., widths[0]) -> (..., widths[-1])."""
    layers: list

    def __init__(self, key, *widths):
        self.layers = [Linear(*pair, k) for k, pair in zip(jax.random.split(key, len(widths)), zip(widths, widths[1:]))]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.silu(layer(x))
        return self.layers[-1](x)


def normalise(h):
    """Root-mean-square norm over the last axis."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


class State(eqx.Module):
    """What a training step changes: the network, the moving average of its weights, the state of the optimiser."""
    net: eqx.Module
    ema: eqx.Module
    optimiser: optax.OptState


def first_state(net, optimiser):
    """The State before the first step."""
    ema = jax.tree.map(lambda a: jnp.copy(a) if eqx.is_array(a) else a, net)  # a copy: a step gives its buffers away
    return State(net, ema, optimiser.init(eqx.filter(net, eqx.is_inexact_array)))


def moving_average(ema, net, decay, step):
    """`ema` after a step, 0 the first, that ended in `net`: ema <- decay ema + (1 - decay) net, faster at first."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    mix = lambda old, new: decay * old + (1 - decay) * new if eqx.is_inexact_array(old) else old
    return jax.tree.map(mix, ema, net)


def adamw(plan, steps, **options):
    """AdamW behind a clip of the gradient norm; the learning rate ends near 0 after `steps` steps."""
    schedule = (optax.cosine_onecycle_schedule(steps, plan.lr, 0.1, 10, 100) if plan.schedule == "onecycle"
                else optax.cosine_decay_schedule(plan.lr, steps))
    options = {"b2": 0.99, "weight_decay": 1e-4} | options
    return optax.chain(optax.clip_by_global_norm(plan.clip), optax.adamw(schedule, **options))


def shuffled(rows, size, rng):
    """Index arrays (size,) that visit `rows` once in random order; the last short batch is dropped."""
    order = rng.permutation(rows)
    return order[:len(order) // size * size].reshape(-1, size)


def batches(arrays, rows, plan, mesh, start=0):
    """Yield the batches of a whole training from the step `start` on: the given `rows` of each of `arrays`
    (N, ...), in an order that --seed and the epoch fix, as tuples of arrays (batch_size, ...) spread over the
    hosts and devices of `mesh`.
    """
    per_epoch = len(rows) // plan.batch_size
    for epoch in range(start // per_epoch, plan.epochs):
        order = shuffled(rows, plan.batch_size, np.random.default_rng([plan.seed, epoch]))
        for batch in order[start % per_epoch if epoch == start // per_epoch else 0:]:
            here = np.split(batch, jax.process_count())[jax.process_index()]  # the rows of this host
            yield shard_batch(tuple(array[here] for array in arrays), mesh)


BLOCK = 256  # responses per call when many are made; larger blocks leave a CPU's cache


def in_blocks(function, key, *arrays):
    """function(*blocks, key) over the rows of `arrays` (N, ...), BLOCK at a time with a key of its own: an
    array (N, ...). The last block is filled up with zeros, so that a compiled function meets one shape."""
    rows, found = len(arrays[0]), []
    for start in range(0, rows, BLOCK):
        blocks = [array[start:start + BLOCK] for array in arrays]
        short = BLOCK - len(blocks[0])
        blocks = [np.pad(block, [(0, short)] + [(0, 0)] * (block.ndim - 1)) for block in blocks]
        found.append(np.asarray(function(*blocks, jax.random.fold_in(key, start)))[:BLOCK - short])
    return np.concatenate(found)


# ---------------------------------------------------------------------------------------------- time and cost

BATCHES = 1, 32, 256, 1024, 8192, 16384  # to time where a response costs little [Poster, Table 3]


def time_sampler(draw, width, sizes, repeats=5):
    """Time draw(c (size, width), key) on a batch of each of `sizes`, on a CPU in blocks as responses are
    generated: {"ms_per_response": {"1": ms, ...}, "compile_seconds": {"1": s, ...}}.

    The first call of each size compiles; then the median of `repeats` calls counts, each waited for to its
    end. compile_seconds is what the first call took longer than that.
    """
    key, blocked = jax.random.key(0), lambda c, key: in_blocks(draw, key, c)
    times = {}
    for size in sizes:
        call = blocked if size > BLOCK and jax.default_backend() == "cpu" else draw
        times[size] = [seconds(call, np.zeros((size, width), np.float32), key) for _ in range(1 + repeats)]
    medians = {size: float(np.median(t[1:])) for size, t in times.items()}
    return {"ms_per_response": {str(size): 1e3 * medians[size] / size for size in sizes},
            "compile_seconds": {str(size): max(times[size][0] - medians[size], 0.0) for size in sizes}}


def seconds(function, *arguments):
    """What a call takes, waited for to its end."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def print_rows(rows):
    """Print dicts with the same keys as a table."""
    text = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [[name.replace("_", " ") for name in rows[0]], *text]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(word.rjust(width) for word, width in zip(line, widths)))


def network_cost(net, *inputs):
    """{"parameters", "mflop"}: trainable numbers, and 10^6 floating-point operations of net(*inputs) as XLA
    counts them. `inputs` are the shapes of one example's."""
    arrays, rest = eqx.partition(net, eqx.is_array)
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in inputs]
    call = jax.jit(lambda arrays, *inputs: eqx.combine(arrays, rest)(*inputs))
    return {"parameters": count_parameters(net), "mflop": call.lower(arrays, *inputs).compile().cost_analysis()["flops"] / 1e6}


def count_parameters(tree):
    """The number of trainable numbers in a model: all its floating-point arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


# ---------------------------------------------------------------------------------------- machine and devices

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


def prepare_jax():
    """What a run needs before JAX is first used: its hosts and the cache of compiled code."""
    initialize_hosts()
    enable_compilation_cache()


def initialize_hosts():
    """Join the hosts of one run, if these are set; call it before JAX is first used.

    ZDC_COORDINATOR: host:port of the first host; ZDC_PROCESSES: how many hosts; ZDC_PROCESS_ID: this one's
    number, from 0. UserError if only some are set. Every host then runs the same command; the first writes
    the files.
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
