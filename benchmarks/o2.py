"""Exported models beside those in JAX: equal responses to equal noise, and scores, time and memory as in O2.
Responses are compared and scored without hit.py, whose network decides who gives light; times are with it.

    python -m benchmarks.o2 --detector zn     writes benchmarks/results/o2-zn.json for the models of weights/
"""
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

import common
import data
import export
import graph
import metrics
from benchmarks.tables import ROOT, write
from simulator import DETECTORS

ROWS = 6000      # test rows of the scores
EQUAL = 1000     # of them, to compare photon by photon
SCORES = "W", "MAE", "AUC_high"


def compare(draw, path, particles, seed=0):
    """{"equal": share of the fibres with the same count, "furthest": largest difference in photons} of the
    ONNX model of any number of particles and of JAX, for the same noise."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng, counts = np.random.default_rng(seed), {node.name: node.shape[1] for node in session.get_inputs()}
    noise = {"normal": rng.standard_normal, "uniform": rng.random}
    feeds = {name: particles if name == "particles" else noise[name]((len(particles), n), np.float32)
             for name, n in counts.items()}
    there, sums = session.run(None, feeds)

    def run(feeds):
        rest = dict(feeds)

        def take(name, shape):
            taken, rest[name] = jnp.split(rest[name], [math.prod(shape[1:])], axis=1)
            return taken.reshape(shape)
        return graph.evaluate(lambda p: draw(p, jax.random.key(0)), take, feeds["particles"])[0]
    here = np.asarray(jax.jit(run)(feeds))
    apart = np.abs(there.astype(int) - here)
    assert np.allclose(sums, metrics.channels(there), rtol=1e-5), "channels are sums of the counts"
    return {"equal": float(np.mean(apart == 0)), "furthest": int(apart.max())}


def call(path, particles, seed, folder):
    """Responses (N, H, W) of O2's form, by a process of its own, and what it prints."""
    source, target = folder / "particles.npy", folder / "responses.npy"
    np.save(source, particles)
    command = [sys.executable, "-m", "benchmarks.o2_call", path, source, target, str(seed)]
    line = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return np.load(target).swapaxes(1, 2), json.loads(line)                    # (N, ny, nx) -> (N, nx, ny)


def row(path, folder):
    """A row of the table for a checkpoint."""
    args, draw = export.open_model(path)
    chance = export.open_hit(ROOT / f"weights/hit-{args.detector}.eqx", args.detector, {})
    batched, single, whole, *_ = export.write(folder, {
        "batched": export.batched_model(draw), "single-o2": export.o2_model(draw, args.detector),
        "whole-o2": export.o2_model(draw, args.detector, chance)})
    dataset, split = data.open_split(args)
    test = data.select(dataset, split.test[:ROWS])
    found = {"label": args.script, **compare(draw, batched, test.particles[:EQUAL]),
             "megabytes": whole.stat().st_size / 1e6}
    generations, prints = zip(*(call(single, test.particles, seed, folder) for seed in range(2)))
    oracle = [metrics.resimulate(args.detector, test, seed) for seed in range(2)]
    here = [common.in_blocks(jax.jit(draw), jax.random.key(seed), test.particles) for seed in range(2)]
    score = lambda made: metrics.evaluate(test.responses, made, test.particles, test.pdg, oracle=oracle)
    pick = lambda found: {name: found[name] for name in SCORES} | {"lit %": found["marginals"]["lit_percent"]}
    found |= call(whole, test.particles, 0, folder)[1] | {"ms_all_hit": prints[0]["ms"]}
    return found | {"o2": pick(score(list(generations))), "seen": pick(score(here)),
                    "rows": {"seen": len(test.pdg)}, "measured_with": common.VERSION}


def main(argv=None):
    """Write the table of a detector."""
    parser = common.parser(__doc__, "o2", flags=())
    parser.add_argument("--detector", choices=DETECTORS, default="zn", help="detector (default: zn)")
    args = parser.parse_args(argv)
    common.prepare_jax()
    rows = []
    for name in export.MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(ROOT / f"weights/{name}-{args.detector}.eqx", Path(folder)))
        print(rows[-1])
    write("o2", args.detector, ROOT, command=f"python -m benchmarks.o2 --detector {args.detector}", rows=rows)


if __name__ == "__main__":
    common.run(main)
