"""The certificate as a page a person reads: verdict, checks, figures, where it comes from."""

import html
import json
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .6rem;
border-bottom: 1px solid #ddd; vertical-align: top } .failed { color: #a40000; font-weight: 600 }
.passed { color: #006b1b } code { overflow-wrap: anywhere }
.note { background: #f4f4f4; padding: 1rem }
"""


def certificate_page(certificate: dict[str, Any], name: str) -> str:
    """The page, whole and without scripts.

    Args:
        name: of the release's folder.
    """
    kind = certificate["format"] or "unknown format"
    if certificate["layout"]:
        kind += f", {certificate['layout']} layout"
    return "\n".join(
        [
            "<!doctype html>",
            f"<html lang=en><meta charset=utf-8><title>Certificate of {_text(name)}</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>{_text(name)} ({_text(kind)}): {_verdict(certificate['passed'])}</h1>",
            _changed(certificate["changed_bounds"]),
            f"<p class=note>{_text(certificate['note'])}</p>" if certificate["note"] else "",
            _reference(certificate["figures"]),
            _checks(certificate),
            "<h2>Measured</h2>",
            _table(certificate["figures"]),
            "<h2>Made from</h2>",
            _table(certificate["checkpoint"]),
            f"<p>Made {_text(certificate['made'])} with "
            + _text(", ".join(f"{n} {v}" for n, v in certificate["made_with"].items()))
            + "</p></html>",
        ]
    )


def _verdict(passed: bool) -> str:
    word = "passed" if passed else "failed"
    return f"<span class={word}>{word}</span>"


def _checks(certificate: dict[str, Any]) -> str:
    rows = ["<table><tr><th>check<th><th>measured<th>bound<th>says</tr>"]
    for check in certificate["checks"]:
        cells = (check["measured"], check["bound"], check["says"])
        rows.append(
            f"<tr><td>{_text(check['name'])}<td>{_verdict(check['passed'])}"
            + "".join(f"<td>{_text(cell)}" for cell in cells)
            + "</tr>"
        )
    for what, why in certificate["not_run"].items():
        rows.append(f"<tr><td>{_text(what)}<td class=failed>not run<td><td><td>{_text(why)}</tr>")
    return "\n".join([*rows, "</table>"])


def _changed(changed: dict[str, list[Any]]) -> str:
    if not changed:
        return ""
    said = "; ".join(f"{name}: {used} in place of {own}" for name, (own, used) in changed.items())
    return f"<p class=failed>Bounds other than the published ones: {_text(said)}</p>"


def _reference(figures: dict[str, Any]) -> str:
    """What a quantized release's answers were compared with."""
    if "divergence" not in figures:
        return ""
    return f"<p>kl and top1 compare with {_text(figures['divergence']['from'])}.</p>"


def _table(values: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>{_text(name)}<td><code>{_text(value)}</code></tr>"
        for name, value in values.items()
    ]
    return "\n".join(["<table>", *rows, "</table>"])


def _text(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}"
    elif not isinstance(value, str):
        value = json.dumps(value)
    return html.escape(value)
