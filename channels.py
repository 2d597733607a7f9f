"""Direct estimates of the five channel sums, without a picture of the shower.

The electronics read five numbers per response, so why not predict these (paper 002, M. Wojnar, "Even faster simulations with
flow matching", appendix E)? A regression gives one answer per particle, the mean of log(1 + sum), where the simulator gives a
distribution: its W measures how much of the data is not decided by the particle. Flow matching on the five numbers,
    x_t = (1 - t) x_0 + t x_1            (Eq. 3)      v_t = x_1 - x_0                            (Eq. 4)
    x_(t+dt) = x_t + dt v_t              (Eq. 5)      L = E || v_theta(x_t, t, c) - v_t ||^2      (Eq. 6)
with t = 0 noise and t = 1 data, does give a distribution. A lookup table gives a random training row of the same particle, and
for a particle that it does not know one of the nearest: no low W means much unless it is below the table's.

    python channels.py --detector zn                        about two minutes on two CPU cores, data included
    python channels.py --detector zn --n 306780             the row in README

Prints W and MAE of every model beside the published W (Table 6) and the oracle, for seen and unseen particles; writes
runs/channels-zn/metrics.json. Trees, boosting and neighbours need scikit-learn: pip install '.[baselines]'.
"""
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import metrics
from common import UserError

PUBLISHED = {   # W for ZN and ZP, paper 002, Table 6; its FM draws whole responses, as fm.py does
    "original data": (0.53, 0.56), "linear regression": (60.06, 34.65), "gradient boosting": (3.86, 3.83),
    "decision tree": (3.86, 3.76), "k nearest neighbours": (2.98, 3.48), "dense network": (2.48, 3.22), "flow matching": (1.27, 1.30)}
CELLS = [(test, *cell) for test in ("seen", "unseen") for cell in (("W", "value"), ("W", "R"), ("MAE", "value"))]   # of the table


# --------------------------------------------------------------------------------------------------------------- flags

def flags():
    """The command line."""
    names = ("detector", "data", "n", "split", "cond", "epochs", "batch_size", "lr", "seed", "steps", "quiet", "run")
    return common.parser(__doc__, "channels", names, n=60_000, epochs=30, batch_size=512, lr=5e-3, steps=25)


# -------------------------------------------------------------------------------------------------------------- network
# It maps x (5,), t () and the condition c (C,) of ONE example to (5,); vmap makes the batch.

# same as fm.py: normalise
def normalise(h):
    """Root mean square norm over the last axis."""
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


# same as fm.py: Embedding
class Embedding(eqx.Module):
    """Time and particle as one vector (width,). Random frequencies of the condition let a small network place the shower."""
    frequencies: jax.Array
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, conditions, width, waves, key):
        keys = jax.random.split(key, 3)
        self.frequencies = jax.random.normal(keys[0], (waves, conditions))
        self.first = eqx.nn.Linear(conditions + 2 * waves + 16, width, key=keys[1])
        self.second = eqx.nn.Linear(width, width, key=keys[2])

    def __call__(self, t, c):
        angles = t * jnp.pi / 2 * 2.0 ** jnp.arange(8)
        waves = self.frequencies @ c
        h = jnp.concatenate([c, jnp.sin(waves), jnp.cos(waves), jnp.sin(angles), jnp.cos(angles)])
        return jax.nn.silu(self.second(jax.nn.silu(self.first(h))))


# same as fm.py: DenseBlock
class DenseBlock(eqx.Module):
    """Residual block on one vector; time and particle scale, shift and gate it (adaptive layer norm, Peebles and Xie 2023)."""
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    modulation: eqx.nn.Linear

    def __init__(self, width, embedding, key):
        keys = jax.random.split(key, 3)
        self.up, self.down = eqx.nn.Linear(width, 2 * width, key=keys[0]), eqx.nn.Linear(2 * width, width, key=keys[1])
        self.modulation = eqx.nn.Linear(embedding, 3 * width, key=keys[2])

    def __call__(self, h, e):
        scale, shift, gate = jnp.split(self.modulation(e), 3)
        return h + gate * self.down(jax.nn.silu(self.up(normalise(h) * (1 + scale) + shift)))


class Network(eqx.Module):
    """Residual blocks on the five numbers, steered by time and particle. The same for the regression, which has no x and t."""
    embedding: Embedding
    enter: eqx.nn.Linear
    blocks: list
    leave: eqx.nn.Linear

    def __init__(self, conditions, key, sums=5, width=64, depth=2, embedding=64, waves=32):
        keys = jax.random.split(key, 3 + depth)
        self.embedding = Embedding(conditions, embedding, waves, keys[0])
        self.enter, self.leave = eqx.nn.Linear(sums, width, key=keys[1]), eqx.nn.Linear(width, sums, key=keys[2])
        self.blocks = [DenseBlock(width, embedding, key) for key in keys[3:]]

    def __call__(self, x, t, c):
        e, h = self.embedding(t, c), self.enter(x)
        for block in self.blocks:
            h = block(h, e)
        return self.leave(normalise(h))


# ------------------------------------------------------------------------------------------------------------ objective
# t = 0 is noise, t = 1 are the channel sums, as standardised log(1 + sum). For a batch x_1 (B, 5), c (B, C).

def regression_loss(net, x1, c, key):
    """Squared error of the one answer."""
    return jnp.mean(jnp.square(regress(net, c) - x1))


def flow_loss(net, x1, c, key):
    """Eq. 6."""
    time_key, noise_key = jax.random.split(key)
    size = len(x1)
    t = (jnp.arange(size)[:, None] + jax.random.uniform(time_key, (size, 1))) / size   # stratified: less noise in the gradient
    x0 = jax.random.normal(noise_key, x1.shape)
    x = (1 - t) * x0 + t * x1                                                  # Eq. 3
    v = jax.vmap(net)(x, t[:, 0], c)
    return jnp.mean(jnp.square(v - (x1 - x0)))                                 # Eq. 4 and 6


# -------------------------------------------------------------------------------------------------------------- sampler

@eqx.filter_jit
def regress(net, c):
    """The answer (B, 5) for the conditions c (B, C)."""
    return jax.vmap(lambda c: net(jnp.zeros(5), 0.0, c))(c)


@eqx.filter_jit
def velocity(net, x, t, c):
    """v_theta for x (B, 5), one time t and c (B, C)."""
    return jax.vmap(net, (0, None, 0))(x, t, c)


def sample(net, c, key, steps):
    """Follow the velocity from noise for each condition c (B, C): x_1 (B, 5)."""
    x = jax.random.normal(key, (len(c), 5))
    for step in range(steps):
        x = x + velocity(net, x, step / steps, c) / steps                      # Eq. 5
    return x


# ------------------------------------------------------------------------------------------------------------- training

def make_step(loss, optimiser):
    """step(net, state, x1, c, key, number) -> (net, state, loss): gradient and update in one compiled call."""

    @eqx.filter_jit
    def step(net, state, x1, c, key, number):
        value, gradient = eqx.filter_value_and_grad(loss)(net, x1, c, jax.random.fold_in(key, number))
        updates, state = optimiser.update(gradient, state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), state, value

    return step


def train(args, loss, x1, c):
    """Minimise `loss` on x_1 (N, 5) and conditions c (N, C), both standardised; yields the network after each epoch."""
    model_key, train_key = jax.random.split(jax.random.key(args.seed))
    size = min(args.batch_size, len(x1))
    schedule = optax.cosine_onecycle_schedule(args.epochs * (len(x1) // size), args.lr, 0.1, 10, 100)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))
    net, done = Network(c.shape[1], model_key), 0
    state, step = optimiser.init(eqx.filter(net, eqx.is_inexact_array)), make_step(loss, optimiser)
    for epoch in common.progress(args.epochs, f"training, {loss.__name__}", args.quiet):
        for rows in data.batches(len(x1), size, np.random.default_rng([args.seed, epoch])):
            net, state, value = step(net, state, x1[rows], c[rows], train_key, np.int32(done))
            done += 1
        common.check_finite(float(value), done, None)
        yield net


# --------------------------------------------------------------------------------------------------------------- models
# A model is fitted on particles (N, 9) and their channel sums (N, 5) and yields candidates, (setting, predict) with
# predict(particles (M, 9)) -> sums (M, 5). The candidate with the lowest W on the validation rows is kept.

def on_logs(fit):
    """Decorator: makes a model of `fit` for the nine standardised features (N, 9) and log(1 + sum) (N, 5)."""

    def model(args, particles, sums):
        scaler = data.fit_conditions(particles, "raw")
        for setting, predict in fit(args, data.conditions(particles, scaler), np.log1p(sums)):
            yield setting, lambda new, predict=predict: np.maximum(np.expm1(predict(data.conditions(new, scaler))), 0)

    return model


@on_logs
def linear_regression(args, x, y):
    constant = lambda x: np.column_stack([x, np.ones(len(x))])
    weights = np.linalg.lstsq(constant(x), y)[0]
    yield "least squares", lambda x: constant(x) @ weights


@on_logs
def gradient_boosting(args, x, y):
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.multioutput import MultiOutputRegressor
    for rate in (0.1, 0.3, 1.0):
        model = HistGradientBoostingRegressor(learning_rate=rate, early_stopping=False, random_state=args.seed)
        yield f"rate {rate}", MultiOutputRegressor(model).fit(x, y).predict


@on_logs
def decision_tree(args, x, y):
    from sklearn.tree import DecisionTreeRegressor
    for depth in (5, 10, 15, 20, 25):
        yield f"depth {depth}", DecisionTreeRegressor(max_depth=depth, random_state=args.seed).fit(x, y).predict


@on_logs
def nearest_neighbours(args, x, y):
    from sklearn.neighbors import KNeighborsRegressor
    for k in (3, 5, 10, 15, 20, 25):
        yield f"{k} neighbours", KNeighborsRegressor(k).fit(x, y).predict


@on_logs
def dense_network(args, x, y):
    mean, std = y.mean(0), y.std(0) + 1e-6
    for epoch, net in enumerate(train(args, regression_loss, (y - mean) / std, x), 1):
        yield f"epoch {epoch}", lambda x, net=net: np.asarray(regress(net, x)) * std + mean


def flow_matching(args, particles, sums):
    scaler, y = data.fit_conditions(particles, args.cond), np.log1p(sums)
    mean, std = y.mean(0), y.std(0) + 1e-6
    *_, net = train(args, flow_loss, (y - mean) / std, data.conditions(particles, scaler))

    def predict(new):
        x = sample(net, data.conditions(new, scaler), jax.random.key(args.seed), args.steps)
        return np.maximum(np.rint(np.expm1(np.asarray(x) * std + mean)), 0)    # whole photons

    yield f"{args.steps} steps, {args.cond} conditions; the paper's draws whole responses", predict


def lookup(args, particles, sums):
    scaler = data.fit_conditions(particles, args.cond)
    known = data.conditions(particles, scaler)
    yield "random row of the same or nearest particle", lambda new: sums[metrics.lookup(particles, new, args.seed, known, data.conditions(new, scaler))]


REGRESSIONS = {"linear regression": linear_regression, "gradient boosting": gradient_boosting, "decision tree": decision_tree,
               "k nearest neighbours": nearest_neighbours, "dense network": dense_network}
MODELS = REGRESSIONS | {"flow matching": flow_matching, "lookup": lookup}


def fit(model, args, training, validation):
    """(setting, predict) of the best candidate, from two pairs (particles, sums); predict is None without scikit-learn."""
    try:
        return min(model(args, *training), key=lambda found: metrics.wasserstein(validation[1], found[1](validation[0])))
    except ModuleNotFoundError as error:
        if not error.name.startswith("sklearn"):
            raise
        return "needs scikit-learn: pip install '.[baselines]'", None


def split(args, dataset):
    """[(rows, particles, sums)] for training, validation and test. UserError where they are too few for 25 neighbours."""
    rows = data.split_particles(dataset.particles, args.seed) if args.split == "particles" else data.split_rows(len(dataset.pdg), args.seed)
    if min(map(len, rows)) < 25:
        raise UserError(f"{len(dataset.pdg)} rows are too few, expected at least 25 each to train, validate and test")
    return [data.Dataset(*(field[part] for field in dataset)) for part in rows]


def direct_estimates(dataset, name, seed=0):
    """W of the five regressions of Table 6 on the test rows of split_rows, papers' convention; None where scikit-learn is missing.

    They need no generative model, so they tell how hard a data set is. Takes about two minutes for 306 780 rows.
    """
    args = flags().parse_args(["--detector", name, "--seed", str(seed), "--quiet"])
    training, validation, (particles, truth) = map(pair, split(args, dataset))
    found = {label: fit(model, args, training, validation)[1] for label, model in REGRESSIONS.items()}
    return {label: predict and metrics.wasserstein(truth, predict(particles)) for label, predict in found.items()}


# -------------------------------------------------------------------------------------------------------------- scoring

def pair(dataset):
    """(particles (N, 9), channel sums (N, 5)) of a data set."""
    return dataset.particles, metrics.channels(dataset.responses)


def scores(truth, found):
    """W and MAE of channel sums (N, 5)."""
    return {"W": metrics.wasserstein(truth, found), "MAE": metrics.mae(truth, found)}


def reference(args, dataset):
    """Scores of the simulator run again; for --data, which has none, those of rows paired by equal particle."""
    particles, truth = pair(dataset)
    if args.data is None:
        return scores(truth, metrics.channels(data.simulate(data.DETECTORS[args.detector], particles, dataset.pdg, 1000)))
    left, right = metrics.pair_rows(data.unique_particles(particles)[0], args.seed)
    return scores(truth[left], truth[right]) if len(left) else dict.fromkeys(("W", "MAE"), np.nan)


def test_sets(args, test):
    """{"seen" or "unseen": (particles, sums, scores of the reference)}; both on the open data split by rows."""
    sets = {"unseen" if args.split == "particles" else "seen": test}
    if args.data is None and args.split == "rows":
        sets["unseen"] = data.open_data(args.detector, min(len(test.pdg), 20_000), args.seed, fresh=True, quiet=args.quiet)
    return {name: (*pair(part), reference(args, part)) for name, part in sets.items()}


def report(args, name, setting, seconds, found):
    """Print a row of the table, return what metrics.json holds of it. found: {"seen": (scores, those of the reference), ...}."""
    published = PUBLISHED.get(name, (None, None))[args.detector == "zp"]
    entry = {test: {score: metrics.cell([ours[score]], [floor[score]], "floor" if args.data else "oracle") for score in ours}
             for test, (ours, floor) in found.items()}
    numbers = [entry.get(test, {}).get(score, {}).get(key) for test, score, key in CELLS]
    print(f"{name:<21}" + "".join(f"{'-':>9}" if n is None else f"{n:9.2f}" for n in (published, *numbers, seconds)), "", setting)
    return {"published": published, "setting": setting, "fit_seconds": seconds, **entry}


def main(argv=None):
    """Fit and score every model. Returns what metrics.json holds."""
    args = flags().parse_args(argv)
    common.enable_compilation_cache()
    dataset = data.load(args.data, args.detector) if args.data else data.open_data(args.detector, args.n, args.seed, quiet=args.quiet)
    training, validation, test = split(args, dataset)
    tests = test_sets(args, test)
    rows = {"train": len(training.pdg), "validation": len(validation.pdg)} | {name: len(part[0]) for name, part in tests.items()}
    print(f"{args.detector.upper()}, the five channel sums; rows: " + ", ".join(f"{count} {name}" for name, count in rows.items()))
    print(f"{'model':<21}" + "".join(f"{title:>9}" for title in ("paper W", "W", "R", "MAE", "unseen W", "R", "MAE", "fit s")))
    floors = {name: (floor, floor) for name, (*_, floor) in tests.items()}
    models = {"original data": report(args, "original data", "half against half" if args.data else "oracle", None, floors)}
    for name, model in MODELS.items():
        began = time.perf_counter()
        setting, predict = fit(model, args, pair(training), pair(validation))
        seconds = time.perf_counter() - began if predict else None
        found = {test: (scores(truth, predict(new)), floor) for test, (new, truth, floor) in tests.items()} if predict else {}
        models[name] = report(args, name, setting, seconds, found)
    shown = ("n", "split", "cond", "epochs", "batch_size", "lr", "seed", "steps", "data")
    result = {"script": "channels", "detector": args.detector, "command": "python " + " ".join(["channels.py", *sys.argv[1:]]),
              "versions": common.versions(), "device": common.device_name(), "flags": {name: getattr(args, name) for name in shown},
              "rows": rows, "models": models}
    common.write_json(args.run / "metrics.json", result)
    print(f"written: {args.run}/metrics.json")
    return result


if __name__ == "__main__":
    common.run(main)
