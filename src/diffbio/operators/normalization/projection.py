"""Linear maps to a few dimensions that start at the principal components and can be trained."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ...errors import ConfigError, DataError
from ...math.linalg import pca
from ..base import Config, Data, Operator, checked_finite, positive, setting

FIT: Mapping[str, Any] = {"batch_size": 512, "learning_rate": 1e-3, "max_epochs": 50}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionConfig(Config):
    """Settings of `LearnableProjection` and `LearnableOrthogonalProjection`.

    n_features: width of `features`.
    n_components: of the projection; at most n_features.
    """

    n_features: int = positive(2000)
    n_components: int = positive(50)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_components > self.n_features:
            msg = f"ProjectionConfig.n_components must be at most n_features ({self.n_features}), "
            msg += f"got {self.n_components}."
            raise ConfigError(msg)


class Projected(TypedDict):
    """projection: coordinates of the cells."""

    projection: Float[Array, "cells components"]


class _FromPrincipalComponents(Operator):
    """A projection that starts at the principal components and is trained to keep what they keep."""

    config: ProjectionConfig
    init_cells: ClassVar[int | None] = 50_000
    fit_defaults: ClassVar[Mapping[str, Any]] = FIT

    if TYPE_CHECKING:
        _start: Callable[..., None]  # from components (components, features) on
        _loadings: Callable[..., Array]  # (components, features) of now

    def __init__(self, config: ProjectionConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        random = jax.random.normal(rngs.params(), (config.n_features, config.n_components))
        self.mean = nnx.BatchStat(jnp.zeros(config.n_features))
        self.fitted = False
        self._start(jnp.linalg.qr(random)[0].T)

    def init_from(self, data: Data) -> None:
        """Puts the projection at the principal components of `data["features"]`; its outputs are their scores.

        Raises:
            DataError: fewer cells than components, or values that are not finite.
        """
        features = np.asarray(self._inputs(data)["features"])
        if len(features) < self.config.n_components:
            msg = (
                f"{type(self).__name__}: n_components is {self.config.n_components}, but data['features'] has only "
                f"{len(features)} cells; pass n_components={len(features)} or fewer."
            )
            raise DataError(msg)
        checked_finite(type(self).__name__, features, key="features")
        found = pca(features, self.config.n_components)
        self.mean[...] = jnp.asarray(found.mean)
        self._start(jnp.asarray(found.components))

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Mean squared error of the features rebuilt from the projection by the same loadings, over their variance.

        With orthonormal loadings this is the share of variance that is lost; its minima are rotations of the
        principal components (Baldi & Hornik 1989).
        """
        features = self._inputs(data)["features"]
        centred = features - self.mean[...].astype(features.dtype)
        rebuilt = self(features)["projection"] @ self._loadings().astype(features.dtype)
        scale = (centred**2).mean()
        error = ((centred - rebuilt) ** 2).mean() / jnp.where(scale > 0, scale, 1.0)
        return error, {"variance_kept": 1 - error}

    def _project(self, features: Array) -> Array:
        checked_finite(type(self).__name__, features, key="features")
        loadings = self._loadings().astype(features.dtype)
        return features @ loadings.T - self.mean[...].astype(features.dtype) @ loadings.T

    @classmethod
    def examples(cls) -> dict[str, tuple[Any, Data]]:
        """Three components of five features, from a random start."""
        op = cls(ProjectionConfig(n_features=5, n_components=3), rngs=nnx.Rngs(0))
        return {"projection": (op, {"features": jax.random.normal(jax.random.key(1), (12, 5))})}


class LearnableProjection(_FromPrincipalComponents):
    """(x - mean) (anchor + delta)ᵀ + bias: the anchor is frozen at the PCA loadings, delta and bias start at 0.

    `init_from` sets the anchor; the outputs are then the PCA scores up to rounding. Training moves delta and bias
    alone, so that a penalty on them measures the distance from PCA.
    """

    def __init__(
        self, config: ProjectionConfig, *, rngs: nnx.Rngs, init_loadings: np.ndarray | Array | None = None
    ) -> None:
        """init_loadings: anchor (components, features) to start at, such as those of a PCA made before; the mean is 0.

        None is a random orthonormal one. `init_from`, and so `diffbio.fit`, replaces both.

        Raises:
            ConfigError: init_loadings has another shape.
        """
        super().__init__(config, rngs=rngs)
        if init_loadings is not None:
            expected = (config.n_components, config.n_features)
            if np.shape(init_loadings) != expected:
                msg = f"LearnableProjection: init_loadings must have the shape {expected} (components, features), "
                msg += f"got {np.shape(init_loadings)}."
                raise ConfigError(msg)
            self._start(jnp.asarray(init_loadings, jnp.float32))

    def __call__(self, features: Float[Array, "cells features"]) -> Projected:
        """Coordinates of the cells."""
        return {"projection": self._project(features) + self.bias[...].astype(features.dtype)}

    def _start(self, components: Float[Array, "components features"]) -> None:
        self.anchor = nnx.BatchStat(components)
        self.delta = nnx.Param(jnp.zeros_like(components))
        self.bias = nnx.Param(jnp.zeros(components.shape[0]))

    def _loadings(self) -> Float[Array, "components features"]:
        return self.anchor[...] + self.delta[...]


class LearnableOrthogonalProjection(_FromPrincipalComponents):
    """(x - mean) Q with Q the orthonormal factor of a weight matrix: training turns, and never stretches.

    The QR decomposition, with a positive diagonal of R, is a retraction onto the Stiefel manifold (Absil, Mahony &
    Sepulchre 2008, ex. 4.1.3): any optimizer of flat weights serves. `init_from` starts at the PCA loadings.
    """

    def __call__(self, features: Float[Array, "cells features"]) -> Projected:
        """Coordinates of the cells."""
        return {"projection": self._project(features)}

    def _start(self, components: Float[Array, "components features"]) -> None:
        self.weight = nnx.Param(components.T)

    def _loadings(self) -> Float[Array, "components features"]:
        q, r = jnp.linalg.qr(self.weight[...])
        return (q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftComponentConfig(Config):
    """Settings of `SoftComponentSelection`.

    coverage: share of the variance that the kept components cover at the start, in (0, 1).
    temperature: width of the border, in shares of the variance; 0+ is a hard cut.
    """

    coverage: float = setting(0.9, "in (0, 1)", lambda v: 0 < v < 1)
    temperature: float = positive(0.05)


class SelectedComponents(TypedDict):
    """What `SoftComponentSelection` adds."""

    gated: Float[Array, "cells components"]  # coordinates times gates
    component_gates: Float[Array, " components"]  # in [0, 1]


class SoftComponentSelection(Operator):
    """Keeps the leading components that together cover a learnable share of the variance.

    Component i has gate sigmoid((coverage - c_i) / temperature), with c_i the share of variance of the components
    before it: as the temperature goes to 0, the fewest components that reach the coverage. At the start the
    coordinates are not those that came in: a component with the coverage before it is halved, those after it nearly
    vanish, and even at a coverage near 1 the last ones, within a few temperatures of it, are gated. `objective` is the
    share of variance lost plus gates / components: a component is worth its place while it holds more than the
    average (Kaiser's rule).
    """

    config: SoftComponentConfig
    fit_defaults: ClassVar[Mapping[str, Any]] = {**FIT, "learning_rate": 0.02}

    def __init__(self, config: SoftComponentConfig, *, rngs: nnx.Rngs) -> None:
        del rngs  # nothing random
        self.config = config
        self.coverage_logit = nnx.Param(jax.scipy.special.logit(jnp.asarray(config.coverage)))
        self.fitted = False

    def __call__(self, projection: Float[Array, "cells components"]) -> SelectedComponents:
        """Gates from the variances of these cells' coordinates; components in any order of variance."""
        projection = checked_finite("SoftComponentSelection", projection, key="projection")
        gates, _ = self._gates(projection)
        return {"gated": projection * gates, "component_gates": gates}

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Variance lost plus places taken, see the class."""
        gates, share = self._gates(self._inputs(data)["projection"])
        lost = ((1 - gates) * share).sum()
        return lost + gates.mean(), {"variance_lost": lost, "components": gates.sum()}

    def _gates(self, projection: Float[Array, "cells components"]) -> tuple[Array, Array]:
        variance = projection.var(axis=0)
        total = variance.sum()
        share = variance / jnp.where(total > 0, total, 1.0)
        before = jnp.cumsum(share) - share
        coverage = jax.nn.sigmoid(self.coverage_logit[...].astype(projection.dtype))
        return jax.nn.sigmoid((coverage - before) / self.config.temperature), share

    @classmethod
    def examples(cls) -> dict[str, tuple["SoftComponentSelection", Data]]:
        """Four components of falling variance."""
        scores = jax.random.normal(jax.random.key(0), (12, 4)) * jnp.array([3.0, 2.0, 1.0, 0.5])
        op = cls(SoftComponentConfig(temperature=0.2), rngs=nnx.Rngs(0))
        return {"components": (op, {"projection": scores})}
