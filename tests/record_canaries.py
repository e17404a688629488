"""Records what the metrics that come with this program give for the fixed images: ``make canaries``.

To be run when such a metric's version is raised, and never to make a failing check pass.
"""

from __future__ import annotations

from hypersd_bench import registry
from hypersd_bench.contracts import MetricContext
from hypersd_bench.provenance import collect
from hypersd_bench.runner.canaries import KNOWN, recorded
from hypersd_bench.store import write_json


def main() -> None:
    """Write ``known.json``."""
    factories = [registry.resolve("metric", name) for name in registry.METRICS]
    context = MetricContext()
    shipped = [factory(context) for factory in factories if not factory.needs]
    write_json(KNOWN, recorded(shipped, collect().packages))
    print(f"{len(shipped)} metrics in {KNOWN.name}")


if __name__ == "__main__":
    main()
