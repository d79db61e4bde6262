"""Compile a model of real size for a GPU without its weights: a library and a manifest, a few MiB.

    python benchmarks/build_synthetic.py CONFIG OUT --experts int4-g128-sym --context 2560 --max-batch 64

`benchmarks/decode_models.py` draws the weights on the GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from moqc.codegen import build, export
from moqc.describe import describe
from moqc.frontend.hf import import_model
from moqc.frontend.synthetic import SyntheticCheckpoint, read_declared, write_metadata
from moqc.log import logger
from moqc.manifest import LIBRARY, MANIFEST
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.synthesize_weights import SynthesizeWeights
from moqc.pipelines import Debug, lowering_pipeline, run_passes
from moqc.targets import find_target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", default="int4-g128-sym")
    parser.add_argument("--linears", default="int8-g64-sym")
    parser.add_argument("--context", type=int, default=2560)
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--target", default="cuda")
    options = parser.parse_args()
    target, declared = find_target(options.target), read_declared(options.config, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        parsed = write_metadata(Path(folder), declared, options.config)
        checkpoint = SyntheticCheckpoint(Path(folder), parsed, options.config, 0)
        mode = target.mode(None)
        synthesize = SynthesizeWeights(
            experts=tuple(options.experts.split("+")), linears=options.linears, activations=mode
        )
        lowering = lowering_pipeline(options.context, options.max_batch, target.caches[0])
        passes = Pipeline((synthesize, *lowering.passes))
        latent, chunk = target.latent_attention, target.chunk_of(options.max_batch)
        mod = import_model(checkpoint, max_batch=options.max_batch, max_chunk=chunk, latent=latent)
        logger.info("imported")
        mod = run_passes(passes, mod, PassContext(target, checkpoint), Debug())
        options.out.mkdir(parents=True, exist_ok=True)
        export(build(mod, target), options.out / LIBRARY, target)
        manifest = describe(mod, checkpoint, target, passes, chunk=chunk)
    (options.out / MANIFEST).write_text(manifest.to_text())


if __name__ == "__main__":
    main()
