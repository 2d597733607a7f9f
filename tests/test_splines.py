"""splines.py: by its definition, monotonic, undone by its inverse."""
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st
from scipy import optimize

import splines
from splines import NUMBERS

spline, inverse_spline = jax.jit(splines.spline), jax.jit(splines.inverse_spline)


def numbers_like(rows, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (rows, NUMBERS)).astype(np.float32)


def exact(x, numbers):
    """The spline of Gregory and Delbourgo by its definition, a number at a time, float64."""
    softmax = lambda n: np.exp(n) / np.exp(n).sum()
    knots = [np.append(0, np.cumsum(1e-3 + (1 - 8e-3) * softmax(np.float64(part)))) * 12 - 6
             for part in (numbers[:8], numbers[8:16])]
    slopes = 1e-3 + np.logaddexp(0, np.float64(numbers[16:]) + math.log(math.expm1(1 - 1e-3)))
    if not -6 < x < 6:
        return x
    k = np.searchsorted(knots[0], x) - 1
    (x0, x1), (y0, y1), (d0, d1) = (a[k:k + 2] for a in (*knots, [1, *slopes, 1]))
    s, t = (y1 - y0) / (x1 - x0), (x - x0) / (x1 - x0)
    return y0 + (y1 - y0) * (s * t**2 + d0 * t * (1 - t)) / (s + (d0 + d1 - 2 * s) * t * (1 - t))


def test_spline_is_its_definition():
    """Values, slopes by differences, and the inverse by bisection."""
    x, numbers, h = np.float32(np.random.default_rng(1).uniform(-7, 7, 200)), numbers_like(200), 1e-6
    y, log_slope = spline(x, numbers)
    x = np.float64(x)
    np.testing.assert_allclose(y, [exact(a, n) for a, n in zip(x, numbers)], atol=2e-4)
    slope = [(exact(a + h, n) - exact(a - h, n)) / (2 * h) for a, n in zip(x, numbers)]
    np.testing.assert_allclose(log_slope, np.log(slope), atol=5e-3)
    mild = 0.5 * numbers                                                       # flat ones leave x unsure
    found = inverse_spline(np.float32(x), mild)
    expected = [optimize.bisect(lambda a: exact(a, n) - b, -8, 8, xtol=1e-9) for b, n in zip(x, mild)]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_spline_rises_and_is_undone(seed, scale):
    x, numbers = jnp.linspace(-8, 8, 321), numbers_like(1, seed, scale).repeat(321, axis=0)
    y, log_slope = spline(x, numbers)
    assert (jnp.diff(y) > -1e-6).all() and jnp.isfinite(log_slope).all()       # 1e-6: float32, where flat
    np.testing.assert_array_equal(y[jnp.abs(x) >= 6], x[jnp.abs(x) >= 6])
    np.testing.assert_allclose(spline(inverse_spline(y, numbers), numbers)[0], y, atol=3e-4)


def test_spline_of_zeros_is_the_identity():
    x = np.linspace(-7, 7, 200, dtype=np.float32)
    y, log_slope = spline(x, np.zeros((200, NUMBERS), np.float32))
    np.testing.assert_allclose(y, x, atol=1e-5)
    np.testing.assert_allclose(log_slope, 0, atol=1e-5)


def test_gradients_of_the_spline_stay_finite():
    x = jnp.array([-1e4, -6.0, -5.999, 0.0, 5.999, 6.0, 1e4])
    gradient = jax.jit(jax.grad(lambda x, n: sum(part.sum() for part in splines.spline(x, n)), (0, 1)))
    for scale in (0, 1, 30):
        assert all(jnp.isfinite(g).all() for g in gradient(x, numbers_like(7, scale=scale)))
