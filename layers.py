"""Layers for pictures of ONE example, channels last, (h, w, C), which train fast on a CPU.

For a whole batch at once, XLA's gradients of convolutions and attention over hundreds of tokens leave every
cache of a CPU. Accelerators get the plain operations.
"""
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

CACHE = 2**19  # float32 numbers, 2 MB: the caches of two cores


def convolve(x, kernel, stride=1):
    """3 x 3 convolution of x (H, W, C_in) with a kernel (3, 3, C_in, C_out), at a stride of 1 or 2. Channels
    last is the fast layout on a CPU."""
    layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    y = jax.lax.conv_general_dilated(x[None], kernel, strides, "SAME", dimension_numbers=layout)[0]
    return checkpoint_name(y, "kept")


def convolve_in_loop(x, kernel, stride=1):
    """The same, for networks that pass a batch in blocks."""
    return (convolve_on_cpu if jax.default_backend() == "cpu" else convolve)(x, kernel, stride)


def convolve_backward(stride, inputs, g):
    """Gradients for x and kernel from g (H, W, C_out), as one convolution and three matrix products: inside a
    loop XLA's own are 7 to 20 times slower on a CPU, though faster outside."""
    x, kernel = inputs
    # zeros in between make it the gradient of a convolution at stride 1
    between = [((n - 1) % stride, 0, stride - 1) for n in x.shape[:2]]
    g = jax.lax.pad(g, np.zeros((), g.dtype), [*between, (0, 0, 0)])
    columns = [jnp.pad(g, ((0, 0), (j, 2 - j), (0, 0))) for j in range(3)]
    columns = jnp.concatenate(columns, axis=-1)                                # (H, W + 2, 3 C_out)
    padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))                              # (H + 2, W + 2, C_in)
    rows = [jnp.einsum("hwi,hwo->io", padded[i:i + len(g)], columns) for i in range(3)]
    weights = jnp.stack(rows).reshape(3, x.shape[-1], 3, -1).swapaxes(1, 2)    # (3, 3, C_in, C_out)
    return convolve(g, kernel[::-1, ::-1].swapaxes(2, 3), 1), weights


convolve_on_cpu = jax.custom_vjp(convolve, nondiff_argnums=(2,))
convolve_on_cpu.defvjp(lambda x, kernel, stride: (convolve(x, kernel, stride), (x, kernel)),
                       convolve_backward)


def enlarge(x, shape):
    """x (h, w, C) at twice the size, each number four times, cut to `shape`."""
    return x.repeat(2, axis=0).repeat(2, axis=1)[:shape[0], :shape[1]]


def pixelwise(layer, x):
    """A layer for vectors on each place of x (h, w, C)."""
    return jax.vmap(jax.vmap(layer))(x)


def attend(qkv, heads):
    """Attention of every token to every token: queries, keys and values side by side (T, 3 C) -> (T, C).
    Tokens last, and the sums of the softmax as a row of ones below v, are a quarter faster on a CPU."""
    q, k, v = qkv.T.reshape(3, heads, -1, len(qkv))                            # (heads, d, T) each
    scores = jnp.einsum("hdk,hdq->hkq", k, q / q.shape[1] ** 0.5)              # (heads, T, T)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(1, keepdims=True)))
    sums = jnp.concatenate([v, jnp.ones_like(v[:, :1])], axis=1) @ weights     # (heads, d + 1, T)
    return (sums[:, :-1] / sums[:, -1:]).reshape(-1, len(qkv)).T


def in_blocks(function, numbers, *args):
    """function(*args) of one example, of which `numbers` numbers are in use at a time. On a CPU its vmap is a
    loop over blocks of examples that fit the cache. Backwards each block is computed again from what is
    "kept", the results of convolutions and attention."""
    if jax.default_backend() != "cpu":
        return function(*args)
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def loop(size, batched, *args):
        block = math.gcd(size, 1 << max(CACHE // numbers, 1).bit_length() - 1)  # a power of two
        each, shared = eqx.partition(args, tuple(batched))
        every = jax.vmap(lambda each: function(*eqx.combine(each, shared)))
        every = jax.checkpoint(every, policy=jax.checkpoint_policies.save_only_these_names("kept"))
        # a block takes every so many examples: of a batch on several devices, some from each
        blocks = jax.tree.map(lambda a: a.reshape(block, -1, *a.shape[1:]).swapaxes(0, 1), each)
        y = jax.lax.map(every, blocks)                                         # (B / block, block, ...)
        return y.swapaxes(0, 1).reshape(size, *y.shape[2:]), True

    return checkpoint_name(call(*args), "kept")
