"""Docstrings name things as Sphinx does (``:class:`X```); on the site that is plain code."""

import re

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):<code>[~!]?(?:[\w.]*\.)?([\w]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Turn ``:func:<code>a.b.c</code>`` into ``<code>c</code>``."""
    return _ROLE.sub(r"<code>\1</code>", html)
