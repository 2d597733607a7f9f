"""An exported model as ALICE O2 calls it: one particle at a time, by ONNX Runtime in one thread.

    python -m benchmarks.o2_call o2/gan-zn-o2.onnx particles.npy responses.npy [SEED]

particles.npy: float32 (N, 9), in GeV, cm, MeV and units of e; responses.npy: uint16 (N, ny, nx). Prints one
line of JSON: ms per response and the memory of this process, which imports nothing else. The contract is
that of O2's NeuralFastSimulation: inputs by position, scales from a text file, whole photons by truncation.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime

CHARGE_UNIT = 3   # ROOT gives charges in units of e / 3


def read_scales(path):
    """(means, scales) of the nine features: "#means", nine lines, an empty line, "#scales", nine lines."""
    lines = Path(path).read_text().split("\n")
    assert lines[0] == "#means" and lines[10] == "" and lines[11] == "#scales", f"{path}: not O2's format"
    return np.array(lines[1:10], np.float32), np.array(lines[12:21], np.float32)


def open_session(path):
    """A session with one thread, and the shapes of its inputs with 1 for what is dynamic."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    length = lambda n: n if isinstance(n, int) else 1
    return session, {node.name: [length(n) for n in node.shape] for node in session.get_inputs()}


def call(path, particles, seed=0):
    """Responses uint16 (N, ny, nx) to particles (N, 9), and the seconds of each call (N,)."""
    session, shapes = open_session(path)
    means, scales = read_scales(path.with_suffix(".txt"))
    (noise_name, noise_shape), (particle_name, particle_shape) = shapes.items()                # by position
    rng, found, seconds = np.random.default_rng(seed), [], []
    for particle in particles * np.array([1] * 8 + [CHARGE_UNIT], np.float32):
        feeds = {noise_name: rng.standard_normal(noise_shape, np.float32),
                 particle_name: ((particle - means) / scales).reshape(particle_shape)}
        began = time.perf_counter()
        pixels = session.run(None, feeds)[0]
        seconds.append(time.perf_counter() - began)
        found.append(np.expm1(pixels[0]).astype(np.uint16))                                    # truncated
    return np.stack(found), np.array(seconds)


def memory_mib():
    """Largest memory of this process so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main(argv=None):
    """Call a model for each particle of a file."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name in ("model", "particles", "responses"):
        parser.add_argument(name, type=Path)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    args = parser.parse_args(argv)
    responses, seconds = call(args.model, np.load(args.particles), args.seed)
    np.save(args.responses, responses)
    print(json.dumps({"ms": 1e3 * np.median(seconds), "ms_99": 1e3 * np.quantile(seconds, 0.99),
                      "memory_mib": memory_mib()}))


if __name__ == "__main__":
    main()
