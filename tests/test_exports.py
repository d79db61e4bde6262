import importlib

import pytest

import moqc


def test_every_public_name_is_there_and_no_package_hides_it():
    for module in ("moqc.evaluate.metrics", "moqc.runtime.artifact", "moqc.commands.compile"):
        importlib.import_module(module)
    for name in moqc.__all__:
        assert callable(getattr(moqc, name)), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'transmogrify'"):
        _ = moqc.transmogrify
