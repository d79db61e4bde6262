"""The messages of errors speak one language: that of docs/cli.md, in the source of every raise."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moqc import errors

ROOT = Path(__file__).parents[2]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type)} - {"InternalError"}
OTHERWISE = {
    r"cannot be (read|written) \(|cannot write there|writing failed": "PATH: cannot read (REASON)",
    r"\bunknown [^:]*: (one of|there are)|^no (option|pass|allocator) ‹|passes are ‹": (
        "unknown KIND 'NAME': known are A, B"
    ),
    r"at least \d+ is needed|give a positive|ask at least|\bare above 0": "OPTION VALUE: must be at least 1",
    r": (download|copy|compile) (it|the model) again": "what to do comes after a semicolon",
    r"\n|\.$|!$|[Pp]lease|[Ss]orry": "one line, without a period and without manners",
}


def text(node: ast.expr) -> str:
    """A message as it is written, values as ‹›."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(text(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return text(left) + text(right)
        case _:
            return "‹›"


def messages() -> Iterator[tuple[str, str]]:
    """(place, message) of every error that a user can see."""
    for folder in ("moqc", "passes", "schedules"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[message, *_])) if name in KINDS:
                        yield f"{file.relative_to(ROOT)}:{node.lineno}", text(message)


def test_messages_are_found():
    assert len(dict(messages())) > 300


@pytest.mark.parametrize("pattern", OTHERWISE)
def test_one_vocabulary(pattern):
    found = [f"{place}: {message}" for place, message in messages() if re.search(pattern, message)]
    assert not found, f"say it as docs/cli.md does ({OTHERWISE[pattern]}): {found}"


def test_classes_of_errors_have_their_exit_codes():
    codes = {name: getattr(errors, name).exit_code for name in KINDS}
    assert {name for name, code in codes.items() if code == 1} == {"MoqcError", "PassError", "VerifyError"}
    assert set(codes.values()) == {1, 2}
