import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from moqc.errors import ArtifactError, TargetError, UserError
from moqc.manifest import LIBRARY, MANIFEST, read_manifest, write_manifest
from moqc.runtime.artifact import load
from moqc.runtime.sampling import Sampling


@pytest.fixture(scope="module")
def artifact(toy):
    return load(toy.folder)


@pytest.fixture
def copy(toy, tmp_path):
    return shutil.copytree(toy.folder, tmp_path / "copy")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 8), (2, 9), (3, 20), (5, 64)])
def test_forward_matches_reference_across_chunks_and_batches(artifact, toy, rows, length):
    ids = np.random.default_rng(length).integers(0, toy.eos, (rows, length))
    np.testing.assert_allclose(artifact.forward(ids), toy.logits(ids), rtol=1e-5, atol=1e-5)


def test_forward_of_one_sequence_drops_the_batch_axis(artifact, toy):
    assert artifact.forward([1, 2, 3]).shape == (3, toy.eos + 1)


def test_session_in_pieces_equals_one_call(artifact):
    ids = np.arange(20)[None]
    session = artifact.session()
    pieces = [session.extend(ids[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 17), (17, 20))]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), artifact.forward(ids))
    assert session.length == 20


def test_generate_recites_and_stops_at_the_end_token(artifact, toy):
    assert artifact.generate("I") == toy.text[1:]


def test_prompts_of_any_lengths_together(artifact, toy):
    """Each says the text from its own position on: five prompts, two rows, chunks of eight tokens."""
    prompts = ["I", "Il était une", toy.text[:30], "Il", "Il é"]
    single = [artifact.generate(prompt) for prompt in prompts]
    assert single == [toy.text[len(prompt) :] for prompt in prompts]
    assert artifact.generate(prompts) == single
    encoded = [artifact.encode(prompt) for prompt in prompts]
    assert artifact.generate(encoded) == single
    for options in (
        {"max_tokens": 3},
        {"stop": ["une"]},
        {"temperature": 2.0, "top_p": 0.9, "seed": 3, "max_tokens": 20},
    ):
        single = [artifact.generate(prompt, **options) for prompt in prompts]
        assert artifact.generate(prompts, **options) == single


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        (["I", ""], {}, "prompt is empty"),
        (["I", "a" * 60], {"max_tokens": 5}, "prompt 2 of 2: .*context of 64"),
        ([[1], [1, 257]], {}, "prompt 2: token ids"),
    ],
)
def test_bad_lists_of_prompts(artifact, prompts, options, says):
    with pytest.raises(UserError, match=says):
        artifact.generate(prompts, **options)


def test_stream_never_splits_a_character(artifact, toy):
    pieces = list(artifact.stream("I"))
    assert "".join(pieces) == toy.text[1:]
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(toy.text) - 1  # one token a byte: one piece a character


def test_max_tokens_cut_inside_a_character_is_shown_as_replacement(artifact):
    assert artifact.generate("Il ", max_tokens=1) == "\ufffd"  # first byte of the é


def test_stop_string_across_token_boundaries(artifact):
    assert artifact.generate("I", stop=["fois", "une fo"]) == "l était "


def test_temperature_needs_the_seed_to_repeat(artifact):
    options = {"temperature": 3.0, "max_tokens": 30}
    first = artifact.generate("I", seed=7, **options)
    assert artifact.generate("I", seed=7, **options) == first
    assert artifact.generate("I", seed=8, **options) != first


def test_what_is_not_given_is_as_the_model_says(toy):
    model = load(toy.folder)
    assert model.sampling() == Sampling(0.0, 1.0, None, 0)
    usual = model.manifest.generation.model_copy(update={"temperature": 3.0, "top_p": 0.9, "top_k": 40})
    model.manifest = model.manifest.model_copy(update={"generation": usual})
    assert model.sampling(seed=1) == Sampling(3.0, 0.9, 1, 40)
    assert model.sampling(0.0, 1.0, 0) == Sampling()
    drawn = model.generate("I", seed=7, max_tokens=30)
    assert drawn == model.generate("I", seed=7, max_tokens=30, temperature=3.0, top_p=0.9, top_k=40)
    assert drawn != model.generate("I", max_tokens=30, temperature=0)
    assert model.generate(["I"], seed=7, max_tokens=30) == [drawn]


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ("a" * 64, {}, "context of 64"),
        ("a" * 60, {"max_tokens": 5}, "context of 64"),
        ("a", {"max_tokens": 0}, "at least 1"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"top_p": 0.0}, "top-p"),
        ("a", {"top_k": -1}, "top-k"),
        ("a", {"stop": [""]}, "stop"),
        ([-1], {}, "token ids"),
        ([257], {}, "token ids"),
    ],
)
def test_bad_requests(artifact, prompt, options, says):
    with pytest.raises(UserError, match=says):
        artifact.generate(prompt, **options)


def test_forward_refuses_what_does_not_fit(artifact):
    for ids in ([], [[]], [[[1]]], [1.5]):
        with pytest.raises(UserError, match="integers of shape"):
            artifact.forward(ids)
    with pytest.raises(UserError, match="context of 64"):
        artifact.forward([1] * 65)


@pytest.mark.parametrize("name", [LIBRARY, "params-00001.safetensors", "tokenizer.json", "config.json"])
def test_a_changed_byte_is_found(copy, name):
    flip(copy / name, -1 if name == LIBRARY else 20)
    with pytest.raises(ArtifactError, match=name):
        load(copy)


def test_every_changed_byte_of_the_manifest_is_found(copy):
    path = copy / MANIFEST
    size = path.stat().st_size
    for at in {0, 1, size - 1, *range(5, size, 37)}:
        flip(path, at)
        with pytest.raises(ArtifactError, match=MANIFEST):
            read_manifest(copy)
        flip(path, at)
    read_manifest(copy)


def test_large_weights_are_hashed_on_request(copy, monkeypatch):
    flip(copy / "params-00001.safetensors", -1)
    monkeypatch.setattr("moqc.runtime.artifact.HASHED_AT_LOAD", 0)
    load(copy)
    with pytest.raises(ArtifactError, match="params-00001"):
        load(copy, verify=True)


def test_incomplete_folders(copy, tmp_path):
    with pytest.raises(ArtifactError, match="not a moqc artifact"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="compile it first"):
        load(tmp_path)
    with (copy / LIBRARY).open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match="bytes where"):
        load(copy)
    (copy / LIBRARY).unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load(copy)


def test_another_tvm(copy):
    manifest = read_manifest(copy)
    versions = manifest.versions.model_copy(update={"tvm": "0.26.0"})
    write_manifest(copy, manifest.model_copy(update={"versions": versions}))
    with pytest.raises(ArtifactError, match=r"compiled with apache-tvm 0\.26\.0"):
        load(copy)


def test_another_cpu(copy):
    manifest = read_manifest(copy)
    target = manifest.target.model_copy(update={"features": ("avx2", "made_up")})
    write_manifest(copy, manifest.model_copy(update={"target": target}))
    with pytest.raises(TargetError, match="lacks made_up"):
        load(copy)


def test_another_schema(copy):
    content = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(content | {"schema_version": 2}))
    with pytest.raises(ArtifactError, match="schema version 2"):
        load(copy)


def test_runs_without_torch_transformers_and_the_compiler(toy):
    code = (
        "import sys, moqc\n"
        f"print(moqc.load({str(toy.folder)!r}).generate('I', max_tokens=5))\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'tvm.relax', 'rich', 'typer'} & set(sys.modules)))\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libtvm_runtime' in maps, 'libtvm_compiler' in maps or 'libtvm.so' in maps)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["l ét", "[]", "True False"]
