"""Names to files and hub datasets; broken rows cost themselves, broken files say so."""

from __future__ import annotations

import errno
import gzip
import json
import os
import time

import pytest

from discobeta.data.sources import read_examples
from discobeta.design.config import RunConfig
from discobeta.errors import UserError

PAIR = {"prompt": "hi", "chosen": "a", "rejected": "b"}
LINE = json.dumps(PAIR).encode()


@pytest.fixture
def read(tmp_path):
    """read(names, kind=..., **config): examples and report, with tmp_path as dataset_dir."""

    def go(names, kind="pairs", split="train", **changes):
        settings = {"stage": "rm", "model_name_or_path": "m", "dataset_dir": str(tmp_path), "max_unusable_rows": 1}
        return read_examples(names, RunConfig.from_mapping(settings | changes)[0], split=split, kind=kind)

    return go


def sources(examples):
    return [example.source for example in examples]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_broken_lines_cost_only_themselves(read, tmp_path, name):
    lines = [
        b"\xef\xbb\xbf" + LINE,
        b"",
        b'{"prompt": "h\xff"}',
        b"{broken",
        b"[1]",
        b"[" * 100_000,
        b'{"prompt": "hi"}',
        LINE,
    ]
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(b"\n".join(lines)))
    examples, report = read(name)
    assert sources(examples) == [f"{name}:1", f"{name}:8"]
    assert report.total == 7 and report.usable == 2
    assert report.reasons == {"not UTF-8": 1, "not JSON": 2, "wrong types": 1, "missing column: chosen": 1}
    assert report.first["not JSON"] == [f"{name}:4", f"{name}:6"]


def test_the_first_line_of_a_jsonl_file_may_be_the_broken_one(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[1]\n" + LINE)
    assert read("a.jsonl")[1].first == {"wrong types": ["a.jsonl:1"]}


def test_array_rows_know_their_line(read, tmp_path):
    text = b'\n[\n %s,\n\n %s , 3,\n {"prompt": "h\xff", "chosen": "a", "rejected": "b"}]\n' % (LINE, LINE)
    (tmp_path / "a.json").write_bytes(text)
    examples, report = read("a.json")
    assert sources(examples) == ["a.json:3", "a.json:5"]
    assert report.first == {"wrong types": ["a.json:5"], "not UTF-8": ["a.json:6"]}


@pytest.mark.parametrize("text", [b"[%s,\n", b"[%s\n", b"[%s,\n{broken}]", b"[%s]\n[1]", b"[%s %s]", b"["])
def test_a_broken_array_is_refused(read, tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.replace(b"%s", LINE))
    with pytest.raises(UserError, match="a.json is not valid JSON after line [12]"):
        read("a.json")


def test_parquet(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array([b"a", b"\xff", b"c"], pa.binary()).buffers()[1:]])
    columns = {"prompt": ["hi", "ho", "he"], "chosen": bad, "rejected": ["b", "b", None], "truth": [{"noise": 0.5}] * 3}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    examples, report = read("a.parquet")
    assert sources(examples) == ["a.parquet:1"] and examples[0].truth == {"noise": 0.5}
    assert report.first == {"not UTF-8": ["a.parquet:2"], "wrong types: rejected": ["a.parquet:3"]}
    (tmp_path / "b.parquet").write_bytes(LINE)
    with pytest.raises(UserError, match="b.parquet is not a readable parquet file"):
        read("b.parquet")


@pytest.mark.parametrize("content", [LINE, gzip.compress(LINE * 999, mtime=0)[:-20]])
def test_a_broken_gzip_file_is_refused(read, tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match="a.jsonl.gz is not a whole gzip file"):
        read("a.jsonl.gz")


def test_rows_that_python_would_read_as_something_else(read, tmp_path):
    """A key that stands twice, and integers of 5,000 digits, which Python refuses to read."""
    start, long = LINE[:-1].decode(), "9" * 5000
    lines = [
        f'{start}, "prompt": "ho"}}',
        f'{start}, "truth": {{"noise": 1, "noise": 2}}}}',
        f'{start}, "other": {{"a": 1, "a": 2}}, "id": {long}}}',  # what nobody reads may be as it likes
        f'{start}, "truth": {{"id": {long}}}}}',
        f'{start}, "truth": {{"id": 1e999}}}}',
        f'{{"prompt": {long}, "chosen": "a", "rejected": "b"}}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text("[" + ",\n".join(lines) + "]")
    for name in ("a.jsonl", "a.json"):
        examples, report = read(name)
        assert sources(examples) == [f"{name}:3"] and examples[0].prompt == "hi"
        assert report.first == {
            "a key stands twice": [f"{name}:1", f"{name}:2"],
            "truth that cannot be kept: 'id'": [f"{name}:4", f"{name}:5"],
            "wrong types: prompt": [f"{name}:6"],
        }


NESTED = b"[" * 3000


@pytest.mark.parametrize(
    "line",
    [
        b"[", b"{", b"null", b"NaN", b"true", b"5", b'"text"', b"\0\0", b"[[]]", NESTED, b'{"a":' * 3000, b"9" * 5000,
        b'{"prompt": ' + NESTED, LINE + LINE, LINE.decode().encode("utf-16"), b"\xff\xfe", b'"\\ud83d"',
        b'{"\\ud83d": 1}', b"{}", b'{"prompt": {"chosen": []}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz"])
def test_a_hostile_line_costs_itself(read, tmp_path, line, ending):
    content = LINE + b"\n" + line + b"\n" + LINE
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    examples, report = read(f"a{ending}")
    assert examples[0].source == f"a{ending}:1" and examples[-1].prompt == "hi" and len(examples) == 2
    assert report.total - report.usable >= 1


def test_what_parquet_holds_and_python_cannot_costs_nothing_where_nobody_reads_it(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"a", b"\xff"], pa.binary()).buffers()[1:]])
    twice = pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["a", "a"])
    odd = {
        "time": pa.array([1, 2**62], pa.timestamp("us")), "zone": pa.array([1, 2], pa.timestamp("ns", "No/Where")),
        "day": pa.array([1, 3_000_000], pa.date32()), "text": bad, "twice": twice,
        "bytes": pa.array([b"a", b"\xff"]), "span": pa.array([1, 2**62], pa.duration("s")),
    }  # fmt: skip
    good = {"prompt": ["hi", "hi"], "chosen": ["a", "a"], "rejected": ["b", "b"]}
    pq.write_table(pa.table(good | odd), tmp_path / "unused.parquet")
    assert len(read("unused.parquet")[0]) == 2


def test_a_parquet_cell_that_cannot_be_read_costs_the_row_where_it_is_read(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"a", b"\xff"], pa.binary()).buffers()[1:]])
    asked = {"instruction": ["hi", "hi"], "chosen": ["a", "a"], "rejected": ["b", "b"]}
    for system, reason in (
        (pa.array([None, 2**62], pa.timestamp("us")), "a value that cannot be read"),
        (pa.array([None, b"\xff"]), "wrong types: system"),
        (bad, "not UTF-8"),
    ):
        pq.write_table(pa.table(asked | {"system": system}), tmp_path / "a.parquet")
        examples, report = read("a.parquet")
        assert sources(examples) == ["a.parquet:1"] and report.first == {reason: ["a.parquet:2"]}


def test_a_parquet_file_with_a_column_twice_is_refused(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"^.*a.parquet has two columns 'prompt'$"):
        read("a.parquet")


def test_a_damaged_parquet_file_is_one_line_or_its_rows(read, tmp_path):
    import random

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: ["x", "y"] for name in PAIR} | {"rejected": ["b", "c"]}), tmp_path / "a.parquet")
    content, rng = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "a.parquet").write_bytes(damaged[: rng.choice([None, rng.randrange(len(content))])])
        try:
            read("a.parquet")
        except UserError as error:
            refused += 1
            assert str(error).startswith("a.parquet ") or str(tmp_path) in str(error)
    assert refused > 100


@pytest.mark.parametrize("name", ["nll", "row", "source", "reward_chosen", "oracle_probability", "response"])
def test_truth_may_not_be_called_what_the_evaluation_calls_its_own(read, tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | {"truth": {name: 1}}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.jsonl: truth: '{name}' is the name of a column that the eval"):
        read("a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | {"truth": {"probability": 1, name: None}}))
    assert read("a.jsonl")[0][0].truth == {"probability": 1}


@pytest.mark.parametrize("name", ["", " ", "a\n", "\0", "a" * 201])
def test_truth_needs_names(read, tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIR | {"truth": {name: 1}}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.jsonl: truth: .* is no name for a column: rename it$"):
        read("a.jsonl")


def test_names_are_concatenated_and_max_samples_counts_per_dataset(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINE, b"broken", LINE]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([LINE] * 3))
    examples, report = read("a.jsonl, b.jsonl", max_samples=2)
    assert sources(examples) == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert (report.total, report.usable) == (4, 3)


def test_a_path_may_be_absolute_or_relative_to_the_working_directory(read, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(read(str(tmp_path / "a.jsonl"), dataset_dir="elsewhere")[0]) == 1
    assert len(read("./a.jsonl", dataset_dir="elsewhere")[0]) == 1


def test_too_many_unusable_rows_are_refused_with_reasons(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINE] * 3 + [b"broken"]))
    assert len(read("a.jsonl", max_unusable_rows=0.25)[0]) == 3
    with pytest.raises(UserError, match=r"1 of 4 rows are unusable, .*0.2 allows:\n  not JSON: 1 \(a.jsonl:4\)"):
        read("a.jsonl", max_unusable_rows=0.2)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "has no rows"), (b"3\nx", r"none of the 2 rows .*\n.*not JSON: 1")]
)
def test_zero_usable_rows_are_refused(read, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(LINE)
    with pytest.raises(UserError, match=f"a.jsonl.*{message}"):
        read("b.jsonl,a.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "start"),
    [
        ("a.jsonl", b"prompt,chosen,rejected\r\nhi,a,b\r\n", "'prompt,chosen,rejected\\r\\nhi,a,b\\r\\n'"),
        ("a.json", b"<!doctype html>\n<html></html>", "'<!doctype html>\\n<html></html>'"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "'version https://git-lfs"),
        ("a.jsonl", b"{'prompt': 'hi', 'chosen': 'a'}\n", "\"{'prompt': 'hi'"),
        ("a.json", b'{\n "prompt": "hi",\n "chosen": "a"\n}\n', '\'{\\n "prompt": "hi"'),
        ("a.json", json.dumps([{"prompt": "hi"}]).encode("utf-16"), "'\ufffd\ufffd[\\x00{"),
        ("a.jsonl", b"PAR1\x15\x04", "'PAR1\\x15\\x04'"),
        ("a.jsonl.gz", gzip.compress(gzip.compress(LINE, mtime=0), mtime=0), "'\\x1f\ufffd"),
    ],
)
def test_a_file_that_is_no_json_is_said_to_be_none_and_how_it_begins(read, tmp_path, name, content, start):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(name)
    where, _, begins = str(caught.value).partition(
        " is neither one JSON array nor JSON objects, one a line: it begins "
    )
    assert where == str(tmp_path / name) and begins.startswith(start)


def test_report_lines(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([LINE, *[b"broken"] * 4, b"[]"]))
    report = read("a.jsonl")[1]
    assert report.lines() == [
        "a.jsonl: 1 of 6 rows are usable",
        "  not JSON: 4 (a.jsonl:2, a.jsonl:3, a.jsonl:4, …)",
        "  wrong types: 1 (a.jsonl:6)",
    ]


def test_entries_of_dataset_info_and_datasets_yaml(read, tmp_path):
    human, gpt, bad = ({"from": role, "value": text} for role, text in (("human", "hi"), ("gpt", "a"), ("gpt", "b")))
    (tmp_path / "a.json").write_text(json.dumps([{"turns": [human], "chosen": gpt, "rejected": bad}] * 3))
    columns = {"messages": "turns", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "a.json", "ranking": True, "formatting": "sharegpt", "columns": columns, "num_samples": 2}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"one": entry}))
    (tmp_path / "datasets.yaml").write_text(
        "two: {file_name: a.json, formatting: sharegpt, columns: {messages: turns, chosen: chosen, rejected: rejected}}"
    )
    assert len(read("one")[0]) == 2
    assert len(read("two")[0]) == 3
    assert read("one")[0][0].prompt == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "hh_rlhf_en"}, "use dataset: Anthropic/hh-rlhf"),
        ({"file_name": "gone.json"}, "no such file: .*gone.json"),
        ({"file": "a.json"}, "'file' is not supported; known: file_name"),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, "'promt' is not supported; known: prompt"),
        ({"file_name": "a.json", "columns": {"label": "x"}}, "'label' is not supported"),
        ({"file_name": "a.json", "formatting": "chatml"}, "should be alpaca, sharegpt or openai"),
        ({"file_name": "a.json", "num_samples": "all"}, "num_samples"),
        ({"file_name": 3}, "file_name: 3 should be text"),
        ({"file_name": "a.json", "columns": {"prompt": ["x"]}}, r"columns: prompt: \['x'\] should be text"),
        ({"file_name": "a.json", "tags": "gpt"}, "tags must be a mapping"),
        ({}, "needs file_name or hf_hub_url"),
        ({"file_name": "a.json", "num_samples": True}, "num_samples: True should be a whole number"),
        ({"file_name": "a.json", "num_samples": 1.5}, "num_samples: 1.5 should be a whole number"),
        ({"file_name": "a.json", "columns": {"prompt": "\ud83d"}}, "columns: prompt: .* should be text"),
        ({"file_name": "a.json", "formatting": ["alpaca"]}, "formatting: .* should be alpaca, sharegpt or openai"),
        ({"hf_hub_url": ".."}, "hf_hub_url: '..' is no hub id"),
        ({"hf_hub_url": "/etc"}, "hf_hub_url: '/etc' is no hub id"),
        ({"hf_hub_url": "https://huggingface.co/a/b"}, "is no hub id"),
        ({"hf_hub_url": "src"}, "hf_hub_url: src is here too"),
        (None, "must be a mapping"),
        (5, "must be a mapping"),
        ("a.json", "must be a mapping"),
    ],
)
def test_wrong_entries(read, tmp_path, entry, message, monkeypatch):
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(UserError, match=message):
        read("mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.jsonl", "no such file: gone.jsonl or .*/gone.jsonl"),
        ("/data/gone", "no such file: /data/gone"),
        ("folder", "is a directory"),
        ("mime", "did you mean the entry 'mine'"),
        ("table.csv", "unknown kind of file"),
        (" , ", "or names none"),
        ("https://example.com/a.jsonl", "https://example.com/a.jsonl is an address: download the file"),
        ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl is an address"),
        ("rows/*.jsonl", r"no such file: rows/\*.jsonl or [^\n]*; patterns are not expanded: name the files"),
        ("a\nb.jsonl", r"^dataset: no such file: 'a\\nb.jsonl'$"),
        ("\x1b[31mred.jsonl", r"^dataset: no such file: '\\x1b\[31mred.jsonl'$"),
    ],
)
def test_wrong_names(read, tmp_path, name, message):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.json"}}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=message):
        read(name)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
@pytest.mark.parametrize("place", ["name", "entry", "dataset_info.json", "datasets.yaml"])
def test_only_regular_files_are_read(read, tmp_path, kind, place):
    """A pipe would be waited for, and a device has no end."""
    path = tmp_path / ("a.jsonl" if place in ("name", "entry") else place)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if place == "entry":
        (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.jsonl"}}))
    (tmp_path / "b.jsonl").write_bytes(LINE)
    asked = {"name": "a.jsonl", "entry": "mine"}.get(place, "b.jsonl")
    with pytest.raises(UserError, match="is not a regular file|is a directory"):
        read(asked)


@pytest.mark.parametrize(
    "name", ["a" * 300 + ".jsonl", "a" * 300, "a/" * 3000 + "b.jsonl", "/dev/null/a.jsonl", "loop.jsonl"]
)
def test_names_that_no_file_can_have_are_one_line(read, tmp_path, name):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(UserError) as caught:
        read(name)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": name}}))
    with pytest.raises(UserError) as again:
        read("mine")
    for message in map(str, (caught.value, again.value)):
        assert len(message.splitlines()) == 1 and ("no such file" in message or "cannot read" in message), message


def test_a_file_that_may_not_be_read_is_one_line(read, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINE)

    def refuse(*words, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.jsonl"))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"^cannot read .*a.jsonl: Permission denied"):
        read("a.jsonl")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"5", b"{", NESTED, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe"]
)
def test_a_broken_dataset_info_is_one_line(read, tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^[^\n]*dataset_info.json [^\n]*$"):
        read("a.jsonl")


def test_a_broken_dataset_info_says_where(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "dataset_info.json").write_text('{\n  "mine": {"file_name": "a.jsonl"},\n}\n')
    with pytest.raises(UserError, match=r"dataset_info.json is not valid JSON: [^\n]* line [23] column"):
        read("mine")


def test_an_entry_of_kto_rows_gives_prompts(read, tmp_path):
    """As in llamafactory's dataset_info.json; the tag is about the answer."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}], "label": True}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"kto_en_demo": entry | {"tags": tags}}))
    (example,) = read("kto_en_demo", kind="prompts")[0]
    assert example.prompt == [{"role": "user", "content": "hi"}]


def test_a_dataset_info_may_begin_with_a_byte_order_mark(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "dataset_info.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"mine": {"file_name": "a.jsonl"}}).encode()
    )
    assert len(read("mine")[0]) == 1


def test_more_rows_than_a_machine_can_count_are_all_rows(read, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.jsonl", "num_samples": 10**30}}))
    assert len(read("mine")[0]) == 1


def test_a_hub_id_offline_fails_fast(read):
    import datasets  # noqa: F401  (its import is not what is timed)

    start = time.monotonic()
    with pytest.raises(UserError, match="nobody/nothing.*cannot be loaded from the hub or its cache"):
        read("nobody/nothing")
    assert time.monotonic() - start < 5


def test_a_dataset_dir_without_entries_is_named(read, tmp_path):
    with pytest.raises(UserError) as caught:
        read("dpo_en_demo")
    says = f"is no local file, no entry ({tmp_path} has no dataset_info.json or datasets.yaml), and cannot be loaded"
    assert says in str(caught.value)


def test_hub_datasets_take_subset_split_and_limit(read, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, data_dir, split, cache_dir):
        asked.append((name, subset, data_dir, split))
        return datasets.Dataset.from_list([PAIR] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (tmp_path / "datasets.yaml").write_text(
        "mine: {hf_hub_url: me/pairs, subset: en, folder: helpful, split: train_prefs, num_samples: 2}"
    )
    assert sources(read("me/pairs", split="test")[0]) == ["me/pairs:0", "me/pairs:1", "me/pairs:2"]
    assert sources(read("mine", split="test")[0]) == ["me/pairs:0", "me/pairs:1"]
    assert asked == [("me/pairs", None, None, "test"), ("me/pairs", "en", "helpful", "train_prefs")]


def test_what_a_hub_dataset_holds_and_python_cannot_costs_nothing_where_nobody_reads_it(read, monkeypatch):
    import datasets
    import pyarrow as pa

    late = pa.array([0, 2**62], pa.timestamp("us"))  # in the year 148,000
    table = pa.table({"prompt": ["hi", "ho"], "chosen": ["a", "a"], "rejected": ["b", "b"], "made": late})
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: datasets.Dataset(table))
    examples, report = read("me/pairs")
    assert [example.prompt for example in examples] == ["hi", "ho"] and report.usable == 2
    truth = pa.StructArray.from_arrays([late], ["made"])
    table = table.append_column("truth", truth)
    with pytest.raises(UserError, match="none of the 2 rows") as caught:
        read("me/pairs")
    assert "a value that cannot be read: 1 (me/pairs:1)" in str(caught.value)


def test_the_shipped_entries_can_be_resolved():
    from pathlib import Path

    from discobeta.data.sources import resolve

    folder = Path(__file__).parents[1] / "config"
    config = RunConfig.from_mapping({"stage": "rm", "model_name_or_path": "m", "dataset_dir": str(folder)})[0]
    assert [(source.hub, source.split) for source in resolve("hh_rlhf,ultrafeedback_binarized", config, "test")] == [
        ("Anthropic/hh-rlhf", "test"),
        ("trl-lib/ultrafeedback_binarized", "test"),
    ]


ROW = '{"prompt": "hi", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    "text", [f"[{ROW}, {ROW}]", f"[\n {ROW},\n {ROW}\n]\n", f"[{ROW},\n{ROW}]", f"[\n{{}},{ROW},{ROW}]"]
)
def test_a_jsonl_file_that_is_one_array_is_read_as_one(read, tmp_path, text):
    (tmp_path / "a.jsonl").write_text("\ufeff" + text)
    examples, report = read("a.jsonl")
    assert len(examples) == 2 and report.total == 2 + text.count("{}")


@pytest.mark.parametrize("line", ["[{}]", "[{broken", '[{"a": 1},', "[[{}]]"])
def test_a_first_line_that_is_a_list_does_not_make_lines_an_array(read, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{line}\n{ROW}\n{ROW}\n")
    assert sources(read("a.jsonl")[0]) == ["a.jsonl:2", "a.jsonl:3"]


def test_entries_may_hold_a_checksum_that_nobody_checks(read, tmp_path):
    (tmp_path / "a.jsonl").write_text(ROW)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "a.jsonl", "file_sha1": "0" * 40}}))
    assert len(read("mine")[0]) == 1


def test_columns_that_an_entry_leaves_out_are_named(read, tmp_path):
    rows = [{"instruction": "hi", "input": "there", "system": "s", "chosen": "a", "rejected": "b"}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entry = {"file_name": "a.json", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    examples, report = read("mine")
    assert examples[0].prompt == [{"role": "user", "content": "hi"}]
    assert report.lines() == [
        "mine: 2 of 2 rows are usable",
        "  not read: input, system (not named by the dataset's entry in its `columns`)",
    ]


def test_reasons_of_many_kinds_stay_few(read, tmp_path):
    """Each row another unknown role: the first few are named."""
    rows = [{"prompt": [{"role": f"role {i}", "content": "hi"}], "chosen": "a", "rejected": "b"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, PAIR])))
    reasons = read("a.jsonl")[1].reasons
    assert reasons["unknown role: 'role 0' in prompt"] == 1 and reasons["unknown role"] == 22
    assert len(reasons) == 9 and sum(reasons.values()) == 30
