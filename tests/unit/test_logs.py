"""Logging: what a line looks like, and that it never holds up the server."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volplugin import loglines, logs
from volplugin.errors import InvalidArgument
from volplugin.logs import Writer, log

logger = logging.getLogger("volplugin.test")

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """No thread, handler or level outlives a test."""
    before = set(threading.enumerate())
    yield
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, Writer):
            handler.close()
    assert set(threading.enumerate()) <= before
    assert logging.getLogger("volplugin").level == logging.NOTSET


def setup(*, fmt: str, level: str, stream: TextIO | None = None) -> Writer:
    """Set up logging without the handlers that pytest adds to each phase of a test."""
    writer = logs.setup(fmt=fmt, level=level, stream=stream)
    logging.getLogger().handlers = [writer]
    return writer


def written(fmt: str, level: str = "debug", *calls: Any) -> list[str]:
    """Return the lines that the calls make log."""
    stream = io.StringIO()
    writer = setup(fmt=fmt, level=level, stream=stream)
    try:
        for call in calls:
            call()
    finally:
        writer.close()
    text = stream.getvalue()
    assert text == "" or text.endswith("\n")
    return text.split("\n")[:-1]


def line(fmt: str, event: str, **fields: object) -> str:
    (one,) = written(fmt, "debug", lambda: log(logger, logging.INFO, event, **fields))
    return one


def deep(depth: int, told: str) -> None:
    if depth:
        deep(depth - 1, told)
    raise ValueError(told)


def failing() -> None:
    try:
        deep(0, "first\nvolume=forged")
    except ValueError:
        logger.exception("it broke")


def test_a_text_line() -> None:
    """Time in UTC, level, event, fields."""
    one = line("text", "call", volume="db", op="Mount", ms=1.2, outcome="ok")
    assert re.fullmatch(
        rf"{TIME} INFO  call volume=db op=Mount ms=1\.2 outcome=ok", one
    )
    logged = time.strptime(one[:19] + "UTC", "%Y-%m-%dT%H:%M:%S%Z")
    assert abs(time.mktime(logged) - time.mktime(time.gmtime())) < 3700


def test_the_time_of_a_line() -> None:
    """Milliseconds are cut, not rounded into the next second."""
    record = logging.LogRecord("v", logging.INFO, "", 0, "e", None, None)
    record.created = 1795546799.9999
    assert loglines.text_line(record, "e") == b"2026-11-24T18:59:59.999Z INFO  e\n"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("db", "db"),
        ("/mnt/größe", "/mnt/größe"),
        ("", '""'),
        ("a b", '"a b"'),
        ("größe x", '"größe x"'),
        ('a"b', r'"a\"b"'),
        ("a=b", '"a=b"'),
        ("a\nb", r'"a\nb"'),
        ("a\0", r'"a\u0000"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("a\u2028b", r'"a\u2028b"'),
        ("\u202eabc", r'"\u202eabc"'),
        ("\ud800", r'"\ud800"'),
        ("a\u00a0b", r'"a\u00a0b"'),
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (["a"], "['a']"),
        (OSError(2, "gone"), '"[Errno 2] gone"'),
    ],
)
def test_text_values(value: object, shown: str) -> None:
    """What could pass for something else is quoted."""
    assert line("text", "e", key=value).endswith(f" INFO  e key={shown}")


@given(st.text(), st.text())
def test_no_text_forges_a_line(event: str, value: str) -> None:
    """One record is one line, and its last field ends it, whatever is in it."""
    record = logging.LogRecord("v", logging.INFO, "", 0, event, None, None)
    record.fields = {"name": value}
    text = loglines.text_line(record, event).decode()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    shown = text[:-1].partition(" name=")[2]
    assert (json.loads(shown) if shown.startswith('"') else shown) == value
    data = json.loads(loglines.json_line(record, event))
    assert (data["event"], data["fields"]["name"]) == (event, value)
    assert loglines.json_line(record, event).count(b"\n") == 1


def test_a_json_line() -> None:
    """An object with time, level, event, fields, logger."""
    data = json.loads(line("json", "call", volume="d b", ms=1.2, n=3, ok=True, x=None))
    assert re.fullmatch(TIME, data.pop("time"))
    assert data == {
        "level": "info",
        "event": "call",
        "fields": {"volume": "d b", "ms": 1.2, "n": 3, "ok": True, "x": None},
        "logger": "volplugin.test",
    }


def test_json_of_other_values() -> None:
    """Infinity, lists and objects are JSON too."""
    fields = json.loads(
        line("json", "e", a=float("inf"), b=["x", 1], c={"k": 1}, d=ValueError("v"))
    )["fields"]
    assert fields == {"a": "inf", "b": ["x", "1"], "c": "{'k': 1}", "d": "v"}


def test_a_stack_trace_stays_in_its_line() -> None:
    """An exception is one more field, in both forms."""
    (text,) = written("text", "debug", failing)
    assert ' ERROR it broke exception="Traceback (most recent call last):\\n' in text
    assert r"ValueError: first\nvolume=forged" in text
    (data,) = written("json", "debug", failing)
    assert json.loads(data)["exception"].endswith("ValueError: first\nvolume=forged")


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_a_line_is_at_most_8_kib(fmt: str) -> None:
    """Values, events and traces are cut; JSON stays JSON; the error is still named."""

    def trace() -> None:
        try:
            deep(900, "the end")
        except ValueError:
            logger.exception("x" * 100_000)

    big = "\U0001f600\n" * 100_000
    smiles = "\U0001f600" * 99
    many = {f"{n}{smiles}": big for n in range(999)}
    lines = written(
        fmt,
        "debug",
        trace,
        lambda: log(logger, logging.INFO, big, name=big),
        lambda: log(logger, logging.INFO, "many", **many),
        lambda: log(
            logger, logging.INFO, "six", **{f"f{n}": "ü" * 2000 for n in range(6)}
        ),
    )
    assert len(lines) == 4
    assert all(len(one.encode()) < 8192 for one in lines)
    assert "ValueError: the end" in lines[0]
    if fmt == "json":
        assert [len(json.loads(one)["fields"]) for one in lines] == [0, 1, 0, 6]


def test_levels() -> None:
    """A level hides those below it; other libraries are heard from warning on."""

    def calls() -> None:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log(logger, level, "ours")
            logging.getLogger("asyncio").log(level, "theirs %d", level)

    def told(level: str) -> list[str]:
        return [one[25:] for one in written("text", level, calls)]

    assert told("debug") == [
        "DEBUG ours",
        "INFO  ours",
        "WARN  ours",
        "WARN  theirs 30",
        "ERROR ours",
        "ERROR theirs 40",
    ]
    assert told("error") == ["ERROR ours", "ERROR theirs 40"]


@pytest.mark.parametrize(("fmt", "level"), [("xml", "info"), ("text", "loud")])
def test_an_unknown_format_or_level(fmt: str, level: str) -> None:
    """It is refused, and nothing is set up."""
    with pytest.raises(InvalidArgument):
        setup(fmt=fmt, level=level)


def test_a_record_that_cannot_be_formatted() -> None:
    """A bad value or format string costs its fields, not the line or the thread."""

    class Bad:
        def __str__(self) -> str:
            raise RuntimeError

    def calls() -> None:
        log(logger, logging.INFO, "first", bad=Bad())
        logger.info("count %d", "x")
        log(logger, logging.INFO, "last")

    first, second, last = written("text", "debug", calls)
    assert first.endswith(
        "INFO  log line without its fields event=first error=RuntimeError"
    )
    assert second.endswith("INFO  count %d ('x',)")
    assert last.endswith("INFO  last")


def test_extra_fields_of_the_standard_call() -> None:
    """logger.info(…, extra={"fields": …}) works as `log` does."""
    (one,) = written(
        "text", "debug", lambda: logger.info("call", extra={"fields": {"volume": "db"}})
    )
    assert one.endswith("INFO  call volume=db")


def test_reconfigure_changes_format_and_level_and_loses_nothing() -> None:
    """A reload while others log keeps every line."""
    stream = io.StringIO()
    writer = setup(fmt="text", level="info", stream=stream)
    for number in range(1000):
        log(logger, logging.INFO, "n", number=number)
        log(logger, logging.DEBUG, "hidden")
        if number == 500:
            writer.reconfigure("json", "info")
    writer.reconfigure("json", "debug")
    log(logger, logging.DEBUG, "shown")
    writer.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1001
    assert json.loads(lines[-1])["event"] == "shown"
    numbers = [int(re.findall(r'number"?[=:](\d+)', one)[0]) for one in lines[:-1]]
    assert numbers == list(range(1000))


def test_setup_again_replaces_the_writer() -> None:
    """Each line goes to one writer; the first one's are all written."""
    first, second = io.StringIO(), io.StringIO()
    setup(fmt="text", level="info", stream=first)
    log(logger, logging.INFO, "one")
    writer = setup(fmt="text", level="info", stream=second)
    log(logger, logging.INFO, "two")
    writer.close()
    writer.close()
    assert first.getvalue().endswith("INFO  one\n")
    assert second.getvalue().count("\n") == 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, Any]]:
    """A pipe whose reader may be slow: its descriptor, and the writer's stream."""
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream:
        yield reader, stream
    try:
        os.close(reader)
    except OSError:
        assert not os.path.exists(f"/proc/self/fd/{reader}")


def drain(reader: int, until: bytes) -> bytes:
    data = b""
    while until not in data:
        part = os.read(reader, 1 << 16)
        assert part, data[-200:]
        data += part
    return data


def test_a_blocked_reader_costs_lines_not_time(pipe: tuple[int, Any]) -> None:
    """When the queue is full, lines are dropped, counted, and that is told."""
    reader, stream = pipe
    writer = setup(fmt="text", level="info", stream=stream)
    started = time.monotonic()
    total = logs.CAPACITY + 5000
    for number in range(total):
        log(logger, logging.INFO, "n", number=number, filler="x" * 50)
    assert time.monotonic() - started < 10  # it would be for ever
    data, dropped, numbers = b"", 0, list[int]()
    while dropped + len(numbers) < total:
        data += os.read(reader, 1 << 20)
        whole = data[: data.rfind(b"\n") + 1]
        dropped = sum(map(int, re.findall(rb"log lines dropped lines=(\d+)", whole)))
        numbers = [int(n) for n in re.findall(rb"number=(\d+)", whole)]
    assert dropped + len(numbers) == total
    assert dropped > 0
    log(logger, logging.INFO, "after")
    drain(reader, b"INFO  after\n")
    assert numbers == sorted(set(numbers))
    writer.close()


def test_close_gives_up_on_a_blocked_reader(pipe: tuple[int, Any]) -> None:
    """close() takes about a second at most, and the thread ends."""
    _, stream = pipe
    writer = setup(fmt="text", level="info", stream=stream)
    for _ in range(5000):
        log(logger, logging.INFO, "n", filler="x" * 50)
    started = time.monotonic()
    writer.close()
    assert time.monotonic() - started < 3


def test_a_reader_that_has_gone(pipe: tuple[int, Any]) -> None:
    """EPIPE neither ends the process nor makes the thread spin."""
    reader, stream = pipe
    writer = setup(fmt="text", level="info", stream=stream)
    os.close(reader)
    for _ in range(100):
        log(logger, logging.INFO, "n")
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    log(logger, logging.INFO, "n")
    writer.close()


def test_lines_lost_to_a_failing_stream_are_told_when_it_works_again() -> None:
    """A full disk that is cleared gets the count."""

    class Disk(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    writer = setup(fmt="text", level="info", stream=disk)
    for _ in range(10):
        log(logger, logging.INFO, "lost")
    limit = time.monotonic() + 10
    while writer.lost < 10 and time.monotonic() < limit:
        time.sleep(0.01)
    disk.full = False
    log(logger, logging.INFO, "kept")
    writer.close()
    kept, dropped = disk.getvalue().splitlines()
    assert kept.endswith("INFO  kept")
    assert dropped.endswith("WARN  log lines dropped lines=10")


def test_a_stream_closed_by_its_owner(pipe: tuple[int, Any]) -> None:
    """The writer has a descriptor of its own: no other file gets the lines."""
    reader, stream = pipe
    writer = setup(fmt="text", level="info", stream=stream)
    stream.close()
    log(logger, logging.INFO, "still")
    assert drain(reader, b"INFO  still\n")
    writer.close()


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process started with descriptor 2 closed logs to nowhere."""
    monkeypatch.setattr(sys, "stderr", None)
    writer = setup(fmt="text", level="info")
    log(logger, logging.INFO, "unheard")
    writer.close()


def test_a_process_that_forgets_to_close_still_ends_and_writes() -> None:
    """At exit the queue is written; a blocked stderr does not keep the process."""
    script = (
        "import logging, sys; from volplugin.logs import *;"
        "setup(fmt='text', level='info');"
        "[log(logging.getLogger('volplugin'), 20, 'n', f='x' * 90) "
        "for _ in range(int(sys.argv[1]))]"
    )
    command = [sys.executable, "-c", script]
    few = subprocess.run([*command, "9"], capture_output=True, timeout=60, check=True)
    assert few.stderr.count(b"INFO  n") == 9
    with subprocess.Popen([*command, "5000"], stderr=subprocess.PIPE) as blocked:
        assert blocked.wait(60) == 0


def test_a_line_costs_the_caller_little() -> None:
    """Logging is under 15 µs of the event loop's time; a level that is off, under 1."""
    writer = setup(fmt="text", level="info", stream=io.StringIO())

    def cost(level: int) -> float:
        best = float("inf")
        for _ in range(20):
            started = time.thread_time()
            for _ in range(200):
                log(
                    logger, level, "call", volume="db", op="Mount", ms=1.2, outcome="ok"
                )
            best = min(best, (time.thread_time() - started) / 200)
        return best

    on, off = cost(logging.INFO), cost(logging.DEBUG)
    writer.close()
    assert on < 15e-6
    assert off < 1e-6
