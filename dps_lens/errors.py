"""Errors of dps_lens: each says which call failed, what was found and how to mend it."""

_LONGEST = 600  # letters of a message that another library wrote, which may quote a file


class DPSLensError(Exception):
    """Base class of every error that dps_lens raises on purpose."""


class ModelLoadError(DPSLensError):
    """A model could not be found, read or wrapped."""


class ModelCheckError(DPSLensError):
    """A loaded model fails one of the checks that scoring relies on."""


class ModelBusyError(DPSLensError, RuntimeError):
    """Another thread is using the model."""


class HeadError(DPSLensError, ValueError):
    """A head, or a number of heads, that the model or the scores do not have."""


class InterventionError(DPSLensError, ValueError):
    """An ablation that is not defined for what it was asked of."""


class DataError(DPSLensError, ValueError):
    """A record or file of user data is malformed; names file, record and field."""


class PromptError(DPSLensError, ValueError):
    """A prompt cannot be built, or does not fit the model's context."""


class ScoreError(DPSLensError, ValueError):
    """Scores cannot be computed, read or combined."""


class RunError(DPSLensError):
    """A run folder was made with other settings, or cannot be used."""


class SteeringError(DPSLensError, ValueError):
    """Generation was asked for something that is not defined."""


class EvaluationError(DPSLensError, ValueError):
    """An evaluation that is not defined for what it was asked of."""


class PlotError(DPSLensError, ValueError):
    """A figure that cannot be drawn or written as asked."""


class FileError(DPSLensError, OSError):
    """A file cannot be written: no room, no permission, or something else stands there."""


class ExtensionError(DPSLensError, ValueError):
    """An object of somebody's own cannot be loaded from its import path."""


def reason(error: BaseException) -> str:
    """The whole message of an error in one line, with its type where the message alone would say little."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    named = f"{type(error).__name__}: {text}" if not text or isinstance(error, LookupError) else text
    return named[:_LONGEST]
