"""What libraries may say while the program runs: the one place, set before any of them is imported.

A user reads our lines, not the deprecation notes of a library of a library. Whatever they set themselves is kept, and
HYPERSD_BENCH_DEBUG=1 lets everything through.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

_ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else each DataLoader worker prints a warning about forks
    "TRANSFORMERS_VERBOSITY": "error",
}
_LOGGERS = ("httpx", "matplotlib", "torch.distributed", "torch.utils.flop_counter")


def quiet_libraries() -> None:
    """Keep libraries' warnings and log lines off the user's screen; errors still come through."""
    if debugging():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for logger in _LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def debugging() -> bool:
    """Say whether HYPERSD_BENCH_DEBUG asks for tracebacks and library warnings."""
    return os.environ.get("HYPERSD_BENCH_DEBUG", "") not in ("", "0")
