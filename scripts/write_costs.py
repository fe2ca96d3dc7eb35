"""Writes model/costs.json, what integers cost the models that `isthmus bench quality` measured, for what `isthmus serve
--quantize` tells. Run it after a new result in benchmarks/results."""

from __future__ import annotations

import json

from benchmarks.quality import costs
from benchmarks.record import load_all, results_folder
from model.costs import KNOWN

KNOWN.write_text(json.dumps(costs(load_all(results_folder(None))), indent=1) + "\n")
