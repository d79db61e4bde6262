"""The whole way, on a small random model: checkpoint -> artifact -> logits, text and scores."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import moqc
import moqc.api
from moqc.calibrate.forward import experts_function, reference_forward
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.skipping import Skipping
from moqc.calibrate.workspace import Workspace
from moqc.errors import BudgetError, UserError
from moqc.evaluate.summary import markdown, table
from moqc.frontend.checkpoint import Checkpoint
from moqc.inputs import read_calibration
from moqc.ir.annotations import BITS
from moqc.ir.text import parse_module
from moqc.manifest import read_manifest
from moqc.options import Debug
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.runtime.sampling import Sampling
from moqc.tensorfile import open_tensors

QUICK = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "activations": "float", "context": 96}
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint folder, a cache and a text file; `compile` uses them."""

    folder: object
    cache: object
    text: object

    def compile(self, out, **options):
        return moqc.compile(self.folder, out, cache=self.cache, **{**QUICK, **options})


@pytest.fixture(scope="session")
def model(tmp_path_factory, write_tokenizer):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("model")
    eos = write_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=eos + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=None,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(TEXT)
    return Model(folder, tmp_path_factory.mktemp("cache"), text)


@pytest.fixture(scope="session")
def compiled(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "artifact"
    model.compile(out)
    return out


@pytest.fixture(scope="session")
def reference(model, compiled):
    """tokens [n, S] -> logits of the torch model with the weights the artifact has."""
    checkpoint = Checkpoint.open(model.folder)
    manifest = read_manifest(compiled)
    store = quantize_experts(checkpoint, manifest.bits, "rtn", None, Workspace(model.cache))
    linears = {
        site: quantize_rtn(checkpoint.load(f"{site}.weight").float(), Format.parse(fmt))
        for site, fmt in manifest.linear_bits.items()
    }
    linears |= {
        name.removesuffix(".weight"): linears[stored.removesuffix(".weight")]
        for name, stored in checkpoint.tied.items()
    }

    def forward(tokens):
        parts = reference_forward(checkpoint, torch.as_tensor(tokens), store, linears=linears)
        return torch.cat(list(parts)).numpy()

    return forward


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 33), (5, 96)])
def test_logits_equal_torch_with_the_same_weights(compiled, reference, shape):
    tokens = np.random.default_rng(shape[1]).integers(0, 256, shape)
    assert relative_error(moqc.load(compiled).forward(tokens), reference(tokens)) < 1e-4


def test_greedy_text_equals_torch(compiled, reference):
    artifact = moqc.load(compiled)
    for prompt in ("The", "é"):
        ids = artifact.encode(prompt)
        produced = list(artifact.tokens(ids, Sampling(), max_tokens=24))
        choices = reference(np.array([[*ids, *produced]]))[0].argmax(-1)[len(ids) - 1 :]
        assert produced == list(choices[: len(produced)])
        assert len(produced) == 24 or choices[len(produced)] == 256


def test_ragged_prompts_together_equal_one_by_one(compiled):
    """Also in chunks, whose padding must not be seen: nine prompts in rows of four."""
    artifact = moqc.load(compiled)
    prompts = [TEXT[: 1 + 7 * number] for number in range(9)]
    single = [artifact.generate(prompt, max_tokens=12) for prompt in prompts]
    assert artifact.generate(prompts, max_tokens=12) == single
    chunked = artifact.manifest.cache.model_copy(update={"chunk": 5})
    artifact.manifest = artifact.manifest.model_copy(update={"cache": chunked})
    assert artifact.generate(prompts, max_tokens=12) == single


def test_logits_of_ragged_rows_equal_torch(compiled, reference):
    session = moqc.load(compiled).session()
    tokens, lengths = np.random.default_rng(5).integers(0, 256, (4, 23)), (23, 1, 9, 16)
    places = np.arange(23)
    positions = np.where(places < np.array(lengths)[:, None], places, -1)
    logits = session.run_at(np.where(positions < 0, 0, tokens), positions)
    for row, length in enumerate(lengths):
        assert relative_error(logits[row, :length], reference(tokens[row : row + 1, :length])[0]) < 1e-4
    step = session.run_at(np.full((4, 1), 7), np.array(lengths)[:, None])
    for row, length in enumerate(lengths):
        longer = np.array([[*tokens[row, :length], 7]])
        assert relative_error(step[row, 0], reference(longer)[0, -1]) < 1e-4


def test_scores_equal_those_of_the_reference(compiled, reference, model):
    from moqc.evaluate.metrics import Accumulator, evaluation_windows

    result = moqc.eval(compiled, [model.text], reference=model.folder, window=64, tokens=512)
    windows = evaluation_windows([model.text], compiled / "tokenizer.json", window=64, tokens=512)["text"]
    original = torch.cat(list(reference_forward(Checkpoint.open(model.folder), torch.from_numpy(windows))))
    accumulator = Accumulator()
    accumulator.add(windows, reference(windows), original.numpy())
    expected = accumulator.scores()
    assert result.scores.tokens == expected.tokens == 8 * 63
    assert result.scores.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
    assert result.scores.kld_mean == pytest.approx(expected.kld_mean, rel=1e-3)
    assert result.scores.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.01)


def test_manifest_tells_what_was_done(compiled, model):
    manifest = read_manifest(compiled)
    checkpoint = Checkpoint.open(model.folder)
    assert manifest.source.fingerprint == checkpoint.fingerprint
    assert manifest.pipeline.startswith("allocate-bits")
    assert manifest.generation.eos_token_ids == (256,)
    assert (manifest.cache.context, manifest.cache.batch, manifest.vocabulary) == (96, 4, 257)
    stored = open_tensors(compiled / "params-00001.safetensors")
    experts = sum(t.data.nbytes for name, t in stored.items() if ".mlp.experts." in name)
    weights = 2 * 4 * 3 * 48 * 64
    assert manifest.sizes.expert_file_bits_per_weight == pytest.approx(8 * experts / weights)
    assert manifest.sizes.expert_file_bits_per_weight <= 3.0
    total = 257 * 64 + weights + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 2 * 16 + 4 * 64 + 2 * 64) + 64
    assert manifest.sizes.model_file_bits_per_weight == pytest.approx(
        8 * manifest.sizes.parameter_bytes / total
    )
    assert stored["model.norm.weight"].dtype == "BF16"  # stored as it was, tied table once, packed
    assert not any(name.startswith("lm_head") for name in stored)


def test_int8_activations_stay_close(compiled, reference, model, tmp_path):
    model.compile(tmp_path / "out", activations="int8")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    error = relative_error(moqc.load(tmp_path / "out").forward(tokens), reference(tokens))
    assert 1e-5 < error < 0.1


def test_an_artifact_is_not_replaced_without_force(compiled, model):
    before = read_manifest(compiled)
    with pytest.raises(UserError, match="--force"):
        model.compile(compiled)
    assert read_manifest(compiled) == before


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"bits": 0.5}, BudgetError, "reach"),
        ({"bits": 12.0}, BudgetError, "reach"),
        ({"bits": -1.0}, BudgetError, "bits"),
        ({"bits": 17.0}, BudgetError, "bits"),
        ({"linears": "int5-g64"}, UserError, "int5-g64|no format"),
        ({"activations": "int4"}, UserError, "activations"),
        ({"quantizer": "mcmoe"}, UserError, "mcmoe"),
        ({"context": 129}, UserError, "1 to 128"),
        ({"max_batch": 0}, UserError, "max-batch"),
        (
            {
                "pipeline": "schedule{",
            },
            UserError,
            "expected",
        ),
        ({"pipeline": "plan-cache"}, UserError, "no legalize"),
        ({"seed": -1, "quantizer": "gptq"}, UserError, "seed"),
        ({"calibration": ["/nowhere"], "quantizer": "gptq"}, UserError, "/nowhere"),
    ],
)
def test_wrong_options_leave_nothing(model, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        model.compile(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_compilation_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moqc.package.record_files", interrupt)  # everything but the manifest is written
    with pytest.raises(KeyboardInterrupt):
        model.compile(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert not list(model.cache.glob("params-*"))


def test_dumped_ir_can_be_continued_to_the_same_artifact(model, compiled, tmp_path):
    dump = tmp_path / "dump"
    text = model.compile(None, debug=Debug(dump_ir=dump, stop_after="quantize-linears"))
    last = sorted(dump.glob("*.py"))[-1]
    assert last.name == "002_quantize-linears.py"
    assert last.read_text() == text
    # What the kernels read was decided by the passes that ran before.
    manifest = model.compile(tmp_path / "out", start_from=last, activations="int8")
    assert manifest.activations == "float"
    assert (
        manifest.files["params-00001.safetensors"]
        == read_manifest(compiled).files["params-00001.safetensors"]
    )


def test_opt_runs_passes_on_text(model, tmp_path):
    dump = tmp_path / "dump"
    text = model.compile(None, debug=Debug(dump_ir=dump, stop_after="allocate-bits"))
    assert "moqc.bits" in text
    changed = moqc.opt(
        dump / "000_allocate-bits.py", "allocate-bits{bits=2.7 allocator=uniform formats=int2-g64}"
    )
    formats = {
        name for site in BITS.of(parse_module(changed)).values() for names in site.values() for name in names
    }
    assert formats == {"int2-g64"}


def test_compare_prints_comparable_rows(model, tmp_path):
    options = {
        "bits": [3.0],
        "plans": ["uniform:rtn", "global:rtn"],
        "calibration": [model.text],
        "calibration_tokens": 512,
        "cache": model.cache,
        "window": 64,
        "tokens": 512,
        "seeds": [0, 1],
        "unseen": [model.text],
        "tasks": [tmp_path / "task.jsonl"],
        "problems": tmp_path / "problems.txt",
        "output": tmp_path / "out.json",
    }
    question = {"query": "Il était", "choices": ["une fois", "un roi", "dix"]}
    options["tasks"][0].write_text(json.dumps(question))
    options["problems"].write_text("Problem: a?\nSolution: b")
    result = moqc.compare(model.folder, [model.text], **options)
    content = json.loads(options["output"].read_text())
    assert content == json.loads(json.dumps(result.to_dict()))
    assert [row["seed"] for row in content["rows"]] == [0, 0, 1, 1]
    assert (content["questions"], content["problems"]) == (1, 1)
    content["rows"] = content["rows"][:2]
    assert [row["plan"] for row in content["rows"]] == ["uniform:rtn", "global:rtn"]
    assert [row["allocator"] for row in content["rows"]] == ["uniform", "global"]
    assert {row["quantizer"] for row in content["rows"]} == {"rtn"}
    assert {row["target_bits"] for row in content["rows"]} == {3.0}
    for row in content["rows"]:
        assert row["expert_file_bits_per_weight"] <= row["target_bits"]
        assert row["model_file_bits_per_weight"] > row["expert_file_bits_per_weight"]
        assert row["loss_increase"] == pytest.approx(row["loss"] - content["reference_loss"])
        assert row["unseen_increase"] == pytest.approx(row["loss_increase"])  # the same text here
        assert row["increases"] == {model.text.stem: pytest.approx(row["loss_increase"])}
        assert row["flips"] in (0, 1)
        assert row["exact"] in (0, 1)
        assert not row["simulated"]
    header, lines = table(result)
    assert len(lines) == 2
    assert lines[0][header.index("seeds")] == 2
    increases = [row.loss_increase for row in result.rows if row.plan == "uniform:rtn"]
    assert lines[0][header.index("increase")] == pytest.approx(sum(increases) / 2)
    assert f"| uniform:rtn | {result.rows[0].target_bits:g} |" in markdown(result)
    assert moqc.compare(model.folder, [model.text], **options) == result


def test_an_interrupted_comparison_leaves_its_rows(model, tmp_path, monkeypatch):
    from moqc.evaluate import compare

    def interrupted(*arguments):
        if len(json.loads(output.read_text())["rows"]) == 1:
            raise KeyboardInterrupt
        return one_row(*arguments)

    one_row, output = compare._row, tmp_path / "out.json"
    monkeypatch.setattr(compare, "_row", interrupted)
    options = {"calibration": [model.text], "calibration_tokens": 512, "cache": model.cache, "window": 64}
    plans = ["uniform:rtn", "global:rtn"]
    with pytest.raises(KeyboardInterrupt):
        moqc.compare(model.folder, [model.text], bits=[3.0], plans=plans, tokens=64, output=output, **options)
    assert [row["plan"] for row in json.loads(output.read_text())["rows"]] == ["uniform:rtn"]


def test_compare_without_a_plan_in_reach_says_why(model, caplog):
    options = {"calibration": [model.text], "calibration_tokens": 512, "cache": model.cache, "window": 64}
    plans = ["uniform:rtn", "global:rtn"]
    with pytest.raises(BudgetError, match=r"uniform:rtn at 12 bits: .* reach .*; global:rtn at 12 bits: "):
        moqc.compare(model.folder, [model.text], bits=[12.0], plans=plans, tokens=64, **options)
    with pytest.raises(BudgetError, match="above 0"):
        moqc.compare(model.folder, [model.text], bits=[3.0, float("nan")], plans=plans, tokens=64, **options)
    result = moqc.compare(model.folder, [model.text], bits=[12.0, 3.0], plans=plans[:1], tokens=64, **options)
    assert [row.target_bits for row in result.rows] == [3.0]


def test_card_analysis_and_recipe_are_kept(compiled, model):
    """The artifact says how it was made: the recipe compiles it again, the card has the command."""
    recipe = moqc.api.recipe(compiled)
    assert {key: recipe.changed()[key] for key in ("allocator", "quantizer", "activations", "context")} == {
        key: QUICK[key] for key in ("allocator", "quantizer", "activations", "context")
    }
    card = (compiled / "README.md").read_text()
    assert recipe.command(str(model.folder), f"{model.folder.name}-moqc") in card
    analysis = json.loads((compiled / "analysis.json").read_text())
    assert list(analysis["sites"]) == list(read_manifest(compiled).bits)
    assert analysis["annotations"] == {}  # uniform with rtn measures nothing


def test_plan_counts_the_same_bytes(compiled, model):
    """Weights to the byte; cache shapes too."""
    manifest = read_manifest(compiled)
    same = {"context": QUICK["context"], "kv_cache": manifest.cache.dtype}
    plan = moqc.plan(model.folder, bits=QUICK["bits"], allocator="uniform", **same)
    assert plan.chosen.stored.parameter_bytes == manifest.sizes.parameter_bytes
    elements = sum(shape[1] * shape[3] for shape in manifest.cache.tensors)
    assert plan.chosen.stored.kv_bytes_per_token == 4 * elements


def test_a_pruned_model_skips_and_says_what(model, tmp_path):
    """What the artifact computes is the rule in front of the experts; the manifest has the coverage."""
    options = {"prune": 0.3, "cold_expert_policy": "remove", "linears": "none", "seed": 0}
    calibration = {"calibration": [model.text], "calibration_tokens": 512}
    model.compile(tmp_path / "out", **options, **calibration)
    manifest = read_manifest(tmp_path / "out")
    chosen = sum(sum(site.chosen) for site in manifest.pruning.values())
    kept = sum(sum(site.kept) for site in manifest.pruning.values())
    assert len(manifest.pruning) == 2
    assert 1 - kept / chosen == pytest.approx(0.3, abs=0.05)
    for site in manifest.pruning.values():
        assert site.policy == "remove"
        assert list(site.cold) == [expert for expert, pairs in enumerate(site.kept) if pairs == 0]

    checkpoint = Checkpoint.open(model.folder)
    workspace = Workspace(model.cache)
    texts = read_calibration(checkpoint, **{"files": [model.text], "tokens": 512, "seed": 0})
    prunings = Skipping.of(checkpoint, texts, workspace).prunings("mass", 0.3)
    for site, pruning in prunings.items():
        pruning.strength[list(manifest.pruning[site].cold)] = 0
    store = quantize_experts(checkpoint, manifest.bits, "rtn", None, workspace)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    layered = LayeredModel(checkpoint)
    stream, pruned = layered.start([torch.from_numpy(tokens)]), PrunedExperts(prunings, 40)
    for index in range(layered.layer_count):
        with layered.layer(index) as layer:
            layer.run(stream, pruned.around(experts_function(layered, index, store, "float")))
    (expected,) = layered.logits(stream)
    assert pruned.skipped > 0.05
    found = moqc.load(tmp_path / "out").forward(tokens[0].tolist())
    assert relative_error(found, expected[0].numpy()) < 1e-4
