from __future__ import annotations

import logging

import pytest

from moqc.compiling import warn_of_padding
from moqc.manifest import Sizes
from moqc.options import CompileOptions


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"bits": 2.5}, True),
        ({"bits": 4.9}, False),
        ({"bits": 2.5, "model_bits": 9.8}, False),
        ({"model_bits": 6.0}, True),
    ],
)
def test_bits_that_a_layout_pads_are_named(options, warns, caplog):
    sizes = Sizes(
        expert_file_bits_per_weight=4.996,
        model_file_bits_per_weight=9.858,
        parameter_bytes=1,
        artifact_bytes=1,
    )
    with caplog.at_level(logging.WARNING, "moqc"):
        warn_of_padding(sizes, CompileOptions(target="cuda", **options))
    assert ["cuda" in record.getMessage() for record in caplog.records] == [True] * warns
