"""calorimeter.py: files of the challenge and what can be wrong with them, the stand-in's parts against closed
forms, features against loops."""
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import integrate, stats

import calorimeter
from calorimeter import CALORIMETERS, MODEL, Calorimeter, Showers
from common import UserError

SMALL, ODD = CALORIMETERS["small"], Calorimeter("odd", (3, 7, 3), (0.0, 10.0, 25.5, 40.0), 3.4)
FLAT = np.full(500, 2e4, np.float32)                                           # two blocks of equal electrons


def assert_user_error(read, path, pattern):
    with pytest.raises(UserError) as raised:
        read(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and re.search(pattern, message), message


# ----------------------------------------------------------------------------------------- geometry and files

def binning(*layers):
    """A binning file of the challenge, of layers (r_edges, n_bin_alpha)."""
    lines = (f'<Layer id="{i}" r_edges="{r}" n_bin_alpha="{alpha}"/>' for i, (r, alpha) in enumerate(layers))
    return f'<Bins><Bin pid="11" name="electron">{"".join(lines)}</Bin></Bins>'


@pytest.mark.parametrize("cylinder", [*CALORIMETERS.values(), ODD], ids=lambda cylinder: cylinder.name)
def test_binning_round_trip(cylinder, tmp_path):
    calorimeter.write_binning(tmp_path / "odd.xml", cylinder)
    found = calorimeter.read_binning(tmp_path / "odd.xml")
    assert found._replace(edges=()) == cylinder._replace(edges=())
    np.testing.assert_allclose(found.edges, cylinder.edges, rtol=1e-6)


def test_binning_of_the_challenge(tmp_path):
    edges = "0,4.65,9.3,13.95,18.6,23.25,27.9,32.55,37.2,41.85"
    (tmp_path / "binning.xml").write_text(binning(*45 * [(edges, 16)]))
    found = calorimeter.read_binning(tmp_path / "binning.xml")
    assert (found.name, found.shape, found.edges[-1]) == ("ds2", (45, 16, 9), 41.85)
    np.testing.assert_allclose(found.middles[0][[0, 8]], (2.325, 39.525))
    np.testing.assert_allclose(found.middles[1], np.pi * np.arange(-15, 16, 2) / 16)


@pytest.mark.parametrize("text", [
    "", "r_edges", binning(), '<?xml version="1.0" encoding="none"?><Bins/>', "<Bins><Layer/></Bins>",
    *(binning(("0,1,2", 8), other) for other in (("0,1,3", 8), ("0,1,2", 9))),
    *(binning((edges, 8)) for edges in ("", "0", "0,one", "1,2", "0,2,1", "0,1,1", "0,nan,2", "0,inf")),
    *(binning(("0,1,2", alpha)) for alpha in ("", 0, -8, 2.5))])
def test_bad_binning(text, tmp_path):
    (tmp_path / "bad.xml").write_text(text)
    assert_user_error(calorimeter.read_binning, tmp_path / "bad.xml", "expected")
    assert_user_error(calorimeter.read_binning, tmp_path / "missing.xml", "expected the binning")


def test_showers_round_trip(tmp_path):
    showers = Showers(FLAT[:20], np.random.default_rng(0).exponential(1, (20, *ODD.shape)).astype(np.float32))
    halves = [Showers(*(part[k:k + 10] for part in showers)) for k in (0, 10)]
    calorimeter.save_showers(tmp_path / "set.hdf5", ODD, 20, halves)
    for n, rows in ((None, 20), (7, 7), (100, 20)):
        found = calorimeter.load_showers(tmp_path / "set.hdf5", ODD, n)
        assert all(np.array_equal(a, b[:rows]) and a.dtype == np.float32 for a, b in zip(found, showers))
    assert np.array_equal(calorimeter.read_energies(tmp_path / "set.hdf5"), showers.energies)


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def test_voxels_are_ordered_as_in_the_challenge(tmp_path):
    """r fastest, then the angle, then z: the features of single lit voxels are where those voxels are."""
    voxels, places = np.zeros((3, 63)), ((0, 0, 1), (1, 2, 0), (2, 6, 2))
    for row, (z, a, r) in zip(voxels, places):
        row[r + 3 * (a + 7 * z)] = 50
    write(tmp_path / "hand.hdf5", incident_energies=np.full((3, 1), 1e4), showers=voxels)
    showers = calorimeter.load_showers(tmp_path / "hand.hdf5", ODD)
    for found, (z, a, r) in zip(calorimeter.features(showers, ODD), places):
        radius, angle = (5, 17.75, 32.75)[r], 2 * np.pi * (a + 0.5) / 7 - np.pi
        expected = np.log10(50), radius * np.cos(angle) / 100, radius * np.sin(angle) / 100
        np.testing.assert_allclose(found[1 + z:10:3], expected, rtol=1e-5)    # energy, eta and phi of a layer


GOOD = {"incident_energies": np.full((4, 1), 1e4), "showers": np.ones((4, 63))}
SPOILT = np.where(np.arange(4 * 63).reshape(4, 63) == 200, 1.0, 0.0)
BAD = {"no showers": ({"showers": None}, "showers is missing"),
       "no energies": ({"incident_energies": None}, "incident_energies is missing"),
       "voxels of ds2": ({"showers": np.ones((4, 6480))}, r"63 voxels \(3, 7, 3\), not of shape \(4, 6480\)"),
       "negative": ({"showers": -SPOILT}, "negative"),
       "nan": ({"showers": SPOILT * np.nan}, "non-finite"),
       "text": ({"showers": np.full((4, 63), b"lit")}, "HDF5 file with incident_energies and showers"),
       "fewer showers": ({"showers": np.ones((3, 63))}, "4 incident energies for 3 showers"),
       "energies in GeV": ({"incident_energies": np.array([[1], [10], [100], [1000]])}, "1000 to 1e.06 MeV"),
       "energies in keV": ({"incident_energies": np.full((4, 1), 1e7)}, "1000 to 1e.06 MeV"),
       "no number": ({"incident_energies": np.array([1e4, 1e4, np.nan, 1e4])}, "MeV, found nan"),
       "two columns": ({"incident_energies": np.full((4, 2), 1e4)}, r"\(N, 1\), not \(4, 2\)")}


@pytest.mark.parametrize("case", BAD)
def test_bad_showers(case, tmp_path):
    changed, pattern = BAD[case]
    write(tmp_path / "bad.h5", **{name: part for name, part in (GOOD | changed).items() if part is not None})
    assert_user_error(lambda path: calorimeter.load_showers(path, ODD), tmp_path / "bad.h5", pattern)


def test_lists_of_energies_and_damaged_files(tmp_path):
    for text in ("1000\n2.5e5\n1e6\n", "incident_energies\n1000\r\n250000\n\n1000000"):
        (tmp_path / "list.csv").write_text(text)
        assert calorimeter.read_energies(tmp_path / "list.csv").tolist() == [1000, 250000, 1000000]
    for text in ("", "incident_energies\n", "E\n1000", "1000,2000", "1", "1000\nnan", "-1000"):
        (tmp_path / "list.csv").write_text(text)
        assert_user_error(calorimeter.read_energies, tmp_path / "list.csv", "expected")
    (tmp_path / "text.h5").write_text("incident_energies")
    for read in (calorimeter.read_energies, lambda path: calorimeter.load_showers(path, ODD)):
        assert_user_error(read, tmp_path / "text.h5", "expected an HDF5 file")
        assert_user_error(read, tmp_path / "missing.h5", "no such file")


# --------------------------------------------------------------------------------------------------- stand-in

def test_bytes_depend_on_the_seed_and_on_the_block():
    first = calorimeter.simulate(SMALL, FLAT, 7)
    assert first.shape == (500, *SMALL.shape) and first.dtype == np.float32
    assert np.array_equal(first, calorimeter.simulate(SMALL, FLAT, 7))
    assert np.array_equal(first[:250], calorimeter.simulate(SMALL, FLAT[:250], 7))
    assert not np.array_equal(first[:250], first[250:])
    for other in (8, 7 + (250 << 32)):                                         # the latter of another file
        again = calorimeter.simulate(SMALL, FLAT, other)
        assert not any(np.array_equal(a, b) for a in np.split(first, 2) for b in np.split(again, 2))


def test_energies_and_angles_of_showers():
    energies = calorimeter.draw_energies(4000, 1)
    assert stats.kstest(np.log10(energies), stats.uniform(3, 3).cdf).pvalue > 0.01
    half = MODEL | {"mean": MODEL["mean"] / 2}
    voxels, dark = (calorimeter.simulate(SMALL, energies, 1, model) for model in (MODEL, half))
    assert calorimeter.THRESHOLD <= voxels[voxels > 0].min() < 1.1 * calorimeter.THRESHOLD
    ratio, dark_ratio = ((showers.sum((1, 2, 3)) / energies).mean() for showers in (voxels, dark))
    assert ratio == pytest.approx(MODEL["mean"], rel=0.15)
    assert dark_ratio == pytest.approx(ratio / 2, rel=0.05)
    shares = voxels.sum((1, 3)) / voxels.sum((1, 2, 3))[:, None]               # of the angular bins
    assert (np.abs(shares.mean(0) - 1 / 8) < 4.5 * shares.std(0) / np.sqrt(len(shares))).all()


@pytest.mark.parametrize("start", [0, 4])                                      # in layers
def test_depths_are_gamma_distributed(start):
    edges, alpha, t_max = 0.8 * np.arange(46), np.array([1.2, 3.5, 6.0]), np.array([3, 6, 20])
    found = calorimeter._depth_profile(edges, np.full((1, 3), 0.8 * start), alpha[None], t_max[None],
                                       np.full((1, 3), 0.7))[0]
    cdf = lambda t: stats.gamma.cdf(t[:, None] - 0.8 * start, alpha, scale=t_max / (alpha - 1)).T
    np.testing.assert_allclose(found, 0.7 * np.diff(cdf(edges)) / cdf(2 * edges[-1:]), atol=1e-3)
    assert found[2].sum() < 0.95 * 0.7                                         # a late shower leaks


@pytest.mark.parametrize("radius", [0.5, 7.0, 60.0])
def test_rings_take_their_share_of_the_radial_density(radius):
    density = lambda r: 2 * r * radius**2 / (r**2 + radius**2)**2
    expected = [integrate.quad(density, *edges)[0] for edges in zip(ODD.edges, ODD.edges[1:])]
    np.testing.assert_allclose(calorimeter._ring_shares(np.full((2, 1), radius), ODD)[1, 0], expected)


def turned(per_ring, radius, depth):
    """_turned of branches of 4 GeV that all drift by depth / 2 mm into the direction 0.7."""
    rng = SimpleNamespace(standard_exponential=np.ones, uniform=lambda low, high, shape: np.full(shape, 0.7))
    energy, lengths = np.full(per_ring.shape[:2], 4.0), np.ones(per_ring.shape[:3])
    return calorimeter._turned(rng, per_ring, energy, depth * lengths, radius * lengths, ODD, {"angle": 1.0})


def test_turning_keeps_the_energy_of_a_ring():
    per_ring = np.random.default_rng(0).exponential(1, (5, 4, 3, 3))
    np.testing.assert_allclose(turned(per_ring, 30.0, 8.0).sum(2), per_ring.sum(1), rtol=1e-4)


@pytest.mark.parametrize("radius, depth", [(9.0, 0.0), (12.0, 10.0), (5.0, 30.0), (5.0, 400.0)])
def test_the_angle_follows_the_displaced_density(radius, depth):
    found, (r, angle), d = turned(np.ones((1, 1, 1, 3)), radius, depth)[0, 0], ODD.middles, min(depth / 2, 20)
    for a, ring in np.ndindex(7, 3):
        square = lambda phi: r[ring]**2 + d**2 - 2 * r[ring] * d * np.cos(phi - 0.7)   # of the distance
        density = lambda phi: 2 * radius**2 / (square(phi) + radius**2)**2
        whole = integrate.quad(density, -np.pi, np.pi, points=[0.7])[0]
        assert found[a, ring] == pytest.approx(density(angle[a]) / whole * 2 * np.pi / 7, rel=1e-3)


def test_spots_are_compound_poisson():
    expected = np.repeat(np.array([0, 2.0, 30.0], np.float32), 100_000).reshape(3, -1)
    voxels = calorimeter._spots(np.random.default_rng(0), expected, 8.0, 0.25)
    assert not voxels[0].any() and (voxels[1] == 0).mean() == pytest.approx(np.exp(-2 / 8), rel=0.01)
    np.testing.assert_allclose(voxels[1:].mean(1), (2, 30), rtol=0.03)
    np.testing.assert_allclose(voxels[1:].var(1), np.array((2, 30)) * 8 * (1 + 1 / 0.25), rtol=0.05)


def test_halo_and_track():
    halo = calorimeter._halo_reach(201, 6.8, {"upstream": 6.0, "downstream": 10.0})[100]   # layers of 3.4 mm
    assert halo.sum() == pytest.approx(1)
    np.testing.assert_allclose(halo[[97, 105]] / halo[100], np.exp(-1))
    voxels = np.zeros((20_000, 2, 4, 3), np.float32)
    calorimeter._add_track(np.random.default_rng(0), voxels, 0.0, 2, {"track": 3.5})       # nothing radiates
    assert not voxels[..., 1:].any()
    np.testing.assert_allclose(voxels[..., 0].mean(0), np.full((2, 4), 2 * 3.5 / 4), rtol=0.06)


# --------------------------------------------------------------------------------------------------- features

def looped(voxels, cut):
    """Features (8, Z) of the layers of one shower in SMALL, voxel by voxel: energy, centres and widths in eta
    and phi, share of empty voxels, centre and width in r."""
    (r, angle), rows = SMALL.middles, []
    for layer in voxels:
        lit = [(layer[a, i], r[i] * np.cos(angle[a]), r[i] * np.sin(angle[a]), r[i])
               for a, i in np.ndindex(layer.shape) if layer[a, i] > cut]
        e, *axes = np.array(lit, np.float64).reshape(-1, 4).T
        total = max(e.sum(), 1e-9)
        means = [(e * x).sum() / total / 100 for x in axes]
        widths = [np.sqrt((e * (x / 100 - mean)**2).sum() / total) for x, mean in zip(axes, means)]
        rows.append([e.sum(), *means[:2], *widths[:2], 1 - len(lit) / layer.size, means[2], widths[2]])
    return np.array(rows).T


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.003, 0.05, 1]), st.sampled_from([0.0, 0.5]))
def test_features_as_a_loop_finds_them(seed, lit, cut):
    rng, shape = np.random.default_rng(seed), (2, *SMALL.shape)
    voxels = (rng.exponential(3, shape) * (rng.random(shape) < lit)).astype(np.float32)
    voxels[0, 3], voxels[1, 4:6], voxels[1, 4, 2, 3], voxels[:, 7, 5] = 0, 0, 7, cut   # empty, and one voxel
    found = calorimeter.features(Showers(np.array([1e3, 1e5], np.float32), voxels), SMALL, cut)
    for shower, incident, row, depths in zip(voxels, (3, 5), found, calorimeter.ring_depths(voxels)):
        layers, log = looped(shower, cut), lambda e: np.log10(e + 1e-8)
        total = log(layers[0].sum())
        expected = [incident, *log(layers[0]), *layers[1:5].ravel(), total, *layers[5:].ravel()]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=5e-4)        # widths cancel in float32
        rings = [sum(z * shower[z, :, i].sum() for z in range(10)) / max(shower[:, :, i].sum(), 1e-9)
                 for i in range(5)]
        np.testing.assert_allclose(depths, rings, rtol=1e-5)


def test_columns_of_ds2():
    voxels = np.zeros((1500, *CALORIMETERS["ds2"].shape), np.float32)          # more than one part
    voxels[1400:, 44, 0, 8] = 100
    found = calorimeter.features(Showers(np.full(1500, 1e3, np.float32), voxels), CALORIMETERS["ds2"])
    assert found.shape == (1500, 362) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, 45], np.where(np.arange(1500) < 1400, -8, 2), rtol=1e-6)


def test_command_writes_showers_and_binning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calorimeter, "BLOCK", 5)                               # two parts of the file
    monkeypatch.setattr(calorimeter, "draw_energies", lambda n, seed: FLAT[:n])
    out = calorimeter.main(["--set", "small", "--n", "60", "--seed", "3", "--quiet", "--binning", "b.xml"])
    assert str(out) == "small.hdf5" and "60 showers of small -> small.hdf5" in capsys.readouterr().out
    found, again = (lambda: calorimeter.load_showers(out, calorimeter.read_binning("b.xml")),
                    lambda: calorimeter.open_showers(SMALL, 60, 3, quiet=True))
    assert np.array_equal(found().energies, FLAT[:60]) and len(np.unique(found().voxels, axis=0)) == 60
    assert all(map(np.array_equal, found(), again()))
    monkeypatch.setattr(calorimeter, "simulate", None)                         # only the file is left
    assert all(map(np.array_equal, found(), again()))
