"""README.rst, the pages in docs and CHANGES.rst say what the code says."""

import re
from pathlib import Path
from typing import Final

import pytest
from docutils import nodes
from docutils.core import publish_doctree

from volplugin import __version__, config, drivers, failpoints, options
from volplugin.cli import cli
from volplugin.config import Config, SocketConfig, Timeouts, load
from volplugin.config_print import render
from volplugin.errors import InvalidArgument
from volplugin.sizes import parse_size

ROOT: Final = Path(__file__).resolve().parents[2]
README: Final = ROOT / "README.rst"
CHANGES: Final = ROOT / "CHANGES.rst"
PAGES: Final = sorted((ROOT / "docs").glob("*.rst"))

Row = tuple[str, ...]


def parse(file: Path) -> nodes.document:
    # Level 2 are warnings; what reaches halt_level is raised.
    document = publish_doctree(
        file.read_text(),
        source_path=str(file),
        settings_overrides={
            "report_level": 2,
            "halt_level": 2,
            "doctitle_xform": False,  # a lone section stays one
        },
    )
    assert isinstance(document, nodes.document)
    return document


@pytest.fixture(scope="module")
def readme() -> nodes.document:
    return parse(README)


@pytest.fixture(scope="module")
def manual(readme: nodes.document) -> list[nodes.document]:
    """All pages for users."""
    return [readme, *map(parse, PAGES)]


def driver_section(manual: list[nodes.document], name: str) -> nodes.section:
    title = f"Driver {name}"
    found = [page for page in manual if title in titles(page)]
    assert len(found) == 1, f"{len(found)} pages have a section {title!r}"
    return section(found[0], title)


def titles(document: nodes.document) -> list[str]:
    return [plain(title) for title in document.findall(nodes.title)]


def section(document: nodes.document, title: str) -> nodes.section:
    found = [
        node
        for node in document.findall(nodes.section)
        if plain(node.next_node(nodes.title)) == title
    ]
    assert len(found) == 1, f"README has {len(found)} sections {title!r}"
    return found[0]


def plain(node: nodes.Node | None) -> str:
    return "" if node is None else " ".join(node.astext().split())


def tables(node: nodes.Element) -> list[list[Row]]:
    """Return the tables of a section, of subsections too, without their heads."""
    return [
        [
            tuple(plain(cell) for cell in row.findall(nodes.entry))
            for body in table.findall(nodes.tbody)
            for row in body.findall(nodes.row)
        ]
        for table in node.findall(nodes.table)
    ]


def table(node: nodes.Element, first_key: str) -> list[Row]:
    found = [rows for rows in tables(node) if rows[0][0] == first_key]
    assert len(found) == 1, f"{len(found)} tables begin with {first_key}"
    return found[0]


def literals(node: nodes.Element) -> list[str]:
    return [plain(literal) for literal in node.findall(nodes.literal)]


def declared(cls: type) -> list[Row]:
    """Return name, unit, default and help of each option, as ``-o help`` tells them."""
    rows: list[Row] = []
    for line in options.describe(cls).splitlines():
        name, *unit, default, explained = re.split(r" {2,}", line)
        shown = default.removeprefix("default ")
        rows.append((name, unit[0] if unit else "", shown, explained))
    return rows


@pytest.mark.parametrize("file", [README, CHANGES, *PAGES], ids=lambda file: file.name)
def test_is_valid_restructured_text(file: Path) -> None:
    """A page that PyPI and GitHub show has no fault in its form."""
    parse(file)


@pytest.mark.parametrize("name", drivers.NAMES)
def test_driver_section_lists_the_options_of_a_volume(
    manual: list[nodes.document], name: str
) -> None:
    """The first table of a driver's section is what ``-o help`` says."""
    assert tables(driver_section(manual, name))[0] == declared(
        drivers.find(name).Options
    )


@pytest.mark.parametrize("name", drivers.NAMES)
def test_driver_section_lists_the_settings_of_a_backend(
    manual: list[nodes.document], name: str
) -> None:
    """The second table of a driver's section has its backend's settings."""
    assert tables(driver_section(manual, name))[1] == declared(
        drivers.find(name).Config
    )


def test_there_is_no_section_of_a_driver_that_is_none(
    manual: list[nodes.document],
) -> None:
    """The sections *Driver NAME* are those of the registry."""
    told = [title for page in manual for title in titles(page)]
    found = [title for title in told if title.startswith("Driver ")]
    assert sorted(found) == [f"Driver {name}" for name in drivers.NAMES]


def test_common_options_are_those_that_the_code_takes_apart(
    readme: nodes.document,
) -> None:
    """Each option of every driver is handled before the driver sees it."""
    rows = table(section(readme, "Options of a volume"), "driver")
    assert [key for key, _ in rows] == [
        *("driver", "help", "opt.X", "backend", "selector.*")
    ]
    common = options.split_common(
        {
            **{key.replace("*", "x"): "1" for key, _ in rows},
            "opt.X": "2",
        }
    )
    assert common == options.Common(backend="1", help=True, rest={"X": "2"})


@pytest.mark.parametrize(
    ("cls", "first_key"),
    [(Config, "root"), (Timeouts, "create"), (SocketConfig, "path")],
)
def test_configuration_lists_every_key_with_its_default(
    readme: nodes.document, cls: type, first_key: str
) -> None:
    """The tables of the configuration are what the code declares."""
    assert table(section(readme, "Configuration"), first_key) == declared(cls)


def test_every_key_that_config_prints_is_in_the_manual(
    manual: list[nodes.document],
) -> None:
    """``volplugin config`` prints no key that a user can't look up."""
    printed = {
        line.partition(" = ")[0]
        for line in render(load_text("")).splitlines()
        if " = " in line
    }
    told = {row[0] for page in manual for rows in tables(page) for row in rows}
    assert printed <= told


def load_text(text: str, directory: Path | None = None) -> Config:
    file = None
    if directory is not None:
        (directory / "volplugin.toml").write_text(text)
        file = str(directory / "volplugin.toml")
    return load(
        file=file or "/dev/null",
        environ={},
        flags={},
        settings_of=drivers.settings_of,
        drivers=drivers.NAMES,
        aliases=drivers.ALIASES,
        shared=drivers.SHARED,
    )


def test_the_example_configuration_is_valid(
    readme: nodes.document, tmp_path: Path
) -> None:
    """The example can be copied; it sets what it says it sets."""
    block = section(readme, "Configuration").next_node(nodes.literal_block)
    assert block is not None
    example = load_text(block.astext(), tmp_path)
    assert example.timeouts.drain == 10
    assert example.backends["fast"].driver == "local"


def test_names_the_default_configuration_file(readme: nodes.document) -> None:
    """A user finds where the file belongs."""
    assert config.DEFAULT_FILE in literals(section(readme, "Configuration"))


def test_variables_are_those_that_the_code_reads(readme: nodes.document) -> None:
    """Each variable in the table is read, and each that is read is in it."""
    rows = table(section(readme, "Configuration"), "the file")
    told = {variable for *_, variable in rows}
    keys = [key for key, *_ in declared(Config)]
    assert told == {
        "VOLPLUGIN_CONFIG",
        "VOLPLUGIN_SOCKET",
        failpoints.VARIABLE,
        *(f"VOLPLUGIN_{key.upper().replace('-', '_')}" for key in keys),
    }
    mentioned = set(re.findall(r"VOLPLUGIN_[A-Z_]+", README.read_text()))
    assert mentioned == told
    with pytest.raises(InvalidArgument) as caught:
        load(
            file="/dev/null",
            environ=dict.fromkeys(mentioned - {"VOLPLUGIN_CONFIG"}, "\0"),
            flags={},
            settings_of=drivers.settings_of,
            drivers=drivers.NAMES,
        )
    assert "unknown variable" not in str(caught.value)


def test_flags_are_those_of_serve(readme: nodes.document) -> None:
    """Each flag in the table is one of ``serve``, and each of those is in it."""
    rows = table(section(readme, "Configuration"), "the file")
    told = [flag for _, flags, _ in rows for flag in flags.split(", ") if flag]
    taken = [flag for each in cli.commands["serve"].params for flag in each.opts]
    assert sorted(told) == sorted(taken)


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_is_named(readme: nodes.document, name: str) -> None:
    """No command is a secret."""
    assert f"volplugin {name}" in literals(readme)


def test_sizes_are_accepted_and_refused_as_told(readme: nodes.document) -> None:
    """The examples of sizes are what the parser does."""
    told = section(readme, "Sizes")
    accepted, refused = (
        literals(paragraph)
        for word in ("Accepted: ", "Refused: ")
        for paragraph in told.findall(nodes.paragraph)
        if plain(paragraph).startswith(word)
    )
    assert all(parse_size(text) > 0 for text in accepted)
    for text in refused:
        with pytest.raises(InvalidArgument):
            parse_size(text)


def test_the_transcript_shows_the_error_of_a_misspelt_option() -> None:
    """The last line of the session is what the code says today."""
    driver = drivers.find("tmpfs")
    with pytest.raises(InvalidArgument) as caught:
        options.parse(driver.Options, {"sise": "10m"}, subject="driver tmpfs")
    assert f"create x: {caught.value}\n" in README.read_text()


def test_make_targets_exist_and_those_for_users_are_told(
    readme: nodes.document,
) -> None:
    """Each target in the text can be made, and each with a help line is in it."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    helped = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    blocks = [plain(block) for block in readme.findall(nodes.literal_block)]
    texts = "\n".join([*literals(readme), *blocks])
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", texts))
    assert named <= targets
    assert helped <= named


def test_layout_has_every_module(readme: nodes.document) -> None:
    """Whoever looks for a module's job finds its line, and no line of one gone."""
    package = ROOT / "volplugin"
    files = {file.relative_to(package) for file in package.rglob("*.py")}
    modules = {file.stem for file in files} - {"__init__", "__main__"}
    folders = {str(file.parent) for file in files} - {"."}
    cells = [cell for row in tables_of_layout(readme) for cell in row]
    told = {word for cell in cells for word in cell}
    assert told - {"mount=", "volplugin recover"} == modules | folders


def tables_of_layout(document: nodes.document) -> list[list[list[str]]]:
    """Return the literals in each cell of the table of modules."""
    return [
        [literals(cell) for cell in row.findall(nodes.entry)]
        for row in section(document, "Layout").findall(nodes.row)
    ]


def test_test_folders_are_told(readme: nodes.document) -> None:
    """Each folder below ``tests`` has its line."""
    rows = tables(section(readme, "Tests"))[0]
    folders = {
        f"tests/{each.name}"
        for each in (ROOT / "tests").iterdir()
        if each.is_dir() and each.name.isidentifier() and each.name != "__pycache__"
    }
    assert {name for name, _ in rows} == folders


def test_changes_begin_with_this_version() -> None:
    """The newest changes are those of the version that the package has."""
    versions = [plain(title) for title in parse(CHANGES).findall(nodes.title)][1:]
    assert versions[0] == __version__
