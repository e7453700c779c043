"""A cloud, hosts and a queue of local processes for the launch scripts."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class Cloud:
  """A stand-in cloud, and a repository from which the scripts are started."""

  def __init__(self, store: pathlib.Path, repository: pathlib.Path):
    self.store, self.repository = store, repository
    self.environment = {
        "HOME": str(store), "STANDIN": str(store),
        "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}",
        "POD_NAME": "oct", "POD_TYPE": "v4-16", "POD_ZONE": "us-central2-b",
        "POD_PYTHON": sys.executable, "POD_INSTALL": "none", "POD_POLL": "0.2",
        "POD_BACKOFF": "0", "POD_GRACE": "20", "GPU_PYTHON": sys.executable,
        "GPU_INSTALL": "none", "GPU_POLL": "0.2", "GPU_BACKOFF": "0", "GPU_GRACE": "20",
    }

  def start(self, *arguments: str, script: str = "tpu_pod.sh") -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(self.repository / "launch" / script), *arguments],
        env=self.environment, cwd=self.store, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )

  def __call__(self, *arguments: str, code: int = 0, script: str = "tpu_pod.sh") -> str:
    process = self.start(*arguments, script=script)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    return output

  def behave(self, **wanted: object) -> None:
    (self.store / "behaviour.json").write_text(json.dumps(wanted))

  def calls(self) -> list[list[str]]:
    log = self.store / "calls.log"
    return [json.loads(line) for line in log.read_text().splitlines()]

  def folder(self, worker: int, node: str = "oct") -> pathlib.Path:
    return self.store / "workers" / f"{node}-{worker}" / "vjepa_jax"

  def preempt(self, node: str = "oct") -> None:
    subprocess.run(
        [HERE / "bin" / "gcloud", "standin-preempt", node], check=True,
        env={**os.environ, "STANDIN": str(self.store)},
    )

  def pids(self) -> list[int]:
    """Every process that was started on a worker or host of this cloud."""
    mark = f"STANDIN_WORKER={self.store}/".encode()
    found = []
    for entry in pathlib.Path("/proc").iterdir():
      try:
        if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
          found.append(int(entry.name))
      except OSError:
        pass
    return found

  def close(self) -> None:
    for pid in self.pids():
      try:
        os.kill(pid, 9)
      except ProcessLookupError:
        pass


def wait_for(claim, seconds: float = 60.0) -> None:
  end = time.monotonic() + seconds
  while not claim():
    assert time.monotonic() < end, f"not within {seconds} s"
    time.sleep(0.02)


@pytest.fixture
def until():
  return wait_for


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
  """The code as it is now: an edit while the tests run changes no hash."""
  copy = tmp_path_factory.mktemp("repository") / "code"
  ignored = shutil.ignore_patterns(
      ".*", "__pycache__", "*.egg-info", "runs", "tests", "docs", "build", "dist"
  )
  shutil.copytree(ROOT, copy, ignore=ignored)
  return copy


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory):
  """The launch scripts beside a program that starts in no time."""
  root = tmp_path_factory.mktemp("toy") / "code"
  shutil.copytree(ROOT / "launch", root / "launch")
  (root / "vjepa_jax").mkdir()
  (root / "vjepa_jax" / "__init__.py").touch()
  (root / "vjepa_jax" / "a name.txt").write_text("with a space\n")
  shutil.copy(HERE / "toy_main.py", root / "vjepa_jax" / "main.py")
  shutil.copy(ROOT / "setup.py", root / "setup.py")
  return root


@pytest.fixture
def make_cloud(tmp_path_factory):
  clouds = []

  def make(repository: pathlib.Path) -> Cloud:
    clouds.append(Cloud(tmp_path_factory.mktemp("cloud"), repository))
    return clouds[-1]

  yield make
  for cloud in clouds:
    cloud.close()


@pytest.fixture
def cloud(make_cloud, toy_repository):
  return make_cloud(toy_repository)


@pytest.fixture
def pod(cloud):
  """A cloud whose node is there and set up."""
  cloud("create")
  cloud("setup")
  return cloud


@pytest.fixture
def lines():
  """Returns the lines of an output that the launcher itself has said."""
  return lambda output: re.findall(r"^\w+\.sh: (.*)$", output, re.MULTILINE)


@pytest.fixture
def linter():
  """Returns linter(name) -> path of one of the test extra, which lies beside python."""

  def find(name: str) -> str:
    found = shutil.which(name, path=str(pathlib.Path(sys.executable).parent))
    found = found or shutil.which(name)
    if not found:
      pytest.skip(f"no {name}; pip install -e '.[test]'")
    return found

  return find
