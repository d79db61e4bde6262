"""Blocks as model code writes them, exported by both of torch's exporters, beside onnxruntime."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import moqc

EXPERTS, HIDDEN, INTER, TOP = 4, 32, 48, 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch's, against itself
]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, INTER, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INTER, HIDDEN, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A router; what its subclasses do with it is `mix`."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])  # no globals: one of them is scripted
        shares = functional.softmax(self.gate(x), dim=1)
        weights, chosen = torch.topk(shares, 2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.mix(x, shares, weights, chosen).reshape(hidden.shape)


class OldMixtral(Block):
    """transformers 4: the tokens of an expert are gathered, and added back by index."""

    def mix(self, x, shares, weights, chosen):
        out = torch.zeros_like(x)
        mask = functional.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            place, rows = torch.where(mask[number])
            current = x[None, rows].reshape(-1, HIDDEN)
            out.index_add_(0, rows, expert(current) * weights[rows, place, None])
        return out


class OnlyHit(Block):
    """Experts that no token chose are left out: an If in a scripted module."""

    def mix(self, x, shares, weights, chosen):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            pairs = torch.nonzero(chosen == number)
            rows, place = pairs[:, 0], pairs[:, 1]
            if rows.shape[0] > 0:
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, place].unsqueeze(-1))
        return out


class Conditional(Block):
    """The same with torch.cond."""

    def mix(self, x, shares, weights, chosen):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            hit = chosen == number
            weight = (weights * hit).sum(-1, keepdim=True)
            out = out + torch.cond(
                hit.any(),
                lambda x, weight, expert=expert: expert(x) * weight,
                lambda x, weight: torch.zeros_like(x),
                (x, weight),
            )
        return out


class Masked(Block):
    """Every expert for all tokens."""

    def mix(self, x, shares, weights, chosen):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * torch.where(chosen == number, weights, 0.0).sum(-1, keepdim=True)
        return out


class MaskedShares(Block):
    """Every expert for all tokens, with shares that a mask made 0."""

    def mix(self, x, shares, weights, chosen):
        shares = shares * torch.zeros_like(shares).scatter(1, chosen, 1.0)
        shares = shares / shares.sum(-1, keepdim=True)
        return torch.stack([expert(x) for expert in self.experts], 1).mul(shares.unsqueeze(-1)).sum(1)


class Stacked(Block):
    """All experts in one product of stacked matrices."""

    def __init__(self):
        super().__init__()
        del self.experts
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTER) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, INTER, HIDDEN) / 8)

    def mix(self, x, shares, weights, chosen):
        table = torch.zeros_like(shares).scatter(1, chosen, weights)
        gate, up = torch.bmm(x.unsqueeze(0).expand(EXPERTS, -1, -1), self.up).chunk(2, -1)
        return (torch.bmm(functional.silu(gate) * up, self.down) * table.t().unsqueeze(-1)).sum(0)


def export(module, x, path, dynamo):
    if dynamo:
        shapes = {"hidden": {1: torch.export.Dim("tokens", min=2, max=512)}}
        torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False).save(path)
    else:
        torch.onnx.export(
            module, (x,), path, dynamo=False, input_names=["hidden"], dynamic_axes={"hidden": [1]}
        )


@pytest.mark.parametrize(
    ("kind", "dynamo"),
    [
        (OldMixtral, True),
        (OldMixtral, False),
        (OnlyHit, False),
        (Conditional, True),
        (Masked, True),
        (Masked, False),
        (MaskedShares, True),
        (MaskedShares, False),
        (Stacked, True),
        (Stacked, False),
    ],
)
def test_compiled_it_is_what_onnxruntime_computes(kind, dynamo, tmp_path):
    torch.manual_seed(0)
    module, path = kind().eval(), tmp_path / "model.onnx"
    export(torch.jit.script(module) if kind is OnlyHit else module, torch.randn(2, 7, HIDDEN), path, dynamo)
    moqc.compile(path, tmp_path / "out", cache=tmp_path / "cache", pipeline="legalize,schedule")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph = moqc.load_graph(tmp_path / "out")
    for tokens in (2, 7, 33):
        x = torch.randn(2, tokens, HIDDEN).numpy()
        (expected,) = session.run(None, {"hidden": x})
        (found,) = graph.run({"hidden": x}).values()
        torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
