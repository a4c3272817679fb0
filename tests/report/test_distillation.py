"""The report of a distillation must show the whole run and let nothing of the user's data act as markup."""

from testing.html_page import Page

from hf_dissect.report.distillation import write_distillation_report

SCRIPT = "<script>alert(1)</script>"
METRICS = {
    "name": "amid-tiny",
    "method": "amid",
    "term_weights": {"task": 1.0, "entropy": 0.25},
    "student": "depth",
    "auxiliaries": ["skeleton", "inertial"],
    "seed": 3,
    "steps": 40,
    "final": {"student_accuracy": 0.7125, "retrieval_R@1": 0.5},
    "warnings": ["discriminator"],
    "rows": {"complete": 12, "unlabelled": 1, "student_only": 2, "unusable": 3, "reasons": {"no label": 3}},
    "times": {"total_s": 100.0, "data_s": 10.0, "training_s": 60.0, "evaluation_s": 5.0},
    "settings": {"learning_rate": 0.125, "method": "amid"},
    "versions": {"torch": "2.13.0"},
}
LOG = [
    {"step": 20, "loss": 3.0, "information_student": 1.0, "information_auxiliary": 0.5, "teacher_accuracy": 0.5},
    {"step": 40, "loss": 2.5, "information_student": 1.25, "information_auxiliary": 0.75, "teacher_accuracy": 0.75},
    {"step": 40, "eval_student_accuracy": 0.625},
]


def report(tmp_path, metrics=METRICS, log=LOG) -> Page:
    return Page(write_distillation_report(tmp_path / "report.html", metrics, log))


def test_page_holds_everything_and_is_well_formed(tmp_path):
    page = report(tmp_path)
    assert page.problems == [] and page.stack == []
    for words in ("amid-tiny: amid", "depth", "skeleton, inertial", "saturated", "0.713", "I(T;S) ends at 1.25"):
        assert words in page.text
    for words in ("12 complete", "no label: 3", "entropy", "0.25", "learning_rate", "0.125", "2.13.0", "60.0 s"):
        assert words in page.text
    # information, accuracy in training, accuracy in evaluation, loss; nothing was logged of the discriminator
    figures = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(figures) == 4 and all(attrs["aria-label"] for attrs in figures)
    assert page.count("script") == page.count("link") == 0 and "url(" not in page.style
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.attributes("href") if value.startswith("#")} <= set(ids)


def test_missing_parts_are_said(tmp_path):
    page = report(tmp_path, METRICS | {"final": {}, "auxiliaries": [], "warnings": []}, [])
    assert "Nothing was evaluated" in page.text and "Nothing was logged" in page.text and page.problems == []
    assert "Trained with" not in page.text and "saturated" not in page.text


def test_nothing_of_the_user_becomes_markup(tmp_path):
    hostile = {"name": SCRIPT, "student": SCRIPT, "auxiliaries": [SCRIPT], "final": {SCRIPT: 1.0}}
    hostile |= {"settings": {SCRIPT: SCRIPT}, "rows": METRICS["rows"] | {"reasons": {SCRIPT: 1}}}
    page = report(tmp_path, METRICS | hostile)
    assert page.count("script") == 0 and page.problems == [] and page.text.count("alert(1)") >= 6


def test_what_the_teacher_knows_is_stated_and_not_known_is_not_zero(tmp_path):
    known = {"information_bound": -0.25, "gain": 0.9, "sentence": "the teacher knows 0.9 nats", "held_out": "9 rows"}
    unknown = dict.fromkeys(known) | {"sentence": SCRIPT, "held_out": "8 rows"}
    page = report(tmp_path, METRICS | {"information": {"before": known, "choice": unknown}})
    for words in ("Before training: the teacher knows 0.9 nats.", "-0.25", "not known", "Held out: 8 rows; 9 rows."):
        assert words in page.text
    assert page.count("script") == 0 and page.problems == []
    for missing in ({}, {"information": None}, {"information": {"before": None}}):
        assert report(tmp_path, METRICS | missing).problems == []
    assert "Nothing was measured" in report(tmp_path).text
