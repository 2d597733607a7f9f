"""lists.py: a list that is cut into jobs gives the bytes of one job, and wrong parts are refused."""
import itertools
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tiny

import common
import data
import hit
import lists
import metrics
from common import UserError
from simulator import DETECTORS

ROWS = 150


@pytest.fixture(scope="module", autouse=True)
def shrunk(small_detectors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "BLOCK", 1)                                      # chunks of 32 rows
        yield


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(rows, **flags) writes a file of a model that draws what its key and the particle say; half miss."""
    tiny.save(tmp_path / "list.h5", data.open_data("zn", ROWS, quiet=True))
    for name in ("model.eqx", "hit.eqx"):
        (tmp_path / name).write_text(name)

    def draw(particles, number):
        rng = np.random.default_rng([number, len(particles)])
        energy = particles[:, 0].astype(int)[:, None, None]
        return (energy + rng.integers(0, 99, (len(particles), *DETECTORS["zn"].shape))).astype(np.uint16)

    def with_misses(generate, path, name, seed, axes):
        def some(particles, number):
            passed = np.random.default_rng(number).random(len(particles)) < 0.5
            responses = np.zeros((len(particles), *DETECTORS["zn"].shape), np.uint16)
            responses[passed] = generate(particles[passed], number)
            return responses
        return some
    monkeypatch.setattr(hit, "with_misses", with_misses)

    def write(rows=None, **flags):
        path = tmp_path / f"{rows or 'all'}{'-'.join(map(str, flags))}.h5".replace(":", "-")
        given = dict(generate=tmp_path / "list.h5", load=tmp_path / "model.eqx", out=path, rows=rows,
                     axes=None, hit=tmp_path / "hit.eqx", all_hit=False, detector="zn", script="fm", seed=0,
                     quiet=True, events=None, header={}) | flags
        lists.write(SimpleNamespace(**given), draw, metrics.channels)
        return path
    return write


def content(path):
    with h5py.File(path) as file:
        attributes = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
        return attributes, {name: file[name][:].tobytes() for name in file}


@pytest.mark.parametrize("seed", range(6))
def test_a_list_that_is_cut_at_random_gives_the_bytes_of_one_job(job, tmp_path, seed, capsys):
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.choice(np.arange(1, ROWS), rng.integers(1, 6), replace=False)), ROWS]
    parts = [job(f"{a}:{b + 99 * (b == ROWS)}") for a, b in itertools.pairwise(cuts)]
    rng.shuffle(parts)
    assert lists.main([*map(str, parts), "--out", str(tmp_path / "whole.h5")])["rows"] == ROWS
    assert content(tmp_path / "whole.h5") == content(job())
    assert "per second, at most" in capsys.readouterr().out


def test_particles_and_channels_are_those_of_the_rows(job):
    with h5py.File(job("40:100")) as part, h5py.File(job()) as whole:
        for name in ("particles", "pdg", "responses", "channels"):
            np.testing.assert_array_equal(part[name], whole[name][40:100])
        assert (part["responses"][:].sum((1, 2)) == 0).any()


@pytest.mark.parametrize("rows", ["150:160", "5:5", "7:3", "-1:4", "3", "a:b", "1:2:3", ":", "0: 4"])
def test_wrong_rows(rows, job):
    with pytest.raises(UserError, match=f"--rows {rows}: expected A:B with 0 <= A < B and A < 150"):
        job(rows)


@pytest.mark.parametrize("parts, message", [
    (["0:50", "60:150"], "begins at row 60, expected row 50 of 150"),
    (["0:50", "40:150"], "begins at row 40, expected row 50 of 150"),
    (["50:150"], "begins at row 50, expected row 0"), (["0:50"], "ends at row 50 of 150"),
    (["0:50", "0:50"], "begins at row 0, expected row 50")])
def test_gaps_and_overlaps(parts, message, job, tmp_path):
    with pytest.raises(UserError, match=message):
        lists.merge([job(rows) for rows in parts], tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()


def test_parts_of_other_jobs(job, tmp_path):
    for flags in (dict(seed=1), dict(all_hit=True), dict(script="gan"), dict(steps=3)):
        with pytest.raises(UserError, match="made of another list, model or flags"):
            lists.merge([job("0:50"), job("50:150", **flags)], tmp_path / "out.h5")


def test_parts_of_another_list_or_model(job, tmp_path):
    parts = [job("0:50")]
    for name in ("model.eqx", "hit.eqx", "list.h5"):
        content = (tmp_path / name).read_bytes()
        if name == "list.h5":
            tiny.save(tmp_path / name, data.open_data("zn", ROWS, seed=1, quiet=True))
        else:
            (tmp_path / name).write_text("another")
        with pytest.raises(UserError, match="made of another list, model or flags"):
            lists.merge([*parts, job("50:150")], tmp_path / "out.h5")
        (tmp_path / name).write_bytes(content)


def test_an_output_replaces_nothing_that_is_read(job, tmp_path):
    inputs = "list.h5", "model.eqx", "hit.eqx"
    wrong = [{flag: tmp_path / name} for flag in ("out", "events") for name in inputs]
    for flags in (*wrong, dict(events=tmp_path / "all.h5", out=tmp_path / "all.h5")):
        with pytest.raises(UserError, match="would replace another file"):
            job(**flags)
    part = job("0:150")
    with pytest.raises(UserError, match="another file than --out"):
        lists.merge([part], part)


@pytest.mark.parametrize("damage", ["text", "half", "missing", "another file"])
def test_damaged_parts(damage, job, tmp_path):
    first, bad = job("0:50"), job("50:150")
    if damage == "missing":
        bad.unlink()
    elif damage == "another file":
        tiny.save(bad, data.open_data("zn", ROWS, quiet=True))
    else:
        bad.write_bytes({"text": b"no", "half": bad.read_bytes()[:600]}[damage])
    with pytest.raises(UserError, match=f"{bad.name}: expected an HDF5 file that --generate has written"):
        lists.merge([first, bad], tmp_path / "out.h5")


# ----------------------------------------------------------------------------------------- what is in a list

def test_neutrinos_get_no_light(job, tmp_path):
    """Others get what they get without them, in jobs as well."""
    before, listed = job(), data.open_data("zn", ROWS, quiet=True)
    listed.pdg[[2, 50]] = 12, -16
    tiny.save(tmp_path / "list.h5", listed)
    with h5py.File(before) as file:
        expected = file["responses"][:]
    expected[[2, 50]] = 0
    for rows in ("0:150", "40:60"):
        with h5py.File(job(rows)) as file:
            first, last = map(int, rows.split(":"))
            np.testing.assert_array_equal(file["responses"], expected[first:last])


def test_a_nucleus_is_refused(job, tmp_path):
    listed = data.open_data("zn", ROWS, quiet=True)
    listed.pdg[7] = 1000020040
    tiny.save(tmp_path / "list.h5", listed)
    with pytest.raises(UserError, match="list.h5: row 7 is a nucleus"):
        job()


def test_charged_particles_from_afar_are_counted(job, tmp_path, capsys):
    listed = data.open_data("zn", ROWS, quiet=True)
    listed.particles[:3, 3], listed.particles[:3, 8] = (-5000, 200, 50), 1
    tiny.save(tmp_path / "list.h5", listed)
    job()
    assert "list.h5: 2 charged particles start more than 1 m" in capsys.readouterr().out


def test_a_byte_order_mark(tmp_path):
    names, row = ",".join(lists.FEATURES), "100,0,0,0,0,0,100,0,0"
    (tmp_path / "a.csv").write_text(f"{names}\n{row}\n", encoding="utf-8-sig")
    assert lists.read_particles(tmp_path / "a.csv")[0].tolist() == [[100, 0, 0, 0, 0, 0, 100, 0, 0]]
