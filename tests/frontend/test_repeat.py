"""Copies of traced layers: the same module as tracing every layer, and no copy of what differs."""

from contextlib import contextmanager

import pytest
import torch
from tvm.ir import assert_structural_equal

from moqc.errors import InternalError
from moqc.frontend import hf, repeat
from moqc.frontend.hooks import hook
from moqc.frontend.skeleton import build_skeleton
from moqc.ir.annotations import PARAMS


@contextmanager
def nothing(_model):
    yield


def traced_layers(monkeypatch):
    """A list that gets the sites of layers as they are traced."""
    sites = []
    ended = repeat._Stack._ended

    def note(stack, traced, *rest):
        sites.append(stack._sites[traced.layer])
        return ended(stack, traced, *rest)

    monkeypatch.setattr(repeat._Stack, "_ended", note)
    return sites


def imported(config):
    model = build_skeleton(config)
    hook(model)
    return hf.import_torch(model, max_batch=2, max_chunk=16)


@pytest.mark.parametrize(
    ("model_type", "layers", "kinds"),
    [
        ("deepseek_v3", 4, [0, 1]),  # the first is dense
        ("gpt_oss", 4, [0, 1]),  # windows and full attention alternate
    ],
)
def test_copies_are_what_tracing_would_give(model_type, layers, kinds, tiny_config, monkeypatch):
    config = tiny_config(model_type, num_hidden_layers=layers)
    sites = traced_layers(monkeypatch)
    copied = imported(config)
    assert sites == [f"model.layers.{index}" for index in kinds]
    with monkeypatch.context() as patch:
        patch.setattr(hf, "repeated", nothing)
        traced = imported(config)
    assert PARAMS.of(copied) == PARAMS.of(traced)
    assert_structural_equal(copied, traced)


class _Layer(torch.nn.Module):
    def __init__(self, number, uses):
        super().__init__()
        self.number, self.uses = number, uses
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, state=None, scale=1.0, **others):
        y = self.linear(x) * scale
        return y * 2 if self.uses and self.number % 2 else y


class _Model(torch.nn.Module):
    """Layers that get their number, and what `arguments` says about it."""

    def __init__(self, uses=False, arguments=lambda _: {}, result=lambda y: y):
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer(number, uses) for number in range(4))
        self.arguments, self.result = arguments, result

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = self.result(layer(x, **self.arguments(number)))
        return x


class _Exported(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def check(model):
    """Export with copies; it must compute what the model does. Returns how often the linear is traced."""
    x = torch.randn(3, 4)
    with torch.no_grad(), repeat.repeated(model):
        program = torch.export.export(_Exported(model), (x,))
    marks = sum(node.target is torch.ops.moqc.layer_like.default for node in program.graph.nodes)
    assert repeat.expand(program)
    assert "forward" not in vars(model.layers[0])
    assert [layer.number for layer in model.layers] == [0, 1, 2, 3]
    assert all(type(layer.number) is int for layer in model.layers)
    torch.testing.assert_close(program.module()(x), model(x))
    return 4 - marks


def test_layers_that_differ_in_weights_and_number_only_are_copied():
    assert check(_Model()) == 1


def test_layers_that_use_their_number_are_traced():
    assert check(_Model(uses=True)) == 4


def test_arguments_make_a_kind():
    assert check(_Model(arguments=lambda number: {"scale": 1.0 + number % 2})) == 2


def test_further_arguments_make_a_kind():
    assert check(_Model(arguments=lambda number: {"mode": "ab"[number % 2]})) == 2


def test_a_state_that_layers_share_is_not_copied():
    shared = {}
    assert check(_Model(arguments=lambda _: {"state": shared})) == 4


def test_buffers_make_a_kind():
    model = _Model()
    for number, layer in enumerate(model.layers):
        layer.register_buffer("table", torch.full((2,), float(number > 1)))
    assert check(model) == 2


def test_a_layer_that_uses_what_another_one_made_is_not_copied():
    """What layer 0 computes reaches layer 1 past its arguments: a copy of layer 1 would read it too."""

    class Making(_Layer):
        def forward(self, x):
            made.append(self.linear(x))
            return made[-1]

    class Peeking(_Layer):
        def forward(self, x):
            return self.linear(x) + made[-1]

    made = []
    model = _Model()
    model.layers = torch.nn.ModuleList([Making(0, False), *(Peeking(number, False) for number in range(3))])
    with torch.no_grad(), repeat.repeated(model):
        program = torch.export.export(_Exported(model), (torch.randn(3, 4),))
    graph = str(program.graph)
    assert "layer_like" in graph
    assert not repeat.expand(program)
    assert str(program.graph) == graph


def test_a_copy_needs_weights(monkeypatch):
    model = _Model()
    with torch.no_grad(), repeat.repeated(model):
        program = torch.export.export(_Exported(model), (torch.randn(3, 4),))
    specs = program.graph_signature.input_specs
    lost = next(spec for spec in specs if spec.target == "model.layers.2.linear.bias")
    lost.target = "model.layers.2.other"
    with pytest.raises(InternalError, match=r"layers\.2: has no weight like model\.layers\.0\.linear\.bias"):
        repeat.expand(program)
