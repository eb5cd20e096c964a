"""The house stays small: lines are counted, and functions too long to read are named."""

import ast
import re
from pathlib import Path

from test_rooms import FILES, OURS, ROOT, reachable

LONGEST_FILE, LONGEST_FUNCTION = 520, 60
# The paper's road: the top level, and what of `poses/` following JSON poses imports.
BESIDE_THE_ROAD = ("evaluate.py", "edit.py")
# The whole house may grow by what is new, but not by saying things twice.
ROAD, HOUSE = 3900, 15_250


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_the_road_and_the_house_keep_their_budgets(capsys):
    followed = {
        OURS[name] for name in reachable("sample") | reachable("train") if name.startswith("poses.")
    }
    road = {file for file in FILES if file.parent == ROOT and file.name not in BESIDE_THE_ROAD} | followed
    with capsys.disabled():
        print()
        for file in sorted(FILES, key=lambda file: (file not in road, file)):
            print(f"{lines(file):6} {'road' if file in road else '':5} {file.relative_to(ROOT)}")
        print(f"{sum(map(lines, road)):6} on the road, {sum(map(lines, FILES))} in the house")
    assert sum(map(lines, road)) <= ROAD
    assert sum(map(lines, FILES)) <= HOUSE


def test_only_one_file_is_long():
    assert len([file for file in FILES if lines(file) > LONGEST_FILE]) <= 1


def test_functions_fit_on_a_screen():
    long = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
        and not node.name.endswith("arguments")
    ]
    assert not long


def test_the_readme_tells_how_long_the_files_are():
    table = re.findall(r"^\| (`[^|]*`) \|[^|]*\| ([\d, ]+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert table
    told = {name: int(count.replace(",", "")) for names, count in table for name in [names]}
    for names, count in told.items():
        paths = [ROOT / name.strip("` ") for name in names.split(", ")]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
        assert abs(sum(map(lines, files)) - count) <= 0.1 * count, (
            f"{names}: {sum(map(lines, files))} lines"
        )
