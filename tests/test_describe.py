"""What the manifest says about generation."""

import json

import pytest

from moqc.describe import read_generation
from moqc.errors import ModelError


@pytest.fixture
def generation(tmp_path):
    """``generation(config, defaults)``: what is read of a folder with these two files."""

    def read(config, defaults=None):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if defaults is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(defaults))
        return read_generation(tmp_path)

    return read


def drawing(found):
    return found.temperature, found.top_p, found.top_k


def test_token_ids(generation):
    found = generation({"eos_token_id": 7, "bos_token_id": 1}, {"eos_token_id": [2, 3], "pad_token_id": None})
    assert (found.eos_token_ids, found.bos_token_id, found.pad_token_id) == ((2, 3), 1, None)
    assert generation({"eos_token_id": 7}, {}).eos_token_ids == (7,)


def test_drawing_is_asked_for(generation):
    assert drawing(generation({})) == (0.0, 1.0, 0)
    assert drawing(generation({}, {"temperature": 0.6, "top_p": 0.9})) == (0.0, 1.0, 0)
    assert drawing(generation({}, {"do_sample": False, "temperature": 0.6})) == (0.0, 1.0, 0)


def test_drawing(generation):
    qwen = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [5, 6]}
    assert drawing(generation({}, qwen)) == (0.6, 0.95, 20)
    assert drawing(generation({}, {"do_sample": True})) == (1.0, 1.0, 50), "as transformers draws"
    assert drawing(generation({}, {"do_sample": True, "top_k": None})) == (1.0, 1.0, 50)


@pytest.mark.parametrize(
    ("defaults", "says"),
    [
        ({"eos_token_id": "x"}, "eos_token_ids of .* not token ids"),
        ({"do_sample": True, "temperature": "hot"}, "temperature of .* valid number"),
        ({"do_sample": True, "temperature": -1}, "temperature of .* greater than or equal to 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p of .* less than or equal to 1"),
        ({"do_sample": True, "top_k": 0.5}, "top_k of .* valid integer"),
    ],
)
def test_values_that_cannot_be(generation, defaults, says):
    with pytest.raises(ModelError, match=says):
        generation({}, defaults)
