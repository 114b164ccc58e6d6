"""Draws docs/terminal.svg: a terminal in which the binary runs on the bundled model. ``terminal_svg.py``.

The commands are run, and what they print is drawn. The lines appear one after
the other, all at once for readers who ask for no motion.
"""

import subprocess
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "terminal.svg"
COLUMNS = 92
CHARACTER, LINE, MARGIN, BAR = 8.4, 20, 18, 34  # pixels
SECONDS_PER_COMMAND, SECONDS_PER_LINE = 1.2, 0.12
# Arguments, and how many lines of the output are drawn; None: all.
COMMANDS = [
    (["generate", "-p", "And the LORD said", "-n", "64", "--temp", "0.7", "--top-p", "0.9", "--seed", "5"], None),
    (["info"], 8),
    (["tokenize", "-p", "Hello, Mixtral", "--explain"], 4),
]


def output_of(arguments: list[str]) -> list[str]:
    """What the binary prints, as lines."""
    command = [ROOT / "build" / "bin" / "mixtral", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip("\n").splitlines()


def shell_line(arguments: list[str]) -> str:
    """The command as a user types it."""
    return " ".join(["mixtral", *(f'"{word}"' if " " in word else word for word in arguments)])


def screen() -> list[tuple[str, str]]:
    """(kind, text) of every line: "command", "output" or "more"."""
    lines = []
    for arguments, most in COMMANDS:
        lines.append(("command", shell_line(arguments)))
        printed = output_of(arguments)
        if arguments[0] == "generate":  # the text continues the prompt
            printed = textwrap.wrap(arguments[arguments.index("-p") + 1] + "\n".join(printed), COLUMNS)
        lines += [("output", line[:COLUMNS]) for line in printed[:most]]
        if most is not None and len(printed) > most:
            lines.append(("more", f"# and {len(printed) - most} more lines"))
        lines.append(("output", ""))
    return lines[:-1]


def picture(lines: list[tuple[str, str]]) -> str:
    """SVG of the screen."""
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), BAR + LINE * len(lines) + MARGIN
    parts, seconds = [], 0.0
    for n, (kind, text) in enumerate(lines):
        seconds += SECONDS_PER_COMMAND if kind == "command" else SECONDS_PER_LINE
        prompt = '<tspan class="prompt">$ </tspan>' if kind == "command" else ""
        place = f'x="{MARGIN}" y="{BAR + LINE * n + LINE}"'
        if text:
            parts.append(
                f'<text class="{kind}" {place} style="animation-delay:{seconds:.2f}s">{prompt}{escape(text)}</text>'
            )
    dots = "".join(f'<circle cx="{MARGIN + 18 * n}" cy="17" r="5.5" fill="{c}"/>' for n, c in enumerate(DOTS))
    size = f'width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" xml:space="preserve">',
            "<title>The binary mixtral on the bundled model</title>",
            f"<style>{STYLE}</style>",
            f'<rect {size} rx="8" fill="#1e1e2e"/>',
            dots,
            *parts,
            "</svg>\n",
        ]
    )


DOTS = ("#f38ba8", "#f9e2af", "#a6e3a1")
STYLE = (
    "text{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#cdd6f4;white-space:pre;"
    "opacity:0;animation:show .01s forwards}.prompt{fill:#a6e3a1}.command{font-weight:bold}.more{fill:#7f849c}"
    "@keyframes show{to{opacity:1}}@media(prefers-reduced-motion:reduce){text{opacity:1;animation:none}}"
)

if __name__ == "__main__":
    PICTURE.write_text(picture(screen()))
