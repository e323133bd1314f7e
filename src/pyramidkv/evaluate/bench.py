"""The benchmark: a list of jobs, each of which appends its records to `results.jsonl` when it is done.

What is measured, and how, is in `perplexity.py`, `recall.py` and `speed.py`; here is only what runs in which order,
what is skipped and why, and how a run that was cut off goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyramidkv.cache import ATTENTION_NAME, PyramidKVCache
from pyramidkv.config import CompressionConfig, unknown
from pyramidkv.decode.graph import can_capture
from pyramidkv.errors import ConfigError, DataError
from pyramidkv.evaluate import origin, perplexity, recall, schema, serving, speed, tasks, texts
from pyramidkv.evaluate.lengths import check_length
from pyramidkv.evaluate.ranks import Ranks, joined, merge
from pyramidkv.evaluate.schema import Layers, Record, Run, Skipped
from pyramidkv.layer import PyramidKVLayer
from pyramidkv.models.hub import hub_problem
from pyramidkv.models.source import DEFAULT_MODEL, LoadedModel, load_model

METRICS = ("perplexity", "recall", "speed", "serving")
DEFAULT_METRICS = METRICS[:3]

# (what is being measured, steps done, steps in all): for a progress bar.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What to measure. Lengths are in tokens."""

    configs: tuple[CompressionConfig, ...]  # the first is the one the report's table shows
    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str = "auto"
    metrics: tuple[str, ...] = DEFAULT_METRICS
    # Neither corpora nor text: the Python reference, and those of the hub if it answers.
    corpora: tuple[str, ...] = ()
    text: tuple[str, ...] = ()  # NAME=FILE_OR_FOLDER
    context: int = 1536
    target: int = 512
    chunks: int = 24
    tasks: tuple[str, ...] = tasks.TASKS
    recall_context: tuple[int, ...] = (2048,)
    recall_examples: int = 16
    question_aware: bool = False
    prompt: int = 3840
    batch: tuple[int, ...] = (1,)
    new_tokens: int = 128
    repeats: int = 5
    requests: int = 16
    memory: int | None = None  # bytes for the cache of the requests served at once; None: `serving.default_memory`

    def check(self) -> None:
        """Raise `ConfigError` for what can be known to be wrong before any model is loaded."""
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"metric={metric!r}: {unknown(metric, METRICS)}")
        for task in self.tasks:
            if task not in tasks.TASKS:
                raise ConfigError(f"task={task!r}: {unknown(task, tasks.TASKS)}")
        least = {
            "target": 1,
            "chunks": 1,
            "recall_examples": 1,
            "prompt": 1,
            "new_tokens": 2,
            "repeats": 1,
            "requests": 2,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least {smallest}")
        if any(b < 1 for b in self.batch):
            raise ConfigError(f"batch={min(self.batch)}: must be at least 1")
        compressed = [c for c in self.configs if c.method != "full"]
        if not compressed:
            raise ConfigError("method='full': give one that compresses; the full cache is always measured beside it")
        if "perplexity" in self.metrics:
            check_length("context", self.context, compressed)
        if "recall" in self.metrics:
            for length in self.recall_context:
                check_length("recall_context", length, compressed)
        if "speed" in self.metrics:
            check_length("prompt", self.prompt, self.configs[:1])
        if "serving" in self.metrics:
            check_length("prompt", self.prompt, compressed)


@dataclass
class _File:
    """A results file being written; knows what it holds already."""

    path: Path
    ranks: Ranks  # the first alone writes
    done: set[str] = field(default_factory=set)

    def has(self, job: str) -> bool:
        return job in self.done

    def add(self, job: str, records: Sequence[Record]) -> None:
        for record in records if self.ranks.first else ():
            schema.append(self.path, record)
        self.done.add(job)


def run(
    settings: Settings, out: Path, *, resume: bool = False, force: bool = False, progress: Progress = lambda *_: None
) -> Path:
    """Measure everything that is not yet in `out`/results.jsonl and return that path.

    Under `torchrun` or `accelerate launch` the processes share the chunks and examples, and the first one writes.

    Raises `ConfigError` if the file is there and neither `resume` nor `force` is given, or if it was made with other
    settings; `DataError` for a corpus that was asked for by name and can't be had.
    """
    settings.check()
    with joined(settings.device) as ranks:
        return _run(settings, out, ranks, resume=resume, force=force, progress=progress)


def _run(settings: Settings, out: Path, ranks: Ranks, *, resume: bool, force: bool, progress: Progress) -> Path:
    path = out / schema.RESULTS
    existing = _existing(path, resume, force) if ranks.first else []
    corpora, skipped = _corpora(settings)
    ranks.same("corpora", [(corpus.name, corpus.sha256) for corpus in corpora])
    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype, settings=settings.configs)
    if {"speed", "serving"} & set(settings.metrics):
        for config in settings.configs:
            can_capture(loaded.model, config)  # an error now, not after all that is measured before
    head = _head(settings, loaded)
    file = _File(path, ranks)
    if existing:
        _check_same(path, schema.cast_run(existing), head)
    elif ranks.first:
        if force:
            path.unlink(missing_ok=True)
        _write_first(path, head)
    file.done = ranks.gather({_job(record) for record in existing[1:]})[0]
    try:
        for note in skipped:
            if not file.has(note.what):
                file.add(note.what, [note])
        if "perplexity" in settings.metrics:
            _perplexity(settings, loaded, corpora, file, progress)
        if "recall" in settings.metrics:
            _recall(settings, loaded, file, progress)
        if "speed" in settings.metrics:
            _speed(settings, loaded, file, progress)
        if "serving" in settings.metrics:
            _serving(settings, loaded, file, progress)
    except BaseException:
        if ranks.first and not existing and file.done <= {note.what for note in skipped}:
            path.unlink(missing_ok=True)  # nothing was measured: no file to stand in the way of the next try
        raise
    return path


def _existing(path: Path, resume: bool, force: bool) -> list[Record]:
    if resume and force:
        raise ConfigError(
            "resume=, force=: give one of them; the first goes on with a results file, the second drops it"
        )
    if not path.exists():
        return []
    if resume:
        return schema.read(path)
    if not force:
        raise ConfigError(f"out={str(path.parent)!r}: {path} is there; --resume goes on with it, --force replaces it")
    return []


def _write_first(path: Path, head: Run) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(path.parent)!r}: can't be made: {error.strerror}") from error
    schema.append(path, head)


def _corpora(settings: Settings) -> tuple[list[texts.Corpus], list[Skipped]]:
    """The corpora to measure on, and those left out of the default because the hub can't be reached."""
    if "perplexity" not in settings.metrics:
        return [], []
    if settings.corpora or settings.text:
        named = [texts.load(name) for name in settings.corpora]
        return [*named, *(texts.parse_text(argument) for argument in settings.text)], []
    local = texts.load(texts.LOCAL)
    hub = [name for name in texts.NAMES if name != texts.LOCAL]
    if hub_problem() is None:
        return [local, *(texts.load(name) for name in hub)], []
    reason = "not measured: the hub can't be reached; give a copy with --text"
    return [local], [Skipped(f"perplexity on {name}", f"{reason} {name}=FILE_OR_FOLDER") for name in hub]


def _head(settings: Settings, loaded: LoadedModel) -> Run:
    main = settings.configs[0]
    shown = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "configs"}
    device: torch.device = loaded.model.device
    return Run(
        command=origin.command(["pyramidkv"], ["-m", "pyramidkv"]),
        started_utc=origin.now_utc(),
        device=origin.device_name(device),
        versions=origin.versions(),
        model=loaded.name,
        model_parameters=loaded.parameters,
        weights_random=loaded.weights_random,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        settings={
            "method": main.method,
            "keep": main.keep,
            "configs": [f"{c.method} {c.describe()}" for c in settings.configs],
            **shown,
        },
    )


def _check_same(path: Path, old: Run, new: Run) -> None:
    changing = {"command", "started_utc"}
    # Through JSON, since that is what became of the old one: tuples are lists there.
    before, now = (dataclasses.asdict(schema.from_json(schema.to_json(r))) for r in (old, new))
    before, now = ({**facts["settings"], **facts} for facts in (before, now))  # one setting to name, not all
    for name in before | now:
        if name not in (*changing, "settings") and before.get(name) != now.get(name):
            raise ConfigError(
                f"resume=True: {path} was made with {name}={before.get(name)!r}, this run has {now.get(name)!r}; "
                "use the same settings, or another --out"
            )


def _job(record: Record) -> str:
    """The name of the job that a record belongs to."""
    match record:
        case schema.Perplexity():
            return f"perplexity on {record.corpus}"
        case schema.Recall():
            return f"recall of {record.task} at {record.context_tokens}"
        case schema.Speed():
            return f"speed at batch {record.batch}"
        case schema.Serving():
            return f"serving of {record.requests} requests"
        case Layers():
            return f"layers of {record.method}"
        case Skipped():
            return record.what
        case Run():
            raise DataError("a results file has one run record, its first line")


def _perplexity(
    settings: Settings, loaded: LoadedModel, corpora: Sequence[texts.Corpus], file: _File, progress: Progress
) -> None:
    if _not_measurable(loaded, [f"perplexity on {corpus.name}" for corpus in corpora], file):
        return
    for number, corpus in enumerate(corpora):
        job = f"perplexity on {corpus.name}"
        pieces = texts.chunks(
            corpus,
            loaded.tokenizer,
            tokens=settings.context + settings.target + 1,
            count=settings.chunks,
            asked="context= + target= + 1",
        )
        if not file.has(job):
            mine = file.ranks.mine(pieces)
            steps = perplexity.measure(
                loaded.model, loaded.name, corpus, mine, settings.configs, context=settings.context
            )
            file.add(job, merge(file.ranks.gather(_last(steps, job, len(mine), progress))))
        if number == 0:
            job = f"layers of {settings.configs[0].method}"
            if not file.has(job):
                file.add(job, [_layers(loaded, settings.configs[0], pieces[0][: settings.context])])


def _recall(settings: Settings, loaded: LoadedModel, file: _File, progress: Progress) -> None:
    jobs = [(task, n) for n in settings.recall_context for task in settings.tasks]
    if _not_measurable(loaded, [f"recall of {task} at {n}" for task, n in jobs], file):
        return

    tokenizer: Any = loaded.tokenizer

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for task, length in jobs:
        job = f"recall of {task} at {length}"
        if file.has(job):
            continue
        examples = tasks.make_examples(task, n=settings.recall_examples, tokens=length, count_tokens=count, seed=0)
        mine = file.ranks.mine(examples)
        steps = recall.measure(
            loaded.model, loaded.tokenizer, loaded.name, mine, settings.configs,
            context=length, question_aware=settings.question_aware,
        )  # fmt: skip
        file.add(job, merge(file.ranks.gather(_last(steps, job, len(mine), progress))))


def _speed(settings: Settings, loaded: LoadedModel, file: _File, progress: Progress) -> None:
    device: torch.device = loaded.model.device
    todo = [batch for batch in settings.batch if not file.has(f"speed at batch {batch}") and file.ranks.first]
    bandwidth = speed.read_bandwidth(device) if todo and device.type != "mps" else None
    for batch in todo:
        steps = speed.measure(
            loaded.model,
            loaded.name,
            speed.engines(settings.configs[:1], device),
            batch=batch,
            prompt=settings.prompt,
            new_tokens=settings.new_tokens,
            repeats=settings.repeats,
            weights_random=loaded.weights_random,
            bandwidth=bandwidth,
        )
        job = f"speed at batch {batch}"
        file.add(job, _last(steps, job, settings.repeats, progress))


def _serving(settings: Settings, loaded: LoadedModel, file: _File, progress: Progress) -> None:
    job = f"serving of {settings.requests} requests"
    if file.has(job) or not file.ranks.first:
        return
    model = loaded.model
    requests = serving.make_requests(
        settings.requests,
        prompt=settings.prompt,
        new_tokens=settings.new_tokens,
        vocabulary=model.config.get_text_config(decoder=True).vocab_size,
    )
    steps = serving.measure(
        model,
        loaded.name,
        speed.engines(settings.configs, model.device),
        requests,
        memory=settings.memory or serving.default_memory(model, requests),
        repeats=settings.repeats,
        weights_random=loaded.weights_random,
    )
    file.add(job, _last(steps, job, settings.repeats, progress))


def _not_measurable(loaded: LoadedModel, jobs: Sequence[str], file: _File) -> bool:
    """Note why quality can't be measured on this model, if it can't."""
    if not loaded.weights_random and loaded.tokenizer is not None:
        return False
    reason = "not measured (random weights)" if loaded.weights_random else "not measured (the model has no tokenizer)"
    for job in jobs:
        if not file.has(job):
            file.add(job, [Skipped(job, reason)])
    return True


def _last(steps: Iterator[list[Any]], job: str, total: int, progress: Progress) -> list[Any]:
    """Run a measurement to its end; only a finished one is written down. Of no pieces it has no records."""
    if not total:
        return []
    progress(job, 0, total)
    records: list[Any] = []
    for done, records in enumerate(steps, 1):  # noqa: B007
        progress(job, done, total)
    return records


def _layers(loaded: LoadedModel, config: CompressionConfig, prompt: Sequence[int]) -> Layers:
    model = loaded.model
    before = model.config._attn_implementation
    cache = PyramidKVCache(model.config, perplexity.stored(config, model))
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        with torch.no_grad():
            model(torch.tensor([list(prompt)], device=model.device), past_key_values=cache, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    layers = [layer for layer in cache.layers if isinstance(layer, PyramidKVLayer)]
    kept = []
    for layer in layers:
        assert layer.storage is not None
        positions = layer.storage.positions[0, :, : layer.storage.length].tolist()
        kept.append(tuple(tuple(p for p in head if p >= 0) for head in positions))
    return Layers(
        model=loaded.name,
        method=config.method,
        prompt_tokens=len(prompt),
        budget_tokens=tuple(layer.usage().kept_tokens for layer in layers),
        kv_bytes=tuple(layer.usage().kv_bytes for layer in layers),
        kept_positions=tuple(kept),
        setting=perplexity.setting(config),
    )
