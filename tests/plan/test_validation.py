from __future__ import annotations

from pathlib import Path
from statistics import median

from plan.validation import rows, table

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def test_errors_are_within_what_is_promised():
    found = rows()
    assert max(abs(row.error) for row in found if row.is_calibrated) <= 0.15
    assert max(abs(row.error) for row in found if not row.is_calibrated) <= 0.35
    assert median(abs(row.error) for row in found) <= 0.15
    assert sum(not row.is_calibrated for row in found) >= 6


def test_the_page_has_the_table():
    assert table(rows()) in PAGE.read_text(encoding="utf-8")
