"""The checked-in weights: small, of the results beside them, and ready to generate."""
import importlib
import json

import h5py
import numpy as np
import pytest

import common
import data
import metrics
from readme_tables import ROOT

PATHS = sorted((ROOT / "weights").glob("*.eqx"))
PARTICLES = 64


def test_they_are_small():
    assert PATHS and sum(path.stat().st_size for path in (ROOT / "weights").iterdir()) < 20e6


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_generate(path, tmp_path, monkeypatch):
    """Responses of known particles are about as bright as the simulator's; the file is of the row in the json file."""
    header, row = common.read_header(path), json.loads(path.with_suffix(".json").read_text())
    assert f"{header['script']}-{header['detector']}" == path.stem
    assert header["parameters"] <= row["parameters"] * 1.01 and header["flags"] == row["flags"]
    dataset = data.open_data(header["detector"], 700, quiet=True)
    with h5py.File(tmp_path / "list.h5", "w") as file:
        file["particles"], file["pdg"] = dataset.particles[:PARTICLES], dataset.pdg[:PARTICLES]
    monkeypatch.setattr(metrics, "BLOCK", PARTICLES)
    steps = ["--steps", "4"] if header["script"] in ("fm", "latent_fm", "diffusion") else []
    script = importlib.import_module(header["script"])
    script.main(["--detector", header["detector"], "--load", str(path), *steps, "--generate", str(tmp_path / "list.h5"), "--out",
                 str(tmp_path / "out.h5"), "--quiet"])
    made, real = data.load(tmp_path / "out.h5", header["detector"]).responses, dataset.responses[:PARTICLES]
    sums, real_sums = (counts.sum((1, 2), dtype=np.float64) for counts in (made, real))
    assert made.shape == real.shape and (made > 0).mean() == pytest.approx((real > 0).mean(), rel=0.3)
    assert sums.mean() == pytest.approx(real_sums.mean(), rel=0.3) and np.corrcoef(sums, real_sums)[0, 1] > 0.7
