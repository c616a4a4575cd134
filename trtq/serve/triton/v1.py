"""Version 1 of the interface between trtq and the repositories that `trtq package triton` writes.

Users keep such a repository, so the import in its `pipeline/1/model.py` is a file format:

    from trtq.serve.triton.v1 import TritonPythonModel

This module stays as long as repositories of version 1 are supported. The files that it reads in
`pipeline/1/parts` belong to the version, too: the settings (`trtq.serve.triton.pipeline.Settings`) and
the components of the pipeline that are not graphs. A change that cannot read the files of version 1
needs a module `v2`, which new repositories then import.
"""

from __future__ import annotations

from trtq.serve.triton.model import TritonPythonModel

__all__ = ["MODEL_PY", "TritonPythonModel"]

MODEL_PY = f'''"""The pipeline for Triton's Python backend; its Python needs trtq: pip install trtq."""

from {__name__} import {TritonPythonModel.__name__}
'''
"""Content of `pipeline/1/model.py`."""
