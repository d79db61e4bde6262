"""Notes and progress on stderr: readable lines, or JSON for programs."""

import itertools
import json
import logging

import pytest

from moqc import log


@pytest.fixture(autouse=True)
def restored():
    before = log.logger.handlers[:], log.logger.level, log.logger.propagate
    yield
    log.logger.handlers[:], log.logger.propagate = before[0], before[2]
    log.logger.setLevel(before[1])


@pytest.fixture
def clock(monkeypatch):
    """Time that passes 10 s at every look."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(ticks)))


def test_events_are_lines_of_json(capsys):
    log.setup()
    log.use_json()
    log.event("layer", "layer é", site="a.b", relative_error=0.25)
    log.logger.warning("careful %d", 3)
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert {key: first[key] for key in ("level", "event", "message", "site", "relative_error")} == {
        "level": "info",
        "event": "layer",
        "message": "layer é",
        "site": "a.b",
        "relative_error": 0.25,
    }
    assert (second["level"], second["event"], second["message"]) == ("warning", "note", "careful 3")


def test_progress_tells_what_is_left(capsys, clock):
    log.setup()
    log.use_json()
    assert list(log.track(range(4), "quantizing")) == [0, 1, 2, 3]
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(item["done"], item["total"], item["seconds_left"]) for item in events] == [
        (1, 4, 30.0),
        (2, 4, 20.0),
        (3, 4, 10.0),
    ]


def test_lines_come_now_and_then(capsys, clock):
    log.setup()
    list(log.track(iter("abcdef"), "packing"))  # no length: no time left
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["INFO     packing: 2", "INFO     packing: 4", "INFO     packing: 6"]


def test_quiet_hides_all_but_warnings(capsys, clock):
    log.setup()
    log.be_quiet()
    log.event("layer", "hidden")
    list(log.track(range(5), "hidden"))
    log.logger.warning("seen")
    assert capsys.readouterr().err == "WARNING  seen\n"


def test_a_library_user_sees_events_as_records(caplog):
    with caplog.at_level(logging.INFO, logger="moqc"):
        log.event("layer", "text", site="x")
    assert caplog.records[0].event == "layer"
    assert caplog.records[0].fields == {"site": "x"}
