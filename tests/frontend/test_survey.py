from __future__ import annotations

import re
from pathlib import Path

import transformers

from moqc.frontend.survey import decoder_types, shipped

ROOT = Path(__file__).parents[2]


def test_the_shipped_table_has_every_type_once():
    table = shipped()
    names = [row.model_type for row in table.rows]
    assert names == sorted(set(names))
    assert all((row.status == "exact") == (row.reason == "") for row in table.rows)
    if transformers.__version__ == table.transformers:  # another version may have other types
        assert set(names) == set(decoder_types())


def test_the_page_is_the_table():
    table, page = shipped(), (ROOT / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| (\w+) \| (exact|refused) \|", page, re.MULTILINE)
    assert listed == [(row.model_type, row.status) for row in table.rows]
    exact = sum(row.status == "exact" for row in table.rows)
    assert f"\n{exact} of the {len(table.rows)} decoder types" in page
