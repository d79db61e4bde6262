"""How the grouped product of warp groups is cut; its values are checked in test_experts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moqc.quant.formats import Format
from moqc.schedules.cuda.grouped import LARGE, TILES, large_for, rings, tiles_for
from moqc.schedules.cuda.grouped_bytes import FACTS, GROUP, by_bytes, byte_rings
from moqc.schedules.cuda.plan import SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.quads import QuadsPlan
from moqc.schedules.cuda.toolchain import with_blocks
from moqc.schedules.cuda.workspace import sections

MULTIPROCESSOR_REGISTERS, MOST_REGISTERS = 65536, {2: 168, 4: 96}
"""Of sm_90, and of a thread before warp groups pass some on (``prefill.cu``)."""


def layer(name: str) -> ExpertsShape:
    formats = (Format.parse(name),)
    return ExpertsShape(8, 2, 512, 512, formats, formats, formats)


@pytest.mark.parametrize("name", ["int1-g128-sym", "int2-g32", "int3-g128", "int4-g128-sym-s8", "int8-g32"])
def test_a_block_fits_a_multiprocessor(name):
    for tile in (*tiles_for(layer(name)).values(), large_for(layer(name))):
        _, shared = rings([Format.parse(name)], tile)
        assert shared <= SHARED_BYTES
        assert tile.threads * MOST_REGISTERS[tile.groups] <= MULTIPROCESSOR_REGISTERS


def test_tiles_grow_with_the_tokens_of_an_expert():
    each = list(TILES)
    assert each == sorted(each)
    slots = [tile.slots for tile in (*TILES.values(), LARGE[0])]
    assert slots == sorted(set(slots))


def test_tiles_of_few_tokens_have_four_groups_and_count_by_themselves():
    found = [(tile.few, tile.groups) for tile in TILES.values()]
    assert found == [(True, 4), (False, 4), (False, 2), (False, 2)]


@pytest.mark.parametrize(
    ("name", "columns", "tile"),
    [
        ("int4-g128-sym", 4096, LARGE[0]),
        ("int8-g32", 4096, LARGE[-1]),
        ("int4-g128-sym", 512, TILES[150]),
        ("int8-g32", 512, TILES[90]),
    ],
)
def test_large_tiles_are_for_long_rows_and_leave_room_for_wide_codes(name, columns, tile):
    shape = replace(layer(name), hidden=columns, intermediate=columns)
    assert large_for(shape) == tile
    assert tile not in tiles_for(shape).values()


def test_large_tiles_are_for_several_formats():
    several = replace(layer("int4-g128-sym"), down=tuple(map(Format.parse, ("int4-g128-sym", "int2-g64"))))
    assert large_for(several) == LARGE[0]


def test_the_compiler_is_told_how_many_blocks_a_multiprocessor_has():
    types, _ = rings([Format.parse("int4-g128-sym")], TILES[20])
    kernels = f"__global__ void __launch_bounds__(640) f() {{ moqc::down_grouped<{types}>(); }}\n"
    kernels += "__global__ void __launch_bounds__(256) g() {}"
    for plan in (QuadsPlan(8, 3, 8, 2, 2, 8, 3), QuadsPlan(16, 6, 8, 2, 2, 8, 1)):
        kernels += f"__global__ void __launch_bounds__({32 * plan.warps}) q() {{ {plan.cpp}(); }}\n"
    told = with_blocks(kernels)
    found = {
        bounds: told.count(f"__launch_bounds__({bounds})") for bounds in ("640, 1", "256", "256, 3", "512, 1")
    }
    assert found == {"640, 1": 1, "256": 1, "256, 3": 1, "512, 1": 1}


def test_single_formats_of_whole_groups_are_multiplied_by_bytes():
    assert by_bytes(layer("int2-g128-sym"))
    assert by_bytes(layer("int4-g128-s8"))
    assert not by_bytes(layer("int2-g64"))
    assert not by_bytes(layer("tcq2-g128"))
    two = tuple(map(Format.parse, ("int4-g128-sym", "int2-g128-sym")))
    assert not by_bytes(replace(layer("int4-g128-sym"), up=two))
    assert not by_bytes(replace(layer("int4-g128-sym"), gate=()))


@pytest.mark.parametrize("name", ["int1-g128-sym", "int3-g128", "int8-g128"])
def test_a_block_by_bytes_fits_a_multiprocessor(name):
    assert byte_rings([Format.parse(name)])[1] <= SHARED_BYTES


def test_facts_of_hidden_values_fit_where_shifts_would_be():
    for columns in (136, 768, 14336):
        shape = replace(layer("int2-g128-sym"), intermediate=columns)
        assert sections(shape)["shifts"] >= -(-columns // GROUP) * FACTS
