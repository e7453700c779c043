"""The real training on a pod of two local workers, pre-empted in the middle."""

import json
import socket

import pytest

from vjepa_jax.train import metrics

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture
def pod(make_cloud, repository):
  return make_cloud(repository)


def environment(cache, programs):
  """How two workers of one machine find each other, which a TPU pod says itself."""
  with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
  return [
      f"--env={name}={value}" for name, value in {
          "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
          "VJEPA_JAX_CACHE": cache, **programs,
          "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
          "JAX_NUM_PROCESSES": "{workers}", "JAX_PROCESS_ID": "{worker}",
      }.items()
  ]


def training(workdir):
  return [
      "--", "--config=configs/oct_multi.py:tiny", f"--workdir={workdir}",
      f"--config.train.total_steps={STEPS}", "--lost_after_s=120",
  ]


def comparable(workdir):
  return [
      {k: v for k, v in line.items() if k not in metrics.TIMING_KEYS}
      for line in metrics.read(workdir)
  ]


def test_a_pod_trains_is_pre_empted_resumes_and_equals_an_unbroken_one(
    pod, programs, until, lines, tmp_path
):
  found = tmp_path / "cache", programs
  spot = ("--queued", "--spot", "--chips=2")
  pod("create", *spot)
  pod("setup", *spot)
  wrong = pod("check", "--chips=4", *environment(*found), code=1)
  assert "worker 1: this worker has 1 devices, not 2" in wrong
  assert "2 workers, 2 devices" in pod("check", *spot, *environment(*found))

  unbroken, broken = pod.store / "unbroken", pod.store / "broken"
  watch = ("--restarts=2", "--poll=0.5", *spot, *environment(*found))
  assert lines(pod("run", *watch, *training(unbroken)))[-1] == (
      f"done at step {STEPS}/{STEPS}"
  )

  runner = pod.start("run", *watch, *training(broken))
  log = pod.folder(0) / "train.log"
  until(lambda: (broken / "checkpoints" / "4").exists(), 300)
  pod.preempt()
  told = runner.communicate(timeout=500)[0]
  assert runner.returncode == 0, told
  assert "restart 1 of 2 in 0 s: node oct is PREEMPTED" in told
  assert lines(told)[-1] == f"done at step {STEPS}/{STEPS}"
  assert "step 1/" not in log.read_text()  # It went on, it did not begin again.
  assert comparable(broken) == comparable(unbroken)

  assert pod("status", *spot).count("ended with 0") == 2
  assert f"step {STEPS}/{STEPS}" in pod("logs", "--lines=200", *spot)
  pod("fetch", f"--to={pod.store}/results", *spot)
  report = json.loads((pod.store / "results" / "broken" / "report.json").read_text())
  assert report
  assert pod("stop", *spot).count("nothing runs") == 2
  assert lines(pod("delete", "--yes", *spot)) == ["node oct is gone"]
  assert not pod.pids()
