"""The tables, the check of the simulator and the documents made of both."""
import importlib
import json
import re
import shlex
from functools import partial

import equinox as eqx
import jax
import numpy as np
import pytest

import calorimeter
import channels
import common
import data
import diffusion
import files
import fm
import iaf
import metrics
import simulator
import solvers
import tiny
from benchmarks import check, docs, tables, transfer
from common import UserError

ROOT, DETECTORS = tables.ROOT, ("zn", "zp")
STUB = """
import argparse, json, sys
from pathlib import Path
parser = argparse.ArgumentParser()
for flag in "--detector", "--value", "--run":
    parser.add_argument(flag)
for flag in "--cut", "--bad", "--resume":
    parser.add_argument(flag, action="store_true")
args = parser.parse_args()
run = Path(args.run)
run.mkdir(parents=True, exist_ok=True)
words = ["stub.py", *sys.argv[1:]]
with open("ran", "a") as file:
    print(*words, file=file)
if args.cut:
    (run / "state.eqx").touch()
if args.bad or args.cut and not args.resume:
    sys.exit(1)
result = {"command": " ".join(["python", *words]), "device": "a machine", "versions": {"zdc": "9.9"},
          "seen": {"W": {"value": float(args.value), "oracle": 1.0}}, "unseen": None,
          "ms_per_response": {"256": 0.5}, "compile_seconds": {"256": 3.0}}
(run / "metrics.json").write_text(json.dumps(result))
"""
COLLECTED = sorted((ROOT / tables.RESULTS).glob("*.json"))


# ------------------------------------------------------------------------------------- commands of the tables

@pytest.mark.parametrize("detector", DETECTORS)
def test_every_command_parses(detector, monkeypatch):
    monkeypatch.chdir(ROOT)
    read, trained, runs = common.read_model_header, {}, []

    def header(path, script, detector, flags):
        """That of weights/, or of the command before that trains the model."""
        return trained[path.parent] if path.parent in trained else read(path, script, detector, flags)

    monkeypatch.setattr(common, "read_model_header", header)
    for name, rows in tables.tables(detector).items():
        for label, command in tables.commands(name, rows, detector).items():
            _, script, *words = shlex.split(command)
            args = importlib.import_module(script.removesuffix(".py")).parse(words)
            assert args.command == command and args.detector == detector, (name, label)
            trained[args.run] = getattr(args, "header", None)
            runs.append(args.run)
    assert len(set(runs)) == len(runs) > 60


def test_flags_of_a_command():
    found = tables.flags_of("python fm.py --solver dpm --steps 8 --validate --run runs/a")
    assert found["solver"] == "dpm" and found["steps"] == "8" and found["run"] == "runs/a"


@pytest.mark.parametrize("path", COLLECTED, ids=lambda path: path.stem)
def test_collected_rows_are_repeated_by_the_commands_of_the_tables(path):
    result = json.loads(path.read_text())
    name, detector = result["table"], result["detector"]
    assert path.stem == f"{name}-{detector}" and result["versions"] and "device" in result
    known = tables.tables(detector).get(name)
    if known is None:
        assert name in ("check", "o2", "events", "transfer", "elsewhere") or name in tables.COMPARISONS
    else:
        whole = tables.commands(name, known, detector)
        assert [row["command"] for row in result["rows"]] == [whole[row["label"]] for row in result["rows"]]


def test_list_prints_every_command(capsys):
    tables.main(["--list", "--detector", "zp"])
    out = capsys.readouterr().out
    run = "--run runs/tables/adversaries-zp/gan-post"
    assert f"python gan.py --detector zp --epochs 2 --validate --loss plain --post {run}\n" in out
    assert all(f"{name}:" in out for name in (*tables.tables("zp"), *tables.COMPARISONS))


# ------------------------------------------------------------------------------------- running and collecting

ROWS = {"good": "stub.py --value 2", "cut off": "stub.py --value 3 --cut", "bad": "stub.py --value 4 --bad"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    return tmp_path


def collect(folder, rows=ROWS):
    """(labels that failed, {label: row}, commands that ran) of a table of stubs."""
    (folder / "ran").unlink(missing_ok=True)
    failed = tables.run_table("adversaries", rows, "zn", folder)
    found = json.loads((folder / tables.RESULTS / "adversaries-zn.json").read_text())
    ran = (folder / "ran").read_text().splitlines() if (folder / "ran").exists() else []
    ran = [re.sub(" --run.*?(?= --|$)", "", line) for line in ran]
    return failed, {row["label"]: row for row in found["rows"]}, ran


def test_a_table_runs_resumes_and_collects(folder):
    failed, rows, ran = collect(folder)
    assert failed == ["cut off", "bad"] and list(rows) == ["good"] and len(ran) == 3
    failed, rows, ran = collect(folder)
    assert failed == ["bad"] and list(rows) == ["good", "cut off"]
    assert ran == ["stub.py --detector zn --value 3 --cut --resume", "stub.py --detector zn --value 4 --bad"]
    row = rows["cut off"]
    run = "runs/tables/adversaries-zn/cut-off"
    assert row["command"] == f"python stub.py --detector zn --value 3 --cut --run {run}"
    assert row["seen"] == {"W": {"value": 3.0, "oracle": 1.0}} and row["measured_with"] == "9.9"
    assert row["ms_per_response"] == {"256": 0.5} and "compile_seconds" not in row


def test_a_row_whose_command_has_changed_is_run_again(folder):
    collect(folder, {"good": "stub.py --value 2"})
    failed, rows, ran = collect(folder, {"good": "stub.py --value 5", "bad": "stub.py --bad --value 1"})
    assert failed == ["bad"] and rows["good"]["seen"]["W"]["value"] == 5 and len(ran) == 2


def test_rows_stay_until_they_are_measured_again(folder):
    """Collected rows outlive the run folders that they were made in."""
    collect(folder, {"good": "stub.py --value 2"})
    path = folder / tables.RESULTS / "adversaries-zn.json"
    known = json.loads(path.read_text())
    known["rows"][0]["note"] = "kept"
    path.write_text(json.dumps(known))
    (folder / "runs/tables/adversaries-zn/good/metrics.json").unlink()
    failed, rows, _ = collect(folder, {"good": "stub.py --value 2", "other": "stub.py --value 1"})
    assert not failed and "note" not in rows["good"]
    path.write_text(json.dumps(known))
    (folder / "stub.py").write_text("raise SystemExit(1)")
    (folder / "runs/tables/adversaries-zn/good/metrics.json").unlink()
    failed, rows, _ = collect(folder, {"good": "stub.py --value 2", "other": "stub.py --value 1"})
    assert failed == ["good"] and rows["good"]["note"] == "kept"


def test_published_figures_stand_beside_the_rows_of_zn(folder):
    _, rows, _ = collect(folder, {"GAN": "stub.py --value 2"})
    assert rows["GAN"]["published"] == {"W": 7.09, "MAE": 25.65, "RMSE": 104.6}
    tables.run_table("adversaries", {"GAN": "stub.py --value 2"}, "zp", folder)
    found = json.loads((folder / tables.RESULTS / "adversaries-zp.json").read_text())
    assert found["rows"][0]["published"] == {}


# ----------------------------------------------------------------------------- learning, and another detector

def test_trainings_are_compared_by_steps_and_minutes(tmp_path):
    """Ten batches of 128 are five of 256, of two seconds each."""
    networks = {"rows": [{"label": "dense", "step_seconds": 2.0}, {"label": "paper", "step_seconds": 30.0}]}
    files.write_json(tmp_path / tables.RESULTS / "networks-zn.json", networks)
    rows = [{"command": f"python fm.py --net {net} --batch-size 128 --epochs {n}", "rows": {"train": 700},
             "validation": {"W": {"value": 3.0 / n}}} for net, n in (("dense", 2), ("paper", 4))]
    found = tables.learning(rows, "zn", tmp_path)
    assert [(row["net"], row["steps"], row["W"]) for row in found] == [
        ("dense", 10, 1.5), ("paper", 20, 0.75)]
    assert [row["minutes"] for row in found] == pytest.approx([5 * 2 / 60, 10 * 30 / 60])
    tables.plot_lines(tmp_path / "a.png", found, "net", [("steps", "W"), ("minutes", "W")])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_other_detector_is_brighter_and_turned(monkeypatch):
    monkeypatch.setattr(transfer, "TESTED", 500)
    usual = simulator.DETECTORS["zn"]
    dataset, channels = transfer.other_detector(2000)
    assert simulator.DETECTORS["zn"] == usual and len(dataset.pdg) == 2000
    args = fm.parse([])
    turned = data.turned(args, dataset, np.arange(2000))
    assert args.header["axes"]["word"] == "yX"
    np.testing.assert_allclose(args.header["axes"]["offset"], transfer.AXES.offset, atol=0.05)
    again = simulator.simulate(usual, turned.particles, turned.pdg, 0)
    assert 1.2 < turned.responses.sum() / again.sum() < 1.6
    truth = metrics.channels(turned.responses[-500:])
    assert channels.sum() == pytest.approx(truth.sum(), rel=0.02)
    assert metrics.mae(truth, channels) < 0.3 * truth.mean()                   # of the same particles


# --------------------------------------------------------------------------------- comparisons in one process

def test_a_race_calls_in_turn():
    called = []
    seconds = tables.race({name: partial(called.append, name) for name in "ab"}, repeats=2)
    assert called == list("ababab") and set(seconds) == {"a", "b"} and min(seconds.values()) >= 0


def test_networks_are_compared(small_detectors, monkeypatch):
    small = partial(fm.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
    monkeypatch.setattr(fm, "NETWORKS", {"dense": small})
    parse = fm.parse
    monkeypatch.setattr(fm, "parse", lambda words: parse([*words, "--batch-size", "8", "--steps", "1"]))
    row, = tables.networks("zn")["rows"]
    assert row["label"] == "dense" and row["evaluations"] == 2 and row["parameters"] > 100
    assert min(row["step_seconds"], row["ms_per_response"]["256"], row["mflop"]) > 0


def test_samplers_are_compared(small_detectors, tmp_path, monkeypatch):
    """Of networks that were not trained: two evaluations of a fitted solver, and three steps of DDIM."""
    tiny.shrink(monkeypatch.setattr)
    monkeypatch.setattr(tables, "FITTED", (2,))
    monkeypatch.setattr(tables, "DDIM", (3,))
    scaler = data.fit_conditions(data.open_data("zn", 700, quiet=True).particles, "physics")
    (tmp_path / "weights").mkdir()
    for script, module, kind in ("fm", fm, ("sample",)), ("diffusion", diffusion, ()):
        small = partial(module.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
        monkeypatch.setattr(module, "NETWORKS", {"dense": small})
        args = module.parse(["--n", "700", "--run", str(tmp_path)])
        make = partial(module.make_network, "dense", *kind, data.DETECTORS["zn"], 14)
        model = solvers.unfitted(make, args.steps, jax.random.key(0))
        common.save_model(tmp_path, args.header, scaler, {}, model)
        (tmp_path / "model.eqx").rename(tmp_path / f"weights/{script}-zn.eqx")
    rows = tables.steps("zn", tmp_path)["rows"]
    assert [(row["script"], row["label"], row["steps"]) for row in rows] == [
        ("fm.py", "fitted", 2), ("diffusion.py", "fitted", 2), ("diffusion.py", "DDIM, eta 0.0", 3),
        ("diffusion.py", "DDIM, eta 0.7", 3)]
    assert all(row["W"] > 0 and 0 <= row["AUC_high"] <= 1 for row in rows)
    assert rows[0]["rows"] == {"validation": 71}
    assert (tmp_path / "pictures/zn-steps.png").stat().st_size > 10_000


def test_flows_are_compared(small_detectors, tmp_path, monkeypatch):
    """On a run whose weights are the same number everywhere."""
    monkeypatch.setattr(tables, "SCORED", 64)
    monkeypatch.setattr(common, "BLOCK", 64)
    dataset, removals = data.open_data("zn", 700, quiet=True), {"floor": 3.0, "scale-floor": 2.0}
    scaler, logit = data.fit_conditions(dataset.particles, "physics"), iaf.fit_logit(0.5, dataset.responses)
    for sampler, folder in ("teacher", "runs/iaf-zn/teacher"), ("student", "runs/iaf-zn"):
        args = iaf.parse(["--n", "700", "--sampler", sampler, "--run", str(tmp_path / folder)])
        make = partial(iaf.make_generator, "local", sampler, data.DETECTORS["zn"], logit, 14)
        shapes = eqx.filter_eval_shape(make, jax.random.key(0))
        net = jax.tree.map(lambda a: np.full(a.shape, 10 if a.dtype == np.int32 else 0.01, a.dtype), shapes)
        header = args.header | {"logit": logit._asdict(), "removal": "floor"}
        scores = {"removals": {"teacher": removals, "student": removals}}
        common.save_model(args.run, header, scaler, scores, net)
    found = tables.flows("zn", tmp_path)
    labels = [f"{flow}, {sums} sums" for flow in ("teacher", "student") for sums in ("true", "predicted")]
    assert [row["label"] for row in found["rows"]] == [*labels, "oracle"] and found["rows"][-1]["R"] == 1
    assert all(row["W"] > 0 and row["MAE_cw"] > 0 for row in found["rows"]) and found["test_rows"] == 64
    assert found["removals"][2] == {"flow": "student", "removal": "floor", "W": 3.0, "paper_W": 2.6}
    ms = found["speed"]["ms"]
    assert set(ms) == {"naive", "incremental", "student"} and min(ms.values()) > 0


# -------------------------------------------------------------------------------------------------- the check

@pytest.mark.parametrize("published, ours, band, verdict", [
    (10, 11, dict(relative=0.1), True), (10, 11.2, dict(relative=0.1), False),
    (-10, -11, dict(relative=0.1), True), (0, 5, dict(absolute=5), True), (0, 5.1, dict(absolute=5), False),
    (1, None, dict(relative=0.1), None), (500, np.uint16(490), dict(relative=0.1), True)])
def test_rows_judge_their_bands(published, ours, band, verdict):
    assert check.row("a", published, ours, **band)["in"] is verdict


@pytest.mark.filterwarnings("ignore")                                         # no particle has five rows
def test_rows_of_the_data_set():
    dataset = data.open_data("zn", 400, quiet=True)
    rows = {row["label"]: row["ours"] for row in check.rows_of_data("zn", dataset)}
    assert rows["share of gamma, %"] == pytest.approx(100 * np.mean(dataset.pdg == 22))
    assert rows["median photon sum"] == np.median(dataset.responses.sum((1, 2)))
    assert rows["E std, after the cut"] == pytest.approx(dataset.particles[:, 0].std(), rel=1e-4)


def test_diversity_is_the_spread_of_a_particle():
    responses = np.zeros((15, 2, 2), np.uint16)
    responses[5:10, 0, 0], responses[10:, 1] = (0, 4, 0, 4, 2), np.array((0, 8, 0, 8, 4))[:, None]
    found = check.diversity(np.concatenate([responses, responses[:1]]), np.repeat([0, 1, 2, 3], [5, 5, 5, 1]))
    np.testing.assert_allclose(found, [0, 0.25, 1, np.nan])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DETECTORS)
def test_the_check_of_a_small_set_misses_rows(name, tmp_path, capsys, monkeypatch):
    """A small set is far from the published figures: the table says so, and the exit code."""
    monkeypatch.setattr(data, "ROWS", {"zn": 400, "zp": 400})
    monkeypatch.setattr(check, "RUNS_BEFORE_CUT", 2000)
    monkeypatch.setattr(check, "EXAMPLES", check.EXAMPLES[:2])
    published = {label: channels.PUBLISHED[label][name == "zp"] for label in channels.REGRESSIONS}
    missing = "gradient boosting"
    monkeypatch.setattr(channels, "direct_estimates", lambda *_: published | {missing: None})
    with pytest.raises(SystemExit) as stop:
        check.main([name, "--json", str(tmp_path / "check.json"), "--quiet"])
    assert stop.value.code == 1
    out, result = capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert set(rows) <= set(re.split(r"  +|\n", out)) and "MISSED" in out and "not run" in out
    assert rows["unique particles"]["in"] is False and rows["W of k nearest neighbours"]["in"]
    assert rows[f"W of {missing}"]["in"] is None and len(rows) > 30 and result["table"] == "check"
    assert sum(row["in"] is False for row in rows.values()) == out.count("MISSED")


def test_the_check_passes_when_every_row_is_in(monkeypatch, capsys):
    rows = [check.row("one", 10, 10.9, relative=0.1), check.row("two", 1, None, relative=0.1)]
    monkeypatch.setattr(check, "check", lambda *_: rows)
    assert check.main(["zn"]) == rows and "0 of 2 rows missed" in capsys.readouterr().out


def published_statistics(incident, voxels):
    """Those of CaloScoreV2, of these showers, each range of u from 0 to 1."""
    logit = lambda x: np.log((1e-6 + (1 - 2e-6) * x) / (1 - 1e-6 - (1 - 2e-6) * x))
    layers = voxels.sum((2, 3))
    u = [layers.sum(1) / (2 * incident)]
    for layer in range(44):
        u.append(layers[:, layer] / (layers[:, layer:].sum(1) + 1e-10))
    u, shares = logit(np.clip(u, 0, 1)), logit(voxels / (layers[:, :, None, None] + 1e-10))
    return {"u_min": [0] * 45, "u_max": [1] * 45, "u_mean": u.mean(1), "u_std": u.std(1),
            "voxel_mean": shares.mean((0, 2)), "voxel_std": np.sqrt(shares.var(0).mean(1)),
            "correlation": np.corrcoef(layers.T)}


def test_rows_of_showers(tmp_path, monkeypatch, capsys):
    """A set of showers agrees with its own statistics; a wrong model does not, and the command says so."""
    blocks = [*calorimeter.simulated_blocks(calorimeter.CALORIMETERS["ds2"], 400, quiet=True)]
    published = published_statistics(*map(np.float64, map(np.concatenate, zip(*blocks))))
    files.write_json(tmp_path / "published.json", {"ds2": published})
    monkeypatch.setattr(check, "SHOWER_FILE", tmp_path / "published.json")
    monkeypatch.setattr(check, "SHOWERS", {"ds2": 400})
    rows = {row["label"]: row for row in check.check("ds2", quiet=True)}
    apart = {label: abs(row["ours"] - row["published"]) for label, row in rows.items()}
    own = [label for label in rows if "E_tot" not in label and "lit voxels" not in label]
    assert len(own) == 94 and max(apart[label] for label in own) < 1e-6
    small = published["u_std"] < 2
    narrow = {f"logit u_{i}, {kind}" for kind in ("mean", "std") for i in np.flatnonzero(small)}
    assert {label for label in own if rows[label]["in"]} == narrow | {*own[-4:-1]}
    assert {label for label in own if rows[label]["in"] is not None} == narrow | {*own[-4:-1]} != {*own}
    for name, value in {"mean": 0.5, "depth": 3.0, "spot": 100.0}.items():
        monkeypatch.setitem(calorimeter.MODEL, name, value)
    with pytest.raises(SystemExit) as stop:
        check.main(["ds2", "--json", str(tmp_path / "check.json"), "--quiet"])
    out, wrong = capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())["rows"]
    missed = {row["label"] for row in wrong if row["in"] is False}
    assert {"E_tot / E_inc, mean", "logit u_0, mean", "logit u_5, mean", *own[-4:-1]} <= missed
    assert stop.value.code == 1 and out.count("MISSED") == len(missed) and "not judged" in out


@pytest.mark.parametrize("name", check.SHOWERS)
def test_published_showers_fit_the_calorimeter(name):
    published = json.loads(check.SHOWER_FILE.read_text())[name]
    layers, _, rings = calorimeter.CALORIMETERS[name].shape
    assert {np.shape(published[key]) for key in ("voxel_mean", "voxel_std")} == {(layers, rings)}
    assert {np.shape(published[f"u_{key}"]) for key in ("min", "max", "mean", "std")} == {(layers,)}
    np.testing.assert_array_equal(published["correlation"], np.transpose(published["correlation"]))
    assert sum(std < 2 for std in published["u_std"]) == 15


def test_there_is_no_sheet_of_showers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        check.main(["ds2", "--sheet", str(tmp_path / "sheet.png")])
    assert "--sheet draws the published examples of zn and zp" in capsys.readouterr().err


def test_the_sheet_draws_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "EXAMPLES", check.EXAMPLES[:2])
    check.main(["zn", "--sheet", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------- documents

def test_documents_are_up_to_date():
    docs.main(["--check"])                                   # else: python -m benchmarks.docs writes them


def test_documents_have_every_table():
    text = "".join((ROOT / name).read_text() for name in docs.DOCUMENTS)
    assert {name for name in docs.TABLES if f"<!-- {name} -->" in text} == set(docs.TABLES)


@pytest.fixture
def documents(tmp_path):
    """A folder with one result and three documents."""
    score = {"value": 1.005, "spread": 0.1, "oracle": 0.5, "R": 2.01}
    lit, own = {"value": 5.0, "real": 5.25}, {"value": 1.0, "spread": None, "floor": 0.5, "R": None}
    part = {"W": score, "MAE": score, "AUC_low": {"value": 0.75}, "groups": {},
            "marginals": {"lit_percent": lit}}
    result = {"script": "fm", "detector": "zn", "rows": {"seen": 7, "unseen": 8}, "parameters": 9,
              "train_seconds": 90, "ms_per_response": {"1": 2.0, "256": 0.1234}, "seen": part,
              "unseen": part | {"W": own, "MAE": own}, "device": "a machine", "versions": {"zdc": "9.9"}}
    for name, value in {"fm-zn": result, "fm-zp": result | {"detector": "zp", "unseen": None}}.items():
        files.write_json(tmp_path / "weights" / f"{name}.json", value)
    (tmp_path / "docs").mkdir()
    for name in docs.DOCUMENTS:
        (tmp_path / name).write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    return tmp_path


def test_a_score_stands_in_its_cells(documents):
    head, line, *rows = docs.TABLES["scores"](documents).splitlines()
    assert len(rows) == 3 and len({text.count("|") for text in (head, line, *rows)}) == 1
    assert rows[0] == ("| fm | ZN | seen | 7 | 1.00 ± 0.10 | 0.50 | 2.01 | 1.00 (0.50) | 0.750 "
                       "| 5.00 (5.25) | 0.123 | 9 | 1.5 |")
    assert "| unseen | 8 | 1.00 ± - | - | - | 1.00 (-) |" in rows[1]
    assert rows[2].startswith("| fm | ZP | seen |")
    assert "AUC low" in head and "AUC high" not in head                        # no row has it


def test_documents_are_written_and_checked(documents):
    with pytest.raises(SystemExit, match="README.md, docs/RESULTS.md, docs/DATA.md"):
        docs.main(["--check"], documents)
    docs.main([], documents)
    docs.main(["--check"], documents)
    text = (documents / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n| model |")
    assert text.endswith("|\n<!-- /results -->\nafter\n")


def test_numbers_of_the_text_come_from_json(documents):
    counts = {"rows": [{"label": "a, b", "x": {"y": 0.126}}]}
    files.write_json(documents / tables.RESULTS / "counts-zn.json", counts)
    text = "W <!-- {{fm_zn.seen.W.R:.1f}} -->{}<!-- / -->,\n<!-- {{counts_zn[a, b].x.y:.2f}} -->{}<!-- / -->."
    found = docs.filled(text.format(3, ""), documents)
    assert found == text.format("2.0", "0.13")
    assert docs.filled(found, documents) == found


def test_an_unknown_table_is_an_error(documents):
    with pytest.raises(UserError, match="no table is called nothing"):
        docs.filled("<!-- nothing -->\n<!-- /nothing -->", documents)
