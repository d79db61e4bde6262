"""Modules that take the place of a model's own while it runs a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from moqc.frontend.experts import ExpertLayout
from moqc.frontend.plain_experts import run_block


class _Forwarding(nn.Module):
    """A stand-in that answers for the attributes of the module it replaces, without owning its weights."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)


class LayerStub(_Forwarding):
    """Takes the place of a decoder layer and notes how it is called."""

    hidden: Tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Note the call; give back `output`, or the hidden states."""
        if args:
            hidden, *rest = args
        else:
            hidden, rest = kwargs.pop("hidden_states"), []
        object.__setattr__(self, "hidden", hidden)
        object.__setattr__(self, "arguments", (tuple(rest), kwargs))
        return hidden if self.output is None else self.output


class ExpertsStub(_Forwarding):
    """Takes the place of an experts block: hands its inputs to the caller's function."""

    def __init__(
        self, layout: ExpertLayout, original: nn.Module, call: Callable[[str, Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__(original)
        object.__setattr__(self, "_layout", layout)
        object.__setattr__(self, "_call", call)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the caller's function computes."""
        layout: ExpertLayout = self.__dict__["_layout"]
        compute = partial(self.__dict__["_call"], layout.site)
        return run_block(compute, hidden_states, top_k_index, top_k_weights.float(), layout.identities_from)
