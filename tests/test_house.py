"""The conventions of the repository: sizes, imports, copies, and documents that agree with the code."""
import ast
import contextlib
import importlib
import io
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = "channels", "fm", "latent_fm", "diffusion", "vae", "gan", "vqgan", "iaf", "calodream"
# Each imports only those before it
SHARED = ("files", "common", "solvers", "plots", "simulator", "orientation", "data", "checkerboard",
          "splines", "totals", "calorimeter", "preprocessing", "judge", "hit", "hep", "lists", "metrics",
          "shower_metrics", "layers", "papers", "graph")
# metrics.py scores two kinds of detector, fibres and, since CaloDREAM, layers of voxels; plots.py draws both.
# papers.py holds the published autoencoder of showers as well; calodream.py trains two networks or three, and
# scores showers itself. calorimeter.py is data.py and simulator.py of its detector in one, preprocessing.py
# what its networks see of it.
# vqgan.py has two stages and two priors, iaf.py three networks, latent_fm.py two pairs of networks,
# diffusion.py the published sampler and a solver
# The network of fm.py sees the neighbours of each patch; data.py finds them, and what decides the brightness
BUDGETS = {"fm": 340, "diffusion": 348, "vae": 440, "latent_fm": 450, "gan": 440, "vqgan": 620, "iaf": 560,
           "channels": 330, "calodream": 630, "solvers": 150, "layers": 90, "papers": 490, "common": 550,
           "plots": 135, "data": 490, "orientation": 105, "files": 135, "lists": 190, "hep": 165,
           "checkerboard": 80, "splines": 55, "totals": 100, "simulator": 520, "calorimeter": 420,
           "preprocessing": 190, "judge": 160, "hit": 250, "metrics": 725, "shower_metrics": 155,
           "graph": 400, "export": 285, "benchmarks/o2": 95, "benchmarks/o2_call": 70,
           "benchmarks/events": 85, "benchmarks/transfer": 125, "benchmarks/tables": 410,
           "benchmarks/check": 290, "benchmarks/docs": 380}
MARK = "# same as "
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): path.read_text()
           for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]}
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}


# ------------------------------------------------------------------------------------------------------ sizes

@pytest.mark.parametrize("name", MODULES)
def test_a_module_keeps_its_budget(name):
    if name != "benchmarks/__init__":
        assert MODULES[name].count("\n") <= 1.1 * BUDGETS[name]


def test_lines_have_at_most_110_columns():
    sources = MODULES | {path.stem: path.read_text() for path in ROOT.glob("tests/*.py")}
    assert not [f"{name}:{number}" for name, source in sources.items()
                for number, line in enumerate(source.splitlines(), 1) if len(line) > 110]


def test_readme_has_at_most_180_lines():
    assert TEXTS["README.md"].count("\n") <= 180


def test_weights_stay_below_40_mb():
    assert sum(path.stat().st_size for path in (ROOT / "weights").iterdir()) < 40e6


# ---------------------------------------------------------------------------------------------------- imports

def imports(source):
    """The modules that a source imports, anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def forbidden(name, source):
    """Modules of this repository that `name` must not import: shared ones that come later, and scripts."""
    if name == "export" or name.startswith("benchmarks/"):
        return set()
    earlier = SHARED[:SHARED.index(name)] if name in SHARED else SHARED
    return imports(source) & {*SHARED, *SCRIPTS, "benchmarks"} - {*earlier}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    assert not forbidden(name, MODULES[name])


def test_an_import_inside_a_function_counts():
    assert forbidden("data", "def f():\n    import metrics") == {"metrics"}
    assert forbidden("fm", "from vae import x\nimport data") == {"vae"}


def test_shapes_of_the_lesson():
    """Every framework has the same headings in the same order, and a main."""
    titles = re.compile(r"^# -+ (.+)$", re.M)
    for name in ("fm", "diffusion", "vae", "latent_fm", "gan", "vqgan", "iaf"):
        found = [title for title in titles.findall(MODULES[name])
                 if title in ("flags", "objective", "sampler", "training", "network", "main")]
        assert found == ["flags", "objective", "sampler", "training", "network", "main"], name
        assert MODULES[name].endswith('if __name__ == "__main__":\n    common.run(main)\n')


# ----------------------------------------------------------------------------------------------------- copies

def definitions(source):
    """(first line, name, syntax tree) of the module's functions and classes; a decorator belongs to them."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = lambda node: min(part.lineno for part in [node, *node.decorator_list])
    return [(first(node), node.name, ast.dump(node)) for node in nodes]


def marks(sources):
    """(file, line, "FILE.py: NAME") of each mark."""
    return [(name, number, line.removeprefix(MARK).strip()) for name, source in sources.items()
            for number, line in enumerate(source.splitlines(), 1) if line.startswith(MARK)]


def drifted(sources):
    """The marks that do not stand right above the same syntax tree as in the file that they name."""
    trees = {f"{name}.py: {function}": tree for name, source in sources.items()
             for _, function, tree in definitions(source)}
    below = {(name, line): tree for name, source in sources.items() for line, _, tree in definitions(source)}
    return [mark for mark in marks(sources)
            if mark[2] not in trees or below.get((mark[0], mark[1] + 1)) != trees[mark[2]]]


def test_copies_are_equal_and_few():
    assert not drifted(MODULES)
    assert len(marks(MODULES)) <= 30


@pytest.mark.parametrize("copy, found", [
    ("def f(x):  # comment\n    return (x)", 0), ("def f(x):\n    return -x", 1),
    ("@cache\ndef f(x):\n    return x", 1), ("\ndef f(x):\n    return x", 1)])
def test_a_drifted_copy_is_found(copy, found):
    assert len(drifted({"a": "def f(x):\n    return x\n", "b": f"{MARK}a.py: f\n{copy}\n"})) == found


def test_what_is_equal_is_marked():
    """No function or class of a script stands unmarked in another one."""
    seen, unmarked = {}, []
    for name in SCRIPTS:
        marked = {(file, line + 1) for file, line, _ in marks(MODULES)}
        for line, function, tree in definitions(MODULES[name]):
            if tree in seen and (name, line) not in marked and len(tree) > 600:
                unmarked.append((name, function, seen[tree]))
            seen.setdefault(tree, name)
    assert not unmarked


# -------------------------------------------------------------------------------------------------- documents

COMMAND = re.compile(r"python (?:-m )?((?:benchmarks\.)?\w+)(?:\.py)?((?: [^\n`&|#]*)?)")
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)")


@cache
def flags_of(module):
    """The flags that a module's --help lists."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return set(FLAG.findall(text.getvalue()))


def commands(text):
    """(module, rest of the line) of each command of this repository in a text."""
    return [(module, rest) for module, rest in COMMAND.findall(text) if module not in ("pytest", "venv")]


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_documents_exist(name):
    assert name != "README.md" or len(commands(TEXTS[name])) > 5
    for module, rest in commands(TEXTS[name]):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
        assert set(FLAG.findall(rest)) <= flags_of(module), (module, rest)


@pytest.mark.parametrize("name", TEXTS)
def test_flags_in_documents_exist(name):
    known = set().union(*map(flags_of, (*SCRIPTS, "data", "calorimeter", "metrics", "export")))
    known |= set().union(*map(flags_of, ("benchmarks.tables", "benchmarks.check", "benchmarks.docs")))
    assert set(FLAG.findall(TEXTS[name])) <= known


@pytest.mark.parametrize("name", MODULES)
def test_commands_in_docstrings_exist(name):
    for module, rest in commands(ast.get_docstring(ast.parse(MODULES[name])) or ""):
        if module in MODULES or module.startswith("benchmarks."):
            assert set(FLAG.findall(rest)) <= flags_of(module), (module, rest)


# Decimal numbers that README may state by itself: distances, versions, arXiv numbers, [FM, Tables 1 and 2].
FACTS = {"112.5", "3.11", "3.13", "2507.18811", "2405.09629", "2512.20346", "2608.12795", "0.5",
         "1.27", "1.30", "0.53", "0.56"}


def test_numbers_in_readme_come_from_json():
    own = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|<!-- \{.*?<!-- / -->", "", TEXTS["README.md"], flags=re.S)
    assert set(re.findall(r"\d+\.\d+", own)) <= FACTS


def test_files_that_readme_names_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXTS["README.md"])
    assert links and all((ROOT / link).exists() for link in links)
