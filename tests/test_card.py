"""The measurement of a GPU, rehearsed on the CPU in tiny sizes."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import card, equal
from bench.measure import TINY
from bench.report import Rows, describe

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def run(out: Path, *options: str) -> None:
    card.main(card.parse_arguments(["--device", "cpu", "--tiny", "--out", str(out), *options]))


def stored(out: Path) -> dict[str, dict]:
    (section,) = json.loads(out.with_suffix(".json").read_text()).values()
    return section["rows"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> SimpleNamespace:
    """A run that stops after its first row, and one that goes on to the end."""
    out = tmp_path_factory.mktemp("card") / "CARDS.md"
    run(out, "--minutes", "0")
    stopped = SimpleNamespace(rows=stored(out), text=out.read_text())
    logging.disable(logging.DEBUG)  # torch.compile logs more than it does where somebody listens
    run(out)
    logging.disable(logging.NOTSET)
    return SimpleNamespace(out=out, stopped=stopped, rows=stored(out), text=out.read_text())


@pytest.fixture
def copied(rehearsal, tmp_path) -> Path:
    """The finished run's files, to be changed."""
    shutil.copytree(rehearsal.out.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "CARDS.md"


def forget(out: Path, key: str) -> None:
    """As if a row had not been measured."""
    file = out.with_suffix(".json")
    sections = json.loads(file.read_text())
    for section in sections.values():
        del section["rows"][key]
    file.write_text(json.dumps(sections))


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of every table, by its heading."""
    found = {}
    for part in text.split("\n### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        found[part.partition("\n")[0]] = [
            [cell.strip() for cell in line[1:-1].split("|")] for line in lines
        ]
    return found


def test_every_part_has_its_table_and_every_cell_is_a_number_or_says_why_not(rehearsal):
    found = tables(rehearsal.text)
    assert [heading[0] for heading in found] == list("abbcdef")
    for heading, (columns, _, *rows) in found.items():
        assert rows, heading
        for name, *cells in rows:
            assert len(cells) == len(columns) - 1
            if name == "ControlVideo":
                assert cells == ["not installed", "–", "–"]
                continue
            for column, cell in zip(columns[1:], cells):
                if column in ("allocated, GB", "taken, GB"):
                    assert cell == "–"  # of a GPU
                elif column != "precision":
                    assert float(cell) >= 0, (heading, name, column)


def test_a_rehearsal_says_that_it_is_no_gpu_s(rehearsal):
    assert "no figure here is a GPU's" in rehearsal.text
    assert "GPU" not in rehearsal.text.partition("\n## ")[2].partition("\n")[0]


def test_on_the_cpu_the_differences_are_those_of_precision_and_of_slices(rehearsal):
    for check in equal.CHECKS:
        row = rehearsal.rows[f"a {check}"]
        assert row["float32"] < 1e-5, check
        assert 1e-5 < row["float16"] < 2e-2, check


def test_when_time_is_up_a_run_stops_after_a_row_and_the_same_command_goes_on(rehearsal):
    (first,) = rehearsal.stopped.rows
    assert rehearsal.stopped.text.count("not measured yet") == len(rehearsal.rows)
    assert rehearsal.rows[first] == rehearsal.stopped.rows[first]
    assert "not measured yet" not in rehearsal.text


def test_a_second_run_measures_nothing_again(rehearsal, copied, monkeypatch):
    def measure(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr("bench.measure.seconds", measure)
    monkeypatch.setattr(equal, "difference", measure)
    monkeypatch.setattr("bench.measure.run", measure)
    run(copied)
    assert copied.read_text() == rehearsal.text


def test_a_row_that_does_not_fit_says_so_beside_its_prediction(copied, monkeypatch):
    def once(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    forget(copied, "c a step, AdamW included")
    forget(copied, "e matrix product")
    monkeypatch.setattr("bench.measure.seconds", once)
    run(copied)
    row = stored(copied)["c a step, AdamW included"]
    assert row["reason"] == "does not fit" and row["predicted, GB"] > 0
    assert stored(copied)["e matrix product"] == {"reason": "does not fit"}


def test_an_error_that_is_no_lack_of_memory_is_not_hidden(copied, monkeypatch):
    def once(*args):
        raise RuntimeError("illegal memory access")

    forget(copied, "e matrix product")
    monkeypatch.setattr("bench.measure.seconds", once)
    with pytest.raises(RuntimeError, match="illegal"):
        run(copied)
    assert "e matrix product" not in stored(copied)


def test_where_compilation_fails_the_row_has_the_reason_in_one_line(copied, monkeypatch):
    def compile(*args, **kwargs):
        raise NotImplementedError("no compiler | here\nand more")

    (key,) = (key for key in stored(copied) if key[0] == "f")
    forget(copied, key)
    monkeypatch.setattr(torch, "compile", compile)
    run(copied)
    assert stored(copied)[key] == {"reason": "NotImplementedError: no compiler / here"}


def test_other_code_that_fails_is_a_row_too(copied, tmp_path):
    run(copied, "--parts", "d", "--controlvideo", str(tmp_path))  # a folder without that code
    assert "| ControlVideo | not installed |" in copied.read_text()


def test_the_sections_of_other_cards_stay_and_its_own_is_replaced(copied):
    before = copied.read_text()
    head, section = before.split("## CPU", 1)
    copied.write_text(f"{head}## Card A\n\nfast\n\n## CPU{section}\n## Card B\n\nslow\n")
    run(copied)
    text = copied.read_text()
    assert [text.count(f"\n## {name}") for name in ("Card A", "CPU", "Card B")] == [1, 1, 1]
    assert text.index("fast") < text.index("## CPU") < text.index("slow")
    run(copied)
    assert copied.read_text() == text


def test_rows_of_another_driver_or_commit_are_measured_again(copied):
    about = describe(CPU, tiny=True)
    assert Rows(copied, about).known
    assert not Rows(copied, about | {"driver": "of tomorrow"}).known


def test_a_result_that_is_no_number_is_no_small_difference(monkeypatch):
    def compute(model, way) -> list[Tensor]:
        exact = model.unet.conv_in.weight.dtype == torch.float32
        return [torch.ones(2), torch.tensor([1.0, 2.0 if exact else float("nan")])]

    monkeypatch.setitem(equal.CHECKS, "broken", (compute, equal.WHOLE))
    assert equal.difference("broken", CPU, torch.float32, TINY.small) == 0
    assert not equal.difference("broken", CPU, torch.float16, TINY.small) < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--device cpu", "give --tiny too"),
        ("--device cpu --tiny --parts ag", "there is no part g"),
        ("--device cpu --tiny --out nowhere/CARDS.md", "there is no folder nowhere"),
        ("--device cpu --tiny --controlvideo nowhere", "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(options, words, capsys):
    with pytest.raises(SystemExit):
        card.parse_arguments(options.split())
    assert words in capsys.readouterr().err


def test_without_a_gpu_the_rehearsal_is_pointed_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        card.parse_arguments([])
    assert "finds no GPU; to rehearse without one" in capsys.readouterr().err
