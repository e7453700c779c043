"""launch/gpu.sh on hosts and a SLURM of local processes."""

import os
import subprocess

import pytest


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def hosts(cloud):
  """Two hosts with two GPUs each, as nvidia-smi tells."""
  for host in ("gpu1", "gpu2"):
    folder = cloud.store / "hosts" / host / "bin"
    folder.mkdir(parents=True)
    executable(folder / "nvidia-smi", "#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
  cloud.environment |= {"GPU_HOSTS": "gpu1,me@gpu2", "GPU_GPUS": "2"}
  (cloud.store / "hosts" / "me@gpu2").symlink_to(cloud.store / "hosts" / "gpu2")
  cloud("setup", script="gpu.sh")
  return cloud


def arguments(cloud, *flags):
  # toy_main takes what it knows; --coordinator and its like are let through.
  return ["--", f"--workdir={cloud.store}/shared", "--worker={worker}", *flags]


@pytest.mark.parametrize(
    "verb", "setup sync check run start stop status logs babysit fetch slurm".split()
)
def test_each_command_explains_itself(cloud, verb):
  assert f"  gpu.sh {'run' if verb == 'babysit' else verb} --" in cloud(
      verb, "--help", script="gpu.sh"
  )


def test_a_host_whose_driver_sees_other_gpus_is_named(hosts):
  executable(
      hosts.store / "hosts" / "gpu2" / "bin" / "nvidia-smi",
      "#!/bin/sh\necho NVIDIA H100\n",
  )
  output = hosts("check", script="gpu.sh", code=1)
  assert "worker 0: driver: 2 NVIDIA H100" in output
  assert "worker 1: 1 GPUs, not 2" in output and "failed on worker 1 of 2" in output


def test_a_host_out_of_reach_is_named(hosts):
  output = hosts("status", "--hosts=gpu1,gpu9", script="gpu.sh", code=1)
  assert "worker 1 (gpu9): ssh cannot reach it" in output
  assert "status failed on worker 1 of 2" in output


def test_hosts_run_are_stopped_and_started_again(hosts, until, lines):
  output = hosts(
      "run", "--restarts=2", *arguments(hosts, "--codes=76,0", "--say=a  b"),
      script="gpu.sh",
  )
  assert "restart 1 of 2 in 0 s: exit code 76, another host was lost" in output
  assert lines(output)[-1] == "done at step 5/5"
  log = (hosts.store / "hosts" / "gpu2" / "vjepa_jax" / "train.log").read_text()
  assert "a  b at step 0" in log
  # The first host is told to all, without the user.
  assert "--coordinator=gpu1:8476 --processes=2 --process_id=1" in log
  assert "nothing runs" in hosts("stop", script="gpu.sh")
  hosts("fetch", f"--to={hosts.store}/results", script="gpu.sh")
  assert (hosts.store / "results" / "shared" / "step-1").read_text() == "5"


@pytest.fixture
def slurm(cloud):
  """sbatch runs the job here; srun one task; scontrol and scancel note their words."""
  folder = cloud.store / "slurm"
  folder.mkdir()
  note = f"#!/bin/sh\necho \"$0 $*\" >>{folder}/asked\n"
  executable(folder / "sbatch", f"#!/bin/sh\ncp $1 {folder}/job.sh\n")
  executable(folder / "srun", (
      "#!/bin/sh\nshift\n\"$@\" &\n"
      f"echo $! >{folder}/task\nwait $!\n"
  ))
  executable(folder / "scontrol", note)
  executable(folder / "scancel", note + f"kill -TERM $(cat {folder}/task)\n")
  cloud.environment["PATH"] = f"{folder}:{cloud.environment['PATH']}"
  return cloud, folder


def submit(cloud, *flags):
  cloud(
      "slurm", "--nodes=2", "--gpus=8", "--restarts=2", "--env=GREETING=a b", "--",
      f"--workdir={cloud.store}/shared", *flags, script="gpu.sh",
  )


def job(cloud, folder, **options):
  return subprocess.Popen(
      ["bash", folder / "job.sh"], text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, env={**cloud.environment, "SLURM_JOB_ID": "7"},
      **options,
  )


def test_a_batch_job_starts_again_a_bounded_number_of_times(slurm):
  cloud, folder = slurm
  submit(cloud, "--codes=75,76,143", "--say=it's two  words")
  script = (folder / "job.sh").read_text()
  for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"):
    assert f"#SBATCH {line}\n" in script
  process = job(cloud, folder)
  output = process.communicate(timeout=60)[0]
  assert process.returncode == 143
  assert output.count("it's two  words at step") == 3
  assert "restart 2 of 2" in output and "all 2 restarts used up" in output


def test_a_batch_job_does_not_start_again_what_cannot_run(slurm):
  cloud, folder = slurm
  submit(cloud, "--codes=2")
  process = job(cloud, folder)
  assert "not started again: exit code 2" in process.communicate(timeout=60)[0]
  assert process.returncode == 2


def test_a_batch_job_at_its_time_limit_saves_and_is_queued_again(slurm, until):
  cloud, folder = slurm
  submit(cloud, "--steps=100000")
  process = job(cloud, folder)
  saved = cloud.store / "shared" / "step-0"
  until(saved.exists)
  os.kill(process.pid, 10)  # SIGUSR1, as --signal=B:USR1 asks for
  output = process.communicate(timeout=60)[0]
  assert "saved after signal 15" in output and "time is up, exit code 143" in output
  assert "scontrol requeue 7" in (folder / "asked").read_text()


def test_a_batch_job_passes_shellcheck(slurm, linter):
  cloud, folder = slurm
  submit(cloud)
  subprocess.run([linter("shellcheck"), folder / "job.sh"], check=True)
