"""The decode kernels: what they build to here, and on a GPU (``pytest -m cuda``) their values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import tvm
import tvm_ffi
from random_codes import random_codes

from moqc.errors import InternalError
from moqc.quant import reference
from moqc.quant.formats import Format
from moqc.quant.grid import rounded
from moqc.quant.pack_mma import pack_units
from moqc.quant.tensor import Quantized
from moqc.schedules.cuda import grouped, quads
from moqc.schedules.cuda.experts import down_kernel, gate_up_kernel, route_kernel
from moqc.schedules.cuda.layer import experts_function
from moqc.schedules.cuda.plan import ExpertsShape, Plan, many_down_plan, shared_bytes
from moqc.schedules.cuda.prune import prune_function
from moqc.schedules.cuda.quads import QuadsPlan, by_quads
from moqc.schedules.cuda.rows import RowsPlan
from moqc.schedules.cuda.workspace import workspace_bytes
from moqc.schedules.pruning import PruneShape

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles CUDA code: needs nvcc")

EXPERTS, TOP_K = 6, 2
TOLERANCE = 5e-3
NAMES = ("gate_up", "down")


@dataclass(frozen=True)
class Layer:
    """A layer and its plans for 1 and for 8 tokens; experts take a projection's classes in turn."""

    hidden: int
    intermediate: int
    classes: dict[str, tuple[str, ...]]
    activation: str
    gate_up: tuple[Plan, Plan]
    down: tuple[Plan, Plan]
    x_dtype: str = "float32"
    biases: tuple[str, ...] = ()

    @property
    def shape(self) -> ExpertsShape:
        formats = {name: tuple(map(Format.parse, names)) for name, names in self.classes.items()}
        lists = (formats.get(name, ()) for name in ("gate", "up", "down"))
        return ExpertsShape(
            EXPERTS, TOP_K, self.hidden, self.intermediate, *lists, self.activation, self.biases
        )

    @property
    def has_quads(self) -> bool:
        """Whether the int8 kernels for several tokens have all of its formats."""
        return all(by_quads(Format.parse(name)) for names in self.classes.values() for name in names)

    def kernels(self) -> dict[str, Any]:
        """The layer with the product's plans; the route kernel, and both products for 1 and 8 tokens."""
        functions = {
            "layer": experts_function(self.shape, x_dtype=self.x_dtype),
            "grouped": self.with_large_tiles(),
            "tiled": experts_function(self.shape, x_dtype=self.x_dtype, grouped=2, warp_groups=False),
            "rows": experts_function(self.shape, x_dtype=self.x_dtype, chosen=self.rows()),
            "route": route_kernel(self.shape, "int64"),
            "down_many": down_kernel(self.shape, many_down_plan(self.shape), many=True),
        }
        if self.has_quads:
            functions["quads"] = self.with_few_blocks()
        for up, down in zip(self.gate_up, self.down, strict=True):
            ids = "int64" if up.tokens == 1 else "int32"
            functions[f"gate_up_{up.tokens}"] = gate_up_kernel(self.shape, up, self.x_dtype, ids)
            functions[f"down_{down.tokens}"] = down_kernel(self.shape, down, ids)
        return functions

    def with_few_blocks(self) -> Any:
        """The layer with int8 kernels for 2 to 181 tokens, whose blocks take pairs of several experts."""
        with patch.object(quads, "MULTIPROCESSORS", 3):
            return experts_function(self.shape, x_dtype=self.x_dtype, chosen=self.quads())

    def with_large_tiles(self) -> Any:
        """The layer with the grouped product from 2 tokens on, whose tiles are as if its rows were long."""
        with patch.object(grouped, "LONG_ROWS", 0):
            return experts_function(self.shape, x_dtype=self.x_dtype, grouped=2)

    def quads(self) -> dict[str, QuadsPlan]:
        """Plans of the int8 kernels for 2 to 181 tokens, of 4 and of 8 at a time."""
        first, second = -(-self.hidden // 256), -(-self.intermediate // 256)
        pairs = (
            (8, QuadsPlan(3, 2, first, first, 1, 8, 2), QuadsPlan(2, 3, second, 1, second, 8, 1)),
            (16, QuadsPlan(3, 2, first, 1, first, 4, 1), QuadsPlan(2, 3, 1, 1, 1, 4, 2)),
            (64, QuadsPlan(2, 3, first, 1, 1, 8, 1), QuadsPlan(4, 2, second, second, 1, 8, 1)),
        )
        return {
            f"{name}_{tokens}": plan
            for tokens, *both in pairs
            for name, plan in zip(NAMES, both, strict=True)
        }

    def rows(self) -> dict[str, RowsPlan]:
        """Plans of the kernels whose warps own rows; tiles of several slots where there is one format."""
        first, second = -(-self.hidden // 256), -(-self.intermediate // 256)
        single = len({name for names in self.classes.values() for name in names}) == 1
        plans = {
            "gate_up_8": RowsPlan(3, 2, first, 1, 2, 8),
            "down_8": RowsPlan(2, 3, second, second, 2, 8),
        }
        for tokens, tile, down in (
            (16, 16, RowsPlan(2, 3, second, 1, 1, 8)),
            (64, 24, RowsPlan(2, 3, second, 1, 1, 8)),
        ):
            plans[f"gate_up_{tokens}"] = replace(plans["gate_up_8"], tokens=tile if single else 8)
            plans[f"down_{tokens}"] = replace(down, tokens=tile if single else 8)
        return plans


def _plans(warps: int, tiles: int, *stages: str, items: int = 1) -> tuple[Plan, Plan]:
    """For 1 and 8 tokens: ``s3`` is a ring of 3 stages, ``r2`` registers for 2."""
    one, eight = ((int(text[1:]), text[0] == "r") for text in (stages[0], stages[-1]))
    return Plan(warps, tiles, *one, 1), Plan(warps, tiles, *eight, 8, items)


LAYERS = {
    # Nothing divides, every projection in classes of its own, all groups, with and without zeros.
    "ragged": Layer(
        264,
        136,
        {
            "gate": ("int3-g64", "int2-g32"),
            "up": ("int4-g128-sym", "int1-g64"),
            "down": ("int3-g32", "int8-g64"),
        },
        "oai_swiglu(alpha=1.702,limit=7.0)",
        _plans(2, 3, "r2", "s3", items=3),
        _plans(4, 1, "r1", "s2"),
        biases=("gate_bias", "up_bias", "down_bias"),
    ),
    # The same classes with every load first, and float16 activations.
    "burst": Layer(
        256,
        128,
        {
            "gate": ("int2-g64", "int4-g128-sym"),
            "up": ("int3-g128", "int1-g32-sym"),
            "down": ("int4-g64", "int2-g128-sym"),
        },
        "silu_glu",
        _plans(1, 2, "r4", items=2),
        _plans(2, 2, "r2", items=4),
        "float16",
        ("down_bias",),
    ),
    "plain": Layer(
        512,
        768,
        {"up": ("int2-g128-sym",), "down": ("int4-g64",)},
        "relu2",
        _plans(2, 8, "r4", "s3"),
        _plans(3, 4, "r2", "s4", items=8),
    ),
} | {
    name: Layer(
        512,
        512,
        {projection: (name,) for projection in ("gate", "up", "down")},
        "silu_glu",
        _plans(2, 4, "r4", "r2", items=4),
        _plans(4, 2, "r2", "r1", items=2),
    )
    for name in (
        *(f"int{bits}{suffix}" for bits in (1, 2, 3, 4, 8) for suffix in ("-g128-sym", "-g64")),
        *("tcq1-g128", "tcq2-g64", "tcq3-g128"),
    )
}
LAYERS["bytes"] = Layer(
    264,
    136,
    {
        "gate": ("int4-g128-sym-s8", "int2-g64-s8", "int3-g128"),
        "up": ("int1-g128-s8", "int3-g64-sym-s8"),
        "down": ("int4-g64-s8", "int8-g32-sym-s8", "int2-g128-sym"),
    },
    "silu_glu",
    _plans(2, 3, "r2", "r1", items=3),
    _plans(4, 1, "r1", "s2"),
)
"""Byte scales beside float16 ones."""
WIDTHS = tuple(f"int{bits}-g128-sym" for bits in (4, 3, 2, 1))
LAYERS["widths"] = Layer(
    512,
    768,
    dict.fromkeys(("gate", "up", "down"), WIDTHS),
    "silu_glu",
    _plans(2, 3, "r5", "r2"),
    _plans(3, 4, "r5", "r2"),
)
"""Gate and up of an expert alike: the tiles on their way depend on the width."""
LAYERS["trellis"] = Layer(
    264,
    136,
    {
        "gate": ("tcq2-g128", "tcq3-g32", "int4-g128-s8"),
        "up": ("int1-g64", "tcq1-g64"),
        "down": ("tcq3-g64", "int4-g128-s8", "tcq2-g32"),
    },
    "silu_glu",
    _plans(2, 3, "r2", "s2", items=3),
    _plans(4, 1, "r1", "s2"),
    biases=("up_bias",),
)
"""Trellis formats beside integers, of all groups."""
LAYERS["quads"] = Layer(
    264,
    136,
    {
        "gate": ("int4-g128-s8", "int2-g64-sym-s8"),
        "up": ("int1-g128",),
        "down": ("int3-g128-sym-s8", "int8-g64"),
    },
    "silu_glu",
    _plans(2, 3, "r2", "r1", items=3),
    _plans(4, 1, "r1", "s2"),
    "float16",
    ("up_bias", "down_bias"),
)
"""Formats that the int8 kernels for several tokens have, every projection in classes of its own."""
CALLS: dict[str, list[list[int]]] = {
    # Name -> ids; 1 token goes through the kernels for 1, more through those for 8.
    "one": [[4, 1]],
    "one-twice-the-same": [[3, 3]],
    "one-unknown": [[-1, 2]],
    "two": [[0, 5], [5, 2]],
    "eight": [[0, 1], [2, 3], [4, 5], [1, 0], [5, 2], [0, 4], [3, 1], [2, 5]],
    "five-on-one": [[3, 1], [3, 2], [3, 3], [4, 3], [5, 3]],
    "all-on-one": [[3, 3]] * 7,
    "unknown": [[0, -1], [EXPERTS, 2], [1 << 40, -(1 << 40)], [1, 4]],
    "none": [],
    "nine": [[0, 5]] * 9,
    "large": [[0, 5], [5, 2], [1, 2]],
    "large-one": [[5, 2]],
    "forty": [[at % EXPERTS, at * at % 7 - 1] for at in range(40)],
    "large-forty": [[at % EXPERTS, at * at % 5] for at in range(40)],
    "hundred": [[at % 5, at // 7 % EXPERTS] for at in range(100)],
    "two-hundred": [[at % 5, at // 7 % EXPERTS] for at in range(200)],
    "three-hundred": [[at % 5, at // 7 % EXPERTS] for at in range(300)],
    "six-hundred": [[at % 5 if at % 3 else 1, at // 7 % 8 - 1] for at in range(600)],
    "large-six-hundred": [[at % 5, at // 7 % 8 - 1] for at in range(600)],
    "six-hundred-on-one": [[3, 3]] * 600,
}
"""In ``large`` calls every second token is 1e5 times as large."""


def saturates(layer: Layer, call: str) -> bool:
    """Whether large tokens' results hang on the signs of values that rounding decides."""
    return call.startswith("large") and layer.activation.startswith("oai_swiglu")


def operands(
    layer: Layer, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]]]:
    """Dequantized matrices, and packed tensors by projection with the table under ``table``, on the GPU."""
    table = torch.zeros(3, EXPERTS, 2, dtype=torch.int32)
    dense, packed = {}, {}
    for number, projection in enumerate(("gate", "up", "down")):
        formats, tensors = layer.classes.get(projection, ()), []
        rows, columns = layer.intermediate, layer.hidden
        if projection == "down":
            rows, columns = columns, rows
        whole = torch.zeros(EXPERTS, rows, columns)
        for at, name in enumerate(formats):
            members = list(range(at, EXPERTS, len(formats)))
            quantized = _random(Format.parse(name), (len(members), rows, columns), generator)
            whole[members] = quantized.dequantize()
            units = pack_units(quantized)
            arrays = [array for array in (units.codes, units.scales, units.zeros) if array is not None]
            tensors += [torch.from_numpy(array).cuda() for array in arrays]
            for index, expert in enumerate(members):
                table[number, expert] = torch.tensor([at, index])
        packed[projection], dense[projection] = tensors, whole
    packed["table"] = [table.cuda()]
    for name in layer.biases:
        dense[name] = torch.randn(EXPERTS, layer.hidden if name == "down_bias" else layer.intermediate)
        packed[name] = [dense[name].cuda()]
    return {name: matrix for name, matrix in dense.items() if name in (*layer.classes, *layer.biases)}, packed


def _random(fmt: Format, shape: tuple[int, ...], generator: torch.Generator) -> Quantized:
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = random_codes(fmt, shape, generator)
    scales = ((torch.rand(groups, generator=generator) - 0.2) * (0.2 / (fmt.values[-1] + 1))).half()
    if fmt.byte_scales:
        scales = rounded(scales.abs().float(), torch.zeros(groups), fmt).scale.half()
    zeros = None if fmt.symmetric else torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, zeros)


def run(
    function: Callable[[str], Any], layer: Layer, packed: dict[str, list[Any]], x: Any, ids: Any, weights: Any
) -> Any:
    """One layer through the single kernels that `function` finds by name; y on the GPU."""
    shape, columns, tokens = layer.shape, 1 if len(ids) == 1 else 8, len(ids)
    slots = max(shape.slots(tokens), 1)
    shifts = 16 * -(-layer.intermediate // 256)
    hidden = torch.full(
        (slots, columns, layer.intermediate), float("nan"), dtype=torch.float16, device="cuda"
    )
    shifts = torch.full((slots, columns, shifts), 255, dtype=torch.uint8, device="cuda")
    y = torch.full((tokens, layer.hidden), float("nan"), device="cuda")
    first, second = ([each for name in names for each in packed.get(name, [])] for names in OPERANDS)
    with tvm_ffi.use_torch_stream():
        if tokens == 1:
            routed = [ids[0], weights.T.contiguous()]
        else:
            slots_, members = (
                torch.full((slots,), 1 << 20, device="cuda"),
                torch.full((slots, 8), -5, device="cuda"),
            )
            shares, hit = (
                torch.full((slots, 8), float("nan"), device="cuda"),
                torch.full((1,), -1, device="cuda"),
            )
            slots_, members, hit = (tensor.to(torch.int32) for tensor in (slots_, members, hit))
            function("route")(ids, weights, slots_, members, shares, hit)
            routed = [slots_, shares, members, hit]
        function(f"gate_up_{columns}")(x, *routed, *packed["table"], *first, hidden, shifts, y)
        down = "down_many" if tokens > 8 else f"down_{columns}"
        function(down)(hidden, shifts, *routed, *packed["table"], *second, y)
    torch.cuda.synchronize()
    return y


WHOLE = ("layer", "grouped", "tiled", "rows", "quads")
OPERANDS = (("gate", "up", "gate_bias", "up_bias"), ("down", "down_bias"))
LAYER_OPERANDS = ("table", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def run_layer(
    function: Callable[..., Any], layer: Layer, packed: dict[str, list[Any]], x: Any, ids: Any, weights: Any
) -> Any:
    """The same through the function of a whole layer."""
    size = workspace_bytes(layer.shape, len(ids))
    workspace = torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    y = torch.full((len(ids), layer.hidden), float("nan"), device="cuda")
    operands = [each for name in LAYER_OPERANDS for each in packed.get(name, [])]
    with tvm_ffi.use_torch_stream():
        function(x, ids, weights, *operands, workspace, y)
    torch.cuda.synchronize()
    return y


def worst_errors(name: str, function: Callable[[str], Any]) -> dict[str, float]:
    """Largest relative error of a token, for every call of `CALLS`, by single kernels and by whole layers.

    Where `saturates`, large tokens have a row of their own: a tenth of their error all together.
    """
    layer, generator = LAYERS[name], torch.Generator().manual_seed(7)
    dense, packed = operands(layer, generator)
    errors = {}
    for call, chosen in CALLS.items():
        ids = torch.tensor(chosen, dtype=torch.int64).reshape(-1, TOP_K)
        x = torch.randn(len(ids), layer.hidden, generator=generator)
        if call.startswith("large"):
            x[::2] *= 6e4 if layer.x_dtype == "float16" else 1e5
            x = x.clamp(-6e4, 6e4) if layer.x_dtype == "float16" else x
        weights = torch.rand(ids.shape, generator=generator)
        given = x.to(getattr(torch, layer.x_dtype)).cuda()
        known = {name: dense.get(name) for name in ("gate_bias", "up_bias", "down_bias")}
        expected = reference.experts(
            given.float().cpu(), ids, weights, dense.get("gate"), dense["up"], dense["down"],
            activation=layer.activation, **known,
        )  # fmt: skip
        arguments = layer, packed, given, ids.cuda(), weights.cuda()
        results = {"": run(function, *arguments)}
        whole = [kind for kind in WHOLE if kind != "quads" or layer.has_quads]
        results |= {f" {kind}": run_layer(function(kind), *arguments) for kind in whole}
        for kind, actual in results.items():
            wrong, size = (actual.cpu() - expected).norm(dim=1), expected.norm(dim=1).clamp_min(1e-30)
            if saturates(layer, call):  # of one such token anything may be off, of all together little
                error = wrong[::2].norm() / size[::2].norm() / 10
                errors[f"{call}{kind}, large tokens"] = float(error.nan_to_num(1e9))
                wrong, size = wrong[1::2], size[1::2]
            # A float32 sum is all that is left of a token without experts.
            errors[call + kind] = float((wrong / size).nan_to_num(1e9).max()) if len(wrong) else 0.0
    return errors


@pytest.mark.cuda
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_reference(name, build):
    library = build(LAYERS[name].kernels())
    errors = worst_errors(name, library.__getitem__)
    assert {call: error for call, error in errors.items() if not error < TOLERANCE} == {}


def test_parameters_follow_the_formats():
    kernels = LAYERS["ragged"].kernels()
    names = [str(parameter.name) for parameter in kernels["down_8"].params]
    classes = [f"down_{number}_{part}" for number in (0, 1) for part in ("codes", "scales", "zeros")]
    lists = ["slots", "shares", "members", "hit", "table"]
    assert names == ["hidden", "shifts", *lists, *classes, "down_bias", "y"]
    names = [str(parameter.name) for parameter in kernels["gate_up_1"].params]
    assert "up_0_zeros" not in names
    assert "up_1_zeros" in names
    assert "hit" not in names
    names = [str(parameter.name) for parameter in kernels["layer"].params]
    assert names[:4] == ["x", "ids", "weights", "table"]
    assert names[-5:] == ["gate_bias", "up_bias", "down_bias", "workspace", "y"]


def test_the_workspace_grows_with_the_tokens_and_stays_aligned():
    shape = LAYERS["plain"].shape
    sizes = [workspace_bytes(shape, tokens) for tokens in (0, 1, 8, 64, 4096)]
    assert sizes == sorted(sizes)
    assert all(size % 256 == 0 for size in sizes)
    hidden = 2 * shape.top_k * shape.intermediate * 4096
    assert hidden < sizes[-1] < 6 * hidden
    assert shape.slots(1) == shape.top_k
    assert shape.slots(8) == shape.experts
    assert shape.slots(64) == shape.experts + 64 * shape.top_k // 8


def test_a_plan_has_to_fit():
    layer = LAYERS["plain"].shape
    with pytest.raises(InternalError, match="does not fit"):
        down_kernel(layer, Plan(3, 5, 4, False, 8))  # 32 row tiles
    with pytest.raises(InternalError, match="does not fit"):
        down_kernel(layer, Plan(24, 32, 8, False, 8))  # shared memory
    with pytest.raises(InternalError, match="no whole windows"):
        down_kernel(layer, Plan(3, 4, 3, True, 8))
    with pytest.raises(InternalError, match="does not fit"):
        down_kernel(layer, Plan(3, 4, 4, False, 1))  # one token through a ring
    with pytest.raises(InternalError, match="a warp for each 256"):
        gate_up_kernel(layer, Plan(3, 8, 2, True, 1), "float32")


def test_shared_memory_is_partials_and_rings():
    formats = [Format.parse("int4-g64"), Format.parse("int2-g128-sym")]
    ring = 4 * 512 + 32 * (4 * 4 + 4 * 2)  # codes; scales and zeros of 4 groups for each lane
    assert shared_bytes(Plan(8, 4, 3, False, 8), 2, formats) == 2 * 4 * 8 * 16 * 8 * 4 + 8 * 3 * ring


def test_shared_memory_keeps_its_size():
    """TVM must not shrink the one shared buffer, of which it sees no element being used."""
    layer = LAYERS["plain"]
    kernel = layer.kernels()["down_8"].with_attr("global_symbol", "down")
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
    with target:
        module = tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"down": kernel}))
        module = tvm.tirx.get_tir_pipeline("s_tir")[0](module)
    size = shared_bytes(layer.down[1], 1, layer.shape.down)
    assert f"T.int64({size}), launch_params=" in module.script()


@needs_nvcc
def test_compiles_to_machine_code_without_a_gpu(tmp_path, build):
    kernels = LAYERS["burst"].kernels()
    library = build({name: kernels[name] for name in ("route", "down_1")})
    path = tmp_path / "kernels.so"
    library.export_library(str(path))
    assert b"sm_90" in path.read_bytes()  # the fat binary names its architecture


@needs_nvcc
def test_compiles_for_gpus_without_warp_groups(tmp_path, build):
    """A whole layer, its grouped product by mma.sync, in the shared memory of sm_89."""
    shared = 99 * 1024
    layer = experts_function(LAYERS["plain"].shape, grouped=9, warp_groups=False, shared=shared)
    assert len(layer.attrs["moqc.kernel"]["recorded"]) == 0
    path = tmp_path / "kernels.so"
    build({"layer": layer}, "sm_89").export_library(str(path))
    assert b"sm_89" in path.read_bytes()


@needs_nvcc
def test_pruning_by_predicted_contributions_compiles(build):
    """The rule `mass` as it is calibrated: with slopes, an operand more."""
    function = prune_function(PruneShape(7, 4, 24, "int64", "mass", 2.0, False, 2, slopes=True))
    assert "slopes" in function.script()
    build({"prune": function})
