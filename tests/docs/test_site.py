"""What makes the site of the pages; `make docs` builds it in CI, strictly."""

from pathlib import Path

import pytest
import yaml

from scripts import check_site, site_hooks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://unpkg.com/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link rel="preconnect" href="https://fonts.gstatic.com">',
        '<img src="HTTPS://shields.example/badge.svg">',
        '<img srcset="a.png 1x, https://x.example/b.png 2x">',
        '<iframe src="https://x.example"></iframe>',
        '<form action="https://x.example"></form>',
        '<a href="page.html" ping="https://x.example">x</a>',
        '<style>@import "https://x.example/a.css";</style>',
        '<p style="background:url(//x.example/a.png)">x</p>',
        '<meta property="og:image" content="https://x.example/a.png">',
        '<pre class="mermaid"><code>graph</code></pre>',
    ],
)
def test_another_host_is_found(html: str, tmp_path: Path) -> None:
    """Whatever would make a browser ask somebody else is a finding."""
    page = tmp_path / "index.html"
    page.write_text(f"<html><body>{html}</body></html>")
    assert check_site.foreign(page)


def test_another_host_is_found_in_a_style_sheet(tmp_path: Path) -> None:
    """Fonts and pictures of style sheets count too; pictures within them do not."""
    sheet = tmp_path / "a.css"
    sheet.write_text("@font-face{src:url(https://fonts.gstatic.com/a.woff2)}")
    assert check_site.foreign(sheet)
    sheet.write_text(
        "a{background:url('../a.png')} b{mask:url(\"data:image/svg+xml;utf8,<svg xmlns='http://w3'/>\")}"
    )
    assert not check_site.foreign(sheet)


def test_own_files_and_links_are_allowed(tmp_path: Path) -> None:
    """Files of the site, and links that a reader has to click."""
    page = tmp_path / "index.html"
    page.write_text(
        '<link href="assets/a.css"><script src="../a.js"></script>'
        '<a href="https://www.rfc-editor.org/rfc/rfc9457">RFC</a> https://HOST:8443'
    )
    assert not check_site.foreign(page)


@pytest.mark.parametrize(
    "uri, link, becomes",
    [
        ("rotation.md", "audit.md#verifying", "audit.md#verifying"),
        ("kubernetes.md", "../benchmarks/README.md", "repository/benchmarks/README.md"),
        ("adr/0014-the-fast-door.md", "../../benchmarks/README.md", "../repository/benchmarks/README.md"),
        ("tutorial.md", "../SECURITY.md#what-is-protected", "repository/SECURITY.md#what-is-protected"),
        ("audit.md", "../README.md", "index.md"),
        ("index.md", "docs/errors.md", "errors.md"),
        ("index.md", "docs/adr/", "adr/README.md"),
        ("index.md", "SECURITY.md", "repository/SECURITY.md"),
        ("repository/SECURITY.md", "docs/audit.md", "../audit.md"),
        (
            "repository/benchmarks/README.md",
            "../docs/reliability.md#two-instances",
            "../../reliability.md#two-instances",
        ),
        ("capacity.md", "../scripts/lock", "repository/scripts/lock"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(uri: str, link: str, becomes: str) -> None:
    """A link that works in a checkout leads to the same text in the site."""
    assert site_hooks.rewrite(f"see [it]({link}).", uri) == f"see [it]({becomes})."
    assert becomes.partition("#")[0] in {"audit.md", "errors.md", "index.md"} or site_hooks.targets(
        f"[it]({link})", uri
    )


def test_folder_without_a_readme_is_listed(tmp_path: Path) -> None:
    """A link to such a folder leads to a page of its files, which are in the site too."""
    (tmp_path / "b.py").touch()
    (tmp_path / "a.py").touch()
    (tmp_path / "inner").mkdir()
    page = site_hooks.folder_page(tmp_path)
    assert page == f"# {tmp_path.name}\n\n- [a.py](a.py)\n- [b.py](b.py)\n"
    assert site_hooks.targets("[it](../scripts)", "audit.md") == {"repository/scripts/README.md"}
    listed = site_hooks.folder_page(ROOT / "scripts")
    assert "repository/scripts/lock" in site_hooks.targets(listed, "repository/scripts/README.md")


@pytest.mark.parametrize("link", ["nothing.md", "../nothing.md", "../../../etc/passwd"])
def test_links_that_lead_nowhere_stay(link: str) -> None:
    """So that the strict build refuses them; and nothing from outside the repository gets into the site."""
    assert site_hooks.rewrite(f"[it]({link})", "rotation.md") == f"[it]({link})"
    assert site_hooks.targets(f"[it]({link})", "rotation.md") == set()


def test_code_is_left_alone() -> None:
    """What looks like a link in a block of code is no link."""
    page = "```\n[it](../README.md)\n```\n[it](../README.md)\n"
    assert site_hooks.rewrite(page, "audit.md") == "```\n[it](../README.md)\n```\n[it](index.md)\n"


def test_site_is_built_from_here_alone() -> None:
    """The theme asks for no fonts, and anything odd ends the build."""

    class Loader(yaml.SafeLoader):
        """Passes over the tag of the function that makes anchors."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)  # noqa: S506 - a safe loader, see above
    assert config["theme"]["font"] is False
    assert config["plugins"] == ["search"]
    assert {level for group in config["validation"].values() for level in group.values()} == {"warn"}
    # Quiet, mkdocs neither shows nor counts warnings.
    commands = [line for line in (ROOT / "Makefile").read_text().splitlines() if "bin/mkdocs" in line]
    assert commands
    assert all("--strict" in line and "--quiet" not in line for line in commands)
