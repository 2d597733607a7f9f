"""Flow matching of the five channel sums: the smallest model here, and a table of direct estimates beside it.

The electronics read five numbers per response, so why not predict these [FM, appendix E]? Flow matching
draws them, with t = 0 noise and t = 1 data:
    x_t = (1 - t) x_0 + t x_1            (Eq. 3)      v_t = x_1 - x_0                            (Eq. 4)
    x_(t+dt) = x_t + dt v_theta          (Eq. 5)      L = E || v_theta(x_t, t, c) - v_t ||^2      (Eq. 6)
A regression gives each particle one answer, the mean of log(1 + sum), where the simulator gives a
distribution; its W says how much of the data the particle does not decide. A lookup table gives a random
training row of the same particle or, if there is none, of the nearest one: on seen particles it is as good as
the simulator, so a low W there says little.

    python channels.py --detector zn                        about two minutes on two CPU cores, data included

Prints W and MAE of every model beside the published W [FM, Table 6] and the oracle, for seen and unseen
particles; ends with `written: runs/channels-zn/metrics.json`.
"""
import time
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import common
import data
import files
import metrics
from common import UserError

PUBLISHED = {   # W for ZN and ZP [FM, Table 6]; there the flow draws whole responses, as fm.py does
    "original data": (0.53, 0.56), "linear regression": (60.06, 34.65), "gradient boosting": (3.86, 3.83),
    "decision tree": (3.86, 3.76), "k nearest neighbours": (2.98, 3.48), "dense network": (2.48, 3.22),
    "flow matching": (1.27, 1.30)}


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags. --cond is for flow and lookup: regressions see the nine features, as in [FM]."""
    names = ("detector", "data", "axes", "n", "split", "cond", "epochs", "batch_size", "lr", "seed", "steps",
             "quiet", "run")
    parser = common.parser(__doc__, "channels", names, n=60_000, epochs=30, batch_size=512, lr=5e-3, steps=25)
    return parser.parse_args(argv)


def plan(args):
    """The Plan of both trainings."""
    return common.Plan(args.header, args.run, args.epochs, args.batch_size, args.lr, seed=args.seed,
                       quiet=args.quiet)


# -------------------------------------------------------------------------------------------------- objective
# x_1 (5,) are the standardised log(1 + sum) of one response, c (C,) the conditions of its particle.

def flow_loss(net, x1, t, c, key):
    """Flow matching for one response: t = 0 is noise, t = 1 is data."""
    x0 = jax.random.normal(key, x1.shape)
    x = (1 - t) * x0 + t * x1                                                  # [FM, Eq. 3]
    v = x1 - x0                                                                # [FM, Eq. 4]
    return jnp.mean((velocity(net, x, t, c) - v)**2)                           # [FM, Eq. 6]


def velocity(net, x, t, c):
    """v_theta (5,)."""
    return net(jnp.concatenate([x, jnp.atleast_1d(t), c]))


def batch_flow_loss(net, x1, c, key):
    """flow_loss of a batch, x_1 (B, 5), c (B, C)."""
    time_key, noise_key = jax.random.split(key)
    size = len(x1)
    t = (jnp.arange(size) + jax.random.uniform(time_key, (size,))) / size      # stratified: less noise
    return jax.vmap(partial(flow_loss, net))(x1, t, c, jax.random.split(noise_key, size)).mean()


def regression_loss(net, x1, c, key):
    """Squared error of the one answer."""
    return jnp.mean(jnp.square(jax.vmap(net)(c) - x1))


# ---------------------------------------------------------------------------------------------------- sampler

@eqx.filter_jit
def euler_step(net, x, t, dt, c):
    """[FM, Eq. 5] for x (B, 5) and one time t."""
    return x + dt * jax.vmap(partial(velocity, net), (0, None, 0))(x, t, c)


def sample(net, c, key, steps):
    """Draw x_1 (B, 5) for conditions c (B, C)."""
    x = jax.random.normal(key, (len(c), 5))
    for step in range(steps):
        x = euler_step(net, x, np.float32(step / steps), np.float32(1 / steps), c)
    return x


# --------------------------------------------------------------------------------------------------- training

def make_step(loss, optimiser):
    """step(net, state, x1, c, key) -> (net, state, loss): gradient and update in one compiled call."""

    @eqx.filter_jit
    def step(net, state, x1, c, key):
        value, gradient = eqx.filter_value_and_grad(loss)(net, x1, c, key)
        updates, state = optimiser.update(gradient, state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), state, value

    return step


def train(loss, inputs, x1, c, plan):
    """Minimise loss(net, x_1 (B, 5), c (B, C), key) on standardised x_1 (N, 5), c (N, C). Yields the network
    after each epoch."""
    size = min(plan.batch_size, len(x1))
    optimiser = common.adamw(plan, plan.epochs * (len(x1) // size))
    net, key, done = make_network(inputs, plan.keys[0]), plan.keys[1], 0
    state, step = optimiser.init(eqx.filter(net, eqx.is_inexact_array)), make_step(loss, optimiser)
    for epoch in common.progress(plan.epochs, f"training {loss.__name__}", plan.quiet):
        for rows in common.shuffled(len(x1), size, np.random.default_rng([plan.seed, epoch])):
            net, state, value = step(net, state, x1[rows], c[rows], jax.random.fold_in(key, done))
            done += 1
        common.check_finite(float(value), done, None)
        yield net


# ---------------------------------------------------------------------------------------------------- network

def make_network(inputs, key):
    """A plain dense network (inputs,) -> (5,). Sinusoidal features, as in fm.py, make W smaller on seen
    particles and larger on unseen ones: they help to tell particles apart, not to compare them."""
    return eqx.nn.MLP(inputs, 5, 144, 4, jax.nn.silu, key=key)


# ----------------------------------------------------------------------------------------------------- models
# A model is fitted on particles (N, 9) and their sums (N, 5) and yields candidates (setting, predict), where
# predict(particles (M, 9)) -> sums (M, 5). The one with the lowest W on the validation rows is kept, as in
# the paper.

def flow_matching(args, particles, sums):
    scaler, y = data.fit_conditions(particles, args.cond), np.log1p(sums)
    mean, std = y.mean(0), y.std(0) + 1e-6
    c = data.conditions(particles, scaler)
    *_, net = train(batch_flow_loss, 5 + 1 + c.shape[1], (y - mean) / std, c, plan(args))

    def predict(new):
        x = np.asarray(sample(net, data.conditions(new, scaler), jax.random.key(args.seed), args.steps))
        return np.maximum(np.rint(np.expm1(x * std + mean)), 0)                # whole photons

    yield f"{args.steps} steps, {args.cond} conditions (paper: of whole responses)", predict


def lookup(args, particles, sums):
    scaler = data.fit_conditions(particles, args.cond)
    c = data.conditions(particles, scaler)
    draw = lambda new: metrics.lookup(particles, new, args.seed, c, data.conditions(new, scaler))
    yield "random row of the same particle; unseen: of the nearest", lambda new: sums[draw(new)]


def on_logs(candidates):
    """Decorator: a model from `candidates` that see nine standardised features and log(1 + sum) (N, 5)."""

    def model(args, particles, sums):
        scaler = data.fit_conditions(particles, "raw")
        features = lambda particles: data.conditions(particles, scaler)
        for setting, predict in candidates(args, features(particles), np.log1p(sums)):
            yield setting, lambda new, predict=predict: np.maximum(np.expm1(predict(features(new))), 0)

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
    options = dict(early_stopping=False, random_state=args.seed)
    for rate in (0.1, 0.3, 1.0):
        model = HistGradientBoostingRegressor(learning_rate=rate, **options)
        yield f"rate {rate}", MultiOutputRegressor(model).fit(x, y).predict


@on_logs
def decision_tree(args, x, y):
    from sklearn.tree import DecisionTreeRegressor
    for depth in (5, 10, 15, 20, 25):
        model = DecisionTreeRegressor(max_depth=depth, random_state=args.seed)
        yield f"depth {depth}", model.fit(x, y).predict


@on_logs
def nearest_neighbours(args, x, y):
    from sklearn.neighbors import KNeighborsRegressor
    for k in (3, 5, 10, 15, 20, 25):
        yield f"{k} neighbours", KNeighborsRegressor(k).fit(x, y).predict


@on_logs
def dense_network(args, x, y):
    mean, std = y.mean(0), y.std(0) + 1e-6
    answer = eqx.filter_jit(lambda net, x: jax.vmap(net)(x))
    nets = train(regression_loss, x.shape[1], (y - mean) / std, x, plan(args))
    for epoch, net in enumerate(nets, 1):
        yield f"epoch {epoch}", lambda x, net=net: np.asarray(answer(net, x)) * std + mean


REGRESSIONS = {
    "linear regression": linear_regression, "gradient boosting": gradient_boosting,
    "decision tree": decision_tree, "k nearest neighbours": nearest_neighbours,
    "dense network": dense_network}
MODELS = REGRESSIONS | {"flow matching": flow_matching, "lookup": lookup}


def fit(model, args, training, validation):
    """(setting, predict) of the best candidate, from pairs (particles, sums)."""
    particles, sums = validation
    return min(model(args, *training), key=lambda found: metrics.wasserstein(sums, found[1](particles)))


def check_parts(parts):
    """UserError where the training, validation or test rows are less than 25 (of 25 neighbours)."""
    if min(map(len, parts)) < 25:
        rows = sum(map(len, parts))
        raise UserError(f"{rows} rows are too few, expected 25 to train, to validate and to test")


def pair(dataset):
    """(particles (N, 9), channel sums (N, 5)) of a data set, in the papers' convention."""
    return dataset.particles, metrics.channels(dataset.responses)


def direct_estimates(dataset, name, seed=0):
    """W of the five regressions of [FM, Table 6] for detector `name` on the test rows of split_rows. They are
    no generative models, so they tell how hard a data set is."""
    args = parse(["--detector", name, "--seed", str(seed), "--quiet"])
    parts = data.split_rows(len(dataset.pdg), seed)
    check_parts(parts)
    training, validation, (particles, truth) = (pair(data.select(dataset, rows)) for rows in parts)
    found = {label: fit(model, args, training, validation)[1] for label, model in REGRESSIONS.items()}
    return {label: metrics.wasserstein(truth, predict(particles)) for label, predict in found.items()}


# ------------------------------------------------------------------------------------------------------- main

def scores(truth, found):
    """W and MAE of channel sums (N, 5)."""
    return {"W": metrics.wasserstein(truth, found), "MAE": metrics.mae(truth, found)}


def reference(args, dataset):
    """Scores of the simulator run again; with --data, which has none, of rows paired by equal particle."""
    particles, truth = pair(dataset)
    if args.data is None:
        return scores(truth, metrics.channels(metrics.resimulate(args.detector, dataset)))
    left, right = metrics.pair_rows(data.unique_particles(particles)[0], args.seed)
    return scores(truth[left], truth[right]) if len(left) else dict.fromkeys(("W", "MAE"), np.nan)


def report(args, name, setting, seconds, found):
    """Print a row of the table; return its entry in metrics.json. found: {"seen": (scores, oracle's)}."""
    published = PUBLISHED.get(name, (None, None))[args.detector == "zp"]
    label = "floor" if args.data else "oracle"
    entry = {test: {score: metrics.cell([ours[score]], [floor[score]], label) for score in ours}
             for test, (ours, floor) in found.items()}
    cells = [entry.get(test, {}).get(score, {}).get(key) for test in ("seen", "unseen")
             for score, key in (("W", "value"), ("W", "R"), ("MAE", "value"))]
    numbers = published, *cells, seconds
    texts = "".join("        -" if number is None else f"{number:9.2f}" for number in numbers)
    print(f"{name:<21}{texts}  {setting}", flush=True)
    return {"published": published, "setting": setting, "fit_seconds": seconds, **entry}


def main(argv=None):
    """Fit and score every model. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    dataset, parts = data.open_split(args)
    check_parts(parts)
    training, validation = (pair(data.select(dataset, rows)) for rows in parts[:2])
    tests = {name: (*pair(test), reference(args, test))
             for name, test in data.test_sets(args, dataset, parts).items()}
    sets = {"train": training, "validation": validation, **tests}
    rows = {name: len(part[0]) for name, part in sets.items()}
    sizes = ", ".join(f"{n} {name} rows" for name, n in rows.items())
    print(f"{args.detector.upper()}, channel sums; {sizes}")
    titles = ("paper W", "W", "R", "MAE", "unseen W", "R", "MAE", "fit s")
    print(f"{'model':<21}" + "".join(f"{title:>9}" for title in titles))
    floors = {name: (floor, floor) for name, (*_, floor) in tests.items()}
    setting = "half by half" if args.data else "oracle"
    models = {"original data": report(args, "original data", setting, None, floors)}
    for name, model in MODELS.items():
        began = time.perf_counter()
        setting, predict = fit(model, args, training, validation)
        seconds = time.perf_counter() - began
        found = {test: (scores(truth, predict(particles)), floor)
                 for test, (particles, truth, floor) in tests.items()}
        models[name] = report(args, name, setting, seconds, found)
    result = {"script": "channels", "detector": args.detector, "command": args.command,
              "versions": common.versions(), "device": common.device_name(), "flags": args.header["flags"],
              "rows": rows, "models": models}
    files.write_json(args.run / "metrics.json", result)
    print(f"written: {args.run}/metrics.json")
    return result


if __name__ == "__main__":
    common.run(main)
