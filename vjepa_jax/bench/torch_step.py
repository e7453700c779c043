"""A training step of V-JEPA 2: ours beside PyTorch's, in turn, in one run.

python -m vjepa_jax.bench.torch_step --tokens=64|512|2048 [--rounds=9] [--json]
python -m vjepa_jax.bench.torch_step --tokens=9216 --device=cuda --dtype=bfloat16 \
    --torch=sdpa,compile --rounds=9 --json

Needs the extra `bench` (torch, transformers). The peer is `VJEPA2Model` of
`transformers`: its own modules, called as facebookresearch/vjepa2 trains them. Both
sides have the same sizes, heads, number of parameters, volumes and masks, and do the
same: the target encoder on every token, the context encoder on the visible ones, the
predictor on all, L1 on normalised targets, backward, AdamW (PyTorch's fused one), EMA.

What differs: PyTorch embeds every patch and then drops the hidden ones, as upstream
does; ours also takes the norm of the gradient, guards against non-finite steps and
computes its metrics. Here PyTorch is spared upstream's sort of the predictor's tokens.

Each side is a process of its own, for three reasons: OpenMP's threads of one library
would spin while the other runs, the CPU seconds and the memory of a side are those of
its process, and a GPU's memory has one owner at a time. They are alive together and
take turns: one waits, without a thread running, while the other takes its steps.

Both sides get the same malloc. A step's temporaries are new memory each time, and
their page faults cost ours up to a fifth of a step; with --huge_pages (the default)
glibc asks the kernel for larger pages, as `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` does
for any program.
"""

from collections.abc import Mapping, Sequence
import copy
import dataclasses
import importlib.metadata
import multiprocessing
import os
import resource
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from vjepa_jax.backbones.vit import ViT
from vjepa_jax.bench import common
from vjepa_jax.compiler import chips
from vjepa_jax.objectives.vjepa import TARGET_EPS, VJEPA
from vjepa_jax.train import optim, program, sharding
from vjepa_jax.volumes.grid import Grid
from vjepa_jax.volumes.masks import Split

ARMS = ("eager", "sdpa", "compile")
RATE, DECAY, MOMENTUM = 6e-4, 0.04, 0.99925
# Once a side has answered, its threads may spin a little before they sleep.
_SETTLE_S = 0.1
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Geometry:
  """What is trained on what.

  Attributes:
    voxels: (Z, Y, X) of a volume of one channel; Y equals X, as PyTorch's model wants.
    patch: (pz, py, px), py equal to px.
    batch: volumes a step.
    width, depth, heads: of the encoder.
    predictor: (width, depth, heads) of the predictor.
  """

  voxels: tuple[int, int, int]
  patch: tuple[int, int, int]
  batch: int
  width: int = 192
  depth: int = 6
  heads: int = 3
  predictor: tuple[int, int, int] = (96, 6, 3)

  @property
  def grid(self) -> Grid:
    """The tokens, with one in time."""
    return Grid((1, *self.voxels), (1, *self.patch))

  @property
  def context(self) -> int:
    """Visible tokens of a volume, a third of all; the others are predicted."""
    return self.grid.tokens // 3

  def model_flops(self) -> float:
    """Products of a step, as multiplications and additions, nothing twice.

    Forward of the target encoder, and three times (forward, and backward to inputs
    and weights) context encoder and predictor.
    """
    tokens, patch = self.grid.tokens, int(np.prod(self.patch))

    def stack(count, width, depth):
      return depth * (24 * count * width**2 + 4 * count**2 * width)

    encode = lambda n: 2 * n * patch * self.width + stack(n, self.width, self.depth)
    width, depth, _ = self.predictor
    predict = stack(tokens, width, depth) + 4 * tokens * width * self.width
    return self.batch * (encode(tokens) + 3 * (encode(self.context) + predict))


GEOMETRIES = {
    64: Geometry((8, 64, 64), (2, 16, 16), 8),
    512: Geometry((16, 128, 128), (2, 16, 16), 8),
    2048: Geometry((16, 128, 128), (2, 8, 8), 2),
    9216: Geometry((64, 384, 384), (4, 16, 16), 8, 768, 12, 12, (384, 12, 12)),
}


def make_batch(geometry: Geometry, seed: int = 0) -> dict[str, np.ndarray]:
  """Draws volumes and masks.

  Returns:
    volume float32 [B, 1, Z, Y, X, 1]; context_ids int32 [B, K] and target_ids int32
    [B, N - K], ascending; `_mask` float32 [B], ones.
  """
  rng = np.random.default_rng(seed)
  rows, kept = geometry.batch, geometry.context
  order = rng.permuted(np.tile(np.arange(geometry.grid.tokens), (rows, 1)), axis=1)
  return {
      "volume": rng.standard_normal((rows, 1, *geometry.voxels, 1), np.float32),
      "context_ids": np.sort(order[:, :kept]).astype(np.int32),
      "target_ids": np.sort(order[:, kept:]).astype(np.int32),
      "_mask": np.ones(rows, np.float32),
  }


class GivenMasks(VJEPA):
  """The objective with the masks of the batch, so that both sides have the same."""

  def draw_masks(self, batch, key):
    del key
    return (Split(batch["context_ids"], batch["target_ids"]),)


def make_ours(
    geometry: Geometry, *, dtype: str = "float32", **options: Any
) -> program.Program:
  """Builds our step, the very one of the training loop.

  Args:
    geometry: of the model and the batch.
    dtype: compute type.
    **options: of both stacks: attention, attention_chunk, remat, unroll, rope_layout.
  """
  width, depth, heads = geometry.predictor
  objective = GivenMasks(
      backbone=ViT(
          geometry.width, geometry.depth, (1, *geometry.patch), geometry.heads,
          dtype=dtype, **options,
      ),
      masks={"all": dict(kind="random", context=0.33, target=0.67)},
      predictor=dict(
          kind="transformer", width=width, depth=depth, heads=heads, dtype=dtype,
          **options,
      ),
      momentum_start=MOMENTUM, momentum_end=MOMENTUM,
  )
  return program.make_program(
      objective=objective,
      optimizer=optim.make_optimizer(learning_rate=RATE, weight_decay=DECAY),
      augment=lambda batch, key, *, train: batch,
      batch=make_batch(geometry),
      mesh=sharding.make_mesh(),
  )


class TorchStep:
  """PyTorch's side: calling it takes a step and returns its loss.

  Args:
    geometry: of the model and the batch.
    batch: of `make_batch`.
    arm: "eager", "sdpa" (its fused attention) or "compile" (sdpa, compiled).
    device: "cpu" or "cuda".
    dtype: compute type; parameters stay float32 (autocast).
  """

  def __init__(
      self,
      geometry: Geometry,
      batch: Mapping[str, np.ndarray],
      *,
      arm: str = "sdpa",
      device: str = "cpu",
      dtype: str = "float32",
  ):
    import torch
    from torch.nn import functional

    self._torch, self._functional = torch, functional
    self._device, self._dtype = device, dtype
    torch.manual_seed(0)
    self.model = _torch_model(geometry, "eager" if arm == "eager" else "sdpa")
    self.model = self.model.to(device).train()
    self.target = copy.deepcopy(self.model.encoder).requires_grad_(False)
    self._optimizer = torch.optim.AdamW(
        _decay_groups(self.model), lr=RATE, weight_decay=DECAY, fused=True
    )
    on_device = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device)
    self._video = on_device(batch["volume"][:, 0, :, None, :, :, 0])  # [B, Z, C, Y, X]
    self._context = on_device(batch["context_ids"].astype(np.int64))
    self._hidden = on_device(batch["target_ids"].astype(np.int64))
    self._loss = torch.compile(self.loss) if arm == "compile" else self.loss

  def __call__(self) -> float:
    torch = self._torch
    loss = self._loss()
    loss.backward()
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
      torch._foreach_lerp_(
          list(self.target.parameters()), list(self.model.encoder.parameters()),
          1.0 - MOMENTUM,
      )
    return loss.item()

  def loss(self) -> Any:
    """Mean absolute difference of predicted and normalised target features."""
    torch, functional = self._torch, self._functional
    low = self._dtype != "float32"
    with torch.autocast(self._device, getattr(torch, self._dtype), enabled=low):
      with torch.no_grad():
        features = self._encode(self.target)
        features = functional.layer_norm(
            features.float(), features.shape[-1:], eps=TARGET_EPS
        )
      context = self._encode(self.model.encoder, self._context)
      prediction = self._predict(self.model.predictor, context)
    wanted = _gather(features, self._hidden)
    return (prediction.float() - wanted).abs().mean()

  def _encode(self, encoder, ids=None):
    tokens = encoder.embeddings(self._video)
    if ids is not None:
      tokens = _gather(tokens, ids)
    for layer in encoder.layer:
      tokens = layer(tokens, ids)[0]
    return encoder.layernorm(tokens)

  def _predict(self, predictor, context):
    hidden = predictor.embeddings.mask_tokens[0].expand(*self._hidden.shape, -1)
    tokens = predictor.embeddings.predictor_embeddings(context)
    tokens = self._torch.cat([tokens, hidden.to(tokens.dtype)], dim=1)
    ids = self._torch.cat([self._context, self._hidden], dim=1)
    for layer in predictor.layer:
      tokens = layer(tokens, ids)[0]
    tokens = predictor.layernorm(tokens)[:, context.shape[1] :]
    return predictor.proj(tokens)


def published_names(model: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns encoder and predictor of a `VJEPA2Model` under upstream's names.

  `interop.vjepa.load_encoder` and `load_predictor` take them.
  """
  parts = ({}, {})
  renames = (
      ("embeddings.patch_embeddings.", "patch_embed."),
      ("embeddings.predictor_embeddings.", "predictor_embed."),
      (".attention.", ".attn."), ("layernorm.", "norm."), ("layer.", "blocks."),
  )
  for name, value in model.state_dict().items():
    component, name = name.split(".", 1)
    for theirs, published in renames:
      name = name.replace(theirs, published)
    if component == "predictor" and name.startswith(("blocks.", "norm.", "proj.")):
      name = f"predictor_{name}"
    parts[component == "predictor"][name] = value.detach().cpu().numpy().copy()
  return _joined_heads(parts[0]), _joined_heads(_split_tokens(parts[1]))


def compare(
    *,
    geometry: Geometry,
    arms: Sequence[str],
    device: str = "cpu",
    dtype: str = "float32",
    rounds: int = 9,
    steps: int = 3,
    threads: int = 2,
    ours: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Lets our side and each arm take steps in turn.

  Args:
    geometry: of both sides.
    arms: of ARMS.
    device: "cpu" or "cuda".
    dtype: compute type of both.
    rounds: timed rounds, at least 5, after one that is not.
    steps: of a side in a round.
    threads: cores that a side may use, on a CPU.
    ours: further options of `make_ours`.

  Returns:
    {"sides": {name: about and times of it}, "turns": {name: [wall, cpu and loss of a
    turn]}, "ratios": {arm: theirs over ours}}.

  Raises:
    ValueError: fewer than 5 rounds, an unknown arm, or sides that differ in the
      number of their parameters.
    RuntimeError: if a side fails; its own words are on stderr.
  """
  if rounds < 5:
    raise ValueError(f"bench: rounds={rounds}; at least 5 are needed for a spread")
  if not set(arms) <= set(ARMS):
    raise ValueError(f"bench: torch={list(arms)}; the arms are {', '.join(ARMS)}")
  shared = dict(
      geometry=geometry, device=device, dtype=dtype, threads=threads, steps=steps
  )
  names = ("ours", *arms)
  workers = {}
  try:
    for name in names:
      workers[name] = _Worker(name, {**shared, "ours": dict(ours or {})})
    counts = {name: worker.about["parameters"] for name, worker in workers.items()}
    if len(set(counts.values())) > 1:
      raise ValueError(f"bench: the sides differ in parameters: {counts}")
    turns = {name: [] for name in names}
    for number in range(rounds + 1):
      # Every other round backwards: no side always follows the same one.
      for name in names if number % 2 else names[::-1]:
        turn = workers[name].turn()
        if number:
          turns[name].append(turn)
    sides = {
        name: workers[name].about | _summary(turns[name], workers[name].memory())
        for name in names
    }
  finally:
    for worker in workers.values():
      worker.stop()
  return {"sides": sides, "turns": turns, "ratios": _ratios(turns)}


class _Worker:
  """One side in a process of its own."""

  def __init__(self, name, options):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
        target=_serve, args=(theirs, name, options), daemon=True
    )
    self._process.start()
    theirs.close()
    self.name = name
    self.about = self._receive()

  def turn(self) -> dict[str, float]:
    time.sleep(_SETTLE_S)
    self._pipe.send("turn")
    return self._receive()

  def memory(self) -> int:
    self._pipe.send("memory")
    return self._receive()

  def stop(self) -> None:
    self._pipe.close()
    self._process.join(5)
    if self._process.is_alive():
      self._process.kill()

  def _receive(self):
    try:
      return self._pipe.recv()
    except EOFError:
      self._process.join(5)
      raise RuntimeError(
          f"bench: side {self.name!r} ended with exit code {self._process.exitcode}; "
          "its own words are above"
      ) from None


def _serve(pipe, name: str, options: Mapping[str, Any]) -> None:
  """Builds a side, tells of it, and takes steps whenever asked."""
  threads, device = options["threads"], options["device"]
  if device == "cpu" and hasattr(os, "sched_setaffinity"):
    # XLA and OpenMP both take as many threads as there are cores for them.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  build = _our_side if name == "ours" else _torch_side
  step, memory, parameters = build(name, options)
  begin = time.perf_counter()
  losses = [step()]
  about = {"parameters": parameters, "first_step_s": time.perf_counter() - begin}
  pipe.send(about | {"loss": losses[0]})
  while True:
    try:
      asked = pipe.recv()
    except EOFError:
      return
    if asked == "memory":
      pipe.send(memory())
      continue
    begin, begin_cpu = time.perf_counter(), time.process_time()
    for _ in range(options["steps"]):
      loss = step()
    pipe.send({
        "wall": (time.perf_counter() - begin) / options["steps"],
        "cpu": (time.process_time() - begin_cpu) / options["steps"],
        "loss": loss,
    })


def _our_side(name, options):
  del name
  geometry = options["geometry"]
  made = make_ours(geometry, dtype=options["dtype"], **options["ours"])
  state = [made.init(jax.random.key(0))]
  batch = sharding.put_batch(make_batch(geometry), made.mesh)

  def step() -> float:
    state[0], metrics = made.step(state[0], batch)
    total, weight = metrics["loss"]
    jax.block_until_ready(state[0])
    return float(total / weight)

  def memory() -> int:
    found = jax.devices()[0].memory_stats()
    return found["peak_bytes_in_use"] if found else _resident()

  count = sum(leaf.size for leaf in jax.tree.leaves(made.state.params))
  return step, memory, count


def _torch_side(name, options):
  import torch

  torch.set_num_threads(options["threads"])
  geometry, device = options["geometry"], options["device"]
  taken = TorchStep(
      geometry, make_batch(geometry), arm=name, device=device, dtype=options["dtype"]
  )
  count = sum(p.numel() for p in taken.model.parameters())
  memory = torch.cuda.max_memory_allocated if device == "cuda" else _resident
  return taken, memory, count


def _resident() -> int:
  """Most bytes this process has held, its libraries included."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _summary(turns, memory):
  numbers = {"loss_last": turns[-1]["loss"], "peak_gib": memory / 2**30}
  for key in ("wall", "cpu"):
    values = [turn[key] for turn in turns]
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    numbers[f"{key}_s"] = {"median": median, "p10": p10, "p90": p90}
  return numbers


def _ratios(turns):
  """Theirs over ours, round by round; above 1 ours is quicker."""
  ratios = {}
  for name, values in turns.items():
    if name == "ours":
      continue
    ratios[name] = {}
    for key in ("wall", "cpu"):
      of_rounds = [
          theirs[key] / mine[key] for theirs, mine in zip(values, turns["ours"])
      ]
      p10, median, p90 = np.percentile(of_rounds, [10, 50, 90])
      ratios[name][key] = {"median": median, "p10": p10, "p90": p90}
  return ratios


def _torch_model(geometry, attention):
  from transformers import VJEPA2Config, VJEPA2Model

  depth, side, _ = geometry.voxels
  width, layers, heads = geometry.predictor
  return VJEPA2Model(VJEPA2Config(
      patch_size=geometry.patch[1], crop_size=side, frames_per_clip=depth,
      tubelet_size=geometry.patch[0], in_chans=1, hidden_size=geometry.width,
      num_attention_heads=geometry.heads, num_hidden_layers=geometry.depth,
      pred_hidden_size=width, pred_num_attention_heads=heads,
      pred_num_hidden_layers=layers, pred_num_mask_tokens=1,
      pred_zero_init_mask_tokens=False, attn_implementation=attention,
  ))


def _decay_groups(model):
  """Biases and norms, the parameters of one axis, do not decay."""
  parameters = list(model.parameters())
  return [
      {"params": [p for p in parameters if p.ndim > 1]},
      {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
  ]


def _gather(tokens, ids):
  return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


def _split_tokens(arrays):
  """Upstream keeps one array a mask token."""
  tokens = arrays.pop("embeddings.mask_tokens")
  return arrays | {f"mask_tokens.{i}": token for i, token in enumerate(tokens)}


def _joined_heads(arrays):
  """Upstream has one projection for query, key and value."""
  joined = {}
  for name, value in arrays.items():
    if ".attn.query." in name:
      others = (arrays[name.replace(".query.", part)] for part in (".key.", ".value."))
      joined[name.replace(".query.", ".qkv.")] = np.concatenate([value, *others])
    elif ".attn.key." not in name and ".attn.value." not in name:
      joined[name] = value
  return joined


def mfu(geometry: Geometry, dtype: str, seconds: float, kind: str) -> float | None:
  """Share of a chip's bfloat16 peak that the model's own products take.

  None where the chip is unknown, or the type is another.
  """
  chip = chips.of_kind(kind)
  if chip is None or dtype != "bfloat16":
    return None
  return geometry.model_flops() / seconds / chip.bf16_flops


def table(found: Mapping[str, Any]) -> str:
  """Returns the result of `compare` as lines to read."""
  lines = [f"{'side':10}{'wall ms':>10}{'CPU ms':>10}{'first s':>10}{'peak GiB':>10}"]
  for name, side in found["sides"].items():
    wall, cpu = (1e3 * side[key]["median"] for key in ("wall_s", "cpu_s"))
    lines.append(
        f"{name:10}{wall:10.1f}{cpu:10.1f}{side['first_step_s']:10.1f}"
        f"{side['peak_gib']:10.2f}"
    )
  for arm, ratio in found["ratios"].items():
    lines.append(
        f"{arm} over ours: wall {ratio['wall']['median']:.2f}, "
        f"CPU {ratio['cpu']['median']:.2f}"
    )
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  """Compares and prints a table, or one JSON line."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; flags begin with --")
  values = flags.FLAGS
  # Set for this process and those that it starts; nothing has touched a device yet.
  os.environ["JAX_PLATFORMS"] = values.device
  jax.config.update("jax_platforms", values.device)
  if values.huge_pages:
    os.environ.update(_HUGE_PAGES)
  # Both sides are alive at once: none may take the whole device beforehand.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  try:
    peers = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
  except importlib.metadata.PackageNotFoundError as error:
    raise app.UsageError(
        f"{error}; pip install \"vjepa_jax[bench]\""
    ) from error
  geometry = GEOMETRIES[int(values.tokens)]
  if values.batch:
    geometry = dataclasses.replace(geometry, batch=values.batch)
  found = compare(
      geometry=geometry, arms=values.torch, device=values.device, dtype=values.dtype,
      rounds=values.rounds, steps=values.steps, threads=values.threads,
      ours={name: values[name].value for name in ("attention", "remat", "unroll")},
  )
  chip = jax.devices()[0].device_kind
  for side in found["sides"].values():
    side["mfu"] = mfu(geometry, values.dtype, side["wall_s"]["median"], chip)
  if not values.json:
    print(table(found), f"load {os.getloadavg()[0]:.1f}", sep="\n")
    return
  ours = [turn["wall"] for turn in found["turns"]["ours"]]
  cpu = [turn["cpu"] for turn in found["turns"]["ours"]]
  common.emit(common.line(
      "torch_step", f"{values.tokens} tokens", ours, cpu, batch=geometry.batch,
      dtype=values.dtype, threads=values.threads, steps=values.steps, peers=peers,
      tunables=os.environ.get("GLIBC_TUNABLES"),
      model_tflop=geometry.model_flops() / 1e12, sides=found["sides"],
      ratios=found["ratios"],
  ))


if __name__ == "__main__":
  flags.DEFINE_enum("tokens", "64", [str(n) for n in GEOMETRIES], "Tokens a volume.")
  flags.DEFINE_integer("batch", 0, "Volumes a step; 0: the geometry's.", lower_bound=0)
  flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "Where both sides run.")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
  flags.DEFINE_list("torch", ["sdpa"], f"PyTorch's arms, of {', '.join(ARMS)}.")
  flags.DEFINE_integer("rounds", 9, "Turns of each side.", lower_bound=5)
  flags.DEFINE_integer("steps", 3, "Steps of a turn.", lower_bound=1)
  flags.DEFINE_integer("threads", 2, "Cores of a side on a CPU.", lower_bound=1)
  flags.DEFINE_string("attention", "auto", "Ours: of `nn.attention.attend`.")
  flags.DEFINE_string("remat", "none", "Ours: of `nn.blocks.Stack`.")
  flags.DEFINE_integer("unroll", 1, "Ours: of `nn.blocks.Stack`.", lower_bound=1)
  flags.DEFINE_bool("huge_pages", True, "Both sides: malloc in pages of 2 MiB.")
  flags.DEFINE_bool("json", False, "One JSON line instead of a table.")
  app.run(main)
