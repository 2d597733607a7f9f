"""The tables of docs/RESULTS.md. A table is a list of commands of the scripts, one for each row.

    python -m benchmarks.tables                           list the tables and their commands
    python -m benchmarks.tables counts --detector zn      run a table, row by row

A row whose run folder holds the metrics.json of its command is not run again, one that was cut off is
resumed. The scores are collected in benchmarks/results/TABLE-DETECTOR.json, beside figures published for
GEANT data. `results` trains the models of weights/: copy a run's model.eqx and metrics.json there to publish
them. `networks` and `flows` compare costs in one process, in which all take turns; `solvers` is
Fig. 9 of [CaloDREAM] for weights/calodream-DETECTOR.eqx, `steps` compares samplers of fm.py and diffusion.py.
"""
import itertools
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

import calodream
import calorimeter
import common
import data
import diffusion
import files
import fm
import iaf
import judge
import metrics
import shower_metrics
import solvers as methods
from calorimeter import CALORIMETERS
from simulator import DETECTORS

ROOT = Path(__file__).parent.parent
RESULTS = "benchmarks/results"


# ----------------------------------------------------------------------------------------------------- tables

# of the models of weights/, each with all rows
RECIPES = {"zn": {"fm": "--epochs 8", "latent_fm": "--epochs 6 --flow-epochs 60", "diffusion": "--epochs 8",
                  "vae": "--epochs 8", "gan": "--epochs 4", "vqgan": "--epochs 4 --prior-epochs 8",
                  "iaf": "--epochs 2 --student-epochs 2 --sum-epochs 3"},
           "zp": {"fm": "--epochs 28", "latent_fm": "--epochs 14 --flow-epochs 90",
                  "diffusion": "--epochs 28", "vae": "--epochs 20", "gan": "--epochs 10",
                  "vqgan": "--epochs 10 --prior-epochs 20",
                  "iaf": "--epochs 5 --student-epochs 4 --sum-epochs 8"}}
ADVERSARIES = {"GAN": "--loss plain", "GAN, post": "--loss plain --post", "GAN + l2": "--loss plain --l2 1",
               "SDI-GAN": "--loss plain --sdi 0.1", "GAN of pairs (default)": ""}
STUDENTS = {"base": "--channel-loss 0 --light-loss 0", "channel": "--no-diversity --light-loss 0",
            "channel and diversity": "--light-loss 0",                     # so far [IAF, Table 1]
            "channel, diversity and light": ""}
LEARNING = ("paper", 2), ("paper", 5), ("dense", 1), ("dense", 2), ("dense", 5)   # networks of fm.py, epochs
TEMPERATURES, TOP_KS = (0.8, 0.9, 1, 1.1, 1.2), (64, 0)                    # [Poster, Fig. 7]; 0: all tokens

# W, MAE and RMSE on GEANT data of ZN; two did not converge there [Comparison, Tables 2 to 4 and 6]
PUBLISHED = {
    "autoencoders": {
        "cnn, vae": (11.52, 17.76, 50.38), "cnn, supervised": (23.71, 31.90, 72.32),
        "cnn, noise-l2": (37.56, 39.32, 92.28), "cnn, noise-sinkhorn": (26.53, 29.07, 66.16),
        "vit, vae": (11.90, 18.05, 49.48), "vit, supervised": (20.43, 30.60, 74.64),
        "vit, noise-l2": (11.19, 15.47, 43.49), "vit, noise-sinkhorn": (11.34, 15.88, 44.17),
        "mixer, vae": (12.22, 18.00, 49.51), "mixer, supervised": (17.08, 26.90, 104.83),
        "mixer, noise-l2": (), "mixer, noise-sinkhorn": ()},
    "adversaries": {
        "GAN": (7.09, 25.65, 104.60), "GAN, post": (5.70, 24.71, 100.98),
        "GAN + l2": (6.44, 27.37, 109.24), "SDI-GAN": (6.57, 27.01, 107.82)}}


def tables(detector):
    """{table: {label: command}} of a detector or a calorimeter of the CaloChallenge."""
    if detector in CALORIMETERS:
        whole = "calodream.py --epochs 6" if detector == "ds3" else "calodream.py"
        return {"results": {"calodream": whole, "calodream-latent": "calodream.py --latent --epochs 8"}}
    weights, rows = f"weights/{{}}-{detector}.eqx", f"--n {data.ROWS[detector]}"
    vae = "vae.py --arch {} --variant {} --epochs 3 --validate"
    tokens = [f"--temperature {t} --top-k {k}" for k in TOP_KS for t in TEMPERATURES]
    passes = [f"--steps {n}" for n in (2, 4, 8, 16, 32)]
    return {
        "results": {model: f"{model}.py {rows} {recipe}" for model, recipe in RECIPES[detector].items()},
        "variants": {"fm, default flags": "fm.py --steps 6", "fm, seed 1": "fm.py --steps 6 --seed 1",
                     "fm, seed 2": "fm.py --steps 6 --seed 2",
                     "latent_fm, published network": "latent_fm.py --net paper --epochs 5 --flow-epochs 10"},
        "counts": {how: f"fm.py --n 20000 --counts {how}" for how in ("round", "floor", "sample")},
        "autoencoders": {label: vae.format(*label.split(", ")) for label in PUBLISHED["autoencoders"]},
        "adversaries": {label: f"gan.py --epochs 2 --validate {ADVERSARIES[label]}" for label in ADVERSARIES},
        "students": {label: f"iaf.py --student-epochs 1 {flags}" for label, flags in STUDENTS.items()},
        "channels": {"direct estimates": "channels.py"},
        "learning": {f"{net}, {n}": f"fm.py --net {net} --batch-size 128 --epochs {n} --validate"
                     for net, n in LEARNING},
        "latent_fm-sweep": sweep("latent_fm", weights, [f"--steps {n}" for n in (1, 2, 4, 7, 11, 16, 32)]),
        "vqgan-sweep": sweep("vqgan", weights, passes + tokens),
        "priors": {prior: f"vqgan.py --prior {prior} --validate" for prior in ("masked", "gpt")}}


def sweep(script, load, cases):
    """The sampler of a trained model with other flags, scored on validation rows."""
    load = load.format(script)
    label = lambda flags: flags.removeprefix("--").replace(" --", ", ")
    return {label(flags): f"{script}.py --load {load} {flags} --validate" for flags in cases}


def commands(name, rows, detector):
    """{label: the whole command}, each with a run folder of its own."""

    def whole(label, command):
        script, *flags = shlex.split(command)
        slug = re.sub(r"[^a-z0-9_.]+", "-", label.lower()).strip("-")
        run = f"runs/{label}-{detector}" if name == "results" else f"runs/tables/{name}-{detector}/{slug}"
        return shlex.join(["python", script, "--detector", detector, *flags, "--run", run])

    return {label: whole(label, command) for label, command in rows.items()}


# ------------------------------------------------------------------------------------- running and collecting

def read(path):
    """The JSON of a file, None without one."""
    return json.loads(path.read_text()) if path.exists() else None


def flags_of(command):
    """{"steps": "8", ...}: the flags of a command and the words after them."""
    words = shlex.split(command)
    return {name[2:]: value for name, value in zip(words, words[1:]) if name.startswith("--")}


def run_row(command, root):
    """metrics.json of a command that is run in the folder `root`, unless it was before; None if it fails."""
    folder = root / flags_of(command)["run"]

    def done():
        result = read(folder / "metrics.json")
        return result if result and result["command"] in (command, f"{command} --resume") else None

    if result := done():
        return result
    if not (folder / "metrics.json").exists() and any(folder.rglob("state.eqx")):
        command += " --resume"
    print(command, flush=True)
    code = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=root).returncode
    return done() if code == 0 else None


KEPT = ("device", "rows", "parameters", "mflop", "evaluations", "train_device", "train_seconds",
        "step_seconds", "ms_per_response", "reconstruction", "factor", "validation", "models")


def collected(label, command, result):
    """A row of a table from what metrics.json holds."""
    row = {"label": label, "command": command, "measured_with": result["versions"]["zdc"]}
    row |= {name: result[name] for name in KEPT if name in result}
    for part in ("seen", "unseen"):
        scores = result.get(part) or {}
        row[part] = {name: scores[name] for name in (*metrics.SCORES, "marginals") if name in scores}
    return row


def write(name, detector, root, **found):
    """Write benchmarks/results/NAME-DETECTOR.json."""
    files.write_json(root / RESULTS / f"{name}-{detector}.json", {
        "table": name, "detector": detector,
        "device": common.device_name(), "versions": common.versions(), **found})


def run_table(name, rows, detector, root=ROOT):
    """Run or resume the rows {label: command}, one by one, and collect them; returns the labels of those that
    failed. A row of the present file stays until it is measured again, unless its command has changed."""
    whole, failed = commands(name, rows, detector), []
    old = (read(root / RESULTS / f"{name}-{detector}.json") or {"rows": []})["rows"]
    found = {row["label"]: row for row in old if row["command"] == whole.get(row["label"])}
    published = PUBLISHED.get(name, {}) if detector == "zn" else {}
    for label, command in whole.items():
        result = run_row(command, root)
        if result is None:
            failed.append(label)
            continue
        figures = dict(zip(("W", "MAE", "RMSE"), published.get(label, ())))
        found[label] = collected(label, command, result) | {"published": figures}
        write(name, detector, root, rows=[found[label] for label in whole if label in found])
    if name == "learning" and found:
        rows = learning([found[label] for label in whole if label in found], detector, root)
        path = root / f"pictures/fm-{detector}-learning.png"
        plot_lines(path, rows, "net", [("steps", "W"), ("minutes", "W")])
    return failed


# --------------------------------------------------------------------------------------------------- pictures

def ticks(axes):
    """Numbers at 1, 2, 5 or closer on the logarithmic axes of a panel."""
    from matplotlib.ticker import LogLocator                                   # half a second to import
    for axis in axes.xaxis, axes.yaxis:
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def plot_lines(path, rows, line, panels):
    """Draw columns of rows, a panel for each pair (x, y) and a line for each text of the column `line`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (x, y) in zip(figure.subplots(1, len(panels)), panels):
        for text in dict.fromkeys(row[line] for row in rows):
            points = [(row[x], row[y]) for row in rows if row[line] == text]
            axes.plot(*zip(*points), marker="o", markersize=4, label=text)
        axes.set(xlabel=x, ylabel=y.replace("_", ", "), xscale="log", yscale="log" if y == "W" else "linear")
        ticks(axes)
    axes.legend(frameon=False)
    with files.write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)


# --------------------------------------------------------------------------- networks at equal steps and time

def learning(rows, detector, root=ROOT):
    """The rows of the table `learning` with "steps" of their trainings, and "minutes" by the step that the
    table `networks` measured, alone on the machine."""
    measured = read(root / RESULTS / f"networks-{detector}.json")["rows"]
    step = {row["label"]: row["step_seconds"] / 256 for row in measured}       # s of an example
    found = []
    for row in rows:
        flags = flags_of(row["command"])
        size = int(flags["batch-size"])
        steps = int(flags["epochs"]) * (row["rows"]["train"] // size)
        minutes = steps * size * step[flags["net"]] / 60
        found.append(row | {"net": flags["net"], "steps": steps, "minutes": minutes,
                            "W": row["validation"]["W"]["value"]})
    return found


# --------------------------------------------------------------------------------- comparisons in one process

def race(functions, repeats=3):
    """Seconds of each function() of a dict, the fastest of `repeats`, called in turn so that all meet the
    same machine; a first round compiles and does not count."""
    rounds = [{name: common.seconds(call) for name, call in functions.items()} for _ in range(1 + repeats)]
    return {name: min(seconds[name] for seconds in rounds[1:]) for name in functions}


def repeated(step, batch, state):
    """Train on one batch for ever, a step for each next()."""
    while True:
        state, losses = step(batch, state)
        yield losses


def networks(detector):
    """The networks of fm.py: parameters, MFLOP, seconds of a step and ms per response, both at batch 256."""
    key, conditions, shape = jax.random.key(0), data.CONDITIONS["physics"], DETECTORS[detector].shape
    rows, functions = [], {}
    for name in fm.NETWORKS:
        how = "round" if name == "paper" else "sample"
        args = fm.parse(["--detector", detector, "--net", name, "--counts", how])
        plan = common.plan(args)
        make = eqx.filter_jit(partial(fm.make_network, name, how, DETECTORS[detector], conditions))
        counts = np.random.default_rng(0).poisson(0.2, (args.batch_size, *shape)).astype(np.uint16)
        c, optimiser = np.zeros((len(counts), conditions), np.float32), common.adamw(plan, 1000)
        step = fm.make_step(partial(fm.batch_loss, how=how), optimiser, plan)
        net, state = make(key), common.first_state(make(key), optimiser)       # a step gives its state away
        model = methods.unfitted(lambda key: net, args.steps, key)
        draw = eqx.filter_jit(eqx.Partial(fm.sample, model, shape=shape, how=how))
        functions[name, "step"] = partial(next, repeated(step, (counts, c, key, np.int32(0)), state))
        functions[name, "draw"] = partial(draw, c, key)
        cost = common.network_cost(net, shape, (), (conditions,), ())
        rows.append({"label": name, **cost, "evaluations": args.steps + (how == "sample")})
    seconds = race(functions)
    for row in rows:
        step, draw = (seconds[row["label"], what] for what in ("step", "draw"))
        row |= {"step_seconds": step, "ms_per_response": {"256": 1e3 * draw / args.batch_size}}
    return {"rows": rows}


SCORED, TIMED = 10_240, 16   # test rows at most; fibres that naive sampling is timed on, each a full pass
REMOVALS = {"floor": 2.60, "round": 4.33, "floor-renormalise": 1.73, "round-renormalise": 2.46}


def flows(detector, root=ROOT):
    """Both flows of runs/iaf-DETECTOR with true and with predicted photon sums, W of the ways to remove the
    noise (published: arXiv 2608.12795), and ms per response of the teacher's two samplers and the student."""
    nets, rows, key, run = {}, [], jax.random.key(0), root / f"runs/iaf-{detector}"
    for path in run / "teacher" / "model.eqx", run / "model.eqx":
        args = iaf.parse(["--detector", detector, "--load", str(path)])
        logit, conditions = iaf.Logit(**args.header["logit"]), data.CONDITIONS[args.cond]
        make = partial(iaf.make_generator, args.net, args.sampler, DETECTORS[detector], logit, conditions)
        nets[args.sampler] = common.load_model(path, make)
        nets[args.sampler, "removal"] = args.header["removal"]
    dataset, split = data.open_split(args)
    test = data.select(dataset, split.test[:SCORED])
    c, total = data.conditions(test.particles, data.stored_scaler(args.header)), test.responses.sum((1, 2))
    predict = eqx.filter_jit(eqx.Partial(iaf.draw_totals, nets["student"].totals))
    sums = {"true": total.astype(np.float32), "predicted": common.in_blocks(predict, key, c)}
    draw = {name: eqx.filter_jit(eqx.Partial(iaf.draw_light, nets[name])) for name in ("teacher", "student")}
    for name, label in itertools.product(draw, sums):
        light = common.in_blocks(draw[name], key, c, sums[label])
        counts = iaf.remove_noise(light, sums[label], nets[name, "removal"], logit.noise)
        scores = channel_scores(test, np.asarray(counts).reshape(test.responses.shape))
        rows.append({"label": f"{name}, {label} sums", "flow": name, "sums": label} | scores)
    again = metrics.resimulate(detector, test)
    rows.append({"label": "oracle", "flow": "oracle", "sums": "-"} | channel_scores(test, again))
    removals = [{"flow": flow, "removal": how, "W": w, "paper_W": REMOVALS.get(how)}
                for flow, found in args.header["scores"]["removals"].items() for how, w in found.items()]
    block = c[:common.BLOCK], sums["true"][:common.BLOCK]
    z = jax.random.normal(key, (len(block[0]), counts.shape[1]))
    naive = eqx.filter_jit(jax.vmap(partial(nets["teacher"].flow.invert, how="naive", fibres=TIMED)))
    seconds = race({"naive": partial(naive, z, *block), "incremental": partial(draw["teacher"], *block, key),
                    "student": partial(draw["student"], *block, key)}, repeats=1)
    seconds["naive"] *= z.shape[1] / TIMED
    ms = {name: 1e3 * value / len(z) for name, value in seconds.items()}
    rows = [row | {"R": row["W"] / rows[-1]["W"]} for row in rows]
    return {"rows": rows, "test_rows": len(c), "removals": removals, "speed": {"ms": ms}}


def channel_scores(test, responses):
    """W, MAE and the conditional scores of [IAF], of the channels of responses to the rows of a Dataset."""
    truth, found = metrics.channels(test.responses), metrics.channels(responses)
    ids = data.unique_particles(test.particles)[0]
    terms = metrics.mae_particles(truth, found, ids)
    means = {name: metrics.weighted_mean(terms, metrics.particle_weights(ids, name))
             for name in ("MAE_c", "MAE_cw", "MAE_cond")}
    return {"W": metrics.wasserstein(truth, found), "MAE": metrics.mae(truth, found)} | means


# Evaluations of the shape network by solver [CaloDREAM, Fig. 9]
SOLVED = {"bns": (4, 8), "rk4": (8, 40), "midpoint": (8, 16), "euler": (8, 32), "bns-global": (4,)}
SHOWERS = 1500             # that each solver makes for the first validation rows


def solvers(detector, root=ROOT):
    """AUC and ms per shower of the solvers of calodream.py against evaluations, for a trained model."""
    path, rows = root / f"weights/calodream-{detector}.eqx", []
    flags = ["--detector", detector, "--load", str(path), "--validate", "--quiet"]
    args = calodream.parse(flags)
    model = common.load_model(path, calodream.maker(args))
    test = calorimeter.Showers(*(array[:SHOWERS] for array in calodream.open_test(args)))
    features = calorimeter.features(test, args.binning)
    for solver, numbers in SOLVED.items():
        for number in numbers:
            steps = number // len(methods.METHODS[solver][0]) if solver in methods.METHODS else number
            args = calodream.parse([*flags, "--solver", solver, "--steps", str(steps)])
            draw = eqx.filter_jit(eqx.Partial(calodream.sample, model,
                                              solver=calodream.choose_solver(args, model)))
            made = calodream.generate_showers(draw, test.energies, jax.random.key(0))
            pair = features, calorimeter.features(made, args.binning)
            logits = shower_metrics.logits_of(test, made, pair, 0, shower_metrics.CLASSIFIER)
            scores = {name: judge.rank_auc(*pair[::-1]) for name, pair in logits.items()}
            rows.append({"label": solver, "evaluations": number, **scores,
                         **common.time_sampler(draw, 1, (1, 100), repeats=3)})
            print(rows[-1])
    path = root / f"pictures/calodream-{detector}-solvers.png"
    plot_lines(path, rows, "label", [("evaluations", "AUC_high"), ("evaluations", "AUC_low")])
    return {"rows": rows, "showers": len(test.energies)}


# Evaluations of solvers, steps of DDIM [Comparison, Fig. 7], and the first validation rows, to save time
FITTED, DDIM, DRAWN = (2, 3, 4, 6, 8), (10, 25, 50), 6000


def steps(detector, root=ROOT):
    """Scores and times of the samplers of fm.py and diffusion.py for the networks of weights/, on validation
    rows."""
    rows, shape = [], DETECTORS[detector].shape
    for script, module, kind, end in ("fm", fm, ("sample",), (fm.END["sample"],)), (
            "diffusion", diffusion, (), ()):
        path = root / f"weights/{script}-{detector}.eqx"
        args = module.parse(["--load", str(path), "--detector", detector])
        make = partial(module.make_network, args.net, *kind, DETECTORS[detector], data.CONDITIONS[args.cond])
        model = common.load_model(args.load, partial(methods.unfitted, make, args.steps))
        scaler, (dataset, split) = data.stored_scaler(args.header), data.open_split(args)
        test = data.select(dataset, split.validation[:DRAWN])
        c = data.conditions(dataset.particles[split.train[:methods.FITTED]], scaler)
        cases = [("fitted", n, module.fit_solver(model.net, c, shape, *end, n), kind) for n in FITTED]
        if script == "diffusion":
            cases += [(f"DDIM, eta {eta}", n, model, (n, eta)) for n in DDIM for eta in (0.0, 0.7)]
        real = metrics.summarise(test.responses)
        for label, n, solved, flags in cases:
            draw = eqx.filter_jit(lambda c, key: module.sample(solved, c, key, shape, *flags))
            made = metrics.generator(draw, scaler, args.seed)(test.particles, 0)
            scores = metrics.quick_scores(args, test, made, f"{script}.py, {label}, {n} steps")
            judged = metrics.judge_pair(real, metrics.summarise(made), test.particles, 0)
            rows.append({"script": f"{script}.py", "label": label, "line": f"{script}.py, {label}",
                         "steps": n, "rows": {"validation": len(made)}, "validation": scores,
                         "W": scores["W"]["value"], **judged["scores"],
                         **common.time_sampler(draw, len(scaler.mean), (1, 256), repeats=3)})
    plot_lines(root / f"pictures/{detector}-steps.png", rows, "line", [("steps", "W"), ("steps", "AUC_high")])
    return {"rows": rows}


COMPARISONS = {"networks": networks, "flows": flows, "solvers": solvers, "steps": steps}


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """List the tables, or run one; the exit code is 1 if a row failed."""
    parser = common.parser(__doc__, "tables", flags=())
    parser.add_argument("--detector", choices=(*DETECTORS, *CALORIMETERS), default="zn",
                        help="detector or calorimeter (default: zn)")
    parser.add_argument("name", nargs="?", choices=(*tables("zn"), *COMPARISONS), help="table to run")
    parser.add_argument("--list", action="store_true", help="list the tables and their commands")
    args = parser.parse_args(argv)
    found = tables(args.detector)
    if args.list or not args.name:
        for name, table in found.items():
            print(f"{name}:", *commands(name, table, args.detector).values(), sep="\n    ")
        return print(*(f"{name}: compared in one process" for name in COMPARISONS), sep="\n")
    common.prepare_jax()
    if args.name in COMPARISONS:
        result = COMPARISONS[args.name](args.detector)
        mark = {"command": f"python -m benchmarks.tables {args.name} --detector {args.detector}",
                "measured_with": common.VERSION}
        write(args.name, args.detector, ROOT, **result | {"rows": [row | mark for row in result["rows"]]})
    elif failed := run_table(args.name, found[args.name], args.detector):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    common.run(main)
