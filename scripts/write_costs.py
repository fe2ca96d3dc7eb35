"""Writes quality/costs.json, by which `isthmus serve --quantize` says what integers cost: the figures that `isthmus
bench quality` measured of known models. Run it after a new result in benchmarks/results."""

from __future__ import annotations

import json

from isthmus.benchmarks.quality import costs
from isthmus.benchmarks.record import load_all, results_folder
from isthmus.quality.costs import KNOWN

KNOWN.write_text(json.dumps(costs(load_all(results_folder(None))), indent=1) + "\n")
