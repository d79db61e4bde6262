"""Options of pruning: shares as people write them, and what does not go together."""

import pytest

from moqc.errors import UserError
from moqc.passes.pipeline import Pipeline
from moqc.passes.prune_routing import PruneRouting
from moqc.pipelines import Pruning
from moqc.recipe import Recipe
from moqc.units import parse_share


@pytest.mark.parametrize(("text", "share"), [("15%", 0.15), ("0.2", 0.2), (" 7.5 % ", 0.075)])
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "1", "-5%", "much", "nan", "%", ""])
def test_what_is_no_share(text):
    with pytest.raises(UserError, match="expected a share above 0 and below 1"):
        parse_share(text)


def test_options_become_a_pass():
    pruning = Pruning.of(Recipe(prune_loss=0.01, prune_rule="odp", cold_expert_policy="demote"))
    assert Pipeline.parse(str(pruning)).passes == (PruneRouting(rule="odp", loss=0.01, cold="demote"),)
    assert Pruning.of(Recipe()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": 0.1, "prune_loss": 0.01}, "not by both"),
        ({"cold_expert_policy": "remove"}, "give --prune or --prune-loss too"),
        ({"prune_loss": -0.5}, "prune -0.5: must be above 0 and below 1"),
        ({"prune": 1.5}, "prune 1.5: must be above 0 and below 1"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        Pruning.of(Recipe(**options))
