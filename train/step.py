"""One optimiser step: loss and gradients on the mesh, the update, the balancing of the routers, and what to do with a NaN."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from ring_jax import numerics, scoring, sharding
from ring_jax.config import ModelConfig
from ring_jax.model import Ring
from ring_jax.moe import RouterStats, balance
from ring_jax.numerics import Numerics
from ring_jax.scoring import Batch
from ring_jax.train.config import OptimizerConfig, TrainConfig
from ring_jax.train.optimizer import make_optimizer, schedule


class TrainState(NamedTuple):
    """Everything a step changes. Parameters are fp32 masters; skipped counts steps whose loss or gradient was not finite."""

    step: Int[Array, ""]
    params: Any
    balance: Any
    optimizer: Any
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


class StepMetrics(NamedTuple):
    """Scalars of one step. load_imbalance: load of the busiest expert over the mean load, averaged over the MoE layers."""

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    num_tokens: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    load_imbalance: Float[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's compiled programs, its constant tables, and how its state and batches lie on the mesh.

    Nothing is computed before it is asked for: a mesh may be of devices that are not here, for which programs are only compiled.
    """

    graph: Any
    make_tables: Callable[[], Any]
    init: Callable[[], TrainState]
    start: Callable[[Any, Any], TrainState]
    abstract: TrainState
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, StepMetrics]]
    evaluate: Callable[[Any, Any, Any, Batch], tuple[Float[Array, ""], Float[Array, ""]]]
    state_shardings: Any
    batch_sharding: Any

    @functools.cached_property
    def tables(self) -> Any:
        """The constant tables, made on the mesh when they are first read."""
        return self.make_tables()


def numerics_of(config: TrainConfig) -> Numerics:
    """Return how a run computes its forward."""
    unroll = config.unroll or (4 if jax.default_backend() == "cpu" else 1)
    how = {"remat": config.remat, "unroll": unroll, "kernels": config.kernels}
    return Numerics.of(config.precision, aligned=config.numerics == "aligned", **how)


def make_program(
    config: ModelConfig, how: Numerics, optimizer_config: OptimizerConfig, steps: int, seed: int, mesh: Mesh | None
) -> Program:
    """Return the programs of a training run (default mesh: one device); nothing is computed yet."""
    optimizer, rate = make_optimizer(optimizer_config, steps), schedule(optimizer_config, steps)

    def fresh() -> tuple[TrainState, Any]:
        _, params, biases, tables = scoring.split(Ring(config, how, rngs=nnx.Rngs(seed)))
        return start(params, biases), tables

    def start(params: Any, biases: Any) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, biases, optimizer.init(params), zero, zero)

    graph, *_ = scoring.split(nnx.eval_shape(lambda: Ring(config, how, rngs=nnx.Rngs(seed))))
    abstract, abstract_tables = jax.eval_shape(fresh)
    mesh = mesh or sharding.make_mesh(sharding.parse_mesh("1x1"))
    specs, table_specs, rows = sharding.specs(abstract, mesh), sharding.specs(abstract_tables, mesh), sharding.batch_spec()
    batch_axes = P(None, *rows) if optimizer_config.accumulate > 1 else rows
    place = lambda tree: jax.tree.map(lambda s: NamedSharding(mesh, s), tree, is_leaf=lambda x: isinstance(x, P))
    state_shardings, weights = place(specs), (specs.params, specs.balance, table_specs)

    def gradients(params, biases, tables, batch):
        options = {"z_loss": optimizer_config.z_loss, "mtp_weight": optimizer_config.mtp_weight}
        return scoring.loss_and_gradients(graph, how, params, biases, tables, batch, **options)

    without_gradients = dataclasses.replace(how, gradients=False)
    scorer, *_ = scoring.split(nnx.eval_shape(lambda: Ring(config, without_gradients, rngs=nnx.Rngs(seed))))

    def evaluate(params, biases, tables, batch):
        logprobs, _ = scoring.next_token_logprobs(scoring.merge(scorer, params, biases, tables, how.dtype), batch)
        return sharding.sum_over_batch((-logprobs.sum(), scoring.scored(batch).sum().astype(jnp.float32)))

    gradients = sharding.on_mesh(gradients, mesh, (*weights, batch_axes), (P(), P(), specs.params))
    evaluate = sharding.on_mesh(evaluate, mesh, (*weights, rows), P())

    def step(state: TrainState, tables: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, stats, grads = gradients(state.params, state.balance, tables, batch)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, new_optimizer = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        biases = _balanced(state.balance, stats.router, optimizer_config.balance_rate)
        # A step that is not finite changes nothing but the counters; the data moves on.
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        bad = (~finite).astype(jnp.int32)
        state = TrainState(
            state.step + 1,
            keep(params, state.params),
            keep(biases, state.balance),
            keep(new_optimizer, state.optimizer),
            state.skipped + bad,
            (state.skipped_in_a_row + bad) * bad,
        )
        updates_done = state.step - 1 - (state.skipped - bad)
        counted = loss, stats.nll, stats.num_tokens, norm, jnp.asarray(rate(updates_done)), _imbalance(stats.router)
        return state, StepMetrics(*counted, state.skipped, state.skipped_in_a_row)

    step_shardings = (state_shardings, NamedSharding(mesh, P()))
    return Program(
        graph=graph,
        make_tables=numerics.jit(lambda: fresh()[1], how, out_shardings=place(table_specs)),
        init=numerics.jit(lambda: fresh()[0], how, out_shardings=state_shardings),
        start=numerics.jit(start, how, out_shardings=state_shardings, donate_argnums=(0, 1)),
        abstract=abstract,
        step=numerics.jit(step, how, donate_argnums=0, out_shardings=step_shardings),
        evaluate=numerics.jit(evaluate, how),
        state_shardings=state_shardings,
        batch_sharding=NamedSharding(mesh, batch_axes),
    )


def _stats(router: Any) -> list[RouterStats]:
    return [s for s in jax.tree.leaves(router, is_leaf=lambda x: isinstance(x, RouterStats)) if isinstance(s, RouterStats)]


def _balanced(biases: Any, router: Any, rate: float) -> Any:
    """The balancing biases after a step's loads. The state lists them in the order of the router statistics: segments, then MTP layers."""
    if not rate:
        return biases
    paths = jax.tree_util.tree_flatten_with_path(biases, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
    key = lambda path: (str(path[0].key) == "mtp", tuple(k.key for k in path if isinstance(k.key, int)))
    order = sorted(range(len(paths)), key=lambda i: key(paths[i][0]))
    stats = dict(zip(order, _stats(router), strict=True))
    leaves = [variable.replace(balance(variable.get_value(), stats[i].load, rate)) for i, (_, variable) in enumerate(paths)]
    structure = jax.tree.structure(biases, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return jax.tree.unflatten(structure, leaves)


def _imbalance(router: Any) -> Float[Array, ""]:
    ratios = [(s.load.max(-1) / jnp.maximum(s.load.mean(-1), 1e-9)).reshape(-1) for s in _stats(router)]
    return jnp.concatenate(ratios).mean() if ratios else jnp.float32(0)
