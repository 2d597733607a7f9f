"""common.py and plots.py: flags, files, checkpoints, log book, layers, batches, timing, devices, pictures."""
import io
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType
from matplotlib.image import imread

import common
import data
import files
import plots
import tiny
from common import UserError

ROOT = Path(__file__).parent.parent
KEY = jax.random.key(0)


def start(code, **environment):
    """Start Python on `code` in the repository root."""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, env=os.environ | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def model(key=0, width=3):
    return eqx.nn.MLP(2, 2, width, 1, key=jax.random.key(key))


def state(seed):
    """What a training script saves: a model, an optimiser's arrays, a step, and other kinds of leaves."""
    half = jnp.arange(3, dtype=jnp.bfloat16) + seed
    return {"model": model(seed), "half": half, "count": np.arange(2) + seed, "step": seed,
            "rate": 0.1 * seed, "done": False, "none": None}


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert type(x) is type(y)
        if eqx.is_array(x):
            assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert x == y or callable(x)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "fm-zn.eqx"
    common.save_checkpoint(path, {"script": "fm", "detector": "zn"}, state(5))
    return path


# ----------------------------------------------------------------------------------------------------- errors

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


def test_a_loss_that_is_not_finite_is_named():
    common.check_finite(jnp.float32(1), 3, None)
    with pytest.raises(UserError, match="loss is nan at step 7.*good checkpoint: runs/fm-zn/state.eqx"):
        common.check_finite(jnp.float32("nan"), 7, Path("runs/fm-zn/state.eqx"))
    with pytest.raises(UserError, match="loss is inf at step 7.*good checkpoint: none"):
        common.check_finite(np.inf, 7, None)


# ------------------------------------------------------------------------------------------------------ flags

def test_number():
    fraction = common.number(float, 0, 1)
    assert fraction("0.25") == 0.25 and common.number(int, 3)("3") == 3
    for text in ("1.5", "-1e-9", "nan"):
        with pytest.raises(ArgumentTypeError, match="between 0 and 1"):
            fraction(text)
    with pytest.raises(ArgumentTypeError, match="at least 0"):
        common.number(float, 0)("inf")


def test_defaults_of_a_script():
    args = common.parser("doc", "fm", steps={"zn": 11, "zp": 9}, lr=3e-4).parse_args(["--detector", "zp"])
    assert (args.steps, args.lr, args.script, args.run) == (9, 3e-4, "fm", Path("runs/fm-zp"))
    assert args.command == "python fm.py --detector zp"
    assert args.resume is False and args.load is None
    args = common.parser("doc", "fm", steps={"zn": 11, "zp": 9}).parse_args(["--steps", "4", "--run", "here"])
    assert (args.steps, args.run, args.epochs) == (4, Path("here"), 10)  # defaults of one script stay with it


def test_a_default_may_be_a_function_of_the_other_flags():
    rate = lambda args: 1e-3 * args.batch_size / args.steps
    parser = common.parser("doc", "fm", lr=rate, steps={"zn": 2, "zp": 4})
    assert parser.parse_args(["--batch-size", "8"]).lr == 4e-3
    assert parser.parse_args(["--batch-size", "8", "--detector", "zp"]).lr == 2e-3
    assert parser.parse_args(["--lr", "0.5"]).lr == 0.5


def test_help_states_defaults_and_units(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line break inside a folder's name
    with pytest.raises(SystemExit) as stop:
        parser = common.parser("An equation: x = y\n  z", "fm", steps={"zn": 11, "zp": 9}, lr=len)
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "An equation: x = y z" in text and "function" not in text
    for name in common.FLAGS:
        assert "--" + name.replace("_", "-") in text
    assert "steps of the sampler (default: zn 11, zp 9)" in text and "random numbers (default: 0)" in text
    assert "folder of the run (default: runs/SCRIPT-DETECTOR)" in text


def test_a_script_may_have_fewer_flags():
    args = common.parser("doc", "data", flags=("detector", "n"), n=7).parse_args([])
    header = {"script": "data", "detector": "zn", "flags": {"n": 7, "data": None, "finetune": None}}
    expected = {"script": "data", "command": "python data.py", "detector": "zn", "n": 7, "header": header}
    assert vars(args) == expected
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
    ("--generate particles.h5", "--generate needs --out and --load, such as weights/fm-zn.eqx"),
    ("--load model.eqx --generate particles.h5", "--generate needs --out"),
    ("--load model.eqx --resume", "--resume and --finetune train, they do not go with --load"),
    ("--batch-size 9 --devices 2", "--batch-size must be a multiple of --devices"),
])
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        common.parser("doc", "fm").parse_args(flags.split())
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def own_parser():
    parser = common.parser("doc", "fm", own=("width",), n=50)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--note", default="")
    return parser


def test_header_holds_the_flags_that_decide_what_is_trained():
    args = own_parser().parse_args(["--width", "7", "--lr", "0.5", "--data", "a/b", "--note", "x", "--quiet"])
    assert args.header["script"] == "fm" and args.header["detector"] == "zn"
    flags = {name: getattr(args, name) for name in ("width", *common.TRAINING)}
    flags |= {"data": "a/b", "finetune": None}
    assert args.header["flags"] == flags and flags["lr"] == 0.5
    assert not {"note", "quiet", "devices", "steps", "run"} & set(flags)


def test_a_loaded_checkpoint_brings_its_own_flags_and_data_back(tmp_path):
    args = own_parser().parse_args(["--width", "7", "--n", "99", "--cond", "raw"])
    scaler = data.Scaler([0.0], [1.0], "raw")
    common.save_model(tmp_path, args.header, scaler, {"train_seconds": 1.0}, model())
    load = ["--load", str(tmp_path / "model.eqx")]
    again = own_parser().parse_args([*load, "--width", "3", "--n", "5", "--steps", "3", "--lr", "0.1"])
    assert (again.width, again.n, again.cond, again.split) == (7, 99, "raw", "rows")
    assert (again.steps, again.lr) == (3, 0.1)                                 # those of the command
    assert again.header == common.read_header(tmp_path / "model.eqx")
    other = common.parser("doc", "fm", own=("height",))
    with pytest.raises(UserError, match="model.eqx: made by another version, without --height"):
        other.parse_args(load)
    with pytest.raises(UserError, match="made by detector zn, expected detector zp"):
        own_parser().parse_args([*load, "--detector", "zp"])
    common.save_checkpoint(tmp_path / "state.eqx", args.header | {"rows": 9}, model())
    with pytest.raises(UserError, match="state.eqx: the state of a run, expected its model.eqx"):
        own_parser().parse_args(["--load", str(tmp_path / "state.eqx")])


def test_plan_is_the_flags_of_a_training():
    args = own_parser().parse_args(["--epochs", "3", "--seed", "5", "--resume"])
    plan = common.plan(args)
    assert all(getattr(plan, name) == getattr(args, name) for name in plan._fields)
    longer = plan._replace(epochs=9)
    assert (longer.epochs, plan.epochs, args.epochs) == (9, 3, 3)
    one, two = map(jax.random.key_data, plan.keys)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(jax.random.key_data(longer.keys), [one, two])
    assert not np.array_equal(jax.random.key_data(plan._replace(seed=6).keys)[0], one)


# ------------------------------------------------------------------------------------------------------ files

def test_write_atomic_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    for text in ("old", "new"):
        with files.write_atomic(path) as temporary:
            temporary.write_text(text)
            assert temporary.parent == path.parent and temporary.suffix == ".txt"
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_exception_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.write_atomic(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_write_follows_links(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    files.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "target.json").read_text() == "1\n"


@pytest.mark.parametrize("path", [os.devnull, "."])
def test_devices_and_folders_are_not_replaced(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        files.write_json(path, 1)
    assert not Path(path).is_file()


def test_kill_keeps_the_old_file_and_leftovers_go(checkpoint):
    old = checkpoint.read_bytes()
    child = start(f"import files, time\n"
                  f"with files.write_atomic({str(checkpoint)!r}) as temporary:\n"
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
    "checkpoint": lambda path: common.save_checkpoint(path, {}, np.zeros(10**6)),
    "json": lambda path: files.write_json(path, list(range(10**5))),
    "log": lambda path: [files.log_line(f"{path}-run", {"step": k, "text": 1000 * "x"}) for k in range(999)],
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as Linux has it")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_full_disk_is_one_line(write, tmp_path, capsys):
    """A limit on the size of a file fails in the middle of a write, as a full disk does."""
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(SystemExit) as stop:
            common.run(partial(write, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert stop.value.code == 2
    assert re.fullmatch(rf"error: {path}.*: not written, .*\n", capsys.readouterr().err)
    assert path.read_text() == "old" and set(os.listdir(tmp_path)) <= {"file", "file-run"}


def test_no_space_left(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    files.write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: files.write_json(tmp_path / "a.json", 2))
    assert stop.value.code == 2
    message = f"error: {tmp_path}/a.json: not written, [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == message
    assert (tmp_path / "a.json").read_text() == "1\n" and os.listdir(tmp_path) == ["a.json"]


def test_json_holds_every_kind_of_number(tmp_path):
    value = {"nan": float("nan"), "inf": np.float32("inf"), "array": np.array([[1.5, np.nan]]),
             "jax": jnp.int32(3), "bf16": jnp.bfloat16(0.5), "flag": np.bool_(True), "path": Path("a"),
             7: (1, None, "text")}
    files.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "nan": None, "inf": None, "array": [[1.5, None]], "jax": 3, "bf16": 0.5, "flag": True, "path": "a",
        "7": [1, None, "text"]}


def test_log_is_cut_where_a_run_resumes(tmp_path):
    folder = tmp_path / "fm-zn"
    assert files.read_log(folder) == []
    for step in range(5):
        files.log_line(folder, {"step": step, "loss": np.float32(step) if step else np.nan})
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # as a kill leaves it
    assert [record["step"] for record in files.read_log(folder)] == [0, 1, 2, 3, 4]
    files.cut_log(folder, 2)
    files.log_line(folder, {"step": 3, "loss": 9.0})
    assert files.read_log(folder) == [{"step": 0, "loss": None}, {"step": 1, "loss": 1.0},
                                       {"step": 2, "loss": 2.0}, {"step": 3, "loss": 9.0}]
    files.cut_log(folder)
    assert files.read_log(folder) == [] and os.listdir(folder) == ["log.jsonl"]


def test_damaged_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match="log.jsonl: damaged"):
        files.read_log(tmp_path)


# ------------------------------------------------------------------------------------------------ checkpoints

def test_cast_changes_floating_point_arrays_alone():
    half = common.cast(state(3), jnp.float16)
    assert half["half"].dtype == half["model"].layers[0].weight.dtype == jnp.float16
    assert half["count"].dtype == np.arange(2).dtype and (half["step"], half["rate"]) == (3, 0.1 * 3)
    assert common.lower(model(), "bf16").layers[0].weight.dtype == jnp.bfloat16
    net = model()
    assert common.lower(net, "f32") is net


def test_checkpoint_returns_the_same_bits(checkpoint):
    header, tree = common.load_checkpoint(checkpoint, state(0), "fm", "zn")
    assert_equal_bits(tree, state(5))
    assert header == common.read_header(checkpoint)
    assert header["format"] == common.FORMAT and header["versions"]["jax"] == jax.__version__


def test_model_is_kept_in_float16(tmp_path):
    """What is returned and loaded again is the same network, float16 numbers in float32."""
    make = lambda key, width=500: eqx.nn.MLP(2, 2, width, 1, key=key)
    net, scaler = make(jax.random.key(3)), data.Scaler(np.float32([0.1]), np.float32([2.0]), "raw")
    header, path = {"script": "fm", "detector": "zn", "flags": {}}, tmp_path / "model.eqx"
    kept = common.save_model(tmp_path, header, scaler, {"step_seconds": 1.5}, net)
    assert_equal_bits(common.load_model(path, make), kept)
    arrays = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (net, kept))
    for exact, found in zip(*arrays, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.float16(exact).astype(np.float32))
    assert path.stat().st_size < 2 * common.count_parameters(net) + 2000
    header = common.read_header(path)
    assert header["parameters"] == common.count_parameters(net) and header["scores"] == {"step_seconds": 1.5}
    assert header["train_device"] == common.device_name()
    stored = data.stored_scaler(header)
    assert stored.mode == "raw" and np.float32(stored.mean) == scaler.mean
    with pytest.raises(UserError, match="model.eqx: holds other arrays"):
        common.load_model(path, partial(make, width=400))


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
    for read in (common.read_header, partial(common.load_checkpoint, like=state(0))):
        with pytest.raises(UserError, match=f"fm-zn.eqx: {message}"):
            read(checkpoint)


def test_any_flipped_byte_is_found(tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "a.eqx"
    common.save_checkpoint(path, {"script": "fm"}, model(1))
    content, expected = path.read_bytes(), common.load_checkpoint(path, model())

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, len(content) - 1), st.integers(1, 255))
    def flip(position, bits):
        path.write_bytes(content[:position] + bytes([content[position] ^ bits]) + content[position + 1:])
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
    (state(0) | {"model": model(width=4)}, "fm", "zn", r"holds other arrays .*\((3|4), 2\).*\((3|4), 2\)"),
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
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
    assert not re.search(r"import (c?loud)?pickle|from pickle|allow_pickle=True|joblib|torch\.load", sources)


# -------------------------------------------------------------------------------------- progress and log book

def test_progress(capsys):
    assert list(common.progress(3, "epoch", quiet=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(common.progress("ab", "epoch")) == ["a", "b"]
    assert "epoch: 100%" in capsys.readouterr().err


def plan_of(folder, **changed):
    header = {"script": "fm", "detector": "zn", "flags": {"lr": changed.get("lr", 0.1), "net": "tiny"}}
    plan = common.Plan(header=header, run=folder, epochs=1, batch_size=8, lr=0.1, quiet=True)
    return plan._replace(**changed)


def keep_book(plan, steps=20, stop=None, rows=70, loss=lambda step: 2.0):
    """Keep the book of `steps` steps, each of which adds 1 to the state; up to the step `stop`."""
    with common.Logbook(plan, rows, steps) as book:
        state = book.begin(jnp.zeros(()))
        while book.step < (stop or steps):
            state = state + 1
            book.record(state, {"loss": jnp.float32(loss(book.step + 1)), "norm": jnp.float32(1.0)})
        return state, book.end() if stop is None else None


@pytest.fixture
def every_minute(monkeypatch):
    """A log line every four steps, each of them a minute after the other."""
    monkeypatch.setattr(common, "LOGGED", 4)
    monkeypatch.setattr(common, "time", tiny.clock())


def test_logbook_logs_and_saves(tmp_path, every_minute):
    times = keep_book(plan_of(tmp_path), steps=18)[1]
    log = files.read_log(tmp_path)
    assert [record["step"] for record in log] == [4, 8, 12, 16, 18]
    assert log[0] == {"step": 4, "seconds": 61.0, "loss": 2.0, "norm": 1.0}
    assert times == {"train_seconds": 61.0 * 6, "step_seconds": 61 / 4}        # median of 61 / (4, 4, 4, 2)
    header, state = common.load_checkpoint(tmp_path / "state.eqx", jnp.zeros(()), "fm", "zn")
    assert (header["step"], header["rows"], state) == (18, 70, 18)
    assert header["flags"] == {"lr": 0.1, "net": "tiny"}


def test_logbook_asks_the_device_only_where_it_logs(tmp_path, every_minute):
    asked = []

    class Loss:
        def __float__(self):
            asked.append(1)
            return 1.0
    with common.Logbook(plan_of(tmp_path), 70, 9) as book:
        book.begin(jnp.zeros(()))
        for _ in range(9):
            book.record(jnp.zeros(()), {"loss": Loss()})
    assert len(asked) == 3


def test_logbook_saves_once_a_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "LOGGED", 1)
    saved, save = [], common.save_checkpoint
    monkeypatch.setattr(common, "save_checkpoint", lambda path, header, state: saved.append(header["step"]) or
                        save(path, header, state))
    ticks = iter(25.0 * k for k in range(99))
    monkeypatch.setattr(common, "time", type("Clock", (), {"perf_counter": lambda: next(ticks)}))
    keep_book(plan_of(tmp_path), steps=10)
    assert saved == [3, 6, 9, 10]                                              # every 75 s, and at the end


def test_logbook_resumes(tmp_path, every_minute):
    plan = plan_of(tmp_path)
    keep_book(plan, stop=14)                                                   # saved at step 12
    files.log_line(tmp_path, {"step": 16, "seconds": 9.0, "loss": 0.0})       # of a run that got further
    resumed = plan._replace(resume=True)
    with common.Logbook(resumed, 70, 20) as book:
        assert book.begin(jnp.zeros(())) == 12 and book.step == 12
        assert [record["step"] for record in files.read_log(tmp_path)] == [4, 8, 12]
    state, times = keep_book(resumed)
    assert state == 20 and [record["step"] for record in files.read_log(tmp_path)] == [4, 8, 12, 16, 20]
    assert times["train_seconds"] == 61 * 3 + 61 * 3                           # of both parts
    assert keep_book(resumed)[0] == 20                                         # nothing is left to do
    keep_book(plan, stop=4)                                                    # a fresh run begins a new log
    assert [record["step"] for record in files.read_log(tmp_path)] == [4]


def test_a_state_of_an_earlier_run_is_not_resumed(tmp_path, every_minute):
    """Neither its own, when a fresh run was cut off before its first save, nor that of a second training."""
    first, second = plan_of(tmp_path / "first"), plan_of(tmp_path / "second")
    assert not common.saved_after(second.run, first.run)
    for plan in (first, second):
        keep_book(plan)
    assert common.saved_after(second.run, first.run)
    keep_book(first, stop=8)                                                   # saved, then cut off
    assert not common.saved_after(second.run, first.run)
    keep_book(first, stop=1)                                                   # cut off before it is saved
    with pytest.raises(UserError, match="expected a checkpoint"):
        keep_book(first._replace(resume=True))


def test_resume_needs_the_same_flags_and_rows(tmp_path, every_minute):
    keep_book(plan_of(tmp_path), stop=8)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="state.eqx: --resume needs the flags of the first.*different: lr$"):
        keep_book(plan_of(tmp_path, lr=0.2, resume=True))
    with pytest.raises(UserError, match="state.eqx: --resume .*different: rows of the data"):
        keep_book(plan_of(tmp_path, resume=True), rows=71)
    with pytest.raises(UserError, match="state.eqx: expected a checkpoint"):
        keep_book(plan_of(tmp_path / "other", resume=True))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_loss_that_diverges_keeps_the_last_good_state(tmp_path, every_minute):
    with pytest.raises(UserError, match="loss is nan at step 12, last good checkpoint: .*state.eqx"):
        keep_book(plan_of(tmp_path), loss=lambda step: math.nan if step > 9 else 1.0)
    assert common.load_checkpoint(tmp_path / "state.eqx", jnp.zeros(()))[1] == 8
    assert [record["step"] for record in files.read_log(tmp_path)] == [4, 8]


# ----------------------------------------------------------------------------------------------------- layers

def test_linear_is_that_of_equinox():
    layer, reference = common.Linear(3, 5, KEY, scale=2.0), eqx.nn.Linear(3, 5, key=KEY)
    x = jax.random.normal(jax.random.key(1), (4, 2, 3))
    expected = jax.vmap(jax.vmap(lambda x: 2 * reference.weight @ x + reference.bias))(x)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)
    assert common.cast(layer, jnp.bfloat16)(x).dtype == jnp.bfloat16           # in the format of its weights


def test_linear_without_bias():
    layer = common.Linear(400, 300, KEY, scale=0.5, bias=False)
    assert layer.bias is None and layer.weight.shape == (300, 400)
    assert float(layer.weight.std() * 20) == pytest.approx(0.5, rel=0.02)
    assert not layer(jnp.zeros((2, 400))).any()
    np.testing.assert_array_equal(layer.weight, 0.5 * common.normal(KEY, 400, 300).T)


def test_mlp_is_that_of_equinox():
    ours, reference = common.MLP(KEY, 3, 7, 7, 2), eqx.nn.MLP(3, 2, 7, 2, jax.nn.silu, key=KEY)
    weights = lambda net: [array for layer in net.layers for array in (layer.weight, layer.bias)]
    reference = eqx.tree_at(weights, reference, weights(ours))
    x = jax.random.normal(jax.random.key(1), (4, 3))
    np.testing.assert_allclose(ours(x), jax.vmap(reference)(x), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(ours.layers[0].weight[:, 0], ours.layers[1].weight[:, 0])


def test_normal_and_normalise():
    weights = common.normal(KEY, 3, 3, 50, 400)
    assert float(weights.std()) == pytest.approx((9 * 50) ** -0.5, rel=0.02)   # by fan-in
    assert float(common.normal(KEY, 50, 400, scale=2.0).std()) == pytest.approx(2, rel=0.02)
    h = 5 * jax.random.normal(KEY, (4, 8))
    np.testing.assert_allclose(jnp.mean(common.normalise(h)**2, -1), 1, rtol=1e-5)
    reference = jax.vmap(eqx.nn.RMSNorm(8, use_weight=False, use_bias=False, eps=1e-6))
    np.testing.assert_allclose(common.normalise(h), reference(h), rtol=1e-5)


# ------------------------------------------------------------------------------ optimiser, batches and blocks

def test_moving_average_starts_fast_and_keeps_what_is_no_weight():
    old, new = {"w": jnp.ones(2), "count": jnp.int32(1)}, {"w": jnp.zeros(2), "count": jnp.int32(9)}
    for step, decay in ((0, 0.1), (8, 0.5), (10**6, 0.99)):
        mixed = common.moving_average(old, new, 0.99, step)
        np.testing.assert_allclose(mixed["w"], decay, rtol=1e-5)
        assert mixed["count"] == 1


def test_first_state_holds_copies():
    net = model()
    state = common.first_state(net, optax.sgd(0.1, momentum=0.9))
    assert_equal_bits(state.ema, net)
    assert state.net is net and state.ema.layers[0].weight is not net.layers[0].weight


def test_adamw_follows_its_schedule():
    """A constant gradient moves a weight by the learning rate in each step, without the decay."""
    optimiser = common.adamw(plan_of(None, lr=0.1), 100, weight_decay=0.0)
    weight, moves = jnp.ones(1), []
    state = optimiser.init(weight)
    update = jax.jit(optimiser.update)
    for _ in range(100):
        change, state = update(jnp.full(1, 1e-3), state, weight)
        moves.append(-float(change[0]))
    peak = int(np.argmax(moves))
    assert max(moves) == pytest.approx(0.1, rel=0.05) and moves[-1] < 1e-3
    assert 8 <= peak <= 12


def test_adamw_clips_gradients():
    """A gradient a million times as long changes neither the step nor the optimiser's state."""
    optimiser = common.adamw(plan_of(None), 100, weight_decay=0.0)
    weight = jnp.ones(2)
    update = lambda gradient: optimiser.update(gradient, optimiser.init(weight), weight)
    short, long = (update(jnp.array([3.0, 4.0]) * size) for size in (1, 1e6))
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 200), size=st.integers(1, 50))
def test_shuffled_batches_visit_every_row_once(n, size):
    rows = np.arange(n) * 3 + 1
    found = common.shuffled(rows, size, np.random.default_rng(0))
    assert found.shape == (n // size, size) and len(set(found.ravel())) == found.size
    assert set(found.ravel()) <= set(rows)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(8, 60), size=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99), part=st.floats(0, 1))
def test_batches_start_anywhere(n, size, seed, part):
    """In the middle of an epoch and at the end of one as well: the rest of those of the whole training."""
    rows, per_epoch = np.random.default_rng(n).permutation(100)[:n], n // size
    arrays, mesh = (np.arange(100), -np.arange(100)[:, None]), common.batch_mesh(2)
    plan = plan_of(None, seed=seed, epochs=3, batch_size=size)
    expected = [np.random.default_rng([seed, epoch]).permutation(rows)[k * size:(k + 1) * size]
                for epoch in range(3) for k in range(per_epoch)]
    for start in {0, per_epoch, 3 * per_epoch, int(part * 3 * per_epoch)}:
        found = list(common.batches(arrays, rows, plan, mesh, start))
        assert len(found) == len(expected) - start
        for (here, other), batch in zip(found, expected[start:], strict=True):
            assert len(here.sharding.device_set) == 2
            assert np.array_equal(here, batch) and np.array_equal(other, -batch[:, None])


def test_in_blocks_is_one_call_after_the_other(monkeypatch):
    monkeypatch.setattr(common, "BLOCK", 4)
    shapes = []

    def function(x, y, key):
        shapes.append((x.shape, y.shape))
        return x.sum(-1) + 10 * y + jax.random.uniform(key)
    x, y = np.arange(22.0).reshape(11, 2), np.arange(11)
    found = common.in_blocks(function, KEY, x, y)
    assert shapes == [((4, 2), (4,))] * 3 and found.shape == (11,)             # the last one is filled up
    noise = found - x.sum(-1) - 10 * y
    assert np.ptp(noise[:4]) < 1e-5 and len(np.unique(noise[::4].round(4))) == 3     # each has its own key
    np.testing.assert_array_equal(common.in_blocks(function, KEY, x[:6], y[:6]), found[:6])


# ---------------------------------------------------------------------------------------------- time and cost

def test_time_sampler(monkeypatch):
    calls = []

    def draw(c, key):
        calls.append(c.shape)
        time.sleep(0.2 if calls.count(c.shape) == 1 else 0.01)                 # the first call compiles
        return jnp.zeros(len(c))
    times = common.time_sampler(draw, 3, sizes=(1, 10), repeats=3)
    assert calls == [(1, 3)] * 4 + [(10, 3)] * 4
    assert times.keys() == {"ms_per_response", "compile_seconds"}
    assert 10 <= times["ms_per_response"]["1"] < 150 and 1 <= times["ms_per_response"]["10"] < 15
    assert all(0 < seconds < 1 for seconds in times["compile_seconds"].values())     # about 0.19
    monkeypatch.setattr(common, "BLOCK", 4)
    calls.clear()
    common.time_sampler(draw, 3, sizes=(10,), repeats=1)
    assert calls == [(4, 3)] * 6                                               # in blocks, as in generating


def test_seconds_waits_for_the_end(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    assert common.seconds(lambda x: 2 * x, 21) >= 0 and waited == [42]


def test_network_cost():
    cost = common.network_cost(model(), (2,))
    assert cost["parameters"] == 2 * 3 + 3 + 3 * 2 + 2
    assert cost["mflop"] == pytest.approx(2 * (2 * 3 + 3 * 2) / 1e6, rel=0.5)
    net = lambda x, c: x @ jnp.ones((100, 50)) + c
    assert common.network_cost(eqx.Partial(net), (30, 100), (50,))["mflop"] == pytest.approx(0.3, rel=0.02)


def test_count_parameters():
    assert common.count_parameters(model()) == 2 * 3 + 3 + 3 * 2 + 2
    assert common.count_parameters({"key": KEY, "step": jnp.int32(3), "w": jnp.zeros((2, 5))}) == 10


# ---------------------------------------------------------------------------------------- machine and devices

def test_what_made_a_result():
    assert {"zdc", "python", "jax", "equinox", "numpy"} <= common.versions().keys()
    assert re.fullmatch(r".+, \d+ cores", common.device_name())


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("ZDC_CACHE", "/some/where")
    assert common.cache_folder() == Path("/some/where")
    monkeypatch.delenv("ZDC_CACHE")
    assert common.cache_folder() == Path.home() / ".cache" / "zdc"


def test_compiled_code_is_kept_and_matplotlib_loaded_lazily(tmp_path):
    code = ("import common, jax, plots, sys; common.prepare_jax(); "
            "print(jax.jit(lambda x: 3 * x)(14.0), 'matplotlib' in sys.modules)")
    for _ in range(2):
        out, error = start(code, ZDC_CACHE=str(tmp_path)).communicate()
        assert out == "42.0 False\n" and error == ""
    assert [path for path in tmp_path.glob("xla/*/*") if "lambda" in path.name]


def test_mesh_of_two_devices():
    mesh = common.batch_mesh(2)
    assert mesh.axis_names == ("batch",) and mesh.axis_types == (AxisType.Auto,)
    x, w = np.arange(24, dtype=np.float32).reshape(8, 3), model().layers[0].weight
    sharded, weights = common.shard_batch({"x": x}, mesh)["x"], common.replicate(w, mesh)
    assert [shard.data.shape for shard in sharded.addressable_shards] == [(4, 3)] * 2
    assert weights.sharding.is_fully_replicated and len(weights.sharding.device_set) == 2
    f = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.tanh(x @ w[:, :1]))))
    w = jnp.full((3, 2), 0.1)
    for one, two in zip(f(w, x), f(common.replicate(w, mesh), sharded)):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    assert_equal_bits(common.replicate(model(), mesh), model())
    with pytest.raises(UserError, match="--devices 3: JAX sees 2"):
        common.batch_mesh(3)


HOST = """
import common, files, jax, numpy
common.initialize_hosts()
mesh = common.batch_mesh(4)
rows = numpy.full((2, 3), 1.0 + jax.process_index())
w, x = common.replicate(numpy.float32(2), mesh), common.shard_batch(rows, mesh)
total = jax.jit(lambda w, x: (w * x).sum())(w, x)
files.log_line({folder!r}, {{"step": jax.process_index()}})
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
    assert files.read_log(tmp_path) == [{"step": 0}]


def test_half_an_address_of_hosts(monkeypatch):
    common.initialize_hosts()  # nothing set, nothing done
    monkeypatch.setenv("ZDC_PROCESSES", "2")
    with pytest.raises(UserError, match="ZDC_COORDINATOR, ZDC_PROCESSES, ZDC_PROCESS_ID: expected"):
        common.initialize_hosts()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone")
def test_threads_are_limited():
    """One thread of XLA's pool, which may run on every processor."""
    code = ("import common, jax, os; from pathlib import Path; reach = os.sched_getaffinity(0); "
            "common.parser('doc', 'fm').parse_args(['--threads', '1']); jax.numpy.ones(9) + 1; "
            "tasks = [*Path('/proc/self/task').iterdir()]; "
            "print(sum('XLAEigen' in (task / 'comm').read_text() for task in tasks), "
            "all(os.sched_getaffinity(int(task.name)) == reach for task in tasks))")
    one_device = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                           env=one_device)
    assert found.stdout.split() == ["1", "True"]


# --------------------------------------------------------------------------------------------------- pictures

def picture(path):
    """The file as an array; there are many colours in it."""
    pixels = imread(path)
    assert len(np.unique(pixels[..., 0])) > 10
    return pixels


def test_pictures_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    real, generated = rng.poisson(0.5, (2, 3, 56, 30)).astype(np.uint16)
    real[1] = 0  # a response without light
    plots.plot_samples(tmp_path / "samples.png", {"data": real, "model": generated}, ["gamma", "n", "K0S"])
    sums, others = rng.exponential(300, (2, 500, 5))
    plots.plot_channels(tmp_path / "channels.png", sums, others[:400])
    plots.plot_channels(tmp_path / "empty.png", sums, np.zeros((500, 5)))
    log = [{"step": 1, "loss": 2.0, "W": None}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None, "W": 3.0}]
    plots.plot_training(tmp_path / "training.png", log)
    assert sorted(os.listdir(tmp_path)) == ["channels.png", "empty.png", "samples.png", "training.png"]
    assert all(picture(path).shape[1] > 300 for path in tmp_path.iterdir())


def test_ratio_of_the_channels_is_that_of_the_densities(tmp_path, monkeypatch):
    """Ten data and five model rows below 550 photons, ten and twenty above, one far beyond."""
    figures = []
    monkeypatch.setattr(plots, "_save_figure", lambda path, figure: figures.append(figure))
    real = np.repeat([[1.0], [1000.0]], 10, axis=0) * np.ones(5)
    generated = np.repeat([[1.0], [1000.0], [9e9]], [5, 19, 1], axis=0) * np.ones(5)
    plots.plot_channels(tmp_path, real, generated)
    above, below = figures[0].axes[0], figures[0].axes[len(plots.CHANNEL_NAMES)]
    [points] = below.containers
    line, _, [bars] = points
    ratios, heights = line.get_ydata(), np.ptp([path.vertices[:, 1] for path in bars.get_paths()], axis=1) / 2
    np.testing.assert_allclose(ratios, [5 / 25 / (10 / 20), 19 / 25 / (10 / 20)])
    np.testing.assert_allclose(heights, ratios / np.sqrt([5, 19]))
    band = next(patch for patch in below.patches)
    values, edges, baseline = band.get_data()
    np.testing.assert_allclose(sorted(set(values)), [1, 1 + 10**-0.5])
    np.testing.assert_allclose(values - 1, 1 - baseline)
    density = above.patches[1].get_data()
    assert (density.values * np.diff(density.edges)).sum() == pytest.approx(1) and density.values[-1] > 0
