import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.errors import ArtifactError
from moqc.runtime.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(toy):
    return Tokenizer(toy.folder / "tokenizer.json")


def test_round_trip(tokenizer, toy):
    ids = tokenizer.encode(toy.text)
    assert len(ids) == len(toy.text.encode())
    assert tokenizer.decode([*ids, toy.eos]) == toy.text
    assert tokenizer.size == 257


@settings(deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 40))
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer, text, cut):
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids[:cut]]
    assert (
        "".join(pieces) == text.encode()[:cut].decode("utf-8", "ignore").rstrip("\ufffd") or "\ufffd" in text
    )
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids[:cut])


def test_a_damaged_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer(path)
    path.write_bytes(b"\xff{}")
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer(path)
