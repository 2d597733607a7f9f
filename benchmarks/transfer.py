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
from functools import partial
from pathlib import Path

import equinox as eqx
import numpy as np

import common
import data
import fm
import metrics
import orientation
import simulator
from benchmarks.tables import RECIPES, ROOT, write
from simulator import DETECTORS

SIZES, TESTED = (100, 1000, 10_000, 60_000), 6000   # rows of the files, of which 70 % train
MANY, FEW = 30_000, 1000                            # rows that every script is trained on, fine-tuned on
SHORT = "--batch-size", 128, "--lr", 5e-4, "--epochs", 60                  # 300 steps on FEW rows
TUNED = dict.fromkeys(("fm", "diffusion", "vae", "gan"), SHORT) | {"latent_fm": (*SHORT, "--flow-epochs", 60)}
AXES = orientation.Axes("yX", (0.5, -0.3))
STEPS = {"fine-tuned": (300, 5e-4), "from nothing": (1000, 2e-3)}   # with their learning rates


def other_detector(rows, fresh=False):
    """The detector, and a Dataset of so many rows of it on axes of its own; `fresh`: of unseen particles."""
    detector, usual = DETECTORS["zn"]._replace(light=0.84, core=1.3, spread=1.2), DETECTORS["zn"]
    DETECTORS["zn"] = detector
    blocks = [*simulator.simulated_blocks("zn", rows, seed=3, fresh=fresh)]
    DETECTORS["zn"] = usual
    responses, particles, pdg = (np.concatenate(parts) for parts in zip(*blocks))
    particles[:, 1:3] += np.float32(AXES.offset)
    return detector, data.Dataset(AXES.write(responses), particles, pdg)


def scores(truth, found, oracle):
    """W, MAE and light of channels (N, 5), beside those of another run of the simulator."""
    cells = {name: metrics.cell([score(truth, found)], [score(truth, oracle)], "oracle")
             for name, score in (("W", metrics.wasserstein), ("MAE", metrics.mae))}
    return cells | {"light": float(found.sum() / truth.sum())}


def trained(how, number, path, folder):
    """(flags, network, scaler) of a training on a file of so many rows."""
    steps, rate = STEPS[how]
    size = 128 if number >= 1000 else 64
    flags = ["--data", path, "--batch-size", size, "--lr", rate, "--quiet", "--run", folder]
    begin = ["--finetune", ROOT / "weights/fm-zn.eqx"] if how == "fine-tuned" else []
    args = fm.parse([str(word) for word in (*flags, *begin)])
    dataset, split = data.open_split(args)
    plan, scaler = common.plan(args), data.first_scaler(args, dataset.particles[split.train])
    plan = plan._replace(epochs=max(1, round(steps * size / len(split.train))))
    arrays = dataset.responses, data.conditions(dataset.particles, scaler)
    make = partial(fm.make_network, args.net, args.counts, DETECTORS["zn"], len(scaler.mean))
    loss = partial(fm.batch_loss, how=args.counts, end=args.exit)
    net, _ = fm.train(common.first_network(args, make, plan), loss, arrays, split.train, plan)
    return args, net, scaler


def row(label, args, net, scaler, test, oracle):
    """A row of the table, on the axes of the open data."""
    turned = data.turned(args, test, np.arange(len(test.pdg)))
    draw = eqx.filter_jit(eqx.Partial(fm.sample, net, shape=DETECTORS["zn"].shape, how=args.counts,
                                      end=args.exit, steps=args.steps))
    made = metrics.channels(metrics.generator(draw, scaler, 0)(turned.particles, 0))
    found = {"label": label, "axes": args.header["axes"]["word"], "measured_with": common.VERSION,
             "rows": {"seen": len(test.pdg)}}
    return found | {"seen": scores(metrics.channels(turned.responses), made, metrics.channels(oracle))}


def transfer():
    """The model as it is, then both trainings for each number of rows."""
    detector, dataset = other_detector(max(SIZES) + TESTED)
    test = data.select(dataset, slice(max(SIZES), None))
    moved = AXES.move(test.particles)
    oracle = simulator.simulate(detector, moved, test.pdg, 1000)
    args = fm.parse(["--load", str(ROOT / "weights/fm-zn.eqx")])
    make = partial(fm.make_network, args.net, args.counts, DETECTORS["zn"], data.CONDITIONS[args.cond])
    usual = common.load_model(args.load, make), data.stored_scaler(args.header)
    yield row("weights/fm-zn.eqx", args, *usual, test, oracle)
    for size in SIZES:
        for how in STEPS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{size}.h5")
                data.save_blocks(path, size, [data.select(dataset, slice(size))._asdict()])
                yield row(f"{size} rows, {how}", *trained(how, size, path, folder), test, oracle)


def elsewhere():
    """Every script trained on MANY rows by its default command, and, where it can be, fine-tuned on FEW."""
    detector, dataset = other_detector(MANY + TESTED)
    tests = {"seen": data.select(dataset, slice(MANY, None)),
             "unseen": other_detector(TESTED, fresh=True)[1]}
    oracles = {name: simulator.simulate(detector, AXES.move(test.particles), test.pdg, 1000)
               for name, test in tests.items()}
    for script, rows in itertools.product(RECIPES["zn"], (MANY, FEW)):
        begin = ["--finetune", ROOT / f"weights/{script}-zn.eqx", *TUNED.get(script, ())]
        if rows == MANY or script in TUNED:
            with tempfile.TemporaryDirectory() as folder:
                path, run = Path(folder, "mine.h5"), Path(folder, "run")
                data.save_blocks(path, rows, [data.select(dataset, slice(rows))._asdict()])
                found = call(script, "--data", path, "--run", run, *(begin if rows == FEW else ()))
                yield {"label": f"{script}, {rows} rows" + ", fine-tuned" * (rows == FEW),
                       "measured_with": common.VERSION, "rows": dict.fromkeys(tests, TESTED),
                       "train_seconds": found["train_seconds"]} | {
                           name: drawn(script, run, test, oracles[name]) for name, test in tests.items()}


def call(script, *flags):
    """The main of a script for ZN."""
    words = [str(word) for word in ("--detector", "zn", "--quiet", *flags)]
    return importlib.import_module(script).main(words)


def drawn(script, run, test, oracle):
    """Scores of the responses that the model in `run` draws for the particles of a Dataset."""
    asked, out = run / "asked.h5", run / "out.h5"
    data.save_blocks(asked, len(test.pdg), [test._asdict()])
    call(script, "--load", run / "model.eqx", "--generate", asked, "--out", out, "--all-hit")
    pair = (AXES.read(responses) for responses in (test.responses, data.load(out, "zn").responses))
    return scores(*map(metrics.channels, (*pair, oracle)))


TABLES = {"transfer": transfer, "elsewhere": elsewhere}


def main(argv=None):
    """Write a table."""
    parser = common.parser(__doc__, "transfer", flags=())
    parser.set_defaults(detector="zn")
    parser.add_argument("table", nargs="?", choices=TABLES, default="transfer", help="default: transfer")
    args = parser.parse_args(argv)
    common.prepare_jax()
    found, command = [], f"python -m benchmarks.transfer {args.table}".removesuffix(" transfer")
    for entry in TABLES[args.table]():
        print(entry, flush=True)
        found.append(entry)
        write(args.table, "zn", ROOT, rows=found, command=command)


if __name__ == "__main__":
    common.run(main)
