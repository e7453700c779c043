"""Runs the toy in a process of its own: python toy_run.py WORKDIR OPTIONS_AS_JSON."""

import json
import sys

import toy

if __name__ == "__main__":
  options = json.loads(sys.argv[2])
  pace_s = options.pop("pace_s", 0.0)
  toy.run(sys.argv[1], data=toy.iterator(pace_s=pace_s), **options)
