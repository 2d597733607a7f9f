"""Small runs for tests: a tiny network, small detectors, one generation, one timing, a token classifier.

Pictures are not drawn (those of test_common.py are).
"""
import itertools
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import numpy as np
import pytest

import common
import data
import files
import fm
import judge
import metrics
import plots
import simulator
import solvers

FLAGS = ["--net", "tiny", "--n", "700", "--epochs", "1", "--batch-size", "64", "--steps", "2", "--quiet"]
SHAPES = {"zn": (12, 12), "zp": (14, 10)}


def shrink(put=setattr):
    """`put` is setattr or a monkeypatch's."""
    small = partial(fm.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
    put(fm, "NETWORKS", fm.NETWORKS | {"tiny": small})
    time_sampler = common.time_sampler

    def time_one_size(draw, width, sizes, **_):
        return time_sampler(draw, width, (64,) if len(sizes) > 1 else sizes, repeats=1)
    put(common, "time_sampler", time_one_size)
    put(common, "BLOCK", 64)
    put(solvers, "ITERATIONS", 2)
    for name in ("plot_samples", "plot_channels", "plot_training", "_save_figure"):
        put(plots, name, lambda path, *_: path.write_bytes(b"a picture"))
    put(metrics, "GENERATIONS", 1)
    put(metrics, "TRAININGS", 1)
    put(judge, "TREES", judge.TREES | dict(max_iter=2))
    put(judge, "NETWORK", judge.NETWORK | dict(rows=60, epochs=1, batch=20, width=8))


def shrink_detectors(patch, folder):
    """Detectors of 144 and 140 fibres, for runs that take time for each; their data lie in `folder`."""
    if not (Path(folder) / "xla").exists():
        (Path(folder) / "xla").symlink_to(common.cache_folder() / "xla")       # what is compiled already
    patch.setenv("ZDC_CACHE", str(folder))
    for name, shape in SHAPES.items():
        patch.setitem(simulator.DETECTORS, name, simulator.DETECTORS[name]._replace(shape=shape))


def save(path, dataset, **attributes):
    """Write a data.Dataset as HDF5."""
    data.save_blocks(path, len(dataset.pdg), [dataset._asdict()], **attributes)


def clock(pause=0.0):
    """Replaces the module time in common.py: 61 s pass between two looks, so that every log line saves."""
    ticks = itertools.count(0, 61)

    def perf_counter():
        time.sleep(pause)
        return float(next(ticks))
    return SimpleNamespace(perf_counter=perf_counter)


def assert_resume_is_as_uninterrupted(run, folder, monkeypatch, stages=(None,)):
    """A training that is cut off and resumed gives the network of one that is not.

    `run(*flags)` trains past step 12 and returns its network. `stages` are the folders of the run in which it
    is cut off, one after the other.
    """
    monkeypatch.setattr(common, "LOGGED", 4)
    whole, log = run("--run", folder / "whole"), files.log_line
    for stage in stages:
        def cut(path, record):
            log(path, record)
            if record["step"] == 12 and stage in (None, path.name):  # saved last: the state of step 8
                raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files, "log_line", cut)
            run("--run", folder / f"cut{stage or ''}")
        resumed = run("--run", folder / f"cut{stage or ''}", "--resume")
        pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs if eqx.is_array(a)), stage
