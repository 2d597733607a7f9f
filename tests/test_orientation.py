"""orientation.py: every symmetry, offset and scale of a file is found, and the open data keep theirs."""
import h5py
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import common
import data
import fm
import orientation
from orientation import Axes
from simulator import DETECTORS

EVERY = [(name, word) for name in DETECTORS for word in orientation.words(DETECTORS[name])]


@pytest.fixture(scope="module")
def sets():
    return {name: data.open_data(name, 4000, quiet=True) for name in DETECTORS}


def found(dataset, name, axes=None):
    """(Dataset, Axes) of data.turned on all rows."""
    args = fm.parse(["--detector", name, *(["--axes", axes] if axes else [])])
    turned = data.turned(args, dataset, np.arange(len(dataset.pdg)))
    return turned, Axes(**args.header["axes"])


def test_words():
    assert len(EVERY) == 12 and len({word for name, word in EVERY if name == "zn"}) == 8


@given(st.sampled_from([word for name, word in EVERY if name == "zn"]),
       hnp.arrays(np.uint16, st.integers(0, 3).flatmap(lambda n: st.just((n, 4, 4)))))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read(word, responses):
    axes = Axes(word)
    np.testing.assert_array_equal(axes.read(axes.write(responses)), responses)
    np.testing.assert_array_equal(axes.write(axes.read(responses)), responses)


def test_what_a_word_says():
    """yX: the first axis of the file counts along y, the second against x."""
    file = np.arange(12).reshape(1, 3, 4)                                      # (y, from high x to low x)
    ours = Axes("yX").read(file)
    assert ours.shape == (1, 4, 3)
    for x in range(4):
        for y in range(3):
            assert ours[0, x, y] == file[0, y, 3 - x]


def test_straight_lines_are_moved_and_scaled():
    particles = np.array([[500, 0.1, 0.2, 0.3, 0.3, 0.4, 499.9, 0, 0]], np.float32)
    place = lambda p: np.array([p[0, 1] + 11250 * p[0, 4] / p[0, 6], p[0, 2] + 11250 * p[0, 5] / p[0, 6]])
    moved = Axes("xy", (0.5, -0.25), 1.25).move(particles)
    np.testing.assert_allclose(place(moved), (place(particles) - [0.5, -0.25]) / 1.25, rtol=1e-5)
    np.testing.assert_array_equal(np.delete(moved, [1, 2, 4, 5]), np.delete(particles, [1, 2, 4, 5]))
    np.testing.assert_array_equal(Axes().move(particles), particles)


@pytest.mark.parametrize("name, word", EVERY)
def test_every_symmetry_is_found(sets, name, word, capsys):
    """From what a file of these axes would hold, and the open data come out of it, to the bit."""
    original = sets[name]
    file = original._replace(responses=Axes(word).write(original.responses))
    turned, axes = found(file, name)
    assert axes == Axes(word)
    assert all(np.array_equal(a, b) for a, b in zip(turned, original))
    assert f"--axes {word}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("offset, scale", [((0.9, -0.4), 1.0), ((0.0, 0.0), 0.8), ((-0.5, 0.7), 1.25)])
def test_offsets_and_scales_are_found(sets, name, offset, scale):
    """Of particles that have been moved and scaled the other way."""
    original = sets[name]
    particles = original.particles.copy()
    particles[:, [1, 2, 4, 5]] *= scale
    particles[:, 1:3] += np.float32(offset)
    _, axes = found(original._replace(particles=particles), name)
    pitch = DETECTORS[name].pitch
    assert axes.word == "xy"
    np.testing.assert_allclose(axes.offset, offset, atol=0.5 * pitch)
    assert axes.scale == pytest.approx(scale, rel=0.1)


def test_nothing_correlates(sets, capsys):
    rng = np.random.default_rng(0)
    shuffled = sets["zn"]._replace(responses=rng.permutation(sets["zn"].responses))
    assert found(shuffled, "zn")[1] == Axes()
    assert "do not correlate, taken as --axes xy\n" in capsys.readouterr().out
    assert found(shuffled, "zn", "Yx")[1] == Axes("Yx")                        # --axes is believed
    assert found(data.select(sets["zn"], slice(5)), "zn")[1] == Axes()         # too few


def test_axes_of_the_flag(sets):
    assert found(sets["zn"], "zn", "yX")[1].word == "yX"


def test_a_model_of_a_user_draws_on_the_users_axes(tmp_path, small_detectors):
    """Trained and told on turned files, it gives what one of the open data gives, turned."""
    with pytest.MonkeyPatch.context() as patch:
        tiny.shrink(patch.setattr)
        dataset, made = data.open_data("zn", 700, quiet=True), {}
        for word in ("xy", "Yx"):
            folder = tmp_path / word
            folder.mkdir()
            tiny.save(folder / "all.h5", dataset._replace(responses=Axes(word).write(dataset.responses)))
            fm.main(["--data", str(folder / "all.h5"), *tiny.FLAGS, "--validate", "--run", str(folder),
                     "--axes", word])
            fm.main(["--load", str(folder / "model.eqx"), "--generate", str(folder / "all.h5"), "--quiet",
                     "--all-hit", "--steps", "2", "--out", str(folder / "out.h5")])
            with h5py.File(folder / "out.h5") as file:
                made[word] = file["responses"][:]
        assert common.read_header(tmp_path / "Yx" / "model.eqx")["axes"]["word"] == "Yx"
        np.testing.assert_array_equal(made["Yx"], Axes("Yx").write(made["xy"]))
