"""Asking models over real HTTP on this machine: the server answers for the embedded policy, faults are injected at its door."""
import json, logging, multiprocessing, os, socket, threading, time
from dataclasses import replace

import openai, pytest
from transformers.utils import logging as hf_logging
from valor.phantom import make_phantom
from valor.policy import PROMPT, build_policy, generate, load_policy, save_policy
from valor.server import Handler, PolicyServer
from valor.zeroshot import Endpoint, EndpointError, ask, run_row

SIZE, TOKENS = 64, 8
hf_logging.disable_progress_bar()


class FaultyHandler(Handler):
    "Takes the next fault off `server.faults` before it answers: a status and headers, or a function of the handler."
    def do_POST(self):
        self.server.asked_at.append(time.time())
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is None: return super().do_POST()
        self.rfile.read(int(self.headers["Content-Length"]))
        if callable(fault): return fault(self)
        status, headers, code = (*fault, {}, None)[:3]
        self.send(status, dict(error=dict(message="the lungs are a secret", code=code)), **headers)


def raw(handler, data):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def says(content, finish="stop", refusal=None):
    body = dict(id="1", object="chat.completion", created=0, model="other", choices=[dict(index=0, finish_reason=finish, message=dict(role="assistant", content=content, refusal=refusal))], usage=dict(prompt_tokens=5, completion_tokens=2, total_tokens=7))
    return lambda handler: raw(handler, json.dumps(body).encode())


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    home = tmp_path_factory.mktemp("policy")
    data = make_phantom(6, seed=2, split="test", size=SIZE)
    save_policy(*build_policy([f"<report> {r} </report>" for r in data["report"]], image_size=SIZE, width=32), home / "policy")
    return data, *load_policy(home / "policy"), home / "policy"


@pytest.fixture
def server(policy):
    with PolicyServer(policy[1], policy[2], key="the-key") as running:
        running.RequestHandlerClass, running.faults, running.asked_at = FaultyHandler, [], []
        os.environ["VALOR_TEST_KEY"] = "the-key"
        yield running


def at(server, **changes): return Endpoint(**dict(model=server.id, base_url=server.url, key_env="VALOR_TEST_KEY", prompt=PROMPT, parameters=dict(max_tokens=TOKENS), backoff=.01, concurrency=1) | changes)


def asks(endpoint, data, path, **kw): return ask(endpoint, data, path, **dict(budget=None, benchmark="phantom") | kw)


def test_answers_are_the_policys_own_and_asked_once(policy, server, tmp_path, caplog):
    data, model, processor, _ = policy
    with caplog.at_level(logging.DEBUG): first = asks(at(server, model=None, concurrency=3), data, tmp_path / "a.jsonl")
    assert list(first.candidate) == generate(model, processor, list(data["image"]), TOKENS) and set(first.status) == {"ok"}
    assert list(first.id) == list(data["study_id"]) and server.asked == len(data)
    assert asks(at(server), data, tmp_path / "a.jsonl").candidate.tolist() == first.candidate.tolist() and server.asked == len(data)
    logged = caplog.text + (tmp_path / "a.jsonl").read_text().replace(PROMPT, "")
    assert "the-key" not in logged and "base64" not in logged and not any(c.strip() and c.strip() in caplog.text for c in first.candidate)


def test_a_killed_job_goes_on_and_asks_no_answered_question_again(policy, server, tmp_path):
    data, path = policy[0], tmp_path / "a.jsonl"
    server.faults = [None] * 3 + [lambda h: time.sleep(60)]                                   # it is killed while it waits for the fourth
    process = multiprocessing.get_context("fork").Process(target=asks, args=(at(server), data, path))   # it needs no model: only the server does
    process.start()
    end = time.time() + 60
    while len(server.asked_at) < 4:
        assert process.is_alive() and time.time() < end, "it ended before it could be killed"
        time.sleep(.02)
    process.kill()
    process.join()
    assert server.asked == 3 and path.read_text().count('"ok"') == 3
    with path.open("a") as f: f.write('{"settings": "torn')
    out = asks(at(server), data, path)
    assert server.asked == 6 and set(out.status) == {"ok"} and list(out.candidate) == generate(*policy[1:3], list(data["image"]), TOKENS)


def test_transient_errors_are_tried_again(policy, server, tmp_path):
    data = policy[0].select(range(4))
    gone = lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)
    server.faults = [(429, {"Retry-After": "1"}), None, (500,), (503,), None, lambda h: raw(h, b'{"choices": [{"mess'), None, gone, None]
    out = asks(at(server), data, tmp_path / "a.jsonl")
    assert set(out.status) == {"ok"} and server.asked == 4 and len(server.asked_at) == 9
    assert server.asked_at[1] - server.asked_at[0] >= 1                                        # as Retry-After said, not as back-off would
    assert list(out.attempts.fillna(1)) == [2, 3, 2, 2]
    assert list(out.unknown.fillna(0)) == [0, 0, 1, 1]                                         # what may have been paid for


def test_a_time_out_is_tried_again_and_counts_against_the_budget(policy, server, tmp_path):
    server.faults = [lambda handler: time.sleep(3), says("clear lungs")]
    endpoint = at(server, timeout=1.5, prices=dict(input=0., output=1e6 / TOKENS))
    out = asks(endpoint, policy[0].select(range(2)), tmp_path / "a.jsonl", budget=2.)
    assert list(out.status) == ["ok", "not asked"] and out.attempts[0] == 2                    # one dollar for what nobody knows the fate of, and a part of one


def test_an_error_costs_its_study_only_and_is_asked_again(policy, server, tmp_path, capsys):
    data = policy[0].select(range(3))
    server.faults = [(400,), (500,), (500,)]
    out = asks(at(server, attempts=2), data, tmp_path / "a.jsonl")
    assert list(out.status) == ["error", "error", "ok"] and list(out.error[:2]) == ["BadRequestError 400", "InternalServerError 500"]
    assert "secret" not in capsys.readouterr().out + (tmp_path / "a.jsonl").read_text()        # a server's words may repeat what was asked
    assert set(asks(at(server), data, tmp_path / "a.jsonl").status) == {"ok"} and server.asked == 3


@pytest.mark.parametrize("fault, message", [((401,), "401, the key in VALOR_TEST_KEY is not accepted"), ((403,), "403, the key in VALOR_TEST_KEY has no access"), ((404,), "404, no model"), ((429, {}, "insufficient_quota"), "429, the account is empty")])
def test_what_cannot_get_better_ends_in_one_line(policy, server, tmp_path, fault, message):
    server.faults = [None, fault]
    with pytest.raises(EndpointError, match=message) as e: asks(at(server), policy[0], tmp_path / "a.jsonl")
    assert "\n" not in str(e.value) and "the-key" not in str(e.value) and len(server.asked_at) == 2
    assert (tmp_path / "a.jsonl").read_text().count('"ok"') == 1                               # what was answered is kept


def test_the_true_key_check_of_the_server(policy, server, tmp_path, monkeypatch):
    monkeypatch.setenv("VALOR_TEST_KEY", "another")
    with pytest.raises(EndpointError, match="401, the key in VALOR_TEST_KEY is not accepted"): asks(at(server), policy[0], tmp_path / "a.jsonl")
    assert server.asked == 0
    monkeypatch.delenv("VALOR_TEST_KEY")
    assert "VALOR_TEST_KEY" in run_row("x", policy[0], tmp_path, "phantom", endpoints=dict(x=dict(model="m", base_url="https://example.org/v1", key_env="VALOR_TEST_KEY")), budget=None).note


def test_errors_in_a_row_stop_it(policy, server, tmp_path):
    server.faults = [(400,)] * 20
    with pytest.raises(EndpointError, match="3 errors in a row, the last: BadRequestError 400"): asks(at(server), policy[0], tmp_path / "a.jsonl", give_up=3)
    assert len(server.asked_at) == 3


def test_refusals_and_empty_answers_are_named(policy, server, tmp_path):
    server.faults = [says("I'm sorry, but I can't interpret medical images."), says(None, refusal="no"), says("half", "content_filter"), says("", "length")]
    result = run_row("x", policy[0], tmp_path, "phantom", budget=None, endpoints=dict(x={k: v for k, v in vars(at(server)).items()}))
    assert list(result.reports.status) == ["refusal"] * 3 + ["empty", "ok", "ok"] and list(result.reports.candidate[:4]) == [""] * 4
    assert result.note.startswith("3 refused, 1 empty")
    before = len(server.asked_at)
    asks(at(server), policy[0], tmp_path / "x.jsonl")
    assert len(server.asked_at) == before                                                      # a refusal is an answer


def test_the_budget_stops_it_and_a_larger_one_goes_on(policy, server, tmp_path, capsys):
    endpoint = at(server, prices=dict(input=0., output=1e6 / TOKENS))                          # a question costs at most one dollar
    some = asks(endpoint, policy[0], tmp_path / "a.jsonl", budget=2.5)
    said = capsys.readouterr().out
    assert list(some.status) == ["ok"] * 2 + ["not asked"] * 4 and server.asked == 2
    assert "6 questions to ask" in said and "at most 6.0000 USD (budget 2.5, spent 0.0000)" in said and "the budget of 2.5 USD stops here" in said
    assert list(asks(endpoint, policy[0], tmp_path / "a.jsonl", budget=2.5).status) == list(some.status) and server.asked == 2   # what was spent before counts
    assert set(asks(replace(endpoint, concurrency=4), policy[0], tmp_path / "a.jsonl", budget=6.).status) == {"ok"} and server.asked == 6
    with pytest.raises(EndpointError, match="prices=None"): asks(at(server), policy[0], tmp_path / "b.jsonl", budget=1.)
    short = run_row("y", policy[0], tmp_path, "phantom", budget=2., endpoints=dict(y=dict(vars(endpoint))))
    assert short.reports is None and short.note == "not finished: 2 of 6 studies answered within the budget"


def test_answers_to_another_prompt_are_said_and_not_used(policy, server, tmp_path, capsys):
    data, path = policy[0].select(range(2)), tmp_path / "a.jsonl"
    asks(at(server), data, path)
    asks(at(server, prompt="Describe this X-ray."), data, path)
    assert "a.jsonl: 2 answers are to another prompt; kept, not used" in capsys.readouterr().out and server.asked == 4
    asks(at(server, parameters=dict(max_tokens=TOKENS - 1)), data, path)
    assert "another prompt and parameters" in capsys.readouterr().out and server.asked == 6
    asks(at(server), data, path)
    assert server.asked == 6                                                                   # and the old ones are still there


def test_restricted_studies_go_nowhere_unless_permitted(policy, server, tmp_path, monkeypatch):
    away = at(server, base_url="https://api.openai.com/v1")
    with pytest.raises(PermissionError, match="nothing of it is sent there"): asks(away, policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg")
    assert "nothing of it is sent there" in run_row("GPT-4o", policy[0], tmp_path, "table").note
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("VALOR_TEST_KEY")
    with pytest.raises(EndpointError, match="VALOR_TEST_KEY"): asks(away, policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg", permitted=["api.openai.com"])   # named: only the key is missing
    os.environ["VALOR_TEST_KEY"] = "the-key"
    assert set(asks(at(server), policy[0], tmp_path / "a.jsonl", benchmark="mimic_cxr_jpg").status) == {"ok"}   # this machine


def test_nobody_there_is_one_line(policy, tmp_path):
    endpoint = Endpoint("m", "http://127.0.0.1:9/v1", attempts=2, backoff=.01, concurrency=1)
    with pytest.raises(EndpointError, match="2 errors in a row, the last: APIConnectionError"): asks(endpoint, policy[0], tmp_path / "a.jsonl", give_up=2)


def test_valor_serve_refuses_what_it_cannot_serve():
    from valor.experiment import main
    with pytest.raises(SystemExit, match="no such folder"): main(["serve", "--model", "/no/such"])
    with pytest.raises(SystemExit, match="others could ask"): main(["serve", "--model", "x", "--host", "0.0.0.0"])


def test_valor_serve_answers(policy, capsys, monkeypatch):
    from valor.experiment import main
    monkeypatch.setenv("SERVED", "secret")
    threading.Thread(target=main, args=(["serve", "--model", str(policy[3]), "--port", "0", "--key-env", "SERVED"],), daemon=True).start()
    said, end = "", time.time() + 60
    while "\n" not in said and time.time() < end: said += capsys.readouterr().out; time.sleep(.05)
    name, _, url, *_ = said.split()
    client = openai.OpenAI(api_key="secret", base_url=url, max_retries=0)
    assert [m.id for m in client.models.list()] == [name] and name.startswith("policy@")
    answer = client.chat.completions.create(model=name, messages=[dict(role="user", content="Describe.")], max_tokens=4)
    assert 0 < answer.usage.completion_tokens <= 4 and answer.choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.BadRequestError, match="fetches nothing"):
        client.chat.completions.create(model=name, messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="https://example.org/x.png"))])])
