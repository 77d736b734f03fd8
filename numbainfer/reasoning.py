"""Models that think aloud: which part of a reply is reasoning, and which is the answer."""

from __future__ import annotations

from numbainfer.generation import overlap

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Tells reasoning from answer while a reply streams.

    A reply reasons from a <think> at its beginning on, or from the start where the prompt ended with one, up to
    </think>. A tag that is mentioned later is text like any other.
    """

    def __init__(self, prompt_text: str = "") -> None:
        self.reasoning = prompt_text.rstrip().endswith(OPEN)
        self._may_open = not self.reasoning
        self._held = ""

    def push(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether it is reasoning) for what is certain; tags count as reasoning."""
        self._held += text
        found = []
        if self._may_open:
            start = self._held.lstrip()
            if start.startswith(OPEN):
                self.reasoning, self._may_open = True, False
            elif not OPEN.startswith(start):
                self._may_open = False
            else:
                return []  # it may become <think>
        if self.reasoning:
            end = self._held.find(CLOSE)
            if end >= 0:
                end += len(CLOSE)
                self.reasoning = False
                found.append((self._held[:end], True))
            else:
                end = len(self._held) - overlap(self._held, CLOSE)
                found.append((self._held[:end], True))
            self._held = self._held[end:]
        if not self.reasoning:
            found.append((self._held, False))
            self._held = ""
        return [part for part in found if part[0]]

    def flush(self) -> list[tuple[str, bool]]:
        """The rest, when nothing follows."""
        rest, self._held = self._held, ""
        return [(rest, self.reasoning)] if rest else []
