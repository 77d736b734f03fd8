"""numbainfer: an inference engine for LLaMA- and Qwen-family models, compiled by Numba from Python alone."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numbainfer._version import __version__
from numbainfer.errors import NumbaInferError

if TYPE_CHECKING:
    from numbainfer.generation import Generation
    from numbainfer.llm import LLM
    from numbainfer.sampling_params import SamplingParams

__all__ = ["LLM", "Generation", "NumbaInferError", "SamplingParams", "__version__"]

_LAZY = {"LLM": "llm", "Generation": "generation", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """The API's names, imported when they are first used: Numba alone takes most of a second."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


_here = Path(__file__).parent
if not (_here / "converters").is_dir():
    # A checkout, where the converters stand beside this package; installing puts them into it.
    __path__.append(str(_here.parent))
