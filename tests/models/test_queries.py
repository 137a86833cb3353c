import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from diffbio.errors import ConfigError, DataError, DataWarning
from diffbio.models import SCVI, posterior
from diffbio.models.base import flat_state

from .conftest import cells


def counts(model):
    return model.adata.X.toarray()


def test_latents_are_the_modules_means(trained):
    q = trained.module.vae.encode(jnp.asarray(counts(trained)))
    np.testing.assert_allclose(trained.get_latent_representation(), q.mean, rtol=1e-4, atol=1e-5)
    mean, var = trained.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(var, jnp.exp(q.logvar), rtol=1e-4)
    z = trained.get_latent_representation(give_mean=False, seed=3)
    np.testing.assert_allclose(((z - mean) / np.sqrt(var)).std(), 1, atol=0.08)  # 1,200 draws
    averaged = trained.get_latent_representation(give_mean=False, mc_samples=100, seed=3)
    np.testing.assert_allclose(((averaged - mean) / np.sqrt(var)).std(), 0.1, atol=0.01)


def test_chunks_and_subsets_give_the_same_as_all_at_once(trained):
    z = trained.get_latent_representation()
    np.testing.assert_allclose(trained.get_latent_representation(batch_size=64), z, rtol=1e-4, atol=1e-5)
    rows = [5, 299, 5, 17]
    np.testing.assert_allclose(trained.get_latent_representation(indices=rows), z[rows], rtol=1e-4, atol=1e-5)
    mask = np.arange(300) % 7 == 0
    np.testing.assert_allclose(trained.get_latent_representation(indices=mask), z[mask], rtol=1e-4, atol=1e-5)
    other = trained.adata[::3, ::-1].copy()  # genes are found by name
    np.testing.assert_allclose(trained.get_latent_representation(other), z[::3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indices", [[], [300], [0.5], np.zeros(300, bool), np.ones(9, bool)])
def test_bad_indices_are_refused(trained, indices):
    with pytest.raises(DataError, match="indices"):
        trained.get_latent_representation(indices=indices)


def test_programs_are_compiled_once(trained):
    trained.get_elbo(indices=np.arange(200))
    before = posterior.evaluate._cache_size()
    trained.get_elbo(indices=np.arange(50, 300), seed=4)
    trained.get_elbo(indices=np.arange(150), seed=5)
    assert posterior.evaluate._cache_size() == before


def test_elbo_reconstruction_and_marginal_are_in_order(trained):
    per_cell = trained.get_elbo(return_mean=False)
    assert per_cell.shape == (300,)
    np.testing.assert_allclose(trained.get_elbo(), per_cell.mean(), rtol=1e-5)
    assert trained.get_elbo() == trained.get_elbo(seed=0) != trained.get_elbo(seed=1)
    few = trained.get_marginal_ll(n_mc_samples=2, seed=1)
    many = trained.get_marginal_ll(n_mc_samples=200, n_mc_samples_per_pass=20)
    assert trained.get_elbo() < few < many < -trained.get_reconstruction_error() + 1


@pytest.mark.parametrize("observed", [True, False])
def test_marginal_likelihood_is_the_integral(observed):
    """One latent dimension (and the library): log p(x) on a grid."""
    adata = cells()[:20].copy()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_hidden=8, n_latent=1, gene_likelihood="nb", use_observed_lib_size=observed)
    model.is_trained = True
    for name, leaf in flat_state(model.module).items():  # encoders wide enough for their posterior
        if name == "vae/encoder/logvar/bias":
            leaf.set_value(leaf[...] + 1.0)
        if name == "vae/library_encoder/mean/bias":
            leaf.set_value(leaf[...] + np.log(counts(model).sum(1)).mean())
    found = model.get_marginal_ll(n_mc_samples=4000, n_mc_samples_per_pass=50, return_mean=False)
    grid = np.linspace(-8, 8, 161).astype(np.float32)
    batch = model.cells().take(np.arange(20))
    module, wanted = model.module, []
    for cell in range(20):
        one = {key: jnp.asarray(value[cell : cell + 1]) for key, value in batch.items()}
        p = posterior.posterior(module, one)
        if observed:
            z, size, log_prior = grid, np.full(161, np.log(one["counts"].sum())), norm.logpdf(grid)
            step = grid[1] - grid[0]
        else:
            m, sd = float(one["local_l_mean"][0]), float(one["local_l_var"][0]) ** 0.5
            z, size = (g.ravel() for g in np.meshgrid(grid, m + sd * grid))
            log_prior = norm.logpdf(z) + norm.logpdf(size, m, sd)
            step = (grid[1] - grid[0]) ** 2 * sd
        injected = jnp.broadcast_to(p.known.injected, (len(z), 2))
        decoded = module.vae.decode(jnp.asarray(z)[:, None], jnp.asarray(size, jnp.float32), injected)
        log_p = module.log_prob(jnp.broadcast_to(one["counts"], (len(z), 40)), decoded)
        wanted.append(logsumexp(np.asarray(log_p, np.float64) + log_prior) + np.log(step))
    # the estimate is a lower bound on average; with 4,000 draws close
    np.testing.assert_allclose(found, wanted, atol=0.35)
    assert np.abs(found - wanted).mean() < 0.1


def test_normalized_expression(trained):
    table = trained.get_normalized_expression(n_samples=4)
    assert list(table.index) == list(trained.adata.obs_names)
    assert list(table.columns) == list(trained.adata.var_names)
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-5)
    scaled = trained.get_normalized_expression(n_samples=4, library_size=1e4, return_numpy=True)
    np.testing.assert_allclose(scaled, 1e4 * table.to_numpy(), rtol=1e-4)
    drawn = trained.get_normalized_expression(n_samples=4, return_mean=False)
    assert drawn.shape == (4, 300, 40)
    own = trained.get_normalized_expression(n_samples=2, library_size="latent")
    np.testing.assert_allclose(own.sum(axis=1), counts(trained).sum(1), rtol=1e-4)
    genes = trained.get_normalized_expression(n_samples=4, gene_list=["gene7", "gene3"])
    assert list(genes.columns) == ["gene3", "gene7"]
    np.testing.assert_allclose(genes, table[["gene3", "gene7"]], rtol=1e-5)
    overall = trained.get_normalized_expression(n_samples_overall=37, return_numpy=True)
    assert overall.shape == (37, 40)


def test_transform_batch_decodes_all_cells_as_that_batch(trained):
    one, two, both, own = (
        trained.get_normalized_expression(transform_batch=batch, return_numpy=True)
        for batch in ("donor 0", 1, ["donor 0", "donor 1"], None)
    )
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-4)
    first = (trained.adata.obs["batch"] == "donor 0").to_numpy()
    np.testing.assert_allclose(own, np.where(first[:, None], one, two), rtol=1e-4)
    assert np.abs(one - two).max() > 1e-3
    with pytest.raises(DataError, match="'donor 5' is no batch"):
        trained.get_normalized_expression(transform_batch="donor 5")


def test_arguments_out_of_range_are_refused(trained):
    with pytest.raises(DataError, match="'nope' not among"):
        trained.get_normalized_expression(gene_list=["nope"])
    with pytest.raises(ConfigError, match="'latent'"):
        trained.get_normalized_expression(library_size="observed")
    with pytest.raises(ConfigError, match="one transform_batch"):
        trained.posterior_predictive_sample(transform_batch=[0, 1])
    with pytest.raises(ConfigError, match="correlation_type"):
        trained.get_feature_correlation_matrix(correlation_type="kendall")


def test_posterior_predictive_counts_have_the_decoded_mean_and_variance(trained):
    drawn = trained.posterior_predictive_sample(n_samples=60, indices=np.arange(50))
    assert drawn.shape == (50, 40, 60)
    x = drawn.todense()
    parameters = trained.get_likelihood_parameters(n_samples=60, indices=np.arange(50))
    mean, theta = parameters["mean"].mean(0), parameters["dispersions"][0]
    assert set(parameters) == {"mean", "dispersions"}
    np.testing.assert_allclose(x.mean() / mean.mean(), 1, atol=0.02)
    variance = parameters["mean"].var(0) + (parameters["mean"] + parameters["mean"] ** 2 / theta).mean(0)
    np.testing.assert_allclose(x.var(2).mean() / variance.mean(), 1, atol=0.15)
    one = trained.posterior_predictive_sample(gene_list=["gene1"])
    assert one.shape == (300, 1)
    assert (one.data > 0).all()


def test_zinb_gives_the_share_of_extra_zeros():
    adata = cells()
    SCVI.setup_anndata(adata)
    model = SCVI(adata, n_hidden=8, gene_likelihood="zinb")
    with pytest.warns(DataWarning, match="not trained"):
        parameters = model.get_likelihood_parameters(n_samples=3, give_mean=True)
    assert {name: value.shape for name, value in parameters.items()} == dict.fromkeys(
        ("mean", "dispersions", "dropout"), (300, 40)
    )
    assert ((parameters["dropout"] > 0) & (parameters["dropout"] < 1)).all()
    model.is_trained = True
    x = model.posterior_predictive_sample()
    expected = (parameters["mean"] * (1 - parameters["dropout"])).sum()
    np.testing.assert_allclose(x.sum() / expected, 1, atol=0.05)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_feature_correlations(trained, kind):
    table = trained.get_feature_correlation_matrix(n_samples=3, correlation_type=kind, transform_batch=["donor 0", 1])
    np.testing.assert_allclose(np.diag(table), 1, rtol=1e-6)
    np.testing.assert_allclose(table, table.T, atol=1e-9)
    x = np.log1p(counts(trained) / counts(trained).sum(1, keepdims=True) * 1e3)
    observed = np.corrcoef(x, rowvar=False)
    upper = np.triu_indices(40, 1)
    assert np.corrcoef(table.to_numpy()[upper], observed[upper])[0, 1] > 0.6


def test_library_size(trained):
    np.testing.assert_allclose(trained.get_latent_library_size()[:, 0], counts(trained).sum(1), rtol=1e-5)


def test_latent_library_follows_the_counts():
    adata = cells()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata, n_hidden=16, use_observed_lib_size=False, gene_likelihood="nb")
    log_size = np.log(counts(model).sum(1))
    for code, name in enumerate(["donor 0", "donor 1"]):
        own = log_size[(adata.obs["batch"] == name).to_numpy()]
        np.testing.assert_allclose([p[code] for p in model.library_prior], [own.mean(), own.var()], rtol=1e-4)
    model.train(max_epochs=40, batch_size=32, plan_kwargs={"lr": 5e-3}, progress=False)
    mean, drawn = model.get_latent_library_size(), model.get_latent_library_size(give_mean=False)
    assert np.corrcoef(np.log(mean[:, 0]), log_size)[0, 1] > 0.6
    assert not np.allclose(mean, drawn)
    assert model.get_elbo() < model.get_marginal_ll(n_mc_samples=50)


def test_every_covariate_reaches_the_decoder():
    adata = cells()
    SCVI.setup_anndata(
        adata, batch_key="batch", categorical_covariate_keys=["site"], continuous_covariate_keys=["age"],
        size_factor_key="depth",
    )
    model = SCVI(adata, n_hidden=8, n_latent=2, encode_covariates=True)
    model.train(max_epochs=1, progress=False)
    base = model.get_normalized_expression(return_numpy=True)
    for key, value in {"batch": "donor 0", "site": "north", "age": 0.3}.items():
        other = adata.copy()
        other.obs[key] = value
        assert np.abs(model.get_normalized_expression(other, return_numpy=True) - base).max() > 1e-6, key
    rate = model.get_likelihood_parameters()["mean"]
    double = adata.copy()
    double.obs["depth"] *= 2
    np.testing.assert_allclose(model.get_likelihood_parameters(double)["mean"], 2 * rate, rtol=1e-3)


def test_a_batch_is_the_same_sparse_or_dense(trained):
    batch = trained.cells().take(np.arange(32))
    sparse = trained.cells().take_sparse(np.arange(32))
    structure, leaves = posterior.Structure.split(trained.module)
    assert posterior.Structure.split(trained.module)[0] is structure
    dense, other = (
        posterior.evaluate(structure, leaves, b, jax.random.key(0), {}, function=posterior.elbo, options=())["elbo"]
        for b in (batch, sparse)
    )
    np.testing.assert_allclose(dense, other, rtol=1e-4)
