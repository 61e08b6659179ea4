"""Documents and --help say what is there: commands that the scripts take, options, config keys, functions, files."""

import argparse
import ast
import base64
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from voxtral import config
from voxtral.data import read_config

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "benchmarks", "research", "serving")
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/*.md"))]
# Named with the commit that has them, or, the last, in the folder of a run.
GONE = {"benchmarks/checkpoint_size.py", "benchmarks/full_pipeline.py", "research/model_in_the_loop.py", "config.yaml"}
SCHEMAS = {"train_full_pipeline": config.FullPipelineConfig}
SCHEMAS |= dict.fromkeys(("train_encoder", "demo", "train_step", "concurrent_graphs"), config.EncoderConfig)
SCHEMAS |= dict.fromkeys(("make_standin", "withheld_encoder", "code_limits"), config.StandinConfig)
KEYS = {key for schema in SCHEMAS.values() for key, _ in config._all_keys(schema)}
BLOCKS = {key.partition(".")[0] for key in KEYS}
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:\S*/)?(?:python|torchrun (?:--\S+ \S+ )*)\s*(?:-m )?(\S+\.py|voxtral\.\w+) (.+)")


def code_of(document: Path) -> tuple[list[str], list[str]]:
    """-> lines of its bash blocks, spans of code between backticks"""
    text = document.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return lines_of(blocks), [" ".join(span.split()) for span in spans]


def lines_of(texts: list[str]) -> list[str]:
    """A line that ends with a backslash goes on in the next."""
    return [line.strip() for text in texts for line in re.sub(r"\\\n\s*", "", text).splitlines()]


def examples_of(script: Path) -> list[str]:
    """Lines of its docstrings and examples."""
    nodes = ast.walk(ast.parse(script.read_text()))
    return lines_of([node.value for node in nodes if isinstance(getattr(node, "value", None), str)])


SPANS = [(document.relative_to(ROOT), span) for document in DOCUMENTS for span in code_of(document)[1]]
SHOWN = [(document.relative_to(ROOT), line) for document in DOCUMENTS for line in code_of(document)[0]]
SHOWN += SPANS + [(script.relative_to(ROOT), line) for script in SCRIPTS for line in examples_of(script)]
COMMANDS = {f"{where}: {line}": found.groups() for where, line in SHOWN if (found := COMMAND.match(line))}
MENTIONED = {f"{where}: {span}": span.split() for where, span in SPANS if re.match(r"\w+\.py .*--", span)}


class Parses(Exception):
    """A parser, and the words that it is to read."""


@pytest.fixture
def parser_of(monkeypatch):
    """parser_of(script) -> its own parser, the name of the method that reads its command line"""
    for name in ("parse_args", "parse_intermixed_args"):

        def parses(parser, words=None, read=getattr(argparse.ArgumentParser, name)):
            raise Parses(parser, lambda words: read(parser, words))

        monkeypatch.setattr(argparse.ArgumentParser, name, parses)
    monkeypatch.chdir(ROOT)
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(ROOT / folder)

    def parser_of(module: str):
        with pytest.raises(Parses) as caught:
            importlib.import_module(module).main()
        return caught.value.args

    return parser_of


@pytest.mark.parametrize("shown", COMMANDS)
def test_a_command_is_one_that_its_script_takes(parser_of, shown):
    script, arguments = COMMANDS[shown]
    module = Path(script).stem if script.endswith(".py") else script
    words = [word for word in shlex.split(arguments.partition(" | ")[0], comments=True) if word.strip(".…")]
    options = vars(parser_of(module)[1](words))
    changes = [*options.get("overrides", []), *(options.get("compare") or [])]
    yaml = str(options.get("config") or options.get("data") or options.get("check") or "configs/demo.yaml")
    if module in SCHEMAS:
        config.load_config(SCHEMAS[module], yaml, [change for change in changes if change != "key=value"])
    elif yaml.endswith(".yaml"):
        read_config(yaml, changes)


@pytest.mark.parametrize("shown", MENTIONED)
def test_an_option_that_is_mentioned_is_there(parser_of, shown):
    script, *words = MENTIONED[shown]
    known = parser_of(Path(script).stem)[0]._option_string_actions
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= set(known)


@pytest.mark.parametrize("document", sorted({where for where, _ in SPANS}), ids=str)
def test_keys_functions_and_files_that_are_mentioned_are_there(document):
    for span in (span.partition("=")[0] for where, span in SPANS if where == document):
        if re.fullmatch(r"[\w./]+\.(py|sh|yaml|ipynb)", span):
            assert span in GONE or list(ROOT.glob(f"**/{span}"))
        elif not span.endswith(".csv") and (dotted := re.match(r"([a-z_]+)\.[\w.]+", span)):
            module, key = ROOT / "voxtral" / f"{dotted[1]}.py", re.sub(r"\.\d+", "[]", dotted[0])
            if module.is_file() or dotted[1] in BLOCKS:
                last = rf"\b{key.rpartition('.')[2]}\b"
                assert key in KEYS or module.is_file() and re.search(last, module.read_text()), span


def test_requests_of_the_readme_are_json(tmp_path):
    """The heredoc's Python writes the request, as the server reads it; what follows -d is one, too."""
    text = (ROOT / "README.md").read_text()
    (program,), (named,) = re.findall(r"<<'PY'[^\n]*\n(.*?)^PY$", text, re.M | re.S), re.findall(r"-d '(.*?)'", text)
    (tmp_path / "anna.wav").write_bytes(b"RIFF\xff")
    request = json.loads(subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path))
    kind, _, content = request.pop("ref_audio").partition(";base64,")
    assert kind == "data:audio/wav" and base64.b64decode(content) == b"RIFF\xff"
    assert request | {"voice": "anna"} == json.loads(named)
