"""What prunings cost on text: all of them in one pass over the weights, beside the model as it is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqc.calibrate.forward import experts_function, overridden
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.stream import ExpertsFunction, Stream, split_batches
from moqc.calibrate.workspace import digest
from moqc.errors import InternalError
from moqc.evaluate.bench import Bench, Linears
from moqc.quant.routing import Pruning

VERSION = 2
"""Of the evaluation; part of the key of cached scores."""


@dataclass(frozen=True)
class Outcome:
    """One pruning on the text: means over its predictions in nats, files alike.

    `increase` is over the same weights unpruned, `standard_error` that of this mean over predictions. `kld`:
    divergence from the model as stored, unpruned. `skipped`: share of the (token, expert) pairs; `kept`: site
    -> pairs of each expert that are left.
    """

    loss: float
    increase: float
    standard_error: float
    kld: float
    skipped: float
    kept: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class SkipBench:
    """The text, and the prunings (site -> pruning) to try on any weights; `key` names the prunings."""

    bench: Bench
    windows: Mapping[str, NDArray[np.int64]]
    prunings: Sequence[Mapping[str, Pruning]]
    key: str

    def measure(self, store: ExpertStore | None, linears: Linears) -> list[Outcome]:
        """Of no pruning, then of each; experts of `store` (None: as stored), other matrices in `linears`."""
        formats = {site: str(fmt) for site, fmt in linears.items()}
        experts = [] if store is None else list(store.keys.values())
        text = list(self.windows), list(self.windows.values())
        key = digest("skip-scores", VERSION, self.key, experts, formats, *text)
        workspace = self.bench.workspace
        if not workspace.has(key):
            found = self._run(store, linears)
            workspace.save_json(key, {"outcomes": [asdict(outcome) for outcome in found]})
        return [Outcome(**values) for values in workspace.load_json(key)["outcomes"]]

    def _run(self, store: ExpertStore | None, linears: Linears) -> list[Outcome]:
        arrays = list(self.windows.values())
        tokens = torch.from_numpy(np.concatenate(arrays))
        files = [number for number, rows in enumerate(arrays) for _ in rows]
        counters = [PrunedExperts(prunings, tokens.shape[1]) for prunings in ({}, *self.prunings)]
        tallies = [Tally() for _ in counters]
        batches = split_batches(tokens)
        row = 0
        for batch, (reference, outputs) in zip(
            batches, self._logits(batches, counters, store, linears), strict=True
        ):
            for tally, logits in zip(tallies, outputs, strict=True):
                for at, window in enumerate(batch):
                    tally.add(files[row + at], window, logits[at], reference[at])
            row += len(batch)
        return [tally.outcome(tallies[0], counter) for tally, counter in zip(tallies, counters, strict=True)]

    def _logits(
        self,
        batches: list[Tensor],
        counters: Sequence[PrunedExperts],
        store: ExpertStore | None,
        linears: Linears,
    ) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        """For each batch: logits of the model as stored, and those of each of `counters`, one at a time."""
        bench = self.bench
        model = overridden(bench.checkpoint, bench.quantized(linears))
        streams = _forward(model, batches, counters, store)
        if store is None and not linears:
            plain, reference = model, streams[0]
        else:
            plain = LayeredModel(bench.checkpoint)
            reference = _forward(plain, batches, [PrunedExperts({}, batches[0].shape[1])], None)[0]
        for number in range(len(batches)):
            tokens = reference.tokens[number]
            one = Stream([tokens], [reference.hidden[number]], [reference.arguments[number]])
            joint = Stream(
                [tokens] * len(streams),
                [stream.hidden[number] for stream in streams],
                [streams[0].arguments[number]] * len(streams),
            )
            (wanted,) = plain.logits(one)
            yield wanted, model.logits(joint)


def _forward(
    model: LayeredModel, batches: list[Tensor], counters: Sequence[PrunedExperts], store: ExpertStore | None
) -> list[Stream]:
    """The final hidden states of each of `counters`, in one pass over the weights."""
    first = model.start(batches)
    streams = [first.fork() for _ in counters]
    for index in range(model.layer_count):
        experts: ExpertsFunction = experts_function(model, index, store, "float")
        with model.layer(index) as layer:
            for stream, counter in zip(streams, counters, strict=True):
                layer.run(stream, counter.around(experts))
    return streams


@dataclass
class Tally:
    """Losses and divergences of single predictions, float64, by file."""

    losses: dict[int, list[Tensor]] = field(default_factory=dict)
    divergences: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, file: int, tokens: Tensor, logits: Tensor, reference: Tensor) -> None:
        """Count one window, where the logits [S, V] are."""
        log_q, log_p = (scores[:-1].double().log_softmax(-1) for scores in (logits, reference))
        targets = tokens[1:, None].to(log_q.device)
        p = log_p.exp()
        self.losses.setdefault(file, []).append(-log_q.gather(-1, targets)[:, 0].cpu())
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        self.divergences.setdefault(file, []).append(terms.sum(-1).clamp(min=0).cpu())

    def outcome(self, unpruned: Tally, counter: PrunedExperts) -> Outcome:
        """The means, files alike. Raises InternalError when logits were NaN."""
        losses, others = _joined(self.losses), _joined(unpruned.losses)
        rises = [one - other for one, other in zip(losses, others, strict=True)]
        loss = _mean(losses)
        if np.isnan(loss):
            raise InternalError("the model's logits are NaN; please report the model and the command")
        variance = sum(float(rise.var(correction=0)) / len(rise) for rise in rises)
        return Outcome(
            loss=loss,
            increase=_mean(rises),
            standard_error=variance**0.5 / len(rises),
            kld=_mean(_joined(self.divergences)),
            skipped=counter.skipped,
            kept={site: counts.tolist() for site, counts in counter.kept.items()},
        )


def _joined(parts: Mapping[int, list[Tensor]]) -> list[Tensor]:
    return [torch.cat(found) for found in parts.values()]


def _mean(files: Sequence[Tensor]) -> float:
    return float(np.mean([float(values.mean()) for values in files]))
