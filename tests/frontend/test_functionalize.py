import pytest
import torch

from moqc.frontend.functionalize import functionalize


class _Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def parts(x):
    out = torch.empty_like(x)
    out[:, :2] = x[:, 2:] * 2
    out[:, 2:] = x[:, :2]
    return out


def chained(x):
    y = x * 2
    y.div_(3).add_(x)
    z = y + 1
    y.mul_(2)
    return y + z


def of_a_tuple(x):
    values, _ = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values


def scattered(x):
    mask = torch.zeros_like(x)
    mask.scatter_(1, x.topk(2).indices, 1)
    return x * mask


def view_read_later(x):
    y = x * 2
    first = y[:, 0]
    y.add_(1)
    return y + first[:, None]


def of_a_view(x):
    y = x * 2
    y.view(-1).add_(1)
    return y


def of_an_input(x):
    x.add_(1)
    return x * 2


class _All:
    def __contains__(self, name):
        return True


@pytest.mark.parametrize("function", [parts, chained, of_a_tuple, scattered])
def test_writes_become_values(function):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(_Model(function), (x,))
    expected = function(x.clone())
    assert functionalize(program.graph, _All())
    program.graph_module.recompile()
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    assert not [schema for schema in schemas if schema is not None and schema.is_mutable]
    torch.testing.assert_close(program.module()(x.clone()), expected)


@pytest.mark.parametrize("function", [view_read_later, of_a_view, of_an_input])
def test_writes_that_something_else_shows_are_left_to_torch(function):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(_Model(function), (x,))
    expected = function(x.clone())
    assert not functionalize(program.graph, _All())
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(x.clone()), expected)


def test_an_unknown_operator_is_left_to_torch():
    program = torch.export.export(_Model(torch.sin), (torch.ones(2, 2),))
    assert functionalize(program.graph, {"sin.default"})
    assert not functionalize(program.graph, {"cos.default"})
