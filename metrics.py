"""Every score of the field, as a library and as a command.

    python metrics.py real.h5 generated.h5 [more generations] [--oracle FILE ...] [--json FILE]

Row i of each file holds a response to the same particle. Notation: w (N, 5) are the channel sums of the real
responses, w^ (N, 5) those of the generated ones, n_k the number of rows of the unique particle k. Several
generations are scored one by one: a value is the mean of their scores, a spread their standard deviation (the
"average of five runs" of [FM], not its code's one histogram of five pooled runs). Every score stands beside
its oracle, the same score of the simulator run again, and R = value / oracle; without an oracle beside its
floor, the score of one half of the real responses against the other, paired by particle. The classifiers
behind the AUC are in judge.py; the scores of calorimeter showers in shower_metrics.py.
"""
import itertools
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

import common
import data
import files
import judge
import lists
import plots
import simulator

CHUNK = 2048  # rows converted to float32 at a time: 16 MB
SHAPES = ("x", "y", "radius", "lit", "peak", "sum")
CONDITIONAL = ("MAE_c", "MAE_cw", "MAE_cond", "dispersion", "JaccErr")
AUCS = ("AUC_high", "AUC_low")  # the stronger one first
SCORES = ("W", "MAE", "RMSE", *CONDITIONAL, *map("shape_{}".format, SHAPES), "spectrum", *AUCS, "FPD", "KPD")
NEIGHBOURS = ((0, 1), (0, 2), (1, 3), (2, 3))  # quadrants that share an edge; the common channel spans all
TAU = 1e-6  # photons; keeps 0 / 0 out of the dispersion, arXiv 2608.12795 gives no value
WIDE = 64  # features; of more, FPD and KPD form no products of two
LARGEST = 65535  # pixel values above are counted as this one (what a file can hold)
BOOTSTRAPS = 1000
GENERATIONS = 5  # of the test set, as in the papers
FLOORS = 2  # random pairings that the floor averages
TRAININGS = 2  # of each classifier, on the first generations
# Columns of the high-level classifier, FPD and KPD; and those that the conditions add for the classifiers
COLUMNS = (*(f"channel {k}" for k in range(5)), *SHAPES, *judge.DETAILS)
PARTICLE_COLUMNS = *simulator.FEATURES, "log E", "charge / E", "impact x", "impact y", "bent impact x"


# ------------------------------------------------------------------- what is measured on one set of responses

class Sample(NamedTuple):
    """Responses (N, H, W) with channels (N, 5) in photons, shapes (N, 6) in the order SHAPES (fibres and
    photons), details (N, 22) of judge.py, and spectrum (K,), the number of pixels that hold 0, 1, 2, ...
    photons."""
    responses: np.ndarray
    channels: np.ndarray
    shapes: np.ndarray
    details: np.ndarray
    spectrum: np.ndarray


def channel_weights(shape, convention="papers"):
    """Fibres of the channels, float32 (H, W, 5) of 0 and 1: quadrants (x<, y<), (x<, y>=), (x>=, y<),
    (x>=, y>=), then the common channel. "papers": even i + j to the quadrants, odd to the common channel;
    "o2": the reverse."""
    if convention not in ("papers", "o2"):
        raise common.UserError(f"unknown channel convention {convention!r}, expected papers or o2")
    i, j = np.indices(shape)
    quadrant = 2 * (i >= shape[0] // 2) + (j >= shape[1] // 2)
    is_common = (i + j) % 2 == (1 if convention == "papers" else 0)
    return np.eye(5, dtype=np.float32)[np.where(is_common, 4, quadrant)]


def channels(responses, convention="papers"):
    """Photon sums of the five channels of responses (N, H, W), float32 (N, 5); see channel_weights."""
    weights = channel_weights(responses.shape[1:], convention).reshape(-1, 5)
    flat = responses.reshape(-1, len(weights))
    sums = np.empty((len(flat), 5), np.float32)
    for k in range(0, len(flat), CHUNK):
        sums[k:k + CHUNK] = flat[k:k + CHUNK].astype(np.float32) @ weights
    return sums


def pixel_counts(responses):
    """Numbers of pixels of responses (N, H, W) that hold 0, 1, 2, ... photons, int64 (K,), after rounding.
    UserError on negative or non-finite values."""
    counts = np.zeros(LARGEST + 1, np.int64)
    for k in range(0, len(responses), CHUNK):
        chunk = responses[k:k + CHUNK]
        if chunk.dtype.kind != "u" and not (np.isfinite(chunk).all() and (chunk >= 0).all()):
            raise common.UserError("responses hold negative or non-finite values, expected photon counts")
        values = chunk[chunk > 0]  # the empty ones, 95 % of all, are what is left
        if chunk.dtype != np.uint16:
            values = np.rint(np.minimum(values, LARGEST)).astype(np.int64)
        counts += np.bincount(values, minlength=LARGEST + 1)
    counts[0] += responses.size - counts.sum()
    return np.trim_zeros(counts, "b")


def summarise(responses, convention="papers"):
    """The Sample of responses (N, H, W). The centre of light counts from the middle of the matrix, the radius
    is the rms distance from it; both are 0 for an empty response."""
    responses = np.asarray(responses)  # a JAX array would be slow below
    height, width = responses.shape[1:]
    counts = pixel_counts(responses)
    x, y = np.indices((height, width)) - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    moments = np.stack([x, y, x**2 + y**2], axis=-1).astype(np.float32)
    weights = np.concatenate([channel_weights((height, width), convention), moments], axis=-1).reshape(-1, 8)
    flat = responses.reshape(-1, height * width)
    sums = np.empty((len(flat), 8))  # products of photon counts are exact in float32, ratios are not
    lit, peak = np.empty(len(flat)), np.empty(len(flat))
    for k in range(0, len(flat), CHUNK):
        chunk, rows = flat[k:k + CHUNK], slice(k, k + CHUNK)
        sums[rows] = chunk.astype(np.float32) @ weights
        lit[rows], peak[rows] = np.count_nonzero(chunk, axis=1), chunk.max(axis=1)
    total = sums[:, :5].sum(axis=1)
    centre, square = np.split(sums[:, 5:] / np.maximum(total, 1e-9)[:, None], [2], axis=1)
    radius = np.sqrt(np.maximum(square[:, 0] - (centre**2).sum(axis=1), 0))
    shapes = np.column_stack([centre, radius, lit, peak, total])
    return Sample(responses, sums[:, :5].astype(np.float32), shapes, judge.details(responses), counts)


def take(sample, rows):
    """The Sample of some of its rows (M,)."""
    responses = sample.responses[rows]
    parts = (part[rows] for part in (sample.channels, sample.shapes, sample.details))
    return Sample(responses, *parts, pixel_counts(responses))


def features(sample):
    """All COLUMNS (N, 33) of a Sample: the features of FPD, KPD and the high-level AUC."""
    return np.concatenate([sample.channels, sample.shapes, sample.details], axis=1)


# -------------------------------------------------------------------------------------------- marginal scores

def wasserstein(real, generated):
    """Mean over the columns of the exact 1-Wasserstein distance, int |F^-1(z) - F^^-1(z)| dz [FM, Eq. 1], of
    real (N,) or (N, C) and generated (M,) or (M, C), in their units; N and M may differ."""
    u, v = (np.sort(np.asarray(a, np.float64).reshape(len(a), -1), axis=0) for a in (real, generated))
    n, m = len(u), len(v)
    # Both quantile functions are steps: they change at multiples of 1 / N and 1 / M, in units of 1 / (N M)
    edges = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(edges, prepend=0) / (n * m)
    return float((widths @ np.abs(u[(edges - 1) // m] - v[(edges - 1) // n])).mean())


def mae(real, generated):
    """Mean over rows and channels of |w - w^| [Comparison, Eq. 14]; w, w^ (N, 5), rows match."""
    return float(np.abs(np.asarray(real, np.float64) - generated).mean())


def rmse(real, generated):
    """sqrt(mean over rows of sum over pixels of (R - R^)^2) of responses (N, H, W) whose rows match. The
    published 59.87 is such a sum over the pixels, although [Comparison, Eq. 15] divides by their number."""
    total = 0.0
    for k in range(0, len(real), CHUNK):
        difference = real[k:k + CHUNK].astype(np.float32) - generated[k:k + CHUNK].astype(np.float32)
        total += float(np.vdot(difference, difference))
    return float(np.sqrt(total / len(real)))


def shower_shape(real, generated):
    """1-Wasserstein distance of each column of shapes (N, 6), (M, 6), a dict by SHAPES, in units of the real
    standard deviation; a column that does not vary in the real data is taken as it is."""
    scale = real.std(axis=0)
    scale[scale == 0] = 1
    return {name: wasserstein(real[:, k], generated[:, k]) / scale[k] for k, name in enumerate(SHAPES)}


def spectrum(real, generated):
    """Separation power 1/2 sum (a - b)^2 / (a + b) of two histograms (K,), (L,) of pixel values, brought to
    unit sums; the empty pixels are one of the bins. 0 equal, 1 disjoint."""
    size = max(len(real), len(generated))
    a, b = (np.pad(h, (0, size - len(h))) / max(h.sum(), 1) for h in (real, generated))
    used = a + b > 0
    return float(0.5 * ((a - b)[used]**2 / (a + b)[used]).sum())


# ----------------------------------------------------------------------------------------- conditional scores
# ids (N,) number the unique particles 0 .. U - 1. The functions return one term for each particle, (U,); a
# score is weighted_mean(terms, particle_weights(ids, name)), and the bootstrap draws terms again.

def particle_means(values, ids):
    """Mean of values (N, C) over the rows of each particle, float64 (U, C)."""
    sums = np.stack([np.bincount(ids, column) for column in np.asarray(values, np.float64).T], axis=1)
    return sums / np.bincount(ids)[:, None]


def particle_medians(values, ids):
    """Median of values (N, C) over the rows of each particle, float64 (U, C)."""
    counts = np.bincount(ids)
    start = np.cumsum(counts) - counts
    columns = np.asarray(values, np.float64).T
    ordered = np.stack([column[np.lexsort((column, ids))] for column in columns], axis=1)
    return (ordered[start + (counts - 1) // 2] + ordered[start + counts // 2]) / 2


def particle_weights(ids, name):
    """Weights p_k (U,) of a score: MAE_c 1, MAE_cw n, others log(1 + n), dispersion only where n >= 2."""
    counts = np.bincount(ids)
    if name in ("MAE_c", "MAE_cw"):
        return np.ones(len(counts)) if name == "MAE_c" else counts.astype(np.float64)
    return np.log1p(counts) * (counts >= (2 if name == "dispersion" else 1))


def weighted_mean(terms, weights):
    """sum p t / sum p of terms (U,) and weights (U,); nan where no weight is left."""
    return float(terms @ weights / weights.sum()) if weights.any() else np.nan


def mae_particles(real, generated, ids):
    """|mean w - mean w^| of w, w^ (N, 5), means over the rows of each particle, averaged over the channels:
    the terms of MAE_c, MAE_cw ([IAF], p = 1 and n) and MAE_cond (arXiv 2608.12795 Eq. 3, p = log(1 + n))."""
    return np.abs(particle_means(real, ids) - particle_means(generated, ids)).mean(axis=1)


def weighted_median(values, weights):
    """Weighted median (C,) of values (U, C): the smallest with at least half of the weight (U,) up to it."""
    order = np.argsort(values, axis=0, kind="stable")
    below = np.cumsum(weights[order], axis=0)
    first = np.argmax(below >= below[-1] / 2, axis=0)
    return np.take_along_axis(values, np.take_along_axis(order, first[None], axis=0), axis=0)[0]


def dispersion(real, generated, ids, pdg):
    """Relative error of the dispersion, arXiv 2608.12795 Eq. 4-6, averaged over the channels of w, w^ (N, 5):
    |MAD~^ - MAD~| / (MAD~^ + MAD~ + tau). MAD = median |w - median w| of a particle is shrunk to its type, by
    pdg (N,): MAD~ = a MAD + (1 - a) MAD_type with a = n / (n + kappa), kappa the 10th percentile of n in the
    type, MAD_type the median, weighted by log(1 + n), of the real MADs of its particles with n >= 5."""
    counts = np.bincount(ids)
    types = pdg[np.unique(ids, return_index=True)[1]]
    mads = [particle_medians(np.abs(w - particle_medians(w, ids)[ids]), ids) for w in (real, generated)]
    alpha, prior = np.empty((len(counts), 1)), np.empty(mads[0].shape)
    for code in np.unique(types):
        members = np.flatnonzero(types == code)
        alpha[members, 0] = counts[members] / (counts[members] + np.percentile(counts[members], 10))
        often = members[counts[members] >= 5]
        chosen = often if len(often) else members  # no particle of the type is frequent: all there is
        prior[members] = weighted_median(mads[0][chosen], np.log1p(counts[chosen]))
    shrunk, shrunk_generated = (alpha * mad + (1 - alpha) * prior for mad in mads)
    return (np.abs(shrunk_generated - shrunk) / (shrunk_generated + shrunk + TAU)).mean(axis=1)


def jaccard(values, ids):
    """J = #(both > 0) / #(either > 0) of each particle and pair of NEIGHBOURS, (U, 4); 1 where all are 0."""
    a, b = (values[:, [pair[k] for pair in NEIGHBOURS]] > 0 for k in (0, 1))
    both, either = particle_means(a & b, ids), particle_means(a | b, ids)
    return np.where(either > 0, both / np.where(either > 0, either, 1), 1)


def jaccard_error(real, generated, ids):
    """|J^ - J| averaged over the pairs of neighbours, of channels (N, 5): the terms of JaccErr (arXiv
    2608.12795 Eq. 7-8), an error of how often two channels fire together."""
    return np.abs(jaccard(generated, ids) - jaccard(real, ids)).mean(axis=1)


def bootstrap(terms, weights, seed=0):
    """16 % and 84 % points of weighted_mean(terms, weights) when particles are drawn again with replacement
    (the terms are kept, so kappa and MAD_type are those of the full set); None without weight."""
    equal = np.full(len(terms), 1 / len(terms))
    draws = np.random.default_rng(seed).multinomial(len(terms), equal, BOOTSTRAPS)
    top, bottom = (draws @ np.stack([terms * weights, weights], axis=1)).T
    return np.percentile(top[bottom > 0] / bottom[bottom > 0], [16, 84]).tolist() if weights.any() else None


# --------------------------------------------------------------------------------- distances in feature space

def scale_features(real, generated):
    """Features (N, F), (M, F) divided by max |real| of each, as in jetnet.evaluation; float64."""
    largest = np.abs(real).max(axis=0).astype(np.float64)
    largest[largest == 0] = 1
    return real / largest, generated / largest


def square_root(covariance):
    """A matrix R with R R^T = covariance, by Cholesky's decomposition (much faster) of wide features."""
    if len(covariance) > WIDE:
        with suppress(np.linalg.LinAlgError):  # no full rank
            return np.linalg.cholesky(covariance)
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet(mean_a, covariance_a, mean_b, covariance_b):
    """Squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A B)^1/2)."""
    root = square_root(covariance_a)  # A B and the symmetric R^T B R have the same eigenvalues
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ covariance_b @ root), 0)).sum()
    return float(((mean_a - mean_b)**2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def fpd_sizes(rows):
    """Smallest and largest sample of fpd: jetnet's 20 000 and 50 000, or 0.4 of the rows and all of them."""
    largest = min(50_000, rows)
    return max(2, largest * 2 // 5), largest


def weighted_covariance(features, drawn, mean, size):
    """Covariance (F, F) of a sample of features (N, F): drawn (N,) is how often it holds each row, mean (F,)
    and size are its own."""
    rows = np.flatnonzero(drawn)
    centred = (features[rows] - mean) * np.sqrt(drawn[rows, None])
    return centred.T @ centred / (size - 1)  # of one array with itself: half the work


def sampled_moments(features, sizes, seed):
    """Means (S, F) and covariances (S, F, F) of S samples of sizes (S,) drawn with replacement from features
    (N, F): one product of the numbers of draws of each row, (S, N), with the features and their products, or
    sample by sample where the products would be too many."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((len(sizes), len(features)))
    for row, size in zip(drawn, sizes):
        row[:] = np.bincount(rng.integers(len(features), size=size), minlength=len(features))
    if features.shape[1] > WIDE:
        means = drawn @ features / sizes[:, None]
        return means, np.array([weighted_covariance(features, *part) for part in zip(drawn, means, sizes)])
    i, j = np.triu_indices(features.shape[1])
    sums = drawn @ np.concatenate([features, features[:, i] * features[:, j]], axis=1)
    means, products = np.split(sums / sizes[:, None], [features.shape[1]], axis=1)
    covariances = np.empty((len(sizes), features.shape[1], features.shape[1]))
    covariances[:, i, j] = covariances[:, j, i] = products - means[:, i] * means[:, j]
    return means, covariances * (sizes / (sizes - 1))[:, None, None]


def fpd(real, generated, batches=20, points=10, seed=42):
    """Frechet physics distance (arXiv 2211.10295, defaults of jetnet.evaluation.fpd) of features (N, F),
    (M, F), and its error: mean of 20 samples at each of 10 sizes regular in 1 / size, intercept of the least
    squares line through them with both parameters >= 0; nan below 10 rows. (The fit inside jetnet stops early
    where the distances are far below 1 and returns about their mean: 1.37e-4 for 1.02e-4.)"""
    if min(len(real), len(generated)) < 10:
        return np.nan, np.nan
    a, b = scale_features(real, generated)
    middle = a.mean(axis=0)  # the distance does not depend on it, the rounding of the moments does
    low, high = fpd_sizes(min(len(a), len(b)))
    sizes = (1 / np.linspace(1 / low, 1 / high, points)).astype(int).repeat(batches)
    one, other = (sampled_moments(x - middle, sizes, seed + k) for k, x in enumerate((a, b)))
    values = np.array([frechet(*moments) for moments in zip(*one, *other)])
    values = values.reshape(points, batches).mean(axis=1)
    design = np.stack([np.ones(points), 1 / sizes[::batches]], axis=1)
    line = np.linalg.lstsq(design, values)[0]
    variance = ((values - design @ line)**2).sum() / (points - 2)
    error = np.sqrt(variance * np.linalg.pinv(design.T @ design)[0, 0])
    intercept = values.mean() if line[1] < 0 else max(line[0], 0.0)
    return float(intercept), float(error)


def mmd(real, generated):
    """Unbiased squared MMD of features (N, F), (M, F) with the kernel (x . y / F + 1)^4. Of few features no
    pair of rows is formed: with z = (1, x / sqrt F) the kernel is (z . z')^4 = (a . b)^2, where a and b are
    products of two elements of z and of z', and its sum over all pairs is the product A^T A : B^T B of small
    matrices. Of wide features all pairs are."""
    if real.shape[1] > WIDE:
        own = [(kernel_sum(x, x) - (((x**2).mean(axis=1) + 1)**4).sum()) / (len(x) * (len(x) - 1))
               for x in (real, generated)]
        return float(sum(own) - 2 * kernel_sum(real, generated) / (len(real) * len(generated)))
    rows, columns = np.triu_indices(real.shape[1] + 1)
    double = np.where(rows == columns, 1, np.sqrt(2))
    products = []
    for x in (real, generated):
        z = np.concatenate([np.ones((len(x), 1)), x / np.sqrt(x.shape[1])], axis=1)
        products.append(z[:, rows] * z[:, columns] * double)
    a, b = (p.T @ p for p in products)
    own = [((gram**2).sum() - ((p**2).sum(axis=1)**2).sum()) / (len(p) * (len(p) - 1))
           for gram, p in zip((a, b), products)]
    return float(sum(own) - 2 * (a * b).sum() / (len(real) * len(generated)))


def kernel_sum(x, y):
    """Sum of (x . y / F + 1)^4 over all pairs of rows of x (N, F) and y (M, F), 512 rows of x at a time."""
    x, y = x.astype(np.float32), y.astype(np.float32) / x.shape[1]
    blocks = (x[k:k + 512] @ y.T + 1 for k in range(0, len(x), 512))
    return sum(np.square(np.square(block)).sum(dtype=np.float64) for block in blocks)


def kpd(real, generated, batches=10, size=5000, seed=42):
    """Kernel physics distance (arXiv 2211.10295, defaults of jetnet.evaluation.kpd) of features (N, F),
    (M, F), and its error: median and half of the 16-84 % range of mmd over 10 samples of 5000 rows, or of all
    that there are; nan below 10 rows."""
    if min(len(real), len(generated)) < 10:
        return np.nan, np.nan
    a, b = scale_features(real, generated)
    size = min(size, len(a), len(b))
    rng = np.random.default_rng(seed)
    drawn = lambda x: x[rng.integers(len(x), size=size)]
    values = [mmd(drawn(a), drawn(b)) for _ in range(batches)]
    low, middle, high = np.percentile(values, [16.275, 50, 83.725])
    return float(middle), float((high - low) / 2)


# ---------------------------------------------------------------------------------------- everything together

def pair_rows(ids, seed=0):
    """Disjoint row numbers (a, b), random pairs of the same particle, ids (N,); an odd row is left out."""
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    order = shuffled[np.argsort(ids[shuffled], kind="stable")]
    counts = np.bincount(ids)
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[ids[order]]
    left = np.flatnonzero((rank % 2 == 0) & (rank + 1 < counts[ids[order]]))
    return order[left], order[left + 1]


def pair_scores(real, generated, ids, pdg, seed):
    """(scores, terms) of two Samples whose rows match: floats by name, with the errors of FPD and KPD, and
    the terms (U,) of each conditional score."""
    w, other = real.channels, generated.channels
    pair = features(real), features(generated)
    terms = dict.fromkeys(("MAE_c", "MAE_cw", "MAE_cond"), mae_particles(w, other, ids))
    terms |= {"dispersion": dispersion(w, other, ids, pdg), "JaccErr": jaccard_error(w, other, ids)}
    scores = {"W": wasserstein(w, other), "MAE": mae(w, other)}
    scores["RMSE"] = rmse(real.responses, generated.responses)
    scores |= {name: weighted_mean(terms[name], particle_weights(ids, name)) for name in CONDITIONAL}
    scores |= {f"shape_{name}": value for name, value in shower_shape(real.shapes, generated.shapes).items()}
    scores["spectrum"] = spectrum(real.spectrum, generated.spectrum)
    scores["FPD"], scores["FPD_error"] = fpd(*pair, seed=seed)
    scores["KPD"], scores["KPD_error"] = kpd(*pair, seed=seed)
    return scores, terms


def type_scores(real, generated, pdg, codes):
    """{code: {"W", "MAE"}} on the rows of each particle type in `codes` that occurs."""
    found = {code: (real.channels[pdg == code], generated.channels[pdg == code]) for code in codes}
    found = {code: pair for code, pair in found.items() if len(pair[0])}
    return {code: {"W": wasserstein(*pair), "MAE": mae(*pair)} for code, pair in found.items()}


def marginals(sample):
    """Lit fibres in % of all, fibres with one photon in % of the lit ones, mean and median photon sum."""
    lit, single = sample.spectrum[1:].sum(), sample.spectrum[1:2].sum()
    total = sample.shapes[:, SHAPES.index("sum")]
    return {"lit_percent": 100 * lit / sample.responses.size, "single_percent": 100 * single / max(lit, 1),
            "sum_mean": total.mean(), "sum_median": np.median(total)}


def floor_pair(sample, ids, seed):
    """Two halves of the real Sample, as in the papers, with one row each of pairs of the same particle, and
    the row numbers of the first half: none where no particle has two rows."""
    a, b = pair_rows(ids, seed)
    return take(sample, a), take(sample, b), a


def compare(pairs, pdg, ids, codes, seed):
    """Scores of pairs (real Sample, generated Sample, row numbers), as lists by (section, name): sections
    "scores", "terms", "marginals" and each code; and the first TRAININGS pairs. `pairs` are functions that
    make one each, called in two threads."""
    found, kept = defaultdict(list), {}

    def score(k, pair):
        real, generated, rows = pair()
        if not len(rows):
            return {}
        if k < TRAININGS:
            kept[k] = real, generated, rows
        row_ids = np.unique(ids[rows], return_inverse=True)[1]
        scores, terms = pair_scores(real, generated, row_ids, pdg[rows], seed + k)
        sections = {"scores": scores, "terms": terms, "marginals": marginals(generated)}
        return sections | type_scores(real, generated, pdg[rows], codes)

    with ThreadPoolExecutor(2) as pool:  # NumPy lets go of the interpreter in all that takes long
        for sections in pool.map(score, itertools.count(), pairs):
            for section, values in sections.items():
                for name, value in values.items():
                    found[section, name].append(value)
    return found, [kept[k] for k in sorted(kept)]


def judge_pair(real, generated, particles, seed):
    """Scores of both classifiers on two Samples of the particles (N, 9): AUCS, and "groups" and "columns" of
    the high-level one."""
    conditions = data.conditions(particles, data.fit_conditions(particles, "physics"))
    tables = [np.concatenate([features(sample), conditions], axis=1) for sample in (real, generated)]
    sums = [sample.shapes[:, SHAPES.index("sum")] for sample in (real, generated)]
    names = *COLUMNS, *(f"particle's {name}" for name in PARTICLE_COLUMNS)
    high = judge.high_level(*tables, sums, particles[:, 8], names, seed)
    rows = np.random.default_rng(seed).permutation(len(particles))[:judge.NETWORK["rows"]]
    pictures = [np.log1p(sample.responses[rows].reshape(len(rows), -1), dtype=np.float32)
                for sample in (real, generated)]
    pictures = [np.concatenate([picture, conditions[rows]], axis=1) for picture in pictures]
    logits, other = judge.network_logits(*pictures, seed)
    scores = {"AUC_high": high["AUC"], "AUC_low": judge.rank_auc(other, logits)}
    return {"scores": scores, "groups": high["groups"], "columns": high["columns"]}


def judge_pairs(pairs, found, particles, seed):
    """Add what judge_pair finds on the first pairs of `compare` to the lists in `found`."""
    pairs = [(real, generated, particles[rows]) for real, generated, rows in pairs if len(rows) >= 10]
    if not pairs:
        return
    with ThreadPoolExecutor(2) as pool:
        for sections in pool.map(judge_pair, *zip(*pairs), itertools.count(seed)):
            for section, values in sections.items():
                for name, value in values.items():
                    found[section, name] += [] if value is None else [value]


def cell(values, references, label, smallest=0.0):
    """{"value", "spread", label, "R"}: mean and standard deviation (None of one) of values, mean of
    references, and for an oracle above `smallest` R = value / oracle, else None."""
    value, reference = (np.mean(part) if part else np.nan for part in (values, references))
    spread = np.std(values, ddof=1) if len(values) > 1 else None
    ratio = value / reference if label == "oracle" and reference > smallest else None
    return files.plain({"value": value, "spread": spread, label: reference, "R": ratio})


def check_arrays(real, generations, oracle, particles, pdg):
    """UserError unless there is a generation and all arrays hold one response for each particle."""
    if real.ndim != 3 or not len(real) or not len(generations):
        raise common.UserError(f"expected responses and generations, not {real.shape} and {len(generations)}")
    for other in [*generations, *oracle]:
        if other.shape != real.shape:
            raise common.UserError(f"responses {other.shape} do not match the real ones, {real.shape}")
    if particles.shape != (len(real), 9) or pdg.shape != (len(real),):
        raise common.UserError(f"particles {particles.shape}, pdg {pdg.shape} do not match {real.shape}")


def evaluate(real, generations, particles, pdg, oracle=None, classifier=True, seed=0, convention="papers"):
    """Every score of `generations`, a list of arrays that match the real responses (N, H, W) row by row.

    particles (N, 9) and pdg (N,) are those of the rows; `oracle`: such a list from the simulator. Returns a
    dict that JSON can hold: {"W": {"value", "spread", "oracle", "R"}, ...} for SCORES, "marginals", "types"
    (those above 1 % of the rows), "groups", the high-level AUC by photon sum and charge, "columns", what
    shuffling each costs that AUC, and what was compared. Without an oracle "floor" stands in its place and R
    is None. CONDITIONAL scores have an "interval", a bootstrap over particles, FPD and KPD their own "error".

    R is None for AUC, whose ideal is 0.5 and not 0, and for FPD and KPD where their oracle does not exceed
    its error: both subtract their own bias, so that the oracle is noise around 0.
    """
    particles, pdg, label = np.asarray(particles), np.asarray(pdg), "oracle" if oracle else "floor"
    check_arrays(real, generations, oracle or [], particles, pdg)
    ids = data.unique_particles(particles)[0]
    codes = [code for code, rows in Counter(pdg.tolist()).most_common() if rows > 0.01 * len(pdg)]
    sample, every_row = summarise(real, convention), np.arange(len(real))
    shared = dict(pdg=pdg, ids=ids, codes=codes, seed=seed)
    pairs = lambda sets: [lambda r=r: (sample, summarise(r, convention), every_row) for r in sets]
    floors = [partial(floor_pair, sample, ids, seed + k) for k in range(FLOORS)]
    pairs = pairs(generations), pairs(oracle) if oracle else floors
    (found, first), (reference, again) = (compare(each, **shared) for each in pairs)
    if classifier:
        judge_pairs(first, found, particles, seed)
        judge_pairs(again, reference, particles, seed)

    def scored(section, name, smallest=0.0):
        return cell(found[section, name], reference[section, name], label, smallest)

    result = {}
    for name in SCORES if classifier else [name for name in SCORES if name not in AUCS]:
        noise = reference["scores", f"{name}_error"] or [np.inf if name in AUCS else 0.0]
        result[name] = scored("scores", name, np.mean(noise))
        if name in CONDITIONAL:
            terms = np.mean(found["terms", name], axis=0)
            result[name]["interval"] = bootstrap(terms, particle_weights(ids, name), seed)
        if name in ("FPD", "KPD"):
            result[name]["error"] = float(np.mean(found["scores", f"{name}_error"]))
    result["marginals"] = {name: {"real": float(value), **scored("marginals", name)}
                           for name, value in marginals(sample).items()}
    result["types"] = {simulator.PDG_NAMES.get(code, str(code)): {
        "rows": int((pdg == code).sum()), "particles": len(np.unique(ids[pdg == code])),
        "W": scored(code, "W"), "MAE": scored(code, "MAE")} for code in codes}
    if classifier:
        groups = [name for (section, name), aucs in found.items() if section == "groups" and aucs]
        result["groups"] = {name: scored("groups", name, np.inf) for name in groups}
        columns = {name: np.mean(losses) for (section, name), losses in found.items() if section == "columns"}
        result["columns"] = files.plain(dict(sorted(columns.items(), key=lambda item: -item[1])))
        result["classifier"] = {"AUC_high": judge.TREES, "AUC_low": judge.NETWORK, "trainings": TRAININGS}
    return result | {"rows": len(real), "particles": int(ids.max()) + 1, "generations": len(generations),
                     "convention": convention, "fpd_samples": list(fpd_sizes(len(real))),
                     "kpd_samples": min(5000, len(real))}


def score_line(name, cell, note=""):
    """A score as it is printed: value +- spread, oracle or floor, R."""
    keys = ("value", ".4g"), ("oracle" if "oracle" in cell else "floor", ".4g"), ("R", ".2f")
    value, reference, ratio = ("-" if cell[key] is None else f"{cell[key]:{form}}" for key, form in keys)
    spread = "" if cell["spread"] is None else f"+- {cell['spread']:.2g}"
    return f"{name:<16}{value:>11} {spread:<12}{reference:>11}{ratio:>9}  {note}".rstrip()


def print_header(cell, note=""):
    """Print the names of what score_line prints of a cell."""
    label = "oracle" if "oracle" in cell else "floor"
    print(f"{'score':<16}{'value':>11} {'spread':<12}{label:>11}{'R':>9}  {note}".rstrip())


def sample_notes(scores):
    """The sizes of the samples of FPD and KPD in words."""
    (low, high), size = scores["fpd_samples"], scores["kpd_samples"]
    return {"FPD": f"samples of {low} to {high} rows" + " (jetnet: 20000 to 50000)" * (high != 50_000),
            "KPD": f"samples of {size} rows" + " (jetnet: 5000)" * (size != 5000)}


def print_settings(name, settings):
    """Print the settings of a classifier."""
    print(f"{name}:", ", ".join(f"{key} {value}" for key, value in settings.items()))


def print_table(scores, title, explain=False):
    """Print the result of evaluate, with the interval or the size of the samples beside a score. Last come
    the columns whose shuffling costs the high-level classifier most, with `explain` all of them."""
    line, notes = lambda *words: print(score_line(*words)), sample_notes(scores)
    print(title + ": {rows} rows, {particles} particles, generations: {generations}".format(**scores))
    print_header(scores["W"], "[68 % over particles]")
    for name in filter(scores.get, SCORES):
        interval = scores[name].get("interval")
        line(name, scores[name], "[{:.4g}, {:.4g}]".format(*interval) if interval else notes.get(name, ""))
    for name, cell in scores["marginals"].items():
        line(name, cell, f"real {cell['real']:.4g}")
    for name, cells in scores["types"].items():
        line(f"W {name}", cells["W"], f"{cells['rows']} rows, {cells['particles']} particles")
        line(f"MAE {name}", cells["MAE"])
    if "classifier" in scores:
        for name, cell in scores["groups"].items():
            line(f"AUC {name}", cell)
        worst = itertools.islice(scores["columns"].items(), len(scores["columns"]) if explain else 5)
        print("seen by AUC_high:", ", ".join(f"{name} {loss:.3f}" for name, loss in worst))
        for name in AUCS:
            print_settings(name, scores["classifier"][name])


def lookup(train_particles, test_particles, seed=0, train_conditions=None, test_conditions=None):
    """The lookup baseline: for each test particle (M, 9) the number of a random training row (N, 9) of the
    same particle, int (M,), or of the particle nearest in the conditions (N, C), (M, C) if there is none;
    UserError if it comes without conditions."""
    ids = data.unique_particles(np.concatenate([train_particles, test_particles]))[0]
    train, test = ids[:len(train_particles)], ids[len(train_particles):].copy()
    counts = np.bincount(train, minlength=ids.max() + 1)
    unseen = np.flatnonzero(counts[test] == 0)
    if len(unseen) and train_conditions is None:
        raise common.UserError(f"{len(unseen)} test particles without training rows: lookup needs conditions")
    if len(unseen):
        known, rows = np.unique(train, return_index=True)
        _, first, inverse = np.unique(test[unseen], return_index=True, return_inverse=True)
        distances = (((train_conditions[rows] - c)**2).sum(axis=1) for c in test_conditions[unseen[first]])
        test[unseen] = known[[distance.argmin() for distance in distances]][inverse]
    start = np.cumsum(counts) - counts
    draws = np.random.default_rng(seed).random(len(test))
    return np.argsort(train, kind="stable")[start[test] + (draws * counts[test]).astype(int)]


# ------------------------------------------------------------------------------------- a model and its scores
# Scoring and generating are the same for every script, which passes its compiled sampler, draw(c (B, C), key)
# -> uint16 (B, H, W), and its parsed flags `args`.

def generator(draw, scaler, seed):
    """generate(particles (N, 9), number) -> uint16 (N, H, W); each number gives another set of responses."""
    def generate(particles, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        return common.in_blocks(draw, key, data.conditions(particles, scaler))

    return generate


def origin(args):
    """Where a result comes from, the first entries of metrics.json."""
    device = common.device_name()
    return {"script": args.script, "detector": args.detector, "command": args.command,
            "versions": common.versions(), "device": device, "flags": args.header["flags"],
            "train_device": args.header.get("train_device", None if args.load else device)}


def plot_logs(run):
    """Draw training.png beside each log in the folder `run` that holds a line: an early kill leaves none."""
    for log in run.rglob("log.jsonl"):
        if records := files.read_log(log.parent):
            plots.plot_training(log.with_name("training.png"), records)


def report(args, draw, scaler, dataset, split, sizes=(1, 32, 256, 8192), **result):
    """Time `draw` on batches of `sizes` and score it on data.test_sets: print the tables, draw the pictures,
    write metrics.json into the run folder and return its content. `result`: the script's own entries, among
    them "parameters", "mflop" and "evaluations" per response."""
    tests, sizes = data.test_sets(args, dataset, split), (1, common.BLOCK) if args.validate else sizes
    rows = {"train": len(split.train)} | {name: len(test.pdg) for name, test in tests.items()}
    result = origin(args) | {"rows": rows} | result | common.time_sampler(draw, len(scaler.mean), sizes)
    times = ", ".join(f"{ms:.3f} (batch {size})" for size, ms in result["ms_per_response"].items())
    print(f"{result['parameters']} parameters, {result['mflop']:.2f} MFLOP and {result['evaluations']} "
          f"evaluations per response; ms per response: {times}")
    generate = generator(draw, scaler, args.seed)
    if args.validate:
        part = tests["validation"]
        made = generate(part.particles, 0)
        result["validation"] = quick_scores(args, part, made, f"{len(part.pdg)} validation rows")
    else:
        result |= score_model(args, generate, tests, f"{result['evaluations']} evaluations each")
    plot_logs(args.run)
    files.write_json(args.run / "metrics.json", result)
    print(f"written: {args.run}/")
    return result


def score_model(args, generate, tests, label):
    """{"seen": scores or None, "unseen": scores or None} on the `tests` (data.test_sets), printed with titles
    that end in `label`; samples.png and channels.png of the first are drawn into the run folder."""
    result = {"seen": None, "unseen": None}
    for name, test in tests.items():
        generations = [generate(test.particles, number) for number in range(GENERATIONS)]
        oracle = None if args.data else [resimulate(args.detector, test, seed) for seed in range(GENERATIONS)]
        result[name] = evaluate(test.responses, generations, test.particles, test.pdg, oracle=oracle)
        print_table(result[name], f"{args.detector.upper()}, {name} particles, {label}")
        if name == next(iter(tests)):
            plot(args.run, test, generations[0])
    return result


def resimulate(detector, test, seed=0):
    """The oracle: the simulator run again on the particles of a Dataset, uint16 (N, H, W)."""
    return simulator.simulate(simulator.DETECTORS[detector], test.particles, test.pdg, 1000 + seed)


def quick_scores(args, test, made, title):
    """{"W": {"value", "oracle", "R"}, "MAE": ...} of one generation `made` (N, H, W) for a Dataset, printed;
    without a simulator, with --data, oracle and R are None."""
    truth, found = channels(test.responses), channels(made)
    again = None if args.data else channels(resimulate(args.detector, test))
    scores, text = {}, []
    for name, score in (("W", wasserstein), ("MAE", mae)):
        value, oracle = score(truth, found), None if again is None else score(truth, again)
        scores[name] = {"value": value, "oracle": oracle, "R": oracle and value / oracle}
        text.append(f"{name} {value:.3f}" + (f" (oracle {oracle:.3f})" if oracle else ""))
    print(f"{title}: {', '.join(text)}")
    return scores


def score_reconstruction(args, redraw, scaler, dataset, split):
    """{"W", "oracle", "R", "MAE"} of the first test set (data.test_sets), encoded and decoded by
    redraw(counts (B, H, W), c (B, C), key) -> uint16 (B, H, W)."""
    test = next(iter(data.test_sets(args, dataset, split).values()))
    c = data.conditions(test.particles, scaler)
    made = common.in_blocks(redraw, jax.random.key(args.seed), test.responses, c)
    w, mean_error = quick_scores(args, test, made, "reconstruction").values()
    return {"W": w["value"], "oracle": w["oracle"], "R": w["R"], "MAE": mean_error["value"]}


def plot(folder, test, generated):
    """Draw samples.png, one particle of each common type, and channels.png: a Dataset and `generated`."""
    real, particles, pdg = test
    ids, first = data.unique_particles(particles)
    rank, keys = Counter(), []  # of a particle within its type, by its rows
    for i in np.argsort(-np.bincount(ids), kind="stable"):
        code = pdg[first[i]]
        keys.append((rank[code], -np.count_nonzero(pdg == code), first[i]))
        rank[code] += 1
    columns = [row for *_, row in sorted(keys)[:8]]
    titles = [f"{simulator.PDG_NAMES.get(int(pdg[row]), '?')} {particles[row, 0]:.0f} GeV" for row in columns]
    plots.plot_samples(folder / "samples.png", {"data": real[columns], "model": generated[columns]}, titles)
    plots.plot_channels(folder / "channels.png", channels(real), channels(generated))


def generate_file(args, draw, scaler):
    """--generate: write responses of a particle list and their five channels, the whole file or none."""
    return lists.write(args, generator(draw, scaler, args.seed), channels)


def main(argv=None):
    """The command line; returns the scores."""
    parser = common.parser(__doc__, "metrics", flags=("detector", "seed"))
    parser.add_argument("real", help="HDF5 file or npz pair with the real responses")
    parser.add_argument("generated", nargs="+", help="generated responses, one file for each generation")
    parser.add_argument("--oracle", nargs="+", default=[], metavar="FILE", help="the simulator run again")
    parser.add_argument("--json", metavar="FILE", help="write the scores into this JSON file")
    parser.add_argument("--convention", choices=("papers", "o2"), default="papers",
                        help="which fibres feed the common channel: odd ones (papers) or even ones (o2)")
    parser.add_argument("--no-classifier", action="store_true", help="leave the AUC out")
    parser.add_argument("--explain", action="store_true",
                        help="print all columns of the high-level classifier by what shuffling costs its AUC")
    args = parser.parse_args(argv)
    real = data.load(args.real, args.detector)
    others = {path: data.load(path, args.detector) for path in args.generated + args.oracle}
    for path, other in others.items():
        if not np.array_equal(other.particles, real.particles):
            raise common.UserError(f"{path}: its particles are not those of {args.real} row by row "
                                   f"(rows: {len(other.particles)} and {len(real.particles)})")
    generations, oracle = ([others[p].responses for p in paths] for paths in (args.generated, args.oracle))
    empty = max(np.mean(~responses.any((1, 2))) for responses in generations)
    if empty and real.responses.any((1, 2)).all():
        print(f"{empty:.1%} of the generated responses are empty and none of the real ones: "
              "--generate leaves out particles that miss, --all-hit does not")
    scores = evaluate(real.responses, generations, real.particles, real.pdg, oracle, not args.no_classifier,
                      args.seed, args.convention)
    print_table(scores, f"{', '.join(args.generated)} against {args.real}", args.explain)
    if args.json:
        compared = {"real": args.real, "generated": args.generated, "detector": args.detector}
        files.write_json(args.json, compared | {"versions": common.versions()} | scores)
    return scores


if __name__ == "__main__":
    common.run(main)
