import pytest
import torch
from transformers import masking_utils

from moqc.frontend import masks
from moqc.frontend.masks import Rule

CAUSAL = masking_utils.causal_mask_function


def marked(function, **keywords):
    return masks.mark(mask_function=function, batch_size=1, q_length=3, **keywords)


def test_rules_of_transformers_masks():
    window = masking_utils.sliding_window_causal_mask_function
    chunk = masking_utils.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.int64))
    assert masks.read(CAUSAL) == Rule()
    assert masks.read(window(5)) == Rule(window=5)
    assert masks.read(chunk) == Rule(chunk=8)
    assert masks.read(masking_utils.and_masks(window(5), window(3), CAUSAL)) == Rule(window=3)


def test_what_is_no_rule_is_told():
    bidirectional = masking_utils.bidirectional_mask_function
    packed = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: q == k)
    for function in (bidirectional, packed, masking_utils.or_masks(CAUSAL, bidirectional)):
        assert masks.read(function) is None
        assert masks.rule_of(marked(function)) is None
    assert masks.rule_of(marked(CAUSAL, attention_mask=torch.ones(1, 3))) is None
    assert masks.rule_of(torch.zeros(1, 1, 3, 3)) is None


def test_a_mark_carries_its_rule():
    assert marked(CAUSAL) is None
    assert masks.rule_of(marked(CAUSAL, allow_is_causal_skip=False)[:, 0]) is None  # nothing reads a part
    assert masks.rule_of(marked(CAUSAL, allow_is_causal_skip=False)) == Rule()
    assert masks.rule_of(None) == Rule()
    assert masks.rule_of(marked(masking_utils.sliding_window_causal_mask_function(4))) == Rule(window=4)


class Selecting(torch.nn.Module):
    """A layer that looks into its mask."""

    def forward(self, mask):
        return mask[:, :, 2]


def test_who_reads_a_mark_is_told():
    model = torch.nn.Sequential(Selecting())
    with pytest.raises(IndexError) as failed:
        model(marked(CAUSAL, allow_is_causal_skip=False))
    assert masks.reader(failed.value) == "Selecting"
    with pytest.raises(IndexError) as failed:
        model(torch.zeros(1, 1, 1))
    assert masks.reader(failed.value) is None


def test_packing_is_off_only_inside():
    positions = torch.tensor([[0, 1, 0, 1]])
    with masks.unpacked():
        assert masking_utils.find_packed_sequence_indices(positions) is None
    assert masking_utils.find_packed_sequence_indices(positions).tolist() == [[0, 0, 1, 1]]
