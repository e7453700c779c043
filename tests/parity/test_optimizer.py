"""Optimiser and schedules against torch.optim and the published schedulers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.train import optim, schedules


@pytest.fixture(scope="module")
def case(shared):
  folder = shared("fixtures/parity/adamw_and_schedules")
  described = json.loads((folder / "case.json").read_text())
  return dict(np.load(folder / "io.npz")), described["tolerance"], described["config"]


@pytest.mark.parametrize(
    "name, options",
    [
        ("adamw_default", dict(b1=0.9, b2=0.999, eps=1e-8)),
        ("adamw_vjepa", dict(b1=0.9, b2=0.999, eps=1e-8)),
        ("adamw_mae", dict(b1=0.9, b2=0.95, eps=1e-6)),
    ],
)
def test_twenty_steps_equal_torch_adamw(case, name, options):
  arrays, tolerance, _ = case
  rates = jnp.asarray(arrays[f"{name}/lr_wd"], jnp.float32)
  optimizer = optim.make_optimizer(
      learning_rate=lambda step: rates[step, 0],
      weight_decay=lambda step: rates[step, 1],
      **options,
  )
  params = {"kernel": arrays[f"{name}/w0"], "bias": arrays[f"{name}/b0"]}
  state = optimizer.init(params)

  @jax.jit
  def update(params, state, grads, step):
    updates, state, _ = optimizer.update(grads, state, params, step=step)
    return jax.tree.map(jnp.add, params, updates), state

  for step in range(20):
    grads = {
        "kernel": arrays[f"{name}/grads_w"][step],
        "bias": arrays[f"{name}/grads_b"][step],
    }
    params, state = update(params, state, grads, jnp.asarray(step))
    for key, ours in (("w", params["kernel"]), ("b", params["bias"])):
      np.testing.assert_allclose(
          ours, arrays[f"{name}/{key}"][step], **tolerance[f"{name}/{key}"]
      )


def test_clipping_equals_torch_clip_grad_norm(case):
  arrays, tolerance, _ = case
  grads = {"a": arrays["clip/g0"], "b": arrays["clip/g1"]}
  norm, clipped, ours = optim.clip(grads, 1.0)
  np.testing.assert_allclose(norm, arrays["clip/norm"], rtol=1e-6)
  assert clipped == 1.0
  np.testing.assert_allclose(ours["a"], arrays["clip/out0"], **tolerance["clip/out0"])
  np.testing.assert_allclose(ours["b"], arrays["clip/out1"], **tolerance["clip/out1"])


# The reference's n-th call of step() is our step n - 1, hence offset=1.
SCHEDULES = {
    "warmup_cosine": (50, lambda c: schedules.warmup_cosine(
        c["ref_lr"], c["T_max"], warmup_steps=c["warmup_steps"], start=c["start_lr"],
        final=c["final_lr"], offset=1,
    )),
    "warmup_cosine_nowarm": (40, lambda c: schedules.warmup_cosine(
        c["ref_lr"], c["T_max"], final=c["final_lr"], offset=1
    )),
    "cosine_wd_up": (51, lambda c: schedules.cosine(
        c["ref_wd"], c["final_wd"], c["T_max"], offset=1
    )),
    "cosine_wd_down": (50, lambda c: schedules.cosine(
        c["ref_wd"], c["final_wd"], c["T_max"], offset=1
    )),
    "wsd": (55, lambda c: schedules.wsd(
        c["ref_lr"], c["T_max"], warmup_steps=c["warmup_steps"],
        decay_steps=c["anneal_steps"], start=c["start_lr"], final=c["final_lr"],
        offset=1,
    )),
    "linear": (30, lambda c: schedules.linear(
        c["ref_lr"], c["final_lr"], c["T_max"], offset=1
    )),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_equal_vjepa2_until_their_end_and_stay_there(case, name):
  arrays, tolerance, config = case
  end, build = SCHEDULES[name]
  schedule, theirs = build(config[name]), arrays[f"schedule/{name}"]
  ours = schedule(np.arange(len(theirs)))
  key = f"schedule/{name}"
  # At its zero the reference's cosine leaves the rounding of 1 + cos(pi), 1e-19.
  allowed = dict(tolerance[key], atol=1e-15)
  np.testing.assert_allclose(ours[:end], theirs[:end], **allowed)
  np.testing.assert_array_equal(ours[end:], ours[end - 1])


def test_ema_momentum_equals_vjepa2_without_an_offset(case):
  arrays, tolerance, _ = case
  theirs = arrays["schedule/ema_linear"]
  ours = schedules.linear(0.998, 1.0, len(theirs) - 1)(np.arange(len(theirs)))
  np.testing.assert_allclose(ours, theirs, **tolerance["schedule/ema_linear"])


def test_spark_schedules_are_ours_over_max_it_minus_one(case):
  arrays, tolerance, config = case
  c, steps = config["spark"], np.arange(60)
  rate = schedules.warmup_cosine(
      c["peak_lr"], c["max_it"] - 1, warmup_steps=c["warmup"],
      start=0.005 * c["peak_lr"], final=0.001 * c["peak_lr"],
  )
  decay = schedules.cosine(c["wd"], c["wd_end"], c["max_it"] - 1)
  for name, schedule in (("spark_lr", rate), ("spark_wd", decay)):
    key = f"schedule/{name}"
    np.testing.assert_allclose(schedule(steps), arrays[key], **tolerance[key])


def test_videomae_schedule_is_a_linear_and_a_cosine_piece(case):
  arrays, tolerance, config = case
  c, key = config["videomae"], "schedule/videomae"
  warmup = c["warmup_epochs"] * c["niter_per_ep"]
  rise = schedules.linear(c["start_warmup"], c["base"], warmup - 1)
  fall = schedules.cosine(c["base"], c["final"], len(arrays[key]) - warmup)
  ours = np.concatenate(
      [rise(np.arange(warmup)), fall(np.arange(len(arrays[key]) - warmup))]
  )
  np.testing.assert_allclose(ours, arrays[key], **tolerance[key])
