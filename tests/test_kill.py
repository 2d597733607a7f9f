"""kill -9 in the middle of a run or of a file that is being written."""
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import common
import data
import files
import fm
import metrics
import solvers
import tiny

CHILD = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent.parent)!r}, {str(Path(__file__).parent)!r}]
import common, fm, metrics, pytest, time, tiny
tiny.shrink()
tiny.shrink_detectors(pytest.MonkeyPatch(), sys.argv.pop())
{{patches}}
common.run(fm.main)
"""


def start(folder, patches, flags):
    code, cache = CHILD.format(patches=patches), str(common.cache_folder())
    command = [sys.executable, "-c", code, *tiny.FLAGS, *flags, cache]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE)


def kill_when(child, ready):
    """SIGKILL the child once `ready()`; it must not have come to its end before."""
    limit = time.time() + 120
    while not ready():
        assert child.poll() is None and time.time() < limit
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def losses(folder):
    log = files.read_log(folder)
    return [{name: value for name, value in record.items() if name != "seconds"} for record in log]


def leaves(path):
    return path.read_bytes().partition(b"\n")[2]


@pytest.fixture(autouse=True)
def small(monkeypatch, small_detectors, tmp_path):
    tiny.shrink(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)


def test_killed_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "report", lambda *args, **kwargs: {})         # scoring takes longer
    monkeypatch.setattr(common, "LOGGED", 10)
    flags = ["--epochs", "9"]                                                  # 63 steps, saved every 10
    log = tmp_path / "cut" / "log.jsonl"
    slow = "common.LOGGED, common.time = 10, tiny.clock(pause=0.3)"
    child = start(tmp_path, slow, [*flags, "--run", "cut"])
    kill_when(child, lambda: log.exists() and log.read_text().count("\n") >= 3)
    assert common.read_header(tmp_path / "cut" / "state.eqx")["step"] in (10, 20, 30)
    with open(log, "a") as file:
        file.write('{"step": 31, "pa')                                        # killed while writing a line
    fm.main([*tiny.FLAGS, *flags, "--run", "cut", "--resume"])
    fm.main([*tiny.FLAGS, *flags, "--run", "whole"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 7
    for name in ("model.eqx", "state.eqx"):
        assert leaves(tmp_path / "cut" / name) == leaves(tmp_path / "whole" / name)


def test_killed_generation(tmp_path):
    args, out = fm.parse([*tiny.FLAGS, "--run", str(tmp_path)]), tmp_path / "out.h5"
    dataset = data.open_data("zn", 700, quiet=True)
    tiny.save(tmp_path / "list.h5", dataset)
    scaler = data.fit_conditions(dataset.particles, args.cond)
    network = partial(fm.make_network, "tiny", args.counts, data.DETECTORS["zn"], len(scaler.mean))
    model = solvers.unfitted(network, args.steps, jax.random.key(0))
    common.save_model(tmp_path, args.header, scaler, {}, model)
    out.write_bytes(b"an old file")
    # two blocks are in the file when it is killed
    child = start(tmp_path, "common.BLOCK = 4\nchannels = metrics.channels\n"
                  "metrics.channels = lambda r: print('block', flush=True) or time.sleep(0.2) or channels(r)",
                  "--load model.eqx --generate list.h5 --out out.h5 --all-hit".split())
    for _ in range(3):
        assert child.stdout.readline() == "block\n"
    [part] = tmp_path.glob(".out.*")
    kill_when(child, lambda: True)
    assert part.exists() and out.read_bytes() == b"an old file"
    fm.main("--load model.eqx --generate list.h5 --out out.h5 --all-hit --quiet".split())
    assert np.array_equal(data.load(out, "zn").particles, dataset.particles)
