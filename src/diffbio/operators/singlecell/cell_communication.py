"""Which ligands of its neighbours explain what a cell expresses: a graph network on edges between cells."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...errors import ConfigError, DataError
from ...math.communication import complex_levels, received
from ...nn.graph_attention import GraphAttention
from ..all_cells import AllCells
from ..base import Config, Data, Operator, fraction, nonnegative, positive
from .pair_checks import check_normalized, check_pairs, with_subunits

WHO = "DifferentiableCellCommunication"
FACTORED = 0.1  # weight of what the pathways leave of the responses
SMALL = 1e-6  # squared responses, below any that is told from none


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellCommunicationConfig(Config):
    """Settings of `DifferentiableCellCommunication`.

    n_genes: columns of `counts`, those of the pairs among them.
    n_lr_pairs: ligand-receptor pairs.
    hidden_dim: width of the niche embedding, and rank of what predicts a cell's genes from its own others.
    num_heads: of attention to the neighbours; they share hidden_dim.
    num_gnn_layers: 1 looks at the neighbours; 2 also at theirs, the cell itself among them.
    n_pathways: sets of pairs with a like response.
    dropout_rate: of the niche embedding, in training.
    sparsity: weight of |W|, the responses to the pairs, in the objective, in standard errors of a response that is
        none (1 / sqrt cells): more leaves fewer responses.
    ridge: weight of the squared weights of what predicts a gene from others and from the niche.
    temperature: of the soft minimum over the subunits of a complex, in units of counts; 0 is the minimum.
    """

    n_genes: int = positive(2000)
    n_lr_pairs: int = positive(100)
    hidden_dim: int = positive(64)
    num_heads: int = positive(4)
    num_gnn_layers: int = positive(1)
    n_pathways: int = positive(10)
    dropout_rate: float = fraction(0.1)
    sparsity: float = nonnegative(2.0)
    ridge: float = nonnegative(0.1)
    temperature: float = nonnegative(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % self.num_heads:
            msg = f"CellCommunicationConfig.hidden_dim must be a multiple of num_heads; {self.hidden_dim} is none of "
            msg += f"{self.num_heads}."
            raise ConfigError(msg)


class Communication(TypedDict):
    """What `DifferentiableCellCommunication` adds."""

    communication_scores: Float[Array, "edges lr_pairs"]  # strength x attention x ligand of sender x receptor
    pair_strengths: Float[Array, " lr_pairs"]  # variance that a pair explains: 1 is that of a gene
    pair_responses: Float[Array, "lr_pairs genes"]  # change of a gene, in its deviations, per deviation of the signal
    edge_attention: Float[Array, "edges heads"]  # of the receiver to its senders; sums to 1
    signaling_activity: Float[Array, "cells pathways"]  # received signals, summed over the pairs of a pathway
    pathway_weights: Float[Array, "lr_pairs pathways"]  # how much a pair belongs to a pathway
    niche_embeddings: Float[Array, "cells hidden"]
    predicted_expression: Float[Array, "cells genes"]  # on the scale of counts


class Signals(NamedTuple):
    """What the network finds, before it is put in words."""

    values: Float[Array, "cells genes"]  # scaled
    ligand: Float[Array, "cells lr_pairs"]
    receptor: Float[Array, "cells lr_pairs"]
    attention: Float[Array, "edges heads"]
    niche: Float[Array, "cells hidden"]
    signal: Float[Array, "cells lr_pairs"]
    predicted: Float[Array, "cells genes"]  # scaled


class DifferentiableCellCommunication(Operator):
    """Predicts every cell's expression from its own other genes, its niche, and ligands that its receptors receive.

    With z the counts, each gene scaled to mean 0 and variance 1,

        z_i ~ own(z_i) + D h_i + sum over pairs p of s_ip W_p,    s_ip = r_ip sum over neighbours j of a_ij l_jp,

    l and r the levels of ligand and receptor (the lowest subunit of a complex), a_ij the mean attention of the first
    layer of a GATv2 network on the edges, h_i its embedding of the neighbours, and own a linear map of rank hidden_dim
    that predicts no gene from itself. The first two terms hold what a cell shares with its type and its surroundings
    with or without a receptor, so that W_p is what the ligand does where the receptor is: an interaction. W_p does not
    predict the pair's own receptor, which is part of the signal. `pair_strengths` are the squared norms of W_p;
    `communication_scores` sum over the edges of a receiver to strength x s_ip. NCEM
    (Fischer et al. 2022) and MISTy (Tanevski et al. 2022) are of this kind; here pairs gated by receptors are the unit.

    `diffbio.fit(op, data)` minimises the squared error over all cells at once, with the sum of |W| (lasso, smooth near
    0). `init_from` reads scales and errors from the data. Pathways factor the responses,
    W ~ A V with A >= 0 and unit rows of V.

    Which cells are neighbours is given (`spatial_graph`), the weights are differentiable. Cost is that of edges x
    pairs, also in memory of the output; the objective takes blocks of pairs.
    """

    config: CellCommunicationConfig
    graph_of_cells = True
    cell_numbers: ClassVar[frozenset[str]] = frozenset({"spatial_graph"})
    fit_defaults: ClassVar[Mapping[str, Any]] = {
        "max_epochs": 300, "batch_size": 4096, "learning_rate": 1e-2, "validation": 0.0, "patience": None,
    }  # fmt: skip

    def __init__(self, config: CellCommunicationConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        genes, pairs, hidden = config.n_genes, config.n_lr_pairs, config.hidden_dim
        small, wide = nnx.initializers.normal(0.01), nnx.initializers.lecun_normal()
        self.own_in = nnx.Param(wide(rngs.params(), (genes, hidden)))
        self.own_out = nnx.Param(small(rngs.params(), (hidden, genes)))
        self.encoder = nnx.Linear(genes, hidden, rngs=rngs)
        width = hidden // config.num_heads
        self.layers = nnx.List(
            [GraphAttention(hidden, width, config.num_heads, rngs=rngs) for _ in range(config.num_gnn_layers)]
        )
        self.dropout = nnx.Dropout(config.dropout_rate, deterministic=True, rngs=rngs)
        self.decoder = nnx.Linear(hidden, genes, rngs=rngs)
        self.responses = nnx.Param(small(rngs.params(), (pairs, genes)))
        self.memberships = nnx.Param(small(rngs.params(), (pairs, config.n_pathways)) - 4.0)
        self.programs = nnx.Param(wide(rngs.params(), (config.n_pathways, genes)))
        self.center, self.scale = nnx.BatchStat(jnp.zeros(genes)), nnx.BatchStat(jnp.ones(genes))
        self.signal_scale = nnx.BatchStat(jnp.ones(pairs))
        self.fitted = False

    def __call__(
        self,
        counts: Float[Array, "cells genes"],
        lr_pairs: Int[Array, "lr_pairs 2 subunits"],
        spatial_graph: Int[Array, "2 edges"],
    ) -> Communication:
        """counts: log-normalised.

        lr_pairs: columns of ligand and receptor, of complexes all subunits, filled up with -1; `apply` takes (pairs, 2)
            too.
        spatial_graph: row numbers of the sender (first row) and the receiver of every edge; no cell is its own sender.

        Raises:
            DataError: where values are known (not under jit): values that are not log-normalised, a pair of a column
                that is not there, an edge of a cell that is not there or to itself.
        """
        found = self.signals(counts, lr_pairs, spatial_graph)
        senders, receivers = spatial_graph
        strengths = self.strengths(lr_pairs).astype(counts.dtype)
        weights = jax.nn.softplus(self.memberships[...]).astype(counts.dtype)
        edge = found.attention.mean(axis=1)
        scale = strengths / self._stat(self.signal_scale, counts)
        scores = edge[:, None] * found.ligand[senders] * (found.receptor * scale)[receivers]
        return {
            "communication_scores": scores,
            "pair_strengths": strengths,
            "pair_responses": self._responses(lr_pairs, counts),
            "edge_attention": found.attention,
            "signaling_activity": found.signal @ weights,
            "pathway_weights": weights,
            "niche_embeddings": found.niche,
            "predicted_expression": found.predicted * self._stat(self.scale, counts) + self._stat(self.center, counts),
        }

    def objective(self, data: Data) -> tuple[Array, dict[str, Array]]:
        """Half the squared error of scaled expression, sum of |W|, squared weights, and what pathways leave of W.

        The mean over cells and genes, of the weights the sum divided by the genes. The metrics hold the share of
        variance that is explained.
        """
        inputs = self._inputs(data)
        found = self.signals(**inputs)
        error = (found.values - found.predicted) ** 2
        loss = error.mean() / 2
        responses = self._responses(inputs["lr_pairs"], found.values)
        genes = self.config.n_genes
        sizes = jnp.sqrt(responses**2 + SMALL).sum()
        sparse = self.config.sparsity / math.sqrt(len(error)) * sizes
        into, out = self.own_in[...], self.own_out[...]
        own = ((into.T @ into) * (out @ out.T)).sum()  # the squared norm of their product
        niche = (self.decoder.kernel[...] ** 2).sum() + (self.encoder.kernel[...] ** 2).sum()
        ridge = self.config.ridge * (own + niche)
        weights = jax.nn.softplus(self.memberships[...])
        left = ((responses - weights @ self._programs()) ** 2).sum()
        total = loss + (sparse + ridge + FACTORED * left) / genes
        explained = 1.0 - error.mean() / (found.values**2).mean()
        return total, {"explained": explained, "strength": (responses**2).sum(axis=1).mean()}

    def signals(
        self,
        counts: Float[Array, "cells genes"],
        lr_pairs: Int[Array, "lr_pairs 2 subunits"],
        spatial_graph: Int[Array, "2 edges"],
    ) -> Signals:
        """All terms of the prediction; arguments as of a call."""
        check_normalized(WHO, counts)
        check_pairs(WHO, lr_pairs, counts.shape[1])
        self._check_graph(spatial_graph, len(counts))
        senders, receivers = spatial_graph
        z = (counts - self._stat(self.center, counts)) / self._stat(self.scale, counts)
        ligand, receptor = self._levels(counts, lr_pairs)
        hidden, first = jax.nn.relu(self.encoder(z)), None
        for layer in self.layers:
            heads, attention = layer(senders, receivers, hidden)
            hidden = jax.nn.gelu(heads.reshape(len(counts), -1))
            first = attention if first is None else first
        assert first is not None
        niche = hidden
        signal = receptor * received(first.mean(axis=1), senders, receivers, ligand)
        into, out = self.own_in[...], self.own_out[...]
        own = (z @ into) @ out - z * (into * out.T).sum(axis=1)  # no gene predicts itself
        caused = (signal / self._stat(self.signal_scale, counts)) @ self._responses(lr_pairs, counts)
        predicted = own + self.decoder(self.dropout(niche)) + caused
        return Signals(z, ligand, receptor, first, niche, signal, predicted)

    def summary(
        self,
        counts: Float[Array, "cells genes"],
        lr_pairs: Int[Array, "lr_pairs 2 subunits"],
        spatial_graph: Int[Array, "2 edges"],
    ) -> dict[str, Array]:
        """As a call, but the scores in factors: nothing of edges x pairs.

        A score is the mean over heads of edge_attention x ligand of the sender x receptor of the receiver, which holds
        the strength. Further `programs` (pathways, genes), unit rows.
        """
        found = self.signals(counts, lr_pairs, spatial_graph)
        strengths = self.strengths(lr_pairs).astype(counts.dtype)
        weights = jax.nn.softplus(self.memberships[...]).astype(counts.dtype)
        return {
            "ligand": found.ligand,
            "receptor": found.receptor * (strengths / self._stat(self.signal_scale, counts)),
            "pair_strengths": strengths,
            "pair_responses": self._responses(lr_pairs, counts),
            "edge_attention": found.attention,
            "signaling_activity": found.signal @ weights,
            "pathway_weights": weights,
            "niche_embeddings": found.niche,
            "programs": self._programs(),
        }

    def strengths(self, pairs: Int[Array, "lr_pairs 2 subunits"]) -> Float[Array, " lr_pairs"]:
        """Sum over genes of the squared response to a deviation of the signal: the variance that it explains."""
        return (self._responses(pairs, self.responses[...]) ** 2).sum(axis=1)

    def init_from(self, data: Data) -> None:
        """Reads means and deviations of genes, and of signals at equal attention.

        Raises:
            DataError: as a call.
        """
        inputs = self._inputs(data)
        counts, pairs, graph = inputs["counts"], inputs["lr_pairs"], inputs["spatial_graph"]
        self._check_graph(graph, len(counts))
        check_pairs(WHO, pairs, counts.shape[1])
        deviation = counts.std(axis=0)
        self.center[...] = counts.mean(axis=0)
        self.scale[...] = jnp.where(deviation > 0, deviation, 1.0)
        senders, receivers = graph
        ligand, receptor = self._levels(counts, pairs)
        number = jax.ops.segment_sum(jnp.ones(len(senders)), receivers, len(counts))
        around = received(1.0 / jnp.maximum(number, 1.0)[receivers], senders, receivers, ligand)
        signal = receptor * around
        spread = signal.std(axis=0)
        self.signal_scale[...] = jnp.where(spread > 0, spread, 1.0)

    def sampler(self, data: Data) -> AllCells:
        """Every minibatch is all cells: they are each other's neighbours."""
        return AllCells(len(data["counts"]))

    def _levels(self, counts: Array, pairs: Array) -> tuple[Array, Array]:
        soft = self.config.temperature
        return complex_levels(counts, pairs[:, 0], soft), complex_levels(counts, pairs[:, 1], soft)

    def _responses(self, pairs: Array, like: Array) -> Array:
        """W without the pairs' own receptors."""
        n_pairs, n_genes = self.responses.shape
        rows = jnp.arange(n_pairs)[:, None]
        receptors = jnp.where(pairs[:, 1] >= 0, pairs[:, 1], n_genes)  # out of range: dropped
        open_to = jnp.ones((n_pairs, n_genes), like.dtype).at[rows, receptors].set(0.0, mode="drop")
        return self.responses[...].astype(like.dtype) * open_to

    def _programs(self) -> Array:
        programs = self.programs[...]
        return programs / jnp.sqrt((programs**2).sum(axis=1, keepdims=True) + SMALL)

    def _stat(self, stat: nnx.BatchStat[Array], like: Array) -> Array:
        return jnp.asarray(stat[...], like.dtype)

    def _read(self, key: str, data: Data) -> Array:
        return super()._read(key, with_subunits(WHO, data) if key == "lr_pairs" else data)

    def _check_graph(self, graph: Array, n_cells: int) -> None:
        if isinstance(graph, jax.core.Tracer):
            return
        with jax.ensure_compile_time_eval():
            ends = np.asarray(graph)
        if ends.size and not 0 <= ends.min() <= ends.max() < n_cells:
            odd = int(ends.min()) if ends.min() < 0 else int(ends.max())
            msg = f"{WHO}: data['spatial_graph'] holds {odd}, but the rows of {n_cells} cells are 0 to {n_cells - 1}."
            raise DataError(msg)
        if (ends[0] == ends[1]).any():
            cell = int(ends[0][ends[0] == ends[1]][0])
            msg = f"{WHO}: data['spatial_graph'] has an edge from cell {cell} to itself; leave such edges out: a cell "
            msg += "would be explained by its own expression."
            raise DataError(msg)

    @classmethod
    def examples(cls) -> dict[str, tuple["DifferentiableCellCommunication", Data]]:
        """Single genes and complexes on a ring of cells, one layer and two."""
        keys = jax.random.split(jax.random.key(3), 2)
        n_cells, n_genes = 14, 6
        counts = jax.random.uniform(keys[0], (n_cells, n_genes), minval=0.1, maxval=2.0)
        here = jnp.arange(n_cells)
        graph = jnp.concatenate([jnp.stack([(here + step) % n_cells, here]) for step in (1, 3)], axis=1)
        pairs = jnp.array([[[0, -1], [1, -1]], [[2, 3], [4, 5]], [[0, -1], [4, -1]]])
        data = {"counts": counts, "lr_pairs": pairs, "spatial_graph": graph}

        def op(**settings: Any) -> DifferentiableCellCommunication:
            sizes: dict[str, Any] = {"n_genes": n_genes, "n_lr_pairs": 3, "hidden_dim": 4, "num_heads": 2}
            return cls(CellCommunicationConfig(**sizes, n_pathways=2, **settings), rngs=nnx.Rngs(0))

        return {"neighbours": (op(temperature=0.2), data), "two layers": (op(num_gnn_layers=2), data)}
