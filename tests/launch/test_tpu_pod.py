"""launch/tpu_pod.sh against a cloud of local processes; the real run is in e2e."""

import re
import shlex
import subprocess

import pytest

VERBS = (
    "create setup sync check run start restart stop status logs babysit fetch delete"
).split()


def toy(cloud, *flags):
  return [
      "--", f"--workdir={cloud.store}/shared", "--worker={worker}", *flags,
  ]


@pytest.mark.parametrize("verb", VERBS)
def test_each_command_explains_itself_with_an_example(cloud, verb):
  output = cloud(verb, "--help")
  assert output.startswith(f"tpu_pod.sh {verb}: ")
  assert f"  tpu_pod.sh {verb} --name=" in output or "&& tpu_pod.sh restart" in output


def test_the_overview_is_the_way_from_nothing_to_a_run(cloud):
  output = cloud("--help")
  for part in ("create", "setup", "check", "run --restarts=50"):
    assert f"launch/tpu_pod.sh {part}" in output


@pytest.mark.parametrize("arguments, message", [
    (("fly",), "'fly' is no command"),
    (("create", "--typ=v4-8"), "unknown flag --typ; known: --name --type"),
    (("create", "--type=v9-8"), "unknown family; v2, v3, v4, v5litepod, v5p, v6e"),
    (("create", "--type=v4"), "must be like v4-32"),
    (("create", "--name=Big Pod"), "small letters, digits and hyphens"),
    (("run", "--restarts=many", "--", "--workdir=gs://b/r"), "must be a whole number"),
    (("run", "--env=KEY", "--", "--workdir=gs://b/r"), "must be --env=NAME=VALUE"),
    (("run", "configs/oct_multi.py"), "arguments of the run follow --"),
    (("run",), "no arguments; for example"),
])
def test_what_cannot_be_meant_is_refused_before_gcloud_is_asked(
    cloud, arguments, message
):
  assert message in cloud(*arguments, code=2)
  assert not (cloud.store / "calls.log").exists()


def test_flags_win_over_the_environment_and_that_over_the_file(cloud):
  file = cloud.store / "pod.env"
  file.write_text("# mine\nPOD_NAME=from-file\nPOD_SPOT=1\nPOD_PROJECT=lab\n")
  cloud.environment["POD_FILE"] = str(file)
  output = cloud("create", "--dry_run")
  assert "create oct " in output and "--spot" in output and "--project=lab" in output
  assert "create third " in cloud("create", "--dry-run", "--name=third")
  file.write_text("POD_NAMED=x\n")
  assert "'POD_NAMED' is no option; known: POD_NAME" in cloud("create", code=2)


def test_a_dry_run_prints_commands_that_gcloud_would_take_and_calls_nothing(cloud):
  cloud.environment["POD_QUEUED"] = "1"
  printed = []
  for verb in VERBS:
    flags = toy(cloud, "--say=it's two  words") if verb == "run" else []
    output = cloud(verb, "--dry_run", "--spot", *flags)
    printed += [shlex.split(x) for x in output.splitlines() if x.startswith("gcloud")]
  assert not (cloud.store / "calls.log").exists()
  assert len(printed) > 12
  assert all("--zone=us-central2-b" in words for words in printed)
  for words in printed:
    if "ssh" in words or "--worker=all" in words:
      assert words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]
  start = next(w for w in printed if "worker.sh start" in w[-1])
  command = shlex.split(start[-1].removeprefix("--command="))
  assert command[-1] == "--say=it's two  words"


def test_create_makes_a_node_once_and_says_that_it_is_there(cloud, lines):
  assert lines(cloud("create"))[-1] == "node oct is READY: v4-16, 2 workers"
  assert lines(cloud("create")) == ["node oct is there: v4-16, 2 workers"]
  made = [call for call in cloud.calls() if "create" in call]
  assert len(made) == 1 and "--version=tpu-ubuntu2204-base" in made[0]
  assert "is there, but as v4-16, not v4-32" in cloud("create", "--type=v4-32", code=2)


def test_create_waits_for_its_turn_in_the_queue(cloud, lines):
  cloud.behave(queue_polls=2)
  said = lines(cloud("create", "--queued", "--spot", "--valid_until=6h"))
  assert said == [
      "waiting for node oct: queued: WAITING_FOR_RESOURCES",
      "node oct is READY: v4-16, 2 workers",
  ]
  made = next(call for call in cloud.calls() if "create" in call)
  assert {"--node-id=oct", "--spot", "--valid-until-duration=6h"} <= set(made)


def test_a_create_that_gcloud_refuses_says_what_to_do(cloud):
  cloud.behave(refuse_create=1)
  output = cloud("create", code=1)
  assert "no more capacity" in output and "--queued waits for capacity" in output


def test_create_clears_away_what_pre_emption_left(cloud, lines):
  cloud("create", "--queued", "--spot")
  cloud.preempt()
  said = lines(cloud("create", "--queued", "--spot"))
  assert said[0] == "node oct is PREEMPTED; its remains are deleted"
  assert said[-1] == "node oct is READY: v4-16, 2 workers"


def test_sync_compares_hashes_and_keeps_the_runs_of_a_worker(pod, lines):
  kept = pod.folder(1) / "code" / "runs" / "kept.txt"
  kept.write_text("result")
  stale = pod.folder(0) / "code" / "stale.py"
  stale.touch()
  said = lines(pod("sync"))
  assert re.fullmatch(r"code [0-9a-f]{16} is on all 2 workers", said[-1])
  assert kept.read_text() == "result" and not stale.exists()
  assert (pod.folder(0) / "code" / "vjepa_jax" / "a name.txt").exists()


def test_check_names_the_worker_whose_code_or_imports_are_wrong(pod):
  edited = pod.folder(1) / "code" / "vjepa_jax" / "__init__.py"
  edited.write_text("import a_package_that_is_missing\n")
  output = pod("check", code=1)
  assert "worker 1: code is " in output and "check failed on worker 1 of 2" in output
  pod("sync")
  python = pod.folder(0) / "python"
  python.write_text("#!/bin/sh\necho \"No module named 'jax'\" >&2\nexit 1\n")
  output = pod("check", code=1)
  assert "worker 0: No module named 'jax'" in output
  assert "check failed on worker 0 of 2" in output and "run setup again" in output


def test_a_worker_out_of_reach_is_named(pod):
  pod.behave(unreachable=[1])
  output = pod("status", code=1)
  assert "worker 0: nothing was started here" in output
  assert "status failed on worker 1 of 2" in output
  assert "cannot reach every worker" in pod("sync", code=1)


def test_commands_without_a_node_or_setup_say_what_comes_first(cloud):
  assert "there is no node oct in us-central2-b; run create first" in cloud(
      "sync", code=1
  )
  cloud("create")
  assert "run setup first" in cloud("run", *toy(cloud), code=1)
  cloud.behave(refuse_describe=1)
  assert "are you logged in" in cloud("status", code=1)


def test_a_run_is_started_stopped_and_goes_on(pod, until):
  command = toy(pod, "--steps=100000", "--say=it's  two $words")
  pod("run", "--env=GREETING=a b", *command)
  log = pod.folder(1) / "train.log"
  until(lambda: "step 3/" in log.read_text())
  assert "it's  two $words at step 0" in log.read_text()
  refused = pod("run", *command, code=1)
  assert "worker 0: a run is alive" in refused and "nothing was started" in refused
  status = pod("status")
  assert "node oct: READY, v4-16, 2 workers" in status
  assert re.search(r"worker 1: running, pid \d+.*; last step \d+/100000", status)
  stopped = pod("stop")
  assert stopped.count("stopped with exit code 143") == 2
  assert "step 3/100000" in pod("logs", "--lines=500", "--worker=all")
  pod("start")
  until(lambda: re.search(r"\$words at step [1-9]", log.read_text()))
  assert pod("restart").count("started, pid") == 2
  assert pod("stop").count("143") == 2
  assert pod("stop").count("nothing runs") == 2


def test_what_ignores_sigterm_is_killed_after_the_grace(pod, until):
  pod("run", *toy(pod, "--steps=100000"))
  until(lambda: "step 1/" in (pod.folder(0) / "train.log").read_text())
  for worker in (0, 1):
    pid = (pod.folder(worker) / "run_pid").read_text().split()[0]
    subprocess.run(["kill", "-STOP", pid], check=True)
  assert pod("stop", "--grace=1").count("killed after 1 s") == 2
  assert "ended with 137, by stop" in pod("status")


def test_results_of_a_pod_may_not_lie_on_the_disk_of_each_worker(pod):
  output = pod("run", "--", "--workdir=runs/oct", code=2)
  assert "each of 2 workers would write its own; use --workdir=gs://" in output
  assert "no --workdir among the arguments" in pod("run", "--", "--steps=1", code=2)


def test_fetch_brings_what_the_last_run_wrote(pod, until):
  pod("run", *toy(pod, "--steps=5"))
  until(lambda: (pod.folder(0) / "exit_code").exists())
  pod("fetch", f"--to={pod.store}/results")
  assert (pod.store / "results" / "shared" / "step-0").read_text() == "5"


def test_fetch_takes_the_results_of_a_bucket_from_the_bucket(pod):
  (pod.store / "buckets" / "lab" / "oct").mkdir(parents=True)
  (pod.store / "buckets" / "lab" / "oct" / "report.json").write_text("{}")
  pod("fetch", "--workdir=gs://lab/oct", f"--to={pod.store}/results")
  assert (pod.store / "results" / "oct" / "report.json").exists()


def test_a_finished_run_ends_the_watching(pod, lines):
  said = lines(pod("run", "--restarts=2", *toy(pod)))
  assert said[-1] == "done at step 5/5"


def test_a_curable_exit_code_is_started_again(pod, lines):
  said = lines(pod("run", "--restarts=3", *toy(pod, "--codes=75,76,0")))
  assert [x for x in said if "restart " in x] == [
      "restart 1 of 3 in 0 s: exit code 75, a bucket was out of reach; last step 5/5",
      "restart 2 of 3 in 0 s: exit code 76, another host was lost; last step 5/5",
  ]
  assert said[-1] == "done at step 5/5"
  assert (pod.store / "shared" / "attempts-1").read_text() == "3"


def test_restarts_are_bounded(pod, lines):
  said = lines(pod("run", "--restarts=2", *toy(pod, "--codes=143"), code=75))
  assert "all 2 restarts are used up" in said[-1]
  assert (pod.store / "shared" / "attempts-0").read_text() == "3"


@pytest.mark.parametrize("code", [1, 2])
def test_a_fault_of_the_run_itself_is_never_started_again(pod, code):
  output = pod("run", "--restarts=5", *toy(pod, f"--codes={code}"), code=code)
  assert f"not started again: exit code {code}" in output and "| fails" in output
  assert (pod.store / "shared" / "attempts-0").read_text() == "1"


def test_devices_that_do_not_initialise_are_worth_a_new_start(pod, lines):
  cry = "--cry=RuntimeError: Unable to initialize backend 'tpu': UNKNOWN"
  said = lines(pod("run", "--restarts=1", *toy(pod, "--codes=1,0", cry)))
  assert "the devices or the cluster did not initialise" in "".join(said)
  assert said[-1] == "done at step 5/5"


def test_a_run_that_was_stopped_by_hand_stays_stopped(pod, until):
  pod("run", *toy(pod, "--steps=100000"))
  watcher = pod.start("babysit", "--restarts=5")
  assert "watching" in watcher.stdout.readline()
  until(lambda: "step 2/" in (pod.folder(0) / "train.log").read_text())
  pod("stop")
  output = watcher.communicate(timeout=60)[0]
  assert watcher.returncode == 0 and "stopped by hand" in output
  assert not pod.pids()


def test_a_stop_before_a_new_start_is_not_taken_for_one_by_hand(pod, until):
  pod("run", *toy(pod, "--codes=76"))
  until(lambda: (pod.folder(0) / "exit_code").exists())
  verb = lambda *words: subprocess.run(
      ["bash", pod.folder(0) / "worker.sh", *words], text=True, capture_output=True,
      check=True, env={**pod.environment, "VJEPA_WORKER": "0"},
  ).stdout
  verb("stop", "5", "again")
  assert "worker 0: state 76 step 5/5" in verb("state")
  verb("stop", "5")
  assert "worker 0: state stopped" in verb("state")


def test_a_pre_empted_node_is_made_anew_and_the_run_goes_on(cloud, lines, until):
  flags = ("--queued", "--spot")
  cloud("create", *flags)
  cloud("setup")
  cloud("run", *toy(cloud, "--steps=400", "--say=two  words"))
  watcher = cloud.start("babysit", "--restarts=2", *flags)
  assert "watching; at most 2 restarts" in watcher.stdout.readline()
  saved = cloud.store / "shared" / "step-0"
  until(lambda: saved.exists() and int(saved.read_text()) >= 10)
  cloud.behave(refuse_create=1)
  cloud.preempt()
  output = watcher.communicate(timeout=60)[0]
  assert watcher.returncode == 0, output
  told = [x for x in lines(output) if x.startswith("restart")]
  assert told[0].startswith("restart 1 of 2 in 0 s: node oct is PREEMPTED")
  assert told[1].startswith("restart 2 of 2 in 0 s: it could not be made anew")
  assert lines(output)[-1] == "done at step 400/400"
  assert re.search(
      r"two  words at step [1-9]\d+", (cloud.folder(0) / "train.log").read_text()
  )


def test_delete_asks_and_takes_the_queued_resource_along(cloud, lines):
  cloud("create", "--queued")
  assert "add --yes" in cloud("delete", code=2)
  assert lines(cloud("delete", "--yes")) == ["node oct is gone"]
  assert lines(cloud("status")) == [
      "there is no node oct; queued resource: NONE"
  ]
  assert lines(cloud("delete", "--yes")) == ["node oct is gone"]


@pytest.mark.parametrize("states, expected", [
    ("running running", "go_on running"),
    ("0 0", "done 0"),
    ("0 running", "linger 0"),
    ("76 running", "linger 76"),
    ("76 137", "restart 137"),
    ("76 2", "give_up 2"),
    ("1 76 76 76", "give_up 1"),
    ("2 running", "give_up 2"),
    ("init 76", "restart 76"),
    ("stopped 143", "stopped stopped"),
    ("130 0", "give_up 130"),
])
def test_what_follows_from_the_states_of_all_workers(cloud, states, expected):
  script = f'source {cloud.repository}/launch/common.sh; verdict {states}'
  found = subprocess.run(
      ["bash", "-c", script, "x"], capture_output=True, text=True, check=True
  )
  assert found.stdout.strip() == expected
