"""The documents say what is so."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import table
from gateway.relay import exchange
from gateway.relay.buffered_call import BufferedCall
from gateway.wire.routes import REFUSED, ROUTES
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
EXAMPLES = (ROOT / "examples" / "README.md").read_text()
LOCKED = [
    *(
        *ROOT.glob("requirements/*"),
        *ROOT.glob("gateway/modelserver/locks/*.lock"),
        *ROOT.glob("tests/heavy/clients/schemathesis.*"),
    ),
    *ROOT.glob("tests/heavy/browser/browser.*"),
    *ROOT.glob("tests/heavy/kubernetes/schemas.in"),
    *ROOT.glob("tests/heavy/kubernetes/schemas.lock"),
    *(*ROOT.glob("bench/requirements/*"), *ROOT.glob("examples/requirements.*")),
]


def test_the_tables_of_settings_are_made_from_the_settings() -> None:
    made = []
    for names, default, meaning in [*table(), *table(ModelServerSettings)]:
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        made.append(f"| {shown} | {f'`{default}`' if default else ''} | {meaning} |")
    written = [line for line in SETTINGS.splitlines() if line.startswith("| `")]
    # Which section a setting belongs to is for a person to say; each stands in one, as it is.
    missing = "\n".join(row for row in made if row not in written)
    assert not missing, f"put this into docs/settings.md:\n{missing}"
    assert sorted(written) == sorted(made)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_links_lead_somewhere() -> None:
    for file in [ROOT / "README.md", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
            to = file.parent / target if target else file
            assert to.exists(), f"{file.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", to.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
                assert heading in anchors, f"{file.name}: {target}#{heading}"


def test_the_tables_of_paths_are_made_from_the_list_of_routes() -> None:
    rows = ["| Call | What | `GATEWAY_ROUTES` |", "|---|---|---|"]
    rows += [f"| `{route.method} {route.path}` | {route.about} | {route.name} |" for route in ROUTES]
    reasons: dict[str, list[str]] = {}
    for path, why in REFUSED.items():
        reasons.setdefault(why, []).append(f"`{path}`")
    refused = ["| Not relayed | Why |", "|---|---|"]
    refused += [f"| {', '.join(paths)} | {why} |" for why, paths in reasons.items()]
    for made in ("\n".join(rows), "\n".join(refused)):
        assert made in API, f"put this into docs/api.md:\n{made}"


def test_every_route_has_an_example() -> None:
    for route in ROUTES:
        path = re.escape(route.path).replace(re.escape("{response_id}"), "[^/ ]+")
        assert re.search(rf"curl [^\n]*http://localhost:9000{path}( |$)", API, re.MULTILINE), route.path


def test_every_example_is_in_their_table_and_says_the_same_of_what_it_needs() -> None:
    rows = dict(re.findall(r"^\| \[(\S+)\]\(\1\) \| [^|]+ \| ([^|]+) \|$", EXAMPLES, re.MULTILINE))
    files = {file.name: file.read_text() for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".sh")}
    assert rows.keys() == files.keys()
    for name, needs in rows.items():
        for install in re.findall(r"`(pip install [^`]+)`", needs):
            assert install in files[name], name
        assert f"examples/{name}" in files[name]


def test_every_promise_names_a_test_that_there_is() -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    documents = [(ROOT / name).read_text() for name in ("docs/reliability.md", "SECURITY.md")]
    reliability, security = (re.findall(r"`(test_\w+)`", document) for document in documents)
    assert len(reliability) > 30
    assert len(security) > 8
    promised = reliability + security
    assert [name for name in promised if f"def {name}(" not in tests] == []


def test_no_secret_is_committed_or_sent_to_a_build_from_where_a_document_puts_it(tmp_path: Path) -> None:
    texts = [file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*/.env"))]
    devices = sorted(folder.name for folder in (ROOT / "docker").iterdir() if folder.is_dir())
    told = {name for text in texts for name in re.findall(r"_FILE=\./(\S+)", text)}
    written = {path for text in texts for path in re.findall(r">>? ?(docker/\S+)", text)}
    paths = sorted(written | {f"docker/{device}/{name}" for device in devices for name in told})

    assert len(paths) > len(devices)
    assert "docker/cpu/files/keys" in written
    # A repository of its own: the source distribution has none, and another user's checkout is as good.
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for ignored in (".gitignore", *(str(file.relative_to(ROOT)) for file in ROOT.glob("docker/*/files/.gitignore"))):
        (tmp_path / ignored).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / ignored, tmp_path / ignored)
    for path in paths:
        command = ["git", "check-ignore", "--quiet", "--no-index", path]
        assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0, f"{path} is not in .gitignore"
    everything, *taken = (ROOT / ".dockerignore").read_text().split()
    folders = {line.removeprefix("!").partition("/")[0] for line in taken if line.startswith("!")}
    assert everything == "*"
    assert "docker" not in folders


def test_the_drawing_of_the_house_has_every_room_and_no_other() -> None:
    (drawing,) = re.findall(r"^gateway/\n((?:  .*\n)+)```", ARCHITECTURE, re.MULTILINE)
    drawn = re.findall(r"^  (\S+)  ", drawing, re.MULTILINE)
    rooms = [f"{path.name}/" for path in (ROOT / "gateway").iterdir() if path.is_dir() and path.name[0] != "_"]
    files = [path.name for path in (ROOT / "gateway").glob("*.py") if path.name != "__init__.py"]
    assert sorted(drawn) == sorted(rooms + files)


def test_no_room_has_more_than_a_dozen_files_and_no_file_is_long() -> None:
    folders = [path for path in (ROOT / "gateway").rglob("*") if path.is_dir()]
    assert [folder for folder in folders if len(list(folder.glob("*.py"))) > 12] == []
    files = (ROOT / "gateway").rglob("*.py")
    assert [file for file in files if len(file.read_text().splitlines()) > 800] == []


def test_the_table_of_states_has_those_of_the_exchange() -> None:
    numbers = {name: value for name, value in vars(exchange).items() if name[0].isupper() and type(value) is int}
    states = [name for name, value in numbers.items() if value <= exchange.ENDED]
    table = ARCHITECTURE.partition("## The exchange's states")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert [*rows, "ENDED"] == states
    for event in re.findall(r"`(\w+)`", table):
        assert event.isupper() or event == "relay" or hasattr(BufferedCall, event), event


def test_no_file_names_a_package_registry() -> None:
    for file in [*LOCKED, ROOT / "pyproject.toml", ROOT / "Makefile"]:
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", file.read_text()), file


def test_every_locked_package_has_a_hash() -> None:
    for file in [file for file in LOCKED if file.suffix == ".lock"]:
        for entry in re.split(r"\n(?=[a-z0-9])", file.read_text()):
            if "==" in entry.partition("\n")[0]:
                assert "--hash=sha256:" in entry, f"{file.name}: {entry[:80]}"


def test_every_target_that_ci_makes_is_one() -> None:
    targets = re.findall(r"^(?:\w+=\w+ )*make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert len(targets) > 7
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert (done.stderr, "Nothing to be done" in done.stdout) == ("", False), target
