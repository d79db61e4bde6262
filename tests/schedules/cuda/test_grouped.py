"""How the grouped product of warp groups is cut; its values are checked in test_experts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moqc.quant.formats import Format
from moqc.schedules.cuda.grouped import LARGE, TILES, large_for, rings, tiles_for
from moqc.schedules.cuda.plan import ExpertsShape
from moqc.schedules.cuda.toolchain import with_blocks

MULTIPROCESSOR_BYTES, RESERVED = 228 * 1024, 1024
"""Shared memory of a multiprocessor of sm_90, and what it keeps of each block."""


def layer(name: str) -> ExpertsShape:
    formats = (Format.parse(name),)
    return ExpertsShape(8, 2, 512, 512, formats, formats, formats)


@pytest.mark.parametrize("name", ["int1-g128-sym", "int2-g32", "int3-g128", "int4-g128-sym-s8", "int8-g32"])
def test_blocks_fit_a_multiprocessor(name):
    for tile in (*tiles_for(layer(name)).values(), large_for(layer(name))):
        _, shared = rings([Format.parse(name)], tile)
        assert tile.blocks * (shared + RESERVED) <= MULTIPROCESSOR_BYTES


def test_tiles_grow_with_the_tokens_of_an_expert():
    each = list(TILES)
    assert each == sorted(each)
    slots = [tile.slots for tile in (*TILES.values(), LARGE[0])]
    assert slots == sorted(set(slots))


def test_a_format_that_two_blocks_have_no_room_for_has_larger_tiles():
    assert all(tile.blocks == 1 for tile in tiles_for(layer("int8-g128-sym")).values())
    assert any(tile.blocks == 2 for tile in tiles_for(layer("int4-g128-sym")).values())


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
    tile = next(each for each in TILES.values() if each.blocks == 2)
    kernels = ""
    for each in (tile, replace(tile, blocks=1, weights=LARGE[0].weights)):
        types, _ = rings([Format.parse("int4-g128-sym")], each)
        kernels += f"__global__ void __launch_bounds__(384) f() {{ moqc::down_grouped<{types}>(); }}\n"
    kernels += (
        "__global__ void __launch_bounds__(384) decode() {}\n__global__ void __launch_bounds__(256) g() {}"
    )
    for warps in (8, 16):
        kernels += (
            f"__global__ void __launch_bounds__({32 * warps}) q() {{ moqc::quads::Plan<{warps}, 6>(); }}\n"
        )
    told = with_blocks(kernels)
    found = {
        bounds: told.count(f"__launch_bounds__({bounds})")
        for bounds in ("384, 2", "384, 1", "256", "256, 2", "512")
    }
    assert found == {"384, 2": 1, "384, 1": 2, "256": 1, "256, 2": 1, "512": 1}
