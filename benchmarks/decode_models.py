"""Whole models on a GPU: decode by batch, prefill, and what the time of a step is made of.

    python benchmarks/decode_models.py FOLDER --config CONFIG [--transformers] [--profile]

FOLDER is what `benchmarks/build_synthetic.py` made; weights are drawn on the GPU. One JSON line a row.
The bound of a step: 2.8 us for each kernel of its graph, and the bytes of weights and cache at 4.6 TB/s.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moqc.manifest import LIBRARY, MANIFEST, Manifest
from moqc.quant.formats import Format
from moqc.runtime.device import Cuda
from moqc.runtime.session import Session
from moqc.runtime.tvm_runtime import import_runtime

LAUNCH, BANDWIDTH = 2.8e-6, 4.6e12
PROMPT, STEPS, PREFILL = 512, 32, 2048


def draw(name: str, shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> torch.Tensor:
    """A weight of plausible size: dequantized values have a deviation of about 0.02."""
    place: dict[str, Any] = {"device": "cuda", "generator": generator}
    if dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, **place)
    if dtype == "float16":
        raise ValueError(f"{name}: scales are drawn with their codes")
    if len(shape) == 1:
        return torch.ones(shape, device="cuda") if "bias" not in name else torch.zeros(shape, device="cuda")
    return torch.randn(shape, **place) * 0.02


def table(plan: dict[str, tuple[str, ...]], experts: int) -> torch.Tensor:
    """int32 [3, E, 2]: class and index in the class of each expert, by projection."""
    result = torch.zeros((3, experts, 2), dtype=torch.int32)
    for number, projection in enumerate(("gate", "up", "down")):
        formats = [Format.parse(text) for text in plan.get(projection, ())]
        order, seen = sorted(set(formats)), Counter[Format]()
        for expert, fmt in enumerate(formats):
            result[number, expert] = torch.tensor([order.index(fmt), seen[fmt]])
            seen[fmt] += 1
    return result.cuda()


def weights(manifest: Manifest, tvm: Any) -> tuple[list[Any], int, dict[str, int]]:
    """Tensors in the function's order; bytes read in every step; bytes of a layer's experts by site."""
    generator = torch.Generator("cuda").manual_seed(0)
    bits = {
        p.name.removesuffix(".codes"): p.shape[-2] for p in manifest.parameters if p.name.endswith(".codes")
    }
    tensors, always, experts = [], 0, Counter[str]()
    embeddings = {name for name in manifest.linear_bits if "embed" in name}
    tied = not any("lm_head" in name for name in manifest.linear_bits)
    for p in manifest.parameters:
        site = next((site for site in manifest.bits if p.name.startswith(f"{site}.")), None)
        if p.name.endswith(".table"):
            tensor = table(manifest.bits[str(site)], p.shape[1])
        elif p.dtype == "float16":
            deviation = 2 ** bits[p.name.removesuffix(".scales")] / math.sqrt(12)
            # Random signs: codes lie half a step off the zero point, which would make all rows alike.
            signs = torch.randint(0, 2, p.shape, dtype=torch.int8, device="cuda", generator=generator)
            tensor = (2 * signs - 1).half() * (0.02 / deviation)
        else:
            tensor = draw(p.name, p.shape, p.dtype, generator)
        size = tensor.numel() * tensor.element_size()
        if site is not None:
            experts[site] += size
        elif tied or not any(p.name.startswith(f"{name}.") for name in embeddings):
            always += size
        tensors.append(tvm.runtime.from_dlpack(tensor))
    return tensors, always, experts


def top_k(manifest: Manifest, config: dict[str, Any]) -> tuple[int, int]:
    number = len(next(iter(next(iter(manifest.bits.values())).values())))
    return number, int(config.get("num_experts_per_tok", 2))


def hit(number: int, chosen: int, tokens: int) -> float:
    """Experts that `tokens` tokens hit when each chooses at random."""
    return number * (1 - (1 - chosen / number) ** tokens)


class Model:
    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.model_validate(json.loads((folder / MANIFEST).read_text()))
        tvm = import_runtime()
        self.device = Cuda(tvm, self.manifest.target.architectures)
        library = tvm.runtime.load_module(str((folder / LIBRARY).resolve()))
        self.machine = tvm.runtime.vm.VirtualMachine(library, self.device.handle)
        tensors, self.always, self.experts = weights(self.manifest, tvm)
        torch.cuda.synchronize()
        self.weights = self.device.group(tensors)

    def session(self) -> Session:
        functions = self.machine["main"], self.weights, self.manifest, self.device, self.machine["advance"]
        return Session(*functions)

    def cache_bytes(self, rows: int, length: int) -> int:
        shapes = self.manifest.cache.tensors
        return sum(shape[1] * shape[3] * 2 * length * rows for shape in shapes)


def decode(model: Model, rows: int, chosen: tuple[int, int], profile: bool) -> dict[str, Any]:
    session, generator = model.session(), np.random.default_rng(rows)
    vocabulary, part = model.manifest.vocabulary, max(1, PROMPT // rows)
    for _ in range(0, PROMPT, part):
        session.extend_last(generator.integers(0, vocabulary, (rows, part)))
    following = session.extend_greedy(generator.integers(0, vocabulary, (rows, 1)))
    for _ in range(4):
        following = session.extend_greedy(following[:, None])
    start = time.perf_counter()
    for _ in range(STEPS):
        following = session.extend_greedy(following[:, None])
    whole = (time.perf_counter() - start) / STEPS
    decoder = session._decoders[rows]
    model.device.stream.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        decoder._graph.launch()
    model.device.stream.synchronize()
    graph = (time.perf_counter() - start) / STEPS
    number, top = chosen
    experts = sum(model.experts.values()) * hit(number, top, rows) / number
    moved = model.always + experts + model.cache_bytes(rows, PROMPT + 70)
    bound = decoder._graph.launches * LAUNCH + moved / BANDWIDTH
    if profile:
        show(decoder, model.device.stream)
    return {
        "tokens": rows,
        "ms": whole * 1e3,
        "graph_ms": graph * 1e3,
        "tokens_per_s": rows / whole,
        "launches": decoder._graph.launches,
        "bytes": int(moved),
        "bound_ms": bound * 1e3,
        "ratio": graph / bound,
        "finite": bool(np.isfinite(model.device.get(decoder.logits, 0, vocabulary)).all()),
    }


def show(decoder: Any, stream: Any) -> None:
    """Microseconds a step by kernel, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(4):
            decoder._graph.launch()
        stream.synchronize()
    rows = [(e.self_device_time_total / 4, e.count / 4, e.key) for e in found.key_averages()]
    for total, count, name in sorted(rows, reverse=True)[:24]:
        print(
            f"PROFILE {total:9.1f} us {count:6.1f} x {total / max(count, 1):8.2f} us  {name[:90]}", flush=True
        )


def prefill(model: Model) -> dict[str, Any]:
    generator, best = np.random.default_rng(7), math.inf
    ids = generator.integers(0, model.manifest.vocabulary, (1, PREFILL))
    for _ in range(3):
        session = model.session()
        model.device.stream.synchronize()
        start = time.perf_counter()
        session.extend_last(ids)
        best = min(best, time.perf_counter() - start)
    row = {"prefill": PREFILL, "chunk": model.manifest.cache.chunk}
    return {**row, "ms": best * 1e3, "tokens_per_s": PREFILL / best}


def report(provider: str, model: str, row: dict[str, Any]) -> None:
    print("RESULT " + json.dumps({"provider": provider, "model": model, **row}), flush=True)


def peer(name: str, config: dict[str, Any]) -> None:
    """transformers in bfloat16, eager with its default experts, random weights."""
    import transformers

    parsed = transformers.AutoConfig.for_model(**config)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(parsed, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for rows in (1, 8, 64):
            cache = model(
                torch.randint(0, 1000, (rows, PROMPT), device="cuda"), logits_to_keep=1
            ).past_key_values
            ids = torch.randint(0, 1000, (rows, 1), device="cuda")
            for step in range(STEPS + 4):
                if step == 4:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                out = model(ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            each = (time.perf_counter() - start) / STEPS
            report("transformers-bf16", name, {"tokens": rows, "ms": each * 1e3, "tokens_per_s": rows / each})
            del cache, out
        ids, best = torch.randint(0, 1000, (1, PREFILL), device="cuda"), math.inf
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids, logits_to_keep=1)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        row = {"prefill": PREFILL, "ms": best * 1e3, "tokens_per_s": PREFILL / best}
        report("transformers-bf16", name, row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, required=True, help="config.json of the model")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    config = json.loads(options.config.read_text())
    name = options.folder.name
    if options.transformers:
        peer(name, config)
        return
    model = Model(options.folder)
    chosen = top_k(model.manifest, config)
    for rows in map(int, options.batches.split(",")):
        report("moqc", name, decode(model, rows, chosen, options.profile))
    report("moqc", name, prefill(model))


if __name__ == "__main__":
    main()
