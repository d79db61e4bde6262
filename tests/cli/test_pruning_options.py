"""Options of pruning: shares as people write them, and what does not go together."""

import pytest

from moqc.commands.units import parse_share
from moqc.errors import UserError
from moqc.passes.pipeline import Pipeline
from moqc.passes.prune_routing import PruneRouting
from moqc.pipelines import Pruning


@pytest.mark.parametrize(("text", "share"), [("15%", 0.15), ("0.2", 0.2), (" 7.5 % ", 0.075)])
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "1", "-5%", "much", "nan", "%", ""])
def test_what_is_no_share(text):
    with pytest.raises(UserError, match="expected a share above 0 and below 1"):
        parse_share(text)


def test_options_become_a_pass():
    pruning = Pruning.of(None, 0.01, "odp", "demote")
    assert Pipeline.parse(str(pruning)).passes == (PruneRouting(rule="odp", loss=0.01, cold="demote"),)
    assert Pruning.of(None, None, "mass", "keep") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((0.1, 0.01, "mass", "keep"), "not by both"),
        ((None, None, "mass", "remove"), "give --prune or --prune-loss too"),
        ((None, -0.5, "mass", "keep"), "prune -0.5: must be above 0 and below 1"),
        ((1.5, None, "mass", "keep"), "prune 1.5: must be above 0 and below 1"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        Pruning.of(*options)
