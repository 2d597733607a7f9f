"""hep.py: event files through the libraries themselves, there and back, and what is wrong with one."""
import gzip
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tiny

import common
import data
import hep
import lists
import metrics
import simulator
from common import UserError
from simulator import DETECTORS, FEATURES

ak = pytest.importorskip("awkward")
pyhepmc = pytest.importorskip("pyhepmc")
uproot = pytest.importorskip("uproot")


@pytest.fixture(scope="module", autouse=True)
def shrunk(small_detectors):
    yield


@pytest.fixture(scope="module")
def dataset():
    return data.open_data("zn", 200, quiet=True)


def write_hepmc(path, events, unit=1.0, length=1.0):
    """Events {number: [(feature row, pdg, status), ...]} in GeV and cm, or other units."""
    units = (pyhepmc.Units.MomentumUnit.GEV if unit == 1 else pyhepmc.Units.MomentumUnit.MEV,
             pyhepmc.Units.LengthUnit.CM if length == 1 else pyhepmc.Units.LengthUnit.MM)
    with pyhepmc.open(str(path), "w") as file:
        for number, particles in events.items():
            event = pyhepmc.GenEvent(*units)
            event.event_number = number
            for row, pdg, status in particles:
                beam = pyhepmc.GenParticle((0, 0, unit * 7000, unit * 7000), 2212, 4)
                e, vx, vy, vz, px, py, pz, mass = (float(x) for x in row[:8])
                made = pyhepmc.GenParticle(tuple(unit * x for x in (px, py, pz, e)), int(pdg), status)
                made.generated_mass = unit * mass / 1000
                vertex = pyhepmc.GenVertex(tuple(length * x for x in (vx, vy, vz, 0)))
                vertex.add_particle_in(beam)
                vertex.add_particle_out(made)
                event.add_vertex(vertex)
            file.write(event)


def write_tree(path, dataset, tree="particles", without=(), **more):
    columns = dict(zip(FEATURES, dataset.particles.T)) | {"pdg": dataset.pdg} | more
    columns = {name: column for name, column in columns.items() if name not in without}
    with uproot.recreate(path) as file:
        file.mktree(tree, {name: column.dtype for name, column in columns.items()}).extend(columns)


# ------------------------------------------------------------------------------------------------------ HepMC

def test_charges_are_those_of_the_simulator():
    pdg = np.array([*simulator.SPECIES, 11, -11, 13, 12, 24, 411, 421, 21])
    expected = [*(species.charge for species in simulator.SPECIES.values()), -1, 1, -1, 0, 1, 1, 0, 0]
    np.testing.assert_array_equal(hep.charges(pdg), expected)


@pytest.mark.parametrize("unit, length", [(1, 1), (1000, 10)])
def test_particles_of_events(dataset, tmp_path, unit, length):
    """Features, types, event numbers and both sides, whatever the units."""
    rows = [(dataset.particles[k], dataset.pdg[k], 1) for k in range(60)]
    write_hepmc(tmp_path / "a.hepmc", {5: rows[:20], 6: [], 9: rows[20:60]}, unit, length)
    found = hep.read(tmp_path / "a.hepmc", 0.0)
    np.testing.assert_allclose(found["particles"], dataset.particles[:60], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["pdg"], dataset.pdg[:60])
    np.testing.assert_array_equal(found["event"], [5] * 20 + [9] * 40)
    assert len(np.unique(found["particle"][:20])) == 20 and {-1, 1} == set(np.sign(found["particles"][:, 6]))
    (tmp_path / "b.hepmc.gz").write_bytes(gzip.compress((tmp_path / "a.hepmc").read_bytes()))
    again = hep.read(tmp_path / "b.hepmc.gz", 0.0)
    assert all(np.array_equal(again[name], found[name]) for name in found)


def test_repeated_numbers_of_events(dataset, tmp_path, capsys):
    """Files of several runs joined: each event is one."""
    row = dataset.particles[0], dataset.pdg[0], 1
    for name, numbers in (("a", (4, 5)), ("b", (5, 6))):
        write_hepmc(tmp_path / f"{name}.hepmc", {number: [row] for number in numbers})
    first, second = ((tmp_path / f"{name}.hepmc").read_text() for name in "ab")
    end = "HepMC::Asciiv3-END_EVENT_LISTING"
    (tmp_path / "c.hepmc").write_text(first.partition(end)[0] + second.partition("START_EVENT_LISTING\n")[2])
    assert hep.read(tmp_path / "a.hepmc", 0.0)["event"].tolist() == [4, 5]
    assert not capsys.readouterr().out
    assert hep.read(tmp_path / "c.hepmc", 0.0)["event"].tolist() == [0, 1, 2, 3]
    assert "numbers of events repeat" in capsys.readouterr().out


def test_only_forward_final_particles_are_taken(tmp_path):
    def particle(pt, pz, pdg=2112, status=1):
        mass = 939.565 if pdg == 2112 else 0.0
        return np.array([np.hypot(np.hypot(pt, pz), mass / 1000), 0, 0, 0, pt, 0, pz, mass]), pdg, status
    cut = np.sinh(6.0)
    rows = [particle(1, 1.01 * cut), particle(1, 0.99 * cut), particle(1, -1.01 * cut),
            particle(0.1, 900, 12), particle(0.1, 900, 2112, 2), particle(0, 500, 22)]
    write_hepmc(tmp_path / "a.hepmc", {1: rows, 2: []})
    found = hep.read(tmp_path / "a.hepmc", 6.0)
    np.testing.assert_allclose(found["particles"][:, 6], [1.01 * cut, -1.01 * cut, 500], rtol=1e-5)
    assert len(hep.read(tmp_path / "a.hepmc", 5.0)["pdg"]) == 4


BAD_HEPMC = {
    "missing": "No such file", "text": "begins with HepMC::Version", "nothing": "begins with HepMC::Version",
    "cut off": "cut off", "cut off within gzip": "expected a HepMC file", "not gzip": "expected a HepMC file",
    "damaged": "damaged, . of 3 particles",
    "no particle": "no particle with .eta. of --min-eta 6 or more in 2 events",
    "no event": "begins with HepMC::Version", "broken energy": "particle row 0 has E"}


@pytest.mark.parametrize("damage", BAD_HEPMC)
def test_bad_hepmc(damage, dataset, tmp_path, capfd):
    path = tmp_path / ("a.hepmc.gz" if "gzip" in damage else "a.hepmc")
    row = dataset.particles[0].copy()
    if damage == "broken energy":
        row[0] *= 1.5
    if damage == "no particle":
        row[4:7] = 3.0, 4.0, 5.0
    events = {} if damage == "no event" else {1: [(row, dataset.pdg[0], 1)], 2: []}
    plain = tmp_path / "plain.hepmc"
    if damage == "damaged":
        events = {1: [(row, dataset.pdg[0], 1)] * 2}
    write_hepmc(plain, events)
    content = plain.read_bytes()
    changed = {"text": b"hello\n", "nothing": b"", "cut off": content[:-60], "not gzip": content,
               "cut off within gzip": gzip.compress(content)[:-20],
               "damaged": content.replace(b"P 2", b"Q 2", 1)}
    if damage != "missing":
        path.write_bytes(changed.get(damage, content))
    with pytest.raises(UserError, match=BAD_HEPMC[damage]) as error:
        hep.read(path, 6.0)
    assert path.name in str(error.value) and "\n" not in str(error.value)
    assert not capfd.readouterr().err                                          # nor does the library say more


@pytest.mark.parametrize("lead", [b"", b"\n"])
def test_hepmc2(dataset, tmp_path, lead):
    """The older format, which its own library begins with an empty line; nuclei are left out."""
    event = pyhepmc.GenEvent(pyhepmc.Units.MomentumUnit.GEV, pyhepmc.Units.LengthUnit.CM)
    vertex = pyhepmc.GenVertex((0, 0, 0, 0))
    vertex.add_particle_in(pyhepmc.GenParticle((0, 0, 7000, 7000), 2212, 4))
    for pdg, energy in ((2112, 900.0), (1000020040, 10_000.0)):
        vertex.add_particle_out(pyhepmc.GenParticle((0, 0, (energy**2 - 0.939565**2)**0.5, energy), pdg, 1))
    event.add_vertex(vertex)
    event.event_number = 3
    with pyhepmc.open(str(tmp_path / "plain.hepmc"), "w", format="hepmc2") as file:
        file.write(event)
    (tmp_path / "a.hepmc").write_bytes(lead + (tmp_path / "plain.hepmc").read_bytes())
    found = hep.read(tmp_path / "a.hepmc", 6.0)
    assert found["pdg"].tolist() == [2112] and found["event"].tolist() == [3]
    assert found["particles"][0, 0] == 900


# ------------------------------------------------------------------------------------------------------- ROOT

def test_particles_of_a_tree(dataset, tmp_path):
    path = tmp_path / "a.root"
    write_tree(path, dataset, event=np.arange(200) // 7, particle=np.arange(200) % 7)
    for name in (path, tmp_path / "a.root:particles"):
        found = hep.read(name, 6.0)
        np.testing.assert_array_equal(found["particles"], dataset.particles)
        np.testing.assert_array_equal(found["pdg"], dataset.pdg)
        np.testing.assert_array_equal(found["event"], np.arange(200) // 7)
        np.testing.assert_array_equal(found["particle"], np.arange(200) % 7)
    write_tree(path, dataset, without=("pdg",))
    found = hep.read(path, 6.0)
    assert not found["pdg"].any() and found.keys() == {"particles", "pdg"}


def test_neutrinos_and_nuclei_of_a_tree_are_left_out(dataset, tmp_path, capsys):
    pdg = dataset.pdg.copy()
    pdg[[3, 50]], pdg[7] = (12, -14), 1000020040
    write_tree(tmp_path / "a.root", dataset._replace(pdg=pdg), event=np.arange(200))
    found = hep.read(tmp_path / "a.root", 6.0)
    np.testing.assert_array_equal(found["event"], np.delete(np.arange(200), [3, 7, 50]))
    np.testing.assert_array_equal(found["particles"], np.delete(dataset.particles, [3, 7, 50], axis=0))
    assert "a.root: 1 nuclei are left out" in capsys.readouterr().out


BAD_TREES = {
    "missing": "expected a ROOT file", "text": "expected a ROOT file", "nothing": "expected a ROOT file",
    "half": "expected a ROOT file", "other name": "FILE.root:TREE, of particles", "two trees": "one tree",
    "no tree": "of none", "missing branch": "has no branch vz", "jagged": "branch E is not one number",
    "momenta in MeV": "expected E and p in GeV", "not a number": "row 0 holds NaN",
    "no entries": "no particles"}


@pytest.mark.parametrize("damage", BAD_TREES)
def test_bad_trees(damage, dataset, tmp_path):
    path = tmp_path / "a.root"
    some = data.select(dataset, np.arange(0 if damage == "no entries" else 3))
    if damage == "momenta in MeV":
        some.particles[:, 4:7] *= 1000
    if damage == "not a number":
        some.particles[0, 2] = np.nan
    write_tree(path, some, without=("vz",) if damage == "missing branch" else ())
    content = path.read_bytes()
    if damage == "two trees":
        with uproot.update(path) as file:
            file.mktree("more", {"x": "int64"}).extend({"x": np.arange(3)})
    if damage in ("no tree", "jagged"):
        with uproot.recreate(path) as file:
            if damage == "jagged":
                column = ak.Array([[1.0], [], [2.0]])
                tree = file.mktree("particles", dict.fromkeys(FEATURES, column.type))
                tree.extend(dict.fromkeys(FEATURES, column))
    if damage in ("text", "nothing", "half"):
        path.write_bytes({"text": b"hello\n", "nothing": b"", "half": content[:900]}[damage])
    if damage == "missing":
        path.unlink()
    asked = tmp_path / "a.root:wrong" if damage == "other name" else path
    with pytest.raises(UserError, match=BAD_TREES[damage]) as error:
        hep.read(asked, 6.0)
    assert "a.root" in str(error.value)


# --------------------------------------------------------------------------------------------- whole commands

@pytest.fixture
def job(dataset, tmp_path, monkeypatch):
    """job(out, **flags) writes responses of known numbers for events of seven particles."""
    monkeypatch.setattr(common, "BLOCK", 1)
    (tmp_path / "model.eqx").write_text("a model")
    write_tree(tmp_path / "a.root", dataset, event=np.arange(200) // 7, particle=np.arange(200) % 7)

    def draw(particles, number):
        rng = np.random.default_rng(number)
        return rng.poisson(0.5, (len(particles), *DETECTORS["zn"].shape)).astype(np.uint16)

    def write(name, **flags):
        given = dict(generate=tmp_path / "a.root", load=tmp_path / "model.eqx", out=tmp_path / name, seed=0,
                     rows=None, axes=None, hit=None, all_hit=True, detector="zn", script="fm", quiet=True,
                     min_eta=6.0, events=None, header={}) | flags
        lists.write(SimpleNamespace(**given), draw, metrics.channels)
        return tmp_path / name
    return write


def test_responses_come_back_from_root(job):
    """Lit fibres, channels and numbers, as the HDF5 file has them."""
    with uproot.open(job("out.root")) as file, h5py.File(job("out.h5")) as expected:
        tree = file["responses"].arrays()
        responses = expected["responses"][:]
        assert len(tree) == 200 and "detector zn" in file["about"]
        for k in range(200):
            found = np.zeros(responses.shape[1:], np.uint16)
            found[tree["fibre_x"][k], tree["fibre_y"][k]] = tree["fibre_photons"][k]
            np.testing.assert_array_equal(found, responses[k])
        np.testing.assert_array_equal(tree["channels"], expected["channels"])
        np.testing.assert_array_equal(tree["side"], np.sign(expected["particles"][:, 6]))
        for name in ("event", "particle", "pdg"):
            np.testing.assert_array_equal(tree[name], expected[name])


def test_sums_over_events(job, tmp_path):
    """By brute force, one side after the other, also where no particle flew."""
    path = job("out.h5", events=tmp_path / "sums.h5")
    with h5py.File(path) as file, h5py.File(tmp_path / "sums.h5") as sums:
        side, total = np.sign(file["particles"][:, 6]), 0
        assert sorted(zip(sums["event"], sums["side"])) == [
            (event, here) for event in np.unique(file["event"]) for here in (-1, 1)]
        columns = (sums[key] for key in ("event", "side", "channels", "particles"))
        for event, here, channels, number in zip(*columns):
            mine = (file["event"][:] == event) & (side == here)
            np.testing.assert_allclose(channels, file["channels"][:][mine].sum(0), rtol=1e-5)
            assert number == mine.sum()
            total += number
        assert total == 200


def test_sums_need_events_and_all_rows(job, dataset, tmp_path):
    tiny.save(tmp_path / "list.h5", dataset)
    for flags in (dict(rows="0:50"), dict(generate=tmp_path / "list.h5")):
        with pytest.raises(UserError, match="--events needs a whole HepMC file"):
            job("out.h5", events=tmp_path / "sums.h5", **flags)
    with pytest.raises(UserError, match="sums.root: sums over events are written as HDF5"):
        job("out.h5", events=tmp_path / "sums.root")
    assert not (tmp_path / "out.h5").exists() and not (tmp_path / "sums.h5").exists()


def test_nothing_half_written(job, tmp_path, monkeypatch):
    """A failure in the second of seven blocks."""
    channels, done = metrics.channels, []

    def fail(responses):
        done.append(1)
        if len(done) == 2:
            raise OSError("no space left")
        return channels(responses)
    monkeypatch.setattr(metrics, "channels", fail)
    with pytest.raises(UserError, match="no space left"):
        job("out.root", events=tmp_path / "sums.h5")
    assert {path.name for path in tmp_path.iterdir()} == {"a.root", "model.eqx"}


def test_without_the_extra(monkeypatch):
    with pytest.raises(UserError, match="need no_such_library: pip install -e"):
        hep.imported("no_such_library")
