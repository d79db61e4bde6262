"""What is fixed about one attention operator; no TVM here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """What is fixed about one attention operator; batch, tokens and slots may be symbolic.

    `scale` multiplies the scores; `window`, `chunk` and `softcap` of 0 mean none; `lanes` of a vector.
    Keys that are `latent` end in the values, which are stored once; `key_width` is that of a query.
    `stored` is the dtype of the caches (`moqc.quant.kv_cache`).
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    scale: float
    window: int
    softcap: float
    causal: bool
    sinks: bool
    lanes: int
    chunk: int = 0
    latent: bool = False
    stored: str = "float32"

    @property
    def own_width(self) -> int:
        """Columns of a key that are no value."""
        return self.key_width - self.value_width if self.latent else self.key_width

    @property
    def bounded(self) -> bool:
        """Whether a token sees only positions from some first one on."""
        return bool(self.window or self.chunk)

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads
