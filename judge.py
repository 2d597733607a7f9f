"""The judge: classifiers that tell generated responses from simulated ones. An AUC of 0.5 means that a
response could as well come from another run of the simulator.

The high-level one sees what a response looks like, 33 numbers such as its channels, how many fibres hold one
photon or have a lit neighbour, and the light around the brightest fibre, beside the particle's conditions. It
is a gradient boosting of trees (scikit-learn's), which finds more than networks do at these sizes, on these
numbers or on pictures; `explain` says by which numbers. The low-level one, a dense network, sees the picture.
"""
import equinox as eqx
import jax
import numpy as np
import optax

CHUNK = 2048               # rows measured at a time: 8 MB
LARGEST = 12               # the brightest fibres, in order
DETAILS = ("ones", "twos", "spread xx", "spread xy", *(f"fibre {k}" for k in range(2, LARGEST + 1)),
           "brightest x", "brightest y", "light in 3 x 3", "light in 7 x 7", "lit pairs along x",
           "lit pairs along y", "local maxima")
TREES = dict(rows=40_000, max_iter=300, learning_rate=0.08)          # rows of one class at most
# Three hidden layers as CaloChallenge's of 2048 (arXiv 2410.21611), scaled to a CPU
NETWORK = dict(rows=20_000, width=256, depth=3, epochs=10, batch=500, learning_rate=3e-4)
FEW = 50                   # rows of a class: of fewer no AUC is given
SUMS = {"below 30 photons": (0, 30), "30 to 300 photons": (30, 300), "above 300 photons": (300, np.inf)}
ADAM = optax.scale_by_adam()


# --------------------------------------------------------------------------------- what a response looks like

def details(responses):
    """The numbers DETAILS of responses (N, H, W) of photon counts, float32 (N, 22): how many fibres hold one
    photon and two, second moments about the centre of light, the brightest fibres but for the first, place of
    the first (in fibres, from the middle), the light around it, pairs of lit fibres that share an edge, and
    fibres with more than two photons and no brighter one among the eight around them."""
    blocks = (responses[k:k + CHUNK] for k in range(0, len(responses), CHUNK))
    return np.concatenate([_details(block) for block in blocks])


def _details(x):
    """One block x (N, H, W). Only the lit fibres, a twentieth, are looked at: their row, place and count."""
    n, height, width = x.shape
    middle = (height - 1) / 2, (width - 1) / 2
    lit = np.flatnonzero(x.reshape(-1) != 0)                                   # (L,)
    row, place = np.divmod(lit, height * width)
    i, j = np.divmod(place, width)
    count = x.reshape(-1)[lit].astype(np.float64)
    around = np.pad(x, [(0, 0), (3, 3), (3, 3)])
    total = lambda values: np.bincount(row, values, n)                         # of each response

    def at(a, b):
        """The fibre (a, b) away from each lit one, (L,)."""
        return around[row, i + 3 + a, j + 3 + b]

    light = np.maximum(total(count), 1e-9)
    u, v = i - middle[0], j - middle[1]
    mean_u, mean_v = total(count * u) / light, total(count * v) / light
    xx, xy = total(count * u**2) / light - mean_u**2, total(count * u * v) / light - mean_u * mean_v
    best = x.reshape(n, -1).argmax(axis=1)
    best_i, best_j = np.divmod(best, width)
    window = lambda reach: sum(around[np.arange(n), best_i + 3 + a, best_j + 3 + b].astype(np.float64)
                               for a in range(-reach, reach + 1) for b in range(-reach, reach + 1))
    beside = [at(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
    maximum = (count > 2) & (count >= np.max(beside, axis=0))
    return np.column_stack([
        total(count == 1), total(count == 2), xx, xy, brightest(row, count, n), best_i - middle[0],
        best_j - middle[1], window(1), window(3), total(at(1, 0) > 0), total(at(0, 1) > 0),
        total(maximum)]).astype(np.float32)


def brightest(row, count, n):
    """The second largest to the LARGEST-th of the counts (L,) in each of n rows, 0 where there are fewer,
    (n, LARGEST - 1); row (L,) is the row of each, in order."""
    number = np.bincount(row, minlength=n)
    first = np.cumsum(number) - number
    ordered = np.append(count[np.lexsort((-count, row))], 0)
    rank = np.arange(1, LARGEST)
    return ordered[np.where(rank < number[:, None], first[:, None] + rank, len(count))]


# ------------------------------------------------------------------------------------------------ classifiers

def rank_auc(positive, negative):
    """Area under the ROC curve: probability that a positive (N,) is above a negative (M,), ties one half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(ordered)))


def high_level(real, generated, sums, charge, names, seed=0):
    """Scores of boosted trees on real and generated features (N, F) named `names`, whose rows match: "AUC",
    "groups" by photon sums, a pair of (N,), and charge (N,), and "columns" of `explain`. Of at most
    TREES["rows"] random row numbers 70 % train and the rest test, so that no pair stands on two sides."""
    from sklearn.ensemble import HistGradientBoostingClassifier                # a second to import
    from threadpoolctl import threadpool_limits
    rows = np.random.default_rng(seed).permutation(len(real))[:TREES["rows"]]
    fit, test = np.split(rows, [len(rows) * 7 // 10])
    settings = {name: value for name, value in TREES.items() if name != "rows"}
    model = HistGradientBoostingClassifier(**settings, early_stopping=False, random_state=seed)
    with threadpool_limits(1):  # threads wait for each other at every node: minutes on a busy machine
        model.fit(np.concatenate([real[fit], generated[fit]]), np.repeat([0, 1], len(fit)))
        score = model.decision_function
        logits = [score(part[test]) for part in (real, generated)]
        columns = explain(score, real[test], generated[test], names, seed)
    groups = grouped_aucs(logits, [part[test] for part in sums], charge[test])
    return {"AUC": rank_auc(*logits[::-1]), "groups": groups, "columns": columns}


def grouped_aucs(logits, sums, charge):
    """AUC of logits, pairs of real and generated (T,), for each of SUMS by the photon sum (T,) of a response,
    for charged and for neutral particles by charge (T,); None where a class has fewer than FEW rows."""
    groups = {name: [(low <= part) & (part < high) for part in sums] for name, (low, high) in SUMS.items()}
    groups |= {"charged": [charge != 0] * 2, "neutral": [charge == 0] * 2}
    found = {name: [part[rows] for part, rows in zip(logits, pair)] for name, pair in groups.items()}
    return {name: rank_auc(generated, real) if min(len(real), len(generated)) >= FEW else None
            for name, (real, generated) in found.items()}


def explain(score, real, generated, names, seed=0):
    """{name: loss of AUC when this column is shuffled among the rows} of test rows (T, F)."""
    table, rng = np.concatenate([real, generated]), np.random.default_rng(seed)

    def auc(x):
        logits = score(x)
        return rank_auc(logits[len(real):], logits[:len(real)])

    whole, losses = auc(table), {}
    for k, name in enumerate(names):
        shuffled = table.copy()
        shuffled[:, k] = rng.permutation(table[:, k])
        losses[name] = whole - auc(shuffled)
    return losses


@eqx.filter_jit
def _train_step(model, state, x, y, rate):
    """One Adam step on the cross entropy of a batch x (B, F), y (B,)."""
    gradient = eqx.filter_grad(lambda m: optax.sigmoid_binary_cross_entropy(jax.vmap(m)(x), y).mean())(model)
    updates, state = ADAM.update(gradient, state)
    return eqx.apply_updates(model, jax.tree.map(lambda u: -rate * u, updates)), state


def network_logits(real, generated, seed=0, settings=NETWORK):
    """Logits (T,) of real and (T,) of generated test rows, by a dense network that separates generated from
    real features (N, F), rows matching: 60 / 20 / 20 % of the row numbers train, choose the epoch and test,
    so that no pair stands on two sides."""
    rng = np.random.default_rng(seed)
    parts = np.split(rng.permutation(len(real)), [len(real) * 6 // 10, len(real) * 8 // 10])
    train, validation, test = (np.concatenate([part, part + len(real)]) for part in parts)
    x, y = np.concatenate([real, generated], dtype=np.float32), np.repeat(np.float32([0, 1]), len(real))
    model = eqx.nn.MLP(x.shape[1], "scalar", settings["width"], settings["depth"], jax.nn.leaky_relu,
                       key=jax.random.key(seed))
    state = ADAM.init(eqx.filter(model, eqx.is_array))
    size, best = min(settings["batch"], len(train)), np.inf
    for _ in range(settings["epochs"]):
        for rows in rng.permutation(train)[:len(train) // size * size].reshape(-1, size):
            model, state = _train_step(model, state, x[rows], y[rows], settings["learning_rate"])
        found = np.asarray(jax.vmap(model)(x[validation]))
        loss = optax.sigmoid_binary_cross_entropy(found, y[validation]).mean()
        if settings.get("challenge"):
            loss = np.mean((found > 0) != y[validation])
        if loss < best:
            best, logits = loss, np.asarray(jax.vmap(model)(x[test]))
    return np.split(logits, 2)


def standardise(features, reference, floor=0.0):
    """Features (N, F) by mean and standard deviation (at least `floor`; 1 where it is 0) of `reference`,
    float32."""
    scale = np.maximum(reference.std(axis=0), floor)
    return ((features - reference.mean(axis=0)) / np.where(scale > 0, scale, 1)).astype(np.float32)
