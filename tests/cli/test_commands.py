"""The commands as a user runs them: in a process of their own where start-up matters."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from moqc.cli import COMMANDS

SCRIPT = [sys.executable, "-m", "moqc"]


def one_line(error):
    return error.startswith("error: ") and error.count("\n") == 1


def test_help_is_quick_and_loads_no_heavy_library():
    code = (
        "import sys\nsys.argv = ['moqc', '--help']\nfrom moqc.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'tvm', 'tvm_ffi', 'torch', 'transformers', 'numpy', 'scipy', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stderr == "[]\n"
    assert "compile" in run.stdout
    # Processor time: what else runs on the machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version(moqc):
    assert moqc("--version") == (0, "moqc 0.1.0\n", "")


def test_run(moqc, toy):
    code, out, err = moqc("run", toy.folder, "--prompt", "I", "-q")
    assert (code, out, err) == (0, toy.text[1:] + "\n", "")


def test_run_json(moqc, toy):
    code, out, _ = moqc("run", toy.folder, "--prompt", "I", "--max-tokens", 9, "--stop", "tai", "--json")
    content = json.loads(out)
    assert code == 0
    assert set(content) == {"prompt", "text", "prompt_tokens", "tokens", "seconds"}
    assert (content["text"], content["tokens"], content["prompt_tokens"]) == ("l é", 7, 1)


def test_run_streams(toy):
    """The text arrives as it is made, also through a pipe and in a process without torch."""
    command = [*SCRIPT, "run", str(toy.folder), "--prompt", "I", "-q"]
    run = subprocess.run(command, capture_output=True, check=True)
    assert run.stdout.decode() == toy.text[1:] + "\n"
    assert run.stderr == b""


def test_inspect(moqc, toy):
    code, out, _ = moqc("inspect", toy.folder, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["target"] == "x86-64-v3"
    assert content["artifact_bytes"] == sum(path.stat().st_size for path in toy.folder.iterdir())
    assert content["expert_file_bits_per_weight"] == 32.0
    assert 16 < content["model_file_bits_per_weight"] < 17
    assert content["bits"]["layers.0.experts"]["up"] == ["int2-g64", "int3-g64"]
    code, out, _ = moqc("inspect", toy.folder)
    assert code == 0
    assert "1 x int2-g64, 1 x int3-g64" in out


def test_verify(moqc, toy, tmp_path):
    assert moqc("verify", toy.folder)[0] == 0
    copy = shutil.copytree(toy.folder, tmp_path / "copy")
    path = copy / "params-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, err = moqc("verify", copy)
    assert code == 2
    assert out == ""
    assert one_line(err)
    assert "params-00001" in err


def test_eval(moqc, toy, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh" * 8)
    code, out, _ = moqc("eval", toy.folder, "--text", text, "--text", text, "--window", 16, "--json")
    content = json.loads(out)
    assert code == 0
    assert {"loss", "perplexity", "tokens", "kld_mean", "kld_p99", "top1_agreement"} < set(content)
    assert content["tokens"] == 2 * 4 * 15
    assert content["kld_mean"] is None
    assert list(content["files"]) == ["a", "a-2"]
    code, out, _ = moqc("eval", toy.folder, "--text", text, "--window", 16, "--tokens", 32)
    assert code == 0
    assert "30" in out.splitlines()[1].split()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "{toy}", "--prompt", ""], "empty"),
        (["run", "/nowhere", "--prompt", "a"], "no such folder"),
        (["run", "{toy}", "--prompt", "a", "--max-tokens", "100"], "context of 64"),
        (["run", "{toy}", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["eval", "{toy}", "--text", "{binary}"], "not UTF-8"),
        (["eval", "{toy}", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["eval", "{toy}", "--text", "{text}", "--window", "65"], "context of 64"),
        (["eval", "{toy}", "--text", "{text}", "--window", "1"], "window"),
        (["inspect", "{folder}"], "not a moqc artifact"),
        (["compile", "/nowhere", "-o", "{folder}/out"], "/nowhere"),
        (["compile", "/nowhere"], "-o"),
        (["compile", "/nowhere", "-o", "{toy}"], "--force"),
        (["compile", "/nowhere", "-o", "{folder}", "--force"], "not a moqc artifact"),
        (["compile", "/nowhere", "-o", "/proc/x/out"], "cannot write"),
        (["compile", "/nowhere", "-o", "{folder}/out", "--target", "z80"], "z80"),
        (["compile", "/nowhere", "-o", "{folder}/out", "--allocator", "oracle"], "oracle"),
        (["compile", "/nowhere", "-o", "{folder}/out", "--quantizer", "spqr"], "spqr"),
        (["compare", "/nowhere", "--text", "{text}", "--bits", "2,x"], "numbers"),
        (["compare", "/nowhere", "--text", "{text}", "--allocators", "global,,pmq"], "empty"),
        (["opt", "/nowhere.py"], "/nowhere.py"),
        (["opt", "{text}"], "not an IR module"),
        (["opt", "{text}", "--pipeline", "no-such-pass"], "no-such-pass"),
        (["opt", "{text}", "--pipeline", "@/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(moqc, toy, tmp_path, arguments, says):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text").write_text("word " * 100)
    places = {"toy": toy.folder, "folder": folder, "binary": tmp_path / "binary", "text": tmp_path / "text"}
    code, out, err = moqc(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert out == ""
    assert one_line(err), err
    assert says in err
    assert sorted(path.name for path in folder.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "'ARTIFACT'; see `moqc run -h`"),
        (["frobnicate"], "'frobnicate'; see `moqc -h`"),
        (["run", "x", "--prompt", "a", "--seed", "pi"], "'--seed'"),
        (["compile", "x", "--bits", "few"], "'--bits'"),
        (["eval", "x"], "'--text'"),
        (["passes", "x"], "(x); see `moqc passes -h`"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(moqc, arguments, says):
    code, out, err = moqc(*arguments)
    assert code == 2
    assert out == ""
    assert one_line(err), err
    assert says in err


def test_nothing_at_all_shows_the_help(moqc):
    code, out, err = moqc()
    assert code == 2
    assert out == ""
    assert "compile" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_with_options_that_exist(moqc, command):
    code, out, err = moqc(command, "--help")
    assert (code, err) == (0, "")
    description, _, example = out.partition("Example: ")
    assert example.startswith(f"moqc {command} ")
    assert all(word in description for word in example.split() if word.startswith("-"))


@pytest.mark.parametrize(
    ("options", "shown"), [([], False), (["-q"], False), (["-v"], True), (["-v", "-q"], False)]
)
def test_verbose_and_quiet(moqc, toy, tmp_path, options, shown):
    text = tmp_path / "a.txt"
    text.write_text("abcdefgh" * 8)
    before = [option for option in options if option == "-v"]
    after = [option for option in options if option == "-q"]
    code, _, err = moqc(*before, "eval", toy.folder, "--text", text, *after)
    assert code == 0
    assert ("loading" in err) == shown


def test_bugs_ask_for_a_report(moqc, toy, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("moqc.api.inspect", fail)
    code, _, err = moqc("inspect", toy.folder)
    assert code == 1
    assert "ZeroDivisionError: boom" in err
    assert "please report" in err.splitlines()[-1]


def test_interrupt_is_130(moqc, toy, monkeypatch):
    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("moqc.api.inspect", interrupt)
    assert moqc("inspect", toy.folder) == (130, "", "interrupted\n")


def test_an_interrupt_that_tvm_swallows_is_one_all_the_same(moqc, toy, monkeypatch):
    def interrupt(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError from None

    monkeypatch.setattr("moqc.api.inspect", interrupt)
    assert moqc("inspect", toy.folder) == (130, "", "interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_pipe_is_no_bug(toy):
    read, write = os.pipe()
    os.close(read)
    command = [*SCRIPT, "run", str(toy.folder), "--prompt", "I", "-q"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert b"please report" not in run.stderr


@pytest.mark.parametrize("command", ["targets", "formats", "allocators", "passes", "doctor"])
def test_lists(moqc, command):
    code, out, _ = moqc(command)
    assert code == 0
    assert len(out.splitlines()) > 3
    code, out, _ = moqc(command, "--json")
    assert code == 0
    assert json.loads(out)


def test_formats_count_scales_and_zeros(moqc):
    rows = {row["name"]: row["file_bits_per_weight"] for row in json.loads(moqc("formats", "--json")[1])}
    assert rows["int2-g64"] == 2.375
    assert rows["int4-g128-sym"] == 4.125
