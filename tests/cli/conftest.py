"""Runs the command line in this process."""

import sys

import pytest

from moqc import cli


@pytest.fixture
def moqc(capfd, monkeypatch):
    """Run the command line; returns (exit code, stdout, stderr), with what libraries write themselves."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moqc", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            cli.main()
        captured = capfd.readouterr()
        return error.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def refused(moqc):
    """Run the command line on wrong input; the text of its one line."""

    def run(*arguments):
        code, out, err = moqc(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        return err

    return run
