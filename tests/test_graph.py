"""graph.py: operations beside JAX's, any number of examples, random numbers from outside."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")

from common import UserError  # noqa: E402
from graph import Converter, Graph, convert, evaluate, placeholder  # noqa: E402

RNG = np.random.default_rng(0)
X, W, B = RNG.normal(size=(3, 4, 6)).astype(np.float32), RNG.normal(size=(6, 5)), RNG.normal(size=5)
W, B = jnp.asarray(W, jnp.float32), jnp.asarray(B, jnp.float32)
FUNCTIONS = {
    "elementwise": lambda x: jnp.exp(-x) + jnp.sqrt(jnp.abs(x)) * jnp.sin(x) / (1 + jnp.exp(x / 9)**0.5),
    "tails": lambda x: jnp.sinh(x) + jnp.arcsinh(x) + jnp.tanh(x) + jnp.log1p(x**2) - jnp.expm1(x),
    "softplus": lambda x: jax.nn.softplus(x) + jax.nn.sigmoid(x),
    "powers": lambda x: x**2 + x**3 + jnp.abs(x)**0.7 + jax.lax.rsqrt(1 + x**2) + jnp.square(x),
    "choices": lambda x: jnp.where(x > 0.3, x, -1.0) + (x <= 0) + jnp.maximum(x, 0) * (x != 0),
    "limits": lambda x: jnp.clip(x, -1, 1) + jnp.minimum(x, x[:1]),
    "roundings": lambda x: jnp.round(3 * x) + jnp.floor(x),
    "counts": lambda x: jnp.clip(jnp.round(5 * x), 0, 65535).astype(jnp.uint16),
    "sums": lambda x: x.sum(0) + x.mean() + jnp.max(x, axis=(0, 1)),
    "layer": lambda x: jax.nn.silu(x @ W + B),
    "vmapped layer": lambda x: jax.vmap(jax.vmap(lambda row: W.T @ row + B))(x),
    "attention": lambda x: jax.nn.softmax(jnp.einsum("bij,bkj->bik", x, x), axis=-1) @ x,
    "heads": lambda x: jnp.einsum("bij,jk,bkl->bil", x, W @ W.T, x.swapaxes(1, 2)),
    "inner": lambda x: jnp.tensordot(x, x, axes=((0, 2), (0, 2))),
    "slices": lambda x: jnp.concatenate([x[:, ::2, 1:4], x[:, 1:3, :3][:, ::-1]], axis=1),
    "rows": lambda x: x[:, 2] + x[:, 0, :1] + x[1, 1, 1],
    "pads": lambda x: jnp.pad(x, [(0, 0), (1, 2), (0, 3)]).transpose(0, 2, 1).reshape(3, -1),
    "pieces": lambda x: jnp.stack(jnp.split(x, 3, axis=2), axis=1)[:, ::-1],
    "broadcasts": lambda x: jnp.broadcast_to(x[:, :1], x.shape) * jnp.arange(6.0) + x[:, None].sum(2),
    "constants": lambda x: x + jnp.cumsum(jnp.arange(6.0))}


def run(function, x, batch=None, *feeds):
    """function(x) by ONNX Runtime, traced with `batch` examples."""
    made = Graph(batch, "x")
    like = jax.ShapeDtypeStruct((batch or len(x), *x.shape[1:]), x.dtype)
    names = iter([f"noise{i}" for i in range(len(feeds))])
    out, = convert(function, made, lambda name, shape: next(names), placeholder(like, "x"))
    free = lambda shape: ("B", *shape[1:]) if batch else shape
    inputs = {"x": x} | {f"noise{i}": feed for i, feed in enumerate(feeds)}
    model = made.model({name: (name, array.dtype, free(array.shape)) for name, array in inputs.items()},
                       {"y": (Converter(made, None).full(out), out.dtype, free(out.shape))})
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_are_those_of_jax(name):
    expected = np.asarray(FUNCTIONS[name](jnp.asarray(X)))
    found = run(FUNCTIONS[name], X)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", ["elementwise", "layer", "vmapped layer", "attention", "slices", "pieces",
                                  "broadcasts"])
def test_any_number_of_examples(name, rows):
    x = RNG.normal(size=(rows, 4, 6)).astype(np.float32)
    expected = FUNCTIONS[name](jnp.asarray(x))
    np.testing.assert_allclose(run(FUNCTIONS[name], x, batch=101), expected, rtol=1e-5, atol=1e-5)


def noisy(x):
    """Normal numbers of all examples, then uniform ones of each."""
    key = jax.random.key(0)
    draw = lambda key, row: row + jax.random.uniform(key, row.shape, minval=2.0, maxval=4.0)
    return jax.vmap(draw)(jax.random.split(key, len(x)), x * jax.random.normal(key, x.shape))


def test_noise_is_what_the_caller_gives():
    """Nodes, `evaluate` and plain arithmetic; outside of explicit_noise nothing changes."""
    normal, uniform = RNG.normal(size=X.shape).astype(np.float32), RNG.random(X.shape, np.float32)
    expected = X * normal + 2 + 2 * uniform
    np.testing.assert_allclose(run(noisy, X, None, normal, uniform), expected, rtol=1e-6)
    np.testing.assert_allclose(run(noisy, X, 101, normal, uniform), expected, rtol=1e-6)
    before = np.asarray(noisy(X))
    found, = evaluate(noisy, lambda name, shape: {"normal": normal, "uniform": uniform}[name], X)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.array_equal(before, noisy(X)) and np.abs(before - expected).max() > 0.1


def test_equal_nodes_and_weights_occur_once_and_unused_ones_not():
    made, x = Graph(), placeholder(X, "x")

    out, _ = convert(lambda x: ((x @ W) * (x @ W), jnp.exp(x)), made, None, x)
    model = made.model({"x": ("x", X.dtype, X.shape)}, {"y": (out.name, out.dtype, out.shape)})
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Mul", "Identity"]
    assert len(model.graph.initializer) == 1


def test_weights_in_half_precision_stay_exact():
    weights = jnp.asarray(RNG.normal(size=(6, 40)).astype(np.float16), jnp.float32)
    made = Graph()
    out, = convert(lambda x: x @ weights, made, None, placeholder(X, "x"))
    model = made.model({"x": ("x", X.dtype, X.shape)}, {"y": (out.name, out.dtype, out.shape)})
    assert model.ByteSize() < 6 * 40 * 2 + 500
    np.testing.assert_allclose(run(lambda x: x @ weights, X), X @ weights, rtol=1e-5, atol=1e-5)


def test_an_operation_without_a_node():
    with pytest.raises(UserError, match="cumsum"):
        run(lambda x: jnp.cumsum(x, axis=1), X)


def test_no_numbers_are_asked_for_an_empty_draw():
    """A model without noise draws none: of shape (B, 0)."""
    draws = lambda name, shape: pytest.fail(f"{name} {shape}")

    def respond(x):
        noise = jax.random.normal(jax.random.key(0), (len(x), 0))
        return jax.vmap(lambda x, z: 2 * x)(x, noise)
    x = placeholder(np.zeros((97, 3), np.float32), "x")
    out, = convert(respond, Graph(97, "x"), draws, x)
    assert out.shape == (97, 3)
