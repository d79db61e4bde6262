"""Pipelines: text in both directions, checks of order, running, dumps, failures."""

import string
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import IRModule, relax

from moqc.errors import ModelError, PassError, PipelineError, UserError, VerifyError
from moqc.ir.annotations import BITS, PARAMS, SCHEMA, Key
from moqc.ir.text import parse_module
from moqc.passes.base import Pass, PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.registry import register_pass

IMPORTANCE: Key[dict[str, list[int]]] = Key(
    "test.importance", "test-score", "site -> importance of each expert"
)
NOTE: Key[list[str]] = Key("note", "test-note", "words left by passes of this test")


@register_pass
@dataclass(frozen=True)
class ScoreExperts(Pass):
    """Write a fixed importance."""

    name: ClassVar[str] = "test-score"
    writes: ClassVar = (IMPORTANCE,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        return IMPORTANCE.put(mod, {"a": [700_000, 200_000, 100_000]})


@register_pass
@dataclass(frozen=True)
class BitsByRank(Pass):
    """The hottest experts get `high` bits, the rest `low`."""

    name: ClassVar[str] = "test-bits-by-rank"
    reads: ClassVar = (IMPORTANCE,)
    writes: ClassVar = (BITS,)
    high: int = 4
    low: int = 2
    share: float = 0.5

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        plan = {}
        for site, scores in IMPORTANCE.of(mod).items():
            order = sorted(range(len(scores)), key=lambda e: -scores[e])
            hot = set(order[: round(self.share * len(scores))])
            names = [f"int{self.high if e in hot else self.low}-g64" for e in range(len(scores))]
            plan[site] = {"down": names}
        return BITS.put(mod, plan)


@register_pass
@dataclass(frozen=True)
class Options(Pass):
    """One option of every type; leaves a note of `text`."""

    name: ClassVar[str] = "test-options"
    count: int = 1
    share: float = 0.5
    on: bool = False
    text: str = "x"
    words: tuple[str, ...] = ()

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        return NOTE.put(mod, [*(NOTE.get(mod) or []), self.text])


@register_pass
@dataclass(frozen=True)
class Required(Pass):
    """An option without a default."""

    name: ClassVar[str] = "test-required"
    path: str

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        return mod


@register_pass
@dataclass(frozen=True)
class Fail(Pass):
    """Raise an error of the chosen kind."""

    name: ClassVar[str] = "test-fail"
    kind: str = "bug"

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        if self.kind == "user":
            raise ModelError("the model is wrong")
        if self.kind == "invalid":
            return PARAMS.put(mod, ["one.name", "too.many"])
        raise KeyError("layers.3")


@pytest.fixture
def mod() -> IRModule:
    builder = relax.BlockBuilder()
    ids, positions = (
        relax.Var(name, relax.TensorType([1, 4], "int64")) for name in ("input_ids", "positions")
    )
    weight = relax.Var("weight", relax.TensorType([4, 8], "float32"))
    with builder.function("main", [ids, positions, weight]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.take(weight, ids, axis=0))
        builder.emit_func_output(out)
    return PARAMS.put(SCHEMA.put(builder.get(), 1), ["embed.weight"])


words = st.text(max_size=8) | st.text(string.ascii_letters + '{}=,+"\\ |$^', min_size=1, max_size=8)
options = st.builds(
    Options,
    count=st.integers(),
    share=st.floats(allow_nan=False),
    on=st.booleans(),
    text=words,
    words=st.lists(words, max_size=3).map(tuple),
)
passes = (
    options | st.builds(BitsByRank, st.integers(1, 8)) | st.builds(Required, words) | st.just(ScoreExperts())
)


@given(st.lists(passes, max_size=4).map(tuple))
def test_parse_is_the_inverse_of_str(items: tuple[Pass, ...]) -> None:
    assert Pipeline.parse(str(Pipeline(items))) == Pipeline(items)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            " test-score , test-bits-by-rank{ high=8  share=0.25 } ",
            "test-score,test-bits-by-rank{high=8 share=0.25}",
        ),
        ("test-options{share=2}", "test-options{share=2.0}"),
        ("test-options{on=true words=a+b}", "test-options{on=true words=a+b}"),
        ("test-options{count=1}", "test-options"),
        ('test-options{text="a b"}', 'test-options{text="a b"}'),
        ("", ""),
    ],
)
def test_text_is_normalized(text: str, expected: str) -> None:
    assert str(Pipeline.parse(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test-scor", r"unknown pass 'test-scor' \(did you mean 'test-score'\?\)"),
        (
            "test-options{cout=1}",
            r"test-options: unknown option 'cout' \(did you mean 'count'\?\): known are count, share",
        ),
        ("test-score{a=1}", "test-score: unknown option 'a': it has none"),
        ("test-options{count=x}", "test-options: count=x is not of type int"),
        ("test-options{on=yes}", "on=yes is not of type bool"),
        ('test-options{text=a"b"}', "is not of type str"),
        ("test-options{words=a++b}", "is not of type tuple"),
        ("test-options{count=1 count=2}", "option count is given twice"),
        ("test-required", "test-required needs a value for path"),
        ("test-options{count=1", r"expected name=value, separated by spaces, or } at 'count=1'"),
        ("test-options{count=1,on=true}", "separated by spaces"),
        ("test-score,", "expected the name of a pass at the end of the pipeline"),
        ("test-score test-score", "expected a comma between passes at 'test-score'"),
        ("{x=1}", "expected the name of a pass at '{x=1}'"),
    ],
)
def test_refuses_with_this_message(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Pipeline.parse(text)


def test_describe() -> None:
    assert Pipeline.parse("test-score,test-bits-by-rank{high=8}").describe() == (
        " 1 test-score                 - -> test.importance\n"
        " 2 test-bits-by-rank{high=8}  test.importance -> moqc.bits"
    )


def test_check_refuses_a_read_nothing_writes() -> None:
    pipeline = Pipeline.parse("test-bits-by-rank,test-score")
    with pytest.raises(PipelineError, match=r"pass 1, test-bits-by-rank, reads test\.importance.*test-score"):
        pipeline.check()
    pipeline.check([IMPORTANCE])
    Pipeline.parse("test-score,test-bits-by-rank").check()


def test_run_checks_the_order_before_running_anything(mod: IRModule) -> None:
    with pytest.raises(PipelineError, match="pass 2, test-bits-by-rank, reads"):
        Pipeline.parse("test-fail,test-bits-by-rank").run(mod, PassContext())


def test_run_leaves_its_input_alone(mod: IRModule) -> None:
    before = mod.script()
    result = Pipeline.parse("test-score,test-bits-by-rank{share=0.34}").run(mod, PassContext())
    assert BITS.of(result) == {"a": {"down": ["int4-g64", "int2-g64", "int2-g64"]}}
    assert mod.script() == before


def test_stop_after_and_resume_from_the_dump(mod: IRModule, tmp_path) -> None:
    pipeline = Pipeline.parse("test-score,test-bits-by-rank,test-options{text=end}")
    whole = pipeline.run(mod, PassContext(), dump_dir=tmp_path)
    dumps = sorted(path.name for path in tmp_path.iterdir())
    assert dumps == ["000_test-score.py", "001_test-bits-by-rank.py", "002_test-options.py"]
    part = pipeline.run(mod, PassContext(), stop_after="test-score")
    assert IMPORTANCE.get(part) is not None
    assert BITS.get(part) is None
    start = parse_module((tmp_path / "000_test-score.py").read_text())
    tvm.ir.assert_structural_equal(start, part)
    tvm.ir.assert_structural_equal(pipeline.after("test-score").run(start, PassContext()), whole)


def test_unknown_stop_and_print_names_are_refused(mod: IRModule) -> None:
    pipeline = Pipeline.parse("test-score")
    with pytest.raises(PipelineError, match=r"no pass 'test-scores' \(did you mean 'test-score'"):
        pipeline.run(mod, PassContext(), stop_after="test-scores")
    with pytest.raises(PipelineError, match="it has test-score"):
        pipeline.run(mod, PassContext(), print_after=("other",))


def test_print_after_time_and_progress(mod: IRModule) -> None:
    reports: list[str] = []
    steps: list[tuple[int, int, str]] = []
    Pipeline.parse("test-score,test-options{count=2}").run(
        mod,
        PassContext(),
        print_after=("test-score",),
        time_passes=True,
        progress=lambda *step: steps.append(step),
        report=reports.append,
    )
    assert steps == [(1, 2, "test-score"), (2, 2, "test-options{count=2}")]
    assert reports[0].startswith("# after test-score\n")
    assert IMPORTANCE.get(parse_module(reports[0])) is not None
    assert [line.split(" s  ")[1] for line in reports[1].splitlines()] == [
        "test-score",
        "test-options{count=2}",
        "total",
    ]


def test_a_failure_names_the_pass_and_leaves_a_reproducer(mod: IRModule, tmp_path) -> None:
    pipeline = Pipeline.parse("test-score,test-fail,test-options")
    with pytest.raises(
        PassError, match=r"test-fail failed after test-score: KeyError: 'layers\.3'"
    ) as caught:
        pipeline.run(mod, PassContext(), dump_dir=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(tmp_path / "reproducer" / "before.py") in str(caught.value)
    rest = Pipeline.parse((tmp_path / "reproducer" / "pipeline.txt").read_text())
    assert str(rest) == "test-fail,test-options"
    before = parse_module((tmp_path / "reproducer" / "before.py").read_text())
    with pytest.raises(PassError, match="test-fail failed after no other pass"):
        rest.run(before, PassContext(), dump_dir=tmp_path)


def test_the_reproducer_has_a_place_without_a_dump_dir(mod: IRModule, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PassError, match=str(tmp_path)):
        Pipeline.parse("test-fail").run(mod, PassContext())
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["before.py", "pipeline.txt"]


def test_a_user_error_stays_what_it_is(mod: IRModule, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"^the model is wrong$"):
        Pipeline.parse("test-fail{kind=user}").run(mod, PassContext(), dump_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_verify_each_blames_the_pass(mod: IRModule, tmp_path) -> None:
    pipeline = Pipeline.parse("test-score,test-fail{kind=invalid}")
    pipeline.run(mod, PassContext())
    with pytest.raises(
        PassError, match="test-fail failed after test-score: VerifyError: main has 3"
    ) as caught:
        pipeline.run(mod, PassContext(), verify_each=True, dump_dir=tmp_path)
    assert isinstance(caught.value.__cause__, VerifyError)


def test_an_unwritable_dump_folder_is_the_users_fault(mod: IRModule, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"000_test-score\.py: cannot write"):
        Pipeline.parse("test-score").run(mod, PassContext(), dump_dir=tmp_path / "file")


def test_to_tvm_runs_under_tvms_instruments(mod: IRModule) -> None:
    sequence = Pipeline.parse("test-score,test-bits-by-rank").to_tvm(PassContext())
    timing = tvm.instrument.PassTimingInstrument()
    with tvm.transform.PassContext(instruments=[timing]):
        result = sequence(mod)
        rendered = timing.render()
    assert BITS.get(result) is not None
    assert "test-bits-by-rank" in rendered


def test_to_tvm_keeps_moqcs_errors(mod: IRModule) -> None:
    with pytest.raises(ModelError, match="the model is wrong"):
        Pipeline.parse("test-fail{kind=user}").to_tvm(PassContext())(mod)
