"""Files that are no TimeSformer or VideoMAE, and models that they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from vjepa_jax.backbones import vit
from vjepa_jax.interop import engine, timesformer, videomae


def test_safetensors_are_read_from_a_folder_or_a_file_and_refused_cut_short(tmp_path):
  arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
  file = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(arrays, file)
  for path in (tmp_path, file):
    found = engine.read_safetensors(path)
    assert set(found) == {"a.weight"}
    np.testing.assert_array_equal(found["a.weight"], arrays["a.weight"])
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(ValueError, match="model.safetensors.*fetch it again"):
    engine.read_safetensors(tmp_path)


@pytest.mark.parametrize("family", [timesformer, videomae])
def test_a_file_of_another_family_is_refused_with_its_names(tmp_path, family):
  safetensors.numpy.save_file(
      {"vit.layer.weight": np.zeros((2, 2), np.float32)},
      tmp_path / "model.safetensors",
  )
  with pytest.raises(ValueError, match="holds no .*vit.layer.weight"):
    family.read(tmp_path)


def test_patches_that_a_published_kernel_cannot_have_are_refused():
  with pytest.raises(ValueError, match=r"\(1, 1, py, px\)"):
    timesformer.encoder_table((1, 8, 16, 16))
  with pytest.raises(ValueError, match="one axis for T and Z"):
    videomae.encoder_table((2, 2, 16, 16))


def test_a_model_with_a_key_bias_lacks_what_videomae_has_none_of(shared):
  path = shared("fixtures/parity/hf_videomae_classification/hf")
  weights = videomae.read(path)
  assert set(weights) == {"encoder", "head"}
  model = vit.ViT(
      width=48, depth=2, heads=4, patch=(2, 1, 8, 8), positions="flat", mlp_ratio=2.0,
      final_norm=False,
  )
  volume = jnp.zeros((1, 4, 1, 16, 16, 3))
  like = jax.eval_shape(lambda: model.init(jax.random.key(0), volume))["params"]
  with pytest.raises(ValueError, match="missing: stack/blocks/attn/key/bias"):
    videomae.load_encoder(weights["encoder"], like, model.patch)
