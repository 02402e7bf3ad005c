"""Reads a page as a browser would, and notes what it would have to fetch."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from xml.etree import ElementTree

from PIL import Image

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags must be closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read_page(path):
    """The page of a file that holds all it shows; every picture in it can be read."""
    content = path.read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>")
    page = Page(content)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in content
    assert "@import" not in content
    for source in page.sources:
        kind, data = re.fullmatch(r"data:(image/png|image/svg\+xml);base64,(.*)", source).groups()
        if kind == "image/png":
            Image.open(BytesIO(b64decode(data))).load()
        else:
            root = ElementTree.fromstring(b64decode(data))
            links = [v for node in root.iter() for name, v in node.attrib.items() if name.endswith("href")]
            assert all(link.startswith("#") for link in links)
    return page
