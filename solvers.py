"""Solvers of dx/dt = v(x, t) from noise at t = 0 to data at t = 1, given as tables of numbers.

A non-stationary solver of N evaluations makes its steps from x_0 and all velocities so far [CaloDREAM]:
    x_(i+1) = a_i x_0 + sum_(j <= i) b_ij v(x_j, t_j)                                              (Eq. 15)
The methods of Runge and Kutta are of this kind, and so are bespoke solvers, whose numbers are fitted to a
given velocity: as few evaluations as after a distillation, but the network stays as it is.

    solver = runge_kutta("midpoint", steps=10)          x = integrate(v, x0, solver)
    solver = fit(v, x0, c, steps=8, how="bns")          for v(x, t, c) of a batch
"""
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Solver(NamedTuple):
    """A solver of N evaluations: times (N,), a (N,) and b (N, N), lower triangular [CaloDREAM, Eq. 15]."""
    times: jax.Array
    a: jax.Array
    b: jax.Array


# Nodes c, weights of the intermediate points and of the step of a Runge-Kutta method
METHODS = {"euler": ((0,), (), (1,)), "midpoint": ((0, 1 / 2), ((1 / 2,),), (0, 1)),
           "rk4": ((0, 1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))}


def runge_kutta(method, steps):
    """The Solver of a Runge-Kutta method with equal steps."""
    nodes, inner, last = METHODS[method]
    stages, h = len(nodes), 1 / steps
    times, b = np.zeros(stages * steps), np.zeros((stages * steps,) * 2)
    for i in range(stages * steps):
        step, stage = divmod(i, stages)
        times[i] = h * (step + nodes[stage])
        b[i, :step * stages] = np.tile(last, step) * h                         # whole steps so far
        weights = (*inner, last)[stage]
        b[i, step * stages:step * stages + len(weights)] = h * np.array(weights)
    return Solver(*(jnp.asarray(x, jnp.float32) for x in (times, np.ones(len(times)), b)))


class Solved(eqx.Module):
    """A generative model: a network and the solver that is fitted to it."""
    net: eqx.Module
    solver: Solver


def unfitted(make, steps, key):
    """The network make(key) with the method of Euler, of the same shapes as a Solved one of `steps`."""
    return Solved(make(key), runge_kutta("euler", steps))


def integrate(v, x0, solver, unroll=1):
    """Follow dx/dt = v(x, t) from noise x_0 at t = 0 to data at t = 1; all velocities are kept."""
    def step(carry, row):
        x, seen = carry
        i, t, a, b = row
        seen = seen.at[i].set(v(x, t))
        return (a * x0 + jnp.tensordot(b, seen, 1), seen), None                # [CaloDREAM, Eq. 15]

    seen = jnp.zeros((len(solver.times), *x0.shape))
    return jax.lax.scan(step, (x0, seen), (jnp.arange(len(seen)), *solver), unroll=unroll)[0][0]


# ------------------------------------------------------------------------------------------- bespoke solvers

FITTED = 128       # particles whose paths a solver is fitted to
ITERATIONS = 200   # of Adam, for either error


def trajectories(v, x0, points=33):
    """x and v (points, ...) at equal times of trajectories that start at x_0: midpoint method, four steps
    from one point to the next."""
    times, h = jnp.linspace(0, 1, points), 1 / (4 * (points - 1))

    def advance(x, t):
        return x + h * v(x + h / 2 * v(x, t), t + h / 2), None

    def segment(x, t):
        after, _ = jax.lax.scan(advance, x, t + h * jnp.arange(4))
        return after, (x, v(x, t))

    last, (xs, vs) = jax.lax.scan(segment, x0, times[:-1])
    return jnp.append(xs, last[None], axis=0), jnp.append(vs, v(last, jnp.float32(1))[None], axis=0)


def between(xs, vs, t):
    """x and v (...) of trajectories at the time t, by cubic Hermite polynomials, and linear."""
    cells = len(xs) - 1
    i = jnp.clip(jnp.floor(t * cells).astype(int), 0, cells - 1)
    s, rise = t * cells - i, xs[i + 1] - xs[i]
    bend = s * (1 - s)**2 * vs[i] - s**2 * (1 - s) * vs[i + 1]
    return xs[i] + s**2 * (3 - 2 * s) * rise + bend / cells, (1 - s) * vs[i] + s * vs[i + 1]


def make_times(theta):
    """Times (N + 1,) from 0 to 1 that rise, from N free numbers."""
    widths = jnp.abs(theta) / jnp.abs(theta).sum()
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(widths)])


def local_fit(theta, xs, vs):
    """The local error [CaloDREAM, Eq. 17], and the Solver with the times of `theta` that minimises it. With
    velocities on the reference, each step is a linear least squares problem for a_i and b_ij."""
    times, n = make_times(theta), len(theta)
    points = [between(xs, vs, t) for t in times]
    basis = jnp.stack([points[0][0].ravel(), *(v.ravel() for _, v in points[:-1])])             # (N + 1, M)
    targets = jnp.stack([x.ravel() for x, _ in points[1:]])                                     # (N, M)
    gram, mixed = basis @ basis.T / basis.shape[1], basis @ targets.T / basis.shape[1]
    a, b, error = [], jnp.zeros((n, n)), 0.0
    for i in range(n):
        k = i + 2                                                              # x_0 and v_0 ... v_i
        weights = jnp.linalg.solve(gram[:k, :k] + 1e-5 * jnp.eye(k), mixed[:k, i])
        error += jnp.mean((targets[i] - weights @ basis[:k])**2)               # [CaloDREAM, Eq. 17]
        a.append(weights[0])
        b = b.at[i, :k - 1].set(weights[1:])
    return error, Solver(times[:-1], jnp.stack(a), b)


def global_error(parameters, v, x0, ends):
    """Mean squared distance of the end points [CaloDREAM, Eq. 16]."""
    theta, a, b = parameters
    solver = Solver(make_times(theta)[:-1], a, jnp.tril(b))
    return jnp.mean((integrate(v, x0, solver) - ends)**2), solver


def descend(loss, parameters, rate, batches):
    """Adam on loss(parameters, *batches(k)) -> (value, Solver); the last Solver."""
    adam = optax.adam(optax.cosine_decay_schedule(rate, ITERATIONS))
    step, state = eqx.filter_jit(jax.grad(loss, has_aux=True)), adam.init(parameters)
    for k in range(ITERATIONS):
        gradient, solver = step(parameters, *batches(k))
        updates, state = adam.update(gradient, state)
        parameters = optax.apply_updates(parameters, updates)
    return solver


def fit(v, x0, c, steps, how, batch=32):
    """A bespoke Solver of `steps` evaluations for v(x, t, c), fitted to trajectories from noise x0 (M, ...)
    for conditions c (M, ...). `how`: "bns" minimises the local error, "bns-global" goes on from there by the
    error of the end points."""
    run = eqx.filter_jit(lambda x0, c: trajectories(lambda x, t: v(x, t, c), x0))
    parts = [run(x0[k:k + batch], c[k:k + batch]) for k in range(0, len(c), batch)]
    xs, vs = (jnp.concatenate(part, axis=1) for part in zip(*parts))           # (points, M, ...)
    # as arguments: XLA would fold constants of their size for minutes
    solver = descend(local_fit, jnp.full(steps, 1 / steps), 0.1 / steps, lambda k: (xs, vs))
    if how == "bns":
        return solver
    theta = jnp.diff(jnp.append(solver.times, 1.0))
    rows = lambda k: [array[np.arange(k * batch, (k + 1) * batch) % len(c)] for array in (x0, c, xs[-1])]
    loss = lambda numbers, x0, c, ends: global_error(numbers, lambda x, t: v(x, t, c), x0, ends)
    return descend(loss, (theta, solver.a, solver.b), 1e-3, rows)
