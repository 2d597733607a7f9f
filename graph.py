"""From JAX to ONNX: the primitive operations of a traced function, each as a few nodes of a graph.

JAX traces a function to a list of operations (its jaxpr). What does not depend on the inputs is computed
here, the rest becomes nodes of standard operators. Random numbers cannot be traced: inside `explicit_noise`,
jax.random.normal and uniform are operations of their own, for which the caller of `convert` supplies the
numbers.
"""
import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import Literal, Primitive
from jax.interpreters import batching
from onnx import TensorProto, helper, numpy_helper

from common import UserError

OPSET = 18   # the least with BitwiseXor; ALICE O2 pins ONNX Runtime 1.22, which reads up to 22

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
         "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "uint32": TensorProto.UINT32,
         "bool": TensorProto.BOOL}


# --------------------------------------------------------------------------------------------- random numbers

def _noise_primitive(name):
    """A primitive in place of jax.random.NAME: of a key, its numbers float32 of a shape."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda key, shape: jax.core.ShapedArray(shape, jnp.float32))

    def batched(keys, dims, shape):
        return primitive.bind(keys[0], shape=(keys[0].shape[dims[0]], *shape)), 0
    batching.primitive_batchers[primitive] = batched
    return primitive


normal_p, uniform_p = _noise_primitive("normal"), _noise_primitive("uniform")


@contextmanager
def explicit_noise():
    """Within it, traced calls of jax.random.normal and uniform are `normal_p` and `uniform_p`."""
    def uniform(key, shape=(), dtype=jnp.float32, minval=0.0, maxval=1.0):
        return minval + (maxval - minval) * uniform_p.bind(key, shape=tuple(shape))
    before = jax.random.normal, jax.random.uniform
    jax.random.normal = lambda key, shape=(), dtype=jnp.float32: normal_p.bind(key, shape=tuple(shape))
    jax.random.uniform = uniform
    try:
        yield
    finally:
        jax.random.normal, jax.random.uniform = before


# ------------------------------------------------------------------------------------------------------ graph

class Value(NamedTuple):
    """An array of the graph: the name of a tensor, or what it is known to be. Axes that an array is broadcast
    along have length 1, or are left out if they are the first, until an operation needs them: `real` is the
    shape of the tensor, `shape` what it stands for."""
    shape: tuple
    dtype: np.dtype
    name: str | None = None
    known: Any = None
    real: tuple = ()

    @property
    def padded(self):
        """`real` with all axes."""
        return (1,) * (len(self.shape) - len(self.real)) + self.real


class Graph:
    """The nodes of a graph, each once, and their constants. Lengths that are multiples of `batch` stand for
    as many examples as the input `rows` has."""

    def __init__(self, batch=None, rows=None):
        self.nodes, self.found, self.constants, self.batch, self.rows = [], {}, {}, batch, rows
        self.unshaped = {}   # tensor: what it is a Reshape of
        self.picked = {}     # tensor: (tensor that it is a row of, shape of the row, axis, index)

    def varies(self, length):
        """Does a length depend on the number of examples?"""
        return self.batch is not None and length > 0 and length % self.batch == 0

    def constant(self, array):
        """The name of a constant."""
        array = np.asarray(array, order="C")
        if any(map(self.varies, array.shape)):
            raise ValueError(f"a constant depends on the number of examples: {array.shape}")
        short = array.astype(np.float16) if array.dtype == np.float32 and array.size > 64 else array
        if short is not array and np.array_equal(short, array):                # as in weights/: half the size
            return self.node("Cast", self.constant(short), to=TensorProto.FLOAT)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        return self.constants[key].name

    def node(self, op, *inputs, outputs=1, **attributes):
        """The name of the output of a node, a list of them if there are several."""
        key = op, inputs, outputs, repr(sorted(attributes.items()))
        if key not in self.found:
            names = [f"v{len(self.found)}_{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(op, inputs, names, **attributes))
            self.found[key] = names[0] if outputs == 1 else names
            if op == "Reshape":
                self.unshaped[names[0]] = inputs[0]
        return self.found[key]

    def ints(self, numbers):
        return self.constant(np.array(numbers, np.int64))

    def sizes(self, shape):
        """A shape for Reshape."""
        return self.ints([-1 if self.varies(length) else length for length in shape])

    def lengths(self, shape):
        """A shape for Expand."""
        if not any(map(self.varies, shape)):
            return self.ints(shape)
        rows = self.node("Gather", self.node("Shape", self.rows), self.ints([0]))
        parts = [self.node("Mul", rows, self.ints([length // self.batch])) if self.varies(length)
                 else self.ints([length]) for length in shape]
        return self.node("Concat", *parts, axis=0)

    def model(self, inputs, outputs):
        """The model of named inputs and outputs {name: (tensor, dtype, shape)}, without nodes that lead
        nowhere."""
        for name, (tensor, _, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [tensor], [name]))
        needed, kept = set(outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        kind = lambda dtype: TYPES[str(np.dtype(dtype))]
        info = lambda name, dtype, shape: helper.make_tensor_value_info(name, kind(dtype), shape)
        constants = [tensor for tensor in self.constants.values() if tensor.name in needed]
        graph = helper.make_graph(kept[::-1], "zdc", [info(name, *what[1:]) for name, what in inputs.items()],
                                  [info(name, *what[1:]) for name, what in outputs.items()], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model


# ------------------------------------------------------------------------------------------------- operations

UNARY = {"neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh",
         "sinh": "Sinh", "asinh": "Asinh", "floor": "Floor", "abs": "Abs", "logistic": "Sigmoid",
         "round": "Round", "not": "Not"}
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
          "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual", "eq": "Equal",
          "and": "And", "or": "Or"}
ELEMENTWISE = {*UNARY, *BINARY, "ne", "select_n", "convert_element_type", "square", "integer_pow", "rsqrt"}
PASSED = "stop_gradient", "copy", "optimization_barrier"


def opened(jaxpr):
    """(jaxpr, constants) of the jaxpr that an operation calls, closed or open."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, [])


def known(array):
    """A Value that does not depend on the inputs."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, None, array, array.shape)


class Converter:
    """Values of a jaxpr as nodes of a graph."""

    def __init__(self, graph, noise):
        self.graph, self.noise = graph, noise   # noise(name, shape) -> tensor

    def tensor(self, value):
        """The name of a value's tensor, its axes as short as they are."""
        return value.name if value.known is None else self.graph.constant(value.known)

    def full(self, value):
        """The name of a value's tensor, each axis of its length."""
        if value.real == value.shape:
            return self.tensor(value)
        if value.known is None and np.prod(value.real) == np.prod(value.shape):
            return self.reshaped(value.name, value.real, value.shape)
        if value.known is not None and not any(map(self.graph.varies, value.shape)):
            return self.graph.constant(np.broadcast_to(value.known, value.shape))
        return self.graph.node("Expand", self.tensor(value), self.graph.lengths(value.shape))

    def made(self, value, op, *inputs, real=None, **attributes):
        """`value`, a shape and type, as the output of a node."""
        return Value(value.shape, value.dtype, self.graph.node(op, *inputs, **attributes), None,
                     value.shape if real is None else real)

    def run(self, jaxpr, constants, arguments):
        """The outputs of a jaxpr, Values, for Values of its inputs."""
        values = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, arguments))
        literal = lambda atom: known(np.asarray(atom.val, atom.aval.dtype))
        read = lambda atom: literal(atom) if isinstance(atom, Literal) else values[atom]
        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            for variable, value in zip(equation.outvars, self.apply(equation, inputs)):
                values[variable] = value
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation, inputs):
        """The outputs of one operation."""
        name, parameters = equation.primitive.name, equation.params
        like = [Value(variable.aval.shape, variable.aval.dtype) for variable in equation.outvars]
        if all(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) for value in like):
            return like                                                        # nobody asks for keys
        if name in ("normal", "uniform") and 0 not in like[0].shape:
            return [like[0]._replace(name=self.noise(name, like[0].shape), real=like[0].shape)]
        inner = parameters.get("jaxpr", parameters.get("call_jaxpr"))
        if inner is not None and name != "scan":
            inner, constants = opened(inner)
            return self.run(inner, [known(x) for x in constants], inputs)
        if name in PASSED:
            return inputs
        if name == "broadcast_in_dim":
            return [self.broadcast(like[0], inputs[0], parameters["broadcast_dimensions"])]
        if 0 in like[0].shape:                                                 # a draw of no numbers
            return [known(np.zeros(value.shape, value.dtype)) for value in like]
        if self.foldable(name, inputs):
            short = np.broadcast_shapes(*(x.real for x in inputs)) if name in ELEMENTWISE else None
            arrays = [np.broadcast_to(x.known, x.shape if short is None else short) for x in inputs]
            found = equation.primitive.bind(*map(jnp.asarray, arrays), **parameters)
            found = found if equation.primitive.multiple_results else [found]
            return [known(x)._replace(shape=value.shape) for x, value in zip(found, like)]
        if name == "split":
            return self.split(like, *inputs, **parameters)
        if name in UNARY:
            return [self.made(like[0], UNARY[name], self.tensor(inputs[0]), real=inputs[0].real)]
        if name in BINARY or name in ("select_n", "ne"):
            return [self.elementwise(name, like[0], inputs)]
        if not hasattr(type(self), name):
            raise UserError(f"no node of ONNX for the operation {name}")
        return [getattr(self, name)(like[0], *inputs, **parameters)]

    def foldable(self, name, inputs):
        """Can an operation be computed here?"""
        shapes = [x.real if name in ELEMENTWISE else x.shape for x in inputs]
        return all(x.known is not None for x in inputs) and not any(map(self.graph.varies, sum(shapes, ())))

    # elementwise: axes of length 1 stay as they are

    def elementwise(self, name, like, inputs):
        real = np.broadcast_shapes(*(value.real for value in inputs))
        tensors = [self.tensor(value) for value in inputs]
        if name == "ne":
            return self.made(like, "Not", self.graph.node("Equal", *tensors), real=real)
        if name == "select_n":
            which, no, yes = tensors
            return self.made(like, "Where", which, yes, no, real=real)
        return self.made(like, BINARY[name], *tensors, real=real)

    def broadcast(self, like, x, axes):
        short = [1] * len(like.shape)
        for axis, length in zip(axes, x.padded):
            short[axis] = length
        while short and short[0] == 1 and len(short) > len(x.real):
            short.pop(0)
        short = tuple(short)
        if x.known is not None:
            return like._replace(known=x.known.reshape(short), real=short)
        return like._replace(name=self.reshaped(x.name, x.real, short), real=short)

    def reshaped(self, tensor, before, after):
        if before == after:
            return tensor
        return self.graph.node("Reshape", self.graph.unshaped.get(tensor, tensor), self.graph.sizes(after))

    def convert_element_type(self, like, x, new_dtype, **_):
        return self.made(like, "Cast", self.tensor(x), to=TYPES[str(np.dtype(new_dtype))], real=x.real)

    def square(self, like, x):
        return self.made(like, "Mul", self.tensor(x), self.tensor(x), real=x.real)

    def integer_pow(self, like, x, y):
        if y == 2:
            return self.square(like, x)
        return self.made(like, "Pow", self.tensor(x), self.graph.constant(np.float32(y)), real=x.real)

    def rsqrt(self, like, x, **_):
        return self.made(like, "Reciprocal", self.graph.node("Sqrt", self.tensor(x)), real=x.real)

    def log1p(self, like, x, **_):
        above = self.graph.node("Add", self.tensor(x), self.graph.constant(np.float32(1)))
        return self.made(like, "Log", above, real=x.real)

    def expm1(self, like, x, **_):
        power, one = self.graph.node("Exp", self.tensor(x)), self.graph.constant(np.float32(1))
        return self.made(like, "Sub", power, one, real=x.real)

    def clamp(self, like, low, x, high):
        return self.elementwise("min", like, [self.elementwise("max", like, [x, low]), high])

    # shapes

    def reshape(self, like, x, new_sizes, **_):
        if x.known is None and np.prod(x.real) == np.prod(x.shape):
            return like._replace(name=self.reshaped(x.name, x.real, like.shape), real=like.shape)
        return like._replace(name=self.reshaped(self.full(x), x.shape, like.shape), real=like.shape)

    def squeeze(self, like, x, dimensions):
        real = tuple(length for axis, length in enumerate(x.padded) if axis not in dimensions)
        tensor, *picked, index = self.graph.picked.get(x.name, (None, None, None))
        if picked == [x.real, *dimensions]:
            return self.made(like, "Gather", tensor, self.graph.constant(np.array(index, np.int64)),
                             axis=dimensions[0], real=real)
        return like._replace(name=self.reshaped(self.tensor(x), x.real, real), real=real)

    def transpose(self, like, x, permutation):
        real = tuple(x.padded[axis] for axis in permutation)
        moved = [axis for axis in permutation if x.padded[axis] > 1]
        if moved == sorted(moved):                                             # only axes of length 1 move
            return like._replace(name=self.reshaped(self.tensor(x), x.real, real), real=real)
        tensor = self.reshaped(self.tensor(x), x.real, x.padded)
        return self.made(like, "Transpose", tensor, perm=list(permutation), real=real)

    def concatenate(self, like, *parts, dimension):
        return self.made(like, "Concat", *map(self.full, parts), axis=dimension)

    def stack(self, like, *parts, axis):
        shape = (*like.shape[:axis], 1, *like.shape[axis + 1:])
        tensors = [self.reshaped(self.full(x), x.shape, shape) for x in parts]
        return self.made(like, "Concat", *tensors, axis=axis)

    def slice(self, like, x, start_indices, limit_indices, strides):
        strides = strides or [1] * len(start_indices)
        ends = [2**31 if self.graph.varies(n) else n for n in limit_indices]
        ints = [self.graph.ints(numbers) for numbers in (start_indices, ends, range(len(ends)), strides)]
        found = self.made(like, "Slice", self.full(x), *ints)
        cut = [axis for axis in range(len(x.shape)) if like.shape[axis] != x.shape[axis]]
        if len(cut) == 1 and like.shape[cut[0]] == 1:
            self.graph.picked[found.name] = self.full(x), like.shape, cut[0], start_indices[cut[0]]
        return found

    def rev(self, like, x, dimensions):
        last, end, step = ([n] * len(dimensions) for n in (-1, -2**31, -1))
        ints = [self.graph.ints(numbers) for numbers in (last, end, dimensions, step)]
        return self.made(like, "Slice", self.full(x), *ints)

    def split(self, like, x, sizes, axis):
        names = self.graph.node("Split", self.full(x), self.graph.ints(sizes), outputs=len(like), axis=axis)
        return [value._replace(name=name, real=value.shape) for value, name in zip(like, names)]

    def pad(self, like, x, value, padding_config):
        assert not any(inner for _, _, inner in padding_config)
        widths = [low for low, _, _ in padding_config] + [high for _, high, _ in padding_config]
        return self.made(like, "Pad", self.full(x), self.graph.ints(widths), self.tensor(value))

    # sums and products

    def reduced(self, op, like, x, axes):
        axes, real = list(axes), tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
        return self.made(like, op, self.full(x), self.graph.ints(axes), keepdims=0, real=real)

    def reduce_sum(self, like, x, axes, **_):
        return self.reduced("ReduceSum", like, x, axes)

    def reduce_max(self, like, x, axes, **_):
        return self.reduced("ReduceMax", like, x, axes)

    def dot_general(self, like, a, b, dimension_numbers, **_):
        """As a product of matrices (batch, rows, contracted) and (batch, contracted, columns)."""
        (a_sum, b_sum), (a_batch, b_batch) = dimension_numbers
        free = lambda value, used: [axis for axis in range(len(value.shape)) if axis not in used]
        a_free, b_free = free(a, (*a_sum, *a_batch)), free(b, (*b_sum, *b_batch))
        if not a_batch and tuple(a_sum) == (len(a.shape) - 1,) and len(b.shape) == 2:
            order = [*b_sum, *b_free]
            right = self.arranged(b, order, [b.shape[axis] for axis in order])
            return self.made(like, "MatMul", self.full(a), right)
        length = lambda value, axes: math.prod(value.shape[axis] for axis in axes)
        batch, count = [a.shape[axis] for axis in a_batch], length(a, a_sum)
        shape = (*batch, length(a, a_free), length(b, b_free))
        left = self.arranged(a, [*a_batch, *a_free, *a_sum], [*batch, shape[-2], count])
        right = self.arranged(b, [*b_batch, *b_sum, *b_free], [*batch, count, shape[-1]])
        product = self.graph.node("MatMul", left, right)
        return like._replace(name=self.reshaped(product, shape, like.shape), real=like.shape)

    def arranged(self, value, axes, shape):
        """A value's tensor with its axes in another order and then another shape."""
        if value.known is not None and not any(map(self.graph.varies, value.shape)):
            whole = np.broadcast_to(value.known, value.shape)
            return self.graph.constant(whole.transpose(axes).reshape(shape))
        tensor, order = self.full(value), list(axes)
        moved, before = [axis for axis in order if value.shape[axis] > 1], value.shape
        if moved != sorted(moved):
            tensor = self.graph.node("Transpose", tensor, perm=order)
            before = tuple(value.shape[axis] for axis in axes)
        return self.reshaped(tensor, before, tuple(shape))


def trace(function, *arguments):
    """The closed jaxpr of function(*arguments), its random numbers being operations."""
    with explicit_noise():
        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments))


def evaluate(function, noise, *arguments):
    """The outputs of function(*arguments), by JAX; noise(name, shape) gives the numbers that it draws."""
    closed = trace(function, *arguments)
    return evaluate_jaxpr(closed.jaxpr, closed.consts, arguments, noise)


def evaluate_jaxpr(jaxpr, constants, arguments, noise):
    """The same for a jaxpr."""
    values = dict(zip(jaxpr.constvars, constants)) | dict(zip(jaxpr.invars, arguments))
    read = lambda atom: atom.val if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if equation.primitive in (normal_p, uniform_p):
            found = [noise(equation.primitive.name, equation.outvars[0].aval.shape)]
        elif inner is not None:
            found = evaluate_jaxpr(*opened(inner), inputs, noise)
        else:
            found = equation.primitive.bind(*inputs, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found))
    return [read(atom) for atom in jaxpr.outvars]


def placeholder(array, name=""):
    """An input like an array, as a Value."""
    return Value(array.shape, np.dtype(array.dtype), name, None, array.shape)


def convert(function, graph, noise, *arguments):
    """The outputs of function(*arguments) as Values of a graph, for arguments that are Values (inputs);
    noise(name, shape) gives the tensor of the numbers that it draws."""
    closed = trace(function, *arguments)
    return Converter(graph, noise).run(closed.jaxpr, [known(x) for x in closed.consts], list(arguments))
