"""Real scans beside the checkout: each read, or refused for a stated reason."""

import numpy as np

from vjepa_jax import data

_REFUSED = {
    "MANIFEST.tsv": "unsupported_format",
    "ivoct_pullback_186x250x250.npz": "several_series",
    "oct_bscan_circle_layers_mit.npz": "several_series",
    "v1_calcium_spontaneous.npz": "several_series",
}


def test_every_real_file_is_read_or_refused_for_a_stated_reason(shared):
  paths = sorted(shared("data").iterdir())
  refused, read = {}, {}
  for path in paths:
    try:
      read[path.name] = data.read(str(path))
    except data.ReadError as error:
      refused[path.name] = error.reason
      assert error.path == str(path) and error.remedy
  assert refused == {k: v for k, v in _REFUSED.items() if k in {p.name for p in paths}}
  assert len(read) >= 9
  for name, record in read.items():
    assert record.volume.ndim == 5 and record.std > 0, name
    assert np.isfinite(record.volume).all(), name
    known = record.spacing[~np.isnan(record.spacing)]
    assert (known > 0).all() and "spacing_source" in record.meta, name


def test_the_named_array_of_a_file_of_several_is_read(shared):
  path = str(shared("data/ivoct_pullback_186x250x250.npz"))
  with np.load(path) as arrays:
    wanted = arrays["vol"]
  np.testing.assert_array_equal(data.read(path, key="vol").volume[0, ..., 0], wanted)
