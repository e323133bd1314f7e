"""Reports of results files. The records are made up here, so that every expected number can be worked out by hand."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.lines import Line2D
from rich.console import Console

from pyramidkv import ConfigError, DataError
from pyramidkv.evaluate.schema import (
    Change,
    Compression,
    Layers,
    Perplexity,
    Recall,
    Record,
    Run,
    Skipped,
    Speed,
    Spread,
    append,
    to_json,
)
from pyramidkv.methods import METHODS
from pyramidkv.report import (
    Cell,
    Results,
    Table,
    engines_table,
    headline,
    methods_table,
    plot,
    summary_table,
    workload_tables,
    write,
)
from pyramidkv.report import text as numbers
from pyramidkv.report.methods import layers_label
from pyramidkv.report.panels import alike
from pyramidkv.report.series import colour_of, series_of
from pyramidkv.report.style import looks
from pyramidkv.report.summary import faster_cell
from pyramidkv.report.text import faster

FULL = Compression("full", "nothing evicted", 1.0, 2_000_000_000, 2_000_000_000)
KEPT = Compression("pyramidkv", "keep=0.25 window=32 beta=20", 0.25, 500_000_000, 2_000_000_000)
HOSTILE = "<b>wiki</b>|`x` $\\frac$"


def run(**changes: object) -> Run:
    defaults = Run(
        command="pyramidkv bench --keep 0.25",
        started_utc="2026-01-02T03:04:05Z",
        device="a device",
        versions={"python": "3.11", "torch": "2.9"},
        model="a-model",
        model_parameters=1_234_567,
        weights_random=False,
        dtype="float16",
        settings={"method": "pyramidkv", "keep": 0.25},
    )
    return dataclasses.replace(defaults, **changes)  # type: ignore[arg-type]


def perplexity(compression: Compression, nll: tuple[float, ...], corpus: str = "wiki") -> Perplexity:
    return Perplexity("a-model", corpus, "c0ffee", 1536, 512, compression, nll)


def speed(compression: Compression, engine: str, ttft: float, tpot: float, peak: int | None, batch: int = 1) -> Speed:
    """Three repeats: the median, 4% less and 8% more."""
    return Speed(
        model="a-model",
        weights_random=False,
        engine=engine,
        batch=batch,
        prompt_tokens=6144,
        new_tokens=128,
        compression=compression,
        ttft_seconds=Spread((ttft * 1.08, ttft, ttft * 0.96)),
        tpot_seconds=Spread((tpot, tpot * 0.96, tpot * 1.08)),
        max_memory_bytes=peak,
        weights_bytes=5_000_000_000,
        tpot_floor_seconds=0.0025,
    )


def recall(compression: Compression, task: str, correct: int) -> Recall:
    return Recall("a-model", task, 1536, False, compression, (correct,), (100,))


def layers() -> Layers:
    """Two layers of two KV heads: layer 0 keeps the even positions of 64, layer 1 the last four in one head only."""
    even = tuple(range(0, 64, 2))
    return Layers("a-model", "pyramidkv", 64, (32, 4), (4096, 512), ((even, even), ((60, 61, 62, 63), ())))


FULL_NLL = (3.0, 3.2, 2.8, 3.0)
KEPT_NLL = (3.1, 3.3, 2.86, 3.14)  # 0.10, 0.10, 0.06 and 0.14 more: 0.10 on average


def default_records() -> list[Record]:
    """What the default run writes: one method at one setting, two corpora, a task, two baseline engines."""
    return [
        run(),
        perplexity(FULL, FULL_NLL),
        perplexity(KEPT, KEPT_NLL),
        perplexity(FULL, FULL_NLL, "books"),
        perplexity(KEPT, FULL_NLL, "books"),
        recall(FULL, "needle", 99),
        recall(KEPT, "needle", 97),
        speed(FULL, "DynamicCache", 0.090, 0.075, 8_000_000_000),
        speed(FULL, "StaticCache", 0.100, 0.005, 9_000_000_000),
        speed(KEPT, "pyramidkv", 0.108, 0.0025, 6_400_000_000),
        layers(),
    ]


def many_records() -> list[Record]:
    """Three methods at three budgets on two corpora and three tasks."""
    records: list[Record] = [run()]
    variants = [
        Compression(method, f"keep={keep} window=32", keep, int(keep * 2e9), 2_000_000_000)
        for method in ("pyramidkv", "snapkv", "random")
        for keep in (0.5, 0.25, 0.125)
    ]
    for corpus in ("wiki", "books"):
        records.append(perplexity(FULL, FULL_NLL, corpus))
        for index, variant in enumerate(variants):
            worse = (0.02 + index**3 / 100) / variant.keep
            records.append(perplexity(variant, tuple(nll + worse for nll in FULL_NLL), corpus))
    for task in ("needle", "several", "chain"):
        records.append(recall(FULL, task, 100))
        records += [recall(variant, task, 90 - index) for index, variant in enumerate(variants)]
    return records


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return save(tmp_path / "results.jsonl", default_records())


def save(path: Path, records: list[Record]) -> Path:
    for record in records:
        append(path, record)
    return path


def rows_of(table: Table) -> dict[str, tuple[Cell, ...]]:
    return {row[0].value: row[1:] for row in table.rows}


def summary(records: list[Record]) -> dict[str, tuple[Cell, ...]]:
    return rows_of(summary_table(Results.from_records(records)))


# The report's own table


def test_rows_and_columns_are_the_reports() -> None:
    table = summary_table(Results.from_records(default_records()))
    assert table.columns == ("Metric", "Baseline", "PyramidKV", "Improvement")
    assert [row[0].value for row in table.rows] == [
        "wiki PPL",
        "books PPL",
        "KV cache memory",
        "Max memory",
        "TPOT",
        "Throughput",
        "TTFT",
    ]
    assert all(cell.value for row in table.rows for cell in row)


def test_perplexity_row_by_hand() -> None:
    baseline, method, change = summary(default_records())["wiki PPL"]
    assert (baseline.value, method.value) == ("20.09", "22.20")  # e^3.0 and e^3.1
    # Differences 0.10, 0.10, 0.06, 0.14: variance 0.0032 / 3, standard error 0.01633, t(3) = 3.182, half width 0.05196.
    # e^0.1 - 1 = 10.52%, e^0.04804 - 1 = 4.92%, e^0.15196 - 1 = 16.41%
    assert (change.value, change.tone) == ("+10.5% [+4.9, +16.4]", "worse")


def test_equal_perplexity_is_no_difference() -> None:
    change = summary(default_records())["books PPL"][2]
    assert (change.value, change.detail, change.tone) == ("+0.00% [+0.00, +0.00]", "no difference found", "")


def test_memory_rows_by_hand() -> None:
    rows = summary(default_records())
    assert [c.value for c in rows["KV cache memory"]] == ["2.00 GB", "0.500 GB", "-75.0%"]
    assert rows["KV cache memory"][1].detail == "25.0% of full"
    # The baseline with the smallest peak is DynamicCache: 8.0 GB, 3.0 GB of it not weights.
    assert [c.value for c in rows["Max memory"]] == ["8.00 GB", "6.40 GB", "-20.0%"]
    assert rows["Max memory"][0].detail == "3.00 GB besides weights; DynamicCache"


def test_time_rows_take_the_best_baseline_of_each_metric() -> None:
    rows = summary(default_records())
    baseline, method, change = rows["TPOT"]
    assert (baseline.value, baseline.detail) == ("5.00 ms", "4.80-5.40; 2.0x its floor of 2.50 ms; StaticCache")
    assert (method.value, method.detail) == ("2.50 ms", "2.40-2.70; 1.0x its floor of 2.50 ms; pyramidkv")
    assert (change.value, change.detail, change.tone) == ("x2.0 faster", "-50.0% time", "better")
    assert [c.value for c in rows["Throughput"]] == ["200 tok/s", "400 tok/s", "+100.0%"]
    assert rows["Throughput"][0].detail == "185-208"  # 1 / 5.4 ms and 1 / 4.8 ms
    assert [c.value for c in rows["TTFT"][:2]] == ["90.0 ms", "108 ms"]
    assert rows["TTFT"][0].detail.endswith("DynamicCache")
    assert rows["TTFT"][2] == Cell("+20.0% (slower)", tone="worse")


def test_a_time_that_is_hardly_shorter_is_no_factor() -> None:
    assert faster_cell(Spread((0.100,)), Spread((0.098,))) == Cell("-2.0% (faster)", "", "better")
    assert faster_cell(Spread((0.100,)), Spread((0.095,))) == Cell("x1.1 faster", "-5.0% time", "better")
    assert faster_cell(Spread((0.100,)), Spread((0.102,))) == Cell("+2.0% (slower)", tone="worse")
    assert [faster(3.0, after) for after in (1.25, 2.99, 3.0, 3.3)] == ["x2.4 faster", "-0.33%", "+0.00%", "+10.0%"]


def test_overlapping_spreads_are_no_difference() -> None:
    records = [*default_records()[:-2], speed(KEPT, "pyramidkv", 0.092, 0.0049, 6_400_000_000)]
    rows = summary(records)
    assert rows["TPOT"][2].detail == "spreads overlap: no difference found"
    assert rows["Throughput"][2].detail == "spreads overlap: no difference found"
    assert rows["TTFT"][2] == Cell("+2.2% (slower)", "spreads overlap: no difference found")
    assert headline(Results.from_records(records)).count("spreads overlap") == 2


def test_more_memory_is_said_to_be_more() -> None:
    records = [*default_records()[:-2], speed(KEPT, "pyramidkv", 0.1, 0.005, 8_800_000_000)]
    assert summary(records)["Max memory"][2] == Cell("+10.0%", "more", "worse")


def test_unreadable_peak_is_said() -> None:
    records = [r for r in default_records() if not isinstance(r, Speed)]
    records += [speed(FULL, "DynamicCache", 0.1, 0.01, None), speed(KEPT, "pyramidkv", 0.1, 0.01, None)]
    cells = summary(records)["Max memory"]
    assert [c.value for c in cells] == ["not measured"] * 3
    assert cells[0].detail == "not readable on this device"


def test_random_weights_without_quality_rows() -> None:
    records: list[Record] = [run(weights_random=True), *default_records()[7:10]]
    rows = summary(records)
    assert [c.value for c in rows["Perplexity"]] == ["not measured"] * 3
    assert rows["Perplexity"][0].detail == "random weights"
    assert "| Perplexity | not measured (random weights) |" in summary_table(Results.from_records(records)).markdown()
    assert headline(Results.from_records(records)).endswith("Quality was not measured: the weights are random.")


def test_skipped_rows_appear_with_their_reason() -> None:
    records: list[Record] = [
        run(),
        *default_records()[1:3],
        Skipped("perplexity on pg19", "not measured: no network"),
        Skipped("speed", "no time left"),
        Skipped("recall of needle", "not measured (no tokenizer)"),
        Skipped("recall of chain", "not measured (no tokenizer)"),
    ]
    rows = summary(records)
    assert rows["wiki PPL"][1].value == "22.20"
    assert rows["pg19 PPL"][0] == Cell("not measured", "no network", "missing")
    for metric in ("Max memory", "TPOT", "Throughput", "TTFT"):
        assert rows[metric][0].detail == "no time left", metric
    assert rows["recall of needle and recall of chain"][0] == Cell("not measured", "no tokenizer", "missing")
    assert rows["KV cache memory"][1].value == "0.500 GB"  # known from the perplexity rows


def test_method_missing_on_one_corpus_leaves_the_baseline() -> None:
    rows = summary([r for r in default_records() if r != default_records()[2]])
    assert rows["wiki PPL"][0].value == "20.09"
    assert [c.value for c in rows["wiki PPL"][1:]] == ["not measured", "not measured"]


def test_one_chunk_has_no_interval() -> None:
    records: list[Record] = [run(), perplexity(FULL, (3.0,)), perplexity(KEPT, (3.1,))]
    change = summary(records)["wiki PPL"][2]
    assert change == Cell("+10.5% [one chunk, no interval]")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "snapkv", "keep": 0.5}, ("snapkv", 0.5)),
        ({"method": ["full", "random", "snapkv"], "keep": [0.125, 0.5]}, ("random", 0.125)),
        ({"method": "full,snapkv", "keep": 0.25}, ("snapkv", 0.25)),
        ({}, ("pyramidkv", 0.5)),
        ({"method": "absent"}, ("pyramidkv", 0.5)),
    ],
)
def test_the_chosen_method_is_the_runs_own(settings: dict[str, object], expected: tuple[str, float]) -> None:
    chosen = Results.from_records([run(settings=settings), *many_records()[1:]]).chosen
    assert chosen is not None
    assert (chosen.method, chosen.keep) == expected


def test_rows_of_other_tokens_are_never_paired() -> None:
    other = dataclasses.replace(perplexity(KEPT, KEPT_NLL), corpus_sha256="decaf")
    rows = summary_table(Results.from_records([run(), perplexity(FULL, FULL_NLL), other])).rows
    assert [row[3].value for row in rows[:2]] == ["not measured", "not measured"]


# The other tables and the words


def test_methods_table_has_every_variant_beside_its_bytes() -> None:
    table = methods_table(Results.from_records(many_records()))
    assert len(table.rows) == 1 + 9
    assert table.columns == ("Method", "KV of full", "wiki PPL", "books PPL", "needle", "several", "chain")
    assert [row[0].value for row in table.rows[:4]] == ["Full cache", "PyramidKV", "SnapKV", "Random"]
    assert table.rows[1][0].detail == "keep=0.5"
    assert table.notes[-1] == "On every line: window=32."
    assert table.rows[1][1] == Cell("50.0%", "1.00 GB")
    assert table.rows[1][2].value == "+4.1%"  # e^(0.02 / 0.5) - 1
    assert table.rows[1][4].value == "90.0%"


def test_a_variant_of_a_later_workload_only_has_its_line() -> None:
    later = [speed(FULL, "DynamicCache", 0.7, 0.08, None, batch=8), speed(KEPT, "pyramidkv", 0.7, 0.02, None, batch=8)]
    results = Results.from_records([run(), speed(FULL, "DynamicCache", 0.1, 0.07, None), *later])
    cells = rows_of(methods_table(results))["PyramidKV"]
    assert [cell.value for cell in cells] == ["25.0%", "not measured", "not measured"]
    assert rows_of(workload_tables(results)[0])["TPOT"][2].value == "x4.0 faster"


def test_engines_table_leaves_nothing_out() -> None:
    rows = rows_of(engines_table(Results.from_records(default_records())))
    assert list(rows) == ["DynamicCache", "StaticCache", "pyramidkv"]
    assert rows["DynamicCache"][5] == Cell("2.50 ms", "TPOT is 30x")


def test_the_floor_says_what_it_was_divided_by() -> None:
    old = default_records()
    new = [dataclasses.replace(r, read_bytes_per_second=2.8e12) if isinstance(r, Speed) else r for r in old]
    none = [dataclasses.replace(r, tpot_floor_seconds=None) if isinstance(r, Speed) else r for r in old]
    notes = [engines_table(Results.from_records(records)).notes for records in (old, new, [*old[:8], *new[8:]], none)]
    start = "Floor: (weight bytes + KV bytes) / "
    by_read = "the rate at which the device read random numbers (2800 GB/s)"
    by_copy = "the rate of a copy of ones, in older records"
    assert [note[0] for note in notes[:3]] == [
        f"{start}{by_copy}.", f"{start}{by_read}.", f"{start}{by_read}, or {by_copy}.",
    ]  # fmt: skip
    assert len(notes[3]) == 1


def test_headline_is_computed() -> None:
    assert headline(Results.from_records(default_records())) == (
        "At 25.0% of the KV memory, PyramidKV changes perplexity by +10.5% [+4.9, +16.4] on wiki and "
        "+0.00% [+0.00, +0.00] on books, answers 97.0% of the needle questions (full cache: 99.0%) and takes "
        "2.50 ms per token (full cache at its best: 5.00 ms; x2.0 faster) and 108 ms to the first token (full cache at "
        "its best: 90.0 ms; +20.0%), at batch 1, prompt 6144 tokens, 128 new tokens."
    )


def test_series_split_where_more_than_the_budget_differs() -> None:
    four = dataclasses.replace(KEPT, setting="keep=0.5 window=32 beta=2", keep=0.5)
    records: list[Record] = [run(), perplexity(KEPT, KEPT_NLL), perplexity(four, KEPT_NLL)]
    assert [s.name for s in series_of(Results.from_records(records))] == ["PyramidKV beta=20", "PyramidKV beta=2"]
    assert [len(s.variants) for s in series_of(Results.from_records(many_records()))] == [3, 3, 3]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.size(1_919_999_999), "1.92 GB"),
        (numbers.size(999_499_999), "999 MB"),
        (numbers.size(490_000_000, 1.9e9), "0.490 GB"),
        (numbers.percent(-0.7457), "-74.6%"),
        (numbers.percent(0.0004), "+0.04%"),
        (numbers.percent(-0.000001), "+0.00%"),
        (numbers.percent(2.37), "+237%"),
        (numbers.seconds(1.834), "1.83 s"),
        (numbers.seconds(0.0752), "75.2 ms"),
        (numbers.seconds(0.4, 1.83), "0.400 s"),
        (numbers.significant(9.996), "10.0"),
        (numbers.shares([0.2531, 0.2534]), "25.3%"),
        (numbers.shares([0.25, 0.26]), "25.0-26.0%"),
        (numbers.interval(Change(0.084, 0.071, 0.098)), "+8.4% [+7.1, +9.8]"),
    ],
)
def test_numbers_as_text(shown: str, expected: str) -> None:
    assert shown == expected


# Several files as one


def saved_shares(folder: Path, *shares: float) -> list[Path]:
    """A file for each share: the full cache and two methods on one corpus and one task."""
    paths = []
    for index, share in enumerate(shares):
        rows = [Compression(m, f"share={share}", share, int(share * 2e9), 2_000_000_000) for m in ("pyramidkv", "auto")]
        records: list[Record] = [run(command=f"bench --share {share}", settings={"method": "pyramidkv", "n": index})]
        records += [perplexity(FULL, FULL_NLL), *(perplexity(row, KEPT_NLL) for row in rows)]
        records += [recall(FULL, "needle", 99), *(recall(row, "needle", 97) for row in rows)]
        paths.append(save(folder / f"{index}.jsonl", records))
    return paths


def test_shares_of_several_files_are_one_curve(tmp_path: Path) -> None:
    results = Results.from_files(*saved_shares(tmp_path, 0.125, 0.25))
    assert [(s.name, len(s.variants)) for s in series_of(results)] == [("PyramidKV", 2), ("auto (4 bits)", 2)]
    assert len(results.perplexities) == len(results.recalls) == 1 + 4  # the full cache once
    assert results.run.command == "bench --share 0.125\nbench --share 0.25"
    assert results.run.settings == {"method": "pyramidkv", "n": [0, 1]}
    assert headline(results).startswith("At 12.5% of the KV memory, PyramidKV changes perplexity by +10.5%")


def test_the_first_file_says_what_is_chosen(tmp_path: Path) -> None:
    recalled = Compression("auto", "share=0.125", 0.4, 250_000_000, 2_000_000_000)
    other = dataclasses.replace(recalled, setting="share=0.25", kv_bytes=500_000_000)
    one = save(tmp_path / "1.jsonl", [run(settings={"method": "auto"}), recall(recalled, "needle", 97)])
    two = save(tmp_path / "2.jsonl", [run(), perplexity(FULL, FULL_NLL), perplexity(other, KEPT_NLL)])
    assert Results.from_files(one, two).chosen == recalled
    assert Results.from_files(two, one).chosen == other


def test_points_of_a_curve_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pyramidkv.report.panels import Curves
    from pyramidkv.report.plot import _rows

    panels = [panel for row in _rows(Results.from_files(*saved_shares(tmp_path, 0.25, 0.125))) for panel in row]
    change, needle = (panel for panel in panels if isinstance(panel, Curves))
    assert (change.title, change.full) == ("wiki perplexity", 0.0)
    assert (needle.title, needle.full) == ("needle recall", 99.0)
    for panel, expected in ((change, (10.52, 4.92, 16.41)), (needle, (97.0, 91.55, 98.97))):
        for curve in panel.curves:
            assert [point.share for point in curve.points] == [25.0, 12.5]
            for point in curve.points:
                assert (point.value, point.low, point.high) == pytest.approx(expected, abs=0.01)


def test_points_at_equal_bytes_stand_side_by_side_and_on_the_figure() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from pyramidkv.report.panels import Curve, Curves, Point

    curves = [
        Curve("a", "red", "o", (Point(12.5, 3.0, 2.0, 4.0), Point(50.0, 9.0, 8.0, 10.0)), strong=True),
        Curve("b", "blue", "s", (Point(12.6, 5.0, 4.0, 6.0),), strong=False),
    ]
    axes = Figure(figsize=(4, 3)).add_axes((0.2, 0.2, 0.7, 0.7))
    Curves("title", "change, %", tuple(curves), 0.0, "change", (Point(25.0, 20.0, 10.0, 30.0),)).draw(axes)
    lines = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    (low, alone), (beside,) = (axes.transData.transform(line.get_xydata())[:, 0] / axes.figure.dpi for line in lines)
    assert beside - low == pytest.approx(0.07, abs=0.02)
    assert lines[0].get_xdata()[1] == pytest.approx(50.0)  # nothing beside it
    assert alone - low > 1
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] < 0 < 30 < axes.get_ylim()[1]  # the neighbour's interval and no change


def test_bits_and_heads_are_always_named() -> None:
    packed = dataclasses.replace(KEPT, method="snapkv", setting="share=0.25 bits=4 heads=adaptive window=64")
    results = Results.from_records([run(), perplexity(packed, KEPT_NLL)])
    assert [series.name for series in series_of(results)] == ["SnapKV bits=4 heads=adaptive"]


@pytest.mark.parametrize(
    ("head", "row", "message"),
    [
        ({"model": "b"}, {}, "model is 'a-model' and 'b'"),
        ({"dtype": "float32"}, {}, "dtype is 'float16' and 'float32'"),
        ({}, {"context_tokens": 1024}, "'wiki' with context_tokens 1536 and 1024 can't share an axis"),
        ({}, {"target_tokens": 64}, "'wiki' with target_tokens 512 and 64 can't"),
        ({}, {"corpus_sha256": "decaf"}, "'wiki' with corpus_sha256 'c0ffee' and 'decaf' can't"),
        ({}, {"chunk_nll": (3.0, 3.1)}, "'wiki' with 4 and 2 chunks can't"),
        ({}, {"chunk_nll": (3.1, 3.3, 2.86, 3.15)}, r"two results of pyramidkv keep=0.25 .* on 'wiki'"),
    ],
)
def test_files_that_cannot_share_an_axis(tmp_path: Path, head: dict, row: dict, message: str) -> None:
    one = save(tmp_path / "1.jsonl", default_records()[:3])
    changed = dataclasses.replace(perplexity(KEPT, KEPT_NLL), **row)
    two = save(tmp_path / "2.jsonl", [run(**head), changed])
    with pytest.raises(DataError, match=rf"1\.jsonl and .*2\.jsonl: .*{message}"):
        Results.from_files(one, two)


def test_other_questions_and_times_of_two_runs_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "1.jsonl", default_records())
    two = save(tmp_path / "2.jsonl", [run(), recall(FULL, "needle", 98)])
    with pytest.raises(DataError, match="two results of full nothing evicted on 'needle'"):
        Results.from_files(one, two)
    three = save(tmp_path / "3.jsonl", [run(), default_records()[7]])
    with pytest.raises(DataError, match="times of different runs can't be compared"):
        Results.from_files(one, three)


def test_the_fastest_engine_of_one_compression_is_the_headlines() -> None:
    slow = speed(KEPT, "pyramidkv, decode=graph", 0.1, 0.004, None)
    fast = speed(KEPT, "pyramidkv, decode=compiled", 0.1, 0.003, None)
    records: list[Record] = [run(), speed(FULL, "DynamicCache", 0.09, 0.075, None), slow, fast]
    assert "takes 3.00 ms per token" in headline(Results.from_records(records))


# The renderers


@pytest.mark.parametrize("width", [50, 60, 80, 100, 200])
def test_a_narrow_terminal_keeps_names_whole_and_shows_every_column(width: int) -> None:
    long = dataclasses.replace(KEPT, setting="share=0.25 heads=adaptive")
    out = StringIO()
    records: list[Record] = [run(), perplexity(FULL, FULL_NLL), perplexity(long, KEPT_NLL)]
    records += [perplexity(FULL, FULL_NLL, "books"), perplexity(long, KEPT_NLL, "books"), recall(long, "needle", 9)]
    records += [speed(FULL, "DynamicCache", 0.1, 0.07, None), speed(KEPT, "pyramidkv", 0.7, 0.02, None)]
    table = methods_table(Results.from_records(records))
    Console(file=out, width=width).print(table.rich(width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if line.endswith(("─", "─ "))]) == len([x for x in lines if "Method" in x])
    heads = [line.split() for line in lines if line.startswith("  Method")]
    assert len(heads) == 1 if width == 200 else len(heads) > 1 if width < 100 else True
    for word in (*table.columns[-2:], "heads=adaptive", "needle"):
        assert word in out.getvalue()


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (-20, 40, 9, [-10, -3, -1, 0, 1, 3, 10, 30]),
        (-20, 40, 7, [-10, -1, 0, 1, 10]),
        (-100, 20000, 7, [-100, -1, 0, 1, 100, 10000]),
        (-0.3, 40, math.inf, [0, 1, 3, 10, 30]),
    ],
)
def test_an_axis_has_no_more_ticks_than_fit_beside_one_another(
    low: float, high: float, most: float, ticks: list[float]
) -> None:
    pytest.importorskip("matplotlib")
    from pyramidkv.report.panels import _decades

    assert _decades(low, high, most) == ticks


def test_rich_shows_brackets_as_they_are() -> None:
    out = StringIO()
    Console(file=out, width=200).print(summary_table(Results.from_records(default_records())).rich(200))
    assert "+10.5% [+4.9, +16.4]" in out.getvalue()


def test_markdown_and_html_escape_what_records_say() -> None:
    table = Table(HOSTILE, ("a", "b"), ((Cell(HOSTILE), Cell("x", HOSTILE)),), (HOSTILE,))
    markdown, page = table.markdown(), table.html()
    assert "<b>" not in markdown
    assert "<b>" not in page
    assert page.count("&lt;b&gt;wiki&lt;/b&gt;") == 4
    row = next(line for line in markdown.splitlines() if line.startswith("| &lt;"))
    assert row.replace("\\|", "").count("|") == 3


# The files


class _Tags(HTMLParser):
    """Every start tag of a page with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_write_makes_every_file(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    written = write(results, out)
    assert [path.name for path in written] == ["result.png", "layers.png", "report.md", "report.html"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in written)
    assert_drawn(out / "result.png", width=2160)
    assert_drawn(out / "layers.png", width=2160)
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for expected in ("+10.5% [+4.9, +16.4]", "pyramidkv bench --keep 0.25", "c0ffee", "2026-01-02T03:04:05Z", "3.1400"):
        assert expected in markdown, expected
        assert expected in page, expected
    assert "![" in markdown
    assert "](result.png)" in markdown


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    records: list[Record] = [
        run(command="x <script>alert(1)</script>", model=HOSTILE),
        perplexity(FULL, FULL_NLL, HOSTILE),
        perplexity(KEPT, KEPT_NLL, HOSTILE),
        recall(KEPT, HOSTILE, 50),
        Skipped(HOSTILE, HOSTILE),
    ]
    page = write(save(tmp_path / "r.jsonl", records), tmp_path)[-1].read_text()
    parsed = _Tags()
    parsed.feed(page)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"b", "script", "link", "iframe"}
    sources = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href")]
    assert sources
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page
    assert "@import" not in page


def test_many_methods_are_drawn(tmp_path: Path) -> None:
    written = write(save(tmp_path / "r.jsonl", many_records()), tmp_path / "out")
    assert [path.name for path in written] == ["result.png", "report.md", "report.html"]
    assert_drawn(written[0], width=2160)


def test_nothing_to_draw_is_still_a_report(tmp_path: Path) -> None:
    source = save(tmp_path / "r.jsonl", [run(), Skipped("perplexity on wiki", "no network")])
    written = write(source, tmp_path / "out")
    assert [path.name for path in written] == ["report.md", "report.html"]
    assert "not measured (no network)" in written[0].read_text()


def test_existing_files_are_kept_unless_forced(results: Path, tmp_path: Path) -> None:
    mine = tmp_path / "report.md"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"report\.md.*--force"):
        write(results, tmp_path)
    assert mine.read_text() == "mine"
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "r2.jsonl").write_text(to_json(run()) + "\n")
    (tmp_path / "result.png").write_text("a picture of another run")
    write(tmp_path / "r2.jsonl", tmp_path, force=True)
    assert mine.read_text() != "mine"
    assert not (tmp_path / "result.png").exists()


def test_half_written_results_name_the_line(results: Path, tmp_path: Path) -> None:
    whole = results.read_text()
    results.write_text(whole[: whole.index("\n") + 60])
    with pytest.raises(DataError, match="line 2"):
        write(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(results: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out=.*folder that can be written"):
        write(results, tmp_path / "file" / "below")


def test_missing_packages_are_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ConfigError, match=r"matplotlib: pip install 'pyramidkv\[report\]'"):
        write(tmp_path / "absent.jsonl", tmp_path)


def test_tables_need_no_optional_package() -> None:
    """Followed through the imports at the top of files: torch may have loaded the packages, so a process can't tell."""
    seen, ahead = set(), ["pyramidkv.report"]
    while ahead:
        module = ahead.pop()
        seen.add(module)
        if not module.startswith("pyramidkv.report"):
            continue
        origin = importlib.util.find_spec(module).origin
        for node in ast.parse(Path(origin).read_text()).body:
            if isinstance(node, ast.ImportFrom):
                ahead += {node.module} - seen
            elif isinstance(node, ast.Import):
                ahead += {alias.name for alias in node.names} - seen
    assert "pyramidkv.report.summary" in seen
    assert not [module for module in seen if module.split(".")[0] in ("matplotlib", "jinja2", "numpy")]


def test_layers_of_one_method_are_told_apart_by_their_settings() -> None:
    settings = ("share=0.25 heads=adaptive", "share=0.25")
    rows = [Compression("echo", setting, 0.25, 500, 2000) for setting in settings]
    records = [dataclasses.replace(layers(), method="echo", setting=setting) for setting in settings]
    results = Results.from_records([run(), *(perplexity(row, KEPT_NLL) for row in rows), *records])
    assert [layers_label(results, record) for record in records] == ["echo heads=adaptive", "echo"]
    assert [colour_of(results, "echo", setting) for setting in settings] == [s.colour for s in series_of(results)]
    older = [dataclasses.replace(record, setting="") for record in records]
    results = Results.from_records([run(), *(perplexity(row, KEPT_NLL) for row in rows), *older])
    assert {layers_label(results, record) for record in older} == {"echo, 28.1% kept"}


def test_every_method_of_the_ablations_has_a_colour_of_its_own() -> None:
    names = [*METHODS, "beta 1", "beta 2"]
    assert (
        len({colour for colour, _ in looks(names).values()}) == len(names) - 1
    )  # all but the full cache, which is grey


def test_lines_of_a_panel_say_as_much_as_each_other() -> None:
    lines = ["Full cache: 100.0%", "SnapKV: 0.0%, 25.6% of KV", "PyramidKV beta=2.0: 0.0%, 25.6% of KV"]
    assert alike(lines, 9) == lines
    assert alike(lines, 2.3) == ["Full cache: 100.0%", "SnapKV: 0.0%", "PyramidKV beta=2.0: 0.0%"]


def test_a_recall_task_is_named_in_words() -> None:
    records = [run(), recall(FULL, "kv", 99), recall(KEPT, "kv", 2)]
    assert "answers 2.0% of the key-value questions (full cache: 99.0%)" in headline(Results.from_records(records))


def test_kept_share_by_hand() -> None:
    from pyramidkv.report.layers import kept_share

    shares = kept_share(layers(), 16)  # 4 positions to a bin
    assert shares.shape == (2, 16)
    assert (shares[0] == 0.5).all()
    assert shares[1, -1] == 0.5  # all four positions, in one of two heads
    assert (shares[1, :-1] == 0).all()
    with pytest.raises(DataError, match="position outside"):
        kept_share(dataclasses.replace(layers(), kept_positions=(((64,),), ((0,),))), 16)


def assert_drawn(path: Path, *, width: int) -> None:
    """A picture of print width in which a fair part, but not all, is ink, and some of the ink has colour."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == width
    assert pixels.shape[0] > 0.2 * width
    ink = (pixels < 0.9).any(axis=2).mean()
    assert 0.01 < ink < 0.9
    assert (pixels.max(axis=2) - pixels.min(axis=2) > 0.3).mean() > 0.001
    assert math.isfinite(float(pixels.mean()))


@pytest.mark.parametrize(
    ("names", "columns"),
    [(["full", "auto"], 4), (["echo heads=adaptive", "auto"], 3), (["a name of thirty characters...", "auto"], 2)],
)
def test_a_legend_has_as_many_columns_as_its_names_fit_in(names: list[str], columns: int) -> None:
    handles = [Line2D([], [], label=name) for name in names]
    assert plot._columns(handles) == columns
    assert [handle.get_label() for handle in handles] == names


def test_a_name_that_is_too_long_for_a_legend_is_cut() -> None:
    handle = Line2D([], [], label="auto layers=(" + "1.0, " * 30)
    assert plot._columns([handle]) == 2
    assert len(str(handle.get_label())) < 40 and str(handle.get_label()).endswith("…")
