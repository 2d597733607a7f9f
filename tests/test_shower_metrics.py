"""shower_metrics.py: scores of showers, on the small calorimeter and a stand-in of changed constants."""
import json

import numpy as np
import pytest
from matplotlib.image import imread

import calorimeter
import preprocessing
import shower_metrics
from calorimeter import Showers
from common import UserError

SMALL = calorimeter.CALORIMETERS["small"]


def stand_in(seed, rows=1200, **changed):
    energies = calorimeter.draw_energies(rows, 0)
    return Showers(energies, calorimeter.simulate(SMALL, energies, seed, calorimeter.MODEL | changed))


@pytest.fixture(scope="module")
def showers():
    """Real, changed, and oracle."""
    return stand_in(1), stand_in(2, radii=2.5, depth=1.5), stand_in(3)


@pytest.fixture(scope="module")
def shower_scores(showers):
    """Scores of the changed stand-in, with oracle, and of some showers of the oracle, without."""
    real, changed, oracle = showers
    few = [Showers(values.energies[:400], values.voxels[:400]) for values in (real, oracle)]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in dict(rows=600, width=32, epochs=6, trainings=2, batch=100).items():
            patch.setitem(shower_metrics.CLASSIFIER, key, value)
        return (shower_metrics.evaluate(real, changed, SMALL, oracle),
                shower_metrics.evaluate(*few, SMALL, cut=1.0))


def test_separation_of_equal_and_of_disjoint_showers(showers):
    real = showers[0]
    columns = shower_metrics.families(real, calorimeter.features(real, SMALL))
    assert {family: column.shape[1] for family, column in columns.items()} == {
        "layer energies": 10, "E_tot": 1, "centres": 20, "widths": 20, "sparsity": 10, "radial centres": 10,
        "radial widths": 10, "voxels": 1, "ring depths": 5}
    layers, total = real.voxels.sum((2, 3)), real.voxels.sum((1, 2, 3))
    np.testing.assert_allclose(10**columns["layer energies"], layers + 1e-8, rtol=1e-4)
    np.testing.assert_allclose(columns["E_tot"][:, 0], total / real.energies, rtol=1e-4)
    np.testing.assert_allclose(columns["sparsity"], (real.voxels == 0).mean((2, 3)), atol=1e-6)
    assert set(shower_metrics.separation(columns, columns).values()) == {0}
    # Columns of one bin each: every family is in its lowest bin, and then beyond its highest one
    low = {family: np.full((9, 2), -9.0) for family in columns}
    high = {family: np.full((9, 2), 9.0) for family in columns}
    assert shower_metrics.separation(low, high) == pytest.approx(dict.fromkeys(columns, 1))


def test_scores_of_showers(shower_scores):
    changed, again = shower_scores
    for name in shower_metrics.AUCS:
        assert changed[name]["value"] > 0.6 and changed[name]["oracle"] == pytest.approx(0.5, abs=0.1)
        assert changed[name]["spread"] > 0 and changed[name]["R"] is None and "floor" in again[name]
    for name in ("FPD", "KPD"):
        assert changed[name]["value"] > 2 * again[name]["value"] and changed[name]["error"] > 0
    assert changed["FPD"]["R"] > 2 and again["FPD"]["R"] is None
    assert all(cell["R"] > 1.2 for cell in changed["separation"].values())
    edges, real, generated = (np.array(changed["weights"][name]) for name in ("log10_w", "real", "generated"))
    assert real.sum() == pytest.approx(1) and generated.sum() == pytest.approx(1) and len(real) == 60
    assert edges[1:] @ real > edges[1:] @ generated
    assert changed["rows"] == 1200 and changed["cut"] == 0 and again["cut"] == 1
    json.dumps(shower_scores, allow_nan=False)


def test_table_and_pictures_of_showers(showers, shower_scores, tmp_path, capsys):
    changed, again = shower_scores
    shower_metrics.print_table(changed, "small, changed")
    shower_metrics.print_table(again, "small, again")
    text = capsys.readouterr().out
    assert "small, changed: 1200 showers\n" in text and "400 showers, voxels above 1 MeV" in text
    assert max(map(len, text.splitlines())) <= 120 and text.count("separation power") == 18
    shower_metrics.plot_showers(tmp_path, *showers[:2], SMALL, changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png", "showers.png"]
    for path in tmp_path.iterdir():
        pixels = imread(path)
        assert pixels.shape[1] > 600 and len(np.unique(pixels[..., 0])) > 10


def test_the_cut_empties_voxels(showers):
    cut = shower_metrics.cut_voxels(showers[0], 5.0)
    np.testing.assert_array_equal(cut.voxels, np.where(showers[0].voxels <= 5, 0, showers[0].voxels))
    assert shower_metrics.cut_voxels(showers[0], 0.0) is showers[0]


def test_the_challenges_classifier_sees_the_inputs_as_they_are(showers, monkeypatch):
    seen = []
    monkeypatch.setattr(shower_metrics, "network_logits", lambda *arguments: seen.append(arguments[:2]))
    # As for the floor, the energies of both sides differ
    pair = [Showers(values.energies[::step], values.voxels[::step]) for values, step in zip(showers, (1, -1))]
    shower_metrics.logits_of(*pair, [np.full((1200, 3), 7.0)] * 2, 0, shower_metrics.CHALLENGE)
    rows = np.random.default_rng(0).permutation(1200)
    low, high, ratios = seen
    for part, inputs, others in zip(pair, low, ratios):
        energies, voxels = (values[rows].reshape(1200, -1) for values in part)
        expected = np.hstack([np.log10(energies), 100 * voxels / energies])
        np.testing.assert_allclose(inputs, expected, rtol=1e-5)
        expected = np.hstack([np.log10(energies), preprocessing.energy_ratios(part)[rows]])
        np.testing.assert_allclose(others, expected, rtol=1e-5)
    assert np.all(np.array(high) == 7)


def test_showers_that_do_not_match_are_refused(showers):
    real, made, _ = showers
    few = [Showers(values.energies[:19], values.voxels[:19]) for values in (real, made)]
    for pair, word in (((real, stand_in(1, 1100)), "row by row"), (few, "at least 20"),
                       ((real, made._replace(voxels=made.voxels[:, 1:])), "row by row")):
        with pytest.raises(UserError, match=word):
            shower_metrics.evaluate(*pair, SMALL)
