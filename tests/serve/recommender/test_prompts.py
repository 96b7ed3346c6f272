"""Prompts behind users' events: what stands in the stream, and that its words go on as the whole model says."""

import json

import jax
import numpy as np
import pytest

from experiments import generate
from moerec.config import cli
from moerec.data.text.tokenizer import TextTokenizer
from moerec.errors import InputError
from moerec.eval.evaluate_run import run_experiment
from moerec.serve.recommender.prompts import lay_prompts
from moerec.train.run_dir import Run
from moerec.types import EVENT, NO_TIME, PADDING, RECOMMEND, TOKEN
from tests.eval.test_mixed_run import make_config

N_NEW = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_experiment(make_config(steps=2, eval_every=2), folder)
    return Run(folder)


def call(run: Run, *flags: str) -> int:
    extra = {"extra_flags": generate.FLAGS, "config_type": None, "workdir": False}
    return cli.execute(generate.main, ["generate", f"--workdir={run.folder}", *flags], **extra)


def find_user(run: Run, short: bool) -> int:
    n_events = np.diff(run.data.dataset.log.offsets)
    return int(np.argmin(n_events) if short else np.argmax(n_events))


@pytest.mark.parametrize("short", [True, False])
def test_events_stand_before_the_words(run, short):
    """As many as leave room; a sequence that is whole begins with its control slot."""
    log, data = run.data.dataset.log, run.config.data
    u, ids = find_user(run, short), np.array([5, 7, 9], np.int32)
    n_new = N_NEW if short else data.seq_len - len(ids) - 4
    own = np.arange(log.offsets[u], log.offsets[u + 1])
    kept = own[-min(len(own), data.history_len, data.seq_len - len(ids) - n_new) :]
    assert (len(kept) < len(own)) is not short
    batch = lay_prompts(run, [str(run.data.dataset.users[u])], [ids], n_new)
    is_whole = len(kept) < min(data.history_len, data.seq_len - len(ids) - n_new)
    kinds = [RECOMMEND] * is_whole + [EVENT] * len(kept) + [TOKEN] * 3
    n = len(kinds)
    assert batch.kind_BT[0].tolist() == [*kinds, PADDING]
    assert batch.segment_BT[0].tolist() == [1] * n + [0]
    assert batch.position_BT[0, :n].tolist() == list(range(n))
    is_event = batch.kind_BT[0] == EVENT
    np.testing.assert_array_equal(batch.item_BT[0, is_event], log.item[kept])
    np.testing.assert_array_equal(batch.action_BT[0, is_event], log.action[kept])
    np.testing.assert_array_equal(batch.time_BT[0, is_event], log.time_us[kept] // 10**6 - 946_684_800)
    assert batch.token_BT[0, n - 3 : n].tolist() == ids.tolist()
    # Of the last event and of the words nothing is known of what comes next.
    assert batch.request.time_BT[0, n - 4 : n].tolist() == [NO_TIME] * 4
    assert not batch.request.utc_offset_BT[0, n - 4 : n].any()
    assert not batch.request.context_BTC[0, n - 4 : n].any()


def test_words_go_on_as_the_whole_model_says(run, capsys):
    """Of several users, each against the stream of its own, anew for each word."""
    users = [str(run.data.dataset.users[find_user(run, short)]) for short in (True, False)]
    text = "a b"
    flags = [f"--user={name}" for name in users]
    assert call(run, *flags, f"--prompt={text}", f"--max_new_tokens={N_NEW}", "--json") == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [answer["user"] for answer in answers] == users
    tokenizer = TextTokenizer.load(run.folder / "tokenizer.json")
    stop = tokenizer.id_of("<|endoftext|>")
    model, catalog = run.predictor.params, run.catalog
    score = jax.jit(lambda batch: model.text_head.score(model.encode(batch, catalog).state_BTD, model.token_encoder))
    for name, answer in zip(users, answers, strict=True):
        ids, found = tokenizer.encode(text), []
        while len(found) < N_NEW:
            batch = lay_prompts(run, [name], [np.append(ids, found).astype(np.int32)], N_NEW - len(found))
            token = int(np.argmax(np.asarray(score(batch))[0, batch.kind_BT.shape[1] - 2]))
            if token == stop:
                break
            found.append(token)
        assert answer["tokens"] == found
        assert answer["n_prompt"] == len(ids)


def test_one_user_and_several_prompts(run, capsys):
    name = str(run.data.dataset.users[0])
    flags = f"--user={name}", "--prompt=a b", "--prompt=c", "--max_new_tokens=3", "--json"
    assert call(run, *flags) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [answer["user"] for answer in answers] == [name, name]
    assert answers[0]["n_prompt"] != answers[1]["n_prompt"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--user=nobody", "--prompt=a", "--max_new_tokens=3"), "no such user as 'nobody'"),
        (("--user=x", "--user=y", *["--prompt=a"] * 3), "--user: 2 users and 3 prompts"),
        (("--user=x", "--prompt=a", "--mesh=2,1,1"), "--user: text behind events needs one device"),
        (("--user=x", "--user=y", "--prompt=a", "--stream"), "--stream: one prompt is needed, not 2"),
        (("--user=x", "--prompt=a", "--max_new_tokens=99999"), "99999 are to follow"),
    ],
)
def test_bad_input_is_one_line(run, flags, line, capsys):
    flags = [flag.replace("=x", f"={run.data.dataset.users[0]}") for flag in flags]
    assert call(run, *flags) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert line in told


def test_an_empty_prompt_is_refused(run):
    name = str(run.data.dataset.users[0])
    with pytest.raises(InputError, match="prompt 2: is empty"):
        lay_prompts(run, [name, name], [np.ones(2, np.int32), np.ones(0, np.int32)], 3)
