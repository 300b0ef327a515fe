"""The report is one well-formed file that needs no network and holds every number."""

import base64
import io
import json
import math
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from d2f_core.flow.evaluate.report import ShownPrompt, best, number, render_report
from d2f_core.flow.evaluate.results import finite

VOID = {"meta", "br", "img", "path", "use", "link"}
ROLES = ("candidate", "champion", "base")
COUNTS = [2, 4, 10, 25]


def estimate(value: float, width: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value * (1 - width), "high": value * (1 + width), "count": 943}


def metric(title: str, name: str, start: float, slope: float, *, higher: bool = False) -> dict[str, Any]:
    values = {
        role: {str(count): estimate(start * (1 + 0.3 * place) * count**slope) for count in COUNTS}
        for place, role in enumerate(ROLES)
    }
    return {"title": title, "name": name, "higher_is_better": higher, "values": values, "floor": estimate(0.9 * start)}


def example() -> dict[str, Any]:
    rules = [
        {
            "rule": "frechet@4 of the candidate is at most 21.37 (champion 21.37)",
            "holds": True,
            "interval": (-6, -3),
            "metric": "frechet_efficientnet-lite0_64d",
            "candidate": 16.44,
            "reference": 21.37,
            "bound": 21.37,
            "detectable": 2.345,
        },
        {
            "rule": "recall@10 of the candidate is at least 0.4513 (champion 0.475)",
            "holds": False,
            "interval": (-1, 0),
            "metric": "recall_efficientnet-lite0_64d",
            "candidate": 0.4123,
            "reference": 0.475,
            "bound": 0.4513,
        },
        {
            "rule": "failed@4 of the candidate is at most 0",
            "holds": True,
            "interval": None,
            "metric": "failed",
            "candidate": 0.0,
            "reference": None,
            "bound": 0.0,
        },
        {
            "rule": "memorisation: not applied, no table",
            "holds": True,
            "applied": False,
            "metric": "nearest_training",
            "candidate": None,
            "reference": None,
            "bound": None,
            "interval": None,
        },
    ]
    for rule in rules:
        rule.setdefault("detectable", None)  # fmt: skip
    verdict = {
        "passed": False,
        "against": "champion",
        "rules": rules,
        "reason": f"does not hold: {rules[1]['rule']}",
        "power": "943 prompts see a difference of 2.3",
        "notes": ["guidance differs: candidate 2, base 3"],
    }
    models = [
        {"role": role, "uri": uri, "sha256": "9f2c" * 16, "solver": solver, "guidance": 2.0, "shift": 1.0,
         "size": [64, 64], "straightness": estimate(0.2), "flow_loss": loss and estimate(loss)}
        for role, uri, solver, loss in (
            ("candidate", "models:/emoji-flow/4", "euler", 0.2871),
            ("champion", "models:/emoji-flow/3", "euler", 0.3012),
            ("base", "infra/models/emoji-sd", "ddim", None),
        )
    ]  # fmt: skip
    failed = {**metric("Share of failed images", "failed", 0.01, 0), "floor": None}
    failed["values"]["candidate"]["4"] = {"value": 0.0, "low": 0.0, "high": 0.0, "count": 943}
    suffix = "efficientnet-lite0_64d"
    return {
        "created": "2026-11-22T12:00:00+00:00",
        "models": models,
        "features": {"features": suffix, "network": "ab12" * 16, "clip": "", "uri": "efficientnet-lite0"},
        "prompts": {"uri": "s3://d2f/prompts.jsonl", "count": 943, "seed": 7},
        "reference": {"uri": "s3://d2f/datasets/openmoji", "count": 1886},
        "evaluations": COUNTS,
        "intervals": "95 %, bootstrap over images, 200 replicates",
        "metrics": {
            "frechet": metric("Fréchet distance", f"frechet_{suffix}", 30, -0.4),
            "kernel": metric("Kernel distance", f"kernel_{suffix}", 0.2, -0.5),
            "precision": metric("Precision", f"precision_{suffix}", 0.4, 0.1, higher=True),
            "recall": metric("Recall", f"recall_{suffix}", 0.3, 0.1, higher=True),
            "failed": failed,
        },
        "distance_to_candidate": {
            "name": f"distance_{suffix}",
            "values": {"base": {str(count): estimate(0.3) for count in COUNTS}},
        },
        "gate": {"metric": "frechet@4", "confidence": 0.99, "verdict": verdict},
        "promotion": None,
    }


def picture(colour: str) -> str:
    sink = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(sink, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"


def shown() -> list[ShownPrompt]:
    images = {role: (picture("red"), picture("lime"), None, picture("blue")) for role in ROLES}
    return [ShownPrompt(prompt='cat <b>face</b> & "co"', images=images), ShownPrompt(prompt="a dog", images=images)]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(example(), shown())


def test_the_page_is_well_formed_and_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.open == [] and page.scripts == 0
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "@import" not in html and "url(http" not in html


def test_every_number_is_there(html: str) -> None:
    text = Page(html).text
    for entry in example()["metrics"].values():
        assert entry["name"] in text and entry["title"] in text
        for values in entry["values"].values():
            for each in values.values():
                assert number(each["value"]) in text
                assert each["low"] == each["high"] or f"{number(each['low'])} to {number(each['high'])}" in text
    for rule in example()["gate"]["verdict"]["rules"]:
        assert rule["rule"] in text
        assert all(number(rule[name]) in text for name in ("candidate", "bound", "detectable") if rule.get(name))
    assert text.count("not applied") == 2, "in its words, and in place of holds"
    for fact in (
        "Mind: guidance differs: candidate 2, base 3",
        "943 prompts see a difference of 2.3",
        "models:/emoji-flow/4",
        "943 prompts, seed 7",
        "Gate not passed",
        "0.2871",
        "the bias is large",
    ):
        assert fact in text
    assert html.count("<svg") == 4 and html.count("data:image/png") == 2 * 3 * 3


def test_prompts_are_text_not_markup(html: str) -> None:
    assert "<b>face</b>" not in html and 'cat <b>face</b> & "co"' in Page(html).text


def test_a_passed_gate_and_a_promotion_are_said() -> None:
    results = example()
    results["gate"]["verdict"] |= {"passed": True, "reason": "all 3 rules hold against the champion"}
    results["promotion"] = "models:/emoji-flow/4 becomes @champion"
    text = Page(render_report(results, [])).text
    assert "Gate passed" in text and "All 3 rules hold" in text and "becomes @champion" in text
    assert "Same prompts" not in text


def test_the_best_of_a_column_is_marked_where_one_is_better() -> None:
    entry = example()["metrics"]["frechet"]
    assert best(entry, 4) == "candidate" and best({**entry, "higher_is_better": True}, 4) == "base"
    assert best(entry, 99) is None


def test_a_value_that_is_not_finite_is_a_dash() -> None:
    results = example()
    results["metrics"]["frechet"]["values"]["base"]["4"] = finite(
        {"value": math.nan, "low": -math.inf, "high": 1.0, "count": 9}
    )
    assert results["metrics"]["frechet"]["values"]["base"]["4"] == {"value": None, "low": None, "high": 1.0, "count": 9}
    text = Page(render_report(json.loads(json.dumps(results, allow_nan=False)), [])).text
    assert "- - to 1" in text and best(results["metrics"]["frechet"], 4) == "candidate"
