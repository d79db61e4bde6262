"""Write a pass, put it into a pipeline, and see what it does to the bits.

    python examples/write_a_pass.py

It runs after allocate-bits. The plan is an annotation of the module: what changes it before quantize-experts
runs changes the compiled model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.text import load_calibration
from moqc.calibrate.workspace import Workspace
from moqc.errors import PipelineError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.ir.annotations import BITS, PROFILE, Key
from moqc.ir.sites import find_experts
from moqc.passes.base import Pass, PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.registry import register_pass
from moqc.quant.formats import Format

MODEL = Path(__file__).parent / "models" / "tiny-moe"
PIPELINE = "profile-activation,allocate-bits{bits=2.5 allocator=uniform},floor-hot-experts{share=0.1 bits=4}"


@register_pass
@dataclass(frozen=True)
class FloorHotExperts(Pass):
    """Store the most used experts of every layer in at least `bits` bits.

    `share` of the experts, rounded up, are raised. It may exceed the budget that allocate-bits was given.
    """

    name: ClassVar[str] = "floor-hot-experts"
    reads: ClassVar[tuple[Key[Any], ...]] = (PROFILE, BITS)
    writes: ClassVar[tuple[Key[Any], ...]] = (BITS,)
    share: float = 0.1
    bits: int = 4

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Rewrite the plan; the graph is left as it is."""
        if not 0 < self.share <= 1:
            raise PipelineError(f"{self.name}: share={self.share:g} is not above 0 and at most 1")
        profile, plan = PROFILE.of(mod), BITS.of(mod)
        for site, projections in plan.items():
            pairs = profile[site]["pairs"]
            by_use = sorted(range(len(pairs)), key=lambda expert: -pairs[expert])
            for expert in by_use[: math.ceil(self.share * len(pairs))]:
                for formats in projections.values():
                    chosen = Format.parse(formats[expert])
                    formats[expert] = str(replace(chosen, bits=max(chosen.bits, self.bits)))
        return BITS.put(mod, plan)


def bits_per_weight(mod: IRModule) -> dict[str, float]:
    """Site -> average stored bits of its experts' weights: codes, scales and zeros."""
    plan, found = BITS.of(mod), {}
    for site in find_experts(mod):
        units = [(Format.parse(name), site.shape(p)) for p in site.projections for name in plan[site.site][p]]
        found[site.site] = sum(f.stored_bits(*s) for f, s in units) / sum(math.prod(s) for _, s in units)
    return found


checkpoint = Checkpoint.open(MODEL)
calibration = load_calibration(None, MODEL / "tokenizer.json", tokens=8192)  # None: the built-in text
ctx = PassContext(checkpoint=checkpoint, calibration=calibration, workspace=Workspace())
pipeline = Pipeline.parse(PIPELINE)
print(pipeline.describe(), end="\n\n")
allocated = pipeline.until("allocate-bits").run(import_model(checkpoint), ctx)
raised = bits_per_weight(pipeline.after("allocate-bits").run(allocated, ctx))
for site, before in bits_per_weight(allocated).items():
    print(f"{site}: {before:.3f} -> {raised[site]:.3f} bits per weight")
