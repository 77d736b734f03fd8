"""Makes docs/images/terminal-*.svg: pictures of real sessions, typed into a terminal of tmux and captured from it.

    python docs/record.py [NAME ...]

Needs tmux, `numbainfer` on the PATH, and in the working directory a converted instruct model `qwen` (the pictures have
Qwen2.5-Coder-0.5B-Instruct).
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS, LINES, PROMPT = 110, 60, "$ "
CHAT_PROMPT = "> a message, or /help"  # with what it shows until something is typed

# What is typed, line by line, each when the one before has been answered.
SESSIONS = {
    "chat": [
        "numbainfer run ./qwen -i --temperature 0",
        "What is the capital of France? One sentence.",
        "And of Italy?",
        "Write a Python one-liner that sums the squares from 1 to n.",
        "/stats",
        "/exit",
    ],
    "bench": [
        "numbainfer bench -q --random smollm2-135m -p 128 -n 32 -b 1 -b 4 -d 0 -d 512 -r 3",
        "numbainfer bench -q --random smollm2-135m --profile -p 0 -n 1 -r 5",
    ],
}


def tmux(*arguments: str) -> str:
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def record(name: str) -> None:
    """Runs a session and writes its picture."""
    session = f"numbainfer-{name}"
    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", "-s", session, *size, f"env PS1='{PROMPT}' NO_COLOR= bash --norc --noprofile")
    try:
        settle(session)
        for line in SESSIONS[name]:
            tmux("send-keys", "-t", session, "-l", line)
            tmux("send-keys", "-t", session, "Enter")
            settle(session)
        screen = tmux("capture-pane", "-t", session, "-e", "-p").rstrip()
    finally:
        tmux("kill-session", "-t", session)
    (IMAGES / f"terminal-{name}.svg").write_text(
        picture(screen.removesuffix(PROMPT.strip()).rstrip()), encoding="utf-8"
    )


def settle(session: str, limit: float = 120.0) -> None:
    """Waits until the shell's or the chat's prompt stands on the last line, and nothing changes."""
    before, deadline = "", time.monotonic() + limit
    while time.monotonic() < deadline:
        time.sleep(0.7)
        now = tmux("capture-pane", "-t", session, "-p").rstrip()
        if now == before and now.splitlines()[-1:] in ([PROMPT.strip()], [CHAT_PROMPT]):
            return
        before = now
    raise SystemExit(f"{session}: no prompt within {limit:.0f} s")


def picture(screen: str) -> str:
    """An SVG of what a terminal shows; without the web font that rich would fetch."""
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    for line in screen.splitlines():
        console.print(Text.from_ansi(line), soft_wrap=True)
    svg = console.export_svg(title="numbainfer")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or SESSIONS:
        record(chosen)
