"""Writes shards on a cluster through Apache Beam (the extra `beam`).

The same shards as `shard_writing` writes on one machine, byte for byte: a shard is
one element, any worker writes it, and what describes the folder is written by the
caller when all are there. On Google Cloud Dataflow:

  python -m vjepa_jax.prepare --config=configs/oct_multi.py \\
    --config.data.manifest=gs://BUCKET/manifest.tsv \\
    --config.data.cache=gs://BUCKET/shards --runner=beam \\
    --beam_options="--runner=DataflowRunner --project=PROJECT --region=REGION \\
      --temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE"

IMAGE is Beam's for this version of Python with `pip install "vjepa_jax[beam,formats]"`
in it. The folder, the manifest and the recordings have to be where all workers reach
them.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import shlex

from vjepa_jax.data import shard_writing
from vjepa_jax.data.record import DataError


def _no_counts(counts: dict[str, int]) -> None:
  del counts


@dataclasses.dataclass(frozen=True)
class Runner:
  """Runs the tasks of `shard_writing.prepare` as a Beam pipeline.

  Attributes:
    options: Beam's own flags, as on a command line; "" runs on this machine.
    timeout_s: that one file may take. Each shard is read by a process of its own, so
      that a file that kills its decoder costs that file and not the worker.
    say: gets a line when the pipeline starts.
  """

  options: str = ""
  timeout_s: float = 600.0
  say: Callable[[str], None] = print

  def __call__(self, tasks: Sequence[shard_writing.Task]) -> None:
    """Writes the shards of these tasks; returns when all are there.

    Raises:
      ImportError: naming the extra.
      DataError: if the pipeline fails; the same call goes on from there.
    """
    if not tasks:
      return
    try:
      import apache_beam as beam
      from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
      raise ImportError(
          'Apache Beam is missing: pip install "vjepa_jax[beam]"'
      ) from error
    try:
      options = shlex.split(self.options)
    except ValueError as error:
      raise DataError(f"beam_options {self.options!r}: {error}") from error
    self.say(f"writing {len(tasks)} shards through Apache Beam")
    crew = shard_writing.Crew(1, 1, self.timeout_s, _no_counts)
    try:
      with beam.Pipeline(options=PipelineOptions(options)) as line:
        _ = (
            line
            | beam.Create(tasks)
            | beam.Reshuffle()
            | beam.Map(functools.partial(_write, crew=crew))
        )
    except (RuntimeError, DataError) as error:
      raise DataError(f"the Beam pipeline failed: {error}") from error


def _write(task: shard_writing.Task, crew: shard_writing.Crew) -> None:
  shard_writing.run_local([task], crew)
