"""Wrong input ends in one line that names the file or flag, exit code 2, and nothing written or lost."""
import subprocess
import sys
from functools import partial
from pathlib import Path

import equinox as eqx
import h5py
import jax
import numpy as np
import pytest

import common
import data
import diffusion
import fm
import gan
import iaf
import latent_fm
import metrics
import solvers
import tiny
import vae
import vqgan

ROOT = Path(__file__).parent.parent
ROW = [500.0, 0, 0, 0, 0.3, 0.4, 499.99968, 0, 0]                              # a photon of 500 GeV
NAMES = ",".join(data.FEATURES)


def table(**changed):
    """Three photons (3, 9); a change is made in the last."""
    rows = np.tile(np.array(ROW), (3, 1))
    for name, value in changed.items():
        rows[2, data.FEATURES.index(name)] = value
    return rows


def hdf5(path, **arrays):
    attributes = {"detector": arrays.pop("detector")} if "detector" in arrays else {}
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
        file.attrs.update(attributes)


def dataset(path, shape=(44, 44), **changed):
    good = {"responses": np.ones((3, *shape), np.uint16), "particles": table(), "pdg": np.full(3, 22)}
    hdf5(path, **good | changed)


def pixel(value):
    return np.where(np.arange(3 * 44 * 44).reshape(3, 44, 44) == 5000, value, 1.0)


def checkpoint(path, detector="zn", **changed):
    """A checkpoint as fm.py writes it, of a network of zeros. A change to None removes an entry."""
    args = fm.parse(["--detector", detector, "--net", "tiny"])
    scaler = data.fit_conditions(table(), args.cond)
    header = args.header | {"scaler": scaler._asdict(), "scores": {"train_seconds": 1.0, "step_seconds": 1.0}}
    header = {name: value for name, value in (header | changed).items() if value is not None}
    network = partial(fm.make_network, "tiny", args.counts, data.DETECTORS[detector], len(scaler.mean))
    make = partial(solvers.unfitted, network, args.steps)
    half = lambda leaf: np.float16 if leaf.dtype == np.float32 else leaf.dtype
    zeros = lambda leaf: np.zeros(leaf.shape, half(leaf)) if hasattr(leaf, "dtype") else leaf
    common.save_checkpoint(path, header, jax.tree.map(zeros, eqx.filter_eval_shape(make, jax.random.key(0))))


def repacked(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of good and bad files."""
    folder = tmp_path_factory.mktemp("inputs")
    file = lambda name: folder / name
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        checkpoint(file("good.eqx"))
        checkpoint(file("zp.eqx"), "zp")
        checkpoint(file("gan.eqx"), script="gan")
        checkpoint(file("format.eqx"), format="zdc-checkpoint-0")
        checkpoint(file("state.eqx"), scaler=None, scores=None)                # a state is no model
        flags = fm.parse(["--net", "tiny", "--cond", "raw"]).header["flags"]
        checkpoint(file("net.eqx"), flags=flags)                               # with arrays for 14 conditions
        good = file("good.eqx").read_bytes()
        damaged = {"truncated": good[:-100], "longer": good + b"0", "empty": b"", "text": b"hello\n",
                   "flipped": good.replace(b'"zn"', b'"zp"')}
        for name, content in damaged.items():
            file(f"{name}.eqx").write_bytes(content)
        yield folder


@pytest.fixture(scope="module")
def files(inputs):
    file = lambda name: inputs / name
    # particle lists
    hdf5(file("list.h5"), particles=table())
    hdf5(file("no-particles.h5"), pdg=np.zeros(3, int))
    hdf5(file("wide.h5"), particles=np.ones((3, 8)))
    hdf5(file("flat.h5"), particles=np.ones(9))
    hdf5(file("scalar.h5"), particles=np.float64(1))
    hdf5(file("none.h5"), particles=np.ones((0, 9)))
    hdf5(file("text.h5"), particles=np.full((3, 9), b"1"))
    hdf5(file("nan.h5"), particles=table(py=np.nan))
    hdf5(file("mev.h5"), particles=table(px=300.0, py=400.0, pz=499999.68))
    hdf5(file("negative.h5"), particles=table(E=-500.0))
    hdf5(file("pz.h5"), particles=table(px=300.0, py=400.0, pz=0.0))
    hdf5(file("huge.h5"), particles=table(E=1e39, pz=1e39))
    hdf5(file("thin.h5"), particles=table(px=300.0, py=400.0, pz=1e-300))
    hdf5(file("short-pdg.h5"), particles=table(), pdg=np.full(2, 22))
    hdf5(file("half-pdg.h5"), particles=table(), pdg=np.full(3, 22.5))
    hdf5(file("infinite-pdg.h5"), particles=table(), pdg=np.full(3, np.inf))
    with h5py.File(file("group.h5"), "w") as group:
        group["particles/E"] = np.ones(3)
    with h5py.File(file("pdg-group.h5"), "w") as group:
        group["particles"], group["pdg/codes"] = table(), np.full(3, 22)
    file("not.h5").write_text("hello")
    repacked_good = file("list.h5").read_bytes()
    file("cut.h5").write_bytes(repacked_good[:len(repacked_good) // 2])
    np.savez(file("key.npz"), particles=table())
    np.savez(file("zero.npz"), np.float64(1))
    np.savez(file("object.npz"), np.array([ROW, None], dtype=object))
    np.savez_compressed(file("damaged.npz"), np.random.default_rng(0).random((100, 9)))
    repacked(file("damaged.npz"), lambda data: data[:300] + bytes([data[300] ^ 255]) + data[301:])
    file("not.npz").write_text("hello")
    with open(file("array.npz"), "wb") as array:
        np.save(array, table())                                                # npy under another name
    file("list.csv").write_text(f"{NAMES}\n{','.join(map(str, ROW))}\n")
    file("empty.csv").write_text("")
    file("header.csv").write_text(f"{NAMES}\n")
    file("headless.csv").write_text(f"{','.join(map(str, ROW))}\n")
    file("word.csv").write_text(f"{NAMES}\n{','.join(map(str, ROW[:-1]))},one\n")
    file("ragged.csv").write_text(f"{NAMES}\n{','.join(map(str, ROW))}\n1,2\n")
    file("narrow.csv").write_text(f"{NAMES},pdg\n{','.join(map(str, ROW))}\n")
    file("binary.csv").write_bytes(bytes(range(256)))
    # data sets
    dataset(file("set.h5"))
    dataset(file("zp.h5"), detector="zp")
    dataset(file("shape.h5"), shape=(44, 43))
    dataset(file("flat-responses.h5"), responses=np.ones((3, 1936)))
    dataset(file("no-responses.h5"), responses=None)
    dataset(file("rows.h5"), responses=np.ones((2, 44, 44)))
    dataset(file("below.h5"), responses=pixel(-1))
    dataset(file("above.h5"), responses=pixel(70_000))
    dataset(file("nan-pixel.h5"), responses=pixel(np.nan))
    dataset(file("scaled.h5"), responses=pixel(0.5))
    dataset(file("complex.h5"), responses=pixel(1j))
    for name in ("folder", "pair", "pair9"):
        file(name).mkdir()
    np.savez(file("pair") / "data_nonrandom_responses.npz", np.ones((3, 44, 44)))
    np.savez(file("pair9") / "data_nonrandom_responses.npz", np.ones((3, 44, 44)))
    np.savez(file("pair9") / "data_nonrandom_particles.npz", np.ones((3, 7)))
    file("plain").write_text("a plain file")
    file("out.h5").write_text("an old file")
    return inputs


GENERATE = "--load good.eqx --out out.h5 --generate"
CASES = {   # flags: what the line must name
    "--detector zx": "--detector",
    "--n 0": "--n",
    "--n 1000000000000": "--n",
    "--n 99999999999999999999": "--n",
    "--n 1": "--batch-size",
    "--n 50": "--batch-size",
    "--epochs none": "--epochs",
    "--epochs 99999999999999999999": "--epochs",
    "--steps 0": "--steps",
    "--steps 1001": "--steps",
    "--batch-size 0": "--batch-size",
    "--batch-size 1": "--batch-size",
    "--batch-size 36": "--batch-size",
    "--lr -1": "--lr",
    "--seed -1": "--seed",
    "--seed 4294967296": "--seed",
    "--devices 0": "--devices",
    "--devices 64 --n 100": "--devices",
    "--ema 1": "--ema",
    "--net unet": "--net",
    "--solver heun": "--solver",
    "--counts poisson": "--counts",
    "--precision f16": "--precision",
    "--split half": "--split",
    "--nonsense": "--nonsense",
    "extra": "extra",
    "--load good.eqx --generate list.h5": "--out",
    "--generate list.h5 --out out.h5": "--load",
    "--load missing.eqx": "missing.eqx",
    "--load folder": "folder",
    "--load list.h5": "list.h5",
    "--load truncated.eqx": "truncated.eqx",
    "--load longer.eqx": "longer.eqx",
    "--load flipped.eqx": "flipped.eqx",
    "--load empty.eqx": "empty.eqx",
    "--load text.eqx": "text.eqx",
    "--load format.eqx": "format.eqx",
    "--load gan.eqx": "gan.eqx",
    "--load zp.eqx": "zp.eqx",
    "--load net.eqx": "net.eqx",
    "--load state.eqx": "state.eqx",
    "--load good.eqx --detector zp": "good.eqx",
    "--load truncated.eqx --out out.h5 --generate list.h5": "truncated.eqx",
    "--load state.eqx --out out.h5 --generate list.h5": "state.eqx",
    "--load good.eqx --resume": "--resume",
    "--resume --n 100": "state.eqx",
    "--run plain --n 100": "plain",
    "--load good.eqx --generate list.h5 --out folder": "folder",
    "--load good.eqx --generate list.h5 --out plain/out.h5": "plain/out.h5",
    "--load good.eqx --generate list.h5 --out /proc/out.h5": "/proc/out.h5",
    "--load good.eqx --generate list.h5 --out /dev/null": "/dev/null",
    **{f"{GENERATE} {name}": name for name in (
        "missing.h5", "missing.csv", "missing.npz", "folder", "no-particles.h5", "wide.h5", "flat.h5",
        "scalar.h5", "none.h5", "text.h5", "nan.h5", "mev.h5", "negative.h5", "pz.h5", "huge.h5", "thin.h5",
        "short-pdg.h5", "half-pdg.h5", "infinite-pdg.h5", "group.h5", "pdg-group.h5", "not.h5", "cut.h5",
        "key.npz", "zero.npz", "object.npz", "damaged.npz", "not.npz", "array.npz", "empty.csv", "header.csv",
        "headless.csv", "word.csv", "ragged.csv", "narrow.csv", "binary.csv", "good.eqx")},
    **{f"--data {name}": name for name in (
        "missing.h5", "folder", "list.h5", "zp.h5", "shape.h5", "flat-responses.h5", "no-responses.h5",
        "rows.h5", "below.h5", "above.h5", "nan-pixel.h5", "scaled.h5", "complex.h5", "pair", "pair9",
        "not.h5", "nan.h5", "plain")},
    "--data set.h5 --detector zp": "set.h5",
    "--data set.h5": "--batch-size",
    "--load good.eqx --generate list.h5 --out good.eqx": "good.eqx",
    "--load good.eqx --generate list.h5 --out ./list.h5": "list.h5",
}


def snapshot(folder):
    """Everything below a folder, files with their bytes."""
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture(autouse=True)
def warnings_are_lines(recwarn):
    yield                                                                      # pytest keeps them from stderr
    assert not [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]


def assert_one_line(code, out, error, name, before, folder):
    assert code == 2 and error.startswith("error: ") and error.index("\n") == len(error) - 1, error
    assert name in error and "Traceback" not in out
    assert snapshot(folder) == before


@pytest.mark.parametrize("flags, name", CASES.items(), ids=[flags.replace("/", "|") for flags in CASES])
def test_bad_input_of_fm(flags, name, files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    before = snapshot(files)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: fm.main([*tiny.FLAGS, "--n", "50", *flags.split()]))
    assert_one_line(stop.value.code, *capfd.readouterr(), name, before, files)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return tmp_path_factory.mktemp("small")


@pytest.mark.parametrize("flags, name", [
    ("--load missing.eqx", "missing.eqx"), ("--load good.eqx", "good.eqx"), ("--resume", "state.eqx"),
    ("--data missing.h5", "missing.h5"), ("--data shape.h5", "shape.h5"), ("--run plain", "plain"),
    ("--batch-size 500", "--batch-size"), ("--generate set.h5", "--load"), ("--lr nan", "--lr"),
    ("--epochs 0", "--epochs"), ("--devices 3 --batch-size 9", "--devices"),
])
@pytest.mark.parametrize("module", [diffusion, gan, iaf, latent_fm, vae, vqgan])
def test_bad_input_of_the_other_scripts(module, flags, name, files, small_data, monkeypatch, capfd):
    tiny.shrink_detectors(monkeypatch, small_data)
    monkeypatch.chdir(files)
    before = snapshot(files)
    first = ["--warm", "0"] if module is gan else []                           # no steps before the others
    every = ["--n", "50", "--batch-size", "16", "--quiet"]
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: module.main([*every, *first, *flags.split()]))
    assert_one_line(stop.value.code, *capfd.readouterr(), name, before, files)


@pytest.mark.parametrize("module, flags, name", [
    (metrics, "set.h5", "generated"),
    (metrics, "set.h5 missing.h5", "missing.h5"),
    (metrics, "set.h5 shape.h5", "shape.h5"),
    (metrics, "set.h5 set.h5 --convention o3", "--convention"),
    (metrics, "set.h5 set.h5 --oracle nan-pixel.h5", "nan-pixel.h5"),
    (metrics, "set.h5 set.h5 --detector zp", "set.h5"),
    (metrics, "set.h5 set.h5 --no-classifier --json folder", "folder"),
    (data, "--n many", "--n"),
    (data, "--detector both", "--detector"),
    (data, "--n 5 --out folder --quiet", "folder"),
    (data, "--n 5 --out plain/zn.h5 --quiet", "plain/zn.h5"),
])
def test_bad_input_of_the_others(module, flags, name, files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    before = snapshot(files)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: module.main(flags.split()))
    assert_one_line(stop.value.code, *capfd.readouterr(), name, before, files)


@pytest.mark.parametrize("command, name", [
    ("fm.py --load missing.eqx", "missing.eqx"),
    ("metrics.py set.h5 cut.h5 --json scores.json", "cut.h5"),
    ("data.py --n 0 --out zn.h5", "--n"),
])
def test_as_a_command(command, name, files):
    script, *flags = command.split()
    before = snapshot(files)
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=files, text=True, capture_output=True)
    assert_one_line(done.returncode, done.stdout, done.stderr, name, before, files)


def test_cache_that_cannot_be_written(files, monkeypatch, capfd):
    monkeypatch.chdir(files)
    monkeypatch.setenv("ZDC_CACHE", "plain")
    before = snapshot(files)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: fm.main([*tiny.FLAGS, "--n", "100"]))
    assert_one_line(stop.value.code, *capfd.readouterr(), "plain", before, files)


def test_a_damaged_cache_is_named(files, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(files)
    monkeypatch.setenv("ZDC_CACHE", str(tmp_path))
    data.open_data("zn", 40, quiet=True)
    [path] = tmp_path.glob("*.h5")
    repacked(path, lambda data: data[:-1000])
    before = snapshot(files)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: fm.main([*tiny.FLAGS, "--n", "40"]))
    assert_one_line(stop.value.code, *capfd.readouterr(), path.name, before, files)
