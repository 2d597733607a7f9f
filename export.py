"""ONNX models, for ALICE O2 and for everyone who runs without JAX.

    python export.py weights/gan-zn.eqx weights/gan-zp.eqx --out o2     two models, each in both forms
    python export.py weights/gan-zn.eqx --out o2 --check                and compared with JAX, timed and scored

o2/gan-zn-o2.onnx is a generator as O2's fast simulation of the ZDC calls it, one particle at a time: noise (1, 10)
from N(0, 1) and particle (1, 9) -> logarithms of photon counts in the order of O2's pixels, which O2 truncates to
whole photons; o2/gan-zn-o2.txt has the scales of its particle. gan.py takes the ten numbers for its noise; all
others come from a hash of the ten, so that equal inputs give equal responses.

o2/gan-zn.onnx takes any number B of them: particles (B, 9) in GeV, cm, MeV and units of e, and all noise as two
inputs, normal (B, N) and uniform (B, U) -> counts uint16 (B, H, W) and channels float32 (B, 5).

Needs the extra [onnx]. Ends with `written: FILE` for each file.
"""
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import common
import data
import fm
import gan
import graph
import latent_fm
import metrics
import vae
from common import UserError
from graph import Graph, Value
from simulator import DETECTORS

NOISE = 10            # numbers that O2 gives to a generator
BATCH = 9973          # stands for any number of particles while a model is traced: a prime, no other length
CHARGE_UNIT = 3       # O2's charges are ROOT's, in units of e / 3


# ------------------------------------------------------------------------------------------------------ models

# (network of a key, sampler) by flags, detector and number of conditions
MODELS = {
    "gan": lambda args, *sizes: (partial(gan.make_gan, args.counts, *sizes), partial(gan.sample, how=args.counts)),
    "vae": lambda args, *sizes: (
        partial(vae.Autoencoder, args.arch, args.variant, args.latent, args.likelihood, *sizes),
        partial(vae.sample, likelihood=args.likelihood)),
    "latent_fm": lambda args, *sizes: (partial(latent_fm.make_latent_fm, args.net, *sizes, args.latent),
                                       partial(latent_fm.sample, steps=args.steps)),
    "fm": lambda args, detector, conditions: (
        partial(fm.make_network, args.net, args.counts, detector, conditions),
        partial(fm.sample, shape=detector.shape, how=args.counts, steps=args.steps,
                end=args.exit if args.counts == "sample" else 1.0))}
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
    return args, lambda particles, key: sample(net, data.conditions(particles, scaler, jnp), key)


# ------------------------------------------------------------------------------------------------------- noise

def mixed(graph, x):
    """A hash of each number uint32 (Wellons 2018, lowbias32): every bit of it depends on all bits of x."""
    number = lambda n: graph.constant(np.uint32(n))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        x = graph.node("BitwiseXor", x, graph.node("BitShift", x, number(shift), direction="RIGHT"))
        if factor:
            x = times(graph, x, factor)
    return x


def times(graph, x, factor):
    """x factor, modulo 2^32."""
    product = graph.node("Mul", graph.node("Cast", x, to=graph_type("int32")),
                         graph.constant(np.uint32(factor).astype(np.int32)))
    return graph.node("Cast", product, to=graph_type("uint32"))


def graph_type(name):
    return graph.TYPES[name]


def hashed_uniforms(graph, noise, count):
    """Numbers in (0, 1), float32 (1, count), from the tensor noise (1, 10): the hash of a counter and of two
    sums of hashes of the ten."""
    number, integers = lambda n: graph.constant(np.array(n, np.int32)), dict(to=graph_type("int32"))
    scaled = graph.node("Mul", noise, graph.constant(np.float32(2**20)))
    places = number((np.arange(NOISE) * 0x9E3779B9).astype(np.uint32).astype(np.int32))
    bits = graph.node("Add", graph.node("Cast", scaled, **integers), places)                     # (1, 10)
    seeds, bits = [], graph.node("Cast", bits, to=graph_type("uint32"))
    for _ in range(2):
        bits = mixed(graph, bits)
        seeds.append(graph.node("ReduceSum", graph.node("Cast", bits, **integers), graph.ints([1]), keepdims=1))
    counter = number((np.arange(count) * 0x9E3779B9).astype(np.uint32).astype(np.int32)[None])  # golden ratio
    x = number(0)
    for term in (graph.node("Add", counter, seeds[0]), seeds[1]):
        x = graph.node("Cast", graph.node("Add", x, term), to=graph_type("uint32"))
        x = graph.node("Cast", mixed(graph, x), **integers)
    x = graph.node("BitShift", graph.node("Cast", x, to=graph_type("uint32")), graph.constant(np.uint32(8)),
                   direction="RIGHT")
    x = graph.node("Mul", graph.node("Cast", x, to=graph_type("float32")), graph.constant(np.float32(2**-24)))
    return graph.node("Add", x, graph.constant(np.float32(2**-25)))


def normals(graph, uniforms, count):
    """`count` normal numbers (1, count) from as many uniform ones, count even (Box and Muller 1958)."""
    first, second = graph.node("Split", uniforms, graph.ints([count // 2] * 2), outputs=2, axis=1)
    radius = graph.node("Sqrt", graph.node("Mul", graph.node("Log", first), graph.constant(np.float32(-2))))
    angle = graph.node("Mul", second, graph.constant(np.float32(2 * math.pi)))
    return graph.node("Concat", *(graph.node("Mul", radius, graph.node(wave, angle)) for wave in ("Cos", "Sin")),
                      axis=1)


def count_draws(function, particles):
    """What a sampler draws: [("normal" or "uniform", shape), ...]."""
    draws = []
    graph.convert(function, Graph(), lambda name, shape: draws.append((name, shape)) or "", particles)
    return draws


class Slices:
    """Draws as slices of the tensors {"normal": (B, N), "uniform": (B, U)}, one after the other."""

    def __init__(self, graph, tensors):
        self.graph, self.tensors, self.used = graph, tensors, dict.fromkeys(tensors, 0)

    def __call__(self, name, shape):
        start = self.used[name]
        self.used[name] = end = start + math.prod(shape[1:])
        cut = self.graph.node("Slice", self.tensors[name], *map(self.graph.ints, ([start], [end], [1])))
        return self.graph.node("Reshape", cut, self.graph.sizes(shape))


def totals(draws):
    """{"normal": numbers of a response, "uniform": ...}."""
    return {kind: sum(math.prod(shape[1:]) for name, shape in draws if name == kind) for kind in ("normal", "uniform")}


# ------------------------------------------------------------------------------------------------------- forms

def batched_model(draw):
    """The ONNX model of any number of particles."""
    made = Graph(BATCH, "particles")
    particles = Value((BATCH, 9), np.dtype(np.float32), "particles", None, (BATCH, 9))

    def respond(particles):
        counts = draw(particles, jax.random.key(0))
        weights = jnp.asarray(metrics.channel_weights(counts.shape[1:]), jnp.float32).reshape(5, -1)
        return counts, counts.astype(jnp.float32).reshape(-1, weights.shape[1]) @ weights.T
    numbers = totals(count_draws(respond, particles))
    outputs = graph.convert(respond, made, Slices(made, {name: name for name in numbers}), particles)
    inputs = {"particles": 9} | {name: count for name, count in numbers.items() if count}
    return made.model({name: (name, np.float32, ("B", count)) for name, count in inputs.items()},
                      {name: (graph.Converter(made, None).full(value), value.dtype, ("B", *value.shape[1:]))
                       for name, value in zip(("counts", "channels"), outputs)})


def o2_model(draw):
    """The ONNX model of O2's contract."""
    made, particle = Graph(), Value((1, 9), np.dtype(np.float32), "particle", None, (1, 9))

    def respond(particle):
        counts = draw(particle, jax.random.key(0)).astype(jnp.float32)
        # O2 takes the whole part of expm1: a hundredth of a photon makes up for rounding
        return jnp.where(counts > 0, jnp.log(counts + 1.01), 0.0).transpose(0, 2, 1)    # (1, y, x)
    draws = count_draws(respond, particle)
    first, numbers = draws[0] == ("normal", (1, NOISE)), totals(draws)
    even = 2 * math.ceil((numbers["normal"] - NOISE * first) / 2)
    uniforms, tensors = hashed_uniforms(made, "noise", even + numbers["uniform"]), {}
    for name, start, end in (("normal", 0, even), ("uniform", even, even + numbers["uniform"])):
        tensors[name] = made.node("Slice", uniforms, *map(made.ints, ([start], [end], [1])))
    tensors["normal"] = normals(made, tensors["normal"], even) if even else None
    if first:
        tensors["normal"] = made.node("Concat", "noise", tensors["normal"], axis=1) if even else "noise"
    out, = graph.convert(respond, made, Slices(made, tensors), particle)
    return made.model({"noise": ("noise", np.float32, (1, NOISE)), "particle": ("particle", np.float32, (1, 9))},
                      {"log_photons": (graph.Converter(made, None).full(out), np.float32, out.shape)})


def scales_text():
    """O2's file of scales: with (x - mean) / scale it makes our units of a particle, charges in units of e."""
    scales = [1] * 8 + [CHARGE_UNIT]
    return "\n".join(["#means", *["0"] * 9, "", "#scales", *map(str, scales), ""])
