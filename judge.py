"""The judge: boosted trees that tell generated responses from simulated ones by what a response looks like.

Each response becomes 33 numbers, such as its channels, its moments, how many fibres hold one photon or have a
lit neighbour, and the light around the largest fibre; the particle is conditioned on by 14 more. An AUC of 0.5
is a response that cannot be told apart from another run of the simulator. Trees are the stronger judge of such
numbers, and of pictures at these sizes (docs/RESULTS.md); which column gives a model away is what `explain`
finds.
"""
from typing import NamedTuple

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

import data
import metrics

LARGEST = 12               # fibres, the largest in order
NAMES = (*(f"channel {k}" for k in range(5)), "photon sum", "lit fibres", "fibres of one photon",
         "fibres of two photons", "centre x", "centre y", "radius squared", "spread xx", "spread xy",
         *(f"largest fibre {k + 1}" for k in range(LARGEST)), "largest fibre x", "largest fibre y",
         "light in 3 x 3", "light in 7 x 7", "lit pairs along x", "lit pairs along y", "local maxima")
CONDITIONS = tuple(f"particle {name}" for name in (
    "E", "vx", "vy", "vz", "px", "py", "pz", "mass", "charge", "log E", "charge / E", "x", "y", "bent x"))
SETTINGS = dict(rows=40_000, max_iter=300, learning_rate=0.08)                 # rows of each kind
SUMS = {"below 30 photons": (0, 30), "30 to 300": (30, 300), "above 300": (300, np.inf)}


def columns(responses):
    """The numbers NAMES of responses (N, H, W), float32 (N, 33). Places and moments are in fibres from the
    middle of the matrix; a local maximum holds more than two photons and no less than its eight neighbours."""
    blocks = (responses[k:k + metrics.CHUNK] for k in range(0, len(responses), metrics.CHUNK))
    return np.concatenate([_columns(block.astype(np.float32)) for block in blocks])


def _columns(x):
    """One block, x (N, H, W)."""
    n, height, width = x.shape
    flat, lit = x.reshape(n, -1), x > 0
    i, j = (axis - (size - 1) / 2 for axis, size in zip(np.indices((height, width)), (height, width)))
    moments = np.stack([i, j, i * i + j * j, i * i, i * j], axis=-1).reshape(-1, 5).astype(np.float32)
    channels, total = metrics.channels(x), flat.sum(1)
    mean = flat @ moments / np.maximum(total, 1e-9)[:, None]
    centre = mean[:, :2]
    spread = mean[:, 2:] - np.column_stack([(centre**2).sum(1), centre[:, 0]**2, centre.prod(1)])
    largest = -np.sort(-np.partition(flat, -LARGEST, axis=1)[:, -LARGEST:], axis=1)
    place = np.column_stack(np.unravel_index(flat.argmax(1), (height, width)))
    around = np.pad(x, [(0, 0), (1, 1), (1, 1)])
    shifted = [around[:, a:a + height, b:b + width] for a in range(3) for b in range(3)]
    maxima = (x > 2) & (x >= np.max(shifted, axis=0))
    pairs = [(lit[:, 1:] & lit[:, :-1]).sum((1, 2)), (lit[:, :, 1:] & lit[:, :, :-1]).sum((1, 2))]
    return np.column_stack([
        channels, total, lit.sum((1, 2)), (x == 1).sum((1, 2)), (x == 2).sum((1, 2)), centre, spread, largest,
        place - np.array([(height - 1) / 2, (width - 1) / 2]), _light_around(x, place, 1),
        _light_around(x, place, 3), *pairs, maxima.sum((1, 2))]).astype(np.float32)


def _light_around(x, place, reach):
    """Light (N,) of x (N, H, W) within `reach` fibres of the place (N, 2) along both axes."""
    around = np.pad(x, [(0, 0), (reach, reach), (reach, reach)])
    rows, steps = np.arange(len(x)), range(2 * reach + 1)
    return sum(around[rows, place[:, 0] + a, place[:, 1] + b] for a in steps for b in steps)


class Verdict(NamedTuple):
    """A trained judge and its test rows: columns (T, F) and log odds (T,) of real and of generated ones, and
    the numbers (T,) of their rows."""
    model: HistGradientBoostingClassifier
    columns: tuple
    logits: tuple
    rows: np.ndarray


def train(real, generated, conditions, seed=0):
    """The Verdict on columns (N, 33) whose rows match, with conditions (N, C): 70 % of at most
    SETTINGS["rows"] random row numbers train and the rest test, so that no pair stands on two sides."""
    rows = np.random.default_rng(seed).permutation(len(real))[:SETTINGS["rows"]]
    fit, test = np.split(rows, [len(rows) * 7 // 10])
    table = lambda part, rows: np.column_stack([part[rows], conditions[rows]])
    model = HistGradientBoostingClassifier(max_iter=SETTINGS["max_iter"], early_stopping=False,
                                           learning_rate=SETTINGS["learning_rate"], random_state=seed)
    model.fit(np.concatenate([table(real, fit), table(generated, fit)]), np.repeat([0, 1], len(fit)))
    tables = table(real, test), table(generated, test)
    return Verdict(model, tables, tuple(model.decision_function(x) for x in tables), test)


def aucs(verdict, charge):
    """{"all", each of SUMS, "charged", "neutral": AUC} of a Verdict, for charges (N,) of all rows. A response
    belongs to a range of photon sums by its own sum; None for fewer than 50 of a kind."""
    total = NAMES.index("photon sum")
    charged = charge[verdict.rows] != 0
    chosen = {"all": [np.full(len(charged), True)] * 2, "charged": [charged] * 2, "neutral": [~charged] * 2}
    for name, (low, high) in SUMS.items():
        chosen[name] = [(x[:, total] >= low) & (x[:, total] < high) for x in verdict.columns]
    found = {name: [logits[rows] for logits, rows in zip(verdict.logits, pair)] for name, pair in chosen.items()}
    return {name: metrics.rank_auc(generated, real) if min(len(real), len(generated)) >= 50 else None
            for name, (real, generated) in found.items()}


def explain(verdict, seed=0):
    """{column: loss of AUC when its values are shuffled among the test rows}, the largest first."""
    rng, size = np.random.default_rng(seed), len(verdict.rows)
    table = np.concatenate(verdict.columns)
    whole, losses = metrics.rank_auc(*verdict.logits[::-1]), {}
    for k, name in enumerate((*NAMES, *CONDITIONS)):
        shuffled = table.copy()
        shuffled[:, k] = rng.permutation(table[:, k])
        logits = verdict.model.decision_function(shuffled)
        losses[name] = whole - metrics.rank_auc(logits[size:], logits[:size])
    return dict(sorted(losses.items(), key=lambda item: -item[1]))
