"""Texts as units: what is the same, and what never is."""

from __future__ import annotations

import pytest

from ftune.artifacts.words import folded, units

SAME = [
    ("The Eiffel Tower.", "eiffel tower"),
    ("Paris (France)", "Paris France"),
    ("(B)", "B"),
    ("**Paris**", "Paris"),
    ("`foo`", "foo"),
    ("It's", "It\u2019s"),
    ("“yes”", "yes"),
    ("Yes!", "yes"),
    ("- Paris", "Paris"),
    ("Paris — capital", "Paris, capital"),
    ("well-known", "well known"),
    ("COVID-19", "covid 19"),
    ("U.S.A.", "USA"),
    ("¿Qué?", "qué"),
    ("An apple", "apple"),
    ("A cat", "cat"),
    ("STRASSE", "straße"),
    ("```python\nx=1\n```", "x = 1"),
    ("1,000", "1000"),
    ("1'234'567.5", "1234567.5"),
    ("1\u202f000", "1000"),
    ("\u22125", "-5"),
    ("+5", "5"),
    (".5", "0.5"),
    ("5.", "5"),
    ("x + 1", "x+1"),
    ("50 %", "50%"),
    ("5kg", "5 kg"),
    ("1990–2000", "1990-2000"),
    ("[1, 2, 3]", "1, 2, 3"),
    ("Cafe\u0301", "Café"),
    ("１２", "12"),
    ("\u0663", "3"),
    ("ｶﾞ", "ガ"),
    ("❤\ufe0f", "❤"),
    ("北京。", "北京"),
    ("「東京」です", "東京です"),
    ("\u200fשלום.\u200f", "שלום"),
]
OTHER = [
    ("5", "-5"),
    ("-5", "-6"),
    ("314", "3.14"),
    ("35", "3.5"),
    ("1.5", "1,5"),
    ("5", "5%"),
    ("$5", "€5"),
    ("3/4", "34"),
    ("12:30", "1230"),
    ("1e5", "15"),
    ("1e-5", "1e5"),
    ("10%", "10‰"),
    ("5 m", "5 m²"),
    ("x²", "x2"),
    ("x-1", "x+1"),
    ("2*3", "23"),
    ("2**3", "2*3"),
    ("a<b", "a>b"),
    ("x != y", "x = y"),
    ("!x", "x"),
    ("(a+b)*c", "a+(b*c)"),
    ("(a + b) * c", "a + (b * c)"),
    ("f(g(x))", "f(g)(x)"),
    ("[0, 1)", "[0, 1]"),
    ("(0, 1)", "[0, 1]"),
    ("x_1", "x1"),
    ("a.b", "ab"),
    ("std::vector", "std vector"),
    (".NET", "NET"),
    ("C", "C++"),
    ("C#", "C"),
    ("A-", "A"),
    ("A+", "A-"),
    ("", "A"),
    ("the", "A"),
    ("A", "B"),
    ("vitamin A deficiency", "vitamin deficiency"),
    ("👍", "👎"),
    ("resume", "résumé"),
    ("ก", "ข"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same(one: str, other: str) -> None:
    assert units(one) == units(other) != ()


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_not_the_same(one: str, other: str) -> None:
    assert units(one) != units(other)


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    assert units("首都是北京") == tuple("首都是北京")
    assert units("カタカナ") == tuple("カタカナ")
    assert units("서울입니다") == tuple("서울입니다")
    assert units("น้ำ") == ("น้", "ำ"), "a vowel sign stays with its letter"
    assert units("GPT4在北京") == ("gpt4", "在", "北", "京")


def test_words_of_scripts_with_marks_stay_whole() -> None:
    assert units("हिन्दी भाषा") == ("हिन्दी", "भाषा")
    assert units("مَرْحَبًا بك") == ("مَرْحَبًا", "بك")


def test_a_long_text_takes_no_time() -> None:
    assert len(units("((((" * 5000 + "a - b " * 20000)) > 20000


def test_folding_loses_nothing_that_is_seen() -> None:
    assert folded(" A.\u00a0B! ") == "A.\u00a0B!"
