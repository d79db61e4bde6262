"""The table of targets, targets of the user's own, and the tools they take."""

import platform
from dataclasses import replace

import pytest

import moqc
from moqc import targets, toolchains
from moqc.errors import TargetError
from moqc.machines.target import Roofline
from moqc.targets import TARGETS, find_target, missing_features, runs_here


def test_every_target_says_what_it_is_and_how_it_was_verified():
    for target in TARGETS.values():
        assert target.doc, target.name
        assert target.verified, target.name
        assert target.device in ("cpu", target.tvm["kind"])


def test_an_unknown_target_names_the_known_ones():
    with pytest.raises(TargetError, match=r"unknown target 'vax': known are native, x86-64-v3, .*FILE\.toml"):
        find_target("vax")
    with pytest.raises(TargetError, match=r"cuda:sm_90@vax': unknown host 'vax': known are x86-64-v3"):
        find_target("cuda:sm_90@vax")
    with pytest.raises(TargetError, match=r"unknown core 'z80': known are cortex-a53"):
        find_target("aarch64:z80")


def test_another_machine_is_missing_whatever_its_flags(monkeypatch):
    native = find_target("native")
    assert runs_here(native)
    assert missing_features(native) == ()
    monkeypatch.setattr(targets.platform, "machine", lambda: "riscv64")
    assert missing_features(native) == (f"an {native.machine} CPU",)
    with pytest.raises(TargetError, match="no kernels for this riscv64 CPU"):
        find_target("native")


def write(folder, text):
    path = folder / "n100.toml"
    path.write_text(text)
    return str(path)


def test_a_target_of_a_file(tmp_path):
    path = write(
        tmp_path,
        'base = "x86-64-v3"\ndoc = "a board"\nmattr = ["+gfni"]\nfeatures = ["avx2", "gfni"]\n'
        '[roofline]\nbandwidth = 2.5e10\nweight_rate = 4e10\nlayer_seconds = 2e-4\nsource = "measured"\n',
    )
    target = find_target(path)
    assert (target.name, target.doc, target.verified) == ("n100", "a board", "")
    assert target.tvm == {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+gfni"]}
    assert target.features == {"avx2", "gfni"}
    assert target.roofline == Roofline(2.5e10, 4e10, 2e-4, "measured")
    assert target.schedules == "cpu"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base = ", "cannot read the target"),
        ('bass = "x86-64-v3"', "unknown key 'bass'"),
        ('doc = "x"', 'needs base = "NAME"'),
        ('base = "other.toml"', 'needs base = "NAME"'),
        ('base = "vax"', "unknown target 'vax'"),
        ('base = "x86-64-v3"\nmcpu = "znver4"', r"need features = \["),
        ('base = "x86-64-v3"\nmattr = ["gfni"]\nfeatures = []', "mattr is a list"),
        ('base = "x86-64-v3"\nfeatures = ["avx2"]', "neither is given"),
        ('base = "cuda"\nmcpu = "x"\nfeatures = []', "are for CPUs"),
        ('base = "x86-64-v3"\n[roofline]\nbandwidth = 1', "needs exactly bandwidth"),
        (
            'base = "x86-64-v3"\n[roofline]\nbandwidth=-1\nweight_rate=1\nlayer_seconds=1\nsource="x"',
            "bandwidth of .* not a positive number",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_key(tmp_path, text, problem):
    with pytest.raises(TargetError, match=problem):
        find_target(write(tmp_path, text))


def test_missing_tools_come_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for machine in ("x86_64", "aarch64"):
        with pytest.raises(TargetError, match="`apt install g"):
            toolchains.linker(machine).require()
    assert toolchains.linker(platform.machine()).programs[0] == "cc"


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("vax", "unknown target 'vax': known are"),
        ("aarch64", r"no linker.*`apt install g"),
        ("jetson-orin", r"no CUDA compiler \(nvcc\)"),
    ],
)
def test_compiling_without_the_tools_is_refused_before_any_work(tmp_path, monkeypatch, target, problem):
    monkeypatch.setitem(toolchains.TOOLS, "nvcc", replace(toolchains.TOOLS["nvcc"], folders=()))
    monkeypatch.setenv("PATH", "")
    # Nor is the model opened: there is none.
    with pytest.raises(TargetError, match=problem):
        moqc.compile(tmp_path / "none", tmp_path / "out", target=target, cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "batch", "chunk"),
    [
        *(("cuda", 4, 2048), ("cuda", 16, 2048), ("cuda", 32, 1024), ("cuda", 64, 512), ("cuda", 500, 512)),
        *(("cuda:sm_80+sm_90", 1, 2048), ("cuda:sm_89", 1, 512), ("jetson-orin", 1, 512)),
        ("x86-64-v4", 4, 512),
    ],
)
def test_prompts_run_in_longer_chunks_where_memory_is_plenty(target, batch, chunk):
    assert find_target(target).chunk_of(batch) == chunk
