"""One optimiser step and one validation step; jittable, mesh-blind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.objectives.base import Batch, Metrics, Objective
from vjepa_jax.train.optim import Optimizer
from vjepa_jax.train.state import Augment, TrainState, with_positions


def make_train_step(
    objective: Objective, optimizer: Optimizer, *, augment: Augment, accum: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Builds step(state, batch) -> (state, metrics).

  The gradient is that of the mean loss over all rows of the batch, whatever
  `accum`: micro-batches are weighted by metrics["loss"][1]. A non-finite loss or
  gradient leaves parameters, optimiser and model state as they were; the step is
  counted all the same, in `step` and in `skipped`.

  A batch without any label, of an objective that has `needs_labels`, leaves them so
  as well: no weight decay, no moment, no EMA, for there was nothing to learn. Such a
  step counts in `step`, by which schedules go, but not in `skipped`, for nothing is
  wrong with it. Without labels is the whole batch, of all micro-batches and hosts.

  Args:
    objective: `loss` is called once a micro-batch, `after_update` once a step. Where
      it has a true `needs_labels`, a batch may weigh 0, and its loss is finite then;
      of others a batch of weight 0 counts as non-finite.
    optimizer: of `optim.make_optimizer`.
    augment: called on every micro-batch with train=True.
    accum: micro-batches a step; must divide the batch.

  Returns:
    A function of (state, host batch [B, ...]). Its metrics are the objective's
    (weight 0 when nothing changed) and grad_norm (before clipping), clipped,
    nonfinite.
  """
  # Static: others keep the program, and the compiled one, that they have.
  needs_labels = getattr(objective, "needs_labels", False)

  def micro_step(carry, batch, *, state, keys):
    grads, model_state = carry
    batch = augment(batch, keys[0], train=True)
    loss = lambda params: objective.loss(
        params, model_state, batch, keys[1], train=True
    )
    micro, (model_state, metrics) = jax.grad(loss, has_aux=True)(state.params)
    weight = metrics["loss"][1]
    grads = jax.tree.map(lambda total, g: total + weight * g, grads, micro)
    return (grads, model_state), metrics

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    keys = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = _split(with_positions(batch), accum)
    (grads, model_state), metrics = jax.lax.scan(
        lambda carry, micro: micro_step(carry, micro, state=state, keys=keys),
        (jax.tree.map(jnp.zeros_like, state.params), state.model_state),
        batch,
    )
    metrics = jax.tree.map(lambda values: values.sum(axis=0), metrics)
    total, weight = metrics["loss"]
    idle = weight == 0 if needs_labels else None  # NaN is not 0.
    if needs_labels:
      weight = jnp.where(idle, 1.0, weight)
    grads = jax.tree.map(lambda g: g / weight, grads)
    updates, opt_state, info = optimizer.update(
        grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    model_state = objective.after_update(params, model_state, state.step)

    finite = jnp.isfinite(total / weight) & jnp.isfinite(info["grad_norm"])
    changed = finite & ~idle if needs_labels else finite
    keep = lambda new, old: jax.tree.map(
        lambda n, o: jnp.where(changed, n, o), new, old
    )
    row, skipped = state.skipped
    state = state.replace(
        step=state.step + 1,
        params=keep(params, state.params),
        model_state=keep(model_state, state.model_state),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.stack([jnp.where(finite, 0, row + 1), skipped + ~finite]),
    )
    return state, _step_metrics(metrics, info, finite, changed)

  return step


def make_eval_step(
    objective: Objective, augment: Augment
) -> Callable[[Any, Any, Batch], Metrics]:
  """Builds eval_step(params, model_state, batch) -> metrics.

  No augmentation, and masks from one fixed key: the same batch always gives the
  same loss. Rows with `_mask` 0 carry no weight (the objective sees to it).
  """

  def eval_step(params: Any, model_state: Any, batch: Batch) -> Metrics:
    key = jax.random.key(0)
    batch = augment(with_positions(batch), key, train=False)
    _, (_, metrics) = objective.loss(params, model_state, batch, key, train=False)
    return metrics

  return eval_step


def _split(batch: Batch, accum: int) -> Batch:
  """[B, ...] -> [accum, B / accum, ...]; each device keeps a share of every part."""
  return jax.tree.map(
      lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch
  )


def _step_metrics(
    metrics: Metrics,
    info: dict[str, jax.Array],
    finite: jax.Array,
    changed: jax.Array,
) -> Metrics:
  zero = lambda value: jnp.where(changed, value, 0.0)
  metrics = {name: (zero(s), zero(w)) for name, (s, w) in metrics.items()}
  for name, value in info.items():
    metrics[name] = (zero(value), zero(1.0))
  metrics["nonfinite"] = ((~finite).astype(jnp.float32), jnp.ones(()))
  return metrics
