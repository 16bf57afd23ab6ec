"""Fast and exact embeddings with jina-embeddings-v5-text and other Qwen3 or EuroBERT encoders.

Public names are loaded on first use, so that ``import jv5kernels`` needs no GPU, no Triton, no
compiler and little time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["FastEncoder", "__version__", "ops", "patch", "unpatch", "verify"]

if TYPE_CHECKING:
    from jv5kernels import ops
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.patching import patch, unpatch
    from jv5kernels.verify import verify

_HOME = {
    "FastEncoder": "jv5kernels.encoder",
    "patch": "jv5kernels.patching",
    "unpatch": "jv5kernels.patching",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("jv5kernels.ops")
    if name == "verify":
        # The function shadows its module of the same name; `import jv5kernels.verify` still finds the module.
        value = import_module("jv5kernels.verify").verify
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'jv5kernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
