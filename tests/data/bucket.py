"""A bucket on loopback, in a process of its own, that fails as it is told to.

`gcp-storage-emulator` with what real storage does and it does not: suffix ranges,
416, generations and their preconditions (304, 412), pages and offsets of listings,
connections kept alive, several at once. Faults are rules, set from any process:

  with bucket.start() as emulator:
    os.environ.update(emulator.env)
    url = emulator.make_bucket("scans")            # gs://scans
    emulator.fault("503", share=0.05, name="scans/oct", seed=1)

or by hand: `python -m tests.data.bucket --port=9023 --root=/tmp/kept`.
"""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import http.server
import io
import json
import logging
import os
import pathlib
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ("reset", "dropped", "truncate", "short", "corrupt", "slow", "hang")
_CONTROL = "/_test/"
_OBJECT = re.compile(
    r"^/(?:(?:download/)?storage/v1/)?b/(?P<bucket>[^/]+)/o/(?P<name>[^/].*)$"
)
_UPLOAD = re.compile(r"^(?:/upload)?/storage/v1/b/(?P<bucket>[^/]+)/o$")
_LISTING = re.compile(r"^/(?:storage/v1/)?b/(?P<bucket>[^/?]+)/o(?:\?.*)?$")
_PAGE = 1000


@dataclasses.dataclass
class Emulator:
  """A running emulator, seen from any process.

  Attributes:
    host: such as http://127.0.0.1:40123.
    process: what runs it.
  """

  host: str
  process: subprocess.Popen

  @property
  def env(self) -> dict[str, str]:
    """The variables that point gcsfs, ArrayRecord and TensorStore at it."""
    return {
        "STORAGE_EMULATOR_HOST": self.host,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.host,
        "TENSORSTORE_GCS_HTTP_URL": self.host,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }

  def make_bucket(self, name: str = "") -> str:
    """Makes an empty bucket and returns its `gs://` path."""
    name = name or f"test-{uuid.uuid4().hex[:12]}"
    self._ask("POST", "/storage/v1/b?project=test", {"name": name})
    return f"gs://{name}"

  def fault(
      self,
      kind: str,
      *,
      share: float = 1.0,
      name: str = "",
      method: str = "",
      times: int | None = None,
      seconds: float = 1.0,
      seed: int = 0,
  ) -> None:
    """Adds a rule; the first rule that fires on a request decides.

    Args:
      kind: a status such as "503", not carried out; "reset" (nothing is carried
        out), "dropped" (carried out, no answer comes), "truncate" (half the body,
        less than announced), "short" (half the body, announced as all), "corrupt"
        (one byte is another), "slow" (the body drips for `seconds`), or "hang" (no
        answer for `seconds`).
      share: the part of the matching requests that it strikes.
      name: what the decoded address (bucket/name, query) must contain.
      method: "GET", ...; "" for any.
      times: strikes after which it ends.
      seconds: of "slow" and "hang".
      seed: of the choice which requests are struck.
    """
    if kind not in KINDS and not re.fullmatch(r"[45]\d\d", kind):
      raise ValueError(f"fault kind {kind!r}: a status, or one of {', '.join(KINDS)}")
    self._ask("POST", _CONTROL + "faults", {
        "kind": kind, "share": share, "name": name, "method": method,
        "times": times, "seconds": seconds, "seed": seed,
    })

  def clear_faults(self) -> None:
    """Ends all rules."""
    self._ask("DELETE", _CONTROL + "faults")

  def requests(self, containing: str = "") -> list[str]:
    """Returns "METHOD address [range] -> status" of each request, oldest first."""
    lines = json.loads(self._ask("GET", _CONTROL + "requests"))
    return [line for line in lines if containing in line]

  def forget_requests(self) -> None:
    """Empties the list of requests."""
    self._ask("DELETE", _CONTROL + "requests")

  def _ask(self, method: str, address: str, content=None) -> bytes:
    request = urllib.request.Request(
        self.host + address, method=method,
        data=None if content is None else json.dumps(content).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
      return answer.read()


@dataclasses.dataclass
class Bucket:
  """One bucket of an emulator.

  Attributes:
    url: `gs://name`.
    emulator: where it lies.
  """

  url: str
  emulator: Emulator

  def __str__(self) -> str:
    return self.url

  def fault(self, kind: str, *, name: str = "", **rule) -> None:
    """Adds a rule (see `Emulator.fault`) for this bucket's objects only."""
    own = self.url.removeprefix("gs://") + "/"
    self.emulator.fault(kind, name=own + name, **rule)

  def clear_faults(self) -> None:
    """Ends all rules."""
    self.emulator.clear_faults()

  def requests(self) -> list[str]:
    """Returns the requests for this bucket since the last `forget_requests`."""
    return self.emulator.requests(self.url.removeprefix("gs://"))

  def forget_requests(self) -> None:
    """Empties the list of requests."""
    self.emulator.forget_requests()


@contextlib.contextmanager
def start(port: int = 0, root: str = "") -> Iterator[Emulator]:
  """Runs an emulator in a process of its own, until the block or its parent ends.

  Args:
    port: 0 picks a free one.
    root: a folder that keeps the objects from run to run; "" keeps them in memory.

  Yields:
    The emulator, once it answers.
  """
  process = subprocess.Popen(
      [sys.executable, "-m", "tests.data.bucket", f"--port={port}", f"--root={root}",
       "--until_stdin_closes"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
  )
  try:
    host = process.stdout.readline().strip()
    if not host:
      raise RuntimeError(f"the emulator did not start: status {process.wait()}")
    yield Emulator(host, process)
  finally:
    process.terminate()
    process.wait()
    process.stdin.close()
    process.stdout.close()


class _Faults:
  """The rules, and a record of what was asked."""

  def __init__(self):
    self._lock = threading.Lock()
    self._rules = []
    self.requests = []

  def add(self, rule: dict) -> None:
    with self._lock:
      self._rules.append((rule, random.Random(rule["seed"])))

  def clear(self) -> None:
    with self._lock:
      self._rules.clear()

  def pick(self, method: str, address: str) -> dict | None:
    with self._lock:
      for rule, rng in self._rules:
        matches = rule["name"] in address and rule["method"] in ("", method)
        if matches and rule["times"] != 0 and rng.random() < rule["share"]:
          if rule["times"] is not None:
            rule["times"] -= 1
          return rule
    return None


class _Asked:
  """One request as the emulator's router sees a handler; keeps its answer."""

  def __init__(self, handler, body: bytes):
    self.storage = handler.storage
    self.server = handler.server
    self.path = handler.path
    self.headers = handler.headers
    if "Content-Length" not in self.headers:
      self.headers["Content-Length"] = str(len(body))
    self.rfile = io.BytesIO(body)
    self.wfile = io.BytesIO()
    self.status = 200
    self.sent = {}

  def send_response(self, status: int, phrase: str = "") -> None:
    self.status = status

  def send_header(self, name: str, value: str) -> None:
    if name != "Content-Length":
      self.sent[name] = value

  def end_headers(self) -> None:
    pass


def _make_handler(store, faults: _Faults):
  """Returns the class that answers requests."""
  from gcp_storage_emulator import server

  lock = threading.Lock()
  finished: dict[str, tuple] = {}
  read_data = server._read_data

  def read_exactly(asked, query):
    if query.get("uploadType") == ["multipart"]:
      return _split_upload(asked.headers["Content-Type"], asked.rfile.read())
    return read_data(asked, query)

  # The emulator's own parser changes the line ends within a binary part.
  server._read_data = read_exactly

  class Handler(http.server.BaseHTTPRequestHandler):
    """Runs the emulator's own routes one at a time, then sends what they wrote."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    storage = store

    def __getattr__(self, name):
      if name.startswith("do_"):
        return lambda: self._serve(name.removeprefix("do_"))
      raise AttributeError(name)

    def log_message(self, format, *args):
      pass

    def _serve(self, method: str):
      body = self._read_body()
      if self.path.startswith(_CONTROL):
        self._send(*_control(faults, method, self.path, body))
        return
      self.path = _with_name(self.path, self.headers, body)
      address = _readable(self.path)
      rule = faults.pick(method, address) or {"kind": ""}
      line = f"{method} {address} {self.headers.get('Range', '')}".rstrip()
      # A client that has enough of an open range goes before it is sent.
      with contextlib.suppress(ConnectionError):
        self._answer(method, body, rule, line)

    def _answer(self, method: str, body: bytes, rule: dict, line: str):
      kind = rule["kind"]
      if kind and kind not in ("hang", "slow"):
        faults.requests.append(f"{line} -> {kind}")
      if kind == "hang":
        time.sleep(rule["seconds"])
      if kind.isdigit():
        self._send(int(kind), {}, _error(int(kind), "a fault, as asked"))
        return
      if kind == "reset":
        self._reset()
        return
      with lock:
        status, headers, content = self._carry_out(method, body)
      if kind in ("", "hang", "slow"):
        faults.requests.append(f"{line} -> {kind or status}")
      if kind == "dropped":
        self._reset()
        return
      middle = len(content) // 2
      if kind == "short":
        content = content[:middle]
      if kind == "corrupt" and content:
        wrong = bytes([content[middle] ^ 255])
        content = content[:middle] + wrong + content[middle + 1 :]
      self._send(status, headers, content, rule)

    def _carry_out(self, method: str, body: bytes):
      """Returns status, headers and body of the real routes' answer."""
      resource = _resource(store, self.path)
      refused = _refusal(method, self.path, resource)
      if refused:
        return refused, {}, _error(refused, "refused") if refused != 304 else b""
      extra = {}
      if resource and method == "GET":
        size = int(resource["size"])
        extra = {
            "X-Goog-Generation": resource["generation"],
            "X-Goog-Stored-Content-Length": str(size),
            "X-Goog-Hash": f"crc32c={resource['crc32c']},md5={resource['md5Hash']}",
        }
        if resource.get("contentEncoding"):
          extra["Content-Encoding"] = resource["contentEncoding"]
        if not _settle_range(self.headers, size):
          return 416, {}, _error(416, "the range lies beyond the end")
      # A finished upload answers again as it did, to those who lost the answer.
      upload = parse_qs(urlsplit(self.path).query).get("upload_id", [""])[0]
      if upload in finished:
        return finished[upload]
      asked = _Asked(self, body)
      server.Router(asked).handle(method)
      content = asked.wfile.getvalue()
      if upload and asked.status == 200:
        finished[upload] = 200, asked.sent, content
      if method == "GET" and _LISTING.match(self.path) and asked.status == 200:
        content = _page(self.path, content)
      if asked.status == 308 and not store.get_resumable_byte_count(upload):
        del asked.sent["Range"]  # It claims one byte where nothing has arrived.
      return asked.status, asked.sent | extra, content

    def _read_body(self) -> bytes:
      if length := self.headers.get("Content-Length"):
        return self.rfile.read(int(length))
      body = b""
      if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
        while size := int(self.rfile.readline().strip() or b"0", 16):
          body += self.rfile.read(size)
          self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
      return body

    def _send(self, status: int, headers: dict, content: bytes, rule=None):
      kind = rule["kind"] if rule else ""
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      if status not in (204, 304):
        self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      if kind == "truncate":
        content = content[: len(content) // 2]
        self.close_connection = True
      if kind != "slow":
        self.wfile.write(content)
        return
      piece = 1 + len(content) // 20
      for start in range(0, len(content), piece):
        self.wfile.write(content[start : start + piece])
        self.wfile.flush()
        time.sleep(rule["seconds"] / 20)

    def _reset(self):
      at_once = struct.pack("ii", 1, 0)
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
      self.connection.close()
      self.close_connection = True

  return Handler


def _with_name(path: str, headers, body: bytes) -> str:
  """Adds to an upload's address the object's name, where only its body has it."""
  query = parse_qs(urlsplit(path).query)
  kind = query.get("uploadType", [""])[0]
  if "name" in query or "upload_id" in query or kind in ("", "media"):
    return path
  if kind == "multipart":
    meta = _split_upload(headers["Content-Type"], body)["meta"]
  else:
    meta = json.loads(body or b"{}")
  return f"{path}&{urlencode({'name': meta['name']})}" if "name" in meta else path


def _split_upload(content_type: str, body: bytes) -> dict:
  """Returns the two parts of a multipart upload, byte for byte."""
  mark = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
  line = b"\r\n" if body.startswith(mark + b"\r\n") else b"\n"
  _, meta, rest = body.split(mark + line, 2)
  content = rest[: rest.rindex(line + mark + b"--")]
  head, _, content = content.partition(line * 2)
  kind = re.search(rb"(?i)content-type:\s*([^;\r\n]+)", head)
  return {
      "meta": json.loads(meta.partition(line * 2)[2]),
      "content": content,
      "content-type": kind[1].decode() if kind else "application/octet-stream",
  }


def _control(faults: _Faults, method: str, path: str, body: bytes):
  what = path.removeprefix(_CONTROL)
  if method == "POST":
    faults.add(json.loads(body))
  elif method == "DELETE" and what == "faults":
    faults.clear()
  elif method == "DELETE":
    faults.requests.clear()
  else:
    return 200, {}, json.dumps(faults.requests).encode()
  return 200, {}, b""


def _readable(path: str) -> str:
  """Returns the address as bucket/name?query, decoded."""
  parts = urlsplit(path)
  found = _OBJECT.match(parts.path) or _UPLOAD.match(parts.path)
  name = parts.path
  if found:
    name = f"{found['bucket']}/{found.groupdict().get('name', '')}"
  elif listing := _LISTING.match(path):
    name = f"{listing['bucket']}/"
  query = parse_qs(parts.query)
  if "name" in query:
    name += query.pop("name")[0]
  return unquote(name) + ("?" + urlencode(query, True, safe="/") if query else "")


def _resource(store, path: str) -> dict | None:
  """Returns what is stored about the object that an address names, if it is there."""
  parts = urlsplit(path)
  query = parse_qs(parts.query)
  if found := _OBJECT.match(parts.path):
    name = unquote(found["name"])
  elif (found := _UPLOAD.match(parts.path)) and "name" in query:
    name = query["name"][0]
  else:
    found = re.match(r"^/(?P<bucket>[^/]+)/(?P<name>[^/].*)$", parts.path)
    if not found:
      return None
    name = unquote(found["name"])
  return store.objects.get(unquote(found["bucket"]), {}).get(name)


def _refusal(method: str, path: str, resource: dict | None) -> int | None:
  """Returns the status of a failed precondition on the generation."""
  query = {k: v[0] for k, v in parse_qs(urlsplit(path).query).items()}
  if "upload_id" in query:
    return None
  generation = resource["generation"] if resource else "0"
  if method == "GET" and query.get("generation", generation) != generation:
    return 404
  if query.get("ifGenerationMatch", generation) != generation:
    return 412
  if query.get("ifGenerationNotMatch") == generation:
    return 304 if method == "GET" else 412
  return None


def _settle_range(headers, size: int) -> bool:
  """Turns a suffix range into an ordinary one; False where none can be met."""
  asked = re.fullmatch(r"\s*bytes=(\d*)-(\d*)\s*", headers.get("Range", ""))
  if not asked or not any(asked.groups()):
    return True
  if not asked[1]:
    start = max(0, size - int(asked[2]))
    headers.replace_header("Range", f"bytes={start}-{max(size - 1, 0)}")
    return size > 0 and int(asked[2]) > 0
  return int(asked[1]) < size


def _page(path: str, content: bytes) -> bytes:
  """Cuts a whole listing to the offsets and the page asked for."""
  query = {k: v[0] for k, v in parse_qs(urlsplit(path).query).items()}
  listing = json.loads(content)
  start, end = query.get("startOffset", ""), query.get("endOffset", "")
  token = query.get("pageToken", "")
  rows = [(item["name"], item) for item in listing.get("items", [])]
  rows += [(prefix, None) for prefix in listing.get("prefixes", [])]
  rows = sorted(
      (row for row in rows
       if row[0] >= start and (not end or row[0] < end) and row[0] > token),
      key=lambda row: row[0],
  )
  count = min(int(query.get("maxResults", _PAGE)), _PAGE)
  page = {
      "kind": "storage#objects",
      "items": [item for _, item in rows[:count] if item],
      "prefixes": [name for name, item in rows[:count] if not item],
  }
  if len(rows) > count:
    page["nextPageToken"] = rows[count - 1][0]
  return json.dumps(page).encode()


def _error(status: int, message: str) -> bytes:
  return json.dumps({"error": {"code": status, "message": message}}).encode()


def _make_store(root: str):
  """Returns the emulator's store; it writes its index when told, not every time."""
  from gcp_storage_emulator.storage import Storage

  class Store(Storage):
    keep_index = Storage._write_config_to_file

    def _write_config_to_file(self):
      pass

    def _bucket_soft_delete_retention_seconds(self, bucket_name):
      return 0

  return Store(use_memory_fs=not root, data_dir=os.path.abspath(root or "."))


def serve(port: int, root: str, until_stdin_closes: bool) -> None:
  """Serves until it is terminated, interrupted, or its parent is gone."""
  logging.disable(logging.CRITICAL)
  store = _make_store(root)
  handler = _make_handler(store, _Faults())

  class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request, client_address):
      if not isinstance(sys.exc_info()[1], ConnectionError | ValueError | OSError):
        super().handle_error(request, client_address)

  def stop(*_):
    threading.Thread(target=server.shutdown, daemon=True).start()

  with Server(("127.0.0.1", port), handler) as server:
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if until_stdin_closes:
      threading.Thread(
          target=lambda: (sys.stdin.read(), stop()), daemon=True
      ).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever(poll_interval=0.1)
  if root:
    store.keep_index()


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description="A bucket on loopback.")
  parser.add_argument("--port", type=int, default=9023, help="0 picks a free one")
  parser.add_argument("--root", default="", help="keep the objects in this folder")
  parser.add_argument("--until_stdin_closes", action="store_true")
  chosen = parser.parse_args()
  serve(chosen.port, chosen.root, chosen.until_stdin_closes)
