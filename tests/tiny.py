"""Makes the runs of tests small: a tiny network, one generation, one timing, a token classifier, pictures that are not drawn (those of
test_common.py and test_data.py are)."""
import itertools
import time
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import numpy as np
import pytest

import common
import data
import fm
import metrics

FLAGS = ["--net", "tiny", "--n", "700", "--epochs", "1", "--batch-size", "64", "--steps", "2", "--quiet"]


def shrink(put=setattr):
    """`put` is setattr or a monkeypatch's."""
    small = partial(fm.Dense, width=8, depth=1, down=2, up=2, hidden=4, embedding=8)
    put(fm, "NETWORKS", fm.NETWORKS | {"tiny": small})
    time_sampler = common.time_sampler
    put(common, "time_sampler", lambda sample, sizes: time_sampler(sample, (64,) if len(sizes) > 1 else sizes, repeats=1))
    put(common, "_save_figure", lambda path, figure: path.write_bytes(b"a picture"))
    put(metrics, "GENERATIONS", 1)
    put(metrics, "BLOCK", 64)
    put(metrics, "CLASSIFIER", metrics.CLASSIFIER | dict(rows=60, epochs=1, batch=20, trainings=1))


def shrink_detectors(patch, folder):
    """Detectors of 144 and 140 fibres, for runs that take their time with each; their data lie in `folder`."""
    patch.setenv("ZDC_CACHE", str(folder))
    patch.setattr(data, "DETECTORS", {name: data.DETECTORS[name]._replace(shape=shape) for name, shape in (("zn", (12, 12)), ("zp", (14, 10)))})


def clock(pause=0.0):
    """Stands in for the module time in common.py: 61 s pass between two looks at it, so that every log line saves."""
    ticks = itertools.count(0, 61)

    def perf_counter():
        time.sleep(pause)
        return float(next(ticks))
    return SimpleNamespace(perf_counter=perf_counter)


def assert_resume_is_as_uninterrupted(run, folder, monkeypatch, stages=(None,)):
    """`run(*flags)` trains past step 12 and returns its network: the same whole, and cut off there and continued. `stages` are the
    folders of the run in which it is cut off, one after the other."""
    monkeypatch.setattr(common, "LOGGED", 4)
    whole, log = run("--run", folder / "whole"), common.log_line
    for stage in stages:
        def cut(path, record):
            log(path, record)
            if record["step"] == 12 and stage in (None, path.name):            # saved last: the state of step 8
                raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common, "log_line", cut)
            run("--run", folder / f"cut{stage or ''}")
        resumed = run("--run", folder / f"cut{stage or ''}", "--resume")
        pairs = zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs if eqx.is_array(a)), stage
