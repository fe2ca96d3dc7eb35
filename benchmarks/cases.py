"""Every benchmark that `isthmus bench` runs, in the order of the report."""

from __future__ import annotations

from isthmus.benchmarks import features, peer_engines, peer_servers, plots, quality, serve, step, train, weights
from isthmus.benchmarks.case import Case

CASES: tuple[Case, ...] = (
    Case("step", "Steps", step.StepBench, step.run, step.show, plots.plot_steps, step.notes),
    Case("serve", "Serving", serve.ServeBench, serve.run, serve.show, plots.plot_rates, serve.notes),
    Case("features", "Features", features.FeaturesBench, features.run, features.show),
    Case("quality", "Quality of integers", quality.QualityBench, quality.run, quality.show, plots.plot_quality),
    Case(
        "peers", "Beside other engines", peer_engines.PeersBench, peer_engines.run, peer_engines.show,
        plots.plot_comparison, peer_engines.notes,
    ),
    Case(
        "peer-servers", "Beside other servers", peer_servers.PeerServersBench, peer_servers.run, peer_servers.show,
        plots.plot_comparison, peer_servers.notes,
    ),
    Case("train", "Training", train.TrainBench, train.run, train.show, notes=train.notes),
    Case("weights", "Loading weights", weights.WeightsBench, weights.run, weights.show, notes=weights.notes),
)  # fmt: skip
