"""Texts that would like to be more than text: thread ids, names and records of whoever wishes us ill."""

from __future__ import annotations

from typing import Final

HOSTILE: Final = (
    "<script>window.pwned=1</script>",
    "</code></bdi></td></tr></table><script>window.pwned=1</script>",
    '"><img src=x onerror=window.pwned=1>',
    "'><svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    '" autofocus onfocus="window.pwned=1',
    "' onmouseover='window.pwned=1",
    "javascript:window.pwned=1",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/leak'>",
    "<link rel=stylesheet href=http://127.0.0.1:9/leak.css>",
    "<style>@import url(http://127.0.0.1:9/leak);</style>",
    "<base href=http://127.0.0.1:9/>",
    "<form action=http://127.0.0.1:9/><input name=a></form>",
    "<img src=http://127.0.0.1:9/leak.png>",
    "<!--><script>window.pwned=1</script>-->",
    "<![CDATA[<script>window.pwned=1</script>]]>",
    "</title><script>window.pwned=1</script>",
    "</textarea></style></noscript><script>window.pwned=1</script>",
    "{{ 7*7 }}{% raw %}{{ config }}",
    "${7*7}#{7*7}",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "&#60;script&#62;window.pwned=1&#60;/script&#62;",
    "%3Cscript%3Ewindow.pwned=1%3C/script%3E",
    "\\u003cscript\\u003ewindow.pwned=1",
    "room:1?thread_id=2&key_id=3#main",
    "//127.0.0.1:9/leak",
    "+ADw-script+AD4-window.pwned=1+ADw-/script+AD4-",
    "\u202egpj.exe\u2066<b>\u200b\ufeff",
    "＜script＞window.pwned=1＜/script＞",  # noqa: RUF001 - that is the point
    "a" * 250,
)
