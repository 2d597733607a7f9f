"""Every score of calorimeter showers, as in the CaloChallenge (arXiv 2410.21611): Showers of
calorimeter.py whose incident energies match row by row. The scores of fibres are in metrics.py."""
from functools import partial

import numpy as np

import common
import files
import plots
from calorimeter import Showers, features as shower_features, ring_depths
from judge import network_logits, rank_auc, standardise
from metrics import (cell, fpd, fpd_sizes, kpd, print_header, print_settings, sample_notes, score_line,
                     spectrum)
from preprocessing import energy_ratios

AUCS = ("AUC_low", "AUC_high", "AUC_u")
# Far smaller than the challenge's: hundreds of features and thousands of voxels overfit soon
CLASSIFIER = dict(rows=10_000, width=256, depth=2, epochs=8, batch=250, learning_rate=3e-4, trainings=3)
# The challenge's own takes its inputs as they are and chooses the epoch by accuracy; for a GPU.
CHALLENGE = dict(rows=100_000, width=2048, depth=3, epochs=50, batch=1000, learning_rate=2e-4, trainings=10,
                 challenge=True)


def families(showers, features):
    """What histograms compare, {family: columns (N, K)}, from Showers and their features. Energies are log10
    of MeV; the voxels are the lit ones (L, 1) of all showers, the empty ones are in the sparsity."""
    layers = showers.voxels.shape[1]
    parts = np.split(features, np.cumsum([1, *[layers] * 5, 1, layers, layers]), axis=1)
    incident, energy, eta, phi, width_eta, width_phi, total, empty, radius, width = parts
    return {"layer energies": energy, "E_tot": 10**(total - incident), "centres": np.hstack([eta, phi]),
            "widths": np.hstack([width_eta, width_phi]), "sparsity": empty, "radial centres": radius,
            "radial widths": width, "voxels": np.log10(showers.voxels[showers.voxels > 0])[:, None],
            "ring depths": ring_depths(showers.voxels)}


def edges_of(family, column):
    """Edges of the histogram of a real column (N,); those of E_tot and the sparsity are the challenge's."""
    if family in ("layer energies", "voxels"):
        return np.linspace(-2, np.max(column, initial=-1), 101)
    margin = 0.05 * np.ptp(column) + 1e-6
    edges = {"E_tot": (0.5, 1.5, 101), "sparsity": (0, 1, 21)}
    return np.linspace(*edges.get(family, (column.min() - margin, column.max() + margin, 101)))


def separation(real, made):
    """{family: separation power} of two results of `families`, mean over the columns of a family; what lies
    beyond the bins counts into the outer ones."""
    def power(family, *pair):
        bins = edges_of(family, pair[0])
        return spectrum(*(np.histogram(np.clip(column, bins[0], bins[-1]), bins)[0] for column in pair))

    return {family: np.mean([power(family, *pair) for pair in zip(real[family].T, made[family].T)])
            for family in real}


def logits_of(real, made, features, seed, settings):
    """{score: logits of the real and of the generated test rows} of one training for each of AUCS, on
    at most settings["rows"] random rows of two Showers and their features."""
    rows = np.random.default_rng(seed).permutation(len(real.energies))[:settings["rows"]]

    def low_level(showers):
        """log10 E_inc and the voxels in % of E_inc."""
        energies = showers.energies[rows, None]
        return np.hstack([np.log10(energies), showers.voxels[rows].reshape(len(rows), -1) * (100 / energies)])

    def ratios(showers):
        return np.hstack([np.log10(showers.energies[:, None]), energy_ratios(showers)])[rows]

    def train(inputs, floor=0.0):
        if not settings.get("challenge"):
            inputs = [standardise(x, inputs[0], floor) for x in inputs]
        return network_logits(*inputs, seed, settings)

    # Without the floor, 0.3 % of E_inc, voxels that are rarely lit rule the low-level inputs
    return {"AUC_low": train([low_level(showers) for showers in (real, made)], floor=0.3),
            "AUC_high": train([values[rows] for values in features]),
            "AUC_u": train([ratios(showers) for showers in (real, made)])}


def shower_scores(real, made, calorimeter, seed, settings):
    """Scores of two Showers, lists by name: AUCS of every training, FPD, KPD and their errors; dicts
    of "separation" and "weights": log10 w over the test rows of AUC_low as histograms [CaloDREAM, Eq. 21]."""
    features = [shower_features(showers, calorimeter) for showers in (real, made)]
    found = {"separation": separation(*map(families, (real, made), features))}
    batches = 20 if settings.get("challenge") else 5  # of FPD: a quarter of jetnet's time
    for name, distance in (("FPD", partial(fpd, batches=batches)), ("KPD", kpd)):
        found[name], found[f"{name}_error"] = ([value] for value in distance(*features, seed=seed))
    seeds = range(seed, seed + settings["trainings"])
    trainings = [logits_of(real, made, features, number, settings) for number in seeds]
    for name in AUCS:
        found[name] = [rank_auc(generated, logits) for logits, generated in (run[name] for run in trainings)]
    found["weights"] = {"log10_w": np.linspace(-2, 2, 61)}
    for name, logits in zip(("real", "generated"), zip(*(run["AUC_low"] for run in trainings))):
        log_w = np.clip(np.concatenate(logits) / -np.log(10), -2, 2)  # w = p_data / p_model = e^-logit
        found["weights"][name] = np.histogram(log_w, found["weights"]["log10_w"])[0] / len(log_w)
    return found


def cut_voxels(showers, cut):
    """Showers whose voxels of at most `cut` MeV are empty [CaloDREAM, Eq. 20]."""
    return showers._replace(voxels=np.where(showers.voxels > cut, showers.voxels, 0)) if cut else showers


def evaluate(real, made, calorimeter, oracle=None, cut=0.0, seed=0, challenge=False):
    """Every score of the generated Showers `made` against `real`; `oracle` is the stand-in run again, without
    it the "floor" is one half of the real ones against the other. Voxels of at most `cut` MeV count as empty.

    Returns a dict that JSON can hold: {"AUC_low": {"value", "spread", "oracle", "R"}, ...}, the spread over
    the trainings of the classifier (CLASSIFIER or, with `challenge`, the published one), "FPD" and
    "KPD" with their "error", "separation" by family, "weights", and what was compared.
    """
    rows, settings = len(real.energies), CHALLENGE if challenge else CLASSIFIER
    for showers in filter(None, (made, oracle)):
        if not np.array_equal(showers.energies, real.energies) or showers.voxels.shape != real.voxels.shape:
            raise common.UserError("expected showers of the same incident energies row by row")
    if rows < 20:
        raise common.UserError(f"expected at least 20 showers to score, not {rows}")
    real, made = cut_voxels(real, cut), cut_voxels(made, cut)
    label, pair = "oracle", (real, oracle and cut_voxels(oracle, cut))
    if oracle is None:
        halves = slice(rows // 2), slice(rows // 2, rows // 2 * 2)
        label, pair = "floor", [Showers(real.energies[half], real.voxels[half]) for half in halves]
    found = shower_scores(real, made, calorimeter, seed, settings)
    reference = shower_scores(*pair, calorimeter, seed, settings)
    result = {name: cell(found[name], reference[name], label, np.inf) for name in AUCS}
    for name in ("FPD", "KPD"):
        result[name] = cell(found[name], reference[name], label, reference[f"{name}_error"][0])
        result[name]["error"] = found[f"{name}_error"][0]
    result["separation"] = {family: cell([value], [reference["separation"][family]], label)
                            for family, value in found["separation"].items()}
    return files.plain(result | {
        "weights": found["weights"], "rows": rows, "cut": cut, "fpd_samples": fpd_sizes(rows),
        "kpd_samples": min(5000, rows), "classifier": settings})


def print_table(scores, title):
    """Print the result of evaluate."""
    cut = f", voxels above {scores['cut']:g} MeV" if scores["cut"] else ""
    print(f"{title}: {scores['rows']} showers{cut}")
    print_header(scores["AUC_low"])
    notes = sample_notes(scores)
    for name in (*AUCS, "FPD", "KPD"):
        print(score_line(name, scores[name], notes.get(name, "")))
    for family, power in scores["separation"].items():
        print(score_line(family, power, "separation power"))
    print_settings("classifier", scores["classifier"])


def plot_showers(folder, real, made, calorimeter, scores):
    """Draw sheet.png, histograms as in [CaloDREAM, Fig. 5] with the weights of `scores`, and showers.png."""
    columns = [families(showers, shower_features(showers, calorimeter)) for showers in (real, made)]
    layers, _, rings = calorimeter.shape
    middle = layers // 4
    shown = [("layer energies", layer, rf"$\log_{{10}} E_{{{layer}}}$ / MeV")
             for layer in (layers // 9, middle, 3 * layers // 4)]
    shown += [("E_tot", 0, r"$E_{tot}$ / $E_{inc}$"), ("voxels", 0, r"$\log_{10} E_{voxel}$ / MeV"),
              ("sparsity", middle, f"sparsity of layer {middle}")]
    shown += [(family, middle, f"{text} of layer {middle} / 100 mm") for family, text in
              (("centres", r"mean $\eta$"), ("widths", "width"), ("radial centres", "mean r"))]
    shown += [("ring depths", ring, f"mean layer of ring {ring}") for ring in (0, 2 * rings // 3)]
    panels = {}
    for family, k, label in shown:
        pair = [part[family][:, k] for part in columns]
        panels[label] = (*pair, edges_of(family, pair[0])[::2])
    plots.plot_sheet(folder / "sheet.png", panels, scores["weights"])
    rows = np.argsort(real.energies)[[len(real.energies) * k // 20 for k in (2, 8, 14, 19)]]
    titles = [f"{energy / 1000:.3g} GeV" for energy in real.energies[rows]]
    examples = {"data": real.voxels[rows], "model": made.voxels[rows]}
    plots.plot_showers(folder / "showers.png", examples, titles, calorimeter)
