"""The glue of all scripts: flags, checkpoints, log book, layers, optimiser, batches, timing, devices.

Whatever can go wrong for a user (a flag, a file, a full disk) ends in one line on stderr and exit code 2.
"""
import argparse
import io
import json
import math
import os
import platform
import shlex
import sys
import time
import zlib
from contextlib import AbstractContextManager
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

import files
from files import UserError

VERSION = "0.8.0"
FORMAT = "zdc-checkpoint-4"
WEIGHTS = Path(__file__).parent / "weights"
LOGGED = 50  # steps from one line of log.jsonl to the next
BLOCK = 256  # responses per call when many are made; larger ones leave a CPU's cache
BATCHES = 1, 32, 256, 1024, 8192, 16384  # sizes to time where a response costs little [Poster, Table 3]


# ----------------------------------------------------------------------------------------------------- errors

def run(main):
    """Call `main()` as the command line does: a user's error becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
    except (UserError, OSError, MemoryError) as error:
        sys.exit(fail(str(error) or "out of memory"))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(fail("the device is out of memory, try a smaller --batch-size"))


def fail(message):
    """Print one `error:` line; returns the exit code."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def check_finite(loss, step, checkpoint):
    """UserError if the loss of `step` is not a finite number; `checkpoint` is the last good one, or None."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}, last good checkpoint: {checkpoint or 'none'}")


# ------------------------------------------------------------------------------------------------------ flags

def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` (int or float) with low <= value <= high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value
    parse.__name__ = kind.__name__  # argparse puts it into "invalid int value: 'x'"
    return parse


# The shared flags have the same name, meaning and unit in every script; only their defaults may differ.
FLAGS = {
    "detector": dict(choices=("zn", "zp"), default="zn", help="neutron (zn) or proton (zp) calorimeter"),
    "data": dict(type=Path, metavar="PATH",
                 help="HDF5 file, or folder with the papers' npz pair, to train on instead of the open data"),
    "axes": dict(choices="xy xY Xy XY yx yX Yx YX".split(), metavar="AXES",
                 help="how fibres of --data count, capitals against an axis (default: see orientation.py)"),
    "n": dict(type=number(int, 1, 10**9), metavar="ROWS", help="rows of the open data set"),
    "split": dict(choices=("rows", "particles"), default="rows",
                  help="split 70:10:20 into train, validation and test by rows, or by whole particles"),
    "cond": dict(choices=("raw", "physics"), default="physics",
                 help="condition on the nine features, or also on impact points and log energy"),
    "epochs": dict(type=number(int, 1, 10**6), default=10, metavar="N", help="passes over the training rows"),
    "batch_size": dict(type=number(int, 1, 10**7), default=256, metavar="N", help="rows per training step"),
    "lr": dict(type=number(float, 0, 1), default=1e-3, metavar="RATE", help="peak learning rate"),
    "ema": dict(type=number(float, 0, 0.99999), default=0.999, metavar="DECAY",
                help="decay per step of the moving average of the weights"),
    "seed": dict(type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="seed of all random numbers"),
    "steps": dict(type=number(int, 1, 1000), default=11, metavar="N", help="steps of the sampler"),
    "load": dict(type=Path, metavar="FILE", help="score this checkpoint or generate with it; no training"),
    "finetune": dict(type=Path, metavar="FILE",
                     help="train on from this checkpoint, with its scaling of the conditions"),
    "resume": dict(action="store_true", help="continue the run in --run where it was cut off"),
    "validate": dict(action="store_true", help="score W and MAE on the validation rows, not the test rows"),
    "generate": dict(type=Path, metavar="FILE", help="generate responses of this particle list into --out"),
    "hit": dict(type=Path, metavar="FILE", default=lambda args: WEIGHTS / f"hit-{args.detector}.eqx",
                help="network of hit.py by which --generate draws who gives light (default: of weights/)"),
    "all_hit": dict(action="store_true", help="let --generate give light to every particle of the list"),
    "rows": dict(metavar="A:B", help="let --generate draw rows A to B - 1 alone, as in the whole (lists.py)"),
    "min_eta": dict(type=number(float, 0), default=6.0, help="least |eta| of particles in HepMC files"),
    "events": dict(type=Path, metavar="FILE", help="write sums over the events of --generate to this file"),
    "out": dict(type=Path, metavar="FILE", help="write this HDF5 file, or ROOT if it ends in .root"),
    "precision": dict(choices=("f32", "bf16"), default="f32",
                      help="number format of the network in training; bf16 pays on accelerators only"),
    "devices": dict(type=number(int, 1), default=1, metavar="N", help="devices to train on, over all hosts"),
    "threads": dict(type=number(int, 1), metavar="N", help="threads of this process (default: a core each)"),
    "quiet": dict(action="store_true", help="show no progress bars"),
    "run": dict(type=Path, metavar="DIR", help="folder of the run (default: runs/SCRIPT-DETECTOR)")}
TRAINING = "cond", "split", "n", "seed", "epochs", "batch_size", "lr", "ema", "precision"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which resolves defaults and a loaded checkpoint in one place."""

    def error(self, message):
        sys.exit(fail(f"{message} (--help lists the flags)"))

    def parse_args(self, args=None, namespace=None):
        """The resolved flags, `command`, which is the whole line, and `header`: of a new checkpoint or, with
        --load, of the loaded one, whose `own` flags and data are in force then; with --finetune the flags of
        its network. A default that is a dict is resolved by the detector, a function with the other flags."""
        words = sys.argv[1:] if args is None else args
        args, header = super().parse_args(args, namespace), None
        args.command = shlex.join(["python", f"{args.script}.py", *words])
        args.detector = args.detector(args) if callable(args.detector) else args.detector
        if "load" in args:
            self._check(args)
            if begin := args.load or vars(args).get("finetune"):
                names = ("cond", "n", "split") if args.load else ("cond",)
                kept = [name for name in self.own if not name.endswith("epochs")]
                kept += [name for name in names if name in args]
                header = read_model_header(begin, args.script, args.detector, kept)
                vars(args).update({name: header["flags"][name] for name in kept})
        if vars(args).get("threads"):
            limit_threads(args.threads)
        for name, value in sorted(vars(args).items(), key=lambda item: callable(item[1])):  # functions last
            value = value[args.detector] if isinstance(value, dict) else value
            setattr(args, name, value(args) if callable(value) else value)
        flags = {name: getattr(args, name) for name in (*self.own, *TRAINING) if name in args}
        for name in ("data", "finetune"):
            flags[name] = str(getattr(args, name)) if getattr(args, name, None) else None
        fresh = {"script": args.script, "detector": args.detector, "flags": flags}
        args.header = header if getattr(args, "load", None) else fresh
        return args

    def _check(self, args):
        if args.generate and not (args.load and args.out):
            self.error(f"--generate needs --out and --load, such as weights/{args.script}-zn.eqx")
        if not args.generate and any(vars(args).get(name) for name in ("rows", "events", "all_hit")):
            self.error("--rows, --events and --all-hit are for --generate")
        if vars(args).get("axes") and args.axes[0] in "yY" and args.detector == "zp":
            self.error(f"--axes {args.axes}: expected xy, xY, Xy or XY for zp, whose sides differ")
        if args.load and (args.resume or vars(args).get("finetune")):
            self.error("--resume and --finetune train, they do not go with --load")
        if args.batch_size % args.devices:
            self.error("--batch-size must be a multiple of --devices")


def parser(doc, script, flags=tuple(FLAGS), own=(), **defaults):
    """The command line of a script: its shared `flags`, their `defaults`, and the text `doc` for --help.
    A default may be a dict {"zn": ..., "zp": ...} or a function of the parsed flags. The script adds its own
    flags with `add_argument`; those named in `own` decide what is trained: they are kept in checkpoints, and
    --load brings them back."""
    if unknown := defaults.keys() - set(flags):
        raise TypeError(f"defaults for flags that the script does not have: {unknown}")
    defaults = {"run": lambda args: Path("runs", f"{script}-{args.detector}")} | defaults
    result = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    result.set_defaults(script=script)
    result.own = own
    for name in flags:
        options = FLAGS[name] | ({"default": defaults[name]} if name in defaults else {})
        default = options.get("default")
        if isinstance(default, dict):
            default = ", ".join(f"{detector} {value}" for detector, value in default.items())
        if not (default is None or default is False or callable(default)):
            options["help"] += f" (default: {default})"
        result.add_argument("--" + name.replace("_", "-"), **options)
    return result


def first_network(args, make, plan):
    """The network to train: of --finetune, else make(key)."""
    return load_model(args.finetune, make) if args.finetune else make(plan.keys[0])


class Plan(NamedTuple):
    """How a network is trained: the shared flags of training, and the `header` of its checkpoint (a dict)."""
    header: dict
    run: Path
    epochs: int
    batch_size: int
    lr: float
    ema: float = 0.999
    precision: str = "f32"
    seed: int = 0
    devices: int = 1
    resume: bool = False
    quiet: bool = False

    @property
    def keys(self):
        """(key of the initial weights, key of the noise in training)."""
        return jax.random.split(jax.random.key(self.seed))


def plan(args):
    """The Plan of the parsed flags."""
    return Plan(*(getattr(args, name) for name in Plan._fields))


# ------------------------------------------------------------------------------------------------ checkpoints
# One JSON line with a checksum, then the leaves of a tree as NumPy arrays (equinox.tree_serialise_leaves). No
# pickle, so that a checkpoint from a stranger can be loaded.

def cast(tree, dtype):
    """`tree` with its floating-point arrays in another number format."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


def lower(net, precision):
    """The network in the number format of --precision, f32 or bf16."""
    return cast(net, jnp.bfloat16) if precision == "bf16" else net


@files.first_host_only
def save_checkpoint(path, header, tree):
    """Write `tree` (a model, or any tree of arrays and numbers) behind `header`, a dict (see `plain`)."""
    leaves = io.BytesIO()
    eqx.tree_serialise_leaves(leaves, jax.device_get(tree))
    header = files.plain({"format": FORMAT} | header | {"versions": versions()})
    line = json.dumps(header | {"crc32": _checksum(header, leaves.getvalue())}, allow_nan=False)
    with files.write_atomic(path) as temporary:
        temporary.write_bytes(line.encode() + b"\n" + leaves.getvalue())


def read_header(path, script=None, detector=None):
    """The header of a checkpoint, a dict. UserError as load_checkpoint."""
    return _read_checkpoint(path, script, detector)[0]


def read_model_header(path, script, detector, flags):
    """The header of a trained model. UserError for the state of a run, or if it lacks one of `flags`."""
    header = read_header(path, script, detector)
    if "scaler" not in header:
        raise UserError(f"{path}: the state of a run, expected its model.eqx")
    if missing := [name for name in flags if name not in header["flags"]]:
        raise UserError(f"{path}: made by another version, without --{missing[0]}")
    return header


def load_checkpoint(path, like, script=None, detector=None):
    """(header, tree) of a checkpoint: `like`, a tree made by the same code, with the saved leaves.
    UserError if the file is missing, damaged, of another `script` or `detector`, or holds other arrays."""
    header, leaves = _read_checkpoint(path, script, detector)
    stream, expected = io.BytesIO(leaves), "arrays than this model and these flags expect"
    try:
        tree = eqx.tree_deserialise_leaves(stream, like)
    except RuntimeError as error:
        raise UserError(f"{path}: holds other {expected}: {error}") from error
    if stream.read(1):
        raise UserError(f"{path}: holds more {expected}")
    return header, tree


def save_model(run, header, scaler, scores, net):
    """Write model.eqx into the folder `run`, in float16; returns the network as it is kept there, in float32.
    Its header is `header` (script, detector, flags), the `scaler` of the conditions, `scores` and device."""
    found = {"scaler": scaler._asdict(), "parameters": count_parameters(net), "train_device": device_name()}
    half = cast(jax.device_get(net), np.float16)
    save_checkpoint(run / "model.eqx", header | found | {"scores": scores}, half)
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, cast(half, np.float32))


def load_model(path, make):
    """The network of a checkpoint written by `save_model`; `make(key)` builds one of the same shapes."""
    like = eqx.filter_eval_shape(lambda key: cast(make(key), jnp.float16), jax.random.key(0))
    return cast(load_checkpoint(path, like)[1], jnp.float32)


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
        raise UserError(f"{path}: damaged, expected {len(leaves)} bytes of arrays to match the checksum")
    for name, expected in (("script", script), ("detector", detector)):
        if expected not in (None, header.get(name)):
            raise UserError(f"{path}: made by {name} {header.get(name)}, expected {name} {expected}")
    return header, leaves


def _checksum(header, leaves):
    return zlib.crc32(leaves, zlib.crc32(json.dumps(header).encode()))


# -------------------------------------------------------------------------------------- progress and log book

def progress(what, label, quiet=False):
    """`what`, an iterable or a number of rounds, with a bar that shows the remaining time unless `quiet`."""
    rounds = range(what) if isinstance(what, int) else what
    interval = 0.2 if sys.stderr.isatty() else 30  # s; a log file need not hold every state of the bar
    return tqdm(rounds, desc=label, disable=quiet, mininterval=interval, dynamic_ncols=True)


class Logbook(AbstractContextManager):
    """The record of a training: a progress bar, log.jsonl every LOGGED steps, the state every minute.
    `step` counts the steps done, out of `steps`. A saved state begins with the header of the `plan` and the
    number of training `rows`, which --resume expects unchanged."""

    def __init__(self, plan, rows, steps):
        self.plan, self.header, self.steps = plan, plan.header | {"rows": rows}, steps
        self.path, self.step, self.before, self.checkpoint = plan.run / "state.eqx", 0, 0.0, None
        self.bar = progress(steps, "training {script} on {detector}".format(**self.header), plan.quiet)

    def __exit__(self, *error):
        self.bar.close()  # before an error is printed

    def begin(self, state):
        """The state to start from: `state` itself or, with --resume, the saved one, of the same shapes."""
        if self.plan.resume:
            found, state = load_checkpoint(self.path, state, self.header["script"], self.header["detector"])
            here, saved = (files.plain(header["flags"] | {"rows of the data": header["rows"],
                                                          "axes": header.get("axes")})
                           for header in (self.header, found))
            if changed := [name for name in here if saved.get(name) != here[name]]:
                raise UserError(f"{self.path}: --resume needs the flags of the first run; different: "
                                f"{', '.join(changed)}")
            self.step, self.before, self.checkpoint = found["step"], found["seconds"], self.path
        else:
            self.path.unlink(missing_ok=True)                                  # of another run
        files.cut_log(self.plan.run, self.step if self.plan.resume else -1)
        self.bar.update(self.step)
        self.began = self.saved = time.perf_counter()
        return state

    def record(self, state, losses):
        """Count a step; each LOGGED steps read losses, a dict of scalars: UserError if one is not finite."""
        self.step += 1
        self.bar.update()
        if self.step % LOGGED and self.step < self.steps:
            return
        losses = {name: float(value) for name, value in losses.items()}
        now = time.perf_counter()
        here = {"step": self.step, "seconds": self.before + now - self.began}
        check_finite(sum(losses.values()), self.step, self.checkpoint)
        files.log_line(self.plan.run, here | losses)
        if now - self.saved > 60 or self.step == self.steps:
            save_checkpoint(self.path, self.header | here, state)
            self.saved, self.checkpoint = now, self.path

    def end(self):
        """{"train_seconds": of all parts of the run, "step_seconds": median, None for a log of one line}."""
        log = files.read_log(self.plan.run)
        per_step = [(after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
                    for before, after in zip(log, log[1:])]
        return {"train_seconds": self.before + time.perf_counter() - self.began,
                "step_seconds": float(np.median(per_step)) if per_step else None}


def saved_after(run, earlier):
    """Whether the folder `run` has the state of a training that followed the one in the folder `earlier`."""
    first, second = (folder / "state.eqx" for folder in (earlier, run))
    return first.exists() and second.exists() and first.stat().st_mtime_ns <= second.stat().st_mtime_ns


# ---------------------------------------------------------------------- layers, optimiser, batches and blocks

def normal(key, *shape, scale=None):
    """Normal weights (..., inputs, outputs), of variance 1 / fan-in or of standard deviation `scale`."""
    return jax.random.normal(key, shape) * (math.prod(shape[:-1]) ** -0.5 if scale is None else scale)


class Linear(eqx.Module):
    """Linear layer on the last axis, (..., inputs) -> (..., outputs), in the number format of its weights.
    Its initial weights, times `scale`, are uniform as in eqx.nn.Linear; without a bias, normal of variance
    1 / inputs. One product for all axes: vmap over eqx.nn.Linear is twice as slow on a CPU."""
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
        keys = jax.random.split(key, len(widths))
        self.layers = [Linear(*sizes, k) for k, *sizes in zip(keys, widths, widths[1:])]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.silu(layer(x))
        return self.layers[-1](x)


def normalise(h):
    """Root-mean-square normalisation over the last axis."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


class State(eqx.Module):
    """State of a training: the network, the moving average of its weights, and the optimiser's state."""
    net: eqx.Module
    ema: eqx.Module
    optimiser: optax.OptState


def first_state(net, optimiser):
    """The State before the first step, compiled as one; a step gives its buffers away, so ema is a copy."""
    copy = lambda a: jnp.copy(a) if eqx.is_array(a) else a
    begin = lambda net: (jax.tree.map(copy, net), optimiser.init(eqx.filter(net, eqx.is_inexact_array)))
    return State(net, *eqx.filter_jit(begin)(net))


def moving_average(ema, net, decay, step):
    """decay ema + (1 - decay) net after step number `step`, from 0; the decay is smaller at first."""
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    mix = lambda old, new: decay * old + (1 - decay) * new if eqx.is_inexact_array(old) else old
    return jax.tree.map(mix, ema, net)


def adamw(plan, steps, **options):
    """AdamW with clipped gradients and a learning rate that ends near 0 after `steps` steps."""
    schedule = optax.cosine_onecycle_schedule(steps, plan.lr, 0.1, 10, 100)
    options = {"b2": 0.99, "weight_decay": 1e-4} | options
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, **options))


def shuffled(rows, size, rng):
    """Batches of `rows` in random order, (number, size); a last short one is dropped."""
    order = rng.permutation(rows)
    return order[:len(order) // size * size].reshape(-1, size)


def batches(arrays, rows, plan, mesh, start=0):
    """Yield the batches of a training from the step `start` on: tuples of arrays (batch_size, ...).
    They hold the given `rows` of each of `arrays` (N, ...), in an order that the seed and the epoch fix, and
    are spread over the hosts and devices of `mesh`."""
    first, done = divmod(start, len(rows) // plan.batch_size)
    for epoch in range(first, plan.epochs):
        order = shuffled(rows, plan.batch_size, np.random.default_rng([plan.seed, epoch]))
        for batch in order[done if epoch == first else 0:]:
            here = np.split(batch, jax.process_count())[jax.process_index()]  # the rows of this host
            yield shard_batch(tuple(array[here] for array in arrays), mesh)


def in_blocks(function, key, *arrays):
    """function(*blocks, key) over the rows of `arrays` (N, ...), BLOCK at a time with a key each: (N, ...).
    The last block is filled up with zeros, so that a compiled function meets one shape."""
    rows, found = len(arrays[0]), []
    for start in range(0, rows, BLOCK):
        blocks = [array[start:start + BLOCK] for array in arrays]
        short = BLOCK - len(blocks[0])
        blocks = [np.pad(block, [(0, short)] + [(0, 0)] * (block.ndim - 1)) for block in blocks]
        found.append(np.asarray(function(*blocks, jax.random.fold_in(key, start)))[:BLOCK - short])
    return np.concatenate(found)


# ---------------------------------------------------------------------------- time, cost, machine and devices

def time_sampler(draw, width, sizes, repeats=5):
    """{"ms_per_response": {"1": ms, ...}, "compile_seconds": {"1": s, ...}} of draw(c (size, width), key).
    On a CPU large batches are drawn in blocks, as responses are generated. The first call of each of `sizes`
    compiles: it counts for compile_seconds, less the median of the `repeats` calls after it."""
    key, blocked = jax.random.key(0), lambda c, key: in_blocks(draw, key, c)
    times = {}
    for size in sizes:
        call = blocked if size > BLOCK and jax.default_backend() == "cpu" else draw
        times[size] = [seconds(call, np.zeros((size, width), np.float32), key) for _ in range(1 + repeats)]
    medians = {size: float(np.median(t[1:])) for size, t in times.items()}
    return {"ms_per_response": {str(size): 1e3 * medians[size] / size for size in sizes},
            "compile_seconds": {str(size): max(times[size][0] - medians[size], 0.0) for size in sizes}}


def seconds(function, *arguments):
    """Duration of a call, waited for to its end."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def network_cost(net, *inputs):
    """{"parameters": trainable numbers, "mflop": 10^6 floating-point operations of net(*inputs), counted by
    XLA}; `inputs` are the shapes of one example's."""
    arrays, rest = eqx.partition(net, eqx.is_array)
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in inputs]
    call = jax.jit(lambda arrays, *inputs: eqx.combine(arrays, rest)(*inputs))
    cost = call.lower(arrays, *inputs).compile().cost_analysis()
    return {"parameters": count_parameters(net), "mflop": cost["flops"] / 1e6}


def count_parameters(tree):
    """The number of trainable numbers in a model: the size of its floating-point arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def versions():
    """Versions of the software that made a result: {"zdc": ..., "python": ..., "jax": ..., ...}."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "equinox", "optax", "numpy")}
    return {"zdc": VERSION, "python": platform.python_version()} | packages


def _cpuinfo(*fields):
    """The first of the `fields` in Linux's /proc/cpuinfo, "" on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fields)), "")


def device_name():
    """The devices of JAX: model and usable cores of the CPU, or number and kind of the accelerators."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpuinfo('model name') or platform.processor() or platform.machine()}, {cores} cores"


def cache_folder():
    """Where data sets and compiled code are kept between runs: ZDC_CACHE, else ~/.cache/zdc."""
    return Path(os.environ.get("ZDC_CACHE") or Path.home() / ".cache" / "zdc")


def limit_threads(n):
    """Let every pool of this process have n threads at most, before JAX is first used: XLA makes as many as
    there are processors in reach. UserError where that cannot be said."""
    if not hasattr(os, "sched_setaffinity") or "ZDC_COORDINATOR" in os.environ:
        raise UserError("--threads works on Linux and one host alone")
    from threadpoolctl import threadpool_limits  # of scikit-learn's dependencies
    threadpool_limits(n)  # BLAS and OpenMP
    reach = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(reach)[:n])
    jax.devices()
    for thread in Path("/proc/self/task").iterdir():  # which processors they run on is the system's affair
        os.sched_setaffinity(int(thread.name), reach)


def prepare_jax():
    """Join the hosts of the run and keep compiled code on disk, so that a second run starts in seconds;
    called before JAX is first used."""
    initialize_hosts()
    features = _cpuinfo("flags", "Features")  # code for one CPU may crash another that shares the folder
    folder = cache_folder() / "xla" / f"{zlib.crc32(features.encode()):08x}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the defaults skip everything small,
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # and a script is many small functions


def initialize_hosts():
    """Join the hosts of a run, which all run the same command, if three environment variables are set:
    ZDC_COORDINATOR, host:port of the first host, which writes the files; ZDC_PROCESSES, number of hosts;
    ZDC_PROCESS_ID, this one's number, from 0. UserError if only some are set."""
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
    """The arrays of `tree`, this host's rows (B, ...), as arrays of all hosts' rows, spread over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree)


def replicate(tree, mesh):
    """The arrays of `tree`, equal on all hosts, copied to every device of the mesh."""
    return eqx.filter_shard(tree, NamedSharding(mesh, PartitionSpec()))
