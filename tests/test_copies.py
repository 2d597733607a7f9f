"""Copied definitions stay equal, and imports run one way: common <- data <- metrics <- scripts."""
import ast
from pathlib import Path

import pytest

SOURCES = {path.name: path.read_text() for path in Path(__file__).parent.parent.glob("*.py")}
MARK = "# same as "


def definitions(source):
    """(first line, name, syntax tree) of the module's functions and classes; a decorator belongs to them."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [(min(part.lineno for part in [node, *node.decorator_list]), node.name, ast.dump(node)) for node in nodes]


def drifted(sources):
    """The marks "# same as FILE: NAME" that do not stand right above the same syntax tree as in FILE."""
    trees = {f"{file}: {name}": tree for file, source in sources.items() for _, name, tree in definitions(source)}
    below = {(file, line): tree for file, source in sources.items() for line, _, tree in definitions(source)}
    marks = [(file, number, line.removeprefix(MARK).strip()) for file, source in sources.items()
             for number, line in enumerate(source.splitlines(), 1) if line.startswith(MARK)]
    return [mark for mark in marks if mark[2] not in trees or below.get((mark[0], mark[1] + 1)) != trees[mark[2]]]


@pytest.mark.parametrize("copy, found", [("def f(x):  # comment\n    return (x)", 0), ("def f(x):\n    return -x", 1),
                                         ("@cache\ndef f(x):\n    return x", 1), ("\ndef f(x):\n    return x", 1)])
def test_copies_are_equal(copy, found):
    assert not drifted(SOURCES)
    assert len(drifted({"a.py": "def f(x):\n    return x\n", "b.py": f"{MARK}a.py: f\n{copy}\n"})) == found


def test_imports_run_one_way():
    order = ["common", "data", "metrics"]
    for name, source in SOURCES.items():
        nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
        allowed = order[:order.index(name[:-3])] if name[:-3] in order else order
        assert not {f"{module}.py" for module in imported - set(allowed)} & set(SOURCES), name
