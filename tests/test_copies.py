"""Copied definitions stay equal, and imports run one way: common <- data <- metrics <- scripts."""
import ast
import re
from pathlib import Path

import pytest

SOURCES = {path.name: path.read_text() for path in sorted(Path(__file__).parent.parent.glob("*.py"))}
MARK = re.compile(r"# same as (\w+\.py): (\w+)")


def definitions(source):
    """{first line, decorators included: node} of the module's functions and classes."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {min(part.lineno for part in [node, *node.decorator_list]): node for node in nodes}


def drifted(sources):
    """(file, line) of each marked definition that is not the syntax tree it names."""
    trees = {(name, node.name): ast.dump(node) for name, text in sources.items() for node in definitions(text).values()}
    marks = [(name, line, MARK.match(text)) for name, source in sources.items()
             for line, text in enumerate(source.splitlines(), 1) if text.startswith("# same as ")]
    here = {name: definitions(text) for name, text in sources.items()}
    return [(name, line) for name, line, mark in marks if not mark or line + 1 not in here[name]
            or ast.dump(here[name][line + 1]) != trees.get(mark.groups())]


def test_copies_are_equal():
    assert not drifted(SOURCES)


@pytest.mark.parametrize("copy, found", [("def f(x):  # comment\n    return (x)", 0), ("def f(x):\n    return -x", 1), ("f = 1", 1),
                                         ("@cache\ndef f(x):\n    return x", 1), ("\ndef f(x):\n    return x", 1)])
def test_a_drifted_copy_is_found(copy, found):
    assert len(drifted({"a.py": "def f(x):\n    return x\n", "b.py": f"# same as a.py: f\n{copy}\n"})) == found


def test_imports_run_one_way():
    order = ["common", "data", "metrics"]
    for name, source in SOURCES.items():
        nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        imported = {getattr(node, "module", None) or alias.name for node in nodes for alias in node.names}
        allowed = order[:order.index(name[:-3])] if name[:-3] in order else order
        assert not {f"{module}.py" for module in imported - set(allowed)} & set(SOURCES), name
