"""What a user says about a source that the source does not say itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from numbainfer.checkpoint import read_json
from numbainfer.errors import NumbaInferError

INTERLEAVED, HALF_SPLIT = "interleaved", "half-split"


@dataclass(frozen=True)
class SourceOptions:
    """tokenizer: a tokenizer's file or directory, in place of what the source carries. config: a Hugging Face
    config.json, for formats without one. rope_layout: "interleaved" (Meta) or "half-split" (Hugging Face), and
    rope_theta, for formats that don't say. None: what the format says, or its custom.
    """

    tokenizer: Path | str | None = None
    config: Path | str | None = None
    rope_layout: str | None = None
    rope_theta: float | None = None

    def refuse_all(self, reason: str) -> None:
        """For a model that knows it all."""
        self._refuse({field.name for field in fields(self)}, reason)

    def refuse_config(self, reason: str) -> None:
        """For a source that has a config of its own."""
        self._refuse({"config", "rope_layout", "rope_theta"}, reason)

    def refuse_rope(self, reason: str) -> None:
        """For a source whose RoPE is known."""
        self._refuse({"rope_layout", "rope_theta"}, reason)

    def _refuse(self, names: set[str], reason: str) -> None:
        for field in fields(self):
            if field.name in names and getattr(self, field.name) is not None:
                option = "--" + field.name.replace("_", "-")
                raise NumbaInferError(f"{option} is for models that don't say it themselves; {reason}")

    def apply_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config with the user's own in its place, after its shape was held against the file's."""
        if self.config is None:
            return config if self.rope_theta is None else config | {"rope_theta": self.rope_theta}
        given = read_json(Path(self.config))
        if not isinstance(given, dict):
            raise NumbaInferError(f"{self.config} is not a JSON object")
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            found = given.get(key, given.get("num_attention_heads") if key == "num_key_value_heads" else None)
            if found != config[key]:
                raise NumbaInferError(f"{self.config} says {key} {found!r}, the weights {config[key]}")
        if self.rope_theta is not None:
            raise NumbaInferError("--rope-theta goes without --config, which says it")
        return given


NO_OPTIONS = SourceOptions()
