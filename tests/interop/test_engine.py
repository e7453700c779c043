"""The engine loads everything or says what is wrong, and runs nothing."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest

from vjepa_jax.interop import engine
from vjepa_jax.interop.engine import Rule

RNG = np.random.default_rng(0)
TABLE = (
    Rule("embed.weight", ("embed/kernel",), engine.patch_conv((2, 3, 4))),
    Rule("layer.{i}.weight", ("stack/kernel",), engine.LINEAR),
    Rule(
        "layer.{i}.qkv.weight",
        ("stack/query", "stack/key", "stack/value"), engine.JOINED_LINEAR,
    ),
    Rule(
        "layer.{i}.qkv.bias", ("stack/bq", "stack/bk", "stack/bv"), engine.JOINED_BIAS
    ),
    Rule("layer.{i}.out.weight", ("stack/out",), engine.OUT_LINEAR),
    Rule("token.{i}", ("tokens",), engine.leading_ones(2)),
)


def ours():
  """A tree with two layers; 2 heads of 3; patches of 2 x 3 x 4 x 5 channels."""
  draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
  stack = {name: draw(2, 6, 2, 3) for name in ("query", "key", "value")}
  stack |= {name: draw(2, 2, 3) for name in ("bq", "bk", "bv")}
  stack |= {"kernel": draw(2, 6, 8), "out": draw(2, 2, 3, 6)}
  return {"embed": {"kernel": draw(120, 6)}, "stack": stack, "tokens": draw(3, 6)}


def test_saving_and_loading_come_back_bit_for_bit():
  params = ours()
  theirs = engine.save(TABLE, params)
  assert {name: a.shape for name, a in theirs.items()} == {
      "embed.weight": (6, 5, 2, 3, 4), "token.0": (1, 1, 6), "token.1": (1, 1, 6),
      "token.2": (1, 1, 6),
      **{
          f"layer.{i}.{name}": shape for i in (0, 1) for name, shape in (
              ("weight", (8, 6)), ("qkv.weight", (18, 6)), ("qkv.bias", (18,)),
              ("out.weight", (6, 6)),
          )
      },
  }
  loaded, report = engine.load(TABLE, theirs, params)
  assert report.complete and len(report.matched) == len(theirs)
  for key in ("embed", "stack"):
    for name in params[key]:
      np.testing.assert_array_equal(loaded[key][name], params[key][name])
  np.testing.assert_array_equal(loaded["tokens"], params["tokens"])


def test_joined_projections_compute_what_their_matrix_computes():
  params = ours()
  theirs = engine.save(TABLE, params)
  x = RNG.normal(size=6)
  # Rows of theirs: q of all heads, then k, then v.
  joined = theirs["layer.1.qkv.weight"] @ x + theirs["layer.1.qkv.bias"]
  for part, (w, b) in zip(
      joined.reshape(3, 2, 3), (("query", "bq"), ("key", "bk"), ("value", "bv"))
  ):
    own = np.einsum("d,dhk->hk", x, params["stack"][w][1]) + params["stack"][b][1]
    np.testing.assert_allclose(part, own, rtol=1e-5)
  heads = RNG.normal(size=(2, 3))
  np.testing.assert_allclose(
      theirs["layer.1.out.weight"] @ heads.reshape(-1),
      np.einsum("hk,hkd->d", heads, params["stack"]["out"][1]), rtol=1e-5,
  )


def test_every_fault_is_reported_at_once():
  params = ours()
  theirs = engine.save(TABLE, params)
  del theirs["layer.1.weight"]
  theirs["layer.2.out.weight"] = theirs["layer.0.out.weight"]
  theirs["head.weight"] = np.zeros(3)
  theirs["layer.0.qkv.bias"] = np.zeros(17)
  theirs["token.1"] = np.zeros((1, 6))
  theirs["pos_embed"] = np.zeros(3)
  with pytest.raises(ValueError) as caught:
    engine.load(TABLE, theirs, params, ignore=("pos_.*",))
  message = str(caught.value)
  for fault in (
      "missing: stack/kernel (from layer.1.weight)",
      "unexpected: layer.2.out.weight",
      "unexpected: head.weight",
      "misshapen: layer.0.qkv.bias (17,) does not fit stack/bq (2, 3)",
      "misshapen: token.1 (1, 6) does not fit tokens (6,)",
      "1 ignored",
  ):
    assert fault in message
  assert message.count("\n") == 5


def test_a_path_that_nothing_fills_is_missing():
  params = ours()
  theirs = engine.save(TABLE, params)
  grown = {**params, "cls": np.zeros((1, 6))}
  with pytest.raises(ValueError, match="missing: cls"):
    engine.load(TABLE, theirs, grown)
  loaded, report = engine.load(TABLE, theirs, grown, strict=False)
  assert report.missing == ["cls"] and loaded["cls"] is grown["cls"]


def test_saving_refuses_paths_without_a_rule():
  with pytest.raises(ValueError, match="no rule of the table takes cls"):
    engine.save(TABLE, {**ours(), "cls": np.zeros(3)})


# Files made byte by byte as torch makes them, so that no torch is needed.


class _Name:
  """Pickles as a global of torch, which need not exist here."""

  def __init__(self, module, name):
    self.module, self.name = module, name


class _Pickler(pickle._Pickler):
  def persistent_id(self, value):
    return value.saved_id if isinstance(value, _Reference) else None

  def save_global_name(self, value):
    self.write(f"c{value.module}\n{value.name}\n".encode())

  dispatch = {**pickle._Pickler.dispatch, _Name: save_global_name}


class _Reference:
  def __init__(self, *saved_id):
    self.saved_id = saved_id


class _Tensor:
  def __init__(self, key, size, shape, stride, offset=0, kind="FloatStorage"):
    self.call = (
        _Reference("storage", _Name("torch", kind), key, "cpu", size),
        offset, shape, stride, False, collections.OrderedDict(),
    )


def save_tensor(pickler, tensor):
  pickler.save_global_name(_Name("torch._utils", "_rebuild_tensor_v2"))
  pickler.save(tensor.call)
  pickler.write(b"R")


_Pickler.dispatch[_Tensor] = save_tensor


def write(path, tree, storages, order=b"little"):
  with zipfile.ZipFile(path, "w") as file:
    with file.open("model/data.pkl", "w") as stream:
      _Pickler(stream, protocol=2).dump(tree)
    file.writestr("model/byteorder", order)
    for key, values in storages.items():
      file.writestr(f"model/data/{key}", values.tobytes())
  return path


def test_strided_and_shared_storages_are_read(tmp_path):
  values = np.arange(12, dtype=np.float32)
  tree = {
      "epoch": 3, "none": None,
      "state": collections.OrderedDict(
          a=_Tensor("0", 12, (3, 4), (4, 1)), t=_Tensor("0", 12, (4, 3), (1, 4)),
          tail=_Tensor("0", 12, (2,), (1,), offset=10),
          scalar=_Tensor("0", 12, (), (), offset=5),
          empty=_Tensor("0", 12, (0, 3), (3, 1)),
      ),
  }
  read = engine.read_torch(write(tmp_path / "x.pt", tree, {"0": values}))
  assert read["epoch"] == 3 and read["none"] is None
  state = read["state"]
  np.testing.assert_array_equal(state["a"], values.reshape(3, 4))
  np.testing.assert_array_equal(state["t"], values.reshape(3, 4).T)
  np.testing.assert_array_equal(state["tail"], [10, 11])
  assert state["scalar"].shape == () and state["scalar"] == 5
  assert state["empty"].shape == (0, 3)


def test_half_precision_storages_are_read(tmp_path):
  bits = np.array([0x3F80, 0xC000], np.uint16)  # 1 and -2 in bfloat16
  tree = {"b": _Tensor("0", 2, (2,), (1,), kind="BFloat16Storage")}
  read = engine.read_torch(write(tmp_path / "x.pt", tree, {"0": bits}))
  np.testing.assert_array_equal(read["b"].astype(np.float32), [1.0, -2.0])


def test_a_file_that_would_run_code_is_refused(tmp_path):
  class Attack:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "harm"),)

  path = write(tmp_path / "x.pt", {"a": Attack()}, {})
  with pytest.raises(ValueError, match="mkdir, which is not a tensor"):
    engine.read_torch(path)
  assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        _Tensor("0", 99, (3, 5), (5, 1)),
        _Tensor("0", 99, (2,), (1,), offset=11),
        _Tensor("0", 99, (2,), (1,), offset=-1),
        _Tensor("0", 99, (2,), (-1,), offset=5),
    ],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, tensor):
  path = write(tmp_path / "x.pt", {"a": tensor}, {"0": np.zeros(12, np.float32)})
  with pytest.raises(ValueError, match="beyond its storage of 12"):
    engine.read_torch(path)


def test_other_files_are_refused_by_name(tmp_path):
  path = tmp_path / "old.pt"
  path.write_bytes(pickle.dumps({"a": 1}))
  with pytest.raises(ValueError, match=r"old\.pt is not a zip file"):
    engine.read_torch(path)
  path = write(tmp_path / "big.pt", {}, {}, order=b"big")
  with pytest.raises(ValueError, match="byte order b'big'"):
    engine.read_torch(path)
  path = write(tmp_path / "cut.pt", {"a": _Tensor("7", 2, (2,), (1,))}, {})
  with pytest.raises(ValueError, match=r"cut\.pt.*data/7"):
    engine.read_torch(path)
