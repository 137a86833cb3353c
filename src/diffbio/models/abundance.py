"""Where in the latent space the cells of a sample lie: densities of the aggregated posterior (as in MrVI)."""

import dataclasses

import numpy as np
from scipy.special import gammaln, logsumexp

CELLS_AT_ONCE = 4_000_000  # pairs of cells, at most


@dataclasses.dataclass(frozen=True)
class AggregatedPosterior:
    """The equal mixture of q(z | x) over cells.

    mean, sd: (cells, latent). dof: degrees of freedom of Student's t in place of each Gaussian, None: Gaussian.
    """

    mean: np.ndarray
    sd: np.ndarray
    dof: float | None = None

    def log_prob(self, z: np.ndarray) -> np.ndarray:
        """Log density at the positions z (n, latent), (n,), in nats."""
        z = np.asarray(z, np.float64)
        n = max(1, CELLS_AT_ONCE // len(self.mean))
        return np.concatenate([self._log_prob(z[start : start + n]) for start in range(0, len(z), n)])

    def sample(self, n: int, *, seed: int = 0) -> np.ndarray:
        """Draws, (n, latent)."""
        rng = np.random.default_rng(seed)
        cells = rng.integers(len(self.mean), size=n)
        shape = (n, self.mean.shape[1])
        noise = rng.standard_normal(shape) if self.dof is None else rng.standard_t(self.dof, shape)
        return self.mean[cells] + self.sd[cells] * noise

    def _log_prob(self, z: np.ndarray) -> np.ndarray:
        total = np.zeros((len(z), len(self.mean)))
        for d in range(z.shape[1]):
            t2 = ((z[:, [d]] - self.mean[:, d]) / self.sd[:, d]) ** 2
            total += -0.5 * t2 if self.dof is None else -0.5 * (self.dof + 1) * np.log1p(t2 / self.dof)
            total -= np.log(self.sd[:, d])
        if self.dof is None:
            constant = -0.5 * np.log(2 * np.pi)
        else:
            constant = gammaln((self.dof + 1) / 2) - gammaln(self.dof / 2) - 0.5 * np.log(self.dof * np.pi)
        found: np.ndarray = logsumexp(total, axis=1) + z.shape[1] * constant - np.log(len(self.mean))
        return found
