"""Hostile inputs, drawn by hypothesis, and the judgement of what a command made of one."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import Outcome, differences, snapshot
from hypothesis import strategies as st

LINES, CHARACTERS = 12, 4000
"""The longest that a command may take to say what is wrong."""

FOREIGN = ("notes.txt", ".notes.partial-mine.txt")


def judge(outcome: Outcome, folder: Path, before: dict, writes: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(kind, text) of everything that is wrong. writes: the paths that the command may change."""
    after, found = snapshot(folder, times=True), []
    output = "\n".join(line.rpartition("\r")[2] for line in outcome.output.splitlines())
    if outcome.hung:
        found.append(("hangs", f"not ended after {outcome.seconds:.0f} s: {output[-300:]}"))
    elif outcome.status not in (0, 2):
        found.append(("status", f"status {outcome.status}: {output[-1500:]}"))
    if "Traceback (most recent call last)" in output:
        found.append(("tracebacks", output[-1500:]))
    if "DISCOBETA_TRACEBACK=1" in output:
        found.append(("unforeseen", output[-700:]))
    if outcome.status == 2 and "discobeta: " not in output:
        found.append(("tracebacks", f"status 2, and no word of what is wrong: {output[-300:]}"))
    lines = [line for line in output.splitlines() if "%|" not in line]  # without progress bars
    if outcome.status == 2 and (len(lines) > LINES or len(output) > CHARACTERS):
        found.append(("too long", f"{len(lines)} lines, {len(output)} characters: {output[:300]} … {output[-300:]}"))
    changed = differences(before, after)
    lost = [line for line in changed if not line.endswith(": new")]
    lost = [line for line in lost if not line.startswith(writes or "\n") or line.partition(":")[0].endswith(FOREIGN)]
    if lost:
        found.append(("foreign files lost", f"{lost[:6]}; {output[-300:]}"))
    half = [line for line in changed if "partial-" in line or "before-" in line or ".running.json: new" in line]
    if half and not outcome.hung:
        found.append(("half-written", f"{half[:6]}; {output[-300:]}"))
    return found


# --- YAML

SCALARS = [
    "null", "true", "yes", "''", "'a'", "0", "-1", "1", "0.5", "1e-4", "1e400", "-1e400", ".nan", ".inf", "-.inf",
    "1e308",
    "9" * 400, "9" * 5000, "-" + "9" * 5000, "0x" + "f" * 4000, str(2**31), str(2**53 + 1), str(2**63), str(2**64),
    "1_000",
    "2024-01-01", "2024-01-01T00:00:00Z", "12:30:45", "!!int abc", "!!float x", "!!binary '@@'", "!!timestamp x",
    "!!set {a}",
    "!!omap [a: 1]", "!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!x y", "!!null x",
    "!!bool maybe", "[]",
    "{}", "[steps]", "[1, 2]", "[[[1]]]", "{a: b}", "{1: 2}", "{? [a] : b}", "{null: 1}", "[null]", "*a", "&a [*a]",
    "&a {b: *a}", "[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000, '"\\ud83d"', '"\\0"',
    '"\\x07\\e[31m"',
    "'" + "x" * 300 + "'", "'" + "x/" * 3000 + "'", "'" + "é" * 200 + "'", "/", ".", "..", "'~'", "''''",
    "'a,b,,c'", "','",
    "'%s{0}{}'", "'$\\nope{$'", "'\u202e\ufeff'", "'C:\\x'", "|\n  a\n  b", "'no such'", "data", "base",
    "base/config.json",
    "data/train.jsonl", "runs/dpo", "notes.txt", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd",
    "hub/name", "a/b/c",
]  # fmt: skip
BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))
values = st.one_of(
    st.sampled_from(SCALARS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=20).map(json.dumps),
    st.text(max_size=20),
    st.recursive(st.integers() | st.text(max_size=4), lambda part: st.lists(part, max_size=3), max_leaves=6).map(
        json.dumps
    ),
)


def near(name: str) -> st.SearchStrategy[str]:
    """The name, or one like it."""
    changed = st.sampled_from(
        [name + "s", name[:-1], name.upper(), f" {name}", f"'{name}\\0'", name * 30, f"{name}: {name}"]
    )
    return st.sampled_from([name] * 6) | changed


def bytes_of(text: str) -> st.SearchStrategy[bytes]:
    """The text as a file, mostly as it should be."""
    plain = text.encode(errors="surrogatepass")
    odd = [
        b"\xef\xbb\xbf" + plain, text.encode("utf-16", "surrogatepass"), plain + b"\xff\xfe", plain + b"\0", b"",
    b"\0" * 99,
        plain.replace(b"\n", b"\r\n"), plain.replace(b"\n", b"\r"), plain + plain, plain * 900,
    b"%YAML 9.9\n---\n" + plain,
        plain + b"---\n" + plain, b"\t" + plain, plain + BOMB.encode(), b"- a\n- b\n", b"5", b"null", b"{",
    b"<<: *x\n",
        b"<<: 5\n" + plain, b"<<: {seed: 3}\n" + plain, b"? " * 4000, plain[: len(plain) // 2],
    b"a: &a\n  <<: *a\n" + plain,
    ]  # fmt: skip
    return st.sampled_from([plain] * 60 + odd)


def yaml_with(lines: dict[str, str], keys: list[str]) -> st.SearchStrategy[bytes]:
    """The settings, of which up to three are hostile."""
    changes = st.lists(st.tuples(st.sampled_from(keys).flatmap(near), values), min_size=1, max_size=3)
    return changes.flatmap(
        lambda pairs: bytes_of("".join(f"{name}: {value}\n" for name, value in (lines | dict(pairs)).items()))
    )


# --- damage to a file


@dataclass(frozen=True)
class Damage:
    kind: str
    where: float = 0.0
    content: bytes = b""

    def do(self, path: Path, other: Path | None = None) -> bool:
        """Do it to a file. False if that changes nothing. other: a file of the same name, of something else."""
        content = path.read_bytes()
        if self.kind == "delete":
            path.unlink()
        elif self.kind == "directory":
            path.unlink()
            path.mkdir()
        elif self.kind == "dangling":
            path.unlink()
            path.symlink_to("nowhere")
        elif self.kind == "swap":
            if other is None or not other.is_file():
                return False
            shutil.copyfile(other, path)
        else:
            path.write_bytes(self.changed(content))
        return not path.is_file() or path.read_bytes() != content

    def changed(self, content: bytes) -> bytes:
        place = int(self.where * len(content))
        if self.kind == "flip" and content:
            return content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        if self.kind == "cut":
            return content[:place]
        if self.kind == "cut lines":
            lines = content.splitlines(keepends=True)
            return b"".join(lines[: int(self.where * len(lines))])
        if self.kind == "insert":
            return content[:place] + self.content + content[place:]
        if self.kind == "replace":
            return self.content
        return content


ODD_JSON = [
    b"", b"null", b"5", b"[]", b"{}", b'"x"', b"[[]]", b"NaN", b"-Infinity", b"[" * 9999, b"9" * 5000,
    b'{"a": ' * 3000,
    b'{"a": NaN}', b"\xff\xfe", b"\0\0\0\0", b'{"files": 5}', b'{"files": {}}', b'{"seal": null}', b'{"parts": [5]}',
    b'{"id": 5}', b'{"pid": "x"}', b'{"id": "x", "pid": 0, "host": "x"}', b'{"model_type": 5}',
    b'{"model_type": "bert"}',
    b'{"a": "\\ud83d"}', b"true", b'{"seal": "x", "files": []}',
]  # fmt: skip
places = st.floats(0, 1, exclude_max=True)
damages = st.one_of(
    st.builds(Damage, st.sampled_from(["flip", "flip", "cut", "cut lines"]), places),
    st.builds(Damage, st.just("insert"), places, st.sampled_from([b"\0", b" ", b"\n", b"\xff", b"x", b"7", b"{"])),
    st.builds(Damage, st.just("replace"), st.just(0.0), st.sampled_from(ODD_JSON)),
    st.builds(Damage, st.sampled_from(["delete", "swap", "swap", "directory", "dangling"])),
)


def damage_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def damage_tensors(path: Path, kind: str, where: float) -> None:
    """Whole and well-formed weights, of another model than it says."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = sorted(tensors)[int(where * len(tensors))]
    weight = tensors[name]
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["model.layers.9.mlp.up_proj.weight"] = weight.clone()
    elif kind == "renamed":
        tensors[name + "x"] = tensors.pop(name)
    elif kind == "nan":
        tensors[name] = torch.full_like(weight, torch.nan)
    elif kind == "inf":
        tensors[name] = torch.full_like(weight, torch.inf)
    elif kind == "shape":
        tensors[name] = weight[..., :-1].contiguous()
    elif kind == "integers":
        tensors[name] = weight.int()
    elif kind == "doubles":
        tensors[name] = weight.double()
    save_file(tensors, path, metadata={"format": "pt"})


TENSORS = ("missing", "extra", "renamed", "nan", "inf", "shape", "integers", "doubles")


# --- rows

ODD_VALUES = [
    None, True, 0, -1.5, float("nan"), 10**400, "", " ", "\0", "\ud83d", "x" * 100_000, "\n\nHuman: a",
    "\n\nAssistant:", [], {},
    [[]], [None], {"a": 1}, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}],
    [{"role": 5}],
    [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"from": "human"}],
    [{"from": "human", "value": "a"}], "\u202e", "é" * 9, "<eos>", "{{ 7 * 7 }}", [1, "a"], ["a", "b"],
    {"role": "user"},
]  # fmt: skip
texts = st.sampled_from(
    ["red", "red green", "one .", "two ?", "blue blue", " one", "one two three four five six . ? ."]
)
odd = st.sampled_from(ODD_VALUES) | st.text(max_size=8) | st.floats() | st.integers()
TRUTH = st.dictionaries(
    st.sampled_from(
        [
            "topic",
            "noise",
            "familiarity",
            "chosen_reward",
            "chosen_sigma",
            "rejected_sigma",
            "probability",
            "nll",
            "row",
        ]
    ),
    odd | st.floats(0, 1) | texts,
    max_size=4,
)


def _chat(strategy):
    return st.builds(lambda text: [{"role": "user", "content": text}], strategy)


def _turns(strategy):
    return st.lists(
        st.builds(lambda text, who: {"from": who, "value": text}, strategy, st.sampled_from(["human", "gpt"]))
    )


ROWS = {
    "standard": {"prompt": texts, "chosen": texts, "rejected": texts, "truth": TRUTH},
    "conversational": {"prompt": _chat(texts), "chosen": _chat(texts), "rejected": _chat(texts)},
    "implicit": {"chosen": _chat(texts), "rejected": _chat(texts)},
    "alpaca": {"instruction": texts, "input": texts, "chosen": texts, "rejected": texts, "system": texts},
    "sharegpt": {"conversations": _turns(texts), "chosen": texts, "rejected": texts},
    "hh": {
        name: st.builds(lambda a, b: f"\n\nHuman: {a}\n\nAssistant: {b}", st.just("red"), texts)
        for name in ("chosen", "rejected")
    },
}


def rows_of(form: str) -> st.SearchStrategy[list]:
    """Rows of a format of which some fields are odd, missing or unknown, and some rows no rows."""
    fields = ROWS[form]
    whole = st.fixed_dictionaries(fields)
    broken = st.builds(
        lambda row, more: row | more, whole, st.dictionaries(st.sampled_from([*fields, "x", ""]), odd, max_size=2)
    )
    partial = st.fixed_dictionaries({}, optional=fields)
    return st.lists(whole | whole | broken | partial | odd, min_size=1, max_size=12)


def write_rows(path: Path, rows: list) -> None:
    """As .json, .jsonl or either .gz."""
    text = json.dumps(rows) if ".jsonl" not in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode(errors="surrogatepass")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def write_parquet(path: Path, rows: list) -> None:
    """As .parquet, if such rows can be."""
    import pandas

    try:
        pandas.DataFrame([row if isinstance(row, dict) else {"value": row} for row in rows]).to_parquet(path)
    except Exception:
        path.write_bytes(b"PAR1" + os.fsencode(str(len(rows))) + b"PAR1")
