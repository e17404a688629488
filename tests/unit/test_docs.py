"""The documentation is true: its commands parse, its specs are specs, its links and its files exist."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml

from hypersd_bench.cli.main import program
from hypersd_bench.runner.spec import RunSpec
from tests.documented import BLOCK, PAGES, blocks, commands
from user_study.wording import load_wording


@pytest.mark.parametrize("words", [pytest.param(words, id=said) for said, words in commands()])
def test_every_command_parses(words: list[str]) -> None:
    """Verbs, options and the values of choices are known; nothing runs, and files need not be there."""
    context = click.Context(program)
    command: click.Command = program
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, f"no verb {name}"
        command, context = found, click.Context(found, info_name=name, parent=context)
    parser = command.make_parser(context)
    given, arguments, _ = parser.parse_args(list(words))
    assert not arguments, "more arguments than the verb takes"
    for parameter in command.params:
        if parameter.name in given and isinstance(parameter.type, click.Choice):
            parameter.type_cast_value(context, given[parameter.name])


def test_there_are_commands_to_parse() -> None:
    assert len(list(commands())) > 50


@pytest.mark.parametrize(("page", "text"), [pytest.param(p, t, id=p.name) for p, t in blocks("yaml")])
def test_every_yaml_block_is_a_spec_or_a_wording(page: Path, text: str, tmp_path: Path) -> None:
    written = yaml.safe_load(text)
    if set(written) <= {"en", "zh"}:
        (tmp_path / "words.yaml").write_text(text)
        assert load_wording(tmp_path / "words.yaml", ("overall",))
        return
    spec = {"base": "pocket", "steps": [4], "prompts": "pocket/held-out", "models": ["lcm"], **written}
    assert RunSpec.model_validate(spec).models


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<img src=\"([^\"]+)\"", text)
    for link in (one or other for one, other in links):
        if not re.match(r"https?:|mailto:", link):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
