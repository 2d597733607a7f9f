"""Another detector: fm.py fine-tuned on few rows of it beside fm.py trained on them from nothing, and every
script trained on it.

    python -m benchmarks.transfer            writes benchmarks/results/transfer-zn.json, a quarter of an hour
    python -m benchmarks.transfer elsewhere  writes benchmarks/results/elsewhere-zn.json, an hour

The other detector is the simulator's ZN with half as many photons again, wider showers, fibres that count
along y and against x, and particles half a centimetre off: what somebody's own data may be to the models of
weights/. Trainings see the same rows; all are scored on the same test rows.
"""
import importlib
import itertools
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np

import common
import data
import metrics
import orientation
import simulator
from benchmarks.tables import RECIPES, ROOT, write
from simulator import DETECTORS

AXES = orientation.Axes("yX", (0.5, -0.3))
SIZES, TESTED = (100, 1000, 10_000, 60_000), 6000   # rows of the files, of which 70 % train
STEPS = {"fine-tuned": (300, 5e-4), "fine-tuned, scaling refitted": (300, 5e-4),
         "from nothing": (1000, 2e-3)}              # with their learning rates
MANY, FEW = 30_000, 1000                            # rows that every script is trained on, fine-tuned on
SHORT = "--batch-size", 128, "--lr", 5e-4, "--epochs", 60                  # 300 steps on FEW rows
TUNED = dict.fromkeys(("fm", "diffusion", "gan"), SHORT) | {
    "vae": (*SHORT, "--prior-epochs", 60), "latent_fm": (*SHORT, "--flow-epochs", 60)}


def other_detector(rows, fresh=False):
    """A Dataset of so many rows of the detector, on axes of its own, and channels of the same particles run
    again; `fresh`: of unseen particles."""
    detector = DETECTORS["zn"]._replace(light=0.84, core=1.3, spread=1.2)
    with mock.patch.dict(DETECTORS, zn=detector):
        blocks = [*simulator.simulated_blocks("zn", rows, seed=3, fresh=fresh)]
    responses, particles, pdg = (np.concatenate(parts) for parts in zip(*blocks))
    again = simulator.simulate(detector, particles[-TESTED:], pdg[-TESTED:], 1000)
    particles[:, 1:3] += np.float32(AXES.offset)
    return data.Dataset(AXES.write(responses), particles, pdg), metrics.channels(again)


def call(script, *flags):
    """The main of a script for ZN."""
    words = [str(word) for word in ("--detector", "zn", "--quiet", *flags)]
    return importlib.import_module(script).main(words)


def trained(script, rows, folder, *flags):
    """A training on the rows of a Dataset: the checkpoint."""
    path, run = folder / "mine.h5", folder / "run"
    data.save_blocks(path, len(rows.pdg), [rows._asdict()])
    call(script, "--data", path, "--run", run, "--validate", *flags)
    return run / "model.eqx"


def scores(truth, found, oracle):
    """W, MAE and light of channels (N, 5), beside those of another run of the simulator."""
    cells = {name: metrics.cell([score(truth, found)], [score(truth, oracle)], "oracle")
             for name, score in (("W", metrics.wasserstein), ("MAE", metrics.mae))}
    return cells | {"light": float(found.sum() / truth.sum())}


def drawn(script, model, test, again, *flags):
    """The scores of responses that a checkpoint draws for the particles of a Dataset."""
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder, "asked.h5"), Path(folder, "out.h5")
        data.save_blocks(asked, len(test.pdg), [{"particles": test.particles}])
        call(script, "--load", model, "--generate", asked, "--out", out, "--all-hit", *flags)
        truth, made = (metrics.channels(AXES.read(responses))
                       for responses in (test.responses, data.load(out, "zn").responses))
    return scores(truth, made, again)


def transfer():
    """The model as it is, then the trainings for each number of rows."""
    dataset, again = other_detector(max(SIZES) + TESTED)
    test, weights = data.select(dataset, slice(-TESTED, None)), ROOT / "weights/fm-zn.eqx"
    usual = drawn("fm", weights, test, again, "--axes", AXES.word)
    yield {"label": "weights/fm-zn.eqx", "seen": usual}
    refit = mock.patch.object(data, "first_scaler", lambda args, particles: data.fit_conditions(
        particles, args.cond))
    for rows, (how, (steps, rate)) in itertools.product(SIZES, STEPS.items()):
        size = 128 if rows >= 1000 else 64
        flags = "--batch-size", size, "--lr", rate, "--epochs", max(1, round(steps * size / (0.7 * rows)))
        begin = ("--finetune", weights) if how != "from nothing" else ()
        with tempfile.TemporaryDirectory() as folder, refit if "refitted" in how else nullcontext():
            model = trained("fm", data.select(dataset, slice(rows)), Path(folder), *flags, *begin)
            yield {"label": f"{rows} rows, {how}", "seen": drawn("fm", model, test, again)}


def elsewhere():
    """Every script trained on MANY rows by its default command, and, where it can be, fine-tuned on FEW."""
    dataset, again = other_detector(MANY + TESTED)
    tests = {"seen": (data.select(dataset, slice(-TESTED, None)), again),
             "unseen": other_detector(TESTED, fresh=True)}
    for script in RECIPES["zn"]:
        cases = {f"{script}, {MANY} rows": (MANY, ())}
        if script in TUNED:
            begin = "--finetune", ROOT / f"weights/{script}-zn.eqx", *TUNED[script]
            cases[f"{script}, {FEW} rows, fine-tuned"] = FEW, begin
        for label, (rows, flags) in cases.items():
            with tempfile.TemporaryDirectory() as folder:
                model = trained(script, data.select(dataset, slice(rows)), Path(folder), *flags)
                yield {"label": label} | {name: drawn(script, model, *test) for name, test in tests.items()}


TABLES = {"transfer": transfer, "elsewhere": elsewhere}


def main(argv=None):
    """Write a table."""
    parser = common.parser(__doc__, "transfer", flags=())
    parser.set_defaults(detector="zn")
    parser.add_argument("table", nargs="?", choices=TABLES, default="transfer", help="default: transfer")
    args = parser.parse_args(argv)
    common.prepare_jax()
    found, command = [], f"python -m benchmarks.transfer {args.table}".removesuffix(" transfer")
    for row in TABLES[args.table]():
        parts = {name: TESTED for name in ("seen", "unseen") if name in row}
        found.append(row | {"measured_with": common.VERSION, "rows": parts})
        print(found[-1], flush=True)
        write(args.table, "zn", ROOT, rows=found, command=command)


if __name__ == "__main__":
    common.run(main)
