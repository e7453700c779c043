"""The arrows between the rooms, read from the imports."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vjepa_jax"

# room -> rooms of ours that its files may import
ALLOWED = {
    "compiler": set(),
    "volumes": set(),
    "nn": {"volumes"},
    "backbones": {"volumes", "nn"},
    "objectives": {"volumes", "nn", "backbones"},
    "data": set(),
    "train": {"objectives", "evaluators", "compiler", "nn"},
    "evaluators": {"data", "volumes", "report"},
    "report": {"volumes"},
    "interop": {"volumes", "nn", "backbones"},
}
# "bench" and the files at the root see everything.
NO_JAX = {"data", "report"}
JAX = {"jax", "flax", "optax", "orbax", "clu"}
CONFIG_IMPORTS = {"ml_collections", "configs"}


def imports(path: pathlib.Path) -> set[str]:
  """Returns the dotted names that a file imports anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
  return found


def files(room: str) -> list[pathlib.Path]:
  return sorted((PACKAGE / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(room):
  assert files(room)
  for path in files(room):
    for name in imports(path):
      parts = name.split(".")
      if parts[0] != "vjepa_jax" or len(parts) == 1:
        continue
      assert parts[1] in ALLOWED[room] | {room}, f"{path.name} imports {name}"


def test_of_the_layers_training_knows_only_where_weights_lie():
  for path in files("train"):
    named = {n for n in imports(path) if n.startswith("vjepa_jax.nn.")}
    assert all(n.startswith("vjepa_jax.nn.placement") for n in named), path.name


@pytest.mark.parametrize("room", sorted(NO_JAX))
def test_host_side_rooms_never_import_jax(room):
  for path in files(room):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & JAX, f"{path.name} imports {roots & JAX}"


def test_objectives_import_no_named_backbone_and_not_each_other():
  own = {p.stem for p in files("objectives")} - {"base", "__init__"}
  for path in files("objectives"):
    for name in imports(path):
      if name.startswith("vjepa_jax.backbones."):
        assert name.split(".")[2] == "base", f"{path.name} imports {name}"
      if name.startswith("vjepa_jax.objectives."):
        assert name.split(".")[2] not in own - {path.stem}, f"{path.name}: {name}"


def test_train_names_no_objective_and_no_evaluator():
  for path in files("train"):
    for name in imports(path):
      if name.startswith(("vjepa_jax.objectives.", "vjepa_jax.evaluators.")):
        assert name.split(".")[2] == "base", f"{path.name} imports {name}"


def test_configs_import_only_ml_collections_and_their_own_kind():
  paths = sorted((ROOT / "configs").glob("*.py"))
  assert paths
  for path in paths:
    outside = {n.split(".")[0] for n in imports(path)} - CONFIG_IMPORTS
    assert outside <= {"difflib"}, f"{path.name} imports {outside}"


def test_only_config_turns_strings_into_imports():
  for path in sorted(PACKAGE.rglob("*.py")):
    if path.parent == PACKAGE / "config":
      continue
    called = {
        node.func.attr for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert "import_module" not in called, path.name
