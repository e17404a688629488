"""Let ``python -m hypersd_bench`` be the program."""

from __future__ import annotations

import sys

from hypersd_bench.cli.main import main

sys.exit(main())
