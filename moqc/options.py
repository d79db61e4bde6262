"""The lists of options of moqc's functions and commands, beside the recipe (`moqc.recipe`).

Each is a frozen dataclass of `moqc.keywords.option` fields; a field that means the same in two lists is
spelled in one and repeated by `like`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moqc.keywords import like, option
from moqc.recipe import Recipe
from moqc.units import parse_bytes, parse_seconds, split, split_integers, split_numbers, split_shares

DEFAULT_TOKENS = 128
"""Produced where nobody says how many."""
PRUNING_RULES = ("mass", "odp", "odp-literal", "topk-threshold")


@dataclass(frozen=True, kw_only=True)
class Debug:
    """What to show of the passes."""

    dump_ir: Path | None = option(None, "write the IR after each pass there", metavar="DIR")
    print_after: Sequence[str] = option(
        (), "print the IR after these passes to stderr", metavar="PASS,...", parse=split, joined=True
    )
    time_passes: bool = option(False, "print the seconds of each pass to stderr")
    verify_each: bool = option(False, "check the IR after each pass")
    stop_after: str | None = option(None, "print the IR after this pass and end", metavar="PASS")


@dataclass(frozen=True, kw_only=True)
class CompileOptions(Recipe):
    """The recipe of a compilation, and how it is run."""

    cache: str | Path | None = option(
        None, "folder for intermediate results [default: ~/.cache/moqc]", metavar="DIR"
    )
    force: bool = option(False, "replace an existing artifact", flags=("--force", "-f"))
    start_from: str | Path | None = option(None, "continue from an IR file of --dump-ir", metavar="FILE")
    debug: Debug = Debug()

    def recipe(self) -> Recipe:
        """The choices alone."""
        return Recipe(**self.options())


@dataclass(frozen=True, kw_only=True)
class SeveralOptions(CompileOptions):
    """A compilation for several targets."""

    targets: Sequence[str] = option(
        (),
        "instead of --target, several: an artifact each, in a folder of its name in DIR; equal files are "
        "stored once",
        metavar="NAME,...",
        parse=split,
        joined=True,
    )


@dataclass(frozen=True, kw_only=True)
class OptOptions:
    """What passes run with, beside their pipeline."""

    model: str | Path | None = option(None, "checkpoint, for passes that read weights", metavar="MODEL")
    target: str = like(Recipe, "target")
    calibration: Sequence[str | Path] = like(Recipe, "calibration")
    calibration_tokens: int = like(Recipe, "calibration_tokens")
    cache: str | Path | None = like(CompileOptions, "cache")
    seed: int = like(Recipe, "seed")
    debug: Debug = Debug()


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """Which model types the gate is run on."""

    verify: str | None = option(None, "run the gate on this model type, or on all, now", metavar="TYPE|all")
    cache: str | Path | None = like(CompileOptions, "cache")


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What experts kernels are timed on."""

    bits: Sequence[str] = option(
        ("4", "3", "2", "1"),
        "bits, or formats; 4/2/1: experts that take these in turn [default: 4,3,2,1]",
        metavar="B,...",
        parse=split,
        joined=True,
    )
    tokens: Sequence[int] = option(
        (1, 32, 512), "tokens a call [default: 1,32,512]", metavar="N,...", parse=split_integers, joined=True
    )
    target: str = like(Recipe, "target")
    threads: int | None = option(None, "threads [default: all cores]", metavar="N")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a prompt is continued."""

    max_tokens: int | None = option(
        None,
        f"tokens to produce at most [default: {DEFAULT_TOKENS}, or what fits]",
        metavar="N",
        flags=("--max-tokens", "-n"),
    )
    temperature: float | None = option(
        None, "0 takes the most likely token [default: the model's own]", metavar="X"
    )
    top_p: float | None = option(
        None, "draw from the fewest tokens of this probability [default: the model's own]", metavar="X"
    )
    top_k: int | None = option(
        None, "draw from the N most likely tokens [default: the model's own]", metavar="N"
    )
    seed: int | None = option(None, "makes drawing repeatable", metavar="N")
    stop: Sequence[str] = option((), "end before it; repeatable", metavar="TEXT")


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Which kernels' plans are searched, and for how long."""

    shapes: Sequence[str] = option(
        ("qwen3-30b-a3b", "olmoe-1b-7b", "mixtral-8x7b", "deepseek-v2-lite", "gpt-oss-20b"),
        "models whose experts are tuned, or a model's folder [default: all known]",
        metavar="NAME,...",
        flags=("--shape",),
        parse=split,
        joined=True,
    )
    bits: Sequence[str] = option(
        (
            "int4-g128-s8",
            "int3-g128-sym-s8",
            "int2-g128-sym-s8",
            "int1-g128-sym-s8",
            "int4-g128-s8/int3-g128-sym-s8/int2-g128-sym-s8",
        ),
        "bits, or formats; 4/2/1: experts that take these in turn [default: the compiler's candidates]",
        metavar="B,...",
        parse=split,
        joined=True,
    )
    trials: int = option(16, "plans tried of each kernel", metavar="N")
    target: str = like(Recipe, "target")
    threads: int | None = like(KernelOptions, "threads")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is timed of an artifact."""

    prompts: Sequence[int] = option(
        (512,),
        "lengths of prompts to time [default: 512]",
        metavar="N,...",
        flags=("--prompt", "-p"),
        parse=split_integers,
        joined=True,
    )
    generated: Sequence[int] = option(
        (128,),
        "numbers of tokens to generate [default: 128]",
        metavar="N,...",
        flags=("--generate", "-n"),
        parse=split_integers,
        joined=True,
    )
    batch: int = option(1, "sequences at once", metavar="N")
    repetitions: int = option(5, "times each", metavar="N", flags=("--repetitions", "-r"))
    threads: int | None = like(KernelOptions, "threads")


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """What a random artifact is made of, and packed for."""

    experts: Sequence[str] = option(
        ("int3-g64",),
        "format of the experts, or several as int2-g64:3,int4-g64:1 [default: int3-g64]",
        metavar="FORMAT,...",
        flags=("--bits",),
        parse=split,
        joined=True,
    )
    layers: int | None = option(None, "keep the first N layers only [default: all]", metavar="N")
    linears: str = like(Recipe, "linears")
    activations: str | None = like(Recipe, "activations")
    target: str = like(Recipe, "target")
    context: int | None = like(Recipe, "context")
    max_batch: int = like(Recipe, "max_batch")
    kv_cache: str | None = like(Recipe, "kv_cache")
    seed: int = like(Recipe, "seed")
    cache: str | Path | None = like(CompileOptions, "cache")
    force: bool = like(CompileOptions, "force")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A budget, one of `bits`, `size` and `latency`, and what the model is to run on."""

    bits: float | None = option(
        None, "expert file bits per weight, scales and all [default: 3, without another budget]", metavar="N"
    )
    size: int | None = option(
        None, "size of the artifact at most, such as 6GiB", metavar="BYTES", parse=parse_bytes
    )
    latency: float | None = option(
        None, "time of a decoded token at most, such as 25ms", metavar="TIME", parse=parse_seconds
    )
    linears: str = like(Recipe, "linears")
    allocator: str = option(
        "global",
        "who decides on bits: uniform gives all experts one format, any other spends the budget",
        metavar="NAME",
    )
    target: str = like(Recipe, "target")
    bandwidth: float | None = option(
        None, "memory bandwidth of the machine in GB/s [default: the target's]", metavar="GB/S"
    )
    context: int | None = like(Recipe, "context")
    max_batch: int = like(Recipe, "max_batch")
    kv_cache: str | None = like(Recipe, "kv_cache")
    calibration_tokens: int = like(Recipe, "calibration_tokens")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Which predictions of an artifact are scored, and beside what."""

    reference: str | Path | None = option(None, "checkpoint to compare the predictions with", metavar="MODEL")
    tokens: int | None = option(None, "score the first N tokens of each file [default: all]", metavar="N")
    window: int | None = option(
        None, "tokens of context a prediction may see [default: 512, or the context]", metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """What plans are compared on: text, calibration text, and what happens to the other matrices."""

    bits: Sequence[float] = option(
        (), "expert file bits per weight [default: 2.5]", metavar="N,...", parse=split_numbers, joined=True
    )
    linears: str = option("none", "format of the other matrices, or none: as they are", metavar="FORMAT")
    tokens: int | None = like(EvalOptions, "tokens")
    window: int = option(512, "tokens of context a prediction may see", metavar="N")
    calibration: Sequence[str | Path] = like(Recipe, "calibration")
    calibration_tokens: int = like(Recipe, "calibration_tokens")
    cache: str | Path | None = like(CompileOptions, "cache")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ScoringOptions):
    """Plans side by side, and what else they are asked."""

    plans: Sequence[str] = option(
        (),
        "allocator, allocator:quantizer or allocator:quantizer:formats [default: all; with --prune: global]",
        metavar="PLAN,...",
        flags=("--allocators",),
        parse=split,
        joined=True,
    )
    model_bits: Sequence[float] = option(
        (), "file bits per weight of the whole model", metavar="N,...", parse=split_numbers, joined=True
    )
    formats: str = like(Recipe, "formats")
    prior: float = like(Recipe, "prior")
    unseen: Sequence[str | Path] = option(
        (), "text of domains that calibration has not seen, scored apart; repeatable", metavar="FILE"
    )
    tasks: Sequence[str | Path] = option(
        (), "multiple-choice questions, JSON Lines; repeatable", metavar="FILE", flags=("--task",)
    )
    problems: str | Path | None = option(None, "worked problems to solve exactly", metavar="FILE")
    questions: int = option(100, "questions of each file, and problems", metavar="N")
    seeds: Sequence[int] = option(
        (0,), "draw calibration text once with each", metavar="N,...", parse=split_integers, joined=True
    )
    output: str | Path | None = option(
        None, "write the result as JSON here, anew after every row", metavar="FILE", flags=("--output", "-o")
    )


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Rules of expert pruning."""

    prune: Sequence[float] = option(
        (0.2,),
        "compare rules that skip these shares of the experts' work, such as 10%,20%",
        metavar="SHARE,...",
        parse=split_shares,
        joined=True,
    )
    rules: Sequence[str] = option(
        PRUNING_RULES,
        "rules to compare with --prune [default: all]",
        metavar="RULE,...",
        flags=("--prune-rules",),
        parse=split,
        joined=True,
    )
    target: str = option("native", "with --prune: predict speed for this machine", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class PruningOptions(ScoringOptions, RuleOptions):
    """Rules of expert pruning side by side."""

    plans: Sequence[str] = like(CompareOptions, "plans")
    seed: int = like(Recipe, "seed")
