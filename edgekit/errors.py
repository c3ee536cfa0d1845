"""The error tree: every failure a user can cause, its exit code and its hint.

Knows no library and no format; it never catches anything itself.

    EdgekitError                    exit code
      UsageError (ValueError)          2   RecipeError ProfileError UnknownNameError
      MissingExtraError (ImportError)  3   prints the exact pip line
      SourceError                      4   DownloadError ChecksumError UnsafeModelError
                                           UnsupportedModelError
      ArtifactError                    5   CorruptArtifactError ManifestError VersionError
                                           UnsafePathError
      ExportError                      6   PassError ParityError GateError OutOfSpaceError
      InferenceError                   7   LoadError PromptTooLongError EngineCrashedError
                                           DeadlineError
      DeviceError                      8   ConnectError HostKeyError TransferError
                                           RemoteCommandError DoesNotFitError
      ServerError                      9   QueueFullError TooLargeError NotAllowedError
      TrainError                      10   DataError DivergedError
"""

from __future__ import annotations

DISTRIBUTION = "edgekit-deploy"


class EdgekitError(Exception):
    """One line that says what is wrong; ``hint`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EdgekitError, ValueError):
    """The call itself is wrong: an option, a value, a combination."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe has an unknown key, a bad value, or asks for the impossible."""


class ProfileError(UsageError):
    """A device profile does not follow its schema."""


class UnknownNameError(UsageError):
    """A name that no registry, table or folder knows."""


class MissingExtraError(EdgekitError, ImportError):
    """An optional part of edgekit is not installed."""

    exit_code = 3

    def __init__(self, extra: str, *, missing: str) -> None:
        super().__init__(
            f"this needs the package '{missing}', which is not installed",
            hint=f"pip install '{DISTRIBUTION}[{extra}]'",
        )
        self.extra = extra
        self.missing = missing


class SourceError(EdgekitError):
    """The model to start from cannot be read."""

    exit_code = 4


class DownloadError(SourceError):
    """The hub could not be reached, or has no such model or revision."""


class ChecksumError(SourceError):
    """Downloaded or cached bytes are not the bytes that were promised."""


class UnsafeModelError(SourceError):
    """The model would run foreign code, or reaches outside its own folder."""


class UnsupportedModelError(SourceError):
    """A family, tokenizer or tensor layout that edgekit does not know."""


class ArtifactError(EdgekitError):
    """An artifact on disk cannot be used."""

    exit_code = 5


class CorruptArtifactError(ArtifactError):
    """Bytes differ from what the manifest or the format says."""


class ManifestError(ArtifactError):
    """The manifest is missing, malformed or does not describe its folder."""


class VersionError(ArtifactError):
    """Written by a newer edgekit than this one."""


class UnsafePathError(ArtifactError):
    """A path inside an artifact leaves the artifact's folder."""


class ExportError(EdgekitError):
    """The export failed; nothing was kept."""

    exit_code = 6


class PassError(ExportError):
    """A graph pass failed or changed what the model computes."""


class ParityError(ExportError):
    """The exported file does not compute what its source computes."""


class GateError(ExportError):
    """The output is right but misses a limit that the user set."""


class OutOfSpaceError(ExportError):
    """The disk has less free space than the work needs."""


class InferenceError(EdgekitError):
    """Loading or running a model failed."""

    exit_code = 7


class LoadError(InferenceError):
    """The engine refused the file."""


class PromptTooLongError(InferenceError):
    """The prompt and the answer do not fit the context."""


class EngineCrashedError(InferenceError):
    """The process that held the engine died."""


class DeadlineError(InferenceError):
    """The work took longer than it was allowed to."""


class DeviceError(EdgekitError):
    """A device failed."""

    exit_code = 8


class ConnectError(DeviceError):
    """The device does not answer."""


class HostKeyError(DeviceError):
    """The device shows another host key than the known one."""


class TransferError(DeviceError):
    """A file did not arrive whole."""


class RemoteCommandError(DeviceError):
    """A command on the device failed."""


class DoesNotFitError(DeviceError):
    """The model needs more memory than the device has."""


class ServerError(EdgekitError):
    """The server refused a request."""

    exit_code = 9


class QueueFullError(ServerError):
    """Too many requests are waiting."""


class TooLargeError(ServerError):
    """A request is larger than the limits allow."""


class NotAllowedError(ServerError):
    """The request is not permitted."""


class TrainError(EdgekitError):
    """A training run cannot start or go on; its last good checkpoint is kept."""

    exit_code = 10


class DataError(TrainError):
    """The data to train on are missing, empty, broken, or labelled with what does not exist."""


class DivergedError(TrainError):
    """The loss is no number any more."""
