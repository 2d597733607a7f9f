"""data.py: files against everything that can be wrong with them, splits, conditions, geometry by brute force,
and distributions of photon counts against scipy."""
import re
import resource
import signal
from argparse import Namespace
from functools import partial

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare, logistic, poisson

import data
import lists
import simulator
import tiny
from common import UserError
from data import DETECTORS, FEATURES
from simulator import SPECIES

KEY = jax.random.key(0)
PLAIN = data.Scaler(np.zeros(14), np.ones(14), "physics")                      # conditions as they are


def particle(code, energy, px=0.0, py=0.0, side=1):
    """One row of features (9,)."""
    species = SPECIES[code]
    pz = side * np.sqrt(energy**2 - (species.mass / 1000) ** 2 - px**2 - py**2)
    return np.array([energy, 0, 0, 0, px, py, pz, species.mass, species.charge])


@pytest.fixture(scope="module")
def dataset():
    """The first 300 rows, simulated."""
    blocks = simulator.simulated_blocks("zn", 300, quiet=True)
    return data.Dataset(*map(np.concatenate, zip(*blocks)))


# ------------------------------------------------------------------------------------------------------ files

def equal(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b))


def test_open_data_are_simulated_once(dataset, monkeypatch):
    first = data.open_data("zn", 300, quiet=True)
    monkeypatch.setattr(simulator, "simulated_blocks", None)                   # only the file is left
    for again in (first, data.open_data("zn", 300, quiet=True)):
        assert equal(again, dataset)


def test_fresh_data_share_no_particle(dataset):
    fresh = data.open_data("zn", 300, fresh=True, quiet=True)
    ids, _ = data.unique_particles(np.concatenate([dataset.particles, fresh.particles]))
    assert not set(ids[:300]) & set(ids[300:])


def test_hdf5_round_trip(dataset, tmp_path):
    tiny.save(tmp_path / "set.h5", dataset, detector="zn", seed=0)
    assert equal(data.load(tmp_path / "set.h5", "zn"), dataset)
    assert equal(lists.read_particles(tmp_path / "set.h5"), dataset[1:])
    with h5py.File(tmp_path / "set.h5") as file:
        assert dict(file.attrs) == {"detector": "zn", "seed": 0}
        assert {file[name].compression for name in file} == {"gzip"}


def test_large_files_stay_on_disk(dataset, tmp_path, monkeypatch):
    """The same rows, by a copy that is made once for a file and again when it has changed."""
    monkeypatch.setenv("ZDC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "LARGE", 1)
    tiny.save(tmp_path / "set.h5", dataset)
    loaded = data.load(tmp_path / "set.h5", "zn")
    assert equal(loaded, dataset) and isinstance(loaded.responses.base, np.memmap)
    assert equal(data.select(loaded, np.array([7, 3])), data.select(dataset, np.array([7, 3])))
    assert equal(data.load(tmp_path / "set.h5", "zn"), dataset)
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    tiny.save(tmp_path / "set.h5", data.select(dataset, slice(100)))
    assert equal(data.load(tmp_path / "set.h5", "zn"), data.select(dataset, slice(100)))
    bad = dataset._replace(responses=dataset.responses.astype(np.int32) - 1)
    tiny.save(tmp_path / "bad.h5", bad)
    before, path = sorted((tmp_path / "cache").iterdir()), tmp_path / "bad.h5"
    assert_user_error(lambda: data.load(path, "zn"), path, "bad.h5: photon counts must lie between 0 and")
    assert sorted((tmp_path / "cache").iterdir()) == before


def npz_pair(folder, responses, table):
    folder.mkdir(exist_ok=True)
    np.savez(folder / "data_nonrandom_responses.npz", responses)
    np.savez(folder / "data_nonrandom_particles.npz", table)


def test_npz_pair(dataset, tmp_path):
    table = np.column_stack([dataset.particles.astype(np.float64), dataset.pdg])
    npz_pair(tmp_path / "alice", dataset.responses.astype(np.float32), table)
    paths = [tmp_path / "alice", *(tmp_path / "alice").iterdir()]
    assert len(paths) == 3 and all(equal(data.load(path, "zn"), dataset) for path in paths)
    assert equal(lists.read_particles(tmp_path / "alice" / "data_nonrandom_particles.npz"), dataset[1:])
    npz_pair(tmp_path / "nine", dataset.responses, table[:, :9])               # without the PDG ids
    assert not data.load(tmp_path / "nine", "zn").pdg.any()


def test_csv(dataset, tmp_path):
    names = ["pdg", *FEATURES[::-1]]                                           # in any order
    table = np.column_stack([dataset.pdg, dataset.particles[:, ::-1]])
    header = " , ".join(names)
    np.savetxt(tmp_path / "list.csv", table, fmt="%.9g", delimiter=", ", header=header, comments="")
    assert equal(lists.read_particles(tmp_path / "list.csv"), dataset[1:])
    row = ",".join(f"{value:.9g}" for value in table[0, 1:])
    (tmp_path / "one.csv").write_text(",".join(names[1:]) + "\r\n" + row + "\r\n\r\n")
    particles, pdg = lists.read_particles(tmp_path / "one.csv")
    assert np.array_equal(particles, dataset.particles[:1]) and np.array_equal(pdg, [0])


ROW = particle(22, 500.0, 0.3, 0.4)
ONES = np.ones((3, 44, 44), np.uint16)
GOOD = {"responses": ONES, "particles": np.tile(ROW, (3, 1)), "pdg": np.full(3, 22)}


def scaled(columns, factor):
    table = np.tile(particle(2112, 500.0, 0.3), (3, 1))
    table[:, columns] *= factor
    return table


def with_value(array, value):
    array = array.astype(np.float64)
    array.flat[-1] = value
    return array


BAD = {   # what is wrong: (changed arrays, attributes, pattern of the message)
    "responses of zp": (dict(responses=np.ones((3, 56, 30), np.uint16)), {}, r"shape \(N, 44, 44\)"),
    "flat responses": (dict(responses=np.ones((3, 1936), np.uint16)), {}, r"shape \(N, 44, 44\)"),
    "text responses": (dict(responses=np.full((3, 44, 44), b"1")), {}, "numbers"),
    "complex responses": (dict(responses=np.ones((3, 44, 44), complex)), {}, "numbers"),
    "NaN responses": (dict(responses=with_value(GOOD["responses"], np.nan)), {}, "NaN"),
    "infinite responses": (dict(responses=with_value(GOOD["responses"], np.inf)), {}, "infinity"),
    "negative responses": (dict(responses=with_value(GOOD["responses"], -1)), {}, "between 0 and 65535"),
    "negative integers": (dict(responses=np.full((3, 44, 44), -1, np.int16)), {}, "between 0 and 65535"),
    "too many photons": (dict(responses=with_value(GOOD["responses"], 70000)), {}, "between 0 and 65535"),
    "fractions": (dict(responses=with_value(GOOD["responses"], 0.5)), {}, "whole counts"),
    "log responses": (dict(responses=np.log1p(GOOD["responses"])), {}, "scaled"),
    "too few responses": (dict(responses=np.ones((2, 44, 44), np.uint16)), {}, "2 responses for 3 particles"),
    "too few ids": (dict(pdg=np.full(2, 22)), {}, "3"),
    "no responses": (dict(responses=None), {}, "responses is missing"),
    "no particles": (dict(particles=None), {}, "particles is missing"),
    "eight features": (dict(particles=np.ones((3, 8))), {}, r"\(N, 9\)"),
    "text features": (dict(particles=np.full((3, 9), b"1")), {}, "numbers"),
    "NaN feature": (dict(particles=with_value(GOOD["particles"], np.nan)), {}, "row 2 holds NaN"),
    "momenta in MeV": (dict(particles=scaled(slice(4, 7), 1000)), {}, "in GeV"),
    "everything in MeV": (dict(particles=scaled(slice(0, 7), 1000)), {}, "GeV"),
    "mass in GeV": (dict(particles=scaled(7, 0.001)), {}, "mass = 0.939565 MeV"),
    "mass in keV": (dict(particles=scaled(7, 1000)), {}, "mass in MeV"),
    "no momentum along z": (dict(particles=np.tile([5.0, 0, 0, 0, 3, 4, 0, 0, 0], (3, 1))), {}, "pz not 0"),
    "negative energy": (dict(particles=with_value(scaled(0, -1), 0)), {}, "E = -500"),
    "fractional ids": (dict(pdg=np.full(3, 22.5)), {}, "PDG"),
    "two columns of ids": (dict(pdg=np.full((3, 2), 22)), {}, "PDG"),
    "another detector": ({}, {"detector": "zp"}, "zp data, not zn"),
    "empty": ({name: array[:0] for name, array in GOOD.items()}, {}, "no particles"),
}


def assert_user_error(read, path, pattern):
    with pytest.raises(UserError) as raised:
        read()
    message = str(raised.value)
    assert "\n" not in message and str(path) in message and re.search(pattern, message), message


def test_a_group_is_no_data_set(tmp_path):
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file.create_group("responses")
        file["particles"] = GOOD["particles"]
    assert_user_error(lambda: data.load(tmp_path / "bad.h5", "zn"), tmp_path, "responses is missing")


@pytest.mark.parametrize("case", BAD)
def test_bad_hdf5(case, tmp_path):
    changed, attributes, pattern = BAD[case]
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        for name, array in (GOOD | changed).items():
            if array is not None:
                file[name] = array
        file.attrs.update(attributes)
    assert_user_error(lambda: data.load(tmp_path / "bad.h5", "zn"), tmp_path / "bad.h5", pattern)


def test_everything_in_mev_is_not_missed_for_photons():
    """Massless particles keep E = p in any unit; 500 GeV in MeV is more than any beam gives."""
    with pytest.raises(UserError, match="GeV"):
        data.check_particles("list", np.tile(ROW * np.where(np.arange(9) < 7, 1000, 1), (3, 1)))


@pytest.mark.parametrize("case", [
    "responses of zp", "complex responses", "NaN responses", "negative responses", "too many photons",
    "fractions", "too few responses", "eight features", "NaN feature", "momenta in MeV",
    "no momentum along z"])
def test_bad_npz(case, tmp_path):
    arrays = GOOD | BAD[case][0]
    npz_pair(tmp_path / "bad", arrays["responses"], np.column_stack([arrays["particles"], arrays["pdg"]]))
    assert_user_error(lambda: data.load(tmp_path / "bad", "zn"), tmp_path / "bad", "")


@pytest.mark.parametrize("damage", ["half", "nothing", "text", "other keys", "objects", "one missing"])
def test_damaged_npz(damage, tmp_path):
    npz_pair(tmp_path / "bad", GOOD["responses"], np.column_stack([GOOD["particles"], GOOD["pdg"]]))
    path = tmp_path / "bad" / "data_nonrandom_responses.npz"
    if damage == "other keys":
        np.savez(path, responses=GOOD["responses"])
    elif damage == "objects":
        np.savez(path, np.array([GOOD["responses"], None], object))            # would need pickle
    elif damage == "one missing":
        path.unlink()
    else:
        path.write_bytes({"half": path.read_bytes()[:200], "nothing": b"", "text": b"E,vx\n"}[damage])
    assert_user_error(lambda: data.load(tmp_path / "bad", "zn"), path, "arr_0|no such file")


@pytest.mark.parametrize("keep", [0, 100, 2000, 0.5, 0.98])
def test_damaged_hdf5(dataset, keep, tmp_path):
    path = tmp_path / "set.h5"
    tiny.save(path, dataset)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if isinstance(keep, float) else keep])
    assert_user_error(lambda: data.load(path, "zn"), path, "HDF5")


@settings(max_examples=60, deadline=None, derandomize=True)                    # HDF5 may crash on others
@given(place=st.floats(0, 1), value=st.integers(0, 255))
def test_one_wrong_byte_is_an_error_or_harmless(dataset, tmp_path_factory, place, value):
    path = tmp_path_factory.getbasetemp() / "flipped.h5"
    tiny.save(path, data.select(dataset, slice(5)))
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] = value
    path.write_bytes(content)
    try:
        data.load(path, "zn")
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text, pattern", [
    ("", "first line must name"),
    ("500,0,0,0,0.3,0.4,499.99968,0,0\n", "first line must name"),
    (",".join(FEATURES[:8]) + "\n" + "1," * 7 + "1\n", "missing charge"),
    (",".join(FEATURES) + "\n", "no particles"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,many,0,0\n", "many"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,nan,0,0\n", "row 0 holds NaN"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,499.99968,0\n", "9 names in the header but 8 columns"),
    (",".join(FEATURES) + "\n500,0,0,0,0.3,0.4,499.99968,0,0\n500,0\n", "columns"),
    (",".join(FEATURES) + ",pdg\n500,0,0,0,0.3,0.4,499.99968,0,0,2.5\n", "PDG"),
    (",".join(FEATURES) + "\n500,0,0,0,300,400,499999.68,0,0\n", "in GeV"),
])
def test_bad_csv(text, pattern, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(text)
    assert_user_error(lambda: lists.read_particles(path), path, pattern)


@pytest.mark.parametrize("name", ["missing.h5", "missing.csv", "missing.npz", "missing"])
def test_missing_files(name, tmp_path):
    assert_user_error(lambda: lists.read_particles(tmp_path / name), tmp_path / name, "no such file")
    if not name.endswith("csv"):
        assert_user_error(lambda: data.load(tmp_path / name, "zn"), tmp_path, "no such file")


def test_failed_writes_keep_the_old_file(dataset, tmp_path):
    """A limit on the size of a file fails in the middle of a write, as a full disk does, and HDF5 must not
    crash."""
    path, size = tmp_path / "set.h5", 8000
    tiny.save(path, dataset)
    old, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(old) > size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, 3000, size, len(old) // 2, len(old) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            assert_user_error(lambda: tiny.save(path, dataset), path, "not written")
            assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    tiny.save(path, dataset)
    assert path.read_bytes() == old


# -------------------------------------------------------------------------------------- splits and conditions

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_rows_are_split_once_and_completely(n, seed):
    parts = data.split_rows(n, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for part, share in zip(parts, (0.7, 0.1, 0.2)):
        assert abs(len(part) - share * n) < 1.01
    assert all(np.array_equal(a, b) for a, b in zip(parts, data.split_rows(n, seed)))


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.integers(0, 40), min_size=1, max_size=200), seed=st.integers(0, 1000))
def test_particles_are_split_whole(kinds, seed):
    particles = np.outer(np.array(kinds) + 1, np.arange(1, 10)).astype(np.float32)
    parts = data.split_particles(particles, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(kinds)))
    held = [set(np.array(kinds)[part]) for part in parts]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    for part, share in zip(held, (0.7, 0.1, 0.2)):
        assert abs(len(part) - share * len(set(kinds))) < 1.01


@settings(max_examples=50, deadline=None)
@given(kinds=st.lists(st.integers(0, 20), min_size=1, max_size=100))
def test_unique_particles(kinds):
    particles = np.outer(np.array(kinds), np.arange(1, 10)).astype(np.float32)
    ids, first = data.unique_particles(particles)
    assert np.array_equal(particles[first][ids], particles) and len(first) == len(set(kinds)) == ids.max() + 1
    assert np.array_equal(ids[first], np.arange(len(first)))


@pytest.mark.parametrize("split", ["rows", "particles"])
@pytest.mark.parametrize("own", [False, True])
def test_data_of_a_script(split, own, dataset, tmp_path):
    """Test rows are seen particles in a split by rows; unseen ones are fresh, or a split by particles."""
    tiny.save(tmp_path / "own.h5", dataset)
    args = Namespace(detector="zn", data=tmp_path / "own.h5" if own else None, n=300, quiet=True, load=None,
                     split=split, batch_size=64, validate=False, axes=None, header={"flags": {"seed": 0}})
    found, parts = data.open_split(args)
    assert equal(found, dataset) and sum(map(len, parts)) == 300
    expected = data.split_rows(300, 0) if split == "rows" else data.split_particles(dataset.particles, 0)
    assert all(np.array_equal(a, b) for a, b in zip(parts, expected))
    sets, test = data.test_sets(args, found, parts), data.select(dataset, parts.test)
    names = ["unseen"] if split == "particles" else ["seen"] if own else ["seen", "unseen"]
    assert list(sets) == names and equal(sets[names[0]], test)
    assert all(len(part.pdg) == len(parts.test) for part in sets.values())
    if "unseen" in sets:
        both = np.concatenate([dataset.particles[parts.train], sets["unseen"].particles])
        ids = data.unique_particles(both)[0]
        assert not set(ids[:len(parts.train)]) & set(ids[len(parts.train):])
    args.validate = True
    [(name, part)] = data.test_sets(args, found, parts).items()
    assert name == "validation" and equal(part, data.select(dataset, parts.validation))
    for size in (1, len(parts.train) + 1):
        args.batch_size = size
        with pytest.raises(UserError, match=f"--batch-size {size}: expected 2 to {len(parts.train)}"):
            data.open_split(args)
    args.load = "model.eqx"                                                    # trains nothing
    data.open_split(args)


@pytest.mark.parametrize("mode, width", [("raw", 9), ("physics", 14)])
def test_conditions_are_standardised_on_the_training_rows(mode, width):
    particles = simulator.primaries(0)[0]
    scaler = data.fit_conditions(particles, mode)
    c = data.conditions(particles, scaler)
    assert c.shape == (len(particles), width) and c.dtype == np.float32
    assert np.isfinite(c).all() and np.abs(c).max() <= 10
    scaled = (np.abs(c).max(0) < 10) & (np.arange(width) < 11)                 # not clipped, no coordinate
    np.testing.assert_allclose(c.mean(0)[scaled], 0, atol=2e-3)
    np.testing.assert_allclose(c.std(0)[scaled], 1, atol=2e-2)
    assert scaled.sum() >= 4 and (scaler.mean[11:] == 0).all() and (scaler.std[11:] == 1).all()
    half = data.fit_conditions(particles[::2], mode)                           # used on other rows
    assert np.array_equal(data.conditions(particles[:5], half), data.conditions(particles, half)[:5])


def test_raw_conditions_are_the_nine_features():
    particles = simulator.primaries(0)[0]
    scaler = data.fit_conditions(particles, "raw")
    np.testing.assert_allclose(scaler.mean, particles.astype(np.float64).mean(0))
    plain = (particles - scaler.mean) / scaler.std
    np.testing.assert_allclose(data.conditions(particles, scaler), np.clip(plain, -10, 10), atol=1e-5)


def test_conditions_of_extremes_stay_finite():
    particles = np.stack([particle(22, 1.1, 1.0), particle(2212, 7000.0, 5.0, -5.0, -1), particle(22, 1e30),
                          particle(22, 1e-30)])
    for mode in ("raw", "physics"):
        for train in (particles, particles[:1], np.tile(particles[:1], (5, 1))):     # constant columns too
            c = data.conditions(particles, data.fit_conditions(train, mode))
            assert np.isfinite(c).all() and np.abs(c).max() <= 10


@pytest.mark.parametrize("side", [-1, 1])
def test_impact_points_are_those_of_the_line_wherever_it_starts(side):
    """A particle further along its line, on either side, hits the same fibre."""
    start = np.array([1000, 0.1, -0.2, 5, 0.3, 0.2, side * 999.9, 939.565, 0])
    along = np.array([start + t * np.array([0, *start[4:7], 0, 0, 0, 0, 0]) for t in (0, 0.1, 6)])
    assert abs(along[2, 3]) > 5900                                             # 60 m
    found = data._features(along, "physics")[:, -3:]
    np.testing.assert_allclose(found, found[:1].repeat(3, 0), rtol=1e-9)


def test_impact_is_a_condition():
    particles = np.stack([particle(22, 900.0, 900 * x / simulator.FLIGHT_CM) for x in (-3.0, 0.0, 3.0)])
    scaler = PLAIN
    found = data.conditions(particles, scaler)[:, 11]
    np.testing.assert_allclose(found, np.arcsinh(np.array([-3, 0, 3]) / 3.52), atol=1e-4)


def test_bend_is_a_condition():
    """The beam passes 9.4 cm from the axis, a proton of half its energy 18.8 cm, near the middle of ZP."""
    particles = np.stack([particle(2212, 7000.0), particle(2212, 3500.0), particle(2112, 3500.0)])
    found = data.conditions(particles, PLAIN)[:, 13]
    np.testing.assert_allclose(found, np.arcsinh((np.array([9.4, 18.8, 0]) - 19.3) / 3.52), atol=2e-3)


# ------------------------------------------------------------------------ geometry of a detector for networks

@settings(max_examples=8, deadline=None)                                       # each compiles
@given(st.tuples(st.integers(1, 13), st.integers(1, 13)), st.integers(1, 5), st.integers(1, 3))
def test_from_patches_is_the_inverse_of_to_patches(shape, size, maps):
    x = np.random.default_rng(0).normal(size=(maps, *shape)).astype(np.float32)
    patches = np.stack([data.to_patches(one, size) for one in x], axis=1)      # (patches, maps, size * size)
    h, w = data.patch_grid(shape, size)
    assert (h, w) == (-(-shape[0] // size), -(-shape[1] // size)) and patches.shape == (h * w, maps, size**2)
    np.testing.assert_array_equal(data.from_patches(patches.reshape(h * w, -1), size, shape), x)


def test_patches_by_brute_force():
    x = np.arange(30.0).reshape(5, 6) + 1
    padded = np.zeros((8, 8))
    padded[:5, :6] = x
    expected = [padded[i:i + 4, j:j + 4].ravel() for i in (0, 4) for j in (0, 4)]
    np.testing.assert_array_equal(data.to_patches(x, 4), expected)


@pytest.mark.parametrize("shape, size", [((22, 22), 2), ((28, 15), 2), ((10, 7), 4), ((14, 10), 4)])
def test_windows_by_brute_force(shape, size):
    """Quarter by quarter, in the order of the patches; 0 beyond the response."""
    x, grid = np.random.default_rng(0).normal(size=shape), data.patch_grid(shape, size)
    found = np.asarray(data.windows(jnp.asarray(x), size)).reshape(*grid, 2, 2, size, size)
    for i, j, *quarter, k, l in np.ndindex(found.shape):
        row, column = (size * n + size * half - size // 2 + m for n, half, m in zip((i, j), quarter, (k, l)))
        inside = 0 <= row < shape[0] and 0 <= column < shape[1]
        assert found[i, j, *quarter, k, l] == pytest.approx(x[row, column] if inside else 0, rel=1e-6)


@pytest.mark.parametrize("grid", [(11, 11), (14, 8), (1, 3)])
def test_neighbour_mean_by_brute_force(grid):
    h = np.random.default_rng(0).normal(size=(*grid, 5))
    found = np.asarray(data.neighbour_mean(jnp.asarray(h.reshape(-1, 5)), grid)).reshape(h.shape)
    for i, j in np.ndindex(grid):
        edges = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        expected = sum(h[k, l] for k, l in edges if 0 <= k < grid[0] and 0 <= l < grid[1]) / 4
        np.testing.assert_allclose(found[i, j], expected, rtol=1e-5, atol=1e-7)


def test_raw_features_are_sines_and_cosines():
    """Of the nine conditions, with high frequencies of px and py alone."""
    c, zn = np.random.default_rng(1).normal(size=9).astype(np.float32), data.DETECTORS["zn"]
    found = np.asarray(data.features(c, zn))
    assert found.shape == (data.feature_count(9, zn),) and np.array_equal(found[:9], c)
    angles = np.r_[np.outer([1, 2, 4], c).ravel(), np.outer([8, 16, 32, 64], c[4:6]).ravel()]
    np.testing.assert_allclose(found[9:], np.r_[np.sin(angles), np.cos(angles)], atol=1e-5)


def place(detector, x, y, charge):
    """(particle (9,), PDG id) that hits x and y fibres from the middle, straight or bent by the dipole."""
    energy, pdg = (3500.0, 2212) if charge else (1000.0, 22)
    bend = charge * simulator.BEAM_CM * 7000 / energy
    x_cm, y_cm = x * detector.pitch + detector.centre - bend, y * detector.pitch
    px, py = (energy * cm / simulator.FLIGHT_CM for cm in (x_cm, y_cm))
    return particle(pdg, energy, px, py), pdg


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
@pytest.mark.parametrize("charge", [0, 1])
def test_vicinity_by_brute_force(detector, charge):
    """Both impact points, fibre by fibre, and the simulator's light stands there."""
    (h, w), x, y = detector.shape, 5.3, -2.1
    row, pdg = place(detector, x, y, charge)
    c = data.conditions(row[None], PLAIN)[0]
    offsets, bumps = jax.jit(partial(data.vicinity, detector=detector, size=4))(c)
    maps = data.from_patches(bumps.reshape(len(bumps), -1), 4, detector.shape)             # (4, H, W)
    i, j = np.indices((h, w))
    r2 = (i + 0.5 - h / 2 - x) ** 2 + (j + 0.5 - w / 2 - y) ** 2
    np.testing.assert_allclose(maps[2 * charge], 1 / (1 + r2 / 4), atol=5e-3)
    np.testing.assert_allclose(maps[2 * charge + 1], np.exp(-r2 / 2), atol=5e-3)
    middles = [(a, b) for a in range(0, h, 4) for b in range(0, w, 4)] + np.array([2 - h / 2, 2 - w / 2])
    expected = np.arcsinh((middles - (x, y)) / 2) / 2
    np.testing.assert_allclose(offsets[:, [charge, 2]], expected, atol=5e-3)
    light = simulator.simulate(detector, np.tile(row, (100, 1)), np.full(100, pdg), 0).mean(0)
    brightest = np.unravel_index(light.argmax(), light.shape)
    assert np.abs(np.subtract(brightest, np.unravel_index(r2.argmin(), r2.shape))).max() <= 1
    near = jax.jit(partial(data.near_impact, detector=detector, size=4))(c)
    expected = np.concatenate([offsets, bumps.reshape(len(bumps), -1)], axis=1)
    np.testing.assert_allclose(near, expected, atol=1e-6)


def test_vicinity_moves_with_the_impact_point():
    """Two patches further all is the same: a network that is shared by the patches knows every place."""
    grid = lambda features: np.asarray(features).reshape(11, 11, -1)
    zn = DETECTORS["zn"]
    features = jax.jit(partial(data.near_impact, detector=zn, size=4))
    near = lambda x, y: features(data.conditions(place(zn, x, y, 0)[0][None], PLAIN)[0])
    here, there = grid(near(5.3, -2.1)), grid(near(5.3 - 8, -2.1 + 4))
    straight = [0, 2, *range(3, 3 + 32)]
    np.testing.assert_allclose(there[:-2, 1:, straight], here[2:, :-1, straight], atol=5e-3)


@pytest.mark.parametrize("detector", data.DETECTORS)
def test_what_falls_on_the_detector(detector):
    """The same for both points of a neutral particle; less and less from the middle to far outside."""
    detector, logs = data.DETECTORS[detector], []
    for x in detector.centre + detector.half[0] * np.array([0, 1, 3]):
        points = [x, 0.0, x - data.DETECTORS["zp"].centre]
        c = jnp.concatenate([jnp.zeros(11), jnp.arcsinh(jnp.array(points) / data.PLACE_CM)])
        logs.append(np.asarray(data.features(c, detector))[-4:])
    assert np.allclose(np.array(logs)[:, :2], np.array(logs)[:, 2:], atol=1e-3)
    wide, narrow = np.exp(2 * np.array(logs)[:, :2]).T
    np.testing.assert_allclose(narrow / narrow[0], [1, 0.5, 0], atol=0.05)     # all, half on the edge, none
    assert wide[0] > wide[1] > 3 * wide[2] > 0.1


def test_features_do_not_depend_on_momentum_and_vertex():
    c, zn = np.random.default_rng(1).normal(size=14).astype(np.float32), data.DETECTORS["zn"]
    pair = c, np.r_[np.zeros(7), c[7:]]
    assert np.array_equal(*(data.features(jnp.asarray(x), zn) for x in pair))
    assert data.feature_count(14, zn) == len(data.features(c, zn))


def test_features_have_waves_of_mass_and_distance_from_the_beam():
    """The distance is that of the straight line, in any direction; nothing else oscillates."""
    zn, away = data.DETECTORS["zn"], np.array([2.0, -1.5]) / data.PLACE_CM
    c = np.r_[np.random.default_rng(2).normal(size=11), np.arcsinh(away), 0.3].astype(np.float32)
    distance = np.arcsinh(2.5 / data.PLACE_CM)
    angles = np.r_[c[7] * np.array([1, 2, 4]), distance * np.array([1, 2, 4, 8, 16])]
    expected = np.r_[c[7:], distance, np.sin(angles), np.cos(angles)]
    np.testing.assert_allclose(data.features(c, zn)[:-4], expected, atol=1e-5)


def test_raw_conditions_have_no_vicinity():
    offsets, bumps = data.vicinity(jnp.zeros(9), DETECTORS["zp"], 4)
    assert offsets.shape == (14 * 8, 0) and bumps.shape == (14 * 8, 0, 16)
    assert data.near_impact(jnp.zeros(9), DETECTORS["zp"], 4).shape == (14 * 8, 0)
    assert data.impact_light(bumps, jnp.zeros((14 * 8, 16))).shape == (0,)


def test_impact_light_is_a_projection_of_unit_length():
    rng = np.random.default_rng(2)
    bumps, patches = rng.random((6, 4, 16)), rng.normal(size=(2000, 6, 16))
    found = jax.vmap(data.impact_light, (None, 0))(jnp.asarray(bumps), jnp.asarray(patches))
    assert np.std(found, axis=0) == pytest.approx(1, abs=0.05)                 # noise as that of a fibre
    expected = [(bumps[:, k] * patches[0]).sum() / np.linalg.norm(bumps[:, k]) for k in range(4)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-2)


# ----------------------------------------------------------------------------- photon counts as distributions

def probabilities(counts, location, scale, odds=()):
    loss = jax.jit(data.count_loss)(jnp.float32(counts), jnp.float32(location), jnp.float32(scale), odds)
    return np.exp(-np.asarray(loss, np.float64))


ODDS = st.one_of(st.just(()), st.tuples(*3 * [st.floats(-9, 9)]))


@settings(deadline=None, max_examples=60)
@given(st.floats(-5, 40), st.floats(-4, 3), ODDS)
def test_probabilities_sum_to_one(location, log_scale, odds):
    found = probabilities(np.arange(40_001), location, np.exp(log_scale), odds)
    assert found.sum() == pytest.approx(1, abs=2e-3)


@settings(deadline=None, max_examples=60)
@given(st.floats(-3, 20), st.floats(-2, 2))
def test_count_loss_is_the_logistic_distribution_between_half_counts(location, log_scale):
    edges = logistic.cdf(2 * np.sqrt(np.maximum(np.arange(201) - 0.5, 0)), location, np.exp(log_scale))
    expected = np.diff(edges)
    expected[0] = edges[1]                                                     # all below counts as no photon
    found = probabilities(np.arange(200), location, np.exp(log_scale))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.floats(-3, 12), st.floats(-1.5, 1), st.tuples(*3 * [st.floats(-4, 4)]))
def test_few_photons_have_odds_of_their_own(location, log_scale, odds):
    """P(n) / P(> n) of 0, 1 and 2; the ratios of larger counts are those without odds."""
    scale = np.exp(log_scale)
    found, plain = (probabilities(np.arange(4000), location, scale, these) for these in (odds, ()))
    for n, more in enumerate(odds):
        expected = np.exp((2 * np.sqrt(n + 0.5) - location) / scale + more)
        assert found[n] == pytest.approx(expected / (1 + expected) * found[n:].sum(), rel=5e-3, abs=1e-9)
    many, plain = found[3:] / (found[3:].sum() + 1e-30), plain[3:] / plain[3:].sum()
    np.testing.assert_allclose(many[:17], plain[:17], rtol=5e-3, atol=1e-6)


def test_count_loss_stays_finite():
    grid = [0.0, 1, 7, 2000, 65535], [-1e3, 0, 30, 1e3], np.exp([-4.0, 0, 3]), [-60, 0, 60]
    counts, location, scale, more = (jnp.asarray(axis, jnp.float32) for axis in np.meshgrid(*grid))
    loss = lambda *law: jnp.mean(sum(data.count_loss(counts, *law[:2], odds) for odds in ((), law[2:])))
    law = location, scale, more, -more, more
    value, gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))(*law)
    assert jnp.isfinite(value) and all(jnp.isfinite(g).all() for g in gradient)


def assert_drawn_from(draws, probability):
    """Chi-square test of whole numbers drawn (N,) against the probability of 0, 1, 2, ..."""
    draws = np.asarray(draws).astype(int)
    expected = len(draws) * probability(np.arange(draws.max() + 1))
    often = expected >= 20
    found = np.append(np.bincount(draws)[often], np.bincount(draws)[~often].sum())
    expected = np.append(expected[often], len(draws) - expected[often].sum())
    assert chisquare(found, expected).pvalue > 1e-4


@pytest.mark.parametrize("location, scale, odds", [
    (0.3, 0.5, ()), (-2.0, 1.5, ()), (6.0, 0.4, ()), (0.3, 0.5, (-1.0, 1.0, -2.0)),
    (6.0, 0.4, (9.0, 4.0, 7.0)), (-2.0, 0.7, (-5.0, -6.0, -6.0))])
def test_draws_follow_the_loss(location, scale, odds):
    draw = jax.jit(data.draw_counts)
    draws = draw(jnp.full(100_000, location), jnp.full(100_000, scale), jax.random.key(7), odds)
    assert_drawn_from(draws, lambda n: probabilities(n, location, scale, odds))


def test_root_counts_undo_the_square_root():
    counts = jnp.arange(60_000.0)
    np.testing.assert_array_equal(data.root_counts(2 * jnp.sqrt(counts)), counts)
    assert (data.root_counts(jnp.array([-5.0, 0.0, 1.41])) == 0).all() and data.root_counts(1.42) == 1


def test_the_scale_is_bounded():
    found = data.bounded_scale(jnp.array([-99.0, 0.5, 99.0]))
    np.testing.assert_allclose(found, np.exp([-4, 0.5, 3]), rtol=1e-6)


def test_poisson_loss_is_the_log_likelihood():
    rng = np.random.default_rng(0)
    log_rate, counts = rng.normal(0, 2, 500), rng.poisson(3, 500)
    found = data.poisson_loss(jnp.asarray(counts, jnp.float32), jnp.asarray(log_rate, jnp.float32))
    np.testing.assert_allclose(found, -poisson(np.exp(log_rate)).logpmf(counts), rtol=1e-4, atol=1e-5)


def test_log_responses_are_rounded():
    counts = jnp.arange(3000.0)
    np.testing.assert_allclose(data.rounded_counts(jnp.log1p(counts) + 1e-6), counts, atol=1)
    np.testing.assert_array_equal(data.rounded_counts(jnp.log1p(counts[:100] + 0.3)), counts[:100])
    assert data.rounded_counts(-3.0) == 0
    assert data.as_uint16(jnp.array([3.0, 65535.0, 1e9])).tolist() == [3, 65535, 65535]


# ------------------------------------------------------------------------------------------------ the command

def test_command_writes_the_open_data(dataset, tmp_path, capsys):
    out = tmp_path / "new" / "zn.h5"
    assert data.main(["--n", "300", "--out", str(out), "--quiet"]) == {"rows": 300, "out": str(out)}
    assert equal(data.load(out, "zn"), dataset) and str(out) in capsys.readouterr().out
    with h5py.File(out) as file:
        cut = {"cut": simulator.CUT, "version": simulator.VERSION}
        assert dict(file.attrs) == {"detector": "zn", "seed": 0} | cut
    data.main(["--n", "300", "--out", str(tmp_path / "again.h5"), "--quiet"])
    assert out.read_bytes() == (tmp_path / "again.h5").read_bytes()


def test_command_needs_a_file():
    with pytest.raises(UserError, match="--out"):
        data.main([])
