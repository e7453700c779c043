"""Objects of Google Cloud Storage: one request a read, one layer of retries.

gcsfs brings the credentials, the session and its event loop. Its own calls try six
times each with waits up to 32 s and know no deadline, so requests are made here, one
at a time, and tried again in one place. Every failure is a `ReadError`.

`storage` imports this module when it meets the first `gs://` path.
"""

import asyncio
import base64
import collections
from collections.abc import Awaitable, Callable, Iterable, Iterator
import dataclasses
import io
import json
import os
import random
import threading
import time
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlencode
import uuid
import zlib

import aiohttp
from fsspec import asyn
import gcsfs.core
from google.auth import exceptions as auth_exceptions
import google_crc32c
import yarl

from vjepa_jax.data import counts
from vjepa_jax.data.record import ReadError

T = TypeVar("T")

DEADLINE_S = 120.0
# A body gets the deadline for every such part of it: 0.5 MB/s is the slowest allowed.
_BYTES_A_DEADLINE = 64 << 20
_PIECE_BYTES = 16 << 20  # of an upload; a multiple of 256 KiB, as GCS demands
_RANGE_BYTES = 32 << 20  # of a download to a file
_DOWNLOADS = 3  # a damaged range shows only in the checksum of the whole
_PAGE = 1000
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 16.0
_FIELDS = "name,size,generation,md5Hash,crc32c,metadata"
# The caller's `random` state is not ours to move; forked workers must differ.
_random = random.SystemRandom()


@dataclasses.dataclass(frozen=True)
class Content:
  """What a read brought.

  Attributes:
    data: the bytes; None where the object is still the one already known.
    generation: of the object that was read.
    size: of the whole object, in bytes, as stored.
    crc32c: of the whole object, base64; "" where the server did not say.
  """

  data: bytes | None
  generation: str
  size: int
  crc32c: str


class _Refused(Exception):
  """An answer with an error status."""

  def __init__(self, status: int, message: str):
    self.status = status
    super().__init__(f"{status}: {message}" if message else str(status))


class _Damaged(Exception):
  """A body that is not the object: "short body" or "bad checksum"."""

  def __init__(self, kind: str, detail: str):
    self.kind = kind
    super().__init__(detail)


class _Budget:
  """The time that one operation may take, all its tries together."""

  def __init__(self):
    self.seconds = float(os.environ.get("VJEPA_JAX_STORAGE_DEADLINE_S") or DEADLINE_S)
    self.start = time.monotonic()
    self.allowed = self.seconds

  def grow(self, size: int) -> None:
    """Allows more time for a large body."""
    self.allowed = max(self.allowed, self.seconds * size / _BYTES_A_DEADLINE)

  @property
  def spent(self) -> float:
    return time.monotonic() - self.start

  @property
  def left(self) -> float:
    return max(self.allowed - self.spent, 0.0)


def get(
    path: str,
    *,
    start: int | None = None,
    stop: int | None = None,
    expect: str | None = None,
    known: str | None = None,
    max_bytes: int | None = None,
) -> Content:
  """Reads an object, or its bytes from `start` to `stop`, by one request.

  Args:
    path: gs://bucket/name.
    start: the first byte; None = 0. Negative counts from the end (no `stop` then).
    stop: the byte after the last; None = the end.
    expect: the generation that it must have.
    known: a generation that the caller has; then no body is sent.
    max_bytes: the largest body that may be read.

  Returns:
    The content; verified against size and checksum where it is the whole object.

  Raises:
    ReadError: missing_file, forbidden, too_large, changed, or unreachable.
  """
  headers = {"Accept-Encoding": "gzip"}
  if start is not None or stop is not None:
    headers["Range"] = _range_header(start, stop)
  query = {"alt": "media"}
  if known:
    query["ifGenerationNotMatch"] = known

  async def take(answer: aiohttp.ClientResponse, budget: _Budget) -> Content:
    told = _told(answer)
    if answer.status == 304:
      told = dataclasses.replace(told, generation=known or "")
    _check_expected(path, expect, told.generation)
    if answer.status == 304:
      return told
    data = await _read_body(path, answer, budget, max_bytes)
    if "Range" not in headers:
      _verify(data, told)
      if answer.headers.get("Content-Encoding") == "gzip":
        data = _gunzip(path, data, max_bytes)
    return dataclasses.replace(told, data=data)

  address = _object_address(path, query, media=True)
  try:
    return _retry(path, _request("GET", address, headers=headers, take=take))
  except _Refused as error:
    if error.status == 416:
      return Content(b"", expect or "", 0, "")
    raise _as_read_error(path, error) from error


def put(path: str, data: bytes, metadata: dict[str, str] | None = None) -> dict:
  """Writes an object by one request; verified by its checksum.

  Returns:
    What the bucket says about it (name, size, generation, crc32c, ...).

  Raises:
    ReadError: forbidden, missing_file (no such bucket), or unreachable.
  """
  bucket, name = split(path)
  about = {"name": name, "crc32c": crc32c(data)}
  if metadata:
    about["metadata"] = metadata
  mark = uuid.uuid4().hex
  body = b"".join((
      f"--{mark}\r\nContent-Type: application/json\r\n\r\n".encode(),
      json.dumps(about).encode(),
      f"\r\n--{mark}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(),
      data, f"\r\n--{mark}--\r\n".encode(),
  ))
  address = f"/upload/storage/v1/b/{quote(bucket)}/o?uploadType=multipart"
  headers = {"Content-Type": f'multipart/related; boundary="{mark}"'}

  async def take(answer: aiohttp.ClientResponse, budget: _Budget) -> dict:
    stored = json.loads(await answer.read())
    if stored.get("crc32c", about["crc32c"]) != about["crc32c"]:
      raise _Damaged("bad checksum", "the object stored is not the one sent")
    return stored

  request = _request("POST", address, headers=headers, body=body, take=take)
  return _call(path, request, size=len(data))


def put_stream(
    path: str, pieces: Iterable[bytes], metadata: dict[str, str] | None = None
) -> dict:
  """Writes an object of any size, holding 16 MiB of it at a time.

  The object appears when it is complete. Returns and raises as `put`.
  """
  blocks = _blocks(pieces, _PIECE_BYTES)
  first = next(blocks, b"")
  block = next(blocks, None)
  if block is None:
    return put(path, first, metadata)
  upload = _Upload(path, metadata)
  upload.send(first)
  for following in blocks:
    upload.send(block)
    block = following
  return upload.finish(block)


def download(
    path: str, file: BinaryIO, *, expect: str | None = None,
    known: str | None = None, max_bytes: int | None = None,
) -> Content:
  """Copies an object into an open file by ranges of 32 MiB of one generation.

  Args and raises as `get`; the returned `data` is b"", or None where `known` holds.
  """
  for _ in range(_DOWNLOADS):
    file.seek(0)
    file.truncate()
    told, found = _copy_ranges(path, file, expect, known, max_bytes)
    if told.data is None or not told.crc32c or found == told.crc32c:
      return dataclasses.replace(told, crc32c=found)
    counts.count("retried bad checksum")
  raise ReadError(path, "unreachable", f"crc32c is {found}, not {told.crc32c}")


def stat(path: str) -> dict:
  """Returns what the bucket says about an object, by one request.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  address = _object_address(path, {"fields": _FIELDS})
  return _call(path, _request("GET", address, take=_take_json))


def list_objects(folder: str, limit: int | None = None) -> list[dict]:
  """Returns what lies below a folder, sorted by name; a request a 1000 objects.

  Raises:
    ReadError: missing_file (no such bucket), forbidden, or unreachable.
  """
  bucket, _, name = folder.removeprefix("gs://").partition("/")
  if not bucket:
    raise ReadError(folder, "missing_file", "the path names no bucket")
  query = {
      "prefix": name.rstrip("/") + "/" if name.strip("/") else "",
      "maxResults": str(min(limit or _PAGE, _PAGE)),
      "fields": f"items({_FIELDS}),nextPageToken",
  }
  found = []
  while True:
    address = f"/storage/v1/b/{quote(bucket)}/o?{urlencode(query)}"
    page = _call(folder, _request("GET", address, take=_take_json))
    # A browser's upload leaves empty objects "folder/" that are no files.
    found += [i for i in page.get("items", []) if not i["name"].endswith("/")]
    query["pageToken"] = page.get("nextPageToken", "")
    if not query["pageToken"] or (limit and len(found) >= limit):
      return sorted(found, key=lambda item: item["name"])


def delete(path: str) -> None:
  """Deletes an object.

  Raises:
    ReadError: missing_file, forbidden, or unreachable.
  """
  tries = []

  async def take(answer: aiohttp.ClientResponse, budget: _Budget) -> None:
    await answer.read()

  request = _request("DELETE", _object_address(path, {}), take=take)

  async def attempt(client, budget):
    tries.append(1)
    return await request(client, budget)

  try:
    _retry(path, attempt)
  except _Refused as error:
    # The answer to a first try that succeeded may have been lost.
    if error.status != 404 or len(tries) == 1:
      raise _as_read_error(path, error) from error


def _copy_ranges(
    path: str, file: BinaryIO, expect: str | None, known: str | None,
    max_bytes: int | None,
) -> tuple[Content, str]:
  """Writes the ranges of one generation; returns what was told and the checksum."""
  told = get(path, start=0, stop=_RANGE_BYTES, expect=expect, known=known)
  if told.data is None:
    return told, ""
  if max_bytes is not None and told.size > max_bytes:
    raise _too_large(path, told.size, max_bytes)
  checksum = google_crc32c.Checksum(told.data)
  file.write(told.data)
  done = len(told.data)
  while done < told.size:
    stop = min(done + _RANGE_BYTES, told.size)
    more = get(path, start=done, stop=stop, expect=told.generation).data
    if len(more) != stop - done:
      raise ReadError(path, "changed", "it became shorter while read")
    checksum.update(more)
    file.write(more)
    done = stop
  found = base64.b64encode(checksum.digest()).decode()
  return dataclasses.replace(told, data=b""), found


class RangeReader(io.RawIOBase):
  """An object as a seekable file; fetches aligned blocks and keeps the last few.

  Args:
    path: gs://bucket/name.
    expect: the generation that it must have; None = the one found at opening.
    block_bytes: size of a block.
  """

  _KEPT = 4

  def __init__(self, path: str, expect: str | None, block_bytes: int):
    super().__init__()
    about = stat(path)
    _check_expected(path, expect, about["generation"])
    self._path = path
    self._generation = about["generation"]
    self._block_bytes = block_bytes
    self._blocks = collections.OrderedDict()
    self._at = 0
    self.size = int(about["size"])

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
    if origin + offset < 0:
      raise ValueError(f"{self._path}: seek to {origin + offset}, before the start")
    self._at = origin + offset
    return self._at

  def readinto(self, target) -> int:
    if self._at >= self.size:
      return 0
    number, skip = divmod(self._at, self._block_bytes)
    part = self._block(number)[skip : skip + len(target)]
    target[: len(part)] = part
    self._at += len(part)
    return len(part)

  def _block(self, number: int) -> memoryview:
    if number in self._blocks:
      self._blocks.move_to_end(number)
      return self._blocks[number]
    start = number * self._block_bytes
    stop = min(start + self._block_bytes, self.size)
    data = get(self._path, start=start, stop=stop, expect=self._generation).data
    if len(data) != stop - start:
      raise ReadError(self._path, "changed", "it became shorter while read")
    self._blocks[number] = memoryview(data)
    if len(self._blocks) > self._KEPT:
      self._blocks.popitem(last=False)
    return self._blocks[number]


class _Upload:
  """A resumable upload; after a fault it goes on from what has arrived."""

  def __init__(self, path: str, metadata: dict[str, str] | None):
    bucket, name = split(path)
    about = {"name": name} | ({"metadata": metadata} if metadata else {})
    query = urlencode({"uploadType": "resumable", "name": name})

    async def take(answer: aiohttp.ClientResponse, budget: _Budget) -> str:
      await answer.read()
      return answer.headers["Location"]

    request = _request(
        "POST", f"/upload/storage/v1/b/{quote(bucket)}/o?{query}",
        headers={"Content-Type": "application/json"}, body=json.dumps(about).encode(),
        take=take,
    )
    self._path = path
    self._address = _call(path, request)
    self._sent = 0
    self._checksum = google_crc32c.Checksum()

  def send(self, block: bytes, total: int | None = None) -> dict | None:
    """Sends the next block; returns the stored object after the last."""
    self._checksum.update(block)
    start, self._sent = self._sent, self._sent + len(block)
    tried = []

    async def attempt(client, budget):
      arrived = start
      if tried:
        arrived = await self._ask_arrived(client, budget, total)
      tried.append(1)
      if isinstance(arrived, dict):
        return arrived
      if not start <= arrived <= self._sent:
        raise ReadError(self._path, "unreachable", "the upload's session was lost")
      if arrived == self._sent and total is None:
        return None
      rest = memoryview(block)[arrived - start :]
      span = f"{arrived}-{self._sent - 1}" if rest else "*"
      found = await self._put(client, budget, f"bytes {span}/{total or '*'}", rest)
      if isinstance(found, int) and (total is not None or found != self._sent):
        raise _Damaged("short body", f"{found} of {self._sent} bytes arrived")
      return found if isinstance(found, dict) else None

    return _call(self._path, attempt, size=len(block))

  def finish(self, block: bytes) -> dict:
    """Sends the last block and verifies the stored object."""
    stored = self.send(block, self._sent + len(block))
    found = base64.b64encode(self._checksum.digest()).decode()
    if int(stored["size"]) != self._sent or stored.get("crc32c", found) != found:
      delete(self._path)
      raise ReadError(
          self._path, "unreachable", "the object stored was not the one sent"
      )
    return stored

  async def _ask_arrived(self, client, budget, total) -> int | dict:
    return await self._put(client, budget, f"bytes */{total or '*'}", b"")

  async def _put(self, client, budget, span: str, body) -> int | dict:
    """Returns the number of bytes that have arrived, or the finished object."""

    async def take(answer: aiohttp.ClientResponse, budget: _Budget) -> int | dict:
      content = await answer.read()
      if answer.status != 308:
        return json.loads(content)
      last = answer.headers.get("Range", "").rpartition("-")[2]
      return int(last) + 1 if last else 0

    headers = {"Content-Range": span}
    request = _request("PUT", self._address, headers=headers, body=body, take=take)
    return await request(client, budget)


def split(path: str) -> tuple[str, str]:
  """Returns bucket and name of gs://bucket/name.

  Raises:
    ReadError: missing_file, where it names no object.
  """
  bucket, _, name = path.removeprefix("gs://").partition("/")
  if not bucket or not name:
    raise ReadError(path, "missing_file", "the path names no object in a bucket")
  return bucket, name


def crc32c(data: bytes) -> str:
  """Returns the Castagnoli checksum as buckets state it: base64, big-endian."""
  return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _call(path: str, attempt, size: int = 0):
  """Retries, and names what is refused for good."""
  try:
    return _retry(path, attempt, size)
  except _Refused as error:
    raise _as_read_error(path, error) from error


def _retry(
    path: str, attempt: Callable[[Any, _Budget], Awaitable[T]], size: int = 0
) -> T:
  """Runs an attempt until it succeeds, is refused for good, or time is up."""
  budget = _Budget()
  budget.grow(size)
  client = _client()
  wait = _FIRST_WAIT_S
  tries = 0
  while True:
    tries += 1
    try:
      return asyn.sync(client.loop, _within_budget, attempt, client, budget)
    except Exception as error:
      kind = _transport_fault(error)
      if kind is None:
        raise
      pause = wait * _random.uniform(0.5, 1.5)
      if pause >= budget.left:
        counts.count("gave up")
        raise ReadError(
            path, "unreachable",
            f"gave up after {tries} tries in {budget.spent:.1f} s: {kind} "
            f"({type(error).__name__}: {error})",
        ) from error
      counts.count(f"retried {kind}")
    time.sleep(pause)
    wait = min(2 * wait, _LONGEST_WAIT_S)


async def _within_budget(attempt, client, budget: _Budget):
  budget.limit = asyncio.timeout(budget.left)
  async with budget.limit:
    return await attempt(client, budget)


def _request(
    method: str, address: str, *, headers: dict | None = None, body=None, take
) -> Callable[[Any, _Budget], Awaitable[Any]]:
  """Returns an attempt: one request whose good answer goes through `take`."""

  async def attempt(client, budget: _Budget):
    session = await client._set_session()
    # aiohttp sends a request on a lost connection again by itself, uncounted; a
    # DELETE carried out by the first would come back as a 404.
    session._retry_connection = False
    whole = address if "://" in address else client._location + address
    quiet = max(min(30.0, budget.seconds / 3), 0.1)
    async with session.request(
        method, yarl.URL(whole, encoded=True),
        headers=client._get_headers({"Accept-Encoding": "identity"} | (headers or {})),
        data=body, allow_redirects=False,
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=min(10.0, quiet), sock_read=quiet
        ),
    ) as answer:
      if answer.status >= 400:
        raise _Refused(answer.status, _message(await answer.read()))
      return await take(answer, budget)

  return attempt


async def _take_json(answer: aiohttp.ClientResponse, budget: _Budget) -> dict:
  return json.loads(await answer.read())


async def _read_body(
    path: str, answer: aiohttp.ClientResponse, budget: _Budget, max_bytes: int | None
) -> bytes:
  """Reads a body of the announced length; refuses a large one before it comes."""
  length = answer.content_length
  if max_bytes is not None and (length or 0) > max_bytes:
    raise _too_large(path, length, max_bytes)
  budget.grow(length or 0)
  now = asyncio.get_running_loop().time()
  budget.limit.reschedule(now + budget.left)
  parts, size = [], 0
  async for part in answer.content.iter_any():
    parts.append(part)
    size += len(part)
    if max_bytes is not None and size > max_bytes:
      raise _too_large(path, size, max_bytes)
  if length is not None and size != length:
    raise _Damaged("short body", f"{size} of {length} bytes came")
  return b"".join(parts)


def _verify(data: bytes, told: Content) -> None:
  if len(data) != told.size:
    raise _Damaged("short body", f"{len(data)} of {told.size} bytes came")
  if told.crc32c and crc32c(data) != told.crc32c:
    raise _Damaged("bad checksum", f"the body's is not {told.crc32c}")


def _told(answer: aiohttp.ClientResponse) -> Content:
  """Returns what the headers say about the object, without its data."""
  headers = answer.headers
  size = headers.get("X-Goog-Stored-Content-Length")
  if size is None:
    size = headers.get("Content-Range", "").rpartition("/")[2]
  if not size.isdigit():
    size = headers.get("Content-Length", "0")
  checksums = ",".join(headers.getall("X-Goog-Hash", []))
  crc = [c.strip() for c in checksums.split(",") if c.strip().startswith("crc32c=")]
  return Content(
      None, headers.get("X-Goog-Generation", ""), int(size),
      crc[0].removeprefix("crc32c=") if crc else "",
  )


def _check_expected(path: str, expect: str | None, found: str) -> None:
  if expect and found and expect != found:
    raise ReadError(path, "changed", f"generation is {found}, {expect} was listed")


def _gunzip(path: str, data: bytes, max_bytes: int | None) -> bytes:
  """Unpacks an object stored with Content-Encoding gzip, as its readers expect."""
  unpack = zlib.decompressobj(wbits=31)
  try:
    content = unpack.decompress(data, 0 if max_bytes is None else max_bytes + 1)
  except zlib.error as error:
    raise ReadError(path, "truncated", f"its gzip encoding: {error}") from error
  if max_bytes is not None and len(content) > max_bytes:
    raise _too_large(path, len(content), max_bytes)
  if not unpack.eof:
    raise ReadError(path, "truncated", "its gzip encoding ends early")
  return content


def _too_large(path: str, size: int, max_bytes: int) -> ReadError:
  return ReadError(
      path, "too_large", f"{size} bytes, more than the {max_bytes} allowed",
      remedy="check that it is one recording, or raise `max_bytes`",
  )


def _range_header(start: int | None, stop: int | None) -> str:
  if start is not None and start < 0:
    return f"bytes={start}"
  return f"bytes={start or 0}-{'' if stop is None else stop - 1}"


def _object_address(path: str, query: dict[str, str], media: bool = False) -> str:
  bucket, name = split(path)
  root = "/download/storage/v1" if media else "/storage/v1"
  address = f"{root}/b/{quote(bucket)}/o/{quote(name, safe='')}"
  return f"{address}?{urlencode(query)}" if query else address


def _blocks(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
  """Cuts a stream into blocks of exactly `size` bytes and a last one."""
  held = bytearray()
  for piece in pieces:
    held += piece
    while len(held) >= size:
      yield bytes(memoryview(held)[:size])
      del held[:size]
  if held:
    yield bytes(held)


def _message(content: bytes) -> str:
  """Returns the server's own words about an error, at most 300 characters."""
  text = content.decode("utf-8", errors="replace")
  try:
    error = json.loads(text)["error"]
    text = error["message"] if isinstance(error, dict) else str(error)
  except (ValueError, KeyError, TypeError):
    pass
  return " ".join(str(text).split())[:300]


def _transport_fault(error: Exception) -> str | None:
  """Names a fault of the way to the object, which another try may mend."""
  if isinstance(error, _Refused):
    return str(error.status) if error.status in _TRANSIENT else None
  if isinstance(error, _Damaged):
    return error.kind
  if isinstance(error, aiohttp.ClientPayloadError):
    return "short body"
  if isinstance(error, TimeoutError):
    return "timeout"
  if isinstance(error, aiohttp.ClientConnectorError):
    return "no connection"
  if isinstance(error, aiohttp.ClientError | ConnectionError):
    return "reset"
  if isinstance(error, auth_exceptions.TransportError):
    return "credentials"
  if isinstance(error, auth_exceptions.RefreshError) and error.retryable:
    return "credentials"
  return None


def _as_read_error(path: str, error: _Refused) -> ReadError:
  if error.status == 404:
    return ReadError(
        path, "missing_file", "no such object; a folder's name ends with /"
    )
  if error.status in (401, 403):
    return ReadError(path, "forbidden", str(error))
  return ReadError(path, "unreachable", f"the bucket refused it, {error}")


class _Clients:
  """The one gcsfs client of this process; a forked child makes its own."""

  def __init__(self):
    self.lock = threading.Lock()
    self.key = None
    self.client = None
    self.abandoned = []

  def after_fork(self) -> None:
    # Closing the parent's sessions here would end connections that it still uses.
    self.abandoned.append(self.client)
    self.lock = threading.Lock()
    self.key = None


_clients = _Clients()
os.register_at_fork(after_in_child=_clients.after_fork)


def _client() -> gcsfs.core.GCSFileSystem:
  host = os.environ.get("STORAGE_EMULATOR_HOST", "")
  anonymous = bool(host) or os.environ.get("VJEPA_JAX_ANONYMOUS", "") in ("1", "true")
  key = (os.getpid(), host, anonymous)
  with _clients.lock:
    if _clients.key != key:
      _clients.client = gcsfs.core.GCSFileSystem(
          token="anon" if anonymous else None, use_listings_cache=False,
          skip_instance_cache=True, endpoint_url=host or None,
          # A body must be the stored bytes for its checksum to hold.
          session_kwargs={"auto_decompress": False},
      )
      _clients.key = key
    return _clients.client
