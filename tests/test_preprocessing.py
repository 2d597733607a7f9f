"""preprocessing.py: what the networks of calodream.py see leads back to the same showers."""
import math
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import calorimeter
import preprocessing
from calorimeter import CALORIMETERS, Showers
from preprocessing import (FACTOR, Latent, energy_ratios, from_patches, layer_energies, measure_latent,
                           measure_logits, measure_ratios, to_patches)

KEY, SMALL = jax.random.key(0), CALORIMETERS["small"]


# ------------------------------------------------------------------------------------------ ratios and shares

def random_shower(seed, energy, lit, empty):
    """Showers of one shower: the share `lit` of its voxels from the threshold to GeVs, some layers empty."""
    rng = np.random.default_rng(seed)
    voxels = 0.016 * np.exp(rng.uniform(0, 12, SMALL.shape)) * (rng.random(SMALL.shape) < lit)
    voxels[rng.random(10) < empty] = 0
    voxels *= min(1, 2.8 * energy / max(voxels.sum(), 1e-9))
    return Showers(np.float32([energy]), np.where(voxels < 0.016, 0, voxels).astype(np.float32)[None])


SHOWERS = st.builds(random_shower, st.integers(0, 2**32 - 1), st.floats(1e3, 1e6),
                    st.sampled_from([0, 0.003, 0.05, 0.5, 1]), st.sampled_from([0, 0.5, 0.9]))


@cache
def measured():
    """Ratios and Logits of 400 simulated showers, of which the first ten are left out."""
    energies = calorimeter.draw_energies(400, 0)
    showers = Showers(energies, calorimeter.simulate(SMALL, energies, 0))
    showers.voxels[:, 9, 7, 4] = 0                                             # a voxel that is never lit
    rows = np.arange(10, 400)
    space = measure_logits(showers.voxels, rows, (2, 8, 5))
    return showers, measure_ratios(energy_ratios(showers)[rows]), space


@eqx.filter_jit
def there_and_back(space, voxels, layers):
    return space.decode(space.encode(voxels, None, None), None, layers)


def assert_survives(showers):
    """Energies of the layers by way of their ratios, voxels by way of their logits."""
    (energy,), (voxels,) = showers
    layers = jax.jit(layer_energies)(energy_ratios(showers)[0], energy)
    np.testing.assert_allclose(layers, voxels.sum((1, 2)), rtol=1e-4, atol=1e-2)
    found = there_and_back(measured()[2], voxels, layers)
    np.testing.assert_allclose(found, voxels, rtol=1e-3, atol=1e-2)


@settings(max_examples=60, deadline=None)
@given(SHOWERS)
def test_preprocessing_is_invertible(showers):
    assert_survives(showers)


@pytest.mark.parametrize("lit", [{}, {0: 5.0}, {9: 0.02}, {4: 2.8e6}, {3: 1e6, 7: 0.11}, {0: 0.02, 9: 1e6}])
def test_layers_of_single_voxels_survive(lit):
    voxels = np.zeros((1, *SMALL.shape), np.float32)
    for layer, energy in lit.items():
        voxels[0, layer, 2, 3] = energy
    assert_survives(Showers(np.float32([1e6]), voxels))


@settings(max_examples=20, deadline=None)
@given(SHOWERS)
def test_ratios_are_those_of_the_equation(showers):
    layers = showers.voxels[0].sum((1, 2), dtype=np.float64)
    u = [layers.sum() / FACTOR / showers.energies[0]]                          # [CaloDREAM, Eq. 2]
    for i in range(9):
        u.append(layers[i] / layers[i:].sum() if layers[i] else 0.0)
    assert (np.array(u) >= 0).all() and (np.array(u) <= 1).all()
    x = 1e-6 + (1 - 2e-6) * np.array(u)                                        # [CaloDREAM, Eq. 3]
    np.testing.assert_allclose(energy_ratios(showers)[0], np.log(x / (1 - x)), atol=1e-4)


@pytest.mark.parametrize("patch", [(2, 8, 5), (5, 2, 1), (1, 1, 1)])
def test_patches(patch):
    voxels = np.arange(400).reshape(SMALL.shape)
    found, grid = to_patches(voxels, patch), [n // p for n, p in zip(SMALL.shape, patch)]
    assert np.array_equal(from_patches(found, patch, SMALL.shape), voxels)
    for number, place in enumerate(np.ndindex(*grid)):
        block = voxels[tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch))]
        assert np.array_equal(found[number], block.ravel())


# -------------------------------------------------------------------------------------------- energy network

def test_measured_ratios():
    """Empty layers and the last lit one leave mean and deviation alone, and are put outside of the others."""
    logits = np.random.default_rng(0).normal(-2, 0.5, (4000, 3)).astype(np.float32)
    inner = logits.copy()
    logits[::2, 1], logits[::3, 2], end = -math.log(1e6), math.log(1e6), math.log(1e6)
    ratios = measure_ratios(logits)
    for k, used in enumerate((slice(None), np.arange(4000) % 2 > 0, np.arange(4000) % 3 > 0)):
        assert ratios.mean[k] == pytest.approx(inner[used, k].mean(), rel=1e-4)
        assert ratios.std[k] == pytest.approx(inner[used, k].std(), rel=1e-2)
    x = ratios.standardise(logits)
    assert (x[::2, 1] == -5).all() and (x[::3, 2] == 5).all() and np.abs(x[1::2, 1]).max() <= 4
    assert abs(logits[0, 1]) == abs(logits[0, 2]) == pytest.approx(end)
    assert np.isfinite(measure_ratios(np.full((5, 3), -end, np.float32)).standardise(logits)).all()


def test_energies_of_the_layers_of_a_condition():
    showers, ratios, _ = measured()
    c = np.hstack([preprocessing.incident(showers.energies), ratios.standardise(energy_ratios(showers))])
    inside = np.abs(c[:, 1:]).max(1) < 4
    expected = showers.voxels.sum((2, 3))
    assert inside.any() and (np.abs(c[:, 1:]) == 5).any()
    np.testing.assert_allclose(jax.vmap(ratios.layers)(c)[inside], expected[inside], rtol=1e-3, atol=1e-2)
    empty = np.abs(c[0, 1:]) >= 0
    assert not ratios.layers(jnp.where(np.append(False, empty), -5.0, c[0]))[:-1].any()        # u = 0: empty


# --------------------------------------------------------------------------------------------- shape network

def test_measured_logits():
    """Means and deviations of the lit voxels of a ring."""
    showers, _, space = measured()
    voxels = showers.voxels[10:]
    shares = voxels / np.maximum(voxels.sum((2, 3), keepdims=True), 1e-10)
    logits = np.log((1e-6 + (1 - 2e-6) * shares) / (1e-6 + (1 - 2e-6) * (1 - shares)))
    for layer, ring in ((0, 0), (4, 2), (9, 4)):
        lit = logits[:, layer, :, ring][voxels[:, layer, :, ring] > 0]
        np.testing.assert_allclose(space.mean[layer, :, ring], lit.mean(), rtol=1e-3)
        np.testing.assert_allclose(space.std[layer, :, ring], lit.std(), rtol=1e-2)
    dark = measure_logits(np.zeros((5, *SMALL.shape), np.float32), np.arange(5), (2, 8, 5))
    assert np.abs(dark.encode(voxels[0], None, None)).max() < 28


def test_empty_voxels():
    _, _, space = measured()
    np.testing.assert_allclose(space.encode(jnp.zeros(SMALL.shape), None, None), space.empty(), rtol=1e-5)
    assert space.empty().shape == (5, 80) and Latent(None, None, None).empty() is None


def test_a_layer_with_energy_has_a_lit_voxel():
    """The largest one if all are below the threshold, which are not added up; none without energy."""
    _, _, space = measured()
    dark = space.empty().at[0, 3].add(0.1)
    found = np.asarray(space.decode(dark, None, jnp.full(10, 5.0).at[2].set(0)))
    assert found[0].sum() == found[0].ravel()[3] == pytest.approx(5) and not found[2].any()
    shares = jnp.full(SMALL.shape, 2e-3).at[:, 0, 0].set(1.0)
    found = np.asarray(preprocessing.to_voxels(shares, jnp.full(10, 5.0)))     # 2e-3 of 5 MeV: 10 keV
    assert ((found > 0) == (shares == 1)).all() and found.sum() == pytest.approx(50)
    found = np.asarray(preprocessing.to_voxels(jnp.full(SMALL.shape, 0.5), jnp.full(10, 1.0)))
    np.testing.assert_allclose(found, 1 / 40, rtol=1e-5)                       # above it, once divided by 20


def test_a_latent_is_standardised_and_put_back():
    rng = np.random.default_rng(0)
    voxels = rng.exponential(1, (200, *SMALL.shape)).astype(np.float32)
    autoencoder = Shift(jnp.float32(-13.0))
    space = measure_latent(autoencoder, voxels, np.zeros((200, 11), np.float32), KEY)
    encode = jax.vmap(lambda voxels, key: space.encode(voxels, None, key))
    x = encode(voxels, jax.random.split(KEY, 200))
    np.testing.assert_allclose(x.mean(0), 0, atol=0.3)
    np.testing.assert_allclose(x.std(0), 1, atol=0.3)
    shares = np.array(jax.nn.sigmoid(x[0] * space.std + space.mean - 13.0)).reshape(SMALL.shape)
    shares[shares < 1e-6] = 0                                                  # [CaloDREAM, Eq. 14]
    layers = jnp.full(10, 100.0)
    found = np.asarray(space.decode(x[0], None, layers))
    np.testing.assert_allclose(found, preprocessing.to_voxels(shares, layers), rtol=1e-2, atol=1e-3)
    assert 0 < (found == 0).mean() < 1 and isinstance(space, Latent)


class Shift(eqx.Module):
    """An autoencoder whose latent (10, 40) is a hundred shares of each voxel, with a deviation of 0.1."""
    logit: jax.Array

    def encode(self, shares, c):
        mean = 100 * shares.reshape(10, 40)
        return mean, jnp.full(mean.shape, math.log(0.1))

    def decode(self, r, c):
        return (r + self.logit).reshape(SMALL.shape)
