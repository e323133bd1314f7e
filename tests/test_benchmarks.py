"""The result file that the scripts in benchmarks/ write."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def result(tmp_path):
    spec = importlib.util.spec_from_file_location("result", FOLDER / "result.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Result(tmp_path / "out.json", "cpu", model="a model")


def test_what_was_measured_before_a_failure_is_kept_and_the_script_goes_on(result, capsys):
    for number in range(3):
        with result.attempt(f"part {number}"):
            result.add("runs", {"number": number, "all": list(range(20))})
            assert json.loads(result.out.read_text())["runs"][-1]["number"] == number
            if number == 1:
                raise ValueError("no memory\nmore")
    with pytest.raises(SystemExit) as end:
        result.finish("runs")
    assert end.value.code == 1
    data = json.loads(result.out.read_text())
    assert [row["number"] for row in data["runs"]] == [0, 1, 2]
    assert data["failed"] == [{"what": "part 1", "error": "ValueError: no memory"}]
    assert data["model"] == "a model" and {"command", "started_utc", "device", "versions"} <= data.keys()
    assert "number\n0     \n1     \n2     \n" in capsys.readouterr().out  # a column a name; long lists are in the file


def test_a_table_shows_medians_and_leaves_gaps(result):
    rows = [{"a": 1, "t": {"median": 2.0, "all": [1.0, 2.0, 3.0]}}, {"a": None, "b": [12, 13], "c": {"x": 1}}]
    table = type(result).finish.__globals__["table"](rows)
    assert table.splitlines() == ["a | t | b    ", "1 | 2 |      ", "  |   | 12 13"]
