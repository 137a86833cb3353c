"""What diffbio raises and warns. A message says where, what came, what was expected, what to do."""

from __future__ import annotations

from typing import ClassVar


class DiffBioError(Exception):
    """Base of every error raised on purpose. `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class ConfigError(DiffBioError, ValueError):
    """A setting is out of its range, of the wrong type, or unknown."""

    exit_code = 2


class DataError(DiffBioError, ValueError):
    """Data does not have the promised kind, shape or values."""

    exit_code = 3


class MissingKeyError(DataError, KeyError):
    """A key that an operator reads is absent from the data."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class InputFileError(DataError):
    """A file cannot be read as single-cell data."""


class ModelFileError(DiffBioError, ValueError):
    """A saved model or checkpoint is damaged, foreign, or newer than this version."""

    exit_code = 4


class OutputError(DiffBioError, OSError):
    """A result cannot be written where it was asked for."""

    exit_code = 5


class DeviceMemoryError(DiffBioError, MemoryError):
    """An array does not fit into memory."""

    exit_code = 6


class TrainingDivergedError(DiffBioError, ArithmeticError):
    """Loss or gradient stayed NaN or infinite."""

    exit_code = 7


class ProcessLostError(DiffBioError, ConnectionError):
    """Another process of a run on several processes is gone."""

    exit_code = 8


class TrainingInterrupted(DiffBioError):
    """SIGINT or SIGTERM arrived; a checkpoint was saved. `exit_code` is 130 or 143."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class DataWarning(UserWarning):
    """Data is usable, but the user should know this about it."""
