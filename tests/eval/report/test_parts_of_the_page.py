"""What the report shows of a model, a request, sizes and differences, against the numbers they are made from."""

import dataclasses
import json
import re

import pytest

from moerec.config import AskConfig, Config, DataConfig, MoEConfig, PersonalConfig, TextConfig
from moerec.errors import InputError
from moerec.eval.report import write_report
from moerec.eval.report.language import is_language
from moerec.eval.report.picture import draw_model
from moerec.eval.report.sizes import list_parts, list_sizes
from moerec.files import to_plain
from tests.eval import test_report
from tests.eval.test_report import SERVICES, Page, make_run

EVIL = "<script>alert(1)</script>"


def full_metrics():
    """Without slices, whose charts take a second to draw."""
    return {**test_report.full_metrics(), "slices": {}}


def show(folder, metrics):
    return write_report(make_run(folder / "run", metrics, [])).read_text()


def draw(services=SERVICES, source="city", **model):
    base = Config(name="demo")
    tasks = ("lm",) if source == "text" else base.tasks
    data, shape = DataConfig(source=source, text_neighbors=64), dataclasses.replace(base.model, **model)
    config = dataclasses.replace(base, data=data, model=shape, tasks=tasks, baselines=())
    metrics = {"dataset": {"services": list(services), "n_items": 1801}}
    return draw_model(metrics, {"format": 1, **to_plain(config)})


def texts(picture):
    return " ".join(re.findall(r"<text [^>]*>(.*?)</text>", picture))


def test_the_picture_has_what_is_switched_on_and_nothing_else():
    dense = texts(draw(n_layers=3, d_ff=238))
    assert "Decoder, layers 1 to 3" in dense
    assert "width 238" in dense
    assert "1,801 items" in dense
    assert not [word for word in ("Analyser", "Profile", "expert", "pointer", "Aggregator", "Trunk") if word in dense]
    moe = MoEConfig(layers=(1,), n_per_group=12, d_expert=48, d_shared=47, n_active=3)
    mixture = texts(draw(moe=moe))
    assert "3 of 48 for a slot" in mixture
    assert "one of width 47" in mixture
    assert mixture.count("… 12") == 4  # of each group eight are drawn
    assert "Analyser" in mixture
    assert "Aggregator" not in mixture
    full = draw(
        moe=dataclasses.replace(moe, n_per_group=2, n_active=2),
        ask=AskConfig(from_layer=1, d_analyser=33),
        personal=PersonalConfig(layers=(1,), memory="delta", n_aspects=5),
        pointer="services",
        text_pointer=True,
    )
    shown = texts(full)
    for word in ("Trunk, layer 1", "Layer 2, asked", "delta, 5 aspects", "width 33", "neighbors by text", "Aggregator"):
        assert word in shown
    assert full.count('class="expert"') == 6
    assert full.count('class="cross"') == 2
    words = texts(draw(services=(), source="text", text=TextConfig(300)))
    assert "300 tokens" in words
    assert "item" not in words


def test_a_picture_of_many_services_stays_in_its_frame():
    services = [f"{EVIL} service {k}" for k in range(12)]
    picture = draw(services=services, moe=MoEConfig(layers=(1,), n_per_group=3))
    assert "<script" not in picture
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', picture)
    assert len(boxes) > 40
    for x, y, w, h in (map(float, box) for box in boxes):
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    assert draw_model({}, {"model": {"a field of another version": 1}}) is None


def item(k, p, service="kuper", text="tea"):
    return {
        "service": service,
        "id": f"i{k}",
        "text": f"{text} {k}",
        "p": p,
        "components": {"softmax": p / 4, "own": p},
    }


def make_example(rank=7.0):
    event = {"service": "kuper", "id": "i1", "text": EVIL, "action": "order", "time": "2024-07-18T12:49:23"}
    return {
        "user": "somebody",
        "time": "2024-07-19T08:00:00",
        "context": {"weather": "rain"},
        "n_history": 40,
        "history": [event, {**event, "text": "", "id": "untold"}],
        "target": {**event, "id": "i2", "text": "tea 2", "p": 0.01234, "rank": rank},
        "n_candidates": 1234,
        "items": [item(1, 0.4), item(2, 0.3), item(3, 0.2)],
        "weights": {"softmax": 0.25, "own": 0.75},
        "domain": dict.fromkeys(SERVICES, 1 / 3),
    }


def test_a_request_is_shown_with_history_list_and_what_came_next(tmp_path):
    metrics = {**full_metrics(), "example": make_example()}
    text = show(tmp_path, metrics)
    page = Page(text)
    assert "script" not in page.tags
    assert ["", "item", "p", "softmax", "own"] in page.rows
    assert ["2", "tea 2kuper", ".3000", ".0750", ".3000"] in page.rows
    assert ["2024-07-18\n12:49", "untoldkuper", "order"] in page.rows
    assert ["", "0.250", "0.750"] in page.rows
    assert "after 38 earlier ones" in text
    assert "place 7 of 1,234 candidates (p 0.01234)" in text
    assert text.count('<tr class="hit">') == 2  # in the history, and in the list
    unseen = show(tmp_path, {**metrics, "example": make_example(None)})
    assert "no candidate, since the user had it" in unseen


def test_a_request_of_an_earlier_version_is_shown_too(tmp_path):
    answer = {"weight": 0.5, "components": {"softmax": 1.0}, "items": [item(1, 0.4)], "experts": {"kuper": 0.9}}
    old = {"service": "kuper", "id": "i1", "text": "bread"}
    example = {"history": [old], "target": old, "domain": {"kuper": 1.0}, "services": {"kuper": answer}}
    text = show(tmp_path, {**full_metrics(), "example": example})
    assert "kuper: weight 0.50; softmax 1.00; experts kuper 0.90" in text
    assert "The model's list" not in text.replace("&#39;", "'")
    assert "candidates" not in text[text.index("One request") : text.index("Details")]


def test_sizes_stand_beside_settings(tmp_path):
    metrics = full_metrics()
    metrics |= {"n_active_params": 1000, "n_params_by_part": {"groups": 300, "head": 100, "final_norm": 50}}
    metrics["baseline_sizes"] = {
        "popularity": {"n_stored": 1801, "seconds": 0.01},
        "item_knn": {"n_params": 5000, "steps": 60, "seconds": 75.0},
    }
    metrics["baseline_settings"] = {"item_knn": {"decay": 0.7, "history": "own", "days": None}}
    model, popularity, knn = list_sizes(metrics)
    assert model[1:] == ("412,345 (1,000 active)", "", "2,000", "5m01s", "")
    assert popularity[1:] == ("none", "1,801", "", "< 0.1s", "")
    assert knn[1:] == ("5,000", "", "60", "1m15s", "decay 0.7, history own, days null")
    assert list_parts(metrics) == [
        ("decoder layers", "300", "66.7 %"),
        ("item head (biases, pointers, gates)", "100", "22.2 %"),
        ("norms", "50", "11.1 %"),
    ]
    page = Page(show(tmp_path, metrics))
    assert ["item kNN", "5,000", "–", "60", "1m15s", "decay 0.7, history own, days null"] in page.rows
    assert list_sizes(full_metrics())[1][1:] == ("", "", "", "", "")


def test_differences_have_intervals_and_corrected_p_values(tmp_path):
    """Holm by hand: the smallest of five times five, the next times four, and never below the one before."""
    metrics = full_metrics()

    def make_test(p, sign=1):
        return {"difference": sign * 0.0123, "interval": [-0.001, 0.025], "p_value": p}

    own = dict(zip(SERVICES, map(make_test, (0.02, 0.9, 0.5)), strict=True))
    metrics["paired"] = {"popularity": {**make_test(0.001, -1), "in_service": own}, "item_knn": {"p_value": 0.01}}
    text = show(tmp_path, metrics)
    rows = [row for row in Page(text).rows if row[0] in ("popularity", "item kNN") and len(row) == 5]
    cells = rows[0][1:]
    assert cells[0] == "−.0123−.0010 to +.0250p .0050"
    assert [cell[-5:] for cell in cells[1:]] == [".0600", "1.000", "1.000"]
    assert rows[1][1:] == ["–p .0400", "–", "–", "–"]


def test_interventions_are_corrected_for_their_number(tmp_path):
    found = {"ndcg@10": 0.1, "difference": 0.02}
    edits = {"swapped": {**found, "p_value": 0.01}, "mean": {**found, "p_value": 0.04}}
    metrics = {**full_metrics(), "probes": {"interventions": {"profile": edits}}}
    rows = Page(show(tmp_path, metrics)).rows
    assert ["profile: swapped", ".1000", "+0.0200", ".0100", ".0200"] in rows
    assert ["profile: mean", ".1000", "+0.0200", ".0400", ".0400"] in rows


def test_a_lost_component_is_shown_with_the_targets_that_fell_to_the_floor(tmp_path):
    lost = {"n": 9, "log_p": -0.119, "ndcg@10": 0.0123, "in_service_ndcg@10": -0.001}
    row = {"all": {**lost, "fell": 0.217}, "target": {"0": lost}, "last_event": {}}  # the latter of an earlier version
    text = show(tmp_path, {**full_metrics(), "probes": {"components": {"softmax": row}}})
    rows = Page(text).rows
    assert ["softmax", "-0.119", "+0.0123", "-0.0010", "22 %"] in rows
    assert ["0 (n 9)", "-0.119", "+0.0123", "-0.0010", ""] in rows
    assert "the p of a uniform guess over all items, the floor" in text


def make_language(**changes):
    found = {"nats_per_token": 2.0, "perplexity": 7.389, "bits_per_byte": 1.5, "n_tokens": 900, "n_documents": 9}
    config = Config(name="words", data=DataConfig(source="text"), tasks=("lm",), baselines=())
    sizes = {"n_tokens": 400, "n_documents": 4, "n_bytes": 777}
    of_file = {"nats_per_token": 2.0, "perplexity": 7.389, "bits_per_byte": 1.25, **sizes}
    rows = {EVIL: of_file, "none": {"n_tokens": 0, "n_documents": 0}}
    metrics = {"config": to_plain(config), "steps": 30, "n_params": 5000, "seed": 0, "wall_s": 3.0}
    return {**metrics, "tasks": {"lm": {**found, "n_bytes": 1900, "by_corpus": rows, **changes}}}


def test_a_run_on_text_has_a_page(tmp_path):
    metrics = make_language()
    assert is_language(metrics)
    figures = {"valid/lm/perplexity": 50, "valid/lm/bits_per_byte": 1.5, f"valid/lm/bits_per_byte/{EVIL}": 1.25}
    lines = [{"step": k, "loss": 3 / k, "valid/lm/nats": 4 / k, **figures} for k in (10, 20, 30)]
    text = write_report(make_run(tmp_path / "run", metrics, lines)).read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.open == []
    assert "<b>1.5000</b> bits per byte" in text
    assert [EVIL, "4", "400", "777", "2.0000", "7.39", "1.2500"] in page.rows
    assert ["all held-out documents", "9", "900", "1,900", "2.0000", "7.39", "1.5000"] in page.rows
    assert ["none", "0", "0", "–", "–", "–", "–"] in page.rows
    assert page.tags.count("svg") == 5  # the loss, bits of all and of a corpus, nats and the model
    assert "Text head" in text


def test_a_run_on_text_without_held_out_documents_has_a_page_too(tmp_path):
    metrics = make_language()
    metrics["tasks"]["lm"] = {"n_tokens": 0, "n_documents": 0}
    text = write_report(make_run(tmp_path / "run", metrics, [])).read_text()
    assert "nothing is measured" in text
    assert "Held-out documents" not in text


@pytest.mark.parametrize(
    "changes", [{"n_tokens": "many"}, {"by_corpus": {"a": {}, "b": {}}}, {"by_corpus": 3}, {"perplexity": None}]
)
def test_a_damaged_run_on_text_is_refused(tmp_path, changes):
    run = make_run(tmp_path / "run", make_language(**changes), [])
    with pytest.raises(InputError, match=r"metrics\.json: is no result of a run"):
        write_report(run)
    assert json.loads((run / "metrics.json").read_text())
