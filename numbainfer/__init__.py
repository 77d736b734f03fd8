"""numbainfer: an inference engine for LLaMA- and Qwen-family models, compiled by Numba from Python alone."""

from numbainfer._version import __version__
from numbainfer.errors import NumbaInferError

__all__ = ["NumbaInferError", "__version__"]
