"""Pages of a PDF as pictures, by PDFium (package pypdfium2, in the extra `pdf`).

A page is rendered so that its longer edge has `LONGEST_EDGE` pixels, about 144 dots an inch of a
letter page: what tiles of 512 show without enlarging. Pages come as PNG, so that they go the way of
any other image.

Refuses what PDFium cannot open, documents behind a password, and pages that are not there. Costs a
few milliseconds a page.
"""

import io

LONGEST_EDGE = 1584
"""Of a rendered page. [pixels]"""


def page_images(data: bytes, name: str, pages: tuple[int, int] | None = None) -> list[bytes]:
    """Rendered pages, PNG each.

    Args:
        name: the file, for messages.
        pages: first and last page, from 1; all where None.

    Raises:
        ValueError: it is no PDF that can be read, or has no such pages; or pypdfium2 is missing.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ValueError(
            f"{name} is a PDF, and reading those needs the package pypdfium2: "
            "pip install 'megatron-vl[pdf]'"
        ) from error
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"{name} is not a PDF that can be read ({error})") from error
    try:
        first, last = pages or (1, len(document))
        if not 1 <= first <= last <= len(document):
            raise ValueError(
                f"pages {first}-{last} of {name} were asked for; it has pages 1-{len(document)}"
            )
        return [_png(document[number]) for number in range(first - 1, last)]
    finally:
        document.close()


def _png(page: object) -> bytes:
    bitmap = page.render(scale=LONGEST_EDGE / max(page.get_size()))  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    bitmap.to_pil().convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
