"""Recordings from files and buckets to host batches; no device is touched."""

from vjepa_jax.data.readers import read
from vjepa_jax.data.record import DataError, ReadError, Record

__all__ = ["DataError", "ReadError", "Record", "read"]
