import pytest
from hypothesis import given
from hypothesis import strategies as st

from moqc.errors import UserError
from moqc.runtime.stop import StopFilter


def run(pieces, stops):
    stop = StopFilter(stops)
    shown = []
    for piece in pieces:
        shown.append(stop.push(piece))
        if stop.stopped:
            return "".join(shown), True
    return "".join(shown) + stop.flush(), False


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
def test_equals_search_in_the_whole_text(pieces, stops):
    """Cutting the text into pieces changes nothing, but for text after the piece where it stopped."""
    text = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    shown, stopped = run(pieces, stops)
    assert stopped == bool(ends)
    if not stopped:
        assert shown == text
        return
    # The first piece that completes any stop string decides; of those complete by then, the leftmost start.
    seen = ""
    for piece in pieces:
        seen += piece
        if any(stop in seen for stop in stops):
            break
    assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_shows_what_is_certain_at_once():
    stop = StopFilter(["\n\n"])
    assert stop.push("one\n") == "one"
    assert stop.push("two") == "\ntwo"
    assert stop.push("\n") == ""
    assert stop.push("\nthree") == ""
    assert stop.stopped


def test_empty_stop_is_refused():
    with pytest.raises(UserError, match="stop"):
        StopFilter([""])
