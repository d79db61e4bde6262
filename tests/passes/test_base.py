"""The contract of a pass, and where passes come from."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from tvm import IRModule

from moqc.errors import InternalError, PipelineError
from moqc.ir.annotations import BITS, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.registry import BUILTIN, find_pass, pass_names, register_pass

IMPORTANCE: Key[dict[str, list[int]]] = Key(
    "test.importance", "test-score", "site -> importance of each expert"
)


@dataclass(frozen=True)
class Base(Pass):
    """A pass that does nothing."""

    name: ClassVar[str] = "base-test"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        return mod


def test_reads_are_checked_before(moe: IRModule) -> None:
    class Reads(Base):
        reads: ClassVar = (IMPORTANCE,)

    with pytest.raises(PipelineError, match=r"base-test reads test\.importance, .* run test-score before"):
        Reads()(moe, PassContext())
    Reads()(IMPORTANCE.put(moe, {"a": [1]}), PassContext())


def test_writes_are_checked_after(moe: IRModule) -> None:
    class Writes(Base):
        writes: ClassVar = (BITS,)

    with pytest.raises(InternalError, match=r"base-test declares that it writes moqc\.bits, and did not"):
        Writes()(moe, PassContext())


def test_required_depends_on_options(moe: IRModule) -> None:
    @dataclass(frozen=True)
    class Depends(Base):
        strict: bool = False

        def required(self):
            return (IMPORTANCE,) if self.strict else ()

    Depends()(moe, PassContext())
    Pipeline((Depends(),)).check()
    with pytest.raises(PipelineError):
        Pipeline((Depends(strict=True),)).check()


def test_editing_the_input_is_an_error(moe: IRModule) -> None:
    class Edits(Base):
        def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
            mod.update_func(mod.get_global_var("main"), mod["main"].with_attr("touched", 1))
            return mod

    with pytest.raises(InternalError, match="base-test changed the module it was given"):
        Edits()(moe, PassContext())


def test_a_pass_returns_a_module(moe: IRModule) -> None:
    class Forgets(Base):
        def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
            return None

    with pytest.raises(InternalError, match="base-test returned NoneType, not an IRModule"):
        Forgets()(moe, PassContext())


def test_what_the_context_lacks_is_named() -> None:
    with pytest.raises(PipelineError, match="quantize-experts needs a checkpoint, and this run has none"):
        PassContext().need("checkpoint", "quantize-experts")
    assert PassContext(seed=3).need("seed", "any") == 3


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_passes_load(name: str) -> None:
    """Each has a doc line, options with a text form, and a test file of its own name."""
    cls = find_pass(name)
    assert (cls.__doc__ or "").partition("\n")[0].endswith(".")
    assert (Path(__file__).parent / f"test_{cls.__module__.rpartition('.')[2]}.py").is_file()


def test_register_and_find() -> None:
    @register_pass
    @dataclass(frozen=True)
    class Registered(Base):
        """Known by its name."""

        name: ClassVar[str] = "base-test-registered"

    assert find_pass("base-test-registered") is Registered
    assert register_pass(Registered) is Registered
    assert pass_names()[: len(BUILTIN)] == list(BUILTIN)
    assert "base-test-registered" in pass_names()
    with pytest.raises(PipelineError, match=r"'base-test-registered' of .*Other is taken by .*Registered"):

        @register_pass
        @dataclass(frozen=True)
        class Other(Base):
            """A second one of the same name."""

            name: ClassVar[str] = "base-test-registered"


def test_a_built_in_name_is_taken() -> None:
    with pytest.raises(PipelineError, match=r"is taken by moqc\.passes\.quantize_experts:QuantizeExperts"):

        @register_pass
        @dataclass(frozen=True)
        class Mine(Base):
            """Claims a name of moqc's."""

            name: ClassVar[str] = "quantize-experts"


def test_classes_that_break_the_rules_are_refused() -> None:
    class NotDecorated(Base):
        """No dataclass."""

    @dataclass(frozen=True)
    class Undocumented(Base):
        pass

    @dataclass(frozen=True)
    class BadName(Base):
        """Its name has a capital."""

        name: ClassVar[str] = "Base"

    @dataclass(frozen=True)
    class BadOption(Base):
        """An option that has no text form."""

        table: dict[str, int] | None = None

    for cls, message in (
        (NotDecorated, r"must be decorated with @dataclass\(frozen=True\)"),
        (Undocumented, "needs a docstring"),
        (BadName, "words of a-z and 0-9 joined by dashes"),
        (BadOption, r"option table is of type .*; use int, float, bool, str, tuple\[str, \.\.\.\]"),
        (int, "is not a subclass of"),
    ):
        with pytest.raises(PipelineError, match=message):
            register_pass(cls)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
from moqc.passes.base import Pass

@dataclass(frozen=True)
class Mark(Pass):
    """Leave a mark."""

    name: ClassVar[str] = "{name}"
    word: str = "hello"

    def run(self, mod, ctx):
        return mod.with_attr("acme.mark", self.word)
'''


def install(folder: Path, package: str, name: str, entry: str, called: str | None = None) -> None:
    """An installed distribution: a module and the metadata that pip would leave beside it."""
    (folder / f"{package}.py").write_text(PLUGIN.format(name=called or name))
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moqc.passes]\n{name} = {entry}\n")


def test_an_installed_plugin_is_found(moe: IRModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "acme_moqc", "acme-mark", "acme_moqc:Mark")
    monkeypatch.syspath_prepend(tmp_path)
    assert "acme-mark" in pass_names()
    assert "acme_moqc" not in sys.modules
    result = Pipeline.parse("acme-mark{word=hi}").run(moe, PassContext(), verify_each=True)
    assert result.attrs["acme.mark"] == "hi"
    monkeypatch.delitem(sys.modules, "acme_moqc")


@pytest.mark.parametrize(
    ("name", "entry", "called", "message"),
    [
        (
            "quantize-linears",
            "acme_clash:Mark",
            None,
            r"offered by moqc\.passes\.quantize_linears.* and by acme_clash",
        ),
        ("acme-gone", "acme_clash:Missing", None, "the plug-in acme_clash:Missing does not load"),
        ("acme-gone", "acme_nowhere:Mark", None, "the plug-in acme_nowhere:Mark does not load: No module"),
        ("acme-other", "acme_clash:Mark", "acme-name", "which calls itself 'acme-name'"),
    ],
)
def test_plugins_that_clash_or_break(
    name: str, entry: str, called: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "acme_clash", name, entry, called)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_clash", raising=False)
    with pytest.raises(PipelineError, match=message):
        find_pass(name)
    monkeypatch.delitem(sys.modules, "acme_clash", raising=False)


def test_two_plugins_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "acme_one", "acme-mark", "acme_one:Mark")
    install(tmp_path, "acme_two", "acme-mark", "acme_two:Mark")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PipelineError, match=r"'acme-mark' is offered by acme_.* and by acme_.*: uninstall one"
    ):
        pass_names()
