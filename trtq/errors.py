"""The tree of exceptions that trtq raises.

```
TrtqError                       any error that trtq raises on purpose
├── UsageError                  invalid argument or unsupported combination: exit code 2
│   ├── RecipeError             unknown key, value out of range, or unsupported bits in a recipe
│   └── MissingDependencyError  an optional package is not installed
├── ArtefactError               a file or folder is missing, damaged or not what it claims to be
│   └── IntegrityError          a hash, path or format version in a manifest does not match
├── QuantizationError           the model is in a state that cannot be quantised, e.g. zero layers
│   ├── NonFiniteError          NaN or infinity, with the name of the layer
│   └── StepError               a quantised layer was called without a denoising step
├── LegalityError               the graph would contain something that the runtime does not accept
├── BuildError                  an engine builder refused the graph, crashed or ran out of memory
├── KernelError                 a CUDA kernel cannot be compiled, loaded or launched
├── MeasurementError            a measured process failed or was killed
├── ServerError                 a remote inference server answered with an error
├── CancelledError              the caller cancelled the request
└── GateError                   a check or a gate was not met: parity after export, `--gate`
```

A message states the given value, the allowed values and what to do.
"""

from __future__ import annotations

__all__ = [
    "ArtefactError",
    "BuildError",
    "CancelledError",
    "GateError",
    "IntegrityError",
    "KernelError",
    "LegalityError",
    "MeasurementError",
    "MissingDependencyError",
    "NonFiniteError",
    "QuantizationError",
    "RecipeError",
    "ServerError",
    "StepError",
    "TrtqError",
    "UsageError",
]


class TrtqError(Exception):
    """Any error that trtq raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(TrtqError, ValueError):
    """An argument is invalid, or a combination of arguments is not supported."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or policy holds an unknown key, a value out of range or unsupported bits."""


class MissingDependencyError(UsageError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""


class ArtefactError(TrtqError):
    """A file or folder is missing, damaged or not what it claims to be."""


class IntegrityError(ArtefactError):
    """A hash, a path or a format version in a manifest does not match."""


class QuantizationError(TrtqError):
    """The model is in a state that cannot be quantised, e.g. zero layers."""


class NonFiniteError(QuantizationError):
    """A tensor holds NaN or infinity; the message names the layer."""


class StepError(QuantizationError, RuntimeError):
    """A quantised layer was called without a denoising step."""


class LegalityError(TrtqError):
    """The graph would contain something that the runtime does not accept."""


class BuildError(TrtqError):
    """An engine builder refused the graph, crashed or ran out of memory."""


class KernelError(TrtqError):
    """A CUDA kernel cannot be compiled, loaded or launched; the message names the device."""


class MeasurementError(TrtqError):
    """A measured process failed or was killed."""


class ServerError(TrtqError):
    """A remote inference server answered with an error."""


class CancelledError(TrtqError):
    """The caller cancelled the request."""


class GateError(TrtqError):
    """A check or a gate was not met."""
