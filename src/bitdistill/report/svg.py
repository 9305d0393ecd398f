"""A drawn SVG made part of the page: its colours (light and dark), its font, its width."""

import re
from xml.etree import ElementTree

INK, MUTED, GRID = "#010101", "#020202", "#030303"
BLUE, ORANGE, GREEN, PURPLE = "#040404", "#050505", "#060606", "#070707"
CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PURPLE: "--purple",
}
"""Stand-in colours and the CSS variable of the page that each becomes."""

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"


def inline_svg(source: str, prefix: str, title: str) -> str:
    """The SVG without what only a file needs, with ids unique on the page and colours from its CSS."""
    root = ElementTree.fromstring(source)
    for parent in root.iter():
        for child in [c for c in parent if c.tag in (f"{_SVG}metadata", f"{_SVG}style")]:
            parent.remove(child)
    used = set(re.findall(r"""(?:href="|url\()#([^")]+)""", source))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        names, element.attrib = element.attrib, {}
        for name, value in names.items():
            if name == _HREF:
                element.set("href", value.replace("#", f"#{prefix}"))
            elif name == "id":
                if value in used:
                    element.set("id", prefix + value)
            elif name == "clip-path":
                element.set(name, value.replace("#", f"#{prefix}"))
            else:
                element.set(name, _themed(value) if name == "style" else value)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _themed(style: str) -> str:
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    for colour, variable in CSS_VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
