"""solvers.py: Runge-Kutta methods against plain loops, bespoke solvers against those and against chance."""
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.linalg import expm

import solvers

RNG = np.random.default_rng(0)
A = np.array([[-0.8, -2.0], [2.4, -0.3]], np.float32)
N = 6                                                                          # evaluations


def turning(x, t, c):
    """A linear velocity that turns, faster and faster, around a point that depends on c."""
    return x @ A.T * (1 + t) + c


def ends(x0, c):
    """Where it leads: e^(A s(1)) x_0 + the integral of e^(A (s(1) - s(t))) c, with s = t + t^2 / 2."""
    t, weights = np.polynomial.legendre.leggauss(20)
    s = (t + 1) / 2 + (t + 1)**2 / 8
    return x0 @ expm(1.5 * A).T + c @ np.einsum("t,tij->ji", weights / 2, expm(A * (1.5 - s)[:, None, None]))


def curved(x, t):
    return jnp.sin(3 * x) + x * t**2


def loop(method, x, steps):
    """A Runge-Kutta method as a textbook prints it."""
    h = 1 / steps
    for t in np.arange(steps) * h:
        k1 = curved(x, t)
        k2 = curved(x + h / 2 * k1, t + h / 2)
        k3 = curved(x + h / 2 * k2, t + h / 2)
        k4 = curved(x + h * k3, t + h)
        x = x + h * {"euler": k1, "midpoint": k2, "rk4": (k1 + 2 * k2 + 2 * k3 + k4) / 6}[method]
    return x


@pytest.mark.parametrize("method", solvers.METHODS)
@pytest.mark.parametrize("steps", [1, 5])
def test_tables_are_the_methods(method, steps):
    x0, solver = jnp.array([[0.3, -2.0, 1.1], [0.0, 4.0, -0.6]]), solvers.runge_kutta(method, steps)
    np.testing.assert_allclose(solvers.integrate(curved, x0, solver), loop(method, x0, steps), atol=1e-5)
    assert not np.triu(solver.b, 1).any()                                      # only velocities so far


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(method, order):
    def error(steps):
        x = solvers.integrate(lambda x, t: x @ A.T, jnp.eye(2), solvers.runge_kutta(method, steps))
        return np.abs(x - expm(A).T).max()
    assert math.log2(error(8) / error(16)) == pytest.approx(order, abs=0.35)


@pytest.fixture(scope="module")
def reference():
    """(x_0, c) of 48 trajectories of `turning`, with x and v on them."""
    x0, c = jnp.asarray(RNG.normal(size=(2, 48, 2)), jnp.float32)
    return x0, c, *solvers.trajectories(lambda x, t: turning(x, t, c), x0)


def test_trajectories(reference):
    x0, c, xs, vs = reference
    assert xs.shape == vs.shape == (33, 48, 2) and np.array_equal(xs[0], x0)
    np.testing.assert_allclose(xs[-1], ends(x0, c), atol=2e-3)
    np.testing.assert_allclose(vs[8], turning(xs[8], 0.25, c), atol=1e-5)


def test_between_two_points_a_cubic_is_exact():
    grid, cubic = np.linspace(0, 1, 5), np.polynomial.Polynomial([0.3, -2.0, 5.0, -4.0])
    xs, vs = (jnp.asarray(p(grid), jnp.float32) for p in (cubic, cubic.deriv()))
    for t in (0.0, 0.1, 0.25, 0.6, 0.99, 1.0):
        x, v = solvers.between(xs, vs, jnp.float32(t))
        assert x == pytest.approx(cubic(t), abs=1e-5) and v == pytest.approx(np.interp(t, grid, vs), abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10) | st.floats(-10, -0.01), min_size=5, max_size=5))
def test_times_rise_from_0_to_1(theta):
    times = solvers.make_times(jnp.array(theta, jnp.float32))
    assert times[0] == 0 and times[-1] == pytest.approx(1) and (np.diff(times) > 0).all()


def local_error(solver, xs, vs):
    """[CaloDREAM, Eq. 17]: errors of the steps with the velocities of the reference, summed."""
    points = [solvers.between(xs, vs, t) for t in jnp.append(solver.times, 1.0)]
    steps = np.multiply.outer(solver.a, xs[0]) + np.tensordot(solver.b, [v for _, v in points[:-1]], 1)
    return sum(float(np.mean((x - step)**2)) for (x, _), step in zip(points[1:], steps))


def test_straight_lines_have_no_local_error():
    x0, v = jnp.asarray(RNG.normal(size=(2, 48, 2)), jnp.float32)
    xs = x0 + jnp.linspace(0, 1, 33)[:, None, None] * v
    error, solver = solvers.local_fit(jnp.arange(1.0, N + 1), xs, jnp.broadcast_to(v, xs.shape))
    assert error < 1e-6
    np.testing.assert_allclose(solvers.integrate(lambda x, t: v, x0, solver), x0 + v, atol=1e-3)


def test_local_fit_is_the_least_error(reference):
    *_, xs, vs = reference
    error, solver = solvers.local_fit(jnp.full(N, 1 / N), xs, vs)
    assert error == pytest.approx(local_error(solver, xs, vs), abs=1e-6) and not np.triu(solver.b, 1).any()
    assert error < 0.5 * local_error(solvers.runge_kutta("euler", N), xs, vs)
    for scale in 12 * [0.01, 0.1]:
        a, b = (part + scale * RNG.normal(size=part.shape) for part in solver[1:])
        assert local_error(solver._replace(a=a, b=np.tril(b)), xs, vs) > error


def test_bespoke_solvers_beat_the_methods(reference):
    """On trajectories that the fit has not seen; the 48 that it has are no multiple of a batch of 20."""
    x0, c, *_ = reference
    bns, bns_global = (solvers.fit(turning, x0, c, N, how, batch=20) for how in ("bns", "bns-global"))
    x0, c = jnp.asarray(RNG.normal(size=(2, 500, 2)), jnp.float32)
    known = solvers.runge_kutta("euler", N), solvers.runge_kutta("midpoint", N // 2)
    assert all(len(solver.times) == N for solver in (*known, bns, bns_global))
    euler, midpoint, local, end = (
        float(jnp.mean((solvers.integrate(lambda x, t: turning(x, t, c), x0, solver) - ends(x0, c))**2))
        for solver in (*known, bns, bns_global))
    assert end < local < 0.1 * min(euler, midpoint)
