"""Signals that ask a training run to stop."""

import os
import signal

import pytest

from diffbio.interrupts import Interrupts


@pytest.fixture(autouse=True)
def sigterm():
    """SIGTERM raises, as on the command line, and SIGINT does even where a shell started the tests with `&`."""

    def stop(*_):
        raise SystemExit

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


def loop(*signals, error=None):
    """A loop that gets signals, notes the first, and ends with an error or without one."""
    with Interrupts() as interrupts:
        for number in signals:
            os.kill(os.getpid(), number)
            assert interrupts.signal == signals[0]
        if error:
            raise error


@pytest.mark.parametrize("second", RAISED)
@pytest.mark.parametrize("first", RAISED)
def test_the_second_acts_at_once(sigterm, first, second):
    with pytest.raises(RAISED[second]) as caught:
        loop(first, second, error=ArithmeticError())
    assert caught.traceback[-1].name in ("stop", "loop")
    assert signal.getsignal(signal.SIGTERM) is sigterm


@pytest.mark.parametrize("number", RAISED)
def test_one_after_the_last_step_is_not_lost(sigterm, number):
    with pytest.raises(RAISED[number]):
        loop(number)


def test_one_that_was_heard_is_not_repeated():
    with pytest.raises(ArithmeticError):
        loop(signal.SIGINT, error=ArithmeticError())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_says_how_to_go_on(number, code):
    interrupts = Interrupts()
    interrupts.signal = number
    assert interrupts.error("folder").exit_code == code
    assert "a checkpoint is saved in folder; the same command with resume" in str(interrupts.error("folder"))
