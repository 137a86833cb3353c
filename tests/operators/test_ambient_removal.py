import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import sparse

import diffbio
from diffbio.errors import DataError
from diffbio.operators.singlecell import AmbientRemovalConfig, DifferentiableAmbientRemoval


def make(n_genes=8, **settings):
    sizes = {"latent_dim": 3, "hidden_dims": (16,), **settings}
    return DifferentiableAmbientRemoval(AmbientRemovalConfig(n_genes=n_genes, **sizes), rngs=nnx.Rngs(0))


def soup_data(n_cells=500, n_genes=80, seed=0):
    """Four cell types with genes of their own, and a known soup of all of them."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 4, n_cells)
    fraction = rng.dirichlet(np.full(n_genes, 0.15), 4)
    soup = fraction.mean(0)
    library = rng.uniform(1500, 3000, (n_cells, 1))
    rho = rng.beta(4, 36, (n_cells, 1))
    native = rng.poisson(rng.gamma(8.0, library * (1 - rho) * fraction[types] / 8.0))
    ambient = rng.poisson(library * rho * soup)
    data = {"counts": (native + ambient).astype(np.float32), "ambient_profile": soup.astype(np.float32)}
    return data, native, ambient


def test_what_remains_is_between_nothing_and_the_counts():
    for op, data in DifferentiableAmbientRemoval.examples().values():
        kept = op.apply(data, {}, None)[0]["decontaminated_counts"]
        assert (kept >= 0).all()
        assert (kept <= data["counts"]).all()
        part = op.apply(data | {"counts": data["counts"] * 0.37}, {}, None)[0]["decontaminated_counts"]
        assert (part >= 0).all()
        assert (part <= data["counts"] * 0.37).all()


def test_without_ambient_rna_the_counts_are_returned():
    _, data = DifferentiableAmbientRemoval.examples()["whole"]
    for temperature in (0.1, 5.0):
        out = make(ambient_prior=1e-8, temperature=temperature).apply(data, {}, None)[0]
        np.testing.assert_allclose(out["decontaminated_counts"], data["counts"], rtol=1e-4, atol=1e-5)
        assert (out["contamination_fraction"] < 1e-4).all()


def test_a_larger_prior_removes_more():
    _, data = DifferentiableAmbientRemoval.examples()["whole"]
    kept = [
        make(ambient_prior=p, ambient_spread=0.1).apply(data, {}, None)[0]["decontaminated_counts"].sum()
        for p in (0.01, 0.2, 0.6)
    ]
    assert kept[0] > kept[1] > kept[2]


def test_whole_molecules_are_removed_as_the_temperature_falls():
    _, data = DifferentiableAmbientRemoval.examples()["whole"]
    kept = make(temperature=0.003).apply(data, {}, None)[0]["decontaminated_counts"]
    assert (jnp.abs(kept - jnp.round(kept)) < 1e-3).mean() > 0.95
    expected = make(temperature=50.0).apply(data, {}, None)[0]["decontaminated_counts"]
    assert jnp.abs(kept - expected).max() <= 0.5 + 1e-4


def test_a_profile_that_is_none_is_refused_but_not_under_jit():
    op, data = DifferentiableAmbientRemoval.examples()["whole"]
    profile = data["ambient_profile"]
    with pytest.raises(DataError, match=r"must sum to 1, but sums to 2; divide it by its sum"):
        op.apply(data | {"ambient_profile": 2 * profile}, {}, None)
    with pytest.raises(DataError, match=r"ambient_profile must be >= 0, but entry 3 is -0.1"):
        op.apply(data | {"ambient_profile": profile.at[3].set(-0.1)}, {}, None)
    with pytest.raises(DataError, match="entry 0 is nan"):
        op.objective(data | {"ambient_profile": profile.at[0].set(jnp.nan)})
    out = jax.jit(lambda d: op.apply(d, {}, None)[0])(data | {"ambient_profile": 2 * profile})
    assert jnp.isfinite(out["decontaminated_counts"]).all()


def test_a_gene_that_the_soup_lacks_keeps_its_counts():
    op, data = DifferentiableAmbientRemoval.examples()["whole"]
    profile = data["ambient_profile"].at[2].set(0.0)
    kept = op.apply(data | {"ambient_profile": profile / profile.sum()}, {}, None)[0]["decontaminated_counts"]
    np.testing.assert_allclose(kept[:, 2], data["counts"][:, 2], rtol=1e-5)


def test_fit_finds_the_fraction_of_every_cell_and_removes_what_was_added():
    data, native, ambient = soup_data()
    op = make(80, latent_dim=5, hidden_dims=(64,))
    diffbio.fit(op, data, max_epochs=120, batch_size=50, progress=False)
    out = op.apply(data, {}, None)[0]
    kept, found = np.asarray(out["decontaminated_counts"]), np.asarray(out["contamination_fraction"])
    true = ambient.sum(1) / data["counts"].sum(1)
    assert np.corrcoef(found, true)[0, 1] > 0.9
    assert abs(found.mean() - true.mean()) < 0.02
    error, without = np.abs(kept - native).mean(), ambient.mean()
    share = true[:, None] * data["counts"].sum(1, keepdims=True) * data["ambient_profile"]
    subtracted = np.abs(np.maximum(data["counts"] - share, 0) - native).mean()
    assert error < 0.5 * without
    assert error < subtracted  # better than subtracting every cell's true fraction of soup
    lost = np.maximum(data["counts"] - kept - ambient, 0).sum() / native.sum()
    assert lost < 0.03
    correlation = np.corrcoef(np.asarray(out["reconstructed"]).ravel(), native.ravel())[0, 1]
    assert correlation > 0.9


def test_the_profile_comes_from_droplets_without_a_cell():
    droplets = np.array([[30, 10, 0], [50, 30, 20], [0, 0, 0], [900, 0, 500]], np.float32)
    for counts in (droplets, sparse.csr_array(droplets)):
        profile = DifferentiableAmbientRemoval.profile_from(counts)
        np.testing.assert_allclose(profile, np.array([80, 40, 20]) / 140, rtol=1e-6)
    with pytest.raises(DataError, match="unfiltered"):
        DifferentiableAmbientRemoval.profile_from(droplets[3:])
    for wrong in (-1.0, np.nan, 0.5):
        droplets[1, 1] = wrong
        for counts in (droplets, sparse.csr_array(droplets)):
            with pytest.raises(DataError, match=f"whole numbers >= 0, but 1 entries do not, such as {wrong:g}"):
                DifferentiableAmbientRemoval.profile_from(counts)


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_counts_that_are_none_are_refused(wrong):
    op, data = DifferentiableAmbientRemoval.examples()["whole"]
    counts = np.array(data["counts"])
    counts[5, 2] = wrong
    for call in (op.apply, op.init_from):
        with pytest.raises(DataError, match=r"DifferentiableAmbientRemoval: .* row 5, column 2"):
            call({**data, "counts": counts})
