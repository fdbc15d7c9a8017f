"""Schemas and fakes of every operator of the namespace `flashinfer_ops`.

Shipped as `flashinfer_ops.meta`. The schemas are the library's table of contents: one module per
operator family, each schema right above the fake that says what shapes and dtypes come out.
"""

from . import attention, merge, page, plan
from ._library import NAMESPACE, library

__all__ = ["NAMESPACE", "attention", "library", "merge", "page", "plan"]
