"""The tables in README from the json files that the scripts wrote: printed, or put between their markers with --write."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def number(value, form):
    return "-" if value is None else f"{value:{form}}"


def markdown(head, rows):
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ("---",) * len(head), *rows])


def read(folder, pattern):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def score_cells(result, part):
    """Cells that all tables of scores share."""
    scores = result[part]
    w, mae, lit = scores["W"], scores["MAE"], scores["marginals"]["lit_percent"]
    reference = "oracle" if "oracle" in w else "floor"
    return (f"{w['value']:.2f} ± {number(w['spread'], '.2f')}", number(w[reference], ".2f"), number(w["R"], ".2f"),
            f"{mae['value']:.2f} ({number(mae[reference], '.2f')})", number(scores.get("AUC_low", {}).get("value"), ".3f"),
            number(scores.get("AUC_high", {}).get("value"), ".3f"), f"{lit['value']:.2f} ({lit['real']:.2f})")


SCORE_HEAD = ("W", "oracle", "R", "MAE (oracle)", "AUC low", "AUC high", "lit % (real)")


def results(root):
    """A row for the seen and one for the unseen particles of each model, at last those of the default commands."""
    head = ("model", "detector", "particles", "test rows", *SCORE_HEAD, "ms per response", "parameters", "training, min", "command")
    return markdown(head, [(r["script"], r["detector"].upper(), part, str(r["rows"][part]), *score_cells(r, part), number(r["ms_per_response"].get("256"), ".3f"),
                            str(r["parameters"]), number(r["train_seconds"] / 60, ".1f"), f"`{r['command']}`")
                           for r in read(root / "weights", "*.json") + read(root / "results", "*-default-*.json")
                           for part in ("seen", "unseen") if r[part]])


def counts(root):
    head = ("counts", "detector", *SCORE_HEAD, "singles, % of lit (real)", "evaluations", "training, min", "command")
    singles = lambda r: r["seen"]["marginals"]["single_percent"]
    return markdown(head, [(r["flags"]["counts"], r["detector"].upper(), *score_cells(r, "seen"), f"{singles(r)['value']:.1f} ({singles(r)['real']:.1f})",
                            str(r["evaluations"]), number(r["train_seconds"] / 60, ".1f"), f"`{r['command']}`") for r in read(root / "results", "fm-counts-*.json")])


def sweep(root):
    head = ("model", "detector", "sampler", "steps", "evaluations", "W", "oracle", "MAE", "ms per response")
    label = lambda p: p.get("label", "-") + (f", temperature {p['temperature']:g}" if "temperature" in p else "")
    model = lambda r: r["script"] + (", gpt" if "--prior gpt" in r["command"] else "")
    return markdown(head, [(model(r), r["detector"].upper(), label(p), str(p["steps"]), str(p["evaluations"]), f"{p['W']:.2f}", number(p.get("oracle"), ".2f"), f"{p['MAE']:.2f}",
                            f"{p['ms_per_response']:.3f}") for r in read(root / "results", "*-sweep-*.json") for p in r["points"]])


def compare(root):
    head = ("detector", "network", "parameters", "MFLOP", "training step, s (batch 256)", "times faster", "evaluations", "ms per response", "times faster")
    return markdown(head, [(r["detector"].upper(), n["net"], str(n["parameters"]), f"{n['mflop']:.1f}", f"{n['step_seconds']:.3f}",
                            f"{r['networks'][0]['step_seconds'] / n['step_seconds']:.0f}", str(n["evaluations"]), f"{n['ms_per_response']:.3f}",
                            f"{r['networks'][0]['ms_per_response'] / n['ms_per_response']:.0f}")
                           for r in read(root / "results", "fm-compare-*.json") for n in r["networks"]])


def check(root):
    head = ("", "published", "ours", "band", "")
    verdict = {True: "in", False: "**MISSED**", None: "not run"}
    return "\n".join(f"**{r['detector'].upper()}**\n\n" + markdown(head, [(row["row"], f"{row['published']:.4g}", number(row["ours"], ".4g"), row["band"],
                     verdict[row["in"]]) for row in r["table"]]) for r in read(root / "results", "data-*.json"))


def channels(root):
    head = ("detector", "model", "published W", "W", "R", "MAE", "W, unseen particles", "R", "fit, s")
    cell = lambda model, part, score, key: number(model.get(part, {}).get(score, {}).get(key), ".2f")
    return markdown(head, [(r["detector"].upper(), name, number(m["published"], ".2f"), cell(m, "seen", "W", "value"), cell(m, "seen", "W", "R"),
                            cell(m, "seen", "MAE", "value"), cell(m, "unseen", "W", "value"), cell(m, "unseen", "W", "R"), number(m["fit_seconds"], ".0f"))
                           for r in read(root / "results", "channels-*.json") for name, m in r["models"].items()])


def times(root):
    """Milliseconds per response against the size of the batch."""
    sizes = "1", "32", "256", "1024", "8192", "16384"
    return markdown(("model", "detector", *(f"batch {size}" for size in sizes)),
                    [(r["script"], r["detector"].upper(), *(number(r["ms_per_response"].get(size), ".3f") for size in sizes))
                     for r in read(root / "weights", "*.json")])


def reconstructions(root):
    """Responses encoded and decoded again."""
    head = ("model", "network", "detector", "test rows", "W", "oracle", "R", "MAE", "then with the flow or prior: W", "R", "MAE (oracle)", "AUC high",
            "ms per response", "command")
    network = lambda flags: flags.get("net") or f"{flags['variant']}, {flags['prior']}"
    return markdown(head, [(r["script"], network(r["flags"]), r["detector"].upper(), str(r["rows"]["seen"]),
                            *(number(r["reconstruction"][key], ".2f") for key in ("W", "oracle", "R", "MAE")),
                            number(r["seen"]["W"]["value"], ".2f"), number(r["seen"]["W"]["R"], ".2f"),
                            f"{r['seen']['MAE']['value']:.2f} ({r['seen']['MAE']['oracle']:.2f})", number(r["seen"]["AUC_high"]["value"], ".3f"),
                            number(r["ms_per_response"]["256"], ".3f"), f"`{r['command']}`")
                           for folder, pattern in (("weights", "latent_fm-*"), ("results", "latent_fm-*"), ("weights", "vqgan-*"), ("results", "vqgan-*"))
                           for r in read(root / folder, pattern + ".json") if "reconstruction" in r])


def autoencoders(root):
    head = ("encoder, decoder", "latent from", "published W", "MAE", "W", "R", "MAE", "RMSE", "W, validation", "ms per response", "parameters", "training, min")
    return "".join(markdown(head, [(row["arch"], row["variant"], *(number(row[f"paper_{name}"], ".2f") for name in ("W", "MAE")),
                                    *(number(row[name], ".2f") for name in ("W", "R", "MAE", "RMSE", "validation_W")),
                                    number(row["ms_per_response"], ".3f"), number(row["parameters"], "d"),
                                    number(row["seconds"] and row["seconds"] / 60, ".1f")) for row in r["table"]])
                   + f"\nOracle: W {r['oracle']['W']:.2f}, MAE {r['oracle']['MAE']:.2f}; {r['rows']['test']} test rows; `{r['command']}`\n"
                   for r in read(root / "results", "vae-table-*.json"))


def adversaries(root):
    """The models of paper 000, Table 6, and gan.py without one of its stabilisers each."""
    parts = []
    for r in read(root / "results", "gan-table-*.json"):
        kinds = [key for key in r["oracle"] if key.startswith("dispersion_")]
        head = ("model", "postprocessing", "published W", "MAE", "W", "R", "MAE", "RMSE", "AUC low", "AUC high",
                *(f"dispersion, {key.removeprefix('dispersion_')}" for key in kinds), "factor", "training, min")
        parts.append(markdown(head, [(row["model"], "yes" if row["post"] else "no", *(number(row.get(key), ".2f") for key in (
            "paper_W", "paper_MAE", "W", "R", "MAE", "RMSE")), *(number(row[key], ".3f") for key in ("AUC_low", "AUC_high", *kinds)),
            f"{row['factor']:.2f}", f"{row['seconds'] / 60:.1f}") for row in r["table"]]) + "\n"
            + f"Oracle: W {r['oracle']['W']:.2f}, MAE {r['oracle']['MAE']:.2f}, dispersion "
            + ", ".join(f"{r['oracle'][key]:.3f}" for key in kinds) + f"; {r['rows']['test']} test rows; `{r['command']}`\n")
    return "\n".join(parts)


def flows(root):
    """Both flows of iaf.py with true and with predicted photon sums, the sums alone, the ways to take the noise away."""
    parts = []
    for r in read(root / "weights", "iaf-*.json"):
        names, sums = ("W", "R", "MAE", "MAE_c", "MAE_cw", "MAE_cond"), r["sums"]
        parts.append(f"**{r['detector'].upper()}**\n\n" + markdown(("flow", "photon sums", *names, "ms per response", "times as fast as naive"), [
            (row["flow"], row["sums"], *(number(row[name], ".2f") for name in names), number(r["speed"]["ms"].get(FLOWS.get(row["flow"])), ".3f"),
             number(r["speed"]["ratio"].get(FLOWS.get(row["flow"])), ".0f")) for row in r["flows"]])
            + f"\nTeacher: {r['bits_per_fibre']:.4f} bits per fibre; one fibre at a time with a full pass for each: {r['speed']['ms']['naive']:.0f} ms. "
            f"Photon sums alone: W {sums['W']:.2f} (oracle {sums['oracle_W']:.2f}), MAE {sums['MAE']:.1f} ({sums['oracle_MAE']:.1f}).\n\n"
            + markdown(("flow", "noise taken away by", "published W", "W, validation", "lit % (real)"), [
                (row["flow"], row["removal"], number(row["paper_W"], ".2f"), number(row["W"], ".2f"), f"{100 * row['lit']:.2f} ({100 * row['real_lit']:.2f})")
                for row in r["removals"]]))
    return "\n".join(parts)


def costs(root):
    """What a response of vqgan.py costs, by tokens, size, precision and batch (papers 001 and 002)."""
    head = ("tokens", "prior", "precision", "batch", "parameters", "MFLOP", "ms per response", "against the row above, %", "published ms on a GPU")
    return markdown(head, [(str(row["tokens"]), row["prior"], row["precision"], str(row["batch"]), str(row["parameters"]), f"{row['mflop']:.0f}",
                            f"{row['ms_per_response']:.3f}", number(row["change"] and 100 * row["change"], "+.0f"), number(row["published_ms"], ".2f"))
                           for r in read(root / "results", "vqgan-compare-*.json") for row in r["rows"]])


def ablation(root):
    """Students of one teacher (paper 004, Table 1)."""
    names = "W", "R", "MAE", "MAE_c", "MAE_cw", "MAE_cond"
    return markdown(("detector", "flow", "photon sums", *names), [(r["detector"].upper(), row["flow"], row["sums"], *(number(row[name], ".2f") for name in names))
                                                   for r in read(root / "results", "iaf-table-*.json") for row in r["table"]])


FLOWS = {"teacher": "incremental", "student": "student"}   # the sampler that is timed for a flow


TABLES = {table.__name__: table for table in (results, times, reconstructions, autoencoders, adversaries, counts, sweep, compare, check, channels,
                                              flows, costs, ablation)}


def marked(name):
    """Matches what stands between the markers of a table."""
    return re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text()
    for name, table in TABLES.items():
        print(f"{name}\n{table(ROOT)}")
        readme = marked(name).sub(lambda _: table(ROOT), readme)
    if "--write" in sys.argv:
        (ROOT / "README.md").write_text(readme)
