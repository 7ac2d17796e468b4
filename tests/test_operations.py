"""The vocabulary: what is taken, what is refused, and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operations import events
from operations.errors import Conflict, HiveError, InvalidRequest, NotFound, from_envelope
from operations.names import resolve
from operations.operations import (
    ALIASES,
    Infer,
    WorkerSpawn,
    json_schema,
    known_operations,
    parse,
)
from operations.patterns import HIVE_ID, IN_WORDS

INFER = {"operation": "infer", "model": "hive-tiny", "prompt": "hello"}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_the_older_documents_spawn_is_taken_verbatim() -> None:
    operation = parse(
        b'{"operation":"worker_spawn","hive_id":"gpu-0","model":"llama-3.2-1b",'
        b'"worker":"cuda","device":0}'
    )
    assert isinstance(operation, WorkerSpawn)
    assert operation.device_ids() == ["cuda:0"]


def patterns_in(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(patterns_in, schema))
    if not isinstance(schema, dict):
        return set()
    found = {schema["pattern"]} if isinstance(schema.get("pattern"), str) else set()
    names = schema.get("patternProperties", {})
    return found.union(names, *map(patterns_in, schema.values()))


def test_every_pattern_of_an_operation_is_described_in_words() -> None:
    found = patterns_in(json_schema())
    assert HIVE_ID in found
    assert found <= IN_WORDS.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"operation": "engine_install", "engine": "vllm", "version": "latest"},
            "engine_install: field 'version': it must begin with a digit, such as '0.32.0', and "
            "have 64 characters at most.",
        ),
        (
            {**INFER, "temperature": 9},
            "infer: field 'temperature': it must be less than or equal to 2.",
        ),
        (
            {**INFER, "prompt": ""},
            "infer: field 'prompt': it must have at least 1 character.",
        ),
        (
            {"operation": "engine_models", "url": "http://a", "api_key": "se cret"},
            "engine_models: field 'api_key': it must have printable ASCII characters alone, and "
            "no spaces.",
        ),
    ],
)
def test_what_a_field_must_be_is_said_in_words_and_quotes_nothing(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(body(**fields))
    assert refused.value.message == message


def test_the_older_documents_infer_is_taken_verbatim() -> None:
    operation = parse(
        b'{"operation":"infer","model":"hive-tiny","prompt":"hello","max_tokens":20,"temperature":0}'
    )
    assert isinstance(operation, Infer)
    assert operation.stream
    assert operation.chat() == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("short", ALIASES)
def test_short_names_mean_the_long_ones(short: str) -> None:
    fields = {} if short == "worker_list" else {"pid": 1}
    assert parse(body(operation=short, **fields)).operation == ALIASES[short]


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"operation": "infer", "prompt": "x"}, "model"),
        ({**INFER, "colour": "red"}, "colour"),
        ({**INFER, "max_tokens": "20"}, "max_tokens"),
        ({**INFER, "max_tokens": True}, "max_tokens"),
        ({**INFER, "max_tokens": 0}, "max_tokens"),
        ({**INFER, "max_tokens": -1}, "max_tokens"),
        ({**INFER, "max_tokens": 10**30}, "max_tokens"),
        ({**INFER, "temperature": -0.1}, "temperature"),
        ({**INFER, "temperature": 1e308}, "temperature"),
        ({**INFER, "top_p": 0}, "top_p"),
        ({**INFER, "seed": -1}, "seed"),
        ({**INFER, "seed": 2**32}, "seed"),
        ({**INFER, "stop": []}, "stop"),
        ({**INFER, "stop": [""]}, "stop.0"),
        ({**INFER, "stream": "yes"}, "stream"),
        ({**INFER, "hive_id": "../x"}, "hive_id"),
        ({**INFER, "worker_id": "../x"}, "worker_id"),
        ({**INFER, "device": "cuda:-1"}, "device"),
        ({**INFER, "on_disconnect": "panic"}, "on_disconnect"),
        ({**INFER, "messages": [{"role": "user", "content": "x"}]}, None),
        ({"operation": "infer", "model": "m"}, None),
        ({"operation": "infer", "model": "m", "messages": []}, "messages"),
        ({"operation": "worker_spawn", "model": "m", "worker": "abacus"}, "worker"),
        ({"operation": "worker_spawn", "model": "m", "worker": "cpu", "device": -1}, "device"),
        ({"operation": "worker_process_get"}, None),
        ({"operation": "worker_process_get", "pid": 2**40}, "pid"),
        ({"operation": "model_get", "id": ""}, "id"),
        ({"operation": "hatch"}, "operation"),
        ({"operation": ["infer"]}, "operation"),
        ({"model": "m"}, "operation"),
    ],
)
def test_a_wrong_field_is_refused_by_name(wrong: dict[str, Any], param: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(json.dumps(wrong).encode())
    assert refused.value.param == param


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b'"infer"',
        b'{"operation":"infer"',
        b'{"operation":"infer","model":"m","prompt":"\xff"}',
        b'{"operation":"infer","model":"m","prompt":"x","temperature":NaN}',
        b'{"operation":"infer","model":"m","prompt":"x","temperature":Infinity}',
        b"[" * 100_000,
        b'{"operation":"infer","model":"m","messages":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw)


@given(st.binary(max_size=200))
def test_no_bytes_whatever_break_the_parser(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(
    st.sampled_from(known_operations()),
    st.dictionaries(
        st.sampled_from(sorted(Infer.model_fields) + sorted(WorkerSpawn.model_fields)),
        json_values,
        max_size=5,
    ),
)
def test_no_fields_whatever_break_the_parser(tag: str, fields: dict[str, Any]) -> None:
    try:
        operation = parse(json.dumps({**fields, "operation": tag}).encode())
    except InvalidRequest:
        return
    assert operation.operation == tag


def test_a_secret_in_a_wrong_field_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(body(operation="infer", model="m", prompt=["hunter2"], max_tokens="hunter2"))
    assert "hunter2" not in refused.value.message


def test_another_daemon_may_send_fields_of_a_newer_version() -> None:
    raw = json.dumps({**INFER, "from_the_future": 1}).encode()
    assert isinstance(parse(raw, from_daemon=True), Infer)
    with pytest.raises(InvalidRequest):
        parse(raw)


def test_the_schema_knows_every_operation() -> None:
    assert set(json_schema()["discriminator"]["mapping"]) == set(known_operations())


# -- names -----------------------------------------------------------------------------------

MODELS = [
    ("hive-tiny", "sha256:1"),
    ("Qwen/Qwen3-0.6B-GGUF:Q8_0", "sha256:2"),
    ("Qwen/Qwen3-0.6B-GGUF:Q4_K_M", "sha256:3"),
    ("meta-llama/Llama-3.2-1B", "sha256:4"),
    ("file:/models/parrot.gguf", "sha256:5"),
]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("hive-tiny", "sha256:1"),
        ("HIVE-TINY", "sha256:1"),
        ("qwen/qwen3-0.6b-gguf:q8_0", "sha256:2"),
        ("Qwen3-0.6B:Q4_K_M", "sha256:3"),
        ("llama-3.2-1b", "sha256:4"),
        ("parrot", "sha256:5"),
        ("parrot.gguf", "sha256:5"),
        ("sha256:4", "sha256:4"),
    ],
)
def test_a_model_is_found_under_each_of_its_names(name: str, digest: str) -> None:
    assert resolve(name, MODELS) == digest


def test_an_ambiguous_name_lists_the_candidates() -> None:
    with pytest.raises(Conflict) as refused:
        resolve("qwen3-0.6b", MODELS)
    assert "Qwen/Qwen3-0.6B-GGUF:Q8_0" in refused.value.message
    assert "Qwen/Qwen3-0.6B-GGUF:Q4_K_M" in refused.value.message


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(NotFound) as refused:
        resolve("gpt-5", MODELS)
    assert "hive-tiny" in refused.value.message


def test_one_model_under_two_names_is_not_ambiguous() -> None:
    twice = [("org/parrot:Q8_0", "sha256:9"), ("file:/models/parrot.gguf", "sha256:9")]
    assert resolve("parrot", twice) == "sha256:9"


# -- events and errors -----------------------------------------------------------------------


def test_every_kind_of_line_is_read_back() -> None:
    token = events.Token(t="a\nb", i=3)
    assert events.parse_line(token.line()) == token
    assert events.parse_line(events.info("a\nb")) == events.Line(type="info", text="a b")
    assert events.parse_line("[DONE]") == events.Line(type="done")
    assert events.parse_line(events.error("no")) == events.Line(type="error", text="no")
    assert events.parse_line('{"workers":[]}') == events.Result(value={"workers": []})
    assert events.parse_line("plain words") == events.Line(type="info", text="plain words")


def test_only_the_three_ends_are_terminal() -> None:
    assert [events.is_terminal(line) for line in ("[DONE]", "[CANCELLED]", "[ERROR] x")] == [
        True
    ] * 3
    assert not events.is_terminal("[INFO] [DONE]")


def test_an_error_keeps_its_class_and_words_over_the_wire() -> None:
    sent = NotFound("no such model", code="model_not_found", param="model")
    payload = {"error": sent.body("hive", "req-1").model_dump()}
    got = from_envelope(404, payload, hop="queen", where="here")
    assert isinstance(got, NotFound)
    assert (got.message, got.code, got.param, got.hop) == (
        "no such model",
        "model_not_found",
        "model",
        "hive",
    )


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ({"error": "boom"}, "worker w-1 answered 422: boom"),
        ({"detail": "Not Found"}, "worker w-1 answered 422: Not Found"),
        (
            {"detail": [{"loc": ["body", "n"], "msg": "too many", "input": "a prompt"}, 1]},
            "worker w-1 answered 422: body.n: too many",
        ),
        ({"detail": [{"msg": "too many"}]}, "worker w-1 answered 422: too many"),
        ({"detail": [5]}, "worker w-1 answered 422 without saying why; see its log."),
        ({"detail": {}}, "worker w-1 answered 422 without saying why; see its log."),
    ],
)
def test_what_an_engine_says_in_other_words_is_passed_on(payload: object, said: str) -> None:
    assert from_envelope(422, payload, hop="worker", where="worker w-1").message == said


@pytest.mark.parametrize("payload", [None, [], "x", {"error": 5}, {"error": "x"}, {"error": {}}])
def test_an_answer_that_is_no_envelope_still_becomes_an_error(payload: object) -> None:
    assert isinstance(from_envelope(502, payload, hop="hive", where="there"), HiveError)
