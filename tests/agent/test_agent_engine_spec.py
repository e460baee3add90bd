"""Engines as the operator writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from node_agent.engine_spec import EngineSpec, SpecError, all_from, from_mapping, parse


def test_url_alone_is_enough() -> None:
    assert parse("http://127.0.0.1:8000") == EngineSpec(
        url="http://127.0.0.1:8000", id="127.0.0.1:8000", kind="auto", advertise="http://127.0.0.1:8000", gpus=None
    )


def test_every_option() -> None:
    spec = parse(
        "http://127.0.0.1:8000/,id=a100-0,kind=vllm,advertise=http://10.0.0.7:8000,gpus=0+1,metrics=http://h:9/metrics"
    )
    assert spec == EngineSpec(
        url="http://127.0.0.1:8000",
        id="a100-0",
        kind="vllm",
        advertise="http://10.0.0.7:8000",
        gpus=("0", "1"),
        metrics="http://h:9/metrics",
    )


def test_id_is_taken_from_the_address_that_the_balancer_knows() -> None:
    assert parse("http://127.0.0.1:8000,advertise=http://10.0.0.7:8000").id == "10.0.0.7:8000"


def test_gpus_by_uuid() -> None:
    assert parse("http://h:1,gpus=GPU-1-2+GPU-3-4").gpus == ("GPU-1-2", "GPU-3-4")


@pytest.mark.parametrize(("name", "kind"), [("llama.cpp", "llamacpp"), ("trt-llm", "trtllm"), ("auto", "auto")])
def test_kind_by_its_common_names(name: str, kind: str) -> None:
    assert parse(f"http://h:1,kind={name}").kind == kind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must look like http://HOST:PORT"),
        ("foo", "must look like http://HOST:PORT"),
        ("127.0.0.1:8000", "must look like http://HOST:PORT"),
        ("ftp://h:1", "must look like http://HOST:PORT"),
        ("http://h:99999", "must look like http://HOST:PORT"),
        ("http://user:secret@h:1", "may carry no user"),
        ("http://h:1?x=1", "may carry no user, query or fragment"),
        ("http://h:1,ID=a", "unknown option 'ID'"),
        ("http://h:1,gpu=0", "unknown option 'gpu'; did you mean 'gpus'?"),
        ("http://h:1,id", "'id' is not NAME=VALUE"),
        ("http://h:1,id=", "'id=' is not NAME=VALUE"),
        ("http://h:1,id=a,id=b", "'id' is given twice"),
        ("http://h:1,kind=vlm", "unknown kind 'vlm'; known: auto, vllm"),
        ("http://h:1,gpus=a", "gpus takes indices or UUIDs"),
        ("http://h:1,gpus=0,1", "'1' is not NAME=VALUE"),
        ("http://h:1,advertise=h", "advertise must look like http://HOST:PORT"),
        ("http://h:1,api_key=x", "unknown option 'api_key'"),  # no secrets on a command line
    ],
)
def test_spec_that_cannot_be_used_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text)
    assert says in str(error.value)
    assert "secret" not in str(error.value)


def test_two_engines_of_one_id_are_refused() -> None:
    with pytest.raises(SpecError, match="two engines have the id 'a'"):
        all_from(["http://h:1,id=a", "http://h:2,id=a"])


def test_engines_as_text_list_and_mappings() -> None:
    expected = ["a", "b"]
    assert [one.id for one in all_from("http://h:1,id=a http://h:2,id=b")] == expected
    assert [one.id for one in all_from(["http://h:1,id=a", {"url": "http://h:2", "id": "b"}])] == expected
    with pytest.raises(SpecError, match="neither a SPEC nor a mapping"):
        all_from([3])


def test_mapping_takes_indices_as_numbers() -> None:
    assert from_mapping({"url": "http://h:1", "gpus": [0, 1]}).gpus == ("0", "1")
    assert from_mapping({"url": "http://h:1", "gpus": 0}).gpus == ("0",)


def test_unknown_name_in_a_mapping_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown option 'advertize'; did you mean 'advertise'"):
        from_mapping({"url": "http://h:1", "advertize": "http://h:2"})


def test_api_key_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    spec = from_mapping({"url": "http://h:1", "api_key_file": str(tmp_path / "key")})
    assert spec.api_key == "s3cret"
    assert "s3cret" not in repr(spec)


def test_api_key_file_that_is_missing_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SpecError, match=r"api_key_file: cannot read .*: No such file"):
        from_mapping({"url": "http://h:1", "api_key_file": str(tmp_path / "nope")})
    with pytest.raises(SpecError, match="is empty"):
        from_mapping({"url": "http://h:1", "api_key_file": str(tmp_path / "empty")})
    with pytest.raises(SpecError, match="not both"):
        from_mapping({"url": "http://h:1", "api_key": "a", "api_key_file": "b"})
