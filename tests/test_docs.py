"""The documents: what they show decodes, what they name exists."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer.main
from typer.core import TyperGroup

from osmf.cli import app
from osmf.settings import Settings, SettingsRefusedError, describe_settings, load_settings
from streams import events
from streams.codec import EventDecoder, json_schemas
from streams.settings import TopicSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
EVENTS = TEXTS["docs/events.md"]
EVENT_TYPES: dict[str, type[Any]] = {each.__name__: each for each in get_args(events.Event)}
PARTS: dict[str, type[Any]] = {
    each.__name__: each for each in (events.ShiftedGroup, events.ProfileEntry, events.CreativeCtr)
}
COMMANDS = dict(typer.main.get_group(app).commands)
for group_name, group in typer.main.get_group(app).commands.items():
    if isinstance(group, TyperGroup):
        COMMANDS |= {f"{group_name} {name}": command for name, command in group.commands.items()}
        del COMMANDS[group_name]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SETTING = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)+(?:\.\*)?")
_VARIABLE = re.compile(r"\bOSMF_[A-Z0-9_]+[A-Z0-9]\b")


def prose(text: str) -> str:
    """Return a document without its fenced blocks."""
    return _FENCE.sub("", text)


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    found = (match.groups() for match in _FENCE.finditer(text))
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, name, body in found if name == language]


def section(text: str, title: str) -> str:
    """Return what stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {title!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    """Return the code in the first column of a section's table."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def code_lines(text: str) -> list[str]:
    """Return inline code, and the lines of indented code."""
    return [*_SPAN.findall(prose(text)), *(m.strip() for m in re.findall(r"^ {4,}(.*)$", text, re.MULTILINE))]


def osmf_calls(text: str) -> list[list[str]]:
    """Return the words of every call of the command line, without `osmf` itself."""
    lines = [line.split("#")[0].strip() for line in code_lines(text)]
    return [shlex.split(line)[1:] for line in lines if re.match(r"osmf [a-z-]", line)]


def slugs(text: str) -> set[str]:
    """Return the anchors of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def in_documents(find: Any) -> list[Any]:
    """Return (document, finding) of every document, as parameters."""
    return [pytest.param(name, found, id=f"{name}: {found}") for name, text in TEXTS.items() for found in find(text)]


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_the_example_of_an_event_decodes(name: str) -> None:
    text = EVENTS[EVENTS.index(f"\n## {name}\n") + 1 :]
    text = text[: text.index("\n## ")]
    (example,) = blocks(text, "json")
    (event,) = EventDecoder(EVENT_TYPES[name]).decode(example.encode())
    assert isinstance(event, EVENT_TYPES[name]), event
    # The decoder passes over names that it does not know; an example has none.
    assert msgspec.to_builtins(event) == json.loads(example)


@pytest.mark.parametrize("name", [*EVENT_TYPES, *PARTS])
def test_the_table_of_an_event_has_its_fields(name: str) -> None:
    fields = msgspec.structs.fields({**EVENT_TYPES, **PARTS}[name])
    rows = section(EVENTS, name)
    assert first_column(rows) == [field.name for field in fields]
    if name in EVENT_TYPES:
        marked = re.findall(r"^\| `([^`]+)` \| [^|]* \| required \|", rows, re.MULTILINE)
        assert marked == [field.name for field in fields if field.required]


def test_every_topic_has_its_row() -> None:
    assert sorted(first_column(section(EVENTS, "Events"))) == sorted(TopicSettings().model_dump().values())


def test_every_reason_of_a_dead_letter_has_a_line() -> None:
    assert first_column(section(EVENTS, "Reasons")) == list(get_args(events.DeadLetterReason))


def test_the_arrow_example_decodes() -> None:
    (example,) = blocks(EVENTS, "python")
    names: dict[str, Any] = {}
    exec(example, names)
    (event,) = EventDecoder(events.Impression).decode(names["payload"])
    assert isinstance(event, events.Impression), event
    assert event.attributes == {"age": "29-32", "os_plant": "ios"}


def test_the_http_examples_decode() -> None:
    from serving.app import DecideAnswer, DecideBody

    call, answer = blocks(TEXTS["docs/operations.md"], "json")
    for example, body in ((call, DecideBody), (answer, DecideAnswer)):
        assert msgspec.to_builtins(msgspec.json.decode(example, type=body)) == json.loads(example)


def test_the_schemas_are_those_of_the_structs() -> None:
    stored = {path.name: json.loads(path.read_bytes()) for path in (ROOT / "docs/schemas").iterdir()}
    assert stored == msgspec.json.decode(msgspec.json.encode(json_schemas()))


def test_there_are_calls_to_check() -> None:
    named = {call[0] for text in TEXTS.values() for call in osmf_calls(text)}
    assert {"demo", "online", "generator", "offline", "serve", "replay", "inspect", "verify"} <= named


@pytest.mark.parametrize(("document", "call"), in_documents(lambda text: [" ".join(c) for c in osmf_calls(text)]))
def test_a_call_of_the_command_line_is_understood(document: str, call: str) -> None:
    words = call.split()
    if words == ["--help"]:
        return
    n_words = 2 if " ".join(words[:2]) in COMMANDS else 1
    name, arguments = " ".join(words[:n_words]), words[n_words:]
    assert name in COMMANDS, document
    parameters = COMMANDS[name].params
    options = {option for parameter in parameters for option in parameter.opts} | {"--help"}
    used = [word.split("=")[0] for word in arguments if word.startswith("--")]
    assert set(used) <= options, document
    if arguments and not arguments[0].startswith("-"):
        assert any(parameter.param_type_name == "argument" for parameter in parameters), document


@pytest.mark.parametrize(
    ("document", "option"),
    in_documents(lambda text: [line.split()[0] for line in _SPAN.findall(prose(text)) if line.startswith("--")]),
)
def test_an_option_named_alone_is_one_of_some_command(document: str, option: str) -> None:
    known = {found for command in COMMANDS.values() for parameter in command.params for found in parameter.opts}
    assert option in known, document


@pytest.mark.parametrize(
    ("document", "target"),
    in_documents(lambda text: [m[1] for line in code_lines(text) if (m := re.match(r"make ([a-z]+)", line))]),
)
def test_a_make_target_exists(document: str, target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), document


def named_settings(text: str) -> list[str]:
    """Return every `section.key` in inline code that begins with a section of the settings."""
    return sorted(
        {
            span
            for span in _SPAN.findall(prose(text))
            if _SETTING.fullmatch(span) and span.split(".")[0] in Settings.model_fields
        }
    )


@pytest.mark.parametrize(("document", "key"), in_documents(named_settings))
def test_a_setting_exists(document: str, key: str) -> None:
    known = [name for name, _, _ in describe_settings()]
    wanted = key.removesuffix(".*")
    # A section, or what is inside a mapping, such as streams.fields.impressions, counts too.
    assert any(name == wanted or name.startswith(f"{wanted}.") for name in known), document


@pytest.mark.parametrize(("document", "variable"), in_documents(lambda text: sorted(set(_VARIABLE.findall(text)))))
def test_a_variable_is_a_setting(document: str, variable: str) -> None:
    key = variable.removeprefix("OSMF_").lower().replace("__", ".")
    assert key in {name for name, _, _ in describe_settings()}, document


@pytest.mark.parametrize(
    ("document", "number"),
    [(name, number) for name, text in TEXTS.items() for number in range(len(blocks(text, "toml")))],
)
def test_an_example_of_settings_is_accepted(
    document: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # no osmf.toml there
    example = tomllib.loads(blocks(TEXTS[document], "toml")[number])
    try:
        load_settings(**example)
    except SettingsRefusedError as error:
        pytest.fail(f"{document}: {error}")


@pytest.mark.parametrize(("document", "target"), in_documents(lambda text: sorted(set(_LINK.findall(prose(text))))))
def test_a_link_leads_somewhere(document: str, target: str) -> None:
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    there = (ROOT / document).parent / path if path else ROOT / document
    assert there.exists(), document
    if anchor:
        assert anchor in slugs(there.read_text()), document
