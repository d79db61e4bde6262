"""Bad input through the command line: one line that says what, where and what to do; nothing is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moqc.manifest import seal

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_weights(folder):
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_weights(folder, header, data):
    (folder / WEIGHTS).unlink()  # a link to the example's
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def replace(file, content):
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    replace(folder / "config.json", json.dumps(config))


def missing_shard(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    header, _ = read_weights_of(folder / names[0])
    tensors = [name for name in header if name != "__metadata__"]
    weight_map = {name: names[number > 4] for number, name in enumerate(tensors)}
    replace(folder / INDEX, json.dumps({"weight_map": weight_map}))


def read_weights_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def retype(folder, dtype, bytes_each):
    header, _ = read_weights(folder)
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = end, end + int(np.prod(entry["shape"])) * bytes_each
            entry |= {"dtype": dtype, "data_offsets": [begin, end]}
    write_weights(folder, header, bytes(end))


def header_only(folder, text):
    replace(folder / WEIGHTS, len(text).to_bytes(8, "little") + text.encode())


def gguf_only(folder):
    (folder / WEIGHTS).unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


CHECKPOINTS = {
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors is missing"),
    "index without files": (lambda f: replace(f / INDEX, '{"weight_map": ["a"]}'), "has no weight_map"),
    "index that leaves": (lambda f: replace(f / INDEX, '{"weight_map": {"a": "../b"}}'), "not the name"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no safetensors files"),
    "truncated": (lambda f: replace(f / WEIGHTS, (f / WEIGHTS).read_bytes()[:-9]), "truncated"),
    "truncated header": (lambda f: replace(f / WEIGHTS, (f / WEIGHTS).read_bytes()[:99]), "truncated"),
    "empty weights": (lambda f: replace(f / WEIGHTS, b""), "truncated"),
    "header of a list": (lambda f: header_only(f, "[1]"), "not a safetensors file"),
    "header without offsets": (lambda f: header_only(f, '{"a": {"dtype": "F32"}}'), "data_offsets"),
    "integers": (lambda f: retype(f, "I32", 4), "stored as I32"),
    "float64": (lambda f: retype(f, "F64", 8), "stored as F64"),
    "float8": (lambda f: retype(f, "F8_E4M3", 1), "stored as F8_E4M3"),
    "unknown architecture": (lambda f: configure(f, model_type="warp"), "warp"),
    "dense": (lambda f: configure(f, model_type="qwen3"), "dense"),
    "impossible value": (lambda f: configure(f, num_experts="many"), "expected int"),
    "quantized": (lambda f: configure(f, quantization_config={"quant_method": "gptq"}), "already quantized"),
    "config of bytes": (lambda f: replace(f / "config.json", b"\xff{}"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no tokenizer's content": (lambda f: replace(f / "tokenizer.json", '{"a": 1}'), "not a tokenizer"),
    "generation of a list": (lambda f: replace(f / "generation_config.json", "[1]"), "not a JSON object"),
    "generation without ids": (
        lambda f: replace(f / "generation_config.json", '{"eos_token_id": "x"}'),
        "not token ids",
    ),
    "GGUF": (gguf_only, "GGUF"),
}


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of tiny-moe whose files are links; replace them, do not write to them."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(refused, checkpoint, tmp_path, name):
    spoil, says = CHECKPOINTS[name]
    spoil(checkpoint)
    out = tmp_path / "out"
    options = ["--cache", tmp_path / "cache", "--allocator", "uniform", "--quantizer", "rtn", "-q"]
    error = refused("compile", checkpoint, "-o", out, *options)
    assert says in error
    assert str(checkpoint) in error
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint"}


def test_damaged_numbers(checkpoint):
    from moqc.errors import ModelError
    from moqc.frontend.checkpoint import Checkpoint

    header, data = read_weights(checkpoint)
    name = next(name for name in header if "experts.3.up" in name)
    begin, end = header[name]["data_offsets"]
    write_weights(checkpoint, header, data[:begin] + b"\xff" * (end - begin) + data[end:])
    with pytest.raises(ModelError, match=r"experts\.3\.up.* holds NaN"):
        Checkpoint.open(checkpoint).load("model.layers.0.mlp.experts.up", 3)


def test_not_a_checkpoint(refused, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    out = ["-o", tmp_path / "out"]
    assert "compiled artifact" in refused("compile", toy.folder, *out)
    assert "GGUF" in refused("compile", file, *out)
    assert "no such folder" in refused("compile", tmp_path / "nowhere", *out)
    assert "no such folder" in refused("compile", "owner/name", *out)
    assert "compiled artifact" in refused("eval", toy.folder, "--text", file, "--reference", toy.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_not_an_artifact(refused, tmp_path):
    assert "compile it first" in refused("run", TINY, "--prompt", "a")
    assert "compile it first" in refused("inspect", TINY)
    assert "not a moqc artifact" in refused("verify", tmp_path)
    assert "no such folder" in refused("verify", tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "nan"],
        ["--bits=-1"],
        ["--bits", "17"],
        ["--bits", "inf"],
        ["--linears", "int5"],
        ["--activations", "fp8"],
        ["--context", "0"],
        ["--context", "5000"],
        ["--max-batch", "0"],
        ["--seed=-1", "--quantizer", "gptq"],
        ["--calib-tokens", "0", "--quantizer", "gptq"],
        ["--pipeline", "quantize-experts{"],
        ["--pipeline", "allocate-bits{x=1}"],
        ["--pipeline", "allocate-bits{bits=many}"],
        ["--pipeline", "no-such-pass"],
        ["--pipeline", ""],
        ["--pipeline", "plan-cache"],
        ["--pipeline", "legalize,schedule"],
        ["--print-after", "a,,b"],
        ["--bits", "1.06", "--quantizer", "gptq", "--allocator", "global"],
        ["--override", "foo=3", "--quantizer", "gptq", "--allocator", "global"],
        ["--prior", "2", "--quantizer", "gptq", "--allocator", "global"],
        ["--prune", "10%", "--prune-rule", "foo"],
        ["--prune", "10%", "--prune-rule", "odp-literal"],
    ],
)
def test_options_of_compile(refused, tmp_path, options):
    """All of them are refused before any work is done."""
    first = ["--allocator", "uniform", "--quantizer", "rtn", "--cache", tmp_path / "cache"]
    refused("compile", TINY, "-o", tmp_path / "out", "-q", *first, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.so", "moqc.json", "params-00001.safetensors", "tokenizer.json"])
def test_a_changed_byte(refused, toy, tmp_path, name):
    copy = shutil.copytree(toy.folder, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for command in (["run", copy, "--prompt", "a"], ["verify", copy]):
        error = refused(*command)
        assert name in error
        assert "compile" in error
    (copy / name).unlink()
    assert name in refused("run", copy, "--prompt", "a")


def test_an_artifact_of_another_tvm(refused, toy, tmp_path):
    copy = shutil.copytree(toy.folder, tmp_path / "copy")
    manifest = (copy / "moqc.json").read_text()
    version = json.loads(manifest)["versions"]["tvm"]
    (copy / "moqc.json").write_text(seal(manifest.replace(version, "0.1.2")))
    text = tmp_path / "a.txt"
    text.write_text("some text " * 100)
    for command in (["run", copy, "--prompt", "a"], ["verify", copy], ["eval", copy, "--text", text]):
        error = refused(*command)
        assert "apache-tvm 0.1.2" in error
        assert version in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
        (["--prompt", "long " * 50], "context of 64"),
        (["--prompt", "a", "--max-tokens", "0"], "max-tokens 0"),
        (["--prompt", "a", "--max-tokens", "1000"], "context of 64"),
        (["--prompt", "a", "--temperature", "nan"], "temperature nan"),
        (["--prompt", "a", "--temperature=-0.5"], "temperature -0.5"),
        (["--prompt", "a", "--top-p", "0"], "top-p 0"),
        (["--prompt", "a", "--seed=-1"], "seed -1"),
        (["--prompt", "a", "--stop", ""], "stop"),
    ],
)
def test_options_of_run(refused, toy, options, says):
    assert says in refused("run", toy.folder, *options)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "empty"), (" \n", "empty"), ("tiny", "do not fill one window"), ("été".encode("latin-1"), "UTF-8")],
)
def test_texts(refused, toy, tmp_path, content, says):
    text = tmp_path / "a.txt"
    replace(text, content)
    assert says in refused("eval", toy.folder, "--text", text)
    calib = ["--quantizer", "rtn", "--calib", text, "--cache", tmp_path / "cache"]
    assert says in refused("compile", TINY, "-o", tmp_path / "out", *calib)
    assert says in refused("compare", TINY, "--text", text)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_reference_of_another_vocabulary(refused, toy, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text " * 100)
    error = refused("eval", toy.folder, "--text", text, "--reference", TINY)
    assert "16384 tokens" in error
    assert str(toy.eos + 1) in error


def test_output_folders(refused, toy, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    artifact = shutil.copytree(toy.folder, tmp_path / "artifact")
    assert "--force" in refused("compile", TINY, "-o", artifact)
    (artifact / "notes.txt").write_text("mine")
    assert "notes.txt" in refused("compile", TINY, "-o", artifact, "--force")
    for option in ([], ["--force"]):
        assert "not a moqc artifact" in refused("compile", TINY, "-o", folder, *option)
        assert "not a folder" in refused("compile", TINY, "-o", folder / "thesis.tex", *option)
        assert "cannot write" in refused("compile", TINY, "-o", folder / "thesis.tex" / "out", *option)
        assert "cannot write" in refused("compile", TINY, "-o", "/proc/out", *option)
    assert (folder / "thesis.tex").read_text() == "years"
    assert (artifact / "notes.txt").read_text() == "mine"
    assert (artifact / "moqc.json").is_file()


def test_interrupted(tmp_path):
    """Ctrl-C in the middle of work: exit code 130, one word, no output; what was cached is kept."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = [sys.executable, "-m", "moqc", "compile", str(TINY), "-o", str(out), "--cache", str(cache)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "profile-channels" in line:
                process.send_signal(signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(timeout=60) == 130
    assert lines[-1] == "interrupted\n"
    assert not any("Traceback" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not list(cache.glob("params-*"))
    assert not list(cache.rglob(".tmp-*"))
