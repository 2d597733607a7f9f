"""The checked-in weights: of the results beside them, and ready to generate."""
import importlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import calodream
import calorimeter
import common
import data
import gan
import hit

WEIGHTS = Path(common.__file__).parent / "weights"
PATHS = sorted(path for path in WEIGHTS.glob("*.eqx") if path.stem.split("-")[0] not in ("calodream", "hit"))
PARTICLES = 64


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """{detector: (Dataset of 64 rows, path of their particle list)}."""
    found = {}
    for name in data.DETECTORS:
        dataset = data.select(data.open_data(name, 700, quiet=True), slice(PARTICLES))
        path = tmp_path_factory.mktemp("lists") / f"{name}.h5"
        with h5py.File(path, "w") as file:
            file["particles"], file["pdg"] = dataset.particles, dataset.pdg
        found[name] = dataset, path
    return found


def test_every_framework_has_weights_for_both_detectors():
    scripts = "diffusion", "fm", "gan", "iaf", "latent_fm", "vae", "vqgan"
    names = [f"{script}-{name}" for script in scripts for name in ("zn", "zp")]
    assert [path.stem for path in PATHS] == names


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_generate(path, lists, tmp_path, monkeypatch):
    """Responses of known particles are about as bright as the simulator's; the json file is of that run."""
    header, row = common.read_header(path), json.loads(path.with_suffix(".json").read_text())
    assert f"{header['script']}-{header['detector']}" == path.stem
    assert header["flags"] == row["flags"]
    dataset, particles = lists[header["detector"]]
    monkeypatch.setattr(common, "BLOCK", PARTICLES)
    steps = ["--steps", "4"] if header["script"] in ("fm", "latent_fm") else []
    importlib.import_module(header["script"]).main([
        "--detector", header["detector"], "--load", str(path), *steps, "--generate", str(particles), "--out",
        str(tmp_path / "out.h5"), "--all-hit", "--quiet"])
    made, real = data.load(tmp_path / "out.h5", header["detector"]).responses, dataset.responses
    sums, real_sums = (counts.sum((1, 2), dtype=np.float64) for counts in (made, real))
    assert made.shape == real.shape and (made > 0).mean() == pytest.approx((real > 0).mean(), rel=0.3)
    assert sums.mean() == pytest.approx(real_sums.mean(), rel=0.3)
    assert np.corrcoef(sums, real_sums)[0, 1] > 0.7


@pytest.mark.parametrize("name", data.DETECTORS)
def test_the_network_of_hits_knows_who_gives_light(name, tmp_path):
    """Of a list before the cut, as many as the simulator's own runs, and the same ones."""
    particles, sums, _ = hit.runs_before_the_cut(name, 2000, 9, fresh=True, copies=20, quiet=True)
    data.save_blocks(tmp_path / "list.h5", 2000, [{"particles": particles}])
    gan.main(["--detector", name, "--load", str(WEIGHTS / f"gan-{name}.eqx"), "--generate",
              str(tmp_path / "list.h5"), "--out", str(tmp_path / "out.h5"), "--quiet"])
    light = data.load(tmp_path / "out.h5", name).responses.sum((1, 2))
    rates = [(found >= 10).reshape(-1, 20).mean(1) for found in (light, sums)]
    assert np.corrcoef(*rates)[0, 1] > 0.95 and rates[0].mean() == pytest.approx(rates[1].mean(), abs=0.05)


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("calodream-*.eqx")), ids=lambda path: path.stem)
def test_showers(path, tmp_path):
    """Electrons deposit about as much as those of the stand-in, and not all the same."""
    header, out = common.read_header(path), tmp_path / "showers.hdf5"
    (tmp_path / "energies.csv").write_text("\n".join(["20000"] * 40))
    flags = ["--load", str(path), "--generate", str(tmp_path / "energies.csv"), "--out", str(out), "--quiet"]
    calodream.main(["--set", header["detector"], *flags])
    showers = calorimeter.load_showers(out, calorimeter.CALORIMETERS[header["detector"]])
    shares = showers.voxels.sum((1, 2, 3)) / showers.energies
    assert shares.mean() == pytest.approx(0.785, abs=0.05) and 0.01 < shares.std() < 0.2
