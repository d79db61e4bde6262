"""The artifact computes what transformers computes with the weights the artifact stores.

The weights are unpacked from the artifact's own files and put into the model of transformers: experts,
linears and embedding alike. On that side nothing of moqc is used but `quant.pack`, and the reference forward
for int8 activations.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moqc
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.forward import reference_forward
from moqc.calibrate.store import ProjectionResult, substituted
from moqc.evaluate.metrics import Accumulator, evaluation_windows
from moqc.frontend.checkpoint import Checkpoint
from moqc.manifest import read_manifest
from moqc.quant.formats import Format
from moqc.quant.hadamard import rotate
from moqc.quant.pack import Packed, unpack
from moqc.quant.tensor import Quantized
from moqc.tensorfile import open_tensors

ROOT = Path(__file__).parents[1]
TINY, TEST_TEXT = ROOT / "examples" / "models" / "tiny-moe", ROOT / "examples" / "data" / "test.txt"
PROMPTS = {
    "en": "It was a dark night, and the old man walked slowly towards the house at the end of",
    "fr": "Il était une fois, dans un petit village au bord de la mer, une jeune fille qui",
    "maths": "Let f be a continuous function on [0, 1] such that f(0) = f(1) = 0. Prove that there",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "short": "A",
}
PROJECTIONS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Stored:
    """The weights of an artifact, read from its files."""

    folder: Path
    tensors: dict[str, np.ndarray]

    @classmethod
    def read(cls, folder: Path) -> Stored:
        tensors = {}
        for path in folder.glob("params-*.safetensors"):
            for name, stored in open_tensors(path).items():
                is_half = stored.dtype == "BF16"
                tensors[name] = np.empty(stored.data.shape, np.float32 if is_half else stored.data.dtype)
                stored.copy_to(tensors[name])
        return cls(folder, tensors)

    def matrix(self, prefix: str, fmt: str, rows: int, columns: int) -> Quantized:
        """A packed matrix or stack of them."""
        parts = [self.tensors.get(f"{prefix}.{part}") for part in ("codes", "scales", "zeros")]
        return unpack(Packed(*parts), Format.parse(fmt), rows, columns)

    def linears(self, checkpoint: Checkpoint) -> dict[str, Quantized]:
        """Site -> matrix, tied ones under both names."""
        found = {
            site: self.matrix(site, fmt, *checkpoint.shape(f"{site}.weight"))
            for site, fmt in read_manifest(self.folder).linear_bits.items()
        }
        tied = {
            name.removesuffix(".weight"): of.removesuffix(".weight") for name, of in checkpoint.tied.items()
        }
        return found | {name: found[of] for name, of in tied.items() if of in found}

    def experts(self, site: str, projection: str, rows: int, columns: int) -> torch.Tensor:
        """All experts of a projection, float32 [E, rows, columns]."""
        formats = read_manifest(self.folder).bits[site][projection]
        dense = {}
        for expert, fmt in enumerate(formats):
            number, index = self.tensors[f"{site}.table"][PROJECTIONS.index(projection), expert]
            prefix = f"{site}.{projection}.{number}"
            if prefix not in dense:
                dense[prefix] = self.matrix(prefix, fmt, rows, columns).dequantize()
            dense[expert] = dense[prefix][index]
        return torch.stack([dense[expert] for expert in range(len(formats))])


@dataclasses.dataclass(frozen=True)
class _Experts:
    """What `reference_forward` reads of a store of experts, from the artifact."""

    stored: Stored
    config: Any

    @property
    def rotated(self) -> bool:
        return read_manifest(self.stored.folder).rotated

    def site(self, site: str) -> dict[str, ProjectionResult]:
        inner, hidden = self.config.moe_intermediate_size, self.config.hidden_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        return {
            name: ProjectionResult(simulated=self.stored.experts(site, name, *shape))
            for name, shape in shapes.items()
        }

    def block(self, site: str, weights: ExpertWeights) -> ExpertWeights:
        return substituted(weights.rotated() if self.rotated else weights, self.site(site))


@dataclasses.dataclass(frozen=True)
class _Noisy:
    """A matrix with relative noise."""

    matrix: Quantized
    noise: float

    def dequantize(self) -> torch.Tensor:
        dense = self.matrix.dequantize()
        return dense * (1 + self.noise * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0)))


@dataclasses.dataclass(frozen=True)
class Pair:
    """A checkpoint and its artifact in both modes of activations."""

    model: Path
    artifacts: dict[str, Path]
    text: Path
    tokens: int
    window: int

    def transformers(self) -> torch.nn.Module:
        """transformers' model, its weights replaced by those that the float artifact stores."""
        checkpoint, stored = Checkpoint.open(self.model), Stored.read(self.artifacts["float"])
        manifest = read_manifest(stored.folder)
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32, local_files_only=True)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        replaced = set()
        with torch.no_grad():
            for site, matrix in stored.linears(checkpoint).items():
                parameters[f"{site}.weight"].copy_(matrix.dequantize())
                replaced.add(f"{site}.weight")
            for site in manifest.bits:
                found = {name: r.dense() for name, r in _Experts(stored, model.config).site(site).items()}
                found["down"] = rotate(found["down"]) if manifest.rotated else found["down"]
                parameters[f"{site}.gate_up_proj"].copy_(torch.cat([found["gate"], found["up"]], dim=1))
                parameters[f"{site}.down_proj"].copy_(found["down"])
                replaced |= {f"{site}.gate_up_proj", f"{site}.down_proj"}
            for name in parameters.keys() - replaced:
                parameters[name].copy_(torch.from_numpy(stored.tensors[name]))
        return model.eval()

    def reference(self, tokens: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """Logits of the reference that models int8 activations, with the weights of the int8 artifact.

        With `noise`, the embeddings are multiplied by 1 + noise * N(0, 1).
        """
        checkpoint, stored = Checkpoint.open(self.model), Stored.read(self.artifacts["int8"])
        experts: Any = _Experts(stored, checkpoint.config)
        linears: dict[str, Any] = stored.linears(checkpoint)
        linears["model.embed_tokens"] = _Noisy(linears["model.embed_tokens"], noise)
        parts = reference_forward(
            checkpoint, torch.from_numpy(tokens), experts, activations="int8", linears=linears
        )
        return torch.cat(list(parts)).numpy()

    def windows(self) -> np.ndarray:
        found = evaluation_windows(
            [self.text], self.model / "tokenizer.json", tokens=self.tokens, window=self.window
        )
        return next(iter(found.values()))


def random_model(folder: Path, eos: int) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=eos + 1, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, intermediate_size=64,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.15, eos_token_id=eos,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module", params=["random", pytest.param("tiny-moe", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory, write_tokenizer) -> Pair:
    cache = tmp_path_factory.mktemp("cache")
    if request.param == "random":
        model = tmp_path_factory.mktemp("random")
        random_model(model, write_tokenizer(model))
        text = model / "text.txt"
        text.write_text("".join(PROMPTS.values()) * 8)
        options = {"bits": 3.0, "allocator": "frequency", "calibration": [text]}
        options |= {"calibration_tokens": 512, "kv_cache": "float32"}
        tokens, window = 512, 64
    else:
        model, text, tokens, window = TINY, TEST_TEXT, 8192, 512
        options = {"bits": 2.5, "calibration_tokens": 4096, "kv_cache": "float32"}
    artifacts = {}
    for mode in ("float", "int8"):
        artifacts[mode] = tmp_path_factory.mktemp("artifacts") / mode
        moqc.compile(model, artifacts[mode], cache=cache, activations=mode, **options)
    return Pair(model, artifacts, text, tokens, window)


@pytest.fixture(scope="module")
def torch_model(pair):
    return pair.transformers()


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(torch.from_numpy(np.asarray(tokens)), use_cache=False).logits.numpy()


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def perplexity(windows, logits):
    accumulator = Accumulator()
    accumulator.add(windows, logits)
    return accumulator.scores().perplexity


def test_the_plan_mixes_formats(pair):
    bits = read_manifest(pair.artifacts["float"]).bits
    assert len({fmt for site in bits.values() for formats in site.values() for fmt in formats}) > 1
    assert read_manifest(pair.artifacts["float"]).linear_bits
    assert read_manifest(pair.artifacts["float"]).rotated


def test_float_logits_equal_transformers(pair, torch_model):
    windows = pair.windows()[:4]
    assert (
        relative_error(moqc.load(pair.artifacts["float"]).forward(windows), logits_of(torch_model, windows))
        < 1e-4
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_transformers(pair, torch_model, prompt):
    artifact = moqc.load(pair.artifacts["float"])
    ids = artifact.encode(PROMPTS[prompt])
    expected = list(ids)
    for _ in range(64):
        token = int(logits_of(torch_model, [expected])[0, -1].argmax())
        if token in artifact.manifest.generation.eos_token_ids:
            break
        expected.append(token)
    text = artifact.tokenizer.decode(expected[len(ids) :])
    assert len(expected) > len(ids)
    assert artifact.generate(PROMPTS[prompt], max_tokens=64) == text


def test_int8_logits_of_single_tokens_equal_the_reference_that_models_them(pair):
    """One token at a time: a rounding that flips reaches all tokens after it; see docs/methods.md."""
    tokens = np.unique(pair.windows())[:512, None]
    result, expected = moqc.load(pair.artifacts["int8"]).forward(tokens), pair.reference(tokens)
    assert relative_error(result, expected) < 2e-3
    errors = np.linalg.norm(result - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 1e-6
    assert np.mean(errors > 2e-3) < 0.05
    exact = moqc.load(pair.artifacts["float"]).forward(tokens)
    assert relative_error(exact, expected) > 4e-3  # the reference does round


def test_int8_logits_are_as_near_the_reference_as_it_is_to_itself(pair):
    """Disturbed by a float rounding of the embeddings, the reference moves as far from itself."""
    windows = pair.windows()[:4]
    expected, disturbed = pair.reference(windows), pair.reference(windows, noise=1e-7)
    result = moqc.load(pair.artifacts["int8"]).forward(windows)
    assert relative_error(result, expected) < max(2e-3, 1.5 * relative_error(disturbed, expected))


def test_perplexity_equals_that_of_the_reference(pair, torch_model):
    windows = pair.windows()
    expected = {
        "float": perplexity(windows, np.concatenate([logits_of(torch_model, [row]) for row in windows])),
        "int8": perplexity(windows, pair.reference(windows)),
    }
    for mode, value in expected.items():
        scores = moqc.eval(pair.artifacts[mode], [pair.text], tokens=pair.tokens, window=pair.window).scores
        assert scores.perplexity == pytest.approx(value, rel=1e-3)


def test_the_certificate_is_in_the_manifest(pair):
    for mode, folder in pair.artifacts.items():
        numerics = read_manifest(folder).numerics
        assert {name.split()[0] for name in numerics} == {"experts", "linear", "embedding"}
        errors = [record.max_relative_error for record in numerics.values()]
        assert max(errors) < {"float": 1e-4, "int8": 2e-3}[mode]
