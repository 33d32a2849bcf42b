"""Asking models over real HTTP on this machine.

The server answers for the embedded policy; the tests inject faults into its answers."""

import json
import logging
import math
import multiprocessing
import os
import re
import socket
import threading
import time
from dataclasses import replace

import openai
import pytest
from transformers.utils import logging as hf_logging

from valor.data.phantom import make_phantom
from valor.policy.models import load_policy, save_policy
from valor.policy.prompt import PROMPT
from valor.policy.server import Handler, PolicyServer
from valor.policy.tiny import build_policy, generate
from valor.results.zeroshot import (
    Endpoint,
    EndpointError,
    Questioning,
    ask,
    collect,
    proxy_of,
    run_row,
)
from valor.rewards.text import report_body

SIZE, TOKENS = 64, 8
hf_logging.disable_progress_bar()


class FaultyHandler(Handler):
    "Before it answers, takes the next of `server.faults`: a status and headers, or a function."

    def do_POST(self):
        self.server.asked_at.append(time.time())
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is None:
            return super().do_POST()
        self.rfile.read(int(self.headers["Content-Length"]))
        if callable(fault):
            return fault(self)
        status, headers, code = (*fault, {}, None)[:3]
        self.send(status, dict(error=dict(message="the lungs are a secret", code=code)), **headers)


def raw(handler, data):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def says(content, finish="stop", refusal=None):
    body = dict(
        id="1",
        object="chat.completion",
        created=0,
        model="other",
        choices=[
            dict(
                index=0,
                finish_reason=finish,
                message=dict(role="assistant", content=content, refusal=refusal),
            )
        ],
        usage=dict(prompt_tokens=5, completion_tokens=2, total_tokens=7),
    )
    return lambda handler: raw(handler, json.dumps(body).encode())


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    home = tmp_path_factory.mktemp("policy")
    data = make_phantom(6, seed=2, split="test", size=SIZE)
    save_policy(
        *build_policy([f"<report> {r} </report>" for r in data["report"]], image_size=SIZE, width=32),
        home / "policy",
    )
    return data, *load_policy(home / "policy"), home / "policy"


@pytest.fixture
def server(policy):
    with PolicyServer(policy[1], policy[2], key="the-key") as running:
        running.RequestHandlerClass, running.faults, running.asked_at = FaultyHandler, [], []
        os.environ["VALOR_TEST_KEY"] = "the-key"
        yield running


def at(server, **changes):
    return Endpoint(
        **dict(
            model=server.id,
            base_url=server.url,
            key_env="VALOR_TEST_KEY",
            prompt=PROMPT,
            parameters=dict(max_tokens=TOKENS),
            backoff=0.01,
            concurrency=1,
        )
        | changes
    )


def asks(endpoint, data, path, **kw):
    return ask(endpoint, data, path, **dict(budget=None, benchmark="phantom") | kw)


def test_answers_are_the_policys_own_and_asked_once(policy, server, tmp_path, caplog):
    data, model, processor, _ = policy
    with caplog.at_level(logging.DEBUG):
        first = asks(at(server, model=None, concurrency=3), data, tmp_path / "a.jsonl")
    assert list(first.candidate) == generate(model, processor, list(data["image"]), TOKENS) and set(
        first.status
    ) == {"ok"}
    assert list(first.id) == list(data["study_id"]) and server.asked == len(data)
    assert asks(
        at(server), data, tmp_path / "a.jsonl"
    ).candidate.tolist() == first.candidate.tolist() and server.asked == len(data)
    logged = caplog.text + (tmp_path / "a.jsonl").read_text().replace(PROMPT, "")
    assert (
        "the-key" not in logged
        and "base64" not in logged
        and not any(c.strip() and c.strip() in caplog.text for c in first.candidate)
    )


def test_a_killed_job_goes_on_and_asks_no_answered_question_again(policy, server, tmp_path):
    data, path = policy[0], tmp_path / "a.jsonl"
    server.faults = [None] * 3 + [lambda h: time.sleep(60)]  # it is killed while it waits for the fourth
    process = multiprocessing.get_context("fork").Process(
        target=asks, args=(at(server), data, path)
    )  # it needs no model: only the server does
    process.start()
    end = time.time() + 60
    while len(server.asked_at) < 4:
        assert process.is_alive() and time.time() < end, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert server.asked == 3 and path.read_text().count('"ok"') == 3
    with path.open("a") as f:
        f.write('{"settings": "torn')
    out = asks(at(server), data, path)
    assert (
        server.asked == 6
        and set(out.status) == {"ok"}
        and list(out.candidate) == generate(*policy[1:3], list(data["image"]), TOKENS)
    )


def test_transient_errors_are_tried_again(policy, server, tmp_path):
    data = policy[0].select(range(4))

    def gone(handler):
        return handler.connection.shutdown(socket.SHUT_RDWR)

    server.faults = [
        (429, {"Retry-After": "1"}),
        None,
        (500,),
        (503,),
        None,
        lambda h: raw(h, b'{"choices": [{"mess'),
        None,
        gone,
        None,
    ]
    out = asks(at(server), data, tmp_path / "a.jsonl")
    assert set(out.status) == {"ok"} and server.asked == 4 and len(server.asked_at) == 9
    assert server.asked_at[1] - server.asked_at[0] >= 1  # as Retry-After said, not as back-off would
    assert list(out.attempts.fillna(1)) == [2, 3, 2, 2]
    assert list(out.unknown.fillna(0)) == [0, 0, 1, 1]  # what may have been paid for


def test_a_time_out_is_tried_again_and_counts_against_the_budget(policy, server, tmp_path):
    server.faults = [lambda handler: time.sleep(3), says("clear lungs")]
    endpoint = at(server, timeout=1.5, prices=dict(input=0.0, output=1e6 / TOKENS))
    out = asks(endpoint, policy[0].select(range(2)), tmp_path / "a.jsonl", budget=2.0)
    assert (
        list(out.status) == ["ok", "not asked"] and out.attempts[0] == 2
    )  # one dollar for what nobody knows the fate of, and a part of one


def test_another_attempt_is_not_made_where_the_budget_has_no_room_for_it(policy, server, tmp_path):
    server.faults = [lambda handler: time.sleep(3), says("clear lungs")]
    endpoint = at(server, timeout=1.5, prices=dict(input=0.0, output=1e6 / TOKENS))
    out = asks(endpoint, policy[0].select(range(1)), tmp_path / "a.jsonl", budget=1.5)
    assert (
        list(out.status) == ["error"] and len(server.asked_at) == 1
    )  # two attempts might have cost two dollars


def test_an_error_costs_its_study_only_and_is_asked_again(policy, server, tmp_path, capsys):
    data = policy[0].select(range(3))
    server.faults = [(400,), (500,), (500,)]
    out = asks(at(server, attempts=2), data, tmp_path / "a.jsonl")
    assert list(out.status) == ["error", "error", "ok"] and list(out.error[:2]) == [
        "BadRequestError 400",
        "InternalServerError 500",
    ]
    assert (
        "secret" not in capsys.readouterr().out + (tmp_path / "a.jsonl").read_text()
    )  # a server's words may repeat what was asked
    assert set(asks(at(server), data, tmp_path / "a.jsonl").status) == {"ok"} and server.asked == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        ((401,), "401, the key in VALOR_TEST_KEY is not accepted"),
        ((403,), "403, the key in VALOR_TEST_KEY has no access"),
        ((404,), "404, no model"),
        ((429, {}, "insufficient_quota"), "429, the account is empty"),
    ],
)
def test_what_cannot_get_better_ends_in_one_line(policy, server, tmp_path, fault, message):
    server.faults = [None, fault]
    with pytest.raises(EndpointError, match=message) as e:
        asks(at(server), policy[0], tmp_path / "a.jsonl")
    assert "\n" not in str(e.value) and "the-key" not in str(e.value) and len(server.asked_at) == 2
    assert (tmp_path / "a.jsonl").read_text().count('"ok"') == 1  # what was answered is kept


def test_the_true_key_check_of_the_server(policy, server, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_TEST_KEY", "another")
    with pytest.raises(EndpointError, match="401, the key in VALOR_TEST_KEY is not accepted"):
        asks(at(server), policy[0], tmp_path / "a.jsonl")
    assert server.asked == 0
    monkeypatch.delenv("VALOR_TEST_KEY")
    assert (
        "VALOR_TEST_KEY"
        in run_row(
            "x",
            policy[0],
            tmp_path,
            "phantom",
            endpoints=dict(x=dict(model="m", base_url="https://example.org/v1", key_env="VALOR_TEST_KEY")),
            budget=None,
        ).note
    )


def test_errors_in_a_row_stop_it(policy, server, tmp_path):
    server.faults = [(400,)] * 20
    with pytest.raises(EndpointError, match="3 errors in a row, the last: BadRequestError 400"):
        asks(at(server), policy[0], tmp_path / "a.jsonl", give_up=3)
    assert len(server.asked_at) == 3


def test_refusals_and_empty_answers_are_named(policy, server, tmp_path):
    server.faults = [
        says("I'm sorry, but I can't interpret medical images."),
        says(None, refusal="no"),
        says("half", "content_filter"),
        says("", "length"),
    ]
    result = run_row(
        "x",
        policy[0],
        tmp_path,
        "phantom",
        budget=None,
        endpoints=dict(x={k: v for k, v in vars(at(server)).items()}),
    )
    assert (
        list(result.reports.status) == ["refusal"] * 3 + ["empty", "ok", "ok"]
        and list(result.reports.candidate[:4]) == [""] * 4
    )
    assert result.note.startswith("3 refused, 1 empty")
    before = len(server.asked_at)
    asks(at(server), policy[0], tmp_path / "x.jsonl")
    assert len(server.asked_at) == before  # a refusal is an answer


def test_the_budget_stops_it_and_a_larger_one_goes_on(policy, server, tmp_path, capsys):
    endpoint = at(server, prices=dict(input=0.0, output=1e6 / TOKENS))  # a question costs at most one dollar
    some = asks(endpoint, policy[0], tmp_path / "a.jsonl", budget=2.5)
    said = capsys.readouterr().out
    assert list(some.status) == ["ok"] * 2 + ["not asked"] * 4 and server.asked == 2
    assert (
        "6 questions to ask" in said
        and "at most 6.0000 USD (budget 2.5, spent 0.0000)" in said
        and "the budget of 2.5 USD stops here" in said
    )
    assert (
        list(asks(endpoint, policy[0], tmp_path / "a.jsonl", budget=2.5).status) == list(some.status)
        and server.asked == 2
    )  # what was spent before counts
    assert (
        set(asks(replace(endpoint, concurrency=4), policy[0], tmp_path / "a.jsonl", budget=6.0).status)
        == {"ok"}
        and server.asked == 6
    )
    with pytest.raises(EndpointError, match="prices=None"):
        asks(at(server), policy[0], tmp_path / "b.jsonl", budget=1.0)
    short = run_row("y", policy[0], tmp_path, "phantom", budget=2.0, endpoints=dict(y=dict(vars(endpoint))))
    assert short.reports is None and short.note == "not finished: 2 of 6 studies answered within the budget"


def test_answers_to_another_prompt_are_said_and_not_used(policy, server, tmp_path, capsys):
    data, path = policy[0].select(range(2)), tmp_path / "a.jsonl"
    asks(at(server), data, path)
    asks(at(server, prompt="Describe this X-ray."), data, path)
    assert (
        "a.jsonl: 2 answers are to another prompt; kept, not used" in capsys.readouterr().out
        and server.asked == 4
    )
    asks(at(server, parameters=dict(max_tokens=TOKENS - 1)), data, path)
    assert "another prompt and parameters" in capsys.readouterr().out and server.asked == 6
    asks(at(server), data, path)
    assert server.asked == 6  # and the old ones are still there


def test_restricted_studies_go_nowhere_unless_permitted(policy, server, tmp_path, monkeypatch):
    away = at(server, base_url="https://api.openai.com/v1")
    with pytest.raises(PermissionError, match="nothing of it is sent there"):
        asks(away, policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg")
    assert "nothing of it is sent there" in run_row("GPT-4o", policy[0], tmp_path, "table").note
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("VALOR_TEST_KEY")
    with pytest.raises(EndpointError, match="VALOR_TEST_KEY"):
        asks(
            away, policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg", permitted=["api.openai.com"]
        )  # named: only the key is missing
    os.environ["VALOR_TEST_KEY"] = "the-key"
    assert set(asks(at(server), policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg").status) == {
        "ok"
    }  # this machine


def test_nobody_there_is_one_line(policy, tmp_path):
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1", attempts=2, backoff=0.01, concurrency=1)
    with pytest.raises(EndpointError, match="2 errors in a row, the last: APIConnectionError"):
        asks(endpoint, policy[0], tmp_path / "a.jsonl", give_up=2)


def test_valor_serve_refuses_what_it_cannot_serve():
    from valor.cli import main

    with pytest.raises(SystemExit, match="no such folder"):
        main(["serve", "--model", "/no/such"])
    with pytest.raises(SystemExit, match="others could ask"):
        main(["serve", "--model", "x", "--host", "0.0.0.0"])


def test_valor_serve_answers(policy, capsys, monkeypatch):
    from valor.cli import main

    monkeypatch.setenv("SERVED", "secret")
    threading.Thread(
        target=main,
        args=(["serve", "--model", str(policy[3]), "--port", "0", "--key-env", "SERVED"],),
        daemon=True,
    ).start()
    said, end = "", time.time() + 60
    while "\n" not in said and time.time() < end:
        said += capsys.readouterr().out
        time.sleep(0.05)
    name, _, url, *_ = said.split()
    client = openai.OpenAI(api_key="secret", base_url=url, max_retries=0)
    assert [m.id for m in client.models.list()] == [name] and name.startswith("policy@")
    answer = client.chat.completions.create(
        model=name, messages=[dict(role="user", content="Describe.")], max_tokens=4
    )
    assert 0 < answer.usage.completion_tokens <= 4 and answer.choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        client.chat.completions.create(
            model=name,
            messages=[
                dict(
                    role="user",
                    content=[dict(type="image_url", image_url=dict(url="https://example.org/x.png"))],
                )
            ],
        )


def body_of(message, **changes):
    return (
        dict(
            id="1",
            object="chat.completion",
            created=0,
            model="other",
            choices=[dict(index=0, finish_reason="stop", message=message)],
        )
        | changes
    )


def answers(body):
    return lambda handler: raw(handler, body if isinstance(body, bytes) else json.dumps(body).encode())


def test_a_local_endpoint_is_asked_past_the_environments_proxies(
    policy, server, tmp_path, monkeypatch, capsys
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert set(
        asks(at(server), policy[0].select(range(2)), tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg").status
    ) == {"ok"}
    assert "proxy" not in capsys.readouterr().out
    assert proxy_of("http://example.org/v1") == "127.0.0.1" and proxy_of(server.url) is None
    monkeypatch.setenv("no_proxy", "example.org")
    assert proxy_of("http://example.org/v1") is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(policy, server, tmp_path, status):
    with PolicyServer(policy[1], policy[2]) as other:
        server.faults = [(status, {"Location": other.url + "/chat/completions"})]
        with pytest.raises(
            EndpointError, match=f"{status}, it sends questions on to another address, which is not followed"
        ) as e:
            asks(at(server), policy[0], tmp_path / "a.jsonl")
        assert other.asked == 0 and "\n" not in str(e.value) and len(server.asked_at) == 1


def test_what_a_server_says_back_is_never_kept(policy, server, tmp_path, capsys):
    echoing = says("The key is the-key.")
    server.faults = [
        (400, {}, "Bearer the-key"),
        echoing,
        answers(body_of(dict(content="clear"), model="the-key")),
        answers(body_of(dict(content="clear"), model=[1])),
    ]
    result = run_row(
        "x",
        policy[0].select(range(4)),
        tmp_path,
        "phantom",
        budget=None,
        endpoints=dict(x=dict(vars(at(server)))),
    )
    assert (
        list(result.reports.status) == ["error", "ok", "ok", "ok"]
        and result.reports.candidate[1] == "The key is [key]."
    )
    assert "the-key" not in (tmp_path / "x.jsonl").read_text() + capsys.readouterr().out + result.note


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        dict(prompt_tokens=-5, completion_tokens=-2),
        dict(prompt_tokens=math.nan, completion_tokens=math.nan),
        dict(prompt_tokens="5", completion_tokens=[2]),
        7,
    ],
)
def test_an_answer_of_unknown_cost_counts_as_the_most_it_can_have_cost(policy, server, tmp_path, usage):
    server.faults = [answers(body_of(dict(content="clear lungs"), usage=usage)) for _ in range(6)]
    out = asks(
        at(server, prices=dict(input=0.0, output=1e6 / TOKENS)), policy[0], tmp_path / "a.jsonl", budget=2.5
    )  # one dollar each
    assert (
        list(out.status) == ["ok"] * 2 + ["not asked"] * 4
        and (tmp_path / "a.jsonl").read_text().count('"ok"') == 2
    )
    more = asks(
        at(server, prices=dict(input=0.0, output=1e6 / TOKENS)), policy[0], tmp_path / "a.jsonl", budget=3.5
    )
    assert list(more.status) == ["ok"] * 3 + ["not asked"] * 3  # what was spent before is known of the file


def test_an_answer_is_written_before_it_is_paid(policy, tmp_path):
    def bill(line):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect(
            policy[0].select(range(1)),
            tmp_path / "a.jsonl",
            Questioning(
                dict(model="m", prompt="p", parameters={}),
                lambda images, again: dict(status="ok", candidate="clear"),
                paid=bill,
            ),
        )
    assert '"clear"' in (tmp_path / "a.jsonl").read_text()


def test_money_is_told_in_numbers(policy, server, tmp_path):
    with pytest.raises(EndpointError, match="budget=nan; expected US dollars"):
        asks(at(server), policy[0], tmp_path / "a.jsonl", budget=math.nan)
    for price in (math.nan, -1, "2"):
        with pytest.raises(EndpointError, match="numbers from 0"):
            asks(at(server, prices=dict(input=0, output=price)), policy[0], tmp_path / "a.jsonl", budget=1)


ODD = {
    "choices null": dict(choices=None),
    "choices {}": dict(choices={}),
    "no choice": dict(choices=[]),
    "a choice that is a text": dict(choices=["x"]),
    "no message": dict(choices=[dict(index=0)]),
    "a number": body_of(dict(content=3)),
    "an object": body_of(dict(content={"text": "x"})),
    "a part that is a number": body_of(dict(content=[3])),
    "a part without its text": body_of(dict(content=[dict(type="text")])),
    "a list": [],
    "nested": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe",
    "a number of 10,000 digits": b"1" * 10_000,
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_an_error_of_its_row(policy, server, tmp_path, name):
    server.faults = [answers(ODD[name])] * 2
    out = asks(at(server, attempts=2), policy[0].select(range(2)), tmp_path / "a.jsonl")
    assert list(out.status) == ["error", "ok"] and out.error[0] == "Malformed"


def test_parts_of_text_are_joined(policy, server, tmp_path):
    server.faults = [
        answers(
            body_of(
                dict(
                    content=[
                        dict(type="text", text="The lungs "),
                        dict(type="thinking", thinking=[]),
                        "are ",
                        dict(type="text", text="clear."),
                    ]
                )
            )
        ),
        says("half \ud800 a pair"),
    ]
    out = asks(at(server), policy[0].select(range(2)), tmp_path / "a.jsonl")
    assert list(out.candidate) == ["The lungs are clear.", "half ? a pair"]


@pytest.mark.parametrize(
    "said, report",
    [
        ("<think>Is it a mass?</think> Clear lungs.", "Clear lungs."),
        ("<think>Is it a mass?", ""),
        ("a mass?</think>\nClear lungs.", "Clear lungs."),
        ("<THINKING>x\ny</THINKING>Clear lungs.", "Clear lungs."),
        ("<think>a</think>b<think>c</think><report> Clear lungs. </report>", "Clear lungs."),
        ("<think>a</think> Clear lungs. <think>b", "Clear lungs."),
        ("Clear lungs, I think.", "Clear lungs, I think."),
    ],
)
def test_what_is_thought_aloud_is_no_part_of_the_report(policy, server, tmp_path, said, report):
    server.faults = [says(said)]
    out = asks(at(server), policy[0].select(range(1)), tmp_path / "a.jsonl")
    assert (
        report_body(said) == report
        and report_body(out.candidate[0]) == report
        and out.status[0] == ("ok" if report else "empty")
    )


def test_a_refusal_that_was_thought_over_is_a_refusal(policy, server, tmp_path):
    server.faults = [says("<think>May I?</think>I'm sorry, but I can't interpret medical images.")]
    assert list(asks(at(server), policy[0].select(range(1)), tmp_path / "a.jsonl").status) == ["refusal"]


@pytest.mark.parametrize(
    "status, param, message, names",
    [
        (400, "temperature", "Unsupported value", "'temperature': 0"),
        (
            400,
            None,
            "Unsupported parameter: 'max_tokens'; use 'max_completion_tokens'",
            f"'max_tokens': {TOKENS}",
        ),
        (422, None, "temperature: not permitted", "'temperature': 0"),
    ],
)
def test_a_parameter_that_is_refused_is_named(policy, server, tmp_path, status, param, message, names):
    server.faults = [lambda handler: handler.send(status, dict(error=dict(message=message, param=param)))]
    with pytest.raises(
        EndpointError,
        match=re.escape(f"{status}, {server.id} refuses parameters={{{names}}}; change or leave out"),
    ):
        asks(at(server, parameters=dict(max_tokens=TOKENS, temperature=0)), policy[0], tmp_path / "a.jsonl")
    assert len(server.asked_at) == 1


def dripping(part, headers):
    "Sends one byte of an answer every 50 ms: of its headers, or of its body."

    def answer(handler):
        if not headers:
            handler.send_response(200)
            handler.send_header("Content-Length", "100000")
            handler.end_headers()
        try:
            for _ in range(200):
                handler.wfile.write(part)
                handler.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass
        handler.close_connection = True

    return answer


@pytest.mark.parametrize("headers", [True, False])
def test_a_slow_answer_ends_at_the_timeout(policy, server, tmp_path, headers):
    server.faults = [dripping(b"H" if headers else b" ", headers)]
    out = asks(at(server, timeout=0.5, attempts=1), policy[0].select(range(1)), tmp_path / "a.jsonl")
    assert (
        list(out.error) == ["Late"] and out.unknown[0] == 1
    )  # it drips for ten seconds, half of one is waited


def test_a_list_of_models_that_is_none_is_one_line(policy, server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        FaultyHandler, "do_GET", lambda handler: handler.send(400, dict(error=dict(message="the-key")))
    )
    with pytest.raises(EndpointError, match=r"does not list its models \(BadRequestError 400\); name one"):
        asks(at(server, model=None), policy[0], tmp_path / "a.jsonl")


def sent(server, text, headers="", first="POST /v1/chat/completions HTTP/1.1", host="127.0.0.1"):
    "`(status, message)` that the server answers to the bytes of a request."
    with socket.create_connection(server.server_address) as s:
        s.settimeout(20)
        s.sendall(f"{first}\r\nHost: {host}\r\n{headers}\r\n".encode() + text)
        data = s.makefile("rb").read()
    return int(data.split()[1]), json.loads(data.split(b"\r\n\r\n", 1)[1])["error"]["message"]


JSON = "Content-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "headers, text, status",
    [
        (JSON + "Content-Length: -1\r\n", b"", 400),
        (JSON + "Content-Length: 300000000\r\n", b"", 413),
        (JSON + "Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n\r\n", 411),
        (JSON, b"", 411),
        (JSON + "Content-Length: 9\r\n", b"{}", 408),
        ("Connection: close\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n", b"{}", 415),
        (JSON + "Origin: http://evil.example\r\nContent-Length: 2\r\n", b"{}", 403),
        (JSON + f"Content-Length: {10**5}\r\n", b"[" * 10**5, 400),
    ],
)
def test_a_request_that_keeps_no_limit_is_told_so(policy, monkeypatch, headers, text, status):
    monkeypatch.setattr(Handler, "timeout", 0.5)
    with PolicyServer(policy[1], policy[2]) as server:
        got, said = sent(server, text, headers)
        assert got == status and "\n" not in said and server.asked == 0


def test_a_foreign_host_is_not_answered(policy):
    with PolicyServer(policy[1], policy[2]) as server:
        assert sent(server, b"{}", JSON + "Content-Length: 2\r\n", host="evil.example:80")[0] == 403


def test_the_body_of_a_refused_request_is_no_request(policy):
    "A page of a browser could otherwise hide one in it that has no Origin."
    hidden = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with PolicyServer(policy[1], policy[2]) as server, socket.create_connection(server.server_address) as s:
        s.settimeout(20)
        headers = f"Host: 127.0.0.1\r\nOrigin: http://evil.example\r\nContent-Length: {len(hidden)}\r\n\r\n"
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + headers.encode() + hidden)
        said = s.makefile("rb").read()
    assert said.startswith(b"HTTP/1.1 403") and said.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "change, status",
    [
        (dict(temperature=1e-300), 400),
        (dict(temperature=math.nan), 400),
        (dict(seed=-1), 400),
        (dict(seed=2**32), 400),
        (dict(max_tokens=True), 400),
        (dict(messages=[dict(role="user", content="word " * 10**6)]), 413),
    ],
)
def test_a_setting_out_of_range_is_told_so(policy, change, status):
    with PolicyServer(policy[1], policy[2]) as server:
        body = json.dumps(
            dict(model=server.id, messages=[dict(role="user", content="Describe.")]) | change
        ).encode()
        assert (
            sent(server, body, JSON + f"Content-Length: {len(body)}\r\n")[0] == status and server.asked == 0
        )


def test_a_small_file_of_many_pixels_is_not_decoded():
    import base64
    import io

    from PIL import Image

    from valor.policy.server import RequestError, data_image

    file = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(file, "PNG")
    with pytest.raises(RequestError, match="13,000 x 13,000 pixels"):
        data_image("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def test_more_connections_than_are_held_are_closed_and_the_others_answered(policy, monkeypatch):
    import valor.policy.server

    monkeypatch.setattr(valor.policy.server, "CONNECTIONS", 2)
    monkeypatch.setattr(Handler, "timeout", 0.5)
    with PolicyServer(policy[1], policy[2]) as server:
        held = [socket.create_connection(server.server_address) for _ in range(3)]
        for s in held:
            s.settimeout(10)
        assert held[2].recv(1) == b"" and [s.recv(1) for s in held[:2]] == [
            b"",
            b"",
        ]  # one too many at once, the others at their timeout
        assert sent(server, b"{}", JSON + "Content-Length: 2\r\n")[0] == 404


@pytest.mark.parametrize("option, value", [("--port", "99999"), ("--port", "-1"), ("--max-new-tokens", "0")])
def test_valor_serve_names_a_wrong_number(policy, option, value):
    from valor.cli import main

    with pytest.raises(SystemExit, match=f"{option[2:].replace('-', '_')}={value}: expected"):
        main(["serve", "--model", str(policy[3]), option, value])
