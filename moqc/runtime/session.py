"""Run a compiled model over tokens, keeping the key/value state of its sequences."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError
from moqc.manifest import Manifest


class Session:
    """Sequences of equal length that grow together; one row of the batch each.

    Not safe for use by several threads at once.
    """

    def __init__(self, main: Callable[..., Any], weights: Any, manifest: Manifest) -> None:
        self._main = main
        self._weights = weights
        self._spec = manifest.cache
        self._vocabulary = manifest.vocabulary
        self._runtime = sys.modules["tvm"].runtime  # imported by whoever made `main`
        self._caches = self._runtime.convert([self._zeros(shape) for shape in self._spec.tensors])
        self.length = 0
        """Tokens each sequence has so far."""

    @property
    def context(self) -> int:
        """Tokens a sequence may have at most."""
        return self._spec.context

    def extend(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append `ids` int64 [B, S] to the sequences; logits [B, S, V] of all of them, float32.

        Long inputs are run in chunks of the compiled size. Raises UserError when B, an id or the new
        length is out of range; the state is then unchanged.
        """
        self._check(ids)
        parts = [
            self._run(ids[:, at : at + self._spec.chunk]) for at in range(0, ids.shape[1], self._spec.chunk)
        ]
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def extend_last(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Like `extend`, but only the last position's logits [B, V], without keeping the others."""
        self._check(ids)
        for at in range(0, ids.shape[1], self._spec.chunk):
            logits = self._run(ids[:, at : at + self._spec.chunk])
        return logits[:, -1]

    def _run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """One call of the compiled function on the next tokens of every row."""
        rows, count = ids.shape
        positions = np.broadcast_to(np.arange(self.length, self.length + count), (rows, count))
        logits = self.run_at(ids, positions)
        self.length += count
        return logits

    def run_at(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One call of the compiled function: logits [B, S, V] of `ids` int64 [B, S] at `positions` [B, S].

        Row b sees and extends cache row b. Position -1 is padding: its logits mean nothing. Nothing is
        checked, and `length` stays as it is.
        """
        tensor = self._runtime.tensor
        result = self._main(
            tensor(np.ascontiguousarray(ids)),
            tensor(np.ascontiguousarray(positions)),
            self._weights,
            self._caches,
        )
        self._caches = result[1:]
        return cast("NDArray[np.float32]", np.from_dlpack(result[0]))

    def _check(self, ids: NDArray[np.int64]) -> None:
        rows, count = ids.shape
        if rows > self._spec.batch:
            raise UserError(f"{rows} sequences at once; this artifact was compiled for {self._spec.batch}")
        if self.length + count > self._spec.context:
            raise UserError(
                f"{self.length + count} tokens are more than the artifact's context of {self._spec.context}: "
                "shorten the text or compile with a larger --context"
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise UserError(f"token ids must be in 0..{self._vocabulary - 1}, got {ids.min()}..{ids.max()}")

    def _zeros(self, shape: tuple[int, ...]) -> Any:
        tensor = self._runtime.empty(shape, "float32")
        np.from_dlpack(tensor).fill(0.0)
        return tensor
