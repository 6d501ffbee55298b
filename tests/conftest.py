"""Fixtures: tiny checkpoints, and the command line within this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import Ran, write_file, write_folder
from hypothesis import settings
from numerics import one_thread  # noqa: F401  (an autouse fixture)

# The same examples every time: a test that fails once in a hundred runs tells of itself at the wrong change.
# QUANTLOOM_FUZZ=N looks at others.
settings.register_profile("same", derandomize="QUANTLOOM_FUZZ" not in os.environ)
settings.load_profile("same")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint in one file, alone in its folder."""
    return write_file(tmp_path / "in" / "tiny.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with three shards, an index and sidecar files."""
    return write_folder(tmp_path / "sharded")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is tried again at once."""
    from quantloom.flow import recovery

    monkeypatch.setattr(recovery, "PAUSE", 0.0)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs ``quantloom`` with these arguments; status, stdout and stderr."""
    from quantloom.flow.cli import main

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return run
