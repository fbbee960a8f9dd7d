"""A report taken apart: elements, drawings and tables, by the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import BytesIO

from PIL import Image

from mt3_export.lab.report.page import page

VOID = {"br", "hr", "img", "input", "link", "meta"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Node:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, attributes, []

    def all(self, tag, class_=None):
        """Elements below, in order."""
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and (class_ is None or class_ in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.all(tag, class_)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Refuses what is not closed in order."""

    def __init__(self, source):
        super().__init__()
        self.root = Node("", {})
        self.stack = [self.root]
        self.feed(source)
        self.close()
        assert self.stack == [self.root]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        node = Node(tag, dict(attrs))
        self.stack[-1].children.append(node)
        if tag not in VOID:
            self.stack.append(node)

    def handle_endtag(self, tag):
        assert self.stack.pop().tag == tag

    def handle_data(self, data):
        self.stack[-1].children.append(data)


def parse(results, pictures=()):
    return Tree(page(results, pictures)).root


def png(width=40, height=30):
    buffer = BytesIO()
    Image.new("RGB", (width, height), "#123456").save(buffer, "PNG")
    return buffer.getvalue()


def wide(root, title):
    """The drawing of a figure for wide pages."""
    figure = next(f for f in root.all("figure") if next(f.all("b")).text == title)
    return next(next(figure.all("div", "wide")).all("svg"))


def tips(svg):
    """Tooltip, x and y of every dot."""
    return {
        next(dot.all("title")).text: (float(dot.attributes["cx"]), float(dot.attributes["cy"]))
        for dot in svg.all("circle")
        if any(dot.all("title"))
    }


def summary_rows(root):
    """Texts of every row's cells by combination, and the heads of the columns."""
    table = next(root.all("table", "summary"))
    heads = [th.text for th in list(next(table.all("thead")).all("tr"))[1].all("th")]
    rows = {}
    for row in next(table.all("tbody")).all("tr"):
        name = next(row.all("th"))
        precision = "".join(child for child in name.children if isinstance(child, str)).strip()
        rows[f"{precision}-{next(name.all('small')).text}"] = list(row.all("td"))
    return heads, rows


def walk(node):
    yield node
    for child in node.children:
        if isinstance(child, Node):
            yield from walk(child)
