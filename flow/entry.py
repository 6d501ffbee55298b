"""How a command line begins and ends: signals that stop it, and its exit status."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..stages.cancelling import STOPPING

if TYPE_CHECKING:
    from collections.abc import Iterator

STOPPED = "stopped: what had been written was removed, and nothing was left under the name of the output"



def run_command(command: click.Command, name: str, arguments: list[str] | None) -> NoReturn:
    """Ends through sys.exit with 0 done, 1 the work failed or was stopped, 2 wrong usage."""
    with _stoppable():
        try:
            status = command.main(arguments, prog_name=name, standalone_mode=False)
        except click.ClickException as error:
            error.show()
            status = 2
        except click.Abort:
            status = 1
    sys.exit(status or 0)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Every signal that stops a program is a KeyboardInterrupt, once: what follows would disturb the tidying up.

    A signal that is ignored (nohup, a job in the background) stays so.
    """
    stopped = False

    def stop(_number: int, _frame: Any) -> None:
        nonlocal stopped
        stopped = True
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
    except ValueError:  # only the main thread may say what a signal does
        before = {}
    try:
        yield
    finally:
        if not stopped:
            for number, handler in before.items():
                signal.signal(number, handler)
