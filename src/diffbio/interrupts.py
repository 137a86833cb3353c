"""Signals that ask a training run to stop."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import TrainingInterrupted


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a note to stop after the step; a second one acts at once.

    One that came after the last step, when nobody looks at the note any more, acts on the way out.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if self.signal is not None and error is None:
            signal.raise_signal(self.signal)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def error(self, checkpoint: str | Path | None) -> TrainingInterrupted:
        """What to raise for the signal that came."""
        name = signal.Signals(self.signal or signal.SIGINT).name
        saved = (
            f"a checkpoint is saved in {checkpoint}; the same command with resume goes on from there"
            if checkpoint is not None
            else "the model holds the best weights so far; pass checkpoint= to be able to go on"
        )
        return TrainingInterrupted(f"fit: stopped by {name}; {saved}.", 128 + int(self.signal or 2))
