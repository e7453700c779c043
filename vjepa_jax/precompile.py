"""Compiles a config's train step for TPU chips that are not there.

  python -m vjepa_jax.precompile --config=configs/oct_multi.py --topology=v4:2x2x4

Says how many bytes a chip would hold, whether that fits, the largest batch that
does, and what the compiler expects a step to cost. It is the step that `main` runs,
with its sharding; libtpu compiles it (pip install "vjepa_jax[precompile]"), no data
are opened and no TPU is needed. Every number is the compiler's estimate or a bound,
none is a measurement. Exit codes: 0 it fits; 1 it does not; 2 it cannot be compiled.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from vjepa_jax import compiler
from vjepa_jax import config as config_lib
from vjepa_jax.compiler import estimate, search, topology
from vjepa_jax.config import programs

LABEL = "compiler estimate, not a measurement"
# Its table is opened by a run, not here.
_ABOUT_DATA = "data.manifest"
# What else a compiler goes by, beside the program.
_ENVIRONMENT = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
_COMPILER_OPTIONS = (
    "jax_optimization_level", "jax_exec_time_optimization_effort",
    "jax_memory_fitting_level", "jax_memory_fitting_effort",
    "jax_disable_most_optimizations", "jax_compiler_enable_remat_pass",
    "jax_use_shardy_partitioner", "jax_enable_pgle",
)


def precompile(
    config: Any,
    topology_name: str,
    *,
    name: str | None = None,
    batch_per_chip: int | None = None,
    max_batch: bool = True,
    top: int = 20,
    keep_text: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Compiles the train step of a config for a topology and reads what comes out.

  Args:
    config: ConfigDict of a run; data need not exist.
    topology_name: such as "v4:2x2x4".
    name: of the config in what is returned; None: its own.
    batch_per_chip: volumes a chip; None: train.batch_size over the chips.
    max_batch: also looks for the largest batch a chip that fits.
    top: how many of the largest operations to list.
    keep_text: file that the compiled program's text is written to.
    say: gets a line for each compilation.

  Returns:
    One JSON object; see `format_table`. Where it does not fit, `fits` is False,
    `peak_gib_per_chip` is what the compiler asked for, `remedies` says what to
    change, and what only a compiled step tells is None.

  Raises:
    ConfigError: if the config cannot run on so many chips.
    TopologyError: if there is no such topology, or no libtpu.
    CompilerError: if the compiler fails by itself.
  """
  slice_, plain = _place(config, topology_name, batch_per_chip)
  attempt = _Attempt(plain, slice_, say)
  rows = plain["train"]["batch_size"]
  begin = time.perf_counter()
  first = attempt.compile(rows)
  seconds = time.perf_counter() - begin
  flops = programs.flops_per_volume(plain) * rows
  result = {
      "topology": slice_.name, "chips": slice_.chips, "hosts": slice_.hosts,
      "config": name or plain["name"], "batch_per_chip": _whole(rows / slice_.chips),
      "accum": plain["train"].get("accum", 1),
      "mesh": {name: int(size) for name, size in attempt.mesh.shape.items()},
      "tokens": config_lib.model_grid(plain).tokens,
      "usable_gib": estimate.gib(slice_.chip.hbm_bytes),
      "model_tflop_per_step": float(f"{flops / 1e12:.6g}"),
      "compile_s": round(seconds, 1),
      **_memory(attempt, rows), **_nothing_known(),
      "versions": _versions("jax", "jaxlib", "libtpu"),
      "label": LABEL,
  }
  if first is not None:
    text = first.as_text()
    if keep_text:
      pathlib.Path(keep_text).write_text(text, encoding="utf-8")
    result |= _cost(text, slice_, flops, top)
  else:
    result["remedies"] = _remedies(plain, slice_)
  del first
  if max_batch:
    result |= attempt.largest()
  return result


def fingerprint(
    config: Any, topology_name: str, *, batch_per_chip: int | None = None
) -> str:
  """Returns a digest of all that decides what `precompile` finds; compiles nothing.

  It is of the step's program with its names (not the places of its source), the
  devices in their order, the compiler's version and options, and the code that reads
  what the compiler says. Where two are equal, so are bytes, estimated times and
  collectives. Takes seconds.

  Args:
    config, topology_name, batch_per_chip: as of `precompile`.

  Raises:
    ConfigError, TopologyError: as `precompile`.
  """
  slice_, plain = _place(config, topology_name, batch_per_chip)
  mesh = programs.mesh_of(plain, slice_.devices())
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)  # A kernel carries them.
  try:
    program = programs.step_program(
        plain, mesh, platform="tpu", batch_size=plain["train"]["batch_size"]
    ).lower().as_text(debug_info=True)
  finally:
    jax.config.update("jax_traceback_in_locations_limit", limit)
  readers = [
      *sorted(pathlib.Path(compiler.__file__).parent.glob("*.py")),
      pathlib.Path(__file__),
  ]
  decisive = (
      slice_.name, [d.id for d in mesh.devices.flat],
      _versions("jax", "jaxlib", "libtpu"),
      {name: os.environ.get(name, "") for name in _ENVIRONMENT},
      {name: repr(jax.config.values.get(name)) for name in _COMPILER_OPTIONS},
      program, [path.read_text(encoding="utf-8") for path in readers],
  )
  return hashlib.sha256(repr(decisive).encode()).hexdigest()


class _Attempt:
  """Compilations of one config for one slice, by global batch."""

  def __init__(self, plain: Mapping[str, Any], slice_: topology.Topology, say):
    self._plain, self._slice, self._say = plain, slice_, say
    self.mesh = programs.mesh_of(plain, slice_.devices())
    # Rows of a global batch that give each device one row of each micro-batch.
    shares = self.mesh.size // self.mesh.shape.get("sequence", 1)
    self._unit = shares * plain["train"].get("accum", 1)
    self.memory: dict[int, estimate.Memory] = {}
    self.refused: dict[int, int | None] = {}

  def compile(self, rows: int) -> Any:
    """Returns the compiled step of a global batch; None where it does not fit."""
    begin = time.perf_counter()
    lowered = programs.step_program(
        self._plain, self.mesh, platform="tpu", batch_size=rows
    ).lower()
    compiled = None
    try:
      compiled = estimate.compile_lowered(lowered)
      self.memory[rows] = estimate.memory(compiled)
      peak = self.memory[rows].peak
    except estimate.OutOfMemory as error:
      peak = self.refused[rows] = error.needed
    asked = "more than there is" if peak is None else f"{estimate.gib(peak)} GiB"
    if compiled is None and peak is not None:
      asked = f"at least {asked}"  # The compiler names what it cannot do without.
    self._say(
        f"batch {rows} ({_whole(rows / self._slice.chips)} a chip): {asked} a chip of "
        f"{estimate.gib(self._slice.chip.hbm_bytes)}, "
        f"{'does not fit' if compiled is None else 'fits'}; "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return compiled

  def largest(self) -> dict[str, Any]:
    """Returns the largest batch a chip that compiles."""

    def measure(units: int) -> float | None:
      self.compile(units * self._unit)
      return self._peak(units * self._unit)

    tried = {
        rows // self._unit: self._peak(rows) for rows in (*self.memory, *self.refused)
    }
    state = min((m.arguments for m in self.memory.values()), default=0)
    found = search.largest_that_fits(
        measure, self._slice.chip.hbm_bytes, tried=tried, fixed=state
    )
    rows = (found.largest or 0) * self._unit
    return {
        "max_batch_per_chip": _whole(rows / self._slice.chips),
        "max_batch_is_exact": found.exact,
        "max_batch_peak_gib": rows and estimate.gib(self.memory[rows].peak) or None,
    }

  def _peak(self, rows: int) -> float | None:
    if rows in self.memory:
      # What compiles fits, however close it comes.
      return min(self.memory[rows].peak, self._slice.chip.hbm_bytes)
    needed = self.refused[rows]
    # A refusal may name temporaries alone.
    return None if needed is None else max(needed, self._slice.chip.hbm_bytes + 1)


def format_table(result: Mapping[str, Any]) -> str:
  """Returns a readable table of what `precompile` found."""
  r = result
  verdict = "fits" if r["fits"] else "DOES NOT FIT"
  largest = r["max_batch_per_chip"]
  rows = [
      ("config", f"{r['config']}, {r['tokens']} tokens a volume"),
      ("topology", f"{r['topology']}: {r['chips']} chips, {r['hosts']} hosts, mesh "
       + " x ".join(f"{name} {size}" for name, size in r["mesh"].items())),
      ("batch", f"{r['batch_per_chip']} a chip, {r['accum']} micro-batch(es)"),
      ("memory", f"{_number(r['peak_gib_per_chip'])} GiB a chip of {r['usable_gib']}: "
       f"{verdict}"),
      ("of it", f"arguments {_number(r['argument_gib'])} GiB, temporary "
       f"{_number(r['temp_gib'])} GiB"),
      ("largest batch", "not looked for" if largest is None else f"{largest} a chip"
       + ("" if r["max_batch_is_exact"] else " at least")),
      ("model", f"{r['model_tflop_per_step']:.6g} TFLOP a step, all chips"),
  ]
  if r["non_kernel_ms"] is not None:
    traffic = r["collective_bytes"]
    rows += [
        ("step", f"{r['step_ms_bound']:.6g} ms at least: {r['non_kernel_ms']:.6g} ms by "
         f"the compiler + {r['kernel_ms']:.6g} ms attention kernels"),
        ("MFU", f"{r['mfu_bound']:.1%} at most"),
        ("collectives", ", ".join(
            f"{kind} {size / 2**20:.6g} MiB" for kind, size in traffic.items()
        ) + f" a chip; {_number(r['collective_ms'])} ms if nothing hides them"),
    ]
    rows += [("kernel", f"{k['ms']:8.2f} ms x{k['trips']:<4} {k['name']}")
             for k in r["kernels"]]
    rows += [("NOT COUNTED", f"kernel {name}") for name in r["unknown_kernels"]]
    rows += [("NOT COUNTED", f"{o['mib']:8.1f} MiB x{o['trips']:<4} {o['name']} "
              f"{o['result']} {o['op_name'][-60:]}") for o in r["unknown_ops"]]
    rows += [("COUNTED ONCE", f"loop {name}") for name in r["unknown_loops"]]
    rows += [("operation", f"{o['ms']:8.2f} ms x{o['trips']:<4} {o['name']} {o['result']} "
              f"{o['op_name'][-60:]}") for o in r["largest_ops"]]
  rows += [("to change", remedy) for remedy in r["remedies"]]
  versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
  rows.append(("compiled", f"in {r['compile_s']} s; {versions}"))
  lines = [f"{name:<14} {text}" for name, text in rows]
  return "\n".join([*lines, f"({r['label']})"])


def _place(
    config: Any, topology_name: str, batch_per_chip: int | None
) -> tuple[topology.Topology, dict[str, Any]]:
  """Returns the slice, and the config as it runs there."""
  slice_ = topology.describe(topology_name)
  plain = config_lib.as_plain(config)
  if batch_per_chip is not None:
    plain["train"]["batch_size"] = batch_per_chip * slice_.chips
  _check(plain, slice_)
  return slice_, plain


def _versions(*packages: str) -> dict[str, str]:
  return {package: importlib.metadata.version(package) for package in packages}


def _check(plain: Mapping[str, Any], slice_: topology.Topology) -> None:
  """Refuses what cannot run on the slice; what is said of data is left to a run."""
  try:
    config_lib.check_config(plain, device_count=slice_.chips)
  except config_lib.ConfigError as error:
    faults = [f for f in error.faults if not f.startswith(_ABOUT_DATA)]
    if faults:
      place = f"{slice_.name} ({slice_.chips} chips)"
      raise config_lib.ConfigError(f"{plain['name']} on {place}", faults) from error


def _memory(attempt: _Attempt, rows: int) -> dict[str, Any]:
  if rows in attempt.memory:
    memory = attempt.memory[rows]
    return {
        "fits": True, "peak_gib_per_chip": estimate.gib(memory.peak),
        "temp_gib": estimate.gib(memory.temporary),
        "argument_gib": estimate.gib(memory.arguments),
    }
  needed = attempt.refused[rows]
  return {
      "fits": False, "peak_gib_per_chip": needed and estimate.gib(needed),
      "temp_gib": None, "argument_gib": None,
  }


def _nothing_known() -> dict[str, Any]:
  """Returns the keys that only a compiled step, or a search, fills."""
  unknown = (
      "max_batch_per_chip", "max_batch_is_exact", "max_batch_peak_gib",
      "non_kernel_ms", "kernel_ms", "step_ms_bound", "mfu_bound", "collective_bytes",
      "collective_ms",
  )
  lists = (
      "largest_ops", "kernels", "unknown_kernels", "unknown_ops", "unknown_loops",
      "remedies",
  )
  return dict.fromkeys(unknown) | {name: [] for name in lists}


def _cost(
    text: str, slice_: topology.Topology, flops: float, top: int
) -> dict[str, Any]:
  cost = estimate.cost(text, slice_.chip, top=top)
  ideal_ms = 1e3 * flops / (slice_.chips * slice_.chip.bf16_flops)
  return {
      "non_kernel_ms": round(cost.non_kernel_ms, 3),
      "kernel_ms": round(cost.kernel_ms, 3),
      "step_ms_bound": round(cost.bound_ms, 3),
      "mfu_bound": round(ideal_ms / cost.bound_ms, 4),
      "collective_bytes": {k: int(v) for k, v in cost.collective_bytes.items()},
      "collective_ms": cost.collective_ms and round(cost.collective_ms, 3),
      "largest_ops": cost.largest_ops, "kernels": cost.kernels,
      "unknown_kernels": cost.unknown_kernels, "unknown_ops": cost.unknown_ops,
      "unknown_loops": cost.unknown_loops,
  }


def _remedies(plain: Mapping[str, Any], slice_: topology.Topology) -> list[str]:
  """Says what to change in a config that does not fit, what costs least first."""
  train, chips = plain["train"], slice_.chips
  rows, accum = train["batch_size"], train.get("accum", 1)
  found = []
  shares = chips // train.get("mesh_sequence", 1)
  smaller = [n for n in range(accum + 1, rows // shares + 1) if rows % (n * shares) == 0]
  if smaller:
    found.append(
        f"train.accum={smaller[0]} (is {accum}) holds {rows // smaller[0] // shares} "
        "rows a chip at a time, at the same global batch (or train.fit=auto chooses it)"
    )
  kept = {
      name: section["remat"] for name, section in (
          ("model", plain["model"]), ("objective.predictor",
                                      plain["objective"].get("predictor") or {}),
      ) if section.get("remat", "full") != "full"
  }
  found += [f"{name}.remat=full (is {value}) computes more and keeps less"
            for name, value in kept.items()]
  if train.get("mesh_fsdp", 1) < shares:
    found.append(
        f"train.mesh_fsdp={shares} (is {train.get('mesh_fsdp', 1)}) splits parameters, "
        "moments and EMA over all chips"
    )
  if rows > chips:
    found.append(f"train.batch_size={max(rows // 2 // chips, 1) * chips} (is {rows})")
  found.append("a slice of more chips, or of chips with more memory: v5p has 95 GiB")
  return found


def _whole(value: float) -> int | float:
  return int(value) if value == int(value) else round(value, 4)


def _number(value: float | None) -> str:
  return "unknown" if value is None else f"{value:.6g}"


def main(argv: list[str]) -> None:
  """Compiles what the flags say, and prints the table or one JSON object."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  logging.set_verbosity(logging.ERROR)
  jax.config.update("jax_platforms", "cpu")  # A TPU that is there is left alone.
  given = flags.FLAGS
  try:
    if given.fingerprint:
      print(fingerprint(
          given.config, given.topology, batch_per_chip=given.batch_per_chip
      ))
      return
    result = precompile(
        given.config, given.topology,
        name=config_flags.get_config_filename(given["config"]),
        batch_per_chip=given.batch_per_chip,
        max_batch=given.max_batch, top=given.top, keep_text=given.keep_text,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
  except (
      config_lib.ConfigError, topology.TopologyError, estimate.CompilerError,
  ) as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(2)
  print(json.dumps(result) if given.json else format_table(result), flush=True)
  sys.exit(0 if result["fits"] else 1)


if __name__ == "__main__":
  # Not at import: other verbs define --config too.
  config_flags.DEFINE_config_file(
      "config", None, "FILE.py[:ARG] of the experiment; --config.KEY=VALUE overrides.",
      lock_config=True,
  )
  flags.DEFINE_string("topology", None, "A slice, such as v4:2x2x4 or v5e:4x4.")
  flags.DEFINE_bool("json", False, "Prints one JSON object in place of the table.")
  flags.DEFINE_integer("batch_per_chip", None, "Volumes a chip.", lower_bound=1)
  flags.DEFINE_bool("max_batch", True, "Looks for the largest batch that fits.")
  flags.DEFINE_integer("top", 20, "Operations to list.", lower_bound=0)
  flags.DEFINE_bool(
      "fingerprint", False,
      "Prints a digest of all that decides the numbers, and compiles nothing.",
  )
  flags.DEFINE_string("keep_text", None, "File for the compiled program's text.")
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main)
