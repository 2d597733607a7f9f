"""The tables and numbers in README.md, docs/RESULTS.md and docs/DATA.md.

    python -m benchmarks.docs              write them from weights/*.json and benchmarks/results/*.json
    python -m benchmarks.docs --check      exit code 1 if a document is not up to date

A table stands between the markers `<!-- name -->` and `<!-- /name -->`, a number of the text between
`<!-- {path:format} -->` and `<!-- / -->`: {fm_zn.seen.W.R:.2f} is a number of weights/fm-zn.json,
{counts_zn[sample].seen.W.R:.2f} one of the row "sample" of benchmarks/results/counts-zn.json.
"""
import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import files
import metrics
import shower_metrics
from benchmarks import tables
from calorimeter import CALORIMETERS
from simulator import DETECTORS

ROOT = Path(__file__).parent.parent
DOCUMENTS = "README.md", "docs/RESULTS.md", "docs/DATA.md"


# ---------------------------------------------------------------------------------------------------- columns
# A table is {head of a column: function(row) -> text}; a row is what metrics.json or a collected table holds.

def at(path, form=".2f", scale=1):
    """The column of the numbers at a path such as "seen.W.R"; "-" where a row has none."""
    def text(row):
        for name in path.split("."):
            row = (row or {}).get(name)
        return "-" if row is None else f"{scale * row:{form}}"
    return text


def pair(first, second, form=".2f", scale=1):
    """The column of a number beside another, in brackets: "16.51 (17.18)"."""
    value, other = at(first, form, scale), at(second, form, scale)
    return lambda row: "-" if value(row) == "-" else f"{value(row)} ({other(row)})"


def beside(path, form=".2f", reference="oracle", scale=1):
    """The column of a score beside its oracle."""
    return pair(f"{path}.value", f"{path}.{reference}", form, scale)


def key(name):
    """The column of a text."""
    return lambda row: str(row[name])


def markdown(columns, rows):
    """A table as text, without columns that are empty in all rows."""
    rows = list(rows)
    texts = {head: [text(row) for row in rows] for head, text in columns.items()}
    filled = {head: column for head, column in texts.items() if set(column) != {"-"}}
    lines = [filled, ["---"] * len(filled), *zip(*filled.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


MODEL = {"model": key("label"), "detector": key("detector")}
MS, TRAINING = at("ms_per_response.256", ".3f"), at("train_seconds", ".1f", 1 / 60)
minutes = lambda row: TRAINING(row) + " (GPU)" * (" x " in (row.get("train_device") or ""))
PUBLISHED = {"published W": at("published.W"), "published MAE": at("published.MAE")}
TEST = {"W": at("seen.W.value"), "R": at("seen.W.R"), "MAE": at("seen.MAE.value"),
        "RMSE": at("seen.RMSE.value")}


def auc(name, part="seen"):
    """The column of the AUC of a classifier of judge.py; "-" where a row was scored before they came."""
    value = at(f"{part}.{name}.value", ".3f")
    return lambda row: value(row) if "groups" in (row.get(part) or {}) else "-"


AUC = {"AUC high": auc("AUC_high"), "AUC low": auc("AUC_low")}


# ------------------------------------------------------------------------------------------------------- rows

def load(root, folder, names):
    """The JSON files of those names, for all detectors, where they exist."""
    detectors = *DETECTORS, *CALORIMETERS
    paths = [root / folder / f"{name}-{detector}.json" for name in names for detector in detectors]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [result | {"detector": result["detector"].upper()} for result in found]


def source(result):
    """The line below a table: detector, rows, oracle, device, version and command."""
    rows, first = result["rows"], result["rows"][0]
    counted = [part for part in ("seen", "validation") if part in first.get("rows", {})]
    scores = first.get("seen") or first.get("validation") or {}
    oracle = {name: scores.get(name, {}).get("oracle") for name in ("W", "MAE")}
    parts = [result["detector"]]
    parts += [f"{first['rows'][part]} {part.replace('seen', 'test')} rows" for part in counted]
    parts += [f"oracle {name} {value:.2f}" for name, value in oracle.items() if value]
    parts += sorted({row.get("device") or result["device"] for row in rows})
    parts += [f"version {version}" for version in sorted({row["measured_with"] for row in rows})]
    command = result.get("command") or (f"python -m benchmarks.tables {result['table']} "
                                        f"--detector {result['detector'].lower()}")
    return f"\n{'; '.join(parts)}; `{command}`\n"


def tabled(root, *names, columns, rows=lambda result: result["rows"]):
    """Collected tables with the same columns, one for each name and detector, each with its source."""
    found = load(root, tables.RESULTS, names)
    return "\n".join(markdown(columns, rows(result)) + source(result) for result in found)


# ----------------------------------------------------------------------------------------- models of weights/

def trained(root):
    """The rows of weights/ and of the table `variants`, with the commands that repeat them."""
    exported = {(result["detector"], row["label"]): row["ms"]
                for result in load(root, tables.RESULTS, ["o2"]) for row in result["rows"]}
    for row in load(root, "weights", tables.RECIPES["zn"]):
        detector, label = row["detector"].lower(), row["script"]
        whole = tables.commands("results", tables.tables(detector)["results"], detector)
        yield row | {"label": label, "command": whole[label], "measured_with": row["versions"]["zdc"],
                     "o2_ms": exported.get((row["detector"], label))}
    for result in load(root, tables.RESULTS, ["variants"]):
        yield from (row | {"detector": result["detector"]} for row in result["rows"])


def models(root, columns, choose=lambda row: True):
    """A table of the trained models that `choose` picks."""
    return markdown(MODEL | columns, filter(choose, trained(root)))


SUMMARY = {"W": TEST["W"], "oracle": at("seen.W.oracle"), "R, seen particles": TEST["R"],
           "R, unseen": at("unseen.W.R"), **AUC, "ms per response, batch 256": MS,
           "batch 1": at("ms_per_response.1"), "ONNX, one thread": at("o2_ms"), "training, min": minutes}
COMMANDS = {"measured with": lambda row: f"{row['device']}, version {row['measured_with']}",
            "command": lambda row: f"`{row['command']}`"}
TIMES = {f"batch {size}": at(f"ms_per_response.{size}", ".3f") for size in common.BATCHES}
RECONSTRUCTIONS = {name: at(f"reconstruction.{name}") for name in ("W", "oracle", "R", "MAE")}
RECONSTRUCTIONS |= {f"whole model: {name}": TEST[name] for name in ("W", "R", "MAE")}


def scored(part):
    """W with its spread, oracle and R; MAE; AUC; lit fibres."""
    value, spread = at(f"{part}.W.value"), at(f"{part}.W.spread")
    return {"W": lambda row: f"{value(row)} ± {spread(row)}", "oracle": at(f"{part}.W.oracle"),
            "R": at(f"{part}.W.R"), "MAE (oracle)": beside(f"{part}.MAE"),
            "AUC high": auc("AUC_high", part), "AUC low": auc("AUC_low", part),
            "lit % (real)": beside(f"{part}.marginals.lit_percent", reference="real")}


SCORES = MODEL | {"particles": key("particles"), "test rows": key("test rows"), **scored("scores"),
                  "ms per response": MS, "parameters": key("parameters"), "training, min": minutes}


def parts(root):
    """A row for the seen and one for the unseen particles of each trained model."""
    rows = [row | {"particles": part, "scores": row[part], "test rows": row["rows"][part]}
            for row in trained(root) for part in ("seen", "unseen") if row.get(part)]
    return markdown(SCORES, rows)


def printed(root):
    """Some of the lines that the command of README prints."""
    [row] = [row for row in trained(root) if row["label"] == "fm, default flags" and row["detector"] == "ZN"]
    lines = []
    for part in ("seen", "unseen"):
        lines.append(f"ZN, {part} particles, {row['evaluations']} evaluations each: {row['rows'][part]} rows")
        names = "W", "MAE", *(metrics.AUCS if "groups" in row[part] else ())
        lines += [metrics.score_line(name, row[part][name]) for name in names]
    return "```\n" + "\n".join(lines) + "\n```\n"


# ----------------------------------------------------------------------------------------- tables of commands

COUNTS = {"--counts": key("label"), **scored("seen"),
          "singles, % of lit (real)": beside("seen.marginals.single_percent", ".1f", "real"),
          "evaluations": key("evaluations")}
VALIDATED = {"W": at("validation.W.value"), "R": at("validation.W.R"),
             "MAE (oracle)": beside("validation.MAE")}
NETWORK = {"parameters": key("parameters"), "MFLOP": at("mflop", ".1f")}
AUTOENCODERS = {"encoder and decoder, latent": key("label"), **PUBLISHED, **VALIDATED, **NETWORK}
ADVERSARIES = {"model": key("label"), **PUBLISHED, **VALIDATED, "factor": at("factor")}
STEPS = {"script": lambda row: row["command"].split()[1], "flags": key("label"),
         "evaluations": key("evaluations"), "W": at("validation.W.value"), "R": at("validation.W.R"),
         "MAE": at("validation.MAE.value"), "ms per response": MS}
SAMPLERS = {"script": key("script"), "sampler": key("label"), "steps": key("steps"), "W": at("W"),
            "R": at("validation.W.R"), "MAE": at("validation.MAE.value"), "AUC high": at("AUC_high", ".3f"),
            "AUC low": at("AUC_low", ".3f"), "ms per response": MS, "batch 1": at("ms_per_response.1")}
O2 = {"model": key("label"), "equal fibres, %": at("equal", ".5f", 100), "furthest": key("furthest"),
      **{f"{name.replace('_', ' ')} in O2's form (JAX)": pair(f"o2.{name}.value", f"seen.{name}.value", ".3f")
         for name in ("W", "MAE", "AUC_high", "lit %")},
      "ms": at("ms"), "99th percentile": at("ms_99"), "ms without hit.py": at("ms_all_hit"),
      "memory, MiB": at("memory_mib", ".0f"), "file, MB": at("megabytes", ".1f")}
HITS = {"detector": key("detector"), "Brier score (oracle)": beside("Brier score", ".4f"),
        "log score, nats (oracle)": beside("log score", ".4f"),
        "pass, % (runs)": beside("passed", ".2f", "real", 100)}
HITS |= {f"bin {k + 1}": lambda row, k=k: "{:.3f} ({:.3f})".format(*row["reliability"][k]) for k in range(10)}
LIGHT = {"W": at("seen.W.value"), "R": at("seen.W.R"), "MAE (oracle)": beside("seen.MAE")}
EVENTS = {"model": key("label"), **LIGHT, "light, % of the simulator's": at("seen.light", ".1f", 100)}
TRANSFER = {"fm.py": key("label"), **LIGHT, "light, %": at("seen.light", ".1f", 100)}
ELSEWHERE = {"model": key("label"), **LIGHT, "light, %": at("seen.light", ".1f", 100),
             "R, unseen": at("unseen.W.R"), "MAE (oracle), unseen": beside("unseen.MAE"),
             "light, %, unseen": at("unseen.light", ".1f", 100)}
CONDITIONAL = "MAE", "MAE_c", "MAE_cw", "MAE_cond"
STUDENTS = {"student": key("label"), "photon sums": key("sums"), "W": at("scores.W.value"),
            "R": at("scores.W.R"), **{f"{name} (oracle)": beside(f"scores.{name}") for name in CONDITIONAL}}


def students(result):
    """Rows for the predicted photon sums and, where they were scored, for the true ones."""
    return [row | {"scores": row[part], "sums": sums} for row in result["rows"]
            for part, sums in (("true_sums", "true"), ("seen", "predicted")) if part in row]


PRIORS = {"--prior": key("label"), "evaluations": key("evaluations"), "W": at("validation.W.value"),
          "R": at("validation.W.R"), "MAE (oracle)": beside("validation.MAE"),
          "parameters": key("parameters"), "ms per response": MS, "batch 1": at("ms_per_response.1")}
TEMPERATURES = {"top-k": key("top-k")}
TEMPERATURES |= {f"temperature {t}": at(f"{100 * t:.0f}") for t in tables.TEMPERATURES}


def temperatures(result):
    """A row of W for each top-k, of the masked prior at eight passes."""
    rows = {k: {"top-k": k or "all"} for k in tables.TOP_KS}
    for row in result["rows"]:
        flags = tables.flags_of(row["command"])
        if "temperature" in flags:
            column = f"{100 * float(flags['temperature']):.0f}"
            rows[int(flags["top-k"])][column] = row["validation"]["W"]["value"]
    return list(rows.values())


# --------------------------------------------------------------------------------- comparisons in one process

NETWORKS = {"--net": key("label"), "parameters": key("parameters"), "MFLOP": at("mflop", ".1f"),
            "training step, s": at("step_seconds", ".3f"), "step, times faster": at("step", ".0f"),
            "evaluations": key("evaluations"), "ms per response": MS,
            "response, times faster": at("draw", ".0f")}


def networks(result):
    """How many times faster than the first network they are."""
    rows, draw = result["rows"], lambda row: row["ms_per_response"]["256"]
    step = rows[0]["step_seconds"]
    return [row | {"step": step / row["step_seconds"], "draw": draw(rows[0]) / draw(row)} for row in rows]


LEARNING = {"--net, epochs": key("label"), "steps": key("steps"), "minutes": at("minutes", ".1f"),
            "W": at("validation.W.value"), "R": at("validation.W.R"), "MAE": at("validation.MAE.value")}
FLOWS = {"flow": key("flow"), "photon sums": key("sums"),
         **{name: at(name) for name in ("W", "R", *CONDITIONAL)},
         "ms per response": at("ms", ".3f"), "times faster than naive": at("ratio", ".0f")}
LIKELIHOODS = {"detector": key("detector"), "test rows": key("test_rows"),
               "bits per fibre, teacher": at("bits_per_fibre", ".4f"),
               "ms per response, naive teacher": at("speed.ms.naive", ".0f"),
               "photon sums alone: W": at("sums.W"), "oracle W": at("sums.oracle_W"),
               "MAE": at("sums.MAE"), "oracle MAE": at("sums.oracle_MAE")}
REMOVALS = {"detector": key("detector"), "flow": key("flow"), "--removal": key("removal"),
            "published W": at("paper_W"), "W": at("W"), "lit %": at("lit", ".2f", 100),
            "real": at("real_lit", ".2f", 100)}


def flows(result):
    """Both flows with the time of their samplers."""
    ms = result["speed"]["ms"]
    times = {"teacher": ms["incremental"], "student": ms["student"]}
    return [row | ({"ms": times[row["flow"]], "ratio": ms["naive"] / times[row["flow"]]}
                   if row["flow"] in times else {}) for row in result["rows"]]


def removals(root):
    """The ways to remove the noise of the dequantisation, on validation rows."""
    found = load(root, tables.RESULTS, ["flows"])
    return markdown(REMOVALS, [result | row for result in found for row in result["removals"]])


# --------------------------------------------------------------------------------------------------- the data

VERDICTS = {True: "in", False: "**out**"}
CHECK = {"row": key("label"), "published": at("published", ".4g"), "ours": at("ours", ".4g"),
         "band": key("band"),
         "": lambda row: VERDICTS.get(row["in"], "not judged" if row["ours"] else "not run")}
CHANNELS = {"model": key("label"), "published W": at("published"), **TEST,
            "W, unseen particles": at("unseen.W.value"), "R, unseen": at("unseen.W.R"),
            "fit, s": at("fit_seconds", ".0f")}


def check(root, detectors):
    """A simulator beside the published statistics."""
    return "\n".join(f"**{result['detector']}**\n\n{markdown(CHECK, result['rows'])}"
                     for result in load(root, tables.RESULTS, ["check"])
                     if result["detector"].lower() in detectors)


# ------------------------------------------------------------------------------- showers of the CaloChallenge

SHOWERS = {"model": key("label"), "showers": key("detector"), "AUC u (oracle)": beside("scores.AUC_u", ".3f"),
           "AUC high": beside("scores.AUC_high", ".3f"), "AUC low": beside("scores.AUC_low", ".3f"),
           "FPD x 1000": beside("scores.FPD", ".1f", scale=1000), "evaluations": at("evaluations", ".0f"),
           "ms per shower, batch 100": at("ms_per_response.100", ".1f"),
           "batch 1": at("ms_per_response.1", ".1f"), "training, min": minutes}
FAMILIES = ("layer energies", "E_tot", "centres", "widths", "sparsity", "radial centres", "radial widths",
            "voxels", "ring depths")
SEPARATIONS = {"model": key("label"), "showers": key("detector")}
SEPARATIONS |= {name: beside(f"scores.separation.{name}", ".2f", scale=1000) for name in FAMILIES}
SOLVERS = {"solver": key("label"), "evaluations": key("evaluations"),
           **{name.replace("_", " "): at(name, ".3f") for name in shower_metrics.AUCS},
           **{f"ms per shower, batch {n}": at(f"ms_per_response.{n}", ".1f") for n in (1, 100)}}


def showers(root, columns, published=False):
    """The trained models of calodream.py; if `published`, reconstructions and those for Geant4 as well."""
    paths = sorted((root / "weights").glob("calodream*.json"))
    rows = [json.loads(path.read_text()) for path in paths]
    rows = [row | {"label": "laViT" if row["flags"]["latent"] else "ViT"} for row in rows]
    if published:
        rows += [{"label": "laViT, reconstruction", "detector": row["detector"],
                  "scores": row["reconstruction"]} for row in rows if "reconstruction" in row]
        rows += json.loads((root / "benchmarks/published/calochallenge.json").read_text())["models"]
    return markdown(columns, rows)


# -------------------------------------------------------------------------------------------------- documents

in_weights = lambda row: "script" in row
TABLES = {
    "results": partial(models, columns=SUMMARY, choose=in_weights),
    "expected": printed,
    "scores": parts,
    "commands": partial(models, columns=COMMANDS),
    "times": partial(models, columns=TIMES, choose=in_weights),
    "reconstructions": partial(models, columns=RECONSTRUCTIONS, choose=lambda row: "reconstruction" in row),
    "counts": lambda root: tabled(root, "counts", columns=COUNTS),
    "autoencoders": lambda root: tabled(root, "autoencoders", columns=AUTOENCODERS),
    "adversaries": lambda root: tabled(root, "adversaries", columns=ADVERSARIES),
    "students": lambda root: tabled(root, "students", columns=STUDENTS, rows=students),
    "steps": lambda root: tabled(root, "latent_fm-sweep", columns=STEPS),
    "samplers": lambda root: tabled(root, "steps", columns=SAMPLERS),
    "passes": lambda root: tabled(root, "vqgan-sweep", columns=STEPS, rows=lambda result: [
        row for row in result["rows"] if row["label"].startswith("steps")]),
    "temperatures": lambda root: tabled(root, "vqgan-sweep", columns=TEMPERATURES, rows=temperatures),
    "priors": lambda root: tabled(root, "priors", columns=PRIORS),
    "o2": lambda root: tabled(root, "o2", columns=O2),
    "hits": lambda root: markdown(HITS, load(root, "weights", ["hit"])),
    "transfer": lambda root: tabled(root, "transfer", columns=TRANSFER),
    "elsewhere": lambda root: tabled(root, "elsewhere", columns=ELSEWHERE),
    "events": lambda root: tabled(root, "events", columns=EVENTS),
    "networks": lambda root: tabled(root, "networks", columns=NETWORKS, rows=networks),
    "learning": lambda root: tabled(root, "learning", columns=LEARNING, rows=lambda result: tables.learning(
        result["rows"], result["detector"].lower(), root)),
    "flows": lambda root: tabled(root, "flows", columns=FLOWS, rows=flows),
    "likelihoods": lambda root: markdown(LIKELIHOODS, load(root, tables.RESULTS, ["flows"])),
    "removals": removals,
    "check": partial(check, detectors=DETECTORS),
    "check-showers": partial(check, detectors=CALORIMETERS),
    "showers": partial(showers, columns=SHOWERS),
    "showers-published": partial(showers, columns=SHOWERS, published=True),
    "separations": partial(showers, columns=SEPARATIONS),
    "solvers": lambda root: tabled(root, "solvers", columns=SOLVERS),
    "channels": lambda root: tabled(root, "channels", columns=CHANNELS, rows=lambda result: [
        model | {"label": name} for name, model in result["rows"][0]["models"].items()])}


class Rows(SimpleNamespace):
    """A JSON file; the rows of a collected table are found by their labels."""

    def __getitem__(self, label):
        return next(row for row in self.rows if row.label == label)


def values(root):
    """{"fm_zn": ..., "counts_zn": ...}: what the numbers of the text are taken from."""
    found = {}
    for path in [*root.glob("weights/*.json"), *root.glob("benchmarks/results/*.json")]:
        loaded = json.loads(path.read_text(), object_hook=lambda entry: SimpleNamespace(**entry))
        found[path.stem.replace("-", "_")] = Rows(**vars(loaded))
    return found


def filled(text, root):
    """The text of a document with its tables and numbers from the json files of `root`."""
    known = values(root)

    def table(match):
        if match[1] not in TABLES:
            raise common.UserError(f"no table is called {match[1]}, expected {', '.join(TABLES)}")
        return f"<!-- {match[1]} -->\n{TABLES[match[1]](root)}<!-- /{match[1]} -->"

    value = lambda match: f"<!-- {match[1]} -->{match[1].format(**known)}<!-- / -->"
    text = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", table, text, flags=re.DOTALL)
    return re.sub(r"<!-- (\{.*?\}) -->.*?<!-- / -->", value, text)


def main(argv=None, root=ROOT):
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(prog="docs", description="Write the tables into the documents.")
    parser.add_argument("--check", action="store_true", help="name the documents that are not up to date")
    args, stale = parser.parse_args(argv), []
    for name in DOCUMENTS:
        text = (root / name).read_text()
        if (new := filled(text, root)) != text:
            stale.append(name)
            if not args.check:
                with files.write_atomic(root / name) as temporary:
                    temporary.write_text(new)
    if args.check and stale:
        sys.exit(f"not up to date: {', '.join(stale)}; python -m benchmarks.docs writes them")


if __name__ == "__main__":
    common.run(main)
