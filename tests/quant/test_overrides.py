"""Units held to some bits by the patterns that name them."""

import pytest

from moqc.errors import UserError
from moqc.quant.overrides import Override


def test_text_and_back():
    override = Override.parse(r"layers\.(0|1)=x\..*down=4, 8")
    assert override == Override(r"layers\.(0|1)=x\..*down", (4, 8))
    assert Override.parse(str(override)) == override


@pytest.mark.parametrize("text", ["down", "=4", "down=", "down=4,", "down=int4", "down=-1"])
def test_what_is_no_override(text):
    with pytest.raises(UserError, match=r"expected a pattern and bits, such as layers\\"):
        Override.parse(text)
