"""Claims of data/record.py."""

import math
import pickle

import numpy as np
import pytest

from vjepa_jax.data.record import ReadError, Record

NAN4 = np.full(4, np.nan, np.float32)


def test_record_computes_mean_and_std_of_its_voxels():
  volume = np.random.default_rng(0).integers(0, 4000, (2, 3, 5, 7, 1)).astype(np.uint16)
  record = Record(volume, NAN4, "a.dcm")
  assert record.mean == pytest.approx(volume.mean(dtype=np.float64), rel=1e-12)
  assert record.std == pytest.approx(volume.std(dtype=np.float64), rel=1e-9)


@pytest.mark.parametrize("fields, words", [
    ({"volume": np.zeros((2, 3, 4), np.uint8)}, r"\[T, Z, Y, X, C\]"),
    ({"volume": np.zeros((1, 2, 3, 4, 1), np.int64)}, "int64"),
    ({"volume": np.zeros((1, 0, 3, 4, 1), np.uint8)}, "no voxel"),
    ({"volume": np.full((1, 2, 3, 4, 1), np.nan, np.float32)}, "mean"),
    ({"spacing": np.array([math.nan, 0.0, 1, 1])}, "spacing"),
    ({"spacing": np.array([math.nan, -0.1, 1, 1])}, "spacing"),
    ({"spacing": np.array([1.0, 1, 1])}, "spacing"),
    ({"mean": 0.0, "std": -1.0}, "std"),
])
def test_a_bad_field_is_a_value_error_that_names_the_source(fields, words):
  good = {"volume": np.ones((1, 2, 3, 4, 1), np.uint8), "spacing": NAN4}
  with pytest.raises(ValueError, match=rf"scan_7\.dcm: .*{words}"):
    Record(**{**good, "source": "scan_7.dcm", **fields})


def test_a_read_error_names_path_reason_detail_and_remedy_and_survives_pickling():
  error = ReadError("a/b.dcm", "truncated", "3 of 9 bytes")
  for found in (error, pickle.loads(pickle.dumps(error))):
    assert (found.path, found.reason, found.detail) == (
        "a/b.dcm", "truncated", "3 of 9 bytes"
    )
    assert "copy the file again" in str(found) and "a/b.dcm" in str(found)


def test_an_unknown_reason_lists_the_closest():
  with pytest.raises(KeyError, match="truncated"):
    ReadError("a.dcm", "truncate")
