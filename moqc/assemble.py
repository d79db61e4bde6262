"""From a lowered module to an artifact: build, certify, package."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from tvm import IRModule

from moqc.card import model_card
from moqc.certificate import certify
from moqc.codegen import write_code
from moqc.describe import analysis, count_weights, describe
from moqc.errors import InternalError
from moqc.log import event
from moqc.manifest import ANALYSIS, CARD, LIBRARY, Manifest
from moqc.package import from_torch, write_artifact
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.recipe import Recipe
from moqc.tensorfile import StoredTensor


def assemble(
    mod: IRModule,
    ctx: PassContext,
    passes: Pipeline,
    chunk: int,
    out: Path,
    *,
    recipe: Recipe | None = None,
    force: bool,
) -> Manifest:
    """Build the library of `mod`, certify its kernels, and write the artifact folder `out`.

    Packed weights come from ``ctx.params``, all others from ``ctx.checkpoint``. `passes` is the pipeline that
    made `mod`, `recipe` what it was chosen by, for the model card; `chunk` the largest number of tokens a row
    may have in one call.
    """
    if ctx.target is None or ctx.checkpoint is None or ctx.params is None:
        raise InternalError("packaging without target, checkpoint or parameters")
    checkpoint, params = ctx.checkpoint, ctx.params
    draft = describe(
        mod, checkpoint, ctx.target, passes, chunk=chunk, recipe=recipe, calibration=ctx.calibration
    )
    event("stage", f"building for {ctx.target.name}", stage="build")

    def load(name: str) -> StoredTensor:
        return StoredTensor.of(params.get(name)) if name in params else from_torch(checkpoint.load(name))

    # The certificate is of the very file that is shipped, and machine code is generated when it is written.
    with tempfile.TemporaryDirectory(prefix="moqc-") as folder:
        code = Path(folder)
        write_code(mod, ctx.target, code)
        event("stage", "certifying kernels", stage="certify")
        numerics = certify(code / LIBRARY, mod, ctx.target, load)
        return write_artifact(
            out,
            draft.model_copy(update={"numerics": numerics}),
            write_code=lambda place: _move_files(code, place),
            load=load,
            counts=count_weights(mod, checkpoint),
            source=checkpoint.path,
            documents=lambda sized: {
                ANALYSIS: analysis(mod, checkpoint),
                **({} if recipe is None else {CARD: model_card(sized, recipe)}),
            },
            shard_bytes=ctx.target.shard_bytes,
            force=force,
        )


def _move_files(source: Path, place: Path) -> None:
    for path in source.iterdir():
        shutil.move(path, place / path.name)
