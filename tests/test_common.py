import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType
from matplotlib.image import imread

import common
from common import UserError

ROOT = Path(__file__).parent.parent


def start(code, **environment):
    """Start Python on `code` in the repository root."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, env=os.environ | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def model(key=0, width=3):
    return eqx.nn.MLP(2, 2, width, 1, key=jax.random.key(key))


def state(seed):
    """What a training script saves: a model, an optimiser's arrays, a step, a key, and other kinds of leaves."""
    return {"model": model(seed), "half": jnp.arange(3, dtype=jnp.bfloat16) + seed, "count": np.arange(2) + seed,
            "step": seed, "rate": 0.1 * seed, "done": False, "key": jax.random.key(seed), "none": None}


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert type(x) is type(y)
        if eqx.is_array(x):
            x, y = (jax.random.key_data(v) if common._is_key(v) else v for v in (x, y))
            assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x == y or callable(x)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "fm-zn.eqx"
    common.save_checkpoint(path, {"script": "fm", "detector": "zn"}, state(5))
    return path


# ------------------------------------------------------------------------------------------------------ checkpoints

def test_checkpoint_returns_the_same_bits(checkpoint):
    header, tree = common.load_checkpoint(checkpoint, state(0), "fm", "zn")
    assert_equal_bits(tree, state(5))
    assert header == common.read_header(checkpoint)
    assert header["format"] == common.FORMAT and header["versions"]["jax"] == jax.__version__


def test_checkpoint_loads_into_shapes_alone(tmp_path):
    common.save_checkpoint(tmp_path / "a.eqx", {}, model(3))
    assert_equal_bits(common.load_checkpoint(tmp_path / "a.eqx", eqx.filter_eval_shape(model))[1], model(3))


def test_small_checkpoint(tmp_path):
    """Float16 for vectors, whole numbers of a step of the row for matrices, float32 in memory."""
    tree = {"net": model(3), "large": jax.random.normal(jax.random.key(0), (40, 50, 60)), "dark": jnp.zeros((2, 3)),
            "outlier": jnp.zeros((3, 900)).at[1, 5].set(7.0), "count": np.arange(3), "step": 4}
    for name, small in (("small", True), ("full", False)):
        common.save_checkpoint(tmp_path / name, {}, tree, small=small)
    assert (tmp_path / "small").stat().st_size < 0.3 * (tmp_path / "full").stat().st_size
    like = tree | {"net": eqx.filter_eval_shape(model), "large": jnp.zeros((40, 50, 60))}
    loaded = common.load_checkpoint(tmp_path / "small", like)[1]
    assert_equal_bits(loaded, common.rounded(tree))
    for exact, found in zip(jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)), jax.tree.leaves(eqx.filter(loaded, eqx.is_inexact_array))):
        if exact.ndim < 2:
            assert np.array_equal(found, np.float16(exact).astype(np.float32))
        else:                                                                  # half a step
            step = np.sqrt(np.mean(np.square(exact), -1, keepdims=True)) / common.LEVELS
            assert (np.abs(found - exact) <= 0.5001 * step).all()
    assert loaded["step"] == 4 and np.array_equal(loaded["count"], tree["count"])
    with pytest.raises(UserError, match="holds other arrays"):
        common.load_checkpoint(tmp_path / "small", like | {"large": jnp.zeros((40, 60, 50))})


def test_checkpoint_holds_scaler_and_paths(tmp_path):
    header = {"scaler": {"mean": np.float32([0.1, np.nan])}, "data": Path("a/b"), "loss": jnp.float32(0.5)}
    common.save_checkpoint(tmp_path / "a.eqx", header, model())
    header = common.read_header(tmp_path / "a.eqx")
    assert np.float32(header["scaler"]["mean"][0]) == np.float32(0.1) and header["scaler"]["mean"][1] is None
    assert header["data"] == "a/b" and header["loss"] == 0.5


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-1], "damaged"),
    (lambda data: data[:len(data) // 2], "damaged"),
    (lambda data: data + b"\0", "damaged"),
    (lambda data: data.replace(b'"zn"', b'"zp"'), "damaged"),
    (lambda data: data.partition(b"\n")[0], "damaged"),
    (lambda data: b"", "not a checkpoint"),
    (lambda data: b"\x89HDF\r\n" + bytes(100), "not a checkpoint"),
    (lambda data: b"[1]\n" + data.partition(b"\n")[2], "not a checkpoint"),
    (lambda data: b'{"format": "other"}\n', "not a checkpoint"),
    (lambda data: b"[" * 100_000 + b"\n", "not a checkpoint"),
], ids=["cut", "half", "longer", "header", "only header", "empty", "HDF5", "list", "format", "nested"])
def test_damaged_checkpoint(checkpoint, damage, message):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    for read in (lambda: common.read_header(checkpoint), lambda: common.load_checkpoint(checkpoint, state(0))):
        with pytest.raises(UserError, match=f"fm-zn.eqx: {message}"):
            read()


def test_any_flipped_byte_is_found(tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "a.eqx"
    common.save_checkpoint(path, {"script": "fm"}, model(1))
    data, expected = path.read_bytes(), common.load_checkpoint(path, model())

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, len(data) - 1), st.integers(1, 255))
    def flip(position, bits):
        path.write_bytes(data[:position] + bytes([data[position] ^ bits]) + data[position + 1:])
        try:
            header, tree = common.load_checkpoint(path, model())
        except UserError:
            return
        assert header == expected[0]  # only a change that JSON does not see, such as a space into a tab
        assert_equal_bits(tree, expected[1])
    flip()


@pytest.mark.parametrize("like, script, detector, message", [
    (state(0), "gan", "zn", "made by script fm, expected script gan"),
    (state(0), "fm", "zp", "made by detector zn, expected detector zp"),
    (state(0) | {"model": model(width=4)}, "fm", "zn", r"holds other arrays .*\(3, 2\).*\(4, 2\)|\(4, 2\).*\(3, 2\)"),
    (state(0) | {"half": jnp.zeros(3)}, "fm", "zn", "holds other arrays .*dtype"),
    (state(0) | {"z": jnp.zeros(3)}, "fm", "zn", "holds other arrays"),
    ({"count": np.arange(2)}, "fm", "zn", "holds more arrays"),
], ids=["script", "detector", "shape", "dtype", "more", "fewer"])
def test_checkpoint_of_something_else(checkpoint, like, script, detector, message):
    with pytest.raises(UserError, match=message) as error:
        common.load_checkpoint(checkpoint, like, script, detector)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nothing.eqx", "."])
def test_missing_checkpoint(tmp_path, path):
    with pytest.raises(UserError, match="expected a checkpoint"):
        common.read_header(tmp_path / path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoint_never_unpickles(tmp_path):
    path, leaves = tmp_path / "a.eqx", io.BytesIO()
    np.save(leaves, np.array([Attack(tmp_path / "attacked")], dtype=object), allow_pickle=True)
    header = {"format": common.FORMAT}
    line = json.dumps(header | {"crc32": common._checksum(header, leaves.getvalue())})
    path.write_bytes(line.encode() + b"\n" + leaves.getvalue())
    for like in (jnp.zeros(1), np.zeros(1), np.array([None]), 0.0):
        with pytest.raises(UserError, match="holds other arrays"):
            common.load_checkpoint(path, like)
    assert not (tmp_path / "attacked").exists()


def test_no_pickle_in_the_sources():
    sources = "\n".join(path.read_text() for path in ROOT.glob("*.py"))
    assert not re.search(r"import (c?loud)?pickle|from pickle|allow_pickle=True|joblib|torch\.load", sources)


# ------------------------------------------------------------------------------------------------------------ files

def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("old", "new"):
        with common.write_atomic(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_exception_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), common.write_atomic(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_write_follows_links(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    common.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == "1\n"


@pytest.mark.parametrize("path", [os.devnull, "."])
def test_devices_and_folders_are_not_replaced(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        common.write_json(path, 1)
    assert not Path(path).is_file()


def test_kill_keeps_the_old_file_and_leftovers_go(checkpoint):
    old = checkpoint.read_bytes()
    child = start(f"import common, time\n"
                  f"with common.write_atomic({str(checkpoint)!r}) as temporary:\n"
                  f"    temporary.write_bytes(b'half of a file')\n"
                  f"    print('writing', flush=True)\n"
                  f"    time.sleep(60)")
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert checkpoint.read_bytes() == old
    [leftover] = set(checkpoint.parent.iterdir()) - {checkpoint}

    common.save_checkpoint(checkpoint, {}, state(1))
    assert leftover.exists()  # it may still be another process's
    os.utime(leftover, times=(time.time() - 2 * 86400,) * 2)
    other = checkpoint.with_name(".gan-zn.1.part.eqx")
    other.touch()
    os.utime(other, times=(0, 0))
    common.save_checkpoint(checkpoint, {}, state(2))
    assert set(checkpoint.parent.iterdir()) == {checkpoint, other}
    assert common.load_checkpoint(checkpoint, state(0))[1]["step"] == 2


def test_kill_while_saving_again_and_again(checkpoint):
    child = start(f"import common, numpy\n"
                  f"tree = numpy.zeros(300_000)\n"
                  f"while True:\n"
                  f"    common.save_checkpoint({str(checkpoint)!r}, {{}}, tree)\n"
                  f"    print('saved', flush=True)")
    for _ in range(3):
        child.stdout.readline()
    time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert common.load_checkpoint(checkpoint, np.zeros(300_000))[1].shape == (300_000,)
    assert len(list(checkpoint.parent.iterdir())) <= 2


WRITERS = {
    "checkpoint": "common.save_checkpoint(path, {}, numpy.zeros(10**6))",
    "json": "common.write_json(path, list(range(10**5)))",
    "log": "[common.log_line(path + '-run', {'step': step, 'text': 1000 * 'x'}) for step in range(10**3)]",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as Linux has it")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_full_disk_is_one_line(tmp_path, write):
    """A limit on the size of a file fails in the middle of a write, as a full disk does."""
    path = tmp_path / "file"
    path.write_text("old")
    child = start(f"import common, numpy, resource\n"
                  f"def main(path={str(path)!r}):\n"
                  f"    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
                  f"    {write}\n"
                  f"common.run(main)")
    out, error = child.communicate()
    assert child.returncode == 2 and out == ""
    assert re.fullmatch(rf"error: {path}.*: not written, .*\n", error)
    assert path.read_text() == "old" and set(os.listdir(tmp_path)) <= {"file", "file-run"}


def test_no_space_left(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    common.write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: common.write_json(tmp_path / "a.json", 2))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/a.json: not written, [Errno 28] No space left on device\n"
    assert (tmp_path / "a.json").read_text() == "1\n" and os.listdir(tmp_path) == ["a.json"]


def test_json_holds_every_kind_of_number(tmp_path):
    value = {"nan": float("nan"), "inf": np.float32("inf"), "array": np.array([[1.5, np.nan]]), "jax": jnp.int32(3),
             "flag": np.bool_(True), "path": Path("a"), 7: (1, None, "text"), "bf16": jnp.bfloat16(0.5)}
    common.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "nan": None, "inf": None, "array": [[1.5, None]], "jax": 3, "flag": True, "path": "a", "7": [1, None, "text"],
        "bf16": 0.5}


def test_log_is_cut_where_a_run_resumes(tmp_path):
    folder = tmp_path / "fm-zn"
    assert common.read_log(folder) == []
    for step in range(5):
        common.log_line(folder, {"step": step, "loss": np.float32(step) if step else np.nan})
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    assert [record["step"] for record in common.read_log(folder)] == [0, 1, 2, 3, 4]
    common.cut_log(folder, 2)
    common.log_line(folder, {"step": 3, "loss": 9.0})
    assert common.read_log(folder) == [{"step": 0, "loss": None}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0},
                                       {"step": 3, "loss": 9.0}]
    common.cut_log(folder)
    assert common.read_log(folder) == [] and os.listdir(folder) == ["log.jsonl"]


def test_damaged_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="log.jsonl: damaged"):
        common.read_log(tmp_path)


# --------------------------------------------------------------------------------------------------- flags, errors

def test_defaults():
    args = common.parser("doc", "fm", steps={"zn": 11, "zp": 9}, lr=3e-4).parse_args(["--detector", "zp"])
    assert (args.steps, args.lr, args.script, args.run) == (9, 3e-4, "fm", Path("runs/fm-zp"))
    assert args.command == "python fm.py --detector zp"
    assert args.resume is False and args.load is None
    args = common.parser("doc", "fm", steps={"zn": 11, "zp": 9}).parse_args(["--steps", "4", "--run", "here"])
    assert (args.steps, args.run, args.epochs) == (4, Path("here"), 10)  # defaults of one script stay with it


def test_help_tells_defaults_and_units(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line break inside a folder's name
    with pytest.raises(SystemExit) as stop:
        common.parser("An equation: x = y\n  z", "fm", steps={"zn": 11, "zp": 9}).parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "An equation: x = y z" in text
    for name in common.FLAGS:
        assert "--" + name.replace("_", "-") in text
    assert "steps of the sampler (default: zn 11, zp 9)" in text and "(default: zn runs/fm-zn, zp runs/fm-zp)" in text


def test_a_script_may_have_fewer_flags():
    args = common.parser("doc", "data", flags=("detector", "n"), n=7).parse_args([])
    assert vars(args) == {"script": "data", "command": "python data.py", "detector": "zn", "n": 7}
    with pytest.raises(TypeError, match="steps"):
        common.parser("doc", "data", flags=("detector", "n"), steps=7)


@pytest.mark.parametrize("flags, message", [
    ("--detector zx", "argument --detector: invalid choice: 'zx'"),
    ("--n 0", "argument --n: must be between 1 and 1000000000, got 0"),
    ("--n many", "argument --n: invalid int value: 'many'"),
    ("--epochs -1", "argument --epochs: must be between 1 and 1000000"),
    ("--lr nan", "argument --lr: must be between 0 and 1, got nan"),
    ("--lr inf", "argument --lr: must be between 0 and 1"),
    ("--seed 4294967296", "argument --seed: must be between 0 and 4294967295"),
    ("--batch-size", "argument --batch-size: expected one argument"),
    ("--precision f16", "argument --precision: invalid choice"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("file", "unrecognized arguments: file"),
    ("--generate particles.h5", "--generate needs --load, a checkpoint such as weights/"),
    ("--load model.eqx --generate particles.h5", "--generate needs --out"),
    ("--load model.eqx --resume", "--resume continues a training, it does not go with --load"),
    ("--batch-size 9 --devices 2", "--batch-size must be a multiple of --devices"),
])
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parser("doc", "fm").parse_args(flags.split())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_number():
    fraction = common.number(float, 0, 1)
    assert fraction("0.25") == 0.25 and common.number(int, 3)("3") == 3
    for text in ("1.5", "-1e-9", "nan"):
        with pytest.raises(ArgumentTypeError, match="between 0 and 1"):
            fraction(text)
    with pytest.raises(ArgumentTypeError, match="at least 0"):
        common.number(float, 0)("inf")


@pytest.mark.parametrize("error, code, message", [
    (UserError("a.h5: expected\n  this"), 2, "error: a.h5: expected this\n"),
    (FileNotFoundError(2, "No such file", "a.h5"), 2, "error: [Errno 2] No such file: 'a.h5'\n"),
    (MemoryError(), 2, "error: out of memory\n"),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 2, "error: the device is out of memory"),
    (KeyboardInterrupt(), 130, ""),
])
def test_run_ends_in_one_line(error, code, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        common.run(main)
    out = capsys.readouterr().err
    assert stop.value.code == code and out.startswith(message) and out.count("\n") == (code == 2)


def test_run_hides_no_bug():
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)
    assert common.run(lambda: None) is None


def test_check_finite():
    common.check_finite(jnp.float32(1), 3, None)
    with pytest.raises(UserError, match="loss is nan at step 7.*good checkpoint: runs/fm-zn/state.eqx"):
        common.check_finite(jnp.float32("nan"), 7, Path("runs/fm-zn/state.eqx"))
    with pytest.raises(UserError, match="loss is inf at step 7.*good checkpoint: none"):
        common.check_finite(np.inf, 7, None)


# ------------------------------------------------------------------------------------------------------------ plots

def picture(path):
    """The file as an array; more than one colour in it."""
    pixels = imread(path)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    return pixels


def test_plots(tmp_path):
    rng = np.random.default_rng(0)
    data, generated = rng.poisson(0.5, (2, 3, 56, 30)).astype(np.uint16)
    data[1] = 0  # a response without light
    common.plot_samples(tmp_path / "samples.png", {"data": data, "model": generated}, ["gamma", "n", "K0S"])
    common.plot_channels(tmp_path / "channels.png", rng.exponential(300, (500, 5)), np.zeros((500, 5)))
    common.plot_training(tmp_path / "training.png", [{"step": 1, "loss": 2.0, "W": None}, {"step": 2, "loss": 1.0},
                                                     {"step": 3, "loss": None, "W": 3.0}])
    common.plot_sweep(tmp_path / "sweep.png", [{"steps": n, "W": 9 / n, "ms_per_response": n / 9} for n in (1, 4, 9)])
    points = [{"label": f"eta {eta}", "steps": n, "W": 9 / n, "ms_per_response": n / 9, "eta": eta} for eta in (0, 1) for n in (1, 4)]
    points += [{"label": "4 steps", "steps": 4, "W": 2, "ms_per_response": 1, "eta": eta, "oracle": 1} for eta in (0, 0.5, 1)]
    common.plot_sweep(tmp_path / "eta.png", points)
    common.plot_sweep(tmp_path / "one.png", points[:1])
    assert sorted(os.listdir(tmp_path)) == ["channels.png", "eta.png", "one.png", "samples.png", "sweep.png", "training.png"]
    for path in tmp_path.iterdir():
        assert picture(path).shape[1] > 300
    assert picture(tmp_path / "eta.png").shape[1] > 1.4 * picture(tmp_path / "sweep.png").shape[1]       # a panel more


def test_plotting_is_loaded_lazily():
    out, error = start("import sys, common; print('matplotlib' in sys.modules)").communicate()
    assert out == "False\n" and error == ""


# --------------------------------------------------------------------------------------------- timing and devices

def test_time_sampler():
    calls = []

    def sample(size):
        calls.append(size)
        time.sleep(0.2 if calls.count(size) == 1 else 0.01)  # the first call compiles
        return jnp.zeros(size)
    times = common.time_sampler(sample, sizes=(1, 10), repeats=3)
    assert calls == [1] * 4 + [10] * 4
    assert times.keys() == {"ms_per_response", "compile_seconds"}
    assert 10 <= times["ms_per_response"]["1"] < 150 and 1 <= times["ms_per_response"]["10"] < 15
    assert all(0 < seconds < 1 for seconds in times["compile_seconds"].values())  # about 0.19


def test_progress(capsys):
    assert list(common.progress(3, "epoch", quiet=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(common.progress("ab", "epoch")) == ["a", "b"]
    assert "epoch: 100%" in capsys.readouterr().err


def test_count_parameters():
    assert common.count_parameters(state(0)["model"]) == 2 * 3 + 3 + 3 * 2 + 2
    assert common.count_parameters({"key": jax.random.key(0), "step": jnp.int32(3), "w": jnp.zeros((2, 5))}) == 10


def test_what_made_a_result(monkeypatch):
    assert {"zdc", "python", "jax", "equinox", "numpy"} <= common.versions().keys()
    assert re.fullmatch(r".+, \d+ cores", common.device_name())


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("ZDC_CACHE", "/some/where")
    assert common.cache_folder() == Path("/some/where")
    monkeypatch.delenv("ZDC_CACHE")
    assert common.cache_folder() == Path.home() / ".cache" / "zdc"


def test_compiled_code_is_kept(tmp_path):
    code = "import common, jax; common.enable_compilation_cache(); print(jax.jit(lambda x: 3 * x)(14.0))"
    for _ in range(2):
        out, error = start(code, ZDC_CACHE=str(tmp_path)).communicate()
        assert out == "42.0\n" and error == ""
    assert [path for path in tmp_path.glob("xla/*/*") if "lambda" in path.name]


def test_mesh_of_two_devices():
    mesh = common.batch_mesh(2)
    assert mesh.axis_names == ("batch",) and mesh.axis_types == (AxisType.Auto,)
    x, w = np.arange(24, dtype=np.float32).reshape(8, 3), model().layers[0].weight
    sharded, weights = common.shard_batch({"x": x}, mesh)["x"], common.replicate(w, mesh)
    assert [shard.data.shape for shard in sharded.addressable_shards] == [(4, 3)] * 2
    assert weights.sharding.is_fully_replicated and len(weights.sharding.device_set) == 2
    f = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.tanh(x @ w[:, :1]))))
    for one, two in zip(f(jnp.zeros((3, 2)) + 0.1, x), f(common.replicate(jnp.zeros((3, 2)) + 0.1, mesh), sharded)):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    assert_equal_bits(common.replicate(model(), mesh), model())
    with pytest.raises(UserError, match="--devices 3: JAX sees 2"):
        common.batch_mesh(3)


HOST = """
import common, jax, numpy
common.initialize_hosts()
mesh = common.batch_mesh(4)
rows = numpy.full((2, 3), 1.0 + jax.process_index())
total = jax.jit(lambda w, x: (w * x).sum())(common.replicate(numpy.float32(2), mesh), common.shard_batch(rows, mesh))
common.log_line({folder!r}, {{"step": jax.process_index()}})
print(jax.process_index(), jax.process_count(), float(total))
"""


def test_two_hosts(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [start(HOST.format(folder=str(tmp_path)), ZDC_COORDINATOR=f"localhost:{port}", ZDC_PROCESSES="2",
                   ZDC_PROCESS_ID=str(i)) for i in range(2)]
    outputs = [host.communicate(timeout=100) for host in hosts]
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["0 2 36.0"], ["1 2 36.0"]], outputs
    assert common.read_log(tmp_path) == [{"step": 0}]


def test_half_an_address_of_hosts(monkeypatch):
    common.initialize_hosts()  # nothing set, nothing done
    monkeypatch.setenv("ZDC_PROCESSES", "2")
    with pytest.raises(UserError, match="ZDC_COORDINATOR, ZDC_PROCESSES, ZDC_PROCESS_ID: expected"):
        common.initialize_hosts()
