"""Which particles give light: the distribution of the photon sum of a run, up to the cut.

The papers' data hold no response of less than 10 photons, so every model here gives light to every particle.
Most particles of an event miss. This network gives a particle c probabilities of the photon sum n of a run:
    P(n | c) = softmax of 11 numbers,  n = 0, 1, ..., 9 and "10 or more"             L = -log P(n | c)
`--generate` of the other scripts draws n first: an empty response for 0, one of the model for 10 or more, and
in between n single photons, spread like the light of all such runs, for what no model has learnt.

    python hit.py --detector zn                      five minutes on two CPU cores, two of them to simulate
    python hit.py --detector zn --data complete.h5   on a complete list: HDF5 with the empty responses in it

Prints how well the probabilities to pass the cut are calibrated, beside the simulator's own rates; ends with
`written: runs/hit-zn/`. The network of weights/ also decides in exported models, see export.py.
"""
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import common
import data
import files
import orientation
import simulator
from common import MLP, UserError
from simulator import CUT, DETECTORS, Detector

RUNS, TESTED = 100, 2000   # of each tested particle, and tested particles
BINS = 10                  # of the reliability curve


# ------------------------------------------------------------------------------------------------------ flags

def parse(argv):
    """The resolved flags of the command line."""
    names = "detector", "data", "axes", "n", "epochs", "batch_size", "lr", "seed", "resume", "quiet", "run"
    parser = common.parser(__doc__, "hit", names, n=500_000, epochs=10, batch_size=1024, lr=3e-3)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------- data

def runs_before_the_cut(name, n, seed, fresh=False, copies=1, quiet=False):
    """n runs of random particles, `copies` of each, without the cut: particles (n, 9), photon sums (n,) of at
    most CUT, and the light (H, W) of all runs with a lower sum. Every block of 2000 runs has another list of
    particles, about a thousand of which occur; none of the `fresh` lists is in the others."""
    detector, found, faint = DETECTORS[name], [], 0
    rng = np.random.default_rng([simulator.VERSION, seed, int(fresh), 10 + sorted(DETECTORS).index(name)])
    for block in common.progress(-(-n // simulator.BLOCK), f"simulating {name.upper()} runs", quiet):
        particles, pdg, weights = simulator.primaries(1000 * (1 + seed) + block, fresh)
        which = np.repeat(rng.choice(len(pdg), simulator.BLOCK // copies, p=weights), copies)
        responses = simulator.run_uncut(rng, detector, particles[which], pdg[which])
        sums = responses.sum((1, 2))
        faint = faint + responses[sums < CUT].sum(0)
        found.append((particles[which], np.minimum(sums, CUT)))
    particles, sums = (np.concatenate(parts)[:n] for parts in zip(*found))
    return particles, sums, faint


def complete_list(args):
    """The same of the training rows of --data, and (particles, sums) of its test rows. UserError without
    runs that miss."""
    dataset = data.load(args.data, args.detector)
    split = data.split_rows(len(dataset.pdg), args.seed)
    dataset = data.turned(args, dataset, split.train)
    sums = np.minimum(data.photon_sums(dataset.responses), CUT)
    if (sums == CUT).all():
        raise UserError(f"{args.data}: no response has less than {CUT} photons, expected all runs of a list")
    below = split.train[sums[split.train] < CUT]
    faint = sum(dataset.responses[below[k:k + 8192]].sum(0) for k in range(0, len(below), 8192))
    parts = [(dataset.particles[rows], sums[rows]) for rows in (split.train, split.test)]
    return *parts[0], faint, parts[1]


# -------------------------------------------------------------------------------------------------- objective

def log_score(net, n, c):
    """-log P(n | c) in nats of one photon sum n <= CUT of a particle c (C,)."""
    return optax.softmax_cross_entropy_with_integer_labels(net(c), n)


def batch_loss(net, n, c, key):
    """Mean over sums n (B,) and conditions c (B, C), and its parts."""
    loss = jax.vmap(partial(log_score, net))(n, c).mean()
    return loss, {"log score": loss}


# ---------------------------------------------------------------------------------------------------- sampler

def sample(net, c, key):
    """Photon sums (B,) of conditions c (B, C), CUT for those that pass."""
    return jax.random.categorical(key, jax.vmap(net)(c))


def single_photons(sums, light, rng):
    """Responses uint16 (N, H, W) of `sums` (N,) photons below the cut, one by one at random fibres, each as
    often as it has its share of `light` (H, W)."""
    light = light if light.any() else np.ones_like(light)
    flat = np.zeros((len(sums), light.size), np.uint16)
    rows = np.repeat(np.arange(len(sums)), sums)
    np.add.at(flat, (rows, rng.choice(light.size, len(rows), p=light.ravel() / light.sum())), 1)
    return flat.reshape(-1, *light.shape)


def probabilities(net, c):
    """P(n | c), (B, CUT + 1), of conditions c (B, C)."""
    return jax.nn.softmax(jax.vmap(net)(c))


def open_hit(path, name, axes):
    """The network of a checkpoint for detector `name`, its Scaler and its Axes, `axes` if it has none."""
    header = common.read_model_header(path, "hit", name, ())
    own = orientation.Axes(**header["axes"]) if "axes" in header else axes
    return common.load_model(path, partial(Hit, DETECTORS[name])), data.stored_scaler(header), own


def with_misses(generate, path, name, seed, axes):
    """generate(particles (N, 9), number) -> uint16 (N, H, W), as that of metrics.generator, for the particles
    alone that pass the cut. The network of the checkpoint `path` draws which do, and the others' sums."""
    net, scaler, own = open_hit(path, name, axes)
    draw = eqx.filter_jit(eqx.Partial(sample, net))

    def generate_all(particles, number):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), 2**31)  # no block's
        sums = common.in_blocks(draw, key, data.conditions(own.move(particles), scaler))
        passed, rng = sums == CUT, np.random.default_rng([seed, number])
        responses = own.write(single_photons(np.where(passed, 0, sums), np.asarray(net.light, float), rng))
        if passed.any():
            responses[passed] = generate(particles[passed], number)
        return responses

    return generate_all


# --------------------------------------------------------------------------------------------------- training

# same as fm.py: make_step
def make_step(loss, optimiser, plan):
    """step((*arrays, key, number), state) -> (state, losses): gradient, update and averages, compiled."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, state):
        *arrays, key, number = batch
        key = jax.random.fold_in(key, number)
        objective = lambda net: loss(common.lower(net, plan.precision), *arrays, key)
        gradient, losses = eqx.filter_grad(objective, has_aux=True)(state.net)
        weights = eqx.filter(state.net, eqx.is_inexact_array)
        updates, optimiser_state = optimiser.update(gradient, state.optimiser, weights)
        net = eqx.apply_updates(state.net, updates)
        ema = common.moving_average(state.ema, net, plan.ema, number)
        return common.State(net, ema, optimiser_state), losses | {"gradient norm": optax.tree.norm(gradient)}

    return step


# same as fm.py: train
def train(net, loss, arrays, rows, plan):
    """Minimise loss(net, *batch, key) on the given rows of `arrays`, each (N, ...).

    Returns the network of averaged weights and {"train_seconds", "step_seconds"}. Order and noise follow from
    --seed and the number of the step, so that a run continued with --resume ends in the same numbers.
    """
    steps = plan.epochs * (len(rows) // plan.batch_size)
    mesh, optimiser, key = common.batch_mesh(plan.devices), common.adamw(plan, steps), plan.keys[1]
    step = make_step(loss, optimiser, plan)
    with common.Logbook(plan, len(rows), steps) as book:
        state = common.replicate(book.begin(common.first_state(net, optimiser)), mesh)
        for batch in common.batches(arrays, rows, plan, mesh, book.step):
            state, losses = step((*batch, key, np.int32(book.step)), state)
            book.record(state, losses)
    return state.ema, book.end()


# ---------------------------------------------------------------------------------------------------- network

class Hit(eqx.Module):
    """Condition c (C,) -> logits (CUT + 1,) of the photon sum. `light` (H, W) is that of runs below the cut,
    counted, not trained."""
    net: MLP
    light: jax.Array
    detector: Detector = eqx.field(static=True)

    def __init__(self, detector, key, width=128):
        self.detector, self.light = detector, jnp.zeros(detector.shape)
        inputs = len(self.features(jnp.zeros(data.CONDITIONS["physics"])))
        self.net = MLP(key, inputs, width, width, width, CUT + 1)

    def features(self, c):
        """Like data.features, with waves of all: there are a hundred times as many particles."""
        angles = jnp.outer(2.0 ** jnp.arange(3), c[7:]).ravel()
        falls = data.vicinity(c, self.detector, 4)[1].sum((0, 2))
        return jnp.concatenate([c[7:], jnp.sin(angles), jnp.cos(angles), jnp.log(falls + 1e-3) / 2])

    def __call__(self, c):
        return self.net(self.features(c)).astype(jnp.float32)


# ----------------------------------------------------------------------------------------------------- scores

def calibration(q, passed):
    """Scores of probabilities q (T,) for runs that passed the cut or not, bool (T, K), lower is better: Brier
    score, log score in nats, the rates, and the reliability curve, [mean q, rate, particles] in bins of q.
    The oracle of K > 1 runs of a particle is its own rate, for the log score at best by 1 / 2K too good."""
    runs, rate = passed.shape[1], passed.mean(1)
    log = lambda q: np.log(np.maximum(q, 1e-9))
    nats = lambda q: -(rate * log(q) + (1 - rate) * log(1 - q)).mean()
    scores, oracle = {"Brier score": np.square(q[:, None] - passed).mean(), "log score": nats(q)}, {}
    if runs > 1:
        oracle = {"Brier score": (rate * (1 - rate)).mean() * runs / (runs - 1), "log score": nats(rate)}
    bins = np.minimum((q * BINS).astype(int), BINS - 1)
    masks = [bins == k for k in np.unique(bins)]
    curve = [[q[mask].mean(), rate[mask].mean(), np.count_nonzero(mask)] for mask in masks]
    found = {name: {"value": value, "oracle": oracle.get(name)} for name, value in scores.items()}
    return found | {"passed": {"value": q.mean(), "real": rate.mean()}, "reliability": curve}


def print_scores(scores):
    """Print what `calibration` returns."""
    for name in ("Brier score", "log score"):
        oracle = scores[name]["oracle"]
        print(f"{name:<12}{scores[name]['value']:8.4f}" + (f"   (oracle {oracle:.4f})" if oracle else ""))
    print("pass the cut: {value:.4f} (runs: {real:.4f}); by probability:".format(**scores["passed"]))
    for q, rate, count in scores["reliability"]:
        print(f"    {q:.3f} {rate:.3f}  {count} particles")


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    """Train and score. Returns what metrics.json holds."""
    args = parse(argv)
    common.prepare_jax()
    if args.data:
        particles, sums, light, (tested, runs) = complete_list(args)
        runs = runs[:, None]
    else:
        particles, sums, light = runs_before_the_cut(args.detector, args.n, args.seed, quiet=args.quiet)
        tested, runs, _ = runs_before_the_cut(args.detector, RUNS * TESTED, args.seed, True, RUNS, args.quiet)
        tested, runs = tested[::RUNS], runs.reshape(-1, RUNS)
    data.check_batch(args.batch_size, len(sums))
    plan = common.Plan(args.header, args.run, args.epochs, args.batch_size, args.lr, seed=args.seed,
                       resume=args.resume, quiet=args.quiet)
    scaler = data.fit_conditions(particles, "physics")
    arrays, rows = (sums.astype(np.int32), data.conditions(particles, scaler)), np.arange(len(sums))
    net, times = train(Hit(DETECTORS[args.detector], plan.keys[0]), batch_loss, arrays, rows, plan)
    net = eqx.tree_at(lambda net: net.light, net, jnp.asarray(light / max(light.max(), 1), jnp.float32))
    net = common.save_model(args.run, args.header, scaler, times, net)
    found = eqx.filter_jit(probabilities)(net, data.conditions(tested, scaler))
    scores = calibration(np.asarray(found)[:, CUT], runs == CUT)
    print_scores(scores)
    result = {"script": "hit", "detector": args.detector, "command": args.command,
              "versions": common.versions(), "device": common.device_name(),
              "rows": {"train": len(sums), "test": runs.size},
              "parameters": common.count_parameters(net.net), **times, **scores}
    files.write_json(args.run / "metrics.json", result)
    print(f"written: {args.run}/")
    return result


if __name__ == "__main__":
    common.run(main)
