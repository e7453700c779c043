"""Joins all workers as a run would, and ends with 1 where chips are missing.

  python launch/devices.py --local=4 --all=16
"""

import argparse
import sys

import jax

from vjepa_jax.train import hosts, lifeline


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--local", type=int, help="devices of this worker")
  parser.add_argument("--all", type=int, help="devices of all workers together")
  parser.add_argument("--coordinator", help="as of vjepa_jax.main, with the next two")
  parser.add_argument("--processes", type=int)
  parser.add_argument("--process_id", type=int)
  parser.add_argument("--seconds", type=float, default=hosts.START_TIMEOUT_S)
  flags = parser.parse_args()
  try:
    place = hosts.find_place(flags.coordinator, flags.processes, flags.process_id)
    together = hosts.start(
        place, hosts.describe({}, "none"), timeout_s=flags.seconds
    )
  except (hosts.HostsError, lifeline.MissingError) as error:
    sys.exit(str(error))
  here, everywhere = jax.local_device_count(), jax.device_count()
  print(
      f"{here} of {everywhere} devices, {jax.devices()[0].device_kind}, jax "
      f"{jax.__version__}, python {sys.version.split()[0]}", flush=True,
  )
  together.close()
  for what, found, wanted in (
      ("this worker", here, flags.local), ("the whole pool", everywhere, flags.all),
  ):
    if wanted is not None and found != wanted:
      sys.exit(
          f"{what} has {found} devices, not {wanted}; is another process on them, is "
          "it of this type (--type, --chips), is the right jax there (--install)?"
      )


if __name__ == "__main__":
  main()
