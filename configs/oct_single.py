"""V-JEPA 2 on retinal OCT of one device, from DICOM.

As configs/oct_multi.py, on the records of one device (Topcon Triton, as in the
OCT project; another: `--config.data.filters.device="('zeiss_cirrus',)"`) and for
120 epochs.

  python -m vjepa_jax.main --config=configs/oct_single.py --workdir=runs/triton \
    --config.data.manifest=/data/oct/manifest.tsv

The arms are those of configs/oct_multi.py.
"""

import ml_collections

from configs import oct_multi


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """Returns the config of the given arms."""
  config = oct_multi.get_config(arg)
  with config.unlocked():
    config.name = "oct_single"
    config.data.filters.device = ("topcon_triton",)
    if "total_epochs" in config.train:
      config.train.total_epochs = 120  # seed
  return config
