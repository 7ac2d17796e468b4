"""The proof between daemons, the cluster's secret and the API keys, as functions."""

from __future__ import annotations

import base64
import json
import stat
import time
from pathlib import Path

import jwt
import pytest

from operations.errors import Conflict, Forbidden, TooManyRequests, Unauthorized
from wire.headers import JOB_ID_HEADER
from wire.keys import SCOPES, Caller, Keys, Limits
from wire.proof import Acceptor, Answer, Dialler, Hello, Signer, Unproven, same_url
from wire.revocations import Revocations
from wire.secret import BadSecret, Secret, load, save
from wire.trust import needed

SECRET = Secret.new()
URL = "http://10.0.0.5:7835"


def acceptor(secret: Secret = SECRET, fingerprint: str = "") -> Acceptor:
    return Acceptor(secret, role="hive", id="gpu-0", instance="ab12", fingerprint=fingerprint)


def dialler(secret: Secret = SECRET) -> Dialler:
    return Dialler(secret, role="queen", id="queen-1")


def greet(
    door: Acceptor, url: str = URL, own: tuple[str, ...] = (URL,)
) -> tuple[Hello, Answer, Signer]:
    asks = dialler()
    hello = asks.hello(url)
    answer = door.greet(hello, own)
    return hello, answer, asks.accept(hello, answer, "")


# -- the proof -------------------------------------------------------------------------------


def test_two_that_share_a_secret_know_each_other() -> None:
    door = acceptor()
    _, answer, signer = greet(door)
    assert (answer.role, answer.id) == ("hive", "gpu-0")
    header = signer.header("POST", "/v1/jobs?x=1", b"body", {JOB_ID_HEADER: "job-1"})
    caller, digest = door.check(header, "POST", "/v1/jobs?x=1", {JOB_ID_HEADER: "job-1"})
    assert (caller.kind, caller.id) == ("daemon", "queen:queen-1")
    assert caller.may("admin")
    assert digest == "230d8358dc8e8890b4c58deeb62912ee2f20357ae92a5cc861b98e68fe31acb5"


def test_what_does_not_know_the_secret_proves_nothing() -> None:
    asks = dialler()
    hello = asks.hello(URL)
    made_up = acceptor(Secret.new())
    forged = made_up.greet(hello.model_copy(update={"cluster_id": made_up._cluster_id}), (URL,))
    with pytest.raises(Unproven, match="does not know this cluster's secret"):
        asks.accept(hello, forged, "")


def test_another_clusters_dialler_is_sent_away() -> None:
    with pytest.raises(Forbidden, match="another cluster"):
        acceptor().greet(dialler(Secret.new()).hello(URL), (URL,))


def test_a_proof_cannot_be_passed_on_from_another_address() -> None:
    """A rogue at R lets the real hive answer: the hive refuses a URL that is not its own, and an
    altered URL makes the proof wrong for the dialler."""
    asks, door = dialler(), acceptor()
    hello = asks.hello("http://10.0.0.66:7835")
    with pytest.raises(Forbidden, match="not an address of this daemon's own"):
        door.greet(hello, (URL,))
    relayed = door.greet(hello.model_copy(update={"url": URL}), (URL,))
    with pytest.raises(Unproven):
        asks.accept(hello, relayed, "")


def test_a_recorded_answer_does_not_fit_another_hello() -> None:
    asks, door = dialler(), acceptor()
    recorded = door.greet(asks.hello(URL), (URL,))
    with pytest.raises(Unproven):
        asks.accept(asks.hello(URL), recorded, "")


@pytest.mark.parametrize("field", ["id", "instance", "session", "nonce", "proof"])
def test_an_altered_answer_proves_nothing(field: str) -> None:
    asks = dialler()
    hello = asks.hello(URL)
    answer = acceptor().greet(hello, (URL,))
    value = getattr(answer, field)
    other = ("0" if value[0] != "0" else "1") + value[1:]
    with pytest.raises(Unproven):
        asks.accept(hello, answer.model_copy(update={field: other}), "")


def test_a_proof_under_tls_holds_for_one_certificate() -> None:
    asks, door = dialler(), acceptor(fingerprint="aa" * 32)
    url = "https://10.0.0.5:7835"
    hello = asks.hello(url)
    answer = door.greet(hello, (url,))
    asks.accept(hello, answer, "aa" * 32)
    with pytest.raises(Unproven):
        asks.accept(hello, answer, "bb" * 32)


def test_a_signed_request_is_taken_once() -> None:
    door = acceptor()
    signer = greet(door)[2]
    header = signer.header("GET", "/v1/info", b"", {})
    door.check(header, "GET", "/v1/info", {})
    with pytest.raises(Unauthorized) as refused:
        door.check(header, "GET", "/v1/info", {})
    assert refused.value.code == "replayed"


def test_requests_may_overtake_each_other_and_very_old_ones_may_not() -> None:
    door = acceptor()
    signer = greet(door)[2]
    headers = [signer.header("GET", "/", b"", {}) for _ in range(9000)]
    for header in (headers[0], *reversed(headers[1:4000])):
        door.check(header, "GET", "/", {})
    for header in headers[4001:]:
        door.check(header, "GET", "/", {})
    for late in (headers[4000], headers[5], headers[-1]):
        with pytest.raises(Unauthorized) as refused:
            door.check(late, "GET", "/", {})
        assert refused.value.code == "replayed"


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("DELETE", "/v1/jobs/1", {}),
        ("POST", "/v1/shutdown", {}),
        ("POST", "/v1/jobs/1?x", {}),
        ("POST", "/v1/jobs/1", {JOB_ID_HEADER: "job-2"}),
    ],
)
def test_an_altered_request_is_refused(method: str, target: str, headers: dict[str, str]) -> None:
    door = acceptor()
    header = greet(door)[2].header("POST", "/v1/jobs/1", b"", {})
    with pytest.raises(Unauthorized) as refused:
        door.check(header, method, target, headers)
    assert refused.value.code == "bad_signature"
    door.check(header, "POST", "/v1/jobs/1", {})  # the true one still holds


@pytest.mark.parametrize("part", range(4))
def test_an_altered_signature_is_refused(part: int) -> None:
    door = acceptor()
    parts = greet(door)[2].header("GET", "/", b"", {}).split(":")
    parts[part] = ("1" if parts[part][0] != "1" else "2") + parts[part][1:]
    with pytest.raises(Unauthorized):
        door.check(":".join(parts), "GET", "/", {})


@pytest.mark.parametrize(
    "header", ["", ":::", "a:b:c:d", "x" * 9999, "a:1:b", "é:1:b:c", "a:²:b:c"]
)
def test_nonsense_for_a_signature_is_refused(header: str) -> None:
    with pytest.raises(Unauthorized):
        acceptor().check(header, "GET", "/", {})


def test_a_flood_of_hellos_does_not_end_a_session() -> None:
    door = acceptor()
    signer = greet(door)[2]
    door.check(signer.header("GET", "/", b"", {}), "GET", "/", {})
    for _ in range(5000):
        door.greet(dialler().hello(URL), (URL,))
    door.check(signer.header("GET", "/", b"", {}), "GET", "/", {})


def test_a_flood_of_hellos_from_one_address_drives_out_only_its_own() -> None:
    door, asks = acceptor(), dialler()
    hello = asks.hello(URL)
    signer = asks.accept(hello, door.greet(hello, (URL,), "10.0.0.1"), "")
    for _ in range(5000):
        door.greet(asks.hello(URL), (URL,), "10.0.0.66")
    door.check(signer.header("GET", "/", b"", {}), "GET", "/", {})


def test_another_version_of_the_proof_is_told() -> None:
    hello = dialler().hello(URL).model_copy(update={"protocol": 2})
    with pytest.raises(Conflict, match="same version"):
        acceptor().greet(hello, (URL,))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://10.0.0.5:80", "http://10.0.0.5", True),
        ("http://[::1]:7835", "http://[0:0:0:0:0:0:0:1]:7835", True),
        ("http://10.0.0.5:7835", "http://[::ffff:10.0.0.5]:7835", True),  # a socket on ::
        ("http://10.0.0.5:7835", "https://10.0.0.5:7835", False),
        ("http://10.0.0.5:7835", "http://10.0.0.5:7836", False),
        ("http://gpu-0:7835", "http://gpu-0:7835", False),  # a name is no address
    ],
)
def test_urls_are_compared_as_places(one: str, other: str, same: bool) -> None:
    assert same_url(one, other) is same


# -- the secret ------------------------------------------------------------------------------


def test_a_secret_survives_being_copied() -> None:
    assert Secret.parse(SECRET.text).text == SECRET.text
    assert Secret.parse(SECRET.text).cluster_id == SECRET.cluster_id


@pytest.mark.parametrize(
    "text", ["", "hunter2", SECRET.text[:-1], SECRET.text + "a", SECRET.text.replace("hive1-", "")]
)
def test_what_is_no_whole_secret_is_refused(text: str) -> None:
    with pytest.raises(BadSecret):
        Secret.parse(text)


def test_one_wrong_letter_in_a_secret_is_noticed() -> None:
    text = SECRET.text
    for place in range(len("hive1-"), len(text), 7):
        other = "a" if text[place] != "a" else "b"
        with pytest.raises(BadSecret):
            Secret.parse(text[:place] + other + text[place + 1 :])


def test_a_secret_does_not_show_itself() -> None:
    assert SECRET.text not in f"{SECRET} {SECRET!r} {[SECRET]}"


def test_a_secrets_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret"
    assert load(path) is None
    save(SECRET, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = load(path)
    assert found is not None
    assert found.text == SECRET.text
    path.chmod(0o640)
    with pytest.raises(BadSecret, match="chmod 600"):
        load(path)


# -- API keys --------------------------------------------------------------------------------


def claims(**other: object) -> dict[str, object]:
    good = {"jti": "0123456789ab", "iss": SECRET.cluster_id, "sub": "lab", "scopes": ["admin"]}
    return {**good, "iat": int(time.time()), **other}


def forged(payload: dict[str, object], key: bytes, algorithm: str = "HS256") -> str:
    return "hk-" + jwt.encode(payload, key, algorithm=algorithm)


def unsigned(payload: dict[str, object], algorithm: str) -> str:
    parts = [{"alg": algorithm, "typ": "JWT"}, payload]
    raw = [base64.urlsafe_b64encode(json.dumps(p).encode()).rstrip(b"=").decode() for p in parts]
    return f"hk-{raw[0]}.{raw[1]}."


def test_a_key_says_who_calls_and_what_is_allowed() -> None:
    key, key_id = Keys(SECRET).make(scopes=("infer",), tenant="lab", rpm=3)
    caller = Keys(SECRET).check(key)
    assert caller == Caller("key", key_id, frozenset({"infer"}), "lab", 3)
    caller.must("infer")
    with pytest.raises(Forbidden, match="admin"):
        caller.must("admin")


SIGNING = SECRET.derive("api keys")
FORGERIES = {
    "another cluster's": Keys(Secret.new()).make(scopes=SCOPES)[0],
    "expired": Keys(SECRET).make(scopes=SCOPES, seconds=-1)[0],
    "alg none": unsigned(claims(), "none"),
    "alg None": unsigned(claims(), "None"),
    "empty signature": unsigned(claims(), "HS256"),
    "another algorithm": forged(claims(), SIGNING + SIGNING, "HS512"),
    "signed with the cluster's id": forged(claims(), SECRET.cluster_id.encode() * 3),
    "no id": forged({k: v for k, v in claims().items() if k != "jti"}, SIGNING),
    "an id that is none": forged(claims(jti="../../x"), SIGNING),
    "scopes that are none": forged(claims(scopes=7), SIGNING),
    "a limit that is none": forged(claims(rpm=0), SIGNING),
    "another issuer": forged(claims(iss="000000000000"), SIGNING),
    "empty": "",
    "a word": "none",
    "long": "hk-" + "a" * 5000,
    "no text": "hk-\x00\udc80",
}


@pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_key_is_refused(name: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        Keys(SECRET).check(FORGERIES[name])
    malformed = name in ("empty", "a word", "long", "no text")
    expected = "malformed_key" if malformed else "invalid_key"
    assert refused.value.code == ("expired_key" if name == "expired" else expected)


def test_a_scope_that_nobody_knows_allows_nothing() -> None:
    caller = Keys(SECRET).check(forged(claims(scopes=["root", "infer"]), SIGNING))
    assert caller.scopes == {"infer"}


def test_a_limit_lets_a_minutes_worth_through_and_then_a_drip() -> None:
    limits, caller = Limits(), Caller("key", "k", rpm=3)
    for _ in range(3):
        limits.take(caller, 1000.0)
    with pytest.raises(TooManyRequests) as refused:
        limits.take(caller, 1000.0)
    assert refused.value.retry_after == pytest.approx(20)
    limits.take(caller, 1020.1)
    with pytest.raises(TooManyRequests):
        limits.take(caller, 1020.1)
    limits.take(Caller("key", "other", rpm=3), 1020.1)
    for _ in range(9):
        limits.take(Caller("key", "free"), 1020.1)


def test_a_revoked_key_stays_revoked(tmp_path: Path) -> None:
    path = tmp_path / "revoked.json"
    Revocations(path).check("0123456789ab")
    first = Revocations(path)
    assert first.add(["0123456789ab", "no id", "../../../etc"])
    assert not first.add(["0123456789ab"])
    assert first.listed == ["0123456789ab"]
    with pytest.raises(Unauthorized, match="revoked"):
        Revocations(path).check("0123456789ab")
    path.write_text("{")
    with pytest.raises(ValueError, match="EOF"):
        Revocations(path)


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/health", "public"),
        ("POST", "/v1/daemons/hello", "public"),
        ("GET", "/v1/models", "any"),
        ("POST", "/v1/chat/completions", "infer"),
        ("POST", "/v1/messages/count_tokens", "infer"),
        ("GET", "/v1/jobs/job-1/stream", "infer"),
        ("POST", "/v1/jobs", "any"),
        ("GET", "/v1/jobs", "admin"),
        ("GET", "/v1/hives", "admin"),
        ("GET", "/v1/heartbeats/stream", "admin"),
        ("POST", "/v1/hive/ready", "admin"),
        ("POST", "/v1/shutdown", "admin"),
        ("POST", "/v1/keys/revoked", "admin"),
        ("GET", "/healthz", "admin"),
        ("GET", "/v1/modelsX", "admin"),
        ("GET", "/v1/jobs/", "infer"),
        ("GET", "//health", "admin"),
        ("GET", "/", "admin"),
    ],
)
def test_what_is_not_named_asks_for_admin(method: str, path: str, scope: str) -> None:
    assert needed(method, path) == scope
