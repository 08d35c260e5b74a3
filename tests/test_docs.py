"""What the documents say exists: files, recipes, models, options."""

import re
from pathlib import Path

import pytest
import timm

from asl.config import read_recipe
from asl.evaluation.settings import ExportConfig, InferConfig, ValidateConfig
from asl.studies.plan import StudyConfig
from asl.training.run import MAY_CHANGE
from asl.training.settings import TrainConfig

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [
    file
    for pattern in ("*.md", "bench/*.md", "docs/*.md", "docs/*/*.md", "zoo/*.md", "pics/*/*.md")
    for file in sorted(REPOSITORY.glob(pattern))
]
RECIPES = sorted(REPOSITORY.glob("configs/*.yaml"))
SCRIPTS = {
    "train": TrainConfig,
    "validate": ValidateConfig,
    "infer": InferConfig,
    "export": ExportConfig,
    "study": StudyConfig,
}
LINE_LENGTH = 120


def name_of(path):
    return str(path.relative_to(REPOSITORY))


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=name_of)


def anchors(path):
    """The addresses that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(link, document):
    """Whether a local link from a document has a target; what is on the web is not looked at."""
    file, _, anchor = link.partition("#")
    target = document.parent / file if file else document
    is_local = not re.match(r"[a-z]+:", link)
    return not is_local or (target.exists() and (not anchor or anchor in anchors(target)))


def options_of(*scripts):
    """All spellings of the options that these scripts take."""
    words = [each for name in scripts for each in SCRIPTS[name].options().values()]
    return {"--help", "-h", *(word for each in words for word in each)}


def options_in(text):
    return {option.replace("_", "-") for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)}


def commands_in(text):
    """(script, arguments) of every call of a script, in blocks of code and between backticks."""
    text = text.replace("\\\n", " ")
    return re.findall(
        r"python (?!bench/)(?:\S*/)?(train|validate|infer|export|study)\.py([^`\n|;&]*)", text
    )


@every_document
def test_every_local_link_leads_somewhere(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    links += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    links += re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    assert [link for link in links if not leads_somewhere(link, path)] == []


@every_document
def test_every_reference_link_is_defined_and_used(path):
    text = path.read_text()
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
    used = set(re.findall(r"\]\[([^\]]+)\]", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)))
    assert defined == used


@every_document
def test_every_option_exists(path):
    names = r"\b(pip|git|srun|torchrun|python (-m|bench/|studies/|tests/))|#SBATCH"
    others = rf"({names})[^`\n]*?(?=train\.py|`|\n)"
    mentioned = options_in(re.sub(others, "", path.read_text()))
    assert {option for option in mentioned if option[:2] == "--"} - options_of(*SCRIPTS) == set()


@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES], ids=name_of)
def test_every_command_has_options_of_its_script_and_a_recipe_that_exists(path):
    text = re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE)
    for script, arguments in commands_in(text):
        assert options_in(arguments) <= options_of(script), f"{script}.py {arguments}"
        for recipe in re.findall(r"--config (\S+)", arguments):
            assert (REPOSITORY / recipe).is_file(), recipe


@every_document
def test_nothing_is_left_to_be_filled_in(path):
    assert re.findall(r"@[A-Z_]+@|to be filled|TODO|FIXME", path.read_text()) == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *RECIPES], ids=name_of)
def test_lines_are_short(path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        unbreakable = re.match(r" *\||\[[^]]+\]: ", line)  # tables and the targets of links
        assert len(line) <= LINE_LENGTH or unbreakable, f"line {number}"


def test_the_model_zoo_lists_the_recipes_that_exist():
    listed = re.findall(r"\(configs/(\w+\.yaml)\)", (REPOSITORY / "MODEL_ZOO.md").read_text())
    assert sorted(listed) == [path.name for path in RECIPES]


@every_recipe
def test_every_recipe_is_valid_and_its_model_exists(path):
    name = TrainConfig.of(**read_recipe(path, TrainConfig)).model.model_name
    assert timm.is_model(name)
    assert "." not in name or name in timm.list_pretrained(name)


@every_recipe
def test_every_recipe_says_how_to_run_it_and_what_to_expect(path):
    text = path.read_text()
    header = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]
    assert f"--config {name_of(path)}" in header
    assert re.search(r"# python train\.py ", header)
    assert re.search(r"\b[Ee]xpect", header)
    assert len(text.splitlines()) <= 25


def test_the_settings_in_which_a_resumed_run_may_differ_are_listed():
    text = (REPOSITORY / "docs/reliability.md").read_text()
    [listed] = re.findall(r"except for what may change: (.*?)\. ", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == [*MAY_CHANGE]
