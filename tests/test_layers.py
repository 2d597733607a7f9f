"""layers.py against the same functions by definition: values, gradients, and batches of every size."""
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
import papers

KEY = jax.random.key(0)


def by_definition(x, kernel, stride):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)


def softmax_attention(qkv, heads):
    q, k, v = jnp.moveaxis(qkv.reshape(len(qkv), 3, heads, -1), 0, 2)
    scores = jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k) / np.sqrt(q.shape[-1]))
    return jnp.einsum("hqk,hkd->qhd", scores, v).reshape(len(qkv), -1)


def same(found, expected):
    """Trees that agree to 1e-5 of the largest number of each leaf."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * (jnp.abs(b).max() + 1e-6))


def with_gradient(function, *args):
    """Values of a function and its gradients for a fixed random direction."""
    values, back = jax.vjp(function, *args)
    return values, back(jax.random.normal(KEY, values.shape))


@pytest.mark.parametrize("shape, stride", [((7, 9), 1), ((8, 6), 2), ((7, 9), 2), ((8, 9), 2)])
def test_convolution_and_its_gradient(shape, stride):
    x, kernel = jax.random.normal(KEY, (3, *shape, 4)), jax.random.normal(KEY, (3, 3, 4, 5))
    batch = jax.vmap(partial(layers.convolve_in_loop, stride=stride), (0, None))
    same(with_gradient(batch, x, kernel), with_gradient(partial(by_definition, stride=stride), x, kernel))


def test_attention_and_its_gradient():
    qkv = jax.random.normal(KEY, (20, 24))
    same(with_gradient(partial(layers.attend, heads=2), qkv),
         with_gradient(partial(softmax_attention, heads=2), qkv))


def test_large_scores_do_not_overflow():
    """Scores of 10 000; they are whole numbers, or rounding would blur them."""
    qkv = jnp.round(100 * jax.random.normal(KEY, (20, 24)))
    same(layers.attend(qkv, 2), softmax_attention(qkv, 2))


@pytest.mark.parametrize("size", [1, 6, 8, 12])
def test_a_batch_in_blocks(monkeypatch, size):
    """Blocks of 4, 2 or 1: what is shared has one gradient, and what is not has its own."""
    monkeypatch.setattr(layers, "CACHE", 100)
    function = lambda w, x, t: jnp.tanh(x @ w["a"]) * t
    blocks = lambda *args: layers.in_blocks(function, 25, *args)
    args = {"a": jax.random.normal(KEY, (3, 2))}, jax.random.normal(KEY, (size, 3)), jnp.float32(0.7)
    for axes in ((None, 0, None), (None, 0, 0)):
        given = (*args[:2], args[2] if axes[2] is None else jnp.arange(1.0, size + 1))
        found, expected = (jax.jit(partial(with_gradient, jax.vmap(f, axes))) for f in (blocks, function))
        same(found(*given), expected(*given))


def test_the_unet_of_a_batch_is_that_of_its_examples(monkeypatch):
    """In blocks within blocks, with the convolutions and attention above, and without any of them."""
    make = lambda: papers.ResponseUNet(4, 2, KEY, widths=(4, 6, 8))
    net = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(KEY, leaf.shape), make())
    x, c, t = jax.random.normal(KEY, (4, 10, 7)), jax.random.normal(KEY, (4, 4)), jnp.linspace(0, 1, 4)
    arrays, rest = eqx.partition(net, eqx.is_array)
    batch = lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x, t, c)
    monkeypatch.setattr(layers, "CACHE", 2 * 32 * 70)
    found = jax.jit(partial(with_gradient, batch))(arrays, x)
    monkeypatch.setattr(layers, "convolve_on_cpu", layers.convolve)
    monkeypatch.setattr(papers, "attend", softmax_attention)
    monkeypatch.setattr(papers, "in_blocks", lambda function, numbers, *args: function(*args))
    same(found, jax.jit(partial(with_gradient, batch))(arrays, x))
