"""A neural ordinary differential equation of RNA: a learned rate of transcription, splicing and degradation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

RIDGE = 1e-2  # of the line through the first guess of the times, per feature of variance 1
FURTHEST = 0.98  # first guesses of times lie between this and 1 minus it


class State(NamedTuple):
    """Unspliced and spliced RNA."""

    unspliced: Float[Array, "*rows genes"]
    spliced: Float[Array, "*rows genes"]


class SplicingODE(nnx.Module):
    """du/dt = a(t) - b u, ds/dt = b u - g s with a(t) a small network, and another that gives every cell its time.

    In units of each gene's spread. Time runs from 0 to n_steps dt and is integrated by as many classical Runge-Kutta
    steps; between them states are interpolated.
    """

    def __init__(self, n_genes: int, *, hidden_dim: int, dt: float, n_steps: int, rngs: nnx.Rngs) -> None:
        self.dt, self.n_steps = dt, n_steps
        self.log_beta = nnx.Param(jnp.full(n_genes, jnp.log(2.0)))
        self.log_ratio = nnx.Param(jnp.zeros(n_genes))
        self.start_u = nnx.Param(jnp.full(n_genes, -2.0))
        self.start_s = nnx.Param(jnp.full(n_genes, -2.0))
        self.into_rate = nnx.Linear(1, hidden_dim, rngs=rngs)
        self.to_rate = nnx.Linear(hidden_dim, n_genes, rngs=rngs)
        self.straight = nnx.Linear(2 * n_genes, 1, rngs=rngs)
        self.into_time = nnx.Linear(2 * n_genes, hidden_dim, rngs=rngs)
        self.to_time = nnx.Linear(hidden_dim, 1, rngs=rngs)
        self.spread_u = nnx.BatchStat(jnp.ones(n_genes))
        self.spread_s = nnx.BatchStat(jnp.ones(n_genes))
        self.mean_u = nnx.BatchStat(jnp.zeros(n_genes))
        self.mean_s = nnx.BatchStat(jnp.zeros(n_genes))

    def features(self, now: State) -> Float[Array, "cells features"]:
        """Moments, centred and in units of their spread."""
        u = (now.unspliced - self.mean_u[...]) / self.spread_u[...]
        s = (now.spliced - self.mean_s[...]) / self.spread_s[...]
        return jnp.concatenate([u, s], axis=1)

    def time_of(self, now: State) -> Float[Array, " cells"]:
        """Of every cell, from 0 to 1."""
        x = self.features(now)
        bent = self.to_time(jnp.tanh(self.into_time(x)))
        return jax.nn.sigmoid((self.straight(x) + bent)[:, 0])

    def rates(self) -> tuple[Array, Array]:
        """Splicing rate beta, and gamma, of u and s in units of counts."""
        # ds/dt = beta u - gamma s has one beta for both, the spreads turn only alpha
        beta = jnp.exp(self.log_beta[...])
        return beta, beta * jnp.exp(self.log_ratio[...])

    def transcription(self, time: Float[Array, " times"]) -> Float[Array, "times genes"]:
        """Rate alpha at times from 0 to 1, in counts per unit of time."""
        hidden = jnp.tanh(self.into_rate(2.0 * time[:, None] - 1.0))
        return jax.nn.softplus(self.to_rate(hidden)) * self.spread_u[...]

    def derivative(self, now: State, time: Float[Array, " rows"]) -> State:
        """Of u and s by time; `time` from 0 to 1."""
        beta, gamma = self.rates()
        change = self.transcription(time) - beta * now.unspliced
        return State(change, beta * now.unspliced - gamma * now.spliced)

    def step(self, now: State, time: Float[Array, " rows"]) -> State:
        """The state after dt."""
        half, whole = 0.5 / self.n_steps, 1.0 / self.n_steps

        def moved(by: State, share: float) -> State:
            return State(*(a + share * self.dt * b for a, b in zip(now, by, strict=True)))

        k1 = self.derivative(now, time)
        k2 = self.derivative(moved(k1, 0.5), time + half)
        k3 = self.derivative(moved(k2, 0.5), time + half)
        k4 = self.derivative(moved(k3, 1.0), time + whole)
        return State(
            *(x + self.dt / 6 * (a + 2 * b + 2 * c + d) for x, a, b, c, d in zip(now, k1, k2, k3, k4, strict=True))
        )

    def trajectory(self) -> State:
        """States at the n_steps + 1 times of the grid, (times, genes)."""
        first = State(
            (jax.nn.softplus(self.start_u[...]) * self.spread_u[...])[None],
            (jax.nn.softplus(self.start_s[...]) * self.spread_s[...])[None],
        )

        def on(now: State, time: Array) -> tuple[State, State]:
            then = self.step(now, time[None])
            return then, now

        grid = jnp.arange(self.n_steps, dtype=first.spliced.dtype) / self.n_steps
        last, before = jax.lax.scan(on, first, grid)
        return State(*(jnp.concatenate([a[:, 0], b]) for a, b in zip(before, last, strict=True)))

    def at(self, time: Float[Array, " cells"]) -> State:
        """The trajectory at any times from 0 to 1, by cubic Hermite interpolation."""
        path = self.trajectory()
        grid = jnp.arange(self.n_steps + 1, dtype=time.dtype) / self.n_steps
        slopes = self.derivative(path, grid)
        place = jnp.clip(time * self.n_steps, 0.0, self.n_steps)
        left = jnp.minimum(place.astype(int), self.n_steps - 1)
        x = (place - left)[:, None]

        def between(values: Array, slope: Array) -> Array:
            a, b, p, q = values[left], values[left + 1], self.dt * slope[left], self.dt * slope[left + 1]
            return (1 + 2 * x) * (1 - x) ** 2 * a + x * (1 - x) ** 2 * p + x**2 * (3 - 2 * x) * b + x**2 * (x - 1) * q

        return State(*(between(v, d) for v, d in zip(path, slopes, strict=True)))

    def loss(self, now: State) -> tuple[Array, dict[str, Array]]:
        """Mean squared distance of cells from the trajectory at their times, in units of each gene's spread."""
        found = self.at(self.time_of(now))
        of_u = (((found.unspliced - now.unspliced) / self.spread_u[...]) ** 2).mean()
        of_s = (((found.spliced - now.spliced) / self.spread_s[...]) ** 2).mean()
        return of_u + of_s, {"unspliced": of_u, "spliced": of_s}

    def start_from(self, now: State, ratio: Any, first_time: Any) -> None:
        """Takes spreads and means from data, gamma / beta, and a line of features through first times."""
        u, s = (np.asarray(x, np.float64) for x in now)
        dtype = self.spread_u[...].dtype

        def kept(variable: Any, value: Any) -> None:
            variable[...] = jnp.asarray(value, dtype)

        for x, mean, spread in ((u, self.mean_u, self.spread_u), (s, self.mean_s, self.spread_s)):
            deviation = x.std(axis=0)
            kept(mean, x.mean(axis=0))
            kept(spread, np.where(deviation > 0, deviation, 1.0))
        kept(self.log_ratio, np.log(np.clip(np.asarray(ratio, np.float64), 1e-2, 1e2)))
        x = np.asarray(self.features(State(jnp.asarray(u, dtype), jnp.asarray(s, dtype))), np.float64)
        wanted = np.clip(np.asarray(first_time, np.float64), 1 - FURTHEST, FURTHEST)
        wanted = np.log(wanted / (1 - wanted))
        n, width = x.shape
        if n < width:
            weights = x.T @ np.linalg.solve(x @ x.T + RIDGE * width * np.eye(n), wanted - wanted.mean())
        else:
            weights = np.linalg.solve(x.T @ x + RIDGE * n * np.eye(width), x.T @ (wanted - wanted.mean()))
        kept(self.straight.kernel, weights[:, None])
        kept(self.straight.bias, [wanted.mean()])
        early = wanted <= np.quantile(wanted, 0.05)
        for x, spread, start in ((u, self.spread_u, self.start_u), (s, self.spread_s, self.start_s)):
            level = np.maximum(x[early].mean(axis=0) / np.asarray(spread[...]), 1e-2)
            kept(start, level + np.log(-np.expm1(-level)))  # inverse of softplus
