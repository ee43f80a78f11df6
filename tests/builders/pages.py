"""Reading a page as a browser does."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, scripts aside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._in_script = False
        self.feed(text)

    def reaches_out(self, beside: str) -> list[tuple[str, dict[str, str | None]]]:
        """Tags that need anything but the page itself, and the one file beside it."""
        return [
            (tag, attributes)
            for tag, attributes in self.tags
            if tag in ("link", "iframe", "object", "base", "embed")
            or attributes.get("src")
            or attributes.get("href", beside) != beside
            or any(name.startswith("on") for name in attributes)
        ]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if not self._in_script:
            self.text.append(data)
