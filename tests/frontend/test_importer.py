from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from moqc.frontend.importer import Importer

# torch 2.13 deprecates what its own copying of programs does.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Wrap(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(x, y)


def fill_an_empty_tensor(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made = x.new_empty(x.shape[0], 10)
    made[:, :6] = x
    made[:, 6:] = y
    return made


def overwrite_the_middle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made = x.clone()
    made[:, 1:5] = y
    made[:, -2:] = y[:, :2]
    return made


def overwrite_across_parts(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(x)
    made[:, 2:] = y
    made[:, 1:5] = x[:, :4]
    return made


def overwrite_every_second(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made = x.clone()
    made[:, ::2] = y[:, :3]
    return made


def rotate_by_complex(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    angles = torch.polar(torch.ones_like(y[:, :3]), y[:, :3]).unsqueeze(1)
    turned = torch.view_as_complex(x.reshape(-1, 1, 3, 2)) * angles.expand(-1, 1, 3)
    return torch.view_as_real(turned * 0.5).flatten(1)


FUNCTIONS = {
    fill_an_empty_tensor: ("concat",),
    overwrite_the_middle: ("concat",),
    overwrite_across_parts: ("concat",),
    overwrite_every_second: ("slice_scatter",),
    rotate_by_complex: (),
    lambda x, y: x.amax(-1, keepdim=True) + y.amax(): (),
    lambda x, y: torch.topk(x, 2, sorted=False)[0] - torch.topk(y, 2, largest=False)[0]: (),
    lambda x, y: torch.topk(x, 2)[1].to(torch.float32) + y[:, :1]: (),
    lambda x, y: torch.addmm(y, x, x.new_ones(6, 4)) - y: (),
    lambda x, y: x.masked_fill(x > 0.3, -float("inf")).softmax(-1)[:, :4] + y.new_full((1, 4), 2.5): (),
    lambda x, y: torch.nn.functional.embedding(y.abs().to(torch.int64)[:, :2], x): (),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_imported_function_computes_the_same(function: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, columns, generator=generator) for columns in (6, 4))
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(
        Wrap(function), (x, y), dynamic_shapes={"x": {0: rows}, "y": {0: rows}}
    ).run_decompositions()
    mod = Importer({}).from_exported_program(program, True, True, False, None)
    mod = relax.transform.DeadCodeElimination()(mod)
    for operator in FUNCTIONS[function]:
        assert f"R.{operator}(" in mod.script()
        assert operator == "slice_scatter" or "slice_scatter" not in mod.script()
    machine = relax.VirtualMachine(tvm.compile(mod, target=tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(tensor.numpy()) for tensor in (x, y))).numpy()
    np.testing.assert_allclose(found, function(x, y).numpy(), rtol=1e-5, atol=1e-6)


def test_symbols_are_renamed_and_identity_reshapes_dropped() -> None:
    program = torch.export.export(
        Wrap(lambda x, y: x.reshape(x.shape[0], 6) + y[:, :1]),
        (torch.ones(5, 6), torch.ones(5, 4)),
        dynamic_shapes={"x": {0: (rows := torch.export.Dim("rows", min=1, max=64))}, "y": {0: rows}},
    ).run_decompositions()
    node = next(iter(program.graph.find_nodes(op="placeholder")))
    symbols = {str(node.meta["val"].shape[0]): "rows"}
    mod: Any = Importer(symbols).from_exported_program(program, True, True, False, None)
    assert [str(mod["main"].params[0].ty.shape[0])] == ["rows"]
    assert "R.reshape" not in mod.script()
