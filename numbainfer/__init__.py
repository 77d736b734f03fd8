"""numbainfer: an inference engine for LLaMA- and Qwen-family models, compiled by Numba from Python alone."""

from pathlib import Path

from numbainfer._version import __version__
from numbainfer.errors import NumbaInferError

__all__ = ["NumbaInferError", "__version__"]

_here = Path(__file__).parent
if not (_here / "converters").is_dir():
    # A checkout, where the converters stand beside this package; installing puts them into it.
    __path__.append(str(_here.parent))
