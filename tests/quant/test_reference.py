import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.quant.activations import apply_activation
from moqc.quant.formats import ACTIVATION_GROUP
from moqc.quant.reference import experts, fake_quantize_activations, linear, quantize_activations

T, H, I, E, K = 7, 136, 24, 5, 2  # noqa: E741


def block(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (E, I, H), "up": (E, I, H), "down": (E, H, I)}
    shapes |= {"gate_bias": (E, I), "up_bias": (E, I), "down_bias": (E, H)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def plain_experts(x, ids, weights, *, gate, up, down, gate_bias, up_bias, down_bias, activation, cut):
    """The definition, token by token; `cut` is what happens to the input of a product."""
    y = torch.zeros(len(x), H)
    for t in range(len(x)):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            g = gate[e] @ cut(x[t]) + gate_bias[e]
            u = up[e] @ cut(x[t]) + up_bias[e]
            h = cut(apply_activation(activation, g, u))
            y[t] += weights[t, j] * (down[e] @ h + down_bias[e])
    return y


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    "ids",
    [
        torch.randint(0, E, (T, K), generator=torch.Generator().manual_seed(1)),
        torch.randint(0, E, (1, K), generator=torch.Generator().manual_seed(2)),
        torch.full((T, K), 3),  # all tokens on one expert, twice
        torch.tensor([[0, 0], [0, 1], [1, 1]]),
        torch.zeros(0, K, dtype=torch.long),
    ],
    ids=["random", "one-token", "one-expert", "duplicates", "no-token"],
)
def test_experts_follow_the_definition(ids: torch.Tensor, activations: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(len(ids), H, generator=g), torch.rand(len(ids), K, generator=g)
    operands = block()
    name = "oai_swiglu(alpha=1.702,limit=7.0)"
    cut = fake_quantize_activations if activations == "int8" else torch.clone
    expected = plain_experts(x, ids, weights, **operands, activation=name, cut=cut)
    actual = experts(x, ids.int(), weights, **operands, activation=name, activations=activations)
    assert actual.shape == (len(ids), H)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_experts_without_gate_or_bias() -> None:
    operands = block()
    x, ids = torch.randn(T, H, generator=torch.Generator().manual_seed(4)), torch.arange(T)[:, None] % E
    y = experts(x, ids, torch.ones(T, 1), None, operands["up"], operands["down"], activation="relu2")
    expected = torch.stack(
        [operands["down"][t % E] @ (operands["up"][t % E] @ x[t]).relu().square() for t in range(T)]
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-3)


def test_pairs_outside_the_experts_are_dropped() -> None:
    operands = block()
    x, weights = torch.randn(2, H, generator=torch.Generator().manual_seed(5)), torch.ones(2, 2)
    kept = experts(x, torch.tensor([[1, E], [-1, E]]), weights, **operands, activation="silu_glu")
    alone = experts(x[:1], torch.tensor([[1]]), weights[:1, :1], **operands, activation="silu_glu")
    torch.testing.assert_close(kept[:1], alone)
    assert kept[1].abs().max() == 0


def test_activations_round_half_to_even_and_pad() -> None:
    x = torch.zeros(2, ACTIVATION_GROUP + 8)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[0, ACTIVATION_GROUP] = -2.0
    codes, scales = quantize_activations(x)
    assert codes.dtype == torch.int8
    assert codes[0, :4].tolist() == [127, 0, 2, -2]
    assert codes[0, ACTIVATION_GROUP] == -127
    assert scales.shape == (2, 2)
    assert scales[0].tolist() == pytest.approx([1.0, 2 / 127])
    assert codes[1].abs().max() == 0
    assert scales[1].abs().max() == 0


def test_activations_survive_tiny_and_huge_values() -> None:
    for value in (1e-44, 1e-30, 1e30):
        x = torch.full((1, 64), value)
        assert torch.isfinite(fake_quantize_activations(x)).all()


@settings(max_examples=40, deadline=None)
@given(columns=st.integers(1, 200), seed=st.integers(0, 2**31), factor=st.sampled_from([1e-6, 1.0, 1e6]))
def test_activation_error_is_within_half_a_step(columns: int, seed: int, factor: float) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * factor
    _, scales = quantize_activations(x)
    step = scales.repeat_interleave(ACTIVATION_GROUP, -1)[:, :columns]
    assert ((fake_quantize_activations(x) - x).abs() <= step * 0.50001).all()


def test_linear_modes() -> None:
    g = torch.Generator().manual_seed(6)
    x, w, bias = (
        torch.randn(2, 3, H, generator=g),
        torch.randn(I, H, generator=g),
        torch.randn(I, generator=g),
    )
    torch.testing.assert_close(linear(x, w, bias), x @ w.T + bias)
    codes, scales = quantize_activations(x)
    exact = torch.zeros(2, 3, I, dtype=torch.float64)
    for group in range(2):
        columns = slice(ACTIVATION_GROUP * group, ACTIVATION_GROUP * (group + 1))
        product = codes[..., columns].double() @ w[:, columns].T.double()
        exact += scales[..., group, None].double() * product
    torch.testing.assert_close(linear(x, w, activations="int8"), exact.float(), rtol=1e-5, atol=1e-5)
    assert linear(x, w.bfloat16(), bias.bfloat16()).dtype == torch.float32
