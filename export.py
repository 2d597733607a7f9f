"""ONNX models, for ALICE O2 and for everyone who runs without JAX.

    python export.py weights/gan-z?.eqx weights/hit-z?.eqx --out o2

o2/gan-zn-o2.onnx is a generator as O2's fast simulation of the ZDC calls it, one particle at a time: noise
(1, 10) from N(0, 1) and particle (1, 9) -> logarithms of photon counts in the order of O2's pixels, which O2
truncates to whole photons; o2/gan-zn-o2.txt has the scales of its particle. gan.py takes the ten numbers for
its noise; all others come from a hash of the ten, so that equal inputs give equal responses. Particles that
do not pass the cut give no light (hit.py; with `--all-hit` all do). A hash of the particle decides, so that
O2's classifier, o2/hit-o2.onnx, knows: particle (1, 9) -> 1 if it gives light to a detector, else 0.

o2/gan-zn.onnx takes any number B of them: particles (B, 9) in GeV, cm, MeV and units of e, and all noise as
two inputs, normal (B, N) and uniform (B, U) -> counts uint16 (B, H, W) and channels float32 (B, 5), as
metrics.channels; all pass the cut. o2/hit-zn.onnx gives for particles (B, 9) the probabilities (B, 11) of 0,
1, ..., 9 photons and of more.

Needs the extra [onnx]. Ends with `written: FILE` for each file. benchmarks/o2.py compares, times and scores
them.
"""
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import common
import data
import files
import fm
import gan
import hit
import latent_fm
import metrics
import solvers
import vae
from common import UserError
from orientation import Axes
from simulator import CUT, DETECTORS

try:
    from graph import TYPES, Converter, Graph, convert, placeholder
except ModuleNotFoundError as error:
    sys.exit(common.fail(f"export.py needs {error.name}: pip install -e '.[onnx]'"))

NOISE = 10            # numbers that O2 gives to a generator
BATCH = 9973          # stands for any number of particles while a model is traced: a prime, no other length
CHARGE_UNIT = 3       # O2's charges are ROOT's, in units of e / 3


# ----------------------------------------------------------------------------------------------------- models

# (network of a key, sampler) by flags, detector and number of conditions
MODELS = {
    "gan": lambda args, *sizes: (partial(gan.make_gan, args.counts, *sizes),
                                 partial(gan.sample, how=args.counts)),
    "vae": lambda args, *sizes: (
        partial(vae.Autoencoder, args.arch, args.variant, args.latent, args.likelihood, *sizes),
        partial(vae.sample, likelihood=args.likelihood)),
    "latent_fm": lambda args, detector, conditions: (
        partial(latent_fm.make_latent_fm, args.net, detector, conditions, args.latent),
        partial(latent_fm.sample, steps=args.steps)),
    "fm": lambda args, *sizes: (
        partial(solvers.unfitted, partial(fm.make_network, args.net, args.counts, *sizes), args.steps),
        partial(fm.sample, shape=sizes[0].shape, how=args.counts))}
SCRIPTS = {"gan": gan, "vae": vae, "latent_fm": latent_fm, "fm": fm}


def open_model(path):
    """(flags, draw) of a checkpoint; draw(particles (B, 9), key) gives photon counts (B, H, W)."""
    header = common.read_header(path)
    script = header["script"]
    if script not in MODELS:
        raise UserError(f"{path}: a model of {script}.py; those of {', '.join(MODELS)} can be exported")
    args = SCRIPTS[script].parse(["--load", str(path), "--detector", header["detector"]])
    make, sample = MODELS[script](args, DETECTORS[args.detector], data.CONDITIONS[args.cond])
    net, scaler = common.load_model(path, make), data.stored_scaler(args.header)
    axes = Axes(**args.header.get("axes", {}))

    def draw(particles, key):
        return axes.write(sample(net, data.conditions(axes.move(particles), scaler, jnp), key))
    return args, draw


def open_hit(path, name, axes):
    """chance(particles (B, 9)) of a checkpoint of hit.py: probabilities (B, CUT + 1); `axes` (a dict) are
    its generator's, for a network that has none of its own."""
    net, scaler, own = hit.open_hit(path, name, Axes(**axes))
    return lambda particles: hit.probabilities(net, data.conditions(own.move(particles), scaler, jnp))


# ------------------------------------------------------------------------------------------------------ noise

def mixed(made, x):
    """A hash of each number uint32 (Wellons 2018, lowbias32): every bit of it depends on all bits of x."""
    number = lambda n: made.constant(np.uint32(n))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        x = made.node("BitwiseXor", x, made.node("BitShift", x, number(shift), direction="RIGHT"))
        if factor:
            x = times(made, x, factor)
    return x


def times(made, x, factor):
    """x factor, modulo 2^32."""
    signed = made.node("Cast", x, to=TYPES["int32"])
    product = made.node("Mul", signed, made.constant(np.uint32(factor).astype(np.int32)))
    return made.node("Cast", product, to=TYPES["uint32"])


def hashed_uniforms(made, noise, count, width=NOISE, unit=2.0**-20):
    """Numbers in (0, 1), float32 (1, count), from the tensor noise (1, width), in whole units: the hash of a
    counter and of two sums of hashes of them."""
    number, integers = lambda n: made.constant(np.array(n, np.int32)), dict(to=TYPES["int32"])
    scaled = made.node("Mul", noise, made.constant(np.float32(1 / unit)))
    places = number((np.arange(width) * 0x9E3779B9).astype(np.uint32).astype(np.int32))
    bits = made.node("Add", made.node("Cast", scaled, **integers), places)                     # (1, 10)
    seeds, bits = [], made.node("Cast", bits, to=TYPES["uint32"])
    for _ in range(2):
        bits = mixed(made, bits)
        # in int64: ONNX Runtime's sums of int32 do not wrap around
        total = made.node("ReduceSum", made.node("Cast", bits, to=TYPES["int64"]), made.ints([1]), keepdims=1)
        seeds.append(made.node("Cast", total, **integers))
    counter = number((np.arange(count) * 0x9E3779B9).astype(np.uint32).astype(np.int32)[None])  # golden ratio
    x = counter
    for seed in seeds:
        x = made.node("Cast", made.node("Add", x, seed), to=TYPES["uint32"])
        x = made.node("Cast", mixed(made, x), **integers)
    x = made.node("Cast", x, to=TYPES["uint32"])
    x = made.node("BitShift", x, made.constant(np.uint32(8)), direction="RIGHT")
    x = made.node("Mul", made.node("Cast", x, to=TYPES["float32"]), made.constant(np.float32(2**-24)))
    return made.node("Add", x, made.constant(np.float32(2**-25)))


def hit_number(made, name):
    """A number in (0, 1), as a Value (1, 1), by which a particle gives light to a detector: a hash of it, so
    that generators and classifier agree."""
    both = hashed_uniforms(made, "particle", len(DETECTORS), width=9, unit=2.0**-18)   # 7000 GeV: 2^31
    start = sorted(DETECTORS).index(name)
    return placeholder(np.zeros((1, 1), np.float32),
                       made.node("Slice", both, *map(made.ints, ([start], [start + 1], [1]))))


def normals(made, uniforms, count):
    """`count` normal numbers (1, count) from as many uniform ones, count even (Box and Muller 1958)."""
    first, second = made.node("Split", uniforms, made.ints([count // 2] * 2), outputs=2, axis=1)
    radius = made.node("Sqrt", made.node("Mul", made.node("Log", first), made.constant(np.float32(-2))))
    angle = made.node("Mul", second, made.constant(np.float32(2 * math.pi)))
    waves = [made.node("Mul", radius, made.node(wave, angle)) for wave in ("Cos", "Sin")]
    return made.node("Concat", *waves, axis=1)


def count_draws(function, *inputs):
    """What a sampler draws: [("normal" or "uniform", shape), ...]."""
    draws = []
    convert(function, Graph(), lambda name, shape: draws.append((name, shape)) or "", *inputs)
    return draws


class Slices:
    """Draws as slices of the tensors {"normal": (B, N), "uniform": (B, U)}, one after the other."""

    def __init__(self, made, tensors):
        self.made, self.tensors, self.used = made, tensors, dict.fromkeys(tensors, 0)

    def __call__(self, name, shape):
        start = self.used[name]
        self.used[name] = end = start + math.prod(shape[1:])
        cut = self.made.node("Slice", self.tensors[name], *map(self.made.ints, ([start], [end], [1])))
        return self.made.node("Reshape", cut, self.made.sizes(shape))


# ------------------------------------------------------------------------------------------------------ forms

def batched_model(draw):
    """The ONNX model of any number of particles."""
    made = Graph(BATCH, "particles")
    particles = placeholder(jax.ShapeDtypeStruct((BATCH, 9), np.float32), "particles")

    def respond(particles):
        counts = draw(particles, jax.random.key(0))
        weights = metrics.channel_weights(counts.shape[1:]).reshape(-1, 5)
        return counts, counts.astype(jnp.float32).reshape(-1, len(weights)) @ weights
    slices = Slices(made, {"normal": "normal", "uniform": "uniform"})
    outputs = convert(respond, made, slices, particles)
    inputs = {"particles": 9} | {name: count for name, count in slices.used.items() if count}
    return made.model({name: (name, np.float32, ("B", count)) for name, count in inputs.items()},
                      {name: (Converter(made, None).full(value), value.dtype, ("B", *value.shape[1:]))
                       for name, value in zip(("counts", "channels"), outputs)})


def o2_model(draw, name, chance=None):
    """The ONNX model of O2's contract; with `chance` (see open_hit), light only for particles that pass."""
    made, particle = Graph(), placeholder(np.zeros((1, 9), np.float32), "particle")

    def respond(particle, number):
        counts = draw(particle, jax.random.key(0)).astype(jnp.float32)
        if chance:
            counts = jnp.where((number < chance(particle)[:, CUT:])[:, None], counts, 0.0)
        # O2 takes the whole part of expm1: a hundredth of a photon makes up for rounding
        return jnp.where(counts > 0, jnp.log(counts + 1.01), 0.0).transpose(0, 2, 1)    # (1, y, x)
    inputs = particle, hit_number(made, name)
    draws = count_draws(respond, *inputs)
    count = lambda kind: sum(math.prod(shape[1:]) for name, shape in draws if name == kind)
    first, total = draws[0] == ("normal", (1, NOISE)), count("uniform")
    even = 2 * math.ceil((count("normal") - NOISE * first) / 2)
    uniforms, tensors = hashed_uniforms(made, "noise", even + total), {}
    for name, start, end in (("normal", 0, even), ("uniform", even, even + total)):
        tensors[name] = made.node("Slice", uniforms, *map(made.ints, ([start], [end], [1])))
    tensors["normal"] = normals(made, tensors["normal"], even) if even else None
    if first:
        tensors["normal"] = made.node("Concat", "noise", tensors["normal"], axis=1) if even else "noise"
    out, = convert(respond, made, Slices(made, tensors), *inputs)
    inputs = {name: (name, np.float32, (1, n)) for name, n in (("noise", NOISE), ("particle", 9))}
    return made.model(inputs, {"log_photons": (Converter(made, None).full(out), np.float32, out.shape)})


def classifier(chances):
    """O2's classifier of {"zn": chance, "zp": chance}, see open_hit: 1 where a detector gets light."""
    made, particle = Graph(), placeholder(np.zeros((1, 9), np.float32), "particle")

    def light(particle, *numbers):
        hits = [u < chance(particle)[:, CUT:] for u, chance in zip(numbers, chances.values())]
        return jnp.max(jnp.concatenate(hits, 1).astype(jnp.float32), 1, keepdims=True)
    out, = convert(light, made, None, particle, *(hit_number(made, name) for name in chances))
    return made.model({"particle": ("particle", np.float32, (1, 9))},
                      {"hit": (Converter(made, None).full(out), np.float32, (1, 1))})


def hit_model(chance):
    """The ONNX model of the probabilities of any number of particles."""
    made = Graph(BATCH, "particles")
    particles = placeholder(jax.ShapeDtypeStruct((BATCH, 9), np.float32), "particles")
    out, = convert(chance, made, None, particles)
    return made.model({"particles": ("particles", np.float32, ("B", 9))},
                      {"probabilities": (Converter(made, None).full(out), np.float32, ("B", CUT + 1))})


def scales_text():
    """O2's file of scales: (x - mean) / scale gives our units of a particle, charges in units of e."""
    scales = [1] * 8 + [CHARGE_UNIT]
    return "\n".join(["#means", *["0"] * 9, "", "#scales", *map(str, scales), ""])


# ------------------------------------------------------------------------------------------------------- main

def write(folder, models):
    """Write {name: model} into a folder, with O2's file of scales beside models for it; returns the files."""
    contents = {f"{name}.onnx": model.SerializeToString() for name, model in models.items()}
    contents |= {f"{name}.txt": scales_text().encode() for name in models if name.endswith("-o2")}
    for name, content in contents.items():
        with files.write_atomic(folder / name) as temporary:
            Path(temporary).write_bytes(content)
    return [folder / name for name in contents]


def generator_models(path, hit_path=None):
    """{name: model} of both forms of a generator; O2's with the network of hit.py at `hit_path`, if given."""
    args, draw = open_model(path)
    chance = hit_path and open_hit(hit_path, args.detector, args.header.get("axes", {}))
    name = f"{args.script}-{args.detector}"
    try:
        return {name: batched_model(draw), f"{name}-o2": o2_model(draw, args.detector, chance)}
    except UserError as error:                                                 # of graph.py
        raise UserError(f"{path}: {error}") from None


def hit_models(paths, axes):
    """{name: model} of the networks of hit.py, {detector: path}, and of O2's classifier by them; `axes` are
    those of the generators, {detector: dict}."""
    chances = {name: open_hit(path, name, axes.get(name, {})) for name, path in paths.items()}
    models = {f"hit-{name}": hit_model(chance) for name, chance in chances.items()}
    return models | {"hit-o2": classifier(chances)}


def named(paths):
    """{"SCRIPT-DETECTOR": (path, header)} of checkpoints. UserError for two of one name."""
    found = {}
    for path in paths:
        header = common.read_header(path)
        name = f"{header['script']}-{header['detector']}"
        if name in found:
            raise UserError(f"{path}: another {name} beside {found[name][0]}, export it to another --out")
        found[name] = path, header
    return found


def main(argv=None):
    """Export the checkpoints of the command line. Returns the files."""
    parser = common.parser(__doc__, "export", flags=("all_hit",))
    parser.set_defaults(detector=None)                                         # that of each checkpoint
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="checkpoints to export")
    parser.add_argument("--out", type=Path, default=Path("o2"), metavar="FOLDER",
                        help="write the files into this folder (default: o2)")
    args = parser.parse_args(argv)
    checkpoints = named(args.models).values()
    hits = {header["detector"]: path for path, header in checkpoints if header["script"] == "hit"}
    generators = [(path, header) for path, header in checkpoints if header["script"] != "hit"]
    axes = {header["detector"]: header.get("axes", {}) for _, header in generators}
    models = hit_models(hits, axes) if hits else {}
    for path, header in generators:
        network = hits.get(header["detector"], common.WEIGHTS / f"hit-{header['detector']}.eqx")
        models |= generator_models(path, None if args.all_hit else network)
    written = write(args.out, models)
    for file in written:
        print(f"written: {file}")
    return written


if __name__ == "__main__":
    common.run(main)
