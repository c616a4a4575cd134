"""What can go wrong, as a tree of exceptions.

```
TrtqError                  anything trtq raises on purpose
├── UsageError             the caller asked for something that cannot be: exit code 2
│   ├── RecipeError        an unknown key, a value out of range, bits no one supports
│   └── MissingDependencyError   an optional package is not installed
├── ArtefactError          a file or folder is missing, damaged or not what it claims to be
│   └── IntegrityError     a hash, a path or a format version in a manifest does not hold
├── QuantizationError      a stage met a state it cannot quantise: zero layers, ...
│   ├── NonFiniteError     NaN or infinity, with the name of the layer
│   └── StepError          a quantised layer was called without its denoising step
├── LegalityError          the graph would hold something the target does not accept
├── BuildError             an engine's builder refused, crashed or ran out of memory
├── KernelError            a kernel cannot be compiled, loaded or started
├── MeasurementError       a process that was being measured failed or was killed
├── ServerError            a server that runs a graph for us answered with an error
└── GateError              a check or a gate was not met: parity after export, `--gate`
```

A message says what came, what is allowed and what to do.
"""

from __future__ import annotations

__all__ = [
    "ArtefactError",
    "BuildError",
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
    """Anything trtq raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(TrtqError, ValueError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or policy holds an unknown key or a value out of range."""


class MissingDependencyError(UsageError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class ArtefactError(TrtqError):
    """A file or folder is missing, damaged or not what it claims to be."""


class IntegrityError(ArtefactError):
    """A hash, a path or a format version in a manifest does not hold."""


class QuantizationError(TrtqError):
    """A stage met a state it cannot quantise."""


class NonFiniteError(QuantizationError):
    """NaN or infinity where numbers are needed; the message names the layer."""


class StepError(QuantizationError, RuntimeError):
    """A quantised layer was called without its denoising step."""


class LegalityError(TrtqError):
    """The graph would hold something the target does not accept."""


class BuildError(TrtqError):
    """An engine's builder refused the graph, crashed or ran out of memory."""


class KernelError(TrtqError):
    """A kernel of ours cannot be compiled, loaded or started; the message says on what."""


class MeasurementError(TrtqError):
    """A process that was being measured failed or was killed."""


class ServerError(TrtqError):
    """A server that runs a graph for us answered with an error."""


class CancelledError(TrtqError):
    """Whoever asked for it no longer wants it."""


class GateError(TrtqError):
    """A check or a gate was not met."""
