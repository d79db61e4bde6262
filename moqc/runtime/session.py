"""Run a compiled model over tokens, keeping the key/value state of its sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError
from moqc.manifest import Manifest
from moqc.runtime.device import Decoder, Device


class Session:
    """Sequences of equal length that grow together; one row of the batch each.

    Not safe for use by several threads at once.
    """

    def __init__(
        self,
        main: Callable[..., Any],
        weights: Any,
        manifest: Manifest,
        device: Device,
        advance: Callable[..., Any] | None = None,
        last: Callable[..., Any] | None = None,
    ) -> None:
        """A session of `main` on `device`; `advance` and `last` as `moqc.runtime.engine.Engine` has them."""
        self._main, self._advance, self._device, self._last_main = main, advance, device, last or main
        self._weights = weights
        self._spec = manifest.cache
        self._vocabulary = manifest.vocabulary
        self._caches = device.group([device.zeros(*buffer) for buffer in self._spec.buffers])
        self._decoders: dict[int, Decoder | None] = {}
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
            self._all(self._run(ids[:, at : at + self._spec.chunk], self._main))
            for at in range(0, ids.shape[1], self._spec.chunk)
        ]
        return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def extend_last(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Like `extend`, but only the last position's logits [B, V], without keeping the others."""
        self._check(ids)
        for at in range(0, ids.shape[1], self._spec.chunk):
            logits = self._run(ids[:, at : at + self._spec.chunk], self._last_main)
        return self._last(logits)

    def extend_greedy(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Like `extend_last`, but only the likeliest next tokens [B]; ties go to the lowest."""
        decoder = self._decoder(len(ids)) if ids.shape[1] == 1 else None
        if decoder is None:
            chosen: NDArray[np.int64] = self.extend_last(ids).argmax(axis=-1)
            return chosen
        self._check(ids)
        self.length += 1
        return decoder.step(ids[:, 0], np.full(len(ids), self.length - 1))

    def run_at(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """One call of the compiled function: logits [B, S, V] of `ids` int64 [B, S] at `positions` [B, S].

        Row b sees and extends cache row b. Position -1 is padding: its logits mean nothing. Nothing is
        checked, and `length` stays as it is.
        """
        return self._all(self._call(ids, positions, self._main))

    def _run(self, ids: NDArray[np.int64], function: Callable[..., Any]) -> Any:
        """One call of `function` on the next tokens of every row; its logits on the device."""
        rows, count = ids.shape
        positions = np.broadcast_to(np.arange(self.length, self.length + count), (rows, count))
        logits = self._call(ids, positions, function)
        self.length += count
        return logits

    def _call(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64], function: Callable[..., Any]
    ) -> Any:
        decoder = self._decoder(len(ids)) if ids.shape[1] == 1 else None
        if decoder is not None:
            decoder.step(ids[:, 0], positions[:, 0])
            return decoder.logits
        # Caches are changed in place; those that come back are the same ones.
        return function(self._device.put(ids), self._device.put(positions), self._weights, self._caches)[0]

    def _decoder(self, rows: int) -> Decoder | None:
        if rows not in self._decoders:
            arguments = (self._main, self._advance, self._weights, self._caches, rows)
            self._decoders[rows] = self._device.decoder(*arguments)
        return self._decoders[rows]

    def _all(self, logits: Any) -> NDArray[np.float32]:
        shape = tuple(int(extent) for extent in logits.shape)
        return self._device.get(logits, 0, int(np.prod(shape))).reshape(shape)

    def _last(self, logits: Any) -> NDArray[np.float32]:
        """The last position's logits [B, V]."""
        rows, count, width = (int(extent) for extent in logits.shape)
        each = [self._device.get(logits, (row * count + count - 1) * width, width) for row in range(rows)]
        return np.stack(each)

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
