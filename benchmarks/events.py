"""Sums over whole events: what the calorimeters read when the particles of an event are drawn one by one.

    python -m benchmarks.events --detector zn     writes benchmarks/results/events-zn.json

An event is PARTICLES random particles, before any cut, of lists that no model has seen, all on one side. The
simulator runs each once; the models draw with hit.py, which decides whom they give light, and without.
"""
from functools import partial

import equinox as eqx
import jax
import numpy as np

import common
import export
import hit
import metrics
import simulator
from benchmarks.tables import ROOT, write
from benchmarks.transfer import scores
from orientation import Axes
from simulator import DETECTORS

EVENTS, PARTICLES = 10_000, 10


def random_particles(name, number, seed=0):
    """`number` random particles (N, 9) and their pdg (N,), a fresh list for each block."""
    rng, found = np.random.default_rng([seed, 21]), []
    for block in range(-(-number // simulator.BLOCK)):
        particles, pdg, weights = simulator.primaries(900 + block, fresh=True)
        which = rng.choice(len(pdg), simulator.BLOCK, p=weights)
        found.append((particles[which], pdg[which]))
    return tuple(np.concatenate(parts)[:number] for parts in zip(*found))


def sums(generate, *arrays):
    """Channels (EVENTS, 5) of the events whose particles are the rows of `arrays`, of responses
    generate(*block of the arrays, start)."""
    starts = range(0, len(arrays[0]), simulator.BLOCK)
    parts = (generate(*(array[k:k + simulator.BLOCK] for array in arrays), k) for k in starts)
    channels = np.concatenate([metrics.channels(part) for part in parts])
    return channels.reshape(-1, PARTICLES, 5).sum(1)


def blocks(draw, particles, number):
    """As metrics.generator, of draw(particles, key)."""
    return common.in_blocks(draw, jax.random.fold_in(jax.random.key(0), number), particles)


def rows(name, models):
    """Two rows of the table for each of `models`: with hit.py, and with light for every particle."""
    particles, pdg = random_particles(name, EVENTS * PARTICLES)
    detector = DETECTORS[name]
    run = lambda particles, pdg, start: simulator.run_uncut(rng, detector, particles, pdg)
    rng = np.random.default_rng(1)
    truth, oracle = sums(run, particles, pdg), sums(run, particles, pdg)
    for model in models:
        args, draw = export.open_model(ROOT / f"weights/{model}-{name}.eqx")
        every = partial(blocks, eqx.filter_jit(draw))
        some = hit.with_misses(every, args.hit, name, 0, Axes())
        for label, generate in ((model, some), (f"{model}, --all-hit", every)):
            yield {"label": label, "measured_with": common.VERSION,
                   "seen": scores(truth, sums(generate, particles), oracle)}


def main(argv=None):
    """Write the table of a detector."""
    parser = common.parser(__doc__, "events", flags=())
    parser.add_argument("--detector", choices=DETECTORS, default="zn", help="detector (default: zn)")
    args = parser.parse_args(argv)
    common.prepare_jax()
    found = []
    for row in rows(args.detector, export.MODELS):
        print(row)
        found.append(row)
    write("events", args.detector, ROOT, rows=found, events=EVENTS, particles=PARTICLES,
          command=f"python -m benchmarks.events --detector {args.detector}")


if __name__ == "__main__":
    common.run(main)
