"""HTML for pages: escaping, the frame of a page and what it may do, pictures, numbers as people say them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIDTH, SMALL = slice(16, 20), 128  # bytes of a PNG that say its width; pixels, up to which its pixels are shown
MINUTE, HOUR = 60, 3600  # s
KB, MB, GB = 1e3, 1e6, 1e9


def escape(text: object) -> str:
    """Return a text as it may stand in HTML, in quotes too."""
    return html.escape(str(text), quote=True)


def json_data(value: Any) -> str:
    """Return a value as JSON that may stand inside a script element: nothing in it can end that or begin a comment."""
    text = json.dumps(value, allow_nan=False, default=str)  # without line ends of Unicode: all is ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def asset_text(name: str) -> str:
    """Return the text of a file of this folder, such as style.css."""
    return (HERE / name).read_text(encoding="utf-8")


def document(title: str, body: str, scripts: Sequence[str] = (), policy: str = "", style: str = "") -> str:
    """Return a page with its `title`, `body` (HTML) and scripts, which run in their order.

    It can load nothing: what it shows is inside. No script runs but these, which the policy names by their hashes.

    policy: directives of a Content-Security-Policy beside those.  style: CSS beside that of all pages.
    """
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    rules = [
        "default-src 'none'",
        "img-src data: blob:",
        "media-src data:",
        "style-src 'unsafe-inline'",
        " ".join(["script-src", *(f"'sha256-{digest}'" for digest in digests)] if digests else ["script-src 'none'"]),
        "base-uri 'none'",
        "form-action 'none'",
        *filter(None, [policy]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(rules)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{asset_text('style.css')}{style}</style>\n</head>\n<body>\n"
        f"{body}{''.join(f'<script>{text}</script>{chr(10)}' for text in scripts)}</body>\n</html>\n"
    )


def data_uri(kind: str, data: bytes) -> str:
    """Return bytes of a media type, such as image/png, as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes, words: str) -> str:
    """Return a picture, PNG or JPEG, whose `words` are for people who do not see it. A small one shows its pixels."""
    png = data.startswith(b"\x89PNG")
    small = png and int.from_bytes(data[WIDTH], "big") < SMALL
    src = data_uri("image/png" if png else "image/jpeg", data)
    return f'<img{" class=small" * small} alt="{escape(words)}" src="{src}">'


def listed(facts: Mapping[str, object]) -> str:
    """Return {name: text} as a list of definitions."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in facts.items())}</dl>"


def table(heads: Sequence[str], lines: Sequence[Sequence[object]], words: str) -> str:
    """Return a table that scrolls by itself where it is too wide; `words` say what it is."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>\n" for line in lines)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(words)}"><table>\n'
        f"<tr>{head}</tr>\n{rows}</table></div>\n"
    )


# ---------------------------------------------------------------- numbers


def number(value: Any) -> str:
    """Return a number in four digits, True or False as yes or no, and None, which was not finite, as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def spell_seconds(seconds: float) -> str:
    """Return a time as people say it."""
    minutes, hours = round(seconds / MINUTE), seconds / HOUR
    return f"{seconds:.0f} s" if seconds < 2 * MINUTE else f"{minutes} min" if hours < 2 else f"{hours:.1f} h"


def spell_bytes(n: float) -> str:
    """Return a size as people say it."""
    unit, name = (GB, "GB") if n >= GB else (MB, "MB") if n >= MB else (KB, "kB")
    return f"{n / unit:.3g} {name}"
