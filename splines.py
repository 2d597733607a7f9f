"""Monotonic rational quadratic splines (Durkan et al. 2019) of x (...), each with numbers (..., NUMBERS)."""
import math

import jax
import jax.numpy as jnp

BINS, BOX, LEAST = 8, 6.0, 1e-3   # bins, half width of the box, least width, height and slope
NUMBERS = 3 * BINS - 1            # widths, heights, slopes at the inner knots


def knots(raw):
    """Knots from -BOX to BOX, (..., BINS + 1), of numbers (..., BINS)."""
    widths = LEAST + (1 - BINS * LEAST) * jax.nn.softmax(raw)
    return 2 * BOX * jnp.pad(jnp.cumsum(widths, axis=-1), [(0, 0)] * (raw.ndim - 1) + [(1, 0)]) - BOX


def find_bin(x, numbers, inverse=False):
    """x_0, x_1, y_0, y_1 and the slopes d_0, d_1 at the ends of the bin that each x (...), or y, is in."""
    xs, ys, slopes = jnp.split(numbers, [BINS, 2 * BINS], axis=-1)
    xs, ys, slopes = knots(xs), knots(ys), jnp.pad(slopes, [(0, 0)] * x.ndim + [(1, 1)])
    left = jnp.sum(x[..., None] >= (ys if inverse else xs)[..., 1:-1], axis=-1, keepdims=True)
    x0, x1, y0, y1, *ends = (jnp.take_along_axis(a, knot, -1)[..., 0]
                             for a in (xs, ys, slopes) for knot in (left, left + 1))
    # a slope of 1 for the number 0, as in the lines outside the box
    return x0, x1, y0, y1, *(LEAST + jax.nn.softplus(d + math.log(math.expm1(1 - LEAST))) for d in ends)


def spline(x, numbers):
    """y (...) and log dy/dx (...) of x (...); the identity outside the box."""
    x0, x1, y0, y1, d0, d1 = find_bin(x, numbers)
    slope, t = (y1 - y0) / (x1 - x0), jnp.clip((x - x0) / (x1 - x0), 0, 1)
    below = slope + (d1 + d0 - 2 * slope) * t * (1 - t)
    y = y0 + (y1 - y0) * (slope * t**2 + d0 * t * (1 - t)) / below             # [Durkan et al., Eq. 4]
    rise = d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t)**2
    log_slope = 2 * jnp.log(slope / below) + jnp.log(rise)                     # [Durkan et al., Eq. 5]
    inside = jnp.abs(x) < BOX
    return jnp.where(inside, y, x), jnp.where(inside, log_slope, 0.0)


def inverse_spline(y, numbers):
    """x (...) whose y of `spline` is given."""
    x0, x1, y0, y1, d0, d1 = find_bin(y, numbers, inverse=True)
    slope, rise = (y1 - y0) / (x1 - x0), jnp.clip(y - y0, 0, y1 - y0)
    mixed = rise * (d1 + d0 - 2 * slope)
    a, b, c = (y1 - y0) * (slope - d0) + mixed, (y1 - y0) * d0 - mixed, -slope * rise
    t = 2 * c / (-b - jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0)))              # [Durkan et al., Eq. 6 to 8]
    return jnp.where(jnp.abs(y) < BOX, x0 + jnp.clip(t, 0, 1) * (x1 - x0), y)
