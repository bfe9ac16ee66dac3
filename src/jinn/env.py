"""The environment variables jinn reads; no other module looks at the environment."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """JINN_HOME: where pulled models are kept. Default: ~/.cache/jinn."""
    value = os.environ.get("JINN_HOME")
    return Path(value).expanduser() if value else Path.home() / ".cache" / "jinn"


def isa() -> str | None:
    """JINN_ISA: the instruction set the kernels must use. Default: None, the best that the machine has."""
    return os.environ.get("JINN_ISA") or None


def of_engine_process() -> dict[str, str]:
    """This process's variables; numpy's BLAS, which the engine has no use for, is to start no threads."""
    return {"OPENBLAS_NUM_THREADS": "1", **os.environ}
