"""Quality: of an artifact, and of plans and pruning rules side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moqc.errors import UserError
from moqc.inputs import open_workspace, read_calibration, require_compiler, resolve_model
from moqc.keywords import keywords
from moqc.options import CompareOptions, EvalOptions, PruningOptions, ScoringOptions
from moqc.targets import find_target

if TYPE_CHECKING:
    from moqc.calibrate.workspace import Workspace
    from moqc.evaluate.artifact import Evaluation
    from moqc.evaluate.compare import Comparison
    from moqc.evaluate.probes import Probe
    from moqc.evaluate.skips import SkipComparison
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.passes.base import PassContext


@keywords(EvalOptions)
def evaluate(artifact: str | Path, texts: Sequence[Path | str], options: EvalOptions) -> Evaluation:
    """Score an artifact on text files, through the runtime; see `moqc.evaluate.artifact`.

    Args:
        artifact: a folder that `compile` wrote.
        texts: UTF-8 text files to score.

    """
    from moqc.evaluate.artifact import evaluate_artifact
    from moqc.runtime.artifact import load

    checkpoint = None
    if options.reference is not None:
        from moqc.frontend.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(resolve_model(options.reference))
    return evaluate_artifact(
        load(artifact), texts, reference=checkpoint, tokens=options.tokens, window=options.window
    )


@keywords(CompareOptions)
def compare(model: str | Path, texts: Sequence[Path | str], options: CompareOptions) -> Comparison:
    """Evaluate every plan (``allocator[:quantizer[:formats]]``) at every budget; see `moqc.evaluate.compare`.

    `bits` are budgets of the routed experts, `model_bits` of the whole model, which only ``global`` can meet.
    Task and problem files are those of `moqc.evaluate.tasks`. Raises UserError as the commands do.

    Args:
        model: a checkpoint folder, or an id of the Hugging Face hub.
        texts: UTF-8 text files to score.

    """
    require_compiler()
    from moqc.evaluate.bench import Bench
    from moqc.evaluate.compare import Budget, compare_plans, keep
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.pipelines import Plan

    parsed = [(text, Plan.parse(text)) for text in options.plans]
    if not parsed or not (options.bits or options.model_bits) or not options.seeds:
        raise UserError("nothing to compare: give at least one plan, one number of bits and one seed")
    if options.model_bits and any(plan.allocator != "global" for _, plan in parsed):
        raise UserError(
            "only the global allocator can meet model bits: give global[:quantizer] plans, or bits"
        )
    checkpoint = Checkpoint.open(resolve_model(model))
    workspace = open_workspace(options.cache)
    probes = _probes(checkpoint, texts, options)
    contexts = {seed: _context(checkpoint, workspace, options, seed) for seed in options.seeds}
    bench = Bench.open(checkpoint, workspace, probes)
    budgets = [Budget(value) for value in options.bits]
    budgets += [Budget(value, whole=True) for value in options.model_bits]
    return compare_plans(
        contexts,
        bench,
        parsed,
        budgets,
        linears=options.linears,
        formats=options.formats,
        prior=options.prior,
        finished=keep(options.output),
    )


@keywords(PruningOptions)
def compare_pruning(
    model: str | Path, texts: Sequence[Path | str], options: PruningOptions
) -> SkipComparison:
    """Evaluate rules that skip shares of the experts' work, on every plan; see `moqc.evaluate.skips`.

    Args:
        model: a checkpoint folder, or an id of the Hugging Face hub.
        texts: UTF-8 text files to score.

    """
    require_compiler()
    from moqc.evaluate.bench import Bench
    from moqc.evaluate.metrics import evaluation_windows
    from moqc.evaluate.skips import SkipChoices, compare_skips
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.frontend.trace import outline
    from moqc.pipelines import Plan

    target = find_target(options.target)
    parsed = [(text, Plan.parse(text)) for text in options.plans]
    checkpoint = Checkpoint.open(resolve_model(model))
    choices = SkipChoices(
        plans=parsed,
        bits=options.bits,
        shares=options.prune,
        rules=options.rules,
        linears=options.linears,
        target=target,
        model=outline(checkpoint.config, latent=target.latent_attention),
    )
    choices.check()
    workspace = open_workspace(options.cache)
    tokenizer = checkpoint.path / "tokenizer.json"
    windows = evaluation_windows(texts, tokenizer, tokens=options.tokens, window=options.window)
    ctx = _context(checkpoint, workspace, options, options.seed)
    return compare_skips(ctx, Bench.open(checkpoint, workspace, {}), windows, choices)


def _context(checkpoint: Checkpoint, workspace: Workspace, options: ScoringOptions, seed: int) -> PassContext:
    from moqc.passes.base import PassContext

    texts = read_calibration(checkpoint, options.calibration, options.calibration_tokens, seed)
    return PassContext(checkpoint=checkpoint, calibration=texts, workspace=workspace, seed=seed)


def _probes(checkpoint: Checkpoint, texts: Sequence[Path | str], options: CompareOptions) -> dict[str, Probe]:
    from moqc.evaluate.metrics import evaluation_windows
    from moqc.evaluate.probes import ChoiceProbe, ExactProbe, TextProbe
    from moqc.evaluate.tasks import multiple_choice, worked_problems

    if options.questions < 1:
        raise UserError(f"questions {options.questions}: must be at least 1")
    tokenizer = checkpoint.path / "tokenizer.json"

    def probe(files: Sequence[Path | str]) -> Probe:
        return TextProbe(evaluation_windows(files, tokenizer, tokens=options.tokens, window=options.window))

    found = {"text": probe(texts)}
    if options.unseen:
        found["unseen"] = probe(options.unseen)
    if options.tasks:
        found["choices"] = ChoiceProbe(multiple_choice(options.tasks, tokenizer, options.questions))
    if options.problems is not None:
        found["exact"] = ExactProbe(worked_problems(options.problems, tokenizer, options.questions))
    return found
