"""Parses an HTML file, so that tests can count its tags and read its text."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    VOID = {"meta", "img", "br"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.style, self.stack, self.problems = [], "", "", [], []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.problems.append(tag)

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "style":
            self.style += data
        else:
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    def attributes(self, *names):
        return [value for _, attrs in self.tags for name, value in attrs.items() if name in names]
