"""`pyramidkv doctor`: what is installed here, and what the benchmark will therefore run."""

from __future__ import annotations

import platform
from typing import Any

import typer
from rich import box
from rich.table import Table

from pyramidkv.cli.options import Json
from pyramidkv.cli.output import json_out, out


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and kernels, and what `pyramidkv bench` will run.

    The exit code is 0 if the default benchmark can run here, else 1.

    Examples:

        pyramidkv doctor

        pyramidkv doctor --json
    """
    found = _examine()
    if as_json:
        json_out(found)
    else:
        _show(found)
    raise typer.Exit(0 if found["ok"] else 1)


def _examine() -> dict[str, Any]:
    import pyramidkv
    from pyramidkv.cli import environment
    from pyramidkv.methods import methods
    from pyramidkv.models.hub import hub_problem
    from pyramidkv.models.shapes import DEFAULT_MODEL
    from pyramidkv.ops.linear.onednn import why_no_onednn
    from pyramidkv.ops.strips import why_no_bags

    device = environment.default_device()
    packages = environment.packages()
    problems = [
        f"{p.name} {p.installed or 'is missing'}: needs {p.wanted}" for p in packages if not p.extra and not p.ok
    ]
    model_problem = environment.model_problem()
    if model_problem:
        problems.append(model_problem)
    corpora_problem = environment.corpora_problem()
    missing = [p.name for p in packages if p.extra == "report" and not p.ok]
    return {
        "ok": not problems,
        "problems": problems,
        "versions": {"python": platform.python_version(), "pyramidkv": pyramidkv.__version__},
        "packages": [
            {"name": p.name, "installed": p.installed, "wanted": p.wanted, "extra": p.extra, "ok": p.ok}
            for p in packages
        ],
        "devices": environment.devices(),
        "default_device": str(device),
        "attention_kernels": environment.attention_kernels(device),
        "packed_on_cpu_problem": why_no_bags(),
        "products_on_cpu_problem": why_no_onednn(),
        "hub_problem": hub_problem(),
        "methods": methods(),
        "default_benchmark": {
            "model": f"{DEFAULT_MODEL} on {device}" if not model_problem else None,
            "perplexity": _corpora(corpora_problem),
            "corpora_problem": corpora_problem,
            "recall": "synthetic tasks, made from a seed",
            "speed": _engines(device),
            "report_problem": f"{' and '.join(missing)} missing: pip install 'pyramidkv[report]'" if missing else None,
        },
    }


def _corpora(problem: str | None) -> list[str]:
    from pyramidkv.evaluate.texts import LOCAL, NAMES

    return [name for name in NAMES if name == LOCAL or problem is None]


def _engines(device: Any) -> list[str]:
    from pyramidkv.config import CompressionConfig
    from pyramidkv.evaluate.speed import engines

    return [engine.name for engine in engines([CompressionConfig(keep=0.25)], device)]


def _show(found: dict[str, Any]) -> None:
    out.print(_packages(found))
    out.print(_devices(found))
    kernels = ", ".join(f"{case} {kernel}" for case, kernel in found["attention_kernels"].items())
    bench = found["default_benchmark"]
    facts = {
        "SDPA runs": f"{kernels} (on {found['default_device']})",
        "packed, on a CPU": _slowly(found["packed_on_cpu_problem"]),
        "products, on a CPU": _by_onednn(found["products_on_cpu_problem"]),
        "hub": found["hub_problem"] or "answers",
        "shipped model": "there" if bench["model"] else "missing",
        "report": bench["report_problem"] or "can be written",
    }
    out.print(_pairs("", facts))
    out.print(_pairs("Methods (--method)", found["methods"]))
    will = {
        "model": bench["model"] or "none",
        "perplexity": ", ".join(bench["perplexity"])
        + (f"; those of the hub not: {bench['corpora_problem']}" if bench["corpora_problem"] else ""),
        "recall": bench["recall"],
        "speed": "; ".join(bench["speed"]),
    }
    out.print(_pairs("pyramidkv bench, by default", will))
    if found["ok"]:
        out.print("[green]The default benchmark can run here.[/green]")
    for problem in found["problems"]:
        out.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)


def _slowly(problem: str | None) -> str:
    return "fast" if problem is None else f"slow: {problem}"


def _by_onednn(problem: str | None) -> str:
    return "float32 by oneDNN" if problem is None else f"as torch does them: {problem}"


def _packages(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("package", "installed", "wanted", "for"):
        table.add_column(column)
    for name, version in found["versions"].items():
        table.add_row(name, version, "", "")
    for p in found["packages"]:
        style = "" if p["ok"] else ("dim" if p["extra"] else "red")
        table.add_row(p["name"], p["installed"] or "no", p["wanted"], _purpose(p["name"], p["extra"]), style=style)
    return table


def _purpose(name: str, extra: str) -> str:
    special = {"hub": "corpora from the hub", "report": "reports", "gguf": ".gguf models", "triton": "GPU kernels"}
    return special.get(extra, "")


def _devices(found: dict[str, Any]) -> Table:
    from pyramidkv.report.text import size

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("device", "name", "memory", "free"):
        table.add_column(column, justify="left" if column in ("device", "name") else "right")
    for d in found["devices"]:
        table.add_row(d["device"], d["name"], size(d["memory_bytes"]), size(d["free_bytes"]))
    return table


def _pairs(title: str, pairs: dict[str, str]) -> Table:
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in pairs.items():
        table.add_row(name, value)
    table.add_row("")
    return table
