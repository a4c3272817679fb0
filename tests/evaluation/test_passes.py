"""A pass of more than a few seconds shows its bar, a shorter one nothing."""

from hf_dissect.evaluation import passes


def test_a_long_pass_shows_its_name_and_length(monkeypatch, capsys):
    monkeypatch.setattr(passes, "DELAY", 0.0)
    monkeypatch.setattr(passes.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(passes.show_pass(range(7), "scoring pairs")) == list(range(7))
    assert "scoring pairs" in (shown := capsys.readouterr().err) and "/7" in shown
    assert list(passes.show_pass(iter("ab"), "reading")) == ["a", "b"] and "reading" in capsys.readouterr().err
    assert list(passes.show_pass([1], "hidden", shown=False)) == [1] and capsys.readouterr().err == ""


def test_a_short_pass_shows_nothing(capsys):
    assert list(passes.show_pass(range(7), "scoring pairs")) == list(range(7))
    assert capsys.readouterr().err == ""
