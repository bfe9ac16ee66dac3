from __future__ import annotations

from cli.conftest import fail, run

__all__ = ["fail", "run"]
