"""The simulators beside what is published about the GEANT data.

    python -m benchmarks.check zn                  the table of docs/DATA.md; exit code 1 if a row is out
    python -m benchmarks.check zn --sheet FILE     independent runs of the published examples, as a picture
    python -m benchmarks.check ds2                 the table of the showers of calorimeter.py; half a minute

The whole data set is simulated on first use, and as many runs before the cut as the papers have: about ten
minutes for a detector. The figures stand in the papers ([FM, appendix A], [Comparison]), arXiv 2608.12795 and
the public scale files and notebooks of AliceO2's fast simulation; docs/DATA.md says what falls short. Those
of the CaloChallenge are the scale files of CaloScoreV2, published/calochallenge.json.
"""
import json
import sys
from pathlib import Path

import numpy as np

import calorimeter
import channels
import common
import data
import files
import metrics
import plots
import simulator
from simulator import DETECTORS, FEATURES, FLIGHT_CM, PDG_NAMES, SPECIES

RUNS_BEFORE_CUT = 511_810
# Rows with their photon sums in ZN and ZP: PDG id, E, px, py, pz in GeV, ZN, ZP
EXAMPLES = (
    (22, 513.318, 0.035456, -0.051821, -513.318, 291, 0),
    (22, 1304.34, -0.509192, 0.461106, 1304.34, 8, 9),
    (22, 1014.72, -0.335473, 0.256277, 1014.72, 130, 0),
    (-211, 325.158, 0.269915, -0.081921, 325.157, 0, 5),
    (2112, 3192.38, 0.022422, -0.182957, -3192.38, 1256, 16),
    (2212, 3961.55, -0.076487, 0.179845, 3961.55, 55, 1195),
    (310, 2770.10, 0.305187, 0.412760, -2770.10, 1122, 23),
    (2212, 3195.12, 0.560528, -0.149980, 3195.11, 230, 78),
    (2112, 1714.07, 0.457768, 0.145639, -1714.07, 655, 34),
    (3122, 4071.23, 0.089305, 0.069410, -4071.23, 34, 1246),
    (3122, 4003.60, 0.769178, -0.276743, 4003.60, 1419, 36),
)
PUBLISHED = {
    "zn": {"unique": 1805, "quartiles": (12, 111, 510), "lit": 3.90, "peak": 591, "median": 234,
           "MAE": 16.41, "RMSE": 59.87, "W": 0.53,
           "shares": {22: 60.83, 2112: 23.34, 2212: 5.30, 3122: 3.08, 310: 2.09, 130: 1.79, 211: 1.30},
           "hits": {22: 45, 2112: 78, 3122: 46, 310: 21, 3222: 0},
           "diversity": {22: 0.10, 2112: 0.30, 3122: 0.48, 310: 0.47, 3222: 0.58},
           "after": {"E mean": 1366.7, "E std": 1259.8, "vz std": 0.0245, "px std": 0.2346, "py std": 0.2581,
                     "pz std": 1858, "mass mean": 353.7, "mass std": 455.0, "charge std": 0.257}},
    "zp": {"unique": 2027, "quartiles": (2, 5, 18), "lit": 1.11, "peak": 765, "median": None,
           "MAE": 13.00, "RMSE": None, "W": 0.56,
           "shares": {2112: 26.92, 22: 26.67, 2212: 23.64, 211: 8.38, 3122: 4.86, 130: 2.16, 310: 2.06,
                      -211: 1.62, 321: 1.41},
           "hits": {}, "diversity": {}, "after": {}},
}
# Runs before the cut, the same for both detectors
BEFORE = {"E mean": 1067, "E std": 1190, "vz std": 0.0201, "px std": 0.297, "py std": 0.293, "pz std": 1598,
          "mass mean": 293, "mass std": 423.5, "charge mean": 0.111, "charge std": 0.388}
SHOWERS = {"ds2": 20_000, "ds3": 3_000}
LIT_VOXELS = {"ds2": 0.236, "ds3": 0.100}          # at least
SHOWER_FILE = Path(__file__).parent / "published" / "calochallenge.json"


# ------------------------------------------------------------------------------------------ rows of the table

def row(label, published, ours, relative=0.0, absolute=0.0, judged=True):
    """A row of the table; ours is in if at most relative x published + absolute away from the published, and
    "in" is None if ours was not run or is not judged."""
    width = relative * abs(published) + absolute
    band = f"{100 * relative:.0f} %" if relative else f"{absolute:g}"
    ours = None if ours is None else float(ours)
    return {"label": label, "published": float(published), "ours": ours, "band": band if judged else "-",
            "in": abs(ours - published) <= width if judged and ours is not None else None}


def moments(particles, published, where):
    """Means and standard deviations of particle features."""
    for name, value in published.items():
        feature, kind = name.split()
        column = particles[:, FEATURES.index(feature)].astype(np.float64)
        yield row(f"{name}, {where}", value, column.mean() if kind == "mean" else column.std(), relative=0.25)


def rows_before_cut(name, seed, quiet):
    """Runs before the cut: quartiles of the photon sum, lit fibres, largest pixel, features."""
    published, detector, size = PUBLISHED[name], DETECTORS[name], simulator.BLOCK
    particles, pdg, weights = simulator.primaries(seed)
    rng, blocks = np.random.default_rng([simulator.VERSION, seed, 7]), -(-RUNS_BEFORE_CUT // size)
    sums, lit, peak, drawn = [], 0.0, 0, []
    for _ in common.progress(blocks, "runs before the cut", quiet):
        drawn.append(rng.choice(len(pdg), size, p=weights))
        runs = simulator.run_uncut(rng, detector, particles[drawn[-1]], pdg[drawn[-1]])
        sums.append(runs.sum((1, 2), dtype=np.int64))
        lit += 100 * np.count_nonzero(runs) / runs.size / blocks
        peak = max(peak, runs.max())
    sums = np.concatenate(sums)
    for share, value in zip((25, 50, 75), published["quartiles"]):
        quartile = np.percentile(sums[sums > 0], share)
        yield row(f"photon sum before the cut, {share} % of the non-empty", value, quartile, relative=0.2)
    yield row("lit fibres before the cut, %", published["lit"], lit, relative=0.2)
    yield row("zero fibres before the cut, %", 100 - published["lit"], 100 - lit, relative=0.2)
    yield row("largest pixel before the cut", published["peak"], peak, relative=0.2)
    yield from moments(particles[np.concatenate(drawn)], BEFORE, "before the cut")


def rows_of_data(name, dataset):
    """The data set after the cut: size, particle types, photon sum, direct hits, diversity, features."""
    published, (responses, particles, pdg) = PUBLISHED[name], dataset
    ids, first = data.unique_particles(particles)
    yield row("rows", data.ROWS[name], len(pdg), relative=0.05)
    yield row("unique particles", published["unique"], len(first), relative=0.05)
    for code, share in published["shares"].items():
        yield row(f"share of {PDG_NAMES[code]}, %", share, 100 * np.mean(pdg == code), absolute=1.5)
    if published["median"]:
        median = np.median(responses.sum((1, 2), dtype=np.int64))
        yield row("median photon sum", published["median"], median, relative=0.1)
    x, y = (FLIGHT_CM * particles[first, i] / np.abs(particles[first, 6]) for i in (4, 5))
    hits = (np.abs(x) < DETECTORS["zn"].half[0]) & (np.abs(y) < DETECTORS["zn"].half[1])
    for code, share in published["hits"].items():
        found = 100 * hits[pdg[first] == code].mean()
        yield row(f"unique {PDG_NAMES[code]} whose straight line hits, %", share, found, absolute=5)
    if published["diversity"]:
        spread = diversity(responses, ids)
        for code, value in published["diversity"].items():
            found = spread[ids[pdg == code]]
            found = found[np.isfinite(found)]
            mean = found.mean() if len(found) else None
            yield row(f"diversity of {PDG_NAMES[code]}", value, mean, absolute=0.1)
    yield from moments(particles, published["after"], "after the cut")


def diversity(responses, ids):
    """f_div of each particle (U,) [Comparison, Eq. 4], scaled to [0, 1]; nan with less than five rows."""
    groups = np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids))[:-1])
    f_div = lambda rows: responses[rows].astype(np.float32).std(0).sum() if len(rows) >= 5 else np.nan
    spread = np.array([f_div(rows) for rows in groups])
    return (spread - np.nanmin(spread)) / (np.nanmax(spread) - np.nanmin(spread))


def rows_of_oracle(name, dataset, seed):
    """Two runs of the same particles on the test rows: the oracle's MAE and RMSE, and W of paired halves."""
    published, test = PUBLISHED[name], data.select(dataset, data.split_rows(len(dataset.pdg), seed).test)
    real, again = test.responses, metrics.resimulate(name, test)
    w = metrics.channels(real)
    yield row("oracle MAE", published["MAE"], metrics.mae(w, metrics.channels(again)), relative=0.1)
    if published["RMSE"]:
        yield row("oracle RMSE", published["RMSE"], metrics.rmse(real, again), relative=0.2)
    left, right = metrics.pair_rows(data.unique_particles(test.particles)[0])
    halves = metrics.wasserstein(w[left], w[right])
    yield row("W of paired halves of the test rows", published["W"], halves, relative=0.15)


def examples():
    """Particles (11, 9) and PDG ids (11,) of EXAMPLES."""
    particles = [(energy, 0, 0, 0, px, py, pz, SPECIES[pdg].mass, SPECIES[pdg].charge)
                 for pdg, energy, px, py, pz, *_ in EXAMPLES]
    return np.array(particles, np.float32), np.array([example[0] for example in EXAMPLES])


def rows_of_examples(name):
    """The published responses: within three standard deviations of 1000 runs of the particle."""
    for particle, pdg, (*_, zn, zp) in zip(*examples(), EXAMPLES):
        runs = simulator.simulate(DETECTORS[name], np.tile(particle, (1000, 1)), np.full(1000, pdg), 5, cut=0)
        sums = runs.sum((1, 2), dtype=np.int64)
        label, published = f"photons, {PDG_NAMES[pdg]} of {particle[0]:.0f} GeV", {"zn": zn, "zp": zp}[name]
        yield row(label, published, sums.mean(), absolute=3 * sums.std()) | {"band": f"3 x {sums.std():.0f}"}


def rows_of_regressions(name, dataset, seed):
    """W of the regressions of channels.py [FM, Table 6]."""
    for label, found in channels.direct_estimates(dataset, name, seed).items():
        yield row(f"W of {label}", channels.PUBLISHED[label][name == "zp"], found, relative=0.3)


# ------------------------------------------------------------------------------- showers of the CaloChallenge

def logit(x):
    """Of a share x in [0, 1], as the published statistics and [CaloDREAM] take it."""
    x = 1e-6 + (1 - 2e-6) * x
    return np.log(x / (1 - x))


def voxel_statistics(blocks):
    """Incident energies (N,), energies of the layers (N, Z), mean and standard deviation (Z, R) of the logit
    of a voxel's share of its layer, over showers and angles, and the share of lit voxels."""
    incident, layers, first, second, lit = [], [], 0, 0, 0
    parts = ((e[k:k + 250], v[k:k + 250]) for e, v in blocks for k in range(0, len(e), 250))
    for energies, voxels in parts:
        incident.append(energies.astype(np.float64))
        layers.append(voxels.sum((2, 3), dtype=np.float64))
        logits = logit(voxels / (layers[-1][:, :, None, None] + 1e-10))
        first, second = first + logits.sum(0), second + np.square(logits).sum(0)
        lit += np.count_nonzero(voxels)
    incident, layers = np.concatenate(incident), np.concatenate(layers)
    mean = first / len(incident)
    variance = second / len(incident) - mean**2                # of each voxel, then averaged over the angle
    return incident, layers, mean.mean(1), np.sqrt(variance.mean(1)), lit / (len(incident) * mean.size)


def energy_logits(incident, layers, low, high):
    """Logits (N, Z) of u_0 = E_tot / 2 E_inc and u_i = E_(i-1) / (energy from that layer on) [CaloDREAM],
    which run from `low` to `high` (Z,)."""
    rest = np.cumsum(layers[:, ::-1], axis=1)[:, ::-1]
    u = np.column_stack([rest[:, 0] / (2 * incident), layers[:, :-1] / (rest[:, :-1] + 1e-10)])
    return logit(np.clip((u - low) / (np.array(high) - low), 0, 1))


def rows_of_showers(name, blocks):
    """Energies, voxels and correlations of Showers. A u_i whose published std is above 2 is not judged: it
    piles up at both ends of the logit."""
    published = json.loads(SHOWER_FILE.read_text())[name]
    incident, layers, mean, std, lit = voxel_statistics(blocks)
    ratio = layers.sum(1) / incident
    yield row("E_tot / E_inc, mean", 0.785, ratio.mean(), relative=0.02)
    yield row("E_tot / E_inc, std", 0.111, ratio.std(), relative=0.1)
    u = energy_logits(incident, layers, published["u_min"], published["u_max"])
    for i, (u_mean, u_std) in enumerate(zip(published["u_mean"], published["u_std"])):
        yield row(f"logit u_{i}, mean", u_mean, u[:, i].mean(), absolute=0.3, judged=u_std < 2)
        yield row(f"logit u_{i}, std", u_std, u[:, i].std(), absolute=0.3, judged=u_std < 2)
    rms = lambda found, key: np.sqrt(np.mean(np.square(found - np.array(published[key]))))
    yield row("logits of voxels: rms error of the means", 0, rms(mean, "voxel_mean"), absolute=0.35)
    yield row("logits of voxels: rms error of the stds", 0, rms(std, "voxel_std"), absolute=0.3)
    yield row("share of lit voxels, at least", LIT_VOXELS[name], lit, judged=False)
    error = np.abs(np.corrcoef(layers.T) - published["correlation"])
    yield row("correlation of neighbouring layers: largest error", 0, np.diag(error, 1).max(), absolute=0.08)
    yield row("correlation of any two layers: largest error", 0, error.max(), judged=False)


def check(name, seed=0, quiet=False):
    """All rows of a detector: {"label", "published", "ours", "band", "in"}."""
    if name in SHOWERS:
        cylinder = calorimeter.CALORIMETERS[name]
        return [*rows_of_showers(name, calorimeter.simulated_blocks(cylinder, SHOWERS[name], seed, quiet))]
    dataset = data.open_data(name, seed=seed, quiet=quiet)
    return [*rows_of_data(name, dataset), *rows_before_cut(name, seed, quiet),
            *rows_of_oracle(name, dataset, seed), *rows_of_examples(name),
            *rows_of_regressions(name, dataset, seed)]


# ----------------------------------------------------------------------------------------------------- output

def print_rows(rows):
    """Print the rows of `check` as one table."""
    print(f"{'':52} {'published':>10} {'ours':>10}  band")
    verdicts = {True: "", False: "MISSED", None: "not judged"}
    for entry in rows:
        run = entry["ours"] is not None
        ours = f"{entry['ours']:.4g}" if run else "-"
        verdict = verdicts[entry["in"]] if run else "not run"
        figures = f"{entry['published']:10.4g} {ours:>10}  {entry['band']:10} {verdict}"
        print(f"{entry['label']:52} {figures}".rstrip())
    print(f"{sum(entry['in'] is False for entry in rows)} of {len(rows)} rows missed")


def sheet(name, path):
    """Draw independent runs (rows) of the published example particles (columns)."""
    particles, pdg = examples()
    titles = [f"{PDG_NAMES[code]} {energy:.0f} GeV" for code, energy in zip(pdg, particles[:, 0])]
    runs = {f"run {i + 1}": simulator.simulate(DETECTORS[name], particles, pdg, i, cut=0) for i in range(4)}
    plots.plot_samples(path, runs, titles)


def main(argv=None):
    """Print the table, or draw the sheet. Returns the rows."""
    parser = common.parser(__doc__, "check", flags=("seed", "quiet"))
    parser.add_argument("detector", choices=(*DETECTORS, *SHOWERS),
                        help="neutron (zn) or proton (zp) calorimeter, or set 2 or 3 of the CaloChallenge")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--sheet", type=Path, metavar="FILE",
                        help="only draw independent runs of the published example particles (PNG)")
    args = parser.parse_args(argv)
    if args.sheet:
        if args.detector in SHOWERS:
            parser.error("--sheet draws the published examples of zn and zp")
        return sheet(args.detector, args.sheet)
    rows = check(args.detector, args.seed, args.quiet)
    print_rows(rows)
    if args.json:
        files.write_json(args.json, {
            "table": "check", "detector": args.detector,
            "device": common.device_name(), "versions": common.versions(),
            "command": f"python -m benchmarks.check {args.detector} --json {args.json}",
            "measured_with": common.VERSION, "rows": rows})
    if any(entry["in"] is False for entry in rows):
        sys.exit(1)
    return rows


if __name__ == "__main__":
    common.run(main)
